"""DSBM around an exact training: every round against the closed form, its orientation, resumed rounds, bad input.

A drift's parameters are a GaussianCoupling and its field the exact minimiser, so that a round's training is to take the
moments of its pairs; what is left to test is what `dsbm` does around it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvjax import bridges, flows, gaussian
from fvjax.bridges import BridgeParams, bridge_pairs, bridge_score, dsbm, probability_flow
from fvjax.interpolants import bridge_drift, brownian_bridge
from fvjax.types import Pair

SIGMA = 1.0
GOLDEN = (0.0, 0.54629, 0.61114, 0.61739, 0.61797)  # docs/theory.md, section 9: exact rounds for sigma = 1


def drift(params, t, x):
    """The exact minimiser for the coupling that is its parameters."""
    return gaussian.population_minimiser(params, bridge_drift(SIGMA))(None, t, x)


def moments(index, pairs_of, params):
    """Exact training: unit variances and the covariance of the pairs, coordinate by coordinate."""
    pairs = pairs_of(0)
    return coupling(covariance(pairs)[0], np.mean(pairs.x0), np.mean(pairs.x1), pairs.x0.shape[1])


def covariance(pairs):
    """Mean over the coordinates of Cov(x0, x1), and its standard error."""
    x0, x1 = (np.asarray(x, float) - np.mean(x, axis=0) for x in pairs)
    products = np.mean(x0 * x1, axis=1)
    return products.mean(), products.std(ddof=1) / np.sqrt(len(products))


def coupling(c, start=-0.1, end=0.1, dim=2):
    """N(start, I) and N(end, I) with Cov = c I."""
    mean, eye = jnp.full(dim, end, jnp.float32), jnp.eye(dim)
    return gaussian.gaussian_coupling(mean, eye, jnp.float32(c) * eye, source_mean=jnp.full(dim, start, jnp.float32))


def normal(mean, n=20_000, dim=2):
    """A function that draws n points of N(mean, I)."""
    return lambda key: mean + jax.random.normal(key, (n, dim))


def euler_covariance(c, sigma, steps):
    """Cov(x0, x1) that Euler-Maruyama's path makes with the exact drift for Cov = c: a product of its own factors."""
    t = np.arange(steps) / steps
    variance = (1 - t) ** 2 + t**2 + 2 * t * (1 - t) * c + sigma**2 * t * (1 - t)
    slope = (t + (1 - t) * c - t * c - (1 - t) - sigma**2 * t) / variance
    return np.prod(1 + slope / steps)


UNTRAINED = BridgeParams(coupling(0.0), coupling(0.0))
MARGINALS = (normal(-0.1), normal(0.1))
OPTIONS = {"key": jax.random.key(0), "sigma": SIGMA, "steps": 20, "chunk": 20_000}


@pytest.mark.parametrize("directions", [("backward", "forward"), ("forward",)])
def test_rounds_are_those_of_the_exact_recursion(directions):
    """Catches drifts that are trained or simulated the wrong way round, from the wrong marginal, or a lost sigma.

    Each round's pairs against what Euler-Maruyama makes of the round before, within 4 standard errors, and against the
    exact rounds, which 20 steps of the scheme miss by 0.020, 0.005, 0.001.
    """
    expected = 0.0
    for done in dsbm(moments, drift, UNTRAINED, MARGINALS, rounds=5, directions=directions, **OPTIONS):
        assert done.direction == directions[(done.index - 1) % len(directions)]
        found, error = covariance(done.pairs)
        assert abs(found - expected) < 4 * error
        np.testing.assert_allclose([np.mean(x) for x in done.pairs], [-0.1, 0.1], atol=0.03)
        assert abs(found - GOLDEN[done.index - 1]) < 0.03
        expected = euler_covariance(found, SIGMA, 20)


