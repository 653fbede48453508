"""The interval of a share."""

import math
from statistics import NormalDist

from fvjax import _validate


def wilson_interval(share: float, count: int, *, level: float = 0.95) -> tuple[float, float]:
    r"""Wilson's score interval [low, high] of a share p of n independent cases.

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),   z the normal quantile of the level.

    ==========  ================================================================
    p = 0       low is 0 exactly, high z^2 / (n + z^2): it has a width, where a
                bootstrap has none
    p = 1       the mirror image
    ==========  ================================================================

    Args:
        share: p, in [0, 1].
        count: n, an integer >= 1.
        level: of the interval, in (0, 1).

    Returns:
        (low, high), within [0, 1].

    Raises:
        ValueError: if an argument is outside of its range.

    Source: Wilson 1927.
    """
    _validate.positive_integer("count", count)
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    square = NormalDist().inv_cdf((1 + level) / 2) ** 2 / count
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
    # Rounding may miss the ends, and the share itself.
    low = 0.0 if share == 0 else min(share, max(0.0, middle - half))
    return low, 1.0 if share == 1 else max(share, min(1.0, middle + half))
