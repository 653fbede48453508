"""Couplings: points are kept, laws are right, options mean what they say."""

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from scipy.optimize import linear_sum_assignment
from scipy.stats import chi2
from sklearn.datasets import load_digits

from fvjax import couplings
from fvjax.types import AffineMap, Coupling

SEEDS = st.integers(0, 2**31 - 1)
EXACT = couplings.minibatch_ot()
SINKHORN = couplings.minibatch_ot(method="sinkhorn")
KEY = jax.random.key(0)
STRUGGLING = couplings.minibatch_ot(method="sinkhorn", epsilon=1e-3, max_iterations=7)
PERMUTING = {
    "paired": couplings.paired,
    "independent": couplings.independent,
    "shuffled": couplings.shuffled,
    "exact": EXACT,
    "sinkhorn": SINKHORN,
}


def clouds(seed: int, n: int, dim: int, dtype: Any = float) -> tuple[jax.Array, jax.Array]:
    """Two samples whose laws differ in place and scale."""
    key0, key1 = jax.random.split(jax.random.key(seed))
    return jax.random.normal(key0, (n, dim), dtype), 1 + 2 * jax.random.normal(key1, (n, dim), dtype)


def squared_distances(x0: Any, x1: Any) -> np.ndarray:
    """All n^2 costs in float64, by differences."""
    flat0, flat1 = (np.asarray(x, float).reshape(len(x), -1) for x in (x0, x1))
    return np.stack([np.square(row - flat1).sum(1) for row in flat0])


def least_cost(cost: np.ndarray) -> float:
    """The exact cost by scipy, mean over pairs."""
    return float(cost[linear_sum_assignment(cost)].mean())


def in_order(x: Any) -> np.ndarray:
    """The rows sorted: equal for equal multisets."""
    rows = np.asarray(x).reshape(len(x), -1)
    return rows[np.lexsort(rows.T)]


def counts_of(permutations: Any) -> dict[tuple[int, ...], int]:
    """How often each row occurs."""
    found, counts = np.unique(np.asarray(permutations), axis=0, return_counts=True)
    return {tuple(map(int, row)): int(count) for row, count in zip(found, counts, strict=True)}


def assert_uniform(counts: dict[tuple[int, ...], int], outcomes: list[tuple[int, ...]]) -> None:
    """Exactly these outcomes, and chi-square below its 99.9% quantile (keys are fixed, so there is no flicker)."""
    assert sorted(counts) == sorted(outcomes)
    expected = sum(counts.values()) / len(outcomes)
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < chi2.ppf(0.999, len(outcomes) - 1)


def drawn_permutations(coupling: Coupling, n: int, draws: int) -> np.ndarray:
    """Index of the partner of each x0 in `clouds(2, n, 2)`, [draws, n]."""
    x0, x1 = clouds(2, n, 2)
    keys = jax.random.split(jax.random.key(5), draws)
    partners = jax.jit(jax.vmap(lambda key: coupling(key, x0, x1).x1))(keys)
    return np.argmax(np.all(np.asarray(partners)[:, :, None] == np.asarray(x1), axis=-1), axis=-1)


@pytest.mark.parametrize("name", PERMUTING)
@given(seed=SEEDS, n=st.sampled_from([2, 9]), ties=st.booleans())
@settings(max_examples=10)
def test_every_point_is_used_exactly_once(name, seed, n, ties):
    """Catches a point that is dropped or doubled, also among equal points, and an x0 that moves."""
    x0, x1 = clouds(seed, n, 2)
    x1 = jnp.round(x1) if ties else x1
    pair = PERMUTING[name](jax.random.key(seed), x0, x1)
    np.testing.assert_array_equal(pair.x0, x0)
    np.testing.assert_array_equal(in_order(pair.x1), in_order(x1))


@pytest.mark.parametrize("name", PERMUTING)
def test_jit_equals_eager(name):
    """Catches a coupling that cannot be traced, or that draws something else when it is."""
    x0, x1 = clouds(0, 9, 2)
    key = jax.random.key(3)
    np.testing.assert_array_equal(jax.jit(PERMUTING[name])(key, x0, x1).x1, PERMUTING[name](key, x0, x1).x1)


