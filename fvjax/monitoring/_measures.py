"""The compiled parts of a look: moments of the gradients of one time bin, their sum, and where the flow goes."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from fvjax.flows import transport
from fvjax.gradients import gradient_moments, merge_moments, total_variance
from fvjax.losses import squared_error
from fvjax.monitoring._probe import Sources
from fvjax.pairs import nearest_target_is_own
from fvjax.sites import verify as verify_gradients
from fvjax.types import Array, GradientMoments, Params, PathSample


@functools.lru_cache(maxsize=16)
def _loss(field: Any, reduction: str) -> Partial:
    """One loss for one field, whose programs are compiled once."""
    return Partial(squared_error(field, reduction=reduction))


def verify(field: Any, params: Params, probe: Sequence[PathSample], reduction: str) -> None:
    """Compares two gradients with those of `vmap(grad)`: DisagreementError if they disagree."""
    verify_gradients(_loss(field, reduction), params, probe[0])


def _moments(field: Any, reduction: str, params: Params, paths: PathSample) -> tuple[GradientMoments, Array]:
    found = gradient_moments(_loss(field, reduction), params, paths)
    return found, _unbiased(found)


@jax.jit
def _unbiased(moments: GradientMoments) -> Array:
    return total_variance(moments, ddof=1)


@jax.jit
def _merged(first: GradientMoments, second: GradientMoments) -> GradientMoments:
    return merge_moments(first, second)


@jax.jit
def _squared(mean: Params) -> Params:
    return jax.tree.map(lambda leaf: jnp.sum(leaf**2), mean)


def _sum(tree: Params) -> float:
    """Of numbers, in double precision."""
    return sum(map(float, jax.tree.leaves(jax.device_get(tree))))


def variance_of(
    field: Any, params: Params, probe: Sequence[PathSample], reduction: str
) -> tuple[float, tuple[float, ...], float]:
    r"""Unbiased total variance, by time bin, and the gradient noise scale, from n draws in each of B equal bins.

    With V_b the unbiased variance within bin b, W = sum_b V_b / B, N = n B and M2 the squared deviations from the mean
    of all draws, the law of total variance gives

        variance = W + sum_b |m_b - m|^2 / B - (1 - 1 / B) W / n = (M2 + W) / N,      |E g|^2 = |m|^2 - W / N,

    the third term because the scatter of the bins' means is in the second, the last because m has the variance W / N
    (bins are equal parts of the draws). For B = 1 that is M2 / (N - 1).

    Returns:
        The variance; that of every bin; and variance / |E g|^2, which is inf where the estimate below is <= 0: the
        draws do not tell the mean gradient from 0. It is nan where both are 0.
    """
    total, within = _moments(field, reduction, params, probe[0])
    found = [within]
    for paths in probe[1:]:
        moments, within = _moments(field, reduction, params, paths)
        total = _merged(total, moments)
        found.append(within)
    bins = tuple(float(value) for value in found)
    m2, squared_mean = _sum(total.m2), _sum(_squared(total.mean))
    draws, mean_within = sum(len(paths.t) for paths in probe), sum(bins) / len(bins)
    variance, signal = (m2 + mean_within) / draws, squared_mean - mean_within / draws
    if signal > 0 or math.isnan(signal):
        return variance, bins, variance / signal
    return variance, bins, math.inf if variance > 0 else math.nan


@functools.partial(jax.jit, static_argnames=("field", "solver", "steps"))
def _flown(field: Any, solver: str, steps: int, params: Params, sources: Sources) -> tuple[Array, Array]:  # noqa: PLR0917
    x0, targets = sources
    ends = jax.vmap(lambda x: transport(field, params, x, solver=solver, steps=steps))(x0)
    distances = jnp.linalg.norm((ends - targets[: len(x0)]).reshape(len(x0), -1), axis=1)
    return distances, nearest_target_is_own(ends, targets, jnp.arange(len(x0)))


def flow_of(field: Any, params: Params, sources: Sources, *, solver: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Distance of every source's end to its own target, nan where the solve failed, and whether none is nearer."""
    distances, returned = _flown(field, solver, steps, params, sources)
    return np.asarray(distances, np.float64), np.asarray(returned)
