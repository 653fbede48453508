r"""How many pairs a point on the path could have come from: does (x_t, t) still name its pair?"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fvjax import _validate
from fvjax.interpolants import Interpolant, as_pytree, draw_path
from fvjax.pairs._checks import checked_pairs, checked_weights
from fvjax.pairs._minimiser import pair_log_weights
from fvjax.types import Array, Key, Pair, Scalar

ELEMENTS = 2**23
"""Bound on draws x pairs (x 16 dimensions, which are compared directly) at once: 32 MiB in float32."""


class Identifiability(NamedTuple):
    """The mean perplexity over draws, between 1 and N, and its standard error; in the shape of the times."""

    perplexity: Array
    standard_error: Array


class _Problem(NamedTuple):
    key: Key
    pairs: Pair
    interpolant: Interpolant
    weights: Array | None


def identifiability(
    key: Key,
    pairs: Pair,
    interpolant: Interpolant,
    t: Scalar,
    *,
    draws: int = 256,
    weights: Array | None = None,
    chunk: int | None = None,
) -> Identifiability:
    r"""Pair identifiability: the perplexity exp H of the posterior over pairs given (x_t, t), averaged over draws.

        P(t) = E exp( - sum_i w_i(x_t, t) log w_i(x_t, t) ),     w_i(x, t) = P(pair i | x_t = x),

    the mean of perplexities, not exp of the mean entropy (which is smaller, by Jensen's inequality). 1: the point
    names its pair, so an expressive field can return every pair exactly. N (with equal weights): it tells nothing.
    No training is needed.

    =============================  ====================================================================================
    gamma(t) = 0                   1, or the number of pairs whose paths meet exactly in x_t (with equal weights)
    sigma >> all distances         exp H(weights), which is N for equal weights
    the ends of a bridge           as gamma(t) = 0: 1, unless sources (or targets) are equal
    N = 1                          1
    =============================  ====================================================================================

    Args:
        key: PRNG key; draw k uses `fold_in(key, k)`, with the same pair and noise at every time, so that the curve over
            t is smooth, and the result does not depend on `chunk`.
        pairs: x0 and x1, [N, *dims] each, floating point.
        interpolant: any interpolant.
        t: times, any shape; traced or not.
        draws: number of (pair, noise) drawn, >= 2. Pairs are drawn with probabilities `weights`.
        weights: pi, [N], >= 0, adding up to 1; None means 1/N each.
        chunk: draws that are compared with all pairs at once; None bounds their memory.

    Returns:
        Identifiability, in the dtype of x0 and the shape of `t`. The standard error is that of the mean over draws, for
        each time alone.

    Raises:
        ValueError: if the pairs are empty, not finite, or not of one shape and floating-point dtype; the weights are
            negative or do not add up to 1; or `draws` or `chunk` is no integer >= 2 or >= 1.

    Source: docs/theory.md, section 8.
    """
    pairs = checked_pairs(pairs)
    weights = checked_weights(weights, len(pairs.x0))
    _validate.positive_integer("draws", draws)
    if draws < 2:
        raise ValueError(f"draws must be >= 2 (one has no standard error), got {draws}")
    if chunk is None:
        n, dim = pairs.x0.reshape(len(pairs.x0), -1).shape
        chunk = max(1, min(draws, ELEMENTS // (16 * max(n, dim))))
    _validate.positive_integer("chunk", chunk)
    t = jnp.asarray(t, pairs.x0.dtype)
    problem = _Problem(key, pairs, as_pytree(interpolant), weights)
    values = _perplexities(problem, t.ravel(), draws=int(draws), chunk=int(chunk))
    error = jnp.std(values, 1, ddof=1) / draws**0.5
    return Identifiability(jnp.mean(values, 1).reshape(t.shape), error.reshape(t.shape))


def perplexity(log_weights: Array) -> Array:
    """exp(-sum w log w) over the last axis of normalised log-weights; 0 log 0 = 0."""
    weights = jnp.exp(log_weights)
    return jnp.exp(-jnp.sum(jnp.where(weights > 0, weights * log_weights, 0), -1))


@functools.partial(jax.jit, static_argnames=("draws", "chunk"))
def _perplexities(problem: _Problem, times: Array, *, draws: int, chunk: int) -> Array:
    """[times, draws]."""
    key, pairs, interpolant, weights = problem
    log_weights = pair_log_weights(pairs, interpolant, weights)

    def of_draw(t: Array, k: Array) -> Array:
        pair_key, path_key = jax.random.split(jax.random.fold_in(key, k))
        i = jax.random.choice(pair_key, len(pairs.x0), p=weights)
        path = draw_path(path_key, Pair(pairs.x0[i], pairs.x1[i]), interpolant, t=t)
        return perplexity(log_weights(t, path.x))

    def at(t: Array) -> Array:
        return jax.lax.map(lambda k: of_draw(t, k), jnp.arange(draws), batch_size=chunk)

    return jax.lax.map(at, times)
