"""What training would reach: the population minimiser, and the rotation that its flow applies."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fvjax
from fvjax import gaussian
from fvjax.couplings import rotation_matrix
from fvjax.gaussian import AffineMap, GaussianCoupling, population_minimiser, selected_angle

INTERPOLANTS: dict[str, Callable[[], fvjax.Interpolant]] = {
    "linear": fvjax.linear,
    "constant_noise": lambda: fvjax.constant_noise(0.4),
    "brownian_bridge": lambda: fvjax.brownian_bridge(0.8),
    "smooth_bridge": lambda: fvjax.smooth_bridge(0.5),
    "trigonometric": fvjax.trigonometric,
    "gaussian_source": lambda: fvjax.gaussian_source(0.2),
}


def general_coupling() -> GaussianCoupling:
    """Neither deterministic nor independent, with means and two different covariances."""
    root = np.array([[1.2, 0.3], [-0.4, 0.8]])
    cross = np.array([[0.3, -0.5], [0.2, 0.1]])
    source = {"source_mean": np.array([0.3, -1.0]), "source_cov": np.array([[0.8, 0.2], [0.2, 0.6]])}
    return gaussian.gaussian_coupling(np.array([1.0, 2.0]), root @ root.T, cross, **source)


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_minimiser_is_the_regression_of_the_target(x64: None, name: str) -> None:
    """Catches a transposed gain or a lost gamma gamma': the residual u_t - v*(x_t) is uncorrelated with 1 and x_t.

    These normal equations of least squares hold within 4 standard errors of a million draws: 72 numbers, of which one
    would fail for 0.5% of the seeds.
    """
    interpolant, n = INTERPOLANTS[name](), 1_000_000
    coupling = general_coupling()
    field = population_minimiser(coupling, interpolant)

    @jax.jit
    def normal_equations(key: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        pair_key, noise_key = jax.random.split(key)
        pairs = gaussian.draw_pairs(pair_key, coupling, n)
        noise = jax.random.normal(noise_key, (n, 2))
        paths = jax.vmap(lambda x0, x1, z: fvjax.interpolants.path_at(fvjax.Pair(x0, x1), interpolant, t, z))(
            *pairs, noise
        )
        velocity = jax.vmap(field, in_axes=(None, None, 0))(None, t, paths.x)
        features = jnp.concatenate([jnp.ones((n, 1)), paths.x], 1)
        products = (paths.target - velocity)[:, :, None] * features[:, None]
        return jnp.mean(products, 0), jnp.std(products, 0) / n**0.5

    for t in (0.2, 0.7):
        mean, error = normal_equations(jax.random.key(0), t)
        assert np.all(np.abs(mean) <= 4 * error + 1e-12)
        assert np.all(error < 0.01)


@given(seed=st.integers(0, 2**16), t=st.floats(0, 1))
def test_minimiser_without_noise_is_the_pair_optimal_field(x64: None, seed: int, t: float) -> None:
    """Catches a minimiser that is not the memorizing field where (x_t, t) names the pair; any positive definite A."""
    random = np.random.default_rng(seed)
    root = random.normal(size=(2, 2))
    map = AffineMap(jnp.asarray(root @ root.T + 0.1 * np.eye(2)), jnp.asarray(random.normal(size=2)))
    source = {"source_mean": random.normal(size=2), "source_cov": np.diag(random.uniform(0.5, 2, 2))}
    coupling, x = gaussian.map_coupling(map, **source), jnp.asarray(random.normal(size=2))
    expected = gaussian.affine_field(gaussian.pair_optimal(map), t, x)
    for interpolant in (fvjax.linear(), fvjax.constant_noise(0.0), fvjax.brownian_bridge(0.0)):
        np.testing.assert_allclose(population_minimiser(coupling, interpolant)(None, t, x), expected, rtol=1e-7)


def test_minimiser_is_the_wiener_filter(x64: None) -> None:
    """Catches a disagreement with the formula of docs/theory.md, section 5, for rotated N(0, I)."""
    mean, turn, t, x = jnp.array([1.0, -2.0]), rotation_matrix(2.5, 2), 0.3, jnp.array([0.4, 0.9])
    for gamma, rate, interpolant in [
        (0.5, 0.0, fvjax.constant_noise(0.5)),
        (0.5 * np.sin(np.pi * t) ** 2, 0.5 * np.pi * np.sin(2 * np.pi * t), fvjax.smooth_bridge(0.5)),
    ]:
        b, eye = np.eye(2) + t * (turn - np.eye(2)), np.eye(2)
        gain = ((turn - eye) @ b.T + gamma * rate * eye) @ np.linalg.inv(b @ b.T + gamma**2 * eye)
        found = population_minimiser(gaussian.map_coupling(AffineMap(turn, mean)), interpolant)(None, t, x)
        np.testing.assert_allclose(found, mean + gain @ (x - t * mean), rtol=1e-13)


def test_minimiser_at_the_ends_of_the_brownian_bridge(x64: None) -> None:
    """Catches nan or 1e8 from gamma' at t = 0 and 1, where the minimiser is finite and continuous."""
    field = population_minimiser(general_coupling(), fvjax.brownian_bridge(0.8, time_range=(0.0, 1.0)))
    x = jnp.array([0.5, -0.5])
    for end, inside in ((0.0, 1e-9), (1.0, 1 - 1e-9)):
        at_end = field(None, end, x)
        assert np.all(np.isfinite(at_end))
        np.testing.assert_allclose(field(None, inside, x), at_end, atol=1e-7)
    np.testing.assert_allclose(
        population_minimiser(general_coupling(), fvjax.brownian_bridge(0.8))(None, 0.0, x),
        field(None, 0.0, x),
        rtol=1e-14,
    )


