r"""Maximum mean discrepancy between two samples, and the value that two samples of one law have.

The kernel is a mean of Gaussians of several widths, so that no single one has to be right:

    k(x, y) = (1 / B) sum_b exp(-|x - y|^2 / (2 s_b^2)),   s_b = (1/4, 1/2, 1, 2, 4) times the median distance,

with k(x, x) = 1. It is summed in tiles: n x m kernel values never exist at once. Tiles are computed in the dtype of the
samples (at least float32), their row sums are added up in float64 on the host.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax.types import Array, Key

Points = Array | np.ndarray

BANDWIDTH_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Widths of the kernel in units of the median distance."""

_MEDIAN_POINTS = 1000  # of each sample: half a percent of error in the median, by 10^6 pairs in place of 10^8
_TILE = 1024  # rows and columns of kernel values at once: 4 MB in float32
_ROUNDING = 1e-4  # of an exponent, above which squared distances are taken from differences, entry by entry


class MmdFloor(NamedTuple):
    """What `squared_mmd` gives for two samples of one law.

    Attributes:
        mean: over the repeats; 0 up to its standard error for the unbiased form.
        standard_deviation: over the repeats, ddof = 1.
        values: float64 [repeats]; the share of them that reaches a measured value is its permutation p-value.
    """

    mean: float
    standard_deviation: float
    values: np.ndarray


def median_bandwidths(x: Points, y: Points, *, factors: Sequence[float] = BANDWIDTH_FACTORS) -> np.ndarray:
    r"""Widths of the Gaussian kernels: `factors` times the median Euclidean distance within the pooled sample.

    The median is over all pairs of different points of x and y together (pairs at distance 0 are left out, so that a
    sample compared with itself has the widths of the sample). Of more than 1000 rows of x or y, 1000 evenly spaced ones
    are used: the widths are a choice of scale, and deterministic.

    Args:
        x: [n, *dims], floating point.
        y: [m, *dims].
        factors: > 0.

    Returns:
        float64 [len(factors)], in units of x.

    Raises:
        ValueError: if the shapes do not fit, a sample is empty or not finite, a factor is not > 0, or all points are
            equal.
    """
    first, second, _ = _checked(x, y)
    _validate.positive("factors", np.asarray(factors, np.float64))
    parts = [part[_spread(len(part))].astype(np.float64) for part in (first, second)]
    pooled = np.concatenate(parts)
    pooled -= pooled.mean(axis=0)
    squares = np.sum(pooled**2, axis=1)
    distances = squares[:, None] + squares - 2 * pooled @ pooled.T
    distances = distances[np.triu_indices(len(pooled), 1)]
    # What is left of |x|^2 + |y|^2 - 2 x.y for x = y is rounding.
    positive = distances[distances > 1e-13 * pooled.shape[1] ** 0.5 * max(float(squares.max()), 0.0)]
    if not positive.size:
        raise ValueError("x and y must hold at least two different points (or bandwidths be given), got one")
    return np.asarray(factors, np.float64) * np.median(np.sqrt(positive))


