"""The loop: many steps, one compilation, and a host that only looks when there is something to write."""

import functools
from collections.abc import Callable
from contextlib import closing, nullcontext
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax.training._logs import Progress
from fvjax.training._step import TrainState, TrainStep
from fvjax.types import Array, Params, Scalar

IN_FLIGHT = 4
"""Steps that may wait on the devices, so that a long interval between two logs does not pile up batches."""


class Monitor(Protocol):
    """What `fit` asks of a `fvjax.monitoring.VarianceMonitor`."""

    every: int

    def measure(self, step: int, params: Params, *, average: Params | None = None, **also: Scalar) -> Any:
        """Looks at the params, and at their running average."""


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient became nan or infinite at `step`.

    `state` is the last state before it whose losses were finite, or None where batches are streamed: then the last
    checkpoint is (`save` is called for states with finite losses only).
    """

    def __init__(self, step: int, last: int, state: TrainState | None) -> None:
        super().__init__(f"the loss must stay finite, got nan or inf at step {step} (last seen to be finite: {last})")
        self.step = step
        self.state = state


@functools.partial(jax.jit, static_argnames=("step", "length"), donate_argnums=0)
def _run(state: TrainState, task: Any, *, step: TrainStep, length: int) -> tuple[TrainState, Array]:
    return jax.lax.scan(lambda state, _: step(state, task), state, None, length=length)


@functools.partial(jax.jit, static_argnames="step", donate_argnums=0)
def _once(state: TrainState, batch: Any, *, step: TrainStep) -> tuple[TrainState, Array]:
    return step(state, batch)


def fit(
    state: TrainState,
    step: TrainStep,
    data: Any,
    *,
    steps: int,
    log_every: int = 1000,
    on_log: Callable[[TrainState, float], None] | None = None,
    save_every: int | None = None,
    save: Callable[[TrainState], None] | None = None,
    stop: Callable[[], bool] | None = None,
    progress: str | None = None,
    monitor: Monitor | None = None,
) -> tuple[TrainState, np.ndarray]:
    """Runs a training step until `state.step == steps`.

    Data that fits into memory is handed to every step as it is, and the steps between two logs are one compiled call.
    Batches of a large data set are streamed instead: `data(i)` makes that of step i while the device computes step
    i - 1. The host waits for the devices only to log and to save.

    Args:
        state: where to start; continues where an earlier run stopped. Its buffers stay usable.
        step: step(state, task or batch) -> (state, loss); hashable, and compiled once for all tasks of the same
            structure; or what `parallelize` returns.
        data: a pytree handed to every step (pairs, interpolant, ...), or a function from the step's number, 0 ...
            steps - 1, to the batch.
        steps: number of updates in all.
        log_every: the host looks at the losses at multiples of this and at the end.
        on_log: called then, with the state and the mean loss since the last call.
        save_every: `save` is called at multiples of this, itself a multiple of `log_every`, so that a resumed run logs
            what the uninterrupted one does; None means only at the end and when stopped.
        save: called with a state whose losses were finite, also at the end and when stopped; it must have copied what
            it keeps when it returns.
        stop: asked before every step, or before every compiled call; when it says yes the loop saves and returns early.
            The state goes on as if nothing had been; the next mean of `on_log` is over the steps since the stop only.
        progress: label of a progress line with rate, remaining time and loss on stderr; None for none.
        monitor: a `fvjax.monitoring.VarianceMonitor`. It looks at multiples of its `every` and at the end, before
            `on_log`: at the params, and for the flow at their average. Its log gets the mean loss since its last look,
            too. Of `every` and `log_every` one must be a multiple of the other: compiled calls end at both.

    Returns:
        The final state and the loss of every step made here, [final step - first step].

    Raises:
        ValueError: if `steps`, `log_every` or `save_every` is not an integer >= 1, `save_every` comes without `save` or
            is not a multiple of `log_every`, neither of `log_every` and `monitor.every` is a multiple of the other, or
            a pytree of data comes with a parallelized step.
        NonFiniteLossError: at the next look at the losses after one is nan or infinite.
    """
    for name, value in (("steps", steps), ("log_every", log_every)):
        _validate.positive_integer(name, value)
    if save_every is not None:
        _validate.positive_integer("save_every", save_every)
        if save is None:
            raise ValueError(f"save_every must be None where there is no save, got {save_every}")
        if save_every % log_every:
            raise ValueError(f"save_every must be a multiple of log_every = {log_every}, got {save_every}")
    look_every = log_every
    if monitor is not None:
        look_every = min(log_every, monitor.every)
        if max(log_every, monitor.every) % look_every:
            raise ValueError(
                f"monitor.every must be a multiple or a divisor of log_every = {log_every}, got {monitor.every}"
            )
    advance = _Stream(step, data, stop) if callable(data) else _Resident(step, data, stop)
    first = done = int(state.step)
    state = jax.tree.map(jnp.copy, state)
    losses: list[np.ndarray] = []
    for_log, for_monitor = _Mean(), _Mean()
    stopped = False
    with nullcontext() if progress is None else closing(Progress(progress, steps, first)) as bar:
        while done < steps and not stopped:
            target = min((done // look_every + 1) * look_every, steps)
            state, values, stopped = advance(state, done, target)
            done += len(values)
            losses.append(values)
            if bar is not None and len(values):
                bar.update(done, float(values.mean()))
            for mean in (for_log, for_monitor):
                mean.add(values)
            if monitor is not None and not stopped and (done % monitor.every == 0 or done == steps):
                monitor.measure(done, state.params, average=state.ema_params, loss=for_monitor.take())
            if on_log is not None and not stopped and (done % log_every == 0 or done == steps):
                on_log(state, for_log.take())
            if save is not None and (done == steps or stopped or (save_every is not None and done % save_every == 0)):
                save(state)
    return state, np.concatenate(losses) if losses else np.zeros(0, np.float32)


class _Mean:
    """The mean of the losses since it was last taken."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    def add(self, values: np.ndarray) -> None:
        self._parts.append(values)

    def take(self) -> float:
        mean = float(np.concatenate(self._parts).mean())
        self._parts.clear()
        return mean