@pytest.mark.parametrize("angle", [np.pi, None])
def test_minimiser_where_all_paths_meet(x64: None, angle: float | None) -> None:
    """Catches 0 / 0 and rounding error taken for a support: at 180 degrees and t = 1/2 x_t is one point.

    With cos and sin of pi as floating point gives them, or exactly.
    """
    turn = -np.eye(2) if angle is None else np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    coupling = gaussian.map_coupling(AffineMap(jnp.asarray(turn), jnp.array([5.0, 5.0])))
    velocity = population_minimiser(coupling, fvjax.linear())(None, 0.5, jnp.array([2.5, 2.7]))
    np.testing.assert_allclose(velocity, [5.0, 5.0], atol=1e-12)


def test_minimiser_is_an_ordinary_field(x64: None) -> None:
    """Catches params that are needed, a batch that does not vmap, and a single precision that drifts."""
    x = np.random.default_rng(0).normal(size=(5, 2))
    double = jax.vmap(population_minimiser(general_coupling(), fvjax.constant_noise(0.3)), (None, None, 0))(
        None, 0.4, x
    )
    with jax.enable_x64(False):
        field = population_minimiser(general_coupling(), fvjax.constant_noise(0.3))
        single = jax.jit(jax.vmap(field, (None, None, 0)))(None, 0.4, jnp.asarray(x, jnp.float32))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, double, rtol=1e-4, atol=1e-5)


def rotated_minimiser(params: tuple[jax.Array, jax.Array], t: jax.Array, x: jax.Array) -> jax.Array:
    """The population minimiser of x1 = R(angle) x0 with constant noise, as a field with params (angle, sigma)."""
    angle, sigma = params
    coupling = gaussian.map_coupling(AffineMap(rotation_matrix(angle, 2), jnp.zeros(2)))
    return population_minimiser(coupling, fvjax.constant_noise(sigma))(None, t, x)


@jax.jit
@jax.vmap
@chex.assert_max_traces(1)
def integrated_angle(angle: jax.Array, sigma: jax.Array) -> jax.Array:
    """The angle by which the minimiser's flow turns a point."""
    x0 = jnp.array([1.0, 0.0])
    x1 = fvjax.transport(rotated_minimiser, (angle, sigma), x0, solver="dopri5", rtol=1e-10, atol=1e-12)
    return jnp.arctan2(x1[1], x1[0])


def test_selected_angle_is_what_the_flow_does(x64: None) -> None:
    """Catches a wrong sign or a lost factor 2: integrates the minimiser's field instead of trusting the formula.

    And a field that compiles again for another angle or sigma: 20 calls, each for one sigma, one trace.
    """
    angles = jnp.asarray(np.deg2rad(np.arange(20) * 9.0))
    for sigma in np.linspace(0.01, 2, 20):
        found = integrated_angle(angles, jnp.full(20, sigma))
        np.testing.assert_allclose(found, selected_angle(angles, sigma), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("angle", "sigma", "expected"),
    [(150, 0.05, 146.7575), (170, 0.05, 146.1401), (179, 0.05, 29.9485), (179, 0.01, 117.3505)],
)
def test_golden_angles(x64: None, angle: float, sigma: float, expected: float) -> None:
    """Catches degrees for radians, and a formula that is wrong close to 180 degrees only."""
    np.testing.assert_allclose(np.rad2deg(selected_angle(np.deg2rad(angle), sigma)), expected, rtol=0, atol=6e-5)


