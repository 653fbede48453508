"""The one-example loss and its mean over a batch: conventions, weights, refusals."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvjax.losses import batch_loss, squared_error
from fvjax.types import Array, Params, PathSample


def field(params: Params, t: Any, x: Array) -> Array:
    """params * x + t, in the shape of x."""
    return params * x + t


def samples(n: int, *dims: int) -> PathSample:
    """A batch of arbitrary regression samples, [n, *dims]."""
    x, target = jax.random.normal(jax.random.key(0), (2, n, *dims))
    return PathSample(jnp.linspace(0.1, 0.9, n), x, target)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_squared_error_and_its_gradient(x64: None, reduction: str) -> None:
    """Catches a factor 1/2, a sum taken for a mean, and a mean over the wrong number of dimensions (2 x 3 here)."""
    example = PathSample(jnp.asarray(0.5), jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3)))
    residual = 2.0 * np.asarray(example.x) + 0.5 - 1.0
    count = 1 if reduction == "sum" else 6
    value, slope = jax.value_and_grad(squared_error(field, reduction=reduction))(jnp.asarray(2.0), example)
    np.testing.assert_allclose(value, np.sum(residual**2) / count, rtol=1e-14)
    np.testing.assert_allclose(slope, 2 * np.sum(residual * np.asarray(example.x)) / count, rtol=1e-14)


@given(weights=st.lists(st.floats(0, 10), min_size=4, max_size=4).filter(lambda w: sum(w) > 1e-3))
def test_batch_loss_is_the_weighted_mean(x64: None, weights: list[float]) -> None:
    """Catches weights that are not normalised, or normalised by n."""
    loss, params, batch = squared_error(field), jnp.asarray(0.7), samples(4, 3)
    each = [float(loss(params, jax.tree.map(lambda x, i=i: x[i], batch))) for i in range(4)]
    np.testing.assert_allclose(batch_loss(loss, params, batch), np.mean(each), rtol=1e-13)
    weighted = batch_loss(loss, params, batch, weights=jnp.asarray(weights))
    np.testing.assert_allclose(weighted, np.average(each, weights=weights), rtol=1e-12)


def test_integer_weights_and_float32() -> None:
    """Catches a promotion error between counts and a float32 loss."""
    loss, batch = squared_error(field), samples(3, 2)
    weighted = batch_loss(loss, jnp.asarray(0.7), batch, weights=jnp.asarray([2, 0, 2]))
    ends = jax.tree.map(lambda x: x[::2], batch)
    assert weighted.dtype == jnp.float32
    np.testing.assert_allclose(weighted, batch_loss(loss, jnp.asarray(0.7), ends), rtol=1e-6)


def test_gradient_of_the_batch_loss_is_the_mean_of_gradients(x64: None) -> None:
    """Catches a batch loss whose gradient is not what the gradient layer calls the mean."""
    loss, params, batch = squared_error(field, reduction="mean"), jnp.asarray([0.3, -1.0]), samples(5, 2)
    each = [jax.grad(loss)(params, jax.tree.map(lambda x, i=i: x[i], batch)) for i in range(5)]
    mean = jax.jit(jax.grad(lambda p: batch_loss(loss, p, batch)))(params)
    np.testing.assert_allclose(mean, np.mean(each, axis=0), rtol=1e-13)


@pytest.mark.parametrize("output", [lambda p, t, x: x[:1], lambda p, t, x: jnp.sum(x), lambda p, t, x: x[None]])
def test_refuses_a_field_of_another_shape(output: Any) -> None:
    """Catches a field whose output would broadcast against the target and train on the wrong loss."""
    example = PathSample(jnp.asarray(0.5), jnp.ones(3), jnp.ones(3))
    with pytest.raises(ValueError, match=r"field\(params, t, x\) and target must have the same shape, got .* \(3,\)"):
        squared_error(output)(None, example)


def test_refuses_bad_arguments() -> None:
    """Catches an unknown reduction, weights that do not fit or are negative, and batches of several lengths."""
    loss, params, batch = squared_error(field), jnp.asarray(1.0), samples(3, 2)
    with pytest.raises(ValueError, match="reduction must be one of sum, mean, got 'max'"):
        squared_error(field, reduction="max")
    with pytest.raises(ValueError, match=r"weights must have shape \(3,\), got \(3, 1\)"):
        batch_loss(loss, params, batch, weights=jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="weights must be >= 0 and finite"):
        batch_loss(loss, params, batch, weights=jnp.asarray([1.0, -1.0, 1.0]))
    with pytest.raises(
        ValueError, match=r"batch must have one common leading axis, got leading axes \[\(2,\), \(3,\)\]"
    ):
        batch_loss(loss, params, batch._replace(t=jnp.ones(2)))
