"""One cell of the table: a network trained on one coupling with one sigma, and what its flow does to known pairs."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import couplings, flows, metrics, nets, training
from fvjax.data.ot_benchmark import OptimalPairs
from fvjax.interpolants import Interpolant, constant_noise
from fvjax.types import Array, Key, Model, Pair, Params

Row = dict[str, Any]

COUPLINGS = ("ot", "minibatch_ot", "ot_finite", "shuffled", "independent")
FINITE = ("ot_finite", "shuffled")
"""Couplings of the first `pairs` samples only; the others draw from the whole pool."""

BATCH = 256
"""Examples of a step, and the size within which minibatch OT is optimal."""

POOL = 65_536
"""Samples of each law that stay in memory: what stands for 'as many as you like'."""

AT_ONCE = 256
"""Sources whose flow under the exact minimiser is integrated at once: it weighs every pair for each of them."""


class Settings(NamedTuple):
    """Sizes of one run, the same for every cell; hashable."""

    width: int
    depth: int
    steps: int
    pairs: int
    pool: int
    held_out: int
    solver: str
    solver_steps: int | None

    @property
    def tolerance(self) -> float | None:
        """Of the solver, where it chooses its own steps."""
        return None if self.solver_steps else flows.TOLERANCE


class Prepared(NamedTuple):
    """What all cells of one dimension share.

    Attributes:
        optimal: the pairs' law and map.
        pool: samples x0 and their optimal x1, [pool, d].
        held_out: further ones.
        partners: for each coupling the row of x1 that each row of x0 is trained towards, int[n]; None where it is
            drawn anew in every step.
        key: of the network's first parameters and of its batches.
    """

    optimal: OptimalPairs
    pool: Pair
    held_out: Pair
    partners: dict[str, np.ndarray | None]
    key: Key


class Task(NamedTuple):
    """What a training step is given. A coupling is three traced values, so that all couplings share one compilation.

    Attributes:
        pool: samples x0 and their optimal x1, [pool, d].
        used: only the first so many rows are drawn from, [].
        partner: row of x1 for each row of x0, int[pool].
        free: whether x1 is drawn at random instead, bool [].
        interpolant: how the two are joined.
    """

    pool: Pair
    used: Array
    partner: Array
    free: Array
    interpolant: Interpolant


def prepare(optimal: OptimalPairs, names: Sequence[str], settings: Settings, key: Key) -> Prepared:
    """Draws the pool and the held-out pairs of one dimension, and couples the pool in every way that is asked for."""
    pool_key, held_out_key, coupling_key, cell_key = jax.random.split(key, 4)
    pool, held_out = optimal.sample(pool_key, settings.pool), optimal.sample(held_out_key, settings.held_out)
    found = {name: _partners(pool, name, settings, coupling_key) for name in names}
    return Prepared(optimal, pool, held_out, found, cell_key)


def _partners(pool: Pair, coupling: str, settings: Settings, key: Key) -> np.ndarray | None:
    if coupling == "independent":
        return None
    if coupling == "shuffled":
        return np.asarray(couplings.derangement(key, settings.pairs))
    if coupling == "minibatch_ot":
        return _minibatch_partners(pool, np.asarray(jax.random.permutation(key, len(pool.x0))))
    return np.arange(settings.pairs if coupling == "ot_finite" else len(pool.x0))


def _minibatch_partners(pool: Pair, rows: np.ndarray) -> np.ndarray:
    """Independent batches of sources and targets, each solved exactly once: the plan of minibatch OT, kept."""
    whole = len(rows) - len(rows) % BATCH
    targets = rows[:whole].reshape(-1, BATCH)
    sources = np.asarray(pool.x0[:whole]).reshape(*targets.shape, -1)
    found = _assignments(jnp.asarray(sources), pool.x1[targets])
    return np.take_along_axis(targets, np.asarray(found), axis=1).ravel()


@jax.jit
def _assignments(x0: Array, x1: Array) -> Array:
    return jax.lax.map(lambda batch: couplings.assignment(*batch), (x0, x1))


def training_pairs(prepared: Prepared, coupling: str, settings: Settings) -> Pair:
    """The first `pairs` sources and the targets that they were trained towards; the optimal ones if there are none."""
    pool, count, partner = prepared.pool, settings.pairs, prepared.partners[coupling]
    return Pair(pool.x0[:count], pool.x1[:count] if partner is None else pool.x1[partner[:count]])


def task_of(prepared: Prepared, coupling: str, sigma: float) -> Task:
    """What the training step of one cell is given."""
    size, partner = len(prepared.pool.x0), prepared.partners[coupling]
    padded = np.zeros(size, np.int32)
    if partner is not None:
        padded[: len(partner)] = partner
    count = size if partner is None else len(partner)
    return Task(
        prepared.pool,
        jnp.asarray(count, jnp.int32),
        jnp.asarray(padded),
        jnp.asarray(partner is None),
        constant_noise(jnp.asarray(sigma, jnp.float32)),
    )


def draw_batch(task: Task, key: Key) -> Pair:
    """`BATCH` pairs of the task's coupling, with replacement."""
    source_key, target_key = jax.random.split(key)
    rows = jax.random.randint(source_key, (BATCH,), 0, task.used)
    free = jax.random.randint(target_key, (BATCH,), 0, task.used)
    targets = jnp.where(task.free, free, task.partner[rows])
    return Pair(task.pool.x0[rows], task.pool.x1[targets])


