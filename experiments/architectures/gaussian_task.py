"""Part A: pairs x1 = mu + A x0 of a Gaussian, drawn anew for every batch: how near do networks come to Lemma 1's field?

On the path the field of Lemma 1 is v*(x_t, t) = theta + Theta (I + t Theta)^-1 (x_t - t theta) = x1 - x0. So the
residual |v - v*|^2 of any network is exactly its loss on held-out pairs, and nothing has to be inverted to measure it.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.architectures.networks import Row, Size, Task, carried, count_parameters, make_trainer, variance_of
from experiments.common import compiled_quickly
from fvjax import couplings, gaussian, metrics, training
from fvjax.interpolants import draw_paths, linear
from fvjax.types import AffineMap, Array, Key, Pair, Params, PathSample

DIMS = (4, 4, 1)
"""Vectors of 16 coordinates, as an image for the networks that want one."""

BATCH = 128
EIGENVALUES = (0.5, 2.0)
"""Smallest and largest eigenvalue of the target's covariance; the others lie between them, evenly in the logarithm."""

EXACT = "closed_form"
"""Name of the row of the affine field with the parameters of Lemma 1, which needs no training."""


class Settings(NamedTuple):
    """Numbers of held-out sources, of those that flows start from, of times, and of draws behind a variance; hashable.

    `solvers` are names with a number of steps, or None for a tolerance of `flows.TOLERANCE`.
    """

    held_out: int = 512
    flows: int = 256
    times: int = 32
    probes: int = 512
    solvers: tuple[tuple[str, int | None], ...] = (("euler", 100), ("dopri5", None))


class Problem(NamedTuple):
    """What all networks of this part share.

    Attributes:
        map: x0 -> A x0 + mu with A = M^(1/2) R.
        held_out: pairs [n, *DIMS] that no network is trained on.
        probe: draws behind a gradient variance.
        times: at which the residual is measured, [k], the midpoints of equal intervals.
        key: of the first parameters and of the batches.
    """

    map: AffineMap
    held_out: Pair
    probe: PathSample
    times: Array
    key: Key

    @property
    def scale(self) -> float:
        """E|u|^2 = |A - I|^2 + |mu|^2, what the residuals are relative to."""
        matrix, shift = (np.asarray(part, float) for part in self.map)
        return float(np.sum((matrix - np.eye(len(shift))) ** 2) + np.sum(shift**2))

    def smallest_singular_values(self) -> np.ndarray:
        """Of I + t (A - I), which Lemma 1 inverts, at each of the times, [k]."""
        matrix, times = np.asarray(self.map.matrix, float), np.asarray(self.times, float)
        identity = np.eye(len(matrix))
        return np.linalg.svd(identity + times[:, None, None] * (matrix - identity), compute_uv=False)[:, -1]


def make_problem(key: Key, degrees: float, settings: Settings) -> Problem:
    """Draws the planes of the rotation and of the covariance M, and the held-out pairs; every mean is 1."""
    return _make_problem(key, jnp.asarray(np.deg2rad(degrees), jnp.float32), settings=settings)


@functools.partial(jax.jit, static_argnames="settings")
def _make_problem(key: Key, angle: Array, *, settings: Settings) -> Problem:
    axes_key, planes_key, data_key, probe_key, train_key = jax.random.split(key, 5)
    dim = int(np.prod(DIMS))
    axes = couplings.random_basis(axes_key, dim)
    cov = (axes * jnp.geomspace(*EIGENVALUES, dim)) @ axes.T
    rotation = couplings.rotation_matrix(angle, dim, basis=couplings.random_basis(planes_key, dim))
    found = gaussian.rotated_map(jnp.ones(dim), (cov + cov.T) / 2, rotation)
    pair_key, path_key = jax.random.split(probe_key)
    probe = draw_paths(path_key, draw_batch(pair_key, found, settings.probes), linear())
    times = jnp.asarray((np.arange(settings.times) + 0.5) / settings.times, jnp.float32)
    return Problem(found, draw_batch(data_key, found, settings.held_out), probe, times, train_key)


def draw_batch(key: Key, map: AffineMap, n: int) -> Pair:
    """n pairs of x0 ~ N(0, I) and x1 = A x0 + mu, [n, *DIMS]."""
    x0 = jax.random.normal(key, (n, len(map.shift)))
    return Pair(x0.reshape(n, *DIMS), (x0 @ map.matrix.T + map.shift).reshape(n, *DIMS))


