"""The models of gradient_variance.py in JAX, their data, and the float64 reference."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from fvjax import nets
from fvjax.nets import convert
from fvjax.types import Model

Array = jax.Array
Batch = tuple[Array, ...]
"""What the model takes, and last the target of its output."""
Loss = Callable[[Any, Batch], Array]
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


class Embedding(nn.Module):
    """A vector of 64 for each token, of a table of 20,000, and three outputs from each."""

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """[l] -> [l, 3]."""
        return nn.Dense(3)(nn.silu(nn.Embed(20_000, 64)(tokens)))


class Recurrent(nn.Module):
    """An LSTM of 64 units, and three outputs from its last state."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[steps, features] -> [3]."""
        return nn.Dense(3)(nn.RNN(nn.OptimizedLSTMCell(64, param_dtype=x.dtype))(x)[-1])


def dense(x: Array, kernel: Array) -> Array:
    """A dense layer without its bias."""
    return x @ kernel


def scaled_dense(x: Array, kernel: Array) -> Array:
    """The kernel divided by the root of its inputs."""
    return x @ (kernel / math.sqrt(len(kernel)))


def masked_dense(x: Array, kernel: Array) -> Array:
    """Weights only to units of at least the degree of the input (MADE, Germain et al. 2015): 63 degrees, in order."""
    inputs, outputs = (np.arange(size) * 63 // size for size in kernel.shape)
    return x @ (kernel * (outputs >= inputs[:, None]).astype(np.float32))


@jax.custom_vjp
def custom_dense(x: Array, kernel: Array) -> Array:
    """A derivative of its own, that of the matrix product."""
    return x @ kernel


custom_dense.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), lambda kept, y: (kept[1] @ y, jnp.outer(kept[0], y)))


class Problem(NamedTuple):
    """A loss of one example, its data, and how many of them.

    `chunk` is that of the chunked peers, and `microbatch` the quickest of jax_privacy on 2 CPU cores: 1
    example, but all (None) where there are convolutions, which a loop of XLA slows down (docs/sharp_edges.md, 7). The
    examples belong to `groups` in turn; with `members`, the params are those of an ensemble, with a leading axis.
    """

    init: Callable[[Array], Any]
    loss: Loss
    draw: Callable[[Array, int], Batch]
    batch: int
    chunk: int
    microbatch: int | None = 1
    groups: int | None = None
    members: int | None = None

    def by(self, n: int) -> np.ndarray | None:
        """The groups of the examples."""
        return None if self.groups is None else np.arange(n) % self.groups


def squared_error(apply: Callable[..., Array]) -> Loss:
    """Squared error of one example, summed over its dimensions."""

    def loss(params: Any, example: Batch) -> Array:
        *inputs, target = example
        return jnp.sum((apply(params, *inputs) - target) ** 2)

    return loss


def of_flax(network: nn.Module, *example: Array) -> Model:
    """A Flax network, from what it takes of one example."""

    def init(key: Array) -> Any:
        return network.init(key, *example)["params"]

    def apply(params: Any, *inputs: Array) -> Any:
        return network.apply({"params": params}, *inputs)

    return Model(init, apply)


def velocity(model: Model, shape: tuple[int, ...], batch: int, chunk: int) -> Problem:
    """A velocity field `(t, x)`."""

    def draw(key: Array, n: int) -> Batch:
        time, *keys = jax.random.split(key, 3)
        return jax.random.uniform(time, (n,)), *(jax.random.normal(key, (n, *shape)) for key in keys)

    return Problem(model.init, squared_error(model.apply), draw, batch, chunk, 1 if len(shape) == 1 else None)


def of_network(network: nn.Module, shape: tuple[int, ...], targets: tuple[int, ...], tokens: int = 0) -> Problem:
    """A Flax network of one input, normal or of tokens; batch 64."""

    def inputs(key: Array, n: int) -> Array:
        return jax.random.randint(key, (n, *shape), 0, tokens) if tokens else jax.random.normal(key, (n, *shape))

    def draw(key: Array, n: int) -> Batch:
        first, second = jax.random.split(key)
        return inputs(first, n), jax.random.normal(second, (n, *targets))

    model = of_flax(network, inputs(jax.random.key(0), 1)[0])
    return Problem(model.init, squared_error(model.apply), draw, batch=64, chunk=16)


def perceptron(layer: Callable[[Array, Array], Array] = dense, deviation: float | None = None) -> Problem:
    """64-256-256-3 units, batch 256; kernels are normal, of variance 1 / inputs unless the deviation is given."""
    sizes = (64, 256, 256, 3)

    def init(key: Array) -> Any:
        params = {}
        for k, shape in enumerate(itertools.pairwise(sizes)):
            width = 1 / math.sqrt(shape[0]) if deviation is None else deviation
            kernel = width * jax.random.normal(jax.random.fold_in(key, k), shape)
            params[f"Dense_{k}"] = {"bias": jnp.zeros(shape[1]), "kernel": kernel}
        return params

    def apply(params: Any, x: Array) -> Array:
        for k in range(3):
            x = layer(x, params[f"Dense_{k}"]["kernel"]) + params[f"Dense_{k}"]["bias"]
            x = nn.silu(x) if k < 2 else x
        return x

    def draw(key: Array, n: int) -> Batch:
        first, second = jax.random.split(key)
        return jax.random.normal(first, (n, sizes[0])), jax.random.normal(second, (n, sizes[-1]))

    return Problem(init, squared_error(apply), draw, batch=256, chunk=16)


