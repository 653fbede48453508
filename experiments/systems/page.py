"""The page of the systems side by side: what their numbers say, tables and figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments import report
from experiments.common import RunFolder
from experiments.report import Row, share, tabled
from fvjax.report import Page, Section, Sentence

ERRORS = 3.0
"""Standard errors within which a covariance agrees with that of the bridge."""


def sentences(content: Mapping[str, Any]) -> list[Sentence]:
    """What the numbers of a run say, each with its evidence."""
    rows = content["rows"]
    names = list(dict.fromkeys(row["problem"] for row in rows))
    return [
        *(_pairs([row for row in rows if row["problem"] == name]) for name in names),
        *(sentence for name in names for sentence in _transport(content, name)),
        *(_escape(found) for found in content["conclusions"]),
        *_bridge(content),
        *_variance(rows),
    ]


def headline(content: Mapping[str, Any]) -> str:
    """One sentence for the whole run: how many systems return their fixed pairs, by problem."""
    found = []
    for name in dict.fromkeys(row["problem"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["problem"] == name]
        returned = [row for row in rows if _majority(row)]
        found.append(f"{len(returned)} of {len(rows)} on {name}")
    return f"Systems that return the fixed random pairs they started from: {', '.join(found)}."


def _majority(row: Row) -> bool | None:
    return share(row["recovered"], row["n_train"]).majority


def _label(row: Row) -> str:
    noise = f" σ = {row['sigma']:g}" if row["sigma"] else ""
    sampler = " (SDE)" if row["sampler"] == "sde" else ""
    return f"{row['system'].replace('_', ' ')}{noise}{sampler}"


def _pairs(rows: Sequence[Row]) -> Sentence:
    """Which systems return more than half of the training sources of one problem to their own pair."""
    returned = [row for row in rows if _majority(row)]
    unsure = [row for row in rows if _majority(row) is None]
    problem = rows[0]["problem"]
    told = ", ".join(f"{_label(row)} {row['recovered']:.0%}" for row in rows)
    evidence = f"share of {rows[0]['n_train']} training sources that end nearest to their own pair: {told}"
    if returned:
        names = report.joined([f"{_label(row)} ({row['recovered']:.0%})" for row in returned])
        text = f"{problem}: {len(returned)} of {len(rows)} systems return their fixed random pairs: {names}."
        return Sentence(text, "bad", evidence)
    if unsure:
        names = report.joined([_label(row) for row in unsure])
        return Sentence(
            f"{problem}: no system clearly returns its random pairs; undecided: {names}.", "unsure", evidence
        )
    most = max(row["recovered"] for row in rows)
    return Sentence(f"{problem}: no system returns its random pairs ({most:.1%} at most).", "good", evidence)


def _transport(content: Mapping[str, Any], problem: str) -> list[Sentence]:
    """The system that is nearest to the optimal targets from new sources, where these are known."""
    rows = [row for row in content["rows"] if row["problem"] == problem and row.get("l2_ot_mean") is not None]
    if not rows:
        return []
    best, worst = (choose(rows, key=lambda row: row["l2_ot_mean"]) for choose in (min, max))
    text = (
        f"{problem}: from new sources {_label(best)} is nearest to the optimal targets, L2 {best['l2_ot_mean']:.3g};"
        f" {_label(worst)} is furthest, {worst['l2_ot_mean']:.3g}."
    )
    base = next(row for row in content["baselines"] if row["problem"] == problem)
    random = base.get("train_l2_ot_mean")
    evidence = f"{best['n_held_out']} held-out sources"
    return [Sentence(text, "info", evidence if random is None else f"{evidence}; random targets {random:.3g}")]


def _escape(found: Row) -> Sentence:
    rival = next(key for key in found if key.endswith("_recovered") and not key.startswith("dsbm"))
    name = rival.removesuffix("_recovered").replace("_", " ")
    does = "escapes" if found["escapes"] else "does not escape"
    text = (
        f"{found['problem']}, σ = {found['sigma']:g}: DSBM {does} the pairs that {name} memorizes:"
        f" {found['dsbm_recovered']:.1%} against {found[rival]:.1%} returned."
    )
    return Sentence(text, "good" if found["escapes"] else "bad", f"{found['difference']:.3g} standard errors apart")


def _bridge(content: Mapping[str, Any]) -> list[Sentence]:
    """Covariance of DSBM's last forward round on the Gaussian test against the closed form of the bridge."""
    known = {row["sigma"]: row["bridge"] for row in content["recursion"]}
    found = []
    tests = [
        row
        for row in content["rows"]
        if row["problem"].startswith("gaussian") and row["system"].startswith("dsbm") and row["sampler"] == "sde"
    ]
    for row in tests:
        if row["sigma"] not in known:
            continue
        distance = (row["covariance"] - known[row["sigma"]]) / row["covariance_error"]
        agrees = abs(distance) <= ERRORS
        text = (
            f"{row['problem']}, σ = {row['sigma']:g}: {row['system'].replace('_', ' ')} ends at Cov(x0, x1) ="
            f" {row['covariance']:.3f}; the Schrödinger bridge has {known[row['sigma']]:.3f}."
        )
        evidence = f"{distance:+.2g} standard errors of {row['covariance_error']:.2g}; agrees within {ERRORS:g}"
        found.append(Sentence(text, "good" if agrees else "bad", evidence))
    return found


