"""Figure 6: what a flow makes of rotated pairs: the exact minimiser's, by formula and by solver, and trained networks'.

Networks are trained in float32; angles are degrees in rows and radians inside.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import progress
from experiments.gaussian_rotation.variance import Row, Target, isotropic_target
from fvjax import flows, gaussian, gradients, losses, metrics, nets, training
from fvjax.interpolants import Interpolant, constant_noise, draw_paths
from fvjax.types import Array, Key, Model, Pair, Params, PathSample, Scalar

SOLVERS: tuple[tuple[str, int | None], ...] = (
    ("euler", 10),
    ("euler", 11),
    ("euler", 100),
    ("euler", 101),
    ("heun", 50),
    ("midpoint", 50),
    ("tsit5", None),
    ("dopri5", None),
)
"""Name and number of steps, None for adaptive steps at a tolerance of 1e-5: an even and an odd count matter at 180."""

SMOKE_SOLVERS = (("euler", 11), ("dopri5", None))

TRAJECTORIES = 40
"""Sources whose trajectories are drawn."""


class Task(NamedTuple):
    """What a training step is given: the pairs and how they are joined."""

    pairs: Pair
    interpolant: Interpolant


class Settings(NamedTuple):
    """How networks are trained: dimension, layer width, steps, number of pairs, draws behind a logged variance."""

    dim: int
    width: int
    steps: int
    pairs: int
    probes: int


class Trained(NamedTuple):
    """One trained network, the pairs it saw, the ones it did not, and what was logged on the way."""

    angle: float
    sigma: float
    model: Model
    params: Params
    train: Pair
    held_out: Pair
    log: list[Row]


def selected_points(target: Target, angles: Sequence[float], sigmas: Sequence[float]) -> list[Row]:
    """The rotation of the exact minimiser's flow, integrated (dopri5, rtol 1e-8); no formula and no training.

    The flow is linear, x1 = mean + L x0; `angle_out` is the phi that minimises E|L x0 - cov^(1/2) R(phi) x0|^2, and
    `l2_paired` and `l2_ot` are the root mean squares of its distance to the paired and to the optimal-transport target.
    """
    cells = [(angle, sigma) for angle in angles for sigma in sigmas]
    optimal = target.map(0.0).matrix
    rows = []
    for angle, sigma in progress(cells, f"exact minimiser, {target.name}", len(cells)):
        rotated = target.map(angle)
        linear = _minimiser_flow(rotated, jnp.asarray(sigma))
        distance = {
            "l2_paired": float(jnp.linalg.norm(linear - rotated.matrix)),
            "l2_ot": float(jnp.linalg.norm(linear - optimal)),
        }
        # Columns of a basis are a sample of E x0 x0^T = I once centred: +-e_i.
        sample = jnp.concatenate([jnp.eye(len(linear)), -jnp.eye(len(linear))])
        turned = metrics.fitted_rotation(sample, sample @ linear.T @ optimal, planes_basis=target.basis)
        row = {"target": target.name, "angle": angle, "sigma": sigma, "angle_out": float(np.rad2deg(turned))}
        rows.append(row | distance)
    return rows


@jax.jit
def _minimiser_flow(map: gaussian.AffineMap, sigma: Array) -> Array:
    """The matrix L of the exact minimiser's flow x0 -> mean + L x0, all columns as one state."""
    field = gaussian.population_minimiser(gaussian.map_coupling(map), constant_noise(sigma))

    def all_columns(params: Params, t: Scalar, columns: Array) -> Array:
        return jax.vmap(lambda x: field(params, t, x) - map.shift, in_axes=1, out_axes=1)(
            columns + t * map.shift[:, None]
        )

    identity = jnp.eye(len(map.shift), dtype=map.shift.dtype)
    return flows.transport(all_columns, None, identity, solver="dopri5", rtol=1e-8)


