"""Interpolants: endpoints, velocities, the ends of the bridge, and where the random numbers of a loss come from."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fvjax import interpolants
from fvjax.interpolants import Interpolant, as_pytree, brownian_bridge, draw_path, draw_paths, linear, path_at
from fvjax.types import Array, Pair, PathSample

FACTORIES: dict[str, Callable[[Any], Interpolant]] = {
    "linear": lambda sigma: interpolants.linear(),
    "constant_noise": interpolants.constant_noise,
    "brownian_bridge": brownian_bridge,
    "smooth_bridge": interpolants.smooth_bridge,
    "trigonometric": lambda sigma: interpolants.trigonometric(),
    "gaussian_source": interpolants.gaussian_source,
}
WITH_NOISE = ("constant_noise", "brownian_bridge", "smooth_bridge")

every_interpolant = pytest.mark.parametrize("name", FACTORIES)
vectors = hnp.arrays(np.float64, 3, elements=st.floats(-5, 5))
sigmas = st.floats(0, 2)
path = jax.jit(path_at)
paths = jax.jit(draw_paths)
coefficients = jax.jit(Interpolant.coefficients)
noise_drift = jax.jit(Interpolant.noise_drift)


def pairs(n: int, *dims: int, seed: int = 0) -> Pair:
    """Standard normal x0 and x1, [n, *dims]."""
    x0, x1 = jax.random.normal(jax.random.key(seed), (2, n, *dims))
    return Pair(x0, x1)


@every_interpolant
@given(x0=vectors, x1=vectors, z=vectors, sigma=sigmas)
def test_endpoints(x64: None, name: str, x0: Array, x1: Array, z: Array, sigma: float) -> None:
    """Catches swapped or mis-scaled coefficients: what each interpolant promises at t = 0 and t = 1, typed out."""
    noise = sigma * z if name == "constant_noise" else 0 * z
    left = x0 * sigma if name == "gaussian_source" else 0 * x0
    interpolant = FACTORIES[name](sigma)
    start, end = (path(Pair(x0, x1), interpolant, t, z).x for t in (0, 1))
    np.testing.assert_allclose(start, x0 + noise, atol=1e-14)
    np.testing.assert_allclose(end, x1 + left + noise, atol=1e-14)


@every_interpolant
@given(t=st.floats(0, 1), sigma=sigmas)
def test_coefficients_are_the_table(x64: None, name: str, t: float, sigma: float) -> None:
    """Catches a wrong law between the ends, such as sin for sin^2: alpha, beta and gamma of the docstring in numpy."""
    quarter = np.pi / 2 * t
    alpha, beta, gamma = {
        "linear": (1 - t, t, 0.0),
        "constant_noise": (1 - t, t, sigma),
        "brownian_bridge": (1 - t, t, sigma * np.sqrt(t * (1 - t))),
        "smooth_bridge": (1 - t, t, sigma * np.sin(np.pi * t) ** 2),
        "trigonometric": (np.cos(quarter), np.sin(quarter), 0.0),
        "gaussian_source": (1 - (1 - sigma) * t, t, 0.0),
    }[name]
    c = coefficients(FACTORIES[name](sigma), t)
    np.testing.assert_allclose(c[:3], (alpha, beta, gamma), rtol=1e-13, atol=1e-15)


@every_interpolant
@given(x0=vectors, x1=vectors, z=vectors, sigma=sigmas, t=st.floats(0.05, 0.95))
def test_target_is_the_velocity_of_the_path(
    x64: None, name: str, x0: Array, x1: Array, z: Array, sigma: float, t: float
) -> None:
    """Catches a wrong derivative: central differences of x_t, whose error h^2 |x'''| / 6 is below 2e-7 for this h."""
    h, interpolant = 1e-5, FACTORIES[name](sigma)
    before, here, after = (path(Pair(x0, x1), interpolant, s, z) for s in (t - h, t, t + h))
    np.testing.assert_allclose((after.x - before.x) / (2 * h), here.target, atol=2e-7)


@every_interpolant
@given(sigma=sigmas, t=st.floats(1e-6, 1 - 1e-6))
def test_noise_drift_is_gamma_times_its_rate(x64: None, name: str, sigma: float, t: float) -> None:
    """Catches a `noise_rate` that disagrees with the coefficients it stands for."""
    interpolant = FACTORIES[name](sigma)
    c = coefficients(interpolant, t)
    np.testing.assert_allclose(noise_drift(interpolant, t), c.gamma * c.gamma_rate, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("sigma", [0.0, 0.5])
@pytest.mark.parametrize(("t", "side"), [(0, 1), (1, -1), (0.0, 1), (1.0, -1)])
def test_brownian_bridge_at_its_ends(t: float, side: int, sigma: float, double: bool) -> None:
    """Catches nan from 0 * inf or 0 / 0 where gamma' is infinite, and an integer time that rounds sigma^2 / 2 to 0."""
    with jax.enable_x64(double):
        bridge, one = brownian_bridge(sigma), jnp.ones(2)
        sample = path_at(Pair(2 * one, 5 * one), bridge, t, one)
        slope = jax.grad(lambda s: jnp.sum(path_at(Pair(one, one), brownian_bridge(s), t, one).target))(sigma)
        np.testing.assert_array_equal(sample.x, 2 * one if t == 0 else 5 * one)
        assert np.all(np.isfinite(sample.target))
        assert np.isfinite(slope)
        assert np.sign(slope) == side
        assert float(bridge.noise_drift(t)) == side * sigma**2 / 2


@given(x0=vectors, x1=vectors, z=vectors, sigma=sigmas, t=st.floats(0, 1 - 1e-6))
def test_bridge_drift_points_at_the_target(x64: None, x0: Array, x1: Array, z: Array, sigma: float, t: float) -> None:
    """Catches the velocity in place of the drift, and a bridge of another law: (x1 - x_t) / (1 - t), and x_t itself."""
    sample = path(Pair(x0, x1), interpolants.bridge_drift(sigma), t, z)
    np.testing.assert_allclose(sample.target, (x1 - sample.x) / (1 - t), rtol=1e-8, atol=1e-8)
    np.testing.assert_array_equal(sample.x, path(Pair(x0, x1), brownian_bridge(sigma), t, z).x)


@given(sigma=sigmas, t=st.floats(0, 1 - 1e-6))
def test_noise_drift_of_a_bridge_drift(x64: None, sigma: float, t: float) -> None:
    """Catches gamma gamma' where the diffusion has gamma times its own multiple of z, -sigma^2 t."""
    c = coefficients(interpolants.bridge_drift(sigma), t)
    np.testing.assert_allclose(noise_drift(interpolants.bridge_drift(sigma), t), c.gamma * c.gamma_rate, atol=1e-14)
    np.testing.assert_allclose(c.gamma * c.gamma_rate, -(sigma**2) * t, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("t", [0, 1, 0.0, 1.0])
def test_bridge_drift_at_its_ends(t: float, double: bool) -> None:
    """Catches nan or inf at the singular end, noise in the target at t = 0, and a slope in sigma that is not finite."""
    with jax.enable_x64(double):
        one = jnp.ones(2)
        target = lambda s: path_at(Pair(2 * one, 5 * one), interpolants.bridge_drift(s), t, one).target  # noqa: E731
        assert np.all(np.isfinite(target(0.5)))
        assert np.all(np.isfinite(jax.jacfwd(target)(0.5)))
        assert np.all(target(0.5) == 3) if t == 0 else np.all(target(0.5) < -100)
        np.testing.assert_array_equal(target(0.0), 3 * one)


@pytest.mark.parametrize("name", WITH_NOISE)
@given(t=st.floats(0, 1))
def test_without_noise_every_straight_interpolant_is_linear(x64: None, name: str, t: float) -> None:
    """Catches noise that survives sigma = 0: the memorizing case must be reached from every family."""
    pair, z = jax.tree.map(lambda x: x[0], pairs(1, 4)), jnp.ones(4)
    chex.assert_trees_all_equal(path(pair, FACTORIES[name](0.0), t, z), path(pair, linear(), t, z))


@pytest.mark.parametrize(
    ("interpolant", "start", "end"),
    [(linear(), 0, 1), (brownian_bridge(0.3), 1e-3, 1 - 1e-3), (brownian_bridge(0.3, time_range=(0.2, 0.7)), 0.2, 0.7)],
)
def test_law_of_time_and_noise(interpolant: Interpolant, start: float, end: float) -> None:
    """Catches times outside `time_range`, a wrong law, and one key used for both time and noise.

    Kolmogorov-Smirnov distance below its 0.1% point, 1.95 / sqrt(n); correlation below 4 / sqrt(n). Fixed keys.
    """
    n = 4000
    interpolant = interpolant._replace(gamma=jnp.ones_like, noise_rate=None)
    sample = draw_paths(jax.random.key(1), Pair(jnp.zeros((n, 2)), jnp.zeros((n, 2))), interpolant)
    t, z = np.asarray(sample.t, float), np.asarray(sample.x, float)
    assert start <= t.min()
    assert t.max() <= end
    assert scipy.stats.kstest(t, scipy.stats.uniform(start, end - start).cdf).statistic < 1.95 / n**0.5
    assert scipy.stats.kstest(z.ravel(), scipy.stats.norm.cdf).statistic < 1.95 / (2 * n) ** 0.5
    assert np.abs(np.corrcoef(np.column_stack([t, z, z**2]).T) - np.eye(5)).max() < 4 / n**0.5


def test_draw_path_is_a_function_of_its_key() -> None:
    """Catches hidden state (a second call differs) and a key that is ignored (another key does not)."""
    pair, interpolant = jax.tree.map(lambda x: x[0], pairs(1, 3)), interpolants.constant_noise(0.3)
    first, again, other = (draw_path(jax.random.key(seed), pair, interpolant) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert first.t != other.t
    assert np.all(first.x != other.x)


@given(t=st.floats(0, 1, width=32))
def test_given_time_keeps_the_noise(t: float) -> None:
    """Catches a key split that depends on whether the time is drawn: the noise must be the same either way."""
    pair, interpolant, key = Pair(jnp.zeros(3), jnp.zeros(3)), interpolants.constant_noise(1.0), jax.random.key(3)
    draw = jax.jit(draw_path)
    given_time = draw(key, pair, interpolant, t=t)
    assert given_time.t == np.float32(t)
    np.testing.assert_array_equal(given_time.x, draw(key, pair, interpolant).x)


@given(start=st.integers(0, 2**30))
def test_draws_do_not_depend_on_the_cut(start: int) -> None:
    """Catches per-example keys made from the position in the batch instead of the global index."""
    batch, interpolant, key = pairs(6, 2), brownian_bridge(0.3), jax.random.key(5)

    def part(low: int, high: int) -> PathSample:
        return paths(key, jax.tree.map(lambda x: x[low:high], batch), interpolant, start=start + low)

    whole = part(0, 6)
    chex.assert_trees_all_equal(
        whole, jax.tree.map(lambda *x: jnp.concatenate(x), *(part(i, i + 2) for i in (0, 2, 4)))
    )
    last = draw_path(jax.random.fold_in(key, start + 5), jax.tree.map(lambda x: x[5], batch), interpolant)
    chex.assert_trees_all_close(last, jax.tree.map(lambda x: x[5], whole), rtol=1e-5)


def test_start_may_be_a_traced_or_narrow_integer(x64: None) -> None:
    """Catches a promotion error: a step counter is int32 also where JAX counts in int64."""
    batch, key = pairs(3, 2), jax.random.key(0)
    expected = draw_paths(key, batch, linear(), start=4)
    drawn = jax.jit(lambda start: draw_paths(key, batch, linear(), start=start))(jnp.int32(4))
    chex.assert_trees_all_close(drawn, expected, rtol=1e-12)


@every_interpolant
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_dtype_follows_the_pair(x64: None, name: str, dtype: Any) -> None:
    """Catches a constant or a sigma that promotes everything to float64, or fails under strict promotion."""
    pair = jax.tree.map(lambda x: x.astype(dtype), pairs(2, 3))
    for sigma in (0.3, np.float32(0.3), jnp.asarray(0.3)):
        sample = draw_paths(jax.random.key(0), pair, FACTORIES[name](sigma))
        assert {x.dtype for x in sample} == {jnp.dtype(dtype)}
        assert np.all(np.isfinite(np.asarray(sample.target, float)))


def test_numpy_pairs_without_x64() -> None:
    """Catches a warning (an error here) on numpy's float64 arrays where JAX computes in float32."""
    sample = draw_path(jax.random.key(0), Pair(np.zeros(3), np.ones(3)), linear())  # type: ignore[arg-type]
    assert {x.dtype for x in sample} == {jnp.dtype("float32")}


@every_interpolant
def test_another_sigma_does_not_compile_again(name: str) -> None:
    """Catches a sigma hidden in a closure: an interpolant is an argument of a jitted function, not a constant."""
    pair = jax.tree.map(lambda x: x[0], pairs(1, 3))
    chex.clear_trace_counter()
    sample = jax.jit(chex.assert_max_traces(lambda i: path_at(pair, i, 0.3, jnp.ones(3)), 1))
    for sigma in (0.1, 0.7):
        expected = path_at(pair, FACTORIES[name](sigma), 0.3, jnp.ones(3))
        chex.assert_trees_all_close(sample(FACTORIES[name](sigma)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*WITH_NOISE, "gaussian_source"])
def test_vmap_over_sigma(name: str) -> None:
    """Catches a factory that looks at the number: sigma may be batched, and negative values pass while traced."""
    pair, several = jax.tree.map(lambda x: x[0], pairs(1, 3)), jnp.asarray([0.0, 0.4, 1.5])

    def place(sigma: Any) -> Array:
        return path_at(pair, FACTORIES[name](sigma), 0.3, jnp.ones(3)).x

    one_by_one = jnp.stack([place(float(sigma)) for sigma in several])
    np.testing.assert_allclose(jax.vmap(place)(several), one_by_one, rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(jax.jit(place)(-0.4)))


def test_plain_functions_are_interpolants() -> None:
    """Catches custom coefficients (a constant, even a Python float) that only work for the built-in families."""
    plain = Interpolant(lambda t: 1 - t**2, lambda t: t**2, lambda t: 0.25, time_range=(0.25, 0.75))  # type: ignore[arg-type,return-value]
    pair, key = jax.tree.map(lambda x: x[0], pairs(1, 3)), jax.random.key(4)
    wrapped = as_pytree(plain)
    assert wrapped.noise_rate is None
    assert wrapped.time_range == (0.25, 0.75)
    assert as_pytree(wrapped) == wrapped
    drawn = jax.jit(draw_path)(key, pair, wrapped)
    chex.assert_trees_all_close(drawn, jax.jit(lambda k: draw_path(k, pair, plain))(key), rtol=1e-6)
    np.testing.assert_allclose(drawn.target, 2 * drawn.t * (pair.x1 - pair.x0), rtol=1e-5)
    with pytest.raises(TypeError, match="interpolant.alpha"):
        jax.jit(draw_path)(key, pair, plain)


@pytest.mark.parametrize("sigma", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", [*WITH_NOISE, "gaussian_source"])
def test_refuses_a_bad_sigma(name: str, sigma: float) -> None:
    """Catches a negative or missing noise scale that would train silently."""
    with pytest.raises(ValueError, match=rf"sigma(_min)? must be >= 0 and finite, got {sigma}"):
        FACTORIES[name](sigma)


@pytest.mark.parametrize("bad", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (1.0, 0.0), (0.0, float("nan")), (0.0,), 0.5])
def test_refuses_a_bad_time_range(bad: Any) -> None:
    """Catches an empty or reversed interval, times outside [0, 1], and anything that is no pair."""
    with pytest.raises(ValueError, match=r"time_range must be a pair with 0.0 <= start < end <= 1.0, got "):
        brownian_bridge(0.1, time_range=bad)


@pytest.mark.parametrize(
    ("x0", "x1", "message"),
    [
        (jnp.zeros(3, int), jnp.zeros(3), "x0 must be floating point, got int32"),
        (jnp.zeros(3), jnp.zeros((3, 1)), r"x0 and x1 must have the same shape, got \(3,\) and \(3, 1\)"),
        (jnp.zeros(3), jnp.zeros(3, jnp.uint8), "x0 and x1 must have the same dtype, got float32 and uint8"),
    ],
)
def test_refuses_a_bad_pair(x0: Array, x1: Array, message: str) -> None:
    """Catches silent broadcasting of x0 against x1, and images that are still bytes."""
    with pytest.raises(ValueError, match=message):
        draw_path(jax.random.key(0), Pair(x0, x1), linear())


def test_refuses_a_bad_batch_start_or_noise() -> None:
    """Catches batches of different lengths, an index that is no integer, and noise that would broadcast."""
    with pytest.raises(ValueError, match="pairs must have one common leading axis"):
        draw_paths(jax.random.key(0), Pair(jnp.zeros((3, 2)), jnp.zeros((4, 2))), linear())
    with pytest.raises(ValueError, match="start must be integers, got float32"):
        draw_paths(jax.random.key(0), pairs(3, 2), linear(), start=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x0 and z must have the same shape"):
        path_at(Pair(jnp.zeros(3), jnp.zeros(3)), linear(), 0.5, jnp.zeros(()))
