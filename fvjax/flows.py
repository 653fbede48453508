r"""Transport along the flow dx/dt = v(x, t) of a velocity field, its trajectories and how straight they are.

Every function here takes ONE example; the caller vmaps:

    jax.jit(jax.vmap(lambda x: transport(field, params, x, solver="euler", steps=100)))(x0)          # x0 [n, *dims]

===================  =======================================================================================
vmap over x0         every example has its OWN error norm and step sizes, as if it were alone; the batch runs
                     until its slowest example is done
batch as one state   `def batch_field(params, t, x): return jax.vmap(field, (None, None, 0))(params, t, x)`,
                     defined once, then `transport(batch_field, params, x0)`: all examples share ONE
                     root-mean-square error norm and ONE sequence of steps
===================  =======================================================================================

With fixed `steps` the two agree to rounding. With tolerances the shared norm lets a hard example hide among easy ones,
by up to sqrt(n): with dopri5 at 1e-5 and one of 1000 examples turning 31 times faster than the others, its error was
1.3e-2, against 3.3e-4 under vmap. The shared norm took a tenth of the time there, where the field costs nothing; with
an MLP of width 64 or 256 it took 1/2.3 or 1/1.3 of it (2 CPU cores).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict, Unpack

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


def transport(
    field: VelocityField,
    params: Params,
    x0: Array,
    *,
    solver: str = "dopri5",
    steps: int | None = None,
    rtol: Scalar | None = None,
    atol: Scalar | None = None,
    start: Scalar = 0.0,
    end: Scalar = 1.0,
    max_steps: int | None = None,
) -> Array:
    r"""Carries ONE example along dx/dt = field(params, t, x) from t = start to t = end.

    Either `steps` equal steps, at the times start + (end - start) k / steps (exact: an even number of steps from 0 to 1
    meets t = 1/2), or steps chosen by the error estimate (root mean square over the dimensions of this example, of
    error / (atol + rtol |x|)). For a batch use `jax.vmap`; see the top of this module for the difference between that
    and a batch as one state.

    ======================  =====================================================================================
    start > end             backward in time
    rtol or atol alone      the other one takes the same value
    neither, and no steps   both 1e-5; Euler has no error estimate and needs `steps`
    a failed solve          not finite, singular, or `max_steps` reached. Called eagerly, also inside an eager vmap
                            or grad: a RuntimeError that names the cause. Under `jit`, where nothing can be raised,
                            that example comes back as nan in every entry, the others of a vmap untouched
    a singular time         may be stepped over unseen, with tolerances too: of x' = x / (t - 1/2) dopri5 at 1e-5
                            returns a finite x(1). Two tolerances, or an odd and an even number of steps, show it
    ======================  =====================================================================================

    Differentiable in reverse mode with respect to `params` and `x0` (through the steps that were taken, checkpointed);
    `jax.jvp` is not supported. Compiled once for each field (compared by ==: a lambda written in a loop compiles on
    every turn), solver, number of steps and shape; times, tolerances and params are traced.

    Args:
        field: hashable callable (params, t [], x [*dims]) -> velocity [*dims].
        params: pytree of arrays, its first argument.
        x0: the state at t = start, ONE example, floating point, [*dims].
        solver: "euler", "heun", "midpoint", "tsit5" or "dopri5", of order 1, 2, 2, 5, 5.
        steps: number of fixed steps, >= 1; excludes rtol, atol and max_steps.
        rtol: relative tolerance of one step, > 0.
        atol: absolute tolerance of one step, > 0, in units of x.
        start: time of x0, shape [].
        end: time of the result, shape [], not equal to `start`.
        max_steps: bound on the steps of an adaptive solve, rejected ones included; None means 4096.

    Returns:
        The state at t = end, [*dims], in the dtype of x0 (as are all times).

    Raises:
        ValueError: for options outside the above, an x0 that is not floating point, or a field that does not return the
            shape and dtype of x0.
        RuntimeError: if the solve fails and this is called eagerly.
    """
    plan = _resolve(x0, solver=solver, steps=steps, rtol=rtol, atol=atol, start=start, end=end, max_steps=max_steps)
    return _solve(field, params, x0, plan)[0]


class Counted(NamedTuple):
    """A state [*dims], and the number of evaluations of the field [] that led to it."""

    state: Array
    evaluations: Array


def counted_transport(field: VelocityField, params: Params, x0: Array, **options: Unpack[SolverOptions]) -> Counted:
    """As `transport` of ONE example, with its number of function evaluations (NFE).

    Those of rejected steps count. Under `vmap` each example has its own number; the batch computes the largest of them
    for all.

    Args:
        field: as in `transport`.
        params: as in `transport`.
        x0: the state at t = start, ONE example, [*dims].
        **options: those of `transport`.

    Returns:
        Counted(state [*dims], evaluations [], int32).

    Raises:
        ValueError: as in `transport`.
        RuntimeError: as in `transport`.
    """
    plan = _resolve(x0, **options)
    state, steps = _solve(field, params, x0, plan)
    per_step, reused = EVALUATIONS[plan.solver]
    return Counted(state, jnp.asarray(steps, jnp.int32) * per_step + reused)


def trajectory(
    field: VelocityField,
    params: Params,
    x0: Array,
    times: Array | Sequence[float],
    **options: Unpack[SolverOptions],
) -> Array:
    """States of ONE example at the given times, along the same solve as `transport`.

    Between two steps the state is the solver's own interpolant: linear for Euler, a cubic for Heun and Midpoint, a
    quartic for Tsit5 and Dopri5. At a step it is that of `transport` to rounding.

    Args:
        field: as in `transport`.
        params: as in `transport`.
        x0: the state at t = start, ONE example, [*dims].
        times: [m], m >= 1, strictly monotone from `start` towards `end` and within them; either end may be left out.
        **options: those of `transport`.

    Returns:
        [m, *dims] in the dtype of x0.

    Raises:
        ValueError: as in `transport`, and if `times` has not the shape [m], is not in order or leaves [start, end].
        RuntimeError: as in `transport`.
    """
    plan = _resolve(x0, **options)
    _check_times(times, plan)
    return _solve(field, params, x0, plan, times=times)[0]


def straightness(
    field: VelocityField, params: Params, x0: Array, *, nodes: int = 32, **options: Unpack[SolverOptions]
) -> Array:
    r"""How far the trajectory of ONE example is from a straight line run at constant speed.

        S = int_0^1 |(z_1 - z_0) - v(z_t, t)|^2 dt,   z the solution of dz/dt = v(z_t, t), z_0 = x0,

    summed over dimensions, without a factor 1/2; the mean over examples is the S of Liu et al. S = 0 if and only if
    one Euler step is exact. Between other times the chord is (z_end - z_start) / (end - start) and the integral runs
    over |dt| from `start` to `end`, so that reversing time leaves S as it is.

    Args:
        field: as in `transport`; it is also evaluated by `jax.vmap` over the nodes.
        params: as in `transport`.
        x0: the state at t = start, ONE example, [*dims].
        nodes: number of Gauss-Legendre nodes in t, >= 1: exact where the integrand is a polynomial in t of degree below
            2 nodes. Between steps the states are interpolated (see `trajectory`).
        **options: those of `transport`.

    Returns:
        S >= 0, shape [], in units of x squared, in the dtype of x0.

    Raises:
        ValueError: as in `transport`, and if `nodes` is not an integer >= 1.
        RuntimeError: as in `transport`.

    Source: Liu et al. 2023 (Rectified Flow), section 2.2, their S(Z) before the expectation.
    """
    plan = _resolve(x0, **options)
    _validate.positive_integer("nodes", nodes)
    points, weights = np.polynomial.legendre.leggauss(nodes)
    start, end = jnp.asarray(plan.start, plan.dtype), jnp.asarray(plan.end, plan.dtype)
    times = _between(start, end, np.append((1 + points) / 2, 1.0))
    states = _solve(field, params, x0, plan, times=times)[0]
    chord = (states[-1] - x0) / (end - start)
    velocities = jax.vmap(field, in_axes=(None, 0, 0))(params, times[:-1], states[:-1])
    squares = jnp.sum((chord - velocities).reshape(nodes, -1) ** 2, axis=1)
    return jnp.abs(end - start) * jnp.dot(jnp.asarray(weights / 2, plan.dtype), squares)


@dataclass(frozen=True)
class _Plan:
    """Validated options; steps is None for an adaptive solve, and then rtol and atol are set."""

    dtype: np.dtype
    solver: str
    steps: int | None
    rtol: Scalar | None
    atol: Scalar | None
    start: Scalar
    end: Scalar
    max_steps: int


def _resolve(
    x0: Array,
    *,
    solver: str = "dopri5",
    steps: int | None = None,
    rtol: Scalar | None = None,
    atol: Scalar | None = None,
    start: Scalar = 0.0,
    end: Scalar = 1.0,
    max_steps: int | None = None,
) -> _Plan:
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
        return _Plan(dtype, solver, int(steps), None, None, start, end, int(steps))
    if solver == "euler":
        raise ValueError("steps must be given for solver euler, which has no error estimate, got None")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None:
            _validate.positive(name, value)
    limit = MAX_STEPS if max_steps is None else max_steps
    _validate.positive_integer("max_steps", limit)
    given = [value for value in (rtol, atol) if value is not None] or [TOLERANCE]
    return _Plan(dtype, solver, None, given[0], given[-1], start, end, int(limit))


def _check_times(times: Any, plan: _Plan) -> None:
    if np.ndim(times) != 1 or np.shape(times)[0] < 1:
        raise ValueError(f"times must have shape [m] with m >= 1, got {np.shape(times)}")
    if _validate.is_concrete(times, plan.start, plan.end):
        line = np.concatenate([np.asarray(part, plan.dtype).reshape(-1) for part in (plan.start, times, plan.end)])
        gaps = np.diff(line) * np.sign(line[-1] - line[0])
        if not (np.all(gaps >= 0) and np.all(gaps[1:-1] > 0)):
            raise ValueError(f"times must run strictly from start = {plan.start} to end = {plan.end}, got {times}")


def _check_field(field: VelocityField, params: Params, x0: Array) -> None:
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
class _VectorField:
    """A field in diffrax's order of arguments. Two are equal if their fields are, so that one solve compiles once."""

    field: VelocityField

    def __call__(self, t: Array, x: Array, params: Params) -> Array:
        return self.field(params, t, x)


