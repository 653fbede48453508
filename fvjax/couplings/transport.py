"""Optimal transport within a batch, exact and entropic, through ott-jax (loaded on use)."""

import functools
import math
import warnings
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fvjax import _validate
from fvjax.couplings.pairings import aligned
from fvjax.types import Array, Coupling, Key, Pair, Scalar

SINKHORN_EPSILON = 0.05
"""Default entropic regularisation, in standard deviations of the pairwise costs."""
SINKHORN_MAX_ITERATIONS = 2000
SINKHORN_THRESHOLD = 1e-3
"""Default L1 error of the plan's marginals, whose mass is 1, at which the Sinkhorn iteration stops."""


class _Costs(NamedTuple):
    """Squared distances, split: |x0_i - x1_j|^2 = constant + rows_i + columns_j + product_ij, the last three centred.

    Every plan with the same marginals pays the same for the first three terms, so the solvers get `product` alone: in
    high dimension, or far from the origin, the full costs would lose it to rounding (mean >> standard deviation). And
    adding the terms up inside the same jit more than doubles its time on CPU (0.23 against 0.10 s, n = 2000, d = 3072).
    """

    constant: Array
    rows: Array
    columns: Array
    product: Array

    def spread(self) -> Array:
        """Standard deviation (ddof 0) of all n^2 costs, []: the three centred terms are orthogonal."""
        return jnp.sqrt(sum(jnp.mean(jnp.square(term)) for term in self[1:]))

    def of_plan(self, plan: Array) -> Array:
        """sum_ij plan_ij cost_ij, []."""
        shared = self.constant * plan.sum() + self.rows @ plan.sum(1) + self.columns @ plan.sum(0)
        return shared + jnp.sum(self.product * plan)


def _costs(x0: Array, x1: Array) -> _Costs:
    """With x, y centred and d = mean(x0) - mean(x1): |x - y + d|^2 = |d|^2 + |x|^2 + 2 d.x + |y|^2 - 2 d.y - 2 x.y."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(x0.dtype, x1.dtype, jnp.float32)
    x, y = (points.reshape(len(points), -1).astype(dtype) for points in (x0, x1))
    mean0, mean1 = x.mean(0), y.mean(0)
    x, y, offset = x - mean0, y - mean1, mean0 - mean1
    with jax.default_matmul_precision("highest"):
        rows = jnp.sum(x * x, 1) + 2 * (x @ offset)
        columns = jnp.sum(y * y, 1) - 2 * (y @ offset)
        product = -2 * (x @ y.T)
    constant = jnp.sum(offset * offset) + rows.mean() + columns.mean()
    return _Costs(constant, rows - rows.mean(), columns - columns.mean(), product)


def _clouds(x0: Array, x1: Array) -> tuple[Array, Array]:
    x0, x1 = aligned(x0, x1)
    if len(x0) == 0:
        raise ValueError(f"x0 and x1 must hold at least one example, got shape {x0.shape}")
    _validate.finite("x0", x0)
    _validate.finite("x1", x1)
    return x0, x1


def _ott() -> tuple[ModuleType, ModuleType, ModuleType]:
    """Geometry, linear solvers and exact solver of ott: loaded on use, and never as part of somebody's trace."""
    with warnings.catch_warnings(), jax.ensure_compile_time_eval():
        warnings.filterwarnings("ignore", "JAXopt is no longer maintained", DeprecationWarning)
        from ott.geometry import geometry
        from ott.solvers import linear
        from ott.tools import unreg
    return geometry, linear, unreg


@jax.jit
def _assignment(x0: Array, x1: Array) -> Array:
    geometry, _, unreg = _ott()
    with jax.numpy_dtype_promotion("standard"):  # ott and optax mix their types
        rows, columns = unreg.hungarian(geometry.Geometry(cost_matrix=_costs(x0, x1).product))[1].paired_indices
    return jnp.zeros_like(columns).at[rows].set(columns)


def assignment(x0: Array, x1: Array) -> Array:
    """The permutation s that minimises sum_i |x0_i - x1_s(i)|^2 over all n! of them (examples are flattened).

    O(n^3): 5 ms at n = 128 and 2.7 s at n = 1000 (d = 2, two CPU cores). Nan in a traced batch gives SOME permutation.

    Args:
        x0: source samples, [n, *dims], n >= 1.
        x1: target samples, [n, *dims].

    Returns:
        Indices into x1, int[n].

    Raises:
        ValueError: if the shapes of x0 and x1 differ, n = 0, or an entry is concrete and not finite.

    Source: Hungarian algorithm in the form of Crouse 2016, through ott.tools.unreg.hungarian.
    """
    return _assignment(*_clouds(x0, x1))


