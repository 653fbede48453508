"""The verdicts as rules of shares, the intervals, and inputs that are refused before anything heavy runs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import fvjax
from fvjax import Pair
from fvjax.auditing import Arrivals
from fvjax.auditing._measures import chance_of_copy
from fvjax.auditing._statistics import summary, wilson
from fvjax.auditing._verdicts import judge_data, judge_pairs

KEY = jax.random.key(0)


@pytest.mark.parametrize(("successes", "count"), [(0, 1), (0, 30), (7, 30), (30, 30), (2, 2), (499, 512)])
def test_intervals_are_wilsons(successes, count):
    """Catches a width of 0 at the ends, a limit outside of [0, 1], and a one-sided level."""
    for level in (0.8, 0.95):
        found = wilson(successes, count, level)
        expected = stats.binomtest(successes, count).proportion_ci(level, method="wilson")
        np.testing.assert_allclose((found.low, found.high), (expected.low, expected.high), atol=1e-12)
        assert found.low <= found.value == successes / count <= found.high
        assert found.low < found.high
    assert dataclasses.astuple(wilson(0, 0, 0.95)) == (0.0, 0.0, 1.0, 0)


def arrived(nearest: int, among: int, count: int = 100, *, failed: int = 0) -> Arrivals:
    """Shares as given, distances that play no part."""
    none = summary(np.empty(0))
    return Arrivals(wilson(nearest, count, 0.95), wilson(among, count, 0.95), none, none, 1000, failed)


@pytest.mark.parametrize(
    ("training", "held_out", "verdict", "criterion"),
    [
        (arrived(95, 97), arrived(2, 5), "memorizes", "nearest"),
        (arrived(95, 97), arrived(90, 95), "follows a rule", "nearest"),
        (arrived(95, 97), arrived(48, 52), "undecided", "nearest"),
        (arrived(95, 97), None, "undecided", "nearest"),
        (arrived(95, 97), arrived(19, 19, 19), "undecided", "nearest"),
        (arrived(2, 5), arrived(2, 5), "lets go", "nearest"),
        (arrived(48, 52), arrived(2, 5), "undecided", "nearest"),
        # Targets closer together than the flow is exact: the nearest 1% decides, for training and held out alike.
        (arrived(20, 99), arrived(15, 98), "follows a rule", "nearest 1%"),
        (arrived(70, 99), arrived(30, 98), "follows a rule", "nearest 1%"),
        (arrived(20, 99), arrived(1, 3), "memorizes", "nearest 1%"),
        (arrived(20, 99), None, "undecided", "nearest 1%"),
        (arrived(95, 97, failed=51), arrived(90, 95), "undecided", "nearest"),
        (arrived(2, 2, 2), None, "undecided", "nearest"),
        (arrived(0, 0, 2), None, "undecided", "nearest"),
    ],
)
def test_the_rule_of_pair_memorization(training, held_out, verdict, criterion):
    """Catches limits that are swapped, and a harsh criterion that calls an exact rule in two dimensions a memory."""
    found = judge_pairs(training, held_out, "none" if held_out is None else "pairs")
    assert (found.verdict, found.criterion) == (verdict, criterion)
    assert found.reason


@pytest.mark.parametrize(
    ("copies", "chance", "held_out", "verdict"),
    [
        (95, 0, True, "memorizes"),
        (95, 0, False, "undecided"),
        (2, 0, True, "does not"),
        (2, 0, False, "does not"),
        (30, 0, True, "undecided"),
        (35, 33, True, "does not"),
        (95, 96, True, "undecided"),
    ],
)
def test_the_rule_of_data_memorization(copies, chance, held_out, verdict):
    """Catches chance in one dimension called memory, and training sources as evidence."""

    def nearest_two(count: int) -> np.ndarray:
        return np.stack([np.where(np.arange(100) < count, 0.1, 0.9), np.ones(100)], 1)

    found = judge_data(nearest_two(copies), nearest_two(chance), dim=1, held_out=held_out, level=0.95)
    assert found.verdict == verdict
    assert found.fraction.value == copies / 100
    assert found.chance.value == chance / 100


def test_chance_of_a_copy_is_that_of_a_poisson_process():
    """Catches a wrong power: uniform points in two dimensions, without held-out targets."""
    points, samples = np.random.default_rng(0).uniform(size=(2, 2000, 2))
    distances = np.sort(np.linalg.norm(samples[:, None] - points, axis=2), 1)[:, :2]
    share = np.mean(distances[:, 0] < distances[:, 1] / 3)
    found, source = chance_of_copy(None, 2, 0.95)
    assert source == "ratio^d"
    assert found.value == pytest.approx(share, abs=4 * np.sqrt(share / 2000))


PAIRS = Pair(np.ones((5, 3), np.float32), np.arange(15, dtype=np.float32).reshape(5, 3))
BAD = Pair(PAIRS.x0, np.where(PAIRS.x1 == 7, np.nan, PAIRS.x1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": jax.random.PRNGKey(0)}, r"key must be one typed PRNG key, jax.random.key\(seed\), got uint32\[2\]"),
        ({"key": 0}, "key must be one typed PRNG key"),
        ({"pairs": PAIRS.x0}, r"pairs must be a Pair\(x0, x1\) of two arrays, got ndarray"),
        ({"pairs": Pair(PAIRS.x0, PAIRS.x1[:4])}, "pairs.x0 and pairs.x1 must have the same shape, got"),
        ({"pairs": Pair(PAIRS.x0[:1], PAIRS.x1[:1])}, "pairs must be at least two .*, got 1"),
        ({"pairs": Pair(PAIRS.x0[:, 0], PAIRS.x1[:, 0])}, r"pairs.x0 must have shape \[n, \*dims\]"),
        ({"pairs": Pair(PAIRS.x0[:, :0], PAIRS.x1[:, :0])}, "pairs must have at least one dimension"),
        ({"pairs": Pair(PAIRS.x0, PAIRS.x1.astype(int))}, "pairs.x1 must be floating point, got int64"),
        ({"pairs": Pair(PAIRS.x0, list(PAIRS.x1))}, "pairs.x1 must be an array with shape, dtype and rows, got list"),
        ({"pairs": BAD}, "pairs.x1 must be finite, got 1 rows with nan or infinity among rows 0 to 4"),
        ({"held_out": PAIRS.x0[:, :2]}, r"held_out must hold examples of the shape \(3,\) of the pairs, got \(5, 2\)"),
        ({"held_out": PAIRS.x0[:0]}, "held_out must hold at least one example"),
        ({"held_out": Pair(PAIRS.x0, PAIRS.x1[:2])}, "held_out.x0 and held_out.x1 must have the same shape"),
        ({"held_out": BAD}, "held_out.x1 must be finite"),
        ({"ot_targets": PAIRS.x1[:2]}, "ot_targets must have the shape of pairs.x1"),
        ({"solver": "rk4"}, "solver must be one of euler, heun, midpoint, tsit5, dopri5, got 'rk4'"),
        ({"solver": "euler"}, "steps must be given for solver euler"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"euler_steps": (4, 6)}, r"euler_steps must be a pair of an odd and an even number, got \(4, 6\)"),
        ({"euler_steps": 4}, "euler_steps must be a pair of an odd and an even number, got 4"),
        ({"sources": 0}, "sources must be an integer >= 1, got 0"),
        ({"draws": 1}, "draws must be >= 2"),
        ({"bins": 2.0}, "bins must be an integer >= 1, got 2.0"),
        ({"level": 1.0}, r"level must be in \(0, 1\), got 1.0"),
        ({"interpolant": "linear"}, "interpolant must be an fvjax.Interpolant or None, got str"),
        ({"progress": 3}, "progress must be callable"),
        ({"field": 3}, r"field must be callable as field\(params, t, x\), got int"),
        (
            {"field": lambda p, t, x: x[:2]},
            r"field\(params, t, x\) must give a .* of the shape \[3\] .* got float32\[2\]",
        ),
        ({"field": lambda p, t, x: (x, x)}, r"field\(params, t, x\) must give .* got float32\[3\] and float32\[3\]"),
        (
            {"field": lambda p, t, x: x > 0},
            r"field\(params, t, x\) must give a floating-point velocity .* got bool\[3\]",
        ),
    ],
)
def test_bad_input_gets_one_clear_error_before_anything_runs(options, message):
    """Catches an error from the depths, and one after minutes of computing."""
    given: dict[str, Any] = {"field": lambda p, t, x: x, "pairs": PAIRS, "key": KEY, "progress": refuse} | options
    with pytest.raises(ValueError, match=f"^{message}"):
        fvjax.audit(given.pop("field"), None, given.pop("pairs"), **given)


def refuse(stage: str, done: float) -> None:
    """A progress callback of an audit that must not begin."""
    raise AssertionError((stage, done))


def test_a_field_that_is_never_finite_is_refused():
    """Catches a report full of nan."""
    with pytest.raises(
        ValueError, match=r"^field must give finite velocities .* at 8 of 8 \(the first at t = 0\.\d+\)"
    ):
        fvjax.audit(lambda p, t, x: x * jnp.nan, None, PAIRS, key=KEY, draws=8)
