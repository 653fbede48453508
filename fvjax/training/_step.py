"""The state of a run and the pure step that advances it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fvjax import _validate
from fvjax._convolutions import refined
from fvjax.couplings import paired
from fvjax.interpolants import Interpolant, draw_paths
from fvjax.losses import batch_loss, squared_error
from fvjax.types import Array, Coupling, Key, Model, Pair, Params, PathSample, VelocityField

SCHEDULES = ("cosine", "constant")


class TrainState(NamedTuple):
    """Everything that a resumed run needs. `step` counts the updates made, `key` is the run's key and never changes."""

    step: Array
    params: Params
    opt_state: Any
    ema_params: Params
    key: Key


TrainStep = Callable[[TrainState, Any], tuple[TrainState, Array]]
"""(state, batch) -> (state after it, loss)."""

Source = Callable[[Key, Array], Array]
"""(key, x1[*dims]) -> x0[*dims], for ONE example."""


def adam(
    steps: int, *, learning_rate: float = 1e-3, warmup: int = 500, clip: float = 1.0, schedule: str = "cosine"
) -> optax.GradientTransformation:
    """Adam with global-norm clipping and linear warm-up, then cosine decay to 1% of the peak or a constant rate.

    Args:
        steps: length of the run, for the decay.
        learning_rate: peak.
        warmup: steps of warm-up, cut to a tenth of the run if it is longer.
        clip: largest global norm of a gradient.
        schedule: "cosine" or "constant", what follows the warm-up.

    Raises:
        ValueError: if `steps` is not an integer >= 1, `warmup` not one >= 0, `learning_rate` or `clip` not positive, or
            `schedule` unknown.
    """
    _validate.positive_integer("steps", steps)
    if warmup:
        _validate.positive_integer("warmup", warmup)
    for name, value in (("learning_rate", learning_rate), ("clip", clip)):
        _validate.positive(name, value)
    _validate.one_of("schedule", schedule, SCHEDULES)
    warmup = min(warmup, steps // 10)
    start = 0.0 if warmup else learning_rate
    if schedule == "cosine":
        length = max(steps, warmup + 1)
        rate = optax.warmup_cosine_decay_schedule(start, learning_rate, warmup, length, 0.01 * learning_rate)
    else:
        rate = optax.warmup_constant_schedule(start, learning_rate, warmup)
    return optax.chain(optax.clip_by_global_norm(clip), optax.adam(rate))


def init_state(key: Key, model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step: parameters from one half of `key`, the other half drives the training."""
    init_key, run_key = jax.random.split(key)
    params = model.init(init_key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), params, run_key)


def standard_normal(key: Key, x1: Array) -> Array:
    """The source N(0, I) of one example, in the shape and dtype of x1."""
    return jax.random.normal(key, x1.shape, x1.dtype)


def minibatch(pairs: Pair, key: Key, size: int) -> Pair:
    """Draws `size` pairs with replacement from a data set in memory: a pure function of the key.

    Raises:
        ValueError: if `size` is not an integer >= 1 or x0 and x1 have no common leading axis.
    """
    _validate.positive_integer("size", size)
    n = _validate.batch("pairs", pairs)
    index = jax.random.randint(key, (size,), 0, n)
    return jax.tree.map(lambda x: x[index], pairs)


class _Draws(NamedTuple):
    """What the step knows of each example: its path, and the key of its dropout if there is any."""

    path: PathSample
    key: Key | None


def make_train_step(
    field: VelocityField,
    interpolant: Interpolant,
    optimizer: optax.GradientTransformation,
    *,
    coupling: Coupling = paired,
    source: Source | None = None,
    dropout: bool = False,
    ema_decay: float = 0.999,
    reduction: str = "mean",
    micro_batches: int = 1,
    compute_dtype: Any = None,
    axis_name: str | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Array]]:
    """Makes the pure training step: couple, draw paths, differentiate the mean loss, update, average.

    Args:
        field: velocity field of one example.
        interpolant: how pairs are joined; may hold traced values.
        optimizer: any optax transformation.
        coupling: re-pairs x0 and x1 within the whole batch, all devices' parts together; `paired` keeps the pairs.
        source: draws x0 for each x1 of the batch; None means that the batch holds both.
        dropout: whether to call field(params, t, x, key=...) with a key for each example and step.
        ema_decay: of the average of the parameters; the first steps use (1 + step) / (10 + step) if that is smaller.
        reduction: over the dimensions, as in `losses.squared_error`.
        micro_batches: parts of the (device's) batch that are differentiated one after the other, for memory's sake; the
            gradient is their mean.
        compute_dtype: what the params are cast to for the field, "bfloat16" for instance; the params themselves, their
            gradient, the optimiser and the loss stay as they are. The field must compute in the dtype of its params, as
            fvjax.nets do. None: no cast.
        axis_name: of the devices among which the batch is divided (`parallelize`); None for one device.

    Returns:
        step(state, batch) -> (state, loss), a deterministic function: its random numbers come from the run's key, the
        step's number and the example's index in the whole batch. `batch` is a Pair, or with a `source` an array x1,
        [n, *dims]. The loss is nan if the gradient is not finite. The params then are not to be used.

    Raises:
        ValueError: if `ema_decay` is not in [0, 1), `reduction` is unknown, `micro_batches` is not an integer >= 1 or
            `compute_dtype` not floating point; on call, if the batch cannot be divided into `micro_batches`.
    """
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
    squared_error(field, reduction=reduction)  # refuses an unknown reduction here, not at the first step
    _validate.positive_integer("micro_batches", micro_batches)
    dtype = None if compute_dtype is None else _floating_dtype(compute_dtype)

    def loss(params: Params, draws: _Draws) -> Array:
        called = field if draws.key is None else partial(field, key=draws.key)  # type: ignore[call-arg]
        return squared_error(called, reduction=reduction)(_cast(params, dtype), draws.path)

    gradient_of = jax.value_and_grad(refined(lambda params, draws: batch_loss(loss, params, draws)))

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Array]:
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), 4)
        start = _first_index(batch, axis_name)
        pairs = batch if source is None else _with_source(source, keys[2], batch, start)
        pairs = _coupled(coupling, keys[0], pairs, axis_name)
        n = _validate.batch("batch", pairs)
        paths = draw_paths(keys[1], pairs, interpolant, start=start)
        draws = _Draws(paths, _keys(keys[3], start, n) if dropout else None)
        value, gradient = _accumulated(gradient_of, state.params, draws, micro_batches)
        if axis_name is not None:
            value, gradient = jax.lax.pmean((value, gradient), axis_name)
        value = jnp.where(jnp.isfinite(optax.tree.norm(gradient)), value, jnp.nan)
        return _updated(state, gradient, optimizer, ema_decay=ema_decay), value

    return step


def _floating_dtype(dtype: Any) -> Any:
    found = jnp.dtype(dtype)
    if not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"compute_dtype must be floating point, got {found}")
    return found


def _cast(params: Params, dtype: Any) -> Params:
    if dtype is None:
        return params
    return jax.tree.map(lambda p: p.astype(dtype) if jnp.issubdtype(p.dtype, jnp.floating) else p, params)


def _first_index(batch: Any, axis_name: str | None) -> Array | int:
    """Index, in the whole batch, of this device's first example."""
    return 0 if axis_name is None else jax.lax.axis_index(axis_name) * _validate.batch("batch", batch)


def _keys(key: Key, start: Array | int, n: int) -> Key:
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(start + jnp.arange(n))


def _with_source(source: Source, key: Key, x1: Array, start: Array | int) -> Pair:
    return Pair(jax.vmap(source)(_keys(key, start, len(x1)), x1), x1)


def _coupled(coupling: Coupling, key: Key, pairs: Pair, axis_name: str | None) -> Pair:
    """Couples the whole batch; every device does so with all of it and keeps its own part."""
    if axis_name is None or coupling is paired:
        return coupling(key, *pairs)
    whole = coupling(key, *jax.lax.all_gather(pairs, axis_name, tiled=True))
    n = len(pairs.x0)
    start = jax.lax.axis_index(axis_name) * n
    return Pair(*(jax.lax.dynamic_slice_in_dim(x, start, n) for x in whole))


def _accumulated(gradient_of: Any, params: Params, draws: _Draws, parts: int) -> tuple[Array, Params]:
    """The mean loss and its gradient, from `parts` equal parts of the batch in turn."""
    if parts == 1:
        return gradient_of(params, draws)
    n = _validate.batch("batch", draws.path)
    if n % parts:
        raise ValueError(f"micro_batches must divide the {n} examples of a device's batch, got {parts}")
    split = jax.tree.map(lambda x: x.reshape(parts, n // parts, *x.shape[1:]), draws)

    def add(total: Any, part: _Draws) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient_of(params, part)), None

    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(gradient_of, params, draws))
    return jax.tree.map(lambda leaf: leaf / parts, jax.lax.scan(add, zero, split)[0])


def _updated(
    state: TrainState, gradient: Params, optimizer: optax.GradientTransformation, *, ema_decay: float
) -> TrainState:
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    count = state.step.astype(jnp.float32)
    decay = jnp.minimum(ema_decay, (1 + count) / (10 + count))
    ema = jax.tree.map(lambda e, p: e + (1 - decay.astype(p.dtype)) * (p - e), state.ema_params, params)
    return TrainState(state.step + 1, params, opt_state, ema, state.key)
