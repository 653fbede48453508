"""The gradient of one example at one site: outer products, image patches, or the derivative of the equation itself."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax._moments import accumulation_dtype
from fvjax.sites._program import LAYOUTS, Program, Step
from fvjax.types import Array

_LOOPS = {"scan", "while", "cond"}
_CUSTOM_RULES = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}


class Operand(NamedTuple):
    """What a site takes from the params: the root, and the steps that only lay it out or cast it for the equation.

    `value` is the equation's input; `stem` leads from `root` to it.
    """

    value: int
    root: int
    stem: tuple[Step, ...]


class Site(NamedTuple):
    """An equation where values that depend on params alone meet data.

    `data` are its other inputs that depend on the example, `outputs` those through which it acts on the loss.
    """

    step: Step
    operands: tuple[Operand, ...]
    data: tuple[int, ...]
    outputs: tuple[int, ...]


class Layout(NamedTuple):
    """How the matrix products [groups, rows, columns] of a site lie in its root.

    `sizes` are those of the root's axes, with the output features of a grouped convolution split into (groups,
    features); `axes` is their order in the product, of which the first `groups` and the next `rows` are its leading
    dimensions.
    """

    sizes: tuple[int, ...]
    axes: tuple[int, ...]
    groups: int
    rows: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """[groups, rows, columns]."""
        sizes = [self.sizes[a] for a in self.axes]
        cuts = (slice(self.groups), slice(self.groups, self.groups + self.rows), slice(self.groups + self.rows, None))
        groups, rows, columns = (int(np.prod(sizes[cut], dtype=int)) for cut in cuts)
        return groups, rows, columns

    def into_root(self, product: Array, shape: tuple[int, ...]) -> Array:
        """[groups, rows, columns] -> the root's shape."""
        spread = product.reshape([self.sizes[a] for a in self.axes])
        return spread.transpose(*np.argsort(self.axes)).reshape(shape)


class Factors(NamedTuple):
    """The gradient as a sum of outer products, sum_l rows[g, l, :]^T columns[g, l, :] in every group g."""

    rows: Array
    columns: Array


def is_product(site: Site) -> bool:
    """Whether the gradient is a sum of outer products of parts of the data and parts of the cotangent."""
    equation = site.step.equation
    real = all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in (*equation.invars, *equation.outvars))
    return real and len(site.operands) == 1 and len(site.data) == 1 and (_is_dot(site) or is_convolution(site))


def _is_dot(site: Site) -> bool:
    return site.step.name == "dot_general"


def is_convolution(site: Site) -> bool:
    """Whether the params are the kernel of a convolution."""
    step = site.step
    return (
        step.name == "conv_general_dilated"
        and step.inputs[1] == site.operands[0].value
        and step.options["batch_group_count"] == 1
    )


def layout(site: Site) -> Layout:
    """Where the products of a dot product or convolution lie in its root."""
    return _dot_layout(site)[0] if _is_dot(site) else _convolution_layout(site)


def length(site: Site) -> int:
    """The number of outer products in one example: rows of a dot product, pixels of a convolution's output."""
    groups, _, columns = layout(site).shape
    output = site.step.equation.outvars[0].aval
    if is_convolution(site):
        return int(output.size) // (groups * columns)
    (side,) = (k for k, value in enumerate(site.step.inputs) if value == site.data[0])
    contracted, batch = (dimensions[side] for dimensions in site.step.options["dimension_numbers"])
    return int(np.prod([n for a, n in enumerate(_shape_of(site, side)) if a not in (*contracted, *batch)], dtype=int))


def factors(site: Site, data: Array, cotangent: Array) -> Factors:
    """Rows [groups, L, rows] and columns [groups, L, columns] of ONE example, in one dtype of at least float32."""
    make = _dot_factors if _is_dot(site) else _convolution_factors
    dtype = np.result_type(accumulation_dtype(data), accumulation_dtype(cotangent))
    return make(site, data.astype(dtype), cotangent.astype(dtype))


def _shape_of(site: Site, side: int) -> tuple[int, ...]:
    return tuple(site.step.equation.invars[side].aval.shape)


