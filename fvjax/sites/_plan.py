"""Which sites a loss has, which params meet data there, and how the gradient of every leaf is put together."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax

from fvjax.sites import _rules
from fvjax.sites._program import Kind, Program, Step, has_own_rule
from fvjax.sites._rules import Layout, Site
from fvjax.types import Array

LARGE_RATIO = 16
"""Gradients formed example by example are slow if they are this many times larger than what they are made of."""

# Steps that lay a value out anew, without repeating an element: their pullbacks keep every coordinate as it is.
_LAYOUTS = {"reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "rev", "slice", "split"}
# Steps whose derivative is the identity.
_IDENTITIES = {"convert_element_type", "copy", "add", "sub"}


class Cluster(NamedTuple):
    """Roots whose per-example gradients are formed together.

    `targets` are the values whose gradients are reduced: the roots themselves or, if `joint`, leaves of the params, to
    which the gradients of the roots are pulled back example by example.
    """

    roots: tuple[int, ...]
    sites: tuple[Site, ...]
    targets: tuple[int, ...]
    joint: bool

    @property
    def layout(self) -> Layout | None:
        """Of the products that make up the gradient, if all sites have the same, in one root: else None."""
        if self.joint or len(self.roots) > 1 or not all(map(_rules.is_product, self.sites)):
            return None
        layouts = {_rules.layout(site) for site in self.sites}
        return layouts.pop() if len(layouts) == 1 else None

    @property
    def length(self) -> int:
        """The number of outer products in one example, if there is a layout."""
        return sum(map(_rules.length, self.sites))

    @property
    def path(self) -> str:
        """The rules in words."""
        names = {_rules.describe(site) for site in self.sites}
        return " + ".join(sorted(names)) + (", pulled back per example" if self.joint else "")


class Plan(NamedTuple):
    """The program, the clusters that together hold the gradient of every leaf, and the way from leaves to roots.

    `common` is a joint cluster of the sites whose gradient is the same for every example (weight decay), if these are
    kept apart: it moves the mean, and no variance. `chain` are the steps from leaves to roots; `roots_of` names, for
    the leaves that are not in a joint cluster, the roots that are their disjoint parts.
    """

    program: Program
    clusters: tuple[Cluster, ...]
    common: Cluster | None
    chain: tuple[Step, ...]
    roots_of: dict[int, tuple[int, ...]]

    def leaves_of(self, cluster: Cluster) -> list[int]:
        """The leaves whose gradient a cluster holds, or holds a part of."""
        if cluster.joint:
            return list(cluster.targets)
        return [leaf for leaf, roots in self.roots_of.items() if set(roots) & set(cluster.roots)]

    def is_slow(self, cluster: Cluster) -> bool:
        """Whether it costs as much as `vmap(grad)`: whole programs, and gradients much larger than their factors."""
        avals = self.program.avals
        if any(map(_rules.is_loop, cluster.sites)):
            return True
        factors = sum(avals[i].size for site in cluster.sites for i in (*site.data, *site.outputs))
        formed = sum(avals[target].size for target in cluster.targets)
        opaque = cluster.joint or any(map(_rules.is_custom, cluster.sites))
        return opaque and formed > LARGE_RATIO * factors

    def spread(self, leaf: int, value: Array) -> list[Array]:
        """The parts of a leaf that its roots are, linearly and in the dtype of `value`."""
        known = {leaf: value}
        for step in self.chain:
            source = next((i for i in step.inputs if i in known), None)
            if source is not None and step.name in _IDENTITIES:
                known |= dict.fromkeys(step.results, known[source])
            elif source is not None:
                known |= step.run(known)
        return [known[root] for root in self.roots_of[leaf]]

    def pullback(self, cluster: Cluster, fixed: dict[int, Any]) -> Callable[[list[Array]], list[Array]]:
        """From the roots of a joint cluster to its leaves, at the given values of what depends on no data."""
        chain = _chain(self.program, set(cluster.roots))

        def roots(leaves: list[Array]) -> list[Array]:
            known = fixed | dict(zip(cluster.targets, leaves, strict=True))
            for step in chain:
                known |= step.run(known)
            return [known[r] for r in cluster.roots]

        values, pull = jax.vjp(roots, [fixed[leaf] for leaf in cluster.targets])
        return lambda gradients: pull([g.astype(v.dtype) for g, v in zip(gradients, values, strict=True)])[0]


def make_plan(program: Program, *, separate: bool) -> Plan:
    """Finds the sites of a program and the clusters of its leaves; `separate` keeps apart what all examples share."""
    found = _sites(program)
    # A derivative rule of params need not be linear, and then has no parts.
    linear = not any(has_own_rule(step.equation) for step in _chain(program, set(_roots(found))))
    shared = _shared(program, found) if separate and linear else ()
    common = _joint(program, shared) if shared else None
    sites = tuple(site for site in found if site not in shared)
    roots = _roots(sites)
    chain = _chain(program, set(roots))
    leaves_of = _dependence(program, chain)
    used = set().union(*(leaves_of[root] for root in roots))
    parts = _Parts(program, chain, set(roots))
    direct = {leaf for leaf in used if parts.are_disjoint(leaf)}

    clusters = []
    together = [_roots((site,)) for site in sites]
    for group in _connected([*used, *roots], [*together, *((root, *leaves_of[root]) for root in roots)]):
        inside = tuple(site for site in sites if site.operands[0].root in group)
        if not group & used <= direct:
            clusters.append(_joint(program, inside))
            continue
        for members in _connected(_roots(inside), map(_roots, ((site,) for site in inside))):
            own = tuple(site for site in inside if site.operands[0].root in members)
            clusters.append(Cluster(_roots(own), own, _roots(own), joint=False))
    joined = {leaf for cluster in clusters if cluster.joint for leaf in cluster.targets}
    roots_of = {leaf: tuple(r for r in roots if leaf in leaves_of[r]) for leaf in used - joined}
    return Plan(program, tuple(clusters), common, tuple(chain), roots_of)


def _roots(sites: Iterable[Site]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(operand.root for site in sites for operand in site.operands))


def _joint(program: Program, sites: tuple[Site, ...]) -> Cluster:
    roots = _roots(sites)
    leaves_of = _dependence(program, _chain(program, set(roots)))
    leaves = set().union(*(leaves_of[root] for root in roots))
    return Cluster(roots, sites, tuple(leaf for leaf in program.leaves if leaf in leaves), joint=True)


def _shared(program: Program, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites that add something made of params to a part of the loss with a constant slope, such as weight decay.

    Their gradient is the same for every example. Followed from the loss backwards through sums, layouts and constant
    factors, and through values that are used only once.
    """
    uses = Counter(i for step in program.steps for i in set(step.inputs))
    ones = {program.example[-1]}
    for step in program.steps:
        if step.name == "convert_element_type" and ones.issuperset(step.inputs):
            ones.update(step.results)
    constant_slope, shared = {program.loss}, []
    site_of = {site.step.results: site for site in sites}
    for step in reversed(program.steps):
        others = [i for i in step.inputs if i not in ones and program.kinds[i] != Kind.CONSTANT]
        scaled = len(others) == 1 and (step.name == "mul" or (step.name == "div" and step.inputs[0] in others))
        if constant_slope.isdisjoint(step.results) or not (scaled or step.name in _LAYOUTS | _IDENTITIES):
            continue
        constant_slope.update(i for i in others if uses[i] == 1 and program.kinds[i] == Kind.DATA)
        if step.results in site_of and (scaled or step.name in {"add", "sub"}):
            shared.append(site_of[step.results])
    return tuple(shared)


