"""Figures of flows that are trained on pairs of images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import NullFormatter

from experiments.plots._style import BLUE, COLORS, GREEN, GREY, PURPLE, RED, Row, column, select
from experiments.plots.images import opaque

TARGETS = {
    "ot": (BLUE, "optimal target"),
    "shuffled": (RED, "shuffled target"),
    "generated": (PURPLE, "generated target"),
}


def image_rows(rows: Mapping[str, np.ndarray], *, title: str) -> Figure:
    """Strips of images, uint8 [n, h, w, c] each, one below the other with their names on the left."""
    count, height, width, _ = next(iter(rows.values())).shape
    figure = Figure(
        figsize=(0.75 * count + 1.4, 0.75 * height / width * len(rows) + 0.5),
        layout=ConstrainedLayoutEngine(w_pad=0.15),
    )
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, (name, images) in zip(panels, rows.items(), strict=True):
        spaced = np.pad(opaque(images), ((0, 0), (0, 0), (0, 1), (0, 0)))
        strip = spaced.transpose(1, 0, 2, 3).reshape(height, count * (width + 1), 4)[:, :-1]
        axes.imshow(strip, interpolation="nearest")
        axes.patch.set_visible(False)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.suptitle(title, fontsize=9)
    return figure


def pair_training(rows: Sequence[Row], *, title: str) -> Figure:
    """Both distances, gradient variance and loss while networks train: one column of distances a sigma."""
    sigmas = sorted({row["sigma"] for row in rows})
    figure = Figure(figsize=(2.6 * max(len(sigmas), 3) + 0.8, 5.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False)[:, 0]
    panels = upper.subplots(1, len(sigmas), squeeze=False, sharex=True, sharey=True)[0]
    for axes, sigma in zip(panels, sigmas, strict=True):
        chosen = select(rows, sigma=sigma)
        for target, (color, label) in TARGETS.items():
            if f"l2_{target}" in chosen[0]:
                steps = column(chosen, "step")
                axes.plot(steps, column(chosen, f"l2_{target}"), color=color, label=f"to the {label}", marker=".", ms=4)
        axes.set_title(rf"$\sigma$ = {sigma:g}", fontsize=10)
        axes.set_xlabel("training step")
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("mean L2 distance\n(training sources)")
    upper.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    for axes, key, label in zip(
        lower.subplots(1, 2, sharex=True),
        ("gradient_variance", "loss"),
        ("total gradient variance\n(loss: mean over dimensions)", "training loss\n(mean over dimensions)"),
        strict=True,
    ):
        for k, sigma in enumerate(sigmas):
            chosen = select(rows, sigma=sigma)
            color = COLORS[k % len(COLORS)]
            axes.plot(column(chosen, "step"), column(chosen, key), color=color, label=rf"$\sigma$ = {sigma:g}")
        axes.set_yscale("log")
        axes.set_xlabel("training step")
        axes.set_ylabel(label)
    lower.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


def sigma_curve(rows: Sequence[Row], minimiser: Sequence[Row], critical: Mapping[str, Any], *, title: str) -> Figure:
    """Distance to both targets against sigma, of networks and of the exact minimiser, and the critical sigma."""
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, split in zip(panels, ("train", "held_out"), strict=True):
        for target, (color, label) in TARGETS.items():
            for source, style in ((rows, "o-"), (minimiser, "x:")):
                chosen = select(source, split=split, target=target)
                chosen = sorted(chosen, key=lambda row: row["sigma"])
                if chosen:
                    name = f"{'network' if source is rows else 'exact minimiser'}, to the {label}"
                    axes.plot(column(chosen, "sigma"), column(chosen, "l2_mean"), style, color=color, label=name)
        _sigma_axis(axes, [row["sigma"] for row in rows])
        axes.set_title("training sources" if split == "train" else "held-out sources", fontsize=10)
    train = panels[0]
    train.set_ylim(bottom=0)
    train.axvline(critical["predicted"], color=GREY, ls="--", label=r"predicted $\sigma_c$")
    for name, color in (("minimiser", "black"), ("networks", GREEN)):
        if critical["measured"][name] is not None:
            train.axvline(critical["measured"][name], color=color, lw=1, label=rf"$\sigma_c$ of the {name}")
    train.set_ylabel("mean L2 distance")
    figure.legend(*train.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def _sigma_axis(axes: Axes, sigmas: Sequence[float]) -> None:
    """Logarithmic, with room for sigma = 0."""
    positive = [sigma for sigma in sigmas if sigma > 0]
    if positive:
        axes.set_xscale("symlog", linthresh=min(positive))
    axes.set_xlim(left=0)
    axes.set_xticks(sorted(set(sigmas)), [f"{sigma:g}" for sigma in sorted(set(sigmas))])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(r"noise scale $\sigma$")


def critical_sigma(swept: Mapping[str, Sequence[Row]], *, title: str) -> Figure:
    """Critical sigma against the number of pairs; and the share of pairs that networks return, by sigma."""
    figure = Figure(figsize=(9.5, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    critical = swept["critical"]
    sizes = column(critical, "pairs")
    left.fill_between(sizes, column(critical, "low"), column(critical, "high"), color=GREY, alpha=0.25, lw=0)
    left.plot(sizes, column(critical, "predicted"), "--", color=GREY, label="predicted from nearest midpoints")
    for name, color, marker in (("minimiser", "black", "x"), ("networks", GREEN, "o")):
        known = [row for row in critical if row[name] is not None]
        label = "exact minimiser" if name == "minimiser" else "trained networks"
        left.plot(column(known, "pairs"), column(known, name), marker=marker, color=color, label=label)
    left.set_xscale("log")
    left.set_xticks(sizes, [f"{int(size)}" for size in sizes])
    left.xaxis.set_minor_formatter(NullFormatter())
    left.set_ylim(bottom=0)
    left.set_xlabel("number of pairs N")
    left.set_ylabel(r"critical noise scale $\sigma_c$")
    left.legend(frameon=False, fontsize=9)
    for k, row in enumerate(critical):
        chosen = select(swept["rows"], pairs=row["pairs"], split="train", target="shuffled")
        x = column(chosen, "sigma") / row["predicted"]
        right.plot(x, column(chosen, "recovered"), "o-", color=COLORS[k % len(COLORS)], label=f"N = {row['pairs']}")
    right.axhline(0.5, color=GREY, lw=0.8)
    right.set_xlabel(r"$\sigma$ / predicted $\sigma_c$")
    right.set_ylabel("share of training sources\nthat return to their pair (networks)")
    right.set_ylim(-0.03, 1.03)
    right.legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure
