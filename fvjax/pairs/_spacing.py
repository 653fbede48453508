r"""Distances between the paths of nearest pairs, and the sigma at which they predict that the pairs are let go."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _quadrature, _validate
from fvjax.interpolants import Interpolant, constant_noise
from fvjax.pairs._checks import checked_pairs
from fvjax.types import Array, Key, Pair, Scalar

RATIO, LOWEST_RATIO, HIGHEST_RATIO = 1.0, 0.85, 1.3
"""sigma_c sqrt(log N) over the median distance between nearest midpoints, constant noise: typical value, and the range
over all sets of pairs with d >= 10 on which it was measured (docs/theory.md, section 8)."""

ELEMENTS = 2**23
"""Bound on the entries of a block of distances or of differences: 32 MiB in float32."""

CANDIDATES = 8
"""Nearest points by |p|^2 - 2 q.p, which cancels, whose distances are computed again from differences."""

Factory = Callable[[Any], Interpolant]
"""sigma -> Interpolant, as `fvjax.constant_noise`."""


class PredictedSigma(NamedTuple):
    """The prediction of sigma_c, its range, and the median distance between nearest midpoints, in units of x."""

    predicted: float
    low: float
    high: float
    spacing: float


def nearest_midpoint_distances(
    pairs: Pair,
    interpolant: Interpolant | None = None,
    *,
    t: Scalar = 0.5,
    sources: int | None = None,
    key: Key | None = None,
) -> Array:
    """The distance of each pair's path at time `t` to the nearest path of another pair, |m_i(t) - m_j(t)|.

    By matrix products in blocks; the nearest few are then measured again from their differences, so that equal paths
    have distance exactly 0, and float32 does not cancel. The cost is sources x N x dim multiplications.

    Args:
        pairs: x0 and x1, [N, *dims] each, floating point.
        interpolant: gives alpha and beta of m_i = alpha x0_i + beta x1_i; its noise plays no part. None is straight
            lines.
        t: time, shape [].
        sources: measure from that many random pairs only (to all others); None means from all.
        key: PRNG key of that choice.

    Returns:
        [N], or [sources], in the dtype of x0; inf for a single pair.

    Raises:
        ValueError: if the pairs are empty, not finite, not of one shape and floating-point dtype, or `sources` is no
            integer in [1, N] or comes without a key.
    """
    pairs = checked_pairs(pairs)
    index = chosen(len(pairs.x0), sources, key)
    c = (constant_noise(0.0) if interpolant is None else interpolant).coefficients(jnp.asarray(t, pairs.x0.dtype))
    middle = (c.alpha * pairs.x0 + c.beta * pairs.x1).reshape(len(pairs.x0), -1)
    return own_and_nearest(middle[index], middle, index)[1]


def predicted_sigma_critical(
    pairs: Pair,
    interpolant: Factory = constant_noise,
    *,
    sources: int | None = None,
    key: Key | None = None,
) -> PredictedSigma:
    r"""Predicts `sigma_critical` from the pairs alone: from their number and the distances of nearest midpoints.

        sigma_c = median_i min_{j != i} |m_i(1/2) - m_j(1/2)| / sqrt(log N),        range 0.85 to 1.3 times this.

    N rivals at distance D weigh N exp(-D^2 / (2 sigma^2)) against a pair of weight 1, hence the square root. The factor
    was measured, not derived: for constant noise and random (shuffled, independent) pairs, N = 20 to 5000, in 10 or
    more dimensions (up to 1.15 for N <= 2000; 1.26 for N = 5000 at d = 10, where nearest midpoints have few rivals at
    their distance). At d = 2 and 3 sigma_c was 0.1-0.6 times this and depended on the number of steps, because there
    paths that come close at any time count: take `sigma_critical`. For another interpolant sigma is converted by the
    root mean square of gamma over t. For the Brownian bridge, sigma / sqrt(6), that agreed with constant noise to 8%;
    noise that is concentrated more about t = 1/2 (`smooth_bridge`) let go at 0.9-1.7 times the prediction.

    ==========================================  =======================================================================
    N = 1                                       inf: nothing to confuse the pair with
    half of the midpoints have an equal one     0: at t = 1/2 nothing names the pair (Counter Example 1), or the set
                                                contains pairs twice (remove them: copies are not confused)
    pairs that are optimal, x1 = T(x0)          a number, but the minimiser may never let go: such pairs need no names
    ==========================================  =======================================================================

    Args:
        pairs: x0 and x1, [N, *dims] each, floating point.
        interpolant: sigma -> Interpolant, gamma proportional to sigma.
        sources: take the median over that many random pairs only; None means all. 50,000 pairs of 12,288 dimensions
            cost 6e13 operations with all, 1e12 with 1,000.
        key: PRNG key of that choice.

    Returns:
        PredictedSigma: floats, in the units of sigma (those of x).

    Raises:
        ValueError: as `nearest_midpoint_distances`, or if gamma is not proportional to sigma.

    Source: docs/theory.md, section 8.
    """
    pairs = checked_pairs(pairs)
    width = _noise_width(interpolant, pairs.x0.dtype)
    distances = nearest_midpoint_distances(pairs, interpolant(1.0), sources=sources, key=key)
    spacing = float(jnp.median(distances))
    width *= math.sqrt(math.log(max(2, len(pairs.x0))))
    predicted, low, high = (ratio * spacing / width for ratio in (RATIO, LOWEST_RATIO, HIGHEST_RATIO))
    return PredictedSigma(predicted, low, high, spacing)


def _noise_width(interpolant: Factory, dtype: Any) -> float:
    """The root mean square of gamma over t at sigma = 1: what sigma is worth in units of constant noise."""
    nodes, weights = _quadrature.legendre(32)

    def gammas(sigma: float) -> np.ndarray:
        times = jnp.asarray(nodes, dtype)
        return np.asarray(jax.vmap(lambda t: interpolant(sigma).coefficients(t).gamma)(times), np.float64)

    one, two = gammas(1.0), gammas(2.0)
    if not (np.any(one > 0) and np.allclose(two, 2 * one, rtol=1e-3)):
        raise ValueError(
            f"interpolant must have gamma proportional to sigma, got {one[16]:.3g} and {two[16]:.3g}"
            " at t = 1/2 for sigma = 1 and 2"
        )
    return math.sqrt(float(np.dot(weights, one**2)))


def chosen(n: int, sources: int | None, key: Key | None) -> Array:
    if sources is None:
        return jnp.arange(n)
    _validate.positive_integer("sources", sources)
    if sources > n:
        raise ValueError(f"sources must be <= the number of pairs, {n}, got {sources}")
    if key is None:
        raise ValueError("key must be given with sources, got None")
    return jax.random.choice(key, n, (int(sources),), replace=False)


def blocks(index: Array, rows: int) -> Array:
    """[m] -> [blocks, rows], the last index repeated."""
    padding = -len(index) % rows
    return jnp.concatenate([index, jnp.broadcast_to(index[-1:], (padding,))]).reshape(-1, rows)


def block_rows(n: int, dim: int) -> int:
    """Points at once, which bounds the distances [rows, n] to all pairs, and the differences from the nearest few."""
    return max(1, ELEMENTS // max(n, 2 * CANDIDATES * dim))


@jax.jit
def own_and_nearest(queries: Array, points: Array, own: Array) -> tuple[Array, Array]:
    """Distances [m] of queries [m, d] to points[own] and to the nearest other of points [n, d] (inf if there is none).

    Both by the same sum of squared differences, so that equal points have equal distances.
    """
    n, dim = points.shape
    origin = jnp.mean(points, 0)
    centred = points - origin
    squares = jnp.sum(centred**2, 1)

    def of_block(position: Array) -> tuple[Array, Array]:
        query, skip = queries[position] - origin, own[position]
        products = jnp.matmul(query, centred.T, precision=jax.lax.Precision.HIGHEST)
        rough = (squares - 2 * products).at[jnp.arange(len(position)), skip].set(jnp.inf)
        _, near = jax.lax.top_k(-rough, min(CANDIDATES, n - 1))
        measured = jnp.concatenate([skip[:, None], near.astype(skip.dtype)], 1)
        distances = jnp.sqrt(jnp.sum((queries[position][:, None] - points[measured]) ** 2, 2))
        return distances[:, 0], jnp.min(distances[:, 1:], 1, initial=jnp.inf)

    rows = min(block_rows(n, dim), len(queries))
    to_own, to_other = jax.lax.map(of_block, blocks(jnp.arange(len(queries)), rows))
    return to_own.ravel()[: len(queries)], to_other.ravel()[: len(queries)]