# A further model needs an entry here, one in gradient_variance.TITLES and, for the rows of PyTorch, one in
# _torch_peers.NETWORKS with the same names of the layers, or its weights by PyTorch's names from `torch_weights`.
PROBLEMS = {
    "mlp": velocity(of_flax(Network(), jnp.zeros(()), jnp.zeros(64)), (64,), 1024, 16),
    "unet": velocity(of_flax(UNet(), jnp.zeros(()), jnp.zeros((16, 16, 3))), (16, 16, 3), 64, 8),
    "cifar": velocity(nets.unet((32, 32, 3)), (32, 32, 3), 8, 2),
    "embedding": of_network(Embedding(), (16,), (16, 3), tokens=20_000),
    "lstm": of_network(Recurrent(), (8, 64), (3,)),
    "custom": perceptron(custom_dense),
    "scaled": perceptron(scaled_dense, deviation=1.0),
    "masked": perceptron(masked_dense),
    "ensemble": perceptron()._replace(members=4),
    "groups10": perceptron()._replace(groups=10),
    "groups32": perceptron()._replace(groups=32),
    "groups33": perceptron()._replace(groups=33),
}


def reference(problem: Problem, params: Any, batch: Batch) -> dict[str, Any]:
    """Mean loss, mean |g|^2 and total variance from one example after the other; with groups, that within them.

    A loop of Python: in one of XLA the derivatives of convolutions take a hundred times as long (docs/sharp_edges.md).
    """
    one = jax.jit(jax.value_and_grad(problem.loss))
    n, value, square = len(batch[0]), 0.0, 0.0
    by = problem.by(n)
    groups = np.zeros(n, int) if by is None else by
    totals: dict[int, list[np.ndarray]] = {}
    for i, group in enumerate(groups):
        loss, gradient = one(params, jax.tree.map(lambda x, i=i: x[i], batch))
        leaves = [np.asarray(g) for g in jax.tree.leaves(gradient)]
        value += float(loss) / n
        square += sum(float(np.sum(g**2)) for g in leaves) / n
        total = totals.get(group)
        totals[group] = leaves if total is None else [a + g for a, g in zip(total, leaves, strict=True)]
    counts = np.bincount(groups)
    means = sum(float(np.sum(g**2)) / counts[group] / n for group, total in totals.items() for g in total)
    return {"loss": value, "norm": square, "variance": square - means}


def of_members(problem: Problem, params: Any, batch: Batch) -> dict[str, Any]:
    """The reference, averaged over the members of an ensemble."""
    if problem.members is None:
        return reference(problem, params, batch)
    found = [reference(problem, jax.tree.map(lambda x, k=k: x[k], params), batch) for k in range(problem.members)]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def torchcfm_weights() -> dict[str, np.ndarray]:
    """Weights of torchcfm's U-Net by its names: normal of variance 1 / inputs, scales of 1 plus a tenth of that.

    None is zero, as some are at the start of a training: these have no gradient behind them.
    """
    rng = np.random.default_rng(0)
    arrays = {}
    for name, size in convert.torch_shapes((32, 32, 3)).items():
        value = rng.normal(size=size) / np.sqrt(np.prod(size[1:])) if len(size) > 1 else 0.1 * rng.normal(size=size)
        scale = len(size) == 1 and name.endswith("weight")
        arrays[name] = (value + scale).astype(np.float32)
    return arrays


def lstm_weights(params: Any) -> dict[str, np.ndarray]:
    """Weights of the recurrent network by the names of torch.nn.LSTM, which has one bias more: zero."""
    cell, last = params["OptimizedLSTMCell_0"], params["Dense_0"]

    def gates(place: str, kind: str) -> np.ndarray:
        return np.concatenate([np.asarray(cell[f"{place}{gate}"][kind]).T for gate in "ifgo"])

    bias = gates("h", "bias")
    return {
        "LSTM_0.weight_ih_l0": gates("i", "kernel"),
        "LSTM_0.weight_hh_l0": gates("h", "kernel"),
        "LSTM_0.bias_ih_l0": np.zeros_like(bias),
        "LSTM_0.bias_hh_l0": bias,
        "Dense_0.weight": np.asarray(last["kernel"]).T,
        "Dense_0.bias": np.asarray(last["bias"]),
    }


def prepare(model: str, batch: int | None) -> dict[str, Any]:
    """Weights, data and the float64 reference of a model, as flat arrays for an npz file.

    The batch is "batch/0", "batch/1", ... Where PyTorch's network has other names or shapes, its weights are given,
    too: "torch/NAME".
    """
    problem = PROBLEMS[model]
    n = batch or problem.batch
    if n % problem.chunk:
        raise ValueError(f"batch must be a multiple of {problem.chunk} for {model}, got {n}")
    init_key, data_key = jax.random.split(jax.random.key(0))
    own: dict[str, np.ndarray] = {}
    if model == "cifar":
        own = torchcfm_weights()
        params = convert.from_torch(own, (32, 32, 3))
    elif problem.members is not None:
        params = jax.vmap(problem.init)(jax.random.split(init_key, problem.members))
    else:
        params = problem.init(init_key)
    if model == "lstm":
        own = lstm_weights(params)
    data = problem.draw(data_key, n)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(float) if jnp.issubdtype(x.dtype, jnp.floating) else x, (params, data))
        exact = of_members(problem, *wide)
    flat = {f"params/{name}": np.asarray(value) for name, value in flatten_dict(params, sep="/").items()}
    flat |= {f"torch/{name}": value for name, value in own.items()}
    flat |= {f"batch/{k}": np.asarray(x) for k, x in enumerate(data)}
    about = {"chunk": problem.chunk, "groups": problem.groups or 1, "model": model}
    return flat | {name: np.asarray(x) for name, x in exact.items()} | about
