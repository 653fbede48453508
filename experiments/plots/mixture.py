"""Figures of the Gaussian-mixture experiment."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.plots._style import BLUE, GREEN, GREY, ORANGE, RED, Row, column, select

MAP_STYLE = {
    "network": (RED, "o", "network"),
    "minimiser": (BLUE, "s", "exact minimiser of the pairs"),
    "population": (GREEN, "D", "minimiser of infinitely many pairs"),
}
PANELS = (
    ("generalization_mmd", "generalization MMD$^2$, unbiased"),
    ("memorization_mmd_biased", "memorization MMD$^2$, biased"),
    ("pair_l2_mean", "mean L2 to the training target"),
)


def mixture_measures(rows: Sequence[Row], summary: Sequence[Row], floors: Sequence[Row], *, title: str) -> Figure:
    """Both MMDs and the pair L2 over sigma; one row of panels a dimension, one point a repeat, bars: 95% t intervals.

    `rows` has one row for each map, dimension, sigma and repeat, `summary` and `floors` their means and the floors.
    """
    dims = list(dict.fromkeys(row["dim"] for row in rows))
    sigmas = sorted({row["sigma"] for row in rows if row["sigma"] is not None})
    figure = Figure(figsize=(11.5, 3.0 * len(dims) + 1.2), layout="constrained")
    panels = figure.subplots(len(dims), len(PANELS), squeeze=False, sharex=True)
    for line, dim in zip(panels, dims, strict=True):
        for axes, (measure, label) in zip(line, PANELS, strict=True):
            _references(axes, select(rows, dim=dim, map="target"), select(floors, dim=dim, measure=measure), measure)
            for place, name in enumerate(MAP_STYLE):
                cell = {"dim": dim, "map": name}
                _line(axes, select(rows, **cell), select(summary, **cell, measure=measure), sigmas, offset=place - 1)
            _scale(axes, measure)
            axes.set_xticks(range(len(sigmas)), [f"{sigma:g}" for sigma in sigmas])
            axes.set_xlim(-0.4, len(sigmas) - 0.6)
            axes.set_ylabel(label)
            axes.grid(axis="y", alpha=0.3)
        line[0].set_title(f"d = {dim}", loc="left")
    for axes in panels[-1]:
        axes.set_xlabel(r"noise scale $\sigma$")
    entries = {
        text: handle for axes in panels[0] for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def _references(axes: Axes, target: Sequence[Row], floor: Sequence[Row], measure: str) -> None:
    """What chance gives: the floor of an MMD as a band, the L2 of random pairs."""
    if floor:
        axes.axhspan(floor[0]["low"], floor[0]["high"], color=GREY, alpha=0.25, lw=0, label="floor: two target samples")
    else:
        axes.axhline(column(target, measure).mean(), color=GREY, ls="--", lw=1, label="random pairs")


def _scale(axes: Axes, measure: str) -> None:
    """Logarithmic but for what is around 0: an unbiased estimate may be negative, and that of a perfect copy is 0."""
    if measure == "generalization_mmd":
        axes.set_yscale("symlog", linthresh=1e-3)
        return
    if measure == "memorization_mmd_biased":
        axes.set_yscale("symlog", linthresh=1e-6)
        axes.set_ylim(-3e-7, axes.get_ylim()[1])  # it is never negative, its symmetric interval may be
        return
    axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])  # a distance of 0 lies on the axis otherwise


def _line(axes: Axes, rows: Sequence[Row], summary: Sequence[Row], sigmas: Sequence[float], *, offset: int) -> None:
    """One map: a point for each repeat, the mean, and its interval; nothing where the map has no such measure."""
    if not summary:
        return
    color, marker, label = MAP_STYLE[summary[0]["map"]]
    measure = summary[0]["measure"]
    known = sorted(summary, key=lambda row: row["sigma"])
    x = np.array([sigmas.index(row["sigma"]) for row in known]) + 0.12 * offset
    mean = column(known, "mean")
    if known[0]["low"] is not None:
        bounds = np.abs(np.stack([column(known, "low"), column(known, "high")]) - mean)
        axes.errorbar(x, mean, bounds, color=color, ls="none", capsize=3, lw=1)
    axes.plot(x, mean, color=color, marker=marker, ms=5, lw=1, label=label)
    places = [sigmas.index(row["sigma"]) + 0.12 * offset for row in rows]
    axes.plot(places, column(rows, measure), color=color, marker=".", ms=4, ls="none", alpha=0.5)


def mixture_samples(views: Sequence[Row], *, title: str) -> Figure:
    """Training targets, and where flows end from fresh sources, in a plane; one row a dimension, one column a sigma.

    `views` has rows with dim, sigma, what ("training targets", without a sigma, or "flow") and points, [n, 2].
    """
    flow = select(views, what="flow")
    dims, sigmas = list(dict.fromkeys(row["dim"] for row in views)), sorted({row["sigma"] for row in flow})
    figure = Figure(figsize=(3.2 * len(sigmas) + 1.0, 3.2 * len(dims) + 1.2), layout="constrained")
    panels = figure.subplots(len(dims), len(sigmas), squeeze=False, sharex="row", sharey="row")
    for line, dim in zip(panels, dims, strict=True):
        (known,) = select(views, dim=dim, what="training targets")
        for axes, sigma in zip(line, sigmas, strict=True):
            (ends,) = select(flow, dim=dim, sigma=sigma)
            style = {"ls": "none", "marker": "o", "alpha": 0.6, "mew": 0}
            axes.plot(*np.transpose(known["points"]), color=ORANGE, ms=4, label="training targets", **style)
            axes.plot(*np.transpose(ends["points"]), color=BLUE, ms=2.5, label="flow from fresh sources", **style)
            axes.set_aspect("equal", adjustable="box")
            axes.set_title(rf"d = {dim}, $\sigma$ = {sigma:g}", fontsize=10)
            axes.grid(alpha=0.3)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=9)
    return figure
