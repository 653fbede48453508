"""Distances, fitted angles and moments against numpy, closed forms and rotations that are known."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from fvjax.metrics import (
    FeatureMoments,
    feature_moments,
    fitted_rotation,
    frechet_distance,
    merge_feature_moments,
    pair_l2,
)


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


def moments_of(mean, covariance, count=50):
    """Moments that some `count` examples could have."""
    return FeatureMoments(count, np.asarray(mean, float), np.asarray(covariance, float) * (count - 1))


def random_moments(k, seed, rank=None):
    """Random moments with a covariance of the given rank."""
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((k, k if rank is None else rank))
    return moments_of(rng.standard_normal(k), factor @ factor.T)


@hypothesis.given(st.integers(1, 4), st.lists(st.integers(0, 9), min_size=1, max_size=6), st.floats(-1e4, 1e4))
def test_feature_moments_are_those_of_numpy_however_they_are_cut(k, cuts, offset):
    """Catches a wrong merge, a lost or empty batch, ddof = 0, and the cancellation of uncentred squares."""
    features = [offset + np.random.default_rng(n).standard_normal((n, k)) for n in [2, *cuts]]
    every = np.concatenate(features)
    result = feature_moments(features)
    assert result.count == len(every)
    np.testing.assert_allclose(result.mean, every.mean(axis=0), rtol=1e-12, atol=1e-12)
    expected = np.atleast_2d(np.cov(every, rowvar=False))
    np.testing.assert_allclose(result.covariance(), expected, rtol=1e-9, atol=1e-9)


def test_feature_moments_over_many_merges():
    """Catches examples lost between merges: more than three times what is gathered before one, of float32."""
    features = np.random.default_rng(0).standard_normal((3500, 3)).astype(np.float32)
    result = feature_moments(features[start : start + 100] for start in range(0, 3500, 100))
    assert result.count == 3500
    assert result.scatter.dtype == np.float64
    np.testing.assert_allclose(result.covariance(), np.cov(features.astype(float), rowvar=False), rtol=1e-12)


@hypothesis.given(st.tuples(*[st.integers(0, 5)] * 3), st.integers(1, 3))
def test_merging_is_associative_and_commutative(counts, k):
    """Catches a result that depends on the order in which processes report, and an empty part that changes it."""
    parts = [
        feature_moments([3 + np.random.default_rng([n, i]).standard_normal((n, k))])
        if n
        else FeatureMoments(0, np.zeros(k), np.zeros((k, k)))
        for i, n in enumerate(counts)
    ]
    a, b, c = parts
    left = merge_feature_moments(merge_feature_moments(a, b), c)
    for other in (
        merge_feature_moments(a, merge_feature_moments(b, c)),
        merge_feature_moments(c, merge_feature_moments(b, a)),
    ):
        assert left.count == other.count == sum(counts)
        np.testing.assert_allclose(left.mean, other.mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(left.scatter, other.scatter, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "features must hold at least one example, got 0"),
        ([np.zeros((0, 3))], "features must hold at least one example, got 0"),
        ([np.zeros(3)], r"batch 0 of features must have shape \[n, k\], got \(3,\)"),
        ([np.zeros((2, 3)), np.zeros((2, 4))], r"batch 1 of features must have shape \[n, 3\], got \(2, 4\)"),
        ([np.zeros((2, 1)), np.array([[np.nan]])], "batch 1 of features must be finite, got 1 of 1 entries"),
    ],
)
def test_feature_moments_refuse(batches, message):
    """Catches images in place of features, and one nan that makes a whole evaluation nan without saying where."""
    with pytest.raises(ValueError, match=f"^{message}"):
        feature_moments(batches)


@pytest.mark.parametrize("seed", range(4))
def test_frechet_distance_is_the_formula_with_the_matrix_root(seed):
    """Catches a lost factor 2 or square, against scipy's root of the product, as the first FID code computes it."""
    from scipy import linalg

    a, b = random_moments(7, seed), random_moments(7, seed + 10)
    root = linalg.sqrtm(a.covariance() @ b.covariance())
    shift = a.mean - b.mean
    expected = shift @ shift + np.trace(a.covariance() + b.covariance() - 2 * root.real)
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-6)


