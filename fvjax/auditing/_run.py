"""What an audit does, from drawn rows to the finished record."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax.auditing import _inputs, _noise, _solvers
from fvjax.auditing._gradients import gradient_variance
from fvjax.auditing._inputs import Field, Given, chosen_rows
from fvjax.auditing._measures import (
    Passed,
    Queries,
    arrivals,
    optimal_transport,
    passed,
    solver_sensitivity,
)
from fvjax.auditing._minimiser import Minimiser, velocity_distance
from fvjax.auditing._result import Audit
from fvjax.auditing._sentences import words
from fvjax.auditing._solvers import Solver
from fvjax.auditing._statistics import number
from fvjax.auditing._types import MinimiserDistance, Settings, Straightness
from fvjax.auditing._verdicts import judge_data, judge_pairs
from fvjax.interpolants import Interpolant, draw_paths
from fvjax.types import Key, PathSample

POINTS = 256
"""Path samples at which the field is compared with the exact minimiser."""


class Keys(NamedTuple):
    """What each part of the randomness is for."""

    sources: Key
    held_out: Key
    rows: Key
    paths: Key
    held_out_paths: Key
    spacing: Key
    subset: Key
    critical: Key
    identifiability: Key


class Drawn(NamedTuple):
    """The rows that are carried: training sources with their own targets, and held-out ones with theirs, if any."""

    x0: np.ndarray
    x1: np.ndarray
    optimal: np.ndarray | None
    held_out: np.ndarray | None
    held_out_own: np.ndarray | None


class Plan(NamedTuple):
    """Checked arguments."""

    field: Field
    given: Given
    interpolant: Interpolant
    solvers: tuple[Solver, ...]
    sources: int
    draws: int
    bins: int
    level: float
    keys: Keys
    tell: Callable[[str, float], None]


def _drawn(plan: Plan) -> Drawn:
    given, keys = plan.given, plan.keys
    index = chosen_rows(keys.sources, len(given.x0), plan.sources)
    optimal = None if given.ot_targets is None else given.ot_targets.take(index)
    held = own = None
    if given.held_out_sources is not None:
        rows = chosen_rows(keys.held_out, len(given.held_out_sources), plan.sources)
        held = given.held_out_sources.take(rows)
        own = None if given.held_out_targets is None else given.held_out_targets.take(rows)
    return Drawn(given.x0.take(index), given.x1.take(index), optimal, held, own)


def _paths(plan: Plan) -> PathSample:
    """`draws` path samples of random training pairs."""
    index = _inputs.host_generator(plan.keys.rows).integers(0, len(plan.given.x0), plan.draws)
    pairs = _inputs.as_pair(plan.given.x0.take(index), plan.given.x1.take(index))
    return draw_paths(plan.keys.paths, pairs, plan.interpolant)


def _off_paths(plan: Plan, drawn: Drawn, arrived: np.ndarray | None) -> PathSample | None:
    """Path samples of held-out pairs, or between held-out sources and where they arrived."""
    if drawn.held_out is None or arrived is None:
        return None
    ends = arrived if drawn.held_out_own is None else drawn.held_out_own
    known = np.isfinite(ends.reshape(len(ends), -1)).all(1)
    if not known.any():
        return None
    rows = np.resize(np.flatnonzero(known), POINTS)
    return draw_paths(plan.keys.held_out_paths, _inputs.as_pair(drawn.held_out[rows], ends[rows]), plan.interpolant)


def _velocities_at(plan: Plan, points: PathSample) -> np.ndarray:
    return _solvers.velocities(plan.field, np.asarray(points.t), np.asarray(points.x))


def _check_velocities(velocities: np.ndarray, points: PathSample) -> None:
    """A field that is not finite at points of its own training paths cannot be audited."""
    bad = ~np.isfinite(velocities.reshape(len(velocities), -1)).all(1)
    if bad.any():
        first = float(points.t[int(np.argmax(bad))])
        raise ValueError(
            f"field must give finite velocities at points of the training paths, got nan or infinity at {bad.sum()} of"
            f" {len(bad)} (the first at t = {first:.3g})"
        )


def run(plan: Plan) -> Audit:
    """Everything behind `audit`, whose arguments were checked."""
    tell, level = plan.tell, plan.level
    drawn, paths = _drawn(plan), _paths(plan)
    points = jax.tree.map(lambda x: x[:POINTS], paths)
    tell("velocities", 0.0)
    at_points = _velocities_at(plan, points)
    _check_velocities(at_points, points)
    chosen, *others = plan.solvers
    tell("transport", 0.0)
    ends, straightness = _solvers.straightly_carried(plan.field, drawn.x0, chosen)
    held = None
    if drawn.held_out is not None:
        held, _ = _solvers.straightly_carried(plan.field, drawn.held_out, chosen)
    arrived = {chosen: ends}
    for k, solver in enumerate(others):
        tell("transport", (k + 1) / len(plan.solvers))
        arrived[solver] = _solvers.carried(plan.field, drawn.x0, solver)
    straight = _straightness(straightness, drawn.x0, ends)
    off = _off_paths(plan, drawn, held)
    found = _passed(plan, Queries(arrived, drawn.x1, held, drawn.held_out_own), points, off)
    tell("gradients", 0.0)
    gradients = gradient_variance(plan.field, paths, bins=plan.bins, time_range=plan.interpolant.time_range)
    tell("noise", 0.0)
    subset = _noise.subset_of(plan.keys.subset, plan.given)
    gamma = _noise.rms_noise(plan.interpolant, plan.given.dtype)
    critical = _noise.critical_noise(plan.keys.critical, plan.given, found.midpoint_spacing, subset=subset, gamma=gamma)
    identified = _noise.identifiability_of(
        plan.keys.identifiability, subset, plan.interpolant, critical=critical, of=len(plan.given.x0)
    )
    tell("done", 1.0)
    training = arrivals(found.training[chosen], level)
    sensitivity = solver_sensitivity(found.training, arrived, level)
    parts: dict[str, Any] = {
        "pair_memorization": judge_pairs(
            training, None if found.held_out is None else arrivals(found.held_out, level), plan.given.kind
        ),
        "data_memorization": judge_data(
            found.copies, found.chance, dim=plan.given.x0.dim, held_out=plan.given.kind != "none", level=level
        ),
        "solvers": sensitivity,
        "straightness": straight,
        "gradients": gradients,
        "identifiability": identified,
        "critical_noise": critical,
        "minimiser": _minimiser_distance(plan, found, points=points, at_points=at_points, off=off),
        "optimal_transport": None
        if drawn.optimal is None
        else optimal_transport(arrived[chosen], drawn.x1, drawn.optimal, level),
        "settings": _settings(plan, drawn, found, gamma),
    }
    return Audit(**words(parts), **parts)


def _passed(plan: Plan, queries: Queries, points: PathSample, off: PathSample | None) -> Passed:
    every = points if off is None else jax.tree.map(lambda *x: jnp.concatenate(x), points, off)
    return passed(
        plan.given,
        queries,
        minimiser=Minimiser(every, plan.interpolant),
        spacing=_noise.Spacing(plan.keys.spacing, plan.given, plan.interpolant),
        tell=lambda done: plan.tell("pairs", done),
    )


def _straightness(found: np.ndarray, sources: np.ndarray, ends: np.ndarray) -> Straightness:
    values = found.astype(np.float64)
    chords = np.sum((ends - sources).reshape(len(ends), -1).astype(np.float64) ** 2, 1)
    known = np.isfinite(values) & np.isfinite(chords)
    if not known.any():
        return Straightness(None, None, None, 0)
    mean, count = float(values[known].mean()), int(known.sum())
    error = float(values[known].std(ddof=1) / np.sqrt(count)) if count > 1 else None
    length = float(chords[known].mean())
    return Straightness(mean, error, number(mean / length) if length > 0 else None, count)


def _minimiser_distance(
    plan: Plan, found: Passed, *, points: PathSample, at_points: np.ndarray, off: PathSample | None
) -> MinimiserDistance:
    count = len(points.t)
    flat = at_points.reshape(count, -1).astype(np.float64)
    targets = np.asarray(points.target, np.float64).reshape(count, -1)
    training = velocity_distance(flat, found.velocities[:count], targets)
    held_out = None
    if off is not None:
        here = _velocities_at(plan, off).reshape(len(off.t), -1).astype(np.float64)
        known = np.isfinite(here).all(1)
        goal = np.asarray(off.target, np.float64).reshape(len(off.t), -1)[known]
        held_out = velocity_distance(
            here[known], found.velocities[count:][known], goal if plan.given.kind == "pairs" else None
        )
    reference = "exact minimiser" if _noise.rms_noise(plan.interpolant, plan.given.dtype) > 0 else "memorizing field"
    return MinimiserDistance(reference, training, held_out)


def _settings(plan: Plan, drawn: Drawn, found: Passed, gamma: float) -> Settings:
    given, (chosen, *_) = plan.given, plan.solvers
    held = given.held_out_sources
    return Settings(
        pairs=len(given.x0),
        dims=given.dims,
        dtype=given.dtype.name,
        distinct_targets=found.distinct,
        spread=found.spread,
        target_spacing=found.target_spacing,
        held_out=given.kind,
        held_out_count=0 if held is None else len(held),
        sources=len(drawn.x0),
        held_out_sources=0 if drawn.held_out is None else len(drawn.held_out),
        draws=plan.draws,
        solver=chosen.solver,
        steps=chosen.steps,
        level=plan.level,
        interpolant="without noise" if gamma == 0 else f"with noise, rms gamma {gamma:.3g}",
    )
