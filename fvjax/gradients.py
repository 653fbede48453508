r"""Per-example gradients and their moments: total variance, by leaf, coordinate and group, and the noise scale.

With g_i the gradient of the loss of example i and weights w_i, W = sum_i w_i,

    mean = sum_i w_i g_i / W,      m2 = sum_i w_i (g_i - mean)^2   elementwise,      variance = m2 / (W - ddof).

`total_variance` is the trace of the gradient covariance, the sum of `variance` over all parameters; a batch of B draws
divides it by B. Moments are computed in passes (mean, its correction, squares) within a chunk and merged by Chan et al.
1979: E|g|^2 - |E g|^2 loses everything to cancellation in float32 once the variance is small.

Everything here is a deterministic function of the examples: draws give Monte Carlo, weighted quadrature nodes give
exact variances.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax.types import Array, Params

ExampleLoss = Callable[[Params, Any], Array]


class GradientMoments(NamedTuple):
    """Weight, mean and weighted sum of squared deviations of gradients; mergeable.

    With G groups every field has a leading axis G (`weight` [G], leaves of `mean` and `m2` [G, *leaf]); without,
    `weight` has shape [] and the leaves those of the params. At least float32.
    """

    weight: Array
    mean: Params
    m2: Params


def per_example_gradients(loss: ExampleLoss, params: Params, batch: Any) -> Params:
    """The gradient of every example, by `vmap(grad)`.

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
    _checked_length(params, batch)
    return jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, batch)


def gradient_moments(
    loss: ExampleLoss,
    params: Params,
    batch: Any,
    *,
    weights: Array | None = None,
    by: Array | None = None,
    groups: int | None = None,
    chunk: int | None = None,
    axis_name: str | None = None,
) -> GradientMoments:
    """Weighted moments of the per-example gradients of a batch, in memory bounded by `chunk` gradients.

    Call it inside `jax.jit`: outside, every call with a `chunk` compiles its loop again.

    Args:
        loss: (params, example) -> scalar for ONE example.
        params: pytree of floating-point arrays.
        batch: pytree of examples with leading axis n, on one device.
        weights: [n], >= 0 (quadrature weights, importance weights); None means 1 each. An example of weight 0 (padding)
            is ignored, even if its gradient is nan.
        by: group of every example, integers in [0, groups), [n] (time bins, pairs, ...); entries outside are dropped.
        groups: number of groups; given exactly if `by` is.
        chunk: examples that are differentiated at once; None means all. Any n works, the last chunk may be ragged.
        axis_name: name of the surrounding `pmap` axis over which the moments are merged.

    Returns:
        GradientMoments, with a leading axis `groups` if `by` is given.

    Raises:
        ValueError: if shapes disagree, the params are not floating point, `by` is not integer, a concrete weight is
            negative, `chunk` or `groups` is not an integer >= 1, or the batch is split over devices outside `pmap`.
    """
    n = _checked_length(params, batch)
    weights, by = _checked_weights_and_groups(n, weights, by, groups)
    if chunk is not None:
        _validate.positive_integer("chunk", chunk)

    def moments_of(piece: tuple[Any, Array, Array | None]) -> GradientMoments:
        examples, weight, group = piece
        gradients = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, examples)
        return _moments(gradients, weight, group, groups)

    if chunk is None or chunk >= n:
        moments = moments_of((batch, weights, by))
    else:
        moments = _merge_chunks(moments_of, _in_chunks((batch, weights, by), n, chunk))
    return moments if axis_name is None else _merge_devices(moments, axis_name)


def _checked_length(params: Params, batch: Any) -> int:
    for leaf in jax.tree.leaves(params):
        _validate.floating("params", leaf)
    _validate.on_one_device("batch", batch)
    return _validate.batch("batch", batch)


def _checked_weights_and_groups(
    n: int, weights: Array | None, by: Array | None, groups: int | None
) -> tuple[Array, Array | None]:
    if (by is None) != (groups is None):
        raise ValueError(f"by and groups must be given together, got by={by}, groups={groups}")
    if groups is not None:
        _validate.positive_integer("groups", groups)
        _validate.shape("by", by, (n,))
        by = jnp.asarray(by)
        _validate.integers("by", by)
    if weights is None:
        return jnp.ones((n,)), by
    _validate.shape("weights", weights, (n,))
    _validate.nonnegative("weights", weights)
    return jnp.asarray(weights, _validate.common_dtype(weights)), by


