"""Claims 3 and 4 of the paper, executed: memorization (Prop. 2), idempotence (Lemma 2), and Counter Example 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fvjax
from fvjax import gaussian
from fvjax.couplings import rotated, rotation_matrix
from fvjax.gaussian import AffineMap
from fvjax.pairs import exact_loss, identifiability, memorizing_field

SOLVERS = {
    "euler 1": {"solver": "euler", "steps": 1},
    "euler 10": {"solver": "euler", "steps": 10},
    "euler 11": {"solver": "euler", "steps": 11},
    "dopri5": {"solver": "dopri5", "rtol": 1e-8, "atol": 1e-8},
}


def random_pairs(n: int, dim: int, seed: int = 0) -> fvjax.Pair:
    """Independent ends: for d = 1 and 2 the lines cross each other in many points."""
    x0, x1 = np.random.default_rng(seed).normal(size=(2, n, dim))
    return fvjax.Pair(jnp.asarray(x0), jnp.asarray(x1))


def opposite_pairs(n: int = 16, seed: int = 0) -> fvjax.Pair:
    """Counter Example 1, T(x0) = R_180 x0 + 5, with coordinates in multiples of 1/16: no rounding anywhere."""
    x0 = np.random.default_rng(seed).choice(np.arange(-48, 49), (n, 2), replace=False) / 16
    return rotated(rotation_matrix(np.pi, 2), 5.0)(jax.random.key(0), jnp.asarray(x0), jnp.asarray(x0))


def rectify(pairs: fvjax.Pair, field: fvjax.VelocityField, **options) -> fvjax.Pair:
    """One ReFlow step with a given field: the sources, and where its flow takes them."""
    flow = jax.jit(jax.vmap(lambda x: fvjax.transport(field, None, x, **options)))
    return fvjax.Pair(pairs.x0, flow(pairs.x0))


@pytest.mark.parametrize("solver", SOLVERS)
def test_lemma_2_rectification_is_idempotent(x64: None, solver: str) -> None:
    """Catches a ReFlow step that moves pairs which need none: x1 = M x0 + b, M positive definite, no two lines meet.

    Also a second step, and the population: the flow of the pair-optimal field of a 150 degree rotation is the rotation.
    """
    x0 = random_pairs(12, 2).x0
    pairs = fvjax.couplings.affine(AffineMap(jnp.array([[2.0, 0.5], [0.5, 0.7]]), jnp.array([3.0, -1.0])))(
        jax.random.key(0), x0, x0
    )
    once = rectify(pairs, memorizing_field(pairs), **SOLVERS[solver])
    np.testing.assert_allclose(once.x1, pairs.x1, atol=1e-9)
    np.testing.assert_allclose(rectify(once, memorizing_field(once), **SOLVERS[solver]).x1, pairs.x1, atol=1e-9)
    turn = AffineMap(rotation_matrix(np.deg2rad(150.0), 2), jnp.full(2, 5.0))
    optimal = gaussian.pair_optimal(turn)
    flow = rectify(pairs, lambda _, t, x: gaussian.affine_field(optimal, t, x), **SOLVERS[solver])
    np.testing.assert_allclose(flow.x1, jax.vmap(turn)(x0), atol=1e-7)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_proposition_2_zero_loss(x64: None, dim: int) -> None:
    """Catches a loss on crossing lines: 0 at 64 nodes in t, and at random times, with 30 crossings of 30 pairs or more.

    In one dimension two lines meet whenever their order changes; in two they cross, but at different times.
    """
    pairs = random_pairs(30, dim)
    if dim == 1:
        order = [np.sign(x[:, None, 0] - x[None, :, 0]) for x in map(np.asarray, pairs)]
        assert np.sum(order[0] != order[1]) / 2 > 30
    field = memorizing_field(pairs)
    assert exact_loss(field, None, pairs, fvjax.linear()) < 1e-25
    paths = fvjax.draw_paths(jax.random.key(1), jax.tree.map(lambda x: jnp.tile(x, (20, 1)), pairs), fvjax.linear())
    losses = jax.vmap(fvjax.squared_error(field), (None, 0))(None, paths)
    assert losses.max() < 1e-25


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_proposition_2_the_flow_returns_the_pairs(x64: None, dim: int, solver: str) -> None:
    """Catches a field that lets go where lines cross: from each training x0 the ODE arrives at its own x1, to 1e-9."""
    pairs = random_pairs(30, dim)
    found = rectify(pairs, memorizing_field(pairs), **SOLVERS[solver])
    np.testing.assert_allclose(found.x1, pairs.x1, atol=1e-9)


def test_proposition_2_holds_for_curved_paths(x64: None) -> None:
    """Catches a memorizing field with the velocity of straight lines only: quarter circles, Heun with 1000 steps."""
    pairs = random_pairs(10, 2)
    field = memorizing_field(pairs, fvjax.trigonometric())
    assert exact_loss(field, None, pairs, fvjax.trigonometric()) < 1e-25
    found = rectify(pairs, field, solver="heun", steps=1000)
    np.testing.assert_allclose(found.x1, pairs.x1, atol=1e-5)


def test_counter_example_1_premises(x64: None) -> None:
    """Catches pairs that are not those of the example: T is invertible, x0 -> x_t is, but for t = 1/2."""
    pairs = opposite_pairs()
    np.testing.assert_array_equal(pairs.x1, 5 - pairs.x0)
    np.testing.assert_array_equal((pairs.x0 + pairs.x1) / 2, np.full((16, 2), 2.5))
    found = identifiability(jax.random.key(0), pairs, fvjax.linear(), jnp.array([0.25, 0.49, 0.5, 0.51, 1.0]))
    np.testing.assert_allclose(found.perplexity, [1, 1, 16, 1, 1], rtol=1e-12)
    # A set of times of measure zero: the loss of the memorizing field is 0 all the same.
    assert exact_loss(memorizing_field(pairs), None, pairs, fvjax.linear()) < 1e-25


def test_counter_example_1_depends_on_the_solver(x64: None) -> None:
    """Catches a flow that is said to be one thing: odd Euler steps return the pairs, even ones send all to one place.

    Even steps stop at t = 1/2, where the field is the mean of all velocities. From there every source goes the same
    way, to within a step of one target: the image of 16 points is one point.
    """
    pairs = opposite_pairs()
    field = memorizing_field(pairs)
    for steps in (1, 11, 101):
        np.testing.assert_allclose(rectify(pairs, field, solver="euler", steps=steps).x1, pairs.x1, atol=1e-10)
    for steps in (2, 10, 100):
        found = rectify(pairs, field, solver="euler", steps=steps).x1
        assert np.ptp(found, axis=0).max() < 1e-10
        assert np.median(np.linalg.norm(found - pairs.x1, axis=1)) > 1
    velocity = jnp.mean(pairs.x1 - pairs.x0, 0)
    np.testing.assert_allclose(field(None, 0.5, jnp.full(2, 2.5)), velocity, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.2, 0.05])
def test_counter_example_1_is_not_straight(x64: None, sigma: float) -> None:
    """Catches a flow that is straight after one ReFlow step: exactly solved, it is the OT map on paths with a kink.

    Of x1 = 5 - x0, x0 ~ N(0, I), the minimiser moves y = x - 5t along y = y0 sqrt((s^2 + q^2) / (s^2 + 1)), q = 1 - 2t
    (docs/theory.md, sections 5 and 6). So it returns x0 + 5, and S = int |y'|^2 dt -> 4 |x0|^2 as s -> 0. The pairs
    (x0, x0 + 5) that it makes are straight: the second step ends it.
    """
    coupling = gaussian.map_coupling(AffineMap(-jnp.eye(2), jnp.full(2, 5.0)))
    field = gaussian.population_minimiser(coupling, fvjax.constant_noise(sigma))
    x0, exact = jnp.array([1.0, -0.5]), {"solver": "dopri5", "rtol": 1e-10, "atol": 1e-10}
    np.testing.assert_allclose(fvjax.transport(field, None, x0, **exact), x0 + 5, atol=1e-7)
    q = np.linspace(-1, 1, 200_001)
    rate = 4 * q**2 / ((sigma**2 + q**2) * (sigma**2 + 1))
    expected = np.sum(x0**2) * np.trapezoid(rate, q) / 2
    found = fvjax.straightness(field, None, x0, nodes=200, **exact)
    np.testing.assert_allclose(found, expected, rtol=1e-2)
    assert abs(found / (4 * np.sum(x0**2)) - 1) < 2 * sigma + 0.05
    second = fvjax.Pair(x0[None], x0[None] + 5)
    assert fvjax.straightness(memorizing_field(second), None, x0, **exact) < 1e-12
