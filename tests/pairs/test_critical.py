"""sigma_c, measured along the exact minimiser's flow and predicted from the nearest midpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

import fvjax
from fvjax.pairs import (
    empirical_minimiser,
    nearest_midpoint_distances,
    nearest_target_is_own,
    predicted_sigma_critical,
    recovered_fraction,
    sigma_critical,
)


def gaussian_pairs(n: int = 20, dim: int = 12, seed: int = 0) -> fvjax.Pair:
    """Independent ends, float32."""
    x0, x1 = np.random.default_rng(seed).normal(size=(2, n, dim)).astype(np.float32)
    return fvjax.Pair(jnp.asarray(x0), jnp.asarray(x1))


@pytest.fixture(scope="module")
def digits() -> fvjax.Pair:
    """200 digits in [-1, 1], their sources under the gradient of a convex function, and then a derangement."""
    images = load_digits().images[np.random.default_rng(0).permutation(1797)[:200]].reshape(200, 64) / 8 - 1
    line = 2 * np.eye(8) - np.eye(8, k=1) - np.eye(8, k=-1)
    line[0, 0] = line[-1, -1] = 1
    values, vectors = np.linalg.eigh(np.kron(line, np.eye(8)) + np.kron(np.eye(8), line))
    blur = vectors * np.exp(-values / 2) @ vectors.T
    sources = 2 * (0.1 * images + np.tanh(1.5 * images @ blur) @ blur / np.tanh(1.5))
    return fvjax.couplings.shuffled(
        jax.random.key(0), jnp.asarray(sources, jnp.float32), jnp.asarray(images, jnp.float32)
    )


def test_digits(digits: fvjax.Pair) -> None:
    """Catches a field that lets go of its pairs too early or too late, and a prediction in other units.

    Measured before this library: sigma <= .2 returns every pair, .7 most, 1.0 few; sigma_c / spacing is .38-.49 for N =
    50 ... 1000.
    """
    found = sigma_critical(digits)
    assert 0.38 < found.measured / found.spacing < 0.49
    assert found.low < found.measured < found.high
    assert abs(found.measured / found.predicted - 1) < 0.1
    assert float(recovered_fraction(digits, fvjax.constant_noise(0.2))) == 1
    assert float(recovered_fraction(digits, fvjax.constant_noise(0.7))) > 0.95
    assert float(recovered_fraction(digits, fvjax.constant_noise(1.0))) < 0.4


def test_search_brackets_the_fraction() -> None:
    """Catches a bisection that keeps the wrong half, and fractions reported beside the wrong sigma."""
    pairs = gaussian_pairs()
    for fraction in (0.3, 0.9):
        found = sigma_critical(pairs, fraction=fraction, rtol=0.01, steps=20)
        assert np.all(np.diff(found.sigmas) > 0)
        below, above = found.sigmas < found.measured, found.sigmas > found.measured
        assert np.max(found.sigmas[below]) > 0.99 * found.measured
        assert np.min(found.sigmas[above]) < 1.01 * found.measured
        assert found.recovered[below][-1] >= fraction > found.recovered[above][0]
        again = recovered_fraction(pairs, fvjax.constant_noise(found.sigmas[0]), steps=20)
        np.testing.assert_allclose(again, found.recovered[0])


def test_one_compilation_for_all_sigmas() -> None:
    """Catches a sigma that is static: the factory would be traced once for each."""
    traced = []

    def counting(sigma: jax.Array) -> fvjax.Interpolant:
        if isinstance(sigma, jax.core.Tracer):
            traced.append(sigma)
        return fvjax.constant_noise(sigma)

    found = sigma_critical(gaussian_pairs(), interpolant=counting, steps=20)
    assert len(found.sigmas) > 4
    assert len(traced) == 1


def test_units(digits: fvjax.Pair) -> None:
    """Catches a prediction that does not scale with the data, or that takes sigma of a bridge for gamma.

    gamma = 3 sigma lets go at a third of sigma, exactly; of the Brownian bridge the mean of gamma^2 is sigma^2 / 6.
    """
    once, twice = (predicted_sigma_critical(fvjax.Pair(c * digits.x0, c * digits.x1)) for c in (1.0, 2.0))
    np.testing.assert_allclose(twice, 2 * np.array(once), rtol=1e-5)
    tripled = predicted_sigma_critical(digits, lambda sigma: fvjax.constant_noise(3 * sigma))
    np.testing.assert_allclose(tripled[:3], np.array(once[:3]) / 3, rtol=1e-5)
    bridge = predicted_sigma_critical(digits, fvjax.brownian_bridge)
    np.testing.assert_allclose(bridge.predicted, once.predicted * 6**0.5, rtol=1e-4)
    np.testing.assert_allclose(bridge.spacing, once.spacing, rtol=1e-6)


def test_bridge_lets_go_where_predicted(digits: fvjax.Pair) -> None:
    """Catches a conversion by gamma(1/2), which is off by a fifth, and nan from the ends of the bridge."""
    pairs = fvjax.Pair(digits.x0[:60], digits.x1[:60])
    constant, bridge = (sigma_critical(pairs, interpolant=f) for f in (fvjax.constant_noise, fvjax.brownian_bridge))
    assert abs(bridge.measured / 6**0.5 / constant.measured - 1) < 0.08


@pytest.mark.parametrize("precise", [False, True])
def test_nearest_midpoints_by_brute_force(precise: bool) -> None:
    """Catches the own midpoint taken for a neighbour, float32 that cancels far from the origin, and wrong blocks."""
    with jax.enable_x64(precise):
        x0, x1 = np.random.default_rng(1).normal(size=(2, 300, 5, 4)) + 100
        x0[7], x1[7] = x1[3], x0[3]  # other paths, the same midpoint
        x0[9], x1[9] = x0[4] + 1e-3, x1[4]
        pairs = fvjax.Pair(jnp.asarray(x0, jnp.result_type(float)), jnp.asarray(x1, jnp.result_type(float)))
        middle = (np.asarray(pairs.x0, np.float64) + np.asarray(pairs.x1, np.float64)).reshape(300, 20) / 2
        distances = np.linalg.norm(middle[:, None] - middle, axis=2) + np.diag(np.full(300, np.inf))
        found = nearest_midpoint_distances(pairs)
        assert found.dtype == pairs.x0.dtype
        # Midpoints are rounded at 100: that, and not the product of norms, is what is left of the error.
        np.testing.assert_allclose(found, distances.min(1), atol=1e-13 if precise else 5e-5)
        assert float(found[3]) == float(found[7]) == 0
        ends = nearest_midpoint_distances(pairs, fvjax.trigonometric(), t=1.0)
        targets = np.asarray(pairs.x1, np.float64).reshape(300, 20)
        gaps = np.linalg.norm(targets[:, None] - targets, axis=2) + np.diag(np.full(300, np.inf))
        np.testing.assert_allclose(ends, gaps.min(1), atol=1e-12 if precise else 1e-3)
        some = nearest_midpoint_distances(pairs, sources=40, key=jax.random.key(0))
        assert some.shape == (40,)
        assert set(np.asarray(some).tolist()) <= set(np.asarray(found).tolist())


def test_nearest_target() -> None:
    """Catches a target compared with the wrong source, equal targets told apart, and nan that counts as returned."""
    targets = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3, 2)).astype(np.float32)).at[5].set(0).at[9].set(0)
    arrived = targets + 0.01
    assert np.all(nearest_target_is_own(arrived, targets))
    some = jnp.array([4, 5, 9, 9])
    assert np.all(nearest_target_is_own(arrived[some], targets, some))
    found = nearest_target_is_own(arrived.at[3].set(jnp.nan).at[7].set(targets[8]), targets)
    np.testing.assert_array_equal(np.flatnonzero(~found), [3, 7])
    with pytest.raises(ValueError, match=r"arrived must have shape \(20, 3, 2\), got \(4, 3, 2\)"):
        nearest_target_is_own(arrived[:4], targets)
    with pytest.raises(ValueError, match="index must be integers, got float32"):
        nearest_target_is_own(arrived[:4], targets, jnp.ones(4))


def test_blocks_of_distances_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a ragged last block that loses or doubles rows: blocks of 13 of 300."""
    from fvjax.pairs import _spacing

    pairs = gaussian_pairs(300, 6)
    expected = nearest_midpoint_distances(pairs)
    monkeypatch.setattr(_spacing, "ELEMENTS", 13 * 300)
    _spacing.own_and_nearest.clear_cache()
    np.testing.assert_allclose(nearest_midpoint_distances(pairs), expected, rtol=1e-6)
    _spacing.own_and_nearest.clear_cache()