def _dot_layout(site: Site) -> tuple[Layout, bool]:
    """The layout, and whether its rows are the contracted axes.

    The axis that comes first in the root is put into the rows, which leaves most gradients where they are.
    """
    (operand,) = site.operands
    side = site.step.inputs.index(operand.value)
    contracted, batch = (dimensions[side] for dimensions in site.step.options["dimension_numbers"])
    shape = _shape_of(site, side)
    axes = np.arange(len(shape))
    for step in reversed(operand.stem):
        if step.name == "transpose":
            axes = np.asarray(step.options["permutation"])[axes]
    sizes = tuple(shape[a] for a in np.argsort(axes))
    free = [a for a in range(len(axes)) if a not in (*contracted, *batch)]
    groups, inner, outer = (tuple(int(axes[a]) for a in part) for part in (batch, contracted, free))
    contracted_first = not outer or (bool(inner) and inner[0] < outer[0])
    rows, columns = (inner, outer) if contracted_first else (outer, inner)
    return Layout(sizes, (*groups, *rows, *columns), len(groups), len(rows)), contracted_first


def _dot_factors(site: Site, data: Array, cotangent: Array) -> Factors:
    (operand,) = site.operands
    side = site.step.inputs.index(operand.value)
    dimensions = site.step.options["dimension_numbers"]
    contracted, batch = dimensions[0][1 - side], dimensions[1][1 - side]
    free = [a for a in range(data.ndim) if a not in (*contracted, *batch)]
    sizes = [int(np.prod([data.shape[a] for a in axes], dtype=int)) for axes in (batch, free, contracted)]
    inner = data.transpose(*batch, *free, *contracted).reshape(sizes)
    # The axes of the output are: batch, free ones of the left operand, free ones of the right.
    if side == 0:
        middle = cotangent.ndim - len(free)
        order = (*range(len(batch)), *range(middle, cotangent.ndim), *range(len(batch), middle))
        cotangent = cotangent.transpose(order)
    outer = cotangent.reshape(sizes[0], sizes[1], -1)
    return Factors(inner, outer) if _dot_layout(site)[1] else Factors(outer, inner)


def _convolution_layout(site: Site) -> Layout:
    spec, groups = site.step.options["dimension_numbers"].rhs_spec, site.step.options["feature_group_count"]
    shape = list(_shape_of(site, 1))
    out, *others = spec
    if groups == 1:
        return Layout(tuple(shape), (*others[1:], others[0], out), 0, len(others))
    shape[out : out + 1] = [groups, shape[out] // groups]
    others = [a + (a > out) for a in others]
    return Layout(tuple(shape), (out, *others[1:], others[0], out + 1), 1, len(others))


def _convolution_factors(site: Site, data: Array, cotangent: Array) -> Factors:
    spec, groups = site.step.options["dimension_numbers"], site.step.options["feature_group_count"]
    image = data.transpose(spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1])
    outer = cotangent.transpose(spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1])
    positions = int(np.prod(outer.shape[:-1], dtype=int))
    patches = _patches(image, site, outer.shape[1:-1])
    rows = patches.reshape(positions, -1, groups, image.shape[-1] // groups)
    rows = jnp.moveaxis(rows, 2, 0).reshape(groups, positions, -1)
    return Factors(rows, jnp.moveaxis(outer.reshape(positions, groups, -1), 1, 0))


def _patches(image: Array, site: Site, extents: Sequence[int]) -> Array:
    """[N, *spatial, C] -> [N, *extents, *kernel, C]: the pixels under the kernel, for every pixel of the output."""
    options = site.step.options
    kernel = [_shape_of(site, 1)[a] for a in options["dimension_numbers"].rhs_spec[2:]]
    dilations = zip(options["padding"], options["lhs_dilation"], strict=True)
    padding = [(low, high, dilation - 1) for (low, high), dilation in dilations]
    image = jax.lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0), *padding, (0, 0, 0)])
    for axis, (size, extent) in enumerate(zip(kernel, extents, strict=True)):
        stride, dilation = options["window_strides"][axis], options["rhs_dilation"][axis]
        starts = [offset * dilation for offset in range(size)]
        ends = [start + (extent - 1) * stride + 1 for start in starts]
        shifted = [jax.lax.slice_in_dim(image, s, e, stride, 1 + axis) for s, e in zip(starts, ends, strict=True)]
        image = jnp.stack(shifted, 1 + len(kernel) + axis)
    return image


