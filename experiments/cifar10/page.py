"""The page of a run on images: what its numbers say, its tables and figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments import report
from experiments.common import RunFolder
from experiments.report import Row, tabled
from fvjax.report import Page, Section, Sentence

CLOSE, FAR = 1.1, 1.25
"""Held-out over training loss: up to CLOSE no sign of memorized images, above FAR a sign of it."""


def sentences(results: Mapping[str, Any]) -> list[Sentence]:
    """What the numbers of a run say, each with its evidence."""
    return [
        _loss(results),
        _distance(results),
        *_solvers(results["samples"]),
        *_variance(results["training"]),
        *_rounds(results.get("rounds", [])),
    ]


def headline(results: Mapping[str, Any]) -> str:
    """One sentence for the whole run."""
    rounds = results.get("rounds")
    after = f", {len(rounds)} rounds of ReFlow" if rounds else ""
    return (
        f"A flow from noise to {results['data']}, {results['steps']} steps{after}: loss {results['loss']:.3g} on"
        f" training images, {results['loss_test']:.3g} on held-out ones; its samples are {results['distance_test']:.3g}"
        f" from held-out images, where the two sets themselves are {results['distance_floor']:.3g} apart."
    )


def _loss(results: Mapping[str, Any]) -> Sentence:
    ratio = results["loss_test"] / results["loss"]
    told = f"loss {results['loss_test']:.3g} on held-out images, {results['loss']:.3g} on training images"
    evidence = f"ratio {ratio:.3g}; one draw of time and noise for each image, mean over dimensions"
    if ratio <= CLOSE:
        return Sentence(f"The network does as well on held-out images as on its own: {told}.", "good", evidence)
    if ratio > FAR:
        return Sentence(f"The network knows its training images: {told}.", "bad", evidence)
    return Sentence(f"The network does a little better on its training images: {told}.", "unsure", evidence)


def _distance(results: Mapping[str, Any]) -> Sentence:
    near = results["distance_test"] <= results["distance_floor"]
    text = (
        f"Samples are {'as near' if near else 'not as near'} to held-out images as training images are:"
        f" {results['distance_test']:.3g} against {results['distance_floor']:.3g}."
    )
    evidence = (
        f"Fréchet distance of {results['features']} features, {results['settings']['samples']} samples;"
        f" {results['distance_train']:.3g} to training images"
    )
    return Sentence(text, "good" if near else "unsure", evidence)


def _solvers(rows: Sequence[Row]) -> list[Sentence]:
    if len(rows) < 2:
        return []
    told = [f"{_solver(row)} {row['distance_test']:.3g} ({row['nfe']:.0f} evaluations)" for row in rows]
    best = min(rows, key=lambda row: row["distance_test"])
    return [Sentence(f"Nearest to held-out images by {_solver(best)}.", "info", ", ".join(told))]


def _solver(row: Row) -> str:
    return f"{row['solver']} {row['steps']}" if row["steps"] else f"{row['solver']} at {row['tolerance']:g}"


def _variance(rows: Sequence[Row]) -> list[Sentence]:
    """Where in time the gradient varies most at the end of training."""
    last = rows[-1] if rows else {}
    bins = [last[key] for key in sorted(last) if key.startswith("gradient_variance_bin_")]
    if len(bins) < 2:
        return []
    top, low = (bins.index(choose(bins)) for choose in (max, min))
    spans = [f"t in [{k / len(bins):g}, {(k + 1) / len(bins):g})" for k in range(len(bins))]
    text = f"At the end the gradient varies most for {spans[top]}: {bins[top]:.3g}, least for {spans[low]}:"
    text += f" {bins[low]:.3g}."
    evidence = f"step {last['step']}; at step {rows[0]['step']} in all {rows[0]['gradient_variance']:.3g},"
    return [Sentence(text, "info", f"{evidence} now {last['gradient_variance']:.3g}")]


def _rounds(rows: Sequence[Row]) -> list[Sentence]:
    if not rows:
        return []
    first, last = rows[0], rows[-1]
    straighter = last["straightness"] < first["straightness"]
    found = [
        Sentence(
            f"After {len(rows)} rounds the flow is {'straighter' if straighter else 'no straighter'}: S"
            f" {first['straightness']:.3g} in round {first['round']}, {last['straightness']:.3g} in round"
            f" {last['round']}.",
            "good" if straighter else "bad",
            f"standard errors {first['straightness_error']:.2g} and {last['straightness_error']:.2g}",
        )
    ]
    copies = [f"round {row['round']}: {row['memorized']:.1%}" for row in rows]
    low, high = last["memorized_low"], last["memorized_high"]
    text = f"Of new samples {last['memorized']:.1%} are copies of training images in round {last['round']}."
    level = "bad" if low > 0.5 else "good" if high < 0.05 else "unsure"
    found.append(Sentence(text, level, f"95% interval {low:.1%} to {high:.1%}; {', '.join(copies)}"))
    for row in rows:
        if row["pair_l2_train"] is not None:
            text = (
                f"Round {row['round']} ends {row['pair_l2_train']:.3g} from the pairs that it was trained on, and"
                f" {row['pair_l2_held_out']:.3g} from the round before on new noise."
            )
            found.append(Sentence(text, "info", f"mean L2; {row['pairs']} pairs, loss on them {row['loss_pairs']:.3g}"))
    return found


def not_tested(results: Mapping[str, Any]) -> list[str]:
    """What a reader might take for shown."""
    found = []
    if results["data"] != "cifar10":
        found.append(f"CIFAR-10: the images are {results['data']}.")
    if "inception" not in results["features"]:
        found.append(f"FID: the distance is between {results['features']} features.")
    if not results.get("rounds"):
        found.append("Whether samples are copies of training images (measured with `--rounds`).")
    return [*found, "Other seeds: one network."]


def make_page(folder: RunFolder, results: Mapping[str, Any], config: Mapping[str, Any], notice: str) -> Page:
    """The page of a finished run.

    Args:
        folder: of the run, in which its figures have been drawn.
        results: what results.json holds.
        config: the options; those of a resumed run may ask for more rounds than config.json.
        notice: what the data really are.
    """
    drawn = {name: report.pictures(folder, {name: _text(name, results)}) for name in folder.drawn}
    rounds = results.get("rounds", [])
    distances = {"solver": "", "steps": "", "tolerance": "g", "nfe": ".1f", "distance_train": ".4g"}
    distances |= {"distance_test": ".4g"}
    labels = {"steps": "solver steps", "error": "L2 to the accurate solve", "pair_l2_train": "L2 to its pairs"}
    labels |= {"pair_l2_held_out": "L2 to the round before", "loss_pairs": "loss on its pairs"}
    by_round = {"round": "", "straightness": ".4g", "straightness_error": ".2g", "memorized": ".3f", "pairs": ""}
    by_round |= {"loss_pairs": ".4g", "pair_l2_train": ".4g", "pair_l2_held_out": ".4g"}
    few = [{"round": row["round"]} | euler for row in rounds for euler in row["euler"]]
    later = [{"round": row["round"]} | found for row in rounds for found in row.get("samples", [])]
    samples = [{"round": 1} | row for row in results["samples"]] + later if rounds else results["samples"]
    caption = f"{results['settings']['samples']} samples; the two splits are {results['distance_floor']:.4g} apart"
    sections = [
        Section("Data", [f"{notice[0].upper()}{notice[1:]}. {results['settings']['images']} training images."]),
        Section(
            "Samples",
            [
                *tabled(samples, {"round": ""} | distances if rounds else distances, caption, labels),
                *_shown(drawn, "samples"),
            ],
        ),
        Section(
            "Rounds of ReFlow",
            [
                *tabled(rounds, by_round, "On the same new noise", labels | {"memorized": "copies, share"}),
                *tabled(few, {"round": "", "steps": "", "error": ".4g", **LAST}, "Samples by few Euler steps", labels),
                *_shown(drawn, "rounds"),
            ],
        ),
        Section("Training", _shown(drawn, "training")),
    ]
    return report.page_of(
        folder,
        title=f"From noise to images: {results['data']}",
        headline=headline(results),
        sentences=sentences(results),
        sections=sections,
        not_tested=not_tested(results),
        smoke=config["smoke"],
        config={**config, **results["settings"]},
    )


LAST = {"distance_train": ".4g", "distance_test": ".4g"}


def _shown(drawn: Mapping[str, Sequence[Any]], part: str) -> list[Any]:
    return [picture for name, pictures in drawn.items() if name.startswith(part) for picture in pictures]


def _text(name: str, results: Mapping[str, Any]) -> tuple[str, str]:
    """Caption and alternative text of a figure."""
    data = results["data"]
    if name == "rounds":
        return (
            "Straightness, errors and distances of few Euler steps, distance to the pairs, and copies, by round.",
            "Five panels of lines over the round or the number of Euler steps. The numbers are in the tables above.",
        )
    if name.startswith("training"):
        which = f" in round {name.removeprefix('training_round_')}" if "round" in name else ""
        return (
            f"Loss, gradient variance by time, and gradient noise scale while the network trains{which}.",
            f"Three panels of curves over the training step, {data}.",
        )
    solver = name.removeprefix("samples_").replace("_", " ")
    return f"Samples of {data}: {solver}.", f"A grid of small images that the flow drew, to look like {data}."