def _sites(program: Program) -> list[Site]:
    varying, reaching = _varying(program), _reaching(program)
    producers = {o: step for step in program.steps for o in step.results}
    sites = []
    for step in program.steps:
        outputs = tuple(o for o in step.outputs if o in reaching and program.kinds[o] == Kind.DATA)
        if outputs and step.name != "stop_gradient" and varying.intersection(step.inputs):
            operands = _rules.find_operands(program, step, producers, varying)
            data = dict.fromkeys(i for i in step.inputs if program.kinds[i] == Kind.DATA)
            sites.append(Site(step, operands, tuple(data), outputs))
    return sites


def _varying(program: Program) -> set[int]:
    """The values that depend on params alone, and have a derivative with respect to them."""
    varying = {leaf for leaf in program.leaves if program.differentiable(leaf)}
    for step in program.steps:
        if step.name != "stop_gradient" and varying.intersection(step.inputs):
            varying.update(o for o in step.results if program.differentiable(o) and program.kinds[o] == Kind.PARAMS)
    return {value for value in varying if program.size(value)}


def _reaching(program: Program) -> set[int]:
    """The values through which the loss can be differentiated: what lies behind a stop_gradient is left out."""
    reaching = {program.loss}
    for step in reversed(program.steps):
        if step.name != "stop_gradient" and reaching.intersection(step.results):
            reaching.update(i for i in step.inputs if program.differentiable(i))
    return reaching


