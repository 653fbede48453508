"""The cases: what is paired with what, how many pairs there are, with which noise which network is trained on them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import couplings, data, nets
from fvjax.data import ot_benchmark
from fvjax.types import Key, Model, Pair

ANGLE = 150.0
"""Degrees by which the Gaussian sources are turned where their coupling is "rotated"."""

SHIFT = 5.0
"""Every coordinate of the Gaussian targets is moved by so much."""

HELD_OUT = 150
"""Pairs of the same coupling that training does not see and the audit does."""

FRESH = 150
"""Optimal pairs that neither of them sees: the truth is measured on them."""


class Case(NamedTuple):
    """One trained network; hashable.

    Attributes:
        problem: "rotation" (N(0, I) to N(5, I) in two dimensions) or "digits" (blurred 8x8 digits to digits).
        coupling: "optimal", "shuffled" (the optimal pairs deranged once) or "rotated" (the sources turned by `ANGLE`).
        pairs: number of training pairs, which stay fixed.
        sigma: constant noise of the interpolant.
        network: "mlp" or "unet".
    """

    problem: str
    network: str
    coupling: str
    pairs: int
    sigma: float

    @property
    def name(self) -> str:
        """Such as digits-mlp-shuffled-200-sigma0.5; a part of file names."""
        return f"{self.problem}-{self.network}-{self.coupling}-{self.pairs}-sigma{self.sigma:g}"


CASES = (
    Case("rotation", "mlp", "rotated", 1000, 0.0),
    Case("rotation", "mlp", "rotated", 1000, 0.5),
    Case("rotation", "mlp", "rotated", 100, 0.0),
    Case("rotation", "mlp", "optimal", 1000, 0.0),
    Case("digits", "mlp", "shuffled", 50, 0.0),
    Case("digits", "mlp", "shuffled", 50, 1.0),
    Case("digits", "mlp", "shuffled", 200, 0.0),
    Case("digits", "mlp", "shuffled", 200, 1.0),
    Case("digits", "mlp", "shuffled", 1000, 0.0),
    Case("digits", "mlp", "shuffled", 1000, 1.0),
    Case("digits", "mlp", "optimal", 50, 0.0),
    Case("digits", "mlp", "optimal", 200, 0.0),
    Case("digits", "mlp", "optimal", 200, 1.0),
    Case("digits", "mlp", "optimal", 1000, 0.0),
    Case("digits", "unet", "shuffled", 50, 0.0),
    Case("digits", "unet", "shuffled", 50, 1.0),
    Case("digits", "unet", "shuffled", 200, 0.0),
    Case("digits", "unet", "shuffled", 200, 1.0),
    Case("digits", "unet", "optimal", 50, 0.0),
    Case("digits", "unet", "optimal", 200, 0.0),
)
"""Chosen before the first audit; all of them are in every table."""

BY_NAME = {case.name: case for case in CASES}


class Recipe(NamedTuple):
    """How a network of a problem is made and trained; hashable.

    Attributes:
        factory: of `fvjax.nets`, with `arguments`.
        arguments: items of its keyword arguments.
        steps: of the training.
        batch: pairs of one step.
    """

    factory: str
    arguments: tuple[tuple[str, Any], ...]
    steps: int
    batch: int

    def model(self) -> Model:
        """The network."""
        factory = {"mlp": nets.mlp, "unet": nets.unet}[self.factory]
        return factory(**dict(self.arguments))  # type: ignore[operator]


_UNET = {"channels": 16, "res_blocks": 1, "multipliers": (1, 2), "attention": (), "heads": 1, "head_channels": None}
_SMALL_UNET = _UNET | {"channels": 8, "multipliers": (1,)}


def recipe_of(case: Case, *, smoke: bool) -> Recipe:
    """The network of a case: the settings with which `experiments.architectures` and `gaussian_rotation` train theirs.

    1000 digits take the MLP 6000 steps; the U-Net's convolutions leave time for 1500.
    """
    if case.problem == "rotation":
        arguments: dict[str, Any] = {"dims": 2, "width": 16 if smoke else 128, "depth": 1 if smoke else 4}
        return Recipe("mlp", tuple(arguments.items()), 20 if smoke else 10_000, 256)
    if case.network == "mlp":
        arguments = {"dims": (8, 8, 1), "width": 16 if smoke else 512, "depth": 1 if smoke else 3}
        return Recipe("mlp", tuple(arguments.items()), 20 if smoke else 6000 if case.pairs > 200 else 4000, 256)
    options = {"dims": (8, 8, 1)} | (_SMALL_UNET if smoke else _UNET)
    return Recipe("unet", tuple(options.items()), 10 if smoke else 1500, 32)


class Problem(NamedTuple):
    """The data of a case.

    Attributes:
        train: what the network is trained on.
        held_out: of the same coupling, unseen by the training; for the audit.
        optimal: targets of optimal transport of the training sources, [N, *dims]; for the truth.
        fresh: unseen pairs of the rule that the coupling follows, optimal pairs where it follows none; for the truth.
        key: of the network and its training.
    """

    train: Pair
    held_out: Pair
    optimal: np.ndarray
    fresh: Pair
    key: Key


@functools.lru_cache(maxsize=2)
def problem_of(kind: str, coupling: str, count: int, seed: int) -> Problem:
    """Draws the data; cases that differ in sigma or network share them."""
    draw_key, shuffle_key, held_key, network_key = jax.random.split(jax.random.key(seed), 4)
    total = count + HELD_OUT + FRESH
    if kind == "rotation":
        source = jax.random.normal(draw_key, (total, 2))
        optimal = Pair(source, source + SHIFT)
        turned = source @ couplings.rotation_matrix(jnp.deg2rad(ANGLE), 2).T.astype(source.dtype) + SHIFT
        rule = Pair(source, turned) if coupling == "rotated" else optimal
    else:
        optimal = rule = ot_benchmark.convex_pairs(data.load("digits"), split="train").sample(draw_key, total)
    train, held_out, fresh = (
        Pair(*(x[part] for x in rule))
        for part in (slice(count), slice(count, count + HELD_OUT), slice(count + HELD_OUT, None))
    )
    if coupling == "shuffled":
        train, held_out = couplings.shuffled(shuffle_key, *train), couplings.shuffled(held_key, *held_out)
    return Problem(train, held_out, np.asarray(optimal.x1[:count]), fresh, network_key)
