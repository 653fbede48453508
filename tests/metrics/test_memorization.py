"""The memorized fraction against brute force, at duplicates and ties, and its interval against the binomial law."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import cdist

from fvjax.metrics import memorized_fraction

KEY = jax.random.key(0)


def points(seed, n, d=3):
    """Gaussian points, float32."""
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


@hypothesis.given(st.integers(1, 30), st.integers(2, 40), st.integers(1, 9), st.floats(-1e3, 1e3), st.integers(0, 99))
def test_fraction_is_its_definition_however_training_is_cut(n, m, chunk, offset, seed):
    """Catches a third of the square, the wrong neighbour across chunks, a chunk lost, and cancellation far from 0."""
    training = points(seed, m) + np.float32(offset)
    near = training[np.random.default_rng(seed).integers(0, m, n)]
    samples = (near + 0.5 * points(seed + 1, n)).astype(np.float32)
    distances = np.sort(cdist(samples.astype(float), training.astype(float)), axis=1)
    expected = np.mean(distances[:, 0] < distances[:, 1] / 3)
    found = memorized_fraction(samples, training, key=KEY, chunk=chunk)
    assert found.fraction == expected
    assert found.count == n
    assert memorized_fraction(samples[..., None], training[..., None], key=KEY).fraction == expected


def test_copies_are_memorized_and_new_points_are_not():
    """Catches distances of 1e-3 for copies, and a fraction of the training points instead of the samples."""
    training = 1e-4 * points(0, 50) + 100
    found = memorized_fraction(np.concatenate([training[:10], training[:10]]), training, key=KEY, ratio=1e-6)
    assert found == (1.0, 1.0, 1.0, 20)
    middle = (training[0] + training[1])[None] / 2
    assert memorized_fraction(middle, training[:2], key=KEY) == (0.0, 0.0, 0.0, 1)


def test_doubled_training_points_count_once():
    """Catches a copy whose second neighbour is its own twin: it would never be memorized."""
    training = points(0, 20)
    doubled = np.concatenate([training, training, -training * 0.0 + training])
    samples = np.concatenate([training[:3], points(1, 3) + 50])
    assert memorized_fraction(samples, doubled, key=KEY).fraction == 0.5
    signed = np.asarray([[0.0], [-0.0], [9.0]], np.float32)
    assert memorized_fraction(np.ones((1, 1)), signed, key=KEY).fraction == 1.0


def test_ties_and_the_ratio_itself():
    """Catches <= in place of <, and a squared ratio: at 1 and 3 from the two points, ratios 1/3 and just above it."""
    training, sample = np.asarray([[0.0], [4.0]]), np.ones((1, 1))
    assert memorized_fraction(sample, training, key=KEY).fraction == 0.0
    assert memorized_fraction(sample, training, key=KEY, ratio=0.334).fraction == 1.0
    assert memorized_fraction(np.full((1, 1), 2.0), training, key=KEY, ratio=1.0).fraction == 0.0


def test_images_as_bytes():
    """Catches differences of unsigned numbers that wrap around."""
    training = np.asarray([[0], [10], [200]], np.uint8)
    assert memorized_fraction(np.asarray([[9], [100]], np.uint8), training, key=KEY).fraction == 0.5


def test_more_samples_than_are_searched_at_once():
    """Catches blocks of samples whose results land in the wrong rows."""
    training = points(0, 30)
    samples = np.concatenate([np.repeat(training, 40, axis=0), points(1, 900) + 20])
    assert memorized_fraction(samples, training, key=KEY, chunk=7).fraction == 1200 / 2100


def test_interval_is_that_of_the_binomial_law():
    """Catches a one-sided or a 2-sigma interval, resampling of another number, and a level that is ignored."""
    training = np.asarray([[0.0], [10.0]])
    samples = np.repeat([[0.0], [5.0]], [60, 140], axis=0)
    for level in (0.5, 0.95):
        found = memorized_fraction(samples, training, key=KEY, level=level, resamples=20_000)
        expected = stats.binom(200, 0.3).ppf([(1 - level) / 2, (1 + level) / 2]) / 200
        np.testing.assert_allclose([found.low, found.high], expected, atol=1.01 / 200)
    same, other = (memorized_fraction(samples, training, key=jax.random.key(k), resamples=9) for k in (0, 1))
    assert same == memorized_fraction(samples, training, key=KEY, resamples=9)
    assert same != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": np.ones((0, 2))}, r"samples must hold at least one example, got shape \(0, 2\)"),
        ({"training": np.ones((0, 2))}, "training must hold at least one example"),
        ({"samples": np.ones((2, 3))}, r"samples and training must hold examples of one shape, got \(3,\) and \(2,\)"),
        ({"samples": np.full((1, 2), np.nan)}, "samples must be finite, got 2 of 2 entries"),
        ({"samples": np.ones((1, 2), complex)}, "samples must hold real numbers, got complex128"),
        ({"training": np.ones((5, 2))}, "training must hold at least two different points, got 1"),
        ({"ratio": 0.0}, r"ratio must be in \(0, 1\], got 0.0"),
        ({"ratio": 1.5}, r"ratio must be in \(0, 1\], got 1.5"),
        ({"level": 1.0}, r"level must be in \(0, 1\), got 1.0"),
        ({"resamples": 0}, "resamples must be an integer >= 1, got 0"),
        ({"chunk": 0}, "chunk must be an integer >= 1, got 0"),
    ],
)
def test_bad_input_gets_one_clear_error(options, message):
    """Catches a fraction of nothing, and one training point without a second neighbour."""
    arguments = {"samples": np.ones((2, 2)), "training": np.eye(2)} | options
    with pytest.raises(ValueError, match=f"^{message}"):
        memorized_fraction(arguments.pop("samples"), arguments.pop("training"), key=KEY, **arguments)


def test_arrays_of_jax_in_half_precision():
    """Catches a refusal of bfloat16, which numpy does not know as floating point."""
    training = jnp.asarray(np.eye(3), jnp.bfloat16)
    assert memorized_fraction(training[:1], training, key=KEY).fraction == 1.0
