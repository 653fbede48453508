"""The sites of whole networks, of Flax, Equinox, NNX and ott-jax, against `vmap(grad)`: norms, means and moments.

In float64 to 1e-11, and in float32 to 1e-5 of float64, on the scale of the largest gradient of any leaf.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvjax import sites
from fvjax.losses import squared_error
from fvjax.nets import mlp
from fvjax.types import Array, PathSample

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


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Float32 numbers."""
    return np.asarray(scale * np.random.default_rng(seed).normal(size=shape), np.float32)


def filled(shapes: Any) -> Any:
    """Random params of the given shapes, none of them at its initial zero; no initialisation is compiled."""
    generator = np.random.default_rng(7)

    def one(aval: Any) -> np.ndarray:
        fan_in = max(1, int(np.prod(aval.shape[:-1])))
        return np.asarray(generator.normal(size=aval.shape) / np.sqrt(fan_in), aval.dtype)

    return jax.tree.map(one, shapes)


def linen(module: nn.Module, x: Any, *args: Any, target: Any = None) -> tuple[Any, Any, Any]:
    """A regression with a Flax module of ONE example; the batch is (x, target, *args)."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x[0], *(a[0] for a in args))["params"]
    output = jax.eval_shape(lambda p: module.apply({"params": p}, x[0], *(a[0] for a in args)), shapes)
    target = normal(99, len(x), *output.shape) if target is None else target

    def loss(params: Any, example: Any) -> Array:
        x, target, *args = example
        # Flax promotes the statistics of its normalisations.
        with jax.numpy_dtype_promotion("standard"):
            predicted = jnp.asarray(module.apply({"params": params}, x, *args))
        return jnp.mean((predicted - target) ** 2)

    return loss, filled(shapes), (x, target, *args)


def regression(predict: Callable[..., Array], params: Any, x: Any, outputs: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """A squared error of predict(params, x)."""

    def loss(params: Any, example: Any) -> Array:
        return jnp.mean((predict(params, example[0]) - example[1]) ** 2)

    return loss, params, (x, normal(98, len(x), *outputs))


def path_samples(*dims: int) -> PathSample:
    """Draws of a path of points of shape dims."""
    return PathSample(np.linspace(0.1, 0.9, N, dtype=np.float32), normal(1, N, *dims), normal(2, N, *dims))


@case({"['input']['kernel']": "outer products", "['block_0']['bias']": "vjp of add"})
def fvjax_mlp():
    """Catches a wrong gradient in the network of the experiments: dense layers, biases and skip connections."""
    model = mlp(3, width=4, depth=2, time_features=2)
    return squared_error(model.apply), filled(jax.eval_shape(model.init, jax.random.key(0))), path_samples(3)


class ConvNet(nn.Module):
    """Stride, dilation, groups, uneven padding, a transposed convolution and GroupNorm, on ONE image."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[5, 6, 2] -> [6, 6, 1]."""
        h = nn.Conv(4, (3, 3), strides=(2, 1), name="strided")(x)
        h = nn.silu(nn.GroupNorm(2, reduction_axes=(-3, -2, -1), name="norm")(h))
        h = nn.Conv(4, (2, 3), kernel_dilation=(1, 2), feature_group_count=2, padding=((1, 0), (2, 1)), name="grouped")(
            h
        )
        return nn.ConvTranspose(1, (3, 2), strides=(2, 1), name="transposed")(nn.silu(h))


@case(
    {
        "['strided']['kernel']": "image patches",
        "['grouped']['kernel']": "image patches",
        "['transposed']['kernel']": "image patches",
        "['strided']['bias']": "vjp of add",
        "['norm']['scale']": "vjp of mul",
    }
)
def conv_net():
    """Catches patches that are cut at the wrong pixels, and groups in the wrong order."""
    return linen(ConvNet(), normal(3, N, 5, 6, 2))


@case({"['kernel']": "image patches", "['bias']": "vjp of add"})
def conv_1d():
    """Catches patches that suppose two spatial axes."""
    return linen(nn.Conv(3, (3,), strides=(2,)), normal(3, N, 6, 2))


