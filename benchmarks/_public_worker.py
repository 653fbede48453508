"""One model of a public package, with all that is measured of it: a worker's program (see _worker.py)."""

import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _public_models import MODELS, Model, Problem
from _worker import serve_parts, timed

import fvjax
from fvjax import sites

Array = jax.Array


def spread(loss: Callable[[Any, Any], Array], params: Any, batch: Any) -> tuple[Any, Array]:
    """Mean gradient and total variance by `vmap(grad)`, in two passes.

    The mean as a matrix product: XLA's sum over the first axis takes 50 times as long (docs/sharp_edges.md, 5).
    """
    gradients = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, batch)
    mean = jax.tree.map(lambda g: jnp.tensordot(jnp.full(len(g), 1 / len(g)), g, 1), gradients)
    parts = jax.tree.map(lambda g, m: jnp.sum((g - m) ** 2) / len(g), gradients, mean)
    return mean, jnp.sum(jnp.stack(jax.tree.leaves(parts)))


def functions(loss: Callable[[Any, Any], Array]) -> dict[str, Callable[[Any, Any], Any]]:
    """What is compiled, by the name of its column."""

    def plain(params: Any, batch: Any) -> Any:
        return jax.value_and_grad(lambda p: jnp.mean(jax.vmap(loss, in_axes=(None, 0))(p, batch)))(params)

    return {
        "plain": plain,
        "trace": partial(sites.moments, loss),
        "norms": partial(sites.square_norms, loss),
        "vmap_grad": partial(spread, loss),
    }


def wide(tree: Any) -> Any:
    """The tree in float64; integers and PRNG keys stay."""
    return jax.tree.map(lambda x: jnp.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def one_by_one(loss: Callable[[Any, Any], Array], params: Any, batch: Any) -> Iterator[np.ndarray]:
    """`jax.grad` of one example after the other: all leaves as one float64 vector."""
    gradient = jax.jit(jax.grad(loss))
    for index in range(len(jax.tree.leaves(batch)[0])):
        found = gradient(params, jax.tree.map(lambda x, index=index: x[index], batch))
        yield np.concatenate([np.ravel(np.asarray(g)).astype(np.float64) for g in jax.tree.leaves(found)])


def reference(model: Model, problem: Problem) -> tuple[np.ndarray, float]:
    """|g_i|^2 [n] and the total variance, in float64 unless the model is to be compared as given."""
    with jax.enable_x64(not model.as_given):
        arguments = (problem.params, problem.batch) if model.as_given else wide((problem.params, problem.batch))
        squares, m2, mean = [], 0.0, np.zeros(())
        for count, gradient in enumerate(one_by_one(problem.loss, *arguments), 1):
            squares.append(float(gradient @ gradient))
            difference = gradient - mean
            mean = mean + difference / count
            m2 += float(difference @ (gradient - mean))
    return np.asarray(squares), m2 / len(squares)


def build(name: str, settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[str], float]]:
    """Compiles all functions of a model, and checks what they give."""
    model = MODELS[name]
    problem = model.build(settings["real"])
    params, batch = jax.tree.map(jnp.asarray, (problem.params, problem.batch))
    made = functions(problem.loss)
    # What a model's own jitted functions keep from their first trace is not charged to the first contender.
    jax.eval_shape(made["plain"], params, batch)
    compiled, seconds, slow = {}, {}, False
    for column, function in made.items():
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            start = time.perf_counter()
            compiled[column] = jax.jit(function).lower(params, batch).compile()
            seconds[column] = time.perf_counter() - start
        slow = slow or any(issubclass(w.category, sites.SlowPathWarning) for w in given)
    squares, variance = reference(model, problem)
    norms = compiled["norms"](params, batch)
    facts = {
        "batch": len(squares),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "compile_seconds": seconds,
        "slow_path": slow,
        "paths": sorted({path for _, path in norms.paths}),
        "variance_error": float(fvjax.total_variance(compiled["trace"](params, batch))) / variance - 1,
        "norms_error": float(np.max(np.abs(np.asarray(norms.square_norms) - squares)) / np.max(squares)),
        "vmap_grad_error": float(compiled["vmap_grad"](params, batch)[1]) / variance - 1,
    }

    def measured(column: str) -> float:
        return timed(lambda: jax.block_until_ready(compiled[column](params, batch)))

    for column in compiled:
        measured(column)
    return facts, measured


if __name__ == "__main__":
    serve_parts(build)
