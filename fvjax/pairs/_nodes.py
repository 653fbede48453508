r"""Loss and gradient moments of ANY field on a finite set of pairs: a sum over pairs, a quadrature in t, a rule for z.

    E l = sum_i pi_i int E_z l(params; t, x_t, u_t) dt,    x_t = alpha x0_i + beta x1_i + gamma z,    t ~ U[time_range].

======================  ============================================================================================
part                    how
======================  ============================================================================================
pairs                   every one, with its weight
time                    Gauss-Legendre on equal panels, an even number of nodes on each, so that none falls on the
                        middle or the ends of one, t = 1/2 included. Panels of the Brownian bridge are equal in
                        log(t / (1 - t)), because there |u_t|^2 grows like 1 / t
noise, gamma = 0        there is none
noise, `space_nodes`    product Gauss-Hermite rule, exact for polynomials in z of degree below 2 space_nodes in every
                        coordinate; it takes space_nodes^d nodes: for d <= 3
noise, `draws`, `key`   z and -z, draws / 2 times for each pair and time: Monte Carlo in z, exact in pairs and t
======================  ============================================================================================

What is left is the error of these rules. A field that changes within a time 1 / (panels time_nodes), or within a
distance gamma / space_nodes, needs more of them. No rule sees a set of times of measure zero, such as crossings.
"""

import itertools
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _quadrature, _validate
from fvjax.interpolants import Interpolant, as_pytree, path_at
from fvjax.pairs._checks import checked_pairs, checked_weights
from fvjax.types import Array, Key, Pair, PathSample, Scalar

Panels = tuple[int, int]
"""Their number, and the nodes on each."""

PRODUCT_LIMIT = 4096
"""Most nodes of the product rule for z: 16 in each of three dimensions, 64 in each of two."""


class NodeOptions(TypedDict, total=False):
    """How to integrate over t and z: the keyword arguments that all functions of this module share (`pair_nodes`)."""

    t: Scalar | None
    panels: int
    time_nodes: int
    space_nodes: int | None
    draws: int | None
    key: Key | None


class Rule(NamedTuple):
    """Times and their weights [T]; noise [S, *dims] with weights [S], or S None and the key of `draws` drawn ones."""

    times: Array
    time_weights: Array
    noise: Array | None
    noise_weights: Array
    key: Key | None


class Problem(NamedTuple):
    """Checked arguments; a pytree."""

    pairs: Pair
    weights: Array
    interpolant: Interpolant
    rule: Rule


def pair_nodes(
    pairs: Pair, interpolant: Interpolant, *, weights: Array | None = None, **options: Unpack[NodeOptions]
) -> tuple[PathSample, Array]:
    """Nodes and weights over which the means of a finite set of pairs are sums, by the rules at the top of this module.

    They are what `gradient_moments(loss, params, nodes, weights=weights)` takes, and `batch_loss`. All nodes at once:
    `exact_loss` and `exact_gradient_moments` make them a block of pairs at a time.

    ===============  ===============================================================================================
    option           meaning
    ===============  ===============================================================================================
    `t`              a time [] instead of the integral over `time_range`: a point of the profile over time
    `panels`         number of panels, >= 1; by default 8
    `time_nodes`     nodes on each panel, even, >= 2; by default 8
    `space_nodes`    nodes in each dimension of z, >= 1, with space_nodes^d <= 4096
    `draws`          noises for each pair and time, even, >= 2; in place of `space_nodes`
    `key`            PRNG key of the draws; pair i uses `fold_in(key, i)`
    ===============  ===============================================================================================

    The noise has no default: where gamma > 0, or is traced, either `space_nodes` or `draws` and `key` must be given.
    Where gamma is 0 at all times they are not needed, and one node stands for all of z.

    Args:
        pairs: x0 and x1, [N, *dims] each, floating point.
        interpolant: how they are joined; its `time_range` is integrated over.
        weights: pi, [N], >= 0, adding up to 1; None means 1/N each.
        **options: as above.

    Returns:
        PathSample with leading axis n = N x times x noises, the pairs outermost, in the dtype of x0; and weights [n],
        which add up to 1.

    Raises:
        ValueError: if the pairs are empty, not finite, or not of one shape and floating dtype; weights are negative or
            do not add up to 1; an option is not as above; or the integral over t does not exist (a Brownian bridge on
            the whole of [0, 1]: |u_t|^2 ~ 1 / t).
    """
    problem = prepared(pairs, interpolant, weights, options)
    return nodes_of(problem, ((problem.pairs, jnp.arange(len(problem.weights))), problem.weights))


def prepared(pairs: Pair, interpolant: Interpolant, weights: Array | None, options: NodeOptions) -> Problem:
    pairs = checked_pairs(pairs)
    n = len(pairs.x0)
    weights = checked_weights(weights, n)
    if weights is None:
        weights = jnp.full(n, 1 / n, _validate.common_dtype(pairs.x0))
    rule = _rule(interpolant, pairs.x0[0], **options)
    return Problem(pairs, weights, as_pytree(interpolant), rule)