def run_cell(problem: Problem, size: Size, steps: int, settings: Settings) -> tuple[list[Row], list[Row]]:
    """Trains one network; returns its row with its profile in t, and its losses.

    Raises:
        NonFiniteLossError: from training.
        FloatingPointError: if every solve of its flow failed.
    """
    begin = time.perf_counter()
    trainer = make_trainer(size, DIMS, draw_batch, steps, BATCH)
    log: list[Row] = []

    def on_log(state: training.TrainState, loss: float) -> None:
        log.append({"part": "gaussian", "name": size.label, "steps": steps, "step": int(state.step), "loss": loss})

    state, _ = training.fit(
        trainer.first_state(problem.key),
        trainer.step,
        Task(problem.map, linear()),
        steps=steps,
        log_every=max(1, steps // 10),
        on_log=on_log,
    )
    known = {
        "steps": steps,
        "batch": BATCH,
        "learning_rate": size.learning_rate,
        "loss": log[-1]["loss"],
        "seconds": time.perf_counter() - begin,
    }
    return rows_of(problem, size, trainer.model.apply, state.ema_params, settings=settings, known=known), log


def closed_form_rows(problem: Problem, settings: Settings) -> list[Row]:
    """The same rows for the parameters of Lemma 1: what is left is rounding."""
    size, known = Size("affine"), {"name": EXACT, "network": EXACT, "steps": 0}
    params = gaussian.pair_optimal(problem.map)
    return rows_of(problem, size, size.model(DIMS).apply, params, settings=settings, known=known)


def rows_of(problem: Problem, size: Size, field: Any, params: Params, *, settings: Settings, known: Row) -> list[Row]:
    """The row of one field, and one for each time of its profile.

    Residuals are sums over the 16 coordinates, relative to E|u|^2; their standard error is that of the mean over
    held-out sources. The variance is that of the loss that is trained, a mean over the coordinates.

    Raises:
        FloatingPointError: if every solve of its flow failed.
    """
    sources = problem.held_out.x0[: settings.flows]
    found = _measuring(field, settings.solvers)(params, problem, sources)
    residuals = np.asarray(found["residual"], float) / problem.scale
    profile, by_source = residuals.mean(1), residuals.mean(0)
    singular = problem.smallest_singular_values()
    worst, ill = int(profile.argmax()), int(singular.argmin())
    row: Row = {
        "part": "gaussian",
        "name": size.label,
        "network": size.network,
        "width": size.width or None,
        "depth": size.depth or None,
        "parameters": count_parameters(params),
        "residual": float(profile.mean()),
        "residual_error": float(by_source.std(ddof=1) / np.sqrt(len(by_source))),
        "worst_t": float(problem.times[worst]),
        "worst_residual": float(profile[worst]),
        "ill_conditioned_t": float(problem.times[ill]),
        "ill_conditioned_residual": float(profile[ill]),
        "n": len(by_source),
    } | _distances(problem, found, [name for name, _ in settings.solvers], size.label)
    row |= {key: float(found[key]) for key in ("gradient_variance", "gradient_noise_scale")}
    if size.network == "affine":
        row["gradient_variance_exact"] = _exact_variance(params, problem.map)
    row |= known
    shown = {key: row[key] for key in ("name", "network", "width", "depth", "steps")}
    times = np.asarray(problem.times, float)
    return [row] + [
        shown | {"part": "gaussian_profile", "t": float(t), "residual": float(r), "smallest_singular_value": float(s)}
        for t, r, s in zip(times, profile, singular, strict=True)
    ]


@functools.cache
def _measuring(field: Any, solvers: tuple[tuple[str, int | None], ...]) -> Any:
    """Everything that is measured of one field, in one compilation: (params, problem, sources) -> arrays by name."""

    def measured(params: Params, problem: Problem, sources: Array) -> dict[str, Array]:
        x0, x1 = problem.held_out

        def residual(t: Array) -> Array:
            predicted = jax.vmap(lambda x: field(params, t, x))(x0 + t * (x1 - x0))
            return jnp.sum((predicted - (x1 - x0)) ** 2, axis=(1, 2, 3))

        flown = {name: carried(field, params, sources, solver=name, steps=steps) for name, steps in solvers}
        variance = variance_of(field, params, problem.probe)
        return {"residual": jax.lax.map(residual, problem.times)} | flown | variance

    return compiled_quickly(measured)


def _distances(problem: Problem, found: dict[str, Array], solvers: Sequence[str], name: str) -> Row:
    """Mean L2 between the end of the flow from held-out sources and their own targets, for each solver."""
    row: Row = {}
    for solver in solvers:
        predicted = found[solver]
        ok = np.isfinite(np.asarray(predicted)).all((1, 2, 3))
        if not ok.any():
            raise FloatingPointError(f"the flow must stay finite, got nan or inf for {name} with {solver}")
        distance = metrics.pair_l2(predicted[ok], problem.held_out.x1[: len(ok)][ok])
        row |= {f"l2_{solver}_mean": float(distance.mean), f"l2_{solver}_std": float(distance.standard_deviation)}
        row[f"failed_{solver}"] = int((~ok).sum())
    return row


@compiled_quickly
def _exact(params: AffineMap, map: AffineMap) -> Array:
    return gaussian.exact_gradient_variance(params, gaussian.map_coupling(map), linear())


def _exact_variance(params: AffineMap, map: AffineMap) -> float:
    """In closed form, for the loss that is a mean over the coordinates: 1 / d^2 of that of the sum."""
    return float(_exact(params, map)) / len(map.shift) ** 2
