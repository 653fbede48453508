"""Equations that take params and data and of whose outputs some depend on params alone; and rules that may not merge.

Under `vmap` such an output has no batch axis, so that one cotangent, summed over the batch, would arrive at it.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvjax import per_example_gradients, sites
from fvjax.types import Array

N, LONG = 5, 70
CASES: dict[str, tuple[Callable[[], tuple[Any, Any, Any]], bool]] = {}


def case(*, slow: bool = False) -> Callable[[Any], Any]:
    """Registers a builder of (loss, params, batch), all in float32, and whether a warning says that it is slow."""

    def register(build: Callable[[], tuple[Any, Any, Any]]) -> Any:
        CASES[build.__name__] = build, slow
        return build

    return register


def normal(seed: int, *shape: int) -> np.ndarray:
    """Float32 numbers, about as large as their rows need to have length one."""
    return np.asarray(np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[-1]), np.float32)


def problem(loss: Callable[[Any, Array], Array], params: Any | None = None) -> tuple[Any, Any, Any]:
    """A loss of a matrix [4, 4], or of other params, on vectors."""
    return loss, normal(4, 4, 4) if params is None else params, 2 * normal(3, N, 4)


def square(x: Array) -> Array:
    """A sum that is not linear, so that the cotangents depend on the data."""
    return jnp.sum(jnp.tanh(x) ** 2 + x)


@case(slow=True)
def long_scan_carries_params():
    """Catches params in the carry that are returned as they came, and used again."""

    def loss(w: Array, x: Array) -> Array:
        (w, h), _ = jax.lax.scan(lambda c, _: ((c[0], jnp.tanh(0.5 * c[1] @ c[0] + x)), None), (w, x), length=LONG)
        return square(h @ w)

    return problem(loss)


@case(slow=True)
def long_scan_changes_params():
    """Catches params in the carry that change with every step, without the data."""

    def loss(w: Array, x: Array) -> Array:
        def step(carry: Any, _: None) -> Any:
            w, h = carry
            return (0.99 * w, jnp.tanh(0.5 * h @ w + x)), jnp.sum(w)

        (w, h), sums = jax.lax.scan(step, (w, x), length=LONG)
        return square(h @ w) + jnp.sum(sums**2) * jnp.sum(x)

    return problem(loss)


@case(slow=True)
def long_scan_mixes_carries():
    """Catches a carry that takes in data only in its second step, through another carry."""

    def loss(w: Array, x: Array) -> Array:
        def step(carry: Any, _: None) -> Any:
            first, second, third = carry
            return (0.9 * first, jnp.tanh(first) + 0.5 * second, 0.5 * third + first * x), None

        (first, second, third), _ = jax.lax.scan(step, (w[0], w[1], w[2]), length=LONG)
        return square(first * x) + square(second + x) + square(third)

    return problem(loss)


@case(slow=True)
def long_fori_loop():
    """Catches a loop whose counter, params and data are one carry."""

    def loss(w: Array, x: Array) -> Array:
        w, h = jax.lax.fori_loop(0, LONG, lambda i, c: (c[0], jnp.tanh(0.5 * c[1] @ c[0] + x + 0.01 * i)), (w, x))
        return square(h @ w)

    return problem(loss)


@case()
def long_scan_of_a_custom_rule():
    """Catches a rule of its own in a loop: one of its outputs needs params only, its derivative needs both."""

    def loss(w: Array, x: Array) -> Array:
        def step(carry: Any, _: None) -> Any:
            h, total = carry
            y, norm = with_norm(w, h)
            return (jnp.tanh(0.5 * y + x), 0.5 * total + norm), None

        (h, total), _ = jax.lax.scan(step, (x, jnp.zeros((), x.dtype)), length=LONG)
        return square(h) * total

    return problem(loss)


@case()
def cond_on_a_constant():
    """Catches branches that return the params, chosen by a flag that is not data."""

    def loss(w: Array, x: Array) -> Array:
        flag = jnp.arange(3).sum() > 2
        y, again = jax.lax.cond(flag, lambda w, x: (x @ w, 2 * w), lambda w, x: (x * w[0], w), w, x)
        return square(y @ again)

    return problem(loss)


@case()
def cond_on_params():
    """Catches branches that are chosen by the params, and return them."""

    def loss(w: Array, x: Array) -> Array:
        y, again = jax.lax.cond(w[0, 0] > 0, lambda w, x: (x @ w, w.T), lambda w, x: (x * w[0], 3 * w), w, x)
        return square(y @ again)

    return problem(loss)


@case()
def switch_on_data():
    """Catches a branch on the data whose output seems to need params only: which ones is chosen by the data."""

    def loss(w: Array, x: Array) -> Array:
        which = (x[0] > 0).astype(np.int32) + (x[1] > 0).astype(np.int32)
        branches = [lambda w, x: (w, x @ w), lambda w, x: (2 * w, x), lambda w, x: (w, x * w[1])]
        w, y = jax.lax.switch(which, branches, w, x)
        return square(y @ w)

    return problem(loss)


@jax.custom_vjp
def with_norm(w: Array, x: Array) -> tuple[Array, Array]:
    """(x w, |w|^2); the derivative by w is declared to hold a product of both cotangents, so it has no parts."""
    return x @ w, jnp.sum(w**2)


def _pull_with_norm(kept: tuple[Array, Array], cotangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (w, x), (y, norm) = kept, cotangents
    return jnp.outer(x, jnp.tanh(y)) + 2 * norm * w * (1 + jnp.sum(y**2)), y @ w.T


with_norm.defvjp(lambda w, x: (with_norm(w, x), (w, x)), _pull_with_norm)


@case()
def custom_vjp_with_a_norm():
    """Catches an output of a declared derivative that depends on params alone, and is used as it is."""

    def loss(w: Array, x: Array) -> Array:
        y, norm = with_norm(w, x)
        return square(y) * norm + jnp.sin(norm)

    return problem(loss)


@jax.custom_vjp
def passing(w: Array, x: Array) -> tuple[Array, Array]:
    """(w, x w), as a layer with a state returns it."""
    return w, x @ w


passing.defvjp(
    lambda w, x: (passing(w, x), (w, x)),
    lambda kept, g: (0.5 * g[0] + jnp.outer(kept[1], g[1]), g[1] @ kept[0].T),
)


@case()
def custom_vjp_passes_params():
    """Catches params that pass through a declared derivative, and make a layer behind it."""

    def loss(w: Array, x: Array) -> Array:
        again, y = passing(w, x)
        return square(jnp.tanh(y) @ again)

    return problem(loss)


@jax.custom_jvp
def scaled_norm(w: Array, x: Array) -> tuple[Array, Array]:
    """(x w, |w|^2); the slope of the second is declared to depend on the data."""
    return x @ w, jnp.sum(w**2)


@scaled_norm.defjvp
def _scaled_norm_slope(at: Any, by: Any) -> Any:
    (w, x), (dw, dx) = at, by
    return scaled_norm(w, x), (x @ dw + dx @ w, 2 * jnp.sum(w * dw) * jnp.sum(x**2))


@case()
def custom_jvp_with_a_norm():
    """Catches an output of params alone, whose declared slope needs the data."""

    def loss(w: Array, x: Array) -> Array:
        y, norm = scaled_norm(w, x)
        return square(y) * norm + jnp.sin(norm)

    return problem(loss)


@jax.custom_jvp
def kept(y: Array, w: Array) -> Array:
    """y, whose derivative is dropped where w is not differentiated."""
    return y


@functools.partial(kept.defjvp, symbolic_zeros=True)
def _kept_slope(at: Any, by: Any) -> Any:
    (y, _), (dy, dw) = at, by
    return y, jnp.zeros_like(y) if isinstance(dw, jax.custom_derivatives.SymbolicZero) else dy


@case()
def symbolic_zeros():
    """Catches a declared derivative that asks whether params are differentiated, as diffrax's loops do."""
    return problem(lambda w, x: square(kept(jnp.tanh(x @ w), w)))


