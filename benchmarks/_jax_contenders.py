"""The models, the float64 reference, and the contenders in JAX: a worker's program (see _worker.py)."""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from _worker import Contender, serve
from flax.traverse_util import flatten_dict, unflatten_dict

import fvjax
from fvjax import sites

Array = jax.Array
Batch = tuple[Array, Array, Array]
norm = partial(nn.GroupNorm, num_groups=8, reduction_axes=(-3, -2, -1))  # one example: no batch axis to spare


class Network(nn.Module):
    """Four hidden layers of 512 units; time is one more input."""

    @nn.compact
    def __call__(self, t: Array, x: Array) -> Array:
        """Velocity of one example."""
        hidden = jnp.concatenate([x, t[None]])
        for _ in range(4):
            hidden = nn.silu(nn.Dense(512)(hidden))
        return nn.Dense(x.size)(hidden)


def conv(features: int, size: int = 3, stride: int = 1) -> nn.Conv:
    """Padded alike on both sides, as PyTorch does it."""
    return nn.Conv(features, (size, size), strides=(stride, stride), padding=size // 2)


class Residual(nn.Module):
    """Two convolutions, GroupNorm before each, the time embedding added in between."""

    features: int

    @nn.compact
    def __call__(self, x: Array, embedding: Array) -> Array:
        """[h, w, c] -> [h, w, features]."""
        h = conv(self.features)(nn.silu(norm()(x)))
        h = h + nn.Dense(self.features)(embedding)
        h = conv(self.features)(nn.silu(norm()(h)))
        return h + (x if x.shape[-1] == self.features else conv(self.features, 1)(x))


class Attention(nn.Module):
    """Self-attention of one head over all positions."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[h, w, c] -> [h, w, c]."""
        tokens = norm()(x).reshape(-1, x.shape[-1])
        query, key, value = (nn.Dense(x.shape[-1])(tokens) for _ in range(3))
        weights = jax.nn.softmax(query @ key.T / math.sqrt(x.shape[-1]))
        return x + nn.Dense(x.shape[-1])(weights @ value).reshape(x.shape)


class UNet(nn.Module):
    """Two resolutions, 64 and 128 channels, attention at the lower one."""

    @nn.compact
    def __call__(self, t: Array, x: Array) -> Array:
        """[h, w, c] -> [h, w, c]."""
        angles = jnp.exp(jnp.linspace(0, 4, 32)) * t
        embedding = nn.silu(nn.Dense(128)(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])))
        skip = Residual(64)(conv(64)(x), embedding)
        h = Residual(128)(conv(128, stride=2)(skip), embedding)
        h = Residual(128)(Attention()(h), embedding)
        h = conv(64)(jnp.repeat(jnp.repeat(h, 2, axis=0), 2, axis=1))
        h = Residual(64)(jnp.concatenate([h, skip], -1), embedding)
        return conv(x.shape[-1])(nn.silu(norm()(h)))


class Problem(NamedTuple):
    """A Flax network `(t, x) -> velocity` of one example, its shape, the batch, and the chunk of the chunked peers."""

    network: nn.Module
    shape: tuple[int, ...]
    batch: int
    chunk: int


# A further model needs an entry here and, for the rows of PyTorch, one in _torch_peers.NETWORKS with the same names of
# the layers.
PROBLEMS = {
    "mlp": Problem(Network(), (64,), 1024, 64),
    "unet": Problem(UNet(), (16, 16, 3), 64, 8),
}


def example_loss(network: nn.Module) -> Callable[[Any, Batch], Array]:
    """Squared error of one example, summed over its dimensions."""

    def loss(params: Any, example: Batch) -> Array:
        t, x, target = example
        velocity: Any = network.apply({"params": params}, t, x)
        return jnp.sum((velocity - target) ** 2)

    return loss


@jax.jit(static_argnums=0)
def reference(loss: Callable[[Any, Batch], Array], params: Any, batch: Batch) -> dict[str, Array]:
    """Mean loss, mean |g|^2 and total variance from one example after the other."""

    def body(sums: Any, example: Batch) -> tuple[Any, None]:
        value, gradient = jax.value_and_grad(loss)(params, example)
        square = sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient))
        return jax.tree.map(jnp.add, sums, (value, square, gradient)), None

    empty = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    sums, _ = jax.lax.scan(body, empty, batch)
    value, square, mean = jax.tree.map(lambda x: x / len(batch[0]), sums)
    return {"loss": value, "norm": square, "variance": square - sum(jnp.sum(g**2) for g in jax.tree.leaves(mean))}


