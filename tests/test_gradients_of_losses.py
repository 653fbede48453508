"""Gradients of losses with networks, randomness and padding inside: against loops, under jit, in bounded memory."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvjax.gradients import (
    GradientMoments,
    gradient_moments,
    merge_groups,
    per_example_gradients,
    total_variance,
)
from fvjax.interpolants import brownian_bridge, draw_path
from fvjax.losses import batch_loss, squared_error
from fvjax.nets import mlp
from fvjax.types import Array, Pair, Params, PathSample


class ConvNet(nn.Module):
    """Convolution, GroupNorm, convolution, on ONE image [h, w, c]."""

    reduction_axes: tuple[int, ...] | None = (-3, -2, -1)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[h, w, 2] -> [h, w, 2]."""
        h = nn.GroupNorm(2, reduction_axes=self.reduction_axes)(nn.Conv(4, (3, 3))(x))
        return nn.Conv(2, (3, 3))(nn.silu(h))


def conv_net(params: Params, x: Array, **options: Any) -> Array:
    """The network as a function."""
    return jnp.asarray(ConvNet(**options).apply({"params": params}, x))


def regression(kind: str) -> tuple[Any, Params, Any]:
    """Loss, params and a batch of six draws for an MLP and for a convolutional network."""
    dims = (3,) if kind == "mlp" else (4, 4, 2)
    batch = PathSample(jnp.linspace(0.1, 0.9, 6), *jax.random.normal(jax.random.key(1), (2, 6, *dims)))
    if kind == "mlp":
        model = mlp(3, width=8, depth=2)
        return squared_error(model.apply), jax.jit(model.init)(jax.random.key(0)), batch
    params = jax.jit(ConvNet().init)(jax.random.key(0), jnp.zeros(dims))["params"]
    return squared_error(lambda p, t, x: t * conv_net(p, x)), params, batch


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_per_example_gradients_are_a_loop_of_grad(kind: str) -> None:
    """Catches examples that leak into each other, in dense layers, convolutions and normalisation."""
    loss, params, batch = regression(kind)
    gradient = jax.jit(jax.grad(loss))
    loop = [gradient(params, jax.tree.map(lambda x, i=i: x[i], batch)) for i in range(6)]
    found = jax.jit(lambda p, b: per_example_gradients(loss, p, b))(params, batch)
    chex.assert_trees_all_close(found, jax.tree.map(lambda *g: jnp.stack(g), *loop), rtol=1e-4, atol=1e-5)


def test_moments_of_a_network() -> None:
    """Catches a mean that is not the gradient of the batch loss, and chunked moments that are not numpy's."""
    loss, params, batch = regression("mlp")

    @jax.jit
    def measure(params: Params) -> tuple[GradientMoments, Params, Params]:
        mean = jax.grad(lambda p: batch_loss(loss, p, batch))(params)
        return gradient_moments(loss, params, batch, chunk=4), mean, per_example_gradients(loss, params, batch)

    chunked, mean, each = measure(params)
    chex.assert_trees_all_close(chunked.mean, mean, rtol=1e-4, atol=1e-5)
    variance = sum(np.sum(np.var(g, axis=0)) for g in jax.tree.leaves(each))
    np.testing.assert_allclose(total_variance(chunked), variance, rtol=1e-4)


def test_group_norm_of_one_example_needs_its_axes() -> None:
    """Documents Flax: by default GroupNorm takes the first axis of ONE image for a batch; named axes do not."""
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 2))
    params = jax.jit(ConvNet().init)(jax.random.key(1), x[0])["params"]

    @jax.jit
    def gap(**options: Any) -> Array:
        return jnp.max(
            jnp.abs(conv_net(params, x, **options) - jax.vmap(lambda one: conv_net(params, one, **options))(x))
        )

    assert gap() < 1e-5
    assert gap(reduction_axes=None) > 1e-2