@case({"['kernel']": "image patches"})
def conv_3d():
    """Catches spatial axes out of order, with a kernel of three sizes."""
    return linen(nn.Conv(2, (1, 2, 3), padding="VALID"), normal(3, N, 3, 4, 5, 2))


@case({"['layers_1']['scale']": "vjp of mul", "['layers_1']['bias']": "vjp of add"})
def layer_norm():
    """Catches scales and biases whose gradients are not summed over the rows."""
    return linen(nn.Sequential([nn.Dense(4), nn.LayerNorm(), nn.tanh, nn.Dense(2)]), normal(3, N, 3, 4))


class ClassConditional(nn.Module):
    """A dense layer plus the embedding of a label."""

    @nn.compact
    def __call__(self, x: Array, label: Array) -> Array:
        """[d], [] -> [d]."""
        h = nn.tanh(nn.Dense(4, name="dense")(x) + nn.Embed(6, 4, name="embed")(label))
        return nn.Dense(3, name="output")(h)


@case({"['embed']['embedding']": "rows of a table", "['dense']['kernel']": "outer products"})
def class_conditional():
    """Catches rows of an embedding that go to the wrong label, and integer leaves of the batch."""
    return linen(ClassConditional(), normal(3, N, 3), np.asarray([0, 2, 2, 5, 1], np.int32))


@case(
    {
        "['query']['kernel']": "outer products",
        "['out']['kernel']": "outer products",
        "['value']['bias']": "vjp of add",
    }
)
def attention():
    """Catches kernels of three axes ([d, heads, features]), contracted over one axis or two."""
    return linen(nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6), normal(3, N, 3, 4))


class Tied(nn.Module):
    """The same dense layer twice."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[4] -> [4]."""
        dense = nn.Dense(4, name="dense")
        return dense(nn.tanh(dense(x)))


@case({"['dense']['kernel']": "outer products", "['dense']['bias']": "vjp of add"})
def tied_dense():
    """Catches squares that are summed over the uses of a layer, rather than its summed gradient squared."""
    return linen(Tied(), normal(3, N, 4))


@case({"": "outer products"})
def tied_autoencoder():
    """Catches a kernel and its transpose that are taken for two parameters, or added without transposing back."""
    return regression(lambda w, x: jnp.tanh(x @ w) @ w.T, normal(4, 4, 3), normal(3, N, 4), (4,))


class Attend(nn.Module):
    """An embedding that is also the output layer."""

    @nn.compact
    def __call__(self, token: Array) -> Array:
        """[] -> [6]."""
        embed = nn.Embed(6, 3, name="embed")
        return embed.attend(nn.tanh(embed(token)))


@case({"['embed']['embedding']": "outer products + rows of a table"})
def embedding_attend():
    """Catches the cross term of two different rules for one parameter."""
    return linen(Attend(), np.asarray([0, 2, 2, 5, 1], np.int32))


class Standardised(nn.Module):
    """A convolution whose kernel is standardised (Qiao et al. 2019)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[4, 4, 2] -> [4, 4, 3]."""
        kernel = self.param("kernel", nn.initializers.normal(), (3, 3, 2, 3))
        mean, variance = jnp.mean(kernel, (0, 1, 2)), jnp.var(kernel, (0, 1, 2))
        kernel = (kernel - mean) / jnp.sqrt(variance + 1e-3)
        return nn.tanh(
            jax.lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))[0]
        )


@case({"['kernel']": "image patches, pulled back per example"})
def weight_standardisation():
    """Catches norms of the gradients of the standardised kernel, instead of those of the kernel."""
    return linen(Standardised(), normal(3, N, 4, 4, 2))


class Normed(nn.Module):
    """A dense layer with weight normalisation."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[4] -> [3]."""
        return nn.tanh(nn.WeightNorm(nn.Dense(3, name="dense"), name="norm")(x))


@case()
def weight_norm():
    """Catches a direction and a scale, two leaves of one kernel, of which one is forgotten."""
    return linen(Normed(), normal(3, N, 4))


@case({"['embed']": "outer products", "['layers']['kernel']": "outer products", "['layers']['bias']": "vjp of add"})
def scan_over_layers():
    """Catches a stack of layers that is mixed up when the scan is unrolled, and a scan of stacks that stays slow."""
    params = {"embed": normal(4, 3, 4), "layers": {"kernel": normal(5, 3, 4, 4, scale=0.5), "bias": normal(6, 3, 4)}}

    def predict(params: Any, x: Array) -> Array:
        def layer(h: Array, p: Any) -> tuple[Array, Array]:
            h = jnp.tanh(h @ p["kernel"] + p["bias"])
            return h, h[0]

        h, firsts = jax.lax.scan(layer, x @ params["embed"], params["layers"])
        return h + jnp.sum(firsts)

    return regression(predict, params, normal(3, N, 3), (4,))


@case({"['embed']": "outer products", "['layers']": "vjp of scan"}, slow=True)
def long_scan_over_layers():
    """Catches a scan that is too long to be unrolled and goes without its warning, or wrong."""

    def predict(params: Any, x: Array) -> Array:
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ params["embed"], params["layers"])[0]

    params = {"embed": normal(4, 3, 2), "layers": normal(5, 70, 2, 2)}
    return regression(predict, params, normal(3, N, 3), (2,))


@case({"['input']": "outer products", "['hidden']": "outer products", "['bias']": "vjp of add"})
def recurrent_network():
    """Catches the gradients of weights that every step shares: squares of steps instead of the square of their sum."""
    return recurrent(zero_state=False)


@case({"['input']": "outer products", "['hidden']": "outer products", "['bias']": "vjp of add"})
def recurrent_network_from_zero():
    """Catches a first step, zeros times weights, that makes the weights depend on params alone."""
    return recurrent(zero_state=True)


def recurrent(*, zero_state: bool) -> tuple[Any, Any, Any]:
    """A network that reads a sequence backwards."""

    def predict(params: Any, x: Array) -> Array:
        def step(h: Array, token: Array) -> tuple[Array, Array]:
            h = jnp.tanh(token @ params["input"] + h @ params["hidden"] + params["bias"])
            return h, h

        start = jnp.zeros(3, x.dtype) if zero_state else x[0, :1] * jnp.ones(3, x.dtype)
        return jax.lax.scan(step, start, x, reverse=True)[1]

    params = {"input": normal(4, 2, 3), "hidden": normal(5, 3, 3, scale=0.5), "bias": normal(6, 3)}
    return regression(predict, params, normal(3, N, 4, 2), (4, 3))


@case({"['a']": "outer products", "['b']": "outer products"})
def checkpoint():
    """Catches `jax.checkpoint` that is taken for one slow site."""

    def predict(params: Any, x: Array) -> Array:
        return jax.checkpoint(lambda h: jnp.tanh(h @ params["b"]))(jax.checkpoint(jnp.tanh)(x @ params["a"]))

    return regression(predict, {"a": normal(4, 4, 3), "b": normal(5, 3, 2)}, normal(3, N, 4), (2,))


class Remat(nn.Module):
    """Two checkpointed dense layers."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[4] -> [2]."""
        return nn.remat(nn.Dense)(2, name="two")(nn.tanh(nn.remat(nn.Dense)(3, name="one")(x)))


@case({"['one']['kernel']": "outer products", "['one']['bias']": "vjp of add"})
def flax_remat():
    """Catches `nn.remat` that is taken for one slow site."""
    return linen(Remat(), normal(3, N, 4))


def dense_net(params: Any, x: Array) -> Array:
    """Two dense layers."""
    return jnp.tanh(x @ params["a"] + params["b"]) @ params["c"]


def dense_params(inputs: int = 3, outputs: int = 3) -> dict[str, np.ndarray]:
    """Params of `dense_net`."""
    return {"a": normal(4, inputs, 4), "b": normal(5, 4), "c": normal(6, 4, outputs)}


@case({"['a']": "outer products", "['b']": "vjp of add", "['c']": "outer products"})
def divergence_in_the_loss():
    """Catches products that a loss with a jvp takes of tangents: several rows of one parameter, of both passes."""

    def loss(params: Any, x: Array) -> Array:
        value, tangent = jax.jvp(lambda x: dense_net(params, x), (x,), (jnp.sin(x),))
        return jnp.sum(value**2) + jnp.sum(jnp.tanh(tangent) * x)

    return loss, dense_params(), normal(3, N, 3)