def _between(start: Array, end: Array, fractions: np.ndarray) -> Array:
    # A convex combination is exact at both ends, and at t = 1/2 of [0, 1] in both directions.
    return start * jnp.asarray(1 - fractions, start.dtype) + end * jnp.asarray(fractions, end.dtype)


def _solve(
    field: VelocityField, params: Params, x0: Array, plan: _Plan, *, times: Any = None
) -> tuple[Array, Array | int]:
    """The state at the end, or the states at `times`; and the number of steps, rejected ones included."""
    import diffrax

    x0 = jnp.asarray(x0)
    _check_field(field, params, x0)
    start, end, controller = _controller(plan)
    vector_field: Any = _VectorField(field)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        getattr(diffrax, SOLVERS[plan.solver])(),
        start,
        end,
        None,
        x0,
        params,
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
    return _or_fail(states, jnp.where(overflow, 1, stopped), plan), solution.stats["num_steps"]


def _controller(plan: _Plan) -> tuple[Array, Array, Any]:
    """Start, end and the step size control of diffrax, in the dtype of the state."""
    import diffrax

    dtype = plan.dtype
    start, end = jnp.asarray(plan.start, dtype), jnp.asarray(plan.end, dtype)
    if plan.steps is not None:
        grid = _between(start, end, np.arange(plan.steps + 1) / plan.steps)
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


def _or_fail(states: Array, failure: Array, plan: _Plan) -> Array:
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