@pytest.mark.parametrize("options", [{}, {"chunk": 3}, {"chunk": 5}, {"groups": 2, "by": np.arange(8) // 4}])
def test_padding_of_weight_zero_is_ignored(x64: None, options: dict[str, Any]) -> None:
    """Catches 0 * nan: the gradient of |x| at zero-padded examples is nan, the moments must not be."""
    x, weights = np.random.default_rng(0).normal(size=(5, 4)), jnp.asarray([1.0, 2, 1, 1, 1, 0, 0, 0])
    padded, params = jnp.asarray(np.concatenate([x, np.zeros((3, 4))])), jnp.ones(4)

    def loss(params: Array, example: Array) -> Array:
        return jnp.linalg.norm(params * example)

    gradients = per_example_gradients(loss, params, padded)
    assert np.all(np.isnan(gradients[5:]))
    found = jax.jit(lambda: gradient_moments(loss, params, padded, elementwise=True, weights=weights, **options))()
    found = merge_groups(found) if "by" in options else found
    mean = np.average(gradients[:5], axis=0, weights=weights[:5])
    np.testing.assert_allclose(found.weight, 6, rtol=1e-14)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-13)
    np.testing.assert_allclose(found.m2, weights[:5] @ (gradients[:5] - mean) ** 2, rtol=1e-12)


def test_moments_under_jit_compile_once() -> None:
    """Catches a Python branch on weights, groups or params, all traced, and a nan in the gradient of the variance."""
    batch = jax.random.normal(jax.random.key(0), (6, 3))
    chex.clear_trace_counter()

    def loss(params: Array, x: Array) -> Array:
        return jnp.sum(jnp.tanh(params * x))

    def variance(params: Array, weights: Array, by: Array) -> Array:
        return jnp.nansum(
            total_variance(gradient_moments(loss, params, batch, weights=weights, by=by, groups=3, chunk=4))
        )

    compiled = jax.jit(chex.assert_max_traces(variance, 1))
    slope = jax.jit(jax.grad(variance))
    by, h = jnp.arange(6) % 2, 1e-2
    for params in (jnp.ones(3), jnp.asarray([0.3, -1.0, 2.0])):
        weights = jnp.arange(6.0) * params[0]
        rise = compiled(params + h, weights, by) - compiled(params - h, weights, by)
        np.testing.assert_allclose(jnp.sum(slope(params, weights, by)), rise / (2 * h), rtol=2e-2)


def test_randomness_inside_the_loss_follows_the_example() -> None:
    """Catches typed PRNG keys, as leaves of the batch, that cannot be cut into chunks."""
    batch = (jax.random.split(jax.random.key(1), 5), Pair(*jax.random.normal(jax.random.key(2), (2, 5, 2))))
    error = squared_error(lambda p, t, x: p * x + t)

    def loss(params: Array, example: tuple[Array, Pair]) -> Array:
        return error(params, draw_path(*example, brownian_bridge(0.1)))

    whole, cut = (jax.jit(lambda c=c: gradient_moments(loss, jnp.ones(2), batch, chunk=c))() for c in (None, 2))
    chex.assert_trees_all_close(cut, whole, rtol=1e-4, atol=1e-6)


def test_chunk_bounds_the_memory() -> None:
    """Catches a chunked computation that holds the activations of all n examples, by the compiler's own account."""
    n, width = 256, 64
    params, batch = jnp.zeros((width, width)), jnp.ones((n, width))

    def loss(params: Array, example: Array) -> Array:
        return jnp.sum(jnp.tanh(params @ example) ** 2)

    def temporary(chunk: int | None) -> int:
        lowered = jax.jit(lambda p, b: gradient_moments(loss, p, b, chunk=chunk)).lower(params, batch)
        analysis = lowered.compile().memory_analysis()
        assert analysis is not None
        return int(analysis.temp_size_in_bytes)

    activations = 4 * n * width
    assert temporary(None) > 2 * activations
    assert temporary(4) < temporary(None) - activations
