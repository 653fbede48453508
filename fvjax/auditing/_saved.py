"""A flow as a folder: what was trained, on which pairs, and how to call it, so that it can be audited later.

flow.json     field, its arguments, interpolant, solver
params.npz    parameters (none where the field brings its own)
pairs.npz     x0, x1; held_out/x0, held_out/x1 (or held_out alone: sources); ot_targets
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax.auditing._fields import check_field, find_field, make_interpolant
from fvjax.auditing._trees import read_tree, write_tree
from fvjax.interpolants import Interpolant
from fvjax.types import Array, Pair, Params, VelocityField

FORMAT = 1
"""Of flow.json; a reader refuses a newer one."""

FILES = {"flow.json", "params.npz", "pairs.npz"}
RESULTS = {"audit.json", "report.html"}
"""What `fvjax audit` leaves in the folder of a flow; removed when another flow is saved there."""


@dataclass(frozen=True)
class Flow:
    """A saved flow, ready to be audited.

    Attributes:
        field: (params, t, x) -> velocity of ONE example.
        params: its parameters; None where it has none of its own.
        pairs: what it was trained on, [N, *dims]; numpy arrays that stay on disk until they are sliced.
        held_out: pairs of the same coupling, or sources alone, or None.
        ot_targets: optimal targets of pairs.x0, [N, *dims], or None.
        interpolant: of the training.
        solver: of `fvjax.transport`.
        steps: of the solver; None for an adaptive one.
        config: field, arguments, interpolant, solver and steps as flow.json holds them.
    """

    field: VelocityField
    params: Params
    pairs: Pair
    held_out: Pair | Array | None
    ot_targets: Array | None
    interpolant: Interpolant
    solver: str
    steps: int | None
    config: Mapping[str, Any]


def save_flow(
    folder: str | Path,
    *,
    field: str,
    params: Params,
    pairs: Pair,
    interpolant: str | tuple[str, Mapping[str, float]] = "linear",
    held_out: Pair | Array | None = None,
    ot_targets: Array | None = None,
    arguments: Mapping[str, Any] | None = None,
    solver: str = "dopri5",
    steps: int | None = None,
) -> Path:
    """Writes a flow as a folder that `load_flow` and `fvjax audit` read; whole or not at all.

        fvjax.auditing.save_flow(
            "runs/mine/flows/last", field="fvjax.nets:mlp", arguments={"dims": 2}, params=params, pairs=pairs,
            interpolant=("constant_noise", {"sigma": 0.05}),
        )

    The field is found by its name and tried on one pair before anything is written. A flow that is there already is
    replaced, and its audit.json and report.html are removed with it.

    Args:
        folder: new, empty, or that of a saved flow.
        field: "module:function", the velocity field (params, t, x) itself; or with `arguments` a factory that returns
            one, a `Model`, or (one of them, params).
        params: pytree of arrays: dicts, lists, tuples, named tuples; None where the field needs none or brings its own.
        pairs: what it was trained on, x0 and x1, [N, *dims].
        interpolant: name of a factory of `fvjax.interpolants`, with its arguments if it has any.
        held_out: Pair of pairs that were not trained on, [M, *dims], or an array of sources alone.
        ot_targets: optimal targets of pairs.x0, [N, *dims].
        arguments: keyword arguments of the factory, JSON values; lists reach it as tuples. {} calls it without any.
        solver: of `fvjax.transport`, by which the flow is to be integrated.
        steps: fixed steps; None for an adaptive solver.

    Returns:
        The folder.

    Raises:
        ValueError: if the field cannot be found or called, arrays do not fit, or the folder holds anything else.
        OSError: if it cannot be written.
    """
    folder = Path(folder)
    name, options = (interpolant, {}) if isinstance(interpolant, str) else interpolant
    config = {
        "format": FORMAT,
        "field": field,
        "arguments": None if arguments is None else dict(arguments),
        "interpolant": [name, {key: float(value) for key, value in options.items()}],
        "solver": solver,
        "steps": steps,
    }
    try:
        text = json.dumps(config, indent=1) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"arguments must be JSON values, got {arguments} ({error})") from error
    _check_folder(folder)
    make_interpolant(name, options)
    checked_flow_arrays(pairs, held_out, ot_targets)
    found = find_field(field, arguments)
    check_field(found.field, found.params if params is None else params, pairs, init=found.init)
    arrays: dict[str, Any] = {"x0": np.asarray(pairs.x0), "x1": np.asarray(pairs.x1)}
    if held_out is not None:
        arrays["held_out"] = dict(held_out._asdict()) if isinstance(held_out, Pair) else held_out
    if ot_targets is not None:
        arrays["ot_targets"] = ot_targets
    partial, old = (folder.with_name(f".{folder.name}.{ending}") for ending in ("partial", "old"))
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_tree(partial / "pairs.npz", arrays)
        if params is not None:
            write_tree(partial / "params.npz", params)
        (partial / "flow.json").write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    finally:
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
    return folder


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        return
    other = (
        sorted(path.name for path in folder.iterdir() if path.name not in FILES | RESULTS) if folder.is_dir() else []
    )
    if not folder.is_dir() or other:
        found = f"{folder} with {other[0]}" if other else f"the file {folder}"
        raise ValueError(f"folder must be new, empty or that of a saved flow, got {found}")


def load_flow(folder: str | Path) -> Flow:
    """Reads what `save_flow` wrote; the module of the field must be importable.

    Args:
        folder: of the flow.

    Returns:
        Flow. Pairs are read from disk as they are sliced.

    Raises:
        ValueError: if it is no folder of a flow, a file in it is damaged, or the field cannot be found or called.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "flow.json").read_text(encoding="utf-8"))
        name, options = config["interpolant"]
        field, arguments, solver, steps = (config[key] for key in ("field", "arguments", "solver", "steps"))
        version = int(config["format"])
    except OSError as error:
        raise ValueError(f"folder must be one that save_flow wrote, got {folder} without flow.json") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder / 'flow.json'} must be as save_flow writes it, got a damaged file") from error
    if version > FORMAT:
        raise ValueError(f"{folder / 'flow.json'} must be of format {FORMAT} or older, got {version}: update fvjax")
    found = find_field(field, arguments)
    params = found.params
    if (folder / "params.npz").is_file():
        params = jax.tree.map(jnp.asarray, read_tree(folder / "params.npz"))
    arrays = read_tree(folder / "pairs.npz", mapped=True)
    if not {"x0", "x1"} <= set(arrays):
        raise ValueError(f"{folder / 'pairs.npz'} must hold x0 and x1, got {', '.join(arrays) or 'nothing'}")
    pairs, held_out = Pair(arrays["x0"], arrays["x1"]), arrays.get("held_out")
    if isinstance(held_out, Mapping):
        held_out = Pair(held_out["x0"], held_out["x1"])
    checked_flow_arrays(pairs, held_out, arrays.get("ot_targets"))
    check_field(found.field, params, pairs, init=found.init)
    interpolant = make_interpolant(name, options)
    return Flow(found.field, params, pairs, held_out, arrays.get("ot_targets"), interpolant, solver, steps, config)


