"""The convolutional U-Net of the flow-matching literature, for ONE image, channels last."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fvjax import _validate
from fvjax.nets import _linen
from fvjax.types import Array, Key, Model

EPSILON = 1e-5
"""Added to the variance in every group normalisation."""
MAX_GROUPS = 32
"""Largest number of groups of a group normalisation."""


class Layer(NamedTuple):
    """One layer: "conv", "res", "attention", "down" or "up"; its name in the params; its output channels."""

    kind: str
    name: str
    channels: int


class Blocks(NamedTuple):
    """Layers by block. Each input block leaves its output as a skip; each output block takes the latest one."""

    inputs: tuple[tuple[Layer, ...], ...]
    middle: tuple[Layer, ...]
    outputs: tuple[tuple[Layer, ...], ...]

    def layers(self) -> Iterator[Layer]:
        """Every layer, in the order of computation."""
        for block in (*self.inputs, self.middle, *self.outputs):
            yield from block


def make_blocks(
    width: int, channels: int, res_blocks: int, *, multipliers: Sequence[int], attention: Sequence[int]
) -> Blocks:
    """Returns the topology: down through the levels, a middle with attention, and up with one block more a level.

    Args:
        width: of the image in pixels; each level halves it.
        channels: unit of the multipliers.
        res_blocks: blocks of a level on the way down.
        multipliers: channels of each level / `channels`.
        attention: widths at which attention follows each residual layer.

    Returns:
        Blocks.
    """

    def block(part: str, index: int, kinds: Sequence[str], multiplier: int) -> tuple[Layer, ...]:
        return tuple(Layer(kind, f"{part}_{index}_{kind}", channels * multiplier) for kind in kinds)

    bodies = [("res", "attention") if width >> level in attention else ("res",) for level in range(len(multipliers))]
    inputs = [block("input", 0, ["conv"], multipliers[0])]
    for level, multiplier in enumerate(multipliers):
        if level:
            inputs.append(block("input", len(inputs), ["down"], multipliers[level - 1]))
        for _ in range(res_blocks):
            inputs.append(block("input", len(inputs), bodies[level], multiplier))
    middle = tuple(block("middle", i, [k], multipliers[-1])[0] for i, k in enumerate(("res", "attention", "res")))
    outputs: list[tuple[Layer, ...]] = []
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for i in range(res_blocks + 1):
            kinds = (*bodies[level], "up") if level and i == res_blocks else bodies[level]
            outputs.append(block("output", len(outputs), kinds, multiplier))
    return Blocks(tuple(inputs), middle, tuple(outputs))


def number_of_groups(channels: int, groups: int | None) -> int:
    """Groups of a normalisation of `channels`: `groups`, or if that is None the largest number that leaves 2 channels.

    That is the largest divisor of `channels` which is at most 32 and at most channels / 2: 32 of 64, 96, 128, ...
    channels, 16 of 32. With ONE channel a group the normalisation would subtract what a residual layer has just added
    to the channel for the time, and the network could not see t.
    """
    if groups is not None:
        return groups
    return max(g for g in range(1, MAX_GROUPS + 1) if channels % g == 0 and (g <= channels // 2 or g == 1))


def _uniform(fan_in: int) -> Callable[[Key, Sequence[int], jnp.dtype], Array]:
    """Uniform on [-b, b], b = fan_in^(-1/2): PyTorch's initialisation of kernels and biases alike."""

    def init(key: Key, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


def _conv(x: Array, features: int, name: str, *, size: int = 3, stride: int = 1, zero: bool = False) -> Array:
    """A convolution with (size - 1) / 2 pixels of zeros on every side, so stride 2 reads the pixels 2 i - 1 ... + 1."""
    init = nn.initializers.zeros if zero else _uniform(size * size * x.shape[-1])
    pad = (size - 1) // 2
    return nn.Conv(features, (size, size), stride, pad, kernel_init=init, bias_init=init, name=name)(x)


def _dense(x: Array, features: int, name: str, *, zero: bool = False) -> Array:
    init = nn.initializers.zeros if zero else _uniform(x.shape[-1])
    return nn.Dense(features, kernel_init=init, bias_init=init, name=name)(x)


class _GroupNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the pixels and channels of each group, in at least float32.

    Flax's own promotes half precision implicitly, which strict promotion refuses. Moments are taken over the pixels
    first and over the few channels of a group then, so that no array of the image's size is reshaped.
    """

    groups: int | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        groups = number_of_groups(channels, self.groups)
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))

        def group_mean(x: Array) -> Array:
            mean = jnp.mean(jnp.mean(x, axis=(0, 1)).reshape(groups, -1), axis=1, keepdims=True)
            return jnp.broadcast_to(mean, (groups, channels // groups)).reshape(channels)

        wide = x.astype(_linen.wide_dtype(x.dtype))
        centred = wide - group_mean(wide)
        factor = jax.lax.rsqrt(group_mean(centred * centred) + EPSILON) * scale.astype(wide.dtype)
        return (centred * factor + bias.astype(wide.dtype)).astype(x.dtype)


class _Residual(nn.Module):
    channels: int
    groups: int | None
    dropout: float

    @nn.compact
    def __call__(self, x: Array, embedding: Array, deterministic: bool) -> Array:
        h = _conv(nn.silu(_GroupNorm(self.groups, name="norm_in")(x)), self.channels, "conv_in")
        h = h + _dense(embedding, self.channels, "time")
        h = nn.silu(_GroupNorm(self.groups, name="norm_out")(h))
        h = _linen.Dropout(self.dropout, deterministic)(h)
        h = _conv(h, self.channels, "conv_out", zero=True)
        return h + (x if x.shape[-1] == self.channels else _conv(x, self.channels, "skip", size=1))


class _Attention(nn.Module):
    heads: int
    groups: int | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        h = _GroupNorm(self.groups, name="norm")(x).reshape(-1, channels)
        h = _dense(h, 3 * channels, "qkv").reshape(len(h), self.heads, 3, -1)
        h = _linen.attention(h[:, :, 0], h[:, :, 1], h[:, :, 2])
        return x + _dense(h, channels, "output", zero=True).reshape(x.shape)


def _upsample(x: Array) -> Array:
    """Every pixel four times, [H, W, C] -> [2 H, 2 W, C]."""
    height, width, channels = x.shape
    four = jnp.broadcast_to(x[:, None, :, None], (height, 2, width, 2, channels))
    return four.reshape(2 * height, 2 * width, channels)


class _UNet(nn.Module):
    channels: int
    blocks: Blocks
    heads: int | None
    head_channels: int | None
    groups: int | None
    dropout: float

    @nn.compact
    def __call__(self, t: Array, x: Array, deterministic: bool) -> Array:
        embedding = _linen.timestep_embedding(t, self.channels).astype(x.dtype)
        embedding = nn.silu(_dense(embedding, 4 * self.channels, "time_in"))
        embedding = nn.silu(_dense(embedding, 4 * self.channels, "time_out"))

        def run(block: tuple[Layer, ...], h: Array) -> Array:
            for kind, name, channels in block:
                if kind == "res":
                    h = _Residual(channels, self.groups, self.dropout, name=name)(h, embedding, deterministic)
                elif kind == "attention":
                    h = _Attention(self.heads or channels // (self.head_channels or 1), self.groups, name=name)(h)
                else:
                    h = _conv(_upsample(h) if kind == "up" else h, channels, name, stride=2 if kind == "down" else 1)
            return h

        h, skips = x, []
        for block in self.blocks.inputs:
            h = run(block, h)
            skips.append(h)
        h = run(self.blocks.middle, h)
        for block in self.blocks.outputs:
            h = run(block, jnp.concatenate([h, skips.pop()], axis=-1))
        return _conv(nn.silu(_GroupNorm(self.groups, name="norm")(h)), x.shape[-1], "output", zero=True)


def unet(
    dims: tuple[int, int, int],
    *,
    channels: int = 128,
    res_blocks: int = 2,
    multipliers: tuple[int, ...] = (1, 2, 2, 2),
    attention: tuple[int, ...] = (16,),
    heads: int | None = 4,
    head_channels: int | None = 64,
    groups: int | None = None,
    dropout: float = 0.0,
) -> Model:
    r"""Returns a U-Net, a velocity field of ONE image: the network of the CIFAR-10 results of flow matching.

    Level l has width W / 2^l and `channels * multipliers[l]` channels. A residual layer is

        h = conv(silu(norm(x))) + W silu(e(t)) + b,    x <- skip(x) + conv(dropout(silu(norm(h)))),

    with 3x3 convolutions, group normalisation (eps 1e-5) and skip the identity, or a 1x1 convolution where the channels
    change; e(t) is a network of two layers on `_linen.timestep_embedding(t, channels)`. An attention layer is
    x <- x + W' softmax(q k^T / sqrt(d)) v, with q, k, v linear in norm(x) and d channels a head. Levels are joined by
    convolutions of stride 2 and by doubled pixels with a convolution; the outputs on the way down are concatenated to
    the inputs on the way up. With the defaults and dims = (32, 32, 3): 35,746,307 parameters.

    Kernels and biases begin uniform in +-fan_in^(-1/2); the last convolution of the network and of each residual layer,
    and the last product of each attention layer, begin at zero, so that the velocity begins at zero.

    Args:
        dims: (H, W, C) of one image; H and W divisible by 2^(levels - 1).
        channels: even, >= 2; unit of the multipliers and features of the time embedding.
        res_blocks: residual layers of a level on the way down (one more on the way up), >= 1.
        multipliers: one integer >= 1 for each level.
        attention: widths in pixels at which attention follows each residual layer; () for none. The middle, at the
            smallest width, has an attention layer always.
        heads: attention heads; None means channels of the level / `head_channels`.
        head_channels: channels of a head; None means channels of the level / `heads`.
        groups: groups of every normalisation; None means 32, or fewer where that would leave a group one channel
            (`number_of_groups`). With one channel a group the time would be lost.
        dropout: rate in [0, 1) in the residual layers. It is active only where `apply` is given a key.

    Returns:
        Model(init, apply). `init(key)` is a plain nested dict of arrays. `apply(params, t, x, *, key=None)` maps t []
        in [0, 1] and x [H, W, C] to a velocity [H, W, C]; it computes in the dtype of the params (statistics and
        softmax in at least float32) and answers in the dtype of x. It raises a ValueError if x is not of shape dims: a
        batch goes through `jax.vmap(apply, in_axes=(None, 0, 0))`, keys through `lambda p, t, x, k: apply(p, t, x,
        key=k)`.

    Raises:
        ValueError: if a size is not an integer in its range, `dims` cannot be halved often enough, a width in
            `attention` does not occur, `heads` and `head_channels` do not multiply to the channels of each level with
            attention, `groups` does not divide the channels, or `dropout` is outside [0, 1).

    Source: the U-Net of Dhariwal and Nichol 2021, without classes, as torchcfm 1.0.7 sets it up (`fvjax.nets.convert`).
    """
    _check_sizes(dims, channels, res_blocks, multipliers=multipliers, groups=groups)
    _linen.check_dropout(dropout)
    widths = [dims[1] >> level for level in range(len(multipliers))]
    for width in attention:
        if width not in widths:
            raise ValueError(f"attention must be among the widths of the levels, {widths}, got {width}")
    blocks = make_blocks(dims[1], channels, res_blocks, multipliers=tuple(multipliers), attention=tuple(attention))
    for layer in blocks.layers():
        if layer.kind == "attention":
            _check_heads(layer.channels, heads, head_channels)
    return _linen.model_of(_UNet(channels, blocks, heads, head_channels, groups, dropout), tuple(dims))


def _check_sizes(
    dims: tuple[int, ...], channels: int, res_blocks: int, *, multipliers: Sequence[int], groups: int | None
) -> None:
    _linen.check_image(dims)
    _validate.even_integer("channels", channels)
    _validate.positive_integer("res_blocks", res_blocks)
    if not multipliers:
        raise ValueError("multipliers must name at least one level, got ()")
    for multiplier in multipliers:
        _validate.positive_integer("multipliers", multiplier)
    divisor = 2 ** (len(multipliers) - 1)
    if dims[0] % divisor or dims[1] % divisor:
        raise ValueError(f"dims must be divisible by {divisor} for {len(multipliers)} levels, got {tuple(dims)}")
    if groups is not None:
        _validate.positive_integer("groups", groups)
        if any(channels * multiplier % groups for multiplier in multipliers):
            found = [channels * multiplier for multiplier in multipliers]
            raise ValueError(f"groups must divide the channels of each level, {found}, got {groups}")


def _check_heads(channels: int, heads: int | None, head_channels: int | None) -> None:
    for name, value in (("heads", heads), ("head_channels", head_channels)):
        if value is not None:
            _validate.positive_integer(name, value)
            if channels % value:
                raise ValueError(f"{name} must divide the {channels} channels of a level with attention, got {value}")
    if heads is None and head_channels is None:
        raise ValueError("heads or head_channels must be given, got None for both")
    if heads is not None and head_channels is not None and heads * head_channels != channels:
        raise ValueError(
            f"heads * head_channels must be the {channels} channels of a level with attention (or one of the two None),"
            f" got heads={heads} and head_channels={head_channels}"
        )
