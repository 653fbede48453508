"""A residual SiLU network for vectors and small images."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax.nets import _linen
from fvjax.types import Array, Model, Scalar


def time_embedding(t: Scalar, features: int) -> Array:
    r"""Sines and cosines of time, sin(w_k t), cos(w_k t), with w_k = k pi / 2, k = 1 ... features / 2.

    The lowest frequency is a quarter period: it is monotone on [0, 1]. With whole periods 2 pi k the network could not
    tell t = 0 from t = 1.

    Args:
        t: time, floating point, shape [].
        features: even number of features, >= 2.

    Returns:
        [features], sines first, in the dtype of t.
    """
    t = jnp.asarray(t)
    angles = t * jnp.asarray(np.pi / 2 * np.arange(1, features // 2 + 1), t.dtype)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


class _ResidualMLP(nn.Module):
    width: int
    depth: int
    time_features: int
    dropout: float

    @nn.compact
    def __call__(self, t: Array, x: Array, deterministic: bool) -> Array:
        time = time_embedding(t.astype(x.dtype), self.time_features)
        h = nn.Dense(self.width, name="input")(jnp.concatenate([jnp.ravel(x), time]))
        for block in range(self.depth):
            # Not h + W silu(h): on rotated Gaussian pairs that left twice the loss after the same steps (three seeds).
            change = nn.silu(nn.Dense(self.width, name=f"block_{block}")(h))
            h = h + _linen.Dropout(self.dropout, deterministic)(change)
        return nn.Dense(x.size, name="output")(h).reshape(x.shape)


def mlp(
    dims: int | tuple[int, ...], *, width: int = 128, depth: int = 4, time_features: int = 8, dropout: float = 0.0
) -> Model:
    r"""Returns a residual SiLU network, a velocity field of ONE example.

    h = W_in [x, sin(w t), cos(w t)] + b_in;  `depth` times h <- h + dropout(silu(W h + b));  v = W_out h + b_out,

    with x flattened and w_k = k pi / 2, k = 1 ... time_features / 2. Every layer, the last one too, has Flax's default
    initialisation (LeCun normal weights, zero biases), in float32. For D = prod(dims) the number of parameters is

        (D + time_features + 1) width + depth (width + 1) width + (width + 1) D.

    Args:
        dims: shape of one example, an int d meaning (d,).
        width: units of each hidden layer, >= 1.
        depth: number of residual blocks, >= 1.
        time_features: even, >= 2; they are the only form in which t enters.
        dropout: rate in [0, 1). It is active only where `apply` is given a key.

    Returns:
        Model(init, apply). `init(key)` is a plain nested dict of arrays. `apply(params, t, x, *, key=None)` maps t []
        and x [*dims] to a velocity [*dims]; it computes in the dtype of the params and answers in the dtype of x. It
        raises a ValueError if x is not of shape dims: a batch goes through `jax.vmap(apply, in_axes=(None, 0, 0))`.

    Raises:
        ValueError: if a size is not an integer >= 1, `time_features` is odd, or `dropout` is outside [0, 1).
    """
    shape = dims if isinstance(dims, tuple) else (dims,)
    if not shape:
        raise ValueError("dims must be an integer >= 1 or a non-empty tuple of them, got ()")
    for size in shape:
        _validate.positive_integer("dims", size)
    _validate.positive_integer("width", width)
    _validate.positive_integer("depth", depth)
    _validate.even_integer("time_features", time_features)
    _linen.check_dropout(dropout)
    return _linen.model_of(_ResidualMLP(width, depth, time_features, dropout), shape)
