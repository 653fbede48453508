"""Gaussian laws: optimal and rotated maps, and jointly Gaussian couplings."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax.types import AffineMap, Array, Key, Pair


class GaussianCoupling(NamedTuple):
    """The joint law x0 = mean0 + factor0 @ xi, x1 = mean1 + factor1 @ xi with xi ~ N(0, I_k).

    Shapes: means [d], factors [d, k]. Cov(X1, X0) = factor1 @ factor0.T; singular covariances are welcome.
    """

    mean0: Array
    factor0: Array
    mean1: Array
    factor1: Array


def square_root(cov: Array, noise: Array | float = 0.0) -> Array:
    """The symmetric root of a positive semi-definite matrix; eigenvalues within rounding of 0, or `noise`, are 0."""
    return _root_above(cov, jnp.asarray(noise, cov.dtype))


@jax.custom_jvp
def _root_above(cov: Array, noise: Array) -> Array:
    values, vectors = jnp.linalg.eigh(cov)
    floor = jnp.maximum(len(cov) * jnp.finfo(cov.dtype).eps * jnp.max(jnp.abs(values)), noise)
    return (vectors * jnp.sqrt(jnp.where(values > floor, values, 0))) @ vectors.T


@_root_above.defjvp
def _root_above_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """X dX + dX X = dS, solved in the eigenbasis of X; the derivative of eigh is nan at equal eigenvalues (S = I)."""
    root = _root_above(*primals)
    values, vectors = jnp.linalg.eigh(root)
    sums = values[:, None] + values
    change = vectors.T @ ((tangents[0] + tangents[0].T) / 2) @ vectors
    zero = sums <= jnp.finfo(root.dtype).eps * jnp.max(sums)
    return root, vectors @ jnp.where(zero, 0, change / jnp.where(zero, 1, sums)) @ vectors.T


def _checked_law(name: str, mean: Array, cov: Array) -> tuple[Array, Array]:
    _validate.covariance(f"{name}cov", cov)
    _validate.shape(f"{name}mean", mean, np.shape(cov)[:1])
    dtype = _validate.common_dtype(mean, cov)
    return jnp.asarray(mean, dtype), jnp.asarray(cov, dtype)


def checked_map(name: str, map: AffineMap) -> AffineMap:
    """Returns `map`; refuses a matrix that is not square, or a shift that does not fit it."""
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

    Source: Peyre & Cuturi 2019, remark 2.31, eq. 2.40.
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
    cross = jnp.asarray(cross, cov.dtype)
    slope = cross @ jnp.linalg.pinv(source_cov, hermitian=True)
    remainder = cov - slope @ source_cov @ slope.T
    # On the scale of cov: where x1 is a function of x0 the remainder is nothing but rounding error.
    rounding = 10 * len(cov) * jnp.finfo(cov.dtype).eps * jnp.max(jnp.abs(cov))
    remainder = (remainder + remainder.T) / 2
    if _validate.is_concrete(remainder, rounding):
        _check_joint(np.asarray(remainder), np.asarray(cross - slope @ source_cov), 100 * float(rounding))
    root = square_root(source_cov)
    return GaussianCoupling(
        source_mean,
        jnp.concatenate([root, jnp.zeros_like(root)], 1),
        mean,
        jnp.concatenate([slope @ root, square_root(remainder, rounding)], 1),
    )


def _check_joint(remainder: np.ndarray, outside: np.ndarray, slack: float) -> None:
    """Refuses a cross-covariance of which the source or the target has too little variance."""
    smallest = np.linalg.eigvalsh(remainder).min(initial=0.0)
    if smallest < -slack:
        raise ValueError(
            "cov - cross source_cov^-1 cross^T must be positive semi-definite,"
            f" got a smallest eigenvalue of {smallest:.3g}"
        )
    excess = np.abs(outside).max(initial=0.0)
    if excess > slack:
        raise ValueError(f"cross must be 0 where source_cov is singular, got {excess:.3g}")


def draw_pairs(key: Key, coupling: GaussianCoupling, n: int) -> Pair:
    """Draws n pairs of a Gaussian coupling: x0 and x1 of shape [n, d].

    Raises:
        ValueError: if `n` is not an integer >= 1.
    """
    _validate.positive_integer("n", n)
    xi = jax.random.normal(key, (n, coupling.factor0.shape[1]), coupling.factor0.dtype)
    return Pair(coupling.mean0 + xi @ coupling.factor0.T, coupling.mean1 + xi @ coupling.factor1.T)
