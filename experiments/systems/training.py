"""The one network of a problem, trained on a table of pairs; every system differs in table and interpolant only."""

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import fit_kept
from experiments.systems.problems import Problem
from fvjax import nets, training
from fvjax.interpolants import Interpolant
from fvjax.monitoring import VarianceMonitor
from fvjax.types import Array, Key, Model, Pair, Params

TABLE = 16_384
"""Rows of the table of pairs that a training draws from; smaller sets of pairs are repeated."""

LOGS = 8
"""Looks at the loss in one training."""


class Settings(NamedTuple):
    """Sizes of a run; hashable."""

    width: int
    depth: int
    steps: int
    bridge_steps: int
    batch: int
    rounds: int
    rectifications: int
    path_steps: int
    probes: int
    measured: int
    coupling_batch: int
    table: int
    seed: int
    smoke: bool


class Task(NamedTuple):
    """What a training step is given: rows of pairs, how many of them count, and how they are joined."""

    pairs: Pair
    used: Array
    interpolant: Interpolant


class Trained(NamedTuple):
    """A network and what its training showed.

    Attributes:
        params: the averaged ones.
        loss: mean over the last part of the training, and over dimensions.
        gradient_variance: of one example's gradient, loss summed over dimensions divided by d.
        gradient_noise_scale: trace of that covariance over the squared mean.
        seconds: of the training without compilation: steps times the median time of a step; nan if it was so short
            that all of it was compiled.
    """

    params: Params
    loss: float
    gradient_variance: float
    gradient_noise_scale: float
    seconds: float


class Trainer:
    """Network and steps of one problem: made once, so that its systems share compilations."""

    def __init__(self, problem: Problem, settings: Settings, folder: Path) -> None:
        self.problem, self.settings, self.folder = problem, settings, folder
        self.model = _model(problem.dim, settings.width, settings.depth)

    def first(self, number: int = 0) -> Params:
        """Untrained parameters: the same for every system; DSBM has two networks."""
        return _first(self.model)(jax.random.fold_in(jax.random.fold_in(self.problem.key, 1), number))

    def train(
        self, name: str, pairs: Any, interpolant: Interpolant, params: Params, *, index: int, steps: int
    ) -> Trained:
        """Trains from `params`, or goes on from the newest checkpoint of `name`.

        Args:
            name: of the network; names its folder.
            pairs: () -> the pairs [n, d]; called only if something is left to be trained.
            interpolant: how they are joined.
            params: to begin with.
            index: of the round; its random numbers depend on it and on the problem alone.
            steps: of the training.
        """
        key = jax.random.fold_in(jax.random.fold_in(self.problem.key, 2), index)
        place = self.folder / "networks" / f"{self.problem.name}_{name}"
        step = _step(self.model, self.settings.batch, steps)
        log_every = max(1, steps // LOGS)
        table = functools.cache(lambda: tabulated(pairs(), self.settings.table))  # made when it is wanted, once
        times = [time.perf_counter()]

        def begin() -> training.TrainState:
            optimizer = training.adam(steps)
            return training.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), params, key)

        def measure(state: training.TrainState) -> Mapping[str, Any]:
            times.append(time.perf_counter())
            found: dict[str, Any] = {"seconds": times[-1] - times[-2]}
            if int(state.step) == steps:
                found |= self._variance(state.params, table(), interpolant, jax.random.fold_in(key, 3))
            times.append(time.perf_counter())
            return found

        complete = _complete(place, steps)
        task = None if complete else _task(table(), interpolant)
        times.append(time.perf_counter())
        state, rows = fit_kept(
            place,
            begin,
            step,
            task,
            like=jax.eval_shape(begin),
            config=self.settings._asdict() | {"problem": self.problem.name, "name": name, "steps": steps},
            steps=steps,
            log_every=log_every,
            save_every=log_every * (LOGS // 2),
            measure=measure,
            label=f"{self.problem.name} {name}",
        )
        if not complete:
            (place / DONE).write_text(f"{steps}\n")
        last, regular = rows[-1], [row["seconds"] for row in rows[1:] if row["step"] % log_every == 0]
        seconds = float(np.median(regular)) * steps / log_every if regular else float("nan")
        return Trained(state.ema_params, last["loss"], last["gradient_variance"], last["gradient_noise_scale"], seconds)

    def _variance(self, params: Params, table: tuple[Pair, Array], interpolant: Interpolant, key: Key) -> Any:
        pairs, used = table
        seen, draws = Pair(*(x[: int(used)] for x in pairs)), self.settings.probes
        monitor = VarianceMonitor(self.model.apply, seen, interpolant, key=key, draws=draws, sources=0)
        monitor.measure(0, params)
        return {name: value for name, value in monitor.row(0).items() if "bin" not in name}


def _task(table: tuple[Pair, Array], interpolant: Interpolant) -> Task:
    pairs, used = table
    return Task(pairs, used, interpolant)


DONE = "done"
"""Marks a network whose training is complete, so that a resumed run need not make its pairs again."""


def _complete(place: Path, steps: int) -> bool:
    return (place / DONE).is_file() and (place / DONE).read_text() == f"{steps}\n"


def tabulated(pairs: Pair, rows: int) -> tuple[Pair, Array]:
    """Pairs as a table of `rows`, repeated to fill it, and how many of them count: one shape for all trainings."""
    n = len(pairs.x0)
    index = np.arange(rows) % n
    x0, x1 = (jnp.asarray(np.asarray(x, np.float32)[index]) for x in pairs)
    return Pair(x0, x1), jnp.asarray(min(n, rows), jnp.int32)


def _drawn(key: Key, pairs: Pair, used: Array, size: int) -> Pair:
    rows = jax.random.randint(key, (size,), 0, used)
    return Pair(pairs.x0[rows], pairs.x1[rows])


@functools.cache
def _model(dim: int, width: int, depth: int) -> Model:
    """One for all problems of a dimension: what is compiled for it is compiled once."""
    return nets.mlp(dim, width=width, depth=depth)


@functools.cache
def _first(model: Model) -> Any:
    return jax.jit(model.init)


@functools.cache
def _step(model: Model, batch: int, steps: int) -> training.TrainStep:
    optimizer = training.adam(steps)

    def step(state: training.TrainState, task: Task) -> tuple[training.TrainState, Array]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)
        pairs = _drawn(key, task.pairs, task.used, batch)
        return training.make_train_step(model.apply, task.interpolant, optimizer)(state, pairs)

    return step
