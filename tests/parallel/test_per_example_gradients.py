"""Per-example gradients of a convolution on 1, 2 and 4 devices: what is right, what is refused, and why."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fvjax import sites
from fvjax.gradients import GradientMoments, gradient_moments, per_example_gradients, total_variance
from fvjax.interpolants import brownian_bridge, draw_paths
from fvjax.losses import squared_error
from fvjax.types import Array, Pair, Params, PathSample

N = 8
AXIS = "data"
SIZES = [1, 2, 4]


def convolution(kernel: Array, x: Array) -> Array:
    """Same-size convolution of ONE image [h, w, c]."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=layout)[0]


def field(params: Params, t: Any, x: Array) -> Array:
    """Two convolutions with a bias in between, a velocity field of ONE image."""
    return t * convolution(params["last"], jnp.tanh(convolution(params["first"], x) + params["bias"]))


LOSS = squared_error(field)


@functools.cache
def problem() -> tuple[Params, PathSample, Params]:
    """Params, a batch on one device, and its gradients by a Python loop."""
    first, last, data = jax.random.split(jax.random.key(0), 3)
    params = {
        "first": 0.3 * jax.random.normal(first, (3, 3, 2, 4)),
        "bias": jnp.zeros(4),
        "last": 0.3 * jax.random.normal(last, (3, 3, 4, 2)),
    }
    batch = PathSample(jnp.linspace(0.2, 0.9, N), *jax.random.normal(data, (2, N, 5, 5, 2)))
    gradient = jax.jit(jax.grad(LOSS))
    loop = [gradient(params, jax.tree.map(lambda x, i=i: x[i], batch)) for i in range(N)]
    return params, batch, jax.tree.map(lambda *g: jnp.stack(g), *loop)


def devices(size: int) -> list[jax.Device]:
    """The first `size` devices."""
    if len(jax.devices()) < size:
        pytest.skip(f"needs {size} devices, has {len(jax.devices())}")
    return jax.devices()[:size]


def mesh(size: int) -> Mesh:
    """A mesh of one axis that leaves the partitioning to the compiler."""
    return jax.make_mesh((size,), (AXIS,), devices=devices(size), axis_types=(AxisType.Auto,))


def split(tree: Any, size: int) -> Any:
    """[n, ...] -> [size, n / size, ...]."""
    return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), tree)


