"""Times at which I + t Theta is singular: where the variance is infinite, where it is 0, and where it is neither."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fvjax
from fvjax import gaussian
from fvjax.couplings import rotation_matrix
from fvjax.gaussian import AffineMap, GaussianCoupling, affine_field, exact_gradient_moments, exact_gradient_variance

TURN = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
"""Some basis in which nothing is diagonal."""


def in_basis(values: list[float]) -> np.ndarray:
    """A 3 x 3 covariance with the given eigenvalues; float64 also where this module is imported, outside `x64`."""
    return (TURN * np.array(values)) @ TURN.T


def problem(angle: float, cov: np.ndarray) -> tuple[AffineMap, AffineMap, GaussianCoupling]:
    """Parameters of the OT and of the pair-optimal field, and the coupling of the rotated map; angle in degrees."""
    mean, dim = jnp.arange(1.0, len(cov) + 1), len(cov)
    map = gaussian.rotated_map(mean, cov, rotation_matrix(np.deg2rad(angle), dim))
    return gaussian.pair_optimal(gaussian.ot_map(mean, cov)), gaussian.pair_optimal(map), gaussian.map_coupling(map)


def variance(params: AffineMap, coupling: GaussianCoupling, sigma: float) -> float:
    """Total variance with constant noise."""
    return float(exact_gradient_variance(params, coupling, fvjax.constant_noise(sigma)))


def brute_force(params: AffineMap, coupling: GaussianCoupling, sigma: float, edges: np.ndarray) -> float:
    """Constant noise: E|g|^2 - |E g|^2 by 24 nodes on each of the given panels, in numpy and by other formulas."""
    (matrix, theta), (mean0, factor0, mean1, factor1) = jax.tree.map(np.asarray, (params, coupling))
    node, weight = np.polynomial.legendre.leggauss(24)
    width = np.diff(edges)[:, None]
    times = (edges[:-1, None] + width * (node + 1) / 2).ravel()
    weights = (width * weight / 2).ravel() / (edges[-1] - edges[0])
    eye, second, mean = np.eye(len(theta)), 0.0, 0.0
    for t, w in zip(times, weights, strict=True):
        flow = eye + t * matrix
        law = [
            np.concatenate([(1 - t) * factor0 + t * factor1, sigma * eye], 1),
            np.hstack([factor1 - factor0, 0 * eye]),
        ]
        b, mean_b = (np.linalg.solve(flow, x) for x in (law[0], (1 - t) * mean0 + t * (mean1 - theta)))
        a, mean_a = (np.linalg.solve(flow.T, x) for x in (matrix @ b - law[1], matrix @ mean_b - mean1 + mean0 + theta))
        size_a, size_b, cross = np.sum(a**2) + mean_a @ mean_a, np.sum(b**2) + mean_b @ mean_b, a @ b.T
        both = size_a * size_b + 2 * np.sum(cross**2) + 4 * mean_a @ cross @ mean_b
        second += w * 4 * (size_a + both)
        mean += w * 2 * np.hstack([cross + np.outer(mean_a, mean_b), mean_a[:, None]])
    return second - np.sum(mean**2)


PLANE = [np.eye(2), np.diag([0.5, 2.0])]
CRITICAL = np.rad2deg(np.arccos(-2 * np.sqrt(2**-0.5 * 2**0.5) / (2**-0.5 + 2**0.5)))
"""160.53 degrees: cos = -2 sqrt(ab) / (a + b) for the eigenvalues a, b of M^(1/2), those of M being 0.5 and 2."""


@pytest.mark.parametrize("cov", PLANE)
@pytest.mark.parametrize("angle", [0, 30, 60, 90, 120, 150])
def test_proposition_1(x64: None, angle: float, cov: np.ndarray) -> None:
    """Catches variance that is due to crossings or to rounding: without noise the pair-optimal field has none."""
    optimal, pair_optimal, coupling = problem(angle, cov)
    for interpolant in (fvjax.linear(), fvjax.constant_noise(0.0)):
        assert exact_gradient_variance(pair_optimal, coupling, interpolant) < 1e-20
    expected = float(exact_gradient_variance(optimal, coupling, fvjax.linear()))
    assert expected < 1e-20 if angle == 0 else expected > 0.1


@pytest.mark.parametrize(
    ("angle", "cov"),
    [
        (180.0, PLANE[0]),
        (180.0, PLANE[1]),
        (179.999999, PLANE[0]),
        (CRITICAL, PLANE[1]),
        (CRITICAL + 1e-9, PLANE[1]),
        (CRITICAL + 1e-3, PLANE[1]),
        (90.0, in_basis([2.0, 1.0, 0.0])),
        (150.0, in_basis([2.0, 1e-6, 0.0])),
    ],
)
def test_proposition_1_at_singular_times(x64: None, angle: float, cov: np.ndarray) -> None:
    """Catches rounding error that is divided by C^2 next to a pole, single, double (critical angle) or at t = 1.

    The fourth angle gave inf, the third 3.7e-6 and the last nan before the residual was cut at its rounding error.
    """
    _, pair_optimal, coupling = problem(angle, cov)
    assert exact_gradient_variance(pair_optimal, coupling, fvjax.linear()) < 1e-20


@given(block=st.integers(2, 5), eigenvalue=st.floats(-4, 0.5), seed=st.integers(0, 2**16))
def test_proposition_1_for_any_map(x64: None, block: int, eigenvalue: float, seed: int) -> None:
    """Catches a map that is no rotation: a Jordan block in a random basis, singular in (0, 1) below -1."""
    random = np.random.default_rng(seed)
    theta = np.diag(np.full(5, eigenvalue)) + np.diag(np.arange(4) < block - 1, 1)
    basis = np.linalg.qr(random.normal(size=(5, 5)))[0]
    params = AffineMap(jnp.asarray(basis @ theta @ basis.T), jnp.asarray(random.normal(size=5)))
    source = {"source_mean": random.normal(size=5), "source_cov": np.diag(random.uniform(0.1, 2, 5))}
    coupling = gaussian.map_coupling(AffineMap(params.matrix + jnp.eye(5), params.shift), **source)
    assert variance(params, coupling, 0.0) < 1e-20


@pytest.mark.parametrize("sigma", [1e-12, 0.05, 10.0])
@pytest.mark.parametrize(("angle", "cov"), [(180.0, PLANE[0]), (CRITICAL + 1e-3, PLANE[1]), (180.0, PLANE[1])])
def test_noise_at_a_singular_time_is_infinite(x64: None, angle: float, cov: np.ndarray, sigma: float) -> None:
    """Catches a large finite number that depends on the quadrature (2e5, 1e12, 8e6 as its nodes grow)."""
    optimal, pair_optimal, coupling = problem(angle, cov)
    moments = exact_gradient_moments(pair_optimal, coupling, fvjax.constant_noise(sigma))
    assert all(np.all(np.isposinf(m2)) for m2 in moments.m2)
    assert all(np.all(np.isnan(mean)) for mean in moments.mean)
    assert np.isfinite(variance(optimal, coupling, sigma))


def test_variance_below_the_critical_angle(x64: None) -> None:
    """Catches infinity from the wrong matrix, and a pair of complex poles that is not resolved.

    160.5 degrees belongs to M = diag(.5, 2); were these the eigenvalues of M^(1/2), it would be 143.1 degrees.
    """
    assert abs(CRITICAL - 160.53) < 0.005
    for below in (1.0, 0.1):
        _, params, coupling = problem(CRITICAL - below, PLANE[1])
        expected = brute_force(params, coupling, 0.05, np.linspace(0, 1, 401))
        np.testing.assert_allclose(variance(params, coupling, 0.05), expected, rtol=1e-9)
    assert np.isfinite(variance(*problem(143.2, PLANE[1])[1:], 0.05))


@pytest.mark.parametrize(
    ("time_range", "expected"),
    [((0.0, 0.5), "inf"), ((0.5, 1.0), "inf"), ((0.4, 0.6), "inf"), ((0.0, 0.49), "finite"), ((0.6, 1.0), "finite")],
)
def test_time_ranges(x64: None, time_range: tuple[float, float], expected: str) -> None:
    """Catches a pole that counts outside the time range, or is missed at its end."""
    _, params, coupling = problem(180.0, PLANE[0])
    interpolant = fvjax.constant_noise(0.05)._replace(time_range=time_range)
    found = exact_gradient_variance(params, coupling, interpolant)
    if expected == "inf":
        assert np.isposinf(found)
    else:
        np.testing.assert_allclose(found, brute_force(params, coupling, 0.05, np.linspace(*time_range, 81)), rtol=1e-9)


SINGULAR = in_basis([2.0, 1.0, 0.0])
"""A target with a constant coordinate: I + t Theta is singular at t = 1 for every map onto it."""


@pytest.mark.parametrize("angle", [60.0, 90.0, 180.0])
def test_constant_coordinates(x64: None, angle: float) -> None:
    """Catches nan, and infinity where nothing diverges: digits have three constant pixels.

    Without noise the pole of the OT field is removable under every coupling. Another field has one under couplings that
    are not its own: C b = y then asks for a b that misses x0.
    """
    optimal, pair_optimal, coupling = problem(angle, SINGULAR)
    independent = gaussian.independent_coupling(coupling.mean1, SINGULAR)
    edges = np.linspace(0, 1, 9)
    for kind in (coupling, independent):
        np.testing.assert_allclose(variance(optimal, kind, 0.0), brute_force(optimal, kind, 0.0, edges), rtol=1e-9)
    assert np.isposinf(variance(pair_optimal, independent, 0.0))
    for params in (optimal, pair_optimal):
        for kind in (coupling, independent):
            assert np.isposinf(variance(params, kind, 1e-3))


@pytest.mark.parametrize("small", [1e-3, 1e-6, 1e-10])
def test_nearly_constant_beside_constant_coordinates(x64: None, small: float) -> None:
    """Catches a pole just behind t = 1 that is taken for the one at 1: that gave nan and infinity for digits.

    The variance grows like 1 / sqrt(small), the standard deviation of the nearly constant coordinate.
    """
    optimal, _, coupling = problem(60.0, in_basis([2.0, small, 0.0]))
    edges = np.concatenate([1 - 2.0 ** -np.arange(20), [1.0]])
    np.testing.assert_allclose(variance(optimal, coupling, 0.0), brute_force(optimal, coupling, 0.0, edges), rtol=1e-6)


def test_noise_that_vanishes_where_the_matrix_is_singular(x64: None) -> None:
    """Catches sin(pi)^2 = 1e-32 taken for noise at t = 1, where the target's constant coordinate has its pole."""
    cov = np.array([[1.0, 0.5], [0.5, 0.25]])
    optimal, _, _ = problem(60.0, cov)
    coupling = gaussian.independent_coupling(optimal.shift, cov)
    assert np.isfinite(exact_gradient_variance(optimal, coupling, fvjax.smooth_bridge(0.3)))
    assert np.isposinf(exact_gradient_variance(optimal, coupling, fvjax.gaussian_source(0.1)))


