"""Velocity networks as `Model(init, apply)`: Flax Linen inside, two pure functions and plain dicts outside.

Parameters of PyTorch's U-Net and parameters in files: `fvjax.nets.convert`, which is imported on its own.
"""

from fvjax.nets.adapters import from_equinox as from_equinox
from fvjax.nets.adapters import from_nnx as from_nnx
from fvjax.nets.mlp import mlp as mlp
from fvjax.nets.transformer import transformer as transformer
from fvjax.nets.unet import unet as unet
