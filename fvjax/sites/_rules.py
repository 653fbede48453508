"""The gradient of one example at one site: outer products, patches, rows of a table, or the equation's own vjp."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax._moments import accumulation_dtype
from fvjax.sites._program import (
    LAYOUTS,
    Flattener,
    Kind,
    Program,
    Step,
    computed,
    has_own_rule,
    live,
    scalar_constant,
)
from fvjax.types import Array

LOOPS = {"scan", "while", "cond"}
"""Whole programs with control flow: their vjp costs as much as `vmap(grad)` of them."""

LOOKUPS = {"gather", "dynamic_slice"}

_CASTS = {"transpose", "convert_element_type", "copy"}


class Operand(NamedTuple):
    """What a site takes from the params: the roots, and the steps that lay them out or cast them for the equation.

    `value` is the equation's input; `stem` leads from the roots to it. Several roots are pieces that are concatenated.
    """

    value: int
    roots: tuple[int, ...]
    stem: tuple[Step, ...]


class Crop(NamedTuple):
    """A root that is a piece of what the product takes: its place along one axis of the whole."""

    axis: int
    start: int
    stop: int


class Layout(NamedTuple):
    """How the matrix products [groups, rows, columns] of a site lie in its root.

    `sizes` are those of the root's axes, with the output features of a grouped convolution split into (groups,
    features); `axes` is their order in the product, of which the first `groups` and the next `rows` are its leading
    dimensions. `tail` are steps that lay the result out once more.
    """

    sizes: tuple[int, ...]
    axes: tuple[int, ...]
    groups: int
    rows: int
    tail: tuple[Step, ...] = ()

    def parts(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The axes that make up the groups, the rows and the columns."""
        end = self.groups + self.rows
        return self.axes[: self.groups], self.axes[self.groups : end], self.axes[end:]

    @property
    def shape(self) -> tuple[int, int, int]:
        """[groups, rows, columns]."""
        groups, rows, columns = (int(np.prod([self.sizes[a] for a in part], dtype=int)) for part in self.parts())
        return groups, rows, columns

    def cropped(self, crop: Crop | None) -> "Layout":
        """The layout of a piece."""
        if crop is None:
            return self
        sizes = list(self.sizes)
        sizes[crop.axis] = crop.stop - crop.start
        return self._replace(sizes=tuple(sizes))

    def into_root(self, product: Array, shape: tuple[int, ...]) -> Array:
        """[groups, rows, columns] -> the root's shape."""
        spread = product.reshape([self.sizes[a] for a in self.axes]).transpose(*np.argsort(self.axes))
        if not self.tail:
            return spread.reshape(shape)
        known = {self.tail[0].inputs[0]: spread}
        for step in self.tail:
            known |= step.run(known)
        return known[self.tail[-1].results[0]]

    def from_root(self, value: Array) -> Array:
        """The root's shape -> [groups, rows, columns]; not with a tail."""
        return value.reshape(self.sizes).transpose(self.axes).reshape(self.shape)


class Factors(NamedTuple):
    """The gradient as a sum of outer products, sum_l rows[g, l, :]^T columns[g, l, :] in every group g."""

    rows: Array
    columns: Array


class Product(NamedTuple):
    """The rule of a site whose gradient is a sum of `length` outer products.

    `factors(known, cotangents)` gives rows [groups, L, rows] and columns [groups, L, columns] of ONE example; `known`
    are values by index. `patches` is the number of elements that it makes beside its operands, `multiplied` a way to
    their product that is faster than one by the factors.
    """

    layout: Layout
    length: int
    factors: Callable[[dict[int, Any], Sequence[Array]], Factors]
    words: str
    patches: int = 0
    multiplied: Callable[[dict[int, Any], Sequence[Array]], Array] | None = None

    def product(self, known: dict[int, Any], cotangents: Sequence[Array]) -> Array:
        """The sum of the outer products of ONE example, [groups, rows, columns].

        A single one is multiplied out: as a batched matrix product it took 200 times as long on a CPU. Full precision,
        since accelerators would round float32 factors to 10 bits or fewer.
        """
        if self.multiplied is not None:
            return self.multiplied(known, cotangents)
        rows, columns = self.factors(known, cotangents)
        if rows.shape[1] == 1:
            return jnp.swapaxes(rows, 1, 2) * columns
        return jnp.einsum("glr,glc->grc", rows, columns, precision=jax.lax.Precision.HIGHEST)


