"""The contenders in PyTorch, eager: torch.func, Opacus and BackPACK. A worker's program (see _worker.py).

The layers bear the names that Flax gives them, so that `copied` finds the weights; images are NCHW here.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _worker import Contender, serve
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Tensor, Tensor, Tensor]
Arrays = dict[str, np.ndarray]


class Network(nn.Module):
    """As in _jax_contenders."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (65, 512, 512, 512, 512, 64)
        for k in range(5):
            self.add_module(f"Dense_{k}", nn.Linear(sizes[k], sizes[k + 1]))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Velocities of a batch."""
        *hidden, last = self.children()
        x = torch.cat([x, t[:, None]], dim=1)
        for layer in hidden:
            x = functional.silu(layer(x))
        return last(x)


def norm(channels: int) -> nn.GroupNorm:
    """With the epsilon of Flax."""
    return nn.GroupNorm(8, channels, eps=1e-6)


class Residual(nn.Module):
    """As in _jax_contenders."""

    def __init__(self, before: int, channels: int) -> None:
        super().__init__()
        self.GroupNorm_0 = norm(before)
        self.Conv_0 = nn.Conv2d(before, channels, 3, padding=1)
        self.Dense_0 = nn.Linear(128, channels)
        self.GroupNorm_1 = norm(channels)
        self.Conv_1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.Conv_2 = nn.Conv2d(before, channels, 1) if before != channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """[n, c, h, w] -> [n, channels, h, w]."""
        h = self.Conv_0(functional.silu(self.GroupNorm_0(x)))
        h = h + self.Dense_0(embedding)[:, :, None, None]
        return self.Conv_2(x) + self.Conv_1(functional.silu(self.GroupNorm_1(h)))


class Attention(nn.Module):
    """As in _jax_contenders."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.GroupNorm_0 = norm(channels)
        self.Dense_0, self.Dense_1, self.Dense_2, self.Dense_3 = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[n, c, h, w] -> [n, c, h, w]."""
        tokens = self.GroupNorm_0(x).flatten(2).transpose(1, 2)
        query, key, value = self.Dense_0(tokens), self.Dense_1(tokens), self.Dense_2(tokens)
        weights = torch.softmax(query @ key.transpose(1, 2) / math.sqrt(x.shape[1]), dim=-1)
        return x + self.Dense_3(weights @ value).transpose(1, 2).reshape(x.shape)


class UNet(nn.Module):
    """As in _jax_contenders."""

    def __init__(self) -> None:
        super().__init__()
        self.Dense_0 = nn.Linear(64, 128)
        self.Conv_0 = nn.Conv2d(3, 64, 3, padding=1)
        self.Residual_0 = Residual(64, 64)
        self.Conv_1 = nn.Conv2d(64, 128, 3, stride=2, padding=1)
        self.Residual_1 = Residual(128, 128)
        self.Attention_0 = Attention(128)
        self.Residual_2 = Residual(128, 128)
        self.Conv_2 = nn.Conv2d(128, 64, 3, padding=1)
        self.Residual_3 = Residual(128, 64)
        self.GroupNorm_0 = norm(64)
        self.Conv_3 = nn.Conv2d(64, 3, 3, padding=1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """[n, 3, h, w] -> [n, 3, h, w]."""
        angles = torch.exp(torch.linspace(0, 4, 32)) * t[:, None]
        embedding = functional.silu(self.Dense_0(torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)))
        skip = self.Residual_0(self.Conv_0(x), embedding)
        h = self.Residual_1(self.Conv_1(skip), embedding)
        h = self.Residual_2(self.Attention_0(h), embedding)
        h = self.Conv_2(functional.interpolate(h, scale_factor=2, mode="nearest"))
        h = self.Residual_3(torch.cat([h, skip], dim=1), embedding)
        return self.Conv_3(functional.silu(self.GroupNorm_0(h)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"mlp": Network, "unet": UNet}


def copied(arrays: Arrays) -> tuple[nn.Module, Batch]:
    """The network with the weights of Flax, and the batch."""
    name = str(arrays["model"])
    if name not in NETWORKS:
        raise NotImplementedError(f"no PyTorch version of {name}")
    layout = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}  # vectors; Dense [in, out]; Conv [h, w, in, out]
    state = {}
    for key in (key for key in arrays if key.startswith("params/")):
        *layers, kind = key.split("/")[1:]
        value = torch.tensor(arrays[key].transpose(layout[arrays[key].ndim])).contiguous()
        state[".".join([*layers, "bias" if kind == "bias" else "weight"])] = value
    network = NETWORKS[name]()
    network.load_state_dict(state)
    t, x, target = (torch.tensor(arrays[key]) for key in ("t", "x", "target"))
    if x.ndim == 4:
        x, target = (image.permute(0, 3, 1, 2).contiguous() for image in (x, target))
    return network, (t, x, target)


def backward(network: nn.Module, batch: Batch) -> Tensor:
    """Mean loss of the batch, after the backward pass."""
    t, x, target = batch
    loss = (network(t, x) - target).square().sum() / len(t)
    loss.backward()
    return loss.detach()


def spread(gradients: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Mean gradient and sum of squared deviations, in two passes."""
    mean = [g.mean(0) for g in gradients]
    return mean, torch.stack([(g - m).square().sum() for g, m in zip(gradients, mean, strict=True)]).sum()


