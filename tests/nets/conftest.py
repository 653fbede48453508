"""What the tests of the networks share: parameters and a batch for the MODEL of the module that asks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fvjax


@pytest.fixture(scope="module")
def params(request: pytest.FixtureRequest) -> Any:
    """Random ones; none keeps its initial zero, so that every layer matters. No initialisation is compiled."""
    generator = np.random.default_rng(7)

    def one(aval: Any) -> Any:
        return jnp.asarray(generator.normal(size=aval.shape) / np.sqrt(max(1, np.prod(aval.shape[:-1]))), aval.dtype)

    return jax.tree.map(one, jax.eval_shape(request.module.MODEL.init, jax.random.key(0)))


@pytest.fixture(scope="module")
def batch(request: pytest.FixtureRequest) -> fvjax.PathSample:
    """Three times, and images of the shape DIMS."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, *request.module.DIMS)), jnp.float32)
    return fvjax.PathSample(jnp.asarray([0.0, 0.5, 1.0], jnp.float32), x, 2 * x)
