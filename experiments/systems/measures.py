"""What a trained system does to held-out sources and to those that it was trained on."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from experiments.systems.problems import Problem
from fvjax import flows, metrics, rectification
from fvjax import pairs as finite
from fvjax.rectification import EulerError
from fvjax.types import Array, Key, Pair, Params, VelocityField

Row = dict[str, Any]
Carry = Callable[[Array, Key], np.ndarray]
"""(sources [n, d], key) -> where the system takes them, [n, d]."""

SOLVER = "dopri5"
"""Of flows, at its default tolerance; a smoke run takes fixed steps, which compile in a fraction of the time."""
EULER_STEPS = (1, 4, 16)

REPEATS = 20
"""Random divisions for the floor of the MMD."""


class Kernel(NamedTuple):
    """The kernel of a problem's MMD, one for all its systems, and what two samples of the targets' law have with it."""

    bandwidths: tuple[float, ...]
    floor: metrics.MmdFloor


def kernel_of(problem: Problem) -> Kernel:
    """Widths from two samples of the targets' law, and the unbiased MMD between such samples."""
    first, second = np.asarray(problem.held_out.x1), np.asarray(problem.reference)
    widths = tuple(float(width) for width in metrics.median_bandwidths(first, second))
    key = jax.random.fold_in(problem.key, 4)
    return Kernel(widths, metrics.mmd_floor(key, first, second, repeats=REPEATS, bandwidths=widths))


def ends_row(problem: Problem, kernel: Kernel, carry: Carry, *, measured: int) -> Row:
    """Generalization on held-out sources and memorization on the first `measured` training sources.

    ================  ==============================================================================================
    l2_ot_*           held-out end to the optimal target; only where that is known
    mmd               unbiased, squared, between the held-out ends and the reference targets
    train_l2_pair_*   training end to the target that the source was paired with, from the start
    train_l2_ot_*     training end to the optimal target
    recovered         share of training ends that are nearer to their own paired target than to any other
    memorized_*       share of held-out ends that are copies of a training target, and its 95% interval
    covariance_*      mean over coordinates of Cov(x0, x1), its standard error; held-out sources
    ================  ==============================================================================================
    """
    keys = jax.random.split(jax.random.fold_in(problem.key, 5), 3)
    held_out = problem.held_out
    ends = carry(held_out.x0, keys[0])
    row: Row = {"n_held_out": len(ends)}
    if problem.optimal is not None:
        row |= _distance("l2_ot", ends, held_out.x1)
    row["mmd"] = metrics.squared_mmd(ends, np.asarray(problem.reference), bandwidths=kernel.bandwidths)
    row |= {"mmd_floor": kernel.floor.mean, "mmd_floor_std": kernel.floor.standard_deviation}
    row |= dict(zip(("covariance", "covariance_error"), covariance(held_out.x0, ends), strict=True))
    copies = metrics.memorized_fraction(ends, np.asarray(problem.pairs.x1), key=keys[2])
    row |= {"memorized": copies.fraction, "memorized_low": copies.low, "memorized_high": copies.high}
    return row | train_row(problem, carry, keys[1], measured=measured)


def train_row(problem: Problem, carry: Carry, key: Key, *, measured: int) -> Row:
    """The part of `ends_row` on training sources."""
    n = min(measured, len(problem.pairs.x0))
    ends = carry(problem.pairs.x0[:n], key)
    row: Row = {"n_train": n} | _distance("train_l2_pair", ends, problem.pairs.x1[:n])
    if problem.optimal is not None:
        row |= _distance("train_l2_ot", ends, problem.optimal[:n])
    own = finite.nearest_target_is_own(jnp.asarray(ends), problem.pairs.x1, jnp.arange(n))
    return row | {"recovered": float(jnp.mean(own))}


def baseline_row(problem: Problem) -> Row:
    """What random pairs would have: distances between the training sources' targets of another row."""
    x1 = np.asarray(problem.pairs.x1)
    other = np.roll(x1, 1, axis=0)
    row = _distance("train_l2_pair", other, jnp.asarray(x1))
    return row if problem.optimal is None else row | _distance("train_l2_ot", other, problem.optimal)


def covariance(x0: Array, x1: np.ndarray) -> tuple[float, float]:
    """Mean over coordinates of Cov(x0, x1), and its standard error over the examples."""
    x0, x1 = np.asarray(x0, np.float64), np.asarray(x1, np.float64)  # type: ignore[assignment]
    products = np.mean((x0 - x0.mean(axis=0)) * (x1 - x1.mean(axis=0)), axis=1)
    n = len(products)
    return float(products.sum() / (n - 1)), float(products.std(ddof=1) / np.sqrt(n))


def _distance(name: str, ends: np.ndarray, targets: Array) -> Row:
    found = metrics.pair_l2(jnp.asarray(ends), targets)
    return {f"{name}_mean": float(found.mean), f"{name}_std": float(found.standard_deviation)}


def flow_row(field: VelocityField, params: Params, problem: Problem, *, measured: int, smoke: bool) -> Row:
    """Straightness, function evaluations of the accurate solve, errors of few Euler steps; on held-out sources."""
    x0 = problem.held_out.x0[:measured]
    pairs = Pair(x0, x0)  # its distances to them are not used
    few, options = (EULER_STEPS[1:2] if smoke else EULER_STEPS), solver_options(smoke=smoke)
    found = rectification.round_measures(field, params, pairs, euler_steps=few, chunk=len(x0), **options)
    row: Row = {"straightness": found.straightness, "straightness_error": found.straightness_error}
    row["evaluations"] = float(np.mean(_evaluations(_as_pytree(field), params, x0, smoke=smoke)))
    return row | {f"euler_{error.steps}": _mean(error) for error in found.euler}


def _as_pytree(field: VelocityField) -> Partial:
    return field if isinstance(field, Partial) else Partial(field)


def _mean(error: EulerError) -> float:
    return float(error.distance.mean)


@functools.partial(jax.jit, static_argnames="smoke")
def _evaluations(field: Partial, params: Params, x0: Array, *, smoke: bool) -> Array:
    options = solver_options(smoke=smoke)
    return jax.vmap(lambda x: flows.counted_transport(field, params, x, **options).evaluations)(x0)


def solver_options(*, smoke: bool) -> flows.SolverOptions:
    """How flows are solved."""
    return {"solver": "euler", "steps": 4} if smoke else {"solver": SOLVER}


def carried_by_ode(field: VelocityField, params: Params, *, smoke: bool) -> Carry:
    """The flow of a velocity field; it starts at x0, without the noise that a path may have at t = 0."""

    def carry(x0: Array, key: Key) -> np.ndarray:
        del key
        x0 = np.asarray(x0)  # type: ignore[assignment]
        return np.asarray(
            rectification.generate_pairs(field, params, x0, chunk=len(x0), **solver_options(smoke=smoke)).x1
        )

    return carry


def carried_by_sde(field: VelocityField, params: Params, *, sigma: float, steps: int) -> Carry:
    """The diffusion of a forward drift, Euler-Maruyama."""
    diffuse = functools.partial(rectification.diffuse_pairs, sigma=jnp.float32(sigma), steps=steps)

    def carry(x0: Array, key: Key) -> np.ndarray:
        x0 = np.asarray(x0)  # type: ignore[assignment]
        return np.asarray(diffuse(key, field, params, x0, chunk=len(x0)).x1)

    return carry
