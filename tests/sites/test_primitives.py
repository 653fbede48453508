"""The sites of losses that are one unusual thing each, against `vmap(grad)`: norms, means and moments, and the paths.

In float64 to 1e-11, and in float32 to 1e-5 of float64, on the scale of the largest gradient of any leaf.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvjax.types import Array

N = 5


class Case(NamedTuple):
    """Builds (loss, params, batch), all in float32; the paths that it promises; whether it says that it is slow."""

    build: Callable[[], tuple[Any, Any, Any]]
    paths: dict[str, str]
    slow: bool


CASES: dict[str, Case] = {}


def case(paths: dict[str, str] | None = None, *, slow: bool = False) -> Callable[[Any], Any]:
    """Registers a builder under its name."""

    def register(build: Callable[[], tuple[Any, Any, Any]]) -> Any:
        CASES[build.__name__] = Case(build, paths or {}, slow)
        return build

    return register


def normal(seed: int, *shape: int) -> np.ndarray:
    """Float32 numbers."""
    return np.asarray(np.random.default_rng(seed).normal(size=shape), np.float32)


def vectors(size: int = 4) -> np.ndarray:
    """A batch of vectors."""
    return normal(3, N, size)


def square(x: Array) -> Array:
    """A sum that is not linear, so that the cotangents depend on the data."""
    return jnp.sum(jnp.tanh(x) ** 2 + x)


@case({"['a']": "vjp of cond", "['b']": "vjp of cond"})
def cond_on_data():
    """Catches a branch on the data that both or none of the examples take, and one without its warning."""

    def loss(params: Any, x: Array) -> Array:
        return jax.lax.cond(x[0] > 0, lambda x: square(x @ params["a"]), lambda x: square(x * params["b"]), x)

    return loss, {"a": normal(4, 4, 3), "b": normal(5, 4)}, vectors()


@case({"": "vjp of cond"})
def switch_on_an_integer():
    """Catches integer data that choose among three branches, one of which has no params."""

    def loss(params: Any, example: Any) -> Array:
        x, which = example
        branches = [lambda x: square(x * params), lambda x: square(x + params), square]
        return jax.lax.switch(which, branches, x)

    return loss, normal(4, 4), (vectors(), np.asarray([0, 2, 1, 1, 0], np.int32))


@jax.custom_vjp
def half_gradient(w: Array, x: Array) -> Array:
    """A product whose derivative with respect to w is declared to be half of what it is."""
    return x @ w


half_gradient.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (0.5 * jnp.outer(kept[1], g), kept[0] @ g))


@case({"['a']": "outer products", "['b']": "outer products"})
def custom_vjp():
    """Catches a declared derivative that is replaced by the true one."""

    def loss(params: Any, x: Array) -> Array:
        return square(half_gradient(params["a"], jnp.tanh(x @ params["b"])))

    return loss, {"a": normal(4, 3, 2), "b": normal(5, 4, 3)}, vectors()


@jax.custom_vjp
def clipped(x: Array) -> Array:
    """The identity, whose cotangent is clipped: the backward pass is not linear in it."""
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@case({"['a']": "outer products"})
def custom_vjp_of_data():
    """Catches cotangents that are clipped as a batch, or after they were scaled, and not one by one."""
    return lambda p, x: square(clipped(x @ p["a"])), {"a": normal(4, 4, 3)}, vectors()


@case()
def custom_vjp_of_params():
    """Catches a function of the params alone whose declared derivative is not linear: it meets no single example."""
    return lambda p, x: square(x @ (0.5 * clipped(p))), normal(4, 4, 3), vectors()


@jax.custom_jvp
def doubled_slope(w: Array, x: Array) -> Array:
    """A product whose derivative is declared to be twice what it is."""
    return w * x


doubled_slope.defjvp(lambda at, by: (at[0] * at[1], 2 * (at[0] * by[1] + by[0] * at[1])))


@case({"": "vjp of custom_jvp_call"})
def custom_jvp():
    """Catches a declared derivative that is replaced by the true one."""
    return lambda w, x: square(doubled_slope(w, x)), normal(4, 4), vectors()


@case({"['used']": "outer products", "['unused']": "unused", "['stopped']": "unused"})
def unused_leaf():
    """Catches leaves without a gradient that are lost, or get the shape of another leaf."""

    def loss(params: Any, x: Array) -> Array:
        return square(x @ params["used"] + jax.lax.stop_gradient(params["stopped"]) + 0 * jnp.sum(x))

    return loss, {"used": normal(4, 4, 2), "unused": normal(5, 3), "stopped": normal(6, 2)}, vectors()


@case()
def no_data():
    """Catches a loss without a site: its gradient is the same for every example, its variance zero."""
    return lambda p, _: square(p["a"]) + square(p["b"]), {"a": normal(4, 4), "b": normal(5, 3)}, vectors()


@case({"['a']": "unused", "['b']": "unused"})
def no_params():
    """Catches a loss that uses no params."""
    return lambda _, x: square(x), {"a": normal(4, 4), "b": normal(5, 3)}, vectors()


@case({"": "outer products"})
def integer_leaves():
    """Catches integers and booleans of the batch that are differentiated, or cast on their way."""

    def loss(w: Array, example: Any) -> Array:
        x, count, flag = example
        return square(jnp.where(flag, x @ w, 2 * x @ w) * count.astype(x.dtype))

    batch = vectors(), np.asarray([3, 1, 0, 2, 5], np.int32), np.asarray([True, False, True, True, False])
    return loss, normal(4, 4, 3), batch


@case()
def fourier_filter():
    """Catches gradients of complex products that keep their imaginary part, or lose a conjugate."""

    def loss(params: Any, x: Array) -> Array:
        spectrum = jnp.fft.rfft(x) * jax.lax.complex(params["real"], params["imaginary"])
        return square(jnp.fft.irfft(spectrum + jnp.fft.rfft(params["kernel"])))

    return loss, {"real": normal(4, 4), "imaginary": normal(5, 4), "kernel": normal(6, 6)}, vectors(6)


@case()
def real_matrix_of_complex_data():
    """Catches a real parameter that is cast to complex for a dot product, and gets complex norms and moments."""

    def loss(w: Array, x: Array) -> Array:
        spectrum = jnp.fft.fft(x)
        return square(jnp.abs(spectrum @ w.astype(spectrum.dtype)))

    return loss, normal(4, 4, 3), vectors()


@case()
def complex_matrix():
    """Catches a matrix that is made complex from two real leaves."""

    def loss(params: Any, x: Array) -> Array:
        return square(jnp.abs(jnp.fft.fft(x) @ jax.lax.complex(params["a"], params["b"])))

    return loss, {"a": normal(4, 4, 3), "b": normal(5, 4, 3)}, vectors()


PRODUCTS = {
    "ek,ekh->eh": ((2, 3), (2, 3, 4)),
    "ehk,ek->eh": ((2, 4, 3), (2, 3)),
    "elk,ekh->leh": ((2, 5, 3), (2, 3, 4)),
    "lek,hek->ehl": ((5, 2, 3), (4, 2, 3)),
    "abk,lkb->bla": ((2, 3, 4), (5, 4, 3)),
    "lij,jki->kl": ((5, 2, 3), (3, 4, 2)),
    "ij,kl->ikjl": ((2, 3), (4, 2)),
    "i,i->": ((4,), (4,)),
    "ei,ei->e": ((3, 4), (3, 4)),
}


def product(subscripts: str, side: int) -> tuple[Any, Any, Any]:
    """An einsum with the params on the left (0) or on the right (1)."""
    shapes = PRODUCTS[subscripts]

    def loss(w: Array, x: Array) -> Array:
        pair = (w, x) if side == 0 else (x, w)
        return square(jnp.einsum(subscripts, *pair)) + square(0.5 * jnp.einsum(subscripts, *pair))

    return loss, normal(4, *shapes[side]), normal(3, N, *shapes[1 - side])


for _side, _word in enumerate(("left", "right")):
    for _subscripts in PRODUCTS:
        CASES[f"{_subscripts} params {_word}"] = Case(
            partial(product, _subscripts, _side), {"": "outer products"}, False
        )

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "all": {
        "window_strides": (2, 1),
        "padding": ((1, 0), (2, 3)),
        "lhs_dilation": (1, 2),
        "rhs_dilation": (2, 1),
        "feature_group_count": 2,
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    },
    "cropped, channels first": {
        "window_strides": (1, 2),
        # Not (-1, 1): jax 0.10.2 then returns garbage on CPUs in float32, without any gradient.
        "padding": ((-1, 0), (0, -1)),
        "dimension_numbers": ("NCHW", "OIHW", "NCHW"),
    },
    "depthwise, odd layouts": {
        "window_strides": (1, 1),
        "padding": "SAME",
        "feature_group_count": 4,
        "dimension_numbers": ("HNCW", "WOIH", "CWHN"),
    },
    "batch groups": {
        "window_strides": (1, 1),
        "padding": "SAME",
        "batch_group_count": 2,
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    },
}


def convolution(name: str) -> tuple[Any, Any, Any]:
    """Two images of 5 x 6 x 4, kernels of 2 x 3, four features."""
    options = CONVOLUTIONS[name]
    spec = options["dimension_numbers"]
    sizes = {"N": 2, "C": 4, "H": 5, "W": 6}
    kernel = {"H": 2, "W": 3, "I": 4 // options.get("feature_group_count", 1), "O": 4}

    def loss(w: Array, x: Array) -> Array:
        return square(jax.lax.conv_general_dilated(x, w, **options))

    return loss, normal(4, *(kernel[a] for a in spec[1])), normal(3, N, *(sizes[a] for a in spec[0]))


for _name, _options in CONVOLUTIONS.items():
    _rule = "vjp of conv_general_dilated" if "batch_group_count" in _options else "image patches"
    CASES[f"convolution: {_name}"] = Case(partial(convolution, _name), {"": _rule}, False)


@case({"": "image patches"})
def kernel_for_each_part():
    """Catches a convolution under an inner vmap over kernels, which makes them feature groups."""

    def loss(kernels: Array, x: Array) -> Array:
        return square(jax.vmap(lambda k, image: jnp.convolve(image, k, mode="same"))(kernels, x))

    return loss, normal(4, 2, 3), normal(3, N, 2, 6)


@case({"": "vjp of conv_general_dilated"})
def image_of_params():
    """Catches params that are the image of a convolution, with the data for a kernel."""
    return lambda p, x: square(jax.lax.conv(p[None], x, (1, 1), "SAME")), normal(4, 2, 4, 4), normal(3, N, 1, 2, 3, 3)


@case()
def concatenated_params():
    """Catches parts of one matrix that are given to the wrong leaf."""

    def loss(params: Any, x: Array) -> Array:
        return square(x @ jnp.concatenate([params["a"], params["b"]], 1)) + square(jnp.concatenate([x, params["c"]]))

    return loss, {"a": normal(4, 4, 2), "b": normal(5, 4, 3), "c": normal(6, 2)}, vectors()


@case({"['qkv']": "outer products"})
def slices_of_qkv():
    """Catches disjoint slices of one leaf, added at the wrong place or made slow."""

    def loss(params: Any, x: Array) -> Array:
        q, k, v = (x @ params["qkv"][:, i : i + 2] for i in (0, 2, 4))
        return square(nn.softmax(q @ k.T) @ v)

    return loss, {"qkv": normal(4, 4, 6)}, normal(3, N, 3, 4)


@case({"": "outer products"})
def stacked_matrices():
    """Catches p[0] and p[1] of one leaf that overwrite each other."""
    return lambda p, x: square(jnp.tanh(x @ p[0]) @ p[-1]), normal(4, 2, 4, 4), vectors()


@case({"": "outer products"})
def split_params():
    """Catches the outputs of one split, one of which is not used."""

    def loss(p: Array, x: Array) -> Array:
        a, _, c = jnp.split(p, 3)
        return square(a @ x) + square(2 * (c @ x))

    return loss, normal(4, 6, 4), vectors()


@case({"": "outer products, pulled back per example"})
def overlapping_slices():
    """Catches overlapping slices, squared one by one: their shared rows have a cross term."""
    return lambda p, x: square(x[:3] @ p[:3]) + square(2 * x[1:] @ p[2:]), normal(4, 5, 3), vectors()


@case({"": "outer products"})
def strided_slices():
    """Catches slices that interleave, taken for overlapping ones."""
    return lambda p, x: square(x @ p[::2]) + square(2 * x @ p[1::2]), normal(4, 8, 3), vectors()


@case({"['table']": "rows of a table"})
def gathered_params():
    """Catches rows that the data index twice in one example, in order and out of range."""

    def loss(params: Any, example: Any) -> Array:
        x, index = example
        return square(params["table"][index] @ x)

    index = np.asarray([[0, 0, 1], [2, 4, 2], [3, 3, 3], [1, 2, 9], [-1, 0, 4]], np.int32)
    return loss, {"table": normal(4, 5, 4)}, (vectors(), index)


@case({"": "vjp of dynamic_slice"})
def dynamic_slice_of_params():
    """Catches a window of the params whose start is data."""

    def loss(p: Array, example: Any) -> Array:
        x, start = example
        return square(jax.lax.dynamic_slice_in_dim(p, start, 3) * x[:3])

    return loss, normal(4, 6), (vectors(), np.arange(N, dtype=np.int32))


@case()
def scattered_params():
    """Catches params that are written into data at an index of the example, and added there."""

    def loss(params: Any, example: Any) -> Array:
        x, index = example
        return square(x.at[index].set(params["set"]) * 2) + square(x.at[index].add(params["add"] * x[:2]))

    index = np.asarray([[0, 1], [2, 3], [3, 0], [1, 2], [0, 3]], np.int32)
    return loss, {"set": normal(4, 2), "add": normal(5, 2)}, (vectors(), index)


@case({"": "outer products"})
def scaled_params():
    """Catches a constant factor that enters the squared norm once."""
    return lambda p, x: square(x @ (3 * p)), normal(4, 4, 3), vectors()


@case()
def nearly_equal_constants():
    """Catches functions of the params that are taken for one, since their constants look alike in print."""

    def loss(p: Array, x: Array) -> Array:
        return square(x @ (p * 0.1001)) + square(x @ (p * 0.1002))

    return loss, normal(4, 4, 3), vectors()


@case({"['a']": "vjp of select_n", "['b']": "vjp of select_n"})
def selected_params():
    """Catches one of two params in one equation."""
    return lambda p, x: square(jnp.where(x > 0, p["a"], p["b"]) * x), {"a": normal(4, 4), "b": normal(5, 4)}, vectors()


@case({"": "outer products, pulled back per example"})
def masked_params():
    """Catches a mask of the params whose zeros get a gradient."""
    return lambda p, x: square(x @ jnp.tril(p)) + square(x @ jnp.where(p > 0, p, 0.1 * p)), normal(4, 4, 4), vectors()


@case({"['kernel']": "image patches", "['scale']": "vjp of mul"})
def max_pooling():
    """Catches a maximum over windows that leaks between examples."""

    def loss(params: Any, x: Array) -> Array:
        h = jax.lax.conv(x[None], params["kernel"], (1, 1), "SAME")[0] * params["scale"][:, None, None]
        return square(nn.max_pool(h.transpose(1, 2, 0), (2, 2), (2, 2)))

    return loss, {"kernel": normal(4, 3, 2, 3, 3), "scale": normal(5, 3)}, normal(3, N, 2, 4, 4)


@case({"['logits']": "vjp of add"})
def softmax_and_cumulative_sums():
    """Catches params within reductions along their own axis."""

    def loss(params: Any, x: Array) -> Array:
        probabilities = jax.nn.softmax(x + params["logits"])
        return square(jnp.cumsum(probabilities * jnp.cumsum(params["steps"])) * x)

    return loss, {"logits": normal(4, 4), "steps": normal(5, 4)}, vectors()


@case({"": "vjp of mul"})
def twice_in_a_row():
    """Catches params that meet data at two equations that follow each other, the cotangent of one in the other's."""
    return lambda p, x: square(p * jnp.sin(p * x)), normal(4, 4), vectors()


