"""What a monitor looks at, fixed when it is made: draws behind the variance, sources and targets of the flow."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax.interpolants import Interpolant, as_pytree, draw_path
from fvjax.types import Array, Key, Pair, PathSample


class Sources(NamedTuple):
    """Sources of the flow [m, *dims], training ones first, and targets [p, *dims]: theirs in order, then others."""

    x0: Array
    targets: Array


def check_pairs(name: str, pairs: Any) -> int:
    """The number of pairs of anything with shape, dtype and rows; refuses what is no set of pairs."""
    if not isinstance(pairs, tuple) or len(pairs) != 2 or not all(hasattr(x, "shape") for x in pairs):
        raise ValueError(f"{name} must be a Pair of arrays, got {type(pairs).__name__}")
    x0, x1 = pairs
    if tuple(x0.shape) != tuple(x1.shape):
        raise ValueError(f"{name} must be arrays of one shape, got {tuple(x0.shape)} and {tuple(x1.shape)}")
    for side, x in (("x0", x0), ("x1", x1)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}.{side} must be floating point, got {x.dtype}")
    if len(x0.shape) < 2 or not x0.shape[0]:
        raise ValueError(f"{name} must hold at least one pair [n, *dims], got shape {tuple(x0.shape)}")
    return int(x0.shape[0])


def spread_rows(key: Key, n: int, count: int) -> np.ndarray:
    """`count` different rows among n, ascending, one from each of as many stretches; all n if there are no more."""
    count = min(count, n)
    edges = np.arange(count + 1) * n // count
    places = np.asarray(jax.random.uniform(key, (count,)), np.float64)
    return edges[:-1] + np.floor(places * np.diff(edges)).astype(np.int64)


def rows_of(array: Any, index: np.ndarray) -> np.ndarray:
    """The rows `index` of an array, only those read; one at a time where it is no array of numpy or JAX."""
    if isinstance(array, np.ndarray | jax.Array):
        return np.asarray(array[index])
    once, places = np.unique(index, return_inverse=True)  # ascending and once, as files want it
    return np.concatenate([np.asarray(array[int(i) : int(i) + 1]) for i in once])[places]


def taken(pairs: Pair, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those pairs as host arrays in the dtype that JAX computes with."""
    x0, x1 = (rows_of(x, index) for x in pairs)
    dtype = jax.dtypes.canonicalize_dtype(x0.dtype)
    return x0.astype(dtype), x1.astype(dtype)


def draw_probe(key: Key, pairs: Pair, interpolant: Interpolant, *, draws: int, bins: int) -> tuple[PathSample, ...]:
    """As many draws in each of `bins` equal intervals of time, pairs drawn with replacement: one batch a bin."""
    row_key, time_key, path_key = jax.random.split(key, 3)
    index = np.asarray(jax.random.randint(row_key, (draws,), 0, pairs.x0.shape[0]))
    chosen = Pair(*map(jnp.asarray, taken(pairs, index)))
    places = jax.random.uniform(time_key, (draws,), chosen.x0.dtype)
    paths = _draw(path_key, chosen, as_pytree(interpolant), places, bins)
    cut = jax.tree.map(lambda x: x.reshape(bins, -1, *x.shape[1:]), paths)
    return tuple(jax.tree.map(lambda x, k=k: x[k], cut) for k in range(bins))


@jax.jit
def _draw(key: Key, pairs: Pair, interpolant: Interpolant, places: Array, bins: Array) -> PathSample:  # noqa: PLR0917
    n, dtype = len(places), places.dtype
    index = jnp.arange(n)
    start, end = (jnp.asarray(time, dtype) for time in interpolant.time_range)
    fraction = ((index // (n // bins)).astype(dtype) + places) / jnp.asarray(bins, dtype)
    times = start + (end - start) * fraction
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    return jax.vmap(lambda k, pair, t: draw_path(k, pair, interpolant, t=t))(keys, pairs, times)


def draw_sources(key: Key, pairs: Pair, held_out: Pair | None, *, sources: int, targets: int) -> tuple[Sources, int]:
    """Training and held-out sources, and the targets of both beside further training targets; the number of the first.

    Both kinds are compared with the same targets, so that neither is the easier to be returned.
    """
    train_key, held_out_key, target_key = jax.random.split(key, 3)
    n = pairs.x0.shape[0]
    x0, x1 = taken(pairs, spread_rows(train_key, n, sources))
    count, own = len(x0), [x1]
    if held_out is not None:
        others = taken(held_out, spread_rows(held_out_key, held_out.x0.shape[0], sources))
        x0 = np.concatenate([x0, others[0].astype(x0.dtype)])
        own.append(others[1].astype(x1.dtype))
    rivals = rows_of(pairs.x1, spread_rows(target_key, n, targets)).astype(x1.dtype)
    together = np.concatenate([*own, rivals])
    for name, array in (("sources", x0), ("targets", together)):
        _validate.finite(name, array)
    return Sources(jnp.asarray(x0), jnp.asarray(together)), count
