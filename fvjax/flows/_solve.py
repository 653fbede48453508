"""What the functions of flows share: options, their checks, one solve by diffrax, and how a failed one is told."""

from dataclasses import dataclass
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax.types import Array, Params, Scalar, VelocityField

SOLVERS = {"euler": "Euler", "heun": "Heun", "midpoint": "Midpoint", "tsit5": "Tsit5", "dopri5": "Dopri5"}
"""Solver names of this module, and the classes of diffrax that they stand for."""

EVALUATIONS = {"euler": (1, 0), "heun": (2, 0), "midpoint": (2, 0), "tsit5": (6, 1), "dopri5": (6, 1)}
"""Evaluations of the field in each step, and once: the last stage of tsit5 and dopri5 is the next step's first."""

TOLERANCE = 1e-5
"""Default of rtol and atol where neither they nor `steps` are given."""

MAX_STEPS = 4096
"""Default bound on the accepted and rejected steps of an adaptive solve."""

_FAILURES = (
    "none",
    "the state, the velocity or x0 is not finite (nan or inf)",
    (
        "the step size fell below the resolution of t: the field is singular or not finite on the way, or the "
        "tolerances are below the rounding error of its dtype"
    ),
    "max_steps was reached: the field is stiff, or the tolerances are too small; raise max_steps or the tolerances",
    "end must be above start: a diffusion runs forward in time only",
)


class SolverOptions(TypedDict, total=False):
    """The keyword arguments of `transport`, which `trajectory` and `straightness` share."""

    solver: str
    steps: int | None
    rtol: Scalar | None
    atol: Scalar | None
    start: Scalar
    end: Scalar
    max_steps: int | None


@dataclass(frozen=True)
class Plan:
    """Validated options; steps is None for an adaptive solve, and then rtol and atol are set.

    With `forward_only` a solve whose end is not above its start fails, which traced times show only while it runs.
    """

    dtype: np.dtype
    solver: str
    steps: int | None
    rtol: Scalar | None
    atol: Scalar | None
    start: Scalar
    end: Scalar
    max_steps: int
    forward_only: bool = False


def resolve(
    x0: Array,
    *,
    solver: str = "dopri5",
    steps: int | None = None,
    rtol: Scalar | None = None,
    atol: Scalar | None = None,
    start: Scalar = 0.0,
    end: Scalar = 1.0,
    max_steps: int | None = None,
) -> Plan:
    """The one place where the options of `transport` are checked and their defaults filled in."""
    _validate.floating("x0", x0)
    dtype = jnp.result_type(x0)
    _validate.one_of("solver", solver, tuple(SOLVERS))
    for name, time in (("start", start), ("end", end)):
        if np.ndim(time) != 0:
            raise ValueError(f"{name} must be a scalar, got shape {np.shape(time)}")
        _validate.finite(name, time)
    if _validate.is_concrete(start, end) and np.asarray(start, dtype) == np.asarray(end, dtype):
        raise ValueError(f"start and end must differ in {dtype}, got {start} and {end}")
    if steps is not None:
        _validate.positive_integer("steps", steps)
        for name, value in (("rtol", rtol), ("atol", atol), ("max_steps", max_steps)):
            if value is not None:
                raise ValueError(f"{name} must not be given together with steps, got {value} and steps = {steps}")
        return Plan(dtype, solver, int(steps), None, None, start, end, int(steps))
    if solver == "euler":
        raise ValueError("steps must be given for solver euler, which has no error estimate, got None")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None:
            _validate.positive(name, value)
    limit = MAX_STEPS if max_steps is None else max_steps
    _validate.positive_integer("max_steps", limit)
    given = [value for value in (rtol, atol) if value is not None] or [TOLERANCE]
    return Plan(dtype, solver, None, given[0], given[-1], start, end, int(limit))


def check_times(times: Any, plan: Plan) -> None:
    if np.ndim(times) != 1 or np.shape(times)[0] < 1:
        raise ValueError(f"times must have shape [m] with m >= 1, got {np.shape(times)}")
    if _validate.is_concrete(times, plan.start, plan.end):
        line = np.concatenate([np.asarray(part, plan.dtype).reshape(-1) for part in (plan.start, times, plan.end)])
        gaps = np.diff(line) * np.sign(line[-1] - line[0])
        if not (np.all(gaps >= 0) and np.all(gaps[1:-1] > 0)):
            raise ValueError(f"times must run strictly from start = {plan.start} to end = {plan.end}, got {times}")


