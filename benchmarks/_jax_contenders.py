"""The contenders in JAX: a worker's program (see _worker.py)."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _problems import PROBLEMS, Array, Batch, Loss, Problem
from _worker import Contender, serve
from flax.traverse_util import unflatten_dict
from jax.tree_util import Partial

import fvjax
from fvjax import sites
from fvjax._convolutions import refined

COMPILED_AGAIN = 2.0
"""A compilation below this many seconds is made three times, and the median counts."""


class Program(NamedTuple):
    """What is compiled, and how the number to check is read from its result.

    `jitted`: whether the caller compiles it; else it compiles itself at its first call.
    """

    function: Callable[[Any, Batch], Any]
    read: Callable[[Any], Any]
    jitted: bool = True


def spread(gradients: Any) -> tuple[Any, Array]:
    """Mean gradient and sum of squared deviations, in two passes.

    The mean as a matrix product: XLA's sum over the first axis takes 50 times as long (docs/sharp_edges.md, 5).
    """
    mean = jax.tree.map(lambda g: jnp.tensordot(jnp.full(len(g), 1 / len(g)), g, 1), gradients)
    parts = jax.tree.map(lambda g, m: jnp.sum((g - m) ** 2), gradients, mean)
    return mean, jnp.sum(jnp.stack(jax.tree.leaves(parts)))


def grouped(gradients: Callable[[Any], Any], pieces: Any, by: Array, groups: int) -> tuple[Any, Array]:
    """Mean gradient of each group, and sum of squared deviations from these, in two passes over pieces of the batch.

    Args:
        gradients: of the examples in one piece, each leaf [chunk, ...].
        pieces: [pieces, chunk, ...].
        by: the groups of the examples, [pieces, chunk].
        groups: their number.
    """
    counts = jnp.bincount(by.reshape(-1), length=groups)

    def add(totals: Any, piece: tuple[Any, Array]) -> tuple[Any, None]:
        own = gradients(piece[0])
        return jax.tree.map(lambda total, g: total.at[piece[1]].add(g), totals, own), None

    shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], pieces))
    empty = jax.tree.map(lambda g: jnp.zeros((groups, *g.shape[1:]), g.dtype), shapes)
    totals, _ = jax.lax.scan(add, empty, (pieces, by))
    means = jax.tree.map(lambda total: total / counts.reshape(-1, *[1] * (total.ndim - 1)), totals)

    def deviations(piece: tuple[Any, Array]) -> Array:
        parts = jax.tree.map(lambda g, mean: jnp.sum((g - mean[piece[1]]) ** 2), gradients(piece[0]), means)
        return jnp.sum(jnp.stack(jax.tree.leaves(parts)))

    return means, jnp.sum(jax.lax.map(deviations, (pieces, by)))


def clipped(loss: Loss, n: int, microbatch: int | None) -> Callable[[Any, Batch], Any]:
    """The sum of gradients of norm at most 1, and the norms before; the library's transformation."""
    from jax_privacy.clipping import clipped_grad

    return clipped_grad(
        loss, l2_clip_norm=1.0, normalize_by=n, keep_batch_dim=False, return_grad_norms=True, microbatch_size=microbatch
    )


def formed(problem: Problem, n: int) -> dict[str, Program]:
    """The contenders that form all gradients: those of `vmap(grad)`."""
    by = problem.by(n)

    def in_pieces(batch: Any, chunk: int) -> Any:
        return jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), batch)

    def variance(params: Any, batch: Batch, chunk: int) -> tuple[Any, Array]:
        def gradients(piece: Batch) -> Any:
            return fvjax.per_example_gradients(problem.loss, params, piece)

        if by is not None:
            pieces, own = in_pieces((batch, jnp.asarray(by)), chunk)
            means, m2 = grouped(gradients, pieces, own, problem.groups or 1)
        elif chunk == n:
            means, m2 = spread(gradients(batch))
        else:
            means, within = jax.lax.map(lambda piece: spread(gradients(piece)), in_pieces(batch, chunk))
            means, between = spread(means)
            m2 = jnp.sum(within) + chunk * between
        return means, m2 / n

    return {
        "vmap_grad": Program(partial(variance, chunk=n), lambda result: result[1]),
        "vmap_grad_chunked": Program(partial(variance, chunk=problem.chunk), lambda result: result[1]),
    }


def mean_square(norms: Any) -> Any:
    """The mean of |g_i|^2 from these, in float64."""
    return np.mean(norms, dtype=float)


