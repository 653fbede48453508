r"""The interpolants x_t = alpha(t) x0 + beta(t) x1 + gamma(t) z and `draw_path`, where all randomness of a loss enters.

======================  ====================  ================  ==========================
name                    alpha                 beta              gamma
======================  ====================  ================  ==========================
`linear()`              1 - t                 t                 0
`constant_noise(s)`     1 - t                 t                 s
`brownian_bridge(s)`    1 - t                 t                 s sqrt(t (1 - t))
`smooth_bridge(s)`      1 - t                 t                 s sin^2(pi t)
`trigonometric()`       cos(pi t / 2)         sin(pi t / 2)     0
`gaussian_source(s)`    1 - (1 - s) t         t                 0, and x0 ~ N(0, I)
======================  ====================  ================  ==========================

The regression target is the velocity u_t = alpha' x0 + beta' x1 + gamma' z, whose minimiser is the field of an ODE.
That of `bridge_drift(s)`, which has the law of `brownian_bridge(s)`, is the drift of a diffusion: another multiple of
z.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from fvjax import _validate
from fvjax.types import Array, Key, Pair, PathSample, Scalar

Coefficient = Callable[[Array], Array]
"""t -> alpha, beta or gamma, of the shape of t."""

BRIDGE_TIMES = (1e-3, 1.0 - 1e-3)
"""Default times of the Brownian bridge, those of Shi et al. 2023 (DSBM): its target has no second moment on [0, 1]."""


class Coefficients(NamedTuple):
    """alpha, beta, gamma at one time and what multiplies x0, x1, z in the target there, each of shape [].

    That are the time derivatives, but for an interpolant with a `noise_target`, whose value is `gamma_rate`.
    """

    alpha: Array
    beta: Array
    gamma: Array
    alpha_rate: Array
    beta_rate: Array
    gamma_rate: Array


class Interpolant(NamedTuple):
    r"""Three scalar functions of time, and the law of the time itself, t ~ U[time_range].

    The factories of this module store their parameters as leaves of the pytree (`jax.tree_util.Partial`), so that an
    interpolant may be an argument of a jitted or vmapped function: another sigma does not compile again. Your own
    coefficients may be plain functions; such an interpolant is captured by closure instead of passed.

    Attributes:
        alpha: multiplies the source sample x0.
        beta: multiplies the target sample x1.
        gamma: multiplies the noise z ~ N(0, I); >= 0.
        noise_rate: gamma gamma' = (gamma^2)' / 2. Needed only where gamma' is infinite and this product is not (the
            ends of the Brownian bridge); by default the product itself.
        time_range: the interval in [0, 1] from which t is drawn and over which exact results integrate.
        noise_target: multiplies z in the regression target in place of gamma', which is the default. With it
            `noise_rate`, where it is given, is gamma times `noise_target`.
    """

    alpha: Coefficient
    beta: Coefficient
    gamma: Coefficient
    noise_rate: Coefficient | None = None
    time_range: tuple[float, float] = (0.0, 1.0)
    noise_target: Coefficient | None = None

    def coefficients(self, t: Scalar) -> Coefficients:
        """alpha, beta, gamma at time `t` (shape []), and their rates: derivatives by forward differentiation."""
        t = _floating_time(t)

        def values(s: Array) -> tuple[Array, Array, Array]:
            a, b, c = self.alpha(s), self.beta(s), self.gamma(s)
            return jnp.asarray(a, s.dtype), jnp.asarray(b, s.dtype), jnp.asarray(c, s.dtype)

        primal, rates = jax.jvp(values, (t,), (jnp.ones_like(t),))
        found = Coefficients(*primal, *rates)
        if self.noise_target is None:
            return found
        return found._replace(gamma_rate=jnp.asarray(self.noise_target(t), t.dtype))

    def noise_drift(self, t: Scalar) -> Array:
        """gamma(t) gamma'(t), shape [], or gamma(t) noise_target(t): what the noise adds to Cov(u_t, x_t)."""
        t = _floating_time(t)
        if self.noise_rate is not None:
            return jnp.asarray(self.noise_rate(t), t.dtype)
        c = self.coefficients(t)
        return c.gamma * c.gamma_rate


