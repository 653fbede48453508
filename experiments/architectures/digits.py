"""Part B: optimal pairs of scikit-learn's digits, shuffled: who memorizes them, at which sigma, after which steps?"""

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.architectures.networks import Row, Size, Task, carried, count_parameters, make_trainer, variance_of
from experiments.common import compiled_quickly
from fvjax import couplings, data, metrics, pairs, training
from fvjax.data import ot_benchmark
from fvjax.interpolants import constant_noise, draw_paths
from fvjax.types import Array, Key, Pair, Params

DIMS = (8, 8, 1)
BATCH = 32
SOLVER, SOLVER_STEPS = "euler", 50
"""Of every flow in this part, in the learning curves too."""

AT_ONCE = 50
"""Sources whose flow is integrated in one call, and training sources behind each point of a learning curve."""

MINIMISER = "minimiser"
"""Name of the rows of the exact minimiser of the flow-matching loss over the shuffled pairs."""

SIZES = {
    "mlp": (Size("mlp", 512, 3), Size("mlp", 256, 2)),
    "unet": (Size("unet", 16, 1),),
    "transformer": (Size("transformer", 64, 2),),
}
"""About 170,000 parameters each, and an MLP of 858,000, which trains in less time than any of the others but MLPs."""

SMOKE_SIZES = {
    "mlp": (Size("mlp", 16, 1),),
    "unet": (Size("unet", 8, 1, levels=1),),
    "transformer": (Size("transformer", 16, 1),),
}

STEPS = {"mlp": 4000, "unet": 1500, "transformer": 1500}
"""By default: what a U-Net's convolutions leave time for. Every number has its steps beside it."""


class Problem(NamedTuple):
    """Optimal pairs for training and held out, what training sees of the first, and the key of its networks."""

    optimal: Pair
    held_out: Pair
    shuffled: Pair
    key: Key


def make_problem(key: Key, count: int) -> Problem:
    """Draws `count` training pairs (and shuffles them once), and at most as many held-out ones."""
    train_key, held_out_key, shuffle_key, network_key = jax.random.split(key, 4)
    images = data.load("digits")
    train, test = (ot_benchmark.convex_pairs(images, split=split) for split in ("train", "test"))
    optimal = train.sample(train_key, count)
    held_out = test.sample(held_out_key, min(count, test.size or count))
    return Problem(optimal, held_out, couplings.shuffled(shuffle_key, *optimal), network_key)


def training_images() -> int:
    """How many digits there are to train on: the most pairs that can be asked for."""
    return len(data.load("digits").train)


def draw_batch(key: Key, known: Pair, n: int) -> Pair:
    """n of the pairs, with replacement."""
    return training.minibatch(known, key, n)


