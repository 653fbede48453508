r"""Which pair a noisy point comes from: the posterior over a finite set of pairs, accurately and in bounded memory.

The cost of a pair is |x - m_i|^2 - 2 gamma^2 log pi_i, and its weight exp(-cost / (2 gamma^2)) up to a constant.

Products first: |x - m_i|^2 = |x|^2 - 2 x . m_i + |m_i|^2 with x . m_i = alpha x0_i . x + beta x1_i . x, which `vmap`
over x turns into two matrix products, whatever t is for each x. Its rounding error is of the order epsilon |x| |m_i|;
divided by 2 gamma^2 that may be any number of nats. Then differences, where it matters: for a near pair a, the anchor,

    |x - m_i|^2 - |x - m_a|^2 = d . (d - 2 e),   d = alpha (x0_i - x0_a) + beta (x1_i - x1_a),   e = x - m_a,

is exact to epsilon |x| |d|, and |d| is small for every pair that competes with a. It is computed for the pairs that
could still have a weight given the error bound of the products, a block at a time: usually for none but the anchor.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fvjax.pairs._set import Geometry, Instant, PairSet
from fvjax.types import Array

DIRECT = 3
"""Up to this many dimensions all costs come from differences and none is refined; above, products are faster."""

BLOCK = 16
"""Pairs that are refined at a time."""

TOLERANCE = 1e-2
"""Rounding error of a log weight, in nats, below which products are good enough; what is typical is a tenth of it.

