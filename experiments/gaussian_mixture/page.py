"""The page of a Gaussian-mixture run: what its numbers say, its tables and figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments import report
from experiments.common import RunFolder
from experiments.gaussian_mixture.problem import Row
from experiments.gaussian_mixture.statistics import CLAIMS, Claim
from experiments.report import share, tabled
from fvjax.report import Page, Section, Sentence

Verdicts = Mapping[bool | None, Sequence[Row]]
"""Rows of one claim and dimension: it came out, the opposite came out, not told apart."""


def sentences(content: Mapping[str, Any]) -> list[Sentence]:
    """What the numbers of a run say of its networks, each with its evidence."""
    dims = [law["dim"] for law in content["data"]]
    return [
        *(sentence for dim in dims for sentence in _returned(content, dim)),
        *(sentence for claim in CLAIMS for dim in dims for sentence in _claim(content["conclusions"], claim, dim)),
        *_floor(content["conclusions"]),
    ]


def headline(content: Mapping[str, Any]) -> str:
    """One sentence for the whole run."""
    pairs, found = content["settings"]["pairs"], []
    for law in content["data"]:
        rows = _of(content["summary"], law["dim"], "network", "recovered")
        told = ", ".join(f"{row['mean']:.0%} at sigma = {row['sigma']:g}" for row in rows)
        found.append(f"d = {law['dim']}: {told}")
    return f"Share of {pairs} random pairs that networks return. {'; '.join(found)}."


def _of(summary: Sequence[Row], dim: int, name: str, measure: str) -> list[Row]:
    wanted = {"dim": dim, "map": name, "measure": measure}
    return [row for row in summary if all(row[key] == value for key, value in wanted.items())]


def _returned(content: Mapping[str, Any], dim: int) -> list[Sentence]:
    """Whether networks return their training sources to their own targets, among all."""
    distances = {row["sigma"]: row["mean"] for row in _of(content["summary"], dim, "network", "pair_l2_mean")}
    exact = {row["sigma"]: row["mean"] for row in _of(content["summary"], dim, "minimiser", "recovered")}
    (chance,) = _of(content["summary"], dim, "target", "pair_l2_mean")
    found = []
    for row in _of(content["summary"], dim, "network", "recovered"):
        sigma = row["sigma"]
        of_all = share(row["mean"], content["settings"]["pairs"] * row["n"])
        does, level = {
            True: ("return their random pairs", "bad"),
            False: ("do not return their random pairs", "good"),
            None: ("return about half of their random pairs", "unsure"),
        }[of_all.majority]
        text = (
            f"d = {dim}, sigma = {sigma:g}: the networks {does}: L2 {distances[sigma]:.3g} to the pair,"
            f" {chance['mean']:.3g} between random ones."
        )
        evidence = f"{of_all.text} end nearest to their own target, {row['n']} repeats"
        if sigma in exact:
            evidence += f"; exact minimiser {exact[sigma]:.0%}"
        found.append(Sentence(text, level, evidence))
    return found


def _claim(conclusions: Sequence[Row], claim: Claim, dim: int) -> list[Sentence]:
    """One claim of the paper, over all sigmas at which it was tried."""
    rows = [r for r in conclusions if (r["claim"], r["dim"], r["map"]) == (claim.name, dim, "network")]
    if not rows:
        return []
    verdicts = {answer: [r for r in rows if r["came_out"] is answer] for answer in (True, False, None)}
    parts = [
        f"{words} at sigma = {report.numbers([row['sigma'] for row in verdicts[answer]])}"
        for answer, words in ((True, "came out"), (False, "the opposite came out"), (None, "not told apart"))
        if verdicts[answer]
    ]
    level = "good" if len(verdicts[True]) == len(rows) else "bad" if len(verdicts[False]) == len(rows) else "unsure"
    told = [f"sigma {row['sigma']:g}: {row['mean']:+.2g}{_bounds(row)}" for row in rows]
    evidence = f"{claim.measure.replace('_', ' ')} against sigma {rows[0]['reference']:g}: {', '.join(told)}"
    text = f"d = {dim}, {claim.name}: {', '.join(parts)}."
    return [Sentence(text, level, f"{evidence}; {rows[0]['n']} repeats")]


def _bounds(row: Row) -> str:
    return "" if row["low"] is None else f" [{row['low']:.2g}, {row['high']:.2g}]"


def _floor(conclusions: Sequence[Row]) -> list[Sentence]:
    """Memorization MMDs below their floor: do they mean that pairs are returned?"""
    names = {claim.name for claim in CLAIMS}
    rows = [row for row in conclusions if row["claim"] not in names and row["map"] == "network"]
    if not rows:
        return []
    true = sum(bool(row["came_out"]) for row in rows)
    text = f"A memorization MMD below its floor meant returned pairs in {true} of {len(rows)} cells of networks."
    told = [f"d = {row['dim']}, sigma {row['sigma']:g}: {row['recovered']:.0%} returned" for row in rows]
    return [Sentence(text, "good" if true == len(rows) else "unsure", "; ".join(told))]


def not_tested(content: Mapping[str, Any]) -> list[str]:
    """What a reader might take for shown."""
    settings = content["settings"]
    found = [content["published"]["note"], "Other networks, and other numbers of pairs, than those of the settings."]
    if settings["seeds"] < 2:
        found.insert(0, "Whether any difference is beyond chance: there is one repeat.")
    return found


def make_page(folder: RunFolder, content: Mapping[str, Any], comparison: Sequence[Row]) -> Page:
    """The page of a finished run.

    Args:
        folder: of the run, in which its figures have been drawn.
        content: what results.json holds.
        comparison: rows of means with intervals beside the published values.
    """
    settings, dims = content["settings"], [str(law["dim"]) for law in content["data"]]
    named = {"dim": "", "map": "", "sigma": "g", "repeat": ""}
    numbers = {"generalization_mmd": ".5f", "memorization_mmd": ".2e", "memorization_mmd_biased": ".2e"}
    numbers |= {"pair_l2_mean": ".3f", "recovered": ".3f", "memorized": ".3f", "failed": "", "training_loss": ".4f"}
    labels = {"generalization_mmd": "generalization MMD²", "memorization_mmd": "memorization MMD², unbiased"}
    labels |= {"memorization_mmd_biased": "memorization MMD², biased", "pair_l2_mean": "L2 to the pair"}
    labels |= {"published": "published generalization", "published ": "published memorization"}
    floors = {"dim": "", "measure": "", "n": "", "mean": ".2e", "low": ".2e", "high": ".2e"}
    widths = [
        f"d = {law['dim']}: widths {', '.join(f'{width:.3g}' for width in law['bandwidths'])}."
        for law in content["data"]
    ]
    beside = dict.fromkeys(("map", "generalization_mmd", "published", "memorization_mmd_biased", "published "), "")
    beside = {"dim": "", "sigma": "g"} | beside | {"pair_l2_mean": ""}
    sections = [
        Section(
            "Over the noise",
            [
                *tabled(comparison, beside, "Mean over repeats [95% t interval]", labels),
                *report.pictures(folder, TEXTS),
            ],
        ),
        Section("Every cell", tabled(content["rows"], named | numbers, "target: spare targets, random pairs", labels)),
        Section(
            "Kernel and floors",
            [
                f"{content['kernel']}.",
                *widths,
                *tabled(content["floors"], floors, "Two independent samples of the target law", {"n": "samples"}),
            ],
        ),
    ]
    law = f"{settings['modes']} Gaussians on a sphere of radius {settings['radius']:g}"
    return report.page_of(
        folder,
        title=f"Random pairs from noise to {law}, d = {report.joined(dims)}",
        headline=headline(content),
        sentences=sentences(content),
        sections=sections,
        not_tested=not_tested(content),
        smoke=settings["smoke"],
    )


TEXTS = {
    "measures": (
        "Both MMDs and the L2 to the training target over the noise, one row a dimension; bars: 95% t intervals.",
        "Panels of points with bars over the noise scale, and the floor of chance; the numbers are in the table above.",
    ),
    "samples": (
        "Training targets, and where flows end from fresh sources, in the plane of the first two principal directions.",
        "Points around the modes of the mixture, one row for each dimension, one column for each noise scale.",
    ),
}
