"""The page of a run on pairs of images: what its numbers say, its tables and figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments import report
from experiments.common import RunFolder
from experiments.report import Row, share, tabled
from fvjax.report import Page, Section, Sentence

OWN = {"shuffled": "shuffled", "reflow": "generated", "ot": "ot"}
"""What networks of a stage are trained towards, where it lasts: independent pairs are drawn anew in each batch."""

CALLED = {"shuffled": "shuffled pairs", "reflow": "generated pairs", "ot": "optimal pairs"}
CLOSE = 0.25
"""A prediction is called right up to this relative error."""


def sentences(results: Mapping[str, Any]) -> list[Sentence]:
    """What the numbers of a run say, each with its evidence."""
    return [
        *(_returns(pair) for pair in _trained(results["rows"])),
        *_held_out(results),
        *_ideal(results),
        *_critical(results),
        *_optimality(results["optimality"]),
    ]


def headline(results: Mapping[str, Any]) -> str:
    """One sentence for the whole run."""
    settings = results["settings"]
    coupling, data = settings["coupling"], results["data"]
    verdicts: dict[bool | None, list[float]] = {True: [], False: [], None: []}
    for own, _ in _trained(results["rows"]):
        if own["stage"] == coupling:
            verdicts[share(own["recovered"], own["n"]).majority].append(own["sigma"])
    if not any(verdicts.values()):
        return f"On {data}: {_best(results, coupling)}"
    parts = [
        f"{what} at sigma = {report.numbers(verdicts[key])}"
        for key, what in ((True, "returned"), (False, "let go"), (None, "undecided"))
        if verdicts[key]
    ]
    return f"{settings['pairs']} {CALLED[coupling]} of {data}: {', '.join(parts)}."


def _trained(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Training rows of every network with a lasting target: that to its own target, and that to the optimal one."""
    train = [row for row in rows if row["split"] == "train" and row["stage"] in OWN]
    optimal = {(row["stage"], row["sigma"]): row for row in train if row["target"] == "ot"}
    return [(row, optimal[row["stage"], row["sigma"]]) for row in train if row["target"] == OWN[row["stage"]]]


def _returns(pair: tuple[Row, Row]) -> Sentence:
    own, optimal = pair
    stage, found = own["stage"], share(own["recovered"], own["n"])
    where = f"At sigma = {own['sigma']:g} the network"
    distances = f"L2 {own['l2_mean']:.2f} to the pair"
    if stage != "ot":
        distances += f", {optimal['l2_mean']:.2f} to the optimal target"
    evidence = (
        f"{found.text} of {own['n']} training sources end nearest to the target that they were trained towards;"
        f" {own['solver']} {own['steps'] or 'adaptive'}, final loss {own['loss']:.3g}"
    )
    if found.majority is None:
        return Sentence(f"{where} returns about half of its {CALLED[stage]}: {distances}.", "unsure", evidence)
    if found.majority:
        level = {"shuffled": "bad", "ot": "good"}.get(stage, "info")
        return Sentence(f"{where} returns its {CALLED[stage]}: {distances}.", level, evidence)
    text = f"{where} lets its {CALLED[stage]} go: {distances}."
    if stage == "shuffled":
        return Sentence(text, "good" if optimal["l2_mean"] < own["l2_mean"] else "unsure", evidence)
    return Sentence(text, "unsure", evidence)


