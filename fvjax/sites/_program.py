"""The loss of one example as a flat list of equations, each of whose values is constant, made of params, or data."""

import enum
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from fvjax.types import Array, Params

UNROLLED = 64
"""Scans that mix params with data are unrolled up to this many iterations; longer ones stay one site."""

# Calls without a derivative rule of their own: what they do is what their equations do.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"}
LAYOUTS = {"broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze", "expand_dims", "transpose"}
"""Steps that only lay out or cast a value."""

_PRODUCTS = {"dot_general", "conv_general_dilated"}

_OWN_RULES = ("custom_", "linear_call", "remat_opt")
"""How the names of equations begin that hold a derivative of their own, or a transpose."""


class Kind(enum.IntEnum):
    """What a value depends on; that of an equation's outputs is the largest of its inputs."""

    CONSTANT = 0
    PARAMS = 1
    DATA = 2


class Step(NamedTuple):
    """An equation between values that are named by integers; None for an output that nobody reads."""

    equation: Any
    inputs: tuple[int, ...]
    outputs: tuple[int | None, ...]

    @property
    def name(self) -> str:
        """The name of the primitive."""
        return self.equation.primitive.name

    @property
    def results(self) -> tuple[int, ...]:
        """The outputs that are read."""
        return tuple(o for o in self.outputs if o is not None)

    @property
    def options(self) -> dict[str, Any]:
        """The parameters of the primitive."""
        return self.equation.params

    def run(self, values: dict[int, Any]) -> dict[int, Any]:
        """The outputs, from a dictionary that holds the inputs."""
        variables = {v: i for v, i in zip(self.equation.invars, self.inputs, strict=True) if isinstance(v, jex.Var)}
        read = [(v, o) for v, o in zip(self.equation.outvars, self.outputs, strict=True) if o is not None]
        debug = jex.DebugInfo("fvjax.sites", self.name, ("",) * len(variables), ("",) * len(read))
        jaxpr = jex.Jaxpr((), list(variables), [v for v, _ in read], [self.equation], self.equation.effects, debug)
        results = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))(*(values[i] for i in variables.values()))
        return {o: r for (_, o), r in zip(read, results, strict=True)}


class Program(NamedTuple):
    """The steps of the loss, in order, and what is known of every value."""

    steps: list[Step]
    avals: list[Any]
    kinds: list[Kind]
    constants: dict[int, Any]
    leaves: list[int]
    example: list[int]
    loss: int

    def differentiable(self, value: int) -> bool:
        """Whether the value is of a floating or complex type."""
        return jnp.issubdtype(self.avals[value].dtype, jnp.inexact)

    def real(self, value: int) -> bool:
        """Whether the value is of a floating type."""
        return jnp.issubdtype(self.avals[value].dtype, jnp.floating)

    def size(self, value: int) -> int:
        """The number of its elements."""
        return int(self.avals[value].size)


def trace(loss: Callable[[Params, Any], Array], params: Params, example: Any) -> Program:
    """Traces `loss` at the shapes of `params` and of one `example`.

    The loss is multiplied by one more input, a 1 that counts as data: so the last equation always is a data equation,
    even if the loss does not depend on the example.
    """

    def scaled(params: Params, example: Any, one: Array) -> Array:
        value: Any = loss(params, example)
        if isinstance(value, tuple | list | dict):
            raise ValueError(
                f"loss must return a real scalar, got a {type(value).__name__} of {len(value)}; of (loss, aux) give the"
                " first: lambda params, example: loss(params, example)[0]"
            )
        value = jnp.asarray(value)
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"loss must return a real scalar, got shape {value.shape}, {value.dtype}")
        return value * one.astype(value.dtype)

    closed = jax.make_jaxpr(scaled)(params, example, jax.ShapeDtypeStruct((), jnp.float32))
    if _holds_references(closed.jaxpr):
        raise ValueError("loss must be without mutable references (jax.new_ref), got one")
    flat = Flattener()
    count = len(jax.tree.leaves(params))
    inputs = [flat.new(v.aval, Kind.PARAMS if i < count else Kind.DATA) for i, v in enumerate(closed.jaxpr.invars)]
    (value,) = flat.inline(closed, inputs)
    steps = live(flat.steps, {value})
    return Program(steps, flat.avals, flat.kinds, flat.constants, inputs[:count], inputs[count:], value)


