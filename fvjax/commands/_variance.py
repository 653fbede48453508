"""`fvjax variance`: how noisy are the gradients of this network on its pairs, where, and which batch size fits?"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from fvjax import _validate, gradients, report
from fvjax.auditing._saved import Flow
from fvjax.commands._problems import FieldOptions, Named, named_flows
from fvjax.commands._text import InputError, check_new, page_table, paragraph, say, table, write
from fvjax.losses import squared_error
from fvjax.pairs import exact_gradient_moments
from fvjax.types import GradientMoments, Pair

VERIFIED = 2
"""Nodes whose gradients are compared with those of `vmap(grad)` before anything else."""

TIME_NODES = 8
"""Gauss-Legendre nodes in each time bin."""

UNUSUAL = 16
"""A batch of more than that many times the pairs is no recommendation."""

SHOWN = 30
"""Layers in the table, those with the largest variance; all of them are in the JSON."""


@dataclass(frozen=True)
class Variance(FieldOptions):
    """Gradient variance and noise scale, by time and by layer."""

    bins: Annotated[int, tyro.conf.arg(help="equal bins of the time")] = 8
    subset: Annotated[int, tyro.conf.arg(help="at most that many random pairs")] = 1024
    draws: Annotated[
        int,
        tyro.conf.arg(help="noises for each pair and time, even, where the interpolant has noise; else none are drawn"),
    ] = 8
    seed: Annotated[int, tyro.conf.arg(help="of pairs and noises that are drawn")] = 0
    json: Annotated[bool, tyro.conf.arg(help="print JSON instead of text")] = False
    out: Annotated[Path | None, tyro.conf.arg(metavar="PAGE.html", help="also write a page with a figure")] = None
    force: Annotated[bool, tyro.conf.arg(help="replace that page if it is there")] = False


def run(options: Variance) -> int:
    """The command; returns its exit status."""
    for name in ("bins", "subset"):
        _validate.positive_integer(name, getattr(options, name))
    _validate.even_integer("draws", options.draws)
    if options.out is not None:
        check_new(options.out, force=options.force)
    results = []
    for named in named_flows(options):
        result = analyse(named, options)
        results.append(result)
        if not options.json:
            _print(result)
    if options.out is not None:
        write(options.out, page(results).to_html())
    if options.json:
        say(json.dumps(results if len(results) > 1 else results[0], indent=1))
    elif options.out is not None:
        say(f"page: {options.out}")
    return 0


def analyse(named: Named, options: Variance) -> dict[str, Any]:
    """Everything that the command says of one flow, as JSON values.

    The gradient is that of the squared error, summed over dimensions, of one draw of (pair, t, z): exact in t and over
    the pairs that are taken, and over z where there is no noise.

    Raises:
        InputError: if the field has no parameters.
        FloatingPointError: if the variance is not finite.
    """
    flow = named.flow
    if not jax.tree.leaves(flow.params):
        raise InputError(f"{named.name} must have parameters to differentiate by (--params), got none")
    subset_key, noise_key = jax.random.split(jax.random.key(options.seed))
    n = len(flow.pairs.x0)
    rows: Any = slice(None)
    if options.subset < n:
        rows = np.sort(np.asarray(jax.random.choice(subset_key, n, (options.subset,), replace=False)))
    part = Pair(jnp.asarray(flow.pairs.x0[rows]), jnp.asarray(flow.pairs.x1[rows]))
    bins = _by_bin(flow, part, noise_key, options)
    whole = gradients.merge_groups(bins)
    total = float(gradients.total_variance(whole))
    if not math.isfinite(total):
        raise FloatingPointError(f"the gradient variance of {named.name} is {total}: the field is not finite somewhere")
    scale = float(gradients.gradient_noise_scale(whole))
    start, end = (float(time) for time in flow.interpolant.time_range)
    edges = np.linspace(start, end, options.bins + 1)
    variances, scales = gradients.total_variance(bins), gradients.gradient_noise_scale(bins)
    return {
        "flow": named.name,
        "field": flow.config["field"],
        "interpolant": flow.config["interpolant"],
        "pairs": n,
        "compared_pairs": len(part.x0),
        "draws": options.draws if _has_noise(flow) else None,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(flow.params)),
        "variance": total,
        "mean_square": float(_square_mean(whole)),
        "noise_scale": _plain(scale),
        "batch": suggested_batch(scale),
        "by_time": [
            {
                "start": float(edges[i]),
                "end": float(edges[i + 1]),
                "variance": float(variances[i]),
                "share": float(variances[i]) / max(float(jnp.sum(variances)), 1e-300),
                "noise_scale": _plain(float(scales[i])),
            }
            for i in range(options.bins)
        ],
        "by_layer": _by_layer(whole, total),
        "seed": options.seed,
    }


def _by_bin(flow: Flow, part: Pair, key: jax.Array, options: Variance) -> GradientMoments:
    """Moments of the gradient in each bin of the time, weight 1 each; compiled once for all bins."""
    loss = squared_error(flow.field)
    start, end = flow.interpolant.time_range
    edges = np.linspace(float(start), float(end), options.bins + 1)
    noise: dict[str, Any] = {"draws": options.draws, "key": key} if _has_noise(flow) else {}
    found: list[GradientMoments] = []
    for low, high in itertools.pairwise(edges):
        within = flow.interpolant._replace(time_range=(float(low), float(high)))
        verify = 0 if found else VERIFIED
        options_of_bin: dict[str, Any] = {"panels": 1, "time_nodes": TIME_NODES, "verify": verify, **noise}
        found.append(exact_gradient_moments(loss, flow.params, part, within, **options_of_bin))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def _has_noise(flow: Flow) -> bool:
    times = jnp.linspace(0.01, 0.99, 33)
    found = jax.vmap(flow.interpolant.coefficients)(times)
    return bool(jnp.any(found.gamma != 0) | jnp.any(found.gamma_rate != 0))


def _square_mean(moments: GradientMoments) -> jax.Array:
    return sum((jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(moments.mean)), jnp.zeros(()))


def _by_layer(moments: GradientMoments, total: float) -> list[dict[str, Any]]:
    """Leaves whose names share all but the last part are one layer."""
    layers: dict[str, dict[str, Any]] = {}
    variances = jax.tree.leaves(gradients.variance_by_leaf(moments))
    means = jax.tree_util.tree_leaves_with_path(moments.mean)
    for (path, mean), variance in zip(means, variances, strict=True):
        name = "/".join(jax.tree_util.keystr((key,), simple=True) for key in path[:-1] or path) or "params"
        layer = layers.setdefault(name, {"layer": name, "parameters": 0, "variance": 0.0, "mean_square": 0.0})
        layer["parameters"] += mean.size
        layer["variance"] += float(variance)
        layer["mean_square"] += float(jnp.sum(jnp.square(mean)))
    for layer in layers.values():
        square = layer.pop("mean_square")
        layer["share"] = layer["variance"] / max(total, 1e-300)
        layer["noise_scale"] = _plain(layer["variance"] / square if square else math.inf)
    return list(layers.values())


def suggested_batch(scale: float) -> int | None:
    """The power of two nearest to the noise scale (in logarithm), at least 1; None where it is no number.

    A batch of that size makes half of the progress that a noiseless step would (McCandlish et al. 2018).
    """
    if not math.isfinite(scale):
        return None
    return int(2 ** max(0, round(math.log2(scale)))) if scale > 1 else 1


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def sentences(result: Mapping[str, Any]) -> list[str]:
    """The answer in words."""
    said = []
    scale, batch = result["noise_scale"], result["batch"]
    if batch is None:
        said.append("The mean gradient is 0: there is no noise scale, and no batch size follows from one.")
    elif batch > UNUSUAL * result["compared_pairs"]:
        said.append(
            f"Noise scale {scale:.4g} examples, many times the number of pairs: here the mean gradient is small against"
            " the noise of a draw, as it is after convergence or on a plateau. No batch size for the whole training"
            " follows from that: ask other checkpoints."
        )
    else:
        said.append(
            f"Noise scale {scale:.4g} examples: a batch of about {batch} makes half of the progress that a step without"
            f" noise would, one of {max(1, batch // 4)} about a fifth, one of {4 * batch} about four fifths."
            " Larger ones mostly cost."
        )
        said.append(
            "That is for these parameters. The noise scale grows as the training converges and the mean gradient"
            " vanishes: ask several checkpoints, not only the last one."
        )
    worst = max(result["by_time"], key=lambda row: row["variance"])
    at = f"[{worst['start']:.3g}, {worst['end']:.3g}]"
    text = f"Most variance is at t in {at}: {worst['share']:.0%} of the sum over bins"
    layer = max(result["by_layer"], key=lambda row: row["variance"])
    said.append(f"{text}; and in the layer {layer['layer']}: {layer['share']:.0%} of the total.")
    return said


TIME_COLUMNS = {
    "start": ("t from", ".3g"),
    "end": ("to", ".3g"),
    "variance": ("variance", ".4g"),
    "share": ("share", ".3f"),
    "noise_scale": ("noise scale", ".4g"),
}
LAYER_COLUMNS = {
    "layer": ("layer", ""),
    "parameters": ("parameters", ","),
    "variance": ("variance", ".4g"),
    "share": ("share", ".3f"),
    "noise_scale": ("noise scale", ".4g"),
}


def largest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The layers with the largest variance, in the order of the network."""
    least = sorted((row["variance"] for row in rows), reverse=True)[:SHOWN][-1]
    return [row for row in rows if row["variance"] >= least]


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with "inf" and "nan" as the numbers that they stand for."""
    return [{**row, "noise_scale": float(row["noise_scale"])} for row in rows]


def page(results: Sequence[Mapping[str, Any]]) -> report.Page:
    """The same as a page: one section a flow."""
    from fvjax.commands import _figures

    alternative = "Gradient variance in each time bin; the tables have the numbers."
    figure = report.figure_svg(_figures.variance_over_time(results))
    picture = report.Picture(figure, "Gradient variance of one draw in each bin of the time.", alternative)
    sections = [report.Section("Over time", [picture])]
    for result in results:
        content = [
            page_table(numbers(result["by_time"]), TIME_COLUMNS, "By time."),
            page_table(numbers(result["by_layer"]), LAYER_COLUMNS, "By layer."),
        ]
        sections.append(report.Section(result["flow"], content))
    said = [(result["flow"], text) for result in results for text in sentences(result)]
    if len(results) == 1:
        headline, said = said[0][1], [("", text) for _, text in said[1:]]
    else:
        headline = f"Gradient variance of {len(results)} flows."
    first = results[0]
    return report.Page(
        title="Gradient variance",
        headline=headline,
        sentences=[report.Sentence(f"{name}: {text}" if name else text, "info") for name, text in said],
        sections=sections,
        config={key: first[key] for key in ("field", "pairs", "compared_pairs", "draws", "seed")}
        | {"interpolant": _interpolant(first)},
        environment=report.environment(),
    )


def _interpolant(result: Mapping[str, Any]) -> str:
    name, values = result["interpolant"]
    given = ", ".join(f"{key} = {value:g}" for key, value in values.items())
    return f"{name} ({given})" if given else str(name)


def _print(result: Mapping[str, Any]) -> None:
    say(f"{result['flow']}: {result['parameters']:,} parameters, {_interpolant(result)}")
    exact = (
        f"all {result['pairs']}"
        if result["compared_pairs"] == result["pairs"]
        else (f"{result['compared_pairs']} random pairs of the {result['pairs']} (--subset)")
    )
    noise = "" if result["draws"] is None else f", {result['draws']} noises for each pair and time (--draws)"
    say(f"pairs: {exact}; quadrature in time{noise}")
    say(f"\ngradient variance   {result['variance']:.4g}  of one draw; a batch of B has 1/B of it")
    say(f"mean gradient       {math.sqrt(result['mean_square']):.4g}")
    say(f"noise scale         {float(result['noise_scale']):.4g} examples\n")
    for text in sentences(result):
        say(paragraph(text))
    say(f"\n{table(numbers(result['by_time']), TIME_COLUMNS)}\n")
    shown = largest(result["by_layer"])
    say(table(numbers(shown), LAYER_COLUMNS))
    if len(shown) < len(result["by_layer"]):
        say(f"the {len(shown)} layers with the largest variance of {len(result['by_layer'])}; all with --json")
    say()