def contract(factors: Factors) -> Array:
    """The sum of the outer products of ONE example, [groups, rows, columns].

    A single one is multiplied out: as a batched matrix product it took 200 times as long on a CPU. Full precision,
    since accelerators would round float32 factors to 10 bits or fewer.
    """
    if factors.rows.shape[1] == 1:
        return jnp.swapaxes(factors.rows, 1, 2) * factors.columns
    return jnp.einsum("glr,glc->grc", *factors, precision=jax.lax.Precision.HIGHEST)


def widened(x: Array) -> Array:
    """Floating-point arrays in at least float32."""
    return x.astype(accumulation_dtype(x)) if jnp.issubdtype(x.dtype, jnp.floating) else x


def patch_size(site: Site) -> int:
    """The number of elements of the patches of one example; 0 for other sites."""
    if not (is_product(site) and is_convolution(site)):
        return 0
    groups, rows, _ = layout(site).shape
    return groups * rows * length(site)


def derivative(site: Site, known: dict[int, Any], cotangents: Sequence[Array]) -> dict[int, Array]:
    """The gradients of ONE example by `jax.vjp` of the equation, and of the stems before it.

    Args:
        site: the site.
        known: values by index: what depends on no data, and the site's data of one example.
        cotangents: of `site.outputs`.

    Returns:
        Gradients by root.
    """
    roots = tuple(dict.fromkeys(operand.root for operand in site.operands))

    def local(*values: Array) -> list[Array]:
        found = known | dict(zip(roots, values, strict=True))
        for operand in site.operands:
            for step in operand.stem:
                found |= step.run(found)
        outputs = site.step.run(found)
        return [outputs[o] for o in site.outputs]

    _, pull = jax.vjp(local, *(known[r] for r in roots))
    return dict(zip(roots, pull(list(cotangents)), strict=True))


def find_operands(program: Program, step: Step, producers: dict[int, Step], varying: set[int]) -> tuple[Operand, ...]:
    """The inputs of a site that are in `varying`, i.e. have a derivative with respect to params, with their roots.

    A dot product looks through transposes and casts, so that a matrix and its transpose are one root. Any other site
    looks through whatever makes the root smaller: the gradient of a bias that is broadcast over 256 pixels has the
    bias's own size only before the broadcast.
    """
    dot = step.name == "dot_general"
    names = {"transpose", "convert_element_type", "copy"} if dot else LAYOUTS
    operands = []
    for value in dict.fromkeys(i for i in step.inputs if i in varying):
        stem = _stem(program, value, producers, names)
        if not dot:
            while stem and program.size(stem[0].inputs[0]) >= program.size(stem[0].results[0]):
                stem = stem[1:]
        operands.append(Operand(value, stem[0].inputs[0] if stem else value, tuple(stem)))
    return tuple(operands)


def _stem(program: Program, value: int, producers: dict[int, Step], names: set[str]) -> list[Step]:
    """The steps of the given names that lead to `value`, through real arrays only."""
    stem: list[Step] = []
    while program.real(value) and (step := producers.get(value)) is not None:
        if step.name not in names or len(step.inputs) != 1 or not program.real(step.inputs[0]):
            break
        value = step.inputs[0]
        stem.insert(0, step)
    return stem


def describe(site: Site) -> str:
    """The rule of the site in words."""
    if is_product(site):
        return "outer products" if _is_dot(site) else "image patches"
    return f"vjp of {site.step.name}"


def is_loop(site: Site) -> bool:
    """Whether the site is a whole program with control flow, of which the rule costs as much as `vmap(grad)` of it."""
    return site.step.name in _LOOPS


def is_custom(site: Site) -> bool:
    """Whether the site is a function with a derivative rule of its own: a few numbers, or a whole layer."""
    return site.step.name in _CUSTOM_RULES
