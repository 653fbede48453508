"""Figures of the Gaussian rotation experiment."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from experiments.plots._style import BLUE, COLORS, GREEN, GREY, ORANGE, RED, Row, column, select

FIELD_STYLE = {"ot": (BLUE, "OT field"), "pair_optimal": (RED, "pair-optimal field")}
COUPLING_STYLE = {
    "ot": (GREEN, "OT pairs"),
    "rotated": (ORANGE, "rotated pairs"),
    "independent": (BLUE, "independent pairs"),
}
ZERO = 1e-20
"""Variances below are rounding errors of zero; a logarithmic axis shows them as triangles at its bottom."""


def _angle_axis(axes: Axes) -> None:
    axes.set_xlim(-4, 184)
    axes.set_xticks(range(0, 181, 45))
    axes.set_xlabel("rotation angle of the pairs [degrees]")


def _line_and_points(axes: Axes, lines: Sequence[Row], points: Sequence[Row], style: tuple[str, str]) -> None:
    """Closed form as a line, drawn estimates with 2 standard errors as points.

    What a logarithmic axis cannot hold stands at its edges: triangles at the top for infinite, at the bottom for zero.
    """
    color, label = style
    angle, exact = column(lines, "angle"), column(lines, "exact")
    log = axes.get_yscale() == "log"
    infinite, zero = ~np.isfinite(exact), log & (exact < ZERO)
    axes.plot(angle, np.where(infinite | zero, np.nan, exact), color=color, label=label, zorder=2)
    shown = [row for row in points if np.isfinite(row["exact"]) and not (log and row["exact"] < ZERO)]
    mean, error = column(shown, "monte_carlo"), 2 * column(shown, "standard_error")
    axes.errorbar(
        column(shown, "angle"),
        mean,
        yerr=[np.minimum(error, 0.99 * mean) if log else error, error],
        color=color,
        fmt="o",
        markersize=3.5,
        capsize=2,
        zorder=3,
    )
    for chosen, height, marker in ((infinite, 0.98, "^"), (zero, 0.02, "v")):
        axes.plot(
            angle[chosen],
            np.full(chosen.sum(), height),
            marker=marker,
            ls="",
            ms=4,
            color=color,
            transform=axes.get_xaxis_transform(),
        )


def _decades(lines: Sequence[Row]) -> tuple[float, float]:
    """Limits that hold the OT field's line and six decades on either side of its top, less where nothing is there."""
    values = column(lines, "exact")
    values = values[np.isfinite(values) & (values >= ZERO)]
    if not values.size:
        return 1e-1, 1e1
    optimal = column(select(lines, field="ot"), "exact")
    optimal = optimal[np.isfinite(optimal) & (optimal >= ZERO)]
    top = optimal.max() if optimal.size else float(np.median(values))
    return max(values.min() / 10, top / 1e6), min(values.max() * 10, top * 1e6)


def variance_by_field(lines: Sequence[Row], points: Sequence[Row], *, coupling: str, title: str) -> Figure:
    """Figure 4: total gradient variance of the OT and the pair-optimal field against the angle, one panel a sigma."""
    sigmas = sorted({row["sigma"] for row in lines})
    figure = Figure(figsize=(3.1 * len(sigmas) + 0.6, 3.8), layout="constrained")
    panels = figure.subplots(1, len(sigmas), squeeze=False)[0]
    for axes, sigma in zip(panels, sigmas, strict=True):
        axes.set_yscale("log")
        axes.set_ylim(*_decades(select(lines, coupling=coupling, sigma=sigma)))
        for field, style in FIELD_STYLE.items():
            chosen = {"coupling": coupling, "field": field, "sigma": sigma}
            _line_and_points(axes, select(lines, **chosen), select(points, **chosen), style)
        axes.set_title(rf"$\sigma$ = {sigma:g}")
        _angle_axis(axes)
    panels[0].set_ylabel("total gradient variance")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    what = "line: closed form; points: draws with 2 standard errors; triangles: infinite (top), zero (bottom)"
    figure.suptitle(f"{title}, {COUPLING_STYLE[coupling][1]}\n{what}", fontsize=11)
    return figure


