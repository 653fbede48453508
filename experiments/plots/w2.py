"""Figures of the Wasserstein-2 benchmark."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from experiments.plots._style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, Row, column, select

COUPLING_STYLE = {
    "ot": (GREEN, "OT pairs"),
    "minibatch_ot": (PURPLE, "minibatch OT"),
    "ot_finite": (ORANGE, "finite OT pairs"),
    "shuffled": (RED, "shuffled pairs"),
    "independent": (BLUE, "independent pairs"),
}
BASELINE_STYLE = {"identity": ("identity", ":"), "mean": ("mean of the targets", "--"), "linear": ("linear map", "-.")}
MARKERS = "ovsPXD*"


def _dimension_axis(axes: Axes, dims: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(dims, [str(dim) for dim in dims])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(dims[0] / 1.5, dims[-1] * 1.5)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic y axis whose labels are there also within one decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _line(axes: Axes, rows: Sequence[Row], key: str, **style: object) -> None:
    """One map's value over the dimension; an undefined one (None) is left out."""
    shown = sorted((row["dim"], row[key]) for row in rows if row[key] is not None)
    if shown:
        axes.plot(*zip(*shown, strict=True), **style)  # type: ignore[arg-type]


def benchmark_quality(rows: Sequence[Row], published: Sequence[Row], *, title: str) -> Figure:
    """L2-UVP and cosine on held-out sources over the dimension, one column a sigma.

    `rows` are held-out rows of networks, minimisers and baselines; `published` has solver, dim, l2_uvp, cosine.
    """
    networks = select(rows, map="network")
    sigmas = sorted({row["sigma"] for row in networks})
    dims = sorted({row["dim"] for row in rows})
    figure = Figure(figsize=(max(3.3 * len(sigmas), 7.2) + 0.8, 7.0), layout="constrained")
    panels = figure.subplots(2, len(sigmas), squeeze=False, sharex=True, sharey="row")
    for j, sigma in enumerate(sigmas):
        for axes, key in zip(panels[:, j], ("l2_uvp", "cosine"), strict=True):
            for name, (label, dashes) in BASELINE_STYLE.items():
                _line(axes, select(rows, map=name), key, color=GREY, ls=dashes, lw=1, label=label)
            for k, solver in enumerate(dict.fromkeys(row["solver"] for row in published)):
                chosen = select(published, solver=solver)
                style = {"color": "black", "marker": MARKERS[k % len(MARKERS)], "ms": 4, "lw": 0.5, "mfc": "none"}
                _line(axes, chosen, key, label=f"{solver} (published)", **style)
            for name, (color, label) in COUPLING_STYLE.items():
                cell = {"coupling": name, "sigma": sigma}
                exact = [row for row in rows if row["map"] == "minimiser" and row["coupling"] == name]
                _line(axes, select(exact, sigma=sigma), key, color=color, ls="--", lw=1, label=f"{label}: minimiser")
                chosen = select(networks, **cell)
                _line(axes, chosen, key, color=color, marker="o", ms=5, label=f"{label}: network")
            _dimension_axis(axes, dims)
            axes.grid(axis="y", alpha=0.3)
        panels[0, j].set_title(rf"$\sigma$ = {sigma:g}")
        panels[1, j].set_xlabel("dimension")
    _logarithmic(panels[0, 0])
    panels[0, 0].set_ylabel("L2-UVP, held-out sources [per cent]")
    panels[1, 0].set_ylabel("cosine of the displacements")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def benchmark_memorization(rows: Sequence[Row], *, title: str) -> Figure:
    """Mean L2 of training sources to the optimal and to the training target over sigma, one panel a dimension."""
    dims, sigmas = (sorted({row[key] for row in rows}) for key in ("dim", "sigma"))
    figure = Figure(figsize=(max(3.3 * len(dims), 7.2) + 0.8, 4.2), layout="constrained")
    panels = figure.subplots(1, len(dims), squeeze=False)[0]
    for axes, dim in zip(panels, dims, strict=True):
        for name, dashes in (("network", "-"), ("minimiser", "--")):
            chosen = sorted(select(rows, dim=dim, map=name), key=lambda row: row["sigma"])
            for key, color, label in (
                ("l2_training", RED, "to the training target"),
                ("l2_ot", BLUE, "to the OT target"),
            ):
                marker = "o" if name == "network" else "x"
                axes.plot(
                    range(len(chosen)),
                    column(chosen, f"{key}_mean"),
                    color=color,
                    ls=dashes,
                    marker=marker,
                    label=f"{name}, {label}",
                )
        axes.set_xticks(range(len(sigmas)), [f"{sigma:g}" for sigma in sigmas])
        axes.set_xlabel(r"noise scale $\sigma$")
        axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])  # a distance of 0 lies on the axis otherwise
        axes.grid(axis="y", alpha=0.3)
        axes.set_title(f"d = {dim}")
    panels[0].set_ylabel("mean L2 distance, training sources")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def benchmark_losses(rows: Sequence[Row], *, title: str) -> Figure:
    """Training loss over the steps, one panel a dimension; colour: coupling, line: sigma."""
    dims, sigmas = (sorted({row[key] for row in rows}) for key in ("dim", "sigma"))
    figure = Figure(figsize=(max(3.6 * len(dims), 7.2) + 0.8, 4.4), layout="constrained")
    panels = figure.subplots(1, len(dims), squeeze=False)[0]
    dashes = ("-", "--", ":", "-.")
    for axes, dim in zip(panels, dims, strict=True):
        for name, (color, label) in COUPLING_STYLE.items():
            for k, sigma in enumerate(sigmas):
                chosen = select(rows, dim=dim, coupling=name, sigma=sigma)
                if chosen:
                    text = rf"{label}, $\sigma$ = {sigma:g}"
                    style = {"color": color, "ls": dashes[k % len(dashes)], "label": text}
                    axes.plot(column(chosen, "step"), column(chosen, "loss"), **style)
        _logarithmic(axes)
        axes.set_xlabel("training step")
        axes.set_title(f"d = {dim}")
    panels[0].set_ylabel("training loss (mean over dimensions)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure
