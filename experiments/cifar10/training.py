"""Training of one flow from noise to images, with checkpoints, metrics and the gradient variance on the way."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cifar10.settings import Settings
from experiments.common import compiled_quickly
from fvjax import couplings, data, training
from fvjax.checkpoints import Checkpoints, stop_on_sigterm
from fvjax.interpolants import constant_noise, draw_paths
from fvjax.monitoring import VarianceMonitor
from fvjax.types import Array, Coupling, Key, Model, Pair, PathSample

STOP_EVERY = 16
"""With several processes they ask each other once in so many steps whether to stop."""


def couplings_by_name() -> dict[str, Coupling]:
    """Couplings of the --coupling option. The source is drawn for each image, so `paired` is the independent one."""
    return {
        "independent": couplings.paired,
        "fixed": couplings.paired,
        "ot": couplings.minibatch_ot(),
        "sinkhorn": couplings.minibatch_ot(method="sinkhorn"),
    }


def optimizer_of(settings: Settings) -> Any:
    """Clipped Adam with warm-up."""
    return training.adam(
        settings.steps,
        learning_rate=settings.learning_rate,
        warmup=settings.warmup,
        schedule=settings.schedule,
    )


def fixed_sources(seed: int, indices: np.ndarray, dims: tuple[int, ...]) -> np.ndarray:
    """The noise that image i is paired with for the whole run: a function of (seed, i)."""
    draws = [
        np.random.Generator(np.random.Philox(key=(seed, int(i)))).standard_normal(dims, np.float32) for i in indices
    ]
    return np.stack(draws)


def batches(settings: Settings, images: np.ndarray, rows: slice) -> Callable[[int], Any]:
    """The batch of each step, this process's rows of it: images, or pairs with the noise that is fixed for each."""

    def images_of(step: int) -> np.ndarray:
        return data.batch(images, seed=settings.seed, step=step, size=settings.batch, flip=settings.flip, rows=rows)

    def pairs_of(step: int) -> Pair:
        indices = data.batch_indices(settings.seed, step, settings.batch, len(images))[rows]
        return Pair(fixed_sources(settings.seed, indices, settings.dims), images_of(step))  # type: ignore[arg-type]

    return pairs_of if settings.coupling == "fixed" else images_of


def probe_paths(settings: Settings, images: np.ndarray, key: Key, *, held_out: bool = False) -> PathSample:
    """The examples at which a loss is measured: `probe_pairs` with times drawn.

    Args:
        settings: of the run.
        images: the first ones of a split.
        key: of source, coupling, times and noise.
        held_out: as in `probe_pairs`.
    """
    *_, path_key = jax.random.split(key, 3)
    return draw_paths(path_key, probe_pairs(settings, images, key, held_out=held_out), constant_noise(settings.sigma))


def probe_pairs(settings: Settings, images: np.ndarray, key: Key, *, held_out: bool = False) -> Pair:
    """Images and their noise as training couples them, here within this set.

    Args:
        settings: of the run.
        images: the first ones of a split.
        key: of source and coupling.
        held_out: whether they are not of the training split; the noise of fixed pairs is then drawn, too.
    """
    count = len(images)
    x1 = jnp.asarray(data.batch(images, seed=0, step=0, size=count))
    source_key, coupling_key, _ = jax.random.split(key, 3)
    if settings.coupling == "fixed" and not held_out:
        indices = data.batch_indices(0, 0, count, count)
        x0 = jnp.asarray(fixed_sources(settings.seed, indices, settings.dims))
    else:
        x0 = jax.random.normal(source_key, x1.shape)
    return couplings_by_name()[settings.coupling](coupling_key, x0, x1)