def squared_mmd(x: Points, y: Points, *, bandwidths: Sequence[float] | None = None, biased: bool = False) -> float:
    r"""Squared maximum mean discrepancy between the laws of two samples.

        biased     sum_ij k(x_i, x_j) / n^2 + sum_ij k(y_i, y_j) / m^2 - 2 sum_ij k(x_i, y_j) / (n m)
        unbiased   the same without the terms i = j of the first two sums, over n (n - 1) and m (m - 1)

    with k(x, y) = mean_b exp(-|x - y|^2 / (2 s_b^2)), so that both are at most 2. The expectation of the unbiased form
    is MMD^2(P, Q), which is 0 if and only if P = Q; its own value may be negative. That of the biased form is too large
    by (1 - E k(x, x')) / n + (1 - E k(y, y')) / m. Compare values of equal n, m and `bandwidths` only, beside their
    `mmd_floor`.

    =========================  =========================================================================================
    x = y, row by row          biased 0 exactly; unbiased -2 (1 - mean of k over pairs i != j) / n
    rows in another order      the same value up to rounding (about 1e-9): it compares sets
    duplicates in x            counted as often as they occur, k = 1 between them
    samples far from 0         centred first, in one shift for both
    widths far below the size  |x|^2 + |y|^2 - 2 x.y would round by more than 1e-4 of an exponent: distances then come
                               from differences instead, exact and slower
    =========================  =========================================================================================

    Time: three matrix products n x d x m. Memory beyond the samples: a few tiles of 1024 x 1024, whatever n and m.

    Args:
        x: [n, *dims], floating point.
        y: [m, *dims].
        bandwidths: widths s_b > 0 in units of x; None means `median_bandwidths(x, y)`. Give them where values are to be
            compared with each other.
        biased: which form.

    Returns:
        MMD^2, without a root.

    Raises:
        ValueError: if the shapes do not fit, a sample is not finite or has fewer than 2 examples (1 for the biased
            form), or a width is not > 0.

    Source: Gretton et al. 2012, eq. 3 (unbiased) and 5 (biased).
    """
    first, second, dtype = _checked(x, y, least=1 if biased else 2)
    widths = _widths(first, second, bandwidths)
    first, second = _centred(first, second, dtype)
    within_x, within_y, between = (
        float(_weighted_sums(*pair, widths, np.ones((len(pair[1]), 1))).sum())
        for pair in ((first, first), (second, second), (first, second))
    )
    return _estimate(within_x, within_y, between, n=len(first), m=len(second), biased=biased)


def mmd_floor(
    key: Key,
    x: Points,
    y: Points | None = None,
    *,
    repeats: int = 20,
    bandwidths: Sequence[float] | None = None,
    biased: bool = False,
) -> MmdFloor:
    r"""`squared_mmd` between two samples of one law: what stands beside a measured value.

    ===========  =======================================================================================================
    y given      x and y are pooled and divided at random into samples of n and m again: the law of `squared_mmd(x, y)`
                 if both had one law, with the same sizes and widths (a permutation test)
    y = None     x is divided at random into halves, of n // 2 and n - n // 2
    ===========  =======================================================================================================

    All repeats share one pass over the kernel: it costs (n + m)^2 kernel values, not `repeats` times as many.

    Args:
        key: of the divisions.
        x: [n, *dims], floating point.
        y: [m, *dims] or None.
        repeats: random divisions, >= 2.
        bandwidths: as in `squared_mmd`, for the given samples; with y = None the median is over x.
        biased: which form.

    Returns:
        MmdFloor(mean, standard_deviation, values [repeats]).

    Raises:
        ValueError: as in `squared_mmd`, for the samples that are formed; if `repeats` is not an integer >= 2.
    """
    _validate.positive_integer("repeats", repeats)
    if repeats < 2:
        raise ValueError(f"repeats must be >= 2, got {repeats}")
    least = 1 if biased else 2
    if y is None:
        first, _, dtype = _checked(x, x, least=2 * least)
        widths, n = _widths(first, first, bandwidths), len(first) // 2
        pooled = _centred(first, first[:0], dtype)[0]
    else:
        first, second, dtype = _checked(x, y, least=least)
        widths, n = _widths(first, second, bandwidths), len(first)
        pooled = np.concatenate(_centred(first, second, dtype))
    count = len(pooled)
    chosen = np.zeros((count, repeats))
    for repeat, repeat_key in enumerate(jax.random.split(key, repeats)):
        chosen[np.asarray(jax.random.permutation(repeat_key, count))[:n], repeat] = 1
    columns = np.concatenate([chosen, np.ones((count, 1))], axis=1)
    sums = _weighted_sums(pooled, pooled, widths, columns)
    of_chosen, of_all = sums[:, :-1], sums[:, -1:]
    within_x = np.sum(chosen * of_chosen, axis=0)
    between = np.sum(chosen * (of_all - of_chosen), axis=0)
    within_y = np.sum((1 - chosen) * (of_all - of_chosen), axis=0)
    values = np.asarray(
        [_estimate(*terms, n=n, m=count - n, biased=biased) for terms in zip(within_x, within_y, between, strict=True)]
    )
    return MmdFloor(float(values.mean()), float(values.std(ddof=1)), values)


def _estimate(within_x: float, within_y: float, between: float, *, n: int, m: int, biased: bool) -> float:
    """MMD^2 from the sums of the kernel over all pairs, i = j included."""
    if biased:
        return max(float(within_x / n**2 + within_y / m**2 - 2 * (between / (n * m))), 0.0)
    return float((within_x - n) / (n * (n - 1)) + (within_y - m) / (m * (m - 1)) - 2 * (between / (n * m)))


