"""Mixtures of Gaussians: samples, density, and the field that flow matching learns from infinitely many of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from fvjax import _validate
from fvjax.interpolants import Interpolant, as_pytree
from fvjax.types import Array, Key, Params, Scalar, VelocityField

_CHUNK = 1024
"""Samples whose component's axes, [d, d] each, are gathered at once."""


class GaussianMixture(NamedTuple):
    r"""The law sum_j w_j N(m_j, S_j) of k components, S_j = U_j diag(l_j) U_j^T; `gaussian_mixture` makes one.

    Covariances are kept by their principal axes: those of alpha^2 I + beta^2 S_j, which a flow from N(0, I) meets at
    every time, are the same. It is a pytree: give it to `jit` as an argument, or close over it.

    Attributes:
        means: m_j, [k, d].
        variances: l_j > 0, along the axes, [k, d].
        axes: U_j, orthogonal, [k, d, d], one axis a column; None where they are the coordinate axes.
        weights: w_j >= 0, adding up to 1, [k].
    """

    means: Array
    variances: Array
    axes: Array | None
    weights: Array

    @property
    def modes(self) -> int:
        """The number k of components."""
        return int(self.means.shape[0])

    @property
    def dim(self) -> int:
        """The dimension d of one sample."""
        return int(self.means.shape[1])

    @property
    def mean(self) -> Array:
        """The mean of the law, [d]."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Array:
        """The covariance of the law, within and between its components, [d, d]."""
        centred = self.means - self.mean
        between = (centred * self.weights[:, None]).T @ centred
        if self.axes is None:
            return between + jnp.diag(self.weights @ self.variances)
        return between + jnp.einsum("k,kij,kj,klj->il", self.weights, self.axes, self.variances, self.axes)

    def sample(self, key: Key, n: int) -> Array:
        """Draws n independent samples, [n, d], in the dtype of the means: a pure function of both arguments.

        Raises:
            ValueError: if n is not an integer >= 1.
        """
        _validate.positive_integer("n", n)
        component_key, noise_key = jax.random.split(key)
        component = jax.random.categorical(component_key, jnp.log(self.weights), shape=(n,))
        noise = jax.random.normal(noise_key, (n, self.dim), self.means.dtype)

        noise = jnp.sqrt(self.variances[component]) * noise
        axes = self.axes
        if axes is not None:

            def turned(drawn: tuple[Array, Array]) -> Array:
                return jnp.dot(axes[drawn[0]], drawn[1], precision=jax.lax.Precision.HIGHEST)

            noise = jax.lax.map(turned, (component, noise), batch_size=_CHUNK)
        return self.means[component] + noise

    def log_density(self, x: Array) -> Array:
        """The logarithm of the density at ONE point x [d], in nats, shape [].

        Raises:
            ValueError: if x is not [d] or not of the dtype of the mixture.
        """
        return jax.nn.logsumexp(self._joint(_point(self, x)))

    def log_responsibilities(self, x: Array) -> Array:
        """log P(component j | x) of ONE point x [d], shape [k]: its argmax is the mode that x belongs to.

        Raises:
            ValueError: if x is not [d] or not of the dtype of the mixture.
        """
        return jax.nn.log_softmax(self._joint(_point(self, x)))

    def _joint(self, x: Array) -> Array:
        return _log_joint(self, _along_axes(self, x - self.means), self.variances)

    def velocity(self, interpolant: Interpolant) -> VelocityField:
        r"""The exact minimiser E[u_t | x_t = x] of the flow-matching loss, from x0 ~ N(0, I), independent of x1.

        x1 is a sample of this mixture. Given its component j all of x0, x1, z are Gaussian and independent, so that
        x_t = alpha x0 + beta x1 + gamma z and u_t = alpha' x0 + beta' x1 + gamma' z have

            E[x_t | j] = beta m_j,      Cov(x_t | j) = V_j = (alpha^2 + gamma^2) I + beta^2 S_j,
            E[u_t | j] = beta' m_j,     Cov(u_t, x_t | j) = C_j = (alpha alpha' + gamma gamma') I + beta beta' S_j.

        Regression within each component, weighted by the posterior of the components:

            v(x, t) = sum_j r_j [beta' m_j + C_j V_j^-1 (x - beta m_j)],      r_j ~ w_j N(x; beta m_j, V_j).

        It is what a network without limits would learn from infinitely many fresh pairs; its flow from the law of x_0
        has the law of x_t at every t. With noise that is left at the ends (`constant_noise`), that is N(0, I) and the
        mixture, both blurred by N(0, sigma^2 I).

        =============================  ================================================================================
        t = 0, linear                  mean of the mixture - x
        t = 1, linear                  x
        Brownian bridge at t = 0, 1    finite: only gamma gamma' enters, not gamma'
        `bridge_drift`                 the drift of its diffusion, gamma `noise_target` in place of gamma gamma'
        w_j = 0                        the component takes no part
        =============================  ================================================================================

        Args:
            interpolant: any interpolant.

        Returns:
            A VelocityField (params, t [], x [d]) -> [d] that ignores its params (pass None), a `jax.tree_util.Partial`
            that holds the mixture. It raises ValueError for an x that is not [d] or not of the mixture's dtype.

        Source: derived above; Gaussian conditioning, as in `fvjax.gaussian.population_minimiser` (its case k = 1).
        """
        return Partial(_velocity, (self, as_pytree(interpolant)))


def gaussian_mixture(
    means: Array, *, scale: Array | float | None = None, covariances: Array | None = None, weights: Array | None = None
) -> GaussianMixture:
    """Makes a mixture of Gaussians from its means and either one scale or the covariances of its components.

    Args:
        means: [k, d], k and d >= 1; their dtype (at least float32) is that of the mixture.
        scale: standard deviation of isotropic components, > 0, [] or [k].
        covariances: symmetric positive definite, [d, d] for all components or [k, d, d].
        weights: [k], >= 0, adding up to 1; None means 1/k each.

    Returns:
        GaussianMixture.

    Raises:
        ValueError: if a shape does not fit, both or none of `scale` and `covariances` are given, or a concrete value is
            not finite or out of its range.
    """
    if np.ndim(means) != 2 or 0 in np.shape(means):
        raise ValueError(f"means must have shape [k, d] with k >= 1 and d >= 1, got {np.shape(means)}")
    _validate.finite("means", means)
    means = jnp.asarray(means, _validate.common_dtype(means))
    if (scale is None) == (covariances is None):
        raise ValueError("exactly one of scale and covariances must be given, got " + ("both", "none")[scale is None])
    variances, axes = _isotropic(means, jnp.asarray(scale)) if covariances is None else _principal(means, covariances)
    return GaussianMixture(means, variances, axes, _checked_weights(means, weights))


def sphere_mixture(key: Key, modes: int, dim: int, *, radius: Scalar, scale: Scalar) -> GaussianMixture:
    """A mixture of isotropic Gaussians of equal weight, in independent, uniformly random directions from the origin.

    The directions are not spread out: in few dimensions two modes may overlap. In many they are nearly orthogonal, and
    the modes lie about sqrt(2) radius apart.

    Args:
        key: of the directions.
        modes: number of components, >= 1.
        dim: dimension, >= 1 (in one dimension every mean is radius or -radius).
        radius: distance of every mean from the origin, > 0, [].
        scale: standard deviation of each component in each coordinate, > 0, [].

    Returns:
        GaussianMixture with means [modes, dim], in JAX's default dtype.

    Raises:
        ValueError: if `modes` or `dim` is not an integer >= 1, or `radius` or `scale` is no number > 0.
    """
    _validate.positive_integer("modes", modes)
    _validate.positive_integer("dim", dim)
    for name, value in (("radius", radius), ("scale", scale)):
        _validate.shape(name, value, ())
        _validate.positive(name, value)
    directions = jax.random.normal(key, (modes, dim))
    directions = directions / jnp.linalg.norm(directions, axis=1, keepdims=True)
    return gaussian_mixture(directions * jnp.asarray(radius, directions.dtype), scale=scale)


def _isotropic(means: Array, scale: Array) -> tuple[Array, None]:
    if scale.shape not in ((), means.shape[:1]):
        raise ValueError(f"scale must have shape () or {means.shape[:1]}, got {scale.shape}")
    _validate.positive("scale", scale)
    scales = jnp.broadcast_to(jnp.asarray(scale, means.dtype), means.shape[:1])
    return jnp.broadcast_to(scales[:, None] ** 2, means.shape), None


def _principal(means: Array, covariances: Array) -> tuple[Array, Array]:
    k, d = means.shape
    if np.shape(covariances) not in ((d, d), (k, d, d)):
        raise ValueError(f"covariances must have shape {(d, d)} or {(k, d, d)}, got {np.shape(covariances)}")
    concrete = _validate.is_concrete(covariances)
    for j, covariance in enumerate(np.asarray(covariances).reshape(-1, d, d) if concrete else ()):
        name = "covariances" if np.ndim(covariances) == 2 else f"covariances[{j}]"
        _validate.covariance(name, covariance)
    variances, axes = jnp.linalg.eigh(jnp.broadcast_to(jnp.asarray(covariances, means.dtype), (k, d, d)))
    if concrete and _validate.is_concrete(variances):
        least, most = np.asarray(variances).min(), np.asarray(variances).max(1)
        if not np.all(np.asarray(variances).min(1) > d * np.finfo(variances.dtype).eps * most):
            raise ValueError(f"covariances must be positive definite, got a smallest eigenvalue of {least:.3g}")
    return variances, axes


def _checked_weights(means: Array, weights: Array | None) -> Array:
    k = len(means)
    if weights is None:
        return jnp.full(k, 1 / k, means.dtype)
    _validate.shape("weights", weights, (k,))
    _validate.nonnegative("weights", weights)
    weights = jnp.asarray(weights, means.dtype)
    if _validate.is_concrete(weights):
        total = float(np.sum(np.asarray(weights, np.float64)))
        if abs(total - 1) > 4 * k * float(jnp.finfo(means.dtype).eps):
            raise ValueError(f"weights must add up to 1, got a sum of {total:.9g}")
    return weights


def _point(mixture: GaussianMixture, x: Array) -> Array:
    x = jnp.asarray(x)
    expected = (mixture.dim,)
    if x.shape != expected or x.dtype != mixture.means.dtype:
        wanted = f"ONE example of shape {expected} and dtype {mixture.means.dtype}"
        raise ValueError(f"x must be {wanted}, got {x.shape} and {x.dtype}; use jax.vmap for a batch")
    return x


def _along_axes(mixture: GaussianMixture, rows: Array) -> Array:
    """U_j^T rows_j, [k, d]."""
    if mixture.axes is None:
        return rows
    return jnp.einsum("kij,ki->kj", mixture.axes, rows, precision=jax.lax.Precision.HIGHEST)


def _log_joint(mixture: GaussianMixture, offsets: Array, variances: Array) -> Array:
    """log w_j + log N, of points at `offsets` [k, d] from the means along the axes, where the variances are [k, d]."""
    squares = jnp.sum(offsets**2 / variances, 1)
    sizes = jnp.sum(jnp.log(variances), 1) + mixture.dim * float(np.log(2 * np.pi))
    return jnp.log(mixture.weights) - (squares + sizes) / 2


def _velocity(law: tuple[GaussianMixture, Interpolant], params: Params, t: Scalar, x: Array) -> Array:
    del params
    mixture, interpolant = law
    x = _point(mixture, x)
    t = jnp.asarray(t, x.dtype)
    c = interpolant.coefficients(t)
    variances = c.alpha**2 + c.gamma**2 + c.beta**2 * mixture.variances
    cross = c.alpha * c.alpha_rate + interpolant.noise_drift(t) + c.beta * c.beta_rate * mixture.variances
    offsets = _along_axes(mixture, x - c.beta * mixture.means)
    posterior = jax.nn.softmax(_log_joint(mixture, offsets, variances))
    pulls = posterior[:, None] * cross / variances * offsets
    if mixture.axes is None:
        back = jnp.sum(pulls, 0)
    else:
        back = jnp.einsum("kij,kj->i", mixture.axes, pulls, precision=jax.lax.Precision.HIGHEST)
    return c.beta_rate * (posterior @ mixture.means) + back