class Entries(NamedTuple):
    """Rows that are added to a table: their numbers [L] (the size of the table: nowhere), and the rows [L, width]."""

    rows: Array
    values: Array


class Lookup(NamedTuple):
    """The rule of a site that takes whole rows from a table, seen as [size, width].

    `axes` are those of the root that number the rows, then the others. `entries(known, cotangents)` is of ONE example.
    """

    axes: tuple[int, ...]
    numbering: int
    shape: tuple[int, ...]
    length: int
    entries: Callable[[dict[int, Any], Sequence[Array]], Entries]

    @property
    def size(self) -> int:
        """The number of rows."""
        return int(np.prod([self.shape[a] for a in self.axes[: self.numbering]], dtype=int))

    @property
    def width(self) -> int:
        """The number of elements of a row."""
        return int(np.prod([self.shape[a] for a in self.axes[self.numbering :]], dtype=int))

    def into_root(self, table: Array) -> Array:
        """[size, width] -> the root's shape."""
        return table.reshape([self.shape[a] for a in self.axes]).transpose(*np.argsort(self.axes))

    def from_root(self, value: Array) -> Array:
        """The root's shape -> [size, width]."""
        return value.transpose(self.axes).reshape(self.size, self.width)


class Site(NamedTuple):
    """An equation where values that depend on params alone meet data.

    `data` are its other inputs that depend on the example, `outputs` those through which it acts on the loss, `rule`
    how the gradient is made (None: by `jax.vjp` of the equation). `moving` are those of the data that depend on params,
    too: a derivative of its own may ask which of its inputs are differentiated.
    """

    step: Step
    operands: tuple[Operand, ...]
    data: tuple[int, ...]
    outputs: tuple[int, ...]
    rule: Product | Lookup | None = None
    moving: tuple[int, ...] = ()

    @property
    def roots(self) -> tuple[int, ...]:
        """Of all operands."""
        return tuple(dict.fromkeys(root for operand in self.operands for root in operand.roots))

    @property
    def words(self) -> str:
        """The rule in words."""
        if self.rule is None:
            return f"vjp of {self.step.name}"
        return self.rule.words if isinstance(self.rule, Product) else "rows of a table"


class Surroundings(NamedTuple):
    """What is known around a step: the program, the steps by their results, and which values params move.

    `varying` are made of params alone and have a derivative, `moving` are data that depend on such.
    """

    program: Program
    producers: dict[int, Step]
    varying: set[int]
    moving: set[int]


def sites_at(around: Surroundings, step: Step, outputs: tuple[int, ...]) -> list[Site]:
    """The sites of one equation: one, or one for each root where the gradients of the roots have rules of their own.

    Args:
        around: the program.
        step: the equation, of which an input is in `varying`.
        outputs: that reach the loss and depend on data.
    """
    program, varying = around.program, around.varying
    data = tuple(dict.fromkeys(i for i in step.inputs if program.kinds[i] == Kind.DATA))
    values = tuple(dict.fromkeys(i for i in step.inputs if i in varying))
    whole = Site(step, (), data, outputs)
    if len(values) == 1 and len(data) == 1 and _is_real(step):
        make = {"dot_general": _dot, "conv_general_dilated": _convolution}.get(step.name)
        found = None if make is None else make(around, whole, values[0])
        if found is not None:
            return found
    operands = tuple(_operand(around, value) for value in values)
    site = whole._replace(operands=operands)
    if step.name in LOOKUPS and values == step.inputs[:1] and len(site.roots) == 1 and _is_real(step, inputs=1):
        rule = _lookup(program, site)
        return [site if rule is None else site._replace(rule=rule)]
    if has_own_rule(step.equation):
        return _declared(program, site._replace(moving=tuple(i for i in data if i in around.moving)))
    return [site]


