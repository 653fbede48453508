"""One cell of the table: a flow of a network or of an exact minimiser, and where it takes old and new sources."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from experiments.gaussian_mixture.problem import Law, Row, Samples
from fvjax import couplings, flows, metrics, nets, training
from fvjax import pairs as finite
from fvjax.interpolants import Interpolant, constant_noise
from fvjax.types import Array, Model, Pair, Params, VelocityField

BATCH = 256
"""Examples of a training step."""

AT_ONCE = 256
"""Sources that are carried at once: the exact minimiser weighs every pair for each of them."""

SHOWN = 500
"""Points of a sample that the figure shows."""


class Settings(NamedTuple):
    """Sizes of one run, the same for every cell; hashable."""

    width: int
    depth: int
    steps: int
    pairs: int
    fresh: int
    solver: str
    solver_steps: int | None

    @property
    def tolerance(self) -> float | None:
        """Of the solver, where it chooses its own steps."""
        return None if self.solver_steps else flows.TOLERANCE


class Task(NamedTuple):
    """What a training step is given; sigma is a leaf of the interpolant, so that all sigmas share one compilation."""

    pairs: Pair
    interpolant: Interpolant


class Ends(NamedTuple):
    """Where a flow took the sources that it was trained on (None if that means nothing) and the fresh ones."""

    trained: np.ndarray | None
    fresh: np.ndarray


def interpolant_of(sigma: float) -> Interpolant:
    """Constant noise: CFM(sigma) of the paper."""
    return constant_noise(jnp.asarray(sigma, jnp.float32))


@functools.cache
def trainer(dim: int, width: int, depth: int, steps: int) -> tuple[Model, Any, training.TrainStep]:
    """Network, optimiser and step; made once for each dimension, so that its cells share one compilation."""
    model = nets.mlp(dim, width=width, depth=depth)
    optimizer = training.adam(steps)

    def step(state: training.TrainState, task: Task) -> tuple[training.TrainState, Array]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)
        batch = training.minibatch(task.pairs, key, BATCH)
        return training.make_train_step(model.apply, task.interpolant, optimizer)(state, batch)

    return model, optimizer, step


def network_cell(law: Law, samples: Samples, sigma: float, settings: Settings) -> tuple[Row, list[Row], Ends]:
    """Trains one network on the pairs; its row, its losses and the ends of its flow.

    Raises:
        NonFiniteLossError: from training.
        FloatingPointError: if every solve failed.
    """
    model, optimizer, step = trainer(law.mixture.dim, settings.width, settings.depth, settings.steps)
    network_key, _, _ = jax.random.split(samples.key, 3)
    log: list[Row] = []
    state, _ = training.fit(
        training.init_state(network_key, model, optimizer),
        step,
        Task(samples.pairs, interpolant_of(sigma)),
        steps=settings.steps,
        log_every=max(1, settings.steps // 10),
        on_log=lambda state, loss: log.append({"step": int(state.step), "loss": loss}),
    )
    row, ends = _row(law, samples, Partial(model.apply), state.ema_params, settings=settings)
    known = {"map": "network", "training_steps": settings.steps, "training_loss": log[-1]["loss"]}
    return known | row, log, ends


def minimiser_row(law: Law, samples: Samples, sigma: float, settings: Settings) -> Row:
    """The flow of the exact minimiser of the same pairs: what a network without limits would learn from them."""
    field = finite.empirical_minimiser(samples.pairs, interpolant_of(sigma))
    return {"map": "minimiser"} | _row(law, samples, field, None, settings=settings)[0]


def population_row(law: Law, samples: Samples, sigma: float, settings: Settings) -> Row:
    """The flow of the minimiser of infinitely many independent pairs: it knows no training pairs to return."""
    field = law.mixture.velocity(interpolant_of(sigma))
    return {"map": "population"} | _row(law, samples, field, None, settings=settings, knows_pairs=False)[0]


def target_row(law: Law, samples: Samples) -> Row:
    """Spare targets in place of a flow's ends: what a perfect sampler has by chance, and the L2 of random pairs."""
    _, _, order_key = jax.random.split(samples.key, 3)
    order = couplings.derangement(order_key, len(samples.pairs.x1))
    row = measured(law, samples, Ends(*(np.asarray(x) for x in samples.spare)))
    random = metrics.pair_l2(samples.pairs.x1[order], samples.pairs.x1)
    row |= {"pair_l2_mean": float(random.mean), "pair_l2_std": float(random.standard_deviation)}
    return {"map": "target"} | row | {"recovered": 1 / len(order)}