Where noise is so large that all pairs share the weight, 2 gamma^2 is at least |m_i - m_a|^2 / 26 in float32, and then
the error of the products is below this for 12,288 dimensions, too (sigma = 5 ... 44 on normal pairs). With 3e-3 nearly
all pairs were refined at sigma = 14, which took 20 times as long.
"""

_dot = partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)  # the default is TF32 on a GPU, bfloat16 on a TPU


class Part(NamedTuple):
    """Some of the pairs, n of them, flattened: `x0`, `x1` [n, D]; the others [n] (`weights` may be None)."""

    x0: Array
    x1: Array
    square0: Array
    square1: Array
    cross: Array
    norm0: Array
    norm1: Array
    weights: Array | None
    valid: Array


def _part(data: PairSet, index: Array | None) -> Part:
    """Chunk `index` of the pairs, the last one filled up with pairs that are not valid; or all of them."""
    g, count = data.geometry, len(data.pairs.x0)
    x0, x1 = (x.reshape(count, -1) for x in data.pairs)
    whole = Part(x0, x1, g.square0, g.square1, g.cross, g.norm0, g.norm1, data.weights, valid=jnp.ones(count, bool))
    if index is None:
        return whole
    start = jnp.minimum(index * data.chunk, count - data.chunk)
    part: Part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, data.chunk), whole)
    return part._replace(valid=start + jnp.arange(data.chunk) >= index * data.chunk)


class Anchor(NamedTuple):
    """A pair close to x, [D] each: the rows, and x - m."""

    x0: Array
    x1: Array
    offset: Array


def _anchor(part: Part, now: Instant, x: Array, index: Array) -> Anchor:
    x0, x1 = part.x0[index], part.x1[index]
    return Anchor(x0, x1, x - now.alpha * x0 - now.beta * x1)


def _differences(anchor: Anchor, now: Instant, x0: Array, x1: Array) -> Array:
    """|x - m|^2 - |x - m_a|^2 from differences; rows [..., D] -> [...]."""
    shift = now.alpha * (x0 - anchor.x0) + now.beta * (x1 - anchor.x1)
    return jnp.sum(shift * (shift - 2 * anchor.offset), -1)


def _by_coordinate(anchor: Anchor, now: Instant, part: Part) -> Array:
    """`_differences` of all pairs, [n], one coordinate after the other: XLA would write out [batch, n, D]."""

    def add(k: Array, total: Array) -> Array:
        shift = now.alpha * (part.x0[:, k] - anchor.x0[k]) + now.beta * (part.x1[:, k] - anchor.x1[k])
        return total + shift * (shift - 2 * anchor.offset[k])

    return jax.lax.fori_loop(0, len(anchor.offset), add, jnp.zeros_like(part.square0))


def _prior(part: Part, now: Instant) -> tuple[Array, Array]:
    """-2 gamma^2 log pi [n], and which pairs take part at all [n]."""
    if part.weights is None:
        return jnp.zeros_like(part.square0), part.valid
    valid = part.valid & (part.weights > 0)
    logs = jnp.log(jnp.where(valid, part.weights, 1))
    return jnp.where(now.noiseless, 0, -now.spread * logs), valid


@jax.custom_jvp
def _with_derivative_of(value: Array, smooth: Array) -> Array:
    del smooth
    return value


@_with_derivative_of.defjvp
def _with_derivative_of_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return _with_derivative_of(*primals), tangents[1]


def _huge(x: Array) -> float:
    return float(jnp.finfo(x.dtype).max) / 8


class Costs(NamedTuple):
    """Costs [n] less |x - m_a|^2 of an anchor a, and that anchor; huge for a pair that takes no part.

    An anchor of zeros stands for costs less |x|^2. The derivative of `values` is that of |x - m_i|^2 - 2 gamma^2 log pi
    up to a number that is the same for all pairs, whatever the anchor.
    """

    values: Array
    valid: Array
    anchor: Anchor


def _costs(part: Part, data: PairSet, now: Instant, x: Array) -> Costs:
    prior, valid = _prior(part, now)
    if x.size <= DIRECT:
        origin = Anchor(jnp.zeros_like(x), jnp.zeros_like(x), x)
        rough = jnp.where(valid, _by_coordinate(origin, now, part) + prior, _huge(x))
        anchor = jax.lax.stop_gradient(_anchor(part, now, x, jnp.argmin(rough)))
        values = _by_coordinate(anchor, now, part) + prior
        return Costs(_with_derivative_of(jnp.where(valid, values, _huge(x)), rough), valid, anchor)

    y = x - now.alpha * data.geometry.center0 - now.beta * data.geometry.center1
    squares = now.alpha**2 * part.square0 + 2 * now.alpha * now.beta * part.cross + now.beta**2 * part.square1
    # Of the centers only their product with y is left out, which is the same for all pairs.
    rough = squares - 2 * (now.alpha * _dot(part.x0, y) + now.beta * _dot(part.x1, y)) + prior
    rough = jnp.where(valid, rough, _huge(x))
    problem = _Refinement(part, data.geometry, now, x, jnp.sqrt(jnp.sum(y**2)), prior)
    values, anchor = _refined(*jax.lax.stop_gradient((problem, rough)))
    return Costs(_with_derivative_of(values, rough), valid, anchor)


class _Refinement(NamedTuple):
    """What it takes to compute a cost again: `length` is |y|, y = x less the mean of m_i."""

    part: Part
    geometry: Geometry
    now: Instant
    x: Array
    length: Array
    prior: Array

    def rounding(self, of: "Part | Geometry", *, bound: bool) -> Array:
        """Error of the rough costs, [n]; [] of the largest of all pairs: a bound, or what is typical.

        A sum of D rounded products is off by epsilon sqrt(D) times the product of norms (random signs, in sequence).
        Sums in blocks, as matrix products take them, were off by at most 7 epsilon with random data, and by 96 epsilon
        with 12,288 dimensions that are all equal, where the bound is 127.
        """
        constant = (16 + bound * self.x.size**0.5) * float(jnp.finfo(self.x.dtype).eps)
        a, b = jnp.abs(self.now.alpha), jnp.abs(self.now.beta)
        sizes = of.square0, of.square1, of.norm0, of.norm1
        square0, square1, norm0, norm1 = sizes if isinstance(of, Part) else map(jnp.max, sizes)
        return constant * 2 * (self.length * (a * norm0 + b * norm1) + a**2 * square0 + b**2 * square1)

    def costs(self, anchor: Anchor, index: Array) -> Array:
        """Those of the pairs `index` from differences."""
        return _differences(anchor, self.now, self.part.x0[index], self.part.x1[index]) + self.prior[index]


def _refined(problem: _Refinement, rough: Array) -> tuple[Array, Anchor]:
    """Costs relative to an anchor, those that matter from differences; the rough ones where they are good enough."""
    part, now, prior = problem.part, problem.now, problem.prior
    tolerated = jnp.where(now.noiseless, 0, TOLERANCE * now.spread)

    def anchored(state: tuple[Array, Anchor, Array]) -> tuple[Array, Anchor, Array]:
        rough = state[0]
        index = jnp.argmin(rough)
        anchor = _anchor(part, now, problem.x, index)
        error, typical = (problem.rounding(part, bound=bound) for bound in (True, False))
        error, typical = error + error[index], typical + typical[index]
        takes_part = rough < _huge(rough)
        unrefined = takes_part & (typical > tolerated) & (jnp.arange(len(rough)) != index)
        relative = (rough - (rough[index] - prior[index])).at[index].set(prior[index])
        values = _refine(problem, anchor, error, (relative, unrefined, prior[index]))
        return jnp.where(takes_part, values, _huge(rough)), anchor, jnp.zeros_like(state[2])

    # A loop of at most one turn: `cond` would compute both sides under `vmap`. The error is that of all pairs, so that
    # all chunks decide alike and their costs can be compared.
    zeros = jnp.zeros_like(problem.x)
    state = rough, Anchor(zeros, zeros, zeros), 2 * problem.rounding(problem.geometry, bound=False) > tolerated
    values, anchor, _ = jax.lax.while_loop(lambda state: state[2], anchored, state)
    return values, anchor


def _refine(problem: _Refinement, anchor: Anchor, error: Array, start: tuple[Array, Array, Array]) -> Array:
    """Starts from rough costs [n], which of them are not exact [n] and the least exact one; refines what matters."""
    size = min(BLOCK, len(error))
    # All that are further behind than this have together less than epsilon of the weight.
    nats = math.log(len(error) / float(jnp.finfo(error.dtype).eps))
    behind = jnp.where(problem.now.noiseless, 0, nats * problem.now.spread)

    def needed(costs: Array, unrefined: Array, best: Array) -> Array:
        return unrefined & (costs - error <= best + behind)

    def body(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        costs, unrefined, best, _ = state
        candidates = needed(costs, unrefined, best)
        _, block = jax.lax.top_k(jnp.where(candidates, -costs, -_huge(costs)), size)
        refined = jnp.where(candidates[block], problem.costs(anchor, block), _huge(costs))
        best = jnp.minimum(best, jnp.min(refined))
        costs = costs.at[block].set(jnp.where(candidates[block], refined, costs[block]))
        unrefined = unrefined.at[block].set(False)
        return costs, unrefined, best, jnp.any(needed(costs, unrefined, best))

    state = *start, jnp.any(needed(*start))
    return jax.lax.while_loop(lambda state: state[3], body, state)[0]


def _decay(gap: Array, now: Instant) -> Array:
    """exp(-gap / (2 gamma^2)) for gap >= 0; without noise 1 for gap = 0 and 0 otherwise."""
    # Beyond 1000 nats all is 0 in any dtype, and the bound keeps an infinite ratio out of the derivative.
    ratio = jnp.minimum(gap, 1000 * now.spread) / now.spread
    return jnp.where(now.noiseless, 1 - jnp.sign(gap), jnp.exp(-ratio))  # nan stays nan


class Sums(NamedTuple):
    """Weighted sums over some pairs; weights are exp(-(cost - best) / (2 gamma^2)), costs relative to the anchor."""

    anchor: Anchor
    best: Array
    total: Array
    x0: Array
    x1: Array


def _sums(part: Part, data: PairSet, now: Instant, x: Array) -> Sums:
    costs, valid, anchor = _costs(part, data, now, x)
    best = jax.lax.stop_gradient(jnp.min(costs))
    weights = _decay(costs - best, now)
    if part.weights is not None:
        # Without noise the prior is left to break no ties but to weigh them.
        weights = weights * jnp.where(now.noiseless, part.weights, 1)
    weights = jnp.where(valid, weights, 0)
    return Sums(anchor, best, jnp.sum(weights), _dot(weights, part.x0), _dot(weights, part.x1))


def _merge(a: Sums, b: Sums, now: Instant) -> Sums:
    """The sums over the pairs of both."""
    # Without a derivative: those of the costs are relative to the same number everywhere.
    gap = jax.lax.stop_gradient(b.best + _differences(a.anchor, now, b.anchor.x0, b.anchor.x1) - a.best)
    factors = _decay(jnp.maximum(-gap, 0), now), _decay(jnp.maximum(gap, 0), now)

    def add(x: Array, y: Array) -> Array:
        return factors[0] * x + factors[1] * y

    anchor, best = jax.tree.map(lambda x, y: jnp.where(gap < 0, y, x), (a.anchor, a.best), (b.anchor, b.best))
    return Sums(anchor, best, add(a.total, b.total), add(a.x0, b.x0), add(a.x1, b.x1))


def posterior_means(data: PairSet, now: Instant, x: Array) -> tuple[Array, Array]:
    """E[x0 | x_t = x] and E[x1 | x_t = x], [D] each, for x [D]."""
    count = len(data.pairs.x0)
    if data.chunk >= count:
        sums = _sums(_part(data, None), data, now, x)
        return sums.x0 / sums.total, sums.x1 / sums.total

    def step(carry: Sums, index: Array) -> tuple[Sums, None]:
        return _merge(carry, _sums(_part(data, index), data, now, x), now), None

    zeros = jnp.zeros_like(x)
    nothing = Sums(Anchor(zeros, zeros, zeros), jnp.full((), _huge(x), x.dtype), jnp.zeros((), x.dtype), zeros, zeros)
    sums, _ = jax.lax.scan(step, nothing, jnp.arange(-(-count // data.chunk)))
    return sums.x0 / sums.total, sums.x1 / sums.total


def log_posterior(data: PairSet, now: Instant, x: Array) -> Array:
    """log w_i(x, t), [N], for x [D]; -inf for a pair that has no weight."""
    part = _part(data, None)
    costs, valid, _ = _costs(part, data, now, x)
    gaps = costs - jax.lax.stop_gradient(jnp.min(costs))
    weights = _decay(gaps, now)
    if part.weights is not None:
        weights = weights * jnp.where(now.noiseless, part.weights, 1)
    weights = jnp.where(valid, weights, 0)
    # Not the logarithm of the weights, which underflow.
    limit = jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, weights, 1)), -jnp.inf)
    logs = jnp.where(now.noiseless, limit, -gaps / now.spread)
    return jnp.where(valid, logs, -jnp.inf) - jnp.log(jnp.sum(weights))