def _is_real(step: Step, inputs: int | None = None) -> bool:
    variables = (*step.equation.invars[:inputs], *step.equation.outvars)
    return all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in variables)


def _operand(around: Surroundings, value: int) -> Operand:
    """An input of an equation that is differentiated as it is, followed back to whatever is smaller.

    The gradient of a bias that is broadcast over 256 pixels has the bias's own size only before the broadcast.
    Concatenated pieces are told apart, so that each stays a part of one leaf.
    """
    program = around.program
    stem = _stem(around, value, LAYOUTS)
    source = stem[0].inputs[0] if stem else value
    pieces = _pieces(around, source)
    if pieces:
        return Operand(value, tuple(dict.fromkeys(root for root, _ in pieces)), (around.producers[source], *stem))
    while stem and program.size(stem[0].inputs[0]) >= program.size(stem[0].results[0]):
        stem = stem[1:]
    return Operand(value, (stem[0].inputs[0] if stem else value,), tuple(stem))


def _stem(around: Surroundings, value: int, names: set[str]) -> list[Step]:
    """The steps of the given names that lead to `value`, through real arrays only."""
    program = around.program
    stem: list[Step] = []
    while program.real(value) and (step := around.producers.get(value)) is not None:
        if step.name not in names or len(step.inputs) != 1 or not program.real(step.inputs[0]):
            break
        value = step.inputs[0]
        stem.insert(0, step)
    return stem


def _pieces(around: Surroundings, value: int) -> list[tuple[int, Crop]]:
    """What `value` is a concatenation of, as far as it depends on params, and where it lies."""
    program, step = around.program, around.producers.get(value)
    if step is None or step.name != "concatenate" or not all(map(program.real, step.inputs)):
        return []
    axis, start, pieces = step.options["dimension"], 0, []
    for piece in step.inputs:
        stop = start + program.avals[piece].shape[axis]
        if piece in around.varying:
            pieces.append((piece, Crop(axis, start, stop)))
        start = stop
    return pieces


# Products


def _dot(around: Surroundings, whole: Site, value: int) -> list[Site]:
    """A dot product of params with data.

    It is followed back through transposes and casts, so that a matrix and its transpose are one root. The axis that
    comes first in the root is put into the rows, which leaves most gradients where they are.
    """
    step = whole.step
    side = step.inputs.index(value)
    contracted, batch = (dimensions[side] for dimensions in step.options["dimension_numbers"])
    shape = _shape_of(step, side)
    stem = _stem(around, value, _CASTS)
    axes = np.arange(len(shape))
    for before in reversed(stem):
        if before.name == "transpose":
            axes = np.asarray(before.options["permutation"])[axes]
    free = [a for a in range(len(axes)) if a not in (*contracted, *batch)]
    groups, inner, outer = (tuple(int(axes[a]) for a in part) for part in (batch, contracted, free))
    rows_first = not outer or (bool(inner) and inner[0] < outer[0])
    rows, columns = (inner, outer) if rows_first else (outer, inner)
    sizes = tuple(shape[a] for a in np.argsort(axes))
    layout = Layout(sizes, (*groups, *rows, *columns), len(groups), len(rows))
    (data,) = whole.data
    others, theirs = (dimensions[1 - side] for dimensions in step.options["dimension_numbers"])
    length = int(
        np.prod([n for a, n in enumerate(_shape_of(step, 1 - side)) if a not in (*others, *theirs)], dtype=int)
    )

    def factors(known: dict[int, Any], cotangents: Sequence[Array]) -> Factors:
        inner, outer = _dot_factors(step, side, *_widened(known[data], cotangents[0]))
        return Factors(inner, outer) if rows_first else Factors(outer, inner)

    root = stem[0].inputs[0] if stem else value
    rule = Product(layout, length, factors, "outer products")
    return _whole_or_pieces(whole, rule, Operand(value, (root,), tuple(stem)), _pieces(around, root))


