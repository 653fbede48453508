"""Diffusions dX = f(X, t) dt + sigma dB: their ends, and their states at given times."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax.flows._solve import Plan, check_field, check_times, integrate, resolve, steps_between
from fvjax.types import Array, Key, Params, Scalar, VelocityField

DIFFUSION_SOLVERS = {"euler": ("Euler", "BrownianIncrement"), "shark": ("ShARK", "SpaceTimeLevyArea")}
"""Solver names of `diffuse`, and the classes of diffrax that they stand for: of the solver, and of what it draws."""


def diffuse(
    key: Key,
    field: VelocityField,
    params: Params,
    x0: Array,
    *,
    sigma: Scalar,
    steps: int,
    solver: str = "euler",
    start: Scalar = 0.0,
    end: Scalar = 1.0,
) -> Array:
    r"""Draws the end of ONE path of dX = field(params, t, X) dt + sigma dB, X(start) = x0.

    B is a standard Brownian motion of the shape of x0, sigma a number, so that Ito and Stratonovich agree. `steps`
    equal steps of length h, at the times start + (end - start) k / steps, by

        euler   x <- x + h f(x, t) + sigma W                                                     (Euler-Maruyama)
        shark   f1 = f(x + sigma H, t),   f2 = f(x + 5/6 h f1 + sigma (5/6 W + H), t + 5/6 h),
                x <- x + h (2/5 f1 + 3/5 f2) + sigma W                                           (Foster et al.)

    with W ~ N(0, h I) and H ~ N(0, h/12 I), the space-time Levy area, independent. For a smooth field the strong order
    (of the error on one path) is 1 and 1.5, the order of expectations 1 and 2. The noise has its exact law at every
    step, and so has X where the field is constant.

    ==================  =========================================================================================
    sigma = 0           the ODE: `euler` is `transport` with Euler and as many steps, to rounding
    singular at `end`   allowed: neither solver evaluates the field there. With the Brownian bridge's drift
                        (x1 - x)/(1 - t) the end is x1 + sigma N(0, h I) under `euler` and has 4 1/12 times that
                        variance under `shark`, whose orders need a smooth field
    start > end         refused. A diffusion backward in time is one forward in s = 1 - t, with the ends swapped
                        and a drift of its own
    same key            the same path, and the same W under both solvers; another number of steps draws another
                        Brownian motion
    a failed solve      not finite, or a traced `start` above `end`. As `transport`: a RuntimeError if called
                        eagerly, nan in every entry of that example under `jit`
    ==================  =========================================================================================

    For a batch use `jax.vmap`, with a key for each example: `fold_in(key, i)` of its global index, so that the result
    does not depend on chunks. Step k draws W from fold_in(split(key)[0], k) and H from fold_in(split(key)[1], k).

    Differentiable in reverse mode with respect to `params`, `x0` and `sigma`, on the drawn path (checkpointed);
    `jax.jvp` is not supported. Compiled once for each field (compared by ==), solver, number of steps and shape; key,
    sigma, times and params are traced.

    Args:
        key: of the Brownian motion of this example.
        field: the drift, a hashable callable (params, t [], x [*dims]) -> [*dims].
        params: pytree of arrays, its first argument.
        x0: the state at t = start, ONE example, floating point, [*dims].
        sigma: noise scale, >= 0, in units of x per square root of time, shape [].
        steps: number of steps, >= 1.
        solver: "euler", one evaluation of the field in a step, or "shark", two.
        start: time of x0, shape [].
        end: time of the result, shape [], above `start`.

    Returns:
        The state at t = end, [*dims], in the dtype of x0 (as are all times and the noise).

    Raises:
        ValueError: for options outside the above, an x0 that is not floating point, or a field that does not return the
            shape and dtype of x0.
        RuntimeError: if the solve fails and this is called eagerly.

    Source: Foster, dos Reis and Strange 2023, arXiv 2210.17543, eq. 6.1 (shark). The bridge's end: put
    f = (x1 - x)/(1 - t) into the last step, where h = 1 - t; it leaves x1 + sigma W, or x1 - sigma (2 W + H).
    """
    plan = _resolve(x0, sigma, steps=steps, solver=solver, start=start, end=end)
    return _draw(key, field, params, x0, sigma=sigma, plan=plan)


def diffusion_path(
    key: Key,
    field: VelocityField,
    params: Params,
    x0: Array,
    *,
    times: Array | Sequence[float],
    sigma: Scalar,
    steps: int,
    solver: str = "euler",
    start: Scalar = 0.0,
    end: Scalar = 1.0,
) -> Array:
    r"""States of ONE path at the given times, along the same solve as `diffuse` with the same key.

    At a step it is the state of `diffuse` to rounding. Between two steps it lies on the line that joins their states:
    the Brownian motion's own variance there, sigma^2 (t - t_k)(t_(k+1) - t)/h, is missing. Choose times that are steps
    wherever the law matters.

    Args:
        key: as in `diffuse`.
        field: as in `diffuse`.
        params: as in `diffuse`.
        x0: the state at t = start, ONE example, [*dims].
        times: [m], m >= 1, strictly increasing, from `start` to `end`; either end may be left out.
        sigma: as in `diffuse`.
        steps: as in `diffuse`.
        solver: as in `diffuse`.
        start: as in `diffuse`.
        end: as in `diffuse`.

    Returns:
        [m, *dims] in the dtype of x0.

    Raises:
        ValueError: as in `diffuse`, and if `times` has not the shape [m], is not in order or leaves [start, end].
        RuntimeError: as in `diffuse`.
    """
    plan = _resolve(x0, sigma, steps=steps, solver=solver, start=start, end=end)
    check_times(times, plan)
    return _draw(key, field, params, x0, sigma=sigma, plan=plan, times=times)


def _resolve(x0: Array, sigma: Scalar, *, steps: int, solver: str, start: Scalar, end: Scalar) -> Plan:
    """The options of `diffuse` checked; what `transport` has too is checked as there."""
    _validate.one_of("solver", solver, tuple(DIFFUSION_SOLVERS))
    _validate.positive_integer("steps", steps)
    if np.ndim(sigma) != 0:
        raise ValueError(f"sigma must be a scalar, got shape {np.shape(sigma)}")
    _validate.nonnegative("sigma", sigma)
    plan = resolve(x0, solver="euler", steps=steps, start=start, end=end)
    if _validate.is_concrete(start, end) and float(start) > float(end):
        raise ValueError(
            f"end must be above start, got start = {start} and end = {end}; backward in time is forward in s = 1 - t, "
            "with the ends swapped"
        )
    return replace(plan, solver=solver, forward_only=True)


def _draw(
    key: Key, field: VelocityField, params: Params, x0: Array, *, sigma: Scalar, plan: Plan, times: Any = None
) -> Array:
    import diffrax

    from fvjax.flows import _brownian

    x0 = jnp.asarray(x0)
    check_field(field, params, x0)
    solver, levy_area = DIFFUSION_SOLVERS[plan.solver]
    start, end = jnp.asarray(plan.start, plan.dtype), jnp.asarray(plan.end, plan.dtype)
    grid = steps_between(start, end, plan.max_steps)  # of fixed steps max_steps is the number
    terms = _brownian.terms(key, field, grid=grid, shape=x0.shape, levy_area=levy_area)
    args = (params, jnp.asarray(sigma, plan.dtype))
    return integrate(terms, getattr(diffrax, solver)(), x0, plan, args=args, times=times)[0]