def train(angle: float, sigma: float, settings: Settings, *, key: Key) -> Trained:
    """Trains a residual MLP on fixed pairs x1 = R(angle) x0 + 5 and logs the variance of its gradient."""
    model, _, step = _trainer(settings.dim, settings.width, settings.steps)
    map = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), isotropic_target(settings.dim).map(angle))
    seen, held_out, probe, state = _prepared(key, map, jnp.asarray(sigma, jnp.float32), settings=settings)
    interpolant = constant_noise(sigma)
    steps = settings.steps
    log: list[Row] = []

    def on_log(state: training.TrainState, loss: float) -> None:
        moments = _network_moments(model, state.params, probe)
        row = {"angle": angle, "sigma": sigma, "step": int(state.step), "loss": loss}
        log.append(
            row
            | {
                "variance": float(gradients.total_variance(moments, ddof=1)),
                "noise_scale": float(gradients.gradient_noise_scale(moments)),
            }
        )

    state, _ = training.fit(
        state, step, Task(seen, interpolant), steps=steps, log_every=max(1, steps // 20), on_log=on_log
    )
    return Trained(angle, sigma, model, state.ema_params, seen, held_out, log)


@functools.partial(jax.jit, static_argnames="settings")
def _prepared(
    key: Key, map: gaussian.AffineMap, sigma: Array, *, settings: Settings
) -> tuple[Pair, Pair, PathSample, training.TrainState]:
    """Training pairs, held-out pairs, the draws behind a logged variance, and the state before the first step."""
    model, optimizer, _ = _trainer(settings.dim, settings.width, settings.steps)
    data_key, probe_key, state_key = jax.random.split(key, 3)
    both = gaussian.draw_pairs(data_key, gaussian.map_coupling(map), 2 * settings.pairs)
    seen, held_out = (Pair(*(x[part] for x in both)) for part in (slice(settings.pairs), slice(settings.pairs, None)))
    probes = training.minibatch(seen, probe_key, settings.probes)
    probe = draw_paths(probe_key, probes, constant_noise(sigma))
    return seen, held_out, probe, training.init_state(state_key, model, optimizer)


@functools.cache
def _trainer(dim: int, width: int, steps: int) -> tuple[Model, Any, training.TrainStep]:
    """Network, optimiser and step; made once for all angles and sigmas, so that they share one compilation."""
    model = nets.mlp(dim, width=width)
    optimizer = training.adam(steps)

    def step(state: training.TrainState, task: Task) -> tuple[training.TrainState, Array]:
        batch_key = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)
        batch = training.minibatch(task.pairs, batch_key, 256)
        return training.make_train_step(model.apply, task.interpolant, optimizer)(state, batch)

    return model, optimizer, step


@functools.partial(jax.jit, static_argnames="model")
def _network_moments(model: Model, params: Params, probe: Any) -> gradients.GradientMoments:
    return gradients.gradient_moments(losses.squared_error(model.apply), params, probe)


def rotation_rows(run: Trained, solvers: Sequence[tuple[str, int | None]] = SOLVERS) -> list[Row]:
    """Pair L2 to the paired and to the OT target and the learned angle, by solver and split; flows start at x0."""
    rows = []
    for solver, count in solvers:
        for split, pairs in (("train", run.train), ("held_out", run.held_out)):
            predicted = _transported(run.model.apply, run.params, pairs.x0, solver=solver, steps=count)
            rows.append(_measured(run.angle, run.sigma, predicted, pairs) | {"split": split} | _named(solver, count))
    return rows


def expected_angle(run: Trained) -> float:
    """The angle of the exact minimiser for Gaussian sources with the mean and covariance of the training sample.

    The training sources are a sample, and with noise the selected angle depends on their covariance: at 150 degrees,
    sigma = 0.2 and 1000 pairs it varies by about a degree around that of N(0, I). Degrees; nan at 180 without noise.
    """
    if np.isnan(gaussian.selected_angle(np.deg2rad(run.angle), run.sigma)):
        return float("nan")
    with jax.enable_x64(True):
        x0, held_out = (jnp.asarray(np.asarray(x, np.float64)) for x in (run.train.x0, run.held_out.x0))
        map = isotropic_target(x0.shape[1]).map(run.angle)
        law = gaussian.map_coupling(map, source_mean=x0.mean(0), source_cov=jnp.cov(x0.T, ddof=0))
        # Far below the width of the field at t = 1/2: at 1e-5 a solver steps over it near 180 degrees.
        predicted = _minimiser_transported(law, run.sigma, held_out, solver="dopri5", steps=None, rtol=1e-9)
        return float(np.rad2deg(metrics.fitted_rotation(held_out, predicted)))