class SinkhornPlan(NamedTuple):
    """Entropic transport plan between two batches of n points, each of weight 1/n.

    Attributes:
        log_plan: logarithm of the plan, [n, n]; row i is x0_i, column j is x1_j.
        cost: sum_ij plan_ij |x0_i - x1_j|^2, []. Its gap to the exact cost mean_i |x0_i - x1_s(i)|^2,
            s = `assignment(x0, x1)`, belongs beside every result that uses the plan.
        epsilon: the regularisation in absolute units (of the cost), [].
        converged: whether `error` fell below the threshold, bool [].
        error: L1 error of the marginals of the plan (their mass is 1), [].
    """

    log_plan: Array
    cost: Array
    epsilon: Array
    converged: Array
    error: Array

    @property
    def plan(self) -> Array:
        """The plan itself, [n, n]: rows and columns sum to 1/n up to `error`."""
        return jnp.exp(self.log_plan)


@functools.partial(jax.jit, static_argnames="max_iterations")
def _solve(x0: Array, x1: Array, *, epsilon: Scalar, max_iterations: int, threshold: Scalar) -> SinkhornPlan:
    geometry, linear, _ = _ott()
    costs = _costs(x0, x1)
    spread = costs.spread()
    # Equal costs have no spread; every plan is then optimal, and any unit will do.
    unit = jnp.where(spread > 0, spread, 1)
    scaled = costs.product / unit
    epsilon, threshold = jnp.asarray(epsilon, unit.dtype), jnp.asarray(threshold, unit.dtype)
    # The error is looked at every 10th iteration; ott would round max_iterations up to a multiple of that.
    every = math.gcd(max_iterations, 10)
    with jax.numpy_dtype_promotion("standard"):  # ott mixes its types
        out = linear.solve(
            geometry.Geometry(cost_matrix=scaled, epsilon=epsilon),
            max_iterations=max_iterations,
            inner_iterations=every,
            threshold=threshold,
        )
    log_plan = (out.f[:, None] + out.g[None, :] - scaled) / epsilon
    error = out.errors[jnp.sum(out.errors != -1) - 1]  # -1 marks the checks that were not reached
    converged = error < threshold  # out.converged is True too where the error became infinite
    return SinkhornPlan(log_plan, costs.of_plan(jnp.exp(log_plan)), epsilon * unit, converged, error)


def _sinkhorn_options(epsilon: Scalar, max_iterations: int, threshold: Scalar) -> None:
    _validate.positive("epsilon", epsilon)
    _validate.positive_integer("max_iterations", max_iterations)
    _validate.positive("threshold", threshold)


def sinkhorn_plan(
    x0: Array,
    x1: Array,
    *,
    epsilon: Scalar = SINKHORN_EPSILON,
    max_iterations: int = SINKHORN_MAX_ITERATIONS,
    threshold: Scalar = SINKHORN_THRESHOLD,
) -> SinkhornPlan:
    r"""The plan P that minimises sum_ij P_ij |x0_i - x1_j|^2 + epsilon s sum_ij P_ij log P_ij, marginals 1/n.

    s is the standard deviation (ddof 0) of the n^2 costs. So the plan does not change when x0 and x1 are scaled, or
    shifted together, and epsilon means the same in every dimension; against the MEAN cost it would not: in high
    dimension the costs differ by little, and 5% of their mean is nearly the independent plan. A shift between x0
    and x1 widens the costs, hence raises the absolute epsilon (`SinkhornPlan.epsilon`).

    ==================  ========================================================
    epsilon -> 0        the exact assignment; takes ever more iterations
    epsilon -> inf      the independent plan, 1/n^2 everywhere
    all costs equal     some plan (all are optimal), never nan; s counts as 1
    ==================  ========================================================

    Args:
        x0: source samples, [n, *dims], n >= 1; examples are flattened.
        x1: target samples, [n, *dims].
        epsilon: regularisation in units of s, > 0.
        max_iterations: the iteration stops there, converged or not.
        threshold: L1 error of the marginals at which it stops, > 0.

    Returns:
        SinkhornPlan; nothing is warned about here, look at `converged`.

    Raises:
        ValueError: if an option is out of range, the shapes of x0 and x1 differ, n = 0, or an entry is concrete and
            not finite.

    Source: Cuturi 2013; Peyre & Cuturi 2019, section 4.2, through ott-jax.
    """
    _sinkhorn_options(epsilon, max_iterations, threshold)
    x0, x1 = _clouds(x0, x1)
    return _solve(x0, x1, epsilon=epsilon, max_iterations=int(max_iterations), threshold=threshold)


