"""What `fvjax audit` and `fvjax variance` work on: saved flows, or a field, parameters and pairs given one by one."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from fvjax.auditing._fields import check_field, find_field, make_interpolant
from fvjax.auditing._saved import Flow, checked_flow_arrays, load_flow
from fvjax.auditing._trees import read_tree
from fvjax.commands._params import load_params, parsed_arguments
from fvjax.commands._text import InputError
from fvjax.types import Pair

Run = Annotated[
    tyro.conf.Positional[Path | None],
    tyro.conf.arg(metavar="RUN", help="folder of a saved flow, or of a run that has some in flows/"),
]
Interpolants = Literal[
    "linear", "constant_noise", "brownian_bridge", "smooth_bridge", "trigonometric", "gaussian_source", "bridge_drift"
]


@dataclass(frozen=True)
class FieldOptions:
    """A saved flow, or its parts."""

    run: Run = None
    flow: Annotated[str | None, tyro.conf.arg(metavar="NAME", help="only RUN/flows/NAME")] = None
    field: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="MODULE:FUNCTION",
            help="the velocity field (params, t, x), of ONE example; or with --arguments a factory that returns one, a"
            " Model, or a tuple of one and its params. The current directory is searched first",
        ),
    ] = None
    arguments: Annotated[
        str | None, tyro.conf.arg(metavar="JSON", help="keyword arguments of the factory, such as '{\"dims\": 2}'")
    ] = None
    params: Annotated[
        Path | None,
        tyro.conf.arg(metavar="FILE", help=".npz, .msgpack (Flax), or folder of a checkpoint (orbax, fvjax)"),
    ] = None
    params_entry: Annotated[
        str | None,
        tyro.conf.arg(metavar="NAME", help="part of that file; of a training state by default ema_params, else params"),
    ] = None
    pairs: Annotated[
        Path | None, tyro.conf.arg(metavar="FILE.npz", help="training pairs: arrays x0 and x1, [N, *dims] each")
    ] = None
    interpolant: Annotated[
        Interpolants | None,
        tyro.conf.arg(help="of the training; default linear, or constant_noise where --sigma is given"),
    ] = None
    sigma: Annotated[float | None, tyro.conf.arg(help="noise scale of the interpolant, in units of x")] = None


class Named(NamedTuple):
    """A flow, its name, and the folder where results about it belong."""

    name: str
    flow: Flow
    folder: Path | None


def named_flows(options: FieldOptions, **more: Any) -> list[Named]:
    """The flows that the options name.

    Args:
        options: of the command line.
        **more: `held_out` and `ot_targets` (paths or None), `solver` and `steps`, where the command has them.

    Returns:
        One or more.

    Raises:
        InputError: if something is missing, does not fit or cannot be read; one line.
        ValueError: the same, by the library.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if options.run is not None:
        _refuse_parts(options, more)
        return [Named(folder.name, load_flow(folder), folder) for folder in _folders(options.run, options.flow)]
    if options.field is None or options.pairs is None:
        raise InputError("RUN, or --field and --pairs, must be given")
    if options.flow is not None:
        raise InputError("--flow must come with RUN")
    return [Named(options.field, _from_parts(options, **more), None)]


def _refuse_parts(options: FieldOptions, more: Mapping[str, Any]) -> None:
    given = {name: getattr(options, name) for name in ("field", "arguments", "params", "params_entry", "pairs")}
    given |= {"interpolant": options.interpolant, "sigma": options.sigma}
    given |= {name: more.get(name) for name in ("held_out", "ot_targets")}
    for name, value in given.items():
        if value is not None:
            raise InputError(f"--{name.replace('_', '-')} must not be given together with RUN, whose flow has its own")


