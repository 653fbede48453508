"""The gradient of one example at one site: outer products, image patches, or the derivative of the equation itself."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax._moments import accumulation_dtype
from fvjax.sites._program import Program, Step
from fvjax.types import Array

_SUBPROGRAMS = {"scan", "while", "cond", "custom_jvp_call", "custom_vjp_call"}


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
    """How the batched matrix product [groups, rows, columns] lies in the axes of the root."""

    axes: tuple[int, ...]
    groups: int
    rows: int

    def into_root(self, product: Array, shape: tuple[int, ...]) -> Array:
        """[..., groups, rows, columns] -> [..., *shape]."""
        lead = product.shape[:-3]
        spread = product.reshape(*lead, *(shape[a] for a in self.axes))
        inverse = np.argsort(self.axes)
        return spread.transpose(*range(len(lead)), *(len(lead) + inverse))


class Factors(NamedTuple):
    """The gradient as a sum of outer products, sum_l rows[g, l, :]^T columns[g, l, :] in every group g."""

    rows: Array
    columns: Array


def is_dot(site: Site) -> bool:
    """Whether the gradient is a sum of outer products of parts of data and cotangent."""
    return site.step.name == "dot_general" and len(site.operands) == 1 and len(site.data) == 1


def is_convolution(site: Site) -> bool:
    """Whether the params are the kernel of a convolution."""
    step = site.step
    return (
        step.name == "conv_general_dilated"
        and len(site.operands) == 1
        and len(site.data) == 1
        and step.inputs[1] == site.operands[0].value
        and step.options["batch_group_count"] == 1
    )


def dot_layout(site: Site) -> Layout:
    """Where the gradient of a dot product lies in its root."""
    rows, columns, groups, _ = _dot_axes(site)
    return Layout((*groups, *rows, *columns), len(groups), len(rows))


def _dot_axes(site: Site) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]:
    """Axes of the root for the rows, columns and groups of the gradient, and whether the rows are the contracted ones.

    The axis that comes first in the root is put into the rows, which leaves most gradients where they are.
    """
    (operand,) = site.operands
    side = site.step.inputs.index(operand.value)
    contracted, batch = (dimensions[side] for dimensions in site.step.options["dimension_numbers"])
    axes = np.arange(len(_shape_of(site, side)))
    for step in reversed(operand.stem):
        if step.name == "transpose":
            axes = np.asarray(step.options["permutation"])[axes]
    free = [a for a in range(len(axes)) if a not in (*contracted, *batch)]
    inner, outer = (tuple(int(axes[a]) for a in part) for part in (contracted, free))
    groups = tuple(int(axes[a]) for a in batch)
    contracted_first = not outer or (bool(inner) and inner[0] < outer[0])
    return (inner, outer, groups, True) if contracted_first else (outer, inner, groups, False)


def _shape_of(site: Site, side: int) -> tuple[int, ...]:
    return tuple(site.step.equation.invars[side].aval.shape)


def dot_factors(site: Site, data: Array, cotangent: Array) -> Factors:
    """[groups, L, rows] and [groups, L, columns] from the data operand and the cotangent of ONE example."""
    (operand,) = site.operands
    side = site.step.inputs.index(operand.value)
    dimensions = site.step.options["dimension_numbers"]
    contracted, batch = dimensions[0][1 - side], dimensions[1][1 - side]
    free = [a for a in range(data.ndim) if a not in (*contracted, *batch)]
    sizes = [int(np.prod([data.shape[a] for a in axes])) for axes in (batch, free, contracted)]
    inner = data.transpose(*batch, *free, *contracted).reshape(sizes)
    # The output's axes: batch, free of the left, free of the right.
    batches = range(len(batch))
    free_out = cotangent.ndim - len(batch) - len(free)
    if side == 1:
        outer = cotangent
    else:
        lhs = range(len(batch), len(batch) + free_out)
        outer = cotangent.transpose(*batches, *range(len(batch) + free_out, cotangent.ndim), *lhs)
    outer = outer.reshape(sizes[0], sizes[1], -1)
    return Factors(inner, outer) if _dot_axes(site)[3] else Factors(outer, inner)


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


def _patches(image: Array, site: Site, extents: Sequence[int]) -> Array:
    """[N, *spatial, C] -> [N, *extents, *kernel, C]: the pixels under the kernel, for every pixel of the output."""
    options = site.step.options
    kernel_spec = options["dimension_numbers"].rhs_spec
    kernel = [_shape_of(site, 1)[a] for a in kernel_spec[2:]]
    padding = [(low, high, dilation - 1) for (low, high), dilation in zip(options["padding"], options["lhs_dilation"], strict=True)]
    image = jax.lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0), *padding, (0, 0, 0)])
    spatial = len(kernel)
    for axis, (size, extent) in enumerate(zip(kernel, extents, strict=True)):
        stride, dilation = options["window_strides"][axis], options["rhs_dilation"][axis]
        starts = [offset * dilation for offset in range(size)]
        ends = [start + (extent - 1) * stride + 1 for start in starts]
        shifted = [jax.lax.slice_in_dim(image, s, e, stride, 1 + axis) for s, e in zip(starts, ends, strict=True)]
        image = jnp.stack(shifted, 1 + spatial + axis)
    return image


def convolution_gradient(site: Site, data: Array, cotangent: Array) -> Array:
    """The gradient of ONE example with respect to the kernel: its patches times its cotangent."""
    options = site.step.options
    spec, shape = options["dimension_numbers"], _shape_of(site, 1)
    spatial = len(shape) - 2
    image = data.transpose(spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1])
    outer = cotangent.transpose(spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1])
    patches = _patches(image, site, outer.shape[1:-1])
    groups, channels, features = options["feature_group_count"], image.shape[-1], outer.shape[-1]
    taps = patches.shape[1 + spatial : -1]
    positions = int(np.prod(outer.shape[:-1]))
    if groups == 1:
        product = contract(Factors(patches.reshape(1, positions, -1), outer.reshape(1, positions, -1)))
    else:
        rows = jnp.moveaxis(patches.reshape(positions, -1, groups, channels // groups), 2, 0)
        columns = jnp.moveaxis(outer.reshape(positions, groups, features // groups), 1, 0)
        grouped = contract(Factors(rows.reshape(groups, positions, -1), columns))
        product = jnp.moveaxis(grouped, 0, 1)
    spread = product.reshape(*taps, channels // groups, features)
    order = (*spec.rhs_spec[2:], spec.rhs_spec[1], spec.rhs_spec[0])
    return spread.transpose(*np.argsort(order))


def patch_size(site: Site) -> int:
    """The number of elements of the patches of one example; 0 for other sites."""
    if not is_convolution(site):
        return 0
    kernel, spec = _shape_of(site, 1), site.step.options["dimension_numbers"]
    image, output = _shape_of(site, 0), site.step.equation.outvars[0].aval.shape
    taps = int(np.prod([kernel[a] for a in spec.rhs_spec[2:]]))
    return taps * image[spec.lhs_spec[1]] * int(np.prod([output[a] for a in (spec.out_spec[0], *spec.out_spec[2:])]))


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


# Steps that only lay out or cast a value.
_LAYOUTS = {"transpose", "convert_element_type", "copy", "broadcast_in_dim", "reshape", "squeeze", "expand_dims"}


def find_operands(
    program: Program, step: Step, producers: dict[int, Step], varying: set[int]
) -> tuple[Operand, ...]:
    """The inputs of a site that are in `varying`, i.e. have a derivative with respect to params, with their roots.

    A dot product looks through transposes and casts, so that a matrix and its transpose are one root. Any other site
    looks through whatever makes the root smaller: the gradient of a bias that is broadcast over 256 pixels has the
    bias's own size only before the broadcast.
    """
    dot = step.name == "dot_general"
    names = {"transpose", "convert_element_type", "copy"} if dot else _LAYOUTS
    operands = []
    for value in dict.fromkeys(i for i in step.inputs if i in varying):
        stem = _stem(program, value, producers, names)
        if not dot:
            while stem and program.size(stem[0].inputs[0]) >= program.size(stem[0].outputs[0]):
                stem = stem[1:]
        operands.append(Operand(value, stem[0].inputs[0] if stem else value, tuple(stem)))
    return tuple(operands)


def _stem(program: Program, value: int, producers: dict[int, Step], names: set[str]) -> list[Step]:
    """The steps of the given names that lead to `value`, through real arrays only."""
    stem: list[Step] = []
    while (step := producers.get(value)) is not None and step.name in names and len(step.inputs) == 1:
        value = step.inputs[0]
        if not jnp.issubdtype(program.avals[value].dtype, jnp.floating):
            break
        stem.insert(0, step)
    return stem


def describe(site: Site) -> str:
    """The rule of the site in words."""
    if is_dot(site):
        return "outer products"
    return "image patches" if is_convolution(site) else f"vjp of {site.step.name}"


def is_slow(site: Site) -> bool:
    """Whether its rule costs as much as `vmap(grad)` of that part of the model."""
    return site.step.name in _SUBPROGRAMS
