"""Norms and moments of gradients that are sums of few outer products, without forming them.

With rows X_i [L, R] and columns Y_i [L, C] of example i, g_i = X_i^T Y_i, and |g_i|^2 = sum((X_i X_i^T) * (Y_i Y_i^T)).
Nothing here is trusted blindly: every result carries a bound of its rounding error, and where that is too large the
next, slower way is taken at run time.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from fvjax import _moments
from fvjax.sites._rules import Factors, Layout
from fvjax.types import Array, GradientMoments

LARGEST_RATIO = 8.0
"""How many times the terms of a difference may exceed it: it loses at most 3 bits to cancellation."""

MOST_GROUPS = 32
"""Up to here one matrix product a group is faster than one outer product an example."""

HIGHEST = jax.lax.Precision.HIGHEST
Result = tuple[Array, Array]


def pays(layout: Layout, length: int, *, elementwise: bool) -> bool:
    """Whether this is faster than forming each gradient, for `length` outer products an example.

    Always for one, never for the squared coordinates of several; otherwise while the Gram matrices are not too large:
    at 8 they took 0.4 to 0.7 of the time of forming each gradient, beyond 16 they took more (2 CPU cores, float32).
    """
    _, rows, columns = layout.shape
    if length == 1 or elementwise:
        return length == 1
    return length**2 * (rows + columns) <= 8 * rows * columns


def _squares(factors: Factors) -> Result:
    """|X_i^T Y_i|^2 [n], and the size of the terms that make it up, [n].

    The error of the sum over l, m of (x_l . x_m) (y_l . y_m) is at most epsilons of B = (sum_l |x_l| |y_l|)^2, and
    typically epsilons of B / L, since the L^2 products round independently: the latter is given.
    """
    x, y = factors
    if x.shape[-2] == 1:
        squares = jnp.sum(jnp.sum(x * x, (-2, -1)) * jnp.sum(y * y, (-2, -1)), 1)
        return squares, squares
    grams = [jnp.einsum("nglr,ngmr->nglm", f, f, precision=HIGHEST) for f in factors]
    lengths = [jnp.sqrt(jnp.diagonal(gram, axis1=-2, axis2=-1)) for gram in grams]
    squares = jnp.sum(grams[0] * grams[1], (1, 2, 3))
    return jnp.maximum(squares, 0), jnp.sum(jnp.sum(lengths[0] * lengths[1], -1) ** 2, 1) / x.shape[-2]


def _product(x: Array, y: Array) -> Array:
    """sum_i X_i^T Y_i, [groups, R, C].

    A single group as XLA forms the gradient of a dense layer, without a transposed copy of X.
    """
    if x.shape[1] == 1:
        columns, rows = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        return jax.lax.dot_general(columns, rows, (((0,), (0,)), ((), ())), precision=HIGHEST).T[None]
    return jnp.einsum("nglr,nglc->grc", x, y, precision=HIGHEST)


def _sound(bound: Array, value: Array) -> Array:
    """Whether no value is much smaller than the terms it is made of (nan passes: a slower way would find it too)."""
    return jnp.logical_not(jnp.any(bound > LARGEST_RATIO * value))


def norms(
    factors: Factors,
    weights: Array | None,
    laid_out: Callable[[Array], Array],
    fallback: Callable[[], Result],
) -> Result:
    """The weighted mean and the squared norms [n].

    Args:
        factors: [n, groups, L, ...].
        weights: [n] or None.
        laid_out: [groups, R, C] -> the shape of the root.
        fallback: the same by forming each gradient.
    """
    x, weighted, total = _weighted(_counted(factors, weights), weights)
    squares, bound = _squares(factors)
    result = laid_out(_product(x, weighted)) / _moments.divisor(total), squares
    if x.shape[-2] == 1:
        return result
    return jax.lax.cond(_sound(bound, squares), lambda: result, fallback)


def traces(values: list[Array], weights: Array) -> GradientMoments:
    """Mean and the trace of m2 of given gradients, [n, ...] each: in one pass, or in three where that would cancel."""
    values = [_moments.counted(weights, v.astype(_moments.accumulation_dtype(v))) for v in values]
    weight = jnp.sum(weights)

    def of_leaf(value: Array) -> Result:
        total = weight.astype(value.dtype)
        mean = _moments.weighted_sum(weights, value) / _moments.divisor(total)
        squares = _moments.weighted_sum(weights, jnp.sum(value * value, tuple(range(1, value.ndim))))
        m2 = squares - total * jnp.sum(mean**2)
        careful = partial(_moments.moments_of, value, weights, trace=True)
        return jax.lax.cond(_sound(squares, m2), lambda: (mean, m2), lambda: (careful().mean, careful().m2))

    means, m2 = zip(*map(of_leaf, values), strict=True)
    return GradientMoments(weight, list(means), list(m2))


def _counted(factors: Factors, weights: Array | None) -> Factors:
    return factors if weights is None else Factors(*(_moments.counted(weights, f) for f in factors))


def _weighted(factors: Factors, weights: Array | None) -> tuple[Array, Array, Array]:
    """X, w Y and the sum of w, for the sums over the examples."""
    x, y = factors
    if weights is None:
        return x, y, jnp.asarray(len(x), y.dtype)
    return x, y * _moments.trailing(weights, y), jnp.sum(weights).astype(y.dtype)


def moments(
    factors: Factors,
    weights: Array | None,
    laid_out: Callable[[Array], Array],
    fallback: Callable[[], Array],
    *,
    trace: bool,
) -> Result:
    """The weighted mean, and m2 or its trace: plainly, else with shifted data, else by `fallback`.

    Args:
        factors: [n, groups, L, ...].
        weights: [n] or None.
        laid_out: [groups, R, C] -> the shape of the root.
        fallback: m2 by forming each gradient.
        trace: whether to give the trace of m2; without, L must be 1.
    """
    factors = _counted(factors, weights)
    plain, shifted = (_plain_trace, _shifted_trace) if trace else (_plain_squares, _shifted_squares)

    def finished(m2: Array) -> Array:
        return jnp.maximum(m2 if trace else laid_out(m2), 0)

    def carefully() -> Array:
        m2, bound = shifted(factors, weights)
        return jax.lax.cond(_sound(bound, m2), lambda: finished(m2), fallback)

    # The mean is right in any case, so only m2 passes through the branches.
    mean, m2, bound = plain(factors, weights)
    return laid_out(mean), jax.lax.cond(_sound(bound, m2), lambda: finished(m2), carefully)


def _plain_trace(factors: Factors, weights: Array | None) -> tuple[Array, Array, Array]:
    """Mean, m2 = sum w |g|^2 - |sum w g|^2 / W, and the bound of its terms."""
    x, weighted, total = _weighted(factors, weights)
    squares, bounds = _squares(factors)
    mean = _product(x, weighted) / _moments.divisor(total)
    return mean, _sum(weights, squares) - total * jnp.sum(mean**2), _sum(weights, bounds)


def _plain_squares(factors: Factors, weights: Array | None) -> tuple[Array, Array, Array]:
    x, weighted, total = _weighted(factors, weights)
    mean = _product(x, weighted) / _moments.divisor(total)
    # Without the detour XLA squares the rows as soon as the forward pass has them, and keeps the squares of all layers
    # until the cotangents are there (8 of 35 MB in a network of 4 x 512). Its CPU compiler drops optimization barriers.
    one = jnp.where(weighted.ravel()[0] > jnp.inf, 0, 1).astype(x.dtype)
    squares = _product(x * x * one, weighted * factors.columns)
    return mean, squares - total * mean**2, squares


def _sum(weights: Array | None, values: Array) -> Array:
    """sum_i w_i v_i over the leading axis."""
    return jnp.sum(values, 0) if weights is None else _moments.weighted_sum(weights, values)


def _shift(factors: Factors, weights: Array | None) -> tuple[Factors, Factors]:
    """The weighted means of X and Y, [groups, L, ...], and the deviations of all examples from them."""
    total = _moments.divisor(_weighted(factors, weights)[2])
    means = Factors(*(_sum(weights, f) / total for f in factors))
    return means, Factors(*(f - m for f, m in zip(factors, means, strict=True)))


def _mean_deviation(
    means: Factors, deviations: Factors, factors: Factors, weights: Array | None
) -> tuple[Array, Array, Array]:
    """The mean of g_i - X^T Y = dX_i^T Y_i + X^T dY_i with X, Y the means of the factors, w Y_i, and the sum of w.

    No step of it cancels when the factors hardly differ (docs/theory.md, section 7).
    """
    dx, weighted, total = _weighted(Factors(deviations.rows, factors.columns), weights)
    rest = jnp.einsum("glr,glc->grc", means.rows, _sum(weights, deviations.columns), precision=HIGHEST)
    return (_product(dx, weighted) + rest) / _moments.divisor(total), weighted, total


def _shifted_trace(factors: Factors, weights: Array | None) -> Result:
    """m2 and the bound of its terms; the deviations are products of 2 L rows, (dX, X) and (Y, dY)."""
    means, deviations = _shift(factors, weights)
    mean, _, total = _mean_deviation(means, deviations, factors, weights)
    doubled = Factors(
        jnp.concatenate([deviations.rows, jnp.broadcast_to(means.rows, factors.rows.shape)], -2),
        jnp.concatenate([factors.columns, deviations.columns], -2),
    )
    squares, bounds = _squares(doubled)
    return _sum(weights, squares) - total * jnp.sum(mean**2), _sum(weights, bounds)


def _shifted_squares(factors: Factors, weights: Array | None) -> Result:
    """Coordinate by coordinate, for L = 1: dx^2 y^2 + 2 x dx y dy + x^2 dy^2, at most 2 (dx^2 y^2 + x^2 dy^2)."""
    means, deviations = _shift(factors, weights)
    mean, weighted, total = _mean_deviation(means, deviations, factors, weights)
    x, dx, dy = means.rows, deviations.rows, deviations.columns
    outer = _product(dx * dx, weighted * factors.columns)
    ends = jnp.swapaxes(x * x, -2, -1) * _sum(weights, dy * dy)
    cross = 2 * jnp.swapaxes(x, -2, -1) * _product(dx, weighted * dy)
    return outer + cross + ends - total * mean**2, 2 * (outer + ends)