def test_brownian_bridge_on_the_whole_interval_is_infinite(x64: None) -> None:
    """Catches a finite number for int sigma^2 d / (4 t) dt; without noise nothing diverges."""
    _, params, coupling = problem(60.0, PLANE[0])
    for sigma in (1e-6, 0.3):
        whole = fvjax.brownian_bridge(sigma, time_range=(0.0, 1.0))
        assert np.isposinf(exact_gradient_variance(params, coupling, whole))
        assert np.isfinite(exact_gradient_variance(params, coupling, fvjax.brownian_bridge(sigma)))
    silent = fvjax.brownian_bridge(0.0, time_range=(0.0, 1.0))
    assert exact_gradient_variance(params, coupling, silent) == 0


def test_noise_that_cannot_be_judged_is_nan(x64: None) -> None:
    """Catches a finite number for gamma = sqrt(t) written by hand: gamma gamma' is 0 * inf without `noise_rate`."""
    _, params, coupling = problem(60.0, PLANE[0])
    bare = fvjax.linear()._replace(gamma=jnp.sqrt)
    assert np.isnan(exact_gradient_variance(params, coupling, bare))


@given(scale=st.integers(-8, 8).map(lambda e: 10.0**e), angle=st.sampled_from([60.0, 180.0]))
def test_verdicts_do_not_depend_on_the_unit_of_length(x64: None, scale: float, angle: float) -> None:
    """Catches an absolute threshold: data in units of 1e-8, with noise to match, is the same problem."""
    optimal, pair_optimal, coupling = problem(angle, SINGULAR)
    independent = gaussian.independent_coupling(coupling.mean1, SINGULAR)
    for params in (optimal, pair_optimal):
        for kind in (coupling, independent):
            for sigma in (0.0, 0.05):
                base = exact_gradient_moments(params, kind, fvjax.constant_noise(sigma)).m2
                larger = params._replace(shift=scale * params.shift), GaussianCoupling(*(scale * x for x in kind))
                m2 = exact_gradient_moments(*larger, fvjax.constant_noise(scale * sigma)).m2
                np.testing.assert_allclose(jnp.sum(m2.shift), scale**2 * jnp.sum(base.shift), rtol=1e-9)
                np.testing.assert_allclose(jnp.sum(m2.matrix), scale**4 * jnp.sum(base.matrix), rtol=1e-9)