@case()
def symbolic_zeros_of_data():
    """Catches a declared derivative that asks whether its data depend on params."""
    return problem(lambda w, x: square(kept(w[0] * x, jnp.tanh(x @ w))))


@case()
def optimization_barrier():
    """Catches a barrier around params and data."""

    def loss(w: Array, x: Array) -> Array:
        w, x = jax.lax.optimization_barrier((w, x))
        return square(jnp.tanh(x @ w) @ w)

    return problem(loss)


@case()
def error_if():
    """Catches a check of the data that holds the params back: vmap leaves them without a batch axis."""

    def loss(w: Array, x: Array) -> Array:
        w = eqx.error_if(w, jnp.any(x > 1000), "too large")
        return square(jnp.tanh(x @ w) @ w)

    return problem(loss)


@case()
def checkpoint_returns_params():
    """Catches a rematerialized layer that returns its params."""

    @jax.checkpoint
    def layer(w: Array, x: Array) -> tuple[Array, Array]:
        return w, jnp.tanh(x @ w)

    def loss(w: Array, x: Array) -> Array:
        w, y = layer(w, x)
        return square(layer(w, y)[1])

    return problem(loss)


@case(slow=True)
def kalman_filter():
    """Catches the recursion of covariances, which needs no observation, beside that of the means: 80 steps."""

    def loss(params: Any, example: Array) -> Array:
        observations = jnp.sin(jnp.arange(80).astype(example.dtype)[:, None] * example)

        def step(carry: Any, y: Array) -> Any:
            mean, covariance = carry
            mean, covariance = params["A"] @ mean, params["A"] @ covariance @ params["A"].T + 0.1 * identity
            spread = params["C"] @ covariance @ params["C"].T + 0.5 * identity
            gain = jnp.linalg.solve(spread, params["C"] @ covariance).T
            gap = y - params["C"] @ mean
            value = gap @ jnp.linalg.solve(spread, gap) + jnp.linalg.slogdet(spread)[1]
            return (mean + gain @ gap, covariance - gain @ params["C"] @ covariance), value

        identity = jnp.eye(4, dtype=example.dtype)
        (mean, covariance), values = jax.lax.scan(step, (jnp.zeros_like(example), identity), observations)
        return jnp.mean(values) + jnp.sum(mean) * jnp.trace(covariance)

    return problem(loss, {"A": 0.5 * normal(4, 4, 4), "C": normal(5, 4, 4)})