def _floating_time(t: Scalar) -> Array:
    t = jnp.asarray(t)
    return t if jnp.issubdtype(t.dtype, jnp.floating) else t.astype(jnp.result_type(float))


def as_pytree(interpolant: Interpolant) -> Interpolant:
    """Wraps plain functions in `Partial`, so that any interpolant can be an argument of `jit`."""

    def wrap(f: Coefficient) -> Coefficient:
        return f if isinstance(f, Partial) else Partial(f)

    alpha, beta, gamma, noise_rate, time_range, noise_target = interpolant
    return Interpolant(
        wrap(alpha),
        wrap(beta),
        wrap(gamma),
        noise_rate and wrap(noise_rate),
        time_range,
        noise_target and wrap(noise_target),
    )


def _zero(t: Array) -> Array:
    return jnp.zeros_like(t)


def _one_minus(t: Array) -> Array:
    return 1 - t


def _identity(t: Array) -> Array:
    return t


def _constant(sigma: Scalar, t: Array) -> Array:
    return jnp.asarray(sigma, t.dtype) * jnp.ones_like(t)


def _brownian(sigma: Scalar, t: Array) -> Array:
    return jnp.asarray(sigma, t.dtype) * _bridge_width(t)


def _brownian_drift(sigma: Scalar, t: Array) -> Array:
    return jnp.asarray(sigma, t.dtype) ** 2 * (1 - 2 * t) / 2


def _drift_of_noise(sigma: Scalar, t: Array) -> Array:
    # Finite at t = 1, like gamma' of the bridge: the value one machine epsilon inside.
    left = jnp.clip(1 - t, float(jnp.finfo(t.dtype).eps))
    return -jnp.asarray(sigma, t.dtype) * jnp.sqrt(jnp.clip(t, 0) / left)


def _bridge_drift_rate(sigma: Scalar, t: Array) -> Array:
    return -(jnp.asarray(sigma, t.dtype) ** 2) * t


def _smooth(sigma: Scalar, t: Array) -> Array:
    return jnp.asarray(sigma, t.dtype) * jnp.sin(jnp.pi * t) ** 2


def _quarter_cosine(t: Array) -> Array:
    return jnp.cos(jnp.pi / 2 * t)


def _quarter_sine(t: Array) -> Array:
    return jnp.sin(jnp.pi / 2 * t)


def _shrink(sigma_min: Scalar, t: Array) -> Array:
    return 1 - (1 - jnp.asarray(sigma_min, t.dtype)) * t


def _straight(gamma: Coefficient, **options: Any) -> Interpolant:
    return Interpolant(Partial(_one_minus), Partial(_identity), gamma, **options)


def linear() -> Interpolant:
    """Straight lines without noise: Rectified Flow (Liu et al. 2023), CFM(0). The memorizing case."""
    return _straight(Partial(_zero))


def constant_noise(sigma: Scalar) -> Interpolant:
    """Straight lines blurred by N(0, sigma^2 I) at every time: CFM(sigma) of Tong et al. 2024.

    gamma' = 0, so the target is x1 - x0. The law at t = 0 is p0 * N(0, sigma^2 I): a sampler may start at x0 or at
    x0 + sigma z, and says which. sigma = 0 is `linear`.

    Args:
        sigma: noise scale, in units of x, shape [].

    Raises:
        ValueError: if `sigma` is concrete and negative.
    """
    _validate.nonnegative("sigma", sigma)
    return _straight(Partial(_constant, sigma))


@jax.custom_jvp
def _bridge_width(t: Array) -> Array:
    return jnp.sqrt(jnp.clip(t * (1 - t), 0))


@_bridge_width.defjvp
def _bridge_width_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (t,), (rate,) = primals, tangents
    epsilon = float(jnp.finfo(t.dtype).eps)
    inside = jnp.clip(t, epsilon, 1 - epsilon)
    return _bridge_width(t), (1 - 2 * inside) / (2 * jnp.sqrt(inside * (1 - inside))) * rate