def test_lemma_1(x64: None) -> None:
    """Catches a wrong sign or a missing t in the field: on the lines of ANY map it is x1 - x0."""
    random = np.random.default_rng(0)
    map = AffineMap(jnp.asarray(random.normal(size=(3, 3))), jnp.asarray(random.normal(size=3)))
    params = gaussian.pair_optimal(map)
    for t in (0.0, 0.3, 0.7, 1.0):
        x0 = jnp.asarray(random.normal(size=3))
        x1 = map(x0)
        np.testing.assert_allclose(affine_field(params, t, (1 - t) * x0 + t * x1), x1 - x0, atol=1e-10)


def test_singular_field_is_an_error_on_the_host_and_not_finite_under_jit(x64: None) -> None:
    """Catches a velocity of 1e16 that looks like a number."""
    params = AffineMap(-2.0 * jnp.eye(2), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"I \+ t Theta must be invertible, got a singular matrix at t = 0.5"):
        affine_field(params, 0.5, jnp.ones(2))
    assert not np.any(np.isfinite(jax.jit(affine_field)(params, 0.5, jnp.ones(2))))
    np.testing.assert_allclose(affine_field(params, 0.25, jnp.ones(2)), -4.0)


def coupling_of(dim: int) -> GaussianCoupling:
    """The independent coupling of N(0, I) with itself."""
    return gaussian.independent_coupling(jnp.zeros(dim), jnp.eye(dim))