def _held_out(results: Mapping[str, Any]) -> list[Sentence]:
    """Whether any sigma makes a map for new images: nearer to the optimal targets than leaving them as they are."""
    found = []
    for stage in dict.fromkeys(row["stage"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["stage"] == stage and row["split"] == "held_out"]
        best, identity = min(rows, key=lambda row: row["l2_mean"]), _identity(results)
        others = ", ".join(f"{row['l2_mean']:.2f} at sigma = {row['sigma']:g}" for row in rows)
        evidence = f"mean L2 over {best['n']} held-out sources: {others}; unmoved images {identity:.2f}"
        if best["l2_mean"] < identity:
            text = f"Trained on {stage} pairs, new images come nearest to their optimal targets at sigma = "
            found.append(Sentence(f"{text}{best['sigma']:g}: L2 {best['l2_mean']:.2f}.", "good", evidence))
        else:
            text = f"Trained on {stage} pairs, no sigma brings new images nearer to their optimal targets than they are"
            found.append(Sentence(f"{text}: L2 {best['l2_mean']:.2f} at best.", "bad", evidence))
    return found


def _identity(results: Mapping[str, Any]) -> float:
    known = {(row["baseline"], row["split"]): row["l2_mean"] for row in results["baselines"]}
    return float(known["identity", "held_out"])


def _best(results: Mapping[str, Any], stage: str) -> str:
    rows = [row for row in results["rows"] if row["stage"] == stage and row["split"] == "held_out"]
    best = min(rows, key=lambda row: row["l2_mean"])
    return (
        f"trained on {stage} pairs, new images end {best['l2_mean']:.2f} from their optimal targets at"
        f" sigma = {best['sigma']:g}, unmoved ones are {_identity(results):.2f} away."
    )


def _ideal(results: Mapping[str, Any]) -> list[Sentence]:
    """Where the network lets go of pairs that the exact minimiser still returns: that is the network, not the noise."""
    exact = {row["sigma"]: row for row in results["minimiser"] if "recovered" in row}
    found = []
    for own, _ in _trained(results["rows"]):
        ideal = exact.get(own["sigma"])
        if own["stage"] != "shuffled" or ideal is None:
            continue
        of_ideal, of_network = share(ideal["recovered"], ideal["n"]), share(own["recovered"], own["n"])
        if of_ideal.majority and of_network.majority is False:
            text = f"At sigma = {own['sigma']:g} the network lets go of pairs that an ideal network would return."
            evidence = f"returned by the exact minimiser of the same pairs: {of_ideal.text}; network: {of_network.text}"
            found.append(Sentence(text, "info", evidence))
    return found


def _critical(results: Mapping[str, Any]) -> list[Sentence]:
    rows = [*(results["sweep"] or {}).get("critical", [])]
    if results["sigma_c_predicted"] is not None:
        measured = results["sigma_c_measured"]
        rows.insert(0, {"pairs": results["settings"]["pairs"], "predicted": results["sigma_c_predicted"]} | measured)
    found = []
    for row in rows:
        networks = "outside the sigmas tried" if row["networks"] is None else f"{row['networks']:.2g}"
        right = abs(row["predicted"] / row["minimiser"] - 1) <= CLOSE
        text = (
            f"{row['pairs']} pairs: the exact minimiser lets half of them go at sigma = {row['minimiser']:.3g},"
            f" predicted {row['predicted']:.3g}; the networks: {networks}."
        )
        evidence = (
            f"prediction / measurement {row['predicted'] / row['minimiser']:.2f}; called right within {CLOSE:.0%}"
        )
        found.append(Sentence(text, "good" if right else "unsure", evidence))
    return found


def _optimality(verified: Mapping[str, Any] | None) -> list[Sentence]:
    if verified is None:
        return []
    if verified["optimal"]:
        return [
            Sentence("The pairs called optimal are: no exchange of targets is cheaper.", "good", "exact assignment")
        ]
    return [Sentence("The pairs called optimal are not: an exchange of targets is cheaper.", "bad", "exact assignment")]


def not_tested(results: Mapping[str, Any]) -> list[str]:
    """What a reader might take for shown."""
    found = ["Other seeds: one draw of the pairs, one first network."]
    if not results["data"].startswith("celeba"):
        found.insert(0, f"CelebA: the images are {results['data']}.")
    if results["optimality"] is None:
        found.append("Whether the pairs called optimal are: there are too many to check.")
    if not results["sweep"]:
        found.append("Other numbers of pairs (`--sizes`).")
    return found


L2 = {"sigma": "g", "split": "", "target": "", "l2_mean": ".3f", "l2_std": ".3f"}


def make_page(folder: RunFolder, results: Mapping[str, Any], *, notice: str, flows: Sequence[Row], smoke: bool) -> Page:
    """The page of a finished run.

    Args:
        folder: of the run, in which its figures have been drawn.
        results: what results.json holds.
        notice: what the data really are.
        flows: where each network is, rows of `report.keep_flow`.
        smoke: whether the sizes were toys.
    """
    data, settings = results["data"], results["settings"]
    how = f"{settings['solver']} {settings['solver_steps'] or 'adaptive'}, {settings['steps']} training steps"
    stage = {"stage": ""}
    drawn = {name: report.pictures(folder, {name: text}) for name, text in _texts(folder, results).items()}
    of = {part: [p for name, shown in drawn.items() if name.startswith(part) for p in shown] for part in PARTS}
    named = {"stage": "trained on", "euler_1": "L2 error, Euler 1", "euler_4": "Euler 4", "euler_16": "Euler 16"}
    named |= {"minimiser": "exact minimiser", "low": "predicted, from", "high": "to"}
    ends = L2 | {"n": "", "recovered": ".3f", "loss": ".3g"}
    rounds = {"straightness": ".3f", "euler_1": ".3f", "euler_4": ".3f", "euler_16": ".3f", "memorized": ".3f", "n": ""}
    critical = dict.fromkeys(("predicted", "low", "high", "minimiser", "networks"), ".3g")
    sections = [
        Section(
            "Data",
            [
                f"{notice}.",
                f"{settings['pairs']} training and {settings['held_out']} held-out pairs of {_shape(settings)}.",
                f"Optimal pairs from {results['ot_source']}.",
                *tabled(results["baselines"], {"baseline": "", **L2, "n": ""}, "Without training", named),
            ],
        ),
        Section("Where flows end", [*tabled(results["rows"], stage | ends, how, named), *of["sigma"][:1]]),
        Section("Images", of["images"]),
        Section(
            "The exact minimiser of the pairs",
            tabled(results["minimiser"], L2 | {"recovered": ".3f", "n": ""}, "What a network without limits would do"),
        ),
        Section(
            "Critical noise",
            [
                *tabled((results["sweep"] or {}).get("critical", []), {"pairs": "", **critical}, "By pairs", named),
                *of["sigma"][1:],
            ],
        ),
        Section(
            "Solvers",
            tabled(
                results["solvers"],
                stage | {"sigma": "g", "solver": "", "steps": "", "target": "", "l2_mean": ".3f", "n": ""},
                "Training sources; no number of steps: adaptive",
                named,
            ),
        ),
        Section(
            "Rounds of ReFlow",
            tabled(
                results["rounds"], stage | {"sigma": "g"} | rounds, "Training sources; errors against dopri5", named
            ),
        ),
        Section("Training", of["training"]),
        report.networks_section(flows),
    ]
    return report.page_of(
        folder,
        title=f"Flows on {settings['coupling']} pairs of {data}",
        headline=headline(results),
        sentences=sentences(results),
        sections=sections,
        not_tested=not_tested(results),
        smoke=smoke,
    )


PARTS = ("sigma", "images", "training")
"""What the names of figures begin with."""


def _shape(settings: Mapping[str, Any]) -> str:
    height, width, channels = settings["dims"]
    return f"{height} x {width} pixels, {channels} channel{'s' if channels > 1 else ''}"


def _texts(folder: RunFolder, results: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Caption and alternative text of every figure of the run."""
    data, found = results["data"], {}
    for name in folder.drawn:
        if name == "sigma":
            caption = "Mean L2 of the flow's ends to each target against the noise: networks and exact minimiser."
            told = [
                f"sigma {own['sigma']:g}: {own['l2_mean']:.2f} to the training, {ot['l2_mean']:.2f} to the OT target"
                for own, ot in _trained(results["rows"])
                if own["stage"] == results["settings"]["coupling"]
            ]
            found[name] = caption, f"Lines over the noise scale, {data}, training sources. {'; '.join(told)}."
        elif name == "sigma_critical":
            caption = "Critical noise by number of pairs, and the share of pairs that networks return by noise."
            found[name] = caption, f"Two line charts on {data}; their numbers are in the table above."
        elif name.startswith("images_"):
            stage, _, split = name.removeprefix("images_").partition("_")
            sources = "training" if split == "train" else "held-out"
            caption = f"{data}: {sources} sources, their targets, and where flows trained on {stage} pairs take them."
            found[name] = (
                caption,
                f"Rows of images of {data}: sources, targets and ends of flows, one row a noise scale.",
            )
        else:
            stage = name.removeprefix("training_")
            caption = f"Distances, gradient variance and loss while networks train on {stage} pairs of {data}."
            found[name] = (
                caption,
                f"Curves over the training step, one for each noise scale, on {stage} pairs of {data}.",
            )
    return found
