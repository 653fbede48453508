"""Training at one sigma, with checkpoints; measured on the way: distances to the targets and the gradient variance."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.celeba.settings import Settings
from experiments.common import compiled_quickly, fit_kept
from fvjax import flows, metrics, training
from fvjax.interpolants import Interpolant
from fvjax.monitoring import VarianceMonitor
from fvjax.types import Array, Key, Pair, Params


class Task(NamedTuple):
    """What a training step is given: the pairs, how they are joined, and whether each batch couples them anew."""

    pairs: Pair
    interpolant: Interpolant
    mixed: Array


class Trainer:
    """Network, optimiser and step of a run: made once, compiled once for all its networks of one number of pairs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.model = settings.model()
        self.optimizer = training.adam(settings.steps, learning_rate=settings.learning_rate, warmup=settings.warmup)
        self._first_state = compiled_quickly(self._init)
        self._moved = jax.jit(self._transported)

        def step(state: training.TrainState, task: Task) -> tuple[training.TrainState, Array]:
            key = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)
            batch = drawn(key, task, settings.batch)
            make = training.make_train_step(
                self.model.apply, task.interpolant, self.optimizer, ema_decay=settings.ema_decay
            )
            return make(state, batch)

        self.step = step

    def _init(self, key: Key) -> training.TrainState:
        return training.init_state(key, self.model, self.optimizer)

    def _transported(self, params: Params, x0: Array) -> Array:
        options = self.curve_options()
        return jax.vmap(lambda x: flows.transport(self.model.apply, params, x, **options))(x0)

    def curve_options(self) -> dict[str, Any]:
        """The solver of the learning curves: the run's own where its steps are fixed, else Euler."""
        steps = self.settings.solver_steps
        return {"solver": "euler", "steps": 50} if steps is None else self.settings.solver_options()

    def train(
        self,
        name: str,
        sigma: float,
        pairs: Pair,
        *,
        mixed: bool,
        targets: Mapping[str, Array],
        folder: Path,
        first: Params | None = None,
    ) -> tuple[training.TrainState, list[dict[str, float]]]:
        """Trains one network, or goes on from the newest checkpoint in `folder`/cells/`name`.

        Args:
            name: of the network, and of its folder. All networks of a run begin with the same random numbers.
            sigma: noise scale of the interpolant.
            pairs: what it is trained on.
            mixed: whether source and target are drawn anew for each batch instead of the pairs as they are.
            targets: what the flow from the first sources is compared with while it trains, aligned with `pairs`.
            folder: of the run.
            first: parameters to begin with; None draws them.

        Returns:
            The final state, and the rows of its metrics.csv.

        Raises:
            Stopped: on SIGTERM.
            NonFiniteLossError, CheckpointError, ConfigMismatchError: see there.
        """
        settings = self.settings
        key = jax.random.key(settings.seed)
        state_key, probe_key = jax.random.split(key)
        task = Task(pairs, settings.interpolant_of(sigma), jnp.asarray(mixed))
        pair_key, probe_key = jax.random.split(probe_key)
        seen = drawn(pair_key, task, len(pairs.x0)) if mixed else pairs
        monitor = VarianceMonitor(
            self.model.apply, seen, task.interpolant, key=probe_key, draws=settings.probes, sources=0
        )

        def begin() -> training.TrainState:
            state = self._first_state(state_key)
            return state if first is None else state._replace(params=first, ema_params=first)

        def measure(state: training.TrainState) -> Mapping[str, Any]:
            monitor.measure(int(state.step), state.params)
            measured: dict[str, Any] = {**monitor.row(int(state.step))}
            count = settings.curve
            predicted = self._moved(state.ema_params, pairs.x0[:count])
            for target, x1 in targets.items():
                measured[f"l2_{target}"] = metrics.pair_l2(predicted, x1[:count]).mean
            return measured

        return fit_kept(
            folder / "cells" / name,
            begin,
            self.step,
            task,
            like=jax.eval_shape(self._init, state_key),
            config=asdict(settings) | {"name": name, "sigma": sigma},
            steps=settings.steps,
            log_every=settings.log_every,
            save_every=settings.save_every,
            measure=measure,
            label=f"training {name}",
        )


def drawn(key: Key, task: Task, size: int) -> Pair:
    """`size` pairs with replacement; sources and targets independently of each other where the task is `mixed`."""
    source_key, target_key = jax.random.split(key)
    n = len(task.pairs.x0)
    i = jax.random.randint(source_key, (size,), 0, n)
    j = jnp.where(task.mixed, jax.random.randint(target_key, (size,), 0, n), i)
    return Pair(task.pairs.x0[i], task.pairs.x1[j])