def test_sets_that_never_let_go() -> None:
    """Catches a search without an end, and a finite sigma_c where there is none."""
    pairs = gaussian_pairs(6)
    translated = fvjax.Pair(pairs.x0, pairs.x0 + 5)
    repeated = fvjax.Pair(*(jnp.repeat(x[:1], 6, axis=0) for x in pairs))
    for never in (translated, repeated):
        found = sigma_critical(never, steps=10)
        assert found.measured == np.inf
        assert np.all(found.recovered == 1)
    assert predicted_sigma_critical(repeated).predicted == 0
    single = sigma_critical(fvjax.Pair(pairs.x0[:1], pairs.x1[:1]), steps=10)
    assert single.measured == single.predicted == single.spacing == np.inf


def test_a_crossing_that_is_met_is_never_passed() -> None:
    """Catches a sigma_c > 0 where Euler with an even number of steps meets the crossing of all paths (Example 1)."""
    x0 = jnp.asarray(np.random.default_rng(0).integers(-16, 16, (6, 2)) / 8, jnp.float32)
    pairs = fvjax.Pair(x0, 5 - x0)
    found = sigma_critical(pairs, steps=10)
    assert found.measured == found.predicted == 0
    assert np.all(found.recovered < 0.5)
    assert sigma_critical(pairs, steps=11).measured > 0.01