@hypothesis.given(st.integers(1, 6), st.integers(0, 100))
def test_frechet_distance_of_commuting_covariances(k, seed):
    """Catches roots of the wrong matrix: with common axes it is |m_a - m_b|^2 + sum (s_a - s_b)^2, zero scales too."""
    rng = np.random.default_rng(seed)
    axes, scales = haar(k, seed), rng.uniform(0, 3, (2, k))
    scales[:, rng.integers(k)] *= rng.integers(0, 2, 2)
    means = rng.standard_normal((2, k))
    a, b = (moments_of(means[i], axes @ np.diag(scales[i] ** 2) @ axes.T) for i in range(2))
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((scales[0] - scales[1]) ** 2)
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-6, atol=1e-10)


@hypothesis.given(st.integers(1, 6), st.integers(0, 4), st.integers(0, 4), st.integers(0, 100))
def test_frechet_distance_is_a_distance(k, rank_a, rank_b, seed):
    """Catches negative or complex values and asymmetry, of singular covariances and covariances of rank 0 too."""
    a, b = random_moments(k, seed, rank_a), random_moments(k, seed + 1, rank_b)
    distance = frechet_distance(a, b)
    assert isinstance(distance, float)
    assert distance >= 0
    np.testing.assert_allclose(frechet_distance(b, a), distance, rtol=1e-9)
    assert 0 <= frechet_distance(a, a) < 1e-12 * (1 + np.trace(a.covariance()))
    axes = haar(k, seed)
    turned = (m._replace(mean=axes @ m.mean, scatter=axes @ m.scatter @ axes.T) for m in (a, b))
    np.testing.assert_allclose(frechet_distance(*turned), distance, rtol=1e-7, atol=1e-10)


def test_frechet_distance_of_fewer_examples_than_features():
    """Catches noise of singular covariances: 10 examples of 40 features, moved by a vector of length 2, are 4 away."""
    features = np.random.default_rng(0).standard_normal((10, 40))
    shift = np.full(40, 2 / np.sqrt(40))
    a, b = feature_moments([features]), feature_moments([features + shift])
    np.testing.assert_allclose(frechet_distance(a, b), 4, rtol=1e-10)


def test_frechet_distance_of_a_line_from_a_ball():
    """Catches rounded zeros that are taken for variances: their roots, 1e-5 here, would add up along 49 axes."""
    direction = haar(50, 0)[0]
    line, ball = moments_of(np.zeros(50), 1e6 * np.outer(direction, direction)), moments_of(np.zeros(50), np.eye(50))
    np.testing.assert_allclose(frechet_distance(line, ball), 1e6 + 50 - 2e3, rtol=1e-12)


def test_frechet_distance_approaches_that_of_the_gaussians():
    """Catches a covariance that is off by a factor: samples of N(0, I) and N(m, 4 I), distance |m|^2 + k."""
    rng = np.random.default_rng(3)
    a = feature_moments([rng.standard_normal((20000, 3))])
    b = feature_moments([[1, 2, 2] + 2 * rng.standard_normal((20000, 3))])
    # By the delta method 2 |m| sqrt(5 / n) of the means dominates: 0.095.
    assert abs(frechet_distance(a, b) - 12) < 4 * 0.1


def test_frechet_distance_is_that_of_torch_fidelity():
    """Catches another ddof or another formula than in the package whose numbers are published."""
    torch = pytest.importorskip("torch")
    published = pytest.importorskip("torch_fidelity.metric_fid", exc_type=(ImportError, RuntimeError))
    rng = np.random.default_rng(5)
    features = [rng.standard_normal((60, 9)) @ rng.standard_normal((9, 9)) for _ in range(2)]
    statistics = [published.fid_features_to_statistics(torch.from_numpy(part)) for part in features]
    expected = published.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    ours = frechet_distance(*(feature_moments([part]) for part in features))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_frechet_distance_refuses():
    """Catches a covariance of one example, features of two networks, and nan that eigh would turn into anything."""
    good = moments_of([0.0, 0.0], np.eye(2))
    with pytest.raises(ValueError, match="^a must hold at least 2 examples, got 1"):
        frechet_distance(good._replace(count=1), good)
    with pytest.raises(ValueError, match=r"^a.mean and b.mean must have the same shape, got \(2,\) and \(3,\)"):
        frechet_distance(good, moments_of(np.zeros(3), np.eye(3)))
    with pytest.raises(ValueError, match="^b.scatter must be finite, got 4 of 4 entries"):
        frechet_distance(good, moments_of([0.0, 0.0], np.full((2, 2), np.inf)))
    with pytest.raises(ValueError, match="^a covariance needs at least 2 examples, got 1"):
        feature_moments([np.zeros((1, 2))]).covariance()
    with pytest.raises(ValueError, match=r"^a.mean and b.mean must have the same shape"):
        merge_feature_moments(good, moments_of(np.zeros(3), np.eye(3)))
