"""What the tests of `fvjax.sites` share: the comparison of a loss with `vmap(grad)`, leaf by leaf, as one fixture."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np
import pytest

from fvjax import sites

Agreement = Callable[..., dict[str, str]]
# The models are tiny, so compiling takes all the time; XLA's optimization of them would double it.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
NAMES = ("squared norms", "mean of square_norms", "mean", "m2", "trace of m2")


def cast(tree: Any, dtype: Any) -> Any:
    """The tree with its floating-point leaves in another dtype; integers and PRNG keys stay."""

    def one(x: Any) -> Any:
        return np.asarray(x).astype(dtype) if jax.dtypes.issubdtype(x.dtype, np.floating) else x

    return jax.tree.map(one, tree)


def gradients(loss: Any, params: Any, batch: Any) -> list[np.ndarray]:
    """`vmap(grad)` in the dtype of the arguments, its leaves [n, ...] in float64."""
    each = jax.jit(jax.vmap(jax.grad(loss), (None, 0)), compiler_options=QUICK)(params, batch)
    return [np.asarray(g).astype(np.float64) for g in jax.tree.leaves(each)]


def expected(each: list[np.ndarray]) -> list[tuple[np.ndarray, ...]]:
    """What the sites must find, for every leaf, in the order of NAMES."""
    found = []
    for g in each:
        flat = g.reshape(len(g), -1)
        m2 = len(g) * np.var(g, 0)
        found.append((np.sum(flat**2, 1), np.mean(g, 0), np.mean(g, 0), m2, np.sum(m2)))
    return found


def measured(loss: Any, params: Any, batch: Any) -> tuple[list[tuple[Any, ...]], sites.SquareNorms]:
    """The same by `fvjax.sites`, in one compilation."""

    @jax.jit
    def measure(params: Any, batch: Any) -> tuple[Any, ...]:
        norms = sites.square_norms(loss, params, batch, by_leaf=True)
        return norms, *(sites.moments(loss, params, batch, elementwise=e) for e in (True, False))

    norms, each, trace = measure.lower(params, batch).compile(QUICK)(params, batch)
    parts = norms.by_leaf, norms.mean, each.mean, each.m2, trace.m2
    for means in (each.mean, trace.mean):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), norms.mean, means)
    return list(zip(*map(jax.tree.leaves, parts), strict=True)), norms


def errors(found: list[tuple[Any, ...]], reference: list[np.ndarray]) -> dict[str, float]:
    """The largest error over all leaves, relative to the largest norm of a gradient of any leaf, or to its square.

    Some gradients, such as those of the biases of attention keys, are zero up to rounding: no scale is theirs.
    """
    right = expected(reference)
    squares = max((np.max(leaf[0], initial=0) for leaf in right), default=0) or 1.0
    scales = squares, np.sqrt(squares), np.sqrt(squares), squares, squares
    worst = dict.fromkeys(NAMES, 0.0)
    for leaf, own in zip(found, right, strict=True):
        for name, value, other, scale in zip(NAMES, leaf, own, scales, strict=True):
            assert np.shape(value) == np.shape(other), name
            assert np.isrealobj(value), f"{name} is complex"
            gap = np.abs(np.asarray(value).astype(np.float64) - other)
            worst[name] = max(worst[name], float(np.max(gap, initial=0)) / scale)
    return worst


@pytest.fixture(scope="session")
def agree() -> Agreement:
    """A function that compares the sites of a loss with `vmap(grad)` in float64, and returns the paths by name."""
    references: dict[str, list[np.ndarray]] = {}

    def reference(name: str, case: tuple[Any, Any, Any]) -> list[np.ndarray]:
        if name not in references:
            with jax.enable_x64(True):
                references[name] = gradients(case[0], *cast(case[1:], np.float64))
        return references[name]

    def compare(
        name: str, case: tuple[Any, Any, Any], *, bits: int = 64, slow: bool = False, tolerance: float | None = None
    ) -> dict[str, str]:
        right = reference(name, case)
        given = case[1:] if bits < 64 else cast(case[1:], np.float64)
        with jax.enable_x64(bits == 64):
            with pytest.warns(sites.SlowPathWarning) if slow else nullcontext():
                found, norms = measured(case[0], *given)
        tolerance = tolerance or {64: 1e-11, 32: 1e-5}[bits]
        gaps = errors(found, right)
        assert all(np.isfinite(gap) and gap <= tolerance for gap in gaps.values()), (gaps, tolerance)
        return dict(norms.paths)

    return compare
