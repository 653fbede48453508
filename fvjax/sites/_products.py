"""Norms and moments of gradients that are sums of few outer products, without forming them.

With rows X_i [L, R] and columns Y_i [L, C] of example i, g_i = X_i^T Y_i, and |g_i|^2 = sum((X_i X_i^T) * (Y_i Y_i^T)).
Nothing here is trusted blindly: what is taken from a difference says whether that has lost digits.
"""

import jax
import jax.numpy as jnp

from fvjax import _moments
from fvjax._moments import Weighting
from fvjax.sites._rules import Factors, Layout
from fvjax.types import Array

LARGEST_RATIO = 8.0
"""How many times the terms of a difference may exceed it: it loses at most 3 bits to cancellation."""

HIGHEST = jax.lax.Precision.HIGHEST
ALL = Weighting(None, None, None)
"""Every example once, in one group."""


def pays(layout: Layout, length: int, *, elementwise: bool) -> bool:
    """Whether this is faster than forming each gradient, for `length` outer products an example.

    Always for one, never for the squared coordinates of several; otherwise while the Gram matrices are not too large:
    at 8 they took 0.4 to 0.7 of the time of forming each gradient, beyond 16 they took more (2 CPU cores, float32).
    """
    _, rows, columns = layout.shape
    if length <= 1 or elementwise:
        return length == 1
    return length**2 * (rows + columns) <= 8 * rows * columns


def sound(bound: Array, value: Array) -> Array:
    """Whether no value is much smaller than the terms it is made of (nan passes: a slower way would find it too)."""
    return jnp.logical_not(jnp.any(bound > LARGEST_RATIO * value))


def squares(factors: Factors, scale: Array | None = None) -> tuple[Array, Array]:
    """|X_i^T Y_i|^2 [n], and the size of the terms that make it up, [n].

    The error of the sum over l, m of (x_l . x_m) (y_l . y_m) is at most epsilons of B = (sum_l |x_l| |y_l|)^2, and
    typically epsilons of B / L, since the L^2 products round independently: the latter is given.

    Args:
        factors: [n, groups, L, ...].
        scale: by which every coordinate is multiplied, [groups, R, C], for L = 1.
    """
    parts = _parts_of_squares(factors, scale)
    if parts is not None:
        found = parts[0] * parts[1]
        return found, found
    x, y = factors
    if scale is not None:
        weighed = jnp.einsum("nglr,grc->nglc", x * x, scale * scale, precision=HIGHEST)
        found = jnp.sum(weighed * (y * y), (1, 2, 3))
        return found, found
    if x.shape[-2] == 1:
        found = jnp.sum(jnp.sum(x * x, (-2, -1)) * jnp.sum(y * y, (-2, -1)), 1)
        return found, found
    grams = [jnp.einsum("nglr,ngmr->nglm", f, f, precision=HIGHEST) for f in factors]
    lengths = [jnp.sqrt(jnp.diagonal(gram, axis1=-2, axis2=-1)) for gram in grams]
    found = jnp.sum(grams[0] * grams[1], (1, 2, 3))
    return jnp.maximum(found, 0), jnp.sum(jnp.sum(lengths[0] * lengths[1], -1) ** 2, 1) / x.shape[-2]


def _is_single(factors: Factors) -> bool:
    """Whether every gradient is one outer product."""
    return factors.rows.shape[1:3] == (1, 1)


def _as_rows(factors: Factors) -> tuple[Array, Array]:
    """[n, R] and [n, C] of single outer products: of these XLA squares and sums in one step."""
    x, y = (f.reshape(len(f), -1) for f in factors)
    return x, y


def _parts_of_squares(factors: Factors, scale: Array | None) -> tuple[Array, Array] | None:
    """|x_i|^2 and |y_i|^2 of single outer products."""
    if scale is not None or not _is_single(factors):
        return None
    x, y = _as_rows(factors)
    return jnp.sum(x * x, 1), jnp.sum(y * y, 1)


