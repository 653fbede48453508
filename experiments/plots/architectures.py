"""Figures of the architectures experiment."""

from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from experiments.plots._style import BLUE, COLORS, GREEN, GREY, ORANGE, PURPLE, RED, Row, column, select

NETWORK_STYLE = {
    "mlp": (BLUE, "o", "MLP"),
    "unet": (RED, "s", "U-Net"),
    "transformer": (PURPLE, "^", "transformer"),
    "affine": (GREEN, "*", "affine field, trained"),
    "closed_form": ("black", "x", "affine field, closed form"),
}
OFF_SCALE = 30.0
"""A residual so many times below that of every network is written at the edge: a common axis would flatten the rest."""

RESIDUAL = r"$E|v - v^*|^2 \, / \, E|u|^2$"


def gaussian_residuals(rows: Sequence[Row], profile: Sequence[Row], *, steps: int, title: str) -> Figure:
    """Residual over width (a line for each depth), over the parameter count, and over t.

    `rows` have name, network, width, depth, parameters, steps, residual, residual_error; `profile` has name, network,
    steps, t, residual and smallest_singular_value. Filled markers: `steps` steps; hollow ones: more.
    """
    figure = Figure(figsize=(14.0, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _over_width(left, select(rows, network="mlp"), steps)
    _over_parameters(middle, rows, steps)
    _over_time(right, rows, profile, steps)
    figure.suptitle(f"{title}; {steps} steps unless stated", fontsize=10)
    return figure


def _over_width(axes: Axes, rows: Sequence[Row], steps: int) -> None:
    more = sorted({row["steps"] for row in rows} - {steps})
    for k, depth in enumerate(sorted({row["depth"] for row in rows})):
        color = COLORS[k % len(COLORS)]
        for count in (steps, *more):
            chosen = sorted(select(rows, depth=depth, steps=count), key=lambda row: row["width"])
            if not chosen:
                continue
            style: dict[str, Any] = {"marker": "o", "color": color, "label": f"depth {depth}"}
            if count != steps:
                style |= {"marker": "D", "ls": "none", "mfc": "none", "ms": 8, "label": f"depth {depth}, {count} steps"}
            errors = column(chosen, "residual_error")
            axes.errorbar(column(chosen, "width"), column(chosen, "residual"), yerr=errors, **style)
    if rows:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        widths = sorted({row["width"] for row in rows})
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.legend(frameon=False, fontsize=9)
    axes.grid(alpha=0.3)
    axes.set_title("MLPs", fontsize=10)
    axes.set_xlabel("width")
    axes.set_ylabel(f"residual {RESIDUAL}")


def _over_parameters(axes: Axes, rows: Sequence[Row], steps: int) -> None:
    networks = [row["residual"] for row in rows if row["network"] not in {"affine", "closed_form"}]
    floor = min(networks) / OFF_SCALE if networks else 0.0
    for name, (color, marker, label) in NETWORK_STYLE.items():
        chosen = select(rows, network=name)
        for filled in (True, False):
            shown = [row for row in chosen if row["residual"] >= floor and (row["steps"] <= steps) == filled]
            if shown:
                style: dict[str, Any] = {
                    "color": color,
                    "marker": marker,
                    "ls": "none",
                    "ms": 7 if marker != "*" else 11,
                }
                style |= {"label": label} if filled else {"mfc": "none", "ms": 10}
                axes.plot(column(shown, "parameters"), column(shown, "residual"), **style)
        for k, row in enumerate(row for row in chosen if row["residual"] < floor):
            height = 0.04 + 0.08 * (name == "affine") + 0.16 * k
            text = f"{label}: {row['residual']:.1g} (below)"
            axes.text(0.03, height, text, transform=axes.transAxes, color=color, fontsize=9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    if floor:
        values = [row["residual"] for row in rows if row["residual"] >= floor]
        axes.set_ylim(min(values) / 8, 2 * max(values))
    axes.grid(alpha=0.3)
    axes.set_title("all networks (hollow: more steps)", fontsize=10)
    axes.set_xlabel("parameters")
    axes.set_ylabel(f"residual {RESIDUAL}")
    axes.legend(frameon=False, fontsize=9)


def _over_time(axes: Axes, rows: Sequence[Row], profile: Sequence[Row], steps: int) -> None:
    """The best network of every architecture, the worst MLP, and how far I + t (A - I) is from singular."""
    for name, (color, _, label) in NETWORK_STYLE.items():
        chosen = sorted(select(rows, network=name, steps=steps), key=lambda row: row["residual"])
        shown = {chosen[0]["name"]: "-"} if chosen and name != "affine" else {}
        if name == "mlp" and len(chosen) > 1:
            shown[chosen[-1]["name"]] = "--"
        for which, dashes in shown.items():
            line = sorted(select(profile, name=which, steps=steps), key=lambda row: row["t"])
            size = which.partition("_")[2].replace("x", " x ")
            axes.plot(column(line, "t"), column(line, "residual"), dashes, color=color, label=f"{label} {size}")
    axes.set_yscale("log")
    axes.set_xlim(0, 1)
    axes.grid(alpha=0.3)
    axes.set_title("over time", fontsize=10)
    axes.set_xlabel("t")
    axes.set_ylabel(f"residual at t {RESIDUAL}")
    other = axes.twinx()
    line = sorted(profile, key=lambda row: row["t"])
    singular = r"smallest singular value of $I + t(A - I)$"
    other.plot(column(line, "t"), column(line, "smallest_singular_value"), ":", color=GREY, label=singular)
    other.set_ylim(bottom=0)
    other.set_ylabel(singular, color=GREY)
    if axes.get_legend_handles_labels()[0]:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.35)  # room for the legend
        axes.legend(loc="upper center", ncols=2, frameon=False, fontsize=8)


def digits_curves(rows: Sequence[Row], curves: Sequence[Row], *, title: str) -> Figure:
    """L2 to the shuffled and the optimal target while networks train: one row a network, one column a sigma.

    `rows` have network, name, sigma, parameters, crossing_step and the final distances, `curves` name, sigma, step,
    l2_shuffled and l2_ot. Dashed: the exact minimiser, which does not train.
    """
    names = list(dict.fromkeys(row["name"] for row in curves))
    sigmas = sorted({row["sigma"] for row in curves})
    figure = Figure(figsize=(max(3.2 * len(sigmas), 6.0) + 0.8, 2.1 * len(names) + 1.3), layout="constrained")
    panels = figure.subplots(len(names), len(sigmas), squeeze=False, sharex="row", sharey=True)
    for i, name in enumerate(names):
        for axes, sigma in zip(panels[i], sigmas, strict=True):
            curve = select(curves, name=name, sigma=sigma)
            (row,) = select(rows, name=name, sigma=sigma)
            exact = select(rows, network="minimiser", sigma=sigma)
            for target, color, label in (("shuffled", RED, "to the shuffled target"), ("ot", BLUE, "to the OT target")):
                steps, values = column(curve, "step"), column(curve, f"l2_{target}")
                axes.plot(steps, values, color=color, marker=".", ms=5, label=label)
                for reference in exact:
                    style = {"color": color, "ls": "--", "lw": 1, "label": f"exact minimiser, {label}"}
                    axes.axhline(reference[f"l2_{target}_mean"], **style)
            if row["crossing_step"] is not None:
                axes.axvline(row["crossing_step"], color=ORANGE, lw=1.2, label="crossing")
            axes.grid(alpha=0.3)
            axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])  # a distance of 0 lies on the axis otherwise
            axes.xaxis.set_minor_formatter(NullFormatter())
        panels[i, 0].set_ylabel(f"{name}\n{row['parameters']:,} parameters\nmean L2", fontsize=9)
    for axes, sigma in zip(panels[0], sigmas, strict=True):
        axes.set_title(rf"$\sigma$ = {sigma:g}", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("training step")
    handles: dict[str, Artist] = {}
    for axes in panels.ravel():
        found, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure
