"""Figure of the audited cases."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.plots._style import BLUE, GREEN, RED, Row

TRUTH_COLORS = {"memorizes": RED, "follows a rule": BLUE, "lets go": GREEN}


def audit_cases(rows: Sequence[Row]) -> Figure:
    """A line for each case: returned shares of training and held-out sources, the verdict at the right edge.

    `rows` have case, truth, verdict, and returned and held_out_returned with their _low and _high.
    """
    figure = Figure(figsize=(9.0, 1.6 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        color = TRUTH_COLORS[row["truth"]]
        for name, offset, fill in (("returned", -0.13, color), ("held_out_returned", 0.13, "none")):
            value, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
            style: dict[str, Any] = {"marker": "o", "ms": 5, "color": color, "mfc": fill, "capsize": 2, "lw": 1}
            error = np.maximum([[value - low], [high - value]], 0)
            axes.errorbar([value], [place + offset], xerr=error, **style)
        wrong = "" if row["verdict"] == row["truth"] else "  (!)"
        axes.annotate(
            f"{row['verdict']}{wrong}", (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=9
        )
    axes.axvline(0.5, color="black", lw=0.8, ls=":")
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel("share of sources that arrive at their own target")
    axes.annotate("verdict", (1.02, 1.0), xycoords="axes fraction", va="bottom", fontsize=9, weight="bold")
    handles = [
        Line2D([], [], color=color, marker="o", ls="none", label=f"truth: {truth}")
        for truth, color in TRUTH_COLORS.items()
    ]
    handles += [
        Line2D([], [], color="black", marker="o", ls="none", label="training"),
        Line2D([], [], color="black", marker="o", mfc="none", ls="none", label="held out"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    return figure