def programs(problem: Problem, n: int) -> dict[str, Program]:
    """All contenders, by name. The loss is a new function at every call, of which nothing has been kept."""

    def loss(params: Any, example: Batch) -> Array:
        return problem.loss(params, example)

    def of_batch(params: Any, batch: Batch) -> Array:
        return jnp.mean(jax.vmap(loss, in_axes=(None, 0))(params, batch))

    def variance(moments: fvjax.GradientMoments) -> Any:
        """Sum of m2 over leaves, coordinates and groups, by the number of examples."""
        return sum(np.sum(x, dtype=float) for x in jax.tree.leaves(moments.m2)) / n

    by = problem.by(n)
    options: dict[str, Any] = {} if by is None else {"by": by, "groups": problem.groups}
    norms, trace = partial(sites.square_norms, loss), partial(sites.moments, loss, **options)
    # Outside jit a Partial is compiled once, any other loss at every call.
    kept = Partial(loss)
    elementwise = partial(sites.moments, loss, elementwise=True, **options)
    return formed(problem._replace(loss=loss), n) | {
        "plain": Program(jax.value_and_grad(of_batch), lambda result: result[0]),
        "plain_refined": Program(jax.value_and_grad(refined(of_batch)), lambda result: result[0]),
        "sites_norms": Program(norms, lambda result: mean_square(result.square_norms)),
        "sites_norms_eager": Program(
            partial(sites.square_norms, kept), lambda result: mean_square(result.square_norms), jitted=False
        ),
        "sites_trace": Program(trace, variance),
        "sites_trace_eager": Program(partial(sites.moments, kept, **options), variance, jitted=False),
        "sites_elementwise": Program(elementwise, variance),
    }


def of_members(program: Program, members: int) -> Program:
    """The program for each member of an ensemble, by `vmap`."""

    def read(result: Any) -> Any:
        return np.mean([float(program.read(jax.tree.map(lambda x, k=k: x[k], result))) for k in range(members)])

    return Program(jax.vmap(program.function, in_axes=(0, None)), read, program.jitted)


def program(name: str, problem: Problem, n: int) -> Program:
    """A contender, with nothing of it compiled."""
    if name == "privacy_clipped":
        return Program(
            clipped(problem.loss, n, problem.microbatch), lambda result: mean_square(result[1].grad_norms ** 2)
        )
    found = programs(problem, n)[name]
    return found if problem.members is None else of_members(found, problem.members)


def compiled(program: Program, params: Any, batch: Batch) -> tuple[Callable[[Any, Batch], Any], dict[str, float]]:
    """What is to be called, and the facts: seconds of tracing and compilation, and the memory that XLA plans.

    A program that compiles itself: seconds of its first call less those of its second.
    """
    jax.clear_caches()
    start = time.perf_counter()
    if not program.jitted:
        jax.block_until_ready(program.function(params, batch))
        first = time.perf_counter() - start
        jax.block_until_ready(program.function(params, batch))
        return program.function, {"compile_seconds": 2 * first + start - time.perf_counter(), "first_seconds": first}
    made = jax.jit(program.function).lower(params, batch).compile()
    facts = {"compile_seconds": time.perf_counter() - start}
    plan = made.memory_analysis()
    if plan is not None:
        facts |= {"xla_temp_bytes": plan.temp_size_in_bytes, "xla_output_bytes": plan.output_size_in_bytes}
    return made, facts


def build(name: str, file: Path) -> Contender:
    """Compiles a contender; a quick compilation is repeated, since others want the cores, too."""
    with np.load(file) as arrays:
        stored = dict(arrays)
    weights = {tuple(key.split("/")[1:]): jnp.asarray(x) for key, x in stored.items() if key.startswith("params/")}
    params = unflatten_dict(weights)
    batch = tuple(jnp.asarray(stored[f"batch/{k}"]) for k in range(sum(key.startswith("batch/") for key in stored)))
    problem = PROBLEMS[str(stored["model"])]
    seconds: list[float] = []
    while len(seconds) < (3 if max(seconds, default=0) < COMPILED_AGAIN else 1):
        own = program(name, problem, len(batch[0]))
        function, facts = compiled(own, params, batch)
        seconds.append(facts["compile_seconds"])
    facts |= {"compile_seconds": statistics.median(seconds)}
    return Contender(
        lambda: jax.block_until_ready(function(params, batch)), lambda r: float(own.read(r)), lambda: None, facts
    )


if __name__ == "__main__":
    serve(build)
