"""The public functions of `fvjax.sites`: checks, chunks, devices, and the way back from targets to the params."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from fvjax import _moments, _validate
from fvjax.sites import _engine
from fvjax.sites._plan import Plan, make_plan
from fvjax.sites._program import trace
from fvjax.types import Array, ExampleLoss, GradientMoments, Params


class SlowPathWarning(UserWarning):
    """Part of a model is differentiated example by example, which costs more than a gradient; the result is right."""


class DisagreementError(RuntimeError):
    """Gradients that were to be verified are not those of `vmap(grad)`."""


class DisagreementWarning(UserWarning):
    """Gradients that were to be verified inside `jit` are not those of `vmap(grad)`; all that was returned is nan."""


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
    verify: int = 0,
) -> SquareNorms:
    """The loss and squared gradient norm |g_i|^2 of every example, and the mean gradient, sum_i w_i g_i / sum_i w_i.

    Outside `jax.jit` it is compiled here, at every call; a loss that is a `jax.tree_util.Partial` once, as by `jit`.
    Only what is quick is compiled: the way without cancellation follows if digits were lost.

    Args:
        loss: (params, example) -> real scalar for ONE example: any function that `jax.grad` differentiates.
        params: pytree of floating-point arrays.
        batch: pytree of examples with leading axis n, on one device.
        by_leaf: whether to give the squared norms of each leaf, too.
        weights: [n], >= 0, for the mean gradient; None means 1 each. An example of weight 0 (padding) is left out of
            the mean, even if its gradient is nan; losses and norms are not weighted.
        chunk: examples that are differentiated at once; None means all. Any n works, the last chunk may be ragged.
        verify: number of examples of which the gradients are compared with those of `vmap(grad)`, leaf by leaf, to the
            third root of the rounding error (5e-3 in float32); 0 means none. It costs another compilation.

    Returns:
        SquareNorms, at least float32: the losses, the mean gradient, the squared norms [n], by leaf (a pytree like the
        params of [n] each) or None, and the path of every leaf.

    Raises:
        ValueError: if shapes disagree, the params are not floating point, the loss is not a real scalar, a concrete
            weight is negative, `chunk` is not an integer >= 1, or the batch is split over devices outside `pmap`.
        DisagreementError: if verified gradients disagree. Under `jit` all is nan then, with a DisagreementWarning.

    Source: docs/theory.md, section 7.
    """
    n = _checked(params, batch)
    weights, _ = _checked_options(n, weights, chunk=chunk)
    options = (("by_leaf", by_leaf), ("chunk", chunk))
    found = _called(_square_norms, loss, options, (params, batch, weights))
    return _verified(found, loss, params, batch, rows=_verified_rows(n, verify), separate=False)


def _square_norms(
    loss: ExampleLoss, arrays: tuple[Any, ...], *, by_leaf: bool, chunk: int | None, guarded: bool
) -> tuple[SquareNorms, Array, "Notes"]:
    params, batch, weights = arrays
    n, plan, paths, notes = _planned(loss, params, batch, separate=False)
    leaves, structure = _flat(params)

    def of_chunk(batch: Any, weights: Array | None) -> tuple[Array, list[Array], list[Array], Array]:
        passed = _engine.backward(plan, leaves, jax.tree.leaves(batch))
        found, sound = _engine.norms(plan, passed, weights, guarded=guarded)
        means, norms = _by_leaf(plan, leaves, found, nothing=lambda dtype: jnp.zeros(len(passed.losses), dtype))
        return passed.losses.astype(_moments.accumulation_dtype(passed.losses)), means, norms, sound

    if chunk is None or chunk >= n:
        losses, means, norms, sound = of_chunk(batch, weights)
    else:
        losses, means, norms, sound = _norms_in_chunks(of_chunk, batch, weights, chunk=chunk)
    widest = np.result_type(np.float32, *(x.dtype for x in norms))
    total = sum((x.astype(widest) for x in norms), jnp.zeros(n, widest))
    tree = jax.tree.unflatten(structure, norms) if by_leaf else None
    return SquareNorms(losses, jax.tree.unflatten(structure, means), total, tree, paths), sound, notes


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
    verify: int = 0,
) -> GradientMoments:
    """Weighted moments of the per-example gradients: total variance for the price of about one gradient.

    Outside `jax.jit` it is compiled here, at every call; a loss that is a `jax.tree_util.Partial` once, as by `jit`.
    Only what is quick is compiled: the way without cancellation follows if digits were lost.

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
        verify: number of examples of which the gradients are compared with those of `vmap(grad)`, leaf by leaf, to the
            third root of the rounding error (5e-3 in float32); 0 means none. It costs another compilation.

    Returns:
        GradientMoments, with a leading axis `groups` if `by` is given. In float32 the variance is right to about 1e-5
        of itself, plus the rounding of gradients, some 1e-13 of the squared mean.

    Raises:
        ValueError: if shapes disagree, the params are not floating point, the loss is not a real scalar, `by` is not
            integer, a concrete weight is negative, `chunk` or `groups` is not an integer >= 1, or the batch is split
            over devices outside `pmap`.
        DisagreementError: if verified gradients disagree. Under `jit` all is nan then, with a DisagreementWarning.

    Source: docs/theory.md, section 7.
    """
    n = _checked(params, batch)
    groups = _number_of_groups(by, groups)
    weights, by = _checked_options(n, weights, by, groups, chunk=chunk)
    options = (("elementwise", elementwise), ("groups", groups), ("chunk", chunk))
    found = _called(_moments_of_loss, loss, options, (params, batch, weights, by))
    found = _verified(found, loss, params, batch, rows=_verified_rows(n, verify), separate=True)
    return found if axis_name is None else _moments.merge_devices(found, axis_name)


def _moments_of_loss(
    loss: ExampleLoss,
    arrays: tuple[Any, ...],
    *,
    elementwise: bool,
    groups: int | None,
    chunk: int | None,
    guarded: bool,
) -> tuple[GradientMoments, Array, "Notes"]:
    params, batch, weights, by = arrays
    n, plan, _, notes = _planned(loss, params, batch, separate=True, elementwise=elementwise)
    leaves, structure = _flat(params)
    lead = () if groups is None else (groups,)

    def of_chunk(piece: tuple[Any, Array | None, Array | None]) -> tuple[GradientMoments, Array]:
        examples, weights, by = piece
        passed = _engine.backward(plan, leaves, jax.tree.leaves(examples))
        weighting = _moments.Weighting(weights, by, groups)
        found, sound = _engine.moments(plan, passed, weighting, trace=not elementwise, guarded=guarded)
        no_trace = None if elementwise else lambda dtype: jnp.zeros(lead, dtype)
        means, m2 = _by_leaf(plan, leaves, found, lead=lead, nothing=no_trace)
        means = _engine.with_common_part(plan, passed, weighting, means)
        trees = (jax.tree.unflatten(structure, x) for x in (means, m2))
        return GradientMoments(weighting.totals(len(passed.losses)), *trees), sound

    if chunk is None or chunk >= n:
        found, sound = of_chunk((batch, weights, by))
    else:
        found, sounds = _moments.merge_chunks(of_chunk, _moments.in_chunks(batch, _ones(weights, n), by, chunk))
        sound = jnp.all(sounds)
    return found, sound, notes


def moments_and_flag(
    loss: ExampleLoss,
    params: Params,
    batch: Any,
    *,
    guarded: bool,
    elementwise: bool = False,
    weights: Array | None = None,
    chunk: int | None = None,
) -> tuple[GradientMoments, Array]:
    """Moments inside the `jit` of a caller who can look at a flag before using them: see `with_care`.

    Args:
        loss: as in `moments`.
        params: as in `moments`.
        batch: as in `moments`.
        guarded: False takes the quick way alone, which compiles to a third, and says whether it lost digits.
        elementwise: as in `moments`.
        weights: as in `moments`.
        chunk: as in `moments`.

    Returns:
        The moments, and a boolean []: whether they are as precise as those of `moments`, which they are if `guarded`.

    Raises:
        ValueError: as `moments` does.
    """
    n = _checked(params, batch)
    weights, _ = _checked_options(n, weights, chunk=chunk)
    options: dict[str, Any] = {"elementwise": elementwise, "groups": None, "chunk": chunk}
    found, sound, notes = _moments_of_loss(loss, (params, batch, weights, None), guarded=guarded, **options)
    _warn(notes, depth=1)
    return found, sound


def with_care(function: Callable[..., tuple[Any, Array]]) -> Callable[..., Any]:
    """The first result of a function that also returns a flag, and is called again if that says that digits were lost.

    Args:
        function: takes a keyword `guarded` for `moments_and_flag`; usually jitted, with `guarded` static.

    Returns:
        A function without that keyword: not `guarded` at first, and `guarded` if the flag is false, or traced.
    """

    @functools.wraps(function)
    def called(*arguments: Any, **options: Any) -> Any:
        if not _is_traced((arguments, options)):
            result, sound = function(*arguments, **options, guarded=False)
            if not _is_traced(sound) and sound:
                return result
        return function(*arguments, **options, guarded=True)[0]

    return called


def verify(loss: ExampleLoss, params: Params, batch: Any, *, examples: int = 2) -> None:
    """Compares the gradients of some examples with those of `vmap(grad)`, leaf by leaf, as `moments(verify=)` does.

    Args:
        loss: as in `moments`.
        params: as in `moments`, not traced.
        batch: as in `moments`, not traced.
        examples: how many are compared, from the first to the last.

    Raises:
        DisagreementError: if they disagree; the leaves are named.
        ValueError: as `moments` does of these arguments.
    """
    _verified((), loss, params, batch, rows=_verified_rows(_checked(params, batch), examples), separate=True)


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
    _checked(params, batch)
    _, _, found, notes = _planned(loss, params, batch, separate=True)
    _warn(notes, depth=1)
    return found


@jax.tree_util.register_static
class Notes(tuple[str, ...]):
    """What is to be said of the paths, each time: it passes through `jit` as it is."""

    __slots__ = ()


def _called(function: Callable[..., Any], loss: ExampleLoss, options: tuple[Any, ...], arrays: tuple[Any, ...]) -> Any:
    """The first result of a function of the loss and the arrays, compiled here unless the arrays are traced.

    Under `jit` all is decided at run time. Else the quick part is compiled alone, and if it says that digits were lost,
    the rest is compiled and run. A loss that is a `jax.tree_util.Partial` may hold arrays: they are arguments.
    """
    if not _is_traced((loss if isinstance(loss, Partial) else None, arrays)):
        compiled = _compiled(function, loss, options)
        result, sound, notes = compiled(loss, arrays, guarded=False)
        # A loss may hold traced values that the arrays do not show.
        if not _is_traced(sound):
            if not sound:
                with jax.debug_key_reuse(False):  # the same examples once more
                    result, _, notes = compiled(loss, arrays, guarded=True)
            _warn(notes, depth=2)
            return result
    result, _, notes = function(loss, arrays, guarded=True, **dict(options))
    _warn(notes, depth=2)
    return result


def _is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _compiled(function: Callable[..., Any], loss: ExampleLoss, options: tuple[Any, ...]) -> Callable[..., Any]:
    """One program for equal Partials, and a new one for any other loss: it may read what has changed since."""
    if isinstance(loss, Partial):
        return _program(function, options)
    own = jax.jit(functools.partial(function, loss, **dict(options)), static_argnames="guarded")
    return lambda _, arrays, guarded: own(arrays, guarded=guarded)


@functools.lru_cache(maxsize=256)
def _program(function: Callable[..., Any], options: tuple[Any, ...]) -> Callable[..., Any]:
    return jax.jit(functools.partial(function, **dict(options)), static_argnames="guarded")


def _checked(params: Params, batch: Any) -> int:
    """The number of examples."""
    for leaf in jax.tree.leaves(params):
        _validate.floating("params", leaf)
    _validate.on_one_device("batch", batch)
    n = _validate.batch("batch", batch)
    if n < 1:
        raise ValueError("batch must have at least one example, got 0")
    return n


def _planned(
    loss: ExampleLoss, params: Params, batch: Any, *, separate: bool, elementwise: bool = False
) -> tuple[int, Plan, Paths, Notes]:
    avals = jax.eval_shape(lambda batch: batch, batch)
    n = len(jax.tree.leaves(batch)[0])
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), avals)
    plan = make_plan(trace(loss, params, example), separate=separate)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    paths = Paths(zip(names, (_path(plan, leaf) for leaf in plan.program.leaves), strict=True))
    return n, plan, paths, _notes(plan, names, elementwise=elementwise)


def _path(plan: Plan, leaf: int) -> str:
    found = [c.words for c in plan.clusters if leaf in c.targets or set(plan.roots_of.get(leaf, ())) & set(c.roots)]
    if plan.common is not None and leaf in plan.common.targets:
        found.append("a part that all examples share")
    return " + ".join(dict.fromkeys(found)) or "unused"


SLOW = 1.0
"""From this price of a cluster on, in gradients of the loss, a warning says so."""


def _notes(plan: Plan, names: Sequence[str], *, elementwise: bool) -> Notes:
    notes = []
    for cluster in plan.clusters:
        price = plan.price(cluster)
        if price < SLOW or cluster.is_lookup() or cluster.is_product(elementwise=elementwise):
            continue
        slow = [name for name, leaf in zip(names, plan.program.leaves, strict=True) if leaf in plan.leaves_of(cluster)]
        shown = ", ".join(slow[:3]) + (", ..." if len(slow) > 3 else "")
        notes.append(
            f"the gradients of {len(slow)} of {len(names)} leaves of params ({shown}) are formed example by example"
            f" ({cluster.words}), which takes some {price:.2g} times the operations of one gradient;"
            " see docs/theory.md, section 7"
        )
    return Notes(notes)


def _warn(notes: Notes, *, depth: int) -> None:
    """Warns at the caller of a public function, `depth` calls above this one."""
    for note in notes:
        warnings.warn(note, SlowPathWarning, stacklevel=2 + depth)


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
        if by.dtype.itemsize > 4 and groups is not None:  # what lies outside must stay so
            by = jnp.minimum(by, groups) if jnp.issubdtype(by.dtype, jnp.unsignedinteger) else jnp.clip(by, -1, groups)
        by = by.astype(jnp.int32)
    if weights is not None:
        _validate.shape("weights", weights, (n,))
        _validate.nonnegative("weights", weights)
        weights = jnp.asarray(weights, _validate.common_dtype(weights))
    return weights, by


def _ones(weights: Array | None, n: int) -> Array:
    return jnp.ones(n) if weights is None else weights


def _verified_rows(n: int, verify: int) -> np.ndarray:
    """The examples to verify, from the first to the last."""
    if isinstance(verify, bool) or not isinstance(verify, int | np.integer) or verify < 0:
        raise ValueError(f"verify must be an integer >= 0, got {verify}")
    return np.unique(np.linspace(0, n - 1, min(verify, n)).round().astype(int))


def _verified(found: Any, loss: ExampleLoss, params: Params, batch: Any, *, rows: np.ndarray, separate: bool) -> Any:
    """What was found, if the gradients of some examples are those of `vmap(grad)`."""
    if not len(rows):
        return found
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    arrays = params, jax.tree.map(lambda x: x[rows] if isinstance(x, jax.Array) else np.asarray(x)[rows], batch)
    options = (("separate", separate),)
    with jax.debug_key_reuse(False):
        if _is_traced((arrays, found)):
            gaps = _disagreement(loss, arrays, separate=separate, guarded=False)
        else:
            gaps = _compiled(_disagreement, loss, options)(loss, arrays, guarded=False)
    if not _is_traced(gaps):
        if np.any(gaps > 1):
            raise DisagreementError(_message(names, np.asarray(gaps)))
        return found
    right = jnp.all(gaps <= 1)
    report = functools.partial(jax.debug.callback, functools.partial(_report, names))
    jax.lax.cond(right, lambda _: None, report, gaps)
    return jax.tree.map(lambda x: jnp.where(right, x, jnp.nan), found)


def _disagreement(loss: ExampleLoss, arrays: tuple[Any, Any], *, separate: bool, guarded: bool) -> Array:
    """By how much the sites' gradients of each leaf are off, in what rounding allows: above 1 they are wrong.

    Compared are the mean gradient with different weights, in which no example can stand for another, and the sum of
    squares: squared norms, or the trace of m2. That of m2 need not be guarded: it is held against the squares.
    """
    params, batch = arrays
    n, plan, _, _ = _planned(loss, params, batch, separate=separate)
    leaves, _ = _flat(params)
    weights = 1 + jnp.arange(n) / n
    weighting = _moments.Weighting(weights, None, None)
    passed = _engine.backward(plan, leaves, jax.tree.leaves(batch))
    if separate:
        found, _ = _engine.moments(plan, passed, weighting, trace=True, guarded=guarded)
        means, seconds = _by_leaf(plan, leaves, found, nothing=lambda dtype: jnp.zeros((), dtype))
        means = _engine.with_common_part(plan, passed, weighting, means)
    else:
        found, _ = _engine.norms(plan, passed, weights, guarded=guarded)
        means, norms = _by_leaf(plan, leaves, found, nothing=lambda dtype: jnp.zeros(n, dtype))
        seconds = [weighting.total(norm) for norm in norms]
    each = [
        g.astype(_moments.accumulation_dtype(g))
        for g in jax.tree.leaves(jax.vmap(jax.grad(loss), (None, 0))(params, batch))
    ]
    squares = [weighting.total(jnp.sum(g * g, tuple(range(1, g.ndim)))) for g in each]
    exact = _moments.moments_of(each, weights, trace=True)
    bits = min(jnp.finfo(a.dtype).bits for a in plan.program.avals if jnp.issubdtype(a.dtype, jnp.floating))
    rounding = {64: 2.0**-53, 32: 2.0**-24, 16: 2.0**-8}.get(bits, 2.0**-3)
    widest = np.result_type(np.float32, *(x.dtype for x in squares))
    whole = sum((s.astype(widest) for s in squares), jnp.zeros((), widest))
    gaps = []
    for mean, second, true_mean, true_second, square in zip(
        means, seconds, exact.mean, exact.m2 if separate else squares, squares, strict=True
    ):
        # A leaf whose gradient is rounding alone has no scale of its own.
        allowed = rounding ** (2 / 3) * square + (100 * rounding) ** 2 * whole.astype(square.dtype)
        allowed = jnp.maximum(allowed, jnp.finfo(square.dtype).tiny)
        gap_of_means = jnp.sum(weights).astype(square.dtype) * jnp.sum((mean - true_mean) ** 2)
        gap = jnp.maximum(gap_of_means / allowed, jnp.abs(second - true_second) / (allowed / rounding ** (1 / 3)))
        # What is not finite either way cannot be compared.
        gaps.append(jnp.where(jnp.isfinite(square), jnp.where(jnp.isnan(gap), jnp.inf, gap), 0).astype(jnp.float32))
    return jnp.stack(gaps) if gaps else jnp.zeros(0)


def _message(names: Sequence[str], gaps: np.ndarray) -> str:
    wrong = [name or "params" for name, gap in zip(names, gaps, strict=True) if gap > 1]
    return (
        f"the gradients of {', '.join(wrong)} are not those of vmap(grad), so fvjax.sites is wrong for this loss: use"
        " fvjax.per_example_gradients, and please report the loss"
    )


def _report(names: Sequence[str], gaps: np.ndarray) -> None:
    warnings.warn(_message(names, np.asarray(gaps)), DisagreementWarning, stacklevel=1)


def _norms_in_chunks(
    of_chunk: Callable[[Any, Array], tuple[Array, list[Array], list[Array], Array]],
    batch: Any,
    weights: Array | None,
    *,
    chunk: int,
) -> tuple[Array, list[Array], list[Array], Array]:
    n = len(jax.tree.leaves(batch)[0])
    pieces, piece_weights, _ = _moments.in_chunks(batch, _ones(weights, n), None, chunk)

    def body(sums: list[Array], piece: tuple[Any, Array]) -> tuple[list[Array], tuple[Array, list[Array], Array]]:
        losses, means, norms, sound = of_chunk(*piece)
        weight = jnp.sum(piece[1])
        return [s + weight.astype(m.dtype) * m for s, m in zip(sums, means, strict=True)], (losses, norms, sound)

    _, shapes, _, _ = jax.eval_shape(of_chunk, *jax.tree.map(lambda x: x[0], (pieces, piece_weights)))
    empty = [jnp.zeros(s.shape, s.dtype) for s in shapes]
    sums, (losses, norms, sounds) = jax.lax.scan(body, empty, (pieces, piece_weights))
    total = _moments.divisor(jnp.sum(piece_weights))
    means = [s / total.astype(s.dtype) for s in sums]
    return losses.reshape(-1)[:n], means, [x.reshape(-1)[:n] for x in norms], jnp.all(sounds)


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