def _in_chunks(tree: Any, n: int, chunk: int) -> Any:
    """[n, ...] -> [chunks, chunk, ...]; the padding repeats the last example with weight 0, so it cannot make a nan."""
    padding = -n % chunk

    def cut(x: Array) -> Array:
        x = jnp.asarray(x)
        padded = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (padding, *x.shape[1:]))])
        return padded.reshape(-1, chunk, *x.shape[1:])

    batch, weights, by = tree
    zeros = jnp.zeros((padding,), weights.dtype)
    padded_weights = jnp.concatenate([weights, zeros]).reshape(-1, chunk)
    return jax.tree.map(cut, batch), padded_weights, None if by is None else cut(by)


def _merge_chunks(moments_of: Callable[[Any], GradientMoments], pieces: Any) -> GradientMoments:
    """Merges the moments of the chunks, with all means relative to the first one.

    So the running mean is rounded on the scale of the deviations, not of the gradients: 10^4 chunks of one, whose true
    variance was 1e-10 of the squared mean, came out right to 2e-6 instead of 5e-3.
    """

    def body(carry: tuple[Params, GradientMoments], piece: Any) -> tuple[tuple[Params, GradientMoments], None]:
        origin, total = carry
        own = moments_of(piece)
        origin = jax.tree.map(lambda o, m: jnp.where(_trailing(total.weight, m) > 0, o, m), origin, own.mean)
        shifted = own._replace(mean=jax.tree.map(jnp.subtract, own.mean, origin))
        return (origin, merge_moments(total, shifted)), None

    shapes = jax.eval_shape(moments_of, jax.tree.map(lambda x: x[0], pieces))
    empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (origin, total), _ = jax.lax.scan(body, (empty.mean, empty), pieces)
    return total._replace(mean=jax.tree.map(jnp.add, origin, total.mean))


def _accumulation_dtype(x: Array) -> Any:
    return x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32