@jax.custom_vjp
def clip_gradient(x: Array) -> Array:
    """The identity, whose cotangent is clipped: the backward pass is not linear in it."""
    return x


clip_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@case()
def clipped_layer_twice():
    """Catches two calls of one jitted layer that become one: their sum would be clipped, instead of each."""

    @jax.jit
    def layer(w: Array, x: Array) -> Array:
        return jnp.tanh(x @ clip_gradient(w))

    return problem(lambda w, x: square(layer(w, layer(w, x))))


@case()
def clipped_in_a_scan():
    """Catches iterations that are written out and share what is clipped."""

    def loss(w: Array, x: Array) -> Array:
        return square(jax.lax.scan(lambda h, _: (jnp.tanh(h @ clip_gradient(w)), None), x, length=4)[0])

    return problem(loss)


@case()
def clipped_in_a_jitted_scan_of_params():
    """Catches equal loops over params that hold a declared derivative, and are merged."""

    @jax.jit
    def power(w: Array) -> Array:
        return jax.lax.scan(lambda h, _: (0.5 * clip_gradient(h) @ w, None), w, length=3)[0]

    return problem(lambda w, x: square(jnp.tanh(x @ power(w)) @ power(w)))


@case()
def clipped_weight_decay():
    """Catches a decay that is pulled back apart from the rest of the gradient: the clip sees their sum."""

    def loss(w: Array, x: Array) -> Array:
        w = clip_gradient(w)
        return square(x @ w) + 0.3 * jnp.sum(w**2)

    return problem(loss)


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("name", CASES)
def test_loss_is_a_loop_over_grad(agree, name, bits):
    """Catches what the builder of the case says."""
    build, slow = CASES[name]
    agree(name, build(), bits=bits, slow=slow)


def test_weight_decay_beside_a_declared_rule_stays_apart(x64):
    """Catches a decay that joins all leaves, since some other layer has a derivative rule of its own."""

    def loss(params: Any, x: Array) -> Array:
        return square(x @ clip_gradient(params["a"])) + square(x @ params["b"]) + 0.3 * jnp.sum(params["b"] ** 2)

    params = {name: jnp.asarray(normal(seed, 4, 4), float) for seed, name in enumerate("ab")}
    batch = jnp.asarray(normal(3, N, 4), float)
    assert dict(sites.paths(loss, params, batch))["['b']"] == "outer products + a part that all examples share"
    found, each = sites.moments(loss, params, batch), per_example_gradients(loss, params, batch)
    for name, gradients in each.items():
        np.testing.assert_allclose(found.mean[name], np.mean(gradients, 0), rtol=1e-12)
        np.testing.assert_allclose(found.m2[name], N * np.sum(np.var(gradients, 0)), rtol=1e-12)
