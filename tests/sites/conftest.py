"""What the tests of `fvjax.sites` share: the comparison of a loss with a loop over `jax.grad`, as one fixture."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np
import pytest

from fvjax import sites

Agreement = Callable[..., dict[str, str]]
# The models are tiny, so compiling takes all the time; XLA's optimization of them would triple it.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
NAMES = ("squared norms", "mean of square_norms", "mean", "mean beside the trace", "m2", "trace of m2")


def cast(tree: Any, dtype: Any) -> Any:
    """The tree with its floating-point leaves in another dtype; integers and PRNG keys stay."""

    def one(x: Any) -> Any:
        return np.asarray(x).astype(dtype) if jax.dtypes.issubdtype(x.dtype, np.floating) else x

    return jax.tree.map(one, tree)


def run_quickly(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function under jit, compiled without optimization."""
    return jax.jit(function).lower(*arguments).compile(QUICK)(*arguments)


def gradients(loss: Any, params: Any, batch: Any) -> list[np.ndarray]:
    """`jax.grad` of one example after the other in the dtype of the arguments, its leaves [n, ...] in float64."""
    rows = [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(len(jax.tree.leaves(batch)[0]))]
    gradient = jax.jit(jax.grad(loss)).lower(params, rows[0]).compile(QUICK)
    each = [jax.tree.leaves(gradient(params, row)) for row in rows]
    return [np.stack([np.asarray(g).astype(np.float64) for g in leaf]) for leaf in zip(*each, strict=True)]


def expected(each: list[np.ndarray]) -> list[tuple[np.ndarray, ...]]:
    """What the sites must find, for every leaf, in the order of NAMES."""
    found = []
    for g in each:
        flat = g.reshape(len(g), -1)
        mean, m2 = np.mean(g, 0), len(g) * np.var(g, 0)
        found.append((np.sum(flat**2, 1), mean, mean, mean, m2, np.sum(m2)))
    return found


def measured(loss: Any, params: Any, batch: Any) -> tuple[list[tuple[Any, ...]], sites.SquareNorms]:
    """The same by `fvjax.sites`, in one compilation."""

    def measure(params: Any, batch: Any) -> tuple[Any, ...]:
        norms = sites.square_norms(loss, params, batch, by_leaf=True)
        return norms, *(sites.moments(loss, params, batch, elementwise=e) for e in (True, False))

    norms, each, trace = run_quickly(measure, params, batch)
    parts = norms.by_leaf, norms.mean, each.mean, trace.mean, each.m2, trace.m2
    return list(zip(*map(jax.tree.leaves, parts), strict=True)), norms


def errors(found: list[tuple[Any, ...]], reference: list[np.ndarray]) -> dict[str, float]:
    """The largest error over all leaves, relative to the largest norm of a gradient of any leaf, or to its square.

    Some gradients, such as those of the biases of attention keys, are zero up to rounding: no scale is theirs.
    """
    right = expected(reference)
    squares = max((np.max(leaf[0], initial=0) for leaf in right), default=0) or 1.0
    scales = squares, *(3 * [np.sqrt(squares)]), squares, squares
    worst = dict.fromkeys(NAMES, 0.0)
    for leaf, own in zip(found, right, strict=True):
        for name, value, other, scale in zip(NAMES, leaf, own, scales, strict=True):
            assert np.shape(value) == np.shape(other), name
            assert np.isrealobj(value), f"{name} is complex"
            gap = np.abs(np.asarray(value).astype(np.float64) - other)
            # Not `max`, which drops a nan: max(0.0, nan) is 0.0.
            worst[name] = float(np.maximum(worst[name], np.max(gap, initial=0) / scale))
    return worst


@pytest.fixture(scope="session")
def agree() -> Agreement:
    """A function that compares the sites of a loss with a loop over `jax.grad` and returns the paths by name.

    `bits` is the precision of the sites. The reference is in float64, of the same numbers, or `as_given` like the
    sites: in the dtypes of the arguments, which are then cast nowhere.
    """
    references: dict[tuple[str, bool], list[np.ndarray]] = {}

    def compare(
        name: str,
        case: tuple[Any, Any, Any],
        *,
        bits: int,
        slow: bool = False,
        tolerance: float | None = None,
        as_given: bool = False,
    ) -> dict[str, str]:
        loss, given, wide = case[0], case[1:], cast(case[1:], np.float64)
        if (name, as_given) not in references:
            with jax.enable_x64(bits == 64 or not as_given):
                references[name, as_given] = gradients(loss, *(given if as_given else wide))
        warned = pytest.warns(sites.SlowPathWarning) if slow else nullcontext()
        with jax.enable_x64(bits == 64), warned:
            found, norms = measured(loss, *(wide if bits == 64 and not as_given else given))
        gaps = errors(found, references[name, as_given])
        limit = tolerance or {64: 1e-11, 32: 1e-5}[bits]
        assert all(np.isfinite(gap) and gap <= limit for gap in gaps.values()), (gaps, limit)
        return dict(norms.paths)

    return compare


@pytest.fixture(scope="session")
def quickly() -> Callable[..., Any]:
    """A function that runs another under jit, compiled without optimization."""
    return run_quickly