def _whole_or_pieces(whole: Site, rule: Product, operand: Operand, pieces: list[tuple[int, Crop]]) -> list[Site]:
    """One site; or one for each of the pieces that the matrix or kernel is made of, with their parts of the factors."""
    if not pieces:
        return [whole._replace(operands=(operand,), rule=rule)]
    sites = []
    for root, crop in pieces:

        def factors(known: dict[int, Any], cotangents: Sequence[Array], crop: Crop = crop) -> Factors:
            return _cropped(rule.layout, rule.factors(known, cotangents), crop)

        own = rule._replace(layout=rule.layout.cropped(crop), factors=factors, multiplied=None)
        sites.append(whole._replace(operands=(operand._replace(roots=(root,)),), rule=own))
    return sites


def _cropped(layout: Layout, factors: Factors, crop: Crop) -> Factors:
    """The factors of a piece."""

    def cut(x: Array, axis: int, part: tuple[int, ...]) -> Array:
        if crop.axis not in part:
            return x
        axis %= x.ndim
        spread = x.reshape(*x.shape[:axis], *(layout.sizes[a] for a in part), *x.shape[axis + 1 :])
        kept = jax.lax.slice_in_dim(spread, crop.start, crop.stop, axis=axis + part.index(crop.axis))
        return kept.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    groups, rows, columns = layout.parts()
    x, y = (cut(factor, 0, groups) for factor in factors)
    return Factors(cut(x, -1, rows), cut(y, -1, columns))


def _widened(*values: Array) -> list[Array]:
    """In one dtype of at least float32."""
    dtype = np.result_type(*map(accumulation_dtype, values))
    return [value.astype(dtype) for value in values]


def _shape_of(step: Step, side: int) -> tuple[int, ...]:
    return tuple(step.equation.invars[side].aval.shape)


def _dot_factors(step: Step, side: int, data: Array, cotangent: Array) -> tuple[Array, Array]:
    """[groups, L, contracted] and [groups, L, free]."""
    dimensions = step.options["dimension_numbers"]
    contracted, batch = dimensions[0][1 - side], dimensions[1][1 - side]
    free = [a for a in range(data.ndim) if a not in (*contracted, *batch)]
    sizes = [int(np.prod([data.shape[a] for a in axes], dtype=int)) for axes in (batch, free, contracted)]
    inner = data.transpose(*batch, *free, *contracted).reshape(sizes)
    # The axes of the output are: batch, free ones of the left operand, free ones of the right.
    if side == 0:
        middle = cotangent.ndim - len(free)
        order = (*range(len(batch)), *range(middle, cotangent.ndim), *range(len(batch), middle))
        cotangent = cotangent.transpose(order)
    columns = int(np.prod(cotangent.shape[len(batch) + len(free) :], dtype=int))
    return inner, cotangent.reshape(sizes[0], sizes[1], columns)


