r"""The affine field of Lemma 1 and the exact moments of its gradient.

With C = I + t Theta, y = x_t - t theta, r = v - u_t, a = C^-T r and b = C^-1 y the gradient of the loss |r|^2 of a draw
is 2 a in theta and 2 a b^T in Theta, because dv = C^-1 dTheta C^-1 y. Given t, (a, b) is Gaussian for every Gaussian
coupling and interpolant, so its first and second moments follow from Isserlis' theorem (docs/theory.md, sections 3 and
4). The variance is a sum of variances, never E|g|^2 - |E g|^2: one of 1e-28 comes out as 1e-28.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _quadrature, _validate
from fvjax.gaussian._inverse import inverse
from fvjax.gaussian._poles import Problem, decompose, find_singularities, regression_at
from fvjax.gaussian.laws import GaussianCoupling, checked_map
from fvjax.gradients import GradientMoments, merge_groups, merge_moments, total_variance
from fvjax.interpolants import Interpolant, as_pytree, path_at
from fvjax.types import AffineMap, Array, Pair, PathSample, Scalar

QUADRATURE_LIMIT = 2_000_000
"""Most nodes that `quadrature_paths` makes: three dimensions of xi and z each take 3 nodes."""


class VarianceProfile(NamedTuple):
    """The gradient of ONE draw at given times: `variance` = tr Cov(g | t), `second_moment` = E[|g|^2 | t]; [*times]."""

    variance: Array
    second_moment: Array


def pair_optimal(map: AffineMap) -> AffineMap:
    """The parameters Theta = A - I, theta = mu with which `affine_field` is x1 - x0 on every line of x1 = A x0 + mu.

    Loss and gradient variance are zero for the linear interpolant, whatever the map (Proposition 1), as long as
    I + t (A - I) is invertible for almost every t.

    Args:
        map: x0 -> A x0 + mu.

    Returns:
        AffineMap(A - I, mu), parameters of `affine_field`.

    Raises:
        ValueError: if the matrix is not square or the shift does not fit.

    Source: Lemma 1 and Proposition 1, Reu et al. 2025.
    """
    checked_map("map", map)
    return AffineMap(map.matrix - jnp.eye(len(map.matrix), dtype=map.matrix.dtype), map.shift)


def affine_field(params: AffineMap, t: Scalar, x: Array) -> Array:
    r"""The affine velocity field v(x, t) = theta + Theta (I + t Theta)^-1 (x - t theta) of ONE example.

    Args:
        params: AffineMap(matrix=Theta [d, d], shift=theta [d]).
        t: time, [].
        x: place, [d].

    Returns:
        Velocity, [d].

    Raises:
        ValueError: if shapes disagree, or everything is concrete and I + t Theta is singular (to machine precision).
            Under `jit` a singular matrix gives inf or nan.

    Source: Lemma 1, Reu et al. 2025.
    """
    theta = checked_map("params", params).shift
    _validate.shape("x", x, theta.shape)
    flow = jnp.eye(len(theta), dtype=theta.dtype) + jnp.asarray(t, theta.dtype) * params.matrix
    if _validate.is_concrete(flow, x) and decompose(flow).null[-1]:
        raise ValueError(f"I + t Theta must be invertible, got a singular matrix at t = {float(t):.6g}")
    return theta + params.matrix @ jnp.linalg.solve(flow, x - jnp.asarray(t, theta.dtype) * theta)


def _moments_at(problem: Problem, t: Array) -> GradientMoments:
    """Exact moments of the gradient given t, weight 1; docs/theory.md, section 4."""
    at = regression_at(problem, t)
    flow_inverse = inverse(at.flow)
    b = flow_inverse @ at.place
    a = flow_inverse.T @ (flow_inverse @ at.residual)
    mean_a, factor_a, mean_b, factor_b = a[:, 0], a[:, 1:], b[:, 0], b[:, 1:]
    cross = factor_a @ factor_b.T
    var_a, var_b = jnp.sum(factor_a**2, 1), jnp.sum(factor_b**2, 1)
    outer = jnp.outer(mean_a, mean_b)
    var_matrix = jnp.outer(var_a, var_b + mean_b**2) + jnp.outer(mean_a**2, var_b) + cross**2 + 2 * outer * cross
    return GradientMoments(
        jnp.ones((), t.dtype),
        AffineMap(2 * (cross + outer), 2 * mean_a),
        AffineMap(4 * var_matrix, 4 * var_a),
    )


def _scaled(moments: GradientMoments, factor: Array) -> GradientMoments:
    return moments._replace(weight=moments.weight * factor, m2=jax.tree.map(lambda m: m * factor, moments.m2))


def _checked_problem(params: AffineMap, coupling: GaussianCoupling, interpolant: Interpolant) -> Problem:
    """Checks shapes and times, and brings everything to one floating dtype."""
    checked_map("params", params)
    dim = np.shape(params.shift)[0]
    if np.shape(coupling.mean0) != (dim,) or np.shape(coupling.factor0)[:1] != (dim,):
        raise ValueError(f"coupling must have the dimension of params, {dim}, got {np.shape(coupling.mean0)[0]}")
    if _validate.is_concrete(interpolant.time_range):
        _validate.interval("interpolant.time_range", interpolant.time_range, 0.0, 1.0)
    dtype = _validate.common_dtype(*params, *coupling)
    params, coupling = jax.tree.map(lambda x: jnp.asarray(x, dtype), (AffineMap(*params), coupling))
    return Problem(params, coupling, as_pytree(interpolant))


def variance_profile(
    params: AffineMap, coupling: GaussianCoupling, interpolant: Interpolant, t: Array
) -> VarianceProfile:
    r"""Exact variance of the affine field's gradient given the time: the integrand of `exact_gradient_variance`.

    The total variance over random t is the mean of `variance` over t plus the variance of E[g | t] between times.

    Args:
        params: parameters of `affine_field`.
        coupling: Gaussian coupling of the same dimension.
        interpolant: any interpolant.
        t: times, any shape.

    Returns:
        VarianceProfile, both fields in the shape of `t`; inf or nan at a time at which I + t Theta is singular.

    Raises:
        ValueError: if the dimensions disagree, or `interpolant.time_range` is no interval in [0, 1].
    """
    problem = _checked_problem(params, coupling, interpolant)
    return _profile(problem, jnp.asarray(t, problem.params.shift.dtype))


@jax.jit
def _profile(problem: Problem, t: Array) -> VarianceProfile:
    def at(s: Array) -> VarianceProfile:
        moments = _moments_at(problem, s)
        variance = total_variance(moments)
        return VarianceProfile(variance, variance + sum(jnp.sum(m**2) for m in moments.mean))

    flat = jax.lax.map(at, t.ravel(), batch_size=64)
    return VarianceProfile(*(x.reshape(t.shape) for x in flat))


def exact_gradient_variance(params: AffineMap, coupling: GaussianCoupling, interpolant: Interpolant) -> Array:
    r"""Total variance tr Cov(g) of the affine field's gradient for ONE draw of (t, x0, x1, z), in closed form.

    g = grad |v(x_t, t) - u_t|^2 with the sum over dimensions (a factor 2 in the gradient), in all d^2 + d parameters;
    t ~ U[interpolant.time_range]. A batch of B draws has 1/B of it.

    =====================================  =============================================================================
    gamma = 0, params = pair_optimal(map)  0 for every map, also where I + t (A - I) is singular at some t: the residual
                                           is below its rounding error, which counts as 0 (Proposition 1)
    I + t Theta singular at some t         inf, if x_t is not degenerate there: b = C^-1 y has a pole, |b|^2 is not
                                           integrable. For rotated Gaussians N(0, I) that is 180 degrees with sigma > 0;
                                           for other covariances already every angle at which A has a negative real
                                           eigenvalue; for a singular target covariance (constant coordinates, t = 1)
                                           any angle with sigma > 0. Finite, if loss and x_t vanish at that t with the
                                           singular direction (sigma = 0: the OT field of a target with constant
                                           coordinates)
    gamma = 0 at an end of `time_range`    inf, if (gamma^2)' > 0 there: E|gamma' z|^2 is not integrable (the Brownian
                                           bridge on [0, 1]; its default `time_range` keeps away from the ends)
    gamma' infinite at an end              nan without a `noise_rate`: cannot be told
    =====================================  =============================================================================

    "Singular" means to machine precision of the dtype: smallest singular value below 8 (d + 4) epsilons of the largest.

    Args:
        params: parameters of `affine_field`.
        coupling: Gaussian coupling of the same dimension.
        interpolant: any interpolant; sigma and the params may be traced.

    Returns:
        Shape []. Differentiable in params, coupling and sigma. The relative error is about epsilon over the smallest
        singular value of I + t Theta: in x64 1e-15 at 170 degrees, 1e-13 at 179.9 (panels in time follow the poles).

    Raises:
        ValueError: if the dimensions disagree, or `interpolant.time_range` is no interval in [0, 1].

    Source: derived in docs/theory.md, section 4.
    """
    return total_variance(exact_gradient_moments(params, coupling, interpolant))


def exact_gradient_moments(params: AffineMap, coupling: GaussianCoupling, interpolant: Interpolant) -> GradientMoments:
    """Exact mean and variance of the affine field's gradient, coordinate by coordinate, as moments of weight 1.

    So everything of `fvjax.gradients` applies: by leaf, elementwise, the gradient noise scale. Arguments, conventions
    and edge cases as in `exact_gradient_variance`; where the variance is infinite, every `m2` is inf and the mean nan.
    """
    return _exact_moments(_checked_problem(params, coupling, interpolant))


@jax.jit
def _exact_moments(problem: Problem) -> GradientMoments:
    dtype = problem.params.shift.dtype
    start, end = (jnp.asarray(t, dtype) for t in problem.interpolant.time_range)
    singular = find_singularities(jax.lax.stop_gradient(problem), start, end)
    lefts, widths = _quadrature.panels(singular.poles, singular.removable, start, end)
    unfinished = lefts[-1] + widths[-1] < end - 1e-6
    widths = jnp.where(singular.diverges, 0, widths)  # nothing to integrate
    nodes, weights = (jnp.asarray(x, dtype) for x in _quadrature.legendre(_quadrature.PANEL_NODES))

    def integrate(total: GradientMoments, left: Array, width: Array) -> GradientMoments:
        at_nodes = jax.vmap(lambda t: _moments_at(problem, t))(left + width * nodes)
        scaled = jax.vmap(_scaled)(at_nodes, weights * width / (end - start))
        return merge_moments(total, merge_groups(scaled))

    def add_panel(total: GradientMoments, panel: tuple[Array, Array]) -> tuple[GradientMoments, None]:
        return jax.lax.cond(panel[1] > 0, integrate, lambda total, *_: total, total, *panel), None

    zeros = jax.tree.map(jnp.zeros_like, problem.params)
    # `cond` skips unused panels, but under vmap it computes them too: let that be where C is regular.
    panels = jnp.where(widths > 0, lefts, start), widths
    moments, _ = jax.lax.scan(add_panel, GradientMoments(jnp.zeros((), dtype), zeros, zeros), panels)
    unknown = unfinished | ~singular.known

    def settled(value: Array, divergent: float) -> Array:
        value = jnp.where(singular.loss | jnp.isfinite(value), value, 0)
        return jnp.where(singular.diverges, divergent, jnp.where(unknown, jnp.nan, value))

    mean = jax.tree.map(lambda m: settled(m, jnp.nan), moments.mean)
    m2 = jax.tree.map(lambda m: settled(m, jnp.inf), moments.m2)
    return GradientMoments(jnp.where(singular.diverges, 1, moments.weight), mean, m2)


def quadrature_paths(
    coupling: GaussianCoupling, interpolant: Interpolant, *, time_nodes: int = 64, space_nodes: int = 3
) -> tuple[PathSample, Array]:
    """Nodes and weights with which `gradient_moments` computes exact gradient moments of ANY field, in low dimension.

    Gauss-Legendre in t times Gauss-Hermite in each of the k + d dimensions of xi and z. 3 space nodes are exact for
    polynomials of degree 5, and so for the affine field, whose squared gradient has degree 4; a network needs more.

    Args:
        coupling: Gaussian coupling with factors [d, k].
        interpolant: any interpolant. For a pole at distance h from its time range take about 10 / sqrt(h) time nodes.
        time_nodes: even, so that no node falls on the middle of the time range.
        space_nodes: in each dimension.

    Returns:
        PathSample with leading axis n = time_nodes * space_nodes^(k + d), and weights [n] that add up to 1.

    Raises:
        ValueError: if the node counts are not positive integers, `time_nodes` is odd, or n is above 2e6.
    """
    _validate.positive_integer("time_nodes", time_nodes)
    _validate.positive_integer("space_nodes", space_nodes)
    if time_nodes % 2:
        raise ValueError(f"time_nodes must be even, got {time_nodes}")
    dim, rank = coupling.factor0.shape
    if time_nodes * space_nodes ** (rank + dim) > QUADRATURE_LIMIT:
        raise ValueError(
            f"time_nodes * space_nodes^(k + d) must be <= {QUADRATURE_LIMIT},"
            f" got {time_nodes} * {space_nodes}^{rank + dim}; take draws instead"
        )
    dtype = coupling.mean0.dtype
    node, weight = _quadrature.hermite(space_nodes)
    noise = jnp.asarray(list(itertools.product(node, repeat=rank + dim)), dtype)
    noise_weight = jnp.asarray([np.prod(w) for w in itertools.product(weight, repeat=rank + dim)], dtype)
    t, t_weight = (jnp.asarray(x, dtype) for x in _quadrature.legendre(time_nodes))
    start, end = interpolant.time_range

    def path(time: Array, xi: Array) -> PathSample:
        pair = Pair(
            coupling.mean0 + coupling.factor0 @ xi[:rank],
            coupling.mean1 + coupling.factor1 @ xi[:rank],
        )
        return path_at(pair, interpolant, start + (end - start) * time, xi[rank:])

    paths = jax.vmap(lambda time: jax.vmap(lambda xi: path(time, xi))(noise))(t)
    weights = (t_weight[:, None] * noise_weight).ravel()
    return jax.tree.map(lambda x: x.reshape(len(weights), *x.shape[2:]), paths), weights