def test_selected_angle_at_the_edges(x64: None) -> None:
    """Catches cos(pi / 2) = 6e-17 in place of 0, and a number where the flow meets a pole; in both precisions."""
    for precise in (False, True):
        with jax.enable_x64(precise):
            sigmas = jnp.array([1e-6, 0.01, 0.5, 100.0])
            for pi in (np.pi, -np.pi, np.float32(np.pi), jnp.asarray(np.pi)):
                if precise and isinstance(pi, np.float32):
                    continue  # not pi in float64, and above it: refused
                np.testing.assert_array_equal(selected_angle(pi, sigmas), 0)
                assert np.isnan(selected_angle(pi, 0.0))
            angles = jnp.linspace(-3.1, 3.1, 9)
            np.testing.assert_allclose(selected_angle(angles, 0.0), angles, rtol=1e-5)
            np.testing.assert_allclose(selected_angle(angles, 1e3), jnp.sin(angles) / 1e6, rtol=1e-5, atol=1e-20)
            assert selected_angle(angles[:, None], sigmas).shape == (9, 4)
    np.testing.assert_allclose(selected_angle(np.array([1, -2]), 0.1), selected_angle(np.array([1.0, -2.0]), 0.1))


@given(angle=st.floats(0.01, 3.1), sigma=st.floats(1e-3, 5))
def test_noise_turns_back(x64: None, angle: float, sigma: float) -> None:
    """Catches an angle that grows with the noise, or is not odd in phi."""
    found = float(selected_angle(angle, sigma))
    assert 0 < found < angle
    assert float(selected_angle(angle, 1.1 * sigma)) < found
    assert float(selected_angle(-angle, sigma)) == -found


def euler(field: fvjax.VelocityField, steps: int) -> np.ndarray:
    """Where Euler's method takes x0 = (1, -2)."""
    x, field = jnp.array([1.0, -2.0]), jax.jit(field)
    for k in range(steps):
        x = x + field(None, k / steps, x) / steps
    return np.asarray(x)


MEETING = GaussianCoupling(*(np.asarray(x, float) for x in ([0, 0], np.eye(2), [5, 5], -np.eye(2))))
"""x1 = 5 - x0, Counter Example 1: all lines meet at t = 1/2."""


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 101])
def test_euler_on_the_ideal_field(x64: None, steps: int) -> None:
    """Catches a field that is wrong where lines meet: odd steps return the pair (factor -1), even ones the mean (0)."""
    factor = -1 if steps % 2 else 0
    np.testing.assert_allclose(
        euler(population_minimiser(MEETING, fvjax.linear()), steps), 5 + factor * np.array([1, -2]), atol=1e-9
    )
    if steps % 2:
        params = gaussian.pair_optimal(AffineMap(-jnp.eye(2), jnp.full(2, 5.0)))
        ideal = euler(lambda _, t, x: gaussian.affine_field(params, t, x), steps)
        np.testing.assert_allclose(ideal, 5 + factor * np.array([1, -2]), atol=1e-9)


@pytest.mark.parametrize("sigma", [0.01, 0.2])
@pytest.mark.parametrize("steps", [1, 10, 11, 101])
def test_euler_on_the_noisy_field(x64: None, steps: int, sigma: float) -> None:
    """Catches a wrong field at 180 degrees: Euler multiplies x - t mu by prod(1 - 2h (1 - 2t) / ((1 - 2t)^2 + s^2))."""
    t = np.arange(steps) / steps
    factor = np.prod(1 - 2 / steps * (1 - 2 * t) / ((1 - 2 * t) ** 2 + sigma**2))
    found = euler(population_minimiser(MEETING, fvjax.constant_noise(sigma)), steps)
    np.testing.assert_allclose(found, 5 + factor * np.array([1, -2]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: selected_angle(1.0, -0.1), "sigma must be >= 0 and finite, got -0.1"),
        (lambda: selected_angle(1.0, np.array([0.1, np.nan])), "sigma must be >= 0 and finite"),
        (lambda: selected_angle(180.0, 0.1), r"angle must be in \[-pi, pi\] radians, got 180"),
        (lambda: selected_angle(np.nan, 0.1), r"angle must be in \[-pi, pi\] radians, got nan"),
        (lambda: selected_angle(np.array([0.0, -3.2]), 0.1), r"angle must be in \[-pi, pi\] radians"),
    ],
)
def test_bad_input_is_refused(call, message: str) -> None:
    """Catches degrees given for radians, and noise without a meaning."""
    with pytest.raises(ValueError, match=message):
        call()