def test_weights_and_sources() -> None:
    """Catches weights that the field or the share does not see, and sources that are mixed up with their pairs."""
    pairs = gaussian_pairs(8)
    weights = jnp.asarray([0.0, 0.3, 0.1, 0.1, 0.2, 0.1, 0.1, 0.1])
    small = fvjax.constant_noise(0.01)
    # The pair of weight 0 is not part of the field, so its source ends at another target; it does not count either.
    assert float(recovered_fraction(pairs, small, weights=weights, steps=20)) == 1
    only = jnp.zeros(8).at[5].set(1.0)
    field = empirical_minimiser(pairs, small, only)
    arrived = jax.vmap(lambda x: fvjax.transport(field, None, x, solver="euler", steps=20))(pairs.x0)
    np.testing.assert_allclose(arrived, pairs.x0 + pairs.x1[5] - pairs.x0[5], atol=1e-5)
    for key in range(3):
        share = recovered_fraction(pairs, small, sources=3, key=jax.random.key(key), steps=20)
        assert float(share) == 1
    large = fvjax.constant_noise(2.0)
    shares = {float(recovered_fraction(pairs, large, sources=1, key=jax.random.key(k), steps=20)) for k in range(12)}
    assert shares == {0.0, 1.0}


def test_other_solvers_and_jit() -> None:
    """Catches options that do not reach the solver, and a share that cannot be part of a jitted function."""
    pairs = gaussian_pairs(8)
    shares = [
        recovered_fraction(pairs, fvjax.constant_noise(0.5)),
        recovered_fraction(pairs, fvjax.constant_noise(0.5), solver="dopri5"),
        jax.jit(lambda pairs, sigma: recovered_fraction(pairs, fvjax.constant_noise(sigma)))(pairs, 0.5),
    ]
    np.testing.assert_allclose(shares, shares[0])
    with pytest.raises(RuntimeError, match="failed for 8 of 8 sources"):
        recovered_fraction(pairs, fvjax.constant_noise(0.01), solver="dopri5", max_steps=1)


PAIRS = gaussian_pairs(4, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sigma_critical(PAIRS, fraction=0.0), r"fraction must be in \(0, 1\), got 0.0"),
        (lambda: sigma_critical(PAIRS, fraction=1), r"fraction must be in \(0, 1\), got 1"),
        (lambda: sigma_critical(PAIRS, rtol=0.0), "rtol must be > 0 and finite, got 0.0"),
        (lambda: sigma_critical(PAIRS, sources=3), "key must be given with sources, got None"),
        (lambda: sigma_critical(PAIRS, sources=5, key=jax.random.key(0)), "sources must be <= the number of pairs, 4"),
        (
            lambda: sigma_critical(PAIRS, interpolant=lambda s: fvjax.linear()),
            "gamma proportional to sigma, got 0 and 0",
        ),
        (
            lambda: predicted_sigma_critical(PAIRS, lambda s: fvjax.constant_noise(s + 1)),
            "gamma proportional to sigma, got 2 and 3",
        ),
        (lambda: recovered_fraction(PAIRS, fvjax.linear(), weights=jnp.full(4, 0.5)), "weights must add up to 1"),
        (lambda: recovered_fraction(PAIRS, fvjax.linear(), solver="rk4"), "solver must be one of"),
        (lambda: predicted_sigma_critical(fvjax.Pair(PAIRS.x0[:0], PAIRS.x1[:0])), "pairs must be at least one"),
        (lambda: predicted_sigma_critical(fvjax.Pair(PAIRS.x0 / 0, PAIRS.x1)), "pairs.x0 must be finite"),
        (
            lambda: nearest_midpoint_distances(PAIRS, sources=0, key=jax.random.key(0)),
            "sources must be an integer >= 1",
        ),
    ],
)
def test_bad_input_is_refused(call, message: str) -> None:
    """Catches options without a meaning, and sets on which the search would run on nan."""
    with pytest.raises(ValueError, match=message):
        call()
