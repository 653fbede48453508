"""The gradients of convolution kernels, formed one example at a time: each against a loop over `jax.grad`."""

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest

from fvjax import _moments, sites
from fvjax.sites import _engine

N = 4
NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
CASES = {
    "same": ((5, 4, 2), (3, 3, 2, 3), {"padding": "SAME"}),
    "stride 2": ((6, 5, 2), (3, 3, 2, 3), {"window_strides": (2, 2), "padding": ((1, 1), (1, 1))}),
    "uneven strides": ((7, 5, 2), (3, 2, 2, 3), {"window_strides": (1, 3), "padding": ((0, 2), (1, 0))}),
    "one pixel": ((3, 3, 2), (3, 3, 2, 3), {"padding": "VALID"}),
    "one row": ((1, 6, 2), (1, 3, 2, 3), {"padding": "SAME"}),
    "1 x 1": ((4, 3, 2), (1, 1, 2, 3), {"padding": "VALID"}),
    "one channel": ((4, 3, 1), (3, 3, 1, 1), {"padding": "SAME"}),
    "cropped": ((6, 5, 2), (3, 3, 2, 3), {"padding": ((-1, 1), (0, -2))}),
    "dilated image": ((3, 4, 2), (3, 2, 2, 3), {"lhs_dilation": (2, 3), "padding": ((2, 1), (1, 0))}),
    "dilated kernel": ((7, 6, 2), (3, 2, 2, 3), {"rhs_dilation": (2, 3), "padding": "VALID"}),
    "groups": ((5, 4, 4), (3, 2, 2, 6), {"feature_group_count": 2, "padding": "SAME"}),
    "depthwise": ((5, 4, 3), (3, 3, 1, 6), {"feature_group_count": 3, "padding": "SAME"}),
    "channels first": ((2, 5, 4), (3, 2, 3, 2), {"padding": "SAME", "dimension_numbers": NCHW}),
    "mixed order": (
        (5, 2, 4),
        (2, 3, 3, 2),
        {"window_strides": (2, 1), "padding": "SAME", "dimension_numbers": ("HCNW", "IHOW", "WNCH")},
    ),
    "1-D": ((9, 2), (3, 2, 3), {"window_strides": (2,), "padding": "SAME", "dimension_numbers": ("NWC", "WIO", "NWC")}),
    "3-D": (
        (3, 4, 5, 2),
        (2, 3, 2, 2, 3),
        {"window_strides": (1, 2, 1), "padding": "SAME", "dimension_numbers": ("NDHWC", "DHWIO", "NDHWC")},
    ),
}


def problem(name):
    """A loss that is not linear in the kernel, a kernel, and N images."""
    shape, kernel, options = CASES[name]
    options = {"window_strides": (1,) * (len(shape) - 1), "dimension_numbers": NHWC} | options
    batch_axis = options["dimension_numbers"][0].index("N")

    def loss(kernel, x):
        y = jax.lax.conv_general_dilated(jnp.expand_dims(x, batch_axis), kernel, **options)
        return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    rng = np.random.default_rng(0)
    return loss, jnp.asarray(rng.normal(size=kernel)), jnp.asarray(rng.normal(size=(N, *shape)))


@pytest.mark.parametrize("block", [1, 3], ids=["one by one", "three at once"])
@pytest.mark.parametrize("name", CASES)
def test_kernel_gradients(name, block, monkeypatch, x64, quickly):
    """Catches axes, strides or dilations that are exchanged where patches are stacked, and a padded last block."""
    loss, kernel, images = problem(name)
    monkeypatch.setattr(_engine, "_block", lambda *_: block)
    monkeypatch.setattr(_engine._products, "pays", lambda *_, **__: False)  # each gradient is formed
    each = np.stack([np.asarray(jax.grad(loss)(kernel, x)) for x in images])
    weights = jnp.asarray([1.0, 0.0, 2.0, 0.5])

    def measure(kernel, images):
        norms = sites.square_norms(loss, kernel, images, weights=weights)
        return norms, *(sites.moments(loss, kernel, images, weights=weights, elementwise=e) for e in (True, False))

    norms, every, trace = quickly(measure, kernel, images)
    mean = np.average(each, 0, weights)
    m2 = np.tensordot(weights, (each - mean) ** 2, 1)
    close = {"rtol": 1e-11, "atol": 1e-11}
    np.testing.assert_allclose(norms.square_norms, np.sum(each.reshape(N, -1) ** 2, 1), **close)
    for found in (norms.mean, every.mean, trace.mean):
        np.testing.assert_allclose(found, mean, **close)
    np.testing.assert_allclose(every.m2, m2, **close)
    np.testing.assert_allclose(trace.m2, np.sum(m2), **close)


def equations(jaxpr):
    """The equations of a jaxpr and of those in it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jex.jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_loops_over_examples_have_no_axes_of_length_one(monkeypatch):
    """Catches images [n, 1, 1, h, w, c] as operands of a loop, each of which XLA copies once more."""
    loss, kernel, images = problem("same")
    monkeypatch.setattr(_engine, "_block", lambda *_: 1)
    monkeypatch.setattr(_engine._products, "pays", lambda *_, **__: False)
    for function in (sites.square_norms, sites.moments):
        found = equations(jax.make_jaxpr(lambda k, x, f=function: f(loss, k, x))(kernel, images).jaxpr)
        loops = [e for e in found if e.primitive.name == "scan"]
        shapes = [
            v.aval.shape for loop in loops for v in loop.invars[loop.params["num_consts"] + loop.params["num_carry"] :]
        ]
        assert (N, 5, 4, 2) in shapes
        assert all(1 not in shape[1:] for shape in shapes)


def test_a_compact_scan_is_a_scan():
    """Catches axes that come back in another place, and an empty or scalar piece that is lost."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 1, 2, 1), "b": (3,), "c": (3, 0, 1), "d": (3, 1)}
    pieces = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}

    def body(carry, piece):
        assert {name: x.shape for name, x in piece.items()} == {name: shape[1:] for name, shape in shapes.items()}
        return carry + jnp.sum(piece["a"]) * piece["b"], piece

    expected, found = (scan(body, jnp.zeros(()), pieces) for scan in (jax.lax.scan, _moments.scan_compactly))
    jax.tree.map(np.testing.assert_array_equal, expected, found)


def test_the_product_reads_patches_as_they_lie():
    """Catches a product over the first axis of the patches, for which XLA's CPU backend has a slow kernel only."""
    loss, kernel, images = problem("same")
    found = equations(jax.make_jaxpr(lambda k, x: sites.square_norms(loss, k, x))(kernel, images).jaxpr)
    dots = [e for e in found if e.primitive.name == "dot_general"]
    products = [e for e in dots if kernel.size // kernel.shape[-1] in e.invars[0].aval.shape]
    assert products
    for equation in products:
        (left, _), _ = equation.params["dimension_numbers"]
        assert left == (equation.invars[0].aval.ndim - 1,)