@pytest.mark.parametrize("name", PERMUTING)
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32])
def test_points_keep_their_shape_and_dtype(name, dtype, x64):
    """Catches a cast of the data by the solver's arithmetic; images and 8-bit pixels must come back as they went in."""
    images = jnp.asarray(load_digits().images[:12], dtype)
    pair = PERMUTING[name](jax.random.key(0), images[:6], images[6:])
    assert pair.x0.dtype == pair.x1.dtype == dtype
    np.testing.assert_array_equal(pair.x0, images[:6])
    np.testing.assert_array_equal(in_order(pair.x1), in_order(images[6:]))


def test_paired_changes_nothing():
    """Catches a permutation where the given pairs are the data."""
    x0, x1 = clouds(0, 4, 2)
    pair = couplings.paired(KEY, x0, x1)
    np.testing.assert_array_equal(pair.x0, x0)
    np.testing.assert_array_equal(pair.x1, x1)


def test_independent_is_uniform_over_all_permutations():
    """Catches a biased shuffle, and one that forbids the identity."""
    counts = counts_of(drawn_permutations(couplings.independent, 3, 3000))
    assert_uniform(counts, list(itertools.permutations(range(3))))


@given(seed=SEEDS, n=st.sampled_from([2, 3, 9]))
def test_derangement_is_a_permutation_without_fixed_point(seed, n):
    """Catches a rejection that accepts too early, or returns no permutation."""
    result = np.asarray(couplings.derangement(jax.random.key(seed), n))
    assert sorted(result) == list(range(n))
    assert np.all(result != np.arange(n))


def test_derangements_are_uniform():
    """Catches repair instead of rejection (a cyclic shift of the fixed points, say): not all 9 are equally frequent."""
    keys = jax.random.split(jax.random.key(1), 4500)
    counts = counts_of(jax.vmap(lambda key: couplings.derangement(key, 4))(keys))
    assert_uniform(counts, [p for p in itertools.permutations(range(4)) if all(p[i] != i for i in range(4))])


def test_shuffled_breaks_every_pair():
    """Catches a plain permutation in the place of the derangement."""
    partners = drawn_permutations(couplings.shuffled, 5, 200)
    assert np.all(partners != np.arange(5))
    assert len(np.unique(partners, axis=0)) > 30  # of 44: drawn, not one fixed derangement


