"""The exact gradient variance: closed form = quadrature = Monte Carlo, golden values, and how it transforms."""

import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fvjax
from fvjax import gaussian
from fvjax.couplings import rotation_matrix
from fvjax.gaussian import AffineMap, GaussianCoupling, exact_gradient_moments, exact_gradient_variance
from fvjax.gradients import elementwise_variance

INTERPOLANTS: dict[str, Callable[[], fvjax.Interpolant]] = {
    "linear": fvjax.linear,
    "constant_noise": lambda: fvjax.constant_noise(0.3),
    "brownian_bridge": lambda: fvjax.brownian_bridge(0.3, time_range=(0.05, 0.95)),
    "smooth_bridge": lambda: fvjax.smooth_bridge(0.3),
    "trigonometric": fvjax.trigonometric,
    "gaussian_source": lambda: fvjax.gaussian_source(0.1),
}
LOSS = fvjax.squared_error(gaussian.affine_field)
quadrature = jax.jit(
    lambda params, paths, weights: fvjax.gradient_moments(LOSS, params, paths, elementwise=True, weights=weights)
)


def anisotropic(dim: int) -> np.ndarray:
    """A covariance with eigenvalues from 0.5 to 2 in a basis that is not the coordinates'."""
    basis = np.linalg.qr(np.random.default_rng(7).normal(size=(dim, dim)))[0]
    return (basis * np.linspace(0.5, 2, dim)) @ basis.T


def rotated(angle: float, dim: int = 2, cov: np.ndarray | None = None) -> tuple[AffineMap, AffineMap, GaussianCoupling]:
    """Parameters of the OT and of the pair-optimal field, and the coupling of the rotated map; angle in degrees."""
    mean, cov = jnp.full(dim, 0.5), jnp.eye(dim) if cov is None else jnp.asarray(cov)
    map = gaussian.rotated_map(mean, cov, rotation_matrix(np.deg2rad(angle), dim))
    optimal = gaussian.pair_optimal(gaussian.ot_map(mean, cov))
    return optimal, gaussian.pair_optimal(map), gaussian.map_coupling(map)


def couplings(cov: np.ndarray) -> dict[str, GaussianCoupling]:
    """One of each kind, with factors of one shape, so that nothing compiles again; the source is not centred."""
    dim = len(cov)
    map = gaussian.rotated_map(jnp.full(dim, 0.5), jnp.asarray(cov), rotation_matrix(2.0, dim))
    source = {"source_mean": jnp.full(dim, -0.2)}
    return {
        "map": gaussian.gaussian_coupling(map.shift, cov, map.matrix, **source),
        "independent": gaussian.independent_coupling(map.shift, cov, **source),
        "general": gaussian.gaussian_coupling(map.shift, cov, 0.6 * map.matrix, **source),
    }


def leaves(tree: AffineMap) -> np.ndarray:
    """All coordinates in one vector."""
    return np.concatenate([np.ravel(leaf) for leaf in tree])


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_closed_form_is_the_quadrature(x64: None, name: str) -> None:
    """Catches an error in any term of Isserlis' formula: means and variances of all coordinates, by differentiation.

    Map, independent and general couplings, I and an anisotropic covariance, OT and pair-optimal parameters.
    """
    interpolant = INTERPOLANTS[name]()
    for cov in (np.eye(2), anisotropic(2)):
        for coupling in couplings(cov).values():
            paths, weights = gaussian.quadrature_paths(coupling, interpolant, time_nodes=48)
            for params in rotated(np.rad2deg(2.0), cov=cov)[:2]:
                exact, nodes = exact_gradient_moments(params, coupling, interpolant), quadrature(params, paths, weights)
                total = float(fvjax.total_variance(exact))
                np.testing.assert_allclose(fvjax.total_variance(nodes), total, rtol=1e-9, atol=1e-20)
                by_coordinate = leaves(elementwise_variance(nodes))
                np.testing.assert_allclose(leaves(elementwise_variance(exact)), by_coordinate, rtol=1e-9, atol=1e-20)
                np.testing.assert_allclose(leaves(exact.mean), leaves(nodes.mean), rtol=1e-9, atol=1e-10 * total**0.5)