def _rule(
    interpolant: Interpolant,
    example: Array,
    *,
    t: Scalar | None = None,
    panels: int = 8,
    time_nodes: int = 8,
    space_nodes: int | None = None,
    draws: int | None = None,
    key: Key | None = None,
) -> Rule:
    _validate.positive_integer("panels", panels)
    _validate.even_integer("time_nodes", time_nodes)
    if space_nodes is not None and (draws is not None or key is not None):
        raise ValueError("space_nodes must not be given together with draws and key: two rules for one noise")
    if (draws is None) != (key is None):
        raise ValueError(f"draws and key must be given together, got draws = {draws} and key = {key}")
    times, time_weights = _times(interpolant, example.dtype, t, (panels, time_nodes))
    coefficients = jax.vmap(interpolant.coefficients)(times)
    gammas = (coefficients.gamma, coefficients.gamma_rate)
    if _validate.is_concrete(gammas) and not np.any(gammas):
        one = jnp.ones(1, example.dtype)
        return Rule(times, time_weights, jnp.zeros((1, *example.shape), example.dtype), one, None)
    if interpolant.noise_rate is not None:
        times, time_weights = _times_of_bridge(interpolant, example.dtype, t, (panels, time_nodes))
    if draws is not None:
        _validate.even_integer("draws", draws)
        return Rule(times, time_weights, None, jnp.full(draws, 1 / draws, example.dtype), key)
    if space_nodes is None:
        raise ValueError(
            "space_nodes (d <= 3), or draws and key, must be given where gamma is not 0 or is traced, got none of them:"
            " no rule for the noise is exact for every field"
        )
    return Rule(times, time_weights, *_product(example, space_nodes), None)


def _panels(dtype: Any, panels: int, time_nodes: int) -> tuple[Array, Array]:
    """Gauss-Legendre on equal panels of [0, 1]; weights add up to 1."""
    node, weight = _quadrature.legendre(time_nodes)
    times = (np.arange(panels)[:, None] + node) / panels
    return jnp.asarray(times.ravel(), dtype), jnp.asarray(np.tile(weight, panels) / panels, dtype)


def _times(interpolant: Interpolant, dtype: Any, t: Scalar | None, grid: Panels) -> tuple[Array, Array]:
    if t is not None:
        _validate.shape("t", t, ())
        return jnp.asarray(t, dtype)[None], jnp.ones(1, dtype)
    start, end = (jnp.asarray(time, dtype) for time in interpolant.time_range)
    fractions, weights = _panels(dtype, *grid)
    return start + (end - start) * fractions, weights


def _times_of_bridge(interpolant: Interpolant, dtype: Any, t: Scalar | None, grid: Panels) -> tuple[Array, Array]:
    """Panels that are equal in s = log(t / (1 - t)): dt = t (1 - t) ds takes the 1/t out of |u_t|^2 dt.

    Poles of the integrand in s lie at +-i pi; 8 panels on [1e-3, 1 - 1e-3] are 1.7 long, and 8 nodes leave 1e-13.
    """
    ends = interpolant.time_range if t is None else (t,)
    if _validate.is_concrete(ends) and not all(0 < float(time) < 1 for time in ends):
        what = "t" if t is not None else "interpolant.time_range"
        raise ValueError(f"{what} must be inside (0, 1), where gamma'^2 is finite, got {ends if t is None else t}")
    if t is not None:
        return _times(interpolant, dtype, t, grid)
    start, end = (jnp.asarray(time, dtype) for time in ends)
    low, high = (jnp.log(time) - jnp.log1p(-time) for time in (start, end))
    fractions, weights = _panels(dtype, *grid)
    times = jax.nn.sigmoid(low + (high - low) * fractions)
    weights = weights * times * (1 - times)
    return times, weights / jnp.sum(weights)


def _product(example: Array, space_nodes: int) -> tuple[Array, Array]:
    """Gauss-Hermite in every coordinate of z: nodes [S, *dims] and weights [S]."""
    _validate.positive_integer("space_nodes", space_nodes)
    count = space_nodes**example.size
    if count > PRODUCT_LIMIT:
        raise ValueError(
            f"space_nodes^d must be <= {PRODUCT_LIMIT}, got {space_nodes}^{example.size}; take draws and key instead"
        )
    node, weight = _quadrature.hermite(space_nodes)
    noise = np.array(list(itertools.product(node, repeat=example.size)))
    weights = np.array([np.prod(w) for w in itertools.product(weight, repeat=example.size)])
    return jnp.asarray(noise.reshape(count, *example.shape), example.dtype), jnp.asarray(weights, example.dtype)


Block = tuple[tuple[Pair, Array], Array]


def nodes_of(problem: Problem, block: Block) -> tuple[PathSample, Array]:
    """The nodes of some pairs with their global indices and weights: leading axis pairs x T x S, and weights."""
    (pairs, index), weights = block
    rule = problem.rule
    count = len(rule.noise_weights)

    def noise(i: Array) -> Array:
        """[T, S, *dims]."""
        shape = (len(rule.times), count, *pairs.x0.shape[1:])
        if rule.key is None:
            return jnp.broadcast_to(jnp.asarray(rule.noise), shape)
        half = (shape[0], count // 2, *shape[2:])
        z = jax.random.normal(jax.random.fold_in(rule.key, i), half, pairs.x0.dtype)
        return jnp.concatenate([z, -z], 1)

    def of_pair(pair: Pair, i: Array) -> PathSample:
        def at(t: Array, z: Array) -> PathSample:
            return jax.vmap(lambda z: path_at(pair, problem.interpolant, t, z))(z)

        return jax.vmap(at)(rule.times, noise(i))

    nodes = jax.vmap(of_pair)(pairs, index)
    node_weights = jnp.multiply.outer(
        weights, jnp.multiply.outer(rule.time_weights, rule.noise_weights).astype(weights.dtype)
    ).ravel()
    return jax.tree.map(lambda x: x.reshape(len(node_weights), *x.shape[3:]), nodes), node_weights
