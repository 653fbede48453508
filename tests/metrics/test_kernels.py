"""MMD against brute force and the closed form between Gaussians; its floor against repeated draws."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy.spatial.distance import cdist, pdist

from fvjax.metrics import BANDWIDTH_FACTORS, _kernels, median_bandwidths, mmd_floor, squared_mmd


def draw(seed, n, d=3, *, shift=0.0, scale=1.0, dtype=np.float32):
    """Gaussian points."""
    return (shift + scale * np.random.default_rng(seed).standard_normal((n, d))).astype(dtype)


def brute_force(x, y, widths, biased):
    """The definition, term by term, in float64."""

    def kernel(a, b):
        squares = cdist(a.reshape(len(a), -1).astype(float), b.reshape(len(b), -1).astype(float), "sqeuclidean")
        return np.mean([np.exp(-squares / (2 * s**2)) for s in widths], axis=0)

    def mean(k):
        return k.mean() if biased else (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    return mean(kernel(x, x)) + mean(kernel(y, y)) - 2 * kernel(x, y).mean()


def gaussian_mmd(variance0, variance1, distance, d, s):
    """MMD^2 of N(m0, v0 I), N(m1, v1 I): with q = s^2 + v + v', E k = (s^2 / q)^(d/2) exp(-|m|^2 / (2 q))."""

    def mean(v, m):
        return (s**2 / (s**2 + v)) ** (d / 2) * np.exp(-(m**2) / (2 * (s**2 + v)))

    return mean(2 * variance0, 0) + mean(2 * variance1, 0) - 2 * mean(variance0 + variance1, distance)


@hypothesis.given(
    st.integers(2, 40), st.integers(2, 40), st.integers(1, 3), st.booleans(), st.floats(-1e3, 1e3), st.integers(0, 99)
)
def test_squared_mmd_is_its_definition(n, m, d, biased, offset, seed):
    """Catches a lost factor, a width that is not halved or squared, a diagonal counted or left out, a lost tile."""
    x, y = draw(seed, n, d, shift=offset), draw(seed + 1, m, d, shift=offset + 0.5, scale=2.0)
    widths = (0.5, 2.0)
    found = squared_mmd(x, y, bandwidths=widths, biased=biased)
    assert isinstance(found, float)
    np.testing.assert_allclose(found, brute_force(x, y, widths, biased), atol=2e-6)
    np.testing.assert_allclose(squared_mmd(y, x, bandwidths=widths, biased=biased), found, atol=1e-6)
    images = squared_mmd(x.reshape(n, d, 1, 1), y.reshape(m, d, 1, 1), bandwidths=widths, biased=biased)
    assert images == found


@pytest.mark.parametrize("sizes", [(1500, 1030), (3, 2100)])
def test_more_than_one_tile(sizes):
    """Catches tiles that are counted twice, skipped or padded with points at 0, which are neighbours here."""
    x, y = draw(0, sizes[0], 2), draw(1, sizes[1], 2, shift=0.1)
    for biased in (True, False):
        np.testing.assert_allclose(
            squared_mmd(x, y, biased=biased), brute_force(x, y, median_bandwidths(x, y), biased), atol=1e-7
        )


def test_expectation_is_the_closed_form_between_gaussians():
    """Catches a biased 'unbiased' form: the mean over 400 pairs of small samples, within 4 standard errors."""
    d, s, shift = 2, 1.3, 0.7
    exact = gaussian_mmd(1.0, 4.0, shift * np.sqrt(d), d, s)
    values = {True: [], False: []}
    for seed in range(400):
        x, y = draw([seed, 0], 8, d), draw([seed, 1], 5, d, shift=shift, scale=2.0)
        for biased, found in values.items():
            found.append(squared_mmd(x, y, bandwidths=[s], biased=biased))
    unbiased, biased = (np.asarray(values[key]) for key in (False, True))
    assert abs(unbiased.mean() - exact) < 4 * unbiased.std() / 20
    bias = sum((1 - (s**2 / (s**2 + 2 * v)) ** (d / 2)) / n for v, n in ((1.0, 8), (4.0, 5)))
    assert abs(biased.mean() - exact - bias) < 4 * biased.std() / 20
    assert bias > 10 * biased.std() / 20  # so that the line above means something


