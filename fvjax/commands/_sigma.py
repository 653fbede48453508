"""`fvjax sigma`: at which noise do these pairs stop being told apart? From the pairs alone, without training."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from fvjax import _validate, interpolants, pairs, report
from fvjax.auditing._saved import checked_flow_arrays
from fvjax.commands._problems import read_pairs
from fvjax.commands._text import check_new, page_table, paragraph, say, table, write
from fvjax.types import Pair

SOURCES = 512
"""Most sources that are carried along the minimiser's flow, unless more are asked for."""

SUBSET, SMALLEST, OPERATIONS = 2000, 200, 4e10
"""Pairs that are compared: at most SUBSET, at least SMALLEST, and in between what takes OPERATIONS for one sigma."""

SPACINGS = 1000
"""Pairs whose distances to all others give the prediction."""

STEPS, DRAWS = 100, 256
"""Euler steps of the minimiser's flow, and draws of a perplexity."""

MULTIPLES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
"""Of the critical sigma: the rows of the table, unless others are asked for."""

CALIBRATED = 10
"""Dimensions from which on the prediction was calibrated (`fvjax.pairs.predicted_sigma_critical`)."""


@dataclass(frozen=True)
class Sigma:
    """Which noise makes these pairs unidentifiable?"""

    pairs: Annotated[
        tyro.conf.Positional[Path],
        tyro.conf.arg(metavar="PAIRS.npz", help="arrays x0 and x1, [N, *dims] each; or the folder of a saved flow"),
    ]
    interpolant: Annotated[
        Literal["constant_noise", "brownian_bridge", "smooth_bridge"],
        tyro.conf.arg(help="whose sigma; constant noise is CFM(sigma), the bridge SB-CFM and DSBM"),
    ] = "constant_noise"
    sigmas: Annotated[
        tuple[float, ...], tyro.conf.arg(help="rows of the table; default: multiples of the critical one")
    ] = ()
    times: Annotated[tuple[float, ...], tyro.conf.arg(help="columns of the table, in (0, 1)")] = (
        0.1,
        0.3,
        0.5,
        0.7,
        0.9,
    )
    subset: Annotated[
        int | None,
        tyro.conf.arg(help=f"compare that many random pairs; default all up to {SUBSET}, fewer in many dimensions"),
    ] = None
    sources: Annotated[
        int | None, tyro.conf.arg(help=f"sources that are carried along the flow; default all up to {SOURCES}")
    ] = None
    seed: Annotated[int, tyro.conf.arg(help="of every random choice")] = 0
    json: Annotated[bool, tyro.conf.arg(help="print JSON instead of text")] = False
    out: Annotated[Path | None, tyro.conf.arg(metavar="PAGE.html", help="also write a page with figures")] = None
    force: Annotated[bool, tyro.conf.arg(help="replace that page if it is there")] = False


def run(options: Sigma) -> int:
    """The command; returns its exit status."""
    check_options(options)
    arrays = read_pairs(options.pairs)
    found = Pair(arrays["x0"], arrays["x1"])
    checked_flow_arrays(found, None, None)
    result = {"file": str(options.pairs), **analyse(found, options)}
    if options.out is not None:
        write(options.out, page(result).to_html())
    if options.json:
        say(json.dumps(result, indent=1))
        return 0
    _print(result)
    if options.out is not None:
        say(f"page: {options.out}")
    return 0


def check_options(options: Sigma) -> None:
    """Refuses values that the library would refuse only later.

    Raises:
        ValueError: naming the first.
    """
    for name in ("subset", "sources"):
        value = getattr(options, name)
        if value is not None:
            _validate.positive_integer(name, value)
    if options.subset is not None and options.subset < 2:
        raise ValueError(f"subset must be >= 2, got {options.subset}")
    if options.sigmas:
        _validate.positive("sigmas", np.array(options.sigmas))
    if not options.times or not all(0 < time < 1 for time in options.times):
        raise ValueError(f"times must be in (0, 1), one at least, got {options.times}")
    if options.out is not None:
        check_new(options.out, force=options.force)