def _convolution(around: Surroundings, whole: Site, value: int) -> list[Site] | None:
    """A convolution of data with a kernel made of params: image patches times cotangents."""
    step, options = whole.step, whole.step.options
    if step.inputs[1] != value or options["batch_group_count"] != 1:
        return None
    groups, shape = options["feature_group_count"], list(_shape_of(step, 1))
    out, *others = options["dimension_numbers"].rhs_spec
    if groups == 1:
        layout = Layout(tuple(shape), (*others[1:], others[0], out), 0, len(others))
    else:
        shape[out : out + 1] = [groups, shape[out] // groups]
        others = [a + (a > out) for a in others]
        layout = Layout(tuple(shape), (out, *others[1:], others[0], out + 1), 1, len(others))
    (data,) = whole.data
    length = int(step.equation.outvars[0].aval.size) // max(1, layout.shape[0] * layout.shape[2])

    def factors(known: dict[int, Any], cotangents: Sequence[Array]) -> Factors:
        patches, outer = _patches_and_cotangent(step, *_widened(known[data], cotangents[0]))
        return Factors(jnp.swapaxes(patches, 1, 2), outer)

    def multiplied(known: dict[int, Any], cotangents: Sequence[Array]) -> Array:
        # XLA's CPU backend has a fast kernel for this order only, and copies into another what is exchanged before.
        patches, outer = _patches_and_cotangent(step, *_widened(known[data], cotangents[0]))
        return jnp.einsum("grl,glc->grc", patches, outer, precision=jax.lax.Precision.HIGHEST)

    elements = layout.shape[0] * layout.shape[1] * length
    rule = Product(layout, length, factors, "image patches", elements, multiplied if length > 1 else None)
    pieces = _pieces(around, value) if groups == 1 else []
    return _whole_or_pieces(whole, rule, Operand(value, (value,), ()), pieces)


def _patches_and_cotangent(step: Step, data: Array, cotangent: Array) -> tuple[Array, Array]:
    """[groups, rows, L] and [groups, L, columns]."""
    spec, groups = step.options["dimension_numbers"], step.options["feature_group_count"]
    image = data.transpose(spec.lhs_spec[1], spec.lhs_spec[0], *spec.lhs_spec[2:])
    outer = cotangent.transpose(spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1])
    positions = int(np.prod(outer.shape[:-1], dtype=int))
    patches = _patches(image, step, outer.shape[1:-1])
    rows = patches.reshape(-1, groups, image.shape[0] // groups, positions)
    rows = jnp.moveaxis(rows, 1, 0).reshape(groups, -1, positions)
    return rows, jnp.moveaxis(outer.reshape(positions, groups, -1), 1, 0)


def _patches(image: Array, step: Step, extents: Sequence[int]) -> Array:
    """[C, N, *spatial] -> [*kernel, C, N, *extents]: the pixels under the kernel, for every pixel of the output.

    The pixels come last, the last axis is shifted first, and the kernel's axes are stacked in front: so the copies of
    all axes but the last are of whole rows of pixels, and the matrix product contracts its left operand over the last
    axis. XLA's CPU backend takes 1.1 to 1.5 times as long for patches [*extents, *kernel, C], of which the product is
    another and slower kernel, and 4 times where the output has few channels.
    """
    options = step.options
    kernel = [_shape_of(step, 1)[a] for a in options["dimension_numbers"].rhs_spec[2:]]
    dilations = zip(options["padding"], options["lhs_dilation"], strict=True)
    padding = [(low, high, dilation - 1) for (low, high), dilation in dilations]
    image = jax.lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0), (0, 0, 0), *padding])
    for axis, (size, extent) in reversed(list(enumerate(zip(kernel, extents, strict=True)))):
        stride, dilation = options["window_strides"][axis], options["rhs_dilation"][axis]
        starts = [offset * dilation for offset in range(size)]
        ends = [start + (extent - 1) * stride + 1 for start in starts]
        place = image.ndim - len(kernel) + axis
        image = jnp.stack([jax.lax.slice_in_dim(image, s, e, stride, place) for s, e in zip(starts, ends, strict=True)])
    return image


# Lookups


