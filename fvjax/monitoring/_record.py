"""What one look of the monitor found, as numbers and as a row of a log, and when it says that a flow memorizes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class MemorizationWarning(UserWarning):
    """A flow began to return its training pairs, and not the held-out ones."""


class Returned(NamedTuple):
    """Where the flow takes some sources.

    Attributes:
        l2: mean Euclidean distance to their own targets, in units of x, summed over dimensions.
        share: of sources whose nearest target is their own, in [0, 1].
        low: lower limit of its interval.
        high: upper limit.
    """

    l2: float
    share: float
    low: float
    high: float


class MonitorRecord(NamedTuple):
    """The numbers of one step.

    Attributes:
        step: of the training.
        gradient_variance: trace of the covariance of ONE example's gradient, unbiased over the probe.
        gradient_variance_bins: the same given that t is in one of equal intervals.
        gradient_noise_scale: that trace over the squared mean gradient, in examples; inf where the probe cannot tell
            the mean from 0.
        train: training sources; None where the monitor has none.
        held_out: held-out sources; None where the monitor has none.
        memorizing: whether the flow returns training pairs and not held-out ones; None where the latter are missing.
    """

    step: int
    gradient_variance: float
    gradient_variance_bins: tuple[float, ...]
    gradient_noise_scale: float
    train: Returned | None = None
    held_out: Returned | None = None
    memorizing: bool | None = None

    def row(self) -> dict[str, float]:
        """The numbers by the name of their column, without the step; `memorizing` as 0 or 1."""
        found = {
            "gradient_variance": self.gradient_variance,
            "gradient_noise_scale": self.gradient_noise_scale,
            **{f"gradient_variance_bin_{k}": value for k, value in enumerate(self.gradient_variance_bins)},
        }
        for name, part in (("train", self.train), ("held_out", self.held_out)):
            if part is not None:
                found |= {
                    f"{name}_l2": part.l2,
                    f"{name}_returned": part.share,
                    f"{name}_returned_low": part.low,
                    f"{name}_returned_high": part.high,
                }
        if self.memorizing is not None:
            found["memorizing"] = float(self.memorizing)
        return found


def memorizes(train: Returned, held_out: Returned, *, before: bool) -> bool:
    """The rule, with hysteresis: it begins where intervals part, and ends where the shares themselves meet.

    ===========================================  ==========
    train.low > held_out.high                    True
    train.share <= held_out.high                 False
    between                                      as `before`
    ===========================================  ==========
    """
    if train.low > held_out.high:
        return True
    return before and train.share > held_out.high


def message(record: MonitorRecord, count: tuple[int, int]) -> str:
    """The warning in words, with its numbers."""
    train, held_out = record.train, record.held_out
    if train is None or held_out is None:
        raise ValueError("record must hold training and held-out sources to be warned about, got none")
    return (
        f"memorization began by step {record.step}: the flow takes {train.share:.0%} of {count[0]} training sources to"
        f" their own targets (at least {train.low:.0%}), and {held_out.share:.0%} of {count[1]} held-out ones (at most"
        f" {held_out.high:.0%}); mean L2 to the own target {train.l2:.3g} and {held_out.l2:.3g}"
    )


def state_of(rows: Sequence[Mapping[str, Any]]) -> tuple[bool, bool]:
    """What the rows of a log say: whether the flow memorized at the last look, and whether it ever did."""
    seen = [bool(row["memorizing"]) for row in rows if "memorizing" in row]
    return bool(seen) and seen[-1], any(seen)