def brownian_bridge(sigma: Scalar, *, time_range: tuple[float, float] = BRIDGE_TIMES) -> Interpolant:
    r"""Lines with the noise of a Brownian bridge, gamma = sigma sqrt(t (1 - t)): SB-CFM, DSBM.

    gamma' = sigma (1 - 2t) / (2 sqrt(t (1 - t))) is infinite at both ends, and E|gamma' z|^2 ~ sigma^2 d / (4 t) is not
    integrable: on the whole of [0, 1] loss and gradient variance are infinite. Hence the default `time_range`.

    ===============  ===========================================================================================
    t = 0 or t = 1   gamma = 0, gamma gamma' = +-sigma^2 / 2 (exact); gamma' is the value one machine epsilon
                     inside, finite and of the right sign, never nan
    sigma = 0        `linear` (on `time_range`)
    ===============  ===========================================================================================

    Args:
        sigma: noise scale of the Brownian motion, in units of x, shape [].
        time_range: t is drawn from it; (0, 1) is allowed and makes exact variances infinite.

    Raises:
        ValueError: if `sigma` is concrete and negative, or `time_range` is no interval in [0, 1].

    Source: Shi et al. 2023 (DSBM); Tong et al. 2024 (SB-CFM).
    """
    _validate.nonnegative("sigma", sigma)
    _validate.interval("time_range", time_range, 0.0, 1.0)
    return _straight(Partial(_brownian, sigma), noise_rate=Partial(_brownian_drift, sigma), time_range=time_range)


def bridge_drift(sigma: Scalar, *, time_range: tuple[float, float] = BRIDGE_TIMES) -> Interpolant:
    r"""The Brownian bridge with the target of a diffusion's drift: bridge matching, DSBM.

    x_t = (1 - t) x0 + t x1 + sigma sqrt(t (1 - t)) z, and the target is the drift of the bridge that is pinned at x1,

        (x1 - x_t) / (1 - t) = x1 - x0 - sigma sqrt(t / (1 - t)) z.

    Its minimiser is the drift f of the diffusion dX = f(X, t) dt + sigma dB that has the law of x_t at every time t
    (the Markovian projection of the bridges), where that of `brownian_bridge` is the velocity of an ODE that has. The
    diffusion backward in time is the same with the ends swapped: train on Pair(x1, x0), with the time s = 1 - t.

    ===========  ===============================================================================================
    t = 0        the target is x1 - x0
    t = 1        the target's second moment is infinite, ~ sigma^2 d / (1 - t): hence `time_range`. The multiple
                 of z is the value one machine epsilon inside, finite and negative, never nan
    sigma = 0    `linear` (on `time_range`)
    ===========  ===============================================================================================

    Args:
        sigma: noise scale of the Brownian motion, in units of x, shape [].
        time_range: t is drawn from it; one that ends at 1 makes exact variances infinite.

    Raises:
        ValueError: if `sigma` is concrete and negative, or `time_range` is no interval in [0, 1].

    Source: Shi et al. 2023 (DSBM), eq. 5 and algorithm 1.
    """
    _validate.nonnegative("sigma", sigma)
    _validate.interval("time_range", time_range, 0.0, 1.0)
    return _straight(
        Partial(_brownian, sigma),
        noise_rate=Partial(_bridge_drift_rate, sigma),
        time_range=time_range,
        noise_target=Partial(_drift_of_noise, sigma),
    )


def smooth_bridge(sigma: Scalar) -> Interpolant:
    """Noise that vanishes smoothly at both ends, gamma = sigma sin^2(pi t), with gamma' = sigma pi sin(2 pi t) finite.

    Args:
        sigma: noise scale at t = 1/2, in units of x, shape [].

    Raises:
        ValueError: if `sigma` is concrete and negative.
    """
    _validate.nonnegative("sigma", sigma)
    return _straight(Partial(_smooth, sigma))


def trigonometric() -> Interpolant:
    """Quarter circles cos(pi t / 2) x0 + sin(pi t / 2) x1 (Albergo & Vanden-Eijnden 2023): unit variance is kept."""
    return Interpolant(Partial(_quarter_cosine), Partial(_quarter_sine), Partial(_zero))


