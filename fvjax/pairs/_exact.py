"""Loss and gradient moments of ANY field on a finite set of pairs, exactly up to the rules of `fvjax.pairs._nodes`."""

import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from fvjax import _moments, _validate, sites
from fvjax.interpolants import Interpolant
from fvjax.losses import squared_error
from fvjax.pairs._minimiser import empirical_minimiser
from fvjax.pairs._nodes import Block, NodeOptions, Problem, nodes_of, prepared
from fvjax.types import Array, ExampleLoss, GradientMoments, Pair, Params, VelocityField

NODES, ELEMENTS = 4096, 2**22
"""Default bounds on the nodes, and on the numbers in their x, that are evaluated at once."""


def exact_loss(
    field: VelocityField,
    params: Params,
    pairs: Pair,
    interpolant: Interpolant,
    *,
    weights: Array | None = None,
    chunk: int | None = None,
    **options: Unpack[NodeOptions],
) -> Array:
    r"""The loss E |field(params, t, x_t) - u_t|^2 of ANY field on a finite set of pairs.

    Summed over dimensions, without a factor 1/2 (`squared_error`). Compiled once for each field (compared by ==, a
    `jax.tree_util.Partial` by its function: a lambda written in a loop compiles on every turn), shape and rule.

    Args:
        field: hashable callable (params, t [], x [*dims]) -> velocity [*dims], or a `jax.tree_util.Partial`.
        params: its first argument.
        pairs: as in `pair_nodes`.
        interpolant: as in `pair_nodes`.
        weights: as in `pair_nodes`.
        chunk: nodes that are evaluated at once, >= 1; None takes 4096, fewer above 1024 dimensions.
        **options: those of `pair_nodes`; where gamma > 0 the rule for z is required.

    Returns:
        Shape [], in the dtype of x0. With `draws` an estimate, by Monte Carlo in z; another key shows its error.

    Raises:
        ValueError: as `pair_nodes`, or if `chunk` is no integer >= 1.

    Source: docs/theory.md, section 8.
    """
    problem = prepared(pairs, interpolant, weights, options)
    return _loss(_as_pytree(field), params, problem, chunk=_chunk(chunk, problem))


def irreducible_loss(
    pairs: Pair,
    interpolant: Interpolant,
    *,
    weights: Array | None = None,
    chunk: int | None = None,
    **options: Unpack[NodeOptions],
) -> Array:
    r"""The least loss that any field can have on a finite set of pairs, V = E tr Cov(u_t | x_t).

    `exact_loss` of the exact minimiser. With constant noise sigma it grows from 0 (sigma -> 0, the memorizing field) to
    the total variance of x1 - x0 over the pairs (sigma -> inf, no field can tell pairs apart).

    Args:
        pairs: as in `pair_nodes`. The cost is nodes x N x dim: N^2 in the number of pairs.
        interpolant: as in `pair_nodes`.
        weights: as in `pair_nodes`.
        chunk: as in `exact_loss`.
        **options: as in `exact_loss`.

    Returns:
        Shape [], in the dtype of x0; 0 to rounding without noise, unless paths meet at a node.

    Raises:
        ValueError: as `exact_loss`.

    Source: docs/theory.md, section 8.
    """
    field = empirical_minimiser(pairs, interpolant, weights)
    return exact_loss(field, None, pairs, interpolant, weights=weights, chunk=chunk, **options)


def exact_gradient_moments(
    loss: ExampleLoss,
    params: Params,
    pairs: Pair,
    interpolant: Interpolant,
    *,
    weights: Array | None = None,
    elementwise: bool = False,
    chunk: int | None = None,
    verify: int = 0,
    **options: Unpack[NodeOptions],
) -> GradientMoments:
    r"""Mean and variance of the gradient of ANY loss over a finite set of pairs, as moments of weight 1.

    The distribution is that of ONE draw of (pair, t, z); a batch of B draws has 1/B of the variance. So
    `total_variance(moments)` is exact up to the rules for t and z, with ddof = 0. Blocks of pairs are streamed and
    merged (Chan et al.), so that a variance near zero does not cancel and N is bounded by time alone. Compiled once
    for each loss (compared by ==), shape and rule.

    Args:
        loss: (params, PathSample of one example) -> scalar, for instance `squared_error(field)`: hashable, or a
            `jax.tree_util.Partial`.
        params: pytree of floating-point arrays.
        pairs: as in `pair_nodes`.
        interpolant: as in `pair_nodes`.
        weights: as in `pair_nodes`.
        elementwise: whether `m2` holds every coordinate, or its trace, one number a leaf, as in `gradient_moments`.
        chunk: nodes that are differentiated at once, >= 1; None takes 4096, fewer above 1024 dimensions.
        verify: number of nodes of the first pairs of which the gradients are compared with those of `vmap(grad)`.
        **options: as in `exact_loss`.

    Returns:
        GradientMoments, weight 1. With `draws` an estimate, by Monte Carlo in z.

    Raises:
        ValueError: as `exact_loss` and `gradient_moments`.
        DisagreementError: if verified gradients disagree.

    Source: docs/theory.md, section 8.
    """
    problem = prepared(pairs, interpolant, weights, options)
    chunk = _chunk(chunk, problem)
    if verify:
        first = jax.tree.map(lambda x: x[0], _blocks(problem, verify))
        sites.verify(loss, params, nodes_of(problem, first)[0], examples=verify)
    return _gradients(_as_pytree(loss), params, problem, elementwise=elementwise, chunk=chunk)


def _chunk(chunk: int | None, problem: Problem) -> int:
    if chunk is None:
        return max(1, min(NODES, ELEMENTS // problem.pairs.x0[0].size))
    _validate.positive_integer("chunk", chunk)
    return int(chunk)


def _as_pytree(function: Any) -> Partial:
    return function if isinstance(function, Partial) else Partial(function)


def _blocks(problem: Problem, chunk: int) -> tuple[tuple[Pair, Array], Array]:
    """The pairs cut into blocks of about `chunk` nodes, the last one filled up with pairs of weight 0."""
    n = len(problem.weights)
    per_pair = len(problem.rule.times) * len(problem.rule.noise_weights)
    rows = max(1, min(n, chunk // per_pair))
    pieces, weights, _ = _moments.in_chunks((problem.pairs, jnp.arange(n)), problem.weights, None, rows)
    return pieces, weights


@functools.partial(jax.jit, static_argnames="chunk")
def _loss(field: Partial, params: Params, problem: Problem, *, chunk: int) -> Array:
    loss = squared_error(field)

    def of_block(block: Block) -> Array:
        nodes, weights = nodes_of(problem, block)
        losses = jax.lax.map(lambda node: loss(params, node), nodes, batch_size=chunk)
        return jnp.sum(jnp.where(weights > 0, weights * losses.astype(weights.dtype), 0))

    return jnp.sum(jax.lax.map(of_block, _blocks(problem, chunk))).astype(problem.pairs.x0.dtype)


@sites.with_care
@functools.partial(jax.jit, static_argnames=("elementwise", "chunk", "guarded"))
def _gradients(
    loss: Partial, params: Params, problem: Problem, *, elementwise: bool, chunk: int, guarded: bool
) -> tuple[GradientMoments, Array]:
    def of_block(block: Block) -> tuple[GradientMoments, Array]:
        nodes, weights = nodes_of(problem, block)
        options: dict[str, Any] = {"weights": weights, "elementwise": elementwise, "chunk": chunk}
        return sites.moments_and_flag(loss, params, nodes, guarded=guarded, **options)

    found, sound = _moments.merge_chunks(of_block, _blocks(problem, chunk))
    return found, jnp.all(sound)
