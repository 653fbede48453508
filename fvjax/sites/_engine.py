"""One forward and one backward pass over the batch, then the gradients of every example, cluster by cluster.

What is quick is done first, for all clusters, together with a flag that says whether digits were lost. Where the caller
can look at the flag, only the quick part is compiled; under the caller's own `jit` one branch follows it, which forms
the moments of all clusters with care, and within that one last loop over the examples.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _moments
from fvjax._moments import Weighting
from fvjax.sites import _lookups, _products, _rules
from fvjax.sites._plan import Cluster, Plan, Scaling
from fvjax.sites._program import Kind, has_own_rule
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


class Backward(NamedTuple):
    """The losses [n] and, for all sites, what they took from the data and the cotangents of what they gave.

    `fixed` are the values that depend on no data, `scales` those of scaled roots.
    """

    losses: Array
    data: dict[int, Array]
    cotangents: dict[int, Array]
    fixed: dict[int, Any]
    scales: dict[int, Array]

    def of(self, cluster: Cluster) -> Example:
        """What the sites of one cluster need."""
        data = {i: self.data[i] for site in cluster.sites for i in site.data}
        return data, {o: self.cotangents[o] for site in cluster.sites for o in site.outputs}


class Reduced(NamedTuple):
    """Mean and second quantity (m2, its trace, or squared norms) of every target, and whether they are sound.

    None: nothing could have been lost. `unscaled`: the scale of the root, one number, is still to be multiplied in.
    """

    means: list[Array]
    seconds: list[Array]
    sound: Array | None = None
    unscaled: bool = False


@jax.custom_jvp
def _probe(value: Array, _delta: Array) -> Array:
    """`value`, with the derivative of value + delta: delta collects the cotangent, and costs nothing forward."""
    return value


@_probe.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return _probe(*primals), tangents[0] + tangents[1]


def backward(plan: Plan, leaves: Sequence[Array], examples: Sequence[Array]) -> Backward:
    """Runs the loss on all examples, and back.

    Args:
        plan: of the loss.
        leaves: of the params.
        examples: leaves of the batch, [n, ...].
    """
    n = len(examples[0])
    program = plan.program
    # A derivative of its own may index its constants by traced numbers, so they are arrays.
    fixed = {i: jnp.asarray(x) if isinstance(x, np.ndarray) else x for i, x in program.constants.items()}
    fixed |= zip(program.leaves, leaves, strict=True)
    data_steps = []
    for step in program.steps:
        if any(program.kinds[i] == Kind.DATA for i in step.inputs):
            data_steps.append(step)
        else:
            fixed |= step.run(fixed)
    clusters = plan.clusters if plan.common is None else (*plan.clusters, plan.common)
    sites = [site for cluster in clusters for site in cluster.sites]
    wanted = tuple(dict.fromkeys(i for site in sites for i in site.data))

    # A derivative of its own may ask which of its inputs are differentiated: params are, whatever comes of it.
    own = {o: site for site in sites if has_own_rule(site.step.equation) for o in site.outputs}
    params = {operand.value: fixed[operand.value] for site in own.values() for operand in site.operands}

    def forward(
        example: Sequence[Array], deltas: dict[int, Array], params: dict[int, Array]
    ) -> tuple[Array, dict[int, Array]]:
        known = fixed | dict(zip(program.example, example, strict=True))
        for step in data_steps:
            given = known | params if own.keys() & step.results else known
            known |= {o: _probe(v, deltas[o]) if o in deltas else v for o, v in step.run(given).items()}
        return known[program.loss], {i: known[i] for i in wanted}

    avals = {o: program.avals[o] for site in sites for o in site.outputs}

    # The derivative of ONE example, mapped: an output that needs no data still gets the cotangent of each example.
    def of_one(example: Sequence[Array]) -> tuple[Array, dict[int, Array], dict[int, Array]]:
        deltas = {o: jnp.zeros(aval.shape, aval.dtype) for o, aval in avals.items()}
        loss, pull, data = jax.vjp(lambda d, p: forward(example, d, p), deltas, params, has_aux=True)
        return loss, data, pull(jnp.ones_like(loss))[0]

    losses, data, cotangents = jax.vmap(of_one)([*examples, jnp.ones(n, jnp.float32)])
    return Backward(losses, data, cotangents, fixed, plan.scales(fixed))


def _gradient_of_one(plan: Plan, cluster: Cluster, passed: Backward) -> Gradient:
    """The function that forms the gradients of ONE example, in at least float32."""
    pull = plan.pullback(cluster, passed.fixed) if cluster.joint else None
    avals = plan.program.avals

    def gradient(example: Example) -> list[Array]:
        total: dict[int, Array] = {}
        for site in cluster.sites:
            for root, value in _at_site(plan, site, passed.fixed, example).items():
                total[root] = total[root] + value if root in total else value
        gradients = [total[root] for root in cluster.roots]
        gradients = gradients if pull is None else pull(gradients)
        dtypes = [_moments.accumulation_dtype(avals[target]) for target in cluster.targets]
        gradients = [g.astype(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]
        if cluster.scaling:
            gradients = [g * passed.scales[t].astype(g.dtype) for g, t in zip(gradients, cluster.targets, strict=True)]
        return gradients

    return gradient


def _at_site(plan: Plan, site: _rules.Site, fixed: dict[int, Any], example: Example) -> dict[int, Array]:
    """The gradients of ONE example at one site, by root."""
    known, cotangents = fixed | {i: example[0][i] for i in site.data}, [example[1][o] for o in site.outputs]
    if isinstance(site.rule, _rules.Product):
        (root,) = site.roots
        product = site.rule.product(known, cotangents)
        return {root: site.rule.layout.into_root(product, plan.program.avals[root].shape)}
    return {root: _rules.widened(g) for root, g in _rules.derivative(site, known, cotangents).items()}


def _block(plan: Plan, cluster: Cluster, n: int) -> int:
    """How many examples to form at once: all where that takes no more room than the factors, else what fits the cache.

    The last block is padded, so a prime n costs no more than its neighbours.
    """
    avals = plan.program.avals
    factors = sum(avals[i].size for site in cluster.sites for i in (*site.data, *site.outputs))
    size = sum(avals[t].size for t in cluster.targets)
    size += sum(site.rule.patches for site in cluster.sites if isinstance(site.rule, _rules.Product))
    slow = any(site.step.name in _rules.LOOPS for site in cluster.sites)
    fitting = max(1, (SLOW_BLOCK if slow else BLOCK) // max(size, 1))
    if size <= factors and not slow:
        fitting = n
    blocks = -(-n // min(fitting, n)) if n else 1
    return max(1, -(-n // blocks))


def _factors(plan: Plan, cluster: Cluster, passed: Backward) -> _rules.Factors:
    """The factors of all examples, [n, groups, L, ...], not scaled; several sites of one root are more rows."""
    data, cotangents = passed.of(cluster)

    def of_site(site: _rules.Site, rule: _rules.Product) -> _rules.Factors:
        def of_one(data: dict[int, Array], cotangents: list[Array]) -> _rules.Factors:
            return rule.factors(passed.fixed | data, cotangents)

        return jax.vmap(of_one)({i: data[i] for i in site.data}, [cotangents[o] for o in site.outputs])

    dtype = _moments.accumulation_dtype(plan.program.avals[cluster.roots[0]])
    parts = itertools.starmap(of_site, cluster.products)
    rows, columns = (jnp.concatenate([f.astype(dtype) for f in part], 2) for part in zip(*parts, strict=True))
    return _rules.Factors(rows, columns)


def _entries(plan: Plan, cluster: Cluster, passed: Backward) -> _rules.Entries:
    """The rows of a table for all examples, united, [n, L, ...]."""
    data, cotangents = passed.of(cluster)
    lookup = cluster.lookups[0][1]
    dtype = _moments.accumulation_dtype(plan.program.avals[cluster.roots[0]])
    scale = passed.scales[cluster.roots[0]].astype(dtype) if cluster.scaling else None

    def of_one(data: dict[int, Array], cotangents: dict[int, Array]) -> _rules.Entries:
        parts = []
        for site, rule in cluster.lookups:
            known = passed.fixed | {i: data[i] for i in site.data}
            parts.append(rule.entries(known, [cotangents[o] for o in site.outputs]))
        rows = jnp.concatenate([part.rows for part in parts])
        values = jnp.concatenate([part.values.astype(dtype) for part in parts])
        if scale is not None:
            whole = scale if scale.ndim == 0 else lookup.from_root(scale).at[rows].get(mode="fill", fill_value=0)
            values = values * whole
        return _lookups.united(_rules.Entries(rows, values), lookup.size)

    return jax.vmap(of_one)(data, cotangents)


def _scale_of(cluster: Cluster, passed: Backward) -> Array | None:
    """The scale of the coordinates as [groups, R, C], where it is not one number."""
    if cluster.scaling != Scaling.GENERAL:
        return None
    return cluster.products[0][1].layout.from_root(passed.scales[cluster.roots[0]])


def _laid_out(plan: Plan, cluster: Cluster, lead: int) -> Callable[[Array], Array]:
    """From [groups of examples?, groups, R, C] to the shape of the root, with `lead` leading axes."""
    layout, shape = cluster.products[0][1].layout, plan.program.avals[cluster.roots[0]].shape

    def one(product: Array) -> Array:
        return layout.into_root(product, shape)

    return jax.vmap(one) if lead else one


# Moments


def moments(
    plan: Plan, passed: Backward, weighting: Weighting, *, trace: bool, guarded: bool
) -> tuple[dict[int, tuple[Array, Array]], Array]:
    """Mean and m2 (or its trace) of every target, and whether they are sound: always, if `guarded`.

    The means are right in any case, so only m2 passes through the branches.
    """
    quick = [_quick_moments(plan, cluster, passed, weighting, trace=trace) for cluster in plan.clusters]
    unsure = [k for k, reduced in enumerate(quick) if reduced.sound is not None]
    sound = _all(quick[k].sound for k in unsure)
    seconds = [reduced.seconds for reduced in quick]
    if guarded and unsure:

        def carefully(operands: Any) -> list[list[Array]]:
            found, passed, weights, by = operands
            own = Weighting(weights, by, weighting.groups)
            chosen = [plan.clusters[k] for k in unsure]
            return _careful_moments(plan, chosen, passed, weighting=own, found=found, trace=trace)

        def quickly(operands: Any) -> list[list[Array]]:
            return [seconds for seconds, _ in operands[0]]

        operands = [(seconds[k], quick[k].sound) for k in unsure], passed, weighting.weights, weighting.by
        for k, own in zip(unsure, _chosen(sound, quickly, carefully, operands), strict=True):
            seconds[k] = own
        sound = jnp.ones((), bool)
    if weighting.by is not None:  # one example has no variance, whatever is left of the differences
        alone = weighting.counts(len(passed.losses)) <= 1
        seconds = [[jnp.where(_moments.trailing(alone, x) > 0, 0, x) for x in own] for own in seconds]
    return _found(plan, passed, quick, seconds), sound


def _found(
    plan: Plan, passed: Backward, quick: Sequence[Reduced], seconds: Sequence[list[Array]]
) -> dict[int, tuple[Array, Array]]:
    """Mean and second quantity by target; where the scale of a product is one number, it is multiplied in here."""
    found: dict[int, tuple[Array, Array]] = {}
    for cluster, reduced, own in zip(plan.clusters, quick, seconds, strict=True):
        parts = list(zip(reduced.means, own, strict=True))
        if reduced.unscaled:
            (mean, second), scale = parts[0], passed.scales[cluster.roots[0]].astype(parts[0][0].dtype)
            parts = [(mean * scale, second * scale**2)]
        found |= zip(cluster.targets, parts, strict=True)
    return found


def _all(flags: Any) -> Array:
    total = jnp.ones((), bool)
    for flag in flags:
        total = total & flag
    return total


def _quick_moments(plan: Plan, cluster: Cluster, passed: Backward, weighting: Weighting, *, trace: bool) -> Reduced:
    lead = 0 if weighting.groups is None else 1
    if cluster.is_product(elementwise=not trace):
        factors = _products.counted(_factors(plan, cluster, passed), weighting)
        mean, scale = _products.mean(factors, weighting), _scale_of(cluster, passed)
        m2, sound = _products.plain(factors, weighting, mean, scale=scale, trace=trace)
        laid_out = _laid_out(plan, cluster, lead)
        unscaled = cluster.scaling == Scaling.UNIFORM
        return Reduced(
            [laid_out(mean if scale is None else mean * scale)], [m2 if trace else laid_out(m2)], sound, unscaled
        )
    if cluster.is_lookup(weighting.groups):
        lookup = cluster.lookups[0][1]
        into_root = jax.vmap(lookup.into_root) if lead else lookup.into_root
        entries = _entries(plan, cluster, passed)
        mean, m2 = _lookups.moments(entries, lookup.size, weighting, trace=trace)
        return Reduced([into_root(mean)], [m2 if trace else into_root(m2)])
    found = _formed_moments(plan, cluster, passed, weighting, trace=trace)
    return Reduced(found.mean, found.m2)


def _careful_moments(
    plan: Plan,
    clusters: Sequence[Cluster],
    passed: Backward,
    *,
    weighting: Weighting,
    found: Sequence[tuple[list[Array], Array]],
    trace: bool,
) -> list[list[Array]]:
    """m2 of products of which some lost digits: by their deviations, else by forming every gradient.

    Product by product, so that what one needs is freed before the next.
    """
    lead = 0 if weighting.groups is None else 1

    def of_cluster(cluster: Cluster, quick: list[Array], sound: Array) -> list[Array]:
        def by_deviations(operands: Any) -> list[Array]:
            first, passed, weights, by = operands
            own = Weighting(weights, by, weighting.groups)
            factors = _products.counted(_factors(plan, cluster, passed), own)
            second, enough, mean = _products.shifted(factors, own, trace=trace)
            m2 = [second if trace else _laid_out(plan, cluster, lead)(second)]
            if cluster.scaling == Scaling.GENERAL:
                m2, enough = first, jnp.zeros((), bool)

            def exactly(operands: Any) -> list[Array]:
                _, mean, passed, weights, by = operands
                own = Weighting(weights, by, weighting.groups)
                return _exact_moments(plan, cluster, passed, weighting=own, mean=mean, trace=trace)

            return _chosen(enough, lambda operands: operands[0], exactly, (m2, mean, passed, weights, by))

        operands = quick, passed, weighting.weights, weighting.by
        return _chosen(sound, lambda operands: operands[0], by_deviations, operands)

    return [of_cluster(cluster, quick, sound) for cluster, (quick, sound) in zip(clusters, found, strict=True)]


def _exact_moments(
    plan: Plan, cluster: Cluster, passed: Backward, *, weighting: Weighting, mean: Array, trace: bool
) -> list[Array]:
    """m2 of products at their mean, [groups of examples?, groups, R, C]: one gradient after the other is formed.

    The mean is off by a few roundings, so with the gaps g - mean in a group, m2 = sum w gap^2 - (sum w gap)^2 / W.
    The examples are taken group by group, and each adds to m2 by how much that grows: one sum of gaps is kept.
    """
    n, grouped = len(passed.losses), weighting.by is not None
    product, scale = _product_of_one(plan, cluster, passed), _scale_of(cluster, passed)
    weights, groups = weighting.of(n), jnp.zeros(n, jnp.int32)
    if weighting.by is not None:
        inside = weighting.inside(weighting.by)
        weights, groups = jnp.where(inside, weights, 0), jnp.where(inside, weighting.by, 0).astype(jnp.int32)
    totals = jnp.atleast_1d(_moments.divisor(weighting.totals(n)))
    centers = mean if grouped else mean[None]
    examples = passed.of(cluster)

    def body(carry: tuple[Array, Any, Array], row: Array) -> tuple[Any, Any]:
        total, coordinates, last = carry
        weight, group, example = weights[row], groups[row], jax.tree.map(lambda x: x[row], examples)
        gap = product(example) - jax.lax.dynamic_index_in_dim(centers, group, keepdims=False)
        gap = jnp.where(weight > 0, gap if scale is None else gap * scale, 0)
        before, w = jnp.where(group == last, total, 0), weight.astype(gap.dtype)
        after = before + w * gap
        growth = w * gap**2 - (after**2 - before**2) / totals[group].astype(gap.dtype)
        if trace:
            return (after, None, group), jnp.sum(growth)
        own = jax.lax.dynamic_index_in_dim(coordinates, group, keepdims=False) + growth
        return (after, jax.lax.dynamic_update_index_in_dim(coordinates, own, group, 0), group), None

    order = jnp.argsort(groups)
    empty: Any = jnp.zeros_like(centers[0]), None if trace else jnp.zeros_like(centers), groups[order[0]]
    (_, coordinates, _), growths = jax.lax.scan(body, empty, order)
    if trace:
        by_group = Weighting(None, groups[order] if grouped else None, weighting.groups)
        return [jnp.maximum(by_group.total(growths), 0)]
    m2 = jnp.maximum(coordinates if grouped else coordinates[0], 0)
    return [_laid_out(plan, cluster, int(grouped))(m2)]


def _product_of_one(plan: Plan, cluster: Cluster, passed: Backward) -> Callable[[Example], Array]:
    """The gradient of ONE example as [groups, R, C], not scaled."""
    dtype = _moments.accumulation_dtype(plan.program.avals[cluster.roots[0]])

    def product(example: Example) -> Array:
        parts = []
        for site, rule in cluster.products:
            known = passed.fixed | {i: example[0][i] for i in site.data}
            parts.append(rule.product(known, [example[1][o] for o in site.outputs]).astype(dtype))
        return sum(parts[1:], parts[0])

    return product


def _formed_moments(
    plan: Plan, cluster: Cluster, passed: Backward, weighting: Weighting, *, trace: bool
) -> GradientMoments:
    block = _block(plan, cluster, len(passed.losses))
    gradient = _gradient_of_one(plan, cluster, passed)
    return _block_moments(gradient, passed.of(cluster), weighting, block=block, trace=trace)


def _block_moments(
    gradient: Callable[[Any], list[Array]], examples: Any, weighting: Weighting, *, block: int, trace: bool
) -> GradientMoments:
    """Moments of the gradients, a block of examples at a time, relative to the gradient of the first that counts.

    So the running mean is rounded on the scale of the deviations, as in `_moments.merge_chunks`. With groups a block
    has examples of one group only.
    """
    n = len(jax.tree.leaves(examples)[0])
    weights, by, groups = weighting.of(n), weighting.by, weighting.groups
    if block >= n:
        return _moments.moments_of(jax.vmap(gradient)(examples), weights, by, groups, trace=trace)
    first = jnp.argmax(weights > 0)
    origin = [jnp.where(jnp.any(weights > 0), g, 0) for g in gradient(jax.tree.map(lambda x: x[first], examples))]

    def merged(total: GradientMoments, examples: Any, w: Array) -> GradientMoments:
        if block == 1:
            values = gradient(jax.tree.map(lambda x: x[0], examples))
            values = [jnp.where(w[0] == 0, 0, g - o) for g, o in zip(values, origin, strict=True)]
            return _moments.add_one(total, values, w[0])
        values = [g - o for g, o in zip(jax.vmap(gradient)(examples), origin, strict=True)]
        return _moments.merge_moments(total, _moments.moments_of(values, w, trace=trace))

    def body(total: GradientMoments, piece: tuple[Any, Array]) -> tuple[GradientMoments, None]:
        return merged(total, *piece), None

    def body_of_group(total: GradientMoments, piece: tuple[Array, Array]) -> tuple[GradientMoments, None]:
        rows, group = piece
        own = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, group, keepdims=False), total)
        w = weights.at[rows].get(mode="fill", fill_value=0)
        own = merged(own, jax.tree.map(lambda x: x.at[rows].get(mode="clip"), examples), w)
        return jax.tree.map(lambda x, v: jax.lax.dynamic_update_index_in_dim(x, v, group, 0), total, own), None

    lead = () if groups is None else (groups,)
    zeros = [jnp.zeros((*lead, *o.shape), o.dtype) for o in origin]
    m2 = [jnp.zeros(lead, o.dtype) for o in origin] if trace else zeros
    empty = GradientMoments(jnp.zeros(lead, weights.dtype), zeros, m2)
    if by is None:
        total, _ = _moments.scan_compactly(body, empty, _moments.in_chunks(examples, weights, None, block)[:2])
    else:
        total, _ = jax.lax.scan(body_of_group, empty, weighting.in_blocks(n, block))
    mean = [_moments.counted(total.weight, m + o) for m, o in zip(total.mean, origin, strict=True)]
    return total._replace(mean=mean)


def with_common_part(plan: Plan, passed: Backward, weighting: Weighting, means: Sequence[Array]) -> list[Array]:
    """Adds the gradient that all examples share to the means of the leaves, in groups that are not empty."""
    if plan.common is None:
        return list(means)
    n = len(passed.losses)
    weight = weighting.totals(n)
    first = jnp.argmax(weighting.of(n) > 0)
    one = _gradient_of_one(plan, plan.common, passed)(jax.tree.map(lambda x: x[first], passed.of(plan.common)))
    shared = dict(zip(plan.common.targets, one, strict=True))
    return [
        mean + _moments.counted(weight, jnp.broadcast_to(shared[leaf], mean.shape)) if leaf in shared else mean
        for leaf, mean in zip(plan.program.leaves, means, strict=True)
    ]


# Norms


def norms(
    plan: Plan, passed: Backward, weights: Array | None, *, guarded: bool
) -> tuple[dict[int, tuple[Array, Array]], Array]:
    """Weighted mean and squared norms [n] of every target, and whether they are sound: always, if `guarded`."""
    weighting = Weighting(weights, None, None)
    quick = [_quick_norms(plan, cluster, passed, weighting) for cluster in plan.clusters]
    unsure = [k for k, reduced in enumerate(quick) if reduced.sound is not None]
    sound = _all(quick[k].sound for k in unsure)
    seconds = [reduced.seconds for reduced in quick]
    if guarded and unsure:

        def exactly(operands: Any) -> list[list[Array]]:
            return _exact_norms(plan, [plan.clusters[k] for k in unsure], operands[1])

        operands = [seconds[k] for k in unsure], passed
        for k, own in zip(unsure, _chosen(sound, lambda operands: operands[0], exactly, operands), strict=True):
            seconds[k] = own
        sound = jnp.ones((), bool)
    return _found(plan, passed, quick, seconds), sound


def _quick_norms(plan: Plan, cluster: Cluster, passed: Backward, weighting: Weighting) -> Reduced:
    if cluster.is_product(elementwise=False):
        factors = _factors(plan, cluster, passed)
        scale = _scale_of(cluster, passed)
        mean = _products.mean(_products.counted(factors, weighting), weighting)
        squares, bound = _products.squares(factors, scale)
        sound = None if cluster.length == 1 else _products.sound(bound, squares)
        mean = _laid_out(plan, cluster, 0)(mean if scale is None else mean * scale)
        return Reduced([mean], [squares], sound, cluster.scaling == Scaling.UNIFORM)
    if cluster.is_lookup():
        lookup, entries = cluster.lookups[0][1], _entries(plan, cluster, passed)
        mean = lookup.into_root(_lookups.mean(entries, lookup.size, weighting))
        return Reduced([mean], [_lookups.square_norms(entries, lookup.size)])
    gradient, block = _gradient_of_one(plan, cluster, passed), _block(plan, cluster, len(passed.losses))
    return _block_norms(gradient, passed.of(cluster), weighting, block)


def _exact_norms(plan: Plan, clusters: Sequence[Cluster], passed: Backward) -> list[list[Array]]:
    """Squared norms of products: one gradient after the other is formed."""
    products = [_product_of_one(plan, cluster, passed) for cluster in clusters]

    def squares(example: list[Example]) -> list[list[Array]]:
        return [[jnp.sum(product(own) ** 2)] for product, own in zip(products, example, strict=True)]

    return jax.lax.map(squares, [passed.of(cluster) for cluster in clusters])


def _block_norms(gradient: Gradient, examples: Example, weighting: Weighting, block: int) -> Reduced:
    n = len(jax.tree.leaves(examples)[0])
    weights = weighting.of(n)

    def reduced(examples: Example, w: Array) -> tuple[list[Array], list[Array]]:
        values = jax.vmap(gradient)(examples)
        sums = [_moments.weighted_sum(w, v if weighting.weights is None else _moments.counted(w, v)) for v in values]
        return sums, [jnp.sum(v * v, tuple(range(1, v.ndim))) for v in values]

    def body(total: list[Array], piece: tuple[Example, Array, Any]) -> tuple[list[Array], list[Array]]:
        sums, squares = reduced(piece[0], piece[1])
        return [t + s for t, s in zip(total, sums, strict=True)], squares

    if block >= n:
        sums, squares = reduced(examples, weights)
    else:
        shapes, _ = jax.eval_shape(reduced, jax.tree.map(lambda x: x[:block], examples), weights[:block])
        empty = [jnp.zeros(s.shape, s.dtype) for s in shapes]
        sums, squares = _moments.scan_compactly(body, empty, _moments.in_chunks(examples, weights, None, block))
        squares = [s.reshape(-1)[:n] for s in squares]
    total = _moments.divisor(weighting.totals(n))
    return Reduced([s / total.astype(s.dtype) for s in sums], squares)


def _chosen(flag: Array, first: Callable[[Any], Any], second: Callable[[Any], Any], operands: Any) -> Any:
    """`first` of the operands if the flag holds, else `second`; also under `vmap`, which would run both.

    There the choice is made for one after the other. It is differentiated as it is.
    """

    def choice(flag: Array, operands: Any) -> Any:
        return jax.lax.cond(flag, first, second, operands)

    @jax.custom_batching.custom_vmap
    def mapped(flag: Array, operands: Any) -> Any:
        return choice(flag, operands)

    @mapped.def_vmap
    def _(_: int, batched: Any, flag: Array, operands: Any) -> tuple[Any, Any]:
        leaves, structure = jax.tree.flatten((flag, operands))
        moved = jax.tree.leaves(batched)

        def one(own: list[Array]) -> Any:
            rest = iter(own)
            values = [next(rest) if moves else leaf for leaf, moves in zip(leaves, moved, strict=True)]
            return mapped(*jax.tree.unflatten(structure, values))

        found = jax.lax.map(one, [leaf for leaf, moves in zip(leaves, moved, strict=True) if moves])
        return found, jax.tree.map(lambda _: True, found)

    @jax.custom_jvp
    def differentiable(flag: Array, operands: Any) -> Any:
        return mapped(flag, operands)

    @differentiable.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Any, Any]:
        return jax.jvp(choice, primals, tangents)

    return differentiable(flag, operands)