def _warn(max_iterations: int, converged: Array, error: Array, threshold: Array) -> None:
    if not converged:  # under vmap `cond` runs both branches
        warnings.warn(
            f"Sinkhorn did not converge within {max_iterations} iterations: the marginals are off by {error:.3g} in L1,"
            f" and the threshold is {threshold:.3g}; raise max_iterations or epsilon",
            RuntimeWarning,
            stacklevel=1,  # the caller is gone: this runs in a callback
        )


def _draw_pairing(key: Key, log_plan: Array) -> Array:
    """Draws a permutation from a plan: rows in random order, each draws among the columns that are still free."""
    order_key, column_key = jax.random.split(key)
    order = jax.random.permutation(order_key, len(log_plan))
    # argmax(log p + Gumbel noise) draws from p. The floor keeps a free column of mass 0 above those that are taken.
    scores = log_plan + jax.random.gumbel(column_key, log_plan.shape, log_plan.dtype)
    scores = jnp.maximum(scores, jnp.finfo(scores.dtype).min)

    def draw(free: Array, row: Array) -> tuple[Array, Array]:
        column = jnp.argmax(jnp.where(free, scores[row], -jnp.inf))
        return free.at[column].set(False), column

    _, columns = jax.lax.scan(draw, jnp.ones(len(log_plan), bool), order)
    return jnp.zeros_like(columns).at[order].set(columns)


@functools.partial(jax.jit, static_argnames="max_iterations")
def _sinkhorn_pairing(
    key: Key, x0: Array, x1: Array, *, epsilon: Scalar, max_iterations: int, threshold: Scalar
) -> Array:
    solution = _solve(x0, x1, epsilon=epsilon, max_iterations=max_iterations, threshold=threshold)
    jax.lax.cond(
        solution.converged,
        lambda *_: None,
        functools.partial(jax.debug.callback, functools.partial(_warn, max_iterations)),
        solution.converged,
        solution.error,
        jnp.asarray(threshold, solution.error.dtype),
    )
    return _draw_pairing(key, solution.log_plan)


def minibatch_ot(
    *,
    method: str = "exact",
    epsilon: Scalar | None = None,
    max_iterations: int | None = None,
    threshold: Scalar | None = None,
) -> Coupling:
    """Joins x0 with the permutation of x1 that optimal transport chooses within the batch, cost |x0 - x1|^2.

    "exact" is `assignment`, and uses no randomness. "sinkhorn" draws a permutation from `sinkhorn_plan`: the rows, in
    random order, each draw a column from their row of the plan restricted to the columns that are still free. So
    every point is used exactly once, at a price: the last rows take what is left, so that the mean cost of the pairs
    lies above that of the plan (not at either end, epsilon -> 0 or inf). For N(0, I) and its shift in d = 2, epsilon
    0.05: the plan 30% and the pairs 53% above the exact cost at n = 128, 29% and 40% at n = 512. State both.

    Sinkhorn that does not converge gives one RuntimeWarning with its error, under jit too; the pairing is then still
    a permutation. It comes from a callback: `jax.effects_barrier()` waits for it.

    Args:
        method: "exact" or "sinkhorn".
        epsilon: sinkhorn only, in standard deviations of the costs, > 0; default 0.05.
        max_iterations: sinkhorn only; default 2000.
        threshold: sinkhorn only, L1 error of the marginals, > 0; default 1e-3.

    Returns:
        A coupling (key, x0[n, *dims], x1[n, *dims]) -> Pair(x0, permuted x1); it raises what `assignment` raises.

    Raises:
        ValueError: if `method` is unknown, an option is out of range, or a sinkhorn option is given to "exact".

    Source: Tong et al. 2024 (OT-CFM); Pooladian et al. 2023.
    """
    _validate.one_of("method", method, ("exact", "sinkhorn"))
    if method == "exact":
        for name, value in (("epsilon", epsilon), ("max_iterations", max_iterations), ("threshold", threshold)):
            if value is not None:
                raise ValueError(f"{name} must be None where method is 'exact' (only sinkhorn has it), got {value}")

        def exact(key: Key, x0: Array, x1: Array) -> Pair:
            del key
            x0, x1 = _clouds(x0, x1)
            return Pair(x0, x1[_assignment(x0, x1)])

        return exact

    epsilon = SINKHORN_EPSILON if epsilon is None else epsilon
    max_iterations = SINKHORN_MAX_ITERATIONS if max_iterations is None else max_iterations
    threshold = SINKHORN_THRESHOLD if threshold is None else threshold
    _sinkhorn_options(epsilon, max_iterations, threshold)
    draw = functools.partial(
        _sinkhorn_pairing, epsilon=epsilon, max_iterations=int(max_iterations), threshold=threshold
    )

    def sinkhorn(key: Key, x0: Array, x1: Array) -> Pair:
        x0, x1 = _clouds(x0, x1)
        return Pair(x0, x1[draw(key, x0, x1)])

    return sinkhorn
