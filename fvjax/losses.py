"""The squared error of ONE example as a function (params, example) -> scalar, and its mean over a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fvjax import _validate
from fvjax.types import Array, ExampleLoss, Params, PathSample, VelocityField

Loss = Callable[[Params, PathSample], Array]
"""(params, example) -> scalar, for ONE example: what the gradient layer differentiates."""

REDUCTIONS = ("sum", "mean")
"""What `squared_error` can do with the dimensions of one example."""


def squared_error(field: VelocityField, *, reduction: str = "sum") -> Loss:
    """Returns the flow-matching loss of one example, l(params, s) = |field(params, s.t, s.x) - s.target|^2.

    Args:
        field: velocity field of one example.
        reduction: over the dimensions of the example, "sum" (the theory's convention: gradients carry a factor 2) or
            "mean" (training's: divided by the number of dimensions d, so variances by d^2).

    Returns:
        A function (params, PathSample of one example) -> scalar, without a factor 1/2.

    Raises:
        ValueError: if `reduction` is unknown; on call, if the field's output has not the shape of the target.
    """
    _validate.one_of("reduction", reduction, REDUCTIONS)
    reduce = jnp.sum if reduction == "sum" else jnp.mean

    def loss(params: Params, example: PathSample) -> Array:
        predicted = field(params, example.t, example.x)
        _validate.same_shape("field(params, t, x)", predicted, "target", example.target)
        return reduce((predicted - example.target) ** 2)

    return loss


def batch_loss(loss: ExampleLoss, params: Params, batch: Any, *, weights: Array | None = None) -> Array:
    """Weighted mean of a one-example loss over a batch.

    Args:
        loss: (params, example) -> scalar.
        params: its first argument.
        batch: pytree of examples with leading axis n.
        weights: [n], >= 0, divided by their sum; None means 1/n each.

    Returns:
        Scalar.

    Raises:
        ValueError: if the leading axes disagree, `weights` has not the shape [n], or a concrete weight is negative.
    """
    n = _validate.batch("batch", batch)
    values = jax.vmap(loss, in_axes=(None, 0))(params, batch)
    if weights is None:
        return jnp.mean(values)
    _validate.shape("weights", weights, (n,))
    _validate.nonnegative("weights", weights)
    weights = jnp.asarray(weights, values.dtype)
    return jnp.sum(weights * values) / jnp.sum(weights)
