"""Figures of ReFlow rounds."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.plots._style import BLUE, COLORS, GREY, ORANGE, Row, column


def reflow_rounds(rows: Sequence[Row], *, title: str) -> Figure:
    """What each round of ReFlow has changed: straightness, errors of few steps, distances, copies.

    Args:
        rows: one a round {round, straightness, straightness_error, pair_l2_train, pair_l2_held_out (None in round 1),
            memorized, memorized_low, memorized_high, euler}, `euler` a list of {steps, error, distance_test}.
        title: of the figure.
    """
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    (straight, error, distance), (pairs, copies, empty) = figure.subplots(2, 3)
    empty.set_axis_off()
    rounds = column(rows, "round")
    straight.errorbar(
        rounds, column(rows, "straightness"), column(rows, "straightness_error"), color=BLUE, marker="o", capsize=3
    )
    straight.set_ylabel("straightness S, images in [-1, 1]")
    for row, color in zip(rows, COLORS, strict=False):
        steps = column(row["euler"], "steps")
        label = f"round {row['round']}"
        error.plot(steps, column(row["euler"], "error"), color=color, marker="o", label=label)
        distance.plot(steps, column(row["euler"], "distance_test"), color=color, marker="o")
    error.set_ylabel("L2 to the accurate solve")
    distance.set_ylabel("distance to held-out images")
    for axes in (error, distance):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("Euler steps (evaluations)")
        axes.xaxis.set_major_formatter("{x:g}")
    later = [row for row in rows if row["pair_l2_train"] is not None]
    for key, label, color in (
        ("pair_l2_train", "pairs of its training", BLUE),
        ("pair_l2_held_out", "the flow before it, new noise", ORANGE),
    ):
        pairs.plot(column(later, "round"), column(later, key), color=color, marker="o", label=label)
    pairs.set_ylabel("pair L2, images in [-1, 1]")
    pairs.legend(frameon=False)
    middle = column(rows, "memorized")
    reach = np.abs(np.stack([column(rows, "memorized_low"), column(rows, "memorized_high")]) - middle)
    copies.errorbar(rounds, middle, reach, color=GREY, marker="o", capsize=3, clip_on=False)
    copies.set_ylabel("memorized fraction, 95%")
    for axes in (straight, pairs, copies):
        _by_round(axes, rounds)
    empty.legend(*error.get_legend_handles_labels(), loc="center", frameon=False)
    figure.suptitle(title)
    return figure


def _by_round(axes: Axes, rounds: np.ndarray) -> None:
    axes.set_xlabel("round")
    axes.set_xlim(rounds[0] - 0.3, rounds[-1] + 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0, top=1.1 * axes.get_ylim()[1])
