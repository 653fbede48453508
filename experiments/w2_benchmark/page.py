"""The page of a Mix3ToMix10 run: what its numbers say, its tables and figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments import report
from experiments.common import RunFolder
from experiments.report import Row, tabled
from fvjax.report import Page, Section, Sentence

MEAN_MAP = 100.0
"""L2-UVP in per cent of the constant map to the mean of the targets."""

NEARER = 1.25
"""A flow ends nearer to one of two targets if the other is so many times as far, on average."""


def sentences(content: Mapping[str, Any]) -> list[Sentence]:
    """What the numbers of a run say, each with its evidence."""
    dims = [law["dim"] for law in content["data"]]
    return [
        *(sentence for dim in dims for sentence in _quality(content, dim)),
        *(sentence for dim in dims for sentence in _memorization(content, dim)),
        *_failed([*content["rows"], *content["minimiser"]]),
    ]


def headline(content: Mapping[str, Any]) -> str:
    """One sentence for the whole run: the best network of every dimension, and where shuffled pairs are returned."""
    best = []
    for law in content["data"]:
        row = min(_held_out(content["rows"], law["dim"]), key=lambda row: row["l2_uvp"])
        best.append(f"{row['l2_uvp']:.3g}% at d = {law['dim']} ({_named(row)})")
    returned = [row for row in _shuffled(content["rows"]) if _nearer(row) == "pair"]
    where = report.joined([f"d = {row['dim']} with sigma = {row['sigma']:g}" for row in returned])
    return f"Best L2-UVP of a network: {'; '.join(best)}. Shuffled pairs are returned at: {where}."


def _held_out(rows: Sequence[Row], dim: int) -> list[Row]:
    return [row for row in rows if row["split"] == "held_out" and row["dim"] == dim]


def _shuffled(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("coupling") == "shuffled" and "l2_training_mean" in row]


def _named(row: Row) -> str:
    return f"{row['coupling'].replace('_', ' ')}, sigma = {row['sigma']:g}"


def _nearer(row: Row) -> str:
    """Which of the two targets the flow's ends are nearer to: "pair", "OT" or "neither"."""
    if row["l2_training_mean"] * NEARER < row["l2_ot_mean"]:
        return "pair"
    return "OT" if row["l2_ot_mean"] * NEARER < row["l2_training_mean"] else "neither"


def _quality(content: Mapping[str, Any], dim: int) -> list[Sentence]:
    """Every coupling's best network on held-out sources against a linear map, which needs no training."""
    linear = next(r["l2_uvp"] for r in content["baselines"] if (r["dim"], r["map"]) == (dim, "linear"))
    rows, found = _held_out(content["rows"], dim), []
    for coupling in dict.fromkeys(row["coupling"] for row in rows):
        chosen = [row for row in rows if row["coupling"] == coupling]
        best = min(chosen, key=lambda row: row["l2_uvp"])
        better = best["l2_uvp"] < linear
        text = (
            f"d = {dim}, {coupling.replace('_', ' ')} pairs: L2-UVP {best['l2_uvp']:.3g}% at best (sigma ="
            f" {best['sigma']:g}), {'better' if better else 'worse'} than a linear map ({linear:.3g}%)"
        )
        text += " and than the mean of the targets (100%)." if best["l2_uvp"] > MEAN_MAP and not better else "."
        evidence = ", ".join(f"sigma {row['sigma']:g}: {row['l2_uvp']:.3g}%" for row in chosen)
        evidence += f"; {best['n']} held-out sources, {best['training_steps']} steps, one seed"
        found.append(Sentence(text, "good" if better else "bad", evidence))
    return found


