"""Flax NNX and Equinox modules as `Model(init, apply)`: pure functions, and parameters as nested dicts of arrays.

Neither library is imported before its adapter is called; Equinox need not be installed for the rest of fvjax.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fvjax import _validate
from fvjax.types import Array, Key, Model, Params, Scalar

_Path = tuple[str, ...]


def from_nnx(make: Callable[[Any], Any], *, call: Callable[..., Array] | None = None) -> Model:
    r"""Returns the Model of a Flax NNX module, apply(params, t, x) = module(t, x) for ONE example.

    The module is rebuilt at every call from its structure, which `make` tells once, and the params; it keeps no state.

    ===========================  =========================================================
    nnx.Param                    the params
    Dropout, random streams      `key=None`: module.eval(); a key: module.train(), and the
                                 streams begin anew from that key
    BatchNorm and other state    ValueError
    ===========================  =========================================================

    Args:
        make: nnx.Rngs -> module, for instance `lambda rngs: MyField(64, rngs=rngs)`. It is called once here, without
            computing anything, and in `init`.
        call: (module, t, x) -> velocity, for a module with another convention; None means module(t, x).

    Returns:
        Model. `init(key)` is the params of make(nnx.Rngs(key)) as nested dicts by attribute, with "0", "1", ... in
        lists. `apply(params, t, x, *, key=None)` gives the module t and x in the dtype of the params and answers in the
        dtype of x.

    Raises:
        ValueError: if the module holds other state than nnx.Param and random streams; on call, if the params have other
            names than the module's, the velocity has not the shape of x, or a random number is drawn without a key.
    """
    from flax import nnx

    parts: Any = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(jax.random.key(0)))), nnx.Param, nnx.RngState, ...)
    graph, parameters, streams, rest = parts
    other = [f"{type(leaf).__name__} {'.'.join(_strings(path))}" for path, leaf in nnx.to_flat_state(rest)]
    if other:
        raise ValueError(
            f"the module must keep no state but nnx.Param and random streams, got {', '.join(other)}; normalise by"
            " GroupNorm or LayerNorm, make constants nnx.Param under jax.lax.stop_gradient or compute them in the call"
        )

    def init(key: Key) -> Params:
        found = nnx.to_flat_state(nnx.state(make(nnx.Rngs(key)), nnx.Param))
        return _nested({_strings(path): leaf.get_value() for path, leaf in found})

    def run(params: Params, t: Array, x: Array, key: Key | None) -> Array:
        values = _flat(params, [_strings(path) for path, _ in nnx.to_flat_state(parameters)])
        filled = {path: leaf.replace(values[_strings(path)]) for path, leaf in nnx.to_flat_state(parameters)}
        started = _nnx_streams(streams, key)
        before = {path: leaf.get_value() for path, leaf in started.items()}
        module = nnx.merge(graph, nnx.from_flat_state(filled | started))
        (module.eval if key is None else module.train)()
        velocity = module(t, x) if call is None else call(module, t, x)
        after = dict(nnx.to_flat_state(nnx.state(module, nnx.RngState)))
        drawn = [path for path, value in before.items() if after[path].get_value() is not value]
        if key is None and drawn:
            raise ValueError(f"key must be given where the module draws random numbers ({drawn[0][0]}), got None")
        return velocity

    return _model(init, run)


def _nnx_streams(streams: Any, key: Key | None) -> dict[Any, Any]:
    """The random streams of a module, begun anew; without a key from a constant, of which `run` refuses every use."""
    from flax import nnx

    key = jax.random.key(0) if key is None else key
    started = {}
    for index, (path, leaf) in enumerate(nnx.to_flat_state(streams)):
        shape = leaf.get_value().shape
        if isinstance(leaf, nnx.RngCount):
            value = jnp.zeros(shape, leaf.get_value().dtype)
        else:
            value = jax.random.fold_in(key, index)
            value = jax.random.split(value, shape) if shape else value
        started[path] = leaf.replace(value)
    return started


def from_equinox(make: Callable[[Key], Any], *, call: Callable[..., Array] | None = None) -> Model:
    r"""Returns the Model of an Equinox module, apply(params, t, x) = module(t, x) for ONE example.

    Every floating-point array of the module is a parameter (constants too: they need `jax.lax.stop_gradient` in the
    module). Everything that is no array is fixed when `make` is called here.

    ==============================  =================================================================
    `key=None`                      eqx.nn.inference_mode(module)(t, x)
    a key                           eqx.nn.inference_mode(module, value=False)(t, x, key=key)
    BatchNorm, integer arrays, ...  ValueError
    ==============================  =================================================================

    Args:
        make: key -> module, for instance `lambda key: MyField(64, key=key)`. It is called once here, without computing
            anything, and in `init`.
        call: as (module, t, x) -> velocity without a key and (module, t, x, key=key) with one, for a module with
            another convention; None means module(t, x) and module(t, x, key=key).

    Returns:
        Model. `init(key)` is the arrays of make(key) as nested dicts by attribute, with "0", "1", ... in tuples and
        lists. `apply(params, t, x, *, key=None)` gives the module t and x in the dtype of the params and answers in the
        dtype of x.

    Raises:
        ValueError: if Equinox is not installed, or the module holds state or arrays that are not floating point; on
            call, if the params have other names than the module's, or the velocity has not the shape of x.
    """
    try:
        import equinox as eqx
    except ImportError as error:
        raise ValueError("Equinox is needed for from_equinox: python -m pip install equinox") from error

    abstract = eqx.filter_eval_shape(make, jax.random.key(0))
    if any(isinstance(x, eqx.nn.StateIndex) for x in jax.tree.leaves(abstract, is_leaf=_is_state(eqx))):
        raise ValueError("the module must keep no state, got an eqx.nn.StateIndex; normalise by GroupNorm or LayerNorm")
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    other = [f"{x.dtype} {'.'.join(_keys(path))}" for path, x in leaves if hasattr(x, "dtype") and not _is_float(x)]
    if other:
        raise ValueError(
            f"the arrays of the module must be floating point, they are its parameters, got {', '.join(other)};"
            " keep others as tuples or compute them in the call"
        )

    def init(key: Key) -> Params:
        found = jax.tree_util.tree_leaves_with_path(make(key))
        return _nested({_keys(path): jnp.asarray(leaf) for path, leaf in found if _is_float(leaf)})

    def run(params: Params, t: Array, x: Array, key: Key | None) -> Array:
        values = _flat(params, [_keys(path) for path, leaf in leaves if _is_float(leaf)])
        filled = [values[_keys(path)] if _is_float(leaf) else leaf for path, leaf in leaves]
        module = eqx.nn.inference_mode(jax.tree.unflatten(structure, filled), value=key is None)
        options = {} if key is None else {"key": key}
        return module(t, x, **options) if call is None else call(module, t, x, **options)

    return _model(init, run)


def _is_state(eqx: Any) -> Callable[[Any], bool]:
    return lambda node: isinstance(node, eqx.nn.StateIndex)


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _model(init: Callable[[Key], Params], run: Callable[[Params, Array, Array, Key | None], Array]) -> Model:
    def apply(params: Params, t: Scalar, x: Array, *, key: Key | None = None) -> Array:
        _validate.shape("t", t, ())
        _validate.floating("x", x)
        dtype = jax.tree.leaves(params)[0].dtype
        velocity = run(params, jnp.asarray(t, dtype), x.astype(dtype), key)
        _validate.same_shape("module(t, x)", velocity, "x", x)
        return velocity.astype(x.dtype)

    return Model(init, apply)


def _strings(path: Sequence[Any]) -> _Path:
    return tuple(str(part) for part in path)


def _keys(path: Sequence[Any]) -> _Path:
    """The attributes, indices and names on the way to a leaf."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _nested(flat: dict[_Path, Any]) -> Params:
    tree: dict[str, Any] = {}
    for (*parents, name), leaf in flat.items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _flat(params: Params, names: Sequence[_Path]) -> dict[_Path, Any]:
    """The leaves by path, if the paths are `names`."""
    flat = {_keys(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    differing = sorted(".".join(path) for path in set(names) ^ set(flat))
    if differing:
        raise ValueError(f"params must have the names of the module's arrays, differs in {', '.join(differing[:4])}")
    return flat