def train(
    settings: Settings, model: Model, images: data.Images, *, folder: Path
) -> tuple[training.TrainState, list[dict[str, Any]]]:
    """Trains on images and their noise, or goes on from the newest checkpoint in `folder`; returns early on SIGTERM.

    Returns:
        The state on the first device, and the rows of metrics.csv.

    Raises:
        NonFiniteLossError, CheckpointError, ConfigMismatchError: see there.
    """
    optimizer = optimizer_of(settings)
    state_key, probe_key = jax.random.split(jax.random.key(settings.seed))

    def first_state(key: Key) -> training.TrainState:
        return training.init_state(key, model, optimizer)

    pair_key, probe_key = jax.random.split(probe_key)
    monitor = monitor_of(settings, model, probe_pairs(settings, images.train[: settings.probes], pair_key), probe_key)
    like = jax.eval_shape(first_state, state_key)
    start = Start(like, lambda: compiled_quickly(first_state)(state_key), asdict(settings))
    made = step_of(
        settings,
        model,
        coupling=couplings_by_name()[settings.coupling],
        source=None if settings.coupling == "fixed" else training.standard_normal,
    )
    stream = batches(settings, images.train, training.process_rows(settings.batch))
    return run(settings, start, step=made, batches=stream, monitor=monitor, folder=folder)


class Start(NamedTuple):
    """Where a training begins: shapes of its state, what makes the first one, the checkpoints' configuration."""

    like: training.TrainState
    first: Callable[[], training.TrainState]
    config: dict[str, Any]


def step_of(
    settings: Settings, model: Model, *, coupling: Coupling, source: Callable[[Key, Array], Array] | None
) -> training.TrainStep:
    """The step on all devices."""
    return training.parallelize(
        training.make_train_step(
            model.apply,
            constant_noise(settings.sigma),
            optimizer_of(settings),
            coupling=coupling,
            source=source,
            dropout=settings.network.get("dropout", 0.0) > 0,
            ema_decay=settings.ema_decay,
            micro_batches=settings.micro_batches,
            compute_dtype=None if settings.precision == "float32" else settings.precision,
            axis_name=training.AXIS,
        )
    )


def monitor_of(settings: Settings, model: Model, pairs: Pair, key: Key) -> VarianceMonitor:
    """The gradient variance at every row of the log. The flow has an evaluation of its own."""
    interpolant, draws = constant_noise(settings.sigma), settings.probes
    return VarianceMonitor(model.apply, pairs, interpolant, key=key, every=settings.log_every, draws=draws, sources=0)


def run(
    settings: Settings,
    start: Start,
    *,
    step: training.TrainStep,
    batches: Callable[[int], Any],
    monitor: VarianceMonitor,
    folder: Path,
    label: str = "training",
) -> tuple[training.TrainState, list[dict[str, Any]]]:
    """One training in one folder, with checkpoints and logged metrics, those of the monitor among them.

    Returns:
        The state on the first device, before the last step if it was stopped, and the rows of metrics.csv.

    Raises:
        NonFiniteLossError, CheckpointError, ConfigMismatchError: see there.
    """
    kept = Checkpoints(folder / "checkpoints", config=start.config, keep_every=5 * settings.save_every)
    with kept as checkpoints, stop_on_sigterm() as stop:
        state = checkpoints.restore(start.like) or start.first()
        with training.MetricsLog(folder, step=int(state.step)) as log:

            def on_log(state: training.TrainState, loss: float) -> None:
                log.write(int(state.step), loss=loss, **monitor.row(int(state.step)))

            state, _ = training.fit(
                state,
                step,
                batches,
                steps=settings.steps,
                log_every=settings.log_every,
                on_log=on_log,
                save_every=settings.save_every,
                save=checkpoints.save,
                stop=stop if jax.process_count() == 1 else _now_and_then(stop),
                progress=label,
                monitor=monitor,
            )
            return training.on_first_device(state), log.rows


def _now_and_then(stop: Callable[[], bool]) -> Callable[[], bool]:
    """Asks every STOP_EVERY-th time; all processes at the same ones."""
    asked = 0

    def ask() -> bool:
        nonlocal asked
        asked += 1
        return asked % STOP_EVERY == 0 and stop()

    return ask