def checked_flow_arrays(pairs: Pair, held_out: Pair | Array | None, ot_targets: Array | None) -> None:
    """Refuses pairs that are not floating point or not of one shape and dtype, and others that do not fit to them."""
    _validate.floating("x0", pairs.x0)
    _validate.same_shape("x0", pairs.x0, "x1", pairs.x1)
    _same_dtype("x0", pairs.x0, "x1", pairs.x1)
    if np.ndim(pairs.x0) < 2 or len(pairs.x0) < 1:
        raise ValueError(f"x0 and x1 must have shape [N, *dims] with N >= 1, got {np.shape(pairs.x0)}")
    other = {"ot_targets": ot_targets}
    if isinstance(held_out, Pair):
        other |= {"held_out.x0": held_out.x0, "held_out.x1": held_out.x1}
        _validate.same_shape("held_out.x0", held_out.x0, "held_out.x1", held_out.x1)
    else:
        other["held_out"] = held_out
    for name, array in other.items():
        if array is None:
            continue
        if np.shape(array)[1:] != np.shape(pairs.x0)[1:]:
            raise ValueError(f"{name} must hold examples of shape {np.shape(pairs.x0)[1:]}, got {np.shape(array)}")
        _same_dtype(name, array, "x0", pairs.x0)
    if ot_targets is not None:
        _validate.same_shape("ot_targets", ot_targets, "x0", pairs.x0)


def _same_dtype(first: str, x: Any, second: str, y: Any) -> None:
    """As files hold them: without x64 JAX would make float32 of float64 and see no difference."""
    if x.dtype != y.dtype:
        raise ValueError(f"{first} and {second} must have the same dtype, got {x.dtype} and {y.dtype}")
