"""Flax NNX and Equinox modules as models: the same numbers, plain params, keys, exact norms, and what is refused."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fvjax
from fvjax import nets
from fvjax.nets.convert import load_params, save_params


class NnxField(nnx.Module):
    """Two layers in a list, with dropout between them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Draws the parameters."""
        self.layers = nnx.List([nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, t: Any, x: Any) -> Any:
        """The velocity."""
        h = jnp.tanh(self.layers[0](jnp.concatenate([x, t[None]])))
        return self.layers[1](self.dropout(h))


class EquinoxField(eqx.Module):
    """The same in Equinox."""

    layers: tuple[eqx.nn.Linear, ...]
    dropout: eqx.nn.Dropout

    def __init__(self, key: Any) -> None:
        """Draws the parameters."""
        first, second = jax.random.split(key)
        self.layers = (eqx.nn.Linear(3, 8, key=first), eqx.nn.Linear(8, 2, key=second))
        self.dropout = eqx.nn.Dropout(0.5)

    def __call__(self, t: Any, x: Any, *, key: Any = None) -> Any:
        """The velocity."""
        h = jnp.tanh(self.layers[0](jnp.concatenate([x, t[None]])))
        return self.layers[1](self.dropout(h, key=key))


ADAPTERS: dict[str, tuple[Callable[..., Any], Any]] = {
    "nnx": (nets.from_nnx, NnxField),
    "equinox": (nets.from_equinox, EquinoxField),
}
X = np.array([0.5, -2.0], np.float32)
both = pytest.mark.parametrize("name", ADAPTERS)


def modules_own(name: str, key: Any, x: Any) -> Any:
    """What the module itself answers in its evaluation mode."""
    if name == "equinox":
        return eqx.nn.inference_mode(EquinoxField(key))(jnp.float32(0.3), x)
    module = NnxField(nnx.Rngs(key))
    module.eval()
    return module(jnp.float32(0.3), x)


@both
def test_answers_and_params_are_the_modules(name: str, tmp_path: Any) -> None:
    """Catches params in another order, a key that `init` ignores, and params that are no plain dicts or not savable."""
    adapter, make = ADAPTERS[name]
    model = adapter(make)
    params = model.init(jax.random.key(1))
    np.testing.assert_array_equal(model.apply(params, 0.3, jnp.asarray(X)), modules_own(name, jax.random.key(1), X))
    assert set(params) == {"layers"}
    assert set(params["layers"]) == {"0", "1"}
    assert all(type(layer) is dict for layer in (params, params["layers"], params["layers"]["0"]))
    assert all(type(leaf) is type(jnp.zeros(2)) for leaf in jax.tree.leaves(params))
    other = model.init(jax.random.key(2))
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True) if a.any())
    save_params(tmp_path / "params.npz", params)
    chex.assert_trees_all_equal(load_params(tmp_path / "params.npz"), params)


@both
def test_dropout_is_active_with_a_key_only(name: str) -> None:
    """Catches hidden random state: the same key must give the same answer, another key another, and none no dropout."""
    adapter, make = ADAPTERS[name]
    model = adapter(make)
    params = model.init(jax.random.key(1))
    x = jnp.asarray(X)
    field = jax.jit(jax.vmap(lambda key: model.apply(params, 0.3, x, key=key)))
    found = field(
        jax.random.wrap_key_data(jax.random.key_data(jax.random.split(jax.random.key(5), 2))[jnp.array([0, 0, 1])])
    )
    np.testing.assert_array_equal(found[0], found[1])
    assert np.any(found[0] != found[2])
    np.testing.assert_array_equal(model.apply(params, 0.3, x), model.apply(params, 0.3, x))
    with_nothing_dropped = model.apply(params, 0.3, x)
    assert np.all(np.any(found != with_nothing_dropped, axis=1))


@both
def test_exact_norms_equal_per_example_gradients(name: str) -> None:
    """Catches a model that cannot be traced inside vmap(grad) or whose sites fvjax does not find."""
    adapter, make = ADAPTERS[name]
    model = adapter(make)
    params = model.init(jax.random.key(1))
    x = jax.random.normal(jax.random.key(2), (4, 2))
    batch = fvjax.PathSample(jnp.linspace(0.0, 1.0, 4), x, 2 * x)
    loss = fvjax.squared_error(model.apply)
    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, batch)
    expected = sum(jnp.sum(leaf.reshape(4, -1) ** 2, axis=1) for leaf in jax.tree.leaves(gradients))
    found = jax.jit(lambda p, b: fvjax.square_norms(loss, p, b))(params, batch).square_norms
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@both
def test_call_and_dtypes(name: str) -> None:
    """Catches a `call` that is ignored, and an answer in another dtype than that of x."""
    adapter, make = ADAPTERS[name]
    plain = adapter(make)
    swapped = adapter(make, call=lambda module, t, x, **options: -module(t, x, **options))
    params = plain.init(jax.random.key(1))
    x = jnp.asarray(X)
    np.testing.assert_array_equal(swapped.apply(params, 0.3, x), -plain.apply(params, 0.3, x))
    key = jax.random.key(3)
    np.testing.assert_array_equal(swapped.apply(params, 0.3, x, key=key), -plain.apply(params, 0.3, x, key=key))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    found = plain.apply(half, 0.3, x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, plain.apply(params, 0.3, x), atol=0.05)


@both
def test_refused_calls(name: str) -> None:
    """Catches params of another module, a velocity that would only broadcast, integer states and a batch of times."""
    adapter, make = ADAPTERS[name]
    model = adapter(make)
    params = model.init(jax.random.key(1))
    x = jnp.asarray(X)
    with pytest.raises(ValueError, match=r"^params must have the names .* differs in extra$"):
        model.apply({**params, "extra": x}, 0.3, x)
    with pytest.raises(
        ValueError, match=r"^params must have the names .* differs in layers.1.bias, layers.1.(kernel|w)"
    ):
        model.apply({"layers": {"0": params["layers"]["0"]}}, 0.3, x)
    with pytest.raises(ValueError, match=r"^module\(t, x\) and x must have the same shape, got \(1,\) and \(2,\)"):
        adapter(make, call=lambda module, t, x: module(t, x)[:1]).apply(params, 0.3, x)
    with pytest.raises(ValueError, match="^x must be floating point, got int32"):
        model.apply(params, 0.3, jnp.array([1, 2]))
    with pytest.raises(ValueError, match=r"^t must have shape \(\), got \(2,\)"):
        model.apply(params, x, x)


def test_nnx_state_and_draws_without_a_key_are_refused() -> None:
    """Catches statistics that would be frozen in silence, and noise that would be the same at every call."""
    with pytest.raises(ValueError, match=r"got BatchStat mean, BatchStat var; normalise by GroupNorm"):
        nets.from_nnx(lambda rngs: nnx.BatchNorm(2, rngs=rngs))

    def noisy(module: Any, t: Any, x: Any) -> Any:
        return module(t, x) + jax.random.normal(module.dropout.rngs(), x.shape)

    model = nets.from_nnx(NnxField, call=noisy)
    params = model.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"^key must be given where the module draws random numbers \(dropout\)"):
        model.apply(params, 0.3, jnp.asarray(X))
    assert model.apply(params, 0.3, jnp.asarray(X), key=jax.random.key(1)).shape == (2,)


def test_equinox_state_and_integer_arrays_are_refused() -> None:
    """Catches buffers that would be lost or trained: only floating-point arrays can be params."""

    class Buffered(eqx.Module):
        linear: eqx.nn.Linear
        order: Any

    def make(key: Any) -> Buffered:
        return Buffered(eqx.nn.Linear(2, 2, key=key), jnp.arange(2))

    with pytest.raises(ValueError, match=r"must be floating point, they are its parameters, got int32 order;"):
        nets.from_equinox(make)
    with pytest.raises(ValueError, match="^the module must keep no state, got an eqx.nn.StateIndex"):
        nets.from_equinox(lambda key: eqx.nn.BatchNorm(2, axis_name="batch", mode="batch"))


def test_importing_the_networks_loads_neither_library() -> None:
    """Catches an import of Equinox or NNX at the top of a module: Equinox is nobody's requirement here."""
    code = "import sys, fvjax.nets.adapters as a; print('equinox' in sys.modules, a.__name__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "fvjax.nets.adapters"]
