"""The networks behind the CelebA64 pairs of the Wasserstein-2 benchmark, for ONE image, channels last; from PyTorch.

Both are fixed: a generator of faces, and an input-convex network whose gradient is an optimal transport map. Their
weights come from the benchmark's files; `from_torch` folds what evaluation mode makes constant into the convolutions.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from fvjax import _validate
from fvjax.nets._state_dict import check_arrays, some
from fvjax.types import Array, Key, Params

SIDE = 64
"""Height and width of the images, in pixels; they have three channels."""
STRONG_CONVEXITY = 0.01
"""The potential is 0.005 |x|^2 plus a convex function."""
_START = 4  # side of the image that the generator begins with
_RESIDUAL = 0.1  # weight of a residual layer's own branch
_SLOPE = 0.2  # of LeakyReLU for negative numbers
_CELU = 0.2  # alpha of the last two CELUs; the first has 1
_EPSILON = 1e-5  # added to the variance by PyTorch's BatchNorm
_LEVELS = 5  # of the generator: 4, 8, 16, 32, 64 pixels


class TorchNetwork(NamedTuple):
    """A network with weights from PyTorch, as pure functions of ONE example.

    Attributes:
        init: key -> random params, for their shapes (`jax.eval_shape`) and for tests.
        apply: (params, x) -> output, computed in the dtype of x.
        torch_shapes: shapes of the arrays that `from_torch` reads, by PyTorch's names.
        from_torch: state dict of arrays -> params in float32. ValueError (one line) if arrays are missing, unexpected,
            of another shape (one message names all three), or hold numbers that cannot be.
    """

    init: Callable[[Key], Params]
    apply: Callable[[Params, Array], Array]
    torch_shapes: dict[str, tuple[int, ...]]
    from_torch: Callable[[Mapping[str, np.ndarray]], Params]


class _Layer(NamedTuple):
    """One convolution or linear layer in both worlds.

    Attributes:
        name: ours, keys joined by "/".
        torch: PyTorch's, without ".weight".
        shape: of PyTorch's weight, outputs first.
        norm: PyTorch's name of the BatchNorm behind it, or None.
        bias: whether PyTorch's layer has a bias.
        convex: whether its weights must be >= 0.
    """

    name: str
    torch: str
    shape: tuple[int, ...]
    norm: str | None = None
    bias: bool = False
    convex: bool = False


def generator(*, latent: int = 128, filters: int = 64, most: int = 512) -> TorchNetwork:
    r"""ResNet_G, which maps a normal vector to a face: z [latent] -> [64, 64, 3] in [-1, 1].

    A linear layer and LeakyReLU (slope 0.2) give 4x4 pixels. Five levels of two residual layers follow, with the
    pixels doubled (nearest) between levels; then a 3x3 convolution and tanh. A residual layer is

        x <- LeakyReLU(skip(x) + 0.1 BN(conv(LeakyReLU(BN(conv(x)))))),

    with 3x3 convolutions, min(inputs, outputs) channels between them, and skip the identity or BN of a 1x1 convolution
    where the channels change. BatchNorm is in evaluation mode, an affine map, which `from_torch` multiplies into the
    layer before it (in float64). With the defaults PyTorch's network has 24,004,675 parameters, and its levels 512,
    512, 256, 128 and 64 channels behind 512 of the linear layer. PyTorch's linear layer orders its outputs by channel,
    row, column, ours by row, column, channel; `from_torch` permutes them. Normalisation's `num_batches_tracked` is
    ignored, and may be absent.

    Args:
        latent: size of z.
        filters: channels of the last level; each level before it has twice as many ...
        most: ... but at most so many.

    Returns:
        TorchNetwork.

    Raises:
        ValueError: if an argument is not an integer >= 1.

    Source: Liu et al. 2019 (WGAN-QC), as Korotin et al. 2021 (arXiv 2106.01954) use it.
    """
    for name, value in (("latent", latent), ("filters", filters), ("most", most)):
        _validate.positive_integer(name, value)
    widths = tuple(min(filters << level, most) for level in range(_LEVELS, -1, -1))
    return _network(_Generator(widths), _generator_layers(latent, widths), (latent,))


def convex_potential(*, channels: int = 128, rank: int = 4) -> TorchNetwork:
    r"""ConvICNN64, an input-convex function of an image: x [64, 64, 3] -> [].

        q0(x) = sum_r (A_r x)^2 + B x        4x4 convolutions of stride 2 to `channels`, r = 1 ... rank
        q1(x) likewise                       7x7 convolutions of stride 4 to 2 `channels`
        h = celu(C_0 q0 + c_0 + q1)          C_0 ... C_3 >= 0: 4x4 convolutions of stride 2 (the last: of stride 1, to
        h <- celu_0.2(C_i h + c_i), i = 1, 2    one number) to 2, 4 and 8 times `channels`
        D(x) = C_3 h + c_3 + 0.005 |x|^2

    It is convex in x, since q0 and q1 are, celu is convex and increasing, and no entry of a C_i is negative;
    `from_torch` refuses one that is. There is no dropout, as in evaluation mode. With the defaults: 11,247,105
    parameters.

    Args:
        channels: of the first layer.
        rank: squares that are added up in each channel of q0 and q1.

    Returns:
        TorchNetwork.

    Raises:
        ValueError: if an argument is not an integer >= 1.

    Source: ConvICNN64 of Korotin et al. 2021 (arXiv 2106.01954).
    """
    for name, value in (("channels", channels), ("rank", rank)):
        _validate.positive_integer(name, value)
    return _network(_Potential(channels, rank), _potential_layers(channels, rank), (SIDE, SIDE, 3))


def _network(module: nn.Module, layers: tuple[_Layer, ...], shape: tuple[int, ...]) -> TorchNetwork:
    def init(key: Key) -> Params:
        return module.init(key, jnp.zeros(shape, jnp.float32))["params"]

    def apply(params: Params, x: Array) -> Array:
        if jnp.shape(x) != shape:
            raise ValueError(f"x must be ONE example of shape {shape} (jax.vmap for a batch), got shape {jnp.shape(x)}")
        _validate.floating("x", x)
        params = jax.tree.map(lambda leaf: leaf.astype(x.dtype), params)
        with jax.default_matmul_precision("highest"):  # else TF32 on a GPU, three digits
            return jnp.asarray(module.apply({"params": params}, x))

    def from_torch(state_dict: Mapping[str, np.ndarray]) -> Params:
        _check_state(state_dict, shapes)
        arrays: dict[str, Array] = {}
        for layer in layers:
            arrays |= _converted(layer, state_dict)
        return unflatten_dict(arrays, sep="/")

    shapes = {name: shape for layer in layers for name, shape in _torch_arrays(layer)}
    return TorchNetwork(init, apply, shapes, from_torch)


def _conv(x: Array, features: int, name: str, *, size: int = 3) -> Array:
    """A convolution of stride 1 that keeps the size of the image."""
    return nn.Conv(features, (size, size), padding=size // 2, name=name)(x)


def _halving(x: Array, features: int, name: str) -> Array:
    return nn.Conv(features, (4, 4), 2, 1, name=name)(x)


class _Residual(nn.Module):
    channels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inputs = x.shape[-1]
        h = nn.leaky_relu(_conv(x, min(inputs, self.channels), "conv_in"), _SLOPE)
        h = _conv(h, self.channels, "conv_out")
        skip = x if inputs == self.channels else _conv(x, self.channels, "skip", size=1)
        return nn.leaky_relu(skip + _RESIDUAL * h, _SLOPE)


class _Generator(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, z: Array) -> Array:
        first, *widths = self.widths
        x = nn.leaky_relu(nn.Dense(_START * _START * first, name="linear")(z), _SLOPE).reshape(_START, _START, first)
        for level, width in enumerate(widths):
            if level:
                height = 2 * x.shape[0]
                x = jnp.broadcast_to(x[:, None, :, None], (height // 2, 2, height // 2, 2, x.shape[-1]))
                x = x.reshape(height, height, -1)
            for index in range(2):
                x = _Residual(width, name=f"level_{level}_{index}")(x)
        return jnp.tanh(_conv(x, 3, "output"))


class _Potential(nn.Module):
    channels: int
    rank: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = self._quadratic(x, self.channels, 0, size=4, stride=2, padding=1)
        q = self._quadratic(x, 2 * self.channels, 1, size=7, stride=4, padding=2)
        h = nn.celu(_halving(h, 2 * self.channels, "convex_0") + q)
        for index in (1, 2):
            h = nn.celu(_halving(h, self.channels << (index + 1), f"convex_{index}"), _CELU)
        h = nn.Conv(1, (4, 4), padding=0, name="convex_3")(h)
        return h.reshape(()) + 0.5 * STRONG_CONVEXITY * jnp.sum(jnp.square(x))

    def _quadratic(self, x: Array, features: int, index: int, **window: int) -> Array:
        size, stride, padding = window["size"], window["stride"], window["padding"]

        def conv(features: int, name: str) -> Array:
            return nn.Conv(features, (size, size), stride, padding, use_bias=False, name=f"{name}_{index}")(x)

        squares = jnp.square(conv(features * self.rank, "square"))
        # The squares of one feature are neighbours.
        return squares.reshape(*squares.shape[:2], features, self.rank).sum(-1) + conv(features, "linear")


def _generator_layers(latent: int, widths: tuple[int, ...]) -> tuple[_Layer, ...]:
    layers = [_Layer("linear", "fc", (widths[0] * _START**2, latent), "bn1d", bias=True)]
    for level, (before, outputs) in enumerate(itertools.pairwise(widths)):
        for index, inputs in enumerate((before, outputs)):
            # Of the three places of a level, the last is the doubling.
            ours, theirs, hidden = f"level_{level}_{index}", f"resnet.{3 * level + index}", min(inputs, outputs)
            parts = {"conv_in": ("0", inputs, hidden, 3), "conv_out": ("1", hidden, outputs, 3)}
            if inputs != outputs:
                parts["skip"] = ("s", inputs, outputs, 1)
            for name, (suffix, fan_in, fan_out, size) in parts.items():
                shape = (fan_out, fan_in, size, size)
                norm = f"{theirs}.bn2d_{suffix}"
                layers.append(_Layer(f"{ours}/{name}", f"{theirs}.conv_{suffix}", shape, norm))
    return (*layers, _Layer("output", "conv_img", (3, widths[-1], 3, 3), bias=True))


def _potential_layers(channels: int, rank: int) -> tuple[_Layer, ...]:
    layers = []
    for index, (features, size) in enumerate(((channels, 4), (2 * channels, 7))):
        theirs = f"quadratic_layers.{index}"
        layers.append(_Layer(f"square_{index}", f"{theirs}.quadratic_decomposed", (features * rank, 3, size, size)))
        layers.append(_Layer(f"linear_{index}", f"{theirs}.linear", (features, 3, size, size)))
    # Between the convolutions of pos_features are CELU and dropout, which have numbers of their own.
    names = ("convex_layers.0", "pos_features.1", "pos_features.4", "pos_features.7")
    widths = (channels, 2 * channels, 4 * channels, 8 * channels, 1)
    for index, name in enumerate(names):
        shape = (widths[index + 1], widths[index], 4, 4)
        layers.append(_Layer(f"convex_{index}", name, shape, bias=True, convex=True))
    return tuple(layers)


def _torch_arrays(layer: _Layer) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Names and shapes of PyTorch's arrays of one layer."""
    yield f"{layer.torch}.weight", layer.shape
    if layer.bias:
        yield f"{layer.torch}.bias", layer.shape[:1]
    if layer.norm is not None:
        for name in ("weight", "bias", "running_mean", "running_var"):
            yield f"{layer.norm}.{name}", layer.shape[:1]


