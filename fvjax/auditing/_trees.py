"""Pytrees of arrays as one npz file: every leaf under the path that leads to it, bit for bit, in any dtype.

    dense/kernel.npy   dense/bias.npy   ...   __structure__.npy

Nested dicts of numpy's own dtypes need no structure: their files are those of `fvjax.nets.convert.save_params`, and
numpy reads them. The structure names lists, tuples, named tuples, empty containers, None, and dtypes such as bfloat16.
"""

import json
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

STRUCTURE = "__structure__"
"""Name of the entry with the structure as JSON, a numpy string."""

_UNREADABLE = (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile, zlib.error)


def write_tree(path: Path, tree: Any) -> None:
    """Writes a pytree of arrays as npz, whole or not at all.

    ==================================  ===========================================================
    dicts (keys: strings or integers),  come back as they are
    lists, tuples, None
    named tuples                        come back where the module of their class has been imported
    Python numbers                      come back as arrays of shape []
    other containers, typed PRNG keys   ValueError
    ==================================  ===========================================================

    Args:
        path: of the file, replaced if it exists.
        tree: arrays of JAX or numpy, of any dtype but objects and typed keys.

    Raises:
        ValueError: if the tree holds something else.
        OSError: if the file cannot be written.
    """
    from fvjax.nets.convert import write_arrays

    arrays: dict[str, np.ndarray] = {}
    structure = _described(tree, (), arrays)
    if not _is_plain(tree):
        arrays[STRUCTURE] = np.array(json.dumps(structure))
    write_arrays(path, arrays)


def _is_plain(tree: Any) -> bool:
    """Whether names of leaves say it all: non-empty dicts of arrays, keys without "/", dtypes of numpy's files."""
    if type(tree) is dict:
        keys = all(isinstance(key, str) and key and "/" not in key and key != STRUCTURE for key in tree)
        return bool(tree) and keys and all(_is_inside(item) for item in tree.values())
    return False


def _is_inside(item: Any) -> bool:
    return (
        _is_plain(item) if isinstance(item, dict) else hasattr(item, "dtype") and np.dtype(item.dtype).kind in "fiubc"
    )


def _described(node: Any, path: tuple[str, ...], arrays: dict[str, np.ndarray]) -> Any:
    """The structure of `node` as JSON; its leaves go into `arrays`."""
    if node is None:
        return None
    if type(node) is dict:
        if not all(isinstance(key, str) or type(key) is int for key in node):
            raise ValueError(f"keys of params must be strings or integers, got {list(node)} at {_where(path)}")
        return {"dict": [[key, _described(item, (*path, str(key)), arrays)] for key, item in node.items()]}
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        kind = f"{type(node).__module__}:{type(node).__qualname__}"
        items = [_described(item, (*path, name), arrays) for name, item in zip(node._fields, node, strict=True)]
        return {"named": kind, "items": items}
    if type(node) in (list, tuple):
        return {type(node).__name__: [_described(item, (*path, str(i)), arrays) for i, item in enumerate(node)]}
    return _described_leaf(node, path, arrays)


def _described_leaf(leaf: Any, path: tuple[str, ...], arrays: dict[str, np.ndarray]) -> dict[str, str]:
    number = isinstance(leaf, bool | int | float | complex)
    is_key = hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    if is_key or not (number or hasattr(leaf, "dtype")) or np.asarray(leaf).dtype.kind in "OUS":
        raise ValueError(
            "params must be dicts, lists, tuples or named tuples of arrays (fvjax.nets.from_equinox and from_nnx make"
            f" them so), got {type(leaf).__name__} at {_where(path)}"
        )
    array = np.asarray(leaf)
    name = "/".join(part.replace("/", "_") for part in path) or "params"
    while name in arrays or name == STRUCTURE:
        name += "_"
    if array.dtype.kind in "fiubc":
        arrays[name] = array
    else:  # bfloat16 and its like, which numpy's format does not know
        arrays[name] = np.frombuffer(array.tobytes(), np.uint8).reshape(*array.shape, array.dtype.itemsize)
    return {"array": name, "dtype": str(array.dtype)}


def _where(path: tuple[str, ...]) -> str:
    return "/".join(path) or "the top"


def read_tree(path: Path, *, mapped: bool = False) -> Any:
    """Reads what `write_tree`, `fvjax.nets.convert.save_params` or `np.savez` wrote.

    Args:
        path: of the npz file.
        mapped: whether arrays stay on disk and are read as they are sliced (`np.memmap`), where the file is not
            compressed; for pairs that do not fit into memory.

    Returns:
        The tree, with numpy arrays; nested dicts by "/" where the file holds no structure.

    Raises:
        ValueError: if it is no npz file of arrays, in one line.
    """
    try:
        arrays = _mapped(path) if mapped else dict(_loaded(path))
        if STRUCTURE not in arrays:
            return _nested(arrays)
        return _rebuilt(json.loads(str(arrays[STRUCTURE][()])), arrays)
    except FileNotFoundError as error:
        raise ValueError(f"{path} must be an npz file, got no file of that name") from error
    except _UNREADABLE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} must be an npz file of arrays ({reason})") from error


def _loaded(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            yield info.filename.removesuffix(".npy"), _entry(archive, info)


def _entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """As `_loaded`, with stored entries as views of the file."""
    arrays = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            stream.seek(info.header_offset)
            header = stream.read(30)  # of the entry, before its name and its extra field
            stream.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), 1)
            layout = _layout(stream) if info.compress_type == zipfile.ZIP_STORED else None
            if layout is None or name == STRUCTURE:
                arrays[name] = _entry(archive, info)
                continue
            shape, fortran, dtype = layout
            order = "F" if fortran else "C"
            arrays[name] = np.memmap(path, dtype, "r", offset=stream.tell(), shape=shape, order=order)  # type: ignore[call-overload]
    return arrays


def _layout(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype] | None:
    """Shape, order and dtype of the array that begins here, if it can be mapped."""
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        return None
    shape, fortran, dtype = read(stream)
    return None if dtype.hasobject or 0 in shape or not shape else (shape, fortran, dtype)


def _nested(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        node = tree
        *parents, last = name.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name} is an array and holds others")
        node[last] = array
    return tree


def _rebuilt(node: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if node is None:
        return None
    if "array" in node:
        array, dtype = arrays[node["array"]], jax.numpy.dtype(node["dtype"])
        return array if array.dtype == dtype else array.view(dtype)[..., 0]
    if "dict" in node:
        return {key: _rebuilt(item, arrays) for key, item in node["dict"]}
    if "named" in node:
        return _named_tuple(node["named"])(*(_rebuilt(item, arrays) for item in node["items"]))
    ((kind, items),) = node.items()
    return {"list": list, "tuple": tuple}[kind](_rebuilt(item, arrays) for item in items)


def _named_tuple(name: str) -> Any:
    """A class of named tuples, of a module that is already imported: a file must not be able to run code."""
    module, _, qualified = name.partition(":")
    kind: Any = sys.modules.get(module)
    for part in qualified.split("."):
        kind = getattr(kind, part, None)
    if not (isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")):
        raise ValueError(f"it holds a {name}, which is no named tuple of an imported module")
    return kind
