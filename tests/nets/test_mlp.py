"""The residual network: shapes, parameters, time, dtypes, a short training and the refused sizes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fvjax.nets
from fvjax.nets import _linen
from fvjax.nets.mlp import time_embedding


@pytest.mark.parametrize(("dims", "shape"), [(3, (3,)), ((2, 4, 3), (2, 4, 3))])
def test_shapes_for_one_example_and_under_jit_and_vmap(dims, shape):
    """Catches a flattened output, an int that is not (d,), and a batch that is taken for one example."""
    model = fvjax.nets.mlp(dims, width=8, depth=2)
    params = jax.jit(model.init)(jax.random.key(0))
    x, t = jax.random.normal(jax.random.key(1), (5, *shape)), jnp.linspace(0.0, 1.0, 5)
    one = model.apply(params, t[0], x[0])
    assert one.shape == shape
    batch = jax.jit(jax.vmap(model.apply, in_axes=(None, 0, 0)))(params, t, x)
    assert batch.shape == x.shape
    np.testing.assert_allclose(batch[0], one, atol=1e-5)
    with pytest.raises(ValueError, match=r"^x must be ONE example of shape .* got shape \(5, "):
        model.apply(params, t[0], x)


@pytest.mark.parametrize(("dims", "width", "depth", "features"), [(2, 128, 4, 8), ((4, 3), 16, 1, 2), (5, 7, 3, 6)])
def test_number_of_parameters_is_the_documented_one(dims, width, depth, features):
    """Catches a layer or a bias too many, and time features beyond those that were asked for."""
    model = fvjax.nets.mlp(dims, width=width, depth=depth, time_features=features)
    params = jax.eval_shape(model.init, jax.random.key(0))
    size = int(np.prod(dims))
    expected = (size + features + 1) * width + depth * (width + 1) * width + (width + 1) * size
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_parameters_are_plain_and_deterministic(x64):
    """Catches a framework's container, parameters in float64 under x64, a key that is ignored and a zero last layer."""
    model = fvjax.nets.mlp(2, width=8)
    params = model.init(jax.random.key(0))
    assert type(params) is dict
    assert set(params) == {"input", "block_0", "block_1", "block_2", "block_3", "output"}
    assert all(type(layer) is dict and set(layer) == {"kernel", "bias"} for layer in params.values())
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    chex.assert_trees_all_equal(params, model.init(jax.random.key(0)))
    other = model.init(jax.random.key(1))
    assert all(np.any(params[name]["kernel"] != other[name]["kernel"]) for name in params)
    assert np.std(params["output"]["kernel"]) > 0.1


def test_the_network_is_the_documented_formula():
    """Catches another activation, a missing skip connection and features in another order."""
    model = fvjax.nets.mlp(2, width=8, depth=2, time_features=4)
    params = jax.jit(model.init)(jax.random.key(0))
    t, x = 0.3, np.array([0.5, -2.0], np.float32)
    angles = np.array([np.pi / 2, np.pi]) * t

    def dense(name, h):
        return h @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])

    h = dense("input", np.concatenate([x, np.sin(angles), np.cos(angles)]))
    for name in ("block_0", "block_1"):
        a = dense(name, h)
        h = h + a / (1 + np.exp(-a))
    np.testing.assert_allclose(model.apply(params, t, jnp.asarray(x)), dense("output", h), atol=1e-5)


def test_dropout_is_active_with_a_key_only():
    """Catches hidden random state, a key that is ignored, and dropout that moves the parameters."""
    plain, model = (fvjax.nets.mlp(2, width=8, dropout=rate) for rate in (0.0, 0.5))
    params = model.init(jax.random.key(0))
    chex.assert_trees_all_equal(params, plain.init(jax.random.key(0)))
    x = jnp.asarray([0.5, -2.0])
    one, two = jax.random.split(jax.random.key(1))
    kept = plain.apply(params, 0.3, x)
    np.testing.assert_array_equal(model.apply(params, 0.3, x), kept)
    np.testing.assert_array_equal(plain.apply(params, 0.3, x, key=one), kept)
    dropped = model.apply(params, 0.3, x, key=one)
    np.testing.assert_array_equal(model.apply(params, 0.3, x, key=one), dropped)
    assert np.any(dropped != kept)
    assert np.any(dropped != model.apply(params, 0.3, x, key=two))


