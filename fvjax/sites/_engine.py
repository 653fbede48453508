"""One forward and one backward pass over the batch, then the gradients of every example, cluster by cluster."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fvjax import _moments
from fvjax.sites import _products, _rules
from fvjax.sites._plan import Cluster, Plan
from fvjax.sites._program import Kind
from fvjax.types import Array, GradientMoments

BLOCK = 2**16
"""Elements of per-example gradients that are formed at once where they are larger than their factors: they stay in
cache."""

SLOW_BLOCK = 2**22
"""The same for sites that are whole programs: there an iteration costs more than memory traffic."""

Example = tuple[dict[int, Array], dict[int, Array]]
"""Data operands and output cotangents of the sites, by index; for ONE example or with a leading axis n."""

Gradient = Callable[[Example], list[Array]]
"""From the operands and cotangents of ONE example to the gradients of the targets of a cluster."""


class Weighting(NamedTuple):
    """Weights [n] (None: 1 each), and the group of every example, integers [n] (None: a single group)."""

    weights: Array | None
    by: Array | None
    groups: int | None

    def of(self, n: int) -> Array:
        """The weights, [n]."""
        return jnp.ones(n) if self.weights is None else self.weights

    def totals(self, n: int) -> Array:
        """The weight of each group, or of all."""
        weights = self.of(n)
        return jnp.sum(weights) if self.by is None else jax.ops.segment_sum(weights, self.by, self.groups)


class Backward(NamedTuple):
    """The losses [n] and, for all sites, what they took from the data and the cotangents of what they gave."""

    losses: Array
    data: dict[int, Array]
    cotangents: dict[int, Array]
    fixed: dict[int, Any]

    def of(self, cluster: Cluster) -> Example:
        """What the sites of one cluster need."""
        data = {i: self.data[i] for site in cluster.sites for i in site.data}
        return data, {o: self.cotangents[o] for site in cluster.sites for o in site.outputs}


@jax.custom_vjp
def _probe(value: Array, delta: Array) -> Array:
    """`value`, with the derivative of value + delta: delta collects the cotangent, and costs nothing forward.

    Under `vmap` the result has a batch axis, as delta has, also where `value` has none: else the one cotangent of all
    examples would arrive. XLA drops the choice, whose outcome is known.
    """
    return jnp.where(False, delta, value)


_probe.defvjp(lambda value, delta: (_probe(value, delta), None), lambda _, cotangent: (cotangent, cotangent))


def backward(plan: Plan, leaves: Sequence[Array], examples: Sequence[Array]) -> Backward:
    """Runs the loss on all examples, and back.

    Args:
        plan: of the loss.
        leaves: of the params.
        examples: leaves of the batch, [n, ...].
    """
    n = len(examples[0])
    program = plan.program
    fixed = program.constants | dict(zip(program.leaves, leaves, strict=True))
    data_steps = []
    for step in program.steps:
        if any(program.kinds[i] == Kind.DATA for i in step.inputs):
            data_steps.append(step)
        else:
            fixed |= step.run(fixed)
    clusters = plan.clusters if plan.common is None else (*plan.clusters, plan.common)
    sites = [site for cluster in clusters for site in cluster.sites]
    wanted = tuple(dict.fromkeys(i for site in sites for i in site.data))

    def forward(example: Sequence[Array], deltas: dict[int, Array]) -> tuple[Array, dict[int, Array]]:
        known = fixed | dict(zip(program.example, example, strict=True))
        for step in data_steps:
            known |= {o: _probe(v, deltas[o]) if o in deltas else v for o, v in step.run(known).items()}
        return known[program.loss], {i: known[i] for i in wanted}

    avals = {o: program.avals[o] for site in sites for o in site.outputs}
    deltas = {o: jnp.zeros((n, *aval.shape), aval.dtype) for o, aval in avals.items()}
    inputs = [*examples, jnp.ones(n, jnp.float32)]
    losses, pull, data = jax.vjp(lambda d: jax.vmap(forward)(inputs, d), deltas, has_aux=True)
    (cotangents,) = pull(jnp.ones_like(losses))
    return Backward(losses, data, cotangents, fixed)


def gradient_of_one(plan: Plan, cluster: Cluster, fixed: dict[int, Any]) -> Gradient:
    """The function that forms the gradients of ONE example, in at least float32."""
    pull = plan.pullback(cluster, fixed) if cluster.joint else None
    avals = plan.program.avals

    def gradient(example: Example) -> list[Array]:
        total: dict[int, Array] = {}
        for site in cluster.sites:
            for root, value in _at_site(plan, site, fixed, example).items():
                total[root] = total[root] + value if root in total else value
        gradients = [total[root] for root in cluster.roots]
        gradients = gradients if pull is None else pull(gradients)
        dtypes = [_moments.accumulation_dtype(avals[target]) for target in cluster.targets]
        return [g.astype(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]

    return gradient


def _at_site(plan: Plan, site: _rules.Site, fixed: dict[int, Any], example: Example) -> dict[int, Array]:
    """The gradients of ONE example at one site, by root."""
    data, cotangents = example[0], [example[1][o] for o in site.outputs]
    if _rules.is_product(site):
        root = site.operands[0].root
        product = _rules.contract(_rules.factors(site, data[site.data[0]], cotangents[0]))
        return {root: _rules.layout(site).into_root(product, plan.program.avals[root].shape)}
    known = fixed | {i: data[i] for i in site.data}
    return {root: _rules.widened(g) for root, g in _rules.derivative(site, known, cotangents).items()}


def _block(plan: Plan, cluster: Cluster, n: int) -> int:
    """How many examples to form at once: all where that takes no more room than the factors, else what fits the cache.

    The last block is padded, so a prime n costs no more than its neighbours.
    """
    avals = plan.program.avals
    factors = sum(avals[i].size for site in cluster.sites for i in (*site.data, *site.outputs))
    size = sum(avals[t].size for t in cluster.targets) + sum(_rules.patch_size(site) for site in cluster.sites)
    slow = any(map(_rules.is_loop, cluster.sites))
    fitting = max(1, (SLOW_BLOCK if slow else BLOCK) // max(size, 1))
    if size <= factors and not slow:
        fitting = n
    blocks = -(-n // min(fitting, n)) if n else 1
    return max(1, -(-n // blocks))


def cluster_moments(
    plan: Plan,
    cluster: Cluster,
    passed: Backward,
    weighting: Weighting,
    *,
    trace: bool,
) -> list[tuple[Array, Array]]:
    """Mean and m2 (or its trace) of every target of a cluster."""
    n = len(passed.losses)
    given, by, groups = weighting
    weights = weighting.of(n)
    example, gradient = passed.of(cluster), gradient_of_one(plan, cluster, passed.fixed)
    block = _block(plan, cluster, n)

    def one_by_one(weights: Array) -> list[tuple[Array, Array]]:
        moments = _block_moments(gradient, example, Weighting(weights, by, groups), block=block, trace=trace)
        return list(zip(moments.mean, moments.m2, strict=True))

    layout = cluster.layout
    if layout is None or (groups is not None and groups > _products.MOST_GROUPS):
        return one_by_one(weights)
    if not _products.pays(layout, cluster.length, elementwise=not trace):
        return one_by_one(weights)
    factors, shape = _factors(plan, cluster, example), plan.program.avals[cluster.roots[0]].shape

    def within(weights: Array | None) -> tuple[Array, Array]:
        def fallback() -> Array:
            whole = Weighting(weights, None, None)
            return _block_moments(gradient, example, whole, block=block, trace=trace).m2[0]

        def laid_out(product: Array) -> Array:
            return layout.into_root(product, shape)

        return _products.moments(factors, weights, laid_out, fallback, trace=trace)

    if by is None:
        return [within(given)]
    return [jax.lax.map(lambda group: within(jnp.where(by == group, weights, 0)), jnp.arange(groups, dtype=by.dtype))]


def _factors(plan: Plan, cluster: Cluster, example: Example) -> _rules.Factors:
    """The factors of all examples, [n, groups, L, ...]; several sites of one root are more rows of the same product."""
    data, cotangents = example
    parts = [
        jax.vmap(lambda d, c, s=site: _rules.factors(s, d, c))(data[site.data[0]], cotangents[site.outputs[0]])
        for site in cluster.sites
    ]
    dtype = _moments.accumulation_dtype(plan.program.avals[cluster.roots[0]])
    return _rules.Factors(*(jnp.concatenate([f.astype(dtype) for f in p], 2) for p in zip(*parts, strict=True)))


def _block_moments(
    gradient: Gradient, example: Example, weighting: Weighting, *, block: int, trace: bool
) -> GradientMoments:
    """Moments of the gradients, a block of examples at a time, relative to the gradient of the first that counts.

    So the running mean is rounded on the scale of the deviations, as in `_moments.merge_chunks`.
    """
    n = len(jax.tree.leaves(example)[0])
    weights, by, groups = weighting.of(n), weighting.by, weighting.groups
    if block >= n:
        values = jax.vmap(gradient)(example)
        if trace and by is None:
            return _products.traces(values, weights)
        return _moments.moments_of(values, weights, by, groups, trace=trace)
    first = jnp.argmax(weights > 0)
    origin = [jnp.where(jnp.any(weights > 0), g, 0) for g in gradient(jax.tree.map(lambda x: x[first], example))]

    def body(total: GradientMoments, piece: tuple[Example, Array, Array | None]) -> tuple[GradientMoments, None]:
        examples, w, group = piece
        if block > 1:
            values = [g - o for g, o in zip(jax.vmap(gradient)(examples), origin, strict=True)]
            own = _moments.moments_of(values, w, group, groups, trace=trace)
            return _moments.merge_moments(total, own), None
        w, group = w[0], None if group is None else group[0]
        if group is not None and groups is not None:
            w = jnp.where((group >= 0) & (group < groups), w, 0)
            group = jnp.clip(group, 0, groups - 1)
        values = gradient(jax.tree.map(lambda x: x[0], examples))
        values = [jnp.where(w == 0, 0, g - o) for g, o in zip(values, origin, strict=True)]
        return _moments.add_one(total, values, w, group), None

    lead = () if groups is None else (groups,)
    zeros = [jnp.zeros((*lead, *o.shape), o.dtype) for o in origin]
    m2 = [jnp.zeros(lead, o.dtype) for o in origin] if trace else zeros
    empty = GradientMoments(jnp.zeros(lead, weights.dtype), zeros, m2)
    total, _ = jax.lax.scan(body, empty, _moments.in_chunks(example, weights, by, block))
    mean = [_moments.counted(total.weight, m + o) for m, o in zip(total.mean, origin, strict=True)]
    return total._replace(mean=mean)


def with_common_part(plan: Plan, passed: Backward, weighting: Weighting, means: Sequence[Array]) -> list[Array]:
    """Adds the gradient that all examples share to the means of the leaves, in groups that are not empty."""
    if plan.common is None:
        return list(means)
    n = len(passed.losses)
    weight = weighting.totals(n)
    first = jnp.argmax(weighting.of(n) > 0)
    one = gradient_of_one(plan, plan.common, passed.fixed)(jax.tree.map(lambda x: x[first], passed.of(plan.common)))
    shared = dict(zip(plan.common.targets, one, strict=True))
    return [
        mean + _moments.counted(weight, jnp.broadcast_to(shared[leaf], mean.shape)) if leaf in shared else mean
        for leaf, mean in zip(plan.program.leaves, means, strict=True)
    ]


def cluster_norms(plan: Plan, cluster: Cluster, passed: Backward, weights: Array | None) -> list[tuple[Array, Array]]:
    """Weighted mean and squared norms [n] of every target of a cluster."""
    n = len(passed.losses)
    example, gradient = passed.of(cluster), gradient_of_one(plan, cluster, passed.fixed)
    block = _block(plan, cluster, n)
    layout = cluster.layout
    if layout is None or not _products.pays(layout, cluster.length, elementwise=False):
        return _block_norms(gradient, example, weights, block)
    factors, shape = _factors(plan, cluster, example), plan.program.avals[cluster.roots[0]].shape
    return [
        _products.norms(
            factors,
            weights,
            lambda product: layout.into_root(product, shape),
            lambda: _block_norms(gradient, example, weights, block)[0],
        )
    ]


def _block_norms(gradient: Gradient, example: Example, weights: Array | None, block: int) -> list[tuple[Array, Array]]:
    n = len(jax.tree.leaves(example)[0])
    weights = jnp.ones(n) if weights is None else weights

    def reduced(examples: Example, w: Array) -> tuple[list[Array], list[Array]]:
        values = jax.vmap(gradient)(examples)
        sums = [_moments.weighted_sum(w, _moments.counted(w, v)) for v in values]
        return sums, [jnp.sum(v * v, tuple(range(1, v.ndim))) for v in values]

    def body(total: list[Array], piece: tuple[Example, Array, Any]) -> tuple[list[Array], list[Array]]:
        sums, squares = reduced(piece[0], piece[1])
        return [t + s for t, s in zip(total, sums, strict=True)], squares

    if block >= n:
        sums, squares = reduced(example, weights)
    else:
        shapes, _ = jax.eval_shape(reduced, jax.tree.map(lambda x: x[:block], example), weights[:block])
        empty = [jnp.zeros(s.shape, s.dtype) for s in shapes]
        sums, squares = jax.lax.scan(body, empty, _moments.in_chunks(example, weights, None, block))
        squares = [s.reshape(-1)[:n] for s in squares]
    total = _moments.divisor(jnp.sum(weights))
    return [(s / total.astype(s.dtype), q) for s, q in zip(sums, squares, strict=True)]
