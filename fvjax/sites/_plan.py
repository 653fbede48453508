"""Which sites a loss has, which params meet data there, and how the gradient of every leaf is put together."""

import enum
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from fvjax.sites import _lookups, _products, _rules
from fvjax.sites._program import LAYOUTS, Kind, Program, Step, computed, has_own_rule
from fvjax.sites._rules import Lookup, Product, Site
from fvjax.types import Array

# Steps that lay a value out anew, without repeating an element: their pullbacks keep every coordinate as it is.
_LAYOUTS = {"reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "rev", "slice", "split"}
# Steps whose derivative is the identity.
_IDENTITIES = {"convert_element_type", "copy", "add", "sub"}
# Steps whose derivative multiplies every coordinate by a constant, where all but one input are constant.
_DIAGONALS = {"mul", "div", "neg", "sub", "select_n"}


class Scaling(enum.IntEnum):
    """By what the way from a leaf to a root multiplies the coordinates: 1, one constant, or a constant each."""

    NONE = 0
    UNIFORM = 1
    GENERAL = 2


class Cluster(NamedTuple):
    """Roots whose per-example gradients are formed together.

    `targets` are the values whose gradients are reduced: the roots themselves or, if `joint`, leaves of the params, to
    which the gradients of the roots are pulled back example by example. `scaling` is that of the root.
    """

    roots: tuple[int, ...]
    sites: tuple[Site, ...]
    targets: tuple[int, ...]
    joint: bool
    scaling: Scaling = Scaling.NONE

    @property
    def products(self) -> list[tuple[Site, Product]]:
        """The sites, if the gradient is a sum of products that lie alike in one root; else none."""
        rules = [(site, site.rule) for site in self.sites if isinstance(site.rule, Product)]
        if self.joint or len(self.roots) > 1 or len(rules) < len(self.sites):
            return []
        layouts = {rule.layout for _, rule in rules}
        # The norm of a sum of products whose coordinates are scaled takes each coordinate.
        scaled = self.scaling == Scaling.GENERAL and (self.length > 1 or bool(rules[0][1].layout.tail))
        return [] if len(layouts) > 1 or scaled else rules

    @property
    def lookups(self) -> list[tuple[Site, Lookup]]:
        """The sites, if the gradient is made of rows of one table; else none."""
        rules = [(site, site.rule) for site in self.sites if isinstance(site.rule, Lookup)]
        if self.joint or len(self.roots) > 1 or len(rules) < len(self.sites):
            return []
        return rules if len({(rule.axes, rule.numbering) for _, rule in rules}) == 1 else []

    def is_product(self, *, elementwise: bool) -> bool:
        """Whether norms and moments (or the coordinates of these) follow from the factors of the products."""
        rules = self.products
        return bool(rules) and _products.pays(rules[0][1].layout, self.length, elementwise=elementwise)

    def is_lookup(self, groups: int | None = None) -> bool:
        """Whether they follow from the rows of a table."""
        rules = self.lookups
        return bool(rules) and _lookups.fits(rules[0][1].size, groups)

    @property
    def length(self) -> int:
        """The number of outer products in one example."""
        return sum(site.rule.length for site in self.sites if site.rule is not None)

    @property
    def words(self) -> str:
        """The rules in words."""
        names = {site.words for site in self.sites}
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

    def price(self, cluster: Cluster) -> float:
        """What forming the gradients of a cluster one by one costs, in gradients of the loss, by count of operations.

        0 for less than 1,000 operations an example, which nobody waits for.

        Counted is what an example adds: the derivative of its sites (a product of a joint cluster: the product), one
        outer product an iteration for what a loop takes whole, the way back to the leaves, and three operations on
        every element that is formed.
        """
        program = self.program
        whole = sum(operations(s.equation, [program.kinds[i] == Kind.DATA for i in s.inputs]) for s in program.steps)
        found = 3.0 * sum(program.size(target) for target in cluster.targets)
        for site in cluster.sites:
            if isinstance(site.rule, Product):
                found += operations(site.step.equation)
            else:
                found += 2 * operations(site.step.equation) + _iterated(program, site)
        if cluster.joint:
            found += 2 * sum(operations(step.equation) for step in _chain(program, set(cluster.roots)))
        return found / max(3 * whole, 1) if found >= 1000 else 0.0

    def spread(self, leaf: int, value: Array, fixed: Mapping[int, Any] | None = None) -> list[Array]:
        """The parts of a leaf that its roots are, in the dtype of `value`; as they are scaled, if `fixed` is given.

        Args:
            leaf: with an entry in `roots_of`.
            value: of the leaf's shape.
            fixed: the values that depend on no data, for the scale.
        """
        known = {leaf: value}
        for step in self.chain:
            source = next((i for i in step.inputs if i in known), None)
            if source is None:
                continue
            if step.name in _LAYOUTS:
                known |= step.run(known)
            else:
                scaled = known[source] if fixed is None else _diagonal(step, source, known[source], fixed)
                known |= dict.fromkeys(step.results, scaled)
        return [known[root] for root in self.roots_of[leaf]]

    def scales(self, fixed: Mapping[int, Any]) -> dict[int, Array]:
        """What the gradients of scaled roots are multiplied by: a number, or an array like the root."""
        scaling = {cluster.roots[0]: cluster.scaling for cluster in self.clusters if cluster.scaling}
        found = {}
        for leaf, roots in self.roots_of.items():
            if scaling.keys().isdisjoint(roots):
                continue
            avals = [self.program.avals[value] for value in (leaf, *roots)]
            ones = jnp.ones(avals[0].shape, np.result_type(np.float32, *(aval.dtype for aval in avals)))
            for root, value in zip(roots, self.spread(leaf, ones, fixed), strict=True):
                if root in scaling:
                    found[root] = value.ravel()[0] if scaling[root] == Scaling.UNIFORM else value
        return found

    def pullback(self, cluster: Cluster, fixed: dict[int, Any]) -> Callable[[list[Array]], list[Array]]:
        """From the roots of a joint cluster to its leaves, at the given values of what depends on no data."""
        chain = _chain(self.program, set(cluster.roots))

        def roots(leaves: list[Array]) -> list[Array]:
            known = computed(chain, fixed | dict(zip(cluster.targets, leaves, strict=True)))
            return [known[r] for r in cluster.roots]

        values, pull = jax.vjp(roots, [fixed[leaf] for leaf in cluster.targets])
        return lambda gradients: pull([g.astype(v.dtype) for g, v in zip(gradients, values, strict=True)])[0]


def _diagonal(step: Step, source: int, value: Array, fixed: Mapping[int, Any]) -> Array:
    """What a step with constants makes of a change of one of its inputs."""
    place = step.inputs.index(source)
    if step.name in {"mul", "div"}:
        other = jnp.asarray(fixed[step.inputs[1 - place]]).astype(value.dtype)
        return value * other if step.name == "mul" else value / other
    if step.name == "select_n":
        chosen = jnp.asarray(fixed[step.inputs[0]]).astype(jnp.int32) == place - 1
        return jnp.where(chosen, value, jnp.zeros_like(value))
    return -value if step.name == "neg" or (step.name == "sub" and place == 1) else value


def make_plan(program: Program, *, separate: bool) -> Plan:
    """Finds the sites of a program and the clusters of its leaves; `separate` keeps apart what all examples share."""
    found = _sites(program)
    shared = _shared(program, found) if separate else ()
    if any(has_own_rule(step.equation) for step in _chain(program, set(_roots(shared)))):
        shared = ()  # a derivative rule of params need not be linear, and then has no parts
    common = _joint(program, shared) if shared else None
    sites = tuple(site for site in found if site not in shared)
    roots = _roots(sites)
    chain = _chain(program, set(roots))
    leaves_of = _dependence(program, chain)
    used = set().union(*(leaves_of[root] for root in roots))
    parts = _Parts(program, chain, set(roots))
    direct = {leaf: scalings for leaf in used if (scalings := parts.of(leaf)) is not None}
    scaling = {root: value for scalings in direct.values() for root, value in scalings.items()}

    clusters = []
    together = [site.roots for site in sites]
    for group in _connected([*used, *roots], [*together, *((root, *leaves_of[root]) for root in roots)]):
        inside = tuple(site for site in sites if site.roots[0] in group)
        if not group & used <= direct.keys():
            clusters.append(_joint(program, inside))
            continue
        for members in _connected(_roots(inside), [site.roots for site in inside]):
            own = tuple(site for site in inside if site.roots[0] in members)
            made = _roots(own)
            clusters.append(Cluster(made, own, made, joint=False, scaling=max(scaling[root] for root in made)))
    joined = {leaf for cluster in clusters if cluster.joint for leaf in cluster.targets}
    roots_of = {leaf: tuple(r for r in roots if leaf in leaves_of[r]) for leaf in used - joined}
    return Plan(program, tuple(clusters), common, tuple(chain), roots_of)


PRODUCT = 1 / 32
"""What a multiplication inside a matrix product costs, beside an operation on an element of an array."""


def operations(equation: Any, moving: Sequence[bool] | None = None) -> float:
    """The operations of an equation, in those on elements of arrays; of a loop those of all its iterations.

    Args:
        equation: of a jaxpr.
        moving: which of its inputs depend on data: then only operations that do are counted; the others are done once
            for all examples. None counts all.
    """
    options, name = equation.params, equation.primitive.name
    if moving is not None and not any(moving):
        return 0.0
    sizes = [v.aval.size for v in equation.outvars if hasattr(v.aval, "size")]
    if name == "dot_general":
        contracted = options["dimension_numbers"][0][0]
        return 2 * PRODUCT * sizes[0] * math.prod(equation.invars[0].aval.shape[a] for a in contracted)
    if name == "conv_general_dilated":
        kernel, spec = equation.invars[1].aval, options["dimension_numbers"].rhs_spec
        return 2 * PRODUCT * sizes[0] * kernel.size / max(1, kernel.shape[spec[0]])
    bodies = list(jex.jaxprs_in_params(options))
    if not bodies:
        return float(sum(sizes))
    if name == "scan":
        if moving is not None:
            moving = _moving_in_scan(bodies[0], list(moving), options["num_consts"], options["num_carry"])
        return options["length"] * _operations_inside(bodies[0], moving)[0]
    if name == "cond":
        return max(_operations_inside(body, None if moving is None else moving[1:])[0] for body in bodies)
    return sum(_operations_inside(body, None)[0] for body in bodies)


def _operations_inside(body: Any, moving: Sequence[bool] | None) -> tuple[float, list[bool]]:
    """The operations of a jaxpr, and which of its outputs depend on the moving inputs."""
    if moving is None or len(moving) != len(body.invars):
        return sum(map(operations, body.eqns)), [True] * len(body.outvars)
    moved = {v for v, moves in zip(body.invars, moving, strict=True) if moves}
    total = 0.0
    for equation in body.eqns:
        own = [isinstance(v, jex.Var) and v in moved for v in equation.invars]
        total += operations(equation, own)
        if any(own):
            moved.update(equation.outvars)
    return total, [isinstance(v, jex.Var) and v in moved for v in body.outvars]


def _moving_in_scan(body: Any, moving: list[bool], consts: int, carries: int) -> list[bool]:
    """Which inputs of the body depend on data in some iteration."""
    for _ in range(carries + 1):
        outputs = _operations_inside(body, moving)[1][:carries]
        after = [a or b for a, b in zip(moving[consts : consts + carries], outputs, strict=True)]
        if after == moving[consts : consts + carries]:
            break
        moving[consts : consts + carries] = after
    return moving


def _iterated(program: Program, site: Site) -> float:
    """The elements that a loop adds up for the params that every one of its iterations takes whole."""
    if site.step.name != "scan":
        return 0.0
    options = site.step.options
    whole = site.step.inputs[: options["num_consts"] + options["num_carry"]]
    taken = {operand.value for operand in site.operands} & set(whole)
    return float(options["length"] * sum(program.size(value) for value in taken))


def _roots(sites: Iterable[Site]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(root for site in sites for root in site.roots))


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
        scaled = len(others) == 1 and (step.name in {"mul", "neg"} or (step.name == "div" and step.inputs[0] in others))
        if constant_slope.isdisjoint(step.results) or not (scaled or step.name in _LAYOUTS | _IDENTITIES):
            continue
        constant_slope.update(i for i in others if uses[i] == 1 and program.kinds[i] == Kind.DATA)
        if step.results in site_of and (scaled or step.name in {"add", "sub"}):
            shared.append(site_of[step.results])
    return tuple(shared)


def _sites(program: Program) -> list[Site]:
    varying, reaching = _varying(program), _reaching(program)
    producers = {o: step for step in program.steps for o in step.results}
    around = _rules.Surroundings(program, producers, varying, _moving(program, varying))
    sites: list[Site] = []
    for step in program.steps:
        outputs = tuple(o for o in step.outputs if o in reaching and program.kinds[o] == Kind.DATA)
        if outputs and step.name != "stop_gradient" and varying.intersection(step.inputs):
            sites += _rules.sites_at(around, step, outputs)
    return sites


def _varying(program: Program) -> set[int]:
    """The values that depend on params alone, and have a derivative with respect to them."""
    varying = {leaf for leaf in program.leaves if program.differentiable(leaf)}
    for step in program.steps:
        if step.name != "stop_gradient" and varying.intersection(step.inputs):
            varying.update(o for o in step.results if program.differentiable(o) and program.kinds[o] == Kind.PARAMS)
    return {value for value in varying if program.size(value)}


def _moving(program: Program, varying: set[int]) -> set[int]:
    """The values that depend on data and, differentiably, on params."""
    moved = set(varying)
    for step in program.steps:
        if step.name != "stop_gradient" and moved.intersection(step.inputs):
            moved.update(o for o in step.results if program.differentiable(o))
    return moved - varying


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
    """Decides whether the roots of a leaf are disjoint parts of it, each used as it is or times constants."""

    def __init__(self, program: Program, chain: list[Step], roots: set[int]) -> None:
        self.program, self.roots = program, roots
        self.uses: dict[int, list[Step]] = defaultdict(list)
        for step in chain:
            for value in dict.fromkeys(step.inputs):
                self.uses[value].append(step)
        self.uniform = {i for i, value in program.constants.items() if jnp.size(value) == 1}
        for step in program.steps:
            if step.name in LAYOUTS and len(step.inputs) == 1 and step.inputs[0] in self.uniform:
                self.uniform.update(step.results)

    def of(self, value: int, scaling: Scaling = Scaling.NONE) -> dict[int, Scaling] | None:
        """The scaling of every root that is a part of `value`, or None where a root is no such part."""
        uses = self.uses[value]
        if len(uses) + (value in self.roots) > 1 and (value in self.roots or not _disjoint_slices(uses)):
            return None
        found = {value: scaling} if value in self.roots else {}
        for step in uses:
            own = self._scaling(step, value)
            for result in step.results:
                parts = None if own is None else self.of(result, max(scaling, own))
                if parts is None:
                    return None
                found |= parts
        return found

    def _scaling(self, step: Step, value: int) -> Scaling | None:
        """By what a step multiplies the coordinates; None where it mixes or repeats them, or mixes in what varies."""
        program, output = self.program, self.program.avals[step.results[0]]
        others = [i for i in step.inputs if i != value]
        if not (program.real(value) and program.real(step.results[0])) or step.inputs.count(value) > 1:
            return None
        if any(program.kinds[i] != Kind.CONSTANT for i in others):
            return None
        if step.name in _LAYOUTS | _IDENTITIES and not others:
            repeated = step.name == "broadcast_in_dim" and output.size != program.avals[value].size
            return None if repeated else Scaling.NONE
        if output.shape != program.avals[value].shape:
            return None
        if step.name in {"add", "sub"}:
            return Scaling.UNIFORM if step.name == "sub" and step.inputs[1] == value else Scaling.NONE
        if step.name not in _DIAGONALS or (step.inputs[0] != value and step.name == "div"):
            return None
        if step.name == "select_n":
            return None if step.inputs[0] == value else Scaling.GENERAL
        return Scaling.UNIFORM if self.uniform.issuperset(others) else Scaling.GENERAL


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