@pytest.mark.parametrize(("dim", "draws"), [(2, 4000), (10, 1000), (50, 100)])
def test_closed_form_is_what_draws_show(x64: None, dim: int, draws: int) -> None:
    """Catches what closed form and quadrature share: the law of the pairs, of the noise and of the time.

    The standard error comes from 40 independent estimates, so the deviation follows Student's t with 39 degrees of
    freedom, and |t| > 3 has probability 0.47%: one of the 12 comparisons would fail for 6% of the seeds.
    """
    cov, interpolant, repeats = anisotropic(dim), fvjax.constant_noise(0.2), 40
    optimal, pair_optimal, _ = rotated(np.rad2deg(2.0), dim, cov)
    cases = [(p, c) for p in (optimal, pair_optimal) for c in couplings(cov).values()]
    cases = cases if dim == 2 else [cases[0], cases[2], cases[3]]

    @jax.jit
    def estimate(key: jax.Array, params: AffineMap, coupling: GaussianCoupling) -> jax.Array:
        def once(key: jax.Array) -> jax.Array:
            pair_key, path_key = jax.random.split(key)
            paths = fvjax.draw_paths(path_key, gaussian.draw_pairs(pair_key, coupling, draws), interpolant)
            return fvjax.total_variance(fvjax.gradient_moments(LOSS, params, paths), ddof=1)

        return jax.lax.map(once, jax.random.split(key, repeats))

    for key, (params, coupling) in zip(jax.random.split(jax.random.key(0), len(cases)), cases, strict=True):
        estimates = np.asarray(estimate(key, params, coupling))
        error = estimates.std(ddof=1) / np.sqrt(repeats)
        assert error < 0.05 * estimates.mean()
        assert abs(estimates.mean() - exact_gradient_variance(params, coupling, interpolant)) < 3 * error


GOLDEN = [  # degrees, OT, pair-optimal: d = 2, sigma = 0.05
    (30, "8.35", "0.018"),
    (90, "50.7", "0.31"),
    (120, "66.1", "1.24"),
    (150, "73.1", "10.8"),
    (170, "74.7", "375"),
    (179, "74.8", "9.6e6"),
]


@pytest.mark.parametrize(("angle", "optimal", "pair_optimal"), GOLDEN)
def test_golden_values(x64: None, angle: float, optimal: str, pair_optimal: str) -> None:
    """Catches a change of convention (factor 2, sum over dimensions, trace) that all comparisons above would share."""
    *params, coupling = rotated(angle)
    for value, text in zip(params, (optimal, pair_optimal), strict=True):
        digits = len(text.split("e")[0].replace(".", "").lstrip("0"))
        variance = float(exact_gradient_variance(value, coupling, fvjax.constant_noise(0.05)))
        assert f"{variance:.{digits}g}" == f"{float(text):.{digits}g}"


def formulas(angle: float, sigma: float, dim: int) -> tuple[float, float]:
    """Total variance of the OT and of the pair-optimal field for N(0, I), all planes rotated: docs/theory.md, 4."""
    s, c, phi = np.sin(np.deg2rad(angle) / 2), np.cos(np.deg2rad(angle) / 2), np.deg2rad(angle)
    second = (s / (2 * c**2) + phi / (4 * c**3)) / s
    third = 1 / (4 * c**2) + 3 * second / (4 * c**2)
    optimal = 16 * s**2 * dim * (1 + (dim + 2) * (c**2 + s**2 / 3) + dim * sigma**2 - c**2)
    bracket = (1 + dim) * second + (dim + 2) * sigma**2 * third - sigma**2 * c**2 * second**2
    return optimal, 16 * s**2 * dim * sigma**2 * bracket


@pytest.mark.parametrize("angle", [1, 60, 120, 170, 179, 179.9, 179.99])
@pytest.mark.parametrize(("dim", "sigma"), [(2, 0.05), (2, 2.0), (10, 0.3)])
def test_arctangent_formula_for_equal_planes(x64: None, angle: float, dim: int, sigma: float) -> None:
    """Catches quadrature that loses a pole: the integrals over t in elementary functions, up to 1e-4 from the pole."""
    *params, coupling = rotated(angle, dim)
    found = [float(exact_gradient_variance(p, coupling, fvjax.constant_noise(sigma))) for p in params]
    np.testing.assert_allclose(found, formulas(angle, sigma, dim), rtol=1e-11)


