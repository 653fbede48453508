"""Exact loss and gradient moments of any field on a finite set of pairs: enumeration, closed forms, Monte Carlo."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fvjax
from fvjax.gradients import elementwise_variance
from fvjax.pairs import (
    empirical_minimiser,
    exact_gradient_moments,
    exact_loss,
    irreducible_loss,
    memorizing_field,
    pair_nodes,
)

KEY = jax.random.key(0)


def pairs_of(n: int = 5, dim: int = 2, seed: int = 0) -> fvjax.Pair:
    """Independent Gaussian ends, in the default float type."""
    x0, x1 = np.random.default_rng(seed).normal(size=(2, n, dim))
    return fvjax.Pair(jnp.asarray(x0), jnp.asarray(x1))


def affine(params: dict[str, jax.Array], t: jax.Array, x: jax.Array) -> jax.Array:
    """v = a x + b t: a polynomial, so that all rules are exact."""
    return params["a"] * x + params["b"] * t


def network(params: dict[str, jax.Array], t: jax.Array, x: jax.Array) -> jax.Array:
    """One hidden layer of tanh."""
    return params["b"] @ jnp.tanh(params["a"] @ x + t)


def affine_params() -> dict[str, jax.Array]:
    """Some parameters of `affine`."""
    return {"a": jnp.asarray(0.3), "b": jnp.array([0.4, -0.2])}


def network_params(dim: int = 2) -> dict[str, jax.Array]:
    """Some parameters of `network`."""
    random = np.random.default_rng(1)
    return {"a": jnp.asarray(random.normal(size=(3, dim))), "b": jnp.asarray(random.normal(size=(dim, 3)))}


def by_hand(field, params, pairs, weights):
    """Loss, and mean and variance of the gradient on straight lines, from loops, `jax.grad` and 30 nodes in t."""
    node, time_weight = np.polynomial.legendre.leggauss(30)
    loss = fvjax.squared_error(field)
    total, gradients = [], []
    for (x0, x1), (t, w) in itertools.product(
        zip(*pairs, strict=True), zip((node + 1) / 2, time_weight / 2, strict=True)
    ):
        sample = fvjax.PathSample(jnp.asarray(t), (1 - t) * x0 + t * x1, x1 - x0)
        total.append(w)
        gradients.append((loss(params, sample), jax.grad(loss)(params, sample)))
    all_weights = np.outer(weights, total[: len(node)]).ravel()
    values, trees = zip(*gradients, strict=True)
    stacked = jax.tree.map(lambda *x: np.stack(x), *trees)
    mean = jax.tree.map(lambda g: np.tensordot(all_weights, g, 1), stacked)
    variance = jax.tree.map(lambda g, m: np.tensordot(all_weights, (g - m) ** 2, 1), stacked, mean)
    return np.dot(all_weights, values), mean, variance


@pytest.mark.parametrize("weighted", [False, True])
def test_without_noise_by_enumeration(x64: None, weighted: bool) -> None:
    """Catches a lost factor, a mean over dimensions, weights that are left out, and nodes that miss t."""
    pairs, params = pairs_of(3), network_params()
    weights = jnp.array([0.5, 0.2, 0.3]) if weighted else None
    loss, mean, variance = by_hand(
        network, params, pairs, np.full(3, 1 / 3) if weights is None else np.asarray(weights)
    )
    np.testing.assert_allclose(exact_loss(network, params, pairs, fvjax.linear(), weights=weights), loss, rtol=1e-10)
    moments = exact_gradient_moments(
        fvjax.squared_error(network), params, pairs, fvjax.linear(), weights=weights, elementwise=True
    )
    np.testing.assert_allclose(moments.weight, 1)
    for name in params:
        np.testing.assert_allclose(moments.mean[name], mean[name], rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(elementwise_variance(moments)[name], variance[name], rtol=1e-8)
    trace = exact_gradient_moments(fvjax.squared_error(network), params, pairs, fvjax.linear(), weights=weights)
    total = sum(np.sum(v) for v in variance.values())
    np.testing.assert_allclose(fvjax.total_variance(trace), total, rtol=1e-8)


@pytest.mark.parametrize("name", ["constant", "brownian", "smooth"])
def test_noise_rule_is_exact_for_polynomials(x64: None, name: str) -> None:
    """Catches gamma' left out of the target, and panels that are too coarse at the ends of a bridge.

    Of v = a x + b t the loss is int E|A + B z|^2 dt with A = a m + b t - m', B = a gamma - gamma': a sum of squares,
    integrated here by Simpson's rule in log(t / (1 - t)).
    """
    interpolant, span = {
        "constant": (fvjax.constant_noise(0.4), (0.0, 1.0)),
        "brownian": (fvjax.brownian_bridge(0.4), (1e-3, 1 - 1e-3)),
        "smooth": (fvjax.smooth_bridge(0.4), (0.0, 1.0)),
    }[name]
    pairs, params = pairs_of(), affine_params()
    s = np.linspace(*(np.log(t / (1 - t)) for t in np.clip(span, 1e-9, 1 - 1e-9)), 4001)
    t = 1 / (1 + np.exp(-s))
    c = jax.vmap(interpolant.coefficients)(jnp.asarray(t))
    middle = (1 - t)[:, None, None] * pairs.x0 + t[:, None, None] * pairs.x1
    shift = params["a"] * middle + params["b"] * t[:, None, None] - (pairs.x1 - pairs.x0)
    integrand = np.mean(np.sum(shift**2, 2), 1) + 2 * (params["a"] * c.gamma - c.gamma_rate) ** 2
    simpson = np.full(4001, 2.0)
    simpson[1::2], simpson[[0, -1]] = 4, 1
    expected = np.sum(simpson * integrand * t * (1 - t)) / np.sum(simpson * t * (1 - t))
    found = exact_loss(affine, params, pairs, interpolant, space_nodes=2)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_moments_with_noise_are_what_draws_show(x64: None, dim: int) -> None:
    """Catches what the exact rules share: the law of the pairs, of t and of z. 4 standard errors of 40 repeats each.

    The loss of a network, its total variance, by 12 nodes in each dimension of z, and by 300,000 draws.
    """
    pairs, params, interpolant = pairs_of(4, dim), network_params(dim), fvjax.constant_noise(0.5)
    weights = jnp.array([0.1, 0.2, 0.3, 0.4])
    loss, repeats, draws = fvjax.squared_error(network), 40, 7_500

    @jax.jit
    def estimate(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        pair_key, path_key = jax.random.split(key)
        index = jax.random.choice(pair_key, 4, (draws,), p=weights)
        paths = fvjax.draw_paths(path_key, jax.tree.map(lambda x: x[index], pairs), interpolant)
        moments = fvjax.gradient_moments(loss, params, paths)
        return fvjax.batch_loss(loss, params, paths), fvjax.total_variance(moments, ddof=1)

    estimates = np.asarray(jax.lax.map(estimate, jax.random.split(KEY, repeats)))
    options = {"weights": weights, "space_nodes": 12, "panels": 2}
    exact = [
        exact_loss(network, params, pairs, interpolant, **options),
        fvjax.total_variance(exact_gradient_moments(loss, params, pairs, interpolant, **options)),
    ]
    for found, value in zip(estimates, exact, strict=True):
        error = found.std(ddof=1) / repeats**0.5
        assert error < 0.02 * value
        assert abs(found.mean() - value) < 4 * error


def test_draws_of_the_noise(x64: None) -> None:
    """Catches draws that are not antithetic (z then has a mean), the same for all pairs, or not of N(0, 1)."""
    pairs = pairs_of(50, 7)
    nodes, weights = pair_nodes(pairs, fvjax.constant_noise(1.0), draws=6, key=KEY, panels=1, time_nodes=4)
    assert nodes.x.shape == (50 * 4 * 6, 7)
    np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-12)
    t = nodes.t.reshape(50, 4, 6)
    middle = (1 - t)[..., None] * pairs.x0[:, None, None] + t[..., None] * pairs.x1[:, None, None]
    z = np.asarray(nodes.x.reshape(50, 4, 6, 7) - middle)
    np.testing.assert_allclose(z[:, :, :3], -z[:, :, 3:], atol=1e-12)
    half = z[:, :, :3].reshape(-1, 7)
    assert len(np.unique(half.round(9), axis=0)) == 600
    assert abs(half.var() - 1) < 4 * (2 / half.size) ** 0.5
    affine_loss = [
        exact_loss(affine, {"a": 0.3, "b": jnp.zeros(7)}, pairs, fvjax.constant_noise(1.0), **rule)
        for rule in ({"draws": 64, "key": KEY}, {"draws": 64, "key": jax.random.key(1)})
    ]
    # E|0.3 x - u|^2: z adds 0.09 E|z|^2 = 0.63, and its mean over 32 draws x 64 times x 50 pairs is off by 1e-3.
    noiseless = exact_loss(affine, {"a": 0.3, "b": jnp.zeros(7)}, pairs, fvjax.linear())
    np.testing.assert_allclose(affine_loss, float(noiseless) + 0.63, atol=4e-3)
    assert affine_loss[0] != affine_loss[1]


def test_chunks_and_blocks_change_nothing(x64: None) -> None:
    """Catches padding that counts, keys that follow the block, and moments merged with wrong weights."""
    pairs, params = pairs_of(7, 3), network_params(3)
    loss, weights = fvjax.squared_error(network), jnp.asarray(np.arange(7) / 21)
    rule = {"weights": weights, "draws": 4, "key": KEY, "panels": 1, "time_nodes": 2}
    whole = exact_gradient_moments(loss, params, pairs, fvjax.constant_noise(0.3), elementwise=True, **rule)
    value = exact_loss(network, params, pairs, fvjax.constant_noise(0.3), **rule)
    for chunk in (5, 17):
        part = exact_gradient_moments(
            loss, params, pairs, fvjax.constant_noise(0.3), elementwise=True, chunk=chunk, **rule
        )
        for found, expected in zip(jax.tree.leaves(part), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-9)
        np.testing.assert_allclose(
            exact_loss(network, params, pairs, fvjax.constant_noise(0.3), chunk=chunk, **rule), value, rtol=1e-12
        )
    nodes, node_weights = pair_nodes(pairs, fvjax.constant_noise(0.3), **rule)
    np.testing.assert_allclose(fvjax.batch_loss(loss, params, nodes, weights=node_weights), value, rtol=1e-12)


def test_given_time_is_the_profile(x64: None) -> None:
    """Catches a time that is ignored: the mean of the profile over the nodes is the integral."""
    pairs, params = pairs_of(), network_params()
    node, weight = np.polynomial.legendre.leggauss(20)
    profile = jax.vmap(lambda t: exact_loss(network, params, pairs, fvjax.constant_noise(0.3), t=t, space_nodes=10))(
        jnp.asarray((node + 1) / 2)
    )
    assert np.ptp(profile) > 0.1
    whole = exact_loss(network, params, pairs, fvjax.constant_noise(0.3), space_nodes=10)
    np.testing.assert_allclose(np.dot(weight / 2, profile), whole, rtol=1e-9)


def test_irreducible_loss(x64: None) -> None:
    """Catches a V that is not the least loss, or not monotone: 0 without noise, tr Cov(x1 - x0) with infinite noise."""
    pairs = pairs_of()
    weights = jnp.array([0.3, 0.1, 0.2, 0.2, 0.2])
    velocity = np.asarray(pairs.x1 - pairs.x0)
    centred = velocity - np.asarray(weights) @ velocity
    spread = float(np.asarray(weights) @ np.sum(centred**2, 1))
    assert irreducible_loss(pairs, fvjax.linear(), weights=weights) < 1e-28
    found = [
        float(irreducible_loss(pairs, fvjax.constant_noise(s), weights=weights, space_nodes=24))
        for s in (0.05, 0.2, 0.5, 1.0, 1e4)
    ]
    assert np.all(np.diff([0, *found]) > 0)
    np.testing.assert_allclose(found[-1], spread, rtol=1e-6)


@pytest.mark.parametrize("name", ["constant", "brownian"])
def test_every_other_field_has_a_larger_loss(x64: None, name: str) -> None:
    """Catches a minimiser that is none: l(v + e w) = V + e^2 E|w|^2 for every w, the cross term is 0 (Pythagoras)."""
    interpolant = {"constant": fvjax.constant_noise(0.5), "brownian": fvjax.brownian_bridge(0.8)}[name]
    pairs, params = pairs_of(), network_params()
    best, rule = empirical_minimiser(pairs, interpolant), {"space_nodes": 24, "panels": 6}

    def perturbed(params, t, x):
        return best(None, t, x) + params[0] * network(params[1], t, x)

    least = float(irreducible_loss(pairs, interpolant, **rule))
    nodes, weights = pair_nodes(pairs, interpolant, **rule)
    square = jax.vmap(lambda n: jnp.sum(network(params, n.t, n.x) ** 2))(nodes)
    for scale in (-0.1, 0.1, 1.0):
        loss = float(exact_loss(perturbed, (scale, params), pairs, interpolant, **rule))
        assert loss > least
        np.testing.assert_allclose(loss - least, scale**2 * np.dot(weights, square), rtol=5e-3)


def test_float32_and_half_precision_ends() -> None:
    """Catches float64 constants under strict promotion, and a variance near zero that cancels.

    The memorizing field plus c has gradient 2 c everywhere: variance 0 in float32, not 1e-7 of |g|^2.
    """
    pairs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), pairs_of(9, 4))
    field = memorizing_field(pairs)
    loss = fvjax.squared_error(lambda params, t, x: field(None, t, x) + params)
    moments = exact_gradient_moments(loss, jnp.full(4, 0.5, jnp.float32), pairs, fvjax.linear())
    np.testing.assert_allclose(moments.mean, 1.0, rtol=1e-6)
    assert float(fvjax.total_variance(moments)) < 1e-10
    value = exact_loss(field, None, pairs, fvjax.linear())
    assert value.dtype == jnp.float32
    assert float(value) == 0


PAIRS = fvjax.Pair(np.zeros((3, 2), np.float32), np.ones((3, 2), np.float32))
NOISY = fvjax.constant_noise(0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"space_nodes \(d <= 3\), or draws and key, must be given"),
        ({"draws": 4}, "draws and key must be given together, got draws = 4 and key = None"),
        ({"key": KEY}, "draws and key must be given together, got draws = None"),
        ({"draws": 3, "key": KEY}, "draws must be an even integer >= 2, got 3"),
        ({"space_nodes": 2, "draws": 4, "key": KEY}, "space_nodes must not be given together with draws and key"),
        ({"space_nodes": 0}, "space_nodes must be an integer >= 1, got 0"),
        ({"space_nodes": 65}, r"space_nodes\^d must be <= 4096, got 65\^2"),
        ({"space_nodes": 2, "time_nodes": 3}, "time_nodes must be an even integer >= 2, got 3"),
        ({"space_nodes": 2, "panels": 0}, "panels must be an integer >= 1, got 0"),
        ({"space_nodes": 2, "t": jnp.zeros(2)}, r"t must have shape \(\), got \(2,\)"),
        ({"space_nodes": 2, "weights": jnp.full(3, 0.5)}, "weights must add up to 1, got a sum of 1.5"),
        ({"space_nodes": 2, "weights": jnp.full(2, 0.5)}, r"weights must have shape \(3,\)"),
        ({"space_nodes": 2, "chunk": 0}, "chunk must be an integer >= 1, got 0"),
        ({"space_nodes": 2, "pairs": fvjax.Pair(PAIRS.x0[:0], PAIRS.x1[:0])}, "pairs must be at least one"),
        ({"space_nodes": 2, "pairs": fvjax.Pair(PAIRS.x0 * np.nan, PAIRS.x1)}, "pairs.x0 must be finite, got 6 of 6"),
        ({"space_nodes": 2, "pairs": fvjax.Pair(PAIRS.x0, PAIRS.x1[:2])}, "pairs.x0 and pairs.x1 must have the same"),
        (
            {"space_nodes": 2, "interpolant": fvjax.brownian_bridge(0.1, time_range=(0.0, 1.0))},
            r"interpolant.time_range must be inside \(0, 1\), where gamma'\^2 is finite, got \(0.0, 1.0\)",
        ),
        ({"space_nodes": 2, "interpolant": fvjax.brownian_bridge(0.1), "t": 0.0}, r"t must be inside \(0, 1\)"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    """Catches rules that would pass for exact, integrals that do not exist, and sets without a mean."""
    given = {"pairs": PAIRS, "interpolant": NOISY, **change}
    with pytest.raises(ValueError, match=message):
        exact_loss(affine, affine_params(), given.pop("pairs"), given.pop("interpolant"), **given)