def _row(
    law: Law,
    samples: Samples,
    field: VelocityField,
    params: Params,
    *,
    settings: Settings,
    knows_pairs: bool = True,
) -> tuple[Row, Ends]:
    """Carries all sources, from x0 itself (without the noise of t = 0), and measures where they end.

    Sources whose solve failed (an adaptive solver on a field with jumps) are counted in `failed` and left out.
    """
    sources = [samples.pairs.x0, samples.fresh.x0] if knows_pairs else [samples.fresh.x0]
    solver = {"solver": settings.solver, "solver_steps": settings.solver_steps, "tolerance": settings.tolerance}
    found = np.asarray(
        _carried(field, params, jnp.concatenate(sources), solver=settings.solver, steps=settings.solver_steps)
    )
    ends = Ends(found[: settings.pairs] if knows_pairs else None, found[-settings.fresh :])
    failed = int((~np.isfinite(found).all(1)).sum())
    return measured(law, samples, ends) | solver | {"failed": failed}, ends


@functools.partial(jax.jit, static_argnames=("solver", "steps"))
def _carried(field: VelocityField, params: Params, x0: Array, *, solver: str, steps: int | None) -> Array:
    def carried(x: Array) -> Array:
        return flows.transport(field, params, x, solver=solver, steps=steps)

    count = min(AT_ONCE, len(x0))
    filled = jnp.pad(x0, ((0, -len(x0) % count), (0, 0)))  # else the rest is a second program to compile
    return jax.lax.map(carried, filled, batch_size=count)[: len(x0)]


def measured(law: Law, samples: Samples, ends: Ends) -> Row:
    """Every measure of one cell; those of training pairs only where there are ends of training sources.

    generalization_mmd, memorization_mmd: squared MMD of the ends of fresh sources and fresh targets, of training
    sources and training targets; unbiased, and biased under the same name with `_biased`. memorized: share of the ends
    of fresh sources that are copies of training targets, with its bootstrap interval. recovered: share of the training
    sources whose end is nearer to their own target than to any other.

    Raises:
        FloatingPointError: if no end, or only one, is finite.
    """
    _, bootstrap_key, _ = jax.random.split(samples.key, 3)
    fresh = ends.fresh[_finite(ends.fresh)]
    targets = np.asarray(samples.pairs.x1)
    row = _mmd("generalization", fresh, np.asarray(samples.fresh.x1), law)
    copies = metrics.memorized_fraction(fresh, targets, key=bootstrap_key)
    row |= {"memorized": copies.fraction, "memorized_low": copies.low, "memorized_high": copies.high}
    row |= {"fresh": len(fresh)}
    if ends.trained is None:
        return row
    own = np.flatnonzero(_finite(ends.trained))
    trained = ends.trained[own]
    row |= _mmd("memorization", trained, targets, law)
    distance = metrics.pair_l2(jnp.asarray(trained), samples.pairs.x1[own])
    row |= {"pair_l2_mean": float(distance.mean), "pair_l2_std": float(distance.standard_deviation)}
    nearest = finite.nearest_target_is_own(jnp.asarray(trained), samples.pairs.x1, jnp.asarray(own))
    return row | {"recovered": float(jnp.mean(nearest)), "pairs": len(own)}


def _finite(ends: np.ndarray) -> np.ndarray:
    ok: np.ndarray = np.isfinite(ends).all(1)
    if ok.sum() < 2:
        raise FloatingPointError(f"the flow must stay finite, got {int(ok.sum())} finite ends of {len(ok)}")
    return ok


def _mmd(name: str, x: np.ndarray, y: np.ndarray, law: Law) -> Row:
    found = {biased: metrics.squared_mmd(x, y, bandwidths=law.bandwidths, biased=biased) for biased in (False, True)}
    return {f"{name}_mmd": found[False], f"{name}_mmd_biased": found[True]}


def view_of(law: Law, what: str, x: Array | np.ndarray) -> Row:
    """The first points of a sample in the plane of the law's first two principal directions, for the figure."""
    points = np.asarray(x, np.float64)[:SHOWN] @ law.view
    return {"map": "view", "dim": law.mixture.dim, "what": what, "points": np.round(points, 4).tolist()}