def _folders(run: Path, name: str | None) -> list[Path]:
    if not run.is_dir():
        raise InputError(f"RUN must be a folder, got {run}")
    if (run / "flow.json").is_file():
        if name is not None:
            raise InputError(f"--flow must name a folder in RUN/flows, got {name} with {run}, which is a flow itself")
        return [run]
    found = sorted(path.parent for path in run.glob("flows/[!.]*/flow.json"))
    if not found:
        raise InputError(f"RUN must hold flow.json or flows/*/flow.json, as save_flow writes them, got {run} with none")
    chosen = [folder for folder in found if name is None or folder.name == name]
    if not chosen:
        raise InputError(f"--flow must be one of {', '.join(folder.name for folder in found)}, got {name}")
    return chosen


def _from_parts(options: FieldOptions, **more: Any) -> Flow:
    if options.field is None or options.pairs is None:
        raise InputError("--field and --pairs must be given")
    arguments = parsed_arguments(options.arguments)
    arrays = read_pairs(options.pairs)
    pairs = Pair(arrays["x0"], arrays["x1"])
    held_out, ot_targets = arrays.get("held_out"), arrays.get("ot_targets")
    if more.get("held_out") is not None:
        held_out = _named_arrays(more["held_out"], {"x0"}, "held-out")
    if isinstance(held_out, Mapping):
        held_out = Pair(held_out["x0"], held_out["x1"]) if "x1" in held_out else held_out["x0"]
    if more.get("ot_targets") is not None:
        ot_targets = _only_array(more["ot_targets"])
    checked_flow_arrays(pairs, held_out, ot_targets)
    name, values = interpolant_options(options.interpolant, options.sigma)
    interpolant = make_interpolant(name, values)
    found = find_field(options.field, arguments)
    params = found.params if options.params is None else load_params(options.params, options.params_entry)
    if params is None and found.init is not None:
        raise InputError(f"--params must be given: {options.field} makes a network without any")
    check_field(found.field, params, pairs, init=found.init)
    solver, steps = more.get("solver") or "dopri5", more.get("steps")
    config = {
        "field": options.field,
        "arguments": arguments,
        "params": None if options.params is None else str(options.params),
        "pairs": str(options.pairs),
        "interpolant": [name, values],
        "solver": solver,
        "steps": steps,
    }
    return Flow(found.field, params, pairs, held_out, ot_targets, interpolant, solver, steps, config)


def interpolant_options(name: str | None, sigma: float | None) -> tuple[str, dict[str, float]]:
    """Name and arguments of the interpolant that --interpolant and --sigma mean.

    Raises:
        InputError: if sigma is missing or has no meaning there.
    """
    name = name or ("linear" if sigma is None else "constant_noise")
    has_sigma = name not in {"linear", "trigonometric"}
    if has_sigma != (sigma is not None):
        raise InputError(f"--sigma must {'' if has_sigma else 'not '}be given with --interpolant {name}")
    if sigma is None:
        return name, {}
    return name, {"sigma_min" if name == "gaussian_source" else "sigma": sigma}


def read_pairs(path: Path) -> dict[str, Any]:
    """x0 and x1, and what else is in the file, on disk until it is sliced.

    Raises:
        InputError: if they are not in it.
        ValueError: if it is no npz file.
    """
    if path.is_dir() and (path / "pairs.npz").is_file():
        path = path / "pairs.npz"
    return _named_arrays(path, {"x0", "x1"}, "pairs")


def _named_arrays(path: Path, wanted: set[str], name: str) -> dict[str, Any]:
    arrays: dict[str, Any] = read_tree(path, mapped=True)
    if not wanted <= set(arrays):
        rule = " and ".join(sorted(wanted))
        raise InputError(f"{name} must be a file with {rule}, got {path} with {', '.join(arrays) or 'nothing'}")
    return arrays


def _only_array(path: Path) -> np.ndarray:
    arrays = read_tree(path, mapped=True)
    for name in ("ot_targets", "x1"):
        if name in arrays:
            return arrays[name]
    if len(arrays) != 1:
        raise InputError(
            f"ot-targets must be a file with the array ot_targets or x1, got {path} with {', '.join(arrays)}"
        )
    return next(iter(arrays.values()))
