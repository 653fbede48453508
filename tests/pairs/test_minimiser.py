"""Finite pairs exactly: the minimiser, its score and its posterior against autodiff, enumeration and float64."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

import fvjax
from fvjax import pairs as finite
from fvjax.interpolants import path_at
from fvjax.types import Pair

INTERPOLANTS: dict[str, Callable[[], fvjax.Interpolant]] = {
    "linear": fvjax.linear,
    "constant_noise": lambda: fvjax.constant_noise(0.4),
    "brownian_bridge": lambda: fvjax.brownian_bridge(0.8),
    "smooth_bridge": lambda: fvjax.smooth_bridge(0.5),
    "trigonometric": fvjax.trigonometric,
    "gaussian_source": lambda: fvjax.gaussian_source(0.2),
    "own": lambda: fvjax.Interpolant(lambda t: 1 - t**2, jnp.sin, lambda t: 0.3 + t * (1 - t)),
}
WEIGHTS = np.array([0.1, 0.2, 0.3, 0.25, 0.15])
DIMS = [3, 24]
"""Fewer and more dimensions than are computed by differences alone."""


def some_pairs(n: int = 5, dims: tuple[int, ...] = (3,), seed: int = 0) -> Pair:
    """Random pairs, off the origin, in the current default precision."""
    x0, x1 = np.random.default_rng(seed).normal(size=(2, n, *dims))
    return Pair(jnp.asarray(x0 + 0.5, float), jnp.asarray(2 * x1 - 1, float))


def noisy(name: str) -> fvjax.Interpolant:
    """The interpolant, with a noise of its own where it has none."""
    interpolant = INTERPOLANTS[name]()
    if float(interpolant.coefficients(0.5).gamma) == 0:
        return interpolant._replace(gamma=lambda t: 0.3 + 0.4 * t**2)
    return interpolant


def log_density(
    t: jax.Array, x: jax.Array, pairs: Pair, interpolant: fvjax.Interpolant, weights: np.ndarray
) -> jax.Array:
    """log p_t(x) of the mixture, by definition."""
    c = interpolant.coefficients(t)
    squares = jnp.sum((x - c.alpha * pairs.x0 - c.beta * pairs.x1) ** 2, -1)
    log_norm = x.size / 2 * jnp.log(2 * jnp.pi * c.gamma**2)
    return jax.nn.logsumexp(jnp.log(weights) - squares / (2 * c.gamma**2)) - log_norm


def enumerated_velocity(
    t: jax.Array, x: jax.Array, pairs: Pair, interpolant: fvjax.Interpolant, weights: np.ndarray
) -> jax.Array:
    """E[u_t | x_t = x]: for each pair the noise that leads to x, and d x_t / dt with that noise, by autodiff."""
    c = interpolant.coefficients(t)

    def one(x0: jax.Array, x1: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = (x - c.alpha * x0 - c.beta * x1) / c.gamma

        def path(s: jax.Array) -> jax.Array:
            return interpolant.alpha(s) * x0 + interpolant.beta(s) * x1 + interpolant.gamma(s) * z

        return weight * jnp.exp(-jnp.sum(z**2) / 2), jax.jvp(path, (t,), (jnp.ones_like(t),))[1]

    masses, velocities = jax.vmap(one)(*pairs, jnp.asarray(weights))
    return masses @ velocities / jnp.sum(masses)


@pytest.mark.parametrize(("name", "dim"), [*((name, 3) for name in INTERPOLANTS), ("brownian_bridge", 24), ("own", 24)])
def test_against_brute_force(x64: None, name: str, dim: int) -> None:
    """Catches any wrong factor: score = grad log p_t, weights by Bayes, velocity by enumeration, all to 1e-10."""
    pairs, interpolant = some_pairs(5, (dim,)), noisy(name)
    known = pairs, interpolant, WEIGHTS
    field, score = finite.empirical_minimiser(*known), finite.empirical_score(*known)
    log_weights = finite.pair_log_weights(*known)
    for seed, t in enumerate(jnp.array([0.05, 0.5, 0.93])):
        c = interpolant.coefficients(t)
        place = c.alpha * pairs.x0[seed] + c.beta * pairs.x1[seed]
        x = place + 1.5 * jax.random.normal(jax.random.key(seed), (dim,)) * c.gamma
        expected = jax.grad(log_density, 1)(t, x, *known)
        np.testing.assert_allclose(score(None, t, x), expected, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(field(None, t, x), enumerated_velocity(t, x, *known), rtol=1e-10, atol=1e-10)
        squares = np.sum((x - c.alpha * pairs.x0 - c.beta * pairs.x1) ** 2, -1)
        logits = np.log(WEIGHTS) - squares / (2 * c.gamma**2)
        np.testing.assert_allclose(log_weights(t, x), logits - jax.nn.logsumexp(logits), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "dim"), [*((name, 3) for name in INTERPOLANTS), ("brownian_bridge", 24), ("own", 24)])
def test_continuity_equation(x64: None, name: str, dim: int) -> None:
    """Catches a velocity that is no transport of p_t: d/dt log p + div v + v . score = 0, by autodiff of p alone."""
    known = some_pairs(5, (dim,)), noisy(name), WEIGHTS
    field = finite.empirical_minimiser(*known)
    t = jnp.asarray(0.35)
    x = jnp.mean(known[0].x0, 0) * 0.6 + jnp.mean(known[0].x1, 0) * 0.4
    rate, score = jax.grad(log_density, (0, 1))(t, x, *known)
    divergence = jnp.trace(jax.jacfwd(field, 2)(None, t, x))
    transported = divergence + field(None, t, x) @ score
    np.testing.assert_allclose(rate, -transported, rtol=1e-10, atol=1e-10 * float(jnp.abs(divergence)))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", ["linear", "trigonometric", "gaussian_source"])
def test_without_noise_the_nearest_pair(x64: None, name: str, dim: int) -> None:
    """Catches a limit that is not the nearest pair's own velocity, and a prior that moves it; weights 0 and -inf."""
    pairs, interpolant = some_pairs(5, (dim,)), INTERPOLANTS[name]()
    field = finite.empirical_minimiser(pairs, interpolant, np.array([0.96, *[0.01] * 4]))
    log_weights = finite.pair_log_weights(pairs, interpolant, np.array([0.96, *[0.01] * 4]))
    for seed, t in enumerate([0.0, 0.3, 0.6, 1.0]):
        c = interpolant.coefficients(t)
        x = jax.random.normal(jax.random.key(seed), (dim,))
        nearest = np.argmin(np.sum((x - c.alpha * pairs.x0 - c.beta * pairs.x1) ** 2, -1))
        expected = c.alpha_rate * pairs.x0[nearest] + c.beta_rate * pairs.x1[nearest]
        np.testing.assert_allclose(field(None, t, x), expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(log_weights(t, x), np.where(np.arange(5) == nearest, 0, -np.inf))


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("dim", DIMS)
def test_ties_are_averaged(dim: int, chunk: int | None) -> None:
    """Catches argmin in place of the limit where lines meet: Counter Example 1 at t = 1/2, weighted, in float32."""
    x0 = jnp.round(8 * some_pairs(3, (dim,)).x0) / 8  # so that 4 - x0 is exact
    pairs, weights = Pair(x0, 4 - x0), np.array([0.5, 0.3, 0.2], np.float32)
    field = finite.empirical_minimiser(pairs, fvjax.linear(), weights, chunk=chunk)
    expected = weights @ (4 - 2 * np.asarray(x0))
    np.testing.assert_allclose(field(None, 0.5, jnp.full(dim, 2.0)), expected, rtol=1e-5, atol=1e-6)
    log_weights = finite.pair_log_weights(pairs, fvjax.linear(), weights)(0.5, jnp.full(dim, 2.0))
    np.testing.assert_allclose(log_weights, np.log(weights), rtol=1e-6)


def hard_case(name: str) -> tuple[Pair, float, np.ndarray]:
    """Float32 pairs whose differences are lost in |x|^2, a time, and points x at distance about sigma from pairs."""
    rng, t, sigma = np.random.default_rng(1), 0.3, 1e-3
    if name == "images":  # [-1, 1], norms of 64
        x0, x1 = rng.uniform(-1, 1, (2, 40, 12288))
    elif name == "near duplicates":  # more than a block of them, at distances of sigma and up
        center0, center1 = rng.uniform(-1, 1, (2, 1, 3072))
        steps = rng.normal(size=(2, 40, 3072)) * np.linspace(0.2, 6, 40)[:, None] * sigma / 3072**0.5
        x0, x1 = center0 + steps[0], center1 + steps[1]
    else:  # "far away": a cloud as narrow as sigma, 30,000 times further from the origin
        x0, x1 = 30 + rng.normal(size=(2, 40, 48)) * sigma / 8
        x1 += 1
    x0, x1 = x0.astype(np.float32), x1.astype(np.float32)
    z = rng.normal(size=x0.shape)
    # Few pairs alone take part in the noise of many dimensions: it moves all costs alike.
    x = 0.7 * x0.astype(float) + 0.3 * x1 + sigma * z
    return Pair(x0, x1), t, x[:6].astype(np.float32)


def reference(pairs: Pair, t: float, x: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Log weights and velocity of ONE x in float64, with the time as float32 holds it."""
    time = float(np.float32(t))
    x0, x1 = (np.asarray(rows, float) for rows in pairs)
    logits = -np.sum((x.astype(float) - (1 - time) * x0 - time * x1) ** 2, -1) / (2 * sigma**2)
    logs = logits - scipy.special.logsumexp(logits)
    return logs, np.exp(logs) @ (x1 - x0)


@pytest.mark.parametrize("name", ["images", "near duplicates", "far away"])
def test_float32_at_small_sigma(name: str) -> None:
    """Catches cancellation in |x|^2 - 2 x . m + |m|^2, and a refinement that stops too early."""
    sigma = 1e-3
    pairs, t, points = hard_case(name)
    log_weights = jax.jit(jax.vmap(finite.pair_log_weights(pairs, fvjax.constant_noise(sigma)), (None, 0)))(t, points)
    fields = [finite.empirical_minimiser(pairs, fvjax.constant_noise(sigma), chunk=chunk) for chunk in (None, 7)]
    velocities = [jax.vmap(field, (None, None, 0))(None, t, points) for field in fields]

    means = np.float32(1 - t) * pairs.x0 + np.float32(t) * pairs.x1
    products = np.sum(points**2, -1)[:, None] - 2 * points @ means.T + np.sum(means**2, -1)
    naive = jax.nn.log_softmax(-products / np.float32(2 * sigma**2))
    competitors, misses = 0, []
    for k, x in enumerate(points):
        logs, velocity = reference(pairs, t, x, sigma)
        counts = logs > -20
        competitors += np.sum(counts)
        misses.append(np.max(np.abs(naive[k] - logs)[counts]))
        np.testing.assert_allclose(log_weights[k][counts], logs[counts], rtol=0, atol=5e-3)
        for found in velocities:
            size, rounding = np.max(np.abs(velocity)), np.finfo(np.float32).eps * np.max(np.abs(pairs.x1))
            np.testing.assert_allclose(found[k], velocity, rtol=0, atol=1e-5 * size + 4 * rounding)
    if name == "images":
        assert competitors == len(points)
    else:
        assert competitors > 10 * len(points)
        assert max(misses) > 10, "not a hard case"


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("sigma", [0.0, 1e-4, 0.7])
def test_chunks_do_not_matter(x64: None, dim: int, sigma: float) -> None:
    """Catches a wrong merge, a last chunk that counts pairs twice, chunks without any weight, and their derivatives."""
    pairs = some_pairs(11, (dim,))
    weights = np.array([0, 0, 0, 0.1, 0.2, 0.3, 0, 0.2, 0.1, 0.1, 0])
    interpolant = fvjax.constant_noise(sigma)
    x = 0.4 * pairs.x0[4] + 0.6 * pairs.x1[4] + 0.5 * sigma

    def everything(chunk: int | None) -> tuple[jax.Array, ...]:
        field = finite.empirical_minimiser(pairs, interpolant, weights, chunk=chunk)
        score = finite.empirical_score(pairs, interpolant, weights, chunk=chunk)
        return jax.jit(lambda x: (field(None, 0.6, x), score(None, 0.6, x), jax.jacrev(field, 2)(None, 0.6, x)))(x)

    expected = everything(None)
    for chunk in (1, 4, 100):
        for found, wanted in zip(everything(chunk), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dim", "chunk"), [(3, None), (24, None), (24, 2)])
def test_derivatives(x64: None, dim: int, chunk: int | None) -> None:
    """Catches the derivative of the refinement loop in place of that of the cost: in x, t and sigma, both modes."""

    def field(sigma: jax.Array, t: jax.Array, x: jax.Array, pairs: Pair) -> jax.Array:
        return finite.empirical_minimiser(pairs, fvjax.constant_noise(sigma), WEIGHTS, chunk=chunk)(None, t, x)

    def brute(sigma: jax.Array, t: jax.Array, x: jax.Array, pairs: Pair) -> jax.Array:
        return enumerated_velocity(t, x, pairs, fvjax.constant_noise(sigma), WEIGHTS)

    forward, reverse, expected = (
        jax.jit(mode(f, (0, 1, 2))) for mode, f in ((jax.jacfwd, field), (jax.jacrev, field), (jax.jacfwd, brute))
    )
    for sigma in (1e-4, 0.3):
        pairs = some_pairs(5, (dim,))
        pairs = Pair(*(x[:1] + sigma / dim**0.5 * (x - x[:1]) for x in pairs))  # all compete
        x = 0.6 * pairs.x0[2] + 0.4 * pairs.x1[2] + sigma / 3 / dim**0.5
        point = jnp.asarray(sigma), jnp.asarray(0.4), x, pairs
        rounding = 4 * dim**0.5 * np.finfo(float).eps * float(jnp.max(jnp.sum(pairs.x1**2, -1))) / sigma**2
        for mode in (forward, reverse):
            for found, wanted in zip(mode(*point), expected(*point), strict=True):
                size = float(jnp.max(jnp.abs(wanted)))
                assert size > 0.01
                np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * size + rounding)


@pytest.mark.parametrize(
    ("name", "dim", "precise"),
    [
        *((name, *case) for name in INTERPOLANTS for case in ((3, False), (24, True))),
        *((name, 24, False) for name in ("brownian_bridge", "smooth_bridge", "own")),
    ],
)
def test_no_nan_at_the_ends(name: str, dim: int, precise: bool) -> None:
    """Catches 0 / 0 at gamma = 0 and sin(pi)^2 that is not 0; on a pair, without noise, its own velocity comes back."""
    with jax.enable_x64(precise):
        pairs, interpolant = some_pairs(5, (dim,)), INTERPOLANTS[name]()
        field, score = finite.empirical_minimiser(pairs, interpolant), finite.empirical_score(pairs, interpolant)

        def everything(t: jax.Array, x: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
            forward, reverse = jax.jacfwd(field, (1, 2))(None, t, x), jax.jacrev(field, 2)(None, t, x)
            return (field(None, t, x), *forward, reverse), score(None, t, x), interpolant.coefficients(t)

        elsewhere = jnp.full(dim, 3.0)
        at_start, at_end = (jnp.stack([x[1], x[2], elsewhere]) for x in pairs)
        times = jnp.repeat(jnp.array([0.0, 1.0]), 3)
        found, scores, coefficients = jax.jit(jax.vmap(everything))(times, jnp.concatenate([at_start, at_end]))
        assert all(np.all(np.isfinite(value)) for value in found)
        assert not np.any(np.isnan(scores))
        for row in (0, 3):
            if abs(coefficients.gamma[row]) < 1e-9:
                own = coefficients.alpha_rate[row] * pairs.x0[1] + coefficients.beta_rate[row] * pairs.x1[1]
                np.testing.assert_allclose(found[0][row], own, rtol=1e-5, atol=1e-5)


def test_bridge_tends_to_its_end(x64: None) -> None:
    """Catches a limit that is not the limit: towards t = 0 the velocity on a path without noise tends to that at 0."""
    pairs, interpolant = some_pairs(), fvjax.brownian_bridge(0.5)
    field = finite.empirical_minimiser(pairs, interpolant)
    at_end = field(None, 0.0, pairs.x0[0])
    for t in (1e-3, 1e-6):
        x = (1 - t) * pairs.x0[0] + t * pairs.x1[0]
        np.testing.assert_allclose(field(None, t, x), at_end, rtol=1e-9)


def test_score_without_noise() -> None:
    """Catches nan, or a large finite number that depends on the dtype, where there is no density."""
    pairs = Pair(jnp.zeros((1, 3)), jnp.ones((1, 3)))
    score = finite.empirical_score(pairs, fvjax.linear())
    np.testing.assert_array_equal(score(None, 0.5, jnp.array([0.0, 0.5, 1.0])), [np.inf, 0, -np.inf])


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("sigma", [0.0, 1e-3, 1.0])
def test_nan_in_nan_out(dim: int, sigma: float) -> None:
    """Catches an endless refinement, and a point that is no number but gets a velocity."""
    field = finite.empirical_minimiser(some_pairs(5, (dim,)), fvjax.constant_noise(sigma), chunk=2)
    assert np.all(np.isnan(field(None, 0.5, jnp.zeros(dim).at[1].set(jnp.nan))))


@pytest.mark.parametrize("make", ["minimiser", "memorizing"])
def test_flow_returns_the_training_targets(x64: None, make: str) -> None:
    """Catches a field that forgets its pairs: on lines that do not cross the ODE at sigma -> 0 returns x1 to 1e-6."""
    x0 = jnp.arange(6.0)[:, None] * jnp.array([1.0, 0.3])
    pairs = Pair(x0, x0 * 1.5 + jnp.array([2.0, -1.0]))
    if make == "memorizing":
        field = finite.memorizing_field(pairs)
    else:
        field = finite.empirical_minimiser(pairs, fvjax.constant_noise(1e-4))
    flow = jax.jit(lambda field, x: jax.vmap(lambda x: fvjax.transport(field, None, x, rtol=1e-9, atol=1e-9))(x))
    np.testing.assert_allclose(flow(field, pairs.x0), pairs.x1, rtol=0, atol=1e-6)
    np.testing.assert_allclose(fvjax.transport(field, None, pairs.x0[3]), pairs.x1[3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "constant_noise", "trigonometric"])
def test_memorizing_field_has_no_loss(x64: None, name: str) -> None:
    """Catches Proposition 2 gone wrong: on crossing lines the loss is 0 at almost every t; noise is left out."""
    pairs = some_pairs(40, (2,))
    interpolant = INTERPOLANTS[name]()
    field = finite.memorizing_field(pairs, interpolant)

    def loss(t: jax.Array, pair: Pair) -> jax.Array:
        sample = path_at(pair, interpolant, t, jnp.zeros(2))
        return jnp.sum((field(None, t, sample.x) - sample.target) ** 2)

    times = jax.random.uniform(jax.random.key(0), (200,))
    losses = jax.vmap(jax.vmap(loss, (None, 0)), (0, None))(times, pairs)
    np.testing.assert_allclose(losses, 0, atol=1e-20)


def test_memorizing_field_at_a_crossing() -> None:
    """Catches a crossing that is resolved by the order of the pairs: the mean velocity comes back there."""
    pairs = Pair(jnp.array([[1.0, 0], [-1, 0]]), jnp.array([[-1.0, 0], [1, 0]]))
    field = finite.memorizing_field(pairs)
    np.testing.assert_array_equal(field(None, 0.5, jnp.zeros(2)), 0)
    np.testing.assert_array_equal(field(None, 0.4, jnp.array([0.2, 0])), [-2, 0])


def test_weights_are_multiplicities(x64: None) -> None:
    """Catches weights that are lost or squared: 1/4 and 3/4 are one pair once and the other three times."""
    once = some_pairs(2)
    thrice = Pair(*(x[np.array([0, 1, 1, 1])] for x in once))
    x = jnp.mean(once.x0, 0)
    for interpolant in (fvjax.constant_noise(1.0), fvjax.linear()):
        weighted = finite.empirical_minimiser(once, interpolant, np.array([0.25, 0.75]))
        repeated = finite.empirical_minimiser(thrice, interpolant)
        np.testing.assert_allclose(weighted(None, 0.3, x), repeated(None, 0.3, x), rtol=1e-12)
    nearest_out = finite.memorizing_field(Pair(once.x0[1:], once.x1[1:]))
    out = finite.empirical_minimiser(once, fvjax.linear(), np.array([0.0, 1.0]))
    np.testing.assert_array_equal(out(None, 0.0, once.x0[0]), nearest_out(None, 0.0, once.x0[0]))


@given(shift=st.floats(-100, 100), scale=st.floats(0.01, 100), order=st.permutations(range(5)))
def test_shift_scale_and_order(x64: None, shift: float, scale: float, order: list[int]) -> None:
    """Catches centers that enter the answer, and units that are not those of x: v(s x + c) = s v(x)."""
    pairs, x = some_pairs(5, (24,)), jnp.linspace(-1, 1, 24)
    moved = Pair(*(scale * x[np.array(order)] + shift for x in pairs))
    expected = finite.empirical_minimiser(pairs, fvjax.constant_noise(0.9))(None, 0.3, x)
    found = finite.empirical_minimiser(moved, fvjax.constant_noise(0.9 * scale))(None, 0.3, scale * x + shift)
    np.testing.assert_allclose(found, scale * expected, rtol=0, atol=1e-10 * scale * (1 + abs(shift) / scale) ** 2)


@pytest.mark.parametrize(("dims", "dtype"), [((), jnp.float32), ((5,), jnp.bfloat16), ((4, 3, 2), jnp.float16)])
def test_shapes_and_dtypes(dims: tuple[int, ...], dtype: jnp.dtype) -> None:
    """Catches a field that is bound to vectors, to float32, or that does not take its pairs as numpy arrays."""
    rows = np.random.default_rng(0).normal(size=(2, 4, *dims))
    pairs = Pair(*(np.asarray(jnp.asarray(x, dtype)) for x in rows))
    interpolant = fvjax.brownian_bridge(0.5)
    x = jnp.asarray(pairs.x0[0])
    wide = Pair(*(jnp.asarray(rows, jnp.float32) for rows in pairs))
    for make in (finite.empirical_minimiser, finite.empirical_score, finite.pair_log_weights):
        arguments = (0.5, x) if make is finite.pair_log_weights else (None, 0.5, x)
        found = make(pairs, interpolant)(*arguments)
        expected = make(wide, interpolant)(*arguments[:-1], x.astype(jnp.float32))
        assert (found.shape, found.dtype) == (expected.shape, dtype)
        assert found.shape == ((4,) if make is finite.pair_log_weights else dims)
        np.testing.assert_array_equal(found, expected.astype(dtype))


def test_batch_in_time_and_place(x64: None) -> None:
    """Catches lanes of a batch that influence each other: different t, and sigma so small that some need refinement."""
    pairs, times = some_pairs(6, (24,)), jnp.linspace(0, 1, 7)
    x = jnp.concatenate([pairs.x0, pairs.x1[:1] * 50])
    field = finite.empirical_minimiser(pairs, fvjax.smooth_bridge(0.05), chunk=4)
    found = jax.vmap(field, (None, 0, 0))(None, times, x)
    for k in range(7):
        np.testing.assert_allclose(found[k], field(None, times[k], x[k]), rtol=1e-9, atol=1e-9)


def test_compiles_once_and_copies_no_pairs() -> None:
    """Catches a field that compiles again for other pairs or another sigma, and pairs inside the compiled program."""
    traces = 0

    @jax.jit
    def velocity(field: fvjax.VelocityField, x: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return jax.vmap(lambda x: field(None, 0.3, x))(x)

    fields = [
        finite.empirical_minimiser(some_pairs(512, (64,), seed), fvjax.constant_noise(0.1 + seed)) for seed in range(3)
    ]
    x = jnp.zeros((2, 64))
    assert len({np.asarray(velocity(field, x)).tobytes() for field in fields}) == 3
    assert traces == 1
    memory = velocity.lower(fields[0], x).compile().memory_analysis()
    size = 2 * 512 * 64 * 4
    assert memory.argument_size_in_bytes > size > 4 * memory.temp_size_in_bytes


@pytest.mark.parametrize(("dim", "chunk", "arrays"), [(512, None, 12), (512, 128, 0.05), (3, None, 4)])
def test_memory_is_bounded(dim: int, chunk: int | None, arrays: float) -> None:
    """Catches an array of batch x pairs x dimensions; with chunks also one of batch x pairs."""
    batch = 64

    def temporary(n: int) -> int:
        pairs = some_pairs(n, (dim,))
        field = finite.empirical_minimiser(pairs, fvjax.constant_noise(0.1), chunk=chunk)
        run = jax.jit(lambda field, t, x: jax.vmap(lambda t, x: field(None, t, x))(t, x))
        lowered = run.lower(field, jnp.zeros(batch), jnp.zeros((batch, dim)))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    growth = temporary(3072) - temporary(1024)  # of 2048 pairs more
    assert growth < arrays * 4 * batch * 2048


BAD = {
    "x0 and pairs.x1 must have the same shape": lambda p: (Pair(p.x0, p.x1[:, :2]), None),
    "pairs must be at least one, got arrays of shape": lambda p: (Pair(p.x0[:0], p.x1[:0]), None),
    r"pairs must have at least one dimension, got arrays of shape \(5, 0\)": lambda p: (
        Pair(p.x0[:, :0], p.x1[:, :0]),
        None,
    ),
    "pairs.x0 must be floating point, got int32": lambda p: (Pair(p.x0.astype(int), p.x1.astype(int)), None),
    "must have the same dtype, got float32 and bfloat16": lambda p: (Pair(p.x0, p.x1.astype(jnp.bfloat16)), None),
    "pairs.x1 must be finite, got 1 of 15": lambda p: (Pair(p.x0, p.x1.at[2, 1].set(jnp.nan)), None),
    r"weights must have shape \(5,\), got \(4,\)": lambda p: (p, WEIGHTS[:4]),
    "weights must be >= 0 and finite, got": lambda p: (p, WEIGHTS - 0.15),
    "weights must be >= 0 and finite, got .*nan": lambda p: (p, np.array([np.nan, *WEIGHTS[1:]])),
    "weights must add up to 1, got a sum of 1.1": lambda p: (p, 1.1 * WEIGHTS),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_pairs_and_weights_are_refused(message: str) -> None:
    """Catches nonsense that would come out as nan, or not at all."""
    arguments = BAD[message](some_pairs())
    for make in (finite.empirical_minimiser, finite.empirical_score, finite.pair_log_weights):
        with pytest.raises(ValueError, match=message):
            make(arguments[0], fvjax.linear(), arguments[1])


def test_pairs_that_a_jitted_function_closes_over_are_checked_there() -> None:
    """Catches a check that traces what is known, and fails with a tracer for an answer."""
    x0 = jnp.asarray([[0.0, 1.0], [2.0, 3.0]])

    def at_half(x1: jax.Array) -> jax.Array:
        known = Pair(x0, x1)
        return jax.jit(lambda x: finite.empirical_minimiser(known, fvjax.constant_noise(0.1))(None, 0.5, x))(x0[0])

    np.testing.assert_allclose(at_half(x0 + 1), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="pairs.x1 must be finite, got 1 of 4"):
        at_half(x0.at[0, 0].set(jnp.nan))


@pytest.mark.parametrize("chunk", [0, -1, 2.0, True, "4"])
def test_bad_chunks_are_refused(chunk: object) -> None:
    """Catches a chunk that would be an endless loop, or is no number."""
    for make in (finite.empirical_minimiser, finite.empirical_score):
        with pytest.raises(ValueError, match="chunk must be an integer >= 1, got"):
            make(some_pairs(), fvjax.linear(), chunk=chunk)
    with pytest.raises(ValueError, match="chunk must be an integer >= 1, got"):
        finite.memorizing_field(some_pairs(), chunk=chunk)


@pytest.mark.parametrize("x", [np.zeros((2, 3), np.float32), np.zeros(4, np.float32), np.zeros(3, np.int32)])
def test_bad_points_are_refused(x: np.ndarray) -> None:
    """Catches a batch given to a field of ONE example, which would broadcast."""
    with pytest.raises(ValueError, match="x must"):
        finite.empirical_minimiser(some_pairs(), fvjax.linear())(None, 0.5, x)
