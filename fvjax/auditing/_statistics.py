"""Shares with Wilson intervals and summaries of distances."""

import math
from typing import Any

import numpy as np

from fvjax.auditing._types import Distances, Share
from fvjax.metrics import wilson_interval

QUANTILES = np.linspace(0, 1, 51)


def wilson(successes: int, count: int, level: float) -> Share:
    """A share with its interval; 0 in [0, 1] where there is no case."""
    if count == 0:
        return Share(0.0, 0.0, 1.0, 0)
    share = successes / count
    return Share(share, *wilson_interval(share, count, level=level), int(count))


def share_of(cases: np.ndarray, level: float) -> Share:
    """The share of true entries."""
    return wilson(int(np.count_nonzero(cases)), len(cases), level)


def summary(distances: np.ndarray) -> Distances:
    """Of the finite ones."""
    found = np.asarray(distances, np.float64)
    found = found[np.isfinite(found)]
    count = len(found)
    if count == 0:
        return Distances(None, None, None, 0, ())
    deviation = float(found.std(ddof=1)) if count > 1 else None
    quantiles = tuple(float(value) for value in np.quantile(found, QUANTILES))
    return Distances(float(found.mean()), deviation, float(np.median(found)), count, quantiles)


def number(value: Any) -> float | None:
    """A float, or None where it is not finite."""
    value = float(value)
    return value if math.isfinite(value) else None