def test_large_samples_reach_the_closed_form():
    """Catches sums that lose digits: 4000 points, and an MMD^2 of 2e-3 between kernel means of 0.3."""
    exact = np.mean([gaussian_mmd(1.0, 1.0, 0.2, 3, s) for s in (1.0, 2.0)])
    x, y = draw(0, 4000), draw(1, 4000)
    y[:, 0] += 0.2
    found = squared_mmd(x, y, bandwidths=[1.0, 2.0])
    floor = mmd_floor(jax.random.key(0), x, y, bandwidths=[1.0, 2.0])
    assert floor.mean + 10 * floor.standard_deviation < found
    # The standard deviation off the null is that of 4 (h(x) - h(y)) / sqrt(n), below 4 sqrt(MMD^2 / n) for k <= 1.
    assert abs(found - exact) < 4 * np.sqrt(exact / 4000)


@hypothesis.given(st.integers(2, 30), st.integers(1, 4), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_a_sample_and_itself(n, d, scale, seed):
    """Catches rounding in place of the 0 of identical samples, a wrong unbiased form, and effects of order."""
    x = draw(seed, n, d, scale=scale)
    assert squared_mmd(x, x, biased=True) == 0
    widths = median_bandwidths(x, x)
    np.testing.assert_allclose(widths, np.median(pdist(x.astype(float))) * np.asarray(BANDWIDTH_FACTORS), rtol=1e-4)
    kernel = np.mean([np.exp(-(pdist(x.astype(float)) ** 2) / (2 * s**2)) for s in widths])
    np.testing.assert_allclose(squared_mmd(x, x), -2 * (1 - kernel) / n, rtol=1e-4)
    shuffled = np.random.default_rng(seed).permutation(x)
    assert squared_mmd(x, shuffled, biased=True) < 1e-6


def test_far_from_zero_and_with_clusters_far_apart():
    """Catches |x|^2 + |y|^2 - 2 x.y in float32: offsets of 3e3, and clusters 2e3 apart with widths of 1."""
    x, y = draw(0, 60, shift=3e3), draw(1, 50, shift=3e3)
    np.testing.assert_allclose(squared_mmd(x, y), brute_force(x, y, median_bandwidths(x, y), False), atol=1e-6)
    x[:30] -= 2e3
    y[:20] -= 2e3
    np.testing.assert_allclose(squared_mmd(x, y, bandwidths=[1.0]), brute_force(x, y, [1.0], False), atol=1e-6)
    twice = np.concatenate([x, x])
    assert squared_mmd(twice, twice, bandwidths=[1e-3]) == pytest.approx(2 / (len(twice) - 1) - 2 * 2 / len(twice))


def test_median_bandwidths_are_those_of_all_pairs():
    """Catches the median of squares or of one sample, the diagonal, copies that count, and a biased choice of rows."""
    x, y = draw(0, 40), draw(1, 30, shift=2.0)
    every = pdist(np.concatenate([x, y]).astype(float))
    np.testing.assert_allclose(
        median_bandwidths(x, y, factors=[1.0, 3.0]), np.median(every) * np.array([1, 3]), rtol=1e-9
    )
    copies = np.concatenate([x] * 3)
    np.testing.assert_allclose(median_bandwidths(copies, copies), median_bandwidths(x, x), rtol=1e-9)
    many = np.sort(draw(2, 3500, 1), axis=0)  # in order, as data by class are
    np.testing.assert_allclose(median_bandwidths(many, many)[2], np.median(pdist(many.astype(float))), rtol=0.02)


def test_half_precision_and_float64(x64):
    """Catches sums in bfloat16, and float64 samples that are rounded to float32."""
    x, y = draw(0, 50, dtype=np.float64), draw(1, 40, dtype=np.float64, shift=1.0)
    np.testing.assert_allclose(squared_mmd(x, y, bandwidths=[1.0]), brute_force(x, y, [1.0], False), atol=1e-13)
    half = [jnp.asarray(part, jnp.bfloat16) for part in (x, y)]
    exact = brute_force(*(np.asarray(part, np.float64) for part in half), [1.0], False)
    np.testing.assert_allclose(squared_mmd(*half, bandwidths=[1.0]), exact, atol=1e-6)


@pytest.mark.parametrize("biased", [False, True])
def test_floor_is_squared_mmd_of_the_divisions(biased):
    """Catches weights that are mixed up in the shared pass: each value is that of the two parts, computed alone."""
    x, y, key = draw(0, 30), draw(1, 21, shift=3.0), jax.random.key(4)
    widths = median_bandwidths(x, y)
    floor = mmd_floor(key, x, y, repeats=3, biased=biased)
    pooled = np.concatenate([x, y])
    for value, repeat_key in zip(floor.values, jax.random.split(key, 3), strict=True):
        order = np.asarray(jax.random.permutation(repeat_key, 51))
        expected = squared_mmd(pooled[order[:30]], pooled[order[30:]], bandwidths=widths, biased=biased)
        np.testing.assert_allclose(value, expected, atol=1e-6)
    np.testing.assert_allclose(floor.mean, floor.values.mean())
    np.testing.assert_allclose(floor.standard_deviation, floor.values.std(ddof=1))
    assert len(set(floor.values)) == 3


def test_floor_is_what_new_samples_of_one_law_give():
    """Catches a floor that is too low or too high: halves of one sample against 60 pairs of new samples of the size."""
    halves = mmd_floor(jax.random.key(0), draw(0, 81), repeats=60, bandwidths=[1.5])
    new = np.asarray([squared_mmd(draw([i, 1], 40), draw([i, 2], 41), bandwidths=[1.5]) for i in range(60)])
    assert abs(halves.mean - new.mean()) < 4 * np.hypot(halves.standard_deviation, new.std()) / np.sqrt(60)
    assert 0.5 < halves.standard_deviation / new.std() < 2


def test_no_matrix_of_all_kernel_values(monkeypatch):
    """Catches n^2 memory: no tile has more than the tile's rows and columns, and all of them have one shape."""
    shapes = set()
    tile = _kernels._tile

    def spy(x, y, *rest, **options):
        shapes.add((x.shape[0], y.shape[0]))
        return tile(x, y, *rest, **options)

    monkeypatch.setattr(_kernels, "_tile", spy)
    squared_mmd(draw(0, 2500, 2), draw(1, 1100, 2))
    assert shapes == {(1024, 1024)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: squared_mmd(draw(0, 1), draw(0, 3)), r"x must hold at least 2 example\(s\), got shape \(1, 3\)"),
        (lambda: squared_mmd(draw(0, 3), draw(0, 0), biased=True), r"y must hold at least 1 example\(s\)"),
        (lambda: squared_mmd(draw(0, 3, 2), draw(0, 3, 3)), r"x and y must hold examples of one shape, got \(2,\) and"),
        (lambda: squared_mmd(np.ones((3, 1), int), draw(0, 3, 1)), "x must be floating point, got int"),
        (lambda: squared_mmd(draw(0, 3), draw(0, 3) * np.nan), "y must be finite, got 9 of 9 entries"),
        (lambda: squared_mmd(np.ones((3, 1)), np.ones((2, 1))), "x and y must hold at least two different points"),
        (lambda: squared_mmd(draw(0, 3), draw(1, 3), bandwidths=[1.0, 0.0]), "bandwidths must be > 0"),
        (lambda: squared_mmd(draw(0, 3), draw(1, 3), bandwidths=[]), r"bandwidths must have shape \[B\] with B >= 1"),
        (lambda: squared_mmd(draw(0, 3), draw(1, 3), bandwidths=1.0), r"bandwidths must have shape \[B\]"),
        (lambda: median_bandwidths(draw(0, 3), draw(1, 3), factors=[-1.0]), "factors must be > 0"),
        (lambda: mmd_floor(jax.random.key(0), draw(0, 3)), r"x must hold at least 4 example\(s\), got shape \(3, 3\)"),
        (lambda: mmd_floor(jax.random.key(0), draw(0, 9), repeats=1), "repeats must be >= 2, got 1"),
        (lambda: mmd_floor(jax.random.key(0), draw(0, 9), repeats=2.5), "repeats must be an integer >= 1, got 2.5"),
    ],
)
def test_bad_input_gets_one_clear_error(call, message):
    """Catches a division by zero examples or a width of 0, which give nan, and broadcasting of another shape."""
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_one_example_each_in_the_biased_form():
    """Catches a refusal, or nan: |k(x, .) - k(y, .)|^2 = 2 - 2 k(x, y)."""
    found = squared_mmd(np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32), bandwidths=[1.0], biased=True)
    np.testing.assert_allclose(found, 2 - 2 * np.exp(-1), rtol=1e-6)
