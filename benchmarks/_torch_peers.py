"""The contenders in PyTorch, eager: torch.func, Opacus and BackPACK. A worker's program (see _worker.py).

The layers bear the names that Flax gives them, so that `copied` finds the weights; images are NCHW here.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _worker import Contender, serve
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Tensor, ...]
"""What the network takes, and last the target of its output."""
Arrays = dict[str, np.ndarray]


class Network(nn.Module):
    """As in _problems."""

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
    """As in _problems."""

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
    """As in _problems."""

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
    """As in _problems."""

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


def torchcfm_unet() -> nn.Module:
    """The network of torchcfm's CIFAR-10 example, without dropout, as fvjax.nets.unet is by default."""
    from torchcfm.models.unet.unet import UNetModelWrapper

    sizes = {"num_channels": 128, "num_res_blocks": 2, "channel_mult": [1, 2, 2, 2]}
    return UNetModelWrapper(dim=(3, 32, 32), **sizes, num_heads=4, num_head_channels=64, attention_resolutions="16")


class Embedding(nn.Module):
    """As in _problems."""

    def __init__(self) -> None:
        super().__init__()
        self.Embed_0 = nn.Embedding(20_000, 64)
        self.Dense_0 = nn.Linear(64, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l] -> [n, l, 3]."""
        return self.Dense_0(functional.silu(self.Embed_0(tokens)))


class Recurrent(nn.Module):
    """As in _problems, without a derivative for the second bias that PyTorch has."""

    def __init__(self, cell: Callable[..., nn.Module] = nn.LSTM) -> None:
        super().__init__()
        self.LSTM_0 = cell(64, 64, batch_first=True)
        self.Dense_0 = nn.Linear(64, 3)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("bias_ih" not in name and "ih.bias" not in name)

    def forward(self, x: Tensor) -> Tensor:
        """[n, steps, features] -> [n, 3]."""
        return self.Dense_0(self.LSTM_0(x)[0][:, -1])


class Scaled(nn.Linear):
    """As in _problems."""

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs] -> [n, outputs]."""
        return functional.linear(x, self.weight / math.sqrt(self.in_features), self.bias)


class Masked(nn.Linear):
    """As in _problems. The mask is no buffer: Opacus refuses layers with these."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        before, after = (torch.arange(size) * 63 // size for size in (inputs, outputs))
        self.mask = (after[:, None] >= before).float()

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs] -> [n, outputs]."""
        return functional.linear(x, self.weight * self.mask, self.bias)


class Perceptron(nn.Module):
    """As in _problems."""

    def __init__(self, layer: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.Dense_0, self.Dense_1, self.Dense_2 = layer(64, 256), layer(256, 256), layer(256, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 64] -> [n, 3]."""
        x = functional.silu(self.Dense_0(x))
        return self.Dense_2(functional.silu(self.Dense_1(x)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": Network,
    "unet": UNet,
    "cifar": torchcfm_unet,
    "embedding": Embedding,
    "lstm": Recurrent,
    "scaled": partial(Perceptron, Scaled),
    "masked": partial(Perceptron, Masked),
    "groups10": Perceptron,
    "groups32": Perceptron,
    "groups33": Perceptron,
}


def opacus_lstm() -> nn.Module:
    """The recurrent network with the layer that Opacus has for it."""
    from opacus.layers import DPLSTM

    return Recurrent(DPLSTM)


def state_of(arrays: Arrays) -> dict[str, Tensor]:
    """The weights by PyTorch's names, from these or from those of Flax."""
    own = {name.removeprefix("torch/"): torch.tensor(x) for name, x in arrays.items() if name.startswith("torch/")}
    if own:
        return own
    layout = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}  # vectors; Dense [in, out]; Conv [h, w, in, out]
    state = {}
    for key in (key for key in arrays if key.startswith("params/")):
        *layers, kind = key.split("/")[1:]
        axes = (0, 1) if kind == "embedding" else layout[arrays[key].ndim]
        value = torch.tensor(arrays[key].transpose(axes)).contiguous()
        state[".".join([*layers, "bias" if kind == "bias" else "weight"])] = value
    return state


