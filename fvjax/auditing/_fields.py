"""Fields and interpolants by name, as a command line and a folder on disk have them."""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _validate, interpolants
from fvjax.interpolants import Interpolant
from fvjax.types import Model, Pair, Params, VelocityField

INTERPOLANTS = (
    "linear",
    "constant_noise",
    "brownian_bridge",
    "smooth_bridge",
    "trigonometric",
    "gaussian_source",
    "bridge_drift",
)


class Found(NamedTuple):
    """What "module:function" names: a field, the parameters that it brings along, and how parameters are made."""

    field: VelocityField
    params: Params | None
    init: Callable[[Any], Params] | None


def make_interpolant(name: str, arguments: Mapping[str, Any]) -> Interpolant:
    """The interpolant of that name of `fvjax.interpolants`.

    Raises:
        ValueError: if there is none, or it does not take these arguments.
    """
    _validate.one_of("interpolant", name, INTERPOLANTS)
    factory = getattr(interpolants, name)
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"the arguments of {name} must be {inspect.signature(factory)}, got {arguments}") from error
    made: Interpolant = factory(**arguments)
    return made


def find_field(name: str, arguments: Mapping[str, Any] | None = None) -> Found:
    """What "module:function" names, called with `arguments` if they are given.

    Raises:
        ValueError: if the module or the function does not exist, the module cannot be imported, or the factory fails or
            returns something else; one line.
    """
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name) or module_name == "__main__":
        raise ValueError(f"field must be module:function, of a module that can be imported, got {name!r}")
    importlib.invalidate_caches()
    try:
        module = sys.modules.get(module_name) or importlib.import_module(module_name)
    except Exception as error:  # of the module itself: of any type
        if isinstance(error, ModuleNotFoundError) and error.name and (module_name + ".").startswith(error.name + "."):
            raise ValueError(
                f"field must be module:function, got {name!r}, and there is no module {error.name}"
            ) from error
        raise ValueError(
            f"field must be module:function, got {name!r}, whose import fails: {one_line(error)}"
        ) from error
    function: Any = module
    for part in function_name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        raise ValueError(f"field must be module:function, got {name!r}, and {module_name} has no such function")
    if arguments is None:
        return Found(function, None, None)
    try:
        made = function(**{key: _tuples(value) for key, value in arguments.items()})
    except Exception as error:  # of the user's function: of any type
        raise ValueError(f"{name}({_shown(arguments)}) must return a field, got {one_line(error)}") from error
    return _made(made, f"{name}({_shown(arguments)})")


def _made(made: Any, call: str) -> Found:
    if isinstance(made, Model):
        return Found(made.apply, None, made.init)
    if isinstance(made, tuple) and len(made) == 2 and (callable(made[0]) or isinstance(made[0], Model)):
        return _made(made[0], call)._replace(params=made[1])
    if not callable(made):
        raise ValueError(
            f"{call} must return a velocity field, a Model, or one of them with its params, got {type(made).__name__}"
        )
    return Found(made, None, None)


def _tuples(value: Any) -> Any:
    """JSON knows no tuples, and shapes are tuples."""
    if isinstance(value, list | tuple):
        return tuple(_tuples(item) for item in value)
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _shown(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())


def one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def check_field(field: VelocityField, params: Params, pairs: Pair, *, init: Callable[[Any], Params] | None) -> None:
    """Refuses params that are not those of `init`, and a field that does not map one x0 to its like; traced only.

    Raises:
        ValueError: one line.
    """
    if init is not None:
        _check_params(params, init)
    dtype = jnp.result_type(pairs.x0.dtype)
    example = jax.ShapeDtypeStruct(np.shape(pairs.x0)[1:], dtype)
    try:
        out = jax.eval_shape(field, params, jax.ShapeDtypeStruct((), dtype), example)
    except Exception as error:  # of the user's function: of any type
        raise ValueError(
            f"field(params, t, x) must take ONE x of shape {example.shape}, got {one_line(error)}"
        ) from error
    found = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(out)]
    if found != [(example.shape, dtype)]:
        got = " and ".join(f"{kind}{list(shape)}" for shape, kind in found) or "nothing"
        raise ValueError(f"field(params, t, x) must return the like of x, {dtype}{list(example.shape)}, got {got}")


def _check_params(params: Params, init: Callable[[Any], Params]) -> None:
    wanted = jax.tree_util.tree_leaves_with_path(jax.eval_shape(init, jax.random.key(0)))
    found = jax.tree_util.tree_leaves_with_path(params)
    shapes = [{jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves} for leaves in (wanted, found)]
    if shapes[0] != shapes[1]:
        name = next(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        old, new = (shapes[i].get(name, "nothing") for i in (0, 1))
        raise ValueError(f"params must be those of the field's init, got {new} for params{name} where it has {old}")
