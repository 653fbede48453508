"""The two verdicts, from shares and their intervals."""

import numpy as np

from fvjax.auditing._measures import RATIO, chance_of_copy, copied
from fvjax.auditing._types import Arrivals, DataMemorization, PairMemorization, Share

LEAST_HELD_OUT = 20
"""Held-out pairs below which no verdict rests on them."""

NO_COPIES = 0.1
"""A share of copies whose interval reaches down to this is called none, where chance is lower."""

NEAREST, COARSE = "nearest", "nearest 1%"


def percent(share: Share) -> str:
    """Such as "97% (95 to 98%, of 512)"."""
    return f"{_rounded(share.value)}% ({_rounded(share.low)} to {_rounded(share.high)}%, of {share.count})"


def _rounded(value: float) -> str:
    if value in (0, 1) or 0.01 <= value <= 0.99:
        return f"{100 * value:.0f}"
    return f"{100 * value:.2g}" if value < 0.01 else f"{100 * value:.1f}"


def judge_pairs(training: Arrivals, held_out: Arrivals | None, kind: str) -> PairMemorization:
    """The rule that `fvjax.audit` states."""
    verdict, reason, criterion = _pair_verdict(training, held_out, kind)
    return PairMemorization(verdict, reason, criterion, training, held_out)


def _pair_verdict(training: Arrivals, held_out: Arrivals | None, kind: str) -> tuple[str, str, str]:
    failed = training.failed
    if 2 * failed > training.returned.count:
        return "undecided", f"the solver failed for {failed} of {training.returned.count} training sources", NEAREST
    fine = training.returned.low > 0.5
    coarse = training.among_nearest.low > 0.5
    if not (fine or coarse):
        if training.among_nearest.high < 0.5:
            return "lets go", "fewer than half of the training sources return to their own target", NEAREST
        return "undecided", "about half of the training sources return to their own target, or there are few", NEAREST
    found = NEAREST if fine else COARSE
    if held_out is None:
        return "undecided", _what_is_missing(kind), found
    if held_out.returned.count < LEAST_HELD_OUT:
        reason = f"only {held_out.returned.count} held-out pairs were given, {LEAST_HELD_OUT} are needed"
        return "undecided", reason, found
    if fine and held_out.returned.low > 0.5:
        return "follows a rule", "held-out sources arrive at their own target, too", NEAREST
    if held_out.among_nearest.low > 0.5:
        return "follows a rule", "held-out sources arrive close to their own target, too", COARSE
    if held_out.among_nearest.high < 0.5:
        return "memorizes", "training sources return to their own target, held-out ones do not find theirs", found
    return "undecided", "about half of the held-out sources find their own target; give more held-out pairs", found


def _what_is_missing(kind: str) -> str:
    given = "held-out sources have no targets" if kind == "sources" else "nothing was held out"
    return f"pairs are returned, and {given}: give `held_out` pairs of the same coupling to tell memory from a rule"


def judge_data(
    copies: np.ndarray, chance: np.ndarray | None, *, dim: int, held_out: bool, level: float
) -> DataMemorization:
    """From the two nearest training targets of the samples, [n, 2], and of held-out targets, or None."""
    fraction = copied(copies, level)
    expected, source = chance_of_copy(chance, dim, level)
    most = fraction.low > 0.5 and fraction.low > expected.high
    none = fraction.high < 0.5 and fraction.low <= max(expected.high, NO_COPIES)
    if none:
        verdict, reason = "does not", "samples are not copies of training targets more often than new data would be"
    elif most and held_out:
        verdict, reason = "memorizes", "most samples from held-out sources are copies of training targets"
    elif most:
        verdict = "undecided"
        reason = "the samples started from training sources, whose own targets they may rightly reach; give `held_out`"
    else:
        verdict, reason = "undecided", "a part of the samples are copies, or too few samples tell"
    return DataMemorization(verdict, reason, fraction, RATIO, "held-out" if held_out else "training", expected, source)
