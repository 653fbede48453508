"""Shares with Wilson intervals and summaries of distances."""

import math
from statistics import NormalDist
from typing import Any

import numpy as np

from fvjax.auditing._types import Distances, Share

QUANTILES = np.linspace(0, 1, 51)


def wilson(successes: int, count: int, level: float) -> Share:
    r"""A share with its score interval.

    (p + z^2 / (2n) -+ z sqrt(p (1 - p) / n + z^2 / (4 n^2))) / (1 + z^2 / n),   z the normal quantile of the level.

    It is [0, z^2 / (n + z^2)] at p = 0, where a bootstrap has no width, and inside of [0, 1] everywhere.

    ==========  =================
    count = 0   0 in [0, 1]
    ==========  =================

    Source: Wilson 1927.
    """
    if count == 0:
        return Share(0.0, 0.0, 1.0, 0)
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / count
    centre = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    low, high = (max(0.0, (centre - half)), centre + half)
    scale = 1 + z**2 / count
    # Exact at the ends, which rounding may miss.
    low = 0.0 if successes == 0 else low / scale
    high = 1.0 if successes == count else min(1.0, high / scale)
    return Share(share, low, high, int(count))


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
