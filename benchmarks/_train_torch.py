"""The training step of torchcfm's CIFAR-10 example in PyTorch, eager, and its parts: a worker's program (_worker.py).

Written anew after the example's settings; neither torch.compile nor a fused Adam, which the example does not use.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _worker import resident, serve_parts, started, timed
from torch import Tensor, nn
from torch.nn import functional
from torchcfm.models.unet.unet import UNetModelWrapper


class Training:
    """The network in training mode, Adam with a linear warm-up, and the average of the parameters."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.settings = settings
        options, (height, width, colours) = settings["network"], settings["dims"]
        self.network = UNetModelWrapper(
            dim=(colours, height, width),
            num_channels=options["channels"],
            num_res_blocks=options["res_blocks"],
            channel_mult=options["multipliers"],
            num_heads=options["heads"],
            num_head_channels=options["head_channels"],
            attention_resolutions=",".join(map(str, options["attention"])),
            dropout=options["dropout"],
        ).train()
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=settings["learning_rate"])
        warmup = settings["warmup"]
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(step, warmup) / warmup)
        pixels = np.random.default_rng(0).integers(0, 256, (settings["batch"], *settings["dims"]), np.uint8)
        self.x1 = torch.tensor(pixels).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
        self.path = self.draw()

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """t, x_t = (1 - t) x0 + t x1 and the target x1 - x0 of the batch."""
        x0 = torch.randn_like(self.x1)
        t = torch.rand(len(x0))
        share = t[:, None, None, None]
        return t, (1 - share) * x0 + share * self.x1, self.x1 - x0

    def backward(self, path: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Loss of the batch, after the backward pass."""
        t, x, target = path
        self.optimizer.zero_grad()
        loss = functional.mse_loss(self.network(t, x), target)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Clips the gradient, and updates the parameters and their average."""
        nn.utils.clip_grad_norm_(self.network.parameters(), self.settings["clip"])
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            for mean, parameter in zip(self.average.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(parameter, 1 - self.settings["ema_decay"])

    def step(self) -> float:
        """One training step."""
        loss = self.backward(self.draw())
        self.update()
        return float(loss)

    def gradient(self, *, dropout: bool) -> Tensor:
        """Loss and gradient at fixed paths."""
        self.network.train(dropout)
        loss = self.backward(self.path)
        self.network.train()
        return loss

    def forward(self) -> Tensor:
        """Loss at fixed paths, without dropout and without what a backward pass needs."""
        t, x, target = self.path
        self.network.eval()
        with torch.no_grad():
            loss = functional.mse_loss(self.network(t, x), target)
        self.network.train()
        return loss

    def dropout_shapes(self) -> list[torch.Size]:
        """Shapes of all that goes into a dropout layer."""
        shapes: list[torch.Size] = []
        layers = [layer for layer in self.network.modules() if isinstance(layer, nn.Dropout)]
        hooks = [layer.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape)) for layer in layers]
        self.forward()
        for hook in hooks:
            hook.remove()
        return shapes


def build(_: str, settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[str], Any]]:
    """A training process that has made its first steps; then the seconds of the part that is asked for."""
    base = resident("VmRSS")
    training = Training(settings)
    facts: dict[str, Any] = dict(started(training.step, base))
    facts["threads"] = torch.get_num_threads()
    facts["parameters"] = sum(p.numel() for p in training.network.parameters())
    shapes = training.dropout_shapes()
    facts["dropout_elements"] = sum(shape.numel() for shape in shapes)
    rate, ones = settings["network"]["dropout"], [torch.ones(shape) for shape in shapes]
    parts: dict[str, Callable[[], Any]] = {
        "step": training.step,
        "gradient_dropout": lambda: training.gradient(dropout=True),
        "gradient": lambda: training.gradient(dropout=False),
        "forward": training.forward,
        "dropout": lambda: [functional.dropout(x, rate) for x in ones],
        "update": training.update,  # of the gradient that is there from the part before
    }
    return facts, lambda part: {"seconds": timed(parts[part])}


if __name__ == "__main__":
    serve_parts(build)
