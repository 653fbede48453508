"""The exact minimiser of the flow-matching loss over a finite set of pairs, its posterior and its score."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from fvjax import _validate
from fvjax.interpolants import Interpolant, as_pytree, linear
from fvjax.pairs._checks import checked_pairs, checked_weights
from fvjax.pairs._posterior import log_posterior, posterior_means
from fvjax.pairs._set import Instant, PairSet, geometry, instant
from fvjax.types import Array, Pair, Params, Scalar, VelocityField

UNCUT = 2**16
"""Up to this many pairs are one chunk: a batch of 64 examples then takes 17 MB for each float32 array of weights."""

CHUNK_ELEMENTS = 2**25
"""Above, numbers in a chunk of x0: it is copied out of the array, 128 MiB in float32."""


def empirical_minimiser(
    pairs: Pair, interpolant: Interpolant, weights: Array | None = None, *, chunk: int | None = None
) -> VelocityField:
    r"""The exact minimiser of the flow-matching loss over all fields, for a finite set of pairs.

    With m_i(t) = alpha x0_i + beta x1_i and x_t = m_i + gamma z for the pair i drawn with probability pi_i,

        v(x, t) = E[u_t | x_t = x] = sum_i w_i [alpha' x0_i + beta' x1_i + (gamma' / gamma) (x - m_i)],
        w_i(x, t) = softmax_i(log pi_i - |x - m_i|^2 / (2 gamma^2)).

    Any coupling (any list of pairs), any gamma. Its flow from the law of x_0 is the law of x_t at every t.

    ===============================  ==================================================================================
    gamma(t) = 0                     the limit: alpha' x0_i + beta' x1_i of the pair whose m_i is nearest to x; of
                                     several at the same distance (as computed) their mean, weighted by pi_i
    the ends of a bridge             that limit, so without the term of gamma'. On the support, x = m_i, that is
                                     E[u_t | x_t = x]; off it the term is infinite, away from m_i at t = 0 and towards
                                     it at t = 1. Finite, no nan
    gamma(t) below rounding of x_t   counts as 0: below one epsilon of the dtype times the median over the pairs of the
                                     root mean square coordinate (sin(pi)^2 at the end of the smooth bridge)
    pi_i = 0                         the pair takes no part, however near
    N = 1                            alpha' x0 + beta' x1 + (gamma' / gamma) (x - m)
    x with nan                       nan
    ===============================  ==================================================================================

    Accuracy: log weights that count are right to 1e-2 (usually 1e-3) and the rounding of x itself, also where
    |x - m_i|^2 is far below the rounding error of |x|^2 (float32, sigma = 1e-3, norms of 100): pairs that compete for
    the weight are compared by their differences, 16 at a time. Where thousands compete at such a sigma the result is
    right, but slow.

    Differentiable in x and t, forward and in reverse; the derivatives of the weights are those of the products, with a
    rounding error of epsilon |x| |m_i| / gamma^2. Under `vmap` over x (and t) the sums over pairs are matrix
    products. The field is a `jax.tree_util.Partial` that holds the pairs. Give it to `jit` as an argument if they are
    many: what a jitted function only closes over, JAX copies into the compiled program.

        flow = jax.jit(lambda field, x: jax.vmap(lambda x: fvjax.transport(field, None, x))(x))
        x1 = flow(empirical_minimiser(pairs, interpolant), x0)

    Args:
        pairs: x0 and x1, [N, *dims] each, N >= 1, of one floating dtype.
        interpolant: any interpolant, your own too.
        weights: pi, [N], >= 0, adding up to 1; None means 1/N each.
        chunk: pairs that are looked at together, an integer >= 1; the extra memory is of the order of
            batch x (chunk + 32 x dimensions) numbers. None means all N up to 65,536 pairs, and above that as many as
            make 2^25 numbers.

    Returns:
        A VelocityField (params, t [], x [*dims]) -> [*dims] that ignores its params (pass None). It raises ValueError
        for an x of another shape or dtype than one example of the pairs.

    Raises:
        ValueError: if the pairs are empty, not finite, not of one floating dtype and shape; if the weights do not have
            shape [N], are negative, not finite or do not add up to 1; if chunk is not an integer >= 1.

    Source: derived in docs/theory.md, section 8.
    """
    return Partial(_velocity, _pair_set(pairs, interpolant, weights, chunk))


def empirical_score(
    pairs: Pair, interpolant: Interpolant, weights: Array | None = None, *, chunk: int | None = None
) -> VelocityField:
    r"""The score grad log p_t(x) of the law of x_t = m_i(t) + gamma z over a finite set of pairs.

        p_t(x) = sum_i pi_i N(x; m_i(t), gamma^2 I),    score = - sum_i w_i (x - m_i) / gamma^2,

    with the weights of `empirical_minimiser`.

    =============================  ====================================================================================
    gamma(t) = 0                   there is no density. The limit comes back: +-inf in every coordinate, towards the
                                   nearest m_i; 0 in a coordinate that is equal to that of the nearest m_i
    the ends of a bridge           the same
    =============================  ====================================================================================

    Args:
        pairs: as in `empirical_minimiser`.
        interpolant: as in `empirical_minimiser`.
        weights: as in `empirical_minimiser`.
        chunk: as in `empirical_minimiser`.

    Returns:
        A field (params, t [], x [*dims]) -> score [*dims], in 1 / units of x, that ignores its params (pass None).

    Raises:
        ValueError: as in `empirical_minimiser`.

    Source: derived in docs/theory.md, section 8.
    """
    return Partial(_score, _pair_set(pairs, interpolant, weights, chunk))


def memorizing_field(pairs: Pair, interpolant: Interpolant | None = None, *, chunk: int | None = None) -> VelocityField:
    r"""The field of Proposition 2 that has loss 0 on the pairs for almost every t: each point follows its nearest pair.

        v(x, t) = alpha' x0_i + beta' x1_i,   i = argmin_i |x - m_i(t)|,

    which is `empirical_minimiser` in the limit gamma -> 0. Integration from a training x0 returns its own x1, even
    where lines cross; a solver that meets a crossing exactly (Counter Example 1 at t = 1/2) gets the mean of the
    velocities there.

    Args:
        pairs: as in `empirical_minimiser`; all of the same weight.
        interpolant: alpha and beta; None means `linear()`. Its noise is left out.
        chunk: as in `empirical_minimiser`.

    Returns:
        A VelocityField as that of `empirical_minimiser`.

    Raises:
        ValueError: as in `empirical_minimiser`.

    Source: Proposition 2, Reu et al. 2025.
    """
    lines = linear() if interpolant is None else interpolant
    silent = lines._replace(gamma=Partial(jnp.zeros_like), noise_rate=None, noise_target=None)
    return empirical_minimiser(pairs, silent, chunk=chunk)


def pair_log_weights(
    pairs: Pair, interpolant: Interpolant, weights: Array | None = None
) -> Callable[[Scalar, Array], Array]:
    r"""The posterior over pairs, log w_i(x, t) = log P(pair i | x_t = x).

    log w_i = log pi_i - |x - m_i|^2 / (2 gamma^2) - log of the sum over i of the exponentials.

    =============================  ====================================================================================
    gamma(t) = 0                   the pairs with m_i nearest to x share the weight in proportion to pi; -inf elsewhere
    pi_i = 0                       -inf
    log w_i << 0                   right to 1e-2 wherever w_i counts (log w_i above -40 or so); below, to the rounding
                                   error of |x| |m_i| / gamma^2
    =============================  ====================================================================================

    Args:
        pairs: as in `empirical_minimiser`.
        interpolant: as in `empirical_minimiser`.
        weights: as in `empirical_minimiser`.

    Returns:
        A function (t [], x [*dims]) -> log w [N], a `jax.tree_util.Partial` as the field is.

    Raises:
        ValueError: as in `empirical_minimiser`.

    Source: derived in docs/theory.md, section 8.
    """
    return Partial(_log_weights, _pair_set(pairs, interpolant, weights, None))


def _pair_set(pairs: Pair, interpolant: Interpolant, weights: Array | None, chunk: int | None) -> PairSet:
    pairs = checked_pairs(pairs)
    count = len(pairs.x0)
    if pairs.x0.size == 0:
        raise ValueError(f"pairs must have at least one dimension, got arrays of shape {pairs.x0.shape}")
    weights = checked_weights(weights, count)
    if chunk is None:
        chunk = count if count <= UNCUT else max(1024, CHUNK_ELEMENTS * count // pairs.x0.size)
    _validate.positive_integer("chunk", chunk)
    dtype = _validate.common_dtype(pairs.x0)
    stored = pairs if pairs.x0.dtype == dtype else jax.tree.map(lambda x: x.astype(dtype), pairs)
    weights = None if weights is None else weights.astype(dtype)
    # `min`: so that equal work compiles once.
    return PairSet(stored, geometry(*stored), weights, as_pytree(interpolant), min(int(chunk), count))


def _checked_point(data: PairSet, x: Array) -> Array:
    x = jnp.asarray(x)
    _validate.floating("x", x)
    example = data.pairs.x0.shape[1:]
    if x.shape != example:
        raise ValueError(f"x must be ONE example of the shape {example} of the pairs, got {x.shape}; use jax.vmap")
    if _validate.common_dtype(x) != data.pairs.x0.dtype:
        raise ValueError(f"x must have the dtype of the pairs, {data.pairs.x0.dtype}, got {x.dtype}")
    return x


def _velocity(data: PairSet, params: Params, t: Scalar, x: Array) -> Array:
    del params
    return _velocity_at(data, t, _checked_point(data, x))


@jax.jit
def _velocity_at(data: PairSet, t: Scalar, x: Array) -> Array:
    now, point = _here(data, t, x)
    x0, x1 = posterior_means(data, now, point)
    velocity = now.alpha_rate * x0 + now.beta_rate * x1 + now.pull * (point - now.alpha * x0 - now.beta * x1)
    return velocity.reshape(x.shape).astype(x.dtype)


def _score(data: PairSet, params: Params, t: Scalar, x: Array) -> Array:
    del params
    return _score_at(data, t, _checked_point(data, x))


@jax.jit
def _score_at(data: PairSet, t: Scalar, x: Array) -> Array:
    now, point = _here(data, t, x)
    x0, x1 = posterior_means(data, now, point)
    offset = now.alpha * x0 + now.beta * x1 - point
    limit = jnp.where(offset == 0, 0, jnp.sign(offset) * jnp.inf)
    # now.spread is 2 gamma^2
    return jnp.where(now.noiseless, limit, 2 * offset / now.spread).reshape(x.shape).astype(x.dtype)


def _log_weights(data: PairSet, t: Scalar, x: Array) -> Array:
    return _log_weights_at(data, t, _checked_point(data, x))


@jax.jit
def _log_weights_at(data: PairSet, t: Scalar, x: Array) -> Array:
    return log_posterior(data, *_here(data, t, x)).astype(x.dtype)


def _here(data: PairSet, t: Scalar, x: Array) -> tuple[Instant, Array]:
    dtype = data.pairs.x0.dtype
    return instant(data, jnp.asarray(t, dtype)), x.reshape(-1).astype(dtype)
