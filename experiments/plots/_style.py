"""What all figures share: rows and their columns, and colours."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]

# Okabe & Ito 2008: distinguishable with every common colour blindness.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#666666"
COLORS = (RED, ORANGE, GREEN, BLUE, PURPLE, GREY)
"""In the order in which lines of one figure take them."""


def select(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """The rows whose entries are the wanted ones."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def column(rows: Sequence[Row], key: str) -> np.ndarray:
    """One entry of every row, as floating-point numbers."""
    return np.asarray([row[key] for row in rows], float)
