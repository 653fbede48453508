"""How many samples are copies of training points."""

import functools
import hashlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax.types import Array, Key

_SAMPLES_AT_ONCE = 1024
_CANDIDATES = 4  # of which the two nearest are found exactly
_GATHERED = 1 << 23  # entries of candidates at once, 64 MB of float64


class MemorizedFraction(NamedTuple):
    """Share of memorized samples in [0, 1], its bootstrap interval [low, high], and how many samples there were."""

    fraction: float
    low: float
    high: float
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody wants of a measurement


def memorized_fraction(
    samples: Array | np.ndarray,
    training: Array | np.ndarray,
    *,
    key: Key,
    ratio: float = 1 / 3,
    resamples: int = 1000,
    level: float = 0.95,
    chunk: int = 4096,
) -> MemorizedFraction:
    r"""Share of samples whose nearest training point is closer than `ratio` times the second nearest.

        |s - a| < ratio |s - b|,   a and b the nearest and the second nearest training point, Euclidean distances.

    Training points that are equal in every bit count as one, else a copy of a doubled training point would have its
    twin as second nearest and never count.

    ==============================  ====================================================================================
    |s - a| = 0                     memorized, whatever `ratio` (> 0): a and b differ
    |s - a| = ratio |s - b|         not memorized; at ratio = 1 only ties are not
    two near, unequal twins a, b    not memorized, however close s is to both: remove such twins from `training` first
    fraction 0 or 1                 a bootstrap then has no spread, low = high; with n samples and none memorized the
                                    upper limit at a level of 95% is about 3 / n
    ==============================  ====================================================================================

    Candidates for a and b come from |s|^2 + |x|^2 - 2 s.x over chunks of centred training points; the distances to the
    4 best are then computed from differences in float64, so that a copy has distance 0 exactly. The interval takes the
    quantiles of the share over resamples of the n samples with replacement, which is Binomial(n, fraction) / n; it says
    nothing about another training set or another trained network.

    Args:
        samples: [n, *dims], n >= 1, real numbers.
        training: [m, *dims], at least two different points; in the units of `samples`.
        key: of the bootstrap.
        ratio: in (0, 1].
        resamples: of the bootstrap, >= 1.
        level: of the interval, in (0, 1).
        chunk: training points at once: a chunk x dims array and 1024 x chunk distances are on the device.

    Returns:
        MemorizedFraction(fraction, low, high, count = n).

    Raises:
        ValueError: if the shapes do not fit, an array is empty or not finite, `training` has fewer than two different
            points, or a number is outside of its range.

    Source: Yoon et al. 2023 (ratio 1/3).
    """
    for name, value in (("resamples", resamples), ("chunk", chunk)):
        _validate.positive_integer(name, value)
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    queries, points = _checked(samples, training)
    nearest = _nearest_two(queries, points, chunk)
    fraction = float(np.mean(nearest[:, 0] < ratio * nearest[:, 1]))
    n = len(queries)
    counts = jax.random.binomial(key, jnp.float32(n), jnp.float32(fraction), shape=(resamples,))
    tail = (1 - level) / 2
    low, high = np.quantile(np.asarray(counts, np.float64) / n, [tail, 1 - tail])
    return MemorizedFraction(fraction, float(low), float(high), n)


def _checked(samples: Any, training: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as host arrays [n, d]; training points that occur several times once."""
    arrays = {"samples": np.asarray(samples), "training": np.asarray(training)}
    for name, array in arrays.items():
        if array.ndim < 1 or not len(array):
            raise ValueError(f"{name} must hold at least one example, got shape {array.shape}")
        if array.dtype.kind not in "fiub" and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must hold real numbers, got {array.dtype}")
        _validate.finite(name, array)
    first, second = arrays.values()
    if first.shape[1:] != second.shape[1:]:
        raise ValueError(
            f"samples and training must hold examples of one shape, got {first.shape[1:]} and {second.shape[1:]}"
        )
    flat = second.reshape(len(second), -1)
    flat = flat + np.zeros((), flat.dtype)  # -0 is 0
    digests = (hashlib.blake2b(row, digest_size=16).digest() for row in np.ascontiguousarray(flat))
    once = sorted({digest: index for index, digest in enumerate(digests)}.values())
    if len(once) < 2:
        raise ValueError(f"training must hold at least two different points, got {len(once)}")
    return first.reshape(len(first), -1), flat if len(once) == len(flat) else flat[once]


def _nearest_two(samples: np.ndarray, training: np.ndarray, chunk: int) -> np.ndarray:
    """Distances to the nearest and the second nearest training point, float64 [n, 2]."""
    found = np.empty((len(samples), 2))
    centre = training.mean(axis=0, dtype=np.float64)
    wanted = min(_CANDIDATES, len(training))
    for start in range(0, len(samples), _SAMPLES_AT_ONCE):
        part = samples[start : start + _SAMPLES_AT_ONCE]
        indices = _candidates(part, training, centre, wanted=wanted, chunk=chunk)
        for rows in _blocks(len(part), math.ceil(_GATHERED / (wanted * max(1, part.shape[1])))):
            differences = training[indices[rows]].astype(np.float64) - part[rows, None].astype(np.float64)
            distances = np.sqrt(np.sum(differences**2, axis=2))
            found[start : start + len(part)][rows] = np.sort(distances, axis=1)[:, :2]
    return found


def _blocks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _candidates(part: np.ndarray, training: np.ndarray, centre: np.ndarray, *, wanted: int, chunk: int) -> np.ndarray:
    """Indices of the `wanted` training points that seem nearest, [n, wanted]."""
    queries = jnp.asarray(part - centre, np.float32)
    best, indices = np.empty((len(part), 0), np.float32), np.empty((len(part), 0), np.int64)
    for rows in _blocks(len(training), chunk):
        points = jnp.asarray(training[rows] - centre, np.float32)
        scores, local = _nearest_in(queries, points, wanted=min(wanted, len(points)))
        best = np.concatenate([best, np.asarray(scores)], axis=1)
        indices = np.concatenate([indices, rows.start + np.asarray(local, np.int64)], axis=1)
        order = np.argsort(best, axis=1, kind="stable")[:, :wanted]
        best, indices = np.take_along_axis(best, order, 1), np.take_along_axis(indices, order, 1)
    return indices


@functools.partial(jax.jit, static_argnames="wanted")
def _nearest_in(queries: Array, points: Array, *, wanted: int) -> tuple[Array, Array]:
    """Smallest |x|^2 - 2 s.x, which orders the points as |s - x| does, and their indices."""
    product = jnp.matmul(queries, points.T, precision=jax.lax.Precision.HIGHEST)
    scores, indices = jax.lax.top_k(2 * product - jnp.sum(points**2, axis=1), wanted)
    return -scores, indices
