r"""Per-example gradients and their moments: total variance, by leaf, coordinate and group, and the noise scale.

With g_i the gradient of the loss of example i and weights w_i, W = sum_i w_i,

    mean = sum_i w_i g_i / W,      m2 = sum_i w_i (g_i - mean)^2   elementwise,      variance = m2 / (W - ddof).

`total_variance` is the trace of the gradient covariance, the sum of `variance` over all parameters; a batch of B draws
divides it by B. `gradient_moments` is `fvjax.sites.moments`: it takes about the time of one gradient, and never forms
E|g|^2 - |E g|^2 where that would lose digits to cancellation. Moments merge by Chan et al. 1979.

Everything here is a deterministic function of the examples: draws give Monte Carlo, weighted quadrature nodes give
exact variances.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax._moments import merge_groups, merge_moments, trailing
from fvjax.sites import moments as gradient_moments
from fvjax.types import Array, ExampleLoss, GradientMoments, Params

__all__ = [
    "GradientMoments",
    "elementwise_variance",
    "gradient_moments",
    "gradient_noise_scale",
    "merge_groups",
    "merge_moments",
    "per_example_gradients",
    "time_bins",
    "total_variance",
    "variance_by_leaf",
]


def per_example_gradients(loss: ExampleLoss, params: Params, batch: Any) -> Params:
    """The gradient of every example, by `vmap(grad)`: n times the memory of the params.

    Args:
        loss: (params, example) -> scalar for ONE example.
        params: pytree of floating-point arrays.
        batch: pytree of examples with leading axis n, on one device.

    Returns:
        Pytree like `params`, each leaf [n, *leaf].

    Raises:
        ValueError: if the params are not floating point, or the batch has no common leading axis or is split over
            devices outside `pmap` (such gradients come out as zeros; see docs/sharp_edges.md).
    """
    for leaf in jax.tree.leaves(params):
        _validate.floating("params", leaf)
    _validate.on_one_device("batch", batch)
    _validate.batch("batch", batch)
    return jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, batch)


def elementwise_variance(moments: GradientMoments, *, ddof: int = 0) -> Params:
    """The variance of every gradient coordinate, m2 / (weight - ddof).

    Args:
        moments: of `gradient_moments(..., elementwise=True)`, with or without groups.
        ddof: 0 for exact (quadrature) weights and for the plug-in estimate, 1 for the unbiased estimate from draws of
            weight 1. A group of weight <= ddof gives nan: it has no variance.

    Returns:
        Pytree like the params (leading axis [groups] if the moments have one).

    Raises:
        ValueError: if `ddof` is neither 0 nor 1, or the moments hold the trace only.
    """
    for mean, m2 in zip(jax.tree.leaves(moments.mean), jax.tree.leaves(moments.m2), strict=True):
        if mean.shape != m2.shape:
            raise ValueError(
                "moments must be elementwise, as gradient_moments(..., elementwise=True) gives them, got m2 of shape"
                f" {m2.shape} for a mean of shape {mean.shape}"
            )
    return _normalised(moments, ddof)


def _normalised(moments: GradientMoments, ddof: int) -> Params:
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof}")
    degrees = jnp.where(moments.weight > ddof, moments.weight - ddof, jnp.nan)
    return jax.tree.map(lambda m2: m2 / trailing(degrees, m2), moments.m2)


def variance_by_leaf(moments: GradientMoments, *, ddof: int = 0) -> Params:
    """The trace of the gradient covariance, leaf by leaf of the params: a pytree of shape [] (or [groups]) each.

    Args:
        moments: elementwise or their trace, with or without groups.
        ddof: as in `elementwise_variance`.

    Returns:
        The leaves, which add up to `total_variance`.

    Raises:
        ValueError: if `ddof` is neither 0 nor 1.
    """
    lead = jnp.ndim(moments.weight)
    return jax.tree.map(lambda v: jnp.sum(v, tuple(range(lead, v.ndim))), _normalised(moments, ddof))


def total_variance(moments: GradientMoments, *, ddof: int = 0) -> Array:
    """tr Cov(g): the total variance of the gradient of ONE draw; a mean over B independent draws has 1/B of it.

    Args and errors as in `variance_by_leaf`.

    Returns:
        Shape [], or [groups]. A group without weight gives nan.
    """
    return _sum_of_leaves(variance_by_leaf(moments, ddof=ddof), moments.weight)


def gradient_noise_scale(moments: GradientMoments, *, ddof: int = 0) -> Array:
    """B_simple = tr Cov(g) / |E g|^2, in examples: batches much larger than this average the noise away.

    Args:
        moments: with or without groups.
        ddof: 0 takes both parts as they are. 1 takes the unbiased estimates from n draws of weight 1: the variance with
            n - 1, and |mean|^2 - variance / n below the line, which may come out <= 0 when the mean is not resolved.

    Returns:
        Shape [], or [groups]; inf where the mean is exactly 0, nan where the variance is 0 too.

    Raises:
        ValueError: if `ddof` is neither 0 nor 1.

    Source: McCandlish et al. 2018, section 2.2 and appendix A.
    """
    variance = total_variance(moments, ddof=ddof)
    lead = jnp.ndim(moments.weight)
    squares = jax.tree.map(lambda m: jnp.sum(m**2, tuple(range(lead, m.ndim))), moments.mean)
    signal = _sum_of_leaves(squares, moments.weight)
    if ddof:
        signal = signal - variance / moments.weight.astype(variance.dtype)
    return variance / signal


def _sum_of_leaves(tree: Params, like: Array) -> Array:
    """The sum, or zeros like `like` without a leaf."""
    leaves = jax.tree.leaves(tree) or [jnp.zeros_like(like)]
    dtype = np.result_type(*(leaf.dtype for leaf in leaves))
    return sum((leaf.astype(dtype) for leaf in leaves[1:]), leaves[0].astype(dtype))


def time_bins(t: Array, bins: int, *, time_range: tuple[float, float] = (0.0, 1.0)) -> Array:
    """The bin of every time among `bins` equal intervals of `time_range`: the `by` of `gradient_moments`.

    Args:
        t: times, [n].
        bins: number of bins.
        time_range: start and end; times outside go to the nearest bin.

    Returns:
        Integers in [0, bins), [n].

    Raises:
        ValueError: if `bins` is not an integer >= 1, or `time_range` is no interval in [0, 1].
    """
    _validate.positive_integer("bins", bins)
    _validate.interval("time_range", time_range, 0.0, 1.0)
    start, end = time_range
    return jnp.clip(jnp.floor((t - start) / (end - start) * bins).astype(jnp.int32), 0, bins - 1)