def check_field(field: VelocityField, params: Params, x0: Array) -> None:
    """Refuses a field that does not map x0 to its like; abstract evaluation, cached by JAX for each field and shape."""
    out = jax.eval_shape(field, params, jax.ShapeDtypeStruct((), x0.dtype), x0)
    found = [(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(out)]
    if found != [(x0.shape, x0.dtype.name)]:
        got = " and ".join(f"{dtype}{list(shape)}" for shape, dtype in found) or "nothing"
        raise ValueError(
            f"field(params, t, x0) must have the shape and dtype of x0, {x0.dtype.name}{list(x0.shape)}, got {got}; "
            "x0 must be ONE example: use jax.vmap over x0 for a batch"
        )


@dataclass(frozen=True)
class VectorField:
    """A field in diffrax's order of arguments. Two are equal if their fields are, so that one solve compiles once."""

    field: VelocityField

    def __call__(self, t: Array, x: Array, params: Params) -> Array:
        return self.field(params, t, x)


def between(start: Array, end: Array, fractions: np.ndarray) -> Array:
    # A convex combination is exact at both ends, and at t = 1/2 of [0, 1] in both directions.
    return start * jnp.asarray(1 - fractions, start.dtype) + end * jnp.asarray(fractions, end.dtype)


def steps_between(start: Array, end: Array, steps: int) -> Array:
    """The times of `steps` equal steps, [steps + 1]."""
    return between(start, end, np.arange(steps + 1) / steps)


def solve(
    field: VelocityField, params: Params, x0: Array, plan: Plan, *, times: Any = None
) -> tuple[Array, Array | int]:
    """The state at the end, or the states at `times`; and the number of steps, rejected ones included."""
    import diffrax

    x0 = jnp.asarray(x0)
    check_field(field, params, x0)
    vector_field: Any = VectorField(field)
    solver = getattr(diffrax, SOLVERS[plan.solver])()
    return integrate(diffrax.ODETerm(vector_field), solver, x0, plan, args=params, times=times)


def integrate(
    terms: Any, solver: Any, x0: Array, plan: Plan, *, args: Any, times: Any = None
) -> tuple[Array, Array | int]:
    """As `solve`, of the terms and the solver of diffrax: the one place where it is called."""
    import diffrax

    start, end, controller = _controller(plan)
    solution = diffrax.diffeqsolve(
        terms,
        solver,
        start,
        end,
        None,
        x0,
        args,
        saveat=diffrax.SaveAt(t1=True) if times is None else diffrax.SaveAt(ts=jnp.asarray(times, plan.dtype)),
        stepsize_controller=controller,
        max_steps=plan.max_steps,
        throw=False,
    )
    states = solution.ys[0] if times is None else solution.ys
    stopped = jnp.where(solution.result == diffrax.RESULTS.max_steps_reached, 3, 0)
    stopped = jnp.where(solution.result == diffrax.RESULTS.dt_min_reached, 2, stopped)
    # A solve that stopped has no states after that: only of a complete one does it say something that they are finite.
    overflow = ~jnp.all(jnp.isfinite(x0)) | (stopped == 0) & ~jnp.all(jnp.isfinite(states))
    failure = jnp.where(overflow, 1, stopped)
    if plan.forward_only:
        failure = jnp.where(end > start, failure, 4)
    return or_fail(states, failure, plan), solution.stats["num_steps"]


def _controller(plan: Plan) -> tuple[Array, Array, Any]:
    """Start, end and the step size control of diffrax, in the dtype of the state."""
    import diffrax

    dtype = plan.dtype
    start, end = jnp.asarray(plan.start, dtype), jnp.asarray(plan.end, dtype)
    if plan.steps is not None:
        grid = steps_between(start, end, plan.steps)
        return grid[0], grid[-1], diffrax.StepTo(grid)
    # A least step: else a field that is nan from some time on would be met by max_steps smaller and smaller steps.
    least = 4 * jnp.finfo(dtype).eps * jnp.maximum(jnp.abs(start), jnp.abs(end))
    rtol, atol = jnp.asarray(plan.rtol, dtype), jnp.asarray(plan.atol, dtype)
    return start, end, diffrax.PIDController(rtol=rtol, atol=atol, dtmin=least, force_dtmin=False)


@jax.custom_batching.custom_vmap
def _worst(failure: Array) -> Array:
    """The largest failure of all examples, the same for each: concrete also inside an eager vmap."""
    return failure


@_worst.def_vmap
def _worst_of_batch(size: int, batched: list[bool], failure: Array) -> tuple[Array, bool]:
    del size, batched
    return _worst(jnp.max(failure, axis=0)), False


def or_fail(states: Array, failure: Array, plan: Plan) -> Array:
    worst = _worst(failure)
    if _validate.is_concrete(worst):
        if int(worst):
            how = f"steps = {plan.steps}"
            if plan.steps is None:
                how = f"rtol = {plan.rtol}, atol = {plan.atol}, max_steps = {plan.max_steps}"
            raise RuntimeError(
                f"{plan.solver} from t = {plan.start} to {plan.end} ({how}) failed: {_FAILURES[int(worst)]}"
            )
        return states
    return jnp.where(failure == 0, states, jnp.nan)
