"""A small jitted trainer: a pure step, and a loop that runs many steps in one compiled call.

The step is free of devices and data: `step(state, batch) -> (state, loss)`. `fit` compiles it once per task shape, so
that runs that differ in pairs, sigma or seed share one compilation.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fvjax import _validate
from fvjax.couplings import paired
from fvjax.interpolants import Interpolant, draw_paths
from fvjax.losses import batch_loss, squared_error
from fvjax.types import Array, Coupling, Key, Model, Pair, Params, VelocityField


class TrainState(NamedTuple):
    """Everything that a resumed run needs. `step` counts the updates made, `key` is the run's key and never changes."""

    step: Array
    params: Params
    opt_state: Any
    ema_params: Params
    key: Key


TrainStep = Callable[[TrainState, Any], tuple[TrainState, Array]]


class NonFiniteLossError(RuntimeError):
    """The loss became nan or infinite; `state` is the last one before it whose loss was finite."""

    def __init__(self, step: int, state: TrainState) -> None:
        super().__init__(f"the loss must stay finite, got nan or inf between step {int(state.step)} and step {step}")
        self.state = state


def adam(
    steps: int, *, learning_rate: float = 1e-3, warmup: int = 500, clip: float = 1.0
) -> optax.GradientTransformation:
    """Adam with global-norm clipping, linear warm-up and cosine decay to 1% of the peak.

    Args:
        steps: length of the run.
        learning_rate: peak.
        warmup: steps of warm-up, cut to a tenth of the run if it is longer.
        clip: largest global norm of a gradient.

    Raises:
        ValueError: if `steps` is not an integer >= 1.
    """
    _validate.positive_integer("steps", steps)
    warmup = min(warmup, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else learning_rate, learning_rate, warmup, max(steps, warmup + 1), 0.01 * learning_rate
    )
    return optax.chain(optax.clip_by_global_norm(clip), optax.adam(schedule))


def init_state(key: Key, model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step: parameters from one half of `key`, the other half drives the training."""
    init_key, run_key = jax.random.split(key)
    params = model.init(init_key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), params, run_key)


def make_train_step(
    field: VelocityField,
    interpolant: Interpolant,
    optimizer: optax.GradientTransformation,
    *,
    coupling: Coupling = paired,
    ema_decay: float = 0.999,
    reduction: str = "mean",
) -> Callable[[TrainState, Pair], tuple[TrainState, Array]]:
    """Makes the pure training step: couple, draw paths, differentiate the mean loss, update, average.

    Args:
        field: velocity field of one example.
        interpolant: how pairs are joined; may hold traced values.
        optimizer: any optax transformation.
        coupling: re-pairs x0 and x1 within the batch; `paired` keeps the pairs.
        ema_decay: of the average of the parameters; the first steps use (1 + step) / (10 + step) if that is smaller.
        reduction: over the dimensions, as in `losses.squared_error`.

    Returns:
        step(state, batch) -> (state, loss), a deterministic function: its random numbers come from the run's key and
        the step's number.

    Raises:
        ValueError: if `ema_decay` is not in [0, 1) or `reduction` is unknown.
    """
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
    loss = squared_error(field, reduction=reduction)

    def step(state: TrainState, batch: Pair) -> tuple[TrainState, Array]:
        coupling_key, path_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        samples = draw_paths(path_key, coupling(coupling_key, batch.x0, batch.x1), interpolant)
        value, gradient = jax.value_and_grad(lambda p: batch_loss(loss, p, samples))(state.params)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        count = state.step.astype(value.dtype)
        decay = jnp.minimum(ema_decay, (1 + count) / (10 + count))
        ema = jax.tree.map(lambda e, p: e + (1 - decay.astype(p.dtype)) * (p - e), state.ema_params, params)
        return TrainState(state.step + 1, params, opt_state, ema, state.key), value

    return step


def minibatch(pairs: Pair, key: Key, size: int) -> Pair:
    """Draws `size` pairs with replacement from a data set in memory: a pure function of the key.

    Raises:
        ValueError: if `size` is not an integer >= 1 or x0 and x1 have no common leading axis.
    """
    _validate.positive_integer("size", size)
    n = _validate.batch("pairs", pairs)
    index = jax.random.randint(key, (size,), 0, n)
    return jax.tree.map(lambda x: x[index], pairs)


@functools.partial(jax.jit, static_argnames=("step", "length"), donate_argnums=0)
def _run(state: TrainState, task: Any, *, step: TrainStep, length: int) -> tuple[TrainState, Array]:
    return jax.lax.scan(lambda state, _: step(state, task), state, None, length=length)


def fit(
    state: TrainState,
    step: TrainStep,
    task: Any,
    *,
    steps: int,
    log_every: int = 1000,
    on_log: Callable[[TrainState, float], None] | None = None,
) -> tuple[TrainState, np.ndarray]:
    """Runs a training step until `state.step == steps`.

    Args:
        state: where to start; continues where an earlier run stopped.
        step: step(state, task) -> (state, loss); hashable, and compiled once for all tasks of the same structure.
        task: pytree handed to every step (pairs, interpolant, ...).
        steps: number of updates in all.
        log_every: updates in one compiled call; the host looks at the losses only then.
        on_log: called then, with the state and the mean loss since the last call.

    Returns:
        The final state and the loss of every step, [steps - state.step].

    Raises:
        ValueError: if `steps` or `log_every` is not an integer >= 1.
        NonFiniteLossError: with the last good state, as soon as a loss is nan or infinite.
    """
    _validate.positive_integer("steps", steps)
    _validate.positive_integer("log_every", log_every)
    losses = []
    state = jax.tree.map(jnp.copy, state)
    while (done := int(state.step)) < steps:
        length = min(log_every, steps - done)
        before = jax.tree.map(jnp.copy, state)
        state, values = _run(state, task, step=step, length=length)
        values = np.asarray(values)
        if not np.all(np.isfinite(values)):
            raise NonFiniteLossError(done + int(np.argmin(np.isfinite(values))) + 1, before)
        losses.append(values)
        if on_log is not None:
            on_log(state, float(values.mean()))
    return state, np.concatenate(losses) if losses else np.zeros(0, np.float32)