def copied(arrays: Arrays, made: Callable[[], nn.Module]) -> tuple[nn.Module, Batch]:
    """The network with the weights of the JAX contenders, and the batch."""
    network, state = made(), state_of(arrays)
    # Opacus' LSTM asks for each of its weights by two names.
    second = {re.sub(r"(weight|bias)_(ih|hh)_l0", r"l0.\2.\1", name): x for name, x in state.items()}
    network.load_state_dict({name: x for name, x in (state | second).items() if name in network.state_dict()})
    batch = tuple(torch.tensor(arrays[f"batch/{k}"]) for k in range(sum(key.startswith("batch/") for key in arrays)))
    return network, tuple(x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x for x in batch)


def backward(network: nn.Module, batch: Batch) -> Tensor:
    """Mean loss of the batch, after the backward pass."""
    *inputs, target = batch
    loss = (network(*inputs) - target).square().sum() / len(target)
    loss.backward()
    return loss.detach()


def spread(gradients: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Mean gradient and sum of squared deviations, in two passes."""
    mean = [g.mean(0) for g in gradients]
    return mean, torch.stack([(g - m).square().sum() for g, m in zip(gradients, mean, strict=True)]).sum()


def torch_func(network: nn.Module, batch: Batch, *, chunk: int, groups: int) -> Callable[[], float]:
    """vmap(grad) in chunks, whose moments are merged; one chunk if it is as long as the batch."""
    weights = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}

    def loss(weights: dict[str, Tensor], *example: Tensor) -> Tensor:
        *inputs, target = example
        return (torch.func.functional_call(network, weights, tuple(x[None] for x in inputs)) - target).square().sum()

    of_batch = torch.func.vmap(torch.func.grad(loss), in_dims=(None, *(0 for _ in batch)))

    def gradients(piece: tuple[Tensor, ...]) -> list[Tensor]:
        return list(of_batch(weights, *piece).values())

    def call() -> float:
        pieces = list(zip(*(x.split(chunk) for x in batch), strict=True))
        if groups > 1:
            return float(grouped(gradients, pieces, groups)) / len(batch[0])
        means, m2 = zip(*(spread(gradients(piece)) for piece in pieces), strict=True)
        _, between = spread([torch.stack(leaf) for leaf in zip(*means, strict=True)])
        return float(sum(m2) + chunk * between) / len(batch[0])

    return call


def grouped(gradients: Callable[[Batch], list[Tensor]], pieces: list[Batch], groups: int) -> Tensor:
    """Sum of squared deviations from the means of groups, to which examples belong in turn, in two passes."""
    by = (torch.arange(sum(len(piece[0]) for piece in pieces)) % groups).split(len(pieces[0][0]))
    counts = torch.bincount(torch.cat(by), minlength=groups)
    totals: list[Tensor] = []
    for own, piece in zip(by, pieces, strict=True):
        found = gradients(piece)
        totals = totals or [torch.zeros(groups, *g.shape[1:]) for g in found]
        totals = [total.index_add_(0, own, g) for total, g in zip(totals, found, strict=True)]
    means = [total / counts.reshape(-1, *[1] * (total.ndim - 1)) for total in totals]
    deviations = [
        (g - mean[own]).square().sum()
        for own, piece in zip(by, pieces, strict=True)
        for g, mean in zip(gradients(piece), means, strict=True)
    ]
    return torch.stack(deviations).sum()


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
    model = str(arrays["model"])
    if model not in NETWORKS:
        raise NotImplementedError(f"no PyTorch version of {model}")
    special = model == "lstm" and name.startswith("opacus")
    network, batch = copied(arrays, opacus_lstm if special else NETWORKS[model])
    n, groups = len(batch[0]), int(arrays["groups"])
    calls: dict[str, Callable[[], Callable[[], Any]]] = {
        "plain": lambda: partial(backward, network, batch),
        "func": lambda: torch_func(network, batch, chunk=n, groups=groups),
        "func_chunked": lambda: torch_func(network, batch, chunk=int(arrays["chunk"]), groups=groups),
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