def _checked(x: Any, y: Any, *, least: int = 1) -> tuple[np.ndarray, np.ndarray, np.dtype]:
    """Both samples as host arrays [n, d], in the dtype of the computation."""
    for name, sample in (("x", x), ("y", y)):
        _validate.floating(name, sample)
        if np.ndim(sample) < 1 or np.shape(sample)[0] < least:
            raise ValueError(f"{name} must hold at least {least} example(s), got shape {np.shape(sample)}")
    if np.shape(x)[1:] != np.shape(y)[1:]:
        raise ValueError(f"x and y must hold examples of one shape, got {np.shape(x)[1:]} and {np.shape(y)[1:]}")
    dtype = _validate.common_dtype(x, y)
    x, y = (np.asarray(sample).astype(dtype, copy=False).reshape(len(sample), -1) for sample in (x, y))
    _validate.finite("x", x)
    _validate.finite("y", y)
    return x, y, dtype


def _spread(count: int) -> np.ndarray:
    """Indices of at most _MEDIAN_POINTS evenly spaced rows."""
    return np.arange(min(count, _MEDIAN_POINTS)) * count // min(count, _MEDIAN_POINTS)


def _widths(x: np.ndarray, y: np.ndarray, bandwidths: Sequence[float] | None) -> np.ndarray:
    if bandwidths is None:
        return median_bandwidths(x, y)
    widths = np.asarray(bandwidths, np.float64)
    if widths.ndim != 1 or not widths.size:
        raise ValueError(f"bandwidths must have shape [B] with B >= 1, got {widths.shape}")
    _validate.positive("bandwidths", widths)
    return widths


def _centred(x: np.ndarray, y: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Both moved by the same vector, their common mean; the differences are kept to rounding."""
    total = x.sum(axis=0, dtype=np.float64) + y.sum(axis=0, dtype=np.float64)
    shift = (total / (len(x) + len(y))).astype(dtype)
    return x - shift, y - shift


def _weighted_sums(x: np.ndarray, y: np.ndarray, widths: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sum_j k(x_i, y_j) weights_jr, float64 [n, r], in tiles of equal shape (the last ones padded, with weights 0)."""
    scales = 1 / (2 * widths**2)
    size = max(float(np.max(np.sum(part.astype(np.float64) ** 2, axis=1))) for part in (x, y))
    direct = bool(8 * np.finfo(x.dtype).eps * size * scales.max() > _ROUNDING)
    rows, columns = (min(_TILE, 1 << (len(part) - 1).bit_length()) for part in (x, y))
    sums = np.zeros((len(x), weights.shape[1]))
    scaled = jnp.asarray(scales, x.dtype)
    for right in range(0, len(y), columns):
        part = jnp.asarray(_padded(y[right : right + columns], columns))
        weight = jnp.asarray(_padded(weights[right : right + columns], columns), x.dtype)
        for left in range(0, len(x), rows):
            tile = _tile(jnp.asarray(_padded(x[left : left + rows], rows)), part, scaled, weight, direct=direct)
            sums[left : left + rows] += np.asarray(tile, np.float64)[: len(x) - left]
    return sums


def _padded(part: np.ndarray, length: int) -> np.ndarray:
    return np.pad(part, ((0, length - len(part)), (0, 0)))


@functools.partial(jax.jit, static_argnames="direct")
def _tile(x: Array, y: Array, scales: Array, weights: Array, *, direct: bool) -> Array:
    """Kernel values of one tile times weights, [n, r]."""
    if direct:
        squares = jax.lax.map(lambda row: jnp.sum((y - row) ** 2, axis=1), x)
    else:
        highest = jax.lax.Precision.HIGHEST  # not the 10 bits of a GPU's default
        product = jnp.matmul(x, y.T, precision=highest)
        squares = jnp.maximum(jnp.sum(x**2, axis=1)[:, None] + jnp.sum(y**2, axis=1) - 2 * product, 0)
    kernel = jnp.zeros_like(squares)
    for index in range(len(scales)):
        kernel += jnp.exp(-squares * scales[index])
    return jnp.matmul(kernel / len(scales), weights, precision=jax.lax.Precision.HIGHEST)
