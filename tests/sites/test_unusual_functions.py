"""Losses that few write: loops, solvers, derivatives and transforms of params within them; and calls outside `jit`."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.ode import odeint

from fvjax import sites
from fvjax.gradients import per_example_gradients, total_variance
from fvjax.sites import _program
from fvjax.types import Array

N = 5
CASES: dict[str, Callable[[], tuple[Any, Any, Any]]] = {}


def case(build: Callable[[], tuple[Any, Any, Any]]) -> Callable[[], tuple[Any, Any, Any]]:
    """Registers a builder of (loss, params, batch)."""
    CASES[build.__name__] = build
    return build


def normal(seed: int, *shape: int) -> np.ndarray:
    """Float32 numbers, about as large as their rows need to have length one."""
    return np.asarray(np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[-1]), np.float32)


def square(x: Array) -> Array:
    """A sum that is not linear, so that the cotangents depend on the data."""
    return jnp.sum(jnp.tanh(x) ** 2 + x)


VECTORS = 2 * normal(3, N, 4)
INDEX = np.asarray([[0, 1, 9], [2, 2, 1], [9, 9, 3], [4, 4, 4], [5, 0, 9]], np.int32)


def problem(loss: Callable[[Any, Any], Array], params: Any | None = None, batch: Any | None = None) -> Any:
    """A loss of a matrix [4, 4], or of other params, on vectors, or on another batch."""
    return loss, normal(4, 4, 4) if params is None else params, VECTORS if batch is None else batch


@case
def scans_over_params_and_rows():
    """Catches loops in loops, the outer one too long to unroll, over params that its carry takes in, backwards."""

    def loss(w: Array, x: Array) -> Array:
        def outer(carry: Any, row: Array) -> Any:
            h, v = carry
            h, sums = jax.lax.scan(lambda h, _: (jnp.tanh(h * row + v), jnp.sum(h)), h, None, length=2)
            return (h, v * row), sums

        (h, v), sums = jax.lax.scan(outer, (x, w[0]), w, reverse=True)
        return square(h * v) + square(sums)

    return problem(loss, normal(4, 6, 4))


@case
def carries_that_change_places():
    """Catches params that two carries exchange in every step, beside one of data."""

    def loss(w: Array, x: Array) -> Array:
        def step(carry: Any, row: Array) -> Any:
            first, second, h = carry
            return (second, first, jnp.tanh(h @ first + row)), second

        (first, _, h), rows = jax.lax.scan(step, (w, w.T, x), jnp.outer(x, x), reverse=True)
        return square(h @ first) + square(rows) + square(x @ w)

    return problem(loss)


@case
def loop_of_data():
    """Catches a loop whose number of iterations the data choose."""

    def loss(w: Array, x: Array) -> Array:
        count = jax.lax.while_loop(lambda c: c < 5 * jnp.abs(x[0]), lambda c: c + 1, jnp.zeros((), x.dtype))
        return square(count * x @ w)

    return problem(loss)


@case
def stopped_power_iteration():
    """Catches a loop over params that must not be differentiated, as in spectral normalization."""

    def loss(w: Array, x: Array) -> Array:
        def step(v: Array) -> Array:
            u = w.T @ (w @ v)
            return u / jnp.linalg.norm(u)

        v = jax.lax.while_loop(lambda c: c[1] < 5, lambda c: (step(c[0]), c[1] + 1), (jnp.ones_like(x), 0))[0]
        return square(x @ (w / jnp.linalg.norm(w @ jax.lax.stop_gradient(v))))

    return problem(loss)


@case
def derivatives_inside():
    """Catches losses that are made of derivatives: a gradient step on the params, a slope, a Hessian."""

    def loss(w: Array, x: Array) -> Array:
        def inner(w: Array, x: Array) -> Array:
            return square(x @ w)

        adapted = w - 0.1 * jax.grad(inner)(w, x)
        _, slope = jax.jvp(functools.partial(inner, w), (x,), (jnp.sin(x),))
        return inner(adapted, x) * slope + square(jax.hessian(inner, 1)(w, x))

    return problem(loss)


@case
def factorizations():
    """Catches equations of params with several outputs: eigenvectors, singular values, a Cholesky factor."""

    def loss(w: Array, x: Array) -> Array:
        symmetric = w @ w.T + jnp.eye(4, dtype=w.dtype)
        values, vectors = jnp.linalg.eigh(symmetric)
        left, singular, _ = jnp.linalg.svd(w)
        return (
            square(x @ jnp.linalg.cholesky(symmetric))
            + square((x @ vectors) ** 2 * values)
            + square((x @ left) ** 2 * singular)
        )

    return problem(loss)


@case
def factorizations_of_sums_with_data():
    """Catches the same of params and data."""

    def loss(w: Array, x: Array) -> Array:
        symmetric = w @ w.T + jnp.eye(4, dtype=w.dtype) + jnp.outer(x, x)
        values, vectors = jnp.linalg.eigh(symmetric)
        return square(x @ jnp.linalg.cholesky(symmetric)) + square((x @ vectors) ** 2 * values)

    return problem(loss)


@case
def sums_by_segment():
    """Catches params and data that are added at indices of the example."""

    def loss(w: Array, example: Any) -> Array:
        x, index = example
        segments = index % 3
        added = jax.ops.segment_sum(w[:3], segments, 3)
        return square(jax.ops.segment_sum(x[:3, None] * w[:3], segments, 3)) + square(2 * added)

    return problem(loss, None, (VECTORS, INDEX))


@case
def running_products():
    """Catches prefix sums and products, of params and of params times data."""

    def loss(w: Array, x: Array) -> Array:
        powers = jax.lax.associative_scan(jnp.matmul, jnp.stack([w, w.T, 2 * w]))
        return square(x @ powers[-1]) + square(jnp.cumsum(w, 0) * x) + square(jax.lax.cumprod(w * x, 1))

    return problem(loss)


@case
def updated_slices():
    """Catches data that are written into params at a place that the data choose, and the other way round."""

    def loss(w: Array, example: Any) -> Array:
        x, place = example
        into_params = jax.lax.dynamic_update_slice_in_dim(w, x[None], place, 0)
        into_data = jax.lax.dynamic_update_slice_in_dim(jnp.outer(x, x), w[:1], place, 0)
        return square(x @ into_params) + square(into_data) + square(x @ w.at[0].set(w[1]))

    return problem(loss, None, (VECTORS, np.arange(N, dtype=np.int32)))


@case
def partly_stopped():
    """Catches gradients through the copy of a parameter that is stopped."""

    def loss(w: Array, x: Array) -> Array:
        stopped = jax.lax.stop_gradient(w)
        return square(jnp.tanh(x @ (w + stopped)) @ (w * stopped)) + square(x @ stopped)

    return problem(loss)


@case
def keys_of_the_examples():
    """Catches keys, in the batch, that are differentiated, or drawn from once for all examples."""

    def loss(w: Array, example: Any) -> Array:
        x, key = example
        kept = jax.random.bernoulli(key, 0.5, x.shape)
        return square(jnp.where(kept, x @ w, 0) * jax.random.normal(key, x.shape, x.dtype))

    return problem(loss, None, (VECTORS, jax.random.split(jax.random.key(0), N)))


@case
def implicit_functions():
    """Catches a fixed point with its implicit derivative, and conjugate gradients."""

    def loss(w: Array, x: Array) -> Array:
        def residual(z: Array) -> Array:
            return z - 0.1 * jnp.tanh(z @ w) - x

        def solve(f: Any, z: Array) -> Array:
            return jax.lax.fori_loop(0, 30, lambda _, z: z - f(z), z)

        root = jax.lax.custom_root(residual, x, solve, lambda g, y: jnp.linalg.solve(jax.jacobian(g)(y), y))
        return square(root) + square(jnp.linalg.solve(w @ w.T + jnp.eye(4, dtype=w.dtype), root))

    return problem(loss)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def bent(function: Any, w: Array, x: Array, factor: float) -> Array:
    """A dense layer; its derivative is declared, with arguments that are not differentiated."""
    return function(x @ w) * factor


bent.defvjp(
    lambda function, w, x, factor: (bent(function, w, x, factor), (w, x)),
    lambda function, factor, kept, g: (factor * jnp.outer(kept[1], function(g)), g @ kept[0].T),
)


@case
def arguments_that_are_not_differentiated():
    """Catches arguments of a declared derivative that are no arrays."""
    return problem(lambda w, x: square(bent(jnp.tanh, w, bent(jnp.sin, w, x, 2.0), 3.0)))


@jax.custom_jvp
def called_back(w: Array, x: Array) -> Array:
    """A dense layer by numpy."""
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)

    def product(w: Any, x: Any) -> np.ndarray:
        return np.matmul(np.asarray(x)[..., None, :], np.asarray(w))[..., 0, :]

    return jax.pure_callback(product, shape, w, x, vmap_method="expand_dims")


called_back.defjvp(lambda at, by: (called_back(*at), by[1] @ at[0] + at[1] @ by[0]))


@case
def callbacks():
    """Catches functions that are no equations."""
    return problem(lambda w, x: square(called_back(w, jnp.tanh(x @ w))))


@jax.custom_vjp
def surrogate(h: Array) -> Array:
    """Zeros, with a declared gradient: what a surrogate loss adds to another."""
    return jnp.zeros_like(h)


surrogate.defvjp(lambda h: (surrogate(h), h), lambda h, g: (g * h,))


@case
def surrogate_gradient():
    """Catches a declared derivative of a function whose value is constant: `vmap` gives it no batch axis."""
    return problem(lambda w, x: square(x @ w + surrogate(jnp.tanh(x @ w))))


@case
def norms_of_missing_rows():
    """Catches a nan, in the cotangent of a row out of range, that spreads: the gradient drops that row."""

    def loss(table: Array, example: Any) -> Array:
        x, index = example
        rows = table.at[index].get(mode="fill", fill_value=0)
        return jnp.sum(jnp.sqrt(jnp.sum(rows**2, -1)) * x[:3])

    return problem(loss, normal(4, 6, 4), (VECTORS, INDEX))


@case
def ordinary_differential_equation():
    """Catches constants that are not jax arrays where a declared derivative indexes them."""

    def loss(w: Array, x: Array) -> Array:
        times = jnp.asarray(np.asarray([0, 0.3, 0.5]), x.dtype)
        return square(odeint(lambda y, t, w: jnp.tanh(y @ w), x, times, w, rtol=1e-3))

    return problem(loss)


def test_mutable_references_are_refused():
    """Catches reads of a reference that are taken for functions of their inputs, and merged."""

    def loss(w: Array, x: Array) -> Array:
        ref = jax.new_ref(w)
        first = ref[...]
        ref[...] = jnp.tanh(first)
        return square(jnp.tanh(x @ first) @ ref[...])

    with pytest.raises(ValueError, match="loss must be without mutable references"):
        sites.square_norms(*problem(loss))


@pytest.mark.parametrize("name", CASES)
def test_unusual_function_is_a_loop_over_grad(agree, name, monkeypatch):
    """Catches what the builder of the case says."""
    monkeypatch.setattr(_program, "UNROLLED", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sites.SlowPathWarning)
        agree(f"unusual: {name}", CASES[name](), bits=64)


@dataclasses.dataclass
class Scaled:
    """A loss without a hash."""

    scales: Array

    def __call__(self, params: Any, x: Array) -> Array:
        """Two dense layers."""
        return jnp.sum(self.scales * jnp.sum((jnp.tanh(x @ params["a"]) @ params["b"]) ** 2))


def spread(size: float) -> tuple[Any, Array]:
    """Params and a batch of nearly equal vectors."""
    params = {"a": jnp.asarray(normal(4, 4, 4)), "b": jnp.asarray(normal(5, 4, 3))}
    return params, jnp.asarray(normal(6, 4) * (1 + size * normal(7, 64, 4)))


@pytest.mark.parametrize("size", [1e-4, 1.0], ids=["digits lost", "sound"])
def test_outside_jit_is_inside(size):
    """Catches results outside `jit` where the careful part is left out, or its flag read wrongly; and no hash."""
    loss, (params, batch) = Scaled(jnp.asarray([1.0, 2.0])), spread(size)
    for options in ({}, {"elementwise": True}, {"by": jnp.arange(64) % 3, "groups": 3}, {"chunk": 20}):

        def measure(params: Any, batch: Array, options: Any = options) -> Any:
            return sites.moments(loss, params, batch, **options)

        chex.assert_trees_all_close(measure(params, batch), jax.jit(measure)(params, batch), rtol=2e-5, atol=1e-12)
    norms = sites.square_norms(loss, params, batch)
    chex.assert_trees_all_close(norms, jax.jit(lambda p, b: sites.square_norms(loss, p, b))(params, batch), rtol=1e-5)


def variance(params: Any, batch: Array, **options: Any) -> Array:
    """The total variance, summed over groups with different weights."""
    found = total_variance(sites.moments(Scaled(jnp.asarray([1.0, 2.0])), params, batch, **options))
    return jnp.sum(found * jnp.arange(1, 1 + found.size).astype(found.dtype))


def variance_by_vmap(params: Any, batch: Array, by: Array, groups: int) -> Array:
    """The same from the gradients of all examples."""
    each = per_example_gradients(Scaled(jnp.asarray([1.0, 2.0])), params, batch)
    members = [by == k for k in range(groups)]
    return sum((1 + k) * sum(jnp.sum(jnp.var(g[members[k]], 0)) for g in jax.tree.leaves(each)) for k in range(groups))


@pytest.mark.parametrize("groups", [1, 3])
def test_variance_is_differentiated(x64, groups):
    """Catches parts of the variance whose own derivative is lost or wrong; under grad, vmap and as a closure."""
    params, batch = jax.tree.map(lambda x: x.astype(np.float64), spread(1.0))
    by = np.arange(64) % groups
    options = {} if groups == 1 else {"by": by, "groups": groups}
    exact = jax.grad(variance_by_vmap)(params, batch, by, groups)
    for chosen in (options, options | {"chunk": 24}, options | {"elementwise": True}):
        found = jax.jit(jax.grad(lambda p, chosen=chosen: variance(p, batch, **chosen)))(params)
        chex.assert_trees_all_close(found, exact, rtol=1e-11)
    stacked = jax.tree.map(lambda x: jnp.stack([x, -2 * x]), params)
    each = jax.jit(jax.vmap(lambda p: variance(p, batch, **options)))(stacked)
    for k in range(2):
        own = variance_by_vmap(jax.tree.map(lambda x, k=k: x[k], stacked), batch, by, groups)
        np.testing.assert_allclose(each[k], own, rtol=1e-11)

    def closed_over(scale: Array) -> Array:
        loss = lambda p, x: scale * Scaled(jnp.asarray([1.0, 2.0]))(p, x)  # noqa: E731
        return jnp.sum(total_variance(sites.moments(loss, params, batch)))

    whole = variance_by_vmap(params, batch, np.zeros(64, int), 1)
    np.testing.assert_allclose(jax.jit(closed_over)(3.0), 9 * whole, rtol=1e-11)
    np.testing.assert_allclose(jax.grad(closed_over)(3.0), 6 * whole, rtol=1e-11)
    np.testing.assert_allclose(jax.vmap(closed_over)(jnp.asarray([1.0, 3.0])), [whole, 9 * whole], rtol=1e-11)


@pytest.mark.parametrize("dtype", [np.int8, np.int64])
def test_groups_of_narrow_integers_look_up(x64, dtype):
    """Catches group * size + row in eight bits, and in two integer types that do not promote."""
    table, by = jnp.asarray(np.random.default_rng(0).normal(size=(100, 2))), np.asarray([0, 1, 2, 2, 1, 0], dtype)
    batch = np.asarray([3, 99, 7, 80, 5, 3], np.int32), np.linspace(1, 2, 6)

    def loss(table: Array, example: Any) -> Array:
        return jnp.sum(jnp.sin(table[example[0]] * example[1]))

    with jax.numpy_dtype_promotion("standard" if dtype == np.int8 else "strict"):
        found = total_variance(sites.moments(loss, table, batch, by=by, groups=3))
    each = np.asarray(per_example_gradients(loss, table, batch))
    np.testing.assert_allclose(found, [np.sum(np.var(each[by == k], 0)) for k in range(3)], rtol=1e-11)


def test_row_that_nearly_all_examples_take():
    """Catches the variance between those that take a row and one that does not, as a rounded difference to 1."""
    n = 30001
    rows = np.where(np.arange(n) == 5, 3, 2)
    y = (normal(0, 1, 30) * (1 + 1e-5 * normal(1, n, 30))).astype(np.float32)
    moments = jax.jit(lambda b: sites.moments(lambda t, e: jnp.sum(t[e[0]] * e[1]), jnp.zeros((7, 30)), b))((rows, y))
    exact = sum(np.sum(np.var(np.where((rows == k)[:, None], y.astype(float), 0), 0)) for k in (2, 3))
    np.testing.assert_allclose(total_variance(moments), exact, rtol=1e-5)


def test_loss_that_reads_what_has_changed():
    """Catches a call outside `jit` that gives the moments of the loss as it was."""
    factor = [1.0]

    def loss(w: Array, x: Array) -> Array:
        return factor[0] * jnp.sum(jnp.sin(x @ w))

    w, batch = jnp.asarray(normal(4, 4, 4)), jnp.asarray(VECTORS)
    before = total_variance(sites.moments(loss, w, batch))
    factor[0] = 2.0
    np.testing.assert_allclose(total_variance(sites.moments(loss, w, batch)), 4 * before, rtol=1e-5)


def test_variance_has_a_forward_derivative(x64):
    """Catches moments that `jax.jvp`, and so `jax.hessian`, refuse."""
    params, batch = jax.tree.map(lambda x: x.astype(np.float64), spread(1.0))
    by = np.zeros(64, int)
    _, found = jax.jvp(lambda p: variance(p, batch), (params,), (params,))
    _, exact = jax.jvp(lambda p: variance_by_vmap(p, batch, by, 1), (params,), (params,))
    np.testing.assert_allclose(found, exact, rtol=1e-11)
