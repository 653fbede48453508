"""Moments of features and the Fréchet distance against numpy, scipy, closed forms and published code."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from fvjax.metrics import FeatureMoments, feature_moments, frechet_distance, merge_feature_moments


def haar(dimension, seed):
    """A uniformly drawn orthogonal matrix."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((dimension, dimension)))
    return q * np.sign(np.diag(r))


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