FLAT = AffineMap(np.zeros((2, 2)), np.zeros(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: affine_field(FLAT._replace(matrix=np.ones((2, 3))), 0.0, np.ones(2)),
            "params.matrix must be a square",
        ),
        (lambda: affine_field(FLAT._replace(shift=np.ones(3)), 0.0, np.ones(2)), "params.shift must have shape"),
        (lambda: affine_field(FLAT, 0.0, np.ones(3)), r"x must have shape \(2,\), got \(3,\)"),
        (lambda: gaussian.pair_optimal(AffineMap(np.ones((2, 3)), np.ones(2))), "map.matrix must be a square"),
        (lambda: variance(FLAT, coupling_of(3), 0.1), "coupling must have the dimension of params, 2, got 3"),
        (lambda: variance(FLAT, coupling_of(2), -0.1), "sigma must be >= 0 and finite, got -0.1"),
        (lambda: variance(AffineMap(np.ones(2), np.ones(2)), coupling_of(2), 0.1), "params.matrix must be a square"),
        (
            lambda: exact_gradient_variance(FLAT, coupling_of(2), fvjax.linear()._replace(time_range=(0.5, 0.5))),
            r"interpolant.time_range must be a pair with 0.0 <= start < end <= 1.0, got \(0.5, 0.5\)",
        ),
        (
            lambda: gaussian.variance_profile(FLAT, coupling_of(3), fvjax.linear(), jnp.ones(1)),
            "coupling must have the dimension of params, 2, got 3",
        ),
        (
            lambda: gaussian.quadrature_paths(coupling_of(2), fvjax.linear(), time_nodes=63),
            "time_nodes must be .*even.*, got 63",
        ),
        (
            lambda: gaussian.quadrature_paths(coupling_of(2), fvjax.linear(), space_nodes=0),
            "space_nodes must be an integer >= 1, got 0",
        ),
        (
            lambda: gaussian.quadrature_paths(coupling_of(5), fvjax.linear()),
            r"must be <= 2000000, got 64 \* 3\^15; take draws instead",
        ),
    ],
)
def test_bad_input_is_refused(call, message: str) -> None:
    """Catches shapes that broadcast, negative noise, and a quadrature that would not fit into memory."""
    with pytest.raises(ValueError, match=message):
        call()