def _chain(program: Program, roots: set[int]) -> list[Step]:
    """The steps that make the roots from the leaves; what they take from constants alone is not among them."""
    wanted, chain = set(roots), []
    for step in reversed(program.steps):
        if any(o in wanted and program.kinds[o] == Kind.PARAMS for o in step.results):
            wanted.update(step.inputs)
            chain.append(step)
    return chain[::-1]


def _dependence(program: Program, chain: list[Step]) -> dict[int, set[int]]:
    """The leaves on which each value of the chain depends; a stop_gradient only makes it larger than necessary."""
    depends = {leaf: {leaf} for leaf in program.leaves}
    for step in chain:
        own = set().union(*(depends.get(i, set()) for i in step.inputs))
        depends |= dict.fromkeys(step.results, own)
    return depends


class _Parts:
    """Decides whether the roots of a leaf are disjoint parts of it, each used as it is."""

    def __init__(self, program: Program, chain: list[Step], roots: set[int]) -> None:
        self.program, self.roots = program, roots
        self.uses: dict[int, list[Step]] = defaultdict(list)
        for step in chain:
            for value in dict.fromkeys(step.inputs):
                self.uses[value].append(step)

    def are_disjoint(self, value: int) -> bool:
        uses = self.uses[value]
        if len(uses) + (value in self.roots) > 1 and (value in self.roots or not _disjoint_slices(uses)):
            return False
        return all(
            self._keeps_coordinates(step, value) and all(self.are_disjoint(o) for o in step.results) for step in uses
        )

    def _keeps_coordinates(self, step: Step, value: int) -> bool:
        program, result = self.program, step.results[0]
        output, others = program.avals[result], [i for i in step.inputs if i != value]
        if not (program.real(value) and program.real(result)) or any(program.kinds[i] != Kind.CONSTANT for i in others):
            return False
        if step.name in {"add", "sub"}:
            counted = step.inputs.count(value) == 1 and (step.name == "add" or step.inputs[0] == value)
            return counted and output.shape == program.avals[value].shape
        if step.name == "broadcast_in_dim":
            return output.size == program.avals[value].size
        return not others and step.name in _LAYOUTS | _IDENTITIES


def _disjoint_slices(steps: Sequence[Step]) -> bool:
    """Whether the steps cut pieces without a common element from one array: apart, or out of step, along some axis."""
    if any(step.name != "slice" for step in steps):
        return False

    def ranges(step: Step) -> list[range]:
        options = step.options
        strides = options["strides"] or [1] * len(options["start_indices"])
        return list(map(range, options["start_indices"], options["limit_indices"], strides))

    def apart(one: range, other: range) -> bool:
        out_of_step = one.step == other.step and (one.start - other.start) % one.step != 0
        return one.stop <= other.start or other.stop <= one.start or out_of_step

    boxes = list(map(ranges, steps))
    return all(any(map(apart, box, other)) for i, box in enumerate(boxes) for other in boxes[:i])


def _connected(items: Iterable[int], links: Iterable[Iterable[int]]) -> list[set[int]]:
    """The connected components of the items under the links."""
    component = {item: {item} for item in items}
    for link in links:
        merged = set().union(*(component[item] for item in link))
        for item in merged:
            component[item] = merged
    return list({id(group): group for group in component.values()}.values())