def _converted(layer: _Layer, state: Mapping[str, np.ndarray]) -> dict[str, Array]:
    """Kernel and bias of one layer with its normalisation, in our layout."""

    def get(prefix: str, name: str) -> np.ndarray:
        return np.asarray(state[f"{prefix}.{name}"], np.float64)

    kernel = get(layer.torch, "weight")
    bias = get(layer.torch, "bias") if layer.bias else np.zeros(layer.shape[0])
    if layer.convex and kernel.min() < 0:
        raise ValueError(f"{layer.torch}.weight must be >= 0 (else D is not convex), got an entry {kernel.min():.3g}")
    if layer.norm is not None:
        variance = get(layer.norm, "running_var")
        if variance.min() < 0:
            raise ValueError(f"{layer.norm}.running_var must be >= 0, got an entry {variance.min():.3g}")
        scale = get(layer.norm, "weight") / np.sqrt(variance + _EPSILON)
        kernel = kernel * scale.reshape(-1, *[1] * (kernel.ndim - 1))
        bias = (bias - get(layer.norm, "running_mean")) * scale + get(layer.norm, "bias")
    if kernel.ndim == 4:
        kernel = kernel.transpose(2, 3, 1, 0)
    else:
        kernel = _pixels_first(kernel).T
        bias = _pixels_first(bias)
    arrays = {f"{layer.name}/kernel": kernel}
    if layer.bias or layer.norm is not None:
        arrays[f"{layer.name}/bias"] = bias
    return {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}


def _pixels_first(array: np.ndarray) -> np.ndarray:
    """Reorders the first axis from (channel, row, column) to (row, column, channel)."""
    split = array.reshape(-1, _START, _START, *array.shape[1:])
    return np.moveaxis(split, 0, 2).reshape(array.shape)


def _check_state(state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a state dict with other arrays than those of `shapes`, or with numbers that are not finite."""
    check_arrays({name: value for name, value in state.items() if not name.endswith(".num_batches_tracked")}, shapes)
    wrong = [name for name in shapes if state[name].dtype.kind != "f" or not np.all(np.isfinite(state[name]))]
    if wrong:
        raise ValueError(f"state_dict must hold finite floating-point numbers, got others in {some(wrong)}")
