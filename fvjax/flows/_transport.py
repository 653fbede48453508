"""Transport along the flow of a velocity field, its trajectories, and how straight they are."""

from collections.abc import Sequence
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax.flows._solve import EVALUATIONS, SolverOptions, between, check_times, resolve, solve
from fvjax.types import Array, Params, Scalar, VelocityField


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
    error / (atol + rtol |x|)). For a batch use `jax.vmap`; see the top of `fvjax.flows` for the difference between that
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
    plan = resolve(x0, solver=solver, steps=steps, rtol=rtol, atol=atol, start=start, end=end, max_steps=max_steps)
    return solve(field, params, x0, plan)[0]


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
    plan = resolve(x0, **options)
    state, steps = solve(field, params, x0, plan)
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
    plan = resolve(x0, **options)
    check_times(times, plan)
    return solve(field, params, x0, plan, times=times)[0]


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

    Source: Liu et al. 2023 (Rectified Flow), eq. 3, their S(Z) before the expectation.
    """
    plan = resolve(x0, **options)
    _validate.positive_integer("nodes", nodes)
    points, weights = np.polynomial.legendre.leggauss(nodes)
    start, end = jnp.asarray(plan.start, plan.dtype), jnp.asarray(plan.end, plan.dtype)
    times = between(start, end, np.append((1 + points) / 2, 1.0))
    states = solve(field, params, x0, plan, times=times)[0]
    chord = (states[-1] - x0) / (end - start)
    velocities = jax.vmap(field, in_axes=(None, 0, 0))(params, times[:-1], states[:-1])
    squares = jnp.sum((chord - velocities).reshape(nodes, -1) ** 2, axis=1)
    return jnp.abs(end - start) * jnp.dot(jnp.asarray(weights / 2, plan.dtype), squares)