@pytest.mark.parametrize(
    ("dim", "crossings"),
    [
        (2, {0.01: 174.6, 0.05: 163.8, 0.1: 153.8, 0.2: 137.4, 0.5: 97.4}),
        (10, {0.01: 173.6, 0.05: 161.0, 0.1: 149.7, 0.2: 132.1, 0.5: 92.3}),
    ],
)
def test_figure_4_holds_above_an_angle_only(x64: None, dim: int, crossings: dict[float, float]) -> None:
    """Catches a wrong order of the two fields: the angle at which OT becomes the quieter one, to 0.1 degree."""

    def pair_optimal_is_quieter(angle: float, sigma: float) -> bool:
        optimal, pair_optimal, coupling = rotated(angle, dim)
        interpolant = fvjax.constant_noise(sigma)
        return bool(
            exact_gradient_variance(pair_optimal, coupling, interpolant)
            < exact_gradient_variance(optimal, coupling, interpolant)
        )

    for sigma, expected in crossings.items():
        low, high = 60.0, 179.0
        while high - low > 0.02:
            middle = (low + high) / 2
            low, high = (middle, high) if pair_optimal_is_quieter(middle, sigma) else (low, middle)
        assert abs(low - expected) < 0.1


@given(seed=st.integers(0, 2**16), scale=st.floats(-3, 3).map(lambda e: 10.0**e))
def test_symmetries(x64: None, seed: int, scale: float) -> None:
    """Catches a coordinate, an origin or a unit of length that is built in.

    An orthogonal change of coordinates and a shift of the target leave the variance as it is; a change of units by s
    multiplies the part of theta by s^2 and the part of Theta by s^4. The variance itself is >= 0 in every coordinate.
    """
    random = np.random.default_rng(seed)
    params = AffineMap(*(jnp.asarray(random.normal(scale=0.4, size=s)) for s in ((2, 2), 2)))
    coupling = GaussianCoupling(*(jnp.asarray(random.normal(size=s)) for s in (2, (2, 4), 2, (2, 4))))
    base = exact_gradient_moments(params, coupling, fvjax.constant_noise(0.3))
    assert min(float(jnp.min(m2)) for m2 in base.m2) >= 0

    q = jnp.asarray(np.linalg.qr(random.normal(size=(2, 2)))[0])
    turned = AffineMap(q @ params.matrix @ q.T, q @ params.shift), GaussianCoupling(*(q @ x for x in coupling))
    total = fvjax.total_variance(base)
    variance = exact_gradient_variance(*turned, fvjax.constant_noise(0.3))
    np.testing.assert_allclose(variance, total, rtol=1e-9)

    shift = jnp.asarray(random.normal(size=2))
    shifted = params._replace(shift=params.shift + shift), coupling._replace(mean1=coupling.mean1 + shift)
    np.testing.assert_allclose(exact_gradient_variance(*shifted, fvjax.constant_noise(0.3)), total, rtol=1e-9)

    larger = params._replace(shift=scale * params.shift), GaussianCoupling(*(scale * x for x in coupling))
    moments = exact_gradient_moments(*larger, fvjax.constant_noise(0.3 * scale))
    np.testing.assert_allclose(moments.m2.shift, scale**2 * base.m2.shift, rtol=1e-9)
    np.testing.assert_allclose(moments.m2.matrix, scale**4 * base.m2.matrix, rtol=1e-9)


def test_profile_integrates_to_the_total(x64: None) -> None:
    """Catches a profile that is not the integrand, and the variance between times forgotten in the total.

    A plain rule with 400 nodes, so it also checks the panels at the ends of the Brownian bridge's time range.
    """
    interpolant = fvjax.brownian_bridge(0.3)
    _, params, coupling = rotated(130.0, cov=anisotropic(2))
    start, end = interpolant.time_range
    node, weight = np.polynomial.legendre.leggauss(400)
    t = jnp.asarray(start + (end - start) * (node + 1) / 2).reshape(20, 20)
    variance, second_moment = gaussian.variance_profile(params, coupling, interpolant, t)
    assert variance.shape == second_moment.shape == (20, 20)
    moments = exact_gradient_moments(params, coupling, interpolant)
    mean_square = sum(float(jnp.sum(m**2)) for m in moments.mean)
    integral = np.sum(weight / 2 * np.ravel(second_moment)) - mean_square
    np.testing.assert_allclose(integral, fvjax.total_variance(moments), rtol=1e-9)
    assert np.all(variance < second_moment)
    one = gaussian.variance_profile(params, coupling, interpolant, t[3, 4])
    np.testing.assert_allclose(one.variance, variance[3, 4], rtol=1e-12)


