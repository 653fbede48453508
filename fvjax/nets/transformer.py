"""The diffusion transformer, for ONE image, channels last."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax.nets import _linen
from fvjax.types import Array, Model

EPSILON = 1e-6
"""Added to the variance in every layer normalisation."""
TIME_FEATURES = 256
"""Sines and cosines of the time, before the layers that embed it."""
MLP_RATIO = 4
"""Width of the hidden layer of a block, as a multiple of the width of the tokens."""


def positions(rows: int, columns: int, features: int) -> np.ndarray:
    r"""Fixed sines and cosines of the place (i, j) of every patch.

    With w_k = 10000^(-k / h), k = 0 ... h - 1, h = features / 4: sin(w_k i), cos(w_k i), sin(w_k j), cos(w_k j).

    Args:
        rows: patches from top to bottom.
        columns: patches from left to right.
        features: divisible by 4.

    Returns:
        [rows * columns, features], row by row, float64.
    """
    quarter = features // 4
    places = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1).reshape(-1, 2)
    angles = places[:, :, None] * 10_000.0 ** (-np.arange(quarter) / quarter)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).reshape(rows * columns, features)


def _dense(x: Array, features: int, name: str, *, zero: bool = False) -> Array:
    init = nn.initializers.zeros if zero else nn.initializers.xavier_uniform()
    return nn.Dense(features, kernel_init=init, name=name)(x)


def _modulated(x: Array, shift: Array, scale: Array) -> Array:
    """A layer normalisation whose scale and shift depend on time."""
    return _linen.standardize(x, EPSILON) * (1 + scale) + shift


class _Block(nn.Module):
    heads: int
    dropout: float

    @nn.compact
    def __call__(self, x: Array, condition: Array, deterministic: bool) -> Array:
        tokens, width = x.shape
        parts = jnp.split(_dense(condition, 6 * width, "modulation", zero=True), 6)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
        h = _dense(_modulated(x, shift_1, scale_1), 3 * width, "qkv").reshape(tokens, 3, self.heads, -1)
        h = _dense(_linen.attention(h[:, 0], h[:, 1], h[:, 2]), width, "projection")
        x = x + gate_1 * _linen.Dropout(self.dropout, deterministic)(h)
        h = nn.gelu(_dense(_modulated(x, shift_2, scale_2), MLP_RATIO * width, "mlp_in"))
        h = _dense(h, width, "mlp_out")
        return x + gate_2 * _linen.Dropout(self.dropout, deterministic)(h)


class _Transformer(nn.Module):
    patch: int
    width: int
    depth: int
    heads: int
    dropout: float

    @nn.compact
    def __call__(self, t: Array, x: Array, deterministic: bool) -> Array:
        height, columns, channels = x.shape[0] // self.patch, x.shape[1] // self.patch, x.shape[2]
        normal = nn.initializers.normal(0.02)
        time = _linen.timestep_embedding(t, TIME_FEATURES).astype(x.dtype)
        time = nn.silu(nn.Dense(self.width, kernel_init=normal, name="time_in")(time))
        condition = nn.silu(nn.Dense(self.width, kernel_init=normal, name="time_out")(time))
        # A convolution that steps from patch to patch is the linear map of each patch, without a transposed copy of x.
        size = (self.patch, self.patch)
        xavier = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=(0, 1, 2), out_axis=3)
        h = nn.Conv(self.width, size, size, padding="VALID", kernel_init=xavier, name="patches")(x)
        h = h.reshape(height * columns, self.width)
        h = h + jnp.asarray(positions(height, columns, self.width), h.dtype)
        for index in range(self.depth):
            h = _Block(self.heads, self.dropout, name=f"block_{index}")(h, condition, deterministic)
        shift, scale = jnp.split(_dense(condition, 2 * self.width, "modulation", zero=True), 2)
        h = _dense(_modulated(h, shift, scale), self.patch * self.patch * channels, "output", zero=True)
        h = h.reshape(height, columns, self.patch, self.patch, channels)
        return h.transpose(0, 2, 1, 3, 4).reshape(x.shape)


def transformer(
    dims: tuple[int, int, int],
    *,
    patch: int = 2,
    width: int = 384,
    depth: int = 12,
    heads: int = 6,
    dropout: float = 0.0,
) -> Model:
    r"""Returns a diffusion transformer (DiT), a velocity field of ONE image.

    The image is cut into patches of patch x patch pixels; each becomes a token, a linear map of its pixels plus
    `positions`. With c = silu(W_2 silu(W_1 e(t) + b_1) + b_2), e(t) = `_linen.timestep_embedding(t, 256)`, a block is

        x <- x + g_1(c) dropout(attention(n(x) (1 + s_1(c)) + m_1(c))),
        x <- x + g_2(c) dropout(mlp(n(x) (1 + s_2(c)) + m_2(c))),

    with n a layer normalisation without parameters (eps 1e-6), multi-head attention softmax(q k^T / sqrt(d)) v, an mlp
    of one hidden layer of 4 width units (GELU, tanh form), and gates g, scales s and shifts m linear in c ("adaLN").
    At the end each token becomes a patch of velocities, linear in n(x) (1 + s(c)) + m(c).

    Gates, scales, shifts and the last linear map begin at zero: at first each block is the identity and the velocity
    zero. Other kernels begin as Glorot's uniform (those of the time network normal, 0.02), biases at zero.

    For N = patch^2 C, w = width, the number of parameters is

        depth (18 w^2 + 15 w) + 3 w^2 + (261 + N) w + (w + 1) N.

    Args:
        dims: (H, W, C) of one image; H and W divisible by `patch`.
        patch: side of a patch in pixels, >= 1.
        width: features of a token, divisible by 4 (positions) and by `heads`.
        depth: number of blocks, >= 1.
        heads: attention heads, >= 1. The defaults of width, depth and heads are those of DiT-S.
        dropout: rate in [0, 1) of what a block adds. It is active only where `apply` is given a key.

    Returns:
        Model(init, apply). `init(key)` is a plain nested dict of arrays. `apply(params, t, x, *, key=None)` maps t []
        in [0, 1] and x [H, W, C] to a velocity [H, W, C]; it computes in the dtype of the params (statistics and
        softmax in at least float32) and answers in the dtype of x. It raises a ValueError if x is not of shape dims: a
        batch goes through `jax.vmap(apply, in_axes=(None, 0, 0))`.

    Raises:
        ValueError: if a size is not an integer >= 1, `patch` does not divide H and W, 4 or `heads` does not divide
            `width`, or `dropout` is outside [0, 1).

    Source: Peebles and Xie 2023, with adaLN-zero, without classes and without learned variances.
    """
    _linen.check_image(dims)
    for name, value in (("patch", patch), ("width", width), ("depth", depth), ("heads", heads)):
        _validate.positive_integer(name, value)
    if dims[0] % patch or dims[1] % patch:
        raise ValueError(f"patch must divide the height and width of dims, {tuple(dims)}, got {patch}")
    if width % 4:
        raise ValueError(f"width must be divisible by 4 (sines and cosines of two coordinates), got {width}")
    if width % heads:
        raise ValueError(f"heads must divide the width {width}, got {heads}")
    _linen.check_dropout(dropout)
    return _linen.model_of(_Transformer(patch, width, depth, heads, dropout), tuple(dims))
