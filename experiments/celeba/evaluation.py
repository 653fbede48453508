"""Where flows end: distances to the optimal, the training and the generated targets; networks and exact minimisers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.celeba.settings import Settings, solver_options
from fvjax import metrics, rectification
from fvjax import pairs as finite
from fvjax.interpolants import Interpolant
from fvjax.types import Array, Key, Params, VelocityField

Row = dict[str, Any]

TABLE = (("euler", 10), ("euler", 11), ("euler", 101), ("heun", 50), ("dopri5", None))
"""Solvers beside the run's own: an even and an odd number of steps, a second order, and a tolerance."""
SMOKE_TABLE = (("euler", 3),)


def starts(settings: Settings, interpolant: Interpolant, x0: Array, key: Key) -> Array:
    """Where the flow starts: at x0, or at a draw of the law at the interpolant's first time, x0 + gamma z."""
    if settings.start == "source":
        return x0
    gamma = interpolant.coefficients(interpolant.time_range[0]).gamma
    return x0 + gamma.astype(x0.dtype) * jax.random.normal(key, x0.shape, x0.dtype)


def moved(
    field: VelocityField, params: Params, x0: Array, *, settings: Settings, options: Mapping[str, Any]
) -> np.ndarray | None:
    """The flow's ends, [n, *dims]; None if one of them is not finite."""
    try:
        return np.asarray(rectification.generate_pairs(field, params, x0, chunk=settings.chunk, **options).x1)
    except FloatingPointError:
        return None


def distances(predicted: np.ndarray | None, targets: Mapping[str, Array]) -> list[Row]:
    """One row a target: mean and standard deviation over examples of the L2 distance, and their number."""
    rows = []
    for target, x1 in targets.items():
        row: Row = {"target": target, "n": len(x1)}
        if predicted is None:
            rows.append(row | {"l2_mean": float("nan"), "l2_std": float("nan")})
            continue
        measured = metrics.pair_l2(jnp.asarray(predicted), jnp.asarray(x1))
        rows.append(row | {"l2_mean": float(measured.mean), "l2_std": float(measured.standard_deviation)})
    return rows


def recovered(predicted: np.ndarray | None, own: Array) -> float:
    """Share of examples whose end is nearest to their own target among all: row i of `own` belongs to example i.

    Args:
        predicted: [n, *dims]; None gives nan.
        own: all targets, [m, *dims], m >= n; the first n belong to the examples.
    """
    if predicted is None:
        return float("nan")
    index = jnp.arange(len(predicted))
    return float(jnp.mean(finite.nearest_target_is_own(jnp.asarray(predicted), jnp.asarray(own), index)))


def solver_rows(
    settings: Settings,
    field: VelocityField,
    params: Params,
    x0: Array,
    *,
    targets: Mapping[str, Array],
    smoke: bool,
) -> list[Row]:
    """Distances by every solver of the table, the run's own first."""
    main = (settings.solver, settings.solver_steps)
    others = tuple(other for other in (SMOKE_TABLE if smoke else TABLE) if other != main)
    rows = []
    for solver, steps in (main, *others):
        predicted = moved(field, params, x0, settings=settings, options=solver_options(solver, steps))
        rows += [{"solver": solver, "steps": steps} | row for row in distances(predicted, targets)]
    return rows
