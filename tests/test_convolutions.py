"""Convolutions with derivatives of their own: the same numbers as `jax.grad`, whatever the function around them is."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.extend.core.primitives import remat_p

from fvjax import _convolutions, nets
from fvjax._convolutions import refined

LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolve(x, kernel, padding="SAME", strides=(1, 1), **options):
    """A convolution in the order that has a rule."""
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT, **options)


def numbers(shape, seed=0, dtype=jnp.float64):
    """Normal numbers of a shape."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def image_and_kernel(size=(3, 3), groups=1, count=2):
    """Images [count, 6, 5, 2] and a kernel [*size, 2 / groups, 4]."""
    return numbers((count, 6, 5, 2)), numbers((*size, 2 // groups, 4), 1)


def pullback(function, *arguments):
    """Values, and the derivatives of a weighted sum of them: every output counts, each with a weight of its own."""
    values, back = jax.vjp(function, *arguments)
    return values, back(jax.tree.map(lambda v: jnp.cos(jnp.arange(v.size, dtype=v.dtype)).reshape(v.shape), values))


def rules(function, *arguments):
    """How many convolutions got the rule of this module, by what is traced."""
    return str(jax.make_jaxpr(refined(function))(*arguments)).count("name=_convolve")


def agree(function, *arguments, expected_rules, tolerance=1e-12):
    """Asserts that the refined function has the values and the derivatives, and that its rules are in use."""
    assert rules(function, *arguments) == expected_rules
    plain, own = jax.jit(lambda *a: (pullback(function, *a), pullback(refined(function), *a)))(*arguments)
    assert jax.tree.structure(plain) == jax.tree.structure(own)
    for expected, found in zip(jax.tree.leaves(plain), jax.tree.leaves(own), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


@pytest.fixture(params=["short", "long"])
def longest(request, monkeypatch):
    """Whether a kernel's sum counts as short, or as long with one image in a block."""
    if request.param == "short":
        monkeypatch.setattr(_convolutions, "LONGEST_SUM", 10**6)
    else:
        monkeypatch.setattr(_convolutions, "LONGEST_SUM", 0)
        monkeypatch.setattr(_convolutions, "BLOCK", 1)


@pytest.mark.parametrize(
    ("size", "padding"),
    [
        ((3, 3), "SAME"),
        ((3, 3), "VALID"),
        ((3, 3), ((0, 2), (1, 0))),
        ((1, 1), "VALID"),
        ((5, 3), "SAME"),
        ((2, 4), ((1, 0), (0, 3))),
    ],
)
def test_derivatives_for_image_and_kernel(size, padding, longest, x64):
    """Catches a kernel that is not reversed, a padding at the wrong end, and shifts of rows and columns exchanged."""
    agree(lambda x, k: convolve(x, k, padding), *image_and_kernel(size), expected_rules=1)


@pytest.mark.parametrize(
    "options",
    [
        {"strides": (2, 2)},
        {"strides": (1, 2), "padding": "VALID"},
        {"lhs_dilation": (2, 1), "padding": ((1, 1), (1, 1))},
        {"rhs_dilation": (2, 2)},
        {"feature_group_count": 2},
        {"batch_group_count": 2},
        {"padding": ((-1, 1), (0, 0))},
        {"padding": ((3, 0), (0, 0))},
        {"preferred_element_type": jnp.float64},
    ],
    ids=str,
)
def test_other_convolutions_are_left_to_xla(options, x64):
    """Catches a rule for stride 1 on a convolution that it does not hold for, beside one that it does hold for."""
    x, kernel = image_and_kernel(groups=options.get("feature_group_count", 1))
    if "preferred_element_type" in options:
        kernel = kernel.astype(jnp.float32)
        x = x.astype(jnp.float32)

    def function(x, kernel, last):
        return convolve(convolve(x, kernel, **options), last.astype(options.get("preferred_element_type", last.dtype)))

    agree(function, x, kernel, numbers((1, 1, 4, 2), 2), expected_rules=1)


def test_another_order_of_axes_is_left_to_xla(x64):
    """Catches a convolution of images [n, c, h, w] that is taken for one of [n, h, w, c]."""
    x, kernel = numbers((2, 3, 3, 3)), numbers((3, 3, 3, 3), 1)
    order = ("NCHW", "OIHW", "NCHW")
    agree(
        lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=order),
        x,
        kernel,
        expected_rules=0,
    )


@pytest.mark.parametrize("count", [1, 7, 12])
def test_blocks_add_up(count, monkeypatch, x64):
    """Catches images that are lost or counted twice where the batch is prime or falls into several blocks."""
    taken = []
    x, kernel = image_and_kernel(count=count)
    monkeypatch.setattr(_convolutions, "LONGEST_SUM", 0)
    monkeypatch.setattr(_convolutions, "BLOCK", 4 * (6 + 2) * 5 * (3 * 2 + 3 * 4))  # four images
    scan = jax.lax.scan
    monkeypatch.setattr(jax.lax, "scan", lambda f, init, xs: taken.append(len(xs[0])) or scan(f, init, xs))
    agree(convolve, x, kernel, expected_rules=1)
    assert taken == [{1: 1, 7: 7, 12: 3}[count]]


def test_the_length_of_the_sum_decides(monkeypatch):
    """Catches a bound that is compared with something else than images x rows x columns of the output."""
    seen = []
    shifts = _convolutions._by_shifts
    monkeypatch.setattr(_convolutions, "_by_shifts", lambda *a: seen.append(a[1].shape) or shifts(*a))
    kernel = jnp.ones((3, 3, 1, 1))
    longest = _convolutions.LONGEST_SUM // (16 * 16)
    for count in (longest, longest + 1):
        x = jnp.ones((count, 16, 16, 1))
        jax.eval_shape(jax.grad(lambda k, x=x: jnp.sum(refined(convolve)(x, k))), kernel)
    assert seen == [(longest + 1, 16, 16, 1)]


@settings(max_examples=8)
@given(st.data())
def test_any_shape_and_padding(x64, data):
    """Catches a shape for which the rule is wrong: sizes, paddings, channels and block sizes at random."""
    integers = lambda low, high, name: data.draw(st.integers(low, high), name)  # noqa: E731
    kernel = tuple(integers(1, 3, "kernel") for _ in range(2))
    padding = tuple((integers(0, k - 1, "low"), integers(0, k - 1, "high")) for k in kernel)
    size = tuple(k + integers(0, 3, "size") for k in kernel)
    count, inputs, outputs = integers(1, 5, "images"), integers(1, 3, "inputs"), integers(1, 3, "outputs")
    x, weights = numbers((count, *size, inputs)), numbers((*kernel, inputs, outputs), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_convolutions, "LONGEST_SUM", integers(0, 40, "longest"))
        patch.setattr(_convolutions, "BLOCK", integers(1, 2000, "block"))
        agree(lambda x, k: convolve(x, k, padding), x, weights, expected_rules=1)


@pytest.mark.parametrize(("dtype", "error"), [(jnp.float32, 4 * 2.0**-23), (jnp.bfloat16, 2.0**-9)])
def test_short_numbers_are_summed_in_float32(dtype, error, longest, x64):
    """Catches sums of blocks in bfloat16: to float64 of the same numbers the result has one rounding, 2^-9.

    The sums have 4096 terms; in float32 they may be off by a few roundings of 2^-24.
    """
    shapes = (64, 8, 8, 2), (3, 3, 2, 2), (64, 8, 8, 2)
    x, kernel, weights = (numbers(shape, seed, dtype) for seed, shape in enumerate(shapes))

    def gradients(function, *arguments):
        return jax.jit(jax.grad(lambda x, k, w: jnp.sum((function(x, k) * w).astype(jnp.float64)), (0, 1)))(*arguments)

    exact = gradients(convolve, *(a.astype(jnp.float64) for a in (x, kernel, weights)))
    for found, expected in zip(gradients(refined(convolve), x, kernel, weights), exact, strict=True):
        assert found.dtype == dtype
        difference = np.abs(np.asarray(found, np.float64) - np.asarray(expected)).max()
        assert 0 < difference <= 1.01 * error * np.abs(expected).max()


@jax.custom_vjp
def doubled_backwards(x):
    """The identity, whose derivative is said to be 2."""
    return x


doubled_backwards.defvjp(lambda x: (x, None), lambda _, g: (2 * g,))


@jax.custom_jvp
def tripled(x):
    """The identity, whose derivative is said to be 3."""
    return x


tripled.defjvps(lambda tangent, _, x: 3 * tangent)


def with_everything(params, batch, constants):
    """Convolutions at the top and inside calls, loops and branches; a pytree in and out; constants of the closure."""
    x = jax.jit(convolve)(batch["x"], params["first"])
    x = jax.jit(lambda x: jax.nn.silu(tripled(jax.jit(convolve)(x, params["second"]))))(x)
    x = doubled_backwards(x) * constants
    x = jax.lax.cond(batch["x"].sum() > 0, lambda x: convolve(x, params["second"]), jnp.sin, x)
    x, rows = jax.lax.scan(lambda c, s: (convolve(c, params["second"]) * s, c.sum()), x, batch["scale"])
    x = jax.checkpoint(lambda x: jnp.tanh(convolve(x, params["second"])))(x)
    several = jnp.split(x, 2, -1)
    return {"x": several[0], "rest": (rows, params["unused"])}, convolve(several[1], params["last"])


def test_a_function_with_everything(longest, x64):
    """Catches an equation that is evaluated wrongly: derivative rules that are lost, constants, outputs in disorder."""
    shapes = {"first": (3, 3, 2, 4), "second": (3, 3, 4, 4), "last": (1, 1, 2, 1), "unused": ()}
    params = {name: 0.3 * numbers(shape, i) for i, (name, shape) in enumerate(shapes.items())}
    batch = {"x": numbers((2, 4, 4, 2), 8), "scale": numbers((3,), 9)}
    constants = numbers((4, 4, 4), 10)
    agree(lambda p, b: with_everything(p, b, constants), params, batch, expected_rules=3)
    one = jnp.ones((1, 1, 1, 1))
    told = jax.grad(lambda x: jnp.sum(refined(lambda x: doubled_backwards(tripled(convolve(x, one))))(x)))
    np.testing.assert_array_equal(told(one), 6.0)  # 1 would be true, and is not what the functions say


def test_a_checkpoint_stays_one_equation(x64):
    """Catches a checkpoint that is opened up, and with it the memory that it was to save."""

    def function(x, kernel):
        return convolve(jax.checkpoint(lambda x: jnp.sin(convolve(x, kernel)))(x), kernel)

    x, kernel = numbers((1, 3, 3, 1)), numbers((3, 3, 1, 1), 1)
    equations = jax.make_jaxpr(refined(function))(x, kernel).jaxpr.eqns
    assert [e.primitive for e in equations if e.primitive.name in ("sin", "remat2", "checkpoint")] == [remat_p]
    assert rules(function, x, kernel) == 1


def test_a_function_without_convolutions_is_called_as_it_is():
    """Catches functions that lose forward-mode derivatives, or what their jaxpr does not hold, for nothing."""
    seen = []

    def function(x):
        seen.append(type(x))
        return np.sin(1.0) * x

    result, tangent = jax.jvp(refined(function), (2.0,), (1.0,))
    assert (float(result), float(tangent)) == pytest.approx((2 * np.sin(1), np.sin(1)))
    assert refined(lambda x: {"same": x})(3) == {"same": 3}
    assert len(seen) == 2  # once to look, once to run


def test_inside_a_loop_and_over_examples(longest, x64):
    """Catches a rule that is wrong where the training uses it: a vmap within, micro-batches in a scan around."""
    x, kernel = numbers((3, 2, 4, 4, 2)), numbers((3, 3, 2, 2), 1)

    def loss(kernel, images):
        return jnp.mean(jax.vmap(lambda image: jnp.sum(jnp.sin(convolve(image[None], kernel)) ** 2))(images))

    def summed(function):
        add = lambda total, images: (total + jax.grad(function)(kernel, images), None)  # noqa: E731
        return jax.jit(lambda: jax.lax.scan(add, jnp.zeros_like(kernel), x)[0])()

    assert rules(loss, kernel, x[0]) == 1
    np.testing.assert_allclose(summed(refined(loss)), summed(loss), rtol=1e-12, atol=1e-12)


@functools.cache
def tiny_unet():
    """A U-Net of two levels for 8 x 8 images; every kernel, the zero ones too, gets numbers."""
    size = {"channels": 16, "res_blocks": 1, "multipliers": (1, 2), "attention": (), "heads": 1, "head_channels": None}
    model = nets.unet((8, 8, 1), **size)
    params = jax.eval_shape(model.init, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    return model, jax.tree.unflatten(tree, [0.1 * numbers(p.shape, i, jnp.float32) for i, p in enumerate(leaves)])


def test_the_gradient_of_a_unet():
    """Catches a convolution of the real network that is taken for another, in float32 as it is trained."""
    model, params = tiny_unet()
    x, t = numbers((4, 8, 8, 1), 0, jnp.float32), jnp.linspace(0.1, 0.9, 4)

    def loss(params):
        return jnp.mean((jax.vmap(model.apply, in_axes=(None, 0, 0))(params, t, x) - x) ** 2)

    assert rules(loss, params) >= 8
    expected, found = jax.jit(lambda p: (jax.value_and_grad(loss)(p), jax.value_and_grad(refined(loss))(p)))(params)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())
