"""What the Linen networks share: the embedding of time, normalisations in float32, and the way out to two functions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax.types import Array, Key, Model, Params, Scalar


def timestep_embedding(t: Scalar, features: int, max_period: float = 10_000.0) -> Array:
    r"""Cosines and sines of time, cos(w_k t), sin(w_k t), with w_k = max_period^(-k / h), k = 0 ... h - 1.

    h = features / 2. The highest frequency is 1, so that on [0, 1] every feature is monotone.

    Args:
        t: time, floating point, shape [].
        features: even number of features, >= 2.
        max_period: the lowest frequency is a little above 1 / max_period.

    Returns:
        [features], cosines first, in the dtype of t.

    Source: the embedding of Vaswani et al. 2017 as torchcfm's U-Net uses it.
    """
    t = jnp.asarray(t)
    half = features // 2
    angles = t * jnp.asarray(max_period ** (-np.arange(half) / half), t.dtype)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])


def wide_dtype(dtype: np.dtype) -> np.dtype:
    """Float32, or `dtype` if that is wider: what time, statistics and softmax are computed in."""
    return np.promote_types(dtype, np.float32)


def standardize(x: Array, epsilon: float) -> Array:
    """(x - mean) / sqrt(var + epsilon) over the last axis, computed in at least float32, in the dtype of x."""
    wide = x.astype(wide_dtype(x.dtype))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype)


def attention(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k^T / sqrt(d)) v for every head; scores and softmax in at least float32.

    Args:
        q: queries, [tokens, heads, d].
        k: keys, [tokens, heads, d].
        v: values, [tokens, heads, d].

    Returns:
        [tokens, heads * d], in the dtype of v.
    """
    scores = jnp.einsum("thd,shd->hts", q, k, preferred_element_type=wide_dtype(q.dtype))
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1).astype(v.dtype)
    return jnp.einsum("hts,shd->thd", weights, v).reshape(q.shape[0], -1)


class Dropout(nn.Module):
    """Sets entries to 0 with probability `rate` and scales the others, so that the mean stays; unless deterministic.

    Two entries share one 32-bit random number, which on a CPU is what dropout costs: flax's own takes twice as long.
    So the rate is rounded to a multiple of 2^-16, for the draw and for the scale alike.
    """

    rate: float
    deterministic: bool

    def __call__(self, x: Array) -> Array:
        """Dropout of an array of any shape, by the random stream "dropout"."""
        if self.deterministic or self.rate == 0:
            return x
        kept = min(max(round((1 - self.rate) * 2**16), 1), 2**16 - 1)
        words = jax.random.bits(self.make_rng("dropout"), (-(-x.size // 2),), jnp.uint32)
        draws = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[: x.size].reshape(x.shape)
        return jnp.where(draws < kept, x * jnp.asarray(2**16 / kept, x.dtype), jnp.zeros((), x.dtype))


def check_dropout(dropout: float) -> None:
    """Refuses a rate of dropout outside [0, 1)."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")


def check_image(dims: tuple[int, ...]) -> None:
    """Refuses anything but the three sizes of an image, (H, W, C)."""
    if not isinstance(dims, tuple | list) or len(dims) != 3:
        raise ValueError(f"dims must be (H, W, C) of one image, got {dims!r}")
    for size in dims:
        _validate.positive_integer("dims", size)


def model_of(network: nn.Module, shape: tuple[int, ...]) -> Model:
    """Returns Model(init, apply) of a module that is called as network(t, x, deterministic) for ONE example.

    Args:
        network: maps t [] (at least float32) and x [*shape] to [*shape]; a False in `deterministic` means dropout.
        shape: of one example.

    Returns:
        Model. `apply(params, t, x, *, key=None)` computes in the dtype of the params and answers in the dtype of x.
    """

    def init(key: Key) -> Params:
        return network.init(key, jnp.zeros((), jnp.float32), jnp.zeros(shape, jnp.float32), True)["params"]

    def apply(params: Params, t: Scalar, x: Array, *, key: Key | None = None) -> Array:
        if jnp.shape(x) != shape:
            raise ValueError(f"x must be ONE example of shape {shape} (jax.vmap for a batch), got shape {jnp.shape(x)}")
        _validate.shape("t", t, ())
        _validate.floating("x", x)
        dtype = jax.tree.leaves(params)[0].dtype
        time = jnp.asarray(t, wide_dtype(dtype))
        rngs = None if key is None else {"dropout": key}
        velocity = network.apply({"params": params}, time, x.astype(dtype), key is None, rngs=rngs)
        return jnp.asarray(velocity).astype(x.dtype)

    return Model(init, apply)
