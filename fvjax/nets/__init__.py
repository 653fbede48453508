"""Velocity networks as `Model(init, apply)`: Flax Linen inside, two pure functions and plain dicts outside."""

from fvjax.nets.mlp import mlp as mlp