def gaussian_source(sigma_min: Scalar) -> Interpolant:
    """Flow matching from x0 ~ N(0, I), x_t = (1 - (1 - sigma_min) t) x0 + t x1, so that x_1 = x1 + sigma_min x0.

    Args:
        sigma_min: width that is left at t = 1, in units of x, shape [].

    Raises:
        ValueError: if `sigma_min` is concrete and negative.

    Source: Lipman et al. 2023, eq. 20.
    """
    _validate.nonnegative("sigma_min", sigma_min)
    return Interpolant(Partial(_shrink, sigma_min), Partial(_identity), Partial(_zero))


def path_at(pair: Pair, interpolant: Interpolant, t: Scalar, z: Array) -> PathSample:
    """The deterministic part of `draw_path`: the regression sample at given time and noise.

    Args:
        pair: ONE pair, x0 and x1 of shape [*dims].
        interpolant: how the two are joined.
        t: time, shape [].
        z: standard noise, [*dims].

    Returns:
        PathSample(t, x_t, u_t) with u_t = alpha' x0 + beta' x1 + gamma' z; `noise_target` in place of gamma', if there
        is one.

    Raises:
        ValueError: if the shapes of x0, x1 and z differ, or x0 and x1 are not of one floating-point dtype.
    """
    x0, x1 = _checked_pair(pair)
    _validate.same_shape("x0", x0, "z", z)
    t = jnp.asarray(t, x0.dtype)
    c = interpolant.coefficients(t)
    x = c.alpha * x0 + c.beta * x1 + c.gamma * z
    return PathSample(t, x, c.alpha_rate * x0 + c.beta_rate * x1 + c.gamma_rate * z)


def _checked_pair(pair: Pair) -> Pair:
    x0, x1 = jnp.asarray(pair.x0), jnp.asarray(pair.x1)
    _validate.floating("x0", x0)
    _validate.same_shape("x0", x0, "x1", x1)
    _validate.same_dtype("x0", x0, "x1", x1)
    return Pair(x0, x1)


def draw_path(key: Key, pair: Pair, interpolant: Interpolant, *, t: Scalar | None = None) -> PathSample:
    """Draws the time and the noise of ONE pair: every random number of the loss comes from here.

    Args:
        key: PRNG key of this example; for a batch fold in the global index (see `draw_paths`).
        pair: x0 and x1, floating point, [*dims] each.
        interpolant: how the two are joined; its `time_range` is the law of t.
        t: a given time, shape [], instead of a drawn one; the noise is the same either way.

    Returns:
        PathSample in the dtype of x0.

    Raises:
        ValueError: if the shapes of x0 and x1 differ, or they are not of one floating-point dtype.
    """
    pair = _checked_pair(pair)
    time_key, noise_key = jax.random.split(key)
    if t is None:
        start, end = (jnp.asarray(time, pair.x0.dtype) for time in interpolant.time_range)
        t = jax.random.uniform(time_key, (), pair.x0.dtype, start, end)
    return path_at(pair, interpolant, t, jax.random.normal(noise_key, pair.x0.shape, pair.x0.dtype))


def draw_paths(key: Key, pairs: Pair, interpolant: Interpolant, *, start: int | Array = 0) -> PathSample:
    """Draws one path for each pair of a batch; example i uses `fold_in(key, start + i)`.

    So a result does not depend on how a data set is cut into batches, chunks or devices.

    Args:
        key: PRNG key of the whole pass.
        pairs: x0 and x1 of shape [n, *dims].
        interpolant: how the two are joined.
        start: global index of the first example.

    Returns:
        PathSample with leading axis n.

    Raises:
        ValueError: as `draw_path`, or if x0 and x1 have no common leading axis, or `start` is no integer.
    """
    n = _validate.batch("pairs", pairs)
    _validate.integers("start", start)
    index = jnp.arange(n)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(start).astype(index.dtype) + index)
    return jax.vmap(lambda k, pair: draw_path(k, pair, interpolant))(keys, pairs)
