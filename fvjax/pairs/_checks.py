"""What every function of a finite set of pairs asks of the pairs and of their weights."""

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax.types import Array, Pair

WEIGHT_SLACK = 1e-3
"""By how much weights may miss the sum 1: 50,000 float32 weights of 1/N, added up, miss it by some 1e-5."""


def checked_pairs(pairs: Pair) -> Pair:
    """Pairs as jax arrays [N, *dims], N >= 1; refuses other shapes, dtypes that are not floating or differ, and nan."""
    pairs = Pair(jnp.asarray(pairs.x0), jnp.asarray(pairs.x1))
    _validate.same_shape("pairs.x0", pairs.x0, "pairs.x1", pairs.x1)
    _validate.floating("pairs.x0", pairs.x0)
    _validate.same_dtype("pairs.x0", pairs.x0, "pairs.x1", pairs.x1)
    if _validate.batch("pairs", pairs) < 1:
        raise ValueError(f"pairs must be at least one, got arrays of shape {pairs.x0.shape}")
    for name, x in zip(("pairs.x0", "pairs.x1"), pairs, strict=True):
        if _validate.is_concrete(x):
            with jax.ensure_compile_time_eval():  # arrays that a jitted function closes over are known, too
                known = bool(_all_finite(x))
            if not known:
                _validate.finite(name, x)
    return pairs


@jax.jit
def _all_finite(x: Array) -> Array:
    """Without the array of booleans, as large as a quarter of x, that counting them takes."""
    return jnp.all(jnp.isfinite(x))


def checked_weights(weights: Array | None, n: int) -> Array | None:
    """Weights [n], >= 0 and adding up to 1 (to 1e-3), divided by their sum in at least float32; or None."""
    if weights is None:
        return None
    _validate.shape("weights", weights, (n,))
    _validate.nonnegative("weights", weights)
    if _validate.is_concrete(weights):
        total = np.sum(np.asarray(weights, np.float64))
        if abs(total - 1) > WEIGHT_SLACK:
            raise ValueError(f"weights must add up to 1, got a sum of {total:.6g}")
    weights = jnp.asarray(weights, _validate.common_dtype(weights))
    return weights / jnp.sum(weights)