@case({"['a']": "outer products", "['b']": "vjp of add"})
def gradient_of_an_energy():
    """Catches kernels that are used from the left in the inner backward pass, from the right in the forward one."""

    def loss(params: Any, example: Any) -> Array:
        field = jax.grad(lambda x: dense_net(params, x)[0])(example[0])
        return jnp.sum((field - example[1]) ** 2)

    return loss, dense_params(outputs=1), (normal(3, N, 3), normal(2, N, 3))


@case({"": "outer products + vjp of add, pulled back per example"}, slow=True)
def weight_decay():
    """Catches a penalty without its cross term with the data, and params of every example without a warning."""

    def loss(params: Any, x: Array) -> Array:
        return jnp.sum(jnp.tanh(x @ params) ** 2) + 0.1 * jnp.sum(params**2)

    return loss, normal(4, 48, 48, scale=0.1), normal(3, N, 48)


@case({"['a']": "outer products", "['b']": "vjp of add", "['c']": "outer products"})
def target_network():
    """Catches gradients that flow through a `stop_gradient`, at the outputs or at the same params."""

    def loss(params: Any, x: Array) -> Array:
        frozen = jax.lax.stop_gradient(params)
        one, two = dense_net(frozen, x), jax.lax.stop_gradient(dense_net(params, jnp.cos(x)))
        return jnp.sum((dense_net(params, 2 * x) - one - two) ** 2)

    return loss, dense_params(), normal(3, N, 3)


@case({"['a']": "outer products", "['c']": "outer products"})
def noise_in_the_loss():
    """Catches PRNG keys in the batch that are not the example's own, in the loss and in the sizes of the plan."""

    def loss(params: Any, example: Any) -> Array:
        x, key = example
        # Float32 in both precisions: the noise is drawn in its dtype.
        noise = jax.random.normal(key, x.shape, jnp.float32).astype(x.dtype)
        return jnp.sum(dense_net(params, x + noise) ** 2)

    return loss, dense_params(), (normal(3, N, 3), jax.random.split(jax.random.key(1), N))


@case({".layers[0].weight": "outer products", ".layers[2].bias": "vjp of add"})
def equinox_mlp():
    """Catches an Equinox module, whose functions and sizes are no leaves of the params."""
    import equinox as eqx

    network = eqx.nn.MLP(3, 2, 4, 2, key=jax.random.key(0))
    params, static = eqx.partition(network, eqx.is_inexact_array)
    return regression(lambda p, x: eqx.combine(p, static)(x), params, normal(3, N, 3), (2,))


def merged(network: Any) -> tuple[Any, Any]:
    """The apply and the params of an NNX module."""
    from flax import nnx

    definition, params, rest = nnx.split(network, nnx.Param, ...)

    def apply(params: Any, *args: Any) -> Array:
        with jax.numpy_dtype_promotion("standard"):
            return nnx.merge(definition, params, rest, copy=True)(*args)

    return apply, filled(params)


@case()
def nnx_conv_net():
    """Catches an NNX module: its params are a State, and its merged copy must not leak tracers."""
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv, self.linear = nnx.Conv(2, 3, (3, 3), rngs=rngs), nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.linear(jnp.tanh(self.conv(x)))

    apply, params = merged(nnx.eval_shape(lambda: Network(nnx.Rngs(0))))
    return regression(apply, params, normal(3, N, 4, 4, 2), (4, 4, 2))


@case({"['blocks']['layers'][0]['lin']['kernel'].value": "outer products"})
def ott_mlp():
    """Catches ott-jax's velocity field, which takes a batch: every product has a batch axis of length one."""
    from flax import nnx
    from ott.neural.networks.velocity_field.mlp import MLP

    apply, params = merged(nnx.eval_shape(lambda: MLP(2, hidden_dims=(4, 4), time_enc_num_freqs=1, rngs=nnx.Rngs(0))))
    return squared_error(lambda p, t, x: apply(p, t[None], x[None])[0]), params, path_samples(2)


