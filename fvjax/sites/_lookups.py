"""Norms and moments of gradients that are a few rows of a large table, such as an embedding, without the other rows.

The gradient of example i is sum_l e(r_il) y_il^T with row numbers r and cotangents y; equal numbers of one example are
added up first, after which its rows are different, and |g_i|^2 = sum_l |y_il|^2.
"""

import jax
import jax.numpy as jnp

from fvjax import _moments
from fvjax._moments import Weighting
from fvjax.sites._rules import Entries
from fvjax.types import Array

SHORT = 64
"""Up to this many rows in one example equal ones are found by comparing all pairs, beyond by sorting."""


def united(entries: Entries, size: int) -> Entries:
    """The rows of ONE example with equal numbers added up in the first of them; the others get the number `size`."""
    rows, values = entries
    length = len(rows)
    if length == 1:
        return entries
    if length > SHORT:
        order = jnp.argsort(rows)
        rows, values = rows[order], values[order]
        begins = jnp.concatenate([jnp.ones(1, bool), rows[1:] != rows[:-1]])
        place = jnp.cumsum(begins) - 1
        values = jax.ops.segment_sum(values, place, length, indices_are_sorted=True)
        return Entries(jnp.full_like(rows, size).at[place].set(rows, indices_are_sorted=True), values)
    equal = rows[:, None] == rows[None]
    first = jnp.logical_not(jnp.any(jnp.tril(equal, -1), 1))
    values = jnp.where((rows < size)[:, None], values, 0)  # what is dropped may be nan
    total = jnp.matmul(equal.astype(values.dtype), values, precision=jax.lax.Precision.HIGHEST)
    return Entries(jnp.where(first, rows, size), jnp.where(first[:, None], total, 0))


def square_norms(entries: Entries, size: int) -> Array:
    """|g_i|^2 [n] of united entries [n, L]."""
    kept = (entries.rows < size)[..., None]
    return jnp.sum(jnp.where(kept, entries.values, 0) ** 2, (1, 2))


def _flat(entries: Entries, size: int, weighting: Weighting) -> tuple[Array, Array, Array, int]:
    """Row numbers in one table for all groups, values and weights of all entries, and the size of that table."""
    n, length = entries.rows.shape
    rows, weights = entries.rows, weighting.of(n).astype(entries.values.dtype)
    whole = size
    if weighting.by is not None and weighting.groups is not None:
        inside = weighting.inside(weighting.by)[:, None] & (rows < size)
        whole = size * weighting.groups
        rows = jnp.where(inside, jnp.clip(weighting.by, 0, weighting.groups - 1)[:, None] * size + rows, whole)
    values = _moments.counted(weights, entries.values)
    return rows.reshape(-1), values.reshape(n * length, -1), jnp.repeat(weights, length), whole


def fits(size: int, groups: int | None) -> bool:
    """Whether the rows of all groups can be numbered by 32-bit integers."""
    return size * (groups or 1) < 2**31 - 1


def mean(entries: Entries, size: int, weighting: Weighting) -> Array:
    """The weighted mean gradient, [size, width], or [groups, size, width]."""
    rows, values, weights, whole = _flat(entries, size, weighting)
    table = jnp.zeros((whole, values.shape[-1]), values.dtype)
    table = table.at[rows].add(values * weights[:, None], mode="drop")
    if weighting.groups is not None:
        table = table.reshape(weighting.groups, size, -1)
    return table / _moments.divisor(_moments.trailing(weighting.totals(len(entries.rows)), table))


def moments(entries: Entries, size: int, weighting: Weighting, *, trace: bool) -> tuple[Array, Array]:
    r"""Mean and m2 (or its trace), without a difference that could cancel.

    With V the weight of the examples that take a row and y their mean gradient of it, the mean is V y / W, and

        m2 = sum_i w_i |y_i - y|^2 + V (W - V) / W |y|^2,

    within and between those that take the row and those that do not, whose gradient is 0 there. Only rows that are
    taken are worked on: they are sorted, and one table is made at the end.

    Args:
        entries: united, [n, L].
        size: of the table.
        weighting: of the examples.
        trace: whether to give one number instead of the coordinates.
    """
    rows, values, weights, whole = _flat(entries, size, weighting)
    order = jnp.argsort(rows)
    rows, values, weights = rows[order], values[order], weights[order]
    count = len(rows)
    begins = jnp.concatenate([jnp.ones(1, bool), rows[1:] != rows[:-1]])
    place = jnp.cumsum(begins) - 1

    def total(x: Array) -> Array:
        return jax.ops.segment_sum(x, place, count, indices_are_sorted=True)

    own = total(weights)[:, None]
    rough = total(weights[:, None] * values) / _moments.divisor(own)
    rest = values - rough[place]
    correction = total(weights[:, None] * rest) / _moments.divisor(own)
    within = total(weights[:, None] * (rest - correction[place]) ** 2)
    average = rough + correction

    numbers = jnp.full_like(rows, whole).at[place].set(rows, indices_are_sorted=True)
    totals = weighting.totals(len(entries.rows)).astype(values.dtype)
    if weighting.groups is not None:
        totals = totals.at[numbers // size].get(mode="fill", fill_value=0)[:, None]
    share = own / _moments.divisor(totals)
    between = own * jnp.maximum(totals - own, 0) / _moments.divisor(totals) * average**2

    def table(x: Array) -> Array:
        full = jnp.zeros((whole, x.shape[-1]), x.dtype).at[numbers].set(x, mode="drop", unique_indices=False)
        return full if weighting.groups is None else full.reshape(weighting.groups, size, -1)

    mean = table(share * average)
    if not trace:
        return mean, table(within + between)
    squares = jnp.where(numbers < whole, jnp.sum(within + between, -1), 0)
    if weighting.groups is None:
        return mean, jnp.sum(squares)
    return mean, jnp.zeros(weighting.groups, squares.dtype).at[numbers // size].add(squares, mode="drop")
