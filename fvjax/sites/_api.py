"""The public functions of `fvjax.sites`: checks, chunks, devices, and the way back from targets to the params."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _moments, _validate
from fvjax.sites import _engine
from fvjax.sites._plan import Plan, make_plan
from fvjax.sites._program import trace
from fvjax.types import Array, ExampleLoss, GradientMoments, Params


class SlowPathWarning(UserWarning):
    """Part of a model is differentiated as slowly as by `vmap(grad)`; the result is right."""


@jax.tree_util.register_static
class Paths(tuple[tuple[str, str], ...]):
    """(name, rule) of every leaf of the params, in their order: how its gradient was formed.

    It holds no array, so it passes through `jit` as it is. `dict(paths)` looks a rule up by name.
    """

    __slots__ = ()


class SquareNorms(NamedTuple):
    """Losses [n], their mean gradient (like the params), |g_i|^2 [n], the same by leaf if asked for, and the paths."""

    losses: Array
    mean: Params
    square_norms: Array
    by_leaf: Params | None
    paths: Paths


def square_norms(
    loss: ExampleLoss,
    params: Params,
    batch: Any,
    *,
    by_leaf: bool = False,
    weights: Array | None = None,
    chunk: int | None = None,
) -> SquareNorms:
    """The loss and squared gradient norm |g_i|^2 of every example, and the mean gradient, sum_i w_i g_i / sum_i w_i.

    Call it inside `jax.jit`: outside, every call traces the loss again and runs it equation by equation.

    Args:
        loss: (params, example) -> real scalar for ONE example: any function that `jax.grad` differentiates.
        params: pytree of floating-point arrays.
        batch: pytree of examples with leading axis n, on one device.
        by_leaf: whether to give the squared norms of each leaf, too.
        weights: [n], >= 0, for the mean gradient; None means 1 each. An example of weight 0 (padding) is left out of
            the mean, even if its gradient is nan; losses and norms are not weighted.
        chunk: examples that are differentiated at once; None means all. Any n works, the last chunk may be ragged.

    Returns:
        SquareNorms, at least float32: the losses, the mean gradient, the squared norms [n], by leaf (a pytree like the
        params of [n] each) or None, and the path of every leaf.

    Raises:
        ValueError: if shapes disagree, the params are not floating point, the loss is not a real scalar, a concrete
            weight is negative, `chunk` is not an integer >= 1, or the batch is split over devices outside `pmap`.

    Source: docs/theory.md, section 7.
    """
    n, plan, paths = _prepared(loss, params, batch, separate=False)
    weights, _ = _checked_options(n, weights, chunk=chunk)
    leaves, structure = _flat(params)

    def of_chunk(batch: Any, weights: Array | None) -> tuple[Array, list[Array], list[Array]]:
        passed = _engine.backward(plan, leaves, jax.tree.leaves(batch))
        found: dict[int, tuple[Array, Array]] = {}
        for cluster in plan.clusters:
            found |= zip(cluster.targets, _engine.cluster_norms(plan, cluster, passed, weights), strict=True)
        means, norms = _by_leaf(plan, leaves, found, nothing=lambda dtype: jnp.zeros(len(passed.losses), dtype))
        return passed.losses.astype(_moments.accumulation_dtype(passed.losses)), means, norms

    if chunk is None or chunk >= n:
        losses, means, norms = of_chunk(batch, weights)
    else:
        losses, means, norms = _norms_in_chunks(of_chunk, batch, weights, chunk=chunk)
    widest = np.result_type(np.float32, *(x.dtype for x in norms))
    total = sum((x.astype(widest) for x in norms), jnp.zeros(n, widest))
    tree = jax.tree.unflatten(structure, norms) if by_leaf else None
    return SquareNorms(losses, jax.tree.unflatten(structure, means), total, tree, paths)


def moments(
    loss: ExampleLoss,
    params: Params,
    batch: Any,
    *,
    elementwise: bool = False,
    weights: Array | None = None,
    by: Array | None = None,
    groups: int | None = None,
    chunk: int | None = None,
    axis_name: str | None = None,
) -> GradientMoments:
    """Weighted moments of the per-example gradients: total variance for the price of about one gradient.

    Call it inside `jax.jit`: outside, every call traces the loss again and runs it equation by equation.

    Args:
        loss: (params, example) -> real scalar for ONE example: any function that `jax.grad` differentiates.
        params: pytree of floating-point arrays.
        batch: pytree of examples with leading axis n, on one device.
        elementwise: whether `m2` holds every coordinate (as `elementwise_variance` needs it) or its trace, one number
            a leaf. The trace is cheaper.
        weights: [n], >= 0 (quadrature weights, importance weights); None means 1 each. An example of weight 0 (padding)
            is ignored, even if its gradient is nan.
        by: group of every example, integers in [0, groups), [n] (time bins, pairs, ...); entries outside are dropped.
        groups: number of groups; None means the largest entry of `by`, which must not be traced then, plus 1.
        chunk: examples that are differentiated at once; None means all. Any n works, the last chunk may be ragged.
        axis_name: name of the surrounding `pmap` axis over which the moments are merged.

    Returns:
        GradientMoments, with a leading axis `groups` if `by` is given. In float32 the variance is right to about 1e-5
        of itself, plus the rounding of gradients, some 1e-13 of the squared mean.

    Raises:
        ValueError: if shapes disagree, the params are not floating point, the loss is not a real scalar, `by` is not
            integer, a concrete weight is negative, `chunk` or `groups` is not an integer >= 1, or the batch is split
            over devices outside `pmap`.

    Source: docs/theory.md, section 7.
    """
    n, plan, _ = _prepared(loss, params, batch, separate=True)
    groups = _number_of_groups(by, groups)
    weights, by = _checked_options(n, weights, by, groups, chunk=chunk)
    leaves, structure = _flat(params)
    lead = () if groups is None else (groups,)

    def of_chunk(piece: tuple[Any, Array | None, Array | None]) -> GradientMoments:
        examples, weights, by = piece
        passed = _engine.backward(plan, leaves, jax.tree.leaves(examples))
        weighting = _engine.Weighting(weights, by, groups)
        found: dict[int, tuple[Array, Array]] = {}
        for cluster in plan.clusters:
            parts = _engine.cluster_moments(plan, cluster, passed, weighting, trace=not elementwise)
            found |= zip(cluster.targets, parts, strict=True)
        no_trace = None if elementwise else lambda dtype: jnp.zeros(lead, dtype)
        means, m2 = _by_leaf(plan, leaves, found, lead=lead, nothing=no_trace)
        means = _engine.with_common_part(plan, passed, weighting, means)
        trees = (jax.tree.unflatten(structure, x) for x in (means, m2))
        return GradientMoments(weighting.totals(len(passed.losses)), *trees)

    if chunk is None or chunk >= n:
        found = of_chunk((batch, weights, by))
    else:
        found = _moments.merge_chunks(of_chunk, _moments.in_chunks(batch, _ones(weights, n), by, chunk))
    return found if axis_name is None else _moments.merge_devices(found, axis_name)


def paths(loss: ExampleLoss, params: Params, batch: Any) -> Paths:
    """The rule by which the gradient of every leaf is formed; nothing is computed.

    Args:
        loss: as in `moments`.
        params: as in `moments`.
        batch: as in `moments`.

    Returns:
        (name, rule) of every leaf, for instance ("['dense']['bias']", "vjp of add").

    Raises:
        ValueError: as `moments` does of these arguments.
    """
    return _prepared(loss, params, batch, separate=True)[2]


def _prepared(loss: ExampleLoss, params: Params, batch: Any, *, separate: bool) -> tuple[int, Plan, Paths]:
    for leaf in jax.tree.leaves(params):
        _validate.floating("params", leaf)
    _validate.on_one_device("batch", batch)
    n = _validate.batch("batch", batch)
    avals = jax.eval_shape(lambda batch: batch, batch)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), avals)
    plan = make_plan(trace(loss, params, example), separate=separate)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    _warn_of_slow_paths(plan, names)
    return n, plan, Paths(zip(names, (_path(plan, leaf) for leaf in plan.program.leaves), strict=True))


def _path(plan: Plan, leaf: int) -> str:
    found = [c.path for c in plan.clusters if leaf in c.targets or set(plan.roots_of.get(leaf, ())) & set(c.roots)]
    if plan.common is not None and leaf in plan.common.targets:
        found.append("a part that all examples share")
    return " + ".join(dict.fromkeys(found)) or "unused"


def _warn_of_slow_paths(plan: Plan, names: Sequence[str]) -> None:
    for cluster in filter(plan.is_slow, plan.clusters):
        slow = [name for name, leaf in zip(names, plan.program.leaves, strict=True) if leaf in plan.leaves_of(cluster)]
        shown = ", ".join(slow[:3]) + (", ..." if len(slow) > 3 else "")
        warnings.warn(
            f"the gradients of {len(slow)} of {len(names)} leaves of params ({shown}) are formed example by example"
            f" ({cluster.path}), as slowly as by vmap(grad); see docs/theory.md, section 7",
            SlowPathWarning,
            stacklevel=4,
        )


def _flat(params: Params) -> tuple[list[Array], Any]:
    leaves, structure = jax.tree.flatten(params)
    return [jnp.asarray(leaf) for leaf in leaves], structure


def _number_of_groups(by: Array | None, groups: int | None) -> int | None:
    if by is None:
        if groups is not None:
            raise ValueError(f"groups must be given with by only, got groups={groups}")
        return None
    if groups is not None:
        return groups
    if not _validate.is_concrete(by):
        raise ValueError(f"groups must be given where by is traced, got by={by}")
    return int(np.max(np.asarray(by), initial=0)) + 1


def _checked_options(
    n: int, weights: Array | None, by: Array | None = None, groups: int | None = None, *, chunk: int | None
) -> tuple[Array | None, Array | None]:
    if chunk is not None:
        _validate.positive_integer("chunk", chunk)
    if by is not None:
        _validate.positive_integer("groups", groups)
        _validate.shape("by", by, (n,))
        by = jnp.asarray(by)
        _validate.integers("by", by)
    if weights is not None:
        _validate.shape("weights", weights, (n,))
        _validate.nonnegative("weights", weights)
        weights = jnp.asarray(weights, _validate.common_dtype(weights))
    return weights, by


def _ones(weights: Array | None, n: int) -> Array:
    return jnp.ones(n) if weights is None else weights


def _norms_in_chunks(
    of_chunk: Callable[[Any, Array], tuple[Array, list[Array], list[Array]]],
    batch: Any,
    weights: Array | None,
    *,
    chunk: int,
) -> tuple[Array, list[Array], list[Array]]:
    n = len(jax.tree.leaves(batch)[0])
    pieces, piece_weights, _ = _moments.in_chunks(batch, _ones(weights, n), None, chunk)

    def body(sums: list[Array], piece: tuple[Any, Array]) -> tuple[list[Array], tuple[Array, list[Array]]]:
        losses, means, norms = of_chunk(*piece)
        weight = jnp.sum(piece[1])
        return [s + weight.astype(m.dtype) * m for s, m in zip(sums, means, strict=True)], (losses, norms)

    _, shapes, _ = jax.eval_shape(of_chunk, *jax.tree.map(lambda x: x[0], (pieces, piece_weights)))
    empty = [jnp.zeros(s.shape, s.dtype) for s in shapes]
    sums, (losses, norms) = jax.lax.scan(body, empty, (pieces, piece_weights))
    total = _moments.divisor(jnp.sum(piece_weights))
    means = [s / total.astype(s.dtype) for s in sums]
    return losses.reshape(-1)[:n], means, [x.reshape(-1)[:n] for x in norms]


def _by_leaf(
    plan: Plan,
    leaves: Sequence[Array],
    found: dict[int, tuple[Array, Array]],
    *,
    lead: tuple[int, ...] = (),
    nothing: Callable[[Any], Array] | None,
) -> tuple[list[Array], list[Array]]:
    """Means and second quantities of every leaf, from those of the targets.

    Second quantities are numbers, which add up; or, if `nothing` is None, arrays like the leaf, which are laid out like
    the means. `nothing` makes the number of a leaf that is not used.
    """
    results = []
    for leaf, value in zip(plan.program.leaves, leaves, strict=True):
        roots = plan.roots_of.get(leaf, ())
        dtype = _moments.accumulation_dtype(value)
        if leaf in found and not roots:
            results.append(found[leaf])
        elif roots:
            means, seconds = zip(*(found[root] for root in roots), strict=True)
            together = _gathered(plan, leaf, jnp.zeros(value.shape, dtype), len(lead))
            second = together(seconds) if nothing is None else sum(seconds[1:], seconds[0])
            results.append((together(means), second))
        else:
            zeros = jnp.zeros((*lead, *value.shape), dtype)
            results.append((zeros, zeros if nothing is None else nothing(dtype)))
    return [mean for mean, _ in results], [second for _, second in results]


def _gathered(plan: Plan, leaf: int, zeros: Array, lead: int) -> Callable[[Sequence[Array]], Array]:
    """From arrays like the roots of a leaf, [*groups, *root], to one like the leaf."""
    if plan.roots_of[leaf] == (leaf,):
        return lambda parts: parts[0]
    _, pull = jax.vjp(lambda value: plan.spread(leaf, value), zeros)

    def gather(parts: Sequence[Array]) -> Array:
        return pull([p.astype(zeros.dtype) for p in parts])[0]

    return jax.vmap(gather) if lead else gather
