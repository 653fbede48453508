"""Pair identifiability: known cases, the two-point case by quadrature, and independence of chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fvjax
from fvjax.pairs import identifiability


def two_pairs(distance: float, dim: int = 3) -> fvjax.Pair:
    """Two parallel paths at a given distance at every time."""
    x0 = np.zeros((2, dim))
    x0[1, 0] = distance
    return fvjax.Pair(jnp.asarray(x0), jnp.asarray(x0 + 1.0))


def random_pairs(n: int = 12, dim: int = 4) -> fvjax.Pair:
    """Independent Gaussian ends."""
    x0, x1 = np.random.default_rng(3).normal(size=(2, n, dim))
    return fvjax.Pair(jnp.asarray(x0), jnp.asarray(x1))


def binary_perplexity(log_odds: np.ndarray) -> np.ndarray:
    """exp H of two weights with given log odds."""
    p = 1 / (1 + np.exp(-log_odds))
    return np.exp(-sum(np.where(q > 0, q * np.log(np.maximum(q, 1e-300)), 0) for q in (p, 1 - p)))


@pytest.mark.parametrize("sigma", [0.2, 0.5, 1.0])
def test_two_pairs_by_quadrature(x64: None, sigma: float) -> None:
    """Catches exp of the mean entropy in place of the mean of exp, and a lost 2 in 2 gamma^2.

    For the pair that x was drawn from the log odds are N(D^2 / (2 sigma^2), D^2 / sigma^2).
    """
    ratio = 1.0 / sigma
    z, weight = np.polynomial.hermite_e.hermegauss(80)
    expected = np.dot(weight, binary_perplexity(ratio**2 / 2 + ratio * z)) / weight.sum()
    found = identifiability(jax.random.key(0), two_pairs(1.0), fvjax.constant_noise(sigma), 0.3, draws=4000)
    assert 0 < found.standard_error < 0.02
    assert abs(found.perplexity - expected) < 4 * found.standard_error
    of_mean_entropy = np.exp(np.dot(weight, np.log(binary_perplexity(ratio**2 / 2 + ratio * z))) / weight.sum())
    if sigma == 0.5:  # elsewhere the two are closer than the draws resolve
        assert abs(found.perplexity - of_mean_entropy) > 4 * found.standard_error


def test_weights_are_probabilities(x64: None) -> None:
    """Catches weights that enter the posterior only, or the draws only: two pairs of 9:1, by quadrature."""
    prior, z, weight = np.array([0.9, 0.1]), *np.polynomial.hermite_e.hermegauss(80)
    own = [np.dot(weight, binary_perplexity(np.log(p / (1 - p)) + 0.5 + z)) / weight.sum() for p in prior]
    found = identifiability(
        jax.random.key(1), two_pairs(1.0), fvjax.constant_noise(1.0), 0.5, draws=4000, weights=jnp.asarray(prior)
    )
    assert abs(found.perplexity - prior @ own) < 4 * found.standard_error
    assert abs(own[0] - own[1]) > 20 * found.standard_error  # so that draws with other probabilities would be seen


def test_limits_of_the_noise() -> None:
    """Catches a perplexity that is not 1 for pairs far apart, or not N where the noise hides everything."""
    pairs = jax.tree.map(lambda x: x.astype(jnp.float32), random_pairs())
    times = jnp.array([[0.0, 0.5], [0.9, 1.0]])
    clear = identifiability(jax.random.key(0), pairs, fvjax.constant_noise(1e-3), times)
    assert clear.perplexity.shape == clear.standard_error.shape == (2, 2)
    assert clear.perplexity.dtype == jnp.float32
    np.testing.assert_array_equal(clear.perplexity, 1)
    hidden = identifiability(jax.random.key(0), pairs, fvjax.constant_noise(1e3), times)
    np.testing.assert_allclose(hidden.perplexity, 12, rtol=1e-4)
    one = fvjax.Pair(pairs.x0[:1], pairs.x1[:1])
    np.testing.assert_array_equal(identifiability(jax.random.key(0), one, fvjax.constant_noise(1.0), 0.5), (1, 0))


def test_perplexity_grows_with_noise() -> None:
    """Catches draws that differ between sigmas or times: the curve is monotone because pair and noise are shared."""
    found = [
        float(identifiability(jax.random.key(0), random_pairs(), fvjax.constant_noise(s), 0.5, draws=64).perplexity)
        for s in (0.1, 0.3, 0.5, 1.0, 2.0, 4.0)
    ]
    assert np.all(np.diff(found) > 0)


def test_without_noise_only_crossings_are_ambiguous() -> None:
    """Catches 0 / 0 at gamma = 0, and ends of a bridge that are not those of the pairs.

    x1 = 5 - x0: all paths meet at t = 1/2 (Counter Example 1); the coordinates are multiples of 1/8, so exactly.
    """
    x0 = jnp.asarray(np.random.default_rng(0).integers(-16, 16, (7, 2)) / 8, jnp.float32)
    pairs = fvjax.Pair(x0, 5 - x0)
    for interpolant in (fvjax.linear(), fvjax.constant_noise(0.0), fvjax.brownian_bridge(0.0)):
        found = identifiability(jax.random.key(0), pairs, interpolant, jnp.array([0.0, 0.25, 0.5, 1.0]), draws=16)
        np.testing.assert_allclose(found.perplexity, [1, 1, 7, 1], rtol=1e-6)
    for interpolant in (fvjax.brownian_bridge(0.7), fvjax.smooth_bridge(0.7)):
        ends = identifiability(jax.random.key(0), pairs, interpolant, jnp.array([0.0, 1.0]), draws=16)
        np.testing.assert_array_equal(ends.perplexity, [1, 1])


def test_chunks_and_jit_change_nothing(x64: None) -> None:
    """Catches keys that depend on the chunk, and Python branches on a traced sigma, time or set of pairs."""
    pairs, times = random_pairs(), jnp.array([0.2, 0.7])

    def whole(pairs: fvjax.Pair, sigma: jax.Array, times: jax.Array, chunk: int | None = None):
        return identifiability(jax.random.key(2), pairs, fvjax.constant_noise(sigma), times, draws=10, chunk=chunk)

    expected = whole(pairs, 0.6, times)
    np.testing.assert_allclose(whole(pairs, 0.6, times, 3), expected, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(whole)(pairs, 0.6, times), expected, rtol=1e-12)
    np.testing.assert_allclose(expected.perplexity[1], whole(pairs, 0.6, 0.7).perplexity, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draws": 1}, "draws must be >= 2"),
        ({"draws": 0}, "draws must be an integer >= 1, got 0"),
        ({"chunk": 0}, "chunk must be an integer >= 1, got 0"),
        ({"weights": jnp.full(12, 0.1)}, "weights must add up to 1, got a sum of 1.2"),
        ({"weights": jnp.full(3, 1 / 3)}, r"weights must have shape \(12,\), got \(3,\)"),
        ({"weights": jnp.array([-0.5, 1.5] + 10 * [0.0])}, "weights must be >= 0 and finite"),
        ({"pairs": fvjax.Pair(jnp.zeros((0, 2)), jnp.zeros((0, 2)))}, "pairs must be at least one"),
        ({"pairs": fvjax.Pair(jnp.zeros((3, 2)), jnp.zeros((3, 4)))}, "pairs.x0 and pairs.x1 must have the same shape"),
        ({"pairs": fvjax.Pair(jnp.zeros((3, 2)), jnp.full((3, 2), jnp.nan))}, "pairs.x1 must be finite, got 6 of 6"),
        ({"pairs": fvjax.Pair(jnp.zeros((3, 2), int), jnp.zeros((3, 2), int))}, "pairs.x0 must be floating point"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    """Catches bad numbers that would come out as a number."""
    given = {"pairs": random_pairs(), **change}
    with pytest.raises(ValueError, match=message):
        identifiability(jax.random.key(0), given.pop("pairs"), fvjax.constant_noise(1.0), 0.5, **given)
