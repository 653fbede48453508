"""The interval of a share."""

import pytest

from fvjax.metrics import wilson_interval


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("count", [1, 7, 1000])
def test_the_interval_holds_the_share_and_is_mirrored(share: float, count: int) -> None:
    """Catches rounding that leaves the share outside, an interval without a width at the ends, and a lost sign."""
    low, high = wilson_interval(share, count)
    assert 0 <= low <= share <= high <= 1
    assert low < high
    assert wilson_interval(1 - share, count) == pytest.approx((1 - high, 1 - low), abs=1e-15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 1.1, "count": 3}, r"share must be in \[0, 1\], got 1.1"),
        ({"share": float("nan"), "count": 3}, r"share must be in \[0, 1\], got nan"),
        ({"share": 0.5, "count": 0}, "count must be an integer >= 1, got 0"),
        ({"share": 0.5, "count": 3, "level": 1.0}, r"level must be in \(0, 1\), got 1.0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, float], message: str) -> None:
    """Catches a share in per cent, and a level that makes the interval infinite."""
    with pytest.raises(ValueError, match=message):
        wilson_interval(**arguments)
