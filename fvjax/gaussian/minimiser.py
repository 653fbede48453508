"""What training would reach: the population minimiser of Gaussian pairs, and the rotation that its flow applies."""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fvjax import _validate
from fvjax.gaussian.laws import GaussianCoupling
from fvjax.interpolants import Interpolant
from fvjax.types import Array, Params, Scalar, VelocityField


def population_minimiser(coupling: GaussianCoupling, interpolant: Interpolant) -> VelocityField:
    r"""The exact minimiser E[u_t | x_t = x] of the flow-matching loss over all fields, for Gaussian pairs.

    v*(x, t) = E u_t + Cov(u_t, x_t) Cov(x_t)^+ (x - E x_t): a Wiener filter. For x1 = mu + A x0 and x0 ~ N(0, I),

        v*(x, t) = mu + [(A - I) B^T + gamma gamma' I] (B B^T + gamma^2 I)^-1 (x - t mu),      B = I + t (A - I).

    ===========================  =======================================================================================
    gamma = 0, B invertible      the pair-optimal field of Lemma 1
    Cov(x_t) singular            the pseudo-inverse: exact on the support of x_t, and off it the component is 0
    Brownian bridge at t = 0, 1  finite: only gamma gamma' enters, not gamma'
    ===========================  =======================================================================================

    Args:
        coupling: any Gaussian coupling of dimension d.
        interpolant: any interpolant.

    Returns:
        A VelocityField (params, t, x[d]) -> [d] that ignores its params (pass None).

    Source: derived in docs/theory.md, section 5.
    """

    def field(params: Params, t: Scalar, x: Array) -> Array:
        del params
        t = jnp.asarray(t, coupling.mean0.dtype)
        c = interpolant.coefficients(t)
        place = c.alpha * coupling.factor0 + c.beta * coupling.factor1
        rate = c.alpha_rate * coupling.factor0 + c.beta_rate * coupling.factor1
        # Where x_t is a single point (180 degrees at t = 1/2), what is left of it after rounding is not its support.
        size = jnp.max(jnp.abs(c.alpha * coupling.factor0) + jnp.abs(c.beta * coupling.factor1))
        place = jnp.where(jnp.abs(place) > 4 * jnp.finfo(t.dtype).eps * size, place, 0)
        identity = jnp.eye(len(place), dtype=t.dtype)
        cross = rate @ place.T + interpolant.noise_drift(t) * identity
        inverse = jnp.linalg.pinv(
            place @ place.T + c.gamma**2 * identity, rtol=len(place) * jnp.finfo(t.dtype).eps, hermitian=True
        )
        mean_x = c.alpha * coupling.mean0 + c.beta * coupling.mean1
        mean_u = c.alpha_rate * coupling.mean0 + c.beta_rate * coupling.mean1
        return mean_u + cross @ (inverse @ (x - mean_x))

    return field


def selected_angle(angle: ArrayLike, sigma: ArrayLike) -> Array:
    r"""Rotation that the flow of the noisy population minimiser applies to rotated Gaussian pairs.

    For x1 = mu + R(phi) x0 with x0 ~ N(0, I) and the constant-noise interpolant, in every plane that R rotates,

        phi_out = 2 c / sqrt(c^2 + sigma^2) * arctan(sin(phi / 2) / sqrt(c^2 + sigma^2)),   c = cos(phi / 2).

    ======================  ===========================================================================
    sigma = 0               phi: the pairing itself
    phi = +-pi, sigma > 0   exactly 0: the optimal-transport map (pi as rounded to the dtype of `angle`)
    phi = +-pi, sigma = 0   undefined (the flow meets a pole): nan
    sigma >> 1              about 2 c sin(phi / 2) / sigma^2 = sin(phi) / sigma^2
    ======================  ===========================================================================

    Args:
        angle: phi, radians in [-pi, pi], any shape.
        sigma: noise scale, >= 0, broadcast against `angle`.

    Returns:
        phi_out in radians, shape of the broadcast.

    Raises:
        ValueError: if `sigma` is concrete and negative, or `angle` is concrete and outside [-pi, pi].

    Source: derived in docs/theory.md, section 5.
    """
    _validate.nonnegative("sigma", sigma)
    angle = jnp.asarray(angle, _validate.common_dtype(angle))
    pi = jnp.asarray(np.pi, angle.dtype)
    if _validate.is_concrete(angle) and not bool(jnp.all(jnp.abs(angle) <= pi)):
        raise ValueError(f"angle must be in [-pi, pi] radians, got {angle}")
    sigma = jnp.asarray(sigma, angle.dtype)
    # cos(phi / 2) as the sine of the distance to pi: exactly 0 at phi = pi, which cos(pi / 2) is not in floating point.
    c = jnp.sin((pi - jnp.abs(angle)) / 2)
    width = jnp.sqrt(c**2 + sigma**2)
    return 2 * c / width * jnp.arctan2(jnp.sin(angle / 2), width)
