"""What the sources share: a checked dtype, maps over many examples in bounded memory, draws without replacement."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from fvjax import _validate
from fvjax.types import Array, Key

_CHUNK = 1024  # examples that are mapped at once

_Result = TypeVar("_Result")


def floating_dtype(dtype: Any) -> np.dtype:
    """`dtype` as numpy's, if it is float32 or, where JAX's x64 is enabled, float64."""
    enabled = jax.numpy.result_type(float) == np.float64
    allowed = [np.dtype(name) for name in ("float32", "float64")[: 1 + enabled]]
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found not in allowed:
        rule = " or ".join(map(str, allowed)) + ("" if enabled else " (float64 needs JAX's x64 mode)")
        raise ValueError(f"dtype must be {rule}, got {dtype if found is None else found}")
    return found


def in_chunks(function: Callable[[Array], _Result], x: Any) -> _Result:
    """`jax.vmap(function)(x)`, in chunks, so that what is computed on the way never takes more than a chunk's room."""
    result: _Result = jax.lax.map(function, x, batch_size=_CHUNK)
    return result


def without_replacement(key: Key, n: int, size: int) -> np.ndarray:
    """N different indices in [0, size), in random order, int[n]; the first of them do not depend on n.

    Raises:
        ValueError: if n is not an integer from 1 to `size`.
    """
    _validate.positive_integer("n", n)
    if n > size:
        raise ValueError(f"n must be at most {size}, the number of pairs in the set, got {n}")
    return np.argsort(_words(key, size), kind="stable")[:n]


def integers(key: Key, shape: tuple[int, ...], size: int) -> np.ndarray:
    """Independent indices in [0, size), int[shape]."""
    return (_words(key, math.prod(shape)) % np.uint64(size)).astype(int).reshape(shape)


def _words(key: Key, count: int) -> np.ndarray:
    """Random 64-bit words, a function of the key, by numpy: on the host nothing must be compiled for every shape.

    numpy promises to keep these raw streams (NEP 19).
    """
    seed = np.random.SeedSequence(np.asarray(jax.random.key_data(key)).ravel().tolist())
    words: np.ndarray = np.random.PCG64(seed).random_raw(count)
    return words
