"""What a run leaves behind: results.json, tables as CSV and on the terminal, figures, and what follows from them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.common import RunFolder, table
from experiments.plots import systems as plots
from experiments.systems.page import GENERALIZATION, MEMORIZATION, NAMED, PRICE, make_page

Row = Mapping[str, Any]


def conclusions(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each problem whose training pairs the last ReFlow memorizes: does DSBM return fewer of them, beyond chance?

    Memorized: more than half of the training sources return to their own pair. `difference` is in standard errors of
    two independent binomial shares; `escapes` asks for more than 3 and for less than half of the sources.
    """
    found = []
    for row in rows:
        if row["system"] != "dsbm" or row["sampler"] != "ode":
            continue
        rivals = [other for other in rows if other["problem"] == row["problem"] and other["sigma"] == 0]
        rivals = [other for other in rivals if other["system"].startswith("reflow_")]
        if not rivals:
            continue
        last = rivals[-1]
        n, own, other = row["n_train"], row["recovered"], last["recovered"]
        if other <= 0.5:
            continue
        error = math.sqrt((own * (1 - own) + other * (1 - other)) / n + 1 / n**2)
        found.append(
            {
                "problem": row["problem"],
                "sigma": row["sigma"],
                "dsbm_recovered": own,
                f"{last['system']}_recovered": other,
                "difference": (other - own) / error,
                "escapes": own < 0.5 and (other - own) / error > 3,
                "dsbm_l2_pair": row["train_l2_pair_mean"],
                "dsbm_l2_ot": row.get("train_l2_ot_mean"),
            }
        )
    return found


def write(folder: RunFolder, content: Mapping[str, Any]) -> None:
    """Writes everything into `folder` and prints the tables."""
    rows, rounds, settings = content["rows"], content["rounds"], content["settings"]
    folder.write_json("results.json", content)
    folder.write_csv("rows.csv", rows)
    folder.write_csv("rounds.csv", [*rounds, *({"system": "exact"} | row for row in content["recursion"])])
    title = f"MLP {settings['width']} x {settings['depth']}, batch {settings['batch']}"
    title += f"; flows: {settings['solver']}, diffusions: {settings['path_steps']} Euler-Maruyama steps"
    folder.write_figure("systems", plots.systems(rows, title=title), rows)
    if rounds:
        figure = plots.rounds(rounds, content["recursion"], title=title)
        folder.write_figure("rounds", figure, rounds)
    folder.write_report(make_page(folder, content))
    _print(content, title)


def _print(content: Mapping[str, Any], title: str) -> None:
    rows = content["rows"]
    print(f"\n{title}")
    print("\ngeneralization: held-out sources, L2 to the optimal target; unbiased squared MMD and its floor")
    print(table(rows, NAMED | GENERALIZATION))
    print("\nmemorization: training sources, L2 to their fixed pair and to the optimal target; share returned to their")
    print("own pair (recovered); share of held-out ends that are copies of a training target (memorized)")
    print(table(rows, NAMED | MEMORIZATION))
    for row in content["baselines"]:
        others = ", ".join(f"{key} {value:.3f}" for key, value in row.items() if key.endswith("_mean"))
        print(f"random pairs of {row['problem']}: {others}")
    print("\nprice: straightness, evaluations of dopri5 at 1e-5, L2 error of 4 Euler steps, gradient variance (loss")
    print("averaged over dimensions) at the end, training steps and seconds (pairs apart)")
    print(table(rows, NAMED | PRICE))
    gaussian = [row for row in content["rounds"] if row["problem"].startswith("gaussian") and row["sampler"] == "sde"]
    if gaussian:
        print("\nCov(x0, x1) per coordinate by round of the forward drift")
        named = {"problem": "", "system": "", "sigma": "g", "round": "", "covariance": ".4f", "covariance_error": ".4f"}
        print(table(gaussian, named))
        print(table(content["recursion"], {"sigma": "g", "round": "", "covariance": ".5f", "bridge": ".5f"}))
    plans = [row for row in rows if row["system"] == "sb_cfm"]
    if plans:
        print("\nSinkhorn: share of the batches that converged, and the largest L1 error of the marginals")
        named = {
            "problem": "",
            "sigma": "g",
            "coupling_batch": "",
            "sinkhorn_converged": ".3f",
            "sinkhorn_error": ".2g",
        }
        print(table(plans, named))
    for found in content["conclusions"]:
        verdict = "escapes the pairs" if found["escapes"] else "does not escape the pairs"
        print(
            f"\n{found['problem']}, sigma = {found['sigma']:g}: DSBM {verdict}: {found['dsbm_recovered']:.3f} recovered"
        )
    print()