def _summed_squares(factors: Factors, weighting: Weighting, scale: Array | None) -> tuple[Array, Array]:
    """sum_i w_i |g_i|^2 and that of the terms, of all or of each group."""
    parts = _parts_of_squares(factors, scale)
    if parts is not None and weighting.by is None:
        first, second = (
            parts if weighting.weights is None else (parts[0] * weighting.weights.astype(parts[0].dtype), parts[1])
        )
        found = jnp.dot(first, second, precision=HIGHEST)
        return found, found
    found, terms = squares(factors, scale)
    return weighting.total(found), weighting.total(terms)


def _product(x: Array, y: Array, weighting: Weighting) -> Array:
    """sum_i w_i X_i^T Y_i, [groups, R, C], or one for each of K groups of examples, [K, groups, R, C].

    A single product as XLA forms the gradient of a dense layer, without a transposed copy of X.
    """
    if weighting.weights is not None:
        y = _moments.trailing(weighting.weights, y) * y
    if weighting.by is not None:
        return _grouped(x, y, weighting)
    if x.shape[1] == 1:
        columns, rows = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        return jax.lax.dot_general(columns, rows, (((0,), (0,)), ((), ())), precision=HIGHEST).T[None]
    return jnp.einsum("nglr,nglc->grc", x, y, precision=HIGHEST)


