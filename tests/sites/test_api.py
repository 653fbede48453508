"""The public functions: order of results, chunks, weights, groups, errors, warnings, paths, memory, under jit."""

import warnings
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fvjax
from fvjax import sites
from fvjax.gradients import (
    elementwise_variance,
    gradient_noise_scale,
    merge_groups,
    merge_moments,
    per_example_gradients,
    total_variance,
    variance_by_leaf,
)
from fvjax.sites import _engine
from fvjax.types import Array, GradientMoments, Params

N = 7


def field(params: Params, t: Array, x: Array) -> Array:
    """One hidden layer, [3] -> [3]; a leaf that is not used."""
    return t * jnp.tanh(x @ params["first"] + params["bias"]) @ params["last"]


LOSS = fvjax.squared_error(field)
PARAMS = {
    "bias": jnp.linspace(-1, 1, 4),
    "first": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32),
    "last": jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32),
    "unused": jnp.ones((2, 2)),
}
_X, _TARGET = np.random.default_rng(2).normal(size=(2, N, 3)).astype(np.float32)
BATCH = fvjax.PathSample(jnp.linspace(0.1, 0.9, N), jnp.asarray(_X), jnp.asarray(_TARGET))


def gradients() -> dict[str, np.ndarray]:
    """Per-example gradients by vmap(grad), flat, in float64."""
    found = jax.jit(lambda p, b: per_example_gradients(LOSS, p, b))(PARAMS, BATCH)
    return {name: np.asarray(g, float).reshape(N, -1) for name, g in found.items()}


