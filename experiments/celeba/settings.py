"""What decides the numbers of a run: presets by size of the images and by device, and the command line over them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fvjax import nets
from fvjax.interpolants import Interpolant, brownian_bridge, constant_noise
from fvjax.types import Model

INTERPOLANTS: dict[str, Callable[..., Interpolant]] = {"constant": constant_noise, "bridge": brownian_bridge}
"""Values of --interpolant."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run, after preset, data and command line are put together."""

    data: str
    ot_source: str
    dims: tuple[int, int, int]
    pairs: int
    held_out: int
    network: str
    options: dict[str, Any]
    interpolant: str
    coupling: str
    steps: int
    batch: int
    learning_rate: float
    warmup: int
    ema_decay: float
    log_every: int
    save_every: int
    probes: int
    curve: int
    solver: str
    solver_steps: int | None
    start: str
    chunk: int
    minimiser_sources: int
    seed: int

    def model(self) -> Model:
        """The network.

        Raises:
            ValueError: if it cannot take images of this size.
        """
        return NETWORKS[self.network](self.dims, **self.options)

    def interpolant_of(self, sigma: float) -> Interpolant:
        """The interpolant at one sigma; all sigmas share one compilation."""
        return INTERPOLANTS[self.interpolant](jnp.asarray(sigma, jnp.float32))

    def solver_options(self) -> dict[str, Any]:
        """Options of `flows.transport` for the main results."""
        return solver_options(self.solver, self.solver_steps)


def solver_options(solver: str, steps: int | None) -> dict[str, Any]:
    """Options of `flows.transport`: fixed steps, or a tolerance where there are none."""
    if steps is None:
        return {"solver": solver, "rtol": TOLERANCE, "atol": TOLERANCE, "max_steps": 100_000}
    return {"solver": solver, "steps": steps}


TOLERANCE = 1e-4
"""Of adaptive solvers: far below the distances that are reported."""

NETWORKS: dict[str, Callable[..., Model]] = {"mlp": nets.mlp, "unet": nets.unet, "transformer": nets.transformer}
"""Values of --net."""

SMALL = 256
"""Images of at most so many pixels count as small."""

SMALL_OPTIONS: dict[str, dict[str, Any]] = {
    "mlp": {"width": 512, "depth": 3},
    "unet": {"channels": 32, "res_blocks": 1, "multipliers": (1, 2), "attention": (), "head_channels": None},
    "transformer": {"patch": 2, "width": 128, "depth": 4, "heads": 4},
}
LARGE_OPTIONS: dict[str, dict[str, Any]] = {
    "mlp": {"width": 1024, "depth": 4},
    "unet": {
        "channels": 32,
        "res_blocks": 1,
        "multipliers": (1, 2, 2, 2),
        "attention": (),
        "heads": 4,
        "head_channels": None,
    },
    "transformer": {"patch": 8, "width": 256, "depth": 6, "heads": 4},
}
GPU_OPTIONS: dict[str, dict[str, Any]] = {
    "mlp": {"width": 2048, "depth": 6},
    "unet": {"channels": 128, "res_blocks": 2, "multipliers": (1, 2, 2, 2), "attention": (16,)},
    "transformer": {"patch": 4, "width": 384, "depth": 12, "heads": 6},
}
"""The U-Net of the paper's CIFAR-10 experiment; it does not give the one of its CelebA experiment."""

SMOKE_OPTIONS: dict[str, dict[str, Any]] = {
    "mlp": {"width": 16, "depth": 1},
    "unet": {"channels": 8, "res_blocks": 1, "multipliers": (1, 2), "attention": (), "heads": 1, "head_channels": None},
    "transformer": {"patch": 4, "width": 16, "depth": 1, "heads": 1},
}

SMALL_PRESET: dict[str, Any] = {
    "pairs": 200,
    "held_out": 200,
    "network": "mlp",
    "steps": 4000,
    "batch": 256,
    "learning_rate": 1e-3,
    "warmup": 500,
    "ema_decay": 0.999,
    "probes": 256,
    "curve": 200,
    "chunk": 500,
    "minimiser_sources": 200,
}
"""Minutes on 2 cores at 8 x 8 pixels."""

LARGE_PRESET: dict[str, Any] = SMALL_PRESET | {
    "network": "unet",
    "steps": 2000,
    "batch": 16,
    "warmup": 200,
    "probes": 32,
    "curve": 16,
    "chunk": 16,
    "minimiser_sources": 64,
}
"""Larger images without a GPU: hours, and far too short to memorize anything; it shows that all works."""

GPU_PRESET: dict[str, Any] = LARGE_PRESET | {
    "pairs": 5000,
    "held_out": 1000,
    "steps": 100_000,
    "batch": 64,
    "learning_rate": 2e-4,
    "warmup": 5000,
    "ema_decay": 0.9999,
    "probes": 64,
    "curve": 100,
    "chunk": 100,
    "minimiser_sources": 256,
}
"""The paper's 5,000 pairs; batch, rate and averaging are those of its CIFAR-10 experiment as far as it gives them."""

SMOKE: dict[str, Any] = {
    "pairs": 16,
    "held_out": 8,
    "steps": 6,
    "batch": 8,
    "probes": 8,
    "curve": 8,
    "chunk": 16,
    "minimiser_sources": 8,
}


def preset_of(dims: tuple[int, int, int], network: str | None, *, smoke: bool) -> dict[str, Any]:
    """The preset for images of these dimensions on this machine.

    Args:
        dims: (h, w, c).
        network: a name of NETWORKS; None for the preset's own.
        smoke: toy sizes.
    """
    small = dims[0] * dims[1] <= SMALL
    gpu = jax.default_backend() != "cpu"
    values = dict(SMALL_PRESET if small else GPU_PRESET if gpu else LARGE_PRESET)
    if network is not None:
        values["network"] = network
    tables = SMALL_OPTIONS if small else GPU_OPTIONS if gpu else LARGE_OPTIONS
    if smoke:
        values |= SMOKE
        tables = SMOKE_OPTIONS
    if values["network"] == "unet" and network == "unet" and small:
        values |= {"batch": min(values["batch"], 64)}
    return values | {"options": tables[values["network"]]}


def log_and_save(steps: int) -> tuple[int, int]:
    """Steps between two rows of metrics (20 rows a run, or more) and between two checkpoints."""
    log_every = min(max(1, steps // 20), 1000)
    return log_every, 5 * log_every
