"""Checks at the public boundary: on the host, on concrete values only, one `ValueError` each (name, rule, value).

Traced values pass unchecked, so that every public function stays usable under `jit` and `vmap`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


def is_concrete(*values: Any) -> bool:
    """Whether no leaf of `values` is a tracer, i.e. whether their numbers can be looked at."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def nonnegative(name: str, value: Any) -> None:
    """Refuses a concrete `value` with an entry that is negative or not finite."""
    if is_concrete(value):
        array = np.asarray(value)
        if not np.all((array >= 0) & np.isfinite(array)):
            raise ValueError(f"{name} must be >= 0 and finite, got {value}")


def positive_integer(name: str, value: Any) -> None:
    """Refuses anything but an integer >= 1 (a bool is not an integer here)."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def one_of(name: str, value: Any, options: Sequence[str]) -> None:
    """Refuses a `value` that is not among `options`."""
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")


def square(name: str, matrix: Any) -> None:
    """Refuses anything but a square matrix, [d, d]."""
    shape = np.shape(matrix)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"{name} must be a square matrix, got shape {shape}")


def _precision(array: np.ndarray) -> Any:
    """Machine limits of the array's own dtype (bfloat16 is floating for JAX, not for numpy), float64's of integers."""
    return jax.numpy.finfo(array.dtype if jax.numpy.issubdtype(array.dtype, jax.numpy.floating) else np.float64)


def covariance(name: str, matrix: Any) -> None:
    """Refuses a matrix that is not square, and a concrete one that is not symmetric positive semi-definite.

    Rounding is forgiven: asymmetry and negative eigenvalues up to 1e3 machine epsilons of the largest entry.
    """
    square(name, matrix)
    if not is_concrete(matrix):
        return
    array = np.asarray(matrix)
    limits = _precision(array)
    array = array.astype(float)
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{name} must be finite, got {matrix}")
    slack = 1e3 * float(limits.eps) * max(np.abs(array).max(initial=0.0), float(limits.tiny))
    asymmetry = np.abs(array - array.T).max(initial=0.0)
    if asymmetry > slack:
        raise ValueError(f"{name} must be symmetric, got a largest |S - S^T| of {asymmetry:.3g}")
    smallest = np.linalg.eigvalsh(array).min(initial=0.0)
    if smallest < -slack * len(array):
        raise ValueError(f"{name} must be positive semi-definite, got a smallest eigenvalue of {smallest:.3g}")


def shape(name: str, value: Any, expected: tuple[int, ...]) -> None:
    """Refuses a `value` whose shape is not `expected`."""
    if np.shape(value) != expected:
        raise ValueError(f"{name} must have shape {expected}, got {np.shape(value)}")


def same_shape(first: str, x: Any, second: str, y: Any) -> None:
    """Refuses two arrays of different shapes."""
    if np.shape(x) != np.shape(y):
        raise ValueError(f"{first} and {second} must have the same shape, got {np.shape(x)} and {np.shape(y)}")


def batch(name: str, tree: Any) -> int:
    """Returns the common leading length n of all leaves of `tree`; refuses leaves that have none or disagree."""
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(f"{name} must have one common leading axis, got leading axes {sorted(lengths)}")
    return int(lengths.pop()[0])


def interval(name: str, value: Any, low: float, high: float) -> None:
    """Refuses anything but two numbers with, if they are concrete, low <= value[0] < value[1] <= high."""
    is_pair = isinstance(value, tuple | list) and len(value) == 2
    if not is_pair or (is_concrete(value) and not low <= value[0] < value[1] <= high):
        raise ValueError(f"{name} must be a pair with {low} <= start < end <= {high}, got {value}")


def on_one_device(name: str, tree: Any) -> None:
    """Refuses concrete arrays that are split over devices.

    `vmap(grad)` of a convolution over such an array returns zeros for every example that is not on the first device
    (measured with jax 0.10.2). Inside `pmap` each device sees its own part, and everything is right. Inside `jit` a
    traced array does not tell how it is split, so it passes.
    """
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and is_concrete(leaf) and not leaf.sharding.is_fully_replicated:
            raise ValueError(
                f"{name} must lie on one device (per-example gradients of auto-sharded arrays are wrong; use jax.pmap),"
                f" got {leaf.sharding}"
            )


def orthogonal(name: str, matrix: Any) -> None:
    """Refuses a matrix that is not square, and a concrete one with |Q Q^T - I| above 1e3 machine epsilons."""
    square(name, matrix)
    if not is_concrete(matrix):
        return
    array = np.asarray(matrix)
    epsilon = float(_precision(array).eps)
    error = np.abs(array.astype(float) @ array.astype(float).T - np.eye(len(array))).max(initial=0.0)
    if not error <= 1e3 * epsilon:
        raise ValueError(f"{name} must be orthogonal, got a largest |Q Q^T - I| of {error:.3g}")


def positive(name: str, value: Any) -> None:
    """Refuses a concrete `value` with an entry that is not above 0, or not finite."""
    if is_concrete(value):
        array = np.asarray(value)
        if not np.all((array > 0) & np.isfinite(array)):
            raise ValueError(f"{name} must be > 0 and finite, got {value}")


def finite(name: str, value: Any) -> None:
    """Refuses a concrete `value` with an entry that is nan or infinite; of an array the message gives their number."""
    if is_concrete(value):
        bad = np.count_nonzero(~np.isfinite(np.asarray(value)))
        if bad:
            found = value if np.ndim(value) == 0 else f"{bad} of {np.size(value)} entries that are not"
            raise ValueError(f"{name} must be finite, got {found}")


def common_dtype(*arrays: Any) -> np.dtype:
    """The widest floating dtype among `arrays` as JAX would hold them; JAX's default float if all are integers.

    At least float32: there is no linear algebra in half precision.
    """
    dtypes = {jax.numpy.asarray(x).dtype for x in arrays}
    floats = [dtype for dtype in dtypes if jax.numpy.issubdtype(dtype, jax.numpy.floating)]
    return np.result_type(np.float32, *floats) if floats else np.dtype(jax.numpy.result_type(float))


def even_integer(name: str, value: Any) -> None:
    """Refuses anything but an even integer >= 2."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or value < 2 or value % 2:
        raise ValueError(f"{name} must be an even integer >= 2, got {value!r}")


def floating(name: str, value: Any) -> None:
    """Refuses an array that is not real floating point (with the dtype in the message), and what is no array."""
    if not hasattr(value, "dtype") and not isinstance(value, bool | int | float | complex | list | tuple):
        raise ValueError(
            f"{name} must be arrays only, got {type(value).__name__}; take a module apart first, as in"
            " params, rest = eqx.partition(module, eqx.is_inexact_array)"
        )
    if not jax.numpy.issubdtype(jax.numpy.result_type(value), jax.numpy.floating):
        raise ValueError(f"{name} must be floating point, got {jax.numpy.result_type(value)}")


def integers(name: str, value: Any) -> None:
    """Refuses an array that is not of an integer type (with the dtype in the message)."""
    if not jax.numpy.issubdtype(jax.numpy.result_type(value), jax.numpy.integer):
        raise ValueError(f"{name} must be integers, got {jax.numpy.result_type(value)}")


def same_dtype(first: str, x: Any, second: str, y: Any) -> None:
    """Refuses two arrays of different dtypes, as JAX would hold them."""
    found = [jax.numpy.result_type(value) for value in (x, y)]
    if found[0] != found[1]:
        raise ValueError(f"{first} and {second} must have the same dtype, got {found[0]} and {found[1]}")
