"""Parameters in the files of others: npz, Flax's msgpack, checkpoints of orbax and of `fvjax.checkpoints`."""

import ast
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fvjax.auditing._fields import one_line
from fvjax.auditing._trees import read_tree
from fvjax.commands._text import InputError
from fvjax.types import Params

ITEMS = ("params", "default", "state")
"""Names under which an orbax CheckpointManager keeps a tree in the folder of a step."""


def load_params(path: Path, entry: str | None) -> Params:
    """Reads parameters.

    ==========================================  ====================================================================
    .npz                                        `save_flow`, `fvjax.nets.convert.save_params`, or `np.savez` with
                                                names such as dense/kernel
    .msgpack                                    `flax.serialization.to_bytes`
    folder with step_<number>/ or index.json    `fvjax.checkpoints`: the newest step
    any other folder                            orbax: the checkpoint, or the newest of a CheckpointManager
    ==========================================  ====================================================================

    Of a training state, which has `params` beside `opt_state` or `ema_params`, `ema_params` is taken, or else `params`.

    Args:
        path: of the file or folder.
        entry: what to take of it instead, names joined by "/".

    Returns:
        The pytree, as JAX arrays.

    Raises:
        InputError: if it cannot be read, or there is no such entry; one line.
    """
    if not path.exists():
        raise InputError(f"--params must be a file or a folder, got {path}, which does not exist")
    if path.is_dir():
        tree = _checkpoint(path)
    elif path.suffix == ".npz":
        tree = read_tree(path)
    elif path.suffix == ".msgpack":
        tree = _msgpack(path)
    else:
        raise InputError(f"--params must be .npz, .msgpack or the folder of a checkpoint, got {path}")
    return jax.tree.map(jnp.asarray, _entry(tree, entry, path))


def _entry(tree: Any, entry: str | None, path: Path) -> Any:
    if entry is None:
        is_state = isinstance(tree, Mapping) and "params" in tree and {"opt_state", "ema_params"} & set(tree)
        if not is_state:
            return tree
        return tree["params"] if tree.get("ema_params") is None else tree["ema_params"]
    for name in entry.split("/"):
        if not isinstance(tree, Mapping) or name not in tree:
            known = ", ".join(map(str, tree)) if isinstance(tree, Mapping) else "arrays"
            raise InputError(f"--params-entry must name a part of {path}, which has {known}, got {entry}")
        tree = tree[name]
    return tree


def _msgpack(path: Path) -> Any:
    from fvjax.nets.convert import load_msgpack

    return load_msgpack(path)


def _checkpoint(path: Path) -> Any:
    own = [path] if (path / "index.json").is_file() else sorted(path.glob("step_*[0-9]/index.json"))
    if own:
        return _own(own[-1] if own[-1].is_dir() else own[-1].parent)
    return _orbax(path)


def _own(path: Path) -> Any:
    """A checkpoint of `fvjax.checkpoints`: leaves by expressions such as state.params['dense']['kernel']."""
    from fvjax.checkpoints._disk import DamagedError, read, read_index

    try:
        arrays = read(path, read_index(path))
    except DamagedError as error:
        raise InputError(f"--params must be a checkpoint, got {path}, which is damaged: {error}") from error
    tree: dict[Any, Any] = {}
    for name, array in arrays.items():
        node, (*parents, last) = tree, _steps(ast.parse(name, mode="eval").body)
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return _with_lists(tree)


def _steps(node: ast.expr) -> list[str | int]:
    """The names and numbers on the way to a leaf: state.params['a'][0] -> params, a, 0."""
    if isinstance(node, ast.Attribute):
        return [*_steps(node.value), node.attr]
    if isinstance(node, ast.Subscript):
        return [*_steps(node.value), ast.literal_eval(node.slice)]
    return []


def _with_lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    items = {key: _with_lists(item) for key, item in node.items()}
    is_list = bool(items) and set(items) == set(range(len(items)))
    return [items[i] for i in range(len(items))] if is_list else items


def _orbax(path: Path) -> Any:
    import orbax.checkpoint as ocp

    found = path
    steps = [folder for folder in path.iterdir() if folder.is_dir() and folder.name.isdigit()]
    if steps:
        found = max(steps, key=lambda folder: int(folder.name))
    for item in ITEMS:
        if (found / item).is_dir() and not (found / "_METADATA").is_file():
            found = found / item
            break
    if not (found / "_METADATA").is_file():
        raise InputError(f"--params must be a checkpoint of orbax or fvjax.checkpoints, got {path}, which holds none")
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # orbax warns of every file that other ways of saving would have left
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            metadata = checkpointer.metadata(found.absolute())
            tree = getattr(metadata, "item_metadata", metadata)
            # As numpy arrays: the devices of the training may not be here.
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), getattr(tree, "tree", tree))
            return checkpointer.restore(found.absolute(), args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    except Exception as error:  # of orbax, TensorStore or the system: of many types
        raise InputError(f"--params must be a checkpoint of orbax, got {path}: {one_line(error)}") from error
    finally:
        log.setLevel(level)


def parsed_arguments(text: str | None) -> dict[str, Any] | None:
    """The keyword arguments of a factory from JSON.

    Raises:
        InputError: if it is no JSON object.
    """
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(
            f"--arguments must be a JSON object such as '{{\"dims\": 2}}', got {text} ({error})"
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"--arguments must be a JSON object such as '{{\"dims\": 2}}', got {text}")
    return found
