"""What the networks are compared with: maps without training, the exact minimiser, and values that others published."""

import csv
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.w2_benchmark.cells import (
    AT_ONCE,
    FINITE,
    Prepared,
    Row,
    Settings,
    cell_of,
    measured,
    rows_of,
    training_pairs,
)
from fvjax import flows, gaussian, pairs
from fvjax.data import DataError
from fvjax.interpolants import constant_noise
from fvjax.types import AffineMap, Array, Pair, VelocityField

BASELINES = ("identity", "mean", "linear")
MINIMISER_SOURCES = 1024
"""Held-out sources of the exact minimiser's rows: a step looks at every pair, which costs more than a network."""

RULE_FROM = 10
"""Dimension from which on `pairs.predicted_sigma_critical` was measured to hold."""

PUBLISHED_COLUMNS = ("solver", "dim", "l2_uvp", "cosine")


def linear_map(pool: Pair) -> AffineMap:
    """The optimal map between the Gaussians with the means and covariances of both samples ('L' of the benchmark).

    It sees the two samples only, not which x1 belongs to which x0. In float64 on the way, float32 in the end.
    """
    x0, x1 = (np.asarray(x, np.float64) for x in pool)
    with jax.enable_x64(True):
        source = {"source_mean": jnp.asarray(x0.mean(0)), "source_cov": jnp.asarray(np.cov(x0.T))}
        found = gaussian.ot_map(jnp.asarray(x1.mean(0)), jnp.asarray(np.cov(x1.T)), **source)
        matrix, shift = (np.asarray(part, np.float32) for part in found)
    return AffineMap(jnp.asarray(matrix), jnp.asarray(shift))


def baseline_rows(prepared: Prepared) -> list[Row]:
    """Held-out rows of the identity, of the mean of the targets, and of the linear map; no training, no solver."""
    x0, pool = prepared.held_out.x0, prepared.pool
    maps = {
        "identity": x0,
        "mean": jnp.broadcast_to(pool.x1.mean(0), x0.shape),
        "linear": jax.vmap(linear_map(pool).__call__)(x0),
    }
    cell = {"data": prepared.optimal.name, "dim": prepared.optimal.dims[0], "split": "held_out"}
    return [cell | {"map": name} | measured(prepared.optimal, prepared.held_out, maps[name]) for name in BASELINES]


def minimiser_rows(prepared: Prepared, coupling: str, sigma: float, settings: Settings) -> list[Row]:
    """The flow of the exact minimiser for the finite set of training pairs: what a network without limits would learn.

    At sigma = 0 that is the minimiser's limit, the memorizing field of Proposition 2. `sigma_c_predicted` is the sigma
    at which it should let go of the pairs; None where that rule does not hold: below 10 dimensions, for optimal pairs.

    Raises:
        ValueError: if the coupling is not of a finite set.
    """
    if coupling not in FINITE:
        raise ValueError(f"coupling must be one of {', '.join(FINITE)}, got {coupling!r}")
    known = training_pairs(prepared, coupling, settings)
    field = pairs.empirical_minimiser(known, constant_noise(jnp.asarray(sigma, jnp.float32)))

    def transported(x0: Array) -> Array:
        return _minimiser_transported(field, x0, solver=settings.solver, steps=settings.solver_steps)

    holds = coupling == "shuffled" and prepared.optimal.dims[0] >= RULE_FROM
    critical = pairs.predicted_sigma_critical(known).predicted if holds else None
    named = {"map": "minimiser", "sigma_c_predicted": critical}
    fewer = prepared._replace(held_out=Pair(*(x[:MINIMISER_SOURCES] for x in prepared.held_out)))
    return rows_of(fewer, cell_of(prepared, coupling, sigma) | named, settings, transported)


@functools.partial(jax.jit, static_argnames=("solver", "steps"))
def _minimiser_transported(field: VelocityField, x0: Array, *, solver: str, steps: int | None) -> Array:
    return jax.lax.map(lambda x: flows.transport(field, None, x, solver=solver, steps=steps), x0, batch_size=AT_ONCE)


def read_published(path: Path) -> list[Row]:
    """Rows of a CSV file with the columns solver, dim, l2_uvp (per cent) and cosine, of which the last may be empty.

    Raises:
        DataError: if the file cannot be read, lacks a column, or holds something that is not a number.
    """
    try:
        with path.open(newline="") as stream:
            reader = csv.DictReader(stream)
            missing = set(PUBLISHED_COLUMNS) - set(reader.fieldnames or ())
            if missing:
                raise DataError(
                    f"{path} must have the columns {', '.join(PUBLISHED_COLUMNS)}: {sorted(missing)} missing"
                )
            return [_published_row(row) for row in reader]
    except (OSError, UnicodeDecodeError, ValueError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} must be a CSV file of numbers: {' '.join(str(error).split())}") from error


def _published_row(row: dict[str, Any]) -> Row:
    cosine = float(row["cosine"]) if row["cosine"] else None
    return {"solver": row["solver"], "dim": int(row["dim"]), "l2_uvp": float(row["l2_uvp"]), "cosine": cosine}