class _Resident:
    """The data are with the devices: the steps up to the next look are one compiled call."""

    def __init__(self, step: TrainStep, task: Any, stop: Callable[[], bool] | None) -> None:
        if getattr(step, "compiled", False):
            raise ValueError(f"data must be a function where the step is parallelized, got {type(task).__name__}")
        self._step, self._task, self._stop = step, task, stop

    def __call__(self, state: TrainState, done: int, target: int) -> tuple[TrainState, np.ndarray, bool]:
        if self._stop is not None and self._stop():
            return state, np.zeros(0, np.float32), True
        before = jax.tree.map(jnp.copy, state)
        state, losses = _run(state, self._task, step=self._step, length=target - done)
        values = np.asarray(losses)
        _check(values, done, before)
        return state, values, False


class _Stream:
    """The host makes a batch for every step, one ahead of the devices."""

    def __init__(self, step: TrainStep, batches: Callable[[int], Any], stop: Callable[[], bool] | None) -> None:
        self._step = step if getattr(step, "compiled", False) else functools.partial(_once, step=step)
        self._batches, self._stop = batches, stop
        self._ahead: tuple[int, Any] | None = None

    def _batch(self, index: int) -> Any:
        if self._ahead is not None and self._ahead[0] == index:
            return self._ahead[1]
        return self._batches(index)

    def __call__(self, state: TrainState, done: int, target: int) -> tuple[TrainState, np.ndarray, bool]:
        losses: list[Array] = []
        stopped = False
        for index in range(done, target):
            if self._stop is not None and self._stop():
                stopped = True
                break
            state, loss = self._step(state, self._batch(index))
            losses.append(loss)
            if index + 1 < target:
                self._ahead = index + 1, self._batches(index + 1)
            if len(losses) > IN_FLIGHT:
                jax.block_until_ready(losses[-IN_FLIGHT])
        values = np.asarray([np.asarray(loss.addressable_data(0)) for loss in losses], np.float32)
        _check(values, done, None)
        return state, values, stopped


def _check(values: np.ndarray, done: int, before: TrainState | None) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        wrong = int(np.argmin(finite))
        raise NonFiniteLossError(done + wrong + 1, done + wrong, before)
