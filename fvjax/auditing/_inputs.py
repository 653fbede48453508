"""What an audit is given, checked before anything heavy runs: pairs that are read in chunks, a field of any kind."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax.types import Array, Key, Pair, Params, Scalar, VelocityField

CHUNK_ROWS, CHUNK_ELEMENTS = 8192, 2**22
"""Bounds on the rows, and on the numbers, that are read at once: 16 MiB in float32."""

CHECKED_ELEMENTS = 2**24
"""Arrays up to this size are searched for nan before anything runs; larger ones as they are read."""


class Rows:
    """[n, *dims] of anything with shape, dtype and row slicing, read a chunk at a time in one floating dtype."""

    def __init__(self, name: str, source: Any, dtype: np.dtype) -> None:
        self.name, self.dtype = name, dtype
        # An array of JAX would compile a slice for every place.
        self._source = np.asarray(source) if isinstance(source, jax.Array) else source
        self.shape = tuple(int(size) for size in source.shape)
        self.dim = math.prod(self.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def chunk(self) -> int:
        """Rows that are read at once: it depends on the shape alone."""
        return max(1, min(len(self), CHUNK_ROWS, CHUNK_ELEMENTS // max(1, self.dim)))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop, [stop - start, *dims]."""
        return self._checked(self._source[start:stop], f"{start} to {stop - 1}")

    def take(self, index: np.ndarray) -> np.ndarray:
        """The rows of `index` [m], in any order and with repetitions; each is read once, in ascending order."""
        once, places = np.unique(index, return_inverse=True)
        if len(once) == len(self):
            return self.read(0, len(self))[places]
        return self._checked(self._source[once], "that were drawn")[places]

    def check_all(self) -> None:
        """Refuses a small array with a nan in it."""
        if len(self) * self.dim <= CHECKED_ELEMENTS:
            self.read(0, len(self))

    def _checked(self, rows: Any, which: str) -> np.ndarray:
        array = np.asarray(rows).astype(self.dtype, copy=False)
        if not np.all(np.isfinite(array)):
            bad = np.count_nonzero(~np.isfinite(array).reshape(len(array), -1).all(1))
            raise ValueError(f"{self.name} must be finite, got {bad} rows with nan or infinity among rows {which}")
        return array


@dataclass(frozen=True)
class Given:
    """Checked inputs. `held_out` is a pair of Rows, or sources only (then `held_out_targets` is None), or nothing."""

    x0: Rows
    x1: Rows
    held_out_sources: Rows | None
    held_out_targets: Rows | None
    ot_targets: Rows | None

    @property
    def dims(self) -> tuple[int, ...]:
        return self.x0.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        return self.x0.dtype

    @property
    def kind(self) -> str:
        """What was held out: "pairs", "sources" or "none"."""
        if self.held_out_sources is None:
            return "none"
        return "sources" if self.held_out_targets is None else "pairs"

    def chunks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(start, x0, x1) of every chunk of the pairs."""
        for start in range(0, len(self.x0), self.x0.chunk):
            stop = min(start + self.x0.chunk, len(self.x0))
            yield start, self.x0.read(start, stop), self.x1.read(start, stop)


def checked_inputs(pairs: Any, held_out: Any, ot_targets: Any) -> Given:
    """Shapes, dtypes and, of small arrays, values."""
    x0, x1 = _two("pairs", pairs)
    sources, targets = _held_out(held_out)
    arrays = {"pairs.x0": x0, "pairs.x1": x1}
    if sources is not None:
        arrays["held_out" if targets is None else "held_out.x0"] = sources
    if targets is not None:
        arrays["held_out.x1"] = targets
    if ot_targets is not None:
        arrays["ot_targets"] = ot_targets
    for name, value in arrays.items():
        _check_array(name, value)
    dims = tuple(x0.shape[1:])
    if tuple(x0.shape) != tuple(x1.shape):
        raise ValueError(f"pairs.x0 and pairs.x1 must have the same shape, got {tuple(x0.shape)} and {tuple(x1.shape)}")
    if x0.shape[0] < 2:
        raise ValueError(f"pairs must be at least two (one has no other target), got {x0.shape[0]}")
    if math.prod(dims) == 0:
        raise ValueError(f"pairs must have at least one dimension, got arrays of shape {tuple(x0.shape)}")
    for name, value in arrays.items():
        if tuple(value.shape[1:]) != dims:
            raise ValueError(f"{name} must hold examples of the shape {dims} of the pairs, got {tuple(value.shape)}")
        if value.shape[0] < 1:
            raise ValueError(f"{name} must hold at least one example, got shape {tuple(value.shape)}")
    if targets is not None and tuple(targets.shape) != tuple(sources.shape):
        raise ValueError(
            f"held_out.x0 and held_out.x1 must have the same shape, got {tuple(sources.shape)} and"
            f" {tuple(targets.shape)}"
        )
    if ot_targets is not None and ot_targets.shape[0] != x0.shape[0]:
        raise ValueError(
            f"ot_targets must have the shape of pairs.x1, {tuple(x1.shape)}, got {tuple(ot_targets.shape)}"
        )
    dtype = _state_dtype(x0, x1)
    rows = {name: Rows(name, value, dtype) for name, value in arrays.items()}
    for each in rows.values():
        each.check_all()
    return Given(
        rows["pairs.x0"],
        rows["pairs.x1"],
        rows.get("held_out.x0", rows.get("held_out")),
        rows.get("held_out.x1"),
        rows.get("ot_targets"),
    )


def _two(name: str, value: Any) -> tuple[Any, Any]:
    if isinstance(value, tuple | list) and len(value) == 2:
        return value[0], value[1]
    raise ValueError(f"{name} must be a Pair(x0, x1) of two arrays, got {type(value).__name__}")


def _held_out(value: Any) -> tuple[Any, Any]:
    if value is None:
        return None, None
    if isinstance(value, tuple | list):
        return _two("held_out", value)
    return value, None


def _check_array(name: str, value: Any) -> None:
    if not (hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "__getitem__")):
        raise ValueError(f"{name} must be an array with shape, dtype and rows, got {type(value).__name__}")
    if len(value.shape) < 2:
        raise ValueError(
            f"{name} must have shape [n, *dims], one axis of examples and one of dimensions at least,"
            f" got {tuple(value.shape)}"
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, got {value.dtype}")


def _state_dtype(*arrays: Any) -> np.dtype:
    """What JAX would hold these in, at least float32: no solver works in half precision."""
    held = [jax.dtypes.canonicalize_dtype(array.dtype) for array in arrays]
    return np.dtype(np.result_type(np.float32, *(dtype for dtype in held if dtype.itemsize >= 4)))


def check_key(key: Any) -> None:
    """Refuses anything but one typed key."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    if not typed:
        got = f"{key.dtype}{list(key.shape)}" if hasattr(key, "shape") and hasattr(key, "dtype") else repr(key)
        raise ValueError(f"key must be one typed PRNG key, jax.random.key(seed), got {got}")


