"""Figures of the commands' pages: numbers in, `Figure` out."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

# Okabe & Ito 2008: distinguishable with every common colour blindness.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#666666")
LINES = ("-", "--", ":")
PANEL = (4.6, 3.2)
"""Width and height of a panel, in inches."""

RATIO = 30
"""From which ratio of the largest to the smallest value on an axis is logarithmic."""

LEGEND_LINE = 0.22
"""Height of a line of a legend, in inches."""


def returned_over_sigma(result: Mapping[str, Any]) -> Figure:
    """The share of sources that the exact minimiser returns, and the perplexities, over sigma."""
    figure = Figure(figsize=(2 * PANEL[0], PANEL[1]), layout="constrained")
    left, right = figure.subplots(1, 2)
    points = sorted([*map(tuple, result["searched"]), *((row["sigma"], row["returned"]) for row in result["table"])])
    left.plot(*zip(*points, strict=True), "o-", color=COLORS[0], markersize=3, label="exact minimiser")
    for name, style in (("measured", "-"), ("predicted_of_compared", ":")):
        if isinstance(result[name], float) and result[name] > 0:
            left.axvline(result[name], color=COLORS[1], linestyle=style, label=name.split("_")[0])
    left.set(ylabel="share of sources returned", ylim=(-0.03, 1.03))
    left.legend(frameon=False)
    sigmas = [row["sigma"] for row in result["table"]]
    for i, time in enumerate(result["times"]):
        values = [row["perplexity"][i] for row in result["table"]]
        right.plot(sigmas, values, "o-", color=COLORS[i % len(COLORS)], markersize=3, label=f"t = {time:g}")
    right.set(yscale="log", ylabel="perplexity, in pairs")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set(xscale="log", xlabel="sigma, in units of x")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    return figure


def variance_over_time(results: Sequence[Mapping[str, Any]]) -> Figure:
    """The gradient variance of each flow in each time bin, as steps."""
    figure = Figure(figsize=PANEL, layout="constrained")
    axes = figure.subplots()
    for i, result in enumerate(results):
        rows = result["by_time"]
        edges = [*(row["start"] for row in rows), rows[-1]["end"]]
        values = [row["variance"] for row in rows]
        axes.stairs(values, edges, color=COLORS[i % len(COLORS)], baseline=None, label=result["flow"])
    axes.set(xlabel="t", ylabel="gradient variance of one draw")
    values = [row["variance"] for result in results for row in result["by_time"]]
    if 0 < RATIO * min(values) < max(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    if len(results) > 1:
        axes.legend(frameon=False)
    return figure


def learning_curves(curves: Sequence[tuple[str, Sequence[Mapping[str, float]]]], measures: Sequence[str]) -> Figure:
    """One panel a measure, one line a curve, over training steps; logarithmic where all values are positive."""
    rows = -(-len(measures) // 2)
    columns = min(2, len(measures))
    legend = LEGEND_LINE * -(-len(curves) // 2) if len(curves) > 1 else 0
    figure = Figure(figsize=(columns * PANEL[0], rows * PANEL[1] + legend), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, measure in zip(panels, measures, strict=False):
        values = []
        for i, (name, points) in enumerate(curves):
            line = [(point["step"], point[measure]) for point in points if measure in point]
            if line:
                style = {"color": COLORS[i % len(COLORS)], "linestyle": LINES[i // len(COLORS) % len(LINES)]}
                axes.plot(*zip(*line, strict=True), label=name, **style)
                values += [value for _, value in line]
        axes.set(xlabel="training step", ylabel=measure.replace("_", " "))
        if values and min(values) > 0:
            axes.set_yscale("log")
    for axes in panels[len(measures) :]:
        axes.set_axis_off()
    if len(curves) > 1:
        known = {name: line for axes in panels for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=2, frameon=False)
    return figure
