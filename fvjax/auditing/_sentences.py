"""The verdict in words for someone who never heard of it, each sentence with the numbers behind it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fvjax.auditing._types import (
    CriticalNoise,
    DataMemorization,
    GradientVariance,
    Identifiability,
    MinimiserDistance,
    OptimalTransport,
    PairMemorization,
    Settings,
    SolverSensitivity,
    Straightness,
    VelocityDistance,
)
from fvjax.auditing._verdicts import COARSE, percent
from fvjax.report import Sentence

CLOSE = 0.1
"""Relative distance of velocities below which two fields are called the same in words."""

FEW = 20
"""Training sources below which the report warns of their number."""

TESTED_DIMENSIONS = 10
"""From here on the prediction of sigma_c was tested."""


class Parts(NamedTuple):
    """The fields of an Audit that are measured."""

    pair_memorization: PairMemorization
    data_memorization: DataMemorization
    solvers: SolverSensitivity
    straightness: Straightness
    gradients: GradientVariance | None
    identifiability: Identifiability
    critical_noise: CriticalNoise
    minimiser: MinimiserDistance
    optimal_transport: OptimalTransport | None
    settings: Settings


def words(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Headline, sentences and what was not tested."""
    parts = Parts(**measured)
    sentences = [_pairs(parts.pair_memorization), *_cautions(parts), _data(parts.data_memorization)]
    sentences += [_solvers(parts), _noise(parts), _minimiser(parts.minimiser)]
    if parts.optimal_transport is not None:
        sentences.append(_optimal(parts.optimal_transport))
    if parts.gradients is not None:
        sentences.append(_gradients(parts.gradients))
    sentences.append(_straightness(parts.straightness))
    return {"headline": _headline(parts), "sentences": tuple(sentences), "not_tested": tuple(_not_tested(parts))}


def _headline(parts: Parts) -> str:
    pair = parts.pair_memorization
    back = f"{percent(pair.training.returned)} of the training sources arrive at their own target"
    text = {
        "memorizes": f"The flow memorizes its pairs: {back}, but held-out sources do not find theirs.",
        "follows a rule": f"The flow follows a rule: {back}, and held-out sources find theirs, too.",
        "lets go": f"The flow lets go of its pairs: only {back}.",
        "undecided": f"Undecided whether the flow memorizes its pairs: {pair.reason}.",
    }[pair.verdict]
    if pair.verdict in ("memorizes", "follows a rule") and pair.criterion == COARSE:
        text = text.replace("at their own target", "at their own target exactly, but most close to it", 1)
    return text + (" With another solver the answer is another one." if parts.solvers.depends else "")