@case()
def params_with_params():
    """Catches a product of two params, whose gradients each hold the other."""

    def loss(params: Any, x: Array) -> Array:
        low_rank = params["u"] @ params["v"] / jnp.linalg.norm(params["v"])
        return square(x @ low_rank)

    return loss, {"u": normal(4, 4, 2), "v": normal(5, 2, 4)}, vectors()


@case({"": "outer products"})
def linear_solve():
    """Catches an equation with sub-programs for its derivative."""

    def loss(p: Array, x: Array) -> Array:
        return square(jnp.linalg.solve(p + 4 * jnp.eye(4, dtype=p.dtype), x))

    return loss, normal(4, 4, 4), vectors()


@case({"": "outer products"})
def fori_loop():
    """Catches a short loop with params that is not unrolled."""
    return lambda p, x: square(jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(p @ h), x)), normal(4, 4, 4), vectors()


@case({"": "outer products"})
def empty_scan():
    """Catches a scan of no iterations, whose outputs cannot be stacked."""

    def loss(p: Array, x: Array) -> Array:
        last, rows = jax.lax.scan(lambda h, w: (w @ h, h), x, p[:0])
        return square(p[0] @ last) + jnp.sum(rows)

    return loss, normal(4, 2, 4, 4), vectors()


@case({"['empty']": "unused", "['full']": "outer products"})
def empty_leaf():
    """Catches a division by the size of a leaf without elements."""

    def loss(params: Any, x: Array) -> Array:
        return square(x[:0] @ params["empty"]) + square(x @ params["full"])

    return loss, {"empty": normal(4, 0, 3), "full": normal(5, 4, 3)}, vectors()