def test_iterative_proportional_fitting_starts_at_the_reference():
    """Catches a first round on independent pairs, or noise of another scale; and that it goes to the same bridge."""
    rounds = dsbm(moments, drift, UNTRAINED, MARGINALS, rounds=6, start="ipf", **OPTIONS)
    first = next(rounds)
    noise = np.asarray(first.pairs.x1 - first.pairs.x0)
    assert first.direction == "backward"
    assert abs(noise.std() - SIGMA) < 0.02
    assert abs(covariance(Pair(first.pairs.x0, noise))[0]) < 0.02
    last = list(rounds)[-1]
    assert abs(covariance(last.pairs)[0] - 0.618) < 0.03


def test_each_round_begins_at_real_samples():
    """Catches rounds that go on from simulated ends: the marginals that the pairs keep, and their orientation."""
    x0, x1 = MARGINALS[0](jax.random.key(1))[:50], MARGINALS[1](jax.random.key(2))[:50]
    seen = []

    def train(index, pairs_of, params):
        seen.append(pairs_of(0))
        return params

    given = Pair(x0, x1[::-1])
    done = list(dsbm(train, drift, UNTRAINED, (x0, x1), rounds=3, start=given, **OPTIONS))
    np.testing.assert_array_equal(seen[0].x0, given.x1)  # backward: its own start is the target
    np.testing.assert_array_equal(done[0].pairs.x0, x0)
    np.testing.assert_array_equal(done[1].pairs.x1, x1)  # made backward from the real targets, for the forward drift
    np.testing.assert_array_equal(seen[1].x1, x1)
    np.testing.assert_array_equal(done[2].pairs.x0, x0)  # made forward from the real sources, for the backward drift
    np.testing.assert_array_equal(seen[2].x1, x0)
    other = done[1].pairs_of(1)  # a further part: the same points, other paths
    np.testing.assert_array_equal(other.x1, x1)
    assert np.all(np.any(other.x0 != done[1].pairs.x0, axis=1))


def test_independent_start_breaks_given_pairs():
    """Catches pairs of aligned arrays that survive into the first round of IMF."""
    x0 = np.asarray(normal(0.0, 500)(jax.random.key(3)))
    first = next(iter(dsbm(moments, drift, UNTRAINED, (x0, x0), rounds=1, **OPTIONS)))
    assert abs(covariance(first.pairs)[0]) < 0.2
    np.testing.assert_array_equal(np.sort(first.pairs.x1, axis=0), np.sort(x0, axis=0))


def test_a_resumed_run_makes_the_same_pairs():
    """Catches keys that depend on how many rounds were run before: round 3 after a stop, bit for bit."""
    small = (normal(-0.1, 100), normal(0.1, 100))
    whole = list(dsbm(moments, drift, UNTRAINED, small, rounds=4, **OPTIONS))
    resumed = list(dsbm(moments, drift, whole[1].params, small, rounds=4, first_round=3, **OPTIONS))
    assert [done.index for done in resumed] == [3, 4]
    for before, after in zip(whole[2:], resumed, strict=True):
        assert before.direction == after.direction
        for first, second in zip(before.pairs, after.pairs, strict=True):
            np.testing.assert_array_equal(first, second)


def test_probability_flow_and_score_of_exact_drifts(x64):
    """Catches a wrong sign or time of the backward drift: the velocity's own minimiser and the Gaussian score."""
    mean, cov = jnp.array([1.0, -0.5]), jnp.array([[1.5, 0.4], [0.4, 0.6]])
    start = jnp.array([[0.8, -0.3], [-0.3, 1.2]])
    optimal = bridges.schroedinger_coupling(mean, cov, SIGMA, source_cov=start)
    params = BridgeParams(optimal, bridges.swapped(optimal))
    x = jnp.array([0.3, 1.1])
    velocity = gaussian.population_minimiser(optimal, brownian_bridge(SIGMA))
    for t in (0.0, 0.2, 0.5, 0.9):
        place, spread = bridges.bridge_law(optimal, SIGMA, t)
        np.testing.assert_allclose(probability_flow(drift)(params, t, x), velocity(None, t, x), atol=1e-12)
        np.testing.assert_allclose(
            bridge_score(drift, SIGMA)(params, t, x), -jnp.linalg.solve(spread, x - place), atol=1e-12
        )