def _distance(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _arrived(name: str, found: Any) -> str:
    return (
        f"{name}: own target nearest for {percent(found.returned)}, among the nearest 1% for"
        f" {percent(found.among_nearest)}, mean distance {_distance(found.to_own.mean)} to it and"
        f" {_distance(found.to_other.mean)} to the nearest other"
    )


_PAIRS = {
    "memorizes": (
        "Pair memorization: yes. A training source is carried to the target it was shown with, a source that was not"
        " trained on does not find the one the coupling gives it. The list of pairs was stored, no map was learned from"
        " it."
    ),
    "follows a rule": (
        "Pair memorization: no. Sources that were not trained on arrive where the coupling would have sent them: the"
        " pairing is a rule that the flow has learned. Whether that rule is the optimal-transport map is another"
        " question."
    ),
    "lets go": (
        "Pair memorization: no. Most training sources end nearer to another target than to their own. For arbitrary"
        " pairs (shuffled, independent, drawn anew at every step) that is what you want; a pairing that carries meaning"
        " is lost."
    ),
}
_LEVELS = {"memorizes": "bad", "follows a rule": "good", "lets go": "info", "undecided": "unsure"}


def _pairs(pair: PairMemorization) -> Sentence:
    text = _PAIRS.get(pair.verdict, f"Pair memorization: undecided. {_capital(pair.reason)}.")
    level = _LEVELS[pair.verdict]
    evidence = _arrived("training", pair.training)
    if pair.held_out is not None:
        evidence += "; " + _arrived("held out", pair.held_out)
    return Sentence(text, level, evidence)


def _cautions(parts: Parts) -> list[Sentence]:
    pair, settings = parts.pair_memorization, parts.settings
    found = []
    if pair.criterion == COARSE and pair.verdict != "lets go":
        text = (
            "The targets lie closer together than the flow is exact, so the verdict asks whether the own target is"
            " among the nearest 1% of all, not whether it is the nearest. This is usual in one and two dimensions."
        )
        evidence = (
            f"{pair.training.targets} targets, median distance to the next one {_distance(settings.target_spacing)};"
            f" mean distance to the own one {_distance(pair.training.to_own.mean)}"
        )
        found.append(Sentence(text, "info", evidence))
    if pair.training.failed:
        text = "The solver failed for some training sources; they count as not returned. Look at the field there."
        found.append(Sentence(text, "unsure", f"{pair.training.failed} of {settings.sources}"))
    if settings.sources < FEW:
        text = "There are few training sources: with two or three pairs even chance returns them."
        found.append(Sentence(text, "unsure", f"{settings.sources} sources of {settings.pairs} pairs"))
    misfit = parts.minimiser.training.to_target
    if misfit is not None and misfit >= 1:
        text = (
            "The field is no closer to the target velocity of its pairs than a field of zeros: it is not trained, or"
            " was trained on other pairs or with another interpolant. The verdicts then say little."
        )
        found.append(Sentence(text, "bad", f"relative L2 distance {_distance(misfit)} on the training paths"))
    repeated = settings.pairs - settings.distinct_targets
    if repeated:
        text = "Some training targets occur more than once. Equal targets count as one: arriving at a copy is a return."
        found.append(Sentence(text, "info", f"{settings.distinct_targets} different ones of {settings.pairs}"))
    return found


def _data(data: DataMemorization) -> Sentence:
    text, level = {
        "memorizes": ("Data memorization: yes. Samples from new sources are copies of training targets.", "bad"),
        "does not": ("Data memorization: no. Samples are not copies of training targets.", "good"),
        "undecided": (f"Data memorization: undecided. {_capital(data.reason)}.", "unsure"),
    }[data.verdict]
    if data.sources == "training" and data.verdict == "does not":
        text += " This was seen from training sources only, where copies would be most likely."
    evidence = (
        f"copies (nearest training target closer than 1/3 of the second nearest): {percent(data.fraction)} of the"
        f" samples from {data.sources} sources; new data would give {100 * data.chance.value:.2g}% ({data.chance_from})"
    )
    return Sentence(text, level, evidence)


def _solvers(parts: Parts) -> Sentence:
    solvers, spacing = parts.solvers, parts.settings.target_spacing
    median = solvers.median_disagreement
    if solvers.depends:
        text = (
            "What the flow does depends on the solver: with one most sources return to their own target, with another"
            " they do not. The field is singular or nearly so on the way; name solver and steps with every result."
        )
        level = "unsure"
    elif median is not None and spacing is not None and median > spacing:
        text = (
            "All solvers give the same verdict, but for a typical source their ends differ by more than the distance"
            " between targets: use more steps or an adaptive solver."
        )
        level = "unsure"
    else:
        text, level = "The verdict on the pairs does not depend on the solver.", "good"
    rows = "; ".join(f"{row.name}: returned {percent(row.returned)}" for row in solvers.rows)
    evidence = (
        f"{rows}; distance between the ends of a source: median {_distance(median)}, largest"
        f" {_distance(solvers.largest_disagreement)}"
    )
    return Sentence(text, level, evidence)


def _noise(parts: Parts) -> Sentence:
    noise, dim = parts.critical_noise, math.prod(parts.settings.dims)
    best, own = noise.best, noise.interpolant
    perplexity = max(parts.identifiability.by_time, key=lambda row: row.perplexity)
    if math.isinf(best):
        text = "No constant noise makes the exact minimiser let go of these pairs: they need no memory."
    elif best == 0:
        text = "The paths of the pairs meet: at half time nothing names a pair, with any noise."
    elif own >= best:
        text = (
            "The noise of the training is above the one at which the exact minimiser lets half of the pairs go: a field"
            " cannot both fit this loss and return the pairs."
        )
    else:
        text = (
            f"To make even an ideal network let go of these pairs takes constant noise of about sigma ="
            f" {best:.3g} in units of x"
            + (f"; the training had {own:.3g}" if own > 0 else "; the training had none")
            + ". Below that, only the limits of network and training stand between the flow and its pairs. Where the"
            f" pairs shall not be kept, try sigma = {best / 2:.2g} and {best:.2g}."
        )
    if dim < TESTED_DIMENSIONS and best == noise.predicted:
        text += f" The prediction is not tested below {TESTED_DIMENSIONS} dimensions and may be several times off."
    how = f"predicted {noise.predicted:.3g} ({noise.low:.2g} to {noise.high:.2g}) from {noise.predicted_pairs} pairs"
    if noise.measured is not None:
        how = f"measured {noise.measured:.3g} on {noise.measured_pairs} pairs, " + how
    evidence = (
        f"sigma_critical {how}; with the noise of the training a point of the path could come from"
        f" {perplexity.perplexity:.3g} of {parts.identifiability.pairs} pairs (t = {perplexity.t:.2g}, the most of all)"
    )
    return Sentence(text, "info", evidence)


def _minimiser(found: MinimiserDistance) -> Sentence:
    on, off = found.training.to_minimiser, None if found.held_out is None else found.held_out.to_minimiser
    name = f"the {found.reference} of its pairs"
    if on is None or on >= CLOSE:
        text = (
            f"The field is not {name}, even on their own paths: it is smoother than the pairs ask for, by its"
            " architecture, its size or the length of the training."
        )
    elif off is None:
        text = f"On the paths of its pairs the field is {name}. Between them nothing was compared."
    elif off < CLOSE and found.held_out is not None and _closer_to_target(found.held_out):
        text = (
            f"The field is {name} on their paths, and close to it off them, where the pairs lie densely; there it is"
            " closer still to the velocity of the held-out pairs."
        )
    elif off < CLOSE:
        text = f"The field is {name}, on their paths and off them: it adds nothing of its own."
    else:
        text = f"On the paths of its pairs the field is {name}; off them it is another one, which is the network's own."
    return Sentence(text, "info", "; ".join(_velocity_lines(found)))


def _closer_to_target(found: VelocityDistance) -> bool:
    own, other = found.to_target, found.minimiser_to_target
    return own is not None and other is not None and own < other


def _velocity_lines(found: MinimiserDistance) -> list[str]:
    lines = []
    for name, part in (("training paths", found.training), ("held-out paths", found.held_out)):
        if part is not None:
            line = f"{name}: relative L2 distance {_distance(part.to_minimiser)} to the {found.reference}"
            if part.to_target is not None:
                line += f", {_distance(part.to_target)} to the target velocity"
            lines.append(line)
    return lines


def _optimal(found: OptimalTransport) -> Sentence:
    if found.closer.count == 0:
        text, level = "The pairs that were carried are the optimal-transport pairs themselves.", "info"
    elif found.closer.low > 0.5:
        text, level = "Most sources arrive nearer to their optimal-transport target than to their own pair.", "good"
    elif found.closer.high < 0.5:
        text, level = "Most sources arrive nearer to their own pair than to their optimal-transport target.", "info"
    else:
        text, level = "Own pair and optimal-transport target are reached about equally often.", "unsure"
    evidence = (
        f"nearer to the optimal one: {percent(found.closer)}; mean distance to it {_distance(found.to_optimal.mean)}"
    )
    return Sentence(text, level, evidence)


def _gradients(found: GradientVariance) -> Sentence:
    scale = f"the noise scale is at least {found.draws} examples, beyond what so many draws resolve"
    if found.noise_scale is not None:
        scale = f"batches much larger than {found.noise_scale:.3g} examples average it away"
    text = (
        f"The gradient of one draw has a total variance of {found.variance:.3g}; {scale}. A low variance alone tells"
        " nothing: a flow that has stored its pairs has one, and so has a flow that has learned an exact rule."
    )
    bins = [row for row in found.by_time if row.variance is not None]
    evidence = f"{found.draws} draws, {found.parameters} parameters; loss: squared error summed over dimensions"
    if bins:
        worst = max(bins, key=lambda row: row.variance or 0)
        evidence += f"; largest at t = {worst.start:.2g} to {worst.end:.2g} ({_distance(worst.variance)})"
    layer = max(found.by_layer, key=lambda row: row.variance)
    evidence += f" and in layer {layer.name} ({_distance(layer.variance)})"
    return Sentence(text, "info", evidence)


def _straightness(found: Straightness) -> Sentence:
    if found.relative is None:
        return Sentence("Straightness could not be measured: no trajectory, or none that moves.", "unsure")
    if found.relative < 0.01:
        text = "The trajectories are straight: a single Euler step is nearly exact."
    else:
        text = "The trajectories are curved: a sampler needs several steps."
    evidence = (
        f"S = {_distance(found.mean)} +- {_distance(found.standard_error)}, {found.relative:.2g} of the squared length,"
        f" {found.count} sources"
    )
    return Sentence(text, "info", evidence)


def _not_tested(parts: Parts) -> list[str]:
    settings, noise, known = parts.settings, parts.critical_noise, parts.identifiability
    found = []
    if settings.held_out == "none":
        found.append("Sources that were not trained on: give `held_out`, pairs of the same coupling or sources alone.")
    elif settings.held_out == "sources":
        found.append("Whether the pairing carries over to new sources: the held-out sources came without targets.")
    if parts.gradients is None:
        found.append("Gradient variance: the field has no floating-point parameters.")
    elif len(parts.gradients.by_time) == 1:
        found.append("Gradient variance by time: one bin only.")
    if parts.optimal_transport is None:
        found.append("Distance to the optimal-transport map: give `ot_targets`.")
    if settings.sources < settings.pairs:
        found.append(
            f"The other {settings.pairs - settings.sources} training sources: {settings.sources} were carried."
        )
    if noise.measured is None:
        found.append(
            "sigma_critical along the minimiser's flow: too much work for these pairs, so it is predicted only."
        )
    elif noise.measured_pairs != noise.predicted_pairs:
        found.append(f"sigma_critical of all pairs: it was measured on {noise.measured_pairs} random ones.")
    if known.pairs < known.of:
        found.append(f"Identifiability among all {known.of} pairs: {known.pairs} random ones were compared.")
    found.append("Another training run: the intervals are over sources, not over seeds.")
    found.append("Quality and coverage of the samples (FID, MMD).")
    return found
