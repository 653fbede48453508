"""What a run leaves behind: results.json, tables as CSV and on the terminal, figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.common import RunFolder, table
from experiments.gaussian_mixture.page import make_page
from experiments.gaussian_mixture.problem import Row
from experiments.plots import mixture as plots
from fvjax import flows

KERNEL = (
    "squared MMD with k(x, y) = mean over b of exp(-|x - y|^2 / (2 s_b^2)); s_b = 1/4, 1/2, 1, 2, 4 times the median"
    " distance between samples of the target law (`bandwidths`), the same for all cells of one dimension"
)

TRAINED = {"solver": "", "solver_steps": "", "training_steps": "", "training_loss": ".4f"}
"""What stands beside every number: how the flow was integrated, how long its network was trained, and to what loss."""


def write(folder: RunFolder, content: Mapping[str, Any]) -> None:
    """Writes everything into `folder` and prints the tables."""
    folder.write_json("results.json", {key: part for key, part in content.items() if key != "views"})
    folder.write_csv("rows.csv", content["rows"])
    settings = content["settings"]
    solver = f"{settings['solver']} {settings['solver_steps'] or flows.TOLERANCE}"
    network = f"MLP {settings['width']} x {settings['depth']}, {settings['steps']} steps; flows from x0: {solver}"
    title = f"{settings['pairs']} random pairs, {settings['seeds']} repeats; {network}"
    figure = plots.mixture_measures(content["rows"], content["summary"], content["floors"], title=title)
    folder.write_figure("measures", figure, [*content["summary"], *content["floors"]])
    figure = plots.mixture_samples(content["views"], title=f"{title}\nfirst repeat, first two principal directions")
    points = [
        {key: view[key] for key in ("dim", "sigma", "what")} | {"x": x, "y": y}
        for view in content["views"]
        for x, y in view["points"]
    ]
    folder.write_figure("samples", figure, points)
    comparison = _beside_published(content["summary"], content["published"]["rows"])
    folder.write_report(make_page(folder, content, comparison))
    _print(content, comparison)


def _print(content: Mapping[str, Any], comparison: Sequence[Row]) -> None:
    print(f"\n{KERNEL}")
    for law in content["data"]:
        print(f"d = {law['dim']}: s_b = {', '.join(f'{width:.3g}' for width in law['bandwidths'])}")
    print("\nevery cell; mmd unbiased, _biased: V-statistic; memorized: copies among the ends of fresh sources;")
    print("recovered: training sources that end nearest to their own target; target: spare targets, random pairs")
    named = {"dim": "", "map": "", "sigma": "g", "repeat": ""}
    numbers = {"generalization_mmd": ".5f", "memorization_mmd": ".2e", "memorization_mmd_biased": ".2e"}
    numbers |= {"pair_l2_mean": ".3f", "pair_l2_std": ".3f", "recovered": ".3f", "memorized": ".3f"}
    print(table(content["rows"], named | numbers | TRAINED))
    print("\nfloors: two independent samples of the target law, mean and 95% of 200 divisions")
    print(table(content["floors"], {"dim": "", "measure": "", "n": "", "mean": ".2e", "low": ".2e", "high": ".2e"}))
    print("\nmean over repeats [95% t interval] beside the published values")
    print(table(comparison, _PUBLISHED_COLUMNS))
    print(content["published"]["note"])
    print("\nconclusions")
    for row in content["conclusions"]:
        print(f"- {row['text']}")
    print()


_PUBLISHED_COLUMNS = {
    "dim": "",
    "sigma": "g",
    "map": "",
    "generalization_mmd": "",
    "published": "",
    "memorization_mmd_biased": "",
    "published ": "",
    "pair_l2_mean": "",
}


def _beside_published(summary: Sequence[Row], published: Sequence[Row]) -> list[Row]:
    """One row for each dimension, sigma and map; the published values beside the networks'."""
    known = {(row["dim"], row["sigma"]): row for row in published}
    rows: dict[tuple[Any, ...], Row] = {}
    for entry in summary:
        key = entry["dim"], entry["sigma"], entry["map"]
        row = rows.setdefault(key, dict(zip(("dim", "sigma", "map"), key, strict=True)))
        row[entry["measure"]] = _interval(entry)
    for (dim, sigma, name), row in rows.items():
        if name == "network" and (dim, sigma) in known:
            row["published"] = f"{known[dim, sigma]['generalization_mmd']:g}"
            row["published "] = f"{known[dim, sigma]['memorization_mmd']:g}"
    order = {name: place for place, name in enumerate(("target", "network", "minimiser", "population"))}
    return sorted(rows.values(), key=lambda row: (row["dim"], order[row["map"]], row["sigma"] or 0.0))


def _interval(entry: Row) -> str:
    if entry["low"] is None:
        return f"{entry['mean']:.3g}"
    return f"{entry['mean']:.3g} [{entry['low']:.3g}, {entry['high']:.3g}]"