def _lookup(program: Program, site: Site) -> Lookup | None:
    """A gather or slice at places that the data choose, whole axes or one element of an axis at a time."""
    step, options = site.step, site.step.options
    (operand,), shape = site.operands, _shape_of(site.step, 0)
    taken = tuple(options["slice_sizes"])
    if operand.stem or 0 in shape or any(t not in (1, n) for t, n in zip(taken, shape, strict=True)):
        return None
    output = step.equation.outvars[0].aval
    if step.name == "gather":
        numbers = options["dimension_numbers"]
        if numbers.operand_batching_dims:
            return None
        offsets = tuple(numbers.offset_dims)
    else:
        offsets = tuple(range(len(shape)))
    numbering = [a for a, t in enumerate(taken) if t == 1]
    whole = [a for a, t in enumerate(taken) if t != 1]
    places = tuple(a for a in range(len(output.shape)) if a not in offsets)
    length = int(np.prod([output.shape[a] for a in places], dtype=int))
    table = tuple(n if a in numbering else 1 for a, n in enumerate(shape))
    size = int(np.prod(table, dtype=int))
    if size >= np.iinfo(np.int32).max:
        return None
    changed: dict[str, Any] = {"slice_sizes": (1,) * len(shape)}
    if step.name == "gather":
        # The transpose of a gather drops what lies outside, also where the gather promised that nothing does.
        clip = jax.lax.GatherScatterMode.CLIP
        mode = clip if options["mode"] == clip else jax.lax.GatherScatterMode.FILL_OR_DROP
        changed |= {"mode": mode, "fill_value": size}

    def entries(known: dict[int, Any], cotangents: Sequence[Array]) -> Entries:
        numbers = jnp.arange(size, dtype=jnp.int32).reshape(table)
        indices = [known[i] for i in step.inputs[1:]]
        rows = step.equation.primitive.bind(numbers, *indices, **(options | changed))
        (values,) = _widened(cotangents[0])
        width = int(np.prod([shape[a] for a in whole], dtype=int))
        return Entries(rows.reshape(length), values.transpose(*places, *offsets).reshape(length, width))

    return Lookup((*numbering, *whole), len(numbering), program.avals[operand.roots[0]].shape, length, entries)


# Everything else


def derivative(site: Site, known: dict[int, Any], cotangents: Sequence[Array]) -> dict[int, Array]:
    """The gradients of ONE example by `jax.vjp` of the equation, and of the stems before it.

    Args:
        site: the site.
        known: values by index: what depends on no data, and the site's data of one example.
        cotangents: of `site.outputs`.

    Returns:
        Gradients by root.
    """
    moved = (*site.roots, *site.moving)

    def local(*values: Array) -> list[Array]:
        found = known | dict(zip(moved, values, strict=True))
        for operand in site.operands:
            for step in operand.stem:
                found |= step.run(found)
        outputs = site.step.run(found)
        return [outputs[o] for o in site.outputs]

    _, pull = jax.vjp(local, *(known[i] for i in moved))
    return dict(zip(site.roots, pull(list(cotangents)), strict=False))


def widened(x: Array) -> Array:
    """Floating-point arrays in at least float32."""
    return x.astype(accumulation_dtype(x)) if jnp.issubdtype(x.dtype, jnp.floating) else x


# Steps that lay out or cast the product of a declared derivative.
_TAIL = {"reshape", "transpose", "squeeze", "expand_dims", "convert_element_type", "copy"}


def _declared(program: Program, site: Site) -> list[Site]:
    """A function with a derivative rule of its own: that rule is traced, and may turn out to be an outer product.

    If so for one root at least, every root becomes a site of its own.
    """
    stems = {o for operand in site.operands for step in operand.stem for o in step.results}
    inputs = dict.fromkeys(i for operand in site.operands for step in operand.stem for i in step.inputs)
    inputs |= dict.fromkeys(site.step.inputs)
    outside = [i for i in inputs if i not in stems and i not in site.data]

    def pulled(*values: Array) -> list[Array]:
        known = dict(zip((*outside, *site.data), values, strict=False))
        gradients = derivative(site, known, values[len(known) :])
        return [gradients[root] for root in site.roots]

    avals = [program.avals[i] for i in (*outside, *site.data, *site.outputs)]
    closed = jax.make_jaxpr(pulled)(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))
    inner = Flattener()
    # PARAMS stands for what varies here: calls that take it are opened up.
    arguments = [inner.new(a, Kind.CONSTANT if k < len(outside) else Kind.PARAMS) for k, a in enumerate(avals)]
    results = inner.inline(closed, arguments)
    names = (*outside, *site.data), arguments
    rules = [
        _traced_product(program, inner, names, (root, value)) for root, value in zip(site.roots, results, strict=True)
    ]
    if not any(rules):
        return [site]
    parts = []
    for root, rule in zip(site.roots, rules, strict=True):
        operands = tuple(o for o in site.operands if root in o.roots)
        if any(len(o.roots) > 1 for o in operands):
            return [site]
        parts.append(site._replace(operands=operands, rule=rule))
    return parts