def _holds_references(jaxpr: Any) -> bool:
    """Whether values are written to: what an equation gives then does not depend on its inputs alone."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in {"new_ref", "ref", "get", "swap", "addupdate"}:
            return True
        if any(map(_holds_references, jex.jaxprs_in_params(equation.params))):
            return True
    return False


class Flattener:
    """Collects the steps. Sub-jaxprs are shared between calls, so every call numbers its values anew."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.avals: list[Any] = []
        self.kinds: list[Kind] = []
        self.constants: dict[int, Any] = {}
        self.zeros: set[int] = set()
        self._seen: dict[Any, tuple[int | None, ...]] = {}
        self._closed_over: dict[int, int] = {}

    def new(self, aval: Any, kind: Kind) -> int:
        self.avals.append(aval)
        self.kinds.append(kind)
        return len(self.avals) - 1

    def constant(self, value: Any) -> int:
        index = self.new(jax.typeof(value), Kind.CONSTANT)
        self.constants[index] = value
        return index

    def _closed(self, value: Any) -> int:
        """A constant that a jaxpr closes over: the same array is the same value, wherever it is used."""
        if id(value) not in self._closed_over:
            self._closed_over[id(value)] = self.constant(value)
        return self._closed_over[id(value)]

    def _is_zero(self, name: str, inputs: list[int]) -> bool:
        """Whether the equation gives zeros for all that is known of it: zeros laid out, or times params."""
        known = [i in self.zeros for i in inputs]
        return (name in LAYOUTS and all(known[:1]) and bool(known)) or (name in _PRODUCTS and any(known))

    def inline(self, closed: Any, inputs: Sequence[int]) -> list[int]:
        jaxpr = closed.jaxpr
        values = dict(zip(jaxpr.constvars, map(self._closed, closed.consts), strict=True))
        values |= zip(jaxpr.invars, inputs, strict=True)

        def read(atom: Any) -> int:
            if not isinstance(atom, jex.Literal):
                return values[atom]
            index = self.constant(atom.val)
            if not np.any(np.asarray(atom.val)):
                self.zeros.add(index)
            return index

        for equation in jaxpr.eqns:
            values |= zip(equation.outvars, self.equation(equation, [read(v) for v in equation.invars]), strict=True)
        return [read(v) for v in jaxpr.outvars]

    def equation(self, equation: Any, inputs: list[int]) -> Sequence[int | None]:
        kinds = {self.kinds[i] for i in inputs}
        name = equation.primitive.name
        if Kind.PARAMS in kinds:
            if name in _CALLS:
                return self.inline(_body(equation), inputs)
            if name == "scan" and Kind.DATA in kinds and 1 <= equation.params["length"] <= UNROLLED:
                return self.inline(_unrolled(equation), inputs)
            if len(equation.outvars) > 1 and Kind.DATA in kinds:
                return self._split(equation, inputs)
        return self._step(equation, inputs)

    def _split(self, equation: Any, inputs: list[int]) -> list[int | None]:
        """An equation of params and data in parts: outputs that depend on no data are made apart, each kind alone."""
        outputs: list[int | None] = [None] * len(equation.outvars)
        places: dict[Kind, list[int]] = {}
        for k, variable in enumerate(equation.outvars):
            if isinstance(variable, jex.DropVar):
                continue
            source = _passed_through(equation, k)
            if source is not None:
                outputs[k] = inputs[source]
                continue
            kind = max((self.kinds[inputs[i]] for i in _needed(equation, [k])[1]), default=Kind.CONSTANT)
            places.setdefault(kind, []).append(k)
        for kind, own in places.items():
            if kind == Kind.DATA:
                found = self._step(equation, inputs, read=own)
                outputs = [found[k] if k in own else o for k, o in enumerate(outputs)]
            else:
                part, needed = _needed(equation, own)
                made = self.inline(part, [inputs[i] for i in needed])
                outputs = [made[own.index(k)] if k in own else o for k, o in enumerate(outputs)]
        return outputs

    def _step(self, equation: Any, inputs: list[int], read: Sequence[int] | None = None) -> tuple[int | None, ...]:
        """One more step, with all outputs or those of the given places."""
        kind = max((self.kinds[i] for i in inputs), default=Kind.CONSTANT)
        name = equation.primitive.name
        zero = self._is_zero(name, inputs)
        if zero and kind == Kind.PARAMS:
            kind = Kind.CONSTANT  # the first step of a recurrent network: a state of zeros times params
        # The same function of the same params is one value: a layer that is called twice is then one root.
        key = _identity(equation, inputs) if kind == Kind.PARAMS else None
        if key is not None and key in self._seen:
            return self._seen[key]
        outputs = tuple(
            None if isinstance(v, jex.DropVar) or (read is not None and k not in read) else self.new(v.aval, kind)
            for k, v in enumerate(equation.outvars)
        )
        self.steps.append(Step(equation, tuple(inputs), outputs))
        if zero:
            self.zeros.update(o for o in outputs if o is not None)
        if key is not None and None not in outputs:
            self._seen[key] = outputs
        return outputs


def has_own_rule(equation: Any) -> bool:
    """Whether the equation, or one inside it, has a derivative of its own, which need not be linear."""
    if equation.primitive.name.startswith(_OWN_RULES):
        return True
    options = equation.params.values()
    parts = [part for value in options for part in (value if isinstance(value, tuple | list) else (value,))]
    bodies = [part.jaxpr if isinstance(part, jex.ClosedJaxpr) else part for part in parts]
    return any(has_own_rule(inner) for body in bodies if isinstance(body, jex.Jaxpr) for inner in body.eqns)