def prepare(model: str, batch: int | None) -> dict[str, Any]:
    """Weights, data and the float64 reference of a model, as flat arrays for an npz file."""
    problem = PROBLEMS[model]
    n = batch or problem.batch
    if n % problem.chunk:
        raise ValueError(f"batch must be a multiple of {problem.chunk} for {model}, got {n}")
    init_key, *keys = jax.random.split(jax.random.key(0), 4)
    params = problem.network.init(init_key, jnp.zeros(()), jnp.zeros(problem.shape))["params"]
    shape = (n, *problem.shape)
    data = (jax.random.uniform(keys[0], (n,)), *(jax.random.normal(key, shape) for key in keys[1:]))
    with jax.enable_x64(True):
        exact = reference(example_loss(problem.network), *jax.tree.map(lambda x: x.astype(float), (params, data)))
    flat = {f"params/{name}": np.asarray(value) for name, value in flatten_dict(params, sep="/").items()}
    flat |= dict(zip(("t", "x", "target"), map(np.asarray, data), strict=True))
    return flat | {name: np.asarray(x) for name, x in exact.items()} | {"chunk": problem.chunk, "model": model}


def spread(gradients: Any) -> tuple[Any, Array]:
    """Mean gradient and sum of squared deviations, in two passes.

    The mean as a matrix product: XLA's sum over the first axis takes 50 times as long (docs/sharp_edges.md, 5).
    """
    mean = jax.tree.map(lambda g: jnp.tensordot(jnp.full(len(g), 1 / len(g)), g, 1), gradients)
    parts = jax.tree.map(lambda g, m: jnp.sum((g - m) ** 2), gradients, mean)
    return mean, jnp.sum(jnp.stack(jax.tree.leaves(parts)))


def functions(loss: Callable[[Any, Batch], Array], chunk: int) -> dict[str, tuple[Callable, Callable]]:
    """What is compiled, and how the number to check is read from its result."""

    def plain(params: Any, batch: Batch) -> Any:
        return jax.value_and_grad(lambda p: jnp.mean(jax.vmap(loss, in_axes=(None, 0))(p, batch)))(params)

    def whole(params: Any, batch: Batch) -> tuple[Any, Array]:
        mean, m2 = spread(fvjax.per_example_gradients(loss, params, batch))
        return mean, m2 / len(batch[0])

    def chunked(params: Any, batch: Batch) -> tuple[Any, Array]:
        pieces = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), batch)
        means, m2 = jax.lax.map(lambda piece: spread(fvjax.per_example_gradients(loss, params, piece)), pieces)
        mean, between = spread(means)
        return mean, (jnp.sum(m2) + chunk * between) / len(batch[0])

    def variance(moments: fvjax.GradientMoments) -> Array:
        return fvjax.total_variance(moments)

    return {
        "plain": (plain, lambda result: result[0]),
        "sites_norms": (partial(sites.square_norms, loss), lambda result: np.mean(result.square_norms, dtype=float)),
        "sites_trace": (partial(sites.moments, loss), variance),
        "sites_elementwise": (partial(sites.moments, loss, elementwise=True), variance),
        "vmap_grad": (whole, lambda result: result[1]),
        "vmap_grad_chunked": (chunked, lambda result: result[1]),
    }


def build(name: str, file: Path) -> Contender:
    """Compiles a contender; `facts` are seconds of tracing and compilation, and the memory that XLA plans."""
    with np.load(file) as arrays:
        stored = dict(arrays)
    weights = {tuple(key.split("/")[1:]): jnp.asarray(x) for key, x in stored.items() if key.startswith("params/")}
    params = unflatten_dict(weights)
    batch = tuple(jnp.asarray(stored[key]) for key in ("t", "x", "target"))
    loss = example_loss(PROBLEMS[str(stored["model"])].network)
    function, read = functions(loss, int(stored["chunk"]))[name]
    start = time.perf_counter()
    compiled = jax.jit(function).lower(params, batch).compile()
    facts = {"compile_seconds": time.perf_counter() - start}
    plan = compiled.memory_analysis()
    if plan is not None:
        facts |= {"xla_temp_bytes": plan.temp_size_in_bytes, "xla_output_bytes": plan.output_size_in_bytes}
    return Contender(
        lambda: jax.block_until_ready(compiled(params, batch)), lambda r: float(read(r)), lambda: None, facts
    )


if __name__ == "__main__":
    serve(build)
