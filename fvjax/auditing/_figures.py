"""Figures of an audit: one function each, an Audit in, a matplotlib Figure out."""

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from fvjax.auditing._statistics import QUANTILES
from fvjax.auditing._types import Distances, Perplexity

if TYPE_CHECKING:
    from fvjax.auditing._result import Audit

# Okabe & Ito 2008: distinguishable with every common colour blindness.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"

LAYERS = 12
"""Layers that are drawn, those of the largest variance."""


def arrival_distances(audit: "Audit") -> Figure:
    """Distribution functions of the distance to the own target and to the nearest other one."""
    pair = audit.pair_memorization
    curves = [
        ("own target, training", pair.training.to_own, BLUE, "-"),
        ("nearest other, training", pair.training.to_other, ORANGE, "--"),
    ]
    if pair.held_out is not None:
        curves.append(("own target, held out", pair.held_out.to_own, RED, "-."))
        curves.append(("nearest other, held out", pair.held_out.to_other, GREY, ":"))
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    known = [curve for curve in curves if curve[1].count]
    floor = _floor([distances for _, distances, _, _ in known])
    for label, distances, color, style in known:
        values = np.maximum(distances.quantiles, floor)
        axes.plot(values, 100 * QUANTILES, style, color=color, label=label, lw=1.8)
    axes.set_xscale("log")
    axes.set_xlabel("distance of the arrival (units of x)")
    axes.set_ylabel("sources below (%)")
    axes.set_ylim(0, 100)
    if known:
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _floor(distances: list[Distances]) -> float:
    """What stands for distances of 0 and nearly so on the logarithmic axis: 1e-4 of the largest."""
    largest = max((max(each.quantiles) for each in distances), default=1.0)
    return 1e-4 * largest if largest > 0 else 1e-4


def solver_shares(audit: "Audit") -> Figure:
    """Returned share with its interval, one row a solver."""
    rows = audit.solvers.rows[::-1]
    figure = Figure(figsize=(6.4, 0.45 * len(rows) + 1.1), layout="constrained")
    axes = figure.subplots()
    for k, row in enumerate(rows):
        share = row.returned
        color = BLUE if row.chosen else GREY
        axes.plot([100 * share.low, 100 * share.high], [k, k], color=color, lw=2)
        axes.plot(100 * share.value, k, "o", color=color)
    axes.axvline(50, color="black", lw=0.8, ls=":")
    axes.set_yticks(range(len(rows)), [row.name + (" (chosen)" if row.chosen else "") for row in rows])
    axes.set_xlim(-3, 103)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("training sources whose nearest target is their own (%)")
    return figure


def gradient_variance(audit: "Audit") -> Figure:
    """Variance of one draw's gradient by time and by layer; the audit must have gradients."""
    found = audit.gradients
    if found is None:
        raise ValueError("audit must have gradients, got None")
    layers = sorted(found.by_layer, key=lambda row: -row.variance)[:LAYERS][::-1]
    figure = Figure(figsize=(8.2, max(3.0, 0.26 * len(layers) + 1.2)), layout="constrained")
    left, right = figure.subplots(1, 2)
    bins = found.by_time
    left.bar(
        [row.start for row in bins],
        [row.variance or 0.0 for row in bins],
        [row.end - row.start for row in bins],
        align="edge",
        color=BLUE,
        edgecolor="white",
    )
    left.set_xlabel("time t")
    left.set_ylabel("gradient variance of one draw")
    right.barh(range(len(layers)), [row.variance for row in layers], color=GREEN)
    right.set_yticks(range(len(layers)), [row.name if len(row.name) <= 28 else f"…{row.name[-27:]}" for row in layers])
    right.set_xlabel("gradient variance of one draw")
    return figure


def identifiability(audit: "Audit") -> Figure:
    """Perplexity of the pair given a point of its path: over time, and over sigma with both estimates of sigma_c."""
    found, noise = audit.identifiability, audit.critical_noise
    figure = Figure(figsize=(8.2, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _perplexities(left, [row.t for row in found.by_time], found.by_time, BLUE)
    left.set_xlabel("time t, with the noise of the training")
    left.set_xlim(0, 1)
    left.set_ylabel("possible pairs of a point")
    _perplexities(right, [row.sigma for row in found.by_sigma], found.by_sigma, GREEN)
    right.set_xscale("log")
    right.set_xticks([row.sigma for row in found.by_sigma], [f"{row.sigma:.2g}" for row in found.by_sigma])
    right.xaxis.set_minor_locator(NullLocator())
    right.set_xlabel("constant noise sigma (units of x), at t = 1/2")
    lines = (("predicted", noise.predicted, RED, "--"), ("measured", noise.measured, "black", "-"))
    shown = [line for line in lines if line[1] is not None and 0 < line[1] < np.inf]
    for name, sigma, color, style in shown:
        right.axvline(sigma or 0.0, color=color, ls=style, lw=1.2, label=f"sigma_critical, {name}")
    left.set_yscale("log")
    left.set_ylim(0.9, 1.2 * found.pairs)
    if shown:
        figure.legend(loc="outside lower right", ncols=2, frameon=False)
    return figure


def _perplexities(axes: Axes, places: list[float], rows: tuple[Perplexity, ...], color: str) -> None:
    errors = [2 * row.standard_error for row in rows]
    axes.errorbar(places, [row.perplexity for row in rows], errors, fmt="o-", color=color, capsize=3, lw=1.4)