@functools.cache
def _trainer(dim: int, width: int, depth: int, steps: int) -> tuple[Model, Any, training.TrainStep]:
    """Network, optimiser and step; made once for each dimension, so that its cells share one compilation."""
    model = nets.mlp(dim, width=width, depth=depth)
    optimizer = training.adam(steps)

    def step(state: training.TrainState, task: Task) -> tuple[training.TrainState, Array]:
        batch = draw_batch(task, jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step))
        return training.make_train_step(model.apply, task.interpolant, optimizer)(state, batch)

    return model, optimizer, step


def run_cell(prepared: Prepared, coupling: str, sigma: float, settings: Settings) -> tuple[list[Row], list[Row]]:
    """Trains one network; returns its rows, training sources and held-out ones, and its losses.

    Raises:
        NonFiniteLossError: from training.
        FloatingPointError: as `rows_of`.
    """
    model, optimizer, step = _trainer(prepared.optimal.dims[0], settings.width, settings.depth, settings.steps)
    cell = cell_of(prepared, coupling, sigma)
    log: list[Row] = []

    def on_log(state: training.TrainState, loss: float) -> None:
        log.append(cell | {"step": int(state.step), "loss": loss})

    state, _ = training.fit(
        training.init_state(prepared.key, model, optimizer),
        step,
        task_of(prepared, coupling, sigma),
        steps=settings.steps,
        log_every=max(1, settings.steps // 10),
        on_log=on_log,
    )

    def transported(x0: Array) -> Array:
        return _transported(model.apply, state.ema_params, x0, solver=settings.solver, steps=settings.solver_steps)

    known = {"map": "network", "training_steps": settings.steps, "training_loss": log[-1]["loss"]}
    return rows_of(prepared, cell | known, settings, transported), log


def cell_of(prepared: Prepared, coupling: str, sigma: float) -> Row:
    """What names a cell in every row of it."""
    return {"data": prepared.optimal.name, "dim": prepared.optimal.dims[0], "coupling": coupling, "sigma": sigma}


def rows_of(prepared: Prepared, cell: Row, settings: Settings, transported: Callable[[Array], Array]) -> list[Row]:
    """A flow's distances on training sources and on held-out ones; it starts at x0, without the noise of t = 0.

    Only training rows of couplings with a lasting partner have the distance to the training target. Sources whose solve
    failed (an adaptive solver on a field with jumps) are counted in `failed` and left out.

    Raises:
        FloatingPointError: if every solve failed.
    """
    train = training_pairs(prepared, cell["coupling"], settings)
    known = prepared.partners[cell["coupling"]] is not None
    solver = {"solver": settings.solver, "solver_steps": settings.solver_steps, "tolerance": settings.tolerance}
    rows = []
    for split, x0, optimal, target in (
        ("train", train.x0, prepared.pool.x1[: settings.pairs], train.x1 if known else None),
        ("held_out", *prepared.held_out, None),
    ):
        predicted = transported(x0)
        ok = np.isfinite(np.asarray(predicted)).all(1)
        if not ok.any():
            raise FloatingPointError(f"the flow must stay finite, got nan or inf for {cell | solver}")
        row = cell | {"split": split} | solver | {"failed": int((~ok).sum())}
        row |= measured(prepared.optimal, Pair(x0[ok], optimal[ok]), predicted[ok])
        if target is not None:
            row |= _named("l2_training", metrics.pair_l2(predicted[ok], target[ok]))
        rows.append(row)
    return rows


def measured(optimal: OptimalPairs, pairs: Pair, predicted: Array) -> Row:
    """L2-UVP in per cent, the cosine of the displacements, and the mean L2 to the optimal targets."""
    uvp = metrics.l2_uvp(predicted, pairs.x1, variance=optimal.target_variance)
    cosine = float(metrics.direction_cosine(pairs.x0, predicted, pairs.x1))
    # Undefined for a map that moves nothing.
    row = {"l2_uvp": float(uvp), "cosine": None if math.isnan(cosine) else cosine}
    return row | _named("l2_ot", metrics.pair_l2(predicted, pairs.x1)) | {"n": len(pairs.x0)}


def _named(name: str, distance: metrics.PairDistance) -> Row:
    return {f"{name}_mean": float(distance.mean), f"{name}_std": float(distance.standard_deviation)}


@functools.partial(jax.jit, static_argnames=("field", "solver", "steps"))
def _transported(field: Any, params: Params, x0: Array, *, solver: str, steps: int | None) -> Array:
    return jax.vmap(lambda x: flows.transport(field, params, x, solver=solver, steps=steps))(x0)