@pytest.fixture(autouse=True)
def printed_digits():
    """Short prints, as many a notebook sets them: nothing may depend on how a number looks."""
    with np.printoptions(precision=3, suppress=True):
        yield


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("name", CASES)
def test_loss_is_vmap_grad(agree, name, bits):
    """Catches what the builder of the case says; for einsums and convolutions axes that are taken for one another."""
    build, paths, slow = CASES[name]
    found = agree(name, build(), bits=bits, slow=slow)
    assert found.items() >= paths.items(), found


def product_in(operands: Any, output: Any) -> Callable[[Any, Array], Array]:
    """A dense layer whose product takes one dtype and gives another."""

    def loss(w: Array, x: Array) -> Array:
        return square(jnp.dot(x.astype(operands), w.astype(operands), preferred_element_type=output))

    return loss


def mixed_leaves(params: Any, x: Array) -> Array:
    """A float32 layer before a float64 bias."""
    return square((x.astype(np.float32) @ params["a"]).astype(np.float64) + params["b"])


KERNEL = normal(4, 4, 3)
MIXED = {
    "float32 params in float64": (product_in(np.float64, np.float64), KERNEL, vectors()),
    "float64 params in float32": (product_in(np.float32, np.float32), KERNEL.astype(np.float64), vectors()),
    "float32 operands, float64 product": (product_in(np.float32, np.float64), KERNEL, vectors()),
    "bfloat16 operands, float32 product": (product_in(jnp.bfloat16, np.float32), KERNEL, vectors()),
    "leaves of both": (mixed_leaves, {"a": KERNEL, "b": normal(5, 3).astype(np.float64)}, vectors()),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_precision_is_vmap_grad(agree, name):
    """Catches products and sums of two dtypes that strict promotion refuses.

    To 1e-6, as `vmap(grad)` rounds gradients to float32; with bfloat16, to eight of its half-units of 2^-9, as it
    rounds them to bfloat16.
    """
    agree(name, MIXED[name], bits=64, as_given=True, tolerance=8 * 2.0**-9 if "bfloat16" in name else 1e-6)