def _trailing(x: Array, like: Array) -> Array:
    """Appends axes to `x` so that it broadcasts against the leading axes of `like`."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim)).astype(like.dtype)


def _ratio(x: Array, total: Array) -> Array:
    """x / total, and 0 where total = 0: an empty group has mean 0, which merges as nothing."""
    total = _trailing(total, x)
    return jnp.where(total > 0, x / jnp.where(total > 0, total, 1), 0)


def _weighted_sum(weights: Array, values: Array) -> Array:
    """sum_i w_i v_i over the leading axis, for weights [n] or, group by group, [n, groups].

    As a matrix product where it is one: XLA's reduction of [64, 512, 512] over its first axis took 2 s on 2 CPU cores,
    the product 12 ms (jax 0.10.2). Full precision, since accelerators would round float32 factors to 10 bits or fewer.
    """
    if weights.ndim > 1:
        return jnp.sum(_trailing(weights, values) * values, 0)
    return jnp.tensordot(weights.astype(values.dtype), values, 1, precision=jax.lax.Precision.HIGHEST)


def _moments(values: Params, weights: Array, by: Array | None = None, groups: int | None = None) -> GradientMoments:
    """Moments of values with a leading axis n, in one group or several.

    The mean is refined by the mean of the residuals: the plain sum of n float32 numbers is off by up to n epsilons, and
    the square of that error would be added to every variance.
    """

    def total(x: Array) -> Array:
        return _weighted_sum(weights, x) if by is None else jax.ops.segment_sum(_trailing(weights, x) * x, by, groups)

    def mean_of(values: Params) -> Params:
        return jax.tree.map(lambda v: _ratio(total(v), weight), values)

    def residual(value: Array, mean: Array) -> Array:
        return value - (mean if by is None else mean[by])

    def counted(v: Array) -> Array:
        """Zero where the weight is 0: the gradient of padding may be nan, and 0 * nan = nan."""
        return jnp.where(_trailing(weights, v) == 0, 0, v.astype(_accumulation_dtype(v)))

    weight = jnp.sum(weights, 0) if by is None else jax.ops.segment_sum(weights, by, groups)
    values = jax.tree.map(counted, values)
    rough = mean_of(values)
    residuals = jax.tree.map(residual, values, rough)
    correction = mean_of(residuals)
    m2 = jax.tree.map(lambda r, c: total(residual(r, c) ** 2), residuals, correction)
    return GradientMoments(weight, jax.tree.map(jnp.add, rough, correction), m2)


def merge_moments(first: GradientMoments, second: GradientMoments) -> GradientMoments:
    """The moments of the union of two disjoint sets of examples; associative and commutative up to rounding.

    Args:
        first: moments with or without groups.
        second: moments of the same shapes; groups merge one by one.

    Returns:
        GradientMoments of the same shapes. Merging with weight 0 changes nothing.

    Source: Chan, Golub & LeVeque 1979, eq. 2.1, with weights.
    """
    return merge_groups(jax.tree.map(lambda x, y: jnp.stack([x, y]), first, second))


def merge_groups(moments: GradientMoments) -> GradientMoments:
    """Merges the leading group axis away: the law of total variance, within plus between the groups.

    m2 = sum_k m2_k + sum_k w_k (mean_k - mean)^2.

    Args:
        moments: with a leading axis [groups, ...].

    Returns:
        GradientMoments without that axis.
    """
    between = _moments(moments.mean, moments.weight)
    return between._replace(m2=jax.tree.map(lambda within, m2: jnp.sum(within, 0) + m2, moments.m2, between.m2))


def _merge_devices(moments: GradientMoments, axis_name: str) -> GradientMoments:
    """The moments of all devices of a `pmap` axis, on every device; sums only, so no device holds all of them."""
    weight = jax.lax.psum(moments.weight, axis_name)

    def merged_mean(mean: Array) -> Array:
        return _ratio(jax.lax.psum(_trailing(moments.weight, mean) * mean, axis_name), weight)

    mean = jax.tree.map(merged_mean, moments.mean)

    def merged(m2: Array, own_mean: Array, total_mean: Array) -> Array:
        return jax.lax.psum(m2 + _trailing(moments.weight, m2) * (own_mean - total_mean) ** 2, axis_name)

    return GradientMoments(weight, mean, jax.tree.map(merged, moments.m2, moments.mean, mean))


def elementwise_variance(moments: GradientMoments, *, ddof: int = 0) -> Params:
    """The variance of every gradient coordinate, m2 / (weight - ddof).

    Args:
        moments: with or without groups.
        ddof: 0 for exact (quadrature) weights and for the plug-in estimate, 1 for the unbiased estimate from draws of
            weight 1. A group of weight <= ddof gives nan: it has no variance.

    Returns:
        Pytree like the params (leading axis [groups] if the moments have one).

    Raises:
        ValueError: if `ddof` is neither 0 nor 1.
    """
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof}")
    degrees = jnp.where(moments.weight > ddof, moments.weight - ddof, jnp.nan)
    return jax.tree.map(lambda m2: m2 / _trailing(degrees, m2), moments.m2)


def variance_by_leaf(moments: GradientMoments, *, ddof: int = 0) -> Params:
    """The trace of the gradient covariance, leaf by leaf of the params: a pytree of shape [] (or [groups]) each.

    Args and errors as in `elementwise_variance`; the leaves add up to `total_variance`.
    """
    lead = jnp.ndim(moments.weight)
    return jax.tree.map(lambda v: jnp.sum(v, tuple(range(lead, v.ndim))), elementwise_variance(moments, ddof=ddof))


def total_variance(moments: GradientMoments, *, ddof: int = 0) -> Array:
    """tr Cov(g): the total variance of the gradient of ONE draw; a mean over B independent draws has 1/B of it.

    Args and errors as in `elementwise_variance`.

    Returns:
        Shape [], or [groups]. A group without weight gives nan.
    """
    return _sum_of_leaves(variance_by_leaf(moments, ddof=ddof))


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

    Source: McCandlish et al. 2018, eq. 2.9 and appendix A.1.
    """
    variance = total_variance(moments, ddof=ddof)
    lead = jnp.ndim(moments.weight)
    signal = _sum_of_leaves(jax.tree.map(lambda m: jnp.sum(m**2, tuple(range(lead, m.ndim))), moments.mean))
    if ddof:
        signal = signal - variance / moments.weight.astype(variance.dtype)
    return variance / signal


def _sum_of_leaves(tree: Params) -> Array:
    leaves = jax.tree.leaves(tree)
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