def _grouped(x: Array, y: Array, weighting: Weighting) -> Array:
    """One product for each group of examples.

    All in one batched product with room for twice the average number of examples; what a group has beyond is added in
    blocks, if there is any.
    """
    n, groups = len(x), weighting.groups or 1
    room = min(n, -(-2 * n // groups))

    def factors(rows: Array) -> list[Array]:
        return [f.at[rows].get(mode="fill", fill_value=0) for f in (x, y)]

    first, rest, of_group = weighting.in_first_blocks(n, room)
    total = jnp.einsum("kbglr,kbglc->kgrc", *factors(first), precision=HIGHEST)

    def added(total: Array) -> Array:
        def body(total: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
            rows, group = block
            left, right = factors(rows)
            own = jax.lax.dynamic_index_in_dim(total, group, keepdims=False) + _product(left, right, ALL)
            return jax.lax.dynamic_update_index_in_dim(total, own, group, 0), None

        return jax.lax.scan(body, total, (rest, of_group))[0]

    return total if not len(rest) else jax.lax.cond(jnp.any(rest < n), added, lambda total: total, total)


def counted(factors: Factors, weighting: Weighting) -> Factors:
    """Examples of weight 0, whose factors may be nan, become zeros."""
    if weighting.weights is None:
        return factors
    return Factors(*(_moments.counted(weighting.weights, f) for f in factors))


def mean(factors: Factors, weighting: Weighting) -> Array:
    """The weighted mean, [groups, R, C], or that of each of K groups of examples, [K, groups, R, C]."""
    total = _product(*factors, weighting)
    return total / _moments.divisor(_moments.trailing(weighting.totals(len(factors.rows)), total))


def plain(
    factors: Factors, weighting: Weighting, mean: Array, *, scale: Array | None = None, trace: bool
) -> tuple[Array, Array]:
    """m2 = sum w |g|^2 - W |mean|^2 or its coordinates, and whether it is sound.

    Args:
        factors: [n, groups, L, ...]; L = 1 for the coordinates.
        weighting: of the examples.
        mean: as `mean` gives it, not scaled.
        scale: by which every coordinate is multiplied, [groups, R, C].
        trace: whether to give one number instead of the coordinates.
    """
    weight = weighting.totals(len(factors.rows))
    if trace:
        found, terms = _summed_squares(factors, weighting, scale)
        scaled = mean if scale is None else mean * scale
        m2 = found - weight.astype(found.dtype) * jnp.sum(scaled**2, (-3, -2, -1))
    else:
        x, y = factors
        # Without the detour XLA squares the rows as soon as the forward pass has them, and keeps the squares of all
        # layers until the cotangents are there (8 of 35 MB in a network of 4 x 512). Its CPU compiler drops
        # optimization barriers.
        one = jnp.where(y.ravel()[0] > jnp.inf, 0, 1).astype(x.dtype)
        terms = _product(x * x * one, y * y, weighting)
        m2 = terms - _moments.trailing(weight, mean) * mean**2
        if scale is not None:
            terms, m2 = terms * scale**2, m2 * scale**2
    if weighting.by is not None:  # a group of one example has no variance, whatever is left of the difference
        alone = _moments.trailing(weighting.counts(len(factors.rows)), m2) <= 1
        terms, m2 = jnp.where(alone, 0, terms), jnp.where(alone, 0, m2)
    return jnp.maximum(m2, 0), sound(terms, m2)


def shifted(factors: Factors, weighting: Weighting, *, trace: bool) -> tuple[Array, Array, Array]:
    """The same from the deviations of the factors from their means, (dX, X) and (Y, dY) with 2 L rows, and the mean.

    No step of it cancels when the factors hardly differ (docs/theory.md, section 7). The mean of g_i - X^T Y is that of
    dX_i^T Y_i + X^T dY_i with X, Y the means of the factors, so the mean is rounded once, not with every example.
    """
    means = Factors(*(weighting.means(f) for f in factors))
    own = Factors(*(weighting.of_each(m, f) for m, f in zip(means, factors, strict=True)))
    dx, dy = (f - m for f, m in zip(factors, own, strict=True))
    weight = weighting.totals(len(dx))
    rest = _outer(means.rows, weighting.total(dy))
    product = _product(dx, factors.columns, weighting) + rest
    gap = product / _moments.divisor(_moments.trailing(weight, product))
    mean = _outer(*means) + gap
    if trace:
        found, terms = _shifted_squares(factors, own, Factors(dx, dy))
        m2 = weighting.total(found) - weight.astype(found.dtype) * jnp.sum(gap**2, (-3, -2, -1))
        return jnp.maximum(m2, 0), sound(weighting.total(terms), m2), mean
    # Coordinate by coordinate, for L = 1: dx^2 y^2 + 2 x dx y dy + x^2 dy^2, at most 2 (dx^2 y^2 + x^2 dy^2).
    outer = _product(dx * dx, factors.columns * factors.columns, weighting)
    ends = jnp.swapaxes(means.rows**2, -2, -1) * weighting.total(dy * dy)
    cross = 2 * jnp.swapaxes(means.rows, -2, -1) * _product(dx, factors.columns * dy, weighting)
    m2 = outer + cross + ends - _moments.trailing(weight, gap) * gap**2
    return jnp.maximum(m2, 0), sound(2 * (outer + ends), m2), mean


def _outer(rows: Array, columns: Array) -> Array:
    """[..., groups, L, R] and [..., groups, L, C] -> [..., groups, R, C]."""
    return jnp.einsum("...glr,...glc->...grc", rows, columns, precision=HIGHEST)


def _shifted_squares(factors: Factors, means: Factors, deviations: Factors) -> tuple[Array, Array]:
    """|dX_i^T Y_i + X^T dY_i|^2 and the size of its terms, [n]; (7.5) of docs/theory.md where they are single."""
    if not _is_single(factors):
        doubled = Factors(
            jnp.concatenate([deviations.rows, jnp.broadcast_to(means.rows, factors.rows.shape)], -2),
            jnp.concatenate([factors.columns, deviations.columns], -2),
        )
        return squares(doubled)
    (dx, dy), y, x = _as_rows(deviations), _as_rows(factors)[1], _as_rows(means)[0]
    terms = jnp.sum(dx * dx, 1) * jnp.sum(y * y, 1) + jnp.sum(x * x, 1) * jnp.sum(dy * dy, 1)
    return jnp.maximum(terms + 2 * jnp.sum(dx * x, 1) * jnp.sum(y * dy, 1), 0), terms