def test_the_ends_of_time_differ():
    """Catches whole periods, with which t = 0 and t = 1 would be the same to the network."""
    ends = np.stack([time_embedding(t, 8) for t in (0.0, 0.5, 1.0)])
    assert np.abs(ends[0] - ends[2]).max() > 0.9
    assert np.abs(ends[0] - ends[1]).max() > 0.9


def test_output_follows_x_and_the_work_the_parameters(x64):
    """Catches a promotion error under x64 and strict dtypes: float64 states with float32 or float64 parameters."""
    model = fvjax.nets.mlp(2, width=8)
    params = model.init(jax.random.key(0))
    x = jnp.asarray([0.5, -2.0], jnp.float64)
    single = model.apply(params, 0.3, x)
    double = model.apply(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params), 0.3, x)
    assert single.dtype == double.dtype == jnp.float64
    np.testing.assert_allclose(single, double, rtol=1e-4)
    assert np.any(single != double)
    assert model.apply(params, jnp.float64(0.3), x.astype(jnp.float32)).dtype == jnp.float32


def test_a_short_training_learns_a_rotation():
    """Catches a network that cannot learn: 300 steps of x1 = R(150 degrees) x0 + 5 take the loss from 60 to below 1."""
    model = fvjax.nets.mlp(2, width=64, depth=2)
    angle = np.deg2rad(150.0)
    rotation = jnp.asarray([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], jnp.float32)
    optimizer = optax.adam(3e-3)

    def loss(params, key):
        x0 = jax.random.normal(key, (128, 2))
        t = jax.random.uniform(jax.random.fold_in(key, 1), (128, 1))
        x1 = x0 @ rotation.T + 5
        velocity = jax.vmap(model.apply, in_axes=(None, 0, 0))(params, t[:, 0], (1 - t) * x0 + t * x1)
        return jnp.mean(jnp.sum((velocity - (x1 - x0)) ** 2, axis=1))

    def step(state, key):
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params, key)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(params, updates), moments), value

    @jax.jit
    def train(key):
        params = model.init(key)
        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, 300))[1]

    with jax.numpy_dtype_promotion("standard"):  # optax's Adam takes a float to the power of an integer
        losses = train(jax.random.key(0))
    assert losses[0] > 40
    assert np.mean(losses[-20:]) < 1


@pytest.mark.parametrize(
    ("dims", "options", "message"),
    [
        (0, {}, "dims must be an integer >= 1, got 0"),
        ((3, 0), {}, "dims must be an integer >= 1, got 0"),
        ((), {}, "dims must be an integer >= 1 or a non-empty tuple"),
        (2.0, {}, "dims must be an integer >= 1, got 2.0"),
        (2, {"width": 0}, "width must be an integer >= 1, got 0"),
        (2, {"depth": 0}, "depth must be an integer >= 1, got 0"),
        (2, {"time_features": 7}, "time_features must be an even integer >= 2, got 7"),
        (2, {"time_features": 0}, "time_features must be an even integer >= 2, got 0"),
        (2, {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_refused_sizes(dims, options, message):
    """Catches a size that would only fail inside Flax, or an odd number of time features rounded down in silence."""
    with pytest.raises(ValueError, match=f"^{message}"):
        fvjax.nets.mlp(dims, **options)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_drops_at_its_rate(rate):
    """Catches a threshold of another number of bits, a wrong scale, and two entries that share their random bits."""
    layer = _linen.Dropout(rate, False)
    x = jnp.ones((501, 401))  # odd: the last random number serves one entry only
    y = np.asarray(layer.apply({}, x, rngs={"dropout": jax.random.key(3)}))
    dropped = y == 0
    error = np.sqrt(rate * (1 - rate) / x.size)
    assert abs(dropped.mean() - rate) < 4 * error
    assert abs(y.mean() - 1) < 4 * error / (1 - rate)
    flat = dropped.ravel()[:-1]
    both = (flat[::2] & flat[1::2]).mean()
    assert abs(both - rate**2) < 4 * np.sqrt(rate**2 * (1 - rate**2) / (x.size / 2))
