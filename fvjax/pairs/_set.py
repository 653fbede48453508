"""A finite set of pairs as a field carries it, and the interpolant at one time as the posterior needs it."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fvjax.interpolants import Interpolant
from fvjax.types import Array, Pair

GEOMETRY_ELEMENTS = 2**20
"""Numbers of x0 in a block when norms are computed."""


class Geometry(NamedTuple):
    """Norms and products of the pairs, [N] each but the centers [D] and the typical norms []; at least float32."""

    center0: Array
    center1: Array
    square0: Array  # |x0 - center0|^2
    square1: Array
    cross: Array  # (x0 - center0) . (x1 - center1)
    norm0: Array  # |x0|
    norm1: Array
    typical0: Array  # median |x0| / sqrt(D)
    typical1: Array


@jax.jit
def geometry(x0: Array, x1: Array) -> Geometry:
    """One pass over the pairs, [N, *dims] each, in blocks: no copy of them is made."""
    count = len(x0)
    x0, x1 = x0.reshape(count, -1), x1.reshape(count, -1)
    center0, center1 = jnp.mean(x0, 0), jnp.mean(x1, 0)
    rows = min(count, max(1, GEOMETRY_ELEMENTS // x0.shape[1]))

    def fill(k: int, sums: Array) -> Array:
        start = jnp.minimum(k * rows, count - rows)
        a, b = (jax.lax.dynamic_slice_in_dim(x, start, rows) for x in (x0, x1))
        y, z = a - center0, b - center1
        block = jnp.stack([jnp.sum(u * v, 1) for u, v in ((y, y), (z, z), (y, z), (a, a), (b, b))])
        return jax.lax.dynamic_update_slice_in_dim(sums, block, start, 1)

    sums = jax.lax.fori_loop(0, -(-count // rows), fill, jnp.zeros((5, count), x0.dtype))
    norm0, norm1 = jnp.sqrt(sums[3]), jnp.sqrt(sums[4])
    root = x0.shape[1] ** 0.5
    typical0, typical1 = jnp.median(norm0) / root, jnp.median(norm1) / root
    return Geometry(center0, center1, sums[0], sums[1], sums[2], norm0, norm1, typical0, typical1)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["pairs", "geometry", "weights", "interpolant"],
    meta_fields=["chunk"],
)
@dataclass(frozen=True, eq=False)
class PairSet:
    """What a field of a finite set of pairs carries; a pytree, `chunk` is static.

    `pairs` [N, *dims] of one dtype, at least float32; `weights` [N], positive or 0, or None for equal ones.
    """

    pairs: Pair
    geometry: Geometry
    weights: Array | None
    interpolant: Interpolant
    chunk: int


class Instant(NamedTuple):
    """The interpolant at one time: coefficients, 2 gamma^2 (1 where noiseless), and (gamma' / gamma, 0 there)."""

    alpha: Array
    beta: Array
    alpha_rate: Array
    beta_rate: Array
    spread: Array
    pull: Array
    noiseless: Array


def instant(data: PairSet, t: Array) -> Instant:
    """gamma counts as 0 below the rounding error of x_t, one epsilon of the typical coordinate: sin(pi)^2 is not 0."""
    c = data.interpolant.coefficients(t)
    size = jnp.abs(c.alpha) * data.geometry.typical0 + jnp.abs(c.beta) * data.geometry.typical1
    # gamma^2 must not underflow either.
    smallest = float(jnp.finfo(t.dtype).tiny) ** 0.5
    noiseless = jax.lax.stop_gradient(jnp.abs(c.gamma) <= jnp.maximum(jnp.finfo(t.dtype).eps * size, smallest))
    variance = jnp.where(noiseless, 1, c.gamma) ** 2
    # Not c.gamma_rate / c.gamma: gamma gamma' is finite at the ends of a bridge, and accurate beside them.
    pull = jnp.where(noiseless, 0, data.interpolant.noise_drift(t)) / variance
    return Instant(c.alpha, c.beta, c.alpha_rate, c.beta_rate, 2 * variance, pull, noiseless)