def host_generator(key: Key) -> np.random.Generator:
    """Randomness on the host, a function of the key: choices among millions of rows need no permutation of them."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).astype(np.uint32).tolist())


def chosen_rows(key: Key, n: int, count: int) -> np.ndarray:
    """`count` different rows out of n, ascending; all of them if there are no more."""
    if count >= n:
        return np.arange(n)
    return np.sort(host_generator(key).choice(n, count, replace=False, shuffle=False))


@dataclass(frozen=True)
class Skeleton:
    """What of a field and its params is no array: their structure, and every other leaf in its place (None: array)."""

    structure: Any
    rest: tuple[Any, ...]


@partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["skeleton"])
@dataclass(frozen=True, eq=False)
class Field:
    """A field and its params as one pytree: arrays are its leaves, everything else (functions, sizes) is static.

    So a compiled program takes every array as an argument, wherever the field keeps it, and two audits of the same
    field compile once. Velocities come back in the dtype of x.
    """

    arrays: tuple[Any, ...]
    skeleton: Skeleton

    @classmethod
    def of(cls, field: VelocityField, params: Params) -> "Field":
        """The two in one."""
        leaves, structure = jax.tree.flatten((field, params))
        rest = tuple(None if is_array(leaf) else leaf for leaf in leaves)
        return cls(tuple(leaf for leaf in leaves if is_array(leaf)), Skeleton(structure, rest))

    def parts(self) -> tuple[VelocityField, Params]:
        """The field and its params again."""
        given = iter(self.arrays)
        leaves = [next(given) if leaf is None else leaf for leaf in self.skeleton.rest]
        field, params = jax.tree.unflatten(self.skeleton.structure, leaves)
        return field, params

    def __call__(self, t: Scalar, x: Array) -> Array:
        """The velocity of ONE example."""
        field, params = self.parts()
        return field(params, t, x).astype(x.dtype)


def is_array(leaf: Any) -> bool:
    """Whether a leaf of a pytree is an array (a number is not: it is part of the structure)."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def check_field(field: Field, dims: tuple[int, ...], dtype: np.dtype) -> None:
    """Refuses what is not callable or does not map one example to its like, by abstract evaluation."""
    if not callable(field.parts()[0]):
        raise ValueError(f"field must be callable as field(params, t, x), got {type(field.parts()[0]).__name__}")
    x = jax.ShapeDtypeStruct(dims, dtype)
    out = jax.eval_shape(_raw_velocity, field, jax.ShapeDtypeStruct((), dtype), x)
    found = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(out)]
    if len(found) != 1 or found[0][0] != dims or not jnp.issubdtype(found[0][1], jnp.floating):
        got = " and ".join(f"{kind.name}{list(shape)}" for shape, kind in found) or "nothing"
        raise ValueError(
            f"field(params, t, x) must give a floating-point velocity of the shape {list(dims)} of ONE example, got"
            f" {got}; fvjax vmaps it over a batch itself"
        )


def _raw_velocity(field: Field, t: Array, x: Array) -> Any:
    function, params = field.parts()
    return function(params, t, x)


def as_pair(x0: np.ndarray, x1: np.ndarray) -> Pair:
    """A Pair on the device."""
    return Pair(jnp.asarray(x0), jnp.asarray(x1))


def check_numbers(**values: Any) -> None:
    """Refuses anything but integers >= 1."""
    for name, value in values.items():
        _validate.positive_integer(name, value)