def _passed_through(equation: Any, place: int) -> int | None:
    """The input that an output merely repeats: an operand of a barrier, or what a scan carries without a change."""
    if equation.primitive.name == "optimization_barrier":
        return place
    if equation.primitive.name == "scan" and place < equation.params["num_carry"]:
        source = equation.params["num_consts"] + place
        body = equation.params["jaxpr"].jaxpr
        return source if body.outvars[place] is body.invars[source] else None
    return None


def _needed(equation: Any, places: Sequence[int]) -> tuple[Any, list[int]]:
    """What remains of an equation for some of its outputs, as a jaxpr, and the inputs that this takes.

    All of it where a derivative of its own remains: such a rule takes all cotangents together.
    """
    variables = [v for v in equation.invars if isinstance(v, jex.Var)]
    unique = list(dict.fromkeys(variables))
    outputs = [v for v in equation.outvars if not isinstance(v, jex.DropVar)]
    debug = jex.DebugInfo("fvjax.sites", equation.primitive.name, ("",) * len(unique), ("",) * len(outputs))
    whole = jex.Jaxpr((), unique, outputs, [equation], equation.effects, debug)
    used = [equation.outvars.index(v) in places for v in outputs]
    part, taken = partial_eval.dce_jaxpr(whole, used)
    if any(map(has_own_rule, part.eqns)):
        part, taken = whole.replace(outvars=[v for v, u in zip(outputs, used, strict=True) if u]), [True] * len(unique)
    inputs = [equation.invars.index(v) for v, t in zip(unique, taken, strict=True) if t]
    return jex.ClosedJaxpr(part, ()), inputs


def _identity(equation: Any, inputs: list[int]) -> Any:
    """What makes two equations the same, or None where they may not be one: see `has_own_rule`; or be compared."""
    if has_own_rule(equation):
        return None
    read = tuple(
        _bits(v.val) if isinstance(v, jex.Literal) else i for v, i in zip(equation.invars, inputs, strict=True)
    )
    key = (equation.primitive, read, tuple(sorted(equation.params.items(), key=lambda item: item[0])))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _bits(value: Any) -> tuple[str, tuple[int, ...], bytes]:
    """What makes two literals the same; what they print as does not."""
    array = np.asarray(value)
    return str(array.dtype), array.shape, array.tobytes()


def _body(equation: Any) -> Any:
    body = equation.params["jaxpr"] if "jaxpr" in equation.params else equation.params["call_jaxpr"]
    return body if isinstance(body, jex.ClosedJaxpr) else jex.ClosedJaxpr(body, ())


def _unrolled(equation: Any) -> Any:
    """The jaxpr of a scan with its iterations written out."""
    options = equation.params
    consts, carries, length = options["num_consts"], options["num_carry"], options["length"]
    body = jex.jaxpr_as_fun(options["jaxpr"])

    def run(*inputs: Any) -> list[Any]:
        fixed, carry, xs = inputs[:consts], inputs[consts : consts + carries], inputs[consts + carries :]
        ys: list[Any] = [None] * length
        for k in reversed(range(length)) if options["reverse"] else range(length):
            outputs = body(*fixed, *carry, *(jax.lax.index_in_dim(x, k, keepdims=False) for x in xs))
            carry, ys[k] = outputs[:carries], outputs[carries:]
        return [*carry, *(jnp.stack(y) for y in zip(*ys, strict=True))]

    return jax.make_jaxpr(run)(*(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars))


def live(steps: list[Step], wanted: set[int]) -> list[Step]:
    """The steps on which the wanted values depend, and those with side effects."""
    wanted, kept = set(wanted), []
    for step in reversed(steps):
        if step.equation.effects or wanted.intersection(step.results):
            wanted.update(step.inputs)
            kept.append(step)
    return kept[::-1]


def computed(steps: Sequence[Step], known: dict[int, Any]) -> dict[int, Any]:
    """`known` and what the steps make of it."""
    for step in steps:
        known = known | step.run(known)
    return known


def scalar_constant(program: Flattener, step: Step) -> tuple[int, float] | None:
    """The input of a step that multiplies it by a known number, and the number; else None."""
    if step.name == "neg":
        return step.inputs[0], -1.0
    places = {"mul": (0, 1), "div": (1,)}.get(step.name, ())
    for place in places:
        number = program.constants.get(step.inputs[place])
        if number is None or np.size(number) != 1 or isinstance(number, jax.core.Tracer):
            continue
        value = float(np.asarray(number).reshape(()))
        return step.inputs[1 - place], value if step.name == "mul" else 1 / value
    return None