def analyse(found: Pair, options: Sigma) -> dict[str, Any]:
    """Everything that the command says, as JSON values (infinite sigmas as "inf").

    Args:
        found: the pairs, [N, *dims]; rows are read as they are needed.
        options: of the command line.

    Returns:
        predicted and measured sigma_critical, and the table over sigma and t.
    """
    factory = getattr(interpolants, options.interpolant)
    subset_key, source_key, draw_key, spacing_key = jax.random.split(jax.random.key(options.seed), 4)
    n, dim = len(found.x0), int(np.prod(found.x0.shape[1:]))
    chosen = options.subset or int(max(SMALLEST, OPERATIONS / (SOURCES * dim * STEPS)))
    size = min(n, options.subset or SUBSET, chosen)
    part = found
    if size < n:
        rows = np.sort(np.asarray(jax.random.choice(subset_key, n, (size,), replace=False)))
        part = Pair(found.x0[rows], found.x1[rows])
    part = Pair(*(jax.numpy.asarray(x) for x in part))
    sources = min(size, options.sources or SOURCES)
    some: dict[str, Any] = {"sources": sources, "key": source_key} if sources < size else {}
    critical = pairs.sigma_critical(part, interpolant=factory, steps=STEPS, **some)
    prediction = pairs.PredictedSigma(critical.predicted, critical.low, critical.high, critical.spacing)
    if size < n:
        whole: dict[str, Any] = {"sources": min(n, SPACINGS), "key": spacing_key}
        prediction = pairs.predicted_sigma_critical(found, factory, **whole)
    usable = 0 < critical.predicted < math.inf and 0 < critical.measured < math.inf
    extrapolated = critical.measured / critical.predicted * prediction.predicted if usable and size < n else None
    rows_of_table = []
    for sigma in options.sigmas or _grid(critical, part):
        returned = pairs.recovered_fraction(part, factory(sigma), steps=STEPS, **some)
        names = pairs.identifiability(
            draw_key, part, factory(sigma), jax.numpy.array(options.times, part.x0.dtype), draws=DRAWS
        )
        values = np.asarray(names.perplexity, float).tolist()
        rows_of_table.append({"sigma": float(sigma), "returned": float(returned), "perplexity": values})
    return {
        "pairs": n,
        "dims": list(found.x0.shape[1:]),
        "interpolant": options.interpolant,
        "compared_pairs": size,
        "sources": sources,
        "predicted": _plain(prediction.predicted),
        "predicted_range": [_plain(prediction.low), _plain(prediction.high)],
        "spacing": _plain(prediction.spacing),
        "measured": _plain(critical.measured),
        "predicted_of_compared": _plain(critical.predicted),
        "extrapolated": extrapolated,
        "times": list(options.times),
        "table": rows_of_table,
        "searched": [[float(s), float(r)] for s, r in zip(critical.sigmas, critical.recovered, strict=True)],
        "seed": options.seed,
    }


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _grid(critical: pairs.SigmaCritical, part: Pair) -> Sequence[float]:
    for centre in (critical.measured, critical.predicted, float(np.std(np.asarray(part.x1)))):
        if 0 < centre < math.inf:
            return [centre * multiple for multiple in MULTIPLES]
    return MULTIPLES