def torch_func(network: nn.Module, batch: Batch, chunk: int) -> Callable[[], float]:
    """vmap(grad) in chunks, whose moments are merged; one chunk if it is as long as the batch."""
    weights = {name: p.detach() for name, p in network.named_parameters()}

    def loss(weights: dict[str, Tensor], t: Tensor, x: Tensor, target: Tensor) -> Tensor:
        return (torch.func.functional_call(network, weights, (t[None], x[None])) - target).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))

    def of_chunk(piece: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor]:
        return spread(list(gradients(weights, *piece).values()))

    def call() -> float:
        means, m2 = zip(*map(of_chunk, zip(*(x.split(chunk) for x in batch), strict=True)), strict=True)
        _, between = spread([torch.stack(leaf) for leaf in zip(*means, strict=True)])
        return float(sum(m2) + chunk * between) / len(batch[0])

    return call


def opacus_norms(network: nn.Module, batch: Batch, *, ghost: bool) -> Callable[[], float]:
    """Squared norms from the gradients of every example, or layer by layer without keeping these."""
    from opacus import grad_sample

    if ghost:
        ghosts = grad_sample.GradSampleModuleFastGradientClipping(network, use_ghost_clipping=True)

        def call_ghosts() -> float:
            backward(ghosts, batch)
            return float(ghosts.get_norm_sample().square().mean())

        return call_ghosts
    samples = grad_sample.GradSampleModule(network)

    def call() -> float:
        backward(samples, batch)
        squares = [p.grad_sample.flatten(1).square().sum(1) for p in network.parameters()]
        return float(torch.stack(squares).sum(0).mean())

    return call


def backpack_sums(network: nn.Module, batch: Batch, kind: str) -> Callable[[], list[Tensor]]:
    """What an extension of BackPACK stores; its gradients are those of loss / n."""
    import backpack
    from backpack import extensions

    extension, field = {
        "backpack_l2": (extensions.BatchL2Grad, "batch_l2"),
        "backpack_squares": (extensions.SumGradSquared, "sum_grad_squared"),
        "backpack_variance": (extensions.Variance, "variance"),
    }[kind]
    extended = backpack.extend(network)

    def call() -> list[Tensor]:
        with backpack.backpack(extension()):
            backward(extended, batch)
        without = {type(m).__name__ for m in network.modules() for p in m._parameters.values() if not hasattr(p, field)}
        if without:
            raise NotImplementedError(f"BackPACK has no {field} for {', '.join(without)}")
        return [getattr(p, field) for p in network.parameters()]

    return call


def clear(network: nn.Module) -> None:
    """Drops gradients and what the libraries hang onto the parameters, so that every call starts alike."""
    fields = ("grad", "grad_sample", "_norm_sample", "batch_l2", "sum_grad_squared", "variance")
    for parameter in network.parameters():
        for field in filter(partial(hasattr, parameter), fields):
            setattr(parameter, field, None)


def total(parts: list[Tensor]) -> float:
    """Sum of all elements, in float64."""
    return sum(part.double().sum().item() for part in parts)


def build(name: str, file: Path) -> Contender:
    """A contender on as many threads as the process may use cores (PyTorch's default)."""
    with np.load(file) as stored:
        arrays = dict(stored)
    network, batch = copied(arrays)
    n = len(batch[0])
    calls: dict[str, Callable[[], Callable[[], Any]]] = {
        "plain": lambda: partial(backward, network, batch),
        "func": lambda: torch_func(network, batch, n),
        "func_chunked": lambda: torch_func(network, batch, int(arrays["chunk"])),
        "opacus_samples": lambda: opacus_norms(network, batch, ghost=False),
        "opacus_ghost": lambda: opacus_norms(network, batch, ghost=True),
    }
    values: dict[str, Callable[[Any], float]] = {
        "backpack_l2": lambda parts: n * total(parts),
        "backpack_squares": lambda parts: n * total(parts),
        "backpack_variance": lambda parts: n * n * total(parts),
    }
    call = calls[name]() if name in calls else backpack_sums(network, batch, name)
    return Contender(call, values.get(name, float), lambda: clear(network), {})


if __name__ == "__main__":
    serve(build)
