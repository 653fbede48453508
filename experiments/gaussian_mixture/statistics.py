"""What the repeats say: means with intervals, paired differences between noise scales, and which claims they bear out.

All intervals are Student's t over repeats, each of which has its own data, network and batches; with 3 repeats they
are 2.5 standard deviations wide on either side. They are not corrected for how many there are.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.gaussian_mixture.problem import Row

LEVEL = 0.95

MEASURES = (
    "generalization_mmd",
    "generalization_mmd_biased",
    "memorization_mmd",
    "memorization_mmd_biased",
    "pair_l2_mean",
    "recovered",
    "memorized",
)

PUBLISHED = (
    {"dim": 3, "sigma": 0.0, "generalization_mmd": 0.0034, "memorization_mmd": 1.758e-6},
    {"dim": 3, "sigma": 0.05, "generalization_mmd": 0.0018, "memorization_mmd": 3.105e-5},
    {"dim": 50, "sigma": 0.0, "generalization_mmd": 0.0021, "memorization_mmd": 9.089e-6},
    {"dim": 50, "sigma": 0.05, "generalization_mmd": 0.0020, "memorization_mmd": 6.09e-5},
)
"""Table 1 of Reu et al. 2025."""

PUBLISHED_NOTE = (
    "Table 1 of Reu et al. 2025 does not state its kernel, whether MMD or its square, which estimator, the number of"
    " pairs or of samples, or the mixture: its order can be compared with this one, its values cannot."
)


class Interval(NamedTuple):
    """Mean of n values and its t interval; the ends are None for one value."""

    mean: float
    low: float | None
    high: float | None
    n: int


class Claim(NamedTuple):
    """A sentence of the paper as a sign: adding noise makes `measure` `expected` ("lower" or "higher")."""

    name: str
    measure: str
    expected: str


CLAIMS = (
    Claim("noise lowers the generalization MMD", "generalization_mmd", "lower"),
    Claim("noise raises the memorization MMD", "memorization_mmd_biased", "higher"),
    Claim("noise moves training sources away from their training targets", "pair_l2_mean", "higher"),
)


def t_interval(values: Sequence[float], *, level: float = LEVEL) -> Interval:
    """Mean and Student's t interval of independent values."""
    x = np.asarray(values, float)
    mean = float(x.mean())
    if len(x) < 2:
        return Interval(mean, None, None, len(x))
    half = float(stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return Interval(mean, mean - half, mean + half, len(x))


def summary(rows: Sequence[Row]) -> list[Row]:
    """One row for each map, dimension, sigma and measure: the mean over repeats and its interval."""
    return _by_cell(rows, lambda values, _: values)


def differences(rows: Sequence[Row]) -> list[Row]:
    """The same of each repeat's difference to its own value at the smallest sigma; `verdict` says its sign.

    The verdict is "lower" or "higher" where the interval leaves out 0, else "not told apart"; and None where there is
    only one repeat.
    """
    found = _by_cell(rows, lambda values, reference: values - reference)
    return [row | {"verdict": _verdict(row)} for row in found if row["sigma"] != row["reference"]]


def _by_cell(rows: Sequence[Row], of: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> list[Row]:
    values = {(r["map"], r["dim"], r["sigma"], r["repeat"], m): r[m] for r in rows for m in MEASURES if m in r}
    repeats = sorted({key[3] for key in values})
    found = []
    for name, dim, sigma, measure in dict.fromkeys((*key[:3], key[4]) for key in values):
        reference = min((key[2] for key in values if key[:2] == (name, dim) and key[2] is not None), default=sigma)
        here, there = (np.array([values[name, dim, s, k, measure] for k in repeats]) for s in (sigma, reference))
        interval = t_interval(of(here, there).tolist())
        named = {"map": name, "dim": dim, "sigma": sigma, "reference": reference, "measure": measure}
        found.append(named | interval._asdict())
    return found


def _verdict(row: Row) -> str | None:
    if row["low"] is None:
        return None
    if row["low"] <= 0 <= row["high"]:
        return "not told apart"
    return "lower" if row["high"] < 0 else "higher"


def conclusions(summaries: Sequence[Row], changes: Sequence[Row], floors: Sequence[Row]) -> list[Row]:
    """What came out of the claims, by the numbers: True, False (the opposite), or None (not told apart, one repeat).

    Beside the three claims: whether a memorization MMD below what two independent samples have, the 2.5% quantile of
    its floor, means that training sources return to their own targets. Not where fewer than half of them do.
    """
    found = []
    for claim in CLAIMS:
        for row in changes:
            if row["measure"] != claim.measure or row["map"] == "population":
                continue
            came_out = None if row["verdict"] in {None, "not told apart"} else row["verdict"] == claim.expected
            found.append(row | {"claim": claim.name, "came_out": came_out, "text": _sentence(claim, row, came_out)})
    return found + _sets_without_pairs(summaries, floors)


def _sentence(claim: Claim, row: Row, came_out: bool | None) -> str:
    answer = {True: "came out", False: "the opposite came out", None: "not told apart"}[came_out]
    bounds = "no interval: one repeat"
    if row["verdict"] is not None:
        bounds = f"{LEVEL:.0%} interval [{row['low']:.3g}, {row['high']:.3g}] over {row['n']} repeats"
    where = f"d = {row['dim']}, {row['map']}, sigma {row['sigma']:g} against {row['reference']:g}"
    return f"{claim.name}: {answer}. {where}: {row['measure']} {row['mean']:+.3g}, {bounds}"


def _sets_without_pairs(summaries: Sequence[Row], floors: Sequence[Row]) -> list[Row]:
    measure, claim = "memorization_mmd_biased", "a memorization MMD below its floor means returned pairs"
    floor = {row["dim"]: row["low"] for row in floors if row["measure"] == measure}
    means = {(row["map"], row["dim"], row["sigma"], row["measure"]): row["mean"] for row in summaries}
    found = []
    for (name, dim, sigma, which), value in means.items():
        if which != measure or name not in {"network", "minimiser"} or value >= floor[dim]:
            continue
        share = means[name, dim, sigma, "recovered"]
        answer = "came out" if share >= 0.5 else "did not come out"
        where = f"d = {dim}, {name}, sigma {sigma:g}"
        text = (
            f"{claim}: {answer}. {where}: {measure} {value:.3g}, floor from {floor[dim]:.3g},"
            f" {share:.0%} of the training sources end nearest to their own target"
        )
        named = {"map": name, "dim": dim, "sigma": sigma, "measure": measure, "mean": value, "recovered": share}
        found.append(named | {"claim": claim, "came_out": share >= 0.5, "text": text})
    return found
