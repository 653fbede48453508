"""The architectures, their sizes, and one compiled training step for each of them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import compiled_quickly
from fvjax import flows, gaussian, gradients, losses, nets, training
from fvjax.interpolants import Interpolant
from fvjax.types import AffineMap, Array, Key, Model, Pair, Params, PathSample, Scalar

Row = dict[str, Any]

NETWORKS = ("mlp", "unet", "transformer", "affine")
"""Values of --networks. The affine field of Lemma 1 has one size, and takes part in the Gaussian task alone."""

Draw = Callable[[Key, Any, int], Pair]
"""(key, what a task holds, number of pairs) -> that many pairs."""


class Size(NamedTuple):
    """One network; hashable.

    Attributes:
        network: one of `NETWORKS`.
        width: units of an MLP's layers, channels of a U-Net, features of a transformer's tokens; affine field: 0.
        depth: residual blocks of an MLP or a transformer, or of each of the U-Net's levels.
        levels: of the U-Net, each with half the pixels of a side and twice the channels.
    """

    network: str
    width: int = 0
    depth: int = 0
    levels: int = 2

    @property
    def label(self) -> str:
        """Such as mlp_64x2; a part of file names."""
        return self.network if self.network == "affine" else f"{self.network}_{self.width}x{self.depth}"

    @property
    def learning_rate(self) -> float:
        """The peak of Adam's rate: an entry of Theta travels 1.5 and more, which takes 1e-3 all of 4000 steps."""
        return 1e-2 if self.network == "affine" else 1e-3

    def model(self, dims: tuple[int, int, int]) -> Model:
        """The network for one image of the shape `dims`.

        Raises:
            ValueError: if there is none of this size.
        """
        if self.network == "affine":
            return affine_model(dims)
        if self.network == "mlp":
            return nets.mlp(dims, width=self.width, depth=self.depth)
        if self.network == "transformer":
            return nets.transformer(dims, patch=2, width=self.width, depth=self.depth, heads=4)
        return nets.unet(
            dims,
            channels=self.width,
            res_blocks=self.depth,
            multipliers=tuple(2**level for level in range(self.levels)),
            attention=(),
            heads=1,
            head_channels=None,
        )


@functools.cache
def affine_model(dims: tuple[int, int, int]) -> Model:
    """The affine field of Lemma 1 on flattened images; it begins at Theta = 0, theta = 0, where nothing moves."""
    dim = int(np.prod(dims))

    def init(key: Key) -> Params:
        del key  # the start is not random
        return AffineMap(jnp.zeros((dim, dim)), jnp.zeros(dim))

    def apply(params: Params, t: Scalar, x: Array) -> Array:
        return gaussian.affine_field(params, t, x.reshape(-1)).reshape(x.shape)

    return Model(init, apply)


class Task(NamedTuple):
    """What a training step is given: what the pairs are drawn from and how they are joined; sigma is traced."""

    source: Any
    interpolant: Interpolant


class Trainer(NamedTuple):
    """A network with its optimiser's step; made once for a size, so that all tasks of it share one compilation."""

    model: Model
    first_state: Callable[[Key], training.TrainState]
    step: training.TrainStep


@functools.cache
def make_trainer(size: Size, dims: tuple[int, int, int], draw: Draw, steps: int, batch: int) -> Trainer:  # noqa: PLR0917
    """The trainer of one size for runs of `steps` steps, whose batches come from `draw`."""
    model = size.model(dims)
    optimizer = training.adam(steps, learning_rate=size.learning_rate)

    def step(state: training.TrainState, task: Task) -> tuple[training.TrainState, Array]:
        pairs = draw(jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step), task.source, batch)
        return training.make_train_step(model.apply, task.interpolant, optimizer)(state, pairs)

    return Trainer(model, compiled_quickly(lambda key: training.init_state(key, model, optimizer)), step)


def count_parameters(params: Params) -> int:
    """Numbers in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def variance_of(field: Any, params: Params, probe: PathSample) -> dict[str, Array]:
    """Total variance of the gradient of the loss that is trained, over the probe, and its noise scale."""
    moments = gradients.gradient_moments(losses.squared_error(field, reduction="mean"), params, probe)
    return {
        "gradient_variance": gradients.total_variance(moments),
        "gradient_noise_scale": gradients.gradient_noise_scale(moments),
    }


def carried(field: Any, params: Params, x0: Array, *, solver: str, steps: int | None = None) -> Array:
    """Where the flow takes each source, [n, *dims]; nan where the solve failed. To be called under `jit`."""
    return jax.vmap(lambda x: flows.transport(field, params, x, solver=solver, steps=steps))(x0)
