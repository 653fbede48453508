"""Figures of the systems side by side."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from experiments.plots._style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, Row, column, select

MEASURES = (
    ("mmd", "MMD² to the targets' law\n(held-out)", "linear"),
    ("l2_ot_mean", "L2 to the optimal target\n(held-out)", "linear"),
    ("recovered", "returned to its own pair\n(training sources)", "share"),
    ("straightness", "straightness S", "log"),
    ("evaluations", "evaluations of\ndopri5 at 1e-5", "linear"),
    ("gradient_variance", "gradient variance\n(mean over d)", "log"),
    ("seconds", "training seconds", "log"),
)
COLORS = {
    "cfm": RED,
    "reflow": ORANGE,
    "cfm_independent": GREY,
    "ot_cfm": GREEN,
    "cfm_bridge": PURPLE,
    "sb_cfm": PURPLE,
    "dsbm": BLUE,
    "sde_reflow": BLUE,
}


def _color(system: str) -> str:
    return next(color for name, color in reversed(COLORS.items()) if system.startswith(name))


def _label(row: Row) -> str:
    noise = f", σ = {row['sigma']:g}" if row["sigma"] else ""
    sampler = f" ({row['sampler'].upper()})" if row["system"].startswith("dsbm") else ""
    return f"{row['system'].replace('_', ' ')}{noise}{sampler}"


def systems(rows: Sequence[Row], *, title: str) -> Figure:
    """One row of panels a problem, one panel a measure, one dot a system; dashed: the floor of the MMD."""
    names = list(dict.fromkeys(row["problem"] for row in rows))
    heights = [len(select(rows, problem=name)) + 2.2 for name in names]
    figure = Figure(figsize=(15, 0.21 * sum(heights) + 0.8), layout="constrained")
    panels = figure.subplots(len(names), len(MEASURES), squeeze=False, height_ratios=heights)
    for line, name in zip(panels, names, strict=True):
        chosen = select(rows, problem=name)
        for axes, (key, label, scale) in zip(line, MEASURES, strict=True):
            _dots(axes, chosen, key, scale)
            axes.set_xlabel(label if name == names[-1] else "", fontsize=8)
        line[0].set_yticks(range(len(chosen)), [_label(row) for row in chosen], fontsize=7)
        line[0].set_ylabel(f"{name}\n(d = {chosen[0]['dim']})", fontsize=9)
        line[0].axvline(chosen[0]["mmd_floor"] + 2 * chosen[0]["mmd_floor_std"], color=GREY, ls="--", lw=1)
    figure.suptitle(title, fontsize=9)
    return figure


def _dots(axes: Axes, rows: Sequence[Row], key: str, scale: str) -> None:
    for place, row in enumerate(rows):
        value = row.get(key)
        if value is not None and np.isfinite(value):
            axes.plot(value, place, "o", color=_color(row["system"]), ms=5)
    axes.set_yticks(range(len(rows)), [])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="both", alpha=0.3)
    axes.tick_params(labelsize=7)
    if not any(row.get(key) is not None for row in rows):
        axes.text(0.5, 0.5, "not known", transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=8)
        axes.set_xticks([])
    elif scale == "log":
        _logarithmic(axes)
    elif scale == "share":
        axes.set_xlim(-0.05, 1.05)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))


def _logarithmic(axes: Axes) -> None:
    """A logarithmic x axis with a few plain labels; linear where it would not span a factor of 3."""
    low, high = axes.dataLim.intervalx
    if high < 3 * low:
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.ticklabel_format(axis="x", useOffset=False)
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if high < 100 * low else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())


STYLES = {"dsbm": "-", "dsbm_ipf": "-.", "sde_reflow": "--"}
STYLES |= dict.fromkeys((f"{system}_exact" for system in STYLES), ":")


def rounds(rows: Sequence[Row], recursion: Sequence[Row], *, title: str) -> Figure:
    """Left: covariance of the Gaussian test by round, beside the exact recursion. Others: share of pairs returned."""
    others = [n for n in dict.fromkeys(row["problem"] for row in rows) if not n.startswith("gaussian")]
    test = [row for row in rows if row["problem"].startswith("gaussian") and row["sampler"] == "sde"]
    count = len(others) + bool(test)
    figure = Figure(figsize=(max(4.2 * count, 6.0) + 0.6, 5.6), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    if test:
        _covariances(panels.pop(0), test, recursion)
    for axes, name in zip(panels, others, strict=True):
        _shares(axes, select(rows, problem=name))
        axes.set_title(name, fontsize=10)
    figure.suptitle(title, fontsize=9)
    return figure


def _covariances(axes: Axes, rows: Sequence[Row], recursion: Sequence[Row]) -> None:
    for k, sigma in enumerate(sorted({row["sigma"] for row in recursion})):
        exact = select(recursion, sigma=sigma)
        label = "exact recursion" if k == 0 else None
        axes.plot(column(exact, "round"), column(exact, "covariance"), color=GREY, marker="x", lw=1, label=label)
        axes.axhline(exact[0]["bridge"], color=GREY, ls=":", lw=1, label="Schroedinger bridge" if k == 0 else None)
    cells = dict.fromkeys((row["problem"], row["system"], row["sigma"]) for row in rows)
    colors = dict(zip(dict.fromkeys(row["problem"] for row in rows), (BLUE, ORANGE, GREEN, PURPLE, RED), strict=False))
    for problem, system, sigma in cells:
        chosen = select(rows, problem=problem, system=system, sigma=sigma)
        style = {"color": colors.get(problem, RED), "ls": STYLES[system], "marker": "o", "ms": 4, "capsize": 2}
        label = f"{system.replace('_', ' ')}, d = {chosen[0]['dim']}, σ = {sigma:g}"
        errors = 2 * column(chosen, "covariance_error")
        axes.errorbar(column(chosen, "round"), column(chosen, "covariance"), errors, label=label, **style)
    axes.set_xlabel("round")
    axes.set_ylabel("Cov(x0, x1) per coordinate, ± 2 standard errors")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, fontsize=7)
    axes.set_title("Gaussian test", fontsize=10)


def _shares(axes: Axes, rows: Sequence[Row]) -> None:
    reflow = [row for row in rows if row["system"].startswith(("cfm", "reflow"))]
    for sigma, color in zip(sorted({row["sigma"] for row in reflow}), (RED, ORANGE), strict=False):
        chosen = select(reflow, sigma=sigma)
        label = f"ReFlow, σ = {sigma:g}"
        axes.plot(column(chosen, "round"), column(chosen, "recovered"), color=color, marker="o", ms=4, label=label)
    bridge = [row for row in rows if row["system"] in STYLES]
    colors = dict(zip(sorted({row["sigma"] for row in bridge}), (BLUE, GREEN, PURPLE, GREY), strict=False))
    for system, sigma in dict.fromkeys((row["system"], row["sigma"]) for row in bridge):
        chosen = select(bridge, system=system, sigma=sigma)
        exact = system.endswith("_exact")
        style = {"color": colors.get(sigma, GREY), "ls": STYLES[system], "marker": "x" if exact else "o", "ms": 4}
        label = f"{system.replace('_exact', '').replace('_', ' ')}, σ = {sigma:g}{', exact minimiser' if exact else ''}"
        axes.plot(column(chosen, "round"), column(chosen, "recovered"), label=label, **style)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("round")
    axes.set_ylabel("training sources returned to their own pair")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, fontsize=7)