def variance_along(problem: tuple, sigma: jax.Array, step: jax.Array) -> jax.Array:
    """Where parameters and the scale of the source have gone a step in given directions."""
    params, coupling, direction, growth = problem
    params = jax.tree.map(lambda x, d: x + step * d, params, direction)
    coupling = coupling._replace(factor0=(1 + step * growth) * coupling.factor0)
    return exact_gradient_variance(params, coupling, fvjax.constant_noise(sigma))


def test_jit_vmap_and_grad(x64: None) -> None:
    """Catches a derivative that is lost in the panels' positions, and panels of one example used for another.

    The last problem has a pole at t = 1 that is removable (constant coordinate, no noise): `vmap` also computes the
    unused panels, and a node there would make 0 * inf = nan. The last but one is infinite.
    """
    direction = AffineMap(jnp.array([[0.3, -1.2], [0.7, 0.4]]), jnp.array([1.1, -0.6]))
    still = jax.tree.map(jnp.zeros_like, direction)
    constant, _, coupling = rotated(60.0, cov=np.array([[1.0, 0.5], [0.5, 0.25]]))
    problems = [(*rotated(angle, cov=anisotropic(2))[1:], direction, 0.5) for angle in (30.0, 120.0, 150.0, 175.0)]
    problems.append((constant, coupling, still, 1.0))
    sigmas = jnp.array([0.05, 0.2, 0.05, 0.3, 0.0])
    stacked = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *problems)

    both = jax.jit(jax.vmap(jax.value_and_grad(variance_along, argnums=(1, 2))))
    values, (by_sigma, by_step) = both(stacked, sigmas, jnp.zeros(5))
    expected = [variance_along(p, s, 0.0) for p, s in zip(problems, sigmas, strict=True)]
    np.testing.assert_allclose(values, expected, rtol=1e-11)
    assert list(np.isinf(values)) == [False, False, False, True, False]
    h = 1e-6
    for i in (0, 1, 2, 4):
        difference = variance_along(problems[i], sigmas[i], h) - variance_along(problems[i], sigmas[i], -h)
        np.testing.assert_allclose(by_step[i], difference / (2 * h), rtol=1e-6)
    for i in (0, 1, 2):
        up, down = (variance_along(problems[i], sigmas[i] + s, 0.0) for s in (h, -h))
        np.testing.assert_allclose(by_sigma[i], (up - down) / (2 * h), rtol=1e-6)


def test_other_values_do_not_compile_again(x64: None, caplog: pytest.LogCaptureFixture) -> None:
    """Catches sigma or an angle that became static: a phase diagram would compile for every pixel."""
    *_, params, coupling = rotated(100.0)
    exact_gradient_variance(params, coupling, fvjax.constant_noise(0.1)).block_until_ready()
    problems = [(rotated(angle)[1:], sigma) for angle, sigma in [(120.0, 0.2), (170.0, 0.0)]]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for (params, coupling), sigma in problems:
            exact_gradient_variance(params, coupling, fvjax.constant_noise(sigma)).block_until_ready()
    assert not [record.getMessage() for record in caplog.records if "ompiling" in record.getMessage()]


@pytest.mark.parametrize("angle", [0.0, 60.0, 120.0, 170.0])
def test_single_precision(angle: float) -> None:
    """Catches cancellation that float64 hides: float32 agrees with it to 1e-4, zero variance included."""
    values = {}
    for precise in (False, True):
        with jax.enable_x64(precise):
            optimal, pair_optimal, coupling = rotated(angle)
            found = [exact_gradient_variance(p, coupling, fvjax.constant_noise(0.05)) for p in (optimal, pair_optimal)]
            assert {x.dtype for x in found} == {jnp.dtype(float if precise else np.float32)}
            values[precise] = [float(x) for x in found]
    np.testing.assert_allclose(values[False], values[True], rtol=1e-4)


def test_plain_functions_make_an_interpolant(x64: None) -> None:
    """Catches coefficients that have to come from the factories."""
    own = fvjax.Interpolant(lambda t: 1 - t, lambda t: t, lambda t: 0.3 * jnp.ones_like(t))
    _, params, coupling = rotated(100.0, cov=anisotropic(2))
    expected = exact_gradient_variance(params, coupling, fvjax.constant_noise(0.3))
    np.testing.assert_allclose(exact_gradient_variance(params, coupling, own), expected, rtol=1e-14)