def variance_by_coupling(lines: Sequence[Row], points: Sequence[Row], *, title: str) -> Figure:
    """Figure 5: total gradient variance at the OT field under OT, rotated and independent pairs, one panel a sigma."""
    sigmas = sorted({row["sigma"] for row in lines})
    figure = Figure(figsize=(3.1 * len(sigmas) + 0.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(sigmas), squeeze=False, sharey=True)[0]
    for axes, sigma in zip(panels, sigmas, strict=True):
        for coupling, style in COUPLING_STYLE.items():
            chosen = {"coupling": coupling, "field": "ot", "sigma": sigma}
            _line_and_points(axes, select(lines, **chosen), select(points, **chosen), style)
        axes.set_title(rf"$\sigma$ = {sigma:g}")
        _angle_axis(axes)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("total gradient variance at the OT field")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{title}; line: closed form, points: draws with 2 standard errors")
    return figure


def _grid(rows: Sequence[Row], key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Angles, sigmas and values [sigma, angle] of rows that fill a grid."""
    angles, sigmas = (np.asarray(sorted({row[k] for row in rows}), float) for k in ("angle", "sigma"))
    values = {(row["angle"], row["sigma"]): row[key] for row in rows}
    return angles, sigmas, np.asarray([[values[a, s] for a in angles] for s in sigmas], float)


def variance_phase(rows: Sequence[Row], *, title: str) -> Figure:
    """Phase diagram of log10 Var(OT) / Var(pair-optimal) over angle and sigma, with its zero line."""
    # At 0 degrees both fields are the same.
    angles, sigmas, values = _grid([row for row in rows if row["angle"] > 0], "log10_ratio")
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    diverged = np.isneginf(values)
    mesh = axes.pcolormesh(
        angles, sigmas, np.where(diverged, np.nan, values), cmap="RdBu", norm=Normalize(-4, 4), shading="nearest"
    )
    axes.set_facecolor("#333333")
    filled = np.where(diverged, -6, values)
    if filled.min() < 0 < filled.max():
        axes.contour(angles, sigmas, filled, levels=[0], colors="black", linewidths=1.5)
    axes.set_yscale("log")
    axes.set_ylim(sigmas[0], sigmas[-1])
    axes.set_ylabel(r"noise scale $\sigma$")
    _angle_axis(axes)
    axes.set_xlim(0, 182)
    bar = figure.colorbar(mesh, ax=axes, extend="both")
    bar.set_label(r"$\log_{10}$ Var(OT field) / Var(pair-optimal field)")
    axes.set_title(f"{title}\nblue: the noiseless order; red: OT lower; black: pair-optimal infinite", fontsize=10)
    return figure


def angle_phase(background: Sequence[Row], integrated: Sequence[Row], trained: Sequence[Row], *, title: str) -> Figure:
    """Phase diagram of the rotation that the flow applies: formula behind, integrated and trained points on top."""
    figure = Figure(figsize=(6.8, 4.6), layout="constrained")
    axes = figure.subplots()
    angles, sigmas, values = _grid(background, "angle_out")
    norm = Normalize(0, 180)
    mesh = axes.pcolormesh(angles, sigmas, values, cmap="viridis", norm=norm, shading="nearest", rasterized=True)
    inside = angles <= 176  # closer to 180 degrees all contours run into one another
    levels = range(20, 180, 20)
    lines = axes.contour(angles[inside], sigmas, values[:, inside], levels=levels, colors="white", linewidths=0.6)
    axes.clabel(lines, fmt="%d", fontsize=7)
    for rows, marker, size, label in (
        (integrated, "o", 26, "exact minimiser, integrated"),
        (trained, "D", 70, "trained network"),
    ):
        visible = [row for row in rows if row["sigma"] > 0 and np.isfinite(row["angle_out"])]
        if visible:
            place = column(visible, "angle"), column(visible, "sigma")
            color = np.abs(column(visible, "angle_out"))
            axes.scatter(
                *place, c=color, s=size, marker=marker, cmap="viridis", norm=norm, edgecolors="white", label=label
            )
    axes.set_yscale("log")
    axes.set_ylim(sigmas[0], sigmas[-1])
    _angle_axis(axes)
    axes.set_ylabel(r"noise scale $\sigma$")
    if integrated or trained:
        legend = axes.legend(loc="upper left", fontsize=8, facecolor="#444444", labelcolor="white")
        for handle in legend.legend_handles:
            handle.set_facecolor("none")  # type: ignore[union-attr]
    figure.colorbar(mesh, ax=axes).set_label("rotation that the flow applies [degrees]")
    axes.set_title(title, fontsize=10)
    return figure


def flow_trajectories(runs: Sequence[Mapping[str, Any]], *, title: str) -> Figure:
    """Figure 6: trajectories of held-out sources, one row an angle, one column a sigma, first two dimensions.

    Each run has `angle`, `sigma`, `paths` [sources, times, 2] and `x1` [sources, 2], the paired targets.
    """
    angles, sigmas = (sorted({run[key] for run in runs}) for key in ("angle", "sigma"))
    figure = Figure(figsize=(2.9 * len(sigmas) + 0.4, 2.8 * len(angles) + 0.8), layout="constrained")
    panels = figure.subplots(len(angles), len(sigmas), squeeze=False, sharex=True, sharey=True)
    for run in runs:
        axes = panels[angles.index(run["angle"]), sigmas.index(run["sigma"])]
        paths, x1 = run["paths"], run["x1"]
        axes.plot(paths[:, :, 0].T, paths[:, :, 1].T, color=GREY, linewidth=0.5, alpha=0.7)
        for points, color, marker, label in (
            (paths[:, 0], BLUE, ".", "source"),
            (x1, ORANGE, "x", "paired target"),
            (paths[:, 0] + 5, GREEN, "+", "OT target"),
            (paths[:, -1], "black", ".", "flow's end"),
        ):
            axes.scatter(points[:, 0], points[:, 1], s=16, color=color, marker=marker, linewidths=1, label=label)
        axes.set_title(rf"{run['angle']:g} degrees, $\sigma$ = {run['sigma']:g}", fontsize=10)
        axes.set_aspect("equal")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    return figure


def solver_distances(rows: Sequence[Row], *, title: str) -> Figure:
    """Pair L2 to the paired and to the OT target on held-out sources, by solver; rows: angles, columns: sigmas."""
    rows = select(rows, split="held_out")
    angles, sigmas = (sorted({row[key] for row in rows}) for key in ("angle", "sigma"))
    figure = Figure(figsize=(2.4 * len(sigmas) + 1.6, 2.5 * len(angles) + 0.9), layout="constrained")
    panels = figure.subplots(len(angles), len(sigmas), squeeze=False, sharex=True, sharey=True)
    for i, angle in enumerate(angles):
        for j, sigma in enumerate(sigmas):
            chosen, axes = select(rows, angle=angle, sigma=sigma), panels[i, j]
            names = [f"{row['solver']} {row['steps'] or 'adaptive'}" for row in chosen]
            for key, color, marker, label in (
                ("l2_paired", RED, "o", "to the paired target"),
                ("l2_ot", BLUE, "s", "to the OT target"),
            ):
                axes.plot(column(chosen, key), range(len(names)), marker=marker, ls="", color=color, label=label)
            axes.set_yticks(range(len(names)), names, fontsize=8)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(axis="y", alpha=0.3)
            axes.set_title(rf"{angle:g} degrees, $\sigma$ = {sigma:g}", fontsize=10)
    low, high = panels[0, 0].get_xlim()
    panels[0, 0].set_xlim(min(low, 1e-2), max(high, 10))
    for axes in panels[-1]:
        axes.set_xlabel("mean L2 distance")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"{title}; held-out sources")
    return figure


def training_variance(rows: Sequence[Row], *, title: str) -> Figure:
    """Gradient variance and loss while the network trains, one column an angle, one line a sigma."""
    angles, sigmas = (sorted({row[key] for row in rows}) for key in ("angle", "sigma"))
    figure = Figure(figsize=(4.0 * len(angles) + 0.6, 5.4), layout="constrained")
    panels = figure.subplots(2, len(angles), squeeze=False, sharex=True, sharey="row")
    for j, angle in enumerate(angles):
        for k, sigma in enumerate(sigmas):
            chosen = select(rows, angle=angle, sigma=sigma)
            for i, key in enumerate(("variance", "loss")):
                style = {
                    "color": COLORS[k % len(COLORS)],
                    "label": rf"$\sigma$ = {sigma:g}",
                    "marker": ".",
                    "markersize": 4,
                }
                panels[i, j].plot(column(chosen, "step"), column(chosen, key), **style)
                panels[i, j].set_yscale("log")
        panels[0, j].set_title(f"{angle:g} degrees")
        panels[1, j].set_xlabel("training step")
    panels[0, 0].set_ylabel("total gradient variance\nof the network")
    panels[1, 0].set_ylabel("loss\n(mean over dimensions)")
    panels[0, 0].legend(frameon=False)
    figure.suptitle(title)
    return figure
