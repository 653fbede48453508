r"""The regression problem of the affine field at one time, and the times at which its gradient is singular.

With C = I + t Theta, y = x_t - t theta, w = u_t - theta the field misses its target by v - u_t = C^-1 rho with
rho = Theta y - C w = Theta (y - t w) - w, because Theta and C commute. The gradient is 2 a and 2 a b^T with b = C^-1 y
and a = C^-T C^-1 rho: both have poles where C is singular, unless y and rho vanish there in the singular direction
(docs/theory.md, section 4).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fvjax import _quadrature
from fvjax.gaussian.laws import GaussianCoupling
from fvjax.interpolants import Interpolant
from fvjax.types import AffineMap, Array


class Problem(NamedTuple):
    """An affine field and what it is trained on, in one floating dtype."""

    params: AffineMap
    coupling: GaussianCoupling
    interpolant: Interpolant


class Regression(NamedTuple):
    """C, y, w and rho at one time. Columns: the mean, then the factors of xi and of z; [d, 1 + k + d].

    `size` bounds |y| and |w| before anything cancels: the scale of their rounding errors.
    """

    flow: Array
    place: Array
    target: Array
    residual: Array
    size: Array


def regression_at(problem: Problem, t: Array) -> Regression:
    """The regression problem at time t; entries of rho within their rounding error are exactly 0.

    So the pair-optimal field of lines without noise has loss and variance 0, however close C is to singular: without
    this the rounding error would be divided by the square of the smallest singular value.
    """
    (theta_matrix, theta), coupling, interpolant = problem
    c = interpolant.coefficients(t)
    identity = jnp.eye(len(theta), dtype=t.dtype)
    x0 = jnp.concatenate([coupling.mean0[:, None], coupling.factor0], 1)
    x1 = jnp.concatenate([coupling.mean1[:, None], coupling.factor1], 1)

    def columns(pair: tuple[Array, Array], weights: tuple[Array, Array, Array], shift: Array) -> Array:
        data = weights[0] * pair[0] + weights[1] * pair[1]
        return jnp.concatenate([data.at[:, 0].add(shift), weights[2] * identity], 1)

    place = columns((x0, x1), (c.alpha, c.beta, c.gamma), -t * theta)
    target = columns((x0, x1), (c.alpha_rate, c.beta_rate, c.gamma_rate), -theta)
    # Before cancellation. x1 = A x0 + mu carries the rounding of that product, |A| |x0| <= (1 + |Theta|) |x0|.
    slope = jnp.abs(theta_matrix)
    sizes = jnp.abs(x0), jnp.abs(x1) + jnp.abs(x0) + slope @ jnp.abs(x0)
    c = jax.tree.map(jnp.abs, c)
    place_size = columns(sizes, (c.alpha, c.beta, c.gamma), t * jnp.abs(theta))
    target_size = columns(sizes, (c.alpha_rate, c.beta_rate, c.gamma_rate), jnp.abs(theta))

    residual = theta_matrix @ (place - t * target) - target
    rounding = _rounding(residual) * (slope @ (place_size + t * target_size) + target_size)
    noise = jax.lax.stop_gradient(jnp.where(jnp.abs(residual) <= rounding, residual, 0))
    return Regression(identity + t * theta_matrix, place, target, residual - noise, place_size + target_size)


def _rounding(matrix: Array) -> float:
    """Relative rounding error that a product of d x d matrices may have, generously."""
    return 8 * (len(matrix) + 4) * float(jnp.finfo(matrix.dtype).eps)


class Decomposition(NamedTuple):
    """C = left diag(values) right^T, and which singular values are 0 to rounding."""

    left: Array
    values: Array
    right: Array
    null: Array


def decompose(matrix: Array) -> Decomposition:
    """Singular value decomposition with the verdict on every singular value."""
    left, values, right = jnp.linalg.svd(matrix)
    null = values <= _rounding(matrix) * jnp.maximum(values[0], 1)
    return Decomposition(left, values, right.T, null)


class Singularities(NamedTuple):
    """Poles of the gradient's moments in t [k], which are removable [k], and what the problem as a whole is like.

    `loss`: whether there is any; without, there is no gradient either (Proposition 1). `diverges`: infinite variance.
    `known`: whether gamma gamma' is a number at both ends, so that the noise can be judged there.
    """

    poles: _quadrature.Poles
    removable: Array
    loss: Array
    diverges: Array
    known: Array


def find_singularities(problem: Problem, start: Array, end: Array) -> Singularities:
    """Where C is singular, within [start, end] and beside it, and what that does to the variance.

    That is at t = -1 / lambda for the eigenvalues lambda of Theta. Whether C is singular within [start, end] is asked
    of the matrix itself, since a double eigenvalue is only good to sqrt(epsilon), and one of multiplicity m to its m-th
    root; the end is asked too, since a singular target covariance puts its pole exactly there. Of the poles near a
    singular time as many as C has zero singular values are that time itself, the nearest ones; any other remains a pole
    (constant beside nearly constant coordinates of x1: at 1 and just behind it).
    """
    matrix = problem.params.matrix
    widest = _widest_noise(problem.interpolant, matrix.dtype)
    loss = jnp.any(jax.vmap(lambda t: regression_at(problem, t).residual)(jnp.linspace(start, end, 3)) != 0)
    eigenvalues = jnp.linalg.eigvals(matrix)
    size = eigenvalues.real**2 + eigenvalues.imag**2
    none = ~loss | (size < jnp.finfo(matrix.dtype).eps ** 2)
    size = jnp.where(none, 1, size)
    poles = _quadrature.Poles(jnp.where(none, jnp.inf, -eigenvalues.real / size), eigenvalues.imag / size)
    times = jnp.append(jnp.clip(poles.real, start, end), end)
    distances = jnp.append(poles.distance(times[:-1]), jnp.where(jnp.min(poles.distance(end)) < 0.1, 0, jnp.inf))

    def ask(question: tuple[Array, Array]) -> tuple[Array, Array]:
        return jax.lax.cond((question[1] < 1e-2) & loss, look, lambda *_: (jnp.asarray(False),) * 2, *question)

    def look(time: Array, distance: Array) -> tuple[Array, Array]:
        parts = decompose(jnp.eye(len(matrix), dtype=matrix.dtype) + time * matrix)
        nullity, nearer = jnp.sum(parts.null), jnp.sum(poles.distance(time) < distance)
        infinite = jax.lax.cond(
            nullity > 0, lambda: _diverges_at(problem, time, parts, widest), lambda: jnp.asarray(False)
        )
        return nearer < nullity, infinite

    removable, infinite = jax.lax.map(ask, (times, distances))
    infinite_rate, known = _judge_ends(problem.interpolant, jnp.stack([start, end]), widest)
    # The coefficients of a bridge have poles at 0 and 1; its time range keeps away from both.
    ends = jnp.where(jnp.stack([start > 0, end < 1]), jnp.asarray([0, 1], matrix.dtype), jnp.inf)
    poles = _quadrature.Poles(jnp.append(poles.real, ends), jnp.append(poles.imag, jnp.zeros_like(ends)))
    removable = jnp.append(removable[:-1], jnp.zeros(2, bool))
    return Singularities(poles, removable, loss, infinite_rate | jnp.any(infinite), known)


def _diverges_at(problem: Problem, time: Array, parts: Decomposition, widest: Array) -> Array:
    r"""Whether the variance is not integrable at a time tau at which C is singular, C = U diag(s) V^T.

    Let U0, V0 be the columns of U, V with s = 0. U0^T (C b - y) and its derivative vanish, and Theta = (C - I) / tau:

        U0^T y = 0                                  else b ~ 1 / (t - tau) and a ~ 1 / (t - tau)^2;
        U0^T b = -tau U0^T w                        for the limit b = V diag(s)^+ U^T y + V0 c, which fixes c;
        V0^T (y - b - tau w) = tau V0^T (v - u_t)   must vanish, else a ~ 1 / (t - tau).

    Noise enters every direction: with gamma(tau) > 0 the first line fails. "0" means rounding error in the first line,
    and its square root in the others, which were divided by singular values.
    """
    at, (left, values, right, null) = regression_at(problem, time), parts
    null = null[:, None]
    epsilon, rounding = jnp.finfo(time.dtype).eps, _rounding(parts.left)
    data = 1 + problem.coupling.factor0.shape[1]
    xi = jnp.full((data - 1,), jnp.linalg.norm(at.size[:, 1:data]))
    scale = jnp.concatenate([jnp.linalg.norm(at.size[:, :1], axis=0), xi, jnp.full(len(null), widest)])

    pole_in_b = jnp.any(jnp.where(null, jnp.abs(left.T @ at.place) > rounding * scale, False)[:, :data])
    pole_in_b |= problem.interpolant.coefficients(time).gamma > epsilon**1.5 * widest

    limit = right @ (jnp.where(null, 0, 1 / values[:, None]) * (left.T @ at.place))
    u, s, vt = jnp.linalg.svd(jnp.where(null & null.T, left.T @ right, 0))
    inverse = jnp.where(s > jnp.sqrt(epsilon), 1 / s, 0)[:, None]
    drift = time * at.target
    limit += right @ (vt.T @ (inverse * (u.T @ jnp.where(null, -left.T @ (limit + drift), 0))))
    tolerance = jnp.sqrt(epsilon) + rounding / jnp.min(jnp.where(parts.null, 1, values))
    missing = jnp.maximum(jnp.abs(left.T @ (limit + drift)), jnp.abs(right.T @ (at.place - limit - drift)))
    pole_in_a = jnp.any(jnp.where(null, missing > tolerance * scale, False))

    return pole_in_b | pole_in_a


def _widest_noise(interpolant: Interpolant, dtype: jnp.dtype) -> Array:
    """The largest gamma of a few times: what the rounding error of gamma is relative to (sin(pi)^2 is not 0)."""
    return jnp.max(jax.vmap(lambda t: interpolant.coefficients(t).gamma)(jnp.linspace(0, 1, 9, dtype=dtype)))


def _judge_ends(interpolant: Interpolant, ends: Array, widest: Array) -> tuple[Array, Array]:
    """Whether gamma' is not square-integrable at an end, gamma = 0 and (gamma^2)' != 0, and whether that is known."""
    epsilon = jnp.finfo(ends.dtype).eps
    gamma = jax.vmap(lambda t: interpolant.coefficients(t).gamma)(ends)
    drift = jnp.abs(jax.vmap(interpolant.noise_drift)(ends))
    infinite = (drift > epsilon * widest**2) & (gamma**2 <= epsilon * drift)
    return jnp.any(infinite), ~jnp.any(jnp.isnan(drift))
