"""Distances row by row and fitted angles against numpy, closed forms and maps that are known."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from fvjax.metrics import direction_cosine, fitted_rotation, l2_uvp, pair_l2


def block_rotation(angle, dimension):
    """Turns the planes (0, 1), (2, 3), ... counter-clockwise and leaves a last odd coordinate alone."""
    matrix = np.eye(dimension)
    for k in range(0, dimension - 1, 2):
        matrix[k : k + 2, k : k + 2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return matrix


def haar(dimension, seed):
    """A uniformly drawn orthogonal matrix."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((dimension, dimension)))
    return q * np.sign(np.diag(r))


def test_pair_l2_is_mean_and_sample_deviation_of_the_norms(x64):
    """Catches a squared distance, a mean over dimensions, ddof = 0 and an axis left out for images."""
    predicted, target = np.random.default_rng(0).standard_normal((2, 7, 4, 3, 2))
    norms = np.sqrt(((predicted - target) ** 2).sum(axis=(1, 2, 3)))
    result = pair_l2(jnp.asarray(predicted), jnp.asarray(target))
    np.testing.assert_allclose(result.mean, norms.mean(), rtol=1e-12)
    np.testing.assert_allclose(result.standard_deviation, norms.std(ddof=1), rtol=1e-12)
    assert result.count == 7


def test_pair_l2_depends_on_the_pairing():
    """Catches a distance of sets: the same points in another order are far from their pairs."""
    x = jnp.asarray([[0.0, 0.0], [3.0, 4.0]])
    assert pair_l2(x, x) == (0.0, 0.0, 2)
    assert pair_l2(x, x[::-1]) == (5.0, 0.0, 2)


def test_pair_l2_of_one_example_under_jit_and_in_half_precision():
    """Catches a warning or a 0 for the spread of one example, and sums in bfloat16."""
    one = jax.jit(pair_l2)(jnp.ones((1, 2)), jnp.zeros((1, 2)))
    np.testing.assert_allclose(one.mean, np.sqrt(2.0), rtol=1e-6)
    assert np.isnan(one.standard_deviation)
    half = pair_l2(jnp.ones((1000, 1), jnp.bfloat16), jnp.zeros((1000, 1), jnp.bfloat16))
    assert half.mean.dtype == jnp.float32
    assert half == (1.0, 0.0, 1000)


@pytest.mark.parametrize(
    ("predicted", "target", "message"),
    [
        (jnp.ones((3, 2)), jnp.ones((3,)), r"predicted and target must have the same shape, got \(3, 2\) and \(3,\)"),
        (jnp.ones((0, 2)), jnp.ones((0, 2)), "predicted must hold at least one example, got 0"),
        (jnp.ones(()), jnp.ones(()), "predicted must have one common leading axis"),
        (jnp.ones((2, 2), int), jnp.ones((2, 2)), "predicted must be floating point, got int32"),
        (jnp.ones((2, 2)), jnp.ones((2, 2), int), "target must be floating point, got int32"),
    ],
)
def test_pair_l2_refuses(predicted, target, message):
    """Catches broadcasting of a wrong shape, which gives a plausible number, and a mean over nothing."""
    with pytest.raises(ValueError, match=f"^{message}"):
        pair_l2(predicted, target)


@hypothesis.given(
    st.floats(-np.pi, np.pi, exclude_min=True), st.sampled_from([2, 5, 10]), st.booleans(), st.integers(0, 9)
)
def test_rotation_is_found_in_any_basis_and_with_any_shift(x64, angle, dimension, turned, seed):
    """Catches a wrong sign, a plane left out, an inverted basis, uncentred samples and an anisotropic sample."""
    rng = np.random.default_rng(seed)
    x0 = rng.standard_normal((20, dimension)) * rng.uniform(0.2, 3.0, dimension) + rng.uniform(-50, 50, dimension)
    basis = haar(dimension, seed) if turned else None
    rotation = block_rotation(angle, dimension)
    if turned:
        rotation = basis @ rotation @ basis.T
    x1 = x0 @ rotation.T + rng.uniform(-50, 50, dimension)
    found = float(jax.jit(fitted_rotation)(x0, x1, planes_basis=basis))
    assert -np.pi < found <= np.pi
    np.testing.assert_allclose(np.exp(1j * found), np.exp(1j * angle), atol=1e-9)