def minimiser_rows(run: Trained, solvers: Sequence[tuple[str, int | None]] = SOLVERS) -> list[Row]:
    """The same table for the exact population minimiser instead of the network: what the solver alone does."""
    rows = []
    with jax.enable_x64(True):
        map = isotropic_target(run.train.x0.shape[1]).map(run.angle)
        pairs = jax.tree.map(lambda x: x.astype(jnp.float64), run.held_out)
        pairs = Pair(pairs.x0, pairs.x0 @ map.matrix.T + map.shift)
        for solver, count in solvers:
            predicted = _minimiser_transported(
                gaussian.map_coupling(map), run.sigma, pairs.x0, solver=solver, steps=count, rtol=flows.TOLERANCE
            )
            rows.append(_measured(run.angle, run.sigma, predicted, pairs) | _named(solver, count))
    return rows


def _named(solver: str, steps: int | None) -> Row:
    return {"solver": solver, "steps": steps, "tolerance": None if steps else flows.TOLERANCE}


def _measured(angle: float, sigma: float, predicted: Array, pairs: Pair) -> Row:
    """Distances over the examples whose solve succeeded; `failed` counts the others."""
    ok = np.all(np.isfinite(np.asarray(predicted)), axis=1)
    row: Row = {"angle": angle, "sigma": sigma, "failed": int((~ok).sum())}
    if not ok.any():
        return row | dict.fromkeys(("l2_paired", "l2_paired_std", "l2_ot", "l2_ot_std", "angle_out"), float("nan"))
    if not ok.all():
        pairs, predicted = Pair(pairs.x0[ok], pairs.x1[ok]), predicted[ok]
    paired, optimal, turned = _distances(pairs, predicted)
    return row | {
        "l2_paired": float(paired.mean),
        "l2_paired_std": float(paired.standard_deviation),
        "l2_ot": float(optimal.mean),
        "l2_ot_std": float(optimal.standard_deviation),
        "angle_out": float(np.rad2deg(turned)),
    }


@jax.jit
def _distances(pairs: Pair, predicted: Array) -> tuple[metrics.PairDistance, metrics.PairDistance, Array]:
    """Distance to the paired and to the OT target, and the angle that was applied."""
    paired, optimal = metrics.pair_l2(predicted, pairs.x1), metrics.pair_l2(predicted, pairs.x0 + 5)
    return paired, optimal, metrics.fitted_rotation(pairs.x0, predicted)


@functools.partial(jax.jit, static_argnames=("field", "solver", "steps"))
def _transported(field: Any, params: Params, x0: Array, *, solver: str, steps: int | None) -> Array:
    return jax.vmap(lambda x: flows.transport(field, params, x, solver=solver, steps=steps))(x0)


def _minimiser_transported(
    law: gaussian.GaussianCoupling, sigma: float, x0: Array, *, solver: str, steps: int | None, rtol: float
) -> Array:
    """The exact minimiser's flow; `rtol` is used where `steps` is None."""
    return _minimiser_flow_of(law, jnp.asarray(sigma), x0, jnp.asarray(rtol), solver=solver, steps=steps)


@functools.partial(jax.jit, static_argnames=("solver", "steps"))
def _minimiser_flow_of(
    law: gaussian.GaussianCoupling, sigma: Array, x0: Array, rtol: Array, *, solver: str, steps: int | None
) -> Array:
    field = gaussian.population_minimiser(law, constant_noise(sigma))
    tolerance = rtol if steps is None else None
    return jax.vmap(lambda x: flows.transport(field, None, x, solver=solver, steps=steps, rtol=tolerance))(x0)


def trajectories(run: Trained) -> np.ndarray:
    """Trajectories of the first held-out sources under the trained network, Euler 100, [sources, 51 times, dim]."""
    return np.asarray(_paths(run.model.apply, run.params, run.held_out.x0[:TRAJECTORIES]))


@functools.partial(jax.jit, static_argnames="field")
def _paths(field: Any, params: Params, x0: Array) -> Array:
    times = jnp.linspace(0, 1, 51)
    return jax.vmap(lambda x: flows.trajectory(field, params, x, times, solver="euler", steps=100))(x0)
