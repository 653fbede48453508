"""Derivatives of convolutions in forms that XLA compiles well on a CPU, for any function, without a change to it.

`jax.grad` of a convolution makes two more: one for the image and one for the kernel. XLA's CPU backend is slow at them
in two cases (jax 0.10.2, 2 cores, float32):

- The kernel's sums over batch x height x width. Beyond some 4096 terms it falls to a fifth of its speed (47 ms against
  9 for the forward pass at batch 8, 32 x 32, 128 to 128 channels).
- Inside a loop (lax.scan, lax.map, while_loop) only a convolution in the order NHWC, HWIO is compiled to the fast
  library call. Its derivatives are written in other orders, and are then some hundred times slower.

`refined` therefore evaluates a function equation by equation and gives each stride-1 convolution the rule below. On
other platforms its derivatives lower to what `jax.grad` makes of them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from fvjax.types import Array

LONGEST_SUM = 4096
"""Terms up to which XLA's own kernel gradient is as fast as the one below (16 shapes from 4 x 4 to 32 x 32 pixels)."""

BLOCK = 2**20
"""Elements of the shifted copies that are built at once: they stay in cache."""

_CALLS = {"jit", "pjit", "closed_call", "core_call"}
"""Equations that only call a jaxpr. A checkpoint is not among them: it must stay one equation to save memory."""