def unet():
    """ott-jax's UNet at the smallest width its GroupNorm of 32 groups allows."""
    from flax import nnx
    from ott.neural.networks.velocity_field.unet import UNet

    network = nnx.eval_shape(
        lambda: UNet(
            shape=(4, 4, 1),
            model_channels=32,
            num_res_blocks=1,
            attention_resolutions=(2,),
            channel_mult=(1,),
            time_embed_dim=8,
            rngs=nnx.Rngs(0),
        )
    )
    apply, params = merged(network)
    return squared_error(lambda p, t, x: apply(p, t[None], x[None])[0]), params, path_samples(4, 4, 1)


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("name", CASES)
def test_model_is_vmap_grad(agree, name, bits):
    """Catches what the builder of the case says; in float32, sums that lose digits."""
    build, paths, slow = CASES[name]
    found = agree(name, build(), bits=bits, slow=slow)
    assert found.items() >= paths.items(), found


def test_moments_of_weight_decay_are_fast(x64):
    """Catches a penalty, the same for every example, that makes the moments slow or moves a variance.

    A SlowPathWarning would be an error.
    """
    loss, params, batch = weight_decay()
    assert dict(sites.paths(loss, params, batch))[""].startswith("outer products")
    free = jax.jit(lambda p, x: sites.moments(lambda p, x: loss(p, x) - 0.1 * jnp.sum(p**2), p, x))(params, batch)
    found = jax.jit(lambda p, x: sites.moments(loss, p, x))(params, batch)
    np.testing.assert_allclose(found.m2, free.m2, rtol=1e-5)
    np.testing.assert_allclose(found.mean - free.mean, 0.2 * params, rtol=1e-4, atol=1e-6)


def test_ott_unet_is_vmap_grad(agree):
    """Catches a slow path, or a wrong one, in a network of 70 leaves with attention, skips and time embeddings.

    In float32 only: it computes its normalisations in float32 whatever its params are.
    """
    paths = agree("unet", unet(), bits=32)
    assert set(paths.values()) <= {"image patches", "outer products", "vjp of add", "vjp of mul"}, paths


class Dropout(nn.Module):
    """Dropout between dense layers, with a key that is data."""

    @nn.compact
    def __call__(self, x: Array, key: Array) -> Array:
        """[4] -> [2]."""
        h = nn.Dropout(0.5, deterministic=False)(nn.tanh(nn.Dense(8)(x)), rng=key)
        return nn.Dense(2)(h)


@pytest.mark.parametrize("bits", [64, 32])
def test_dropout_is_vmap_grad(agree, bits):
    """Catches masks that the examples share, or that the forward pass and the site draw apart.

    In float32 against `vmap(grad)` in float32: Flax draws other masks in float64.
    """
    case = linen(Dropout(), normal(3, N, 4), jax.random.split(jax.random.key(1), N))
    agree("dropout", case, bits=bits, as_given=bits == 32)


def in_bfloat16(*names: str) -> tuple[Any, Any, Any]:
    """A net of two layers, the named leaves of which are bfloat16, with a float32 batch, computing in bfloat16."""
    params = {k: jnp.asarray(v, jnp.bfloat16 if k in names else jnp.float32) for k, v in dense_params().items()}

    def loss(params: Any, x: Array) -> Array:
        narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        return jnp.sum(dense_net(narrow, x.astype(jnp.bfloat16)).astype(jnp.float32) ** 2)

    return loss, params, normal(3, N, 3)


@pytest.mark.parametrize("names", [(), ("a", "b", "c"), ("a", "b")], ids=["compute", "params", "mixed"])
def test_bfloat16_is_vmap_grad(agree, names):
    """Catches moments that are accumulated in bfloat16, and leaves of several dtypes that are added up.

    The tolerance is eight half-units of bfloat16, 2^-9 each: a gradient passes through about as many roundings, and is
    squared; the sites round less of it than `vmap(grad)` does.
    """
    case = in_bfloat16(*names)
    paths = agree(f"bfloat16 {names}", case, bits=32, as_given=True, tolerance=8 * 2.0**-9)
    assert paths == {"['a']": "outer products", "['b']": "vjp of add", "['c']": "outer products"}
    found = jax.eval_shape(lambda p, x: sites.moments(case[0], p, x), *case[1:])
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}
