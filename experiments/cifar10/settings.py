"""What a preset stands for, and which one this machine can run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from fvjax import data, nets
from fvjax.types import Model


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run, after preset, data and command line are put together."""

    preset: str
    data: str
    dims: tuple[int, int, int]
    images: int
    flip: bool
    network: dict[str, Any]
    sigma: float
    coupling: str
    steps: int
    batch: int
    learning_rate: float
    warmup: int
    schedule: str
    ema_decay: float
    micro_batches: int
    precision: str
    log_every: int
    save_every: int
    probes: int
    samples: int
    euler: tuple[int, ...]
    tolerance: float
    seed: int

    def model(self) -> Model:
        """The U-Net."""
        return nets.unet(self.dims, **self.network)


@dataclass(frozen=True)
class Rounds:
    """What ReFlow adds to the settings: the number of rounds, and of the pairs that each later round trains on."""

    rounds: int
    pairs: int


PAIRS = {"paper": 50_000, "cpu": 2000}
"""Pairs by preset; as few as there are samples where images are large (CPU_LARGE) and in a smoke run."""

PAPER: dict[str, Any] = {
    "network": {
        "channels": 128,
        "res_blocks": 2,
        "multipliers": (1, 2, 2, 2),
        "attention": (16,),
        "heads": 4,
        "head_channels": 64,
        "dropout": 0.1,
    },
    "steps": 400_001,
    "batch": 128,
    "learning_rate": 2e-4,
    "warmup": 5000,
    "schedule": "constant",
    "ema_decay": 0.9999,
    "log_every": 500,
    "save_every": 20_000,
    "probes": 128,
    "samples": 50_000,
}
"""Reu et al. 2025, CIFAR-10."""

CPU: dict[str, Any] = {
    "network": {
        "channels": 32,
        "res_blocks": 1,
        "multipliers": (1, 2),
        "attention": (),
        "heads": 4,
        "head_channels": None,
        "dropout": 0.0,
    },
    "steps": 2000,
    "batch": 64,
    "learning_rate": 1e-3,
    "warmup": 200,
    "schedule": "cosine",
    "ema_decay": 0.999,
    "log_every": 100,
    "save_every": 500,
    "probes": 64,
    "samples": 1000,
}
"""Minutes on 2 cores at 8 x 8 pixels."""

CPU_LARGE: dict[str, Any] = {"batch": 16, "samples": 200}
"""Instead, for images of more than LARGE pixels: still minutes at 32 x 32."""
LARGE = 256

SMOKE: dict[str, Any] = {
    "network": {
        "channels": 8,
        "multipliers": (1,),
        "attention": (),
        "res_blocks": 1,
        "heads": 1,
        "head_channels": None,
    },
    "steps": 6,
    "batch": 8,
    "log_every": 2,
    "probes": 8,
    "samples": 16,
}


def find_data(preset: str, source: str, data_dir: Path | None) -> tuple[str, data.Images, str]:
    """The preset, the images and a sentence about how they were chosen.

    Args:
        preset: "auto", "paper" or "cpu".
        source: "auto", or as in `data.load`.
        data_dir: of tensorflow-datasets.

    Raises:
        DataError: if the data that were asked for cannot be read.
    """
    gpu = jax.default_backend() != "cpu"
    if source == "auto" and preset == "cpu":
        return "cpu", data.load("digits"), "preset cpu: scikit-learn's 8x8 digits"
    named = "cifar10" if source == "auto" else source
    if preset != "auto":
        return preset, _load(named, data_dir), f"preset {preset}"
    if not gpu and source == "auto":
        return (
            "cpu",
            data.load("digits"),
            ("no GPU: preset cpu, a small U-Net on scikit-learn's 8x8 digits, NOT CIFAR-10 (--preset paper for that)"),
        )
    try:
        images = _load(named, data_dir)
    except data.DataError as error:
        if source != "auto":
            raise
        return "cpu", data.load("digits"), f"no CIFAR-10: preset cpu on scikit-learn's 8x8 digits instead ({error})"
    if gpu:
        return "paper", images, "a GPU: preset paper"
    return "cpu", images, "no GPU: preset cpu, a small U-Net"


def _load(source: str, data_dir: Path | None) -> data.Images:
    if source in {"cifar10", "celeba"}:
        return data.load(source, data_dir=data_dir)
    return data.load(source)