def _variance(rows: Sequence[Row]) -> list[Sentence]:
    """Whether the gradient variance tells systems that return pairs from those that do not."""
    found = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        chosen = [row for row in rows if row["problem"] == problem]
        returned = [row["gradient_variance"] for row in chosen if _majority(row)]
        free = [row["gradient_variance"] for row in chosen if _majority(row) is False]
        if not returned or not free:
            continue
        apart = max(returned) < min(free) or max(free) < min(returned)
        text = f"{problem}: the gradient variance {'tells' if apart else 'does not tell'} who returns its pairs."
        evidence = f"returning {min(returned):.2g} to {max(returned):.2g}, others {min(free):.2g} to {max(free):.2g}"
        found.append(Sentence(text, "info", evidence))
    return found


def not_tested(content: Mapping[str, Any]) -> list[str]:
    """What a reader might take for shown."""
    found = ["Other seeds: one draw of every problem, one training of every system."]
    if not any(row["problem"] == "mix3tomix10" for row in content["rows"]):
        found.append("Mix3ToMix10: its files were not given (`--data`), or it was not asked for.")
    if not any(row["problem"] == "digits" for row in content["rows"]):
        found.append("Images: no problem of this run has any.")
    found.append("Networks other than MLPs.")
    return found


NAMED = {"problem": "", "system": "", "sigma": "g", "sampler": ""}
GENERALIZATION = {"l2_ot_mean": ".3f", "l2_ot_std": ".3f", "mmd": ".5f", "mmd_floor": ".5f", "mmd_floor_std": ".5f"}
MEMORIZATION = {"train_l2_pair_mean": ".3f", "train_l2_ot_mean": ".3f", "recovered": ".3f", "memorized": ".3f"}
PRICE = {"straightness": ".3g", "evaluations": ".0f", "euler_4": ".3g", "gradient_variance": ".3g", "loss": ".4g"}
PRICE |= {"steps": "", "seconds": ".1f", "pair_seconds": ".1f"}
LABELS = {
    "l2_ot_mean": "L2 to OT, held-out",
    "l2_ot_std": "standard deviation",
    "mmd": "MMD²",
    "mmd_floor": "its floor",
    "mmd_floor_std": "floor, standard deviation",
    "train_l2_pair_mean": "L2 to the pair",
    "train_l2_ot_mean": "L2 to OT",
    "euler_4": "L2 error, Euler 4",
    "steps": "training steps",
    "seconds": "training [s]",
    "pair_seconds": "making pairs [s]",
    "covariance": "Cov(x0, x1)",
    "covariance_error": "standard error",
    "bridge": "bridge",
    "coupling_batch": "batch",
    "sinkhorn_converged": "batches converged",
    "sinkhorn_error": "largest L1 error of the marginals",
}


def make_page(folder: RunFolder, content: Mapping[str, Any]) -> Page:
    """The page of a finished run, in whose folder the figures have been drawn."""
    rows, names = content["rows"], list(dict.fromkeys(row["problem"] for row in content["rows"]))
    tests = [row for row in content["rounds"] if row["problem"].startswith("gaussian") and row["sampler"] == "sde"]
    by_round = {"problem": "", "system": "", "sigma": "g", "round": "", "covariance": ".4f", "covariance_error": ".4f"}
    plans = {"problem": "", "sigma": "g", "coupling_batch": "", "sinkhorn_converged": ".3f", "sinkhorn_error": ".2g"}
    exact = {"sigma": "g", "round": "", "covariance": ".5f", "bridge": ".5f"}
    shown = {name: report.pictures(folder, {name: text}) for name, text in TEXTS.items()}
    sections = [
        Section(
            "Who memorizes",
            [*tabled(rows, NAMED | MEMORIZATION, "Training sources", LABELS), *shown["systems"]],
        ),
        Section("Who generalizes", tabled(rows, NAMED | GENERALIZATION, "Held-out sources", LABELS)),
        Section("At which price", tabled(rows, NAMED | PRICE, "Evaluations of dopri5 at 1e-5", LABELS)),
        Section(
            "Round by round",
            [
                *tabled(tests, by_round, "Covariance on the Gaussian test, forward drift", LABELS),
                *tabled(content["recursion"] if tests else [], exact, "The same in closed form", LABELS),
                *shown["rounds"],
            ],
        ),
        Section(
            "Sinkhorn",
            tabled([row for row in rows if row["system"] == "sb_cfm"], plans, "Of the pairs of SB-CFM", LABELS),
        ),
    ]
    return report.page_of(
        folder,
        title=f"Systems side by side on {report.joined(names)}",
        headline=headline(content),
        sentences=sentences(content),
        sections=sections,
        not_tested=not_tested(content),
        smoke=content["settings"]["smoke"],
    )


TEXTS = {
    "systems": (
        "Every system on every problem: one row of panels a problem, one panel a measure, one dot a system.",
        "Dots by system, one panel for each measure. The numbers are in the tables of this page.",
    ),
    "rounds": (
        "What rounds change: the covariance on the Gaussian test, and the share of pairs that are returned.",
        "Line charts over the round of DSBM and of ReFlow. The numbers are in results.json, the covariances above.",
    ),
}