def _memorization(content: Mapping[str, Any], dim: int) -> list[Sentence]:
    """Shuffled pairs: does the flow end at the wrong target that it was shown?"""
    found = []
    exact = {row["sigma"]: row for row in _shuffled(content["minimiser"]) if row["dim"] == dim}
    for row in _shuffled(content["rows"]):
        if row["dim"] != dim:
            continue
        where = f"d = {dim}, shuffled pairs, sigma = {row['sigma']:g}: the network"
        told = f"L2 {row['l2_training_mean']:.3g} to the training target, {row['l2_ot_mean']:.3g} to the optimal one"
        end = _nearer(row)
        does, level = {
            "pair": ("returns towards the wrong targets that it was shown", "bad"),
            "OT": ("has let go of the wrong targets that it was shown", "good"),
            "neither": ("ends about as far from both targets", "unsure"),
        }[end]
        evidence = f"{row['n']} training sources, final loss {row['training_loss']:.3g}"
        if row["sigma"] in exact:
            ideal = exact[row["sigma"]]
            evidence += (
                f"; exact minimiser of the same pairs {ideal['l2_training_mean']:.3g} and {ideal['l2_ot_mean']:.3g}"
            )
        found.append(Sentence(f"{where} {does}: {told}.", level, evidence))
    return found


def _failed(rows: Sequence[Row]) -> list[Sentence]:
    failed = sum(row["failed"] for row in rows)
    if not failed:
        return []
    return [Sentence(f"{failed} solves failed and are left out of every number.", "unsure", "column failed")]


def not_tested(content: Mapping[str, Any]) -> list[str]:
    """What a reader might take for shown."""
    found = ["Other seeds: one network for each cell.", "Solvers of the benchmark's own paper, beyond values given to"]
    found[1] += " `--published`."
    if not any(row["coupling"] == "ot_finite" for row in content["rows"]):
        found.append("Optimal pairs as few as the shuffled ones (`--couplings ot_finite`).")
    return found


def make_page(folder: RunFolder, content: Mapping[str, Any]) -> Page:
    """The page of a finished run, in whose folder the figures have been drawn."""
    names = report.joined([law["name"] for law in content["data"]])
    every = [*content["baselines"], *content["minimiser"], *content["rows"]]
    named = {"data": "", "map": "", "coupling": "", "sigma": "g"}
    how = {"solver": "", "solver_steps": "", "training_steps": "", "training_loss": ".4f", "failed": ""}
    labels = {
        "l2_uvp": "L2-UVP [%]",
        "l2_ot_mean": "mean L2 to OT",
        "l2_training_mean": "mean L2 to the training target",
    }
    labels["sigma_c_predicted"] = "predicted critical σ"
    held_out = [row for row in every if row["split"] == "held_out"]
    train = [row for row in every if row["split"] == "train"]
    uvp = {"l2_uvp": ".2f", "cosine": ".3f"}
    l2 = {"l2_ot_mean": ".3f", "l2_training_mean": ".3f", "sigma_c_predicted": ".2f"}
    shown = {name: report.pictures(folder, {name: text}) for name, text in TEXTS.items()}
    sections = [
        Section(
            "Held-out sources",
            [
                *tabled(
                    held_out, named | uvp | {"l2_ot_mean": ".3f"} | how, "0%: the optimal map; 100%: its mean", labels
                ),
                *tabled(content["published"], {"solver": "", "dim": ""} | uvp, "Published values, as given", labels),
                *shown["quality"],
            ],
        ),
        Section(
            "Training sources",
            [*tabled(train, named | l2 | how, "Minimiser: of the loss over the pairs", labels), *shown["memorization"]],
        ),
        Section("Training", shown["training"]),
    ]
    return report.page_of(
        folder,
        title=f"Flows on pairs with a known optimal transport: {names}",
        headline=headline(content),
        sentences=sentences(content),
        sections=sections,
        not_tested=not_tested(content),
        smoke=content["settings"]["smoke"],
    )


TEXTS = {
    "quality": (
        "L2-UVP and cosine on held-out sources by dimension, one column for each noise scale.",
        "Two rows of line charts over the dimension: networks, exact minimisers, maps without training.",
    ),
    "memorization": (
        "Shuffled pairs: distance of training sources' ends to the training and to the optimal target, over the noise.",
        "Line charts over the noise scale, one panel for each dimension. The numbers are in the table above.",
    ),
    "training": (
        "Training loss by coupling and noise, one panel for each dimension.",
        "Falling curves over the training step, coloured by coupling.",
    ),
}