@pytest.mark.parametrize("chunk", [None, 1, 3, N + 1])
def test_square_norms_in_their_order(chunk: int | None) -> None:
    """Catches fields in another order, padding that shows in losses or norms, weights that scale norms."""
    weights = jnp.asarray([1.0, 2, 0, 1, 0.5, 1, 3])
    norms = jax.jit(lambda p, b: sites.square_norms(LOSS, p, b, by_leaf=True, weights=weights, chunk=chunk))
    losses, mean, square_norms, by_leaf, paths = norms(PARAMS, BATCH)
    exact = gradients()
    np.testing.assert_allclose(losses, jax.vmap(LOSS, (None, 0))(PARAMS, BATCH), rtol=1e-6)
    for name, gradient in exact.items():
        average = np.average(gradient, axis=0, weights=weights)
        np.testing.assert_allclose(np.ravel(mean[name]), average, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(by_leaf[name], np.sum(gradient**2, 1), rtol=1e-5)
    np.testing.assert_allclose(square_norms, sum(np.sum(g**2, 1) for g in exact.values()), rtol=1e-5)
    assert dict(paths) == {
        "['bias']": "vjp of add",
        "['first']": "outer products",
        "['last']": "outer products",
        "['unused']": "unused",
    }
    assert sites.square_norms(LOSS, PARAMS, BATCH).by_leaf is None


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("grouped", [False, True])
def test_trace_is_the_sum_of_the_coordinates(chunk: int | None, *, grouped: bool) -> None:
    """Catches a trace that is not that of the elementwise moments: whole, in chunks, by group, merged."""
    options: dict[str, Any] = {"by": jnp.asarray([0, 1, 0, 2, 1, 0, 5]), "groups": 3} if grouped else {}

    @jax.jit
    def both(params: Params, batch: Any) -> tuple[GradientMoments, GradientMoments]:
        found = [sites.moments(LOSS, params, batch, elementwise=e, chunk=chunk, **options) for e in (True, False)]
        return found[0], found[1]

    each, trace = both(PARAMS, BATCH)
    lead = (3,) if grouped else ()
    assert jax.tree.map(jnp.shape, trace.m2) == dict.fromkeys(PARAMS, lead)
    pairs = [(each, trace), (merge_moments(each, each), merge_moments(trace, trace))]
    pairs += [(merge_groups(each), merge_groups(trace))] if grouped else []
    for full, short in pairs:
        chex.assert_trees_all_close(short.mean, full.mean, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(variance_by_leaf(short), variance_by_leaf(full), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(total_variance(short, ddof=1), total_variance(full, ddof=1), rtol=1e-5)
        np.testing.assert_allclose(gradient_noise_scale(short), gradient_noise_scale(full), rtol=1e-4)
    with pytest.raises(ValueError, match=r"moments must be elementwise, .* got m2 of shape .* for a mean of shape"):
        elementwise_variance(trace)


def test_law_of_total_variance_over_layers_and_groups(x64: None) -> None:
    """Catches parts that do not add up: layers to the total, and within plus between groups to the whole."""
    by = fvjax.time_bins(BATCH.t, 3)
    params, batch = jax.tree.map(lambda x: x.astype(float), (PARAMS, BATCH))
    grouped = sites.moments(LOSS, params, batch, by=by, groups=3)
    whole = sites.moments(LOSS, params, batch)
    share = grouped.weight / grouped.weight.sum()
    between = sum(
        jnp.sum(share.reshape(-1, *[1] * m.ndim) * (g - m) ** 2)
        for g, m in zip(jax.tree.leaves(grouped.mean), jax.tree.leaves(whole.mean), strict=True)
    )
    within = share @ total_variance(grouped)
    np.testing.assert_allclose(within + between, total_variance(whole), rtol=1e-13)
    np.testing.assert_allclose(sum(jax.tree.leaves(variance_by_leaf(whole))), total_variance(whole), rtol=1e-14)


@pytest.mark.parametrize("block", [1, 8, 2**16])
def test_many_groups_take_one_product_an_example(x64: None, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Catches the other way for more groups than matrix products pay for, and indices outside that wrap or clamp."""
    monkeypatch.setattr(_engine, "BLOCK", block)
    n, groups = 80, 40
    rng = np.random.default_rng(0)
    batch, params = jnp.asarray(rng.normal(size=(n + 2, 3))), jnp.asarray(rng.normal(size=(3, 5)))
    by = jnp.concatenate([jnp.arange(n) // 2, jnp.asarray([-1, groups])])

    def loss(params: Params, x: Array) -> Array:
        return jnp.sum(jnp.sin(x @ params))

    found = jax.jit(lambda: sites.moments(loss, params, batch, by=by, groups=groups))()
    exact = np.asarray(per_example_gradients(loss, params, batch))[:n].reshape(groups, 2, -1)
    assert np.all(found.weight == 2)
    np.testing.assert_allclose(total_variance(found), exact.var(1).sum(1), rtol=1e-11)
    np.testing.assert_allclose(found.mean.reshape(groups, -1), exact.mean(1), rtol=1e-11, atol=1e-14)


def long_scan(params: Params, x: Array) -> Array:
    """100 steps with the same params: too long to unroll."""
    return jnp.sum(jax.lax.scan(lambda h, _: (jnp.tanh(h @ params), None), x, length=100)[0] ** 2)


def test_slow_paths_warn_once() -> None:
    """Catches silence about a path that costs more than a gradient, and a warning for every chunk or leaf."""
    params, batch = 0.5 * jnp.eye(3), jnp.asarray(_X)
    with pytest.warns(sites.SlowPathWarning, match=r"1 of 1 leaves .* \(vjp of scan\), which takes some") as caught:
        found = jax.jit(lambda p, b: sites.square_norms(long_scan, p, b, chunk=2))(params, batch)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert dict(found.paths) == {"": "vjp of scan"}
    exact = jax.jit(lambda p, b: per_example_gradients(long_scan, p, b))(params, batch)
    np.testing.assert_allclose(found.square_norms, np.sum(np.asarray(exact, float) ** 2, (1, 2)), rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sites.paths(LOSS, PARAMS, BATCH)


def decayed(params: Params, example: Any) -> Array:
    """The loss with weight decay inside."""
    return LOSS(params, example) + 0.1 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


def test_weight_decay_moves_the_mean_alone(x64: None) -> None:
    """Catches weight decay that joins all leaves, which is slow, or that is lost, counted twice or varies."""
    params, batch = jax.tree.map(lambda x: x.astype(float), (PARAMS, BATCH))
    options = {"weights": jnp.asarray([0.0, 1, 1, 1, 2, 1, 1]), "by": jnp.arange(N) % 2, "groups": 3}
    plain, found = (sites.moments(loss, params, batch, elementwise=True, **options) for loss in (LOSS, decayed))
    chex.assert_trees_all_close(found.m2, plain.m2, rtol=1e-11, atol=1e-13)
    for name, mean in found.mean.items():
        assert np.all(mean[2] == 0)
        np.testing.assert_allclose(mean[:2] - plain.mean[name][:2], np.stack([0.2 * params[name]] * 2), rtol=1e-11)
    assert dict(sites.paths(decayed, params, batch))["['first']"] == "outer products + a part that all examples share"
    norms = sites.square_norms(decayed, params, batch).square_norms
    exact = jax.tree.leaves(per_example_gradients(decayed, params, batch))
    np.testing.assert_allclose(norms, sum(np.sum(np.reshape(g, (N, -1)) ** 2, 1) for g in exact), rtol=1e-12)


NOT_SHARED: dict[str, Callable[[Array, Array], Array]] = {
    "used twice": lambda both, _: both + both**2,
    "squared": lambda both, _: both**2,
    "times data": lambda both, t: t * both,
    "over data": lambda both, t: both / t,
    "under a constant": lambda both, _: 2 / both,
}


@pytest.mark.parametrize("case", NOT_SHARED)
def test_weight_decay_that_examples_do_not_share(x64: None, case: str) -> None:
    """Catches a penalty that is kept apart although its slope depends on the example."""
    params, batch = jax.tree.map(lambda x: x.astype(float), (PARAMS, BATCH))

    def loss(params: Params, example: Any) -> Array:
        return NOT_SHARED[case](decayed(params, example), example.t)

    assert "share" not in dict(sites.paths(loss, params, batch))["['first']"]
    found = jax.jit(lambda p, b: sites.moments(loss, p, b))(params, batch)
    exact = per_example_gradients(loss, params, batch)
    np.testing.assert_allclose(total_variance(found), sum(np.var(g, 0).sum() for g in exact.values()), rtol=1e-11)


def test_params_that_are_not_jax_arrays() -> None:
    """Catches numpy params, Python numbers, and batches of numpy arrays."""
    params = {"w": np.ones((3, 2)), "b": 0.5}

    def loss(params: Params, x: Array) -> Array:
        return jnp.sum((x @ params["w"] + params["b"]) ** 2)

    found = sites.moments(loss, params, _X)
    exact = per_example_gradients(loss, jax.tree.map(jnp.asarray, params), _X)
    np.testing.assert_allclose(total_variance(found), sum(np.var(g, 0).sum() for g in exact.values()), rtol=1e-5)


def test_one_trace_and_one_backward_pass() -> None:
    """Catches a loss that is traced again in every chunk or for every leaf."""
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(LOSS, 1)
    step = jax.jit(lambda p, b: sites.moments(counted, p, b, chunk=2))
    for scale in (1.0, 2.0):
        step(jax.tree.map(lambda x, s=scale: s * x, PARAMS), BATCH)


BAD: dict[str, tuple[Any, str]] = {
    "vector": (lambda p, e: e.x, r"loss must return a real scalar, got shape \(3,\), float32"),
    "integer": (lambda p, e: 1, r"loss must return a real scalar, got shape \(\), int32"),
    "complex": (
        lambda p, e: jax.lax.complex(p["bias"][0], e.t),
        r"loss must return a real scalar, got shape \(\), complex64",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_losses_without_a_gradient(case: str) -> None:
    """Catches losses that would be summed, or fail deep inside jax."""
    loss, message = BAD[case]
    for function in (sites.square_norms, sites.moments, sites.paths):
        with pytest.raises(ValueError, match=message):
            function(loss, PARAMS, BATCH)


def test_square_norms_refuse_bad_options() -> None:
    """Catches options that would be ignored, broadcast or fail deep inside jax."""
    for options, message in (
        ({"chunk": 0}, "chunk must be an integer >= 1, got 0"),
        ({"weights": -jnp.ones(N)}, "weights must be >= 0 and finite"),
        ({"weights": jnp.ones(3)}, r"weights must have shape \(7,\), got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            sites.square_norms(LOSS, PARAMS, BATCH, **options)
    with pytest.raises(ValueError, match="params must be floating point, got int32"):
        sites.square_norms(LOSS, {"w": jnp.arange(3)}, BATCH)
    with pytest.raises(ValueError, match="batch must have one common leading axis"):
        sites.square_norms(LOSS, PARAMS, BATCH._replace(t=jnp.ones(3)))