class _Convolution(NamedTuple):
    """What fixes a convolution of stride 1 in the order NHWC, HWIO: the padding, the precision and the type of sums."""

    padding: tuple[tuple[int, int], tuple[int, int]]
    precision: Any
    preferred_element_type: Any

    def __call__(self, x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(convolution: _Convolution, x: Array, kernel: Array) -> Array:
    return convolution(x, kernel)


def _forward(convolution: _Convolution, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return convolution(x, kernel), (x, kernel)


def _backward(convolution: _Convolution, saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, kernel = saved

    def plain(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
        return jax.vjp(convolution.__call__, x, kernel)[1](cotangent)

    def on_cpu(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
        return _image_gradient(convolution, kernel, cotangent), _kernel_gradient(convolution, x, kernel, cotangent)

    return jax.lax.platform_dependent(x, kernel, cotangent, cpu=on_cpu, default=plain)


_convolve.defvjp(_forward, _backward)


def _image_gradient(convolution: _Convolution, kernel: Array, cotangent: Array) -> Array:
    """A convolution with the reversed kernel, written in the order NHWC, HWIO."""
    height, width = kernel.shape[:2]
    (top, bottom), (left, right) = convolution.padding
    padding = (height - 1 - top, height - 1 - bottom), (width - 1 - left, width - 1 - right)
    reversed_kernel = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    return convolution._replace(padding=padding)(cotangent, reversed_kernel).astype(kernel.dtype)


def _kernel_gradient(convolution: _Convolution, x: Array, kernel: Array, cotangent: Array) -> Array:
    """sum over images and pixels of x[n, r + i, c + j] cotangent[n, r, c]."""
    rows, columns = cotangent.shape[1:3]
    if x.shape[0] * rows * columns <= LONGEST_SUM:
        exchanged = convolution(x.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3))
        return exchanged.transpose(1, 2, 0, 3).astype(kernel.dtype)
    return _by_shifts(convolution, x, kernel, cotangent)


def _by_shifts(convolution: _Convolution, x: Array, kernel: Array, cotangent: Array) -> Array:
    r"""The same as one matrix product a block of images.

    With X_j the padded images without their first j columns and G_i the cotangents i rows further down,

        K[i, j] = sum_{n, r, c} X_j[n, r, c] G_i[n, r, c]^T,

    so the X_j side by side times the G_i side by side give all i, j at once: kh + kw copies instead of the kh kw of
    im2col.
    """
    height, width, inputs, outputs = kernel.shape
    count, rows, columns, _ = cotangent.shape
    (top, bottom), (left, right) = convolution.padding
    size = (rows + height - 1) * columns * (width * inputs + height * outputs)
    block = max(d for d in range(1, count + 1) if count % d == 0 and (d == 1 or d * size <= BLOCK))

    def of_block(total: Array, images: tuple[Array, Array]) -> tuple[Array, None]:
        image, gradient = images
        padded = jax.lax.pad(image, jnp.zeros((), x.dtype), ((0, 0, 0), (top, bottom, 0), (left, right, 0), (0, 0, 0)))
        shifted = jnp.concatenate([padded[:, :, j : j + columns] for j in range(width)], -1)
        lowered = [jnp.pad(gradient, ((0, 0), (i, height - 1 - i), (0, 0), (0, 0))) for i in range(height)]
        product = jax.lax.dot_general(
            shifted.reshape(-1, width * inputs),
            jnp.concatenate(lowered, -1).reshape(-1, height * outputs),
            (((0,), (0,)), ((), ())),
            precision=convolution.precision,
            preferred_element_type=total.dtype,
        )
        return total + product, None

    accumulator = jnp.zeros((width * inputs, height * outputs), np.promote_types(kernel.dtype, np.float32))
    blocks = x.reshape(-1, block, *x.shape[1:]), cotangent.reshape(-1, block, *cotangent.shape[1:])
    total = jax.lax.scan(of_block, accumulator, blocks)[0]
    return total.reshape(width, inputs, height, outputs).transpose(2, 0, 1, 3).astype(kernel.dtype)


def _recognised(equation: Any) -> _Convolution | None:
    """The convolution that an equation is, if it is one of those that have a rule here."""
    if equation.primitive.name != "conv_general_dilated":
        return None
    options = equation.params
    (x, kernel), numbers = (v.aval for v in equation.invars), options["dimension_numbers"]
    ordered = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    ones = (1, 1)
    plain = (options["window_strides"], options["lhs_dilation"], options["rhs_dilation"]) == (ones, ones, ones)
    single = options["feature_group_count"] == options["batch_group_count"] == 1
    # With sums in another dtype the image's gradient would be a convolution of two dtypes.
    alike = x.dtype == kernel.dtype == equation.outvars[0].aval.dtype
    real = alike and jnp.issubdtype(x.dtype, jnp.floating)
    if not (ordered and plain and single and real and math.prod(x.shape)):
        return None
    vertical, horizontal = ((int(low), int(high)) for low, high in options["padding"])
    padding = vertical, horizontal
    inside = all(0 <= p < s for pair, s in zip(padding, kernel.shape[:2], strict=True) for p in pair)
    return _Convolution(padding, options["precision"], options["preferred_element_type"]) if inside else None


def refined(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of arrays, whose reverse-mode derivative is faster on a CPU where it holds convolutions.

    Calls are opened up; loops, branches and functions with derivative rules of their own stay as they are, and so do
    the convolutions in them, and all that are strided, dilated, grouped or in another order than NHWC, HWIO. A function
    without such a convolution is called as it is.

    Args:
        function: pure, of pytrees of arrays. A batch goes in as such: vmap within `function`, not around this.

    Returns:
        A function with the same values. Forward-mode derivatives are not defined where it holds a convolution.
    """

    def evaluated(*arguments: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        if not _holds_one(closed.jaxpr):
            return function(*arguments)
        outputs = _evaluate(closed, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return evaluated


def _body(equation: Any) -> Any:
    """The jaxpr that an equation calls, or None."""
    if equation.primitive.name not in _CALLS:
        return None
    body = equation.params["jaxpr"] if "jaxpr" in equation.params else equation.params["call_jaxpr"]
    return body if isinstance(body, jex.ClosedJaxpr) else jex.ClosedJaxpr(body, ())


def _holds_one(jaxpr: Any) -> bool:
    bodies = [(equation, _body(equation)) for equation in jaxpr.eqns]
    return any(_recognised(e) is not None if body is None else _holds_one(body.jaxpr) for e, body in bodies)


def _evaluate(closed: Any, arguments: list[Any]) -> list[Any]:
    jaxpr = closed.jaxpr
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *arguments), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(v) for v in equation.invars]
        convolution, body = _recognised(equation), _body(equation)
        if convolution is not None:
            outputs = [_convolve(convolution, *inputs)]
        elif body is not None:
            outputs = _evaluate(body, inputs)
        else:
            outputs = _bind(equation, inputs)
        values |= zip(equation.outvars, outputs, strict=True)
    return [read(v) for v in jaxpr.outvars]


def _bind(equation: Any, inputs: list[Any]) -> list[Any]:
    variables = {v: x for v, x in zip(equation.invars, inputs, strict=True) if isinstance(v, jex.Var)}
    outputs = [v for v in equation.outvars if not isinstance(v, jex.DropVar)]
    debug = jex.DebugInfo("fvjax", equation.primitive.name, ("",) * len(variables), ("",) * len(outputs))
    jaxpr = jex.Jaxpr((), list(variables), outputs, [equation], equation.effects, debug)
    results = iter(jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))(*variables.values()))
    return [None if isinstance(v, jex.DropVar) else next(results) for v in equation.outvars]
