r"""Bridges of Gaussians exactly: the Schroedinger bridge, one step of iterative Markovian fitting, and how far apart.

A bridge joins the ends of a coupling by Brownian motion, x_t = (1 - t) x0 + t x1 + sigma sqrt(t (1 - t)) z. What is
Gaussian about it is a `GaussianCoupling`, so that the fields of its Markovian projection are minimisers of
`fvjax.gaussian.population_minimiser`:

=================  ==================================================================================
velocity           population_minimiser(coupling, brownian_bridge(sigma)), probability flow  (t, x)
forward drift      population_minimiser(coupling, bridge_drift(sigma))                       (t, x)
backward drift     population_minimiser(swapped(coupling), bridge_drift(sigma))              (1 - t, x)
=================  ==================================================================================

With f forward, b backward, p_t the law of x_t: f + b = sigma^2 grad log p_t, and the velocity is (f - b) / 2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from fvjax import _validate, flows
from fvjax.gaussian import GaussianCoupling, independent_coupling, population_minimiser
from fvjax.gaussian.laws import square_root
from fvjax.interpolants import bridge_drift
from fvjax.types import Array, Pair, Params, Scalar

TOLERANCE = 1e-11
"""rtol of what `markov_coupling` integrates, and its atol relative to the ends; never below 8 epsilons."""


def schroedinger_coupling(
    mean: Array,
    cov: Array,
    sigma: Scalar,
    *,
    source_mean: Array | None = None,
    source_cov: Array | None = None,
) -> GaussianCoupling:
    r"""The ends of the Schroedinger bridge between Gaussians, reference dX = sigma dB, in closed form.

    That is the entropic coupling: it minimises E|x0 - x1|^2 + 2 sigma^2 KL(coupling || product of its marginals). With

        C = Cov(X0, X1) = (S0^(1/2) D S0^(-1/2) - sigma^2 I) / 2,      D = (4 S0^(1/2) S1 S0^(1/2) + sigma^4 I)^(1/2).

    It is computed without differences and inverses. With the singular values S1^(1/2) S0^(1/2) = U diag(s) V^T, the
    ends share a standard normal vector a, b is another one:

        x0 = m0 + S0^(1/2) V a,     x1 = m1 + S1^(1/2) U (r a + sqrt(1 - r^2) b),
        r = 2 s / (sigma^2 + w),    1 - r^2 = 2 sigma^2 / (sigma^2 + w),    w = sqrt(4 s^2 + sigma^4).

    ====================  ============================================================================================
    sigma = 0             the optimal-transport coupling, x1 = ot_map(x0); where s = 0 its limit, r = 0
    sigma -> inf          independent ends: C falls like S0 S1 / sigma^2, with full relative precision
    S0 or S1 singular     fine, as everywhere in `fvjax.gaussian`
    ====================  ============================================================================================

    Args:
        mean: mean of the target, [d].
        cov: covariance of the target, [d, d], symmetric positive semi-definite.
        sigma: scale of the Brownian motion, >= 0, in units of x, shape [], may be traced.
        source_mean: mean of the source, [d]; 0 by default.
        source_cov: covariance of the source, [d, d]; I by default.

    Returns:
        GaussianCoupling; Cov(X1, X0) = factor1 @ factor0.T is C^T, which is symmetric only where S0 and S1 commute.
        Differentiable in sigma > 0 and the means; in the covariances only where the singular values differ.

    Raises:
        ValueError: if `sigma` is not one finite number >= 0, a covariance is not square, symmetric and positive
            semi-definite, or the dimensions disagree.

    Source: Bunne et al. 2023 (The Schroedinger bridge between Gaussian measures has a closed form), theorem 3; Janati
        et al. 2020; the factors are derived here: with P = S0^(1/2) S1 S0^(1/2) = V s^2 V^T the bracket in
        C is S0^(1/2) V diag(w - sigma^2) V^T S0^(-1/2), w - sigma^2 = 4 s^2 / (w + sigma^2) and
        P S0^(-1/2) = V diag(s) U^T S1^(1/2).
    """
    _checked_sigma(sigma)
    ends = independent_coupling(mean, cov, source_mean=source_mean, source_cov=source_cov)
    dim, dtype = len(ends.mean0), ends.mean0.dtype
    sigma = jnp.asarray(sigma, dtype)
    root0, root1 = ends.factor0[:, :dim], ends.factor1[:, dim:]
    u, s, vt = jnp.linalg.svd(root1 @ root0)
    # On the scale of the factors: where s is rounding error, u and v are no pairs.
    size = jnp.linalg.norm(root0) * jnp.linalg.norm(root1)
    s = jnp.where(s > dim * jnp.finfo(dtype).eps * size, s, 0)
    width = sigma**2 + jnp.hypot(2 * s, sigma**2)
    point = width == 0
    width = jnp.where(point, 1, width)
    shared = jnp.where(point, 0, 2 * s / width)
    own = jnp.where(point, 1, sigma * jnp.sqrt(2 / width))
    factor1 = jnp.concatenate([root1 @ (u * shared) @ vt, root1 @ (u * own)], 1)
    return GaussianCoupling(ends.mean0, jnp.concatenate([root0, jnp.zeros_like(root0)], 1), ends.mean1, factor1)


def swapped(coupling: GaussianCoupling) -> GaussianCoupling:
    """The same joint law with the ends exchanged: what the diffusion backward in time starts from, s = 1 - t.

    Args:
        coupling: any Gaussian coupling.

    Returns:
        GaussianCoupling of (x1, x0).
    """
    return GaussianCoupling(coupling.mean1, coupling.factor1, coupling.mean0, coupling.factor0)


def bridge_law(coupling: GaussianCoupling, sigma: Scalar, t: Scalar) -> tuple[Array, Array]:
    r"""Mean and covariance of x_t = (1 - t) x0 + t x1 + sigma sqrt(t (1 - t)) z, a Gaussian.

    V_t = (1 - t)^2 S0 + t^2 S1 + t (1 - t) (C + C^T + sigma^2 I),  C = Cov(X0, X1).

    Args:
        coupling: any Gaussian coupling of dimension d.
        sigma: scale of the Brownian motion, >= 0, shape [].
        t: time in [0, 1], shape [].

    Returns:
        (mean [d], covariance [d, d]); at t = 0 and t = 1 those of the ends.

    Raises:
        ValueError: if `sigma` is not one finite number >= 0, or `t` is not one in [0, 1].
    """
    _checked_sigma(sigma)
    _validate.shape("t", t, ())
    if _validate.is_concrete(t) and not 0 <= float(t) <= 1:
        raise ValueError(f"t must be in [0, 1], got {t}")
    dtype = coupling.mean0.dtype
    sigma, t = jnp.asarray(sigma, dtype), jnp.asarray(t, dtype)
    place = (1 - t) * coupling.factor0 + t * coupling.factor1
    noise = sigma**2 * t * (1 - t) * jnp.eye(len(place), dtype=dtype)
    return (1 - t) * coupling.mean0 + t * coupling.mean1, place @ place.T + noise


def markov_coupling(coupling: GaussianCoupling, sigma: Scalar) -> GaussianCoupling:
    r"""One exact step of iterative Markovian fitting (IMF): the ends of the diffusion that follows the bridges' laws.

    The diffusion dX = f(X, t) dt + sigma dB from X_0 = x0 with the drift f = m_t' + A_t (x - m_t) that is the
    Markovian projection of the bridges (see the top of this module) has the law of x_t at every t, and at its ends
    another joint law than the coupling: Phi' = A_t Phi, Phi(0) = I, gives Cov(X1, X0) = Phi(1) S0. For sigma > 0
    its only fixed point is the Schroedinger bridge. The diffusion backward in time has the same joint law. What DSBM
    approximates:

        coupling = independent_coupling(mean, cov)
        for _ in range(rounds):
            coupling = markov_coupling(coupling, sigma)        # 0, .54629, .61114, ... -> .61803 (d = 1, sigma = 1)

    =====================  ===========================================================================================
    sigma = 0              one exact round of ReFlow: x1 becomes a function of x0. From independent ends it is the OT
                           map where S0 and S1 commute, and not in general
    V_t singular           not determined at sigma = 0 (180 degrees at t = 1/2): the flow meets a pole on the way, which
                           a step may miss
    S0 singular            fine for sigma > 0: the diffusion leaves the support of x0 and comes back
    S1 singular            Cov(X1, X0) is 0 in that direction to the tolerance
    =====================  ===========================================================================================

    Args:
        coupling: any Gaussian coupling of dimension d.
        sigma: scale of the Brownian motion, >= 0, shape [].

    Returns:
        GaussianCoupling with the marginals of `coupling`. Phi is integrated by dopri5, with a relative error of about
        1e-10 in float64 and 1e-6 in float32.

    Raises:
        ValueError: if `sigma` is not one finite number >= 0.
        RuntimeError: if the integration fails; under `jit` the factors are nan instead.

    Source: Shi et al. 2023 (DSBM), eq. 8; the Gaussian case is derived here.
    """
    _checked_sigma(sigma)
    dtype = coupling.mean0.dtype
    tolerance = max(TOLERANCE, 8 * float(jnp.finfo(dtype).eps))
    root0 = square_root(coupling.factor0 @ coupling.factor0.T)
    zero = jnp.zeros_like(coupling.mean0)
    centred = coupling._replace(mean0=zero, mean1=zero)
    # The rows of the state are the columns of Phi S0^(1/2): nothing has to be known outside the support of x0.
    params = centred, jnp.asarray(sigma, dtype)
    size = jnp.sqrt(jnp.max(jnp.square(coupling.factor0)) + jnp.max(jnp.square(coupling.factor1)))
    atol = tolerance * jnp.where(size > 0, size, 1)
    slope = flows.transport(_drift_of_rows, params, root0, solver="dopri5", rtol=tolerance, atol=atol).T
    cov = coupling.factor1 @ coupling.factor1.T
    remainder = cov - slope @ slope.T
    remainder = square_root((remainder + remainder.T) / 2, 10 * tolerance * jnp.max(jnp.abs(cov)))
    return GaussianCoupling(
        coupling.mean0,
        jnp.concatenate([root0, jnp.zeros_like(root0)], 1),
        coupling.mean1,
        jnp.concatenate([slope, remainder], 1),
    )


def _drift_of_rows(params: Params, t: Scalar, rows: Array) -> Array:
    """A_t applied to each row; a function of the module, so that every round and every sigma shares one program."""
    centred, sigma = params
    drift = population_minimiser(centred, bridge_drift(sigma))
    return jax.vmap(drift, (None, None, 0))(None, t, rows)


def coupling_divergence(coupling: GaussianCoupling, reference: GaussianCoupling) -> Array:
    r"""KL(coupling || reference) of the joint laws of (x0, x1), in nats: how far a coupling is from the bridge's.

    (tr(J_r^-1 J) - 2 d - log det(J_r^-1 J) + |m - m_r|^2_(J_r^-1)) / 2 with the covariances J, J_r, [2d, 2d]. As a sum
    of lambda - 1 - log lambda over eigenvalues it is >= 0 in floating point too.

    It is also the KL of the processes that fill the two couplings with Brownian bridges of one sigma.

    ========================  =========================================================================
    one of them singular      inf (a deterministic coupling, sigma = 0)
    both singular             nan: whether they share a support is not for floating point to decide
    ========================  =========================================================================

    "Singular" means to machine precision: the smallest singular value of the factors below 2 d epsilons of the largest.

    Args:
        coupling: any Gaussian coupling of dimension d.
        reference: the same of the law to compare with, as `schroedinger_coupling`.

    Returns:
        Shape [].

    Raises:
        ValueError: if the dimensions disagree.
    """
    dim = len(coupling.mean0)
    if len(reference.mean0) != dim:
        raise ValueError(f"reference must have the dimension of coupling, {dim}, got {len(reference.mean0)}")
    dtype = _validate.common_dtype(*coupling, *reference)
    (mean, factor), (center, scale) = (_joint(law, dtype) for law in (coupling, reference))
    singular, without = _singular(factor), _singular(scale)
    lower = jnp.linalg.qr(scale.T, mode="r").T  # scale @ scale.T = lower @ lower.T, without squaring first
    relative = jnp.linalg.svd(solve_triangular(lower, factor, lower=True), compute_uv=False) ** 2
    offset = solve_triangular(lower, mean - center, lower=True)
    divergence = (jnp.sum((relative - 1) - jnp.log(relative)) + jnp.sum(offset**2)) / 2
    return jnp.where(singular & without, jnp.nan, jnp.where(singular | without, jnp.inf, divergence))


def _joint(coupling: GaussianCoupling, dtype: np.dtype) -> tuple[Array, Array]:
    """Mean [2d] and factor [2d, 2d] of (x0, x1)."""
    mean = jnp.concatenate([coupling.mean0, coupling.mean1]).astype(dtype)
    factor = jnp.concatenate([coupling.factor0, coupling.factor1]).astype(dtype)
    lacking = max(0, len(mean) - factor.shape[1])
    factor = jnp.pad(factor, ((0, 0), (0, lacking)))
    return mean, jnp.linalg.qr(factor.T, mode="r").T


def _singular(factor: Array) -> Array:
    values = jnp.linalg.svd(factor, compute_uv=False)
    return values[-1] <= len(values) * jnp.finfo(factor.dtype).eps * values[0]


class SampleDivergence(NamedTuple):
    """KL in nats of the Gaussian that was estimated from pairs, [], and mean and standard deviation of its floor."""

    divergence: Array
    floor: float
    floor_std: float


def sample_divergence(pairs: Pair, reference: GaussianCoupling) -> SampleDivergence:
    """KL(N(mean, covariance of the pairs) || reference) of the joint law, and what it is for pairs of `reference`.

    An estimated covariance is never exact, so that this is positive for the right coupling too: read it beside the
    floor. Only means and covariances are looked at, not whether the pairs are Gaussian.

    Args:
        pairs: x0 and x1, [n, d], n >= 2 d + 1; covariance with ddof 1.
        reference: as in `coupling_divergence`.

    Returns:
        SampleDivergence; floor and standard deviation are those of `divergence_floor(n, 2 d)`.

    Raises:
        ValueError: if the shapes do not fit, n < 2 d + 1, or an entry is concrete and not finite.
    """
    count, dim = _validate.batch("pairs", pairs), len(reference.mean0)
    for name, points in (("pairs.x0", pairs.x0), ("pairs.x1", pairs.x1)):
        _validate.shape(name, points, (count, dim))
        _validate.finite(name, points)
    floor = divergence_floor(count, 2 * dim)
    dtype = _validate.common_dtype(pairs.x0, pairs.x1)
    points = jnp.concatenate([jnp.asarray(part, dtype) for part in pairs], 1)
    mean = jnp.mean(points, 0)
    factor = jnp.linalg.qr(points - mean, mode="r").T / (count - 1) ** 0.5
    estimated = GaussianCoupling(mean[:dim], factor[:dim], mean[dim:], factor[dim:])
    return SampleDivergence(coupling_divergence(estimated, reference), *floor)


def divergence_floor(count: int, dim: int) -> tuple[float, float]:
    r"""Mean and standard deviation of KL(N(mean, covariance of a sample) || the law itself), for a Gaussian law.

    With p = `dim`, n = `count` and nu = n - 1, nu S ~ Wishart(nu) after whitening, independent of the mean:

        E KL   = (sum_(i < p) [log(nu / 2) - psi((nu - i) / 2)] + p / n) / 2       ~ p (p + 3) / (4 n)
        Var KL = (sum_(i < p) psi'((nu - i) / 2) - 2 p / nu + 2 p / n^2) / 4,

    from E log det, Var log det of a Wishart matrix and Cov(tr, log det) = 2 p. Neither depends on the law.

    Args:
        count: sample size n >= p + 1; covariance with ddof 1.
        dim: dimension p; that of the joint law (x0, x1) is 2 d.

    Returns:
        (mean, standard deviation) in nats.

    Raises:
        ValueError: if `dim` or `count` is not an integer >= 1, or `count` < `dim` + 1: the covariance is singular.

    Source: derived in the docstring; the moments of log det W are in Muirhead 1982.
    """
    from scipy.special import digamma, polygamma

    _validate.positive_integer("dim", dim)
    _validate.positive_integer("count", count)
    if count < dim + 1:
        raise ValueError(f"count must be >= dim + 1 = {dim + 1}, else the covariance is singular, got {count}")
    freedom = count - 1
    halves = (freedom - np.arange(dim)) / 2
    mean = (np.sum(np.log(freedom / 2) - digamma(halves)) + dim / count) / 2
    variance = (np.sum(polygamma(1, halves)) - 2 * dim / freedom + 2 * dim / count**2) / 4
    return float(mean), float(np.sqrt(variance))


def _checked_sigma(sigma: Scalar) -> None:
    _validate.shape("sigma", sigma, ())
    _validate.nonnegative("sigma", sigma)
