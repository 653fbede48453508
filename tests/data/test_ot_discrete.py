"""Finite sets: the assignment is the best of all, pairs are looked up and not invented; the check catches errors."""

import itertools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from fvjax import couplings
from fvjax.data.ot_benchmark import OptimalPairs, discrete_pairs, optimal_assignment, verify_optimal
from fvjax.types import Pair


def clouds(n, dims=(3,), seed=0, dtype=np.float32):
    """Two sets of standard normal points, [n, *dims]."""
    return np.random.default_rng(seed).normal(size=(2, n, *dims)).astype(dtype)


def monotone_pairs(n, dim=3, dtype=np.float64):
    """Optimal pairs: x1 is the gradient of a quadratic convex function of x0."""
    generator = np.random.default_rng(1)
    root = generator.normal(size=(dim, dim))
    x0 = generator.normal(size=(n, dim))
    return Pair(x0.astype(dtype), (x0 @ (root @ root.T + np.eye(dim)) + 2).astype(dtype))


@hypothesis.given(st.integers(1, 6), st.integers(0, 1000))
def test_no_permutation_is_cheaper(n, seed):
    """Catches a wrong sign or an inverted permutation: all n! costs, in one dimension and more."""
    x0, x1 = clouds(n, (1 + seed % 3, 2), seed, np.float64)
    cheapest = min(((x0 - x1[list(order)]) ** 2).sum() for order in itertools.permutations(range(n)))
    assert ((x0 - x1[optimal_assignment(x0, x1)]) ** 2).sum() == pytest.approx(cheapest, rel=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_the_jax_solver_agrees_and_nothing_is_lost_far_from_the_origin(offset):
    """Catches squared distances of uncentred float32: at 1e4 they have no digit of the differences left."""
    x0, x1 = clouds(60, (2,))
    np.testing.assert_array_equal(optimal_assignment(x0, x1), couplings.assignment(x0, x1))
    moved = optimal_assignment(x0.astype(np.float64) + offset, x1.astype(np.float64) - offset)
    np.testing.assert_array_equal(moved, optimal_assignment(x0, x1))


def test_many_coordinates_are_taken_in_blocks(monkeypatch):
    """Catches coordinates that a block leaves out: another block size must not matter."""
    from fvjax.data.ot_benchmark import _discrete

    x0, x1 = clouds(40, (5, 7), dtype=np.float64)
    whole, checked = optimal_assignment(x0, x1), verify_optimal(Pair(x0, x1), cycles=50)
    monkeypatch.setattr(_discrete, "_FEATURES", 4)
    monkeypatch.setattr(_discrete, "_ROWS", 7)
    monkeypatch.setattr(_discrete, "_CYCLE_CHUNK", 3)
    np.testing.assert_array_equal(optimal_assignment(x0, x1), whole)
    again = verify_optimal(Pair(x0, x1), cycles=50)
    assert again.largest_gain == pytest.approx(checked.largest_gain, rel=1e-12)
    assert again.cycle == checked.cycle


def test_pairs_are_the_assignment_with_its_cost():
    """Catches a cost without its 1/2, the variance of x0, targets in their old order."""
    x0, x1 = clouds(50, (2, 2))
    pairs = discrete_pairs(x0, x1)
    paired = x1[optimal_assignment(x0, x1)]
    assert isinstance(pairs, OptimalPairs)
    assert (pairs.name, pairs.dims, pairs.size) == ("discrete", (2, 2), 50)
    assert pairs.cost == pytest.approx(0.5 * ((np.float64(x0) - paired) ** 2).sum((1, 2)).mean(), rel=1e-12)
    assert pairs.target_variance == pytest.approx(np.float64(x1).var(0).sum(), rel=1e-12)
    drawn = pairs.sample(jax.random.key(0), 50)
    assert len(np.unique(drawn.x0.reshape(50, -1), axis=0)) == 50
    partners = {source.tobytes(): target for source, target in zip(x0, paired, strict=True)}
    for source, target in zip(np.asarray(drawn.x0), np.asarray(drawn.x1), strict=True):
        np.testing.assert_array_equal(target, partners[source.tobytes()])
    with pytest.raises(ValueError, match="n must be at most 50, the number of pairs in the set, got 51"):
        pairs.sample(jax.random.key(0), 51)


def test_the_map_is_known_on_the_set_alone():
    """Catches a nearest neighbour that is passed off as transport: nan everywhere else."""
    x0, x1 = clouds(20)
    pairs = discrete_pairs(x0, x1)
    move = jax.jit(jax.vmap(pairs.transport))
    np.testing.assert_array_equal(move(x0), x1[optimal_assignment(x0, x1)])
    assert np.all(np.isnan(move(x0 + np.float32(1e-6))))
    with pytest.raises(ValueError, match=r"x0 must have shape \(3,\), got \(20, 3\)"):
        pairs.transport(x0)


def test_float64_stays_float64(x64):
    """Catches points that lose their digits on the way, and are then not found."""
    x0, x1 = clouds(10, dtype=np.float64)
    pairs = discrete_pairs(x0, x1)
    drawn = pairs.sample(jax.random.key(0), 10)
    assert drawn.x0.dtype == drawn.x1.dtype == jnp.float64
    np.testing.assert_array_equal(jax.vmap(pairs.transport)(drawn.x0), drawn.x1)


def test_bad_sets_are_refused():
    """Catches sets of two sizes, nan, nothing, integers, a matrix that does not fit into memory."""
    x0, x1 = clouds(4)
    with pytest.raises(ValueError, match=r"x0 and x1 must have the same shape, got \(4, 3\) and \(3, 3\)"):
        discrete_pairs(x0, x1[:3])
    with pytest.raises(ValueError, match=r"at least one example, got shape \(0, 3\)"):
        discrete_pairs(x0[:0], x1[:0])
    with pytest.raises(ValueError, match="x0 and x1 must be .n, .dims."):
        optimal_assignment(1.0, 2.0)
    broken = x1.copy()
    broken[2, 1] = np.nan
    with pytest.raises(ValueError, match="x1 must be finite, got 1 of 12 entries"):
        discrete_pairs(x0, broken)
    with pytest.raises(ValueError, match="x0 must be floating point, got int32"):
        discrete_pairs(jnp.ones((3, 2), int), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="x0 and x1 must have the same dtype, got float32 and float16"):
        discrete_pairs(x0, x1.astype(np.float16))
    with pytest.raises(ValueError, match=r"max_bytes must be at least 128, 8 bytes for each of 4\^2 costs, got 127"):
        discrete_pairs(x0, x1, max_bytes=127)
    assert discrete_pairs(x0, x1, max_bytes=128).size == 4


def test_optimal_pairs_pass():
    """Catches a check that refuses what is right, in both precisions; and says what it looked at."""
    for dtype in (np.float32, np.float64):
        report = verify_optimal(monotone_pairs(100, dtype=dtype), cycles=30, longest=5)
        assert report.optimal
        assert report.largest_gain < 0
        assert (report.size, report.two_cycles, report.longer_cycles, report.longest) == (100, 4950, 90, 5)
        assert report.assigned == 100
    assert verify_optimal(discrete_pairs(*clouds(80)), n=500).size == 80


def test_shuffled_pairs_fail():
    """Catches a check that lets everything pass."""
    x0, x1 = monotone_pairs(100)
    report = verify_optimal(Pair(x0, np.roll(x1, 1, axis=0)))
    assert not report.optimal
    assert report.largest_gain > 0.1


@pytest.mark.parametrize("n", [100, 1500])
def test_two_exchanged_targets_among_many_are_found(n):
    """Catches blocks that skip a part of the 2-cycles: the gain is that of the one wrong exchange."""
    x0, x1 = monotone_pairs(n)
    first, second = 3, n - 2
    x1[[first, second]] = x1[[second, first]]
    report = verify_optimal(Pair(x0, x1), cycles=1)
    assert not report.optimal
    assert not verify_optimal(Pair(x0, x1), cycles=1, tolerance=0.9 * report.largest_gain).optimal
    assert {first, second} & set(report.cycle)


def rotated(angle, n=8):
    """Points of a circle and their rotation, float64: 2-cycles gain only beyond 90 degrees, n-cycles at any angle."""
    places = 2 * np.pi * np.arange(n) / n
    x0 = np.stack([np.cos(places), np.sin(places)], 1)
    return Pair(x0, np.stack([np.cos(places + angle), np.sin(places + angle)], 1))


def test_what_only_longer_cycles_show_is_found():
    """Catches a check of 2-cycles alone: a circle of 8 points, rotated by 80 degrees, is monotone in pairs.

    The exact assignment turns everything back by two places, in two cycles of 4: it gains cos(80 - 90) - cos(80).
    """
    pairs = rotated(np.deg2rad(80))
    gains = [
        pairs.x0[i] @ (pairs.x1[j] - pairs.x1[i]) + pairs.x0[j] @ (pairs.x1[i] - pairs.x1[j])
        for i, j in itertools.combinations(range(8), 2)
    ]
    assert max(gains) < 0
    report = verify_optimal(pairs, cycles=1, longest=2)
    assert (report.optimal, len(report.cycle), report.longer_cycles) == (False, 4, 0)
    assert report.largest_gain == pytest.approx(math.cos(np.deg2rad(10)) - math.cos(np.deg2rad(80)))


def test_random_cycles_are_looked_at(monkeypatch):
    """Catches random cycles that are counted and not evaluated: here no exact assignment helps."""
    from fvjax.data.ot_benchmark import _discrete

    monkeypatch.setattr(_discrete, "_best_exchange", lambda sets, subset: (-np.inf, ()))
    pairs = rotated(np.deg2rad(80), n=4)  # a 4-cycle gains nothing: 80 degrees are nearer to 90 than to 0
    assert not verify_optimal(pairs, cycles=2000, longest=4).optimal
    assert verify_optimal(pairs, cycles=2000, longest=2).optimal


def test_large_sets_are_checked_in_part(monkeypatch):
    """Catches an assignment of unbounded size, and one whose size is not reported."""
    from fvjax.data.ot_benchmark import _discrete

    monkeypatch.setattr(_discrete, "_ASSIGNED", 30)
    x0, x1 = monotone_pairs(100)
    assert verify_optimal(Pair(x0, x1), cycles=1).assigned == 30
    report = verify_optimal(Pair(x0, np.roll(x1, 1, axis=0)), cycles=1, longest=2)
    assert not report.optimal
    assert max(report.cycle) > 30  # indices of the whole set, not of the part


def test_ties_and_degenerate_sets_are_optimal():
    """Catches rounding that is taken for a gain: equal points, a single pair, one place only."""
    x0, x1 = monotone_pairs(20, dtype=np.float32)
    repeated = Pair(np.tile(x0, (2, 1)), np.tile(x1, (2, 1)))
    assert verify_optimal(repeated).optimal
    assert verify_optimal(Pair(x0[:1], x1[:1])).optimal
    alone = verify_optimal(Pair(x0[:1], x1[:1]), longest=2)
    assert (alone.optimal, alone.cycle, alone.two_cycles) == (True, (), 0)
    assert verify_optimal(Pair(np.full_like(x0, 0.1), np.roll(x1, 1, axis=0))).optimal


def test_far_from_the_origin_rounding_is_forgiven_and_shuffling_is_not():
    """Catches a tolerance that knows the spread only: at 300 float32 points are rounded by 3e-5."""
    x0, x1 = monotone_pairs(200, dtype=np.float32)
    far = Pair(x0 + np.float32(300), x1 - np.float32(300))
    assert verify_optimal(far).optimal
    assert not verify_optimal(Pair(far.x0, np.roll(far.x1, 1, axis=0))).optimal


def test_the_checks_options_are_checked():
    """Catches a check of nothing."""
    pairs = monotone_pairs(4)
    for options, message in (
        ({"cycles": 0}, "cycles must be an integer >= 1, got 0"),
        ({"longest": 1}, "longest must be an integer >= 2, got 1"),
        ({"n": 0}, "n must be an integer >= 1, got 0"),
        ({"tolerance": -1.0}, "tolerance must be >= 0 and finite, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            verify_optimal(pairs, **options)
    with pytest.raises(ValueError, match="x0 and x1 must have the same shape"):
        verify_optimal(Pair(pairs.x0, pairs.x1[:3]))
    with pytest.raises(ValueError, match="x1 must be finite"):
        verify_optimal(Pair(pairs.x0, np.full_like(pairs.x1, np.inf)))