def _traced_product(
    program: Program, inner: Flattener, names: tuple[Sequence[int], Sequence[int]], target: tuple[int, int]
) -> Product | None:
    """The factors of a traced gradient, if its last steps are a product that is laid out."""
    root, value = target
    producers = {o: step for step in inner.steps for o in step.results}
    tail: list[Step] = []
    factor = 1.0
    while (step := producers.get(value)) is not None:
        scale = scalar_constant(inner, step)
        if scale is not None:
            factor, value = factor * scale[1], scale[0]
        elif step.name in _TAIL and len(step.inputs) == 1:
            tail.insert(0, step)
            value = step.inputs[0]
        else:
            break
    if step is None or not program.real(root) or not _is_real(step):
        return None
    read = {"dot_general": _dot_of_values, "mul": _outer_of_values}.get(step.name)
    found = None if read is None else read(inner, producers, step)
    if found is None:
        return None
    layout, length, sources, arranged = found
    outer, arguments = names
    steps = live(inner.steps, set(sources))

    def factors(known: dict[int, Any], cotangents: Sequence[Array]) -> Factors:
        given = [*(known[i] for i in outer), *cotangents]
        values = computed(steps, inner.constants | dict(zip(arguments, given, strict=True)))
        rows, columns = arranged(*_widened(*(values[s] for s in sources)))
        return Factors(rows, columns if factor == 1 else columns * factor)

    kept = tuple(step for step in tail if step.name not in {"convert_element_type", "copy"})
    return Product(layout._replace(tail=kept), length, factors, "outer products")


Traced = tuple[Layout, int, tuple[int, int], Callable[[Array, Array], Factors]]
"""Layout and length of a product, the values that it multiplies, and how these become factors."""


def _dot_of_values(inner: Flattener, _: dict[int, Step], step: Step) -> Traced:
    contracted, batch = step.options["dimension_numbers"]
    shapes = [_shape_of(step, side) for side in (0, 1)]
    free = [
        [a for a in range(len(shape)) if a not in (*contracted[side], *batch[side])]
        for side, shape in enumerate(shapes)
    ]
    output = tuple(inner.avals[step.results[0]].shape)
    layout = Layout(output, tuple(range(len(output))), len(batch[0]), len(free[0]))
    length = int(np.prod([shapes[0][a] for a in contracted[0]], dtype=int))

    def arranged(*values: Array) -> Factors:
        ordered = [v.transpose(*batch[k], *contracted[k], *free[k]) for k, v in enumerate(values)]
        groups, rows, columns = layout.shape
        return Factors(ordered[0].reshape(groups, length, rows), ordered[1].reshape(groups, length, columns))

    left, right = step.inputs
    return layout, length, (left, right), arranged


def _outer_of_values(inner: Flattener, producers: dict[int, Step], step: Step) -> Traced | None:
    """An outer product that is written as a product of two arrays that are broadcast along different axes."""
    output = tuple(inner.avals[step.results[0]].shape)
    sources, along = [], []
    for value in step.inputs:
        made = producers.get(value)
        if made is not None and made.name == "broadcast_in_dim" and len(made.inputs) == 1:
            source, dimensions = made.inputs[0], made.options["broadcast_dimensions"]
        else:
            source, dimensions = value, range(len(inner.avals[value].shape))
        sources.append(source)
        along.append([d for d, n in zip(dimensions, inner.avals[source].shape, strict=True) if n != 1])
    left, right = along
    if set(left) & set(right) or {d for d, n in enumerate(output) if n != 1} != {*left, *right}:
        return None
    rest = [d for d, n in enumerate(output) if n == 1]
    layout = Layout(output, (*left, *right, *rest), 0, len(left))
    first, second = sources
    return layout, 1, (first, second), lambda x, y: Factors(x.reshape(1, 1, -1), y.reshape(1, 1, -1))
