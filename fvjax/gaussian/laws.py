"""Gaussian laws: optimal and rotated maps, jointly Gaussian couplings, and the law of (x_t, u_t) at one time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax.interpolants import Interpolant
from fvjax.types import AffineMap, Array, Key, Pair


class GaussianCoupling(NamedTuple):
    """The joint law x0 = mean0 + factor0 @ xi, x1 = mean1 + factor1 @ xi with xi ~ N(0, I_k).

    Shapes: means [d], factors [d, k]. Cov(X1, X0) = factor1 @ factor0.T; singular covariances are welcome.
    """

    mean0: Array
    factor0: Array
    mean1: Array
    factor1: Array


def square_root(cov: Array) -> Array:
    """The symmetric root of a positive semi-definite matrix; eigenvalues within rounding of 0 count as 0."""
    values, vectors = jnp.linalg.eigh(cov)
    noise = len(cov) * jnp.finfo(cov.dtype).eps * jnp.max(jnp.abs(values))
    return (vectors * jnp.sqrt(jnp.where(values > noise, values, 0))) @ vectors.T


def _checked_law(name: str, mean: Array, cov: Array) -> tuple[Array, Array]:
    _validate.covariance(f"{name}cov", cov)
    _validate.shape(f"{name}mean", mean, np.shape(cov)[:1])
    dtype = _validate.common_dtype(mean, cov)
    return jnp.asarray(mean, dtype), jnp.asarray(cov, dtype)


def checked_map(name: str, map: AffineMap) -> AffineMap:
    _validate.square(f"{name}.matrix", map.matrix)
    _validate.shape(f"{name}.shift", map.shift, np.shape(map.matrix)[:1])
    return map


def _source(dim: int, dtype: jnp.dtype, source_mean: Array | None, source_cov: Array | None) -> tuple[Array, Array]:
    """Mean and covariance of the source, by default those of N(0, I)."""
    mean = jnp.zeros(dim, dtype) if source_mean is None else jnp.asarray(source_mean, dtype)
    cov = jnp.eye(dim, dtype=dtype) if source_cov is None else jnp.asarray(source_cov, dtype)
    _validate.covariance("source_cov", cov)
    _validate.shape("source_cov", cov, (dim, dim))
    _validate.shape("source_mean", mean, (dim,))
    return mean, cov


def ot_map(mean: Array, cov: Array, *, source_mean: Array | None = None, source_cov: Array | None = None) -> AffineMap:
    r"""The optimal-transport map from N(source_mean, source_cov) to N(mean, cov), for the squared Euclidean cost.

    A = S0^(-1/2) (S0^(1/2) S1 S0^(1/2))^(1/2) S0^(-1/2), which is S1^(1/2) for the default source N(0, I).

    Args:
        mean: mean of the target, [d].
        cov: covariance of the target, [d, d], symmetric positive semi-definite (singular is allowed).
        source_mean: mean of the source, [d]; 0 by default.
        source_cov: covariance of the source, [d, d]; I by default. If singular, the map on its support.

    Returns:
        AffineMap x -> mean + A (x - source_mean).

    Raises:
        ValueError: if a covariance is not square, symmetric and positive semi-definite, or shapes disagree.

    Source: Peyre & Cuturi 2019, eq. 2.40.
    """
    mean, cov = _checked_law("", mean, cov)
    source_mean, source_cov = _source(len(mean), mean.dtype, source_mean, source_cov)
    root = square_root(source_cov)
    inverse = jnp.linalg.pinv(root, hermitian=True)
    matrix = inverse @ square_root(root @ cov @ root) @ inverse
    return AffineMap(matrix, mean - matrix @ source_mean)


def rotated_map(mean: Array, cov: Array, rotation: Array) -> AffineMap:
    r"""The map x -> mean + cov^(1/2) R x: another map from N(0, I) to N(mean, cov), optimal only for R = I.

    Args:
        mean: mean of the target, [d].
        cov: covariance of the target, [d, d].
        rotation: orthogonal R, [d, d].

    Returns:
        AffineMap.

    Raises:
        ValueError: as `ot_map`, or if a concrete `rotation` is not orthogonal (to 1e3 machine epsilons).
    """
    mean, cov = _checked_law("", mean, cov)
    _validate.shape("rotation", rotation, cov.shape)
    rotation = jnp.asarray(rotation, cov.dtype)
    _validate.orthogonal("rotation", rotation)
    return AffineMap(square_root(cov) @ rotation, mean)


def map_coupling(
    map: AffineMap, *, source_mean: Array | None = None, source_cov: Array | None = None
) -> GaussianCoupling:
    """The deterministic coupling x1 = map(x0) of a Gaussian source, N(0, I) by default.

    Args:
        map: x0 -> A x0 + mu.
        source_mean: [d]; 0 by default.
        source_cov: [d, d]; I by default.

    Raises:
        ValueError: if shapes disagree or `source_cov` is no covariance.
    """
    checked_map("map", map)
    source_mean, source_cov = _source(len(map.shift), map.shift.dtype, source_mean, source_cov)
    root = square_root(source_cov)
    return GaussianCoupling(source_mean, root, map(source_mean), map.matrix @ root)


def independent_coupling(
    mean: Array, cov: Array, *, source_mean: Array | None = None, source_cov: Array | None = None
) -> GaussianCoupling:
    """Independent x0 and x1 ~ N(mean, cov), the random coupling of the paper. Arguments and errors as in `ot_map`."""
    mean, cov = _checked_law("", mean, cov)
    return gaussian_coupling(mean, cov, jnp.zeros_like(cov), source_mean=source_mean, source_cov=source_cov)


def gaussian_coupling(
    mean: Array,
    cov: Array,
    cross: Array,
    *,
    source_mean: Array | None = None,
    source_cov: Array | None = None,
) -> GaussianCoupling:
    """Any jointly Gaussian coupling, given by the cross-covariance K = Cov(X1, X0).

    x1 = mean + K S0^-1 (x0 - source_mean) + (cov - K S0^-1 K^T)^(1/2) xi.

    Args:
        mean: mean of the target, [d].
        cov: covariance of the target, [d, d].
        cross: K, [d, d].
        source_mean: [d]; 0 by default.
        source_cov: [d, d]; I by default.

    Raises:
        ValueError: as `ot_map`, or if no joint law has these covariances.
    """
    mean, cov = _checked_law("", mean, cov)
    _validate.shape("cross", cross, cov.shape)
    source_mean, source_cov = _source(len(mean), mean.dtype, source_mean, source_cov)
    slope = jnp.asarray(cross, cov.dtype) @ jnp.linalg.pinv(source_cov, hermitian=True)
    remainder = cov - slope @ source_cov @ slope.T
    remainder = (remainder + remainder.T) / 2
    _validate.covariance("cov - cross source_cov^-1 cross^T", remainder)
    root = square_root(source_cov)
    return GaussianCoupling(
        source_mean,
        jnp.concatenate([root, jnp.zeros_like(root)], 1),
        mean,
        jnp.concatenate([slope @ root, square_root(remainder)], 1),
    )


def draw_pairs(key: Key, coupling: GaussianCoupling, n: int) -> Pair:
    """Draws n pairs of a Gaussian coupling: x0 and x1 of shape [n, d].

    Raises:
        ValueError: if `n` is not an integer >= 1.
    """
    _validate.positive_integer("n", n)
    xi = jax.random.normal(key, (n, coupling.factor0.shape[1]), coupling.factor0.dtype)
    return Pair(coupling.mean0 + xi @ coupling.factor0.T, coupling.mean1 + xi @ coupling.factor1.T)


class PathLaw(NamedTuple):
    """x_t = mean_x + factor_x xi and u_t = mean_u + factor_u xi at one time, xi ~ N(0, I), the path's noise included."""

    mean_x: Array
    factor_x: Array
    mean_u: Array
    factor_u: Array


def path_law(coupling: GaussianCoupling, interpolant: Interpolant, t: Array) -> PathLaw:
    c = interpolant.coefficients(t)
    noise = jnp.eye(len(coupling.mean0), dtype=t.dtype)
    return PathLaw(
        c.alpha * coupling.mean0 + c.beta * coupling.mean1,
        jnp.concatenate([c.alpha * coupling.factor0 + c.beta * coupling.factor1, c.gamma * noise], 1),
        c.alpha_rate * coupling.mean0 + c.beta_rate * coupling.mean1,
        jnp.concatenate([c.alpha_rate * coupling.factor0 + c.beta_rate * coupling.factor1, c.gamma_rate * noise], 1),
    )