def run_cell(
    problem: Problem, size: Size, sigma: float, *, steps: int, points: int, probes: int
) -> tuple[list[Row], list[Row]]:
    """Trains one network at one sigma; returns its row and its learning curve.

    Args:
        problem: the pairs.
        size: of the network.
        sigma: noise scale, traced: every sigma runs the same compiled step.
        steps: of the training.
        points: of the learning curve, fewer where there are fewer steps.
        probes: draws behind the gradient variance.

    Raises:
        NonFiniteLossError: from training.
        FloatingPointError: if a flow does not stay finite.
    """
    begin = time.perf_counter()
    trainer = make_trainer(size, DIMS, draw_batch, steps, BATCH)
    field = trainer.model.apply
    task = Task(problem.shuffled, constant_noise(jnp.asarray(sigma, jnp.float32)))
    cell: Row = {"part": "digits", "network": size.network, "name": size.label, "sigma": sigma}
    curve: list[Row] = []

    def on_log(state: training.TrainState, loss: float) -> None:
        measured = _curve_point(problem, _moved(field, state.ema_params, problem.optimal.x0[:AT_ONCE]))
        curve.append(cell | {"step": int(state.step), "loss": loss} | measured)

    state, _ = training.fit(
        trainer.first_state(problem.key),
        trainer.step,
        task,
        steps=steps,
        log_every=max(1, steps // points),
        on_log=on_log,
    )
    seconds, params = time.perf_counter() - begin, state.ema_params
    pair_key, path_key = jax.random.split(jax.random.fold_in(problem.key, 1))
    probe = draw_paths(path_key, draw_batch(pair_key, problem.shuffled, probes), task.interpolant)
    variance = _variance_of(field)(params, probe)
    row = cell | {
        "parameters": count_parameters(params),
        "steps": steps,
        "batch": BATCH,
        "learning_rate": size.learning_rate,
        "loss": curve[-1]["loss"],
    }
    row |= distances(problem, functools.partial(_moved, field, params), cell)
    row |= {"crossing_step": crossing_step(curve), "curve_every": max(1, steps // points)}
    row |= {key: float(variance[key]) for key in ("gradient_variance", "gradient_noise_scale")}
    return [row | {"seconds": seconds}], curve


def minimiser_rows(problem: Problem, sigma: float) -> list[Row]:
    """The same distances for the exact minimiser: what a network without limits would learn; no training.

    `sigma_c_predicted` is where it should let go of the pairs.
    """
    field = pairs.empirical_minimiser(problem.shuffled, constant_noise(jnp.asarray(sigma, jnp.float32)))
    cell: Row = {"part": "digits", "network": MINIMISER, "name": MINIMISER, "sigma": sigma}
    found = distances(problem, functools.partial(_minimiser_moved, field), cell)
    return [cell | found | {"sigma_c_predicted": pairs.predicted_sigma_critical(problem.shuffled).predicted}]


def baselines(problem: Problem) -> Row:
    """Mean L2 between the sources, the shuffled targets and the optimal ones, on training pairs; no flow."""
    optimal, other = problem.optimal, problem.shuffled.x1
    return {
        "l2_identity_to_ot": float(metrics.pair_l2(optimal.x0, optimal.x1).mean),
        "l2_identity_to_shuffled": float(metrics.pair_l2(optimal.x0, other).mean),
        "l2_shuffled_to_ot": float(metrics.pair_l2(other, optimal.x1).mean),
    }


def distances(problem: Problem, moved: Any, cell: Row) -> Row:
    """Mean and standard deviation of the L2 from the flow's ends to the shuffled and the optimal targets.

    Raises:
        FloatingPointError: if the flow does not stay finite.
    """
    row: Row = {"solver": SOLVER, "solver_steps": SOLVER_STEPS}
    ends = {
        split: _in_chunks(moved, np.asarray(x0))
        for split, x0 in (("train", problem.optimal.x0), ("held_out", problem.held_out.x0))
    }
    if not all(np.isfinite(found).all() for found in ends.values()):
        raise FloatingPointError(f"the flow must stay finite, got nan or inf for {cell}")
    for name, split, target in (
        ("shuffled", "train", problem.shuffled.x1),
        ("ot", "train", problem.optimal.x1),
        ("held_out_ot", "held_out", problem.held_out.x1),
    ):
        distance = metrics.pair_l2(jnp.asarray(ends[split]), target)
        row |= {f"l2_{name}_mean": float(distance.mean), f"l2_{name}_std": float(distance.standard_deviation)}
    return row | {"n": len(problem.optimal.x0), "n_held_out": len(problem.held_out.x0)}


def crossing_step(curve: Sequence[Row]) -> int | None:
    """The first logged step at which the flow ends nearer to the shuffled targets than to the optimal ones."""
    return next((row["step"] for row in curve if row["l2_shuffled"] < row["l2_ot"]), None)


def _curve_point(problem: Problem, predicted: Array) -> Row:
    count = len(predicted)
    return {
        f"l2_{name}": float(metrics.pair_l2(predicted, target[:count]).mean)
        for name, target in (("shuffled", problem.shuffled.x1), ("ot", problem.optimal.x1))
    }


def _in_chunks(moved: Any, x0: np.ndarray) -> np.ndarray:
    """The flow from all sources, in calls of one shape."""
    size = min(AT_ONCE, len(x0))
    padded = np.concatenate([x0, np.repeat(x0[-1:], -len(x0) % size, axis=0)])
    ends = [np.asarray(moved(jnp.asarray(part))) for part in np.split(padded, len(padded) // size)]
    return np.concatenate(ends)[: len(x0)]


@functools.partial(jax.jit, static_argnames="field")
def _moved(field: Any, params: Params, x0: Array) -> Array:
    return carried(field, params, x0, solver=SOLVER, steps=SOLVER_STEPS)


@jax.jit
def _minimiser_moved(field: Any, x0: Array) -> Array:
    return carried(field, None, x0, solver=SOLVER, steps=SOLVER_STEPS)


@functools.cache
def _variance_of(field: Any) -> Any:
    """The gradient variance of one network, compiled once for all sigmas."""
    return compiled_quickly(functools.partial(variance_of, field))