def test_affine_replaces_the_targets():
    """Catches a transposed matrix, a lost shift and a dependence on the given x1; casts to the dtype of x0."""
    x0, x1 = clouds(0, 6, 3)
    matrix, shift = np.arange(9.0).reshape(3, 3), np.array([1.0, -2.0, 3.0])
    coupling = couplings.affine(AffineMap(matrix, shift))
    pair = jax.jit(coupling)(KEY, x0, x1)
    np.testing.assert_allclose(pair.x1, np.asarray(x0, float) @ matrix.T + shift, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(pair.x1, jax.jit(coupling)(jax.random.key(1), x0, x1 + 7).x1)
    assert pair.x1.dtype == x0.dtype


def test_rotated_is_counter_example_1():
    """Catches an inexact half turn: x1 = R_180 x0 + 5 is 5 - x0 to the last bit."""
    x0, x1 = clouds(0, 6, 2)
    pair = couplings.rotated(couplings.rotation_matrix(math.pi, 2), 5)(KEY, x0, x1)
    np.testing.assert_array_equal(pair.x1, 5 - x0)


def test_rotated_shift_and_traced_rotation():
    """Catches a shift that is dropped or must be full length, and a check that breaks under jit."""
    x0, x1 = clouds(0, 6, 2)
    key = jax.random.key(0)
    quarter = couplings.rotation_matrix(math.pi / 2, 2)
    turned = jnp.stack([-x0[:, 1], x0[:, 0]], axis=1)
    np.testing.assert_array_equal(couplings.rotated(quarter)(key, x0, x1).x1, turned)
    shift = jnp.array([1.0, -2.0])
    np.testing.assert_array_equal(couplings.rotated(quarter, shift)(key, x0, x1).x1, turned + shift)
    traced = jax.jit(lambda r: couplings.rotated(r, shift)(key, x0, x1).x1)(quarter)
    np.testing.assert_array_equal(traced, turned + shift)


@given(a=st.floats(-7, 7), b=st.floats(-7, 7), dim=st.sampled_from([1, 2, 5]), in_basis=st.booleans())
def test_rotations_form_a_group(x64, a, b, dim, in_basis):
    """Catches a wrong sign, an axis that two planes share, and a basis on one side only."""
    basis = couplings.random_basis(jax.random.key(dim), dim) if in_basis else None
    r_a, r_b, r_ab = (np.asarray(couplings.rotation_matrix(x, dim, basis=basis)) for x in (a, b, a + b))
    np.testing.assert_allclose(r_a @ r_a.T, np.eye(dim), atol=1e-14)
    np.testing.assert_allclose(r_a @ r_b, r_ab, atol=2e-14)
    np.testing.assert_allclose(np.linalg.det(r_a), 1, atol=1e-14)
    np.testing.assert_allclose(np.trace(r_a), 2 * (dim // 2) * math.cos(a) + dim % 2, atol=1e-13)


def test_rotation_in_a_basis_turns_its_columns(x64):
    """Catches Q^T R Q for Q R Q^T: the first column must go towards the second, the odd last one stay."""
    q = couplings.random_basis(jax.random.key(0), 5)
    matrix = couplings.rotation_matrix(0.7, 5, basis=q)
    np.testing.assert_allclose(matrix @ q[:, 0], math.cos(0.7) * q[:, 0] + math.sin(0.7) * q[:, 1], atol=1e-15)
    np.testing.assert_allclose(matrix @ q[:, 3], math.cos(0.7) * q[:, 3] - math.sin(0.7) * q[:, 2], atol=1e-15)
    np.testing.assert_allclose(matrix @ q[:, 4], q[:, 4], atol=1e-15)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("dim", [4, 5])
def test_half_turn_is_exact(dtype, dim, x64):
    """Catches sin(pi) != 0, which in float32 is 9e-8: Python, array and traced angle, with and without a basis."""
    exact = -np.eye(dim)
    exact[-1, -1] = 1 if dim % 2 else -1
    angle = jnp.asarray(math.pi, dtype)
    traced = jax.jit(lambda a: couplings.rotation_matrix(a, dim))(angle)
    for matrix in (couplings.rotation_matrix(math.pi, dim), couplings.rotation_matrix(angle, dim), traced):
        np.testing.assert_array_equal(matrix, exact)
    if dim % 2 == 0:
        basis = couplings.random_basis(jax.random.key(0), dim).astype(dtype)
        in_basis = couplings.rotation_matrix(math.pi, dim, basis=basis)
        np.testing.assert_array_equal(in_basis, exact)
        assert in_basis.dtype == dtype


def test_rotation_angle_is_traced_and_differentiable():
    """Catches a jit that disagrees with the host's arithmetic, and a reduction of the angle that loses its gradient."""
    traced = jax.jit(jax.value_and_grad(lambda a: couplings.rotation_matrix(a, 3)[1, 0]))
    for angle in (0.3, 2.618, math.pi, -9.0):
        host = np.asarray(couplings.rotation_matrix(angle, 3))
        np.testing.assert_allclose(host[:2, 0], [math.cos(angle), math.sin(angle)], atol=1e-7)
        np.testing.assert_allclose(traced(angle), [math.sin(angle), math.cos(angle)], atol=2e-6)


def test_random_basis_is_haar():
    """Catches QR without its sign correction, whose trace has mean -1.4: Haar has E tr Q = 0, E (tr Q)^2 = 1."""
    keys = jax.random.split(jax.random.key(0), 4000)
    bases = np.asarray(jax.jit(jax.vmap(lambda key: couplings.random_basis(key, 3)))(keys), float)
    np.testing.assert_allclose(bases @ bases.swapaxes(1, 2), np.broadcast_to(np.eye(3), bases.shape), atol=1e-5)
    traces = np.trace(bases, axis1=1, axis2=2)
    for sample, mean in ((traces, 0), (traces**2, 1), (np.linalg.det(bases), 0)):
        assert abs(sample.mean() - mean) < 4 * sample.std() / math.sqrt(len(sample))


@pytest.mark.parametrize("dim", [2, 40])
def test_assignment_has_the_least_cost(dim):
    """Catches a transposed assignment and a cost that is not the squared distance: scipy is the reference."""
    x0, x1 = clouds(dim, 50, dim)
    cost = squared_distances(x0, x1)
    result = np.asarray(couplings.assignment(x0, x1))
    assert sorted(result) == list(range(50))
    np.testing.assert_allclose(cost[np.arange(50), result].mean(), least_cost(cost), rtol=1e-6)


def test_assignment_of_digits():
    """Catches examples that are not flattened, on real images; integers with many ties."""
    images = load_digits().images[:120]
    x0, x1 = jnp.asarray(images[:60], jnp.float32), jnp.asarray(images[60:], jnp.float32)
    cost = squared_distances(x0, x1)
    result = np.asarray(couplings.assignment(x0, x1))
    assert sorted(result) == list(range(60))
    assert cost[np.arange(60), result].sum() == cost[linear_sum_assignment(cost)].sum()
    np.testing.assert_array_equal(EXACT(KEY, x0, x1).x1, x1[result])


@given(seed=SEEDS)
def test_exact_coupling_on_the_line_is_monotone(seed):
    """Catches any other cost than a convex one: on the line optimal transport keeps the order."""
    x0, x1 = clouds(seed, 9, 1)
    pair = EXACT(KEY, x0, x1)
    np.testing.assert_array_equal(np.argsort(pair.x0[:, 0]), np.argsort(pair.x1[:, 0]))


@pytest.mark.parametrize("dim", [2, 2000])
def test_sinkhorn_plan_reports_its_own_numbers(dim):
    """Catches a wrong unit of epsilon (the mean, the variance), a cost of other points, and marginals that are off."""
    x0, x1 = clouds(0, 64, dim)
    cost = squared_distances(x0, x1)
    solution = couplings.sinkhorn_plan(x0, x1, epsilon=0.1)
    plan = np.asarray(solution.plan, float)
    marginal_error = np.abs(plan.sum(0) - 1 / 64).sum() + np.abs(plan.sum(1) - 1 / 64).sum()
    assert solution.converged
    assert marginal_error < 1e-3
    np.testing.assert_allclose(marginal_error, solution.error, atol=1e-5)
    np.testing.assert_allclose(solution.epsilon, 0.1 * cost.std(), rtol=1e-5)
    np.testing.assert_allclose(solution.cost, np.sum(plan * cost), rtol=1e-5)


def test_sinkhorn_plan_solves_its_problem(x64):
    """Catches a plan of another epsilon than it reports: the optimality condition log P = (f + g - cost) / epsilon."""
    x0, x1 = clouds(1, 12, 3)
    solution = couplings.sinkhorn_plan(x0, x1, threshold=1e-12, max_iterations=20_000)
    assert solution.converged
    assert solution.error < 1e-12
    residual = np.asarray(solution.log_plan) + squared_distances(x0, x1) / float(solution.epsilon)
    residual -= residual.mean(0)
    np.testing.assert_allclose(residual, np.broadcast_to(residual.mean(1, keepdims=True), residual.shape), atol=1e-9)


@pytest.mark.parametrize("dim", [2, 2000])
def test_sinkhorn_cost_falls_to_the_exact_one(dim):
    """Catches an epsilon that does not regularise, or that means something else in high dimension.

    There 0.05 of the MEAN cost is nearly the independent plan; the default must recover 90% of what OT gains.
    """
    x0, x1 = clouds(0, 64, dim)
    cost = squared_distances(x0, x1)
    exact, independent = least_cost(cost), cost.mean()
    plans = [couplings.sinkhorn_plan(x0, x1, epsilon=e) for e in (1e4, 1.0, 0.2, 0.05, 0.01)]
    assert all(p.converged for p in plans)
    remaining = (np.array([float(p.cost) for p in plans]) - exact) / (independent - exact)
    assert np.all(np.diff(remaining) < 0)
    assert abs(remaining[0] - 1) < 1e-3
    assert remaining[3] < 0.1
    assert 0 <= remaining[4] < 0.02
    np.testing.assert_allclose(64**2 * np.asarray(plans[0].plan), 1, atol=5e-3)


@pytest.mark.parametrize("dim", [2, 2000])
def test_sinkhorn_knows_no_unit_and_no_origin(dim):
    """Catches an absolute epsilon, and costs whose spread is lost to rounding beside their mean."""
    x0, x1 = clouds(0, 64, dim)
    plan = 64 * couplings.sinkhorn_plan(x0, x1).plan
    np.testing.assert_allclose(64 * couplings.sinkhorn_plan(100 * x0, 100 * x1).plan, plan, atol=1e-3)
    np.testing.assert_allclose(64 * couplings.sinkhorn_plan(x0 + 100, x1 + 100).plan, plan, atol=1e-3)


def test_sinkhorn_pairing_knows_no_unit():
    """Catches a unit that enters between plan and pairing: in powers of two even the rounding is the same."""
    x0, x1 = clouds(0, 9, 2)
    np.testing.assert_array_equal(SINKHORN(KEY, 128 * x0, 128 * x1).x1, 128 * SINKHORN(KEY, x0, x1).x1)


def law_of_drawing(plan: np.ndarray) -> dict[tuple[int, ...], float]:
    """Odds of each permutation: rows in all orders, each picks among the free columns in proportion to `plan`."""
    orders = list(itertools.permutations(range(len(plan))))
    law = dict.fromkeys(orders, 0.0)
    for order, permutation in itertools.product(orders, orders):
        free, probability = set(range(len(plan))), 1.0 / len(orders)
        for row in order:
            probability *= plan[row, permutation[row]] / plan[row, sorted(free)].sum()
            free.remove(permutation[row])
        law[permutation] += probability
    return law


def test_sinkhorn_pairing_has_the_stated_law():
    """Catches a wrong temperature, noise that rows share, and rows in a fixed order: all six odds are enumerated."""
    coupling = couplings.minibatch_ot(method="sinkhorn", epsilon=0.2)
    law = law_of_drawing(np.asarray(couplings.sinkhorn_plan(*clouds(2, 3, 2), epsilon=0.2).plan, float))
    counts = counts_of(drawn_permutations(coupling, 3, 20_000))
    statistic = sum((counts.get(p, 0) - 20_000 * share) ** 2 / (20_000 * share) for p, share in law.items())
    assert statistic < chi2.ppf(0.999, 5)


def test_sinkhorn_pairing_at_both_ends():
    """Catches a drawing that favours some rows: uniform over permutations for large epsilon, exact for small."""
    uniform = couplings.minibatch_ot(method="sinkhorn", epsilon=1e4)
    assert_uniform(counts_of(drawn_permutations(uniform, 3, 3000)), list(itertools.permutations(range(3))))
    x0 = jnp.eye(9)  # every wrong partner costs the same 2: the plan is sharp as soon as epsilon is small
    x1 = x0[::-1]
    sharp = couplings.minibatch_ot(method="sinkhorn", epsilon=0.01)
    for seed in range(20):
        np.testing.assert_array_equal(sharp(jax.random.key(seed), x0, x1).x1, x0)


def test_sinkhorn_of_equal_points_is_a_pairing():
    """Catches a division by a spread of zero, and by a single pair's."""
    for n in (1, 2):
        solution = couplings.sinkhorn_plan(jnp.zeros((n, 2)), jnp.ones((n, 2)))
        assert solution.converged
        np.testing.assert_allclose(solution.plan, np.full((n, n), 1 / n**2), rtol=1e-5)
        assert solution.cost == pytest.approx(2)


def warnings_of(call: Callable[[], Any]) -> list[str]:
    """The messages of all RuntimeWarnings that `call` causes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.block_until_ready(call())
        jax.effects_barrier()
    assert all(w.category is RuntimeWarning for w in caught)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_sinkhorn_warns_once_if_it_does_not_converge(transform):
    """Catches silence, and an iteration limit that is rounded up to ott's ten; the result must still be a pairing."""
    x0, x1 = clouds(0, 9, 2)
    pairs = []
    messages = warnings_of(lambda: pairs.append(transform(STRUGGLING)(KEY, x0, x1)))
    assert len(messages) == 1
    solution = couplings.sinkhorn_plan(x0, x1, epsilon=1e-3, max_iterations=7)
    assert not solution.converged
    assert f"within 7 iterations: the marginals are off by {float(solution.error):.3g} in L1" in messages[0]
    assert solution.error > couplings.sinkhorn_plan(x0, x1, epsilon=1e-3, max_iterations=10).error
    np.testing.assert_array_equal(in_order(pairs[0].x1), in_order(x1))


def test_sinkhorn_is_silent_if_it_converges():
    """Catches the callback that `cond` under vmap runs for every batch, converged or not."""
    x0, x1 = clouds(0, 9, 2)
    batches = jnp.stack([x0, 2 * x0])
    keys = jax.random.split(jax.random.key(0))
    assert warnings_of(lambda: SINKHORN(keys[0], x0, x1)) == []
    assert warnings_of(lambda: jax.vmap(SINKHORN, (0, 0, None))(keys, batches, x1)) == []


@pytest.mark.parametrize(
    ("coupling", "hole"),
    [
        (EXACT, True),
        (SINKHORN, True),
        (couplings.minibatch_ot(method="sinkhorn", epsilon=1e-30), False),
        (couplings.minibatch_ot(method="sinkhorn", epsilon=1e-38), False),
    ],
    ids=["exact nan", "sinkhorn nan", "epsilon 1e-30", "epsilon 1e-38"],
)
def test_failed_solver_still_gives_a_pairing(coupling, hole):
    """Catches doubled points where the plan is useless: nan under jit (unchecked), overflow from a tiny epsilon."""
    x0, x1 = clouds(0, 9, 2)
    call, x0 = (jax.jit(coupling), x0.at[0, 0].set(jnp.nan)) if hole else (coupling, x0)
    pairs = []
    messages = warnings_of(lambda: pairs.append(call(KEY, x0, x1)))
    assert len(messages) == (coupling is not EXACT)
    np.testing.assert_array_equal(in_order(pairs[0].x1), in_order(x1))


def test_diverged_plan_has_not_converged():
    """Catches ott's own flag, which is True where the error became infinite.

    Whether it does, or stays at some number of the order of n, depends on how XLA rounds.
    """
    solution = couplings.sinkhorn_plan(*clouds(0, 9, 2), epsilon=1e-30)
    assert not solution.error < 1
    assert not solution.converged


def test_epsilon_may_be_traced():
    """Catches an epsilon that is compiled in: a sweep must not recompile."""
    x0, x1 = clouds(0, 64, 2)
    cost = jax.jit(lambda e: couplings.sinkhorn_plan(x0, x1, epsilon=e).cost)
    for epsilon in (0.05, 0.5):
        np.testing.assert_allclose(cost(epsilon), couplings.sinkhorn_plan(x0, x1, epsilon=epsilon).cost, rtol=1e-5)


ONES, EYE = jnp.ones((4, 2)), jnp.eye(2)
HOLE = ONES.at[1, 1].set(jnp.nan)


@pytest.mark.parametrize("coupling", [*PERMUTING.values(), couplings.rotated(EYE)], ids=[*PERMUTING, "rotated"])
def test_unequal_batches_are_refused(coupling):
    """Catches a silent cut to the shorter batch, and a scalar in the place of a batch."""
    message = r"x0 and x1 must have the same shape, got \(4, 2\) and \(3, 2\)"
    with pytest.raises(ValueError, match=message):
        coupling(KEY, ONES, ONES[:3])
    with pytest.raises(ValueError, match=message):
        jax.jit(coupling)(KEY, ONES, ONES[:3])
    with pytest.raises(ValueError, match="x0 and x1 must have one common leading axis"):
        coupling(KEY, 1.0, 2.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: couplings.derangement(KEY, 1), r"n must be >= 2 \(one element has no derangement\), got 1"),
        (lambda: couplings.derangement(KEY, 0), "n must be an integer >= 1, got 0"),
        (lambda: couplings.derangement(KEY, 2.0), r"n must be an integer >= 1, got 2\.0"),
        (lambda: couplings.shuffled(KEY, ONES[:1], ONES[:1]), r"n must be >= 2 .*, got 1"),
        (lambda: couplings.affine(AffineMap(ONES, ONES[0])), r"map.matrix must be a square matrix, got shape \(4, 2\)"),
        (lambda: couplings.affine(AffineMap(EYE, ONES[:, 0])), r"map.shift must have shape \(2,\), got \(4,\)"),
        (lambda: couplings.rotated(EYE)(KEY, ONES.T, ONES.T), r"x0 must have shape \(2, 2\), got \(2, 4\)"),
        (lambda: couplings.rotated(EYE)(KEY, ONES > 0, ONES > 0), "x0 must be floating point, got bool"),
        (lambda: couplings.rotated(2 * EYE), r"rotation must be orthogonal, got a largest \|Q Q\^T - I\| of 3"),
        (lambda: couplings.rotated(ONES), r"rotation must be a square matrix, got shape \(4, 2\)"),
        (lambda: couplings.rotated(EYE, jnp.ones(3)), r"shift must have shape \(\) or \(2,\), got \(3,\)"),
        (lambda: couplings.rotation_matrix(1.0, 0), "dim must be an integer >= 1, got 0"),
        (lambda: couplings.rotation_matrix(jnp.ones(2), 2), r"angle must have shape \(\), got \(2,\)"),
        (lambda: couplings.rotation_matrix(math.nan, 2), "angle must be finite, got nan"),
        (lambda: couplings.rotation_matrix(1.0, 3, basis=EYE), r"basis must have shape \(3, 3\), got \(2, 2\)"),
        (lambda: couplings.rotation_matrix(1.0, 2, basis=2 * EYE), "basis must be orthogonal, got"),
        (lambda: couplings.random_basis(KEY, 0), "dim must be an integer >= 1, got 0"),
        (lambda: couplings.minibatch_ot(method="emd"), "method must be one of exact, sinkhorn, got 'emd'"),
        (lambda: couplings.minibatch_ot(epsilon=0.1), r"epsilon must be None where method is 'exact' .*, got 0\.1"),
        (lambda: couplings.minibatch_ot(max_iterations=9), "max_iterations must be None where .*, got 9"),
        (lambda: couplings.minibatch_ot(threshold=0.1), r"threshold must be None where .*, got 0\.1"),
        (lambda: couplings.minibatch_ot(method="sinkhorn", epsilon=0), "epsilon must be > 0 and finite, got 0"),
        (lambda: couplings.sinkhorn_plan(ONES, ONES, epsilon=-1), "epsilon must be > 0 and finite, got -1"),
        (lambda: couplings.sinkhorn_plan(ONES, ONES, epsilon=math.inf), "epsilon must be > 0 and finite, got inf"),
        (lambda: couplings.sinkhorn_plan(ONES, ONES, threshold=0), "threshold must be > 0 and finite, got 0"),
        (
            lambda: couplings.sinkhorn_plan(ONES, ONES, max_iterations=0),
            "max_iterations must be an integer >= 1, got 0",
        ),
        (lambda: couplings.sinkhorn_plan(ONES, HOLE), "x1 must be finite, got 1 of 8 entries that are not"),
        (lambda: couplings.assignment(HOLE, ONES), "x0 must be finite, got 1 of 8 entries that are not"),
        (lambda: SINKHORN(KEY, HOLE, ONES), "x0 must be finite"),
        (lambda: EXACT(KEY, ONES, HOLE), "x1 must be finite"),
        (lambda: couplings.assignment(ONES[:0], ONES[:0]), r"must hold at least one example, got shape \(0, 2\)"),
        (lambda: couplings.sinkhorn_plan(ONES, ONES[:3]), "x0 and x1 must have the same shape"),
    ],
)
def test_bad_input_is_named(call, message):
    """Catches an option that is ignored, and bad input that ends in a traceback from inside jax or ott."""
    with pytest.raises(ValueError, match=message):
        call()