def test_the_probability_flow_carries_the_law(x64):
    """Catches a field that integrates but does not transport: mean and covariance of the ODE's affine map."""
    mean, cov = jnp.array([1.0, -0.5]), jnp.array([[1.5, 0.4], [0.4, 0.6]])
    optimal = bridges.schroedinger_coupling(mean, cov, SIGMA)
    params = BridgeParams(optimal, bridges.swapped(optimal))
    ends = jax.vmap(lambda x: flows.transport(probability_flow(drift), params, x, rtol=1e-9, atol=1e-9))(
        jnp.concatenate([jnp.zeros((1, 2)), jnp.eye(2)])
    )
    matrix = (ends[1:] - ends[0]).T
    np.testing.assert_allclose(ends[0], mean, atol=1e-6)
    np.testing.assert_allclose(matrix @ matrix.T, cov, atol=1e-6)


def test_pairs_of_both_directions_are_sources_and_targets():
    """Catches a backward pair that comes out swapped."""
    points = np.asarray(normal(0.0, 6)(jax.random.key(4)))
    params = BridgeParams(coupling(0.6), bridges.swapped(coupling(0.6)))
    forward, backward = (
        bridge_pairs(jax.random.key(5), drift, params, points, direction=name, sigma=SIGMA, steps=5)
        for name in ("forward", "backward")
    )
    np.testing.assert_array_equal(forward.x0, points)
    np.testing.assert_array_equal(backward.x1, points)


def small(**options):
    """A call with one bad option."""
    points = np.zeros((4, 2), np.float32)
    given = {"rounds": 2, "key": jax.random.key(0), "sigma": 1.0, "marginals": (points, points)} | options
    return next(iter(dsbm(moments, drift, UNTRAINED, given.pop("marginals"), **given)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be an integer >= 1, got 0"),
        (
            {"sigma": 0.0},
            r"sigma must be > 0 and finite for a bridge \(without noise it is rectification.reflow\), got 0.0",
        ),
        ({"sigma": float("nan")}, "sigma must be > 0 and finite"),
        ({"first_round": 3}, "first_round must be at most rounds = 2, got 3"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"start": "dsbm"}, "start must be one of imf, ipf, got 'dsbm'"),
        ({"directions": ()}, r"directions must be a non-empty sequence of directions, got \(\)"),
        ({"directions": "forward"}, "directions must be a non-empty sequence of directions, got 'forward'"),
        ({"directions": ("sideways",)}, "directions must be one of backward, forward, got 'sideways'"),
        ({"start": "ipf", "directions": ("forward",)}, "directions must begin with backward where start is ipf"),
        (
            {"marginals": (np.zeros((4, 2), np.float32), np.zeros((4, 3), np.float32))},
            r"marginals must have the same dimensions, got examples of shape \(2,\) and \(3,\)",
        ),
        (
            {"marginals": (lambda key: np.zeros((4, 2), np.float32), lambda key: np.zeros((4, 3), np.float32))},
            r"marginals must have the same dimensions, got examples of shape \(2,\) and \(3,\)",
        ),
        (
            {"marginals": (np.zeros((4, 2), np.float32), np.zeros((5, 2), np.float32))},
            "marginals must hold as many sources as targets where they are paired, got 4 and 5",
        ),
    ],
)
def test_bad_input_is_named(options, message):
    """Catches a late or nameless failure: the argument, the rule and the value."""
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_unknown_direction_and_score_without_noise():
    """Catches a typo that is taken for the other direction, and a division by sigma = 0."""
    points = np.zeros((2, 2), np.float32)
    with pytest.raises(ValueError, match="direction must be one of backward, forward, got 'up'"):
        bridge_pairs(jax.random.key(0), drift, UNTRAINED, points, direction="up", sigma=1.0)
    with pytest.raises(ValueError, match="sigma must be > 0 and finite for a bridge"):
        bridge_score(drift, 0.0)
