"""Variance of the gradient over path samples of the pairs: in total, by time and by layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from fvjax import gradients
from fvjax.auditing._inputs import Field, is_array
from fvjax.auditing._statistics import number
from fvjax.auditing._types import GradientVariance, Layer, TimeBin
from fvjax.losses import squared_error
from fvjax.types import Array, GradientMoments, Params, PathSample, Scalar

AT_ONCE = 256
"""Path samples that are differentiated at once."""

VERIFIED = 2
"""Path samples whose gradients are compared with those of `vmap(grad)`."""

MEANS = 2**28
"""Bound on bins x parameters, the numbers in the mean gradients by bin (1 GiB): above, all draws are one bin."""


def is_parameter(leaf: Any) -> bool:
    """Whether a leaf of the params is differentiated: a floating-point array, no plain number."""
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def parameter_names(params: Params) -> list[str]:
    """Names such as "encoder.kernel" of the leaves that are differentiated, in their order."""
    named = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params) if is_parameter(leaf)]
    # The values of Flax NNX's variables are called "value".
    names = [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in named]
    return [name or "params" for name in names]


def gradient_variance(
    field: Field, paths: PathSample, *, bins: int, time_range: tuple[float, float]
) -> GradientVariance | None:
    """Of the squared error, summed over dimensions; None without floating-point parameters."""
    params = field.parts()[1]
    leaves = [leaf for leaf in jax.tree.leaves(params) if is_parameter(leaf)]
    sizes = [int(np.size(leaf)) for leaf in leaves]
    if not sum(sizes):
        return None
    bins = bins if bins * sum(sizes) <= MEANS else 1
    by = gradients.time_bins(paths.t, bins, time_range=time_range)
    total, binned = jax.device_get(_sums(field, paths, by, bins=bins))
    variances, signals = _by_leaf(total)
    binned_variances, binned_signals = _by_leaf(binned)
    counts = binned.weight
    edges = np.linspace(*time_range, bins + 1)
    by_time = tuple(
        TimeBin(float(edges[k]), float(edges[k + 1]), int(counts[k]), *_ratio(v, s, counts[k]))
        for k, (v, s) in enumerate(zip(binned_variances.sum(0), binned_signals.sum(0), strict=True))
    )
    draws = len(paths.t)
    variance, noise_scale = _ratio(variances.sum(), signals.sum(), draws)
    return GradientVariance(
        variance=float(variance or 0.0),
        noise_scale=noise_scale,
        mean_square=number(signals.sum()) if signals.sum() > 0 else None,
        draws=draws,
        parameters=sum(sizes),
        by_time=by_time,
        by_layer=_layers(parameter_names(params), sizes, Spread(variances, signals, draws)),
    )


class Spread(NamedTuple):
    """Of each leaf variance and |E g|^2, and the draws that they are from."""

    variances: np.ndarray
    signals: np.ndarray
    draws: int


def _layers(names: list[str], sizes: list[int], found: Spread) -> tuple[Layer, ...]:
    """Leaves that share all but the last part of their name, together."""
    members: dict[str, list[int]] = {}
    for k, name in enumerate(names):
        members.setdefault(name.rpartition(".")[0] or name, []).append(k)
    return tuple(
        Layer(
            name,
            sum(sizes[k] for k in rows),
            *_ratio(found.variances[rows].sum(), found.signals[rows].sum(), found.draws),  # type: ignore[arg-type]
        )
        for name, rows in members.items()
    )


def _ratio(variance: Any, signal: Any, draws: Any) -> tuple[float | None, float | None]:
    """Variance and noise scale; the latter None where |E g|^2 is not resolved.

    n draws add variance / n to |mean of g|^2. An |E g|^2 below that is lost in it: noise scales from n on are not told.
    """
    return number(variance), number(variance / signal) if signal * draws > variance else None


class Sums(NamedTuple):
    """Weight, and of each leaf m2 and |mean|^2: [], [leaves], [leaves], or with a last axis of groups."""

    weight: Array
    m2: Array
    square: Array


def _by_leaf(sums: Sums) -> tuple[np.ndarray, np.ndarray]:
    """Unbiased variance and |E g|^2 of each leaf, float64 [leaves] or [leaves, groups]; nan for fewer than 2 draws."""
    weight = np.asarray(sums.weight, np.float64)
    variances = np.asarray(sums.m2, np.float64) / np.where(weight > 1, weight - 1, np.nan)
    return variances, np.asarray(sums.square, np.float64) - variances / np.maximum(weight, 1)


def _with(params: Params, values: list[Array]) -> Params:
    """The params with other floating-point arrays."""
    leaves, structure = jax.tree.flatten(params)
    given = iter(values)
    return jax.tree.unflatten(structure, [next(given) if is_parameter(leaf) else leaf for leaf in leaves])


def _loss(field: Field, values: list[Array], example: PathSample) -> Array:
    """The squared error of one example, as a function of the parameters that are differentiated."""
    function, params = field.parts()

    def velocity(values: list[Array], t: Scalar, x: Array) -> Array:
        return function(_with(params, values), t, x).astype(x.dtype)

    return squared_error(velocity)(values, example)


def _sums(field: Field, paths: PathSample, by: Array, *, bins: int) -> tuple[Sums, Sums]:
    """Of all draws, and by bin; two of them are verified."""
    values = [leaf for leaf in jax.tree.leaves(field.parts()[1]) if is_parameter(leaf)]
    chunk = min(AT_ONCE, len(paths.t))
    loss = Partial(_loss, field)
    binned = gradients.gradient_moments(loss, values, paths, by=by, groups=bins, chunk=chunk, verify=VERIFIED)
    return _summed(binned)


@jax.jit
def _summed(binned: GradientMoments) -> tuple[Sums, Sums]:
    return _sums_of(gradients.merge_groups(binned)), _sums_of(binned)


def _sums_of(moments: GradientMoments) -> Sums:
    lead = jnp.ndim(moments.weight)
    widest = jnp.result_type(*(m2.dtype for m2 in moments.m2))
    squares = [jnp.sum(mean.astype(widest) ** 2, tuple(range(lead, mean.ndim))) for mean in moments.mean]
    return Sums(moments.weight, jnp.stack([m2.astype(widest) for m2 in moments.m2]), jnp.stack(squares))
