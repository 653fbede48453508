"""Training of one flow from noise to images, with checkpoints, metrics and the gradient variance on the way."""

import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cifar10.settings import Settings
from fvjax import couplings, data, gradients, training
from fvjax.checkpoints import Checkpoints, stop_on_sigterm
from fvjax.interpolants import constant_noise, draw_paths
from fvjax.losses import squared_error
from fvjax.types import Array, Coupling, Key, Model, Pair, Params, PathSample

BINS = 4
"""Equal intervals of time in which the gradient variance is logged."""

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
    """The examples at which loss and gradient variance are measured: coupled within this set, times drawn.

    Args:
        settings: of the run.
        images: the first ones of a split.
        key: of source, coupling, times and noise.
        held_out: whether they are not of the training split; the noise of fixed pairs is then drawn, too.
    """
    count = len(images)
    x1 = jnp.asarray(data.batch(images, seed=0, step=0, size=count))
    source_key, coupling_key, path_key = jax.random.split(key, 3)
    if settings.coupling == "fixed" and not held_out:
        indices = data.batch_indices(0, 0, count, count)
        x0 = jnp.asarray(fixed_sources(settings.seed, indices, settings.dims))
    else:
        x0 = jax.random.normal(source_key, x1.shape)
    pairs = couplings_by_name()[settings.coupling](coupling_key, x0, x1)
    return draw_paths(path_key, pairs, constant_noise(settings.sigma))


@functools.partial(jax.jit, static_argnames="field")
def gradient_variance(field: Any, params: Params, probe: PathSample) -> dict[str, Array]:
    """Total variance of the loss gradient over the probe, its noise scale, and the variance in each time bin."""
    loss = squared_error(field, reduction="mean")
    by = gradients.time_bins(probe.t, BINS)
    grouped = gradients.gradient_moments(loss, params, probe, by=by, groups=BINS)
    moments = gradients.merge_groups(grouped)
    bins = gradients.total_variance(grouped)
    return {
        "gradient_variance": gradients.total_variance(moments),
        "gradient_noise_scale": gradients.gradient_noise_scale(moments),
        **{f"gradient_variance_bin_{k}": bins[k] for k in range(BINS)},
    }


def train(
    settings: Settings, model: Model, images: data.Images, *, folder: Path
) -> tuple[training.TrainState, list[dict[str, Any]]]:
    """Trains, or goes on from the newest checkpoint in `folder`; returns early on SIGTERM.

    Returns:
        The state on the first device, and the rows of metrics.csv.

    Raises:
        NonFiniteLossError, CheckpointError, ConfigMismatchError: see there.
    """
    optimizer = optimizer_of(settings)
    state_key, probe_key = jax.random.split(jax.random.key(settings.seed))

    def first_state(key: Key) -> training.TrainState:
        return training.init_state(key, model, optimizer)

    probe = probe_paths(settings, images.train[: settings.probes], probe_key)
    step = training.parallelize(
        training.make_train_step(
            model.apply,
            constant_noise(settings.sigma),
            optimizer,
            coupling=couplings_by_name()[settings.coupling],
            source=None if settings.coupling == "fixed" else training.standard_normal,
            dropout=settings.network.get("dropout", 0.0) > 0,
            ema_decay=settings.ema_decay,
            micro_batches=settings.micro_batches,
            compute_dtype=None if settings.precision == "float32" else settings.precision,
            axis_name=training.AXIS,
        )
    )
    kept = Checkpoints(folder / "checkpoints", config=asdict(settings), keep_every=5 * settings.save_every)
    with kept as checkpoints, stop_on_sigterm() as stop:
        state = checkpoints.restore(jax.eval_shape(first_state, state_key)) or _compiled_quickly(first_state)(state_key)
        with training.MetricsLog(folder, step=int(state.step)) as log:

            def on_log(state: training.TrainState, loss: float) -> None:
                measured = gradient_variance(model.apply, training.on_first_device(state.params), probe)
                log.write(int(state.step), loss=loss, **{name: float(value) for name, value in measured.items()})

            state, _ = training.fit(
                state,
                step,
                batches(settings, images.train, training.process_rows(settings.batch)),
                steps=settings.steps,
                log_every=settings.log_every,
                on_log=on_log,
                save_every=settings.save_every,
                save=checkpoints.save,
                stop=stop if jax.process_count() == 1 else _now_and_then(stop),
                progress="training",
            )
            return training.on_first_device(state), log.rows


def _compiled_quickly(function: Callable[..., Any]) -> Callable[..., Any]:
    """For a function that runs once: the draws of a U-Net's parameters take 20 s to compile with all optimizations."""
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=quick)


def _now_and_then(stop: Callable[[], bool]) -> Callable[[], bool]:
    """Asks every STOP_EVERY-th time; all processes at the same ones."""
    asked = 0

    def ask() -> bool:
        nonlocal asked
        asked += 1
        return asked % STOP_EVERY == 0 and stop()

    return ask