@pytest.mark.parametrize("dimension", [2, 5, 10])
def test_noise_moves_the_angle_by_its_standard_error(dimension):
    """Catches an estimator that is biased, or worse than least squares: error below 4 sigma / sqrt(n planes 2)."""
    rng = np.random.default_rng(dimension)
    n, sigma, angle = 4000, 0.3, np.deg2rad(150.0)
    x0 = rng.standard_normal((n, dimension))
    x1 = x0 @ block_rotation(angle, dimension).T + 5 + sigma * rng.standard_normal((n, dimension))
    found = jax.jit(fitted_rotation)(jnp.asarray(x0, jnp.float32), jnp.asarray(x1, jnp.float32))
    assert abs(found - angle) < 4 * sigma / np.sqrt(n * (dimension // 2) * 2)


def test_a_stretch_after_the_rotation_does_not_change_the_angle(x64):
    """Catches a fit of the linear map's eigenvalues: M^(1/2) R(phi) of a white sample has the angle phi."""
    rng = np.random.default_rng(1)
    x0 = rng.standard_normal((50, 2))
    x0 -= x0.mean(axis=0)
    x0 = np.linalg.solve(np.linalg.cholesky(x0.T @ x0), x0.T).T
    stretch = np.array([[2.0, 0.6], [0.6, 0.5]])
    x1 = x0 @ (stretch @ block_rotation(2.0, 2)).T
    np.testing.assert_allclose(fitted_rotation(jnp.asarray(x0), jnp.asarray(x1)), 2.0, rtol=1e-12)


def test_sign_convention_and_half_a_turn():
    """Catches clockwise angles and -pi: a quarter turn takes (1, 0) to (0, 1), half a turn is +pi."""
    x0 = jnp.asarray([[1.0, 0.0], [-1.0, 0.0]])
    np.testing.assert_allclose(fitted_rotation(x0, jnp.asarray([[0.0, 1.0], [0.0, -1.0]])), np.pi / 2, rtol=1e-6)
    for zero in (0.0, -0.0):
        assert fitted_rotation(x0, jnp.asarray([[-1.0, zero], [1.0, -zero]])) == np.float32(np.pi)
    assert fitted_rotation(x0, x0) == 0.0


def test_an_undefined_angle_is_nan():
    """Catches a plausible 0 degrees for a map that collapses everything to a point."""
    x0 = jnp.asarray([[1.0, 0.0], [-1.0, 2.0]])
    assert np.isnan(fitted_rotation(x0, jnp.ones((2, 2))))
    assert np.isnan(fitted_rotation(x0[:1], x0[:1]))


@pytest.mark.parametrize(
    ("shapes", "basis", "message"),
    [
        (((4, 2), (4, 3)), None, r"x0 and x1_hat must have the same shape, got \(4, 2\) and \(4, 3\)"),
        (((4, 1), (4, 1)), None, r"x0 must have shape \[n, d\] with n >= 1 and d >= 2, got \(4, 1\)"),
        (((0, 2), (0, 2)), None, r"x0 must have shape \[n, d\] with n >= 1 and d >= 2, got \(0, 2\)"),
        (((4, 2, 2), (4, 2, 2)), None, r"x0 must have shape \[n, d\] with n >= 1 and d >= 2, got \(4, 2, 2\)"),
        (((4, 2), (4, 2)), np.eye(3), r"planes_basis must have shape \(2, 2\), got \(3, 3\)"),
        (((4, 2), (4, 2)), 2 * np.eye(2), "planes_basis must be orthogonal, got"),
    ],
)
def test_fitted_rotation_refuses(shapes, basis, message):
    """Catches images, single coordinates and bases that are no bases, for which an angle has no meaning."""
    with pytest.raises(ValueError, match=f"^{message}"):
        fitted_rotation(jnp.ones(shapes[0]), jnp.ones(shapes[1]), planes_basis=basis)
    with pytest.raises(ValueError, match="^x0 must be floating point, got int32"):
        fitted_rotation(jnp.ones((4, 2), int), jnp.ones((4, 2)))


@hypothesis.given(st.integers(2, 30), st.integers(1, 4), st.integers(0, 99), st.floats(-1e3, 1e3))
def test_l2_uvp_is_the_share_of_the_variance(x64, n, d, seed, offset):
    """Catches a mean over dimensions, a lost 100, ddof = 1, a root, and a variance around 0 instead of the mean."""
    target, error = np.random.default_rng(seed).standard_normal((2, n, d, 2))
    target += offset
    variance = target.reshape(n, -1).var(axis=0).sum()
    expected = 100 * (error**2).sum() / n / variance
    found = l2_uvp(jnp.asarray(target + error), jnp.asarray(target))
    np.testing.assert_allclose(found, expected, rtol=1e-8)
    np.testing.assert_allclose(
        l2_uvp(jnp.asarray(target + error), jnp.asarray(target), variance=2 * variance), expected / 2
    )


def test_l2_uvp_of_the_true_map_of_the_mean_and_of_a_point():
    """Catches a scale on which the two published reference values are not 0 and 100, and a plausible 0 of 0 / 0."""
    target = jax.random.normal(jax.random.key(0), (50, 3)) + 7
    assert l2_uvp(target, target) == 0
    mean = jnp.broadcast_to(target.mean(axis=0), target.shape)
    np.testing.assert_allclose(jax.jit(l2_uvp)(mean, target), 100, rtol=1e-5)
    one = jnp.ones((1, 3))
    assert np.isnan(l2_uvp(one, one))
    assert l2_uvp(one + 1, one) == np.inf
    np.testing.assert_allclose(l2_uvp(one + 1, one, variance=6.0), 50)


@hypothesis.given(st.integers(1, 20), st.integers(1, 4), st.integers(0, 99), st.floats(0.01, 100), st.booleans())
def test_direction_cosine_is_that_of_the_whole_displacement(x64, n, d, seed, scale, backwards):
    """Catches a mean of cosines, directions of the images instead of the displacements, and a lost sign."""
    x0, moved, true = np.random.default_rng(seed).standard_normal((3, n, d))
    cosine = (moved * true).sum() / np.sqrt((moved**2).sum() * (true**2).sum())
    sign = -1 if backwards else 1
    found = jax.jit(direction_cosine)(x0, x0 + sign * scale * moved, x0 + true)
    np.testing.assert_allclose(found, sign * cosine, atol=1e-9)
    np.testing.assert_allclose(direction_cosine(jnp.asarray(x0), x0 + sign * scale * true, x0 + true), sign, rtol=1e-9)


def test_direction_cosine_without_displacement_or_far_out():
    """Catches 0 or 1 for a direction that does not exist, and squares that overflow or vanish in float32."""
    x0, away = jnp.zeros((4, 2)), jnp.ones((4, 2))
    assert np.isnan(direction_cosine(x0, x0, away))
    assert np.isnan(direction_cosine(x0, away, x0))
    assert direction_cosine(x0, 1e30 * away, 1e-30 * away) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: l2_uvp(jnp.ones((3, 2)), jnp.ones((3, 1))), "predicted and target must have the same shape"),
        (lambda: l2_uvp(jnp.ones((0, 2)), jnp.ones((0, 2))), "predicted must hold at least one example, got 0"),
        (lambda: l2_uvp(jnp.ones((3, 2)), jnp.ones((3, 2), int)), "target must be floating point, got int32"),
        (lambda: l2_uvp(jnp.ones((3, 2)), jnp.ones((3, 2)), variance=0.0), "variance must be > 0 and finite, got 0.0"),
        (lambda: l2_uvp(jnp.ones((3, 2)), jnp.ones((3, 2)), variance=jnp.ones(2)), r"variance must have shape \(\)"),
        (lambda: direction_cosine(jnp.ones(3), jnp.ones(2), jnp.ones(3)), "predicted and x0 must have the same shape"),
        (lambda: direction_cosine(jnp.ones(3), jnp.ones(3), jnp.ones(2)), "target and x0 must have the same shape"),
    ],
)
def test_measures_of_the_benchmark_refuse(call, message):
    """Catches broadcasting of a wrong shape, and a variance of each dimension in place of the total."""
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