def sentences(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The answer in words, each sentence with the level that it has on a page."""
    n, measured, predicted = result["pairs"], result["measured"], result["predicted"]
    part = result["compared_pairs"] < n
    of = f"{result['compared_pairs']} random pairs of {n}" if part else f"these {n} pairs"
    error = ""
    if result["sources"] < result["compared_pairs"]:
        error = f" (its share has a standard error of {0.5 / math.sqrt(result['sources']):.2g})"
    said = []
    if n == 1:
        said.append(("One pair cannot be confused with another: no noise makes it unidentifiable.", "info"))
    elif measured == "inf":
        said.append((_NEVER.format(of=of), "info"))
    elif measured == 0:
        said.append((_NOT_AT_ALL.format(of=of), "info"))
    else:
        said.append((_CRITICAL.format(sigma=measured, of=of, error=error), "info"))
    if result["extrapolated"] is not None:
        ratio = measured / result["predicted_of_compared"]
        text = f"That is {ratio:.2f} times what is predicted for them. For all {n} pairs that makes sigma = "
        said.append((f"{text}{result['extrapolated']:.3g} (extrapolated, not measured).", "unsure"))
    if predicted == 0:
        said.append((_CROSSING, "bad"))
    if math.prod(result["dims"]) < CALIBRATED and n > 1:
        said.append((_FEW_DIMENSIONS.format(dims=math.prod(result["dims"])), "unsure"))
    said.append((_LIMITS, "info"))
    return said


_CRITICAL = (
    "At sigma = {sigma:.3g} the ideal network of {of} returns half of the sources to their own target{error}. With less"
    " noise a network that is expressive enough and trained for long enough memorizes them; with clearly more it"
    " cannot, because a point on the path no longer tells which pair it is of."
)
_NEVER = (
    "The ideal network of {of} returns them at every sigma that was tried: the pairing is one that a smooth map makes"
    " (a translation, an optimal map), so noise neither can nor need take it away."
)
_NOT_AT_ALL = (
    "The ideal network of {of} does not return half of the sources even at the smallest sigma that was tried: paths"
    " cross, or targets are closer than its flow is exact."
)
_CROSSING = (
    "Half of the paths or more meet another one exactly at t = 1/2: there nothing names the pair (or pairs are in the"
    " file twice; remove these)."
)
_FEW_DIMENSIONS = (
    "The prediction was calibrated for 10 or more dimensions; at {dims} it may be several times off. Go by the"
    " measured number."
)
_LIMITS = (
    "The ideal network is the exact minimiser of the loss on these pairs. A real one, trained for less long or with"
    " less capacity, lets go earlier: `fvjax audit` tells about yours."
)


def columns(result: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, tuple[str, str]]]:
    """Rows and columns of the table over sigma and t."""
    rows = []
    for row in result["table"]:
        values = {f"t{i}": value for i, value in enumerate(row["perplexity"])}
        rows.append({"sigma": row["sigma"], "returned": row["returned"], **values})
    named = {"sigma": ("sigma", ".3g"), "returned": ("returned", ".3f")}
    return rows, named | {f"t{i}": (f"t = {time:g}", ".4g") for i, time in enumerate(result["times"])}


def page(result: Mapping[str, Any]) -> report.Page:
    """The same as a page."""
    from fvjax.commands import _figures

    (headline, _), *others = sentences(result)
    low, high = result["predicted_range"]
    evidence = f"predicted {_number(result['predicted'])}, range {_number(low)} to {_number(high)}"
    others.insert(0, (f"Measured sigma_critical: {_number(result['measured'])}.", "info"))
    alternative = "Share of returned sources falls with sigma, perplexities rise with it; the table has the numbers."
    figure = report.figure_svg(_figures.returned_over_sigma(result))
    content: list[str | report.Table | report.Picture] = [
        report.Picture(figure, "Measured points, and perplexities at several times.", alternative),
        page_table(*columns(result), CAPTION),
    ]
    return report.Page(
        title=f"Critical noise of {result['file']}",
        headline=headline,
        sentences=[report.Sentence(text, level, "" if i else evidence) for i, (text, level) in enumerate(others)],
        sections=[report.Section("Over sigma", content)],
        config={key: result[key] for key in CONFIG},
        environment=report.environment(),
    )


def _print(result: Mapping[str, Any]) -> None:
    low, high = result["predicted_range"]
    say(f"{result['file']}: {result['pairs']} pairs of shape {tuple(result['dims'])}, {result['interpolant']}")
    if result["compared_pairs"] < result["pairs"] or result["sources"] < result["pairs"]:
        text = f"compared: {result['compared_pairs']} random pairs, {result['sources']} of their sources"
        say(f"{text}; --subset and --sources change that")
    say(f"\npredicted sigma_critical  {_number(result['predicted'])}  (range {_number(low)} to {_number(high)})")
    of = f"  (of {result['compared_pairs']} random pairs)" if result["compared_pairs"] < result["pairs"] else ""
    say(f"measured sigma_critical   {_number(result['measured'])}{of}\n")
    for text, _ in sentences(result):
        say(paragraph(text))
    say()
    say(paragraph(CAPTION))
    say(table(*columns(result)))


CONFIG = ("file", "pairs", "dims", "interpolant", "compared_pairs", "sources", "times", "seed")
"""What a page lists as the options of the run."""

CAPTION = (
    "returned: share of the sources that the exact minimiser takes to their own target. Columns t: number of pairs that"
    " a point x_t could have come from (perplexity; 1: it names its pair)."
)


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"
