"""A state as named host arrays, and back, bit for bit."""

import zlib
from collections.abc import Mapping
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

SHOWN = 8
"""How many leaves an error names."""


class StateMismatchError(ValueError):
    """A checkpoint holds another tree, other shapes or other dtypes than the state that is asked for."""


class Spec(TypedDict):
    """What a leaf is. A typed key has its own dtype, such as "key<fry>", and a Python number the name of its type."""

    shape: list[int]
    dtype: str


def named_leaves(state: Any) -> dict[str, Any]:
    """Leaves by the expression that reaches them, such as "state.params['w']"; these are unique."""
    return {f"state{jax.tree_util.keystr(path)}": leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def spec(name: str, leaf: Any) -> Spec:
    """Shape and dtype of an array, a typed key, a Python number or a `jax.ShapeDtypeStruct`.

    Raises:
        ValueError: if the leaf is none of these.
    """
    if isinstance(leaf, bool | int | float | complex) and not isinstance(leaf, np.generic):
        return {"shape": [], "dtype": type(leaf).__name__}
    if not hasattr(leaf, "dtype") or np.dtype(object) == leaf.dtype or str(leaf.dtype)[:2] in {"<U", "|S"}:
        raise ValueError(f"state must hold arrays, keys and numbers only, got {type(leaf).__name__} at {name}")
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def to_host(name: str, leaf: Any, buffer: np.ndarray | None) -> np.ndarray:
    """A copy of the leaf in host memory that shares nothing with it: in `buffer` if that fits.

    On the CPU `np.asarray(leaf)` is the memory of the device itself, which the next training step may be given. New
    memory costs several times the copy (page faults), hence the buffer.

    Raises:
        ValueError: if this process does not hold the whole array.
    """
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        raise ValueError(f"state must be whole on every process (replicated), got {leaf.sharding} at {name}")
    value = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
    if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
        return np.array(value, order="C")
    np.copyto(buffer, value)
    return buffer


def start_copies(leaves: Mapping[str, Any]) -> None:
    """Lets all transfers from an accelerator run at once."""
    for leaf in leaves.values():
        if isinstance(leaf, jax.Array) and not _is_key(leaf) and leaf.is_fully_addressable:
            leaf.copy_to_host_async()


def digest(array: np.ndarray) -> str:
    """CRC-32 of the bytes: finds every change within 32 consecutive bits, any other but one in 4e9; about 2 GB/s."""
    return f"{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data):08x}"


def compare(saved: Mapping[str, Spec], leaves: Mapping[str, Any]) -> None:
    """Refuses leaves that are not those of the checkpoint.

    Raises:
        StateMismatchError: naming up to `SHOWN` leaves.
    """
    wanted = {name: spec(name, leaf) for name, leaf in leaves.items()}
    found = []
    for name in sorted({*saved, *wanted}):
        old, new = (_show(specs.get(name)) for specs in (saved, wanted))
        if old != new:
            found.append(f"{name}: {old} -> {new}")
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise StateMismatchError(
            f"like must have the leaves of the checkpoint, got {len(found)} that differ (checkpoint -> like): "
            + "; ".join(found[:SHOWN])
            + more
        )


def _show(found: Spec | None) -> str:
    return "(absent)" if found is None else f"{found['dtype']}{found['shape']}"


def from_host(value: np.ndarray, like: Any, key_impl: str | None) -> Any:
    """The leaf that `like` describes, of its type and on its devices, with the bits of `value`.

    ====================  ===============================================================================
    jax.Array             of the same sharding; uncommitted and weakly typed (0-d only) where `like` is
    jax.ShapeDtypeStruct  of its sharding if it has one, else on the default device
    typed key             of the implementation that was saved
    numpy array, scalar   the same
    Python number         the same
    ====================  ===============================================================================
    """
    if isinstance(like, np.generic):
        return value[()]
    if isinstance(like, np.ndarray):
        return value
    if isinstance(like, bool | int | float | complex):
        return type(like)(value.item())
    if key_impl is not None:
        data = jax.random.key_data(like) if isinstance(like, jax.Array) else None
        return jax.random.wrap_key_data(_place(value, data), impl=key_impl)
    return _place(value, like)


def _place(value: np.ndarray, like: Any) -> jax.Array:
    sharding = getattr(like, "sharding", None)
    if sharding is not None and getattr(like, "committed", True):
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
    if getattr(like, "weak_type", False) and value.ndim == 0:
        weak = jnp.asarray(value.item())
        if weak.dtype == value.dtype:
            return weak
    return jnp.array(value)


def key_impl(leaf: Any) -> str | None:
    """Name of a typed key's implementation; None for other leaves."""
    return str(jax.random.key_impl(leaf)) if _is_key(leaf) else None