def joined(tree: Any) -> Any:
    """The inverse of `split`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


@pytest.mark.parametrize("size", SIZES)
def test_pmap_gives_the_gradients_of_a_loop(size: int) -> None:
    """Catches gradients of other devices' examples that come out as zeros or as sums."""
    params, batch, loop = problem()
    gradients = jax.pmap(lambda p, b: per_example_gradients(LOSS, p, b), in_axes=(None, 0), devices=devices(size))
    chex.assert_trees_all_close(joined(gradients(params, split(batch, size))), loop, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_moments_over_devices_are_those_of_one(size: int) -> None:
    """Catches a merge over devices that averages variances, forgets weights or groups, or leaves devices different."""
    params, batch, loop = problem()
    weights, by = jnp.linspace(0.5, 2, N), jnp.asarray([0, 0, 1, 0, 2, 2, 1, 0])

    def local(params: Params, data: Any) -> GradientMoments:
        examples, weights, by = data
        return gradient_moments(
            LOSS, params, examples, elementwise=True, weights=weights, by=by, groups=4, chunk=3, axis_name=AXIS
        )

    over_devices = jax.pmap(local, axis_name=AXIS, in_axes=(None, 0), out_axes=None, devices=devices(size))
    found = over_devices(params, split((batch, weights, by), size))
    for group in range(4):
        w = np.where(by == group, weights, 0).astype(float)
        np.testing.assert_allclose(found.weight[group], w.sum(), rtol=1e-6)
        for gradients, mean, m2 in zip(*map(jax.tree.leaves, (loop, found.mean, found.m2)), strict=True):
            exact = np.asarray(gradients, float)
            average = np.tensordot(w, exact, 1) / max(w.sum(), 1e-300)
            np.testing.assert_allclose(mean[group], average, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(m2[group], np.tensordot(w, (exact - average) ** 2, 1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_norms_and_traces_over_devices_are_those_of_one(size: int) -> None:
    """Catches square norms of other devices' examples, and a merge over devices that takes a trace for coordinates."""
    params, batch, loop = problem()

    def local(params: Params, examples: Any) -> tuple[sites.SquareNorms, GradientMoments]:
        return sites.square_norms(LOSS, params, examples), gradient_moments(LOSS, params, examples, axis_name=AXIS)

    out_axes = (sites.SquareNorms(0, 0, 0, None, None), None)
    over_devices = jax.pmap(local, axis_name=AXIS, in_axes=(None, 0), out_axes=out_axes, devices=devices(size))
    norms, moments = over_devices(params, split(batch, size))
    flat = np.concatenate([np.asarray(g, float).reshape(N, -1) for g in jax.tree.leaves(loop)], 1)
    np.testing.assert_allclose(norms.square_norms.ravel(), np.sum(flat**2, 1), rtol=1e-5)
    np.testing.assert_allclose(total_variance(moments), np.sum(np.var(flat, axis=0)), rtol=1e-5)
    chex.assert_trees_all_close(jax.tree.map(lambda m: jnp.mean(m, 0), norms.mean), moments.mean, rtol=1e-4, atol=1e-5)


def test_draws_and_moments_do_not_depend_on_the_number_of_devices() -> None:
    """Catches keys that depend on the device: draws with the global index, then moments, on 1 and 4 devices."""
    params, batch, _ = problem()

    def local(params: Params, pairs: Pair) -> tuple[PathSample, GradientMoments]:
        start = jax.lax.axis_index(AXIS) * len(pairs.x0)
        samples = draw_paths(jax.random.key(1), pairs, brownian_bridge(0.2), start=start)
        return jax.lax.all_gather(samples, AXIS, tiled=True), gradient_moments(LOSS, params, samples, axis_name=AXIS)

    def run(size: int) -> tuple[PathSample, GradientMoments]:
        over_devices = jax.pmap(local, axis_name=AXIS, in_axes=(None, 0), out_axes=None, devices=devices(size))
        return over_devices(params, split(Pair(batch.x, batch.target), size))

    one, four = (jax.device_get(run(size)) for size in (1, 4))
    chex.assert_trees_all_equal(four[0], one[0])
    chex.assert_trees_all_close(four[1], one[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [2, 4])
def test_a_split_batch_is_refused_outside_pmap(size: int) -> None:
    """Catches the silent zeros of sharp edge 1; a batch that lies whole on every device is welcome."""
    params, batch, loop = problem()
    whole = jax.device_put(batch, NamedSharding(mesh(size), P()))
    found = per_example_gradients(LOSS, jax.device_put(params, NamedSharding(mesh(size), P())), whole)
    chex.assert_trees_all_close(found, loop, rtol=1e-4, atol=1e-5)
    parts = jax.device_put(batch, NamedSharding(mesh(size), P(AXIS)))
    for function in (per_example_gradients, gradient_moments, sites.square_norms):
        with pytest.raises(ValueError, match=r"batch must lie on one device .*use jax.pmap.*, got NamedSharding"):
            function(LOSS, params, parts)


@pytest.mark.parametrize("size", [2, 4])
def test_jax_loses_gradients_of_a_split_batch(size: int) -> None:
    """Documents the reason (docs/sharp_edges.md, 1): once this skips, `_validate.on_one_device` is no longer needed."""
    params, batch, loop = problem()
    parts = jax.device_put(batch, NamedSharding(mesh(size), P(AXIS)))
    replicated = jax.device_put(params, NamedSharding(mesh(size), P()))
    found = jax.jit(jax.vmap(jax.grad(LOSS), in_axes=(None, 0)))(replicated, parts)
    kernel, expected = np.asarray(found["last"]), np.asarray(loop["last"])
    if np.allclose(kernel, expected, rtol=1e-3, atol=1e-4):
        pytest.skip(f"jax {jax.__version__} differentiates split convolutions correctly: the refusal may be dropped")
    on_first = N // size
    np.testing.assert_allclose(kernel[:on_first], expected[:on_first], rtol=1e-4, atol=1e-5)
    assert np.all(kernel[on_first:] == 0)
    assert np.all(np.abs(expected[on_first:]).max((1, 2, 3, 4)) > 1)


@pytest.mark.parametrize("size", [2, 4])
def test_shard_map_needs_check_vma_off(size: int) -> None:
    """Documents sharp edge 2: by default shard_map sums the gradients of replicated params over the devices.

    Example j of every device gets the sum over the devices' examples j. Skips once jax no longer does that.
    """
    params, batch, loop = problem()
    parts = jax.device_put(batch, NamedSharding(mesh(size), P(AXIS)))

    def gradients(check_vma: bool) -> Params:
        over_devices = jax.shard_map(
            jax.vmap(jax.grad(LOSS), in_axes=(None, 0)),
            mesh=mesh(size),
            in_specs=(P(), P(AXIS)),
            out_specs=P(AXIS),
            check_vma=check_vma,
        )
        return jax.jit(over_devices)(params, parts)

    chex.assert_trees_all_close(gradients(check_vma=False), loop, rtol=1e-4, atol=1e-5)
    default = gradients(check_vma=True)
    if np.allclose(default["last"], loop["last"], rtol=1e-3, atol=1e-4):
        pytest.skip(f"jax {jax.__version__} no longer sums the gradients: sharp edge 2 may be dropped")
    summed = jax.tree.map(lambda g: jnp.broadcast_to(jnp.sum(g, 0), g.shape), split(loop, size))
    chex.assert_trees_all_close(default, joined(summed), rtol=1e-4, atol=1e-4)
