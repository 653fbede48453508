"""What an audit measures, piece by piece: nearest targets, the streamed minimiser, gradients, fields of any kind."""

from typing import Any

import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st

import fvjax
from fvjax import Pair, PathSample, nets
from fvjax.auditing import _gradients, _inputs, _solvers
from fvjax.auditing._gradients import gradient_variance, parameter_names
from fvjax.auditing._inputs import Field, Rows
from fvjax.auditing._minimiser import Minimiser
from fvjax.auditing._nearest import Search, Targets
from fvjax.auditing._solvers import Solver
from fvjax.sites import DisagreementError


def points(seed: int, n: int, d: int = 3) -> np.ndarray:
    """Gaussian points, float32 [n, d]."""
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


@hypothesis.settings(max_examples=10)
@hypothesis.given(st.integers(2, 40), st.sampled_from([7, 40]), st.booleans(), st.integers(0, 99))
def test_search_is_brute_force(n, chunk, doubled, seed):
    """Catches targets lost between chunks, the own target or its copies among the others, and a wrong count."""
    values = points(seed, n)
    if doubled:
        values[n // 2 :] = values[: n - n // 2]
    own = np.random.default_rng(seed).integers(0, n, 9)
    queries = (values[own] + 0.4 * points(seed + 1, 9)).astype(np.float32)
    rows = Rows("x", values, np.dtype(np.float32))
    targets = Targets(values.mean(0, dtype=float))
    targets.begin(rows)
    search = Search(queries, values[own], targets.centre)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_inputs, "CHUNK_ROWS", chunk)
        for start in range(0, n, rows.chunk):
            search.feed(targets.chunk(start, rows.read(start, min(start + rows.chunk, n))))
    once = np.unique(values.astype(float), axis=0)
    distances = np.linalg.norm(queries[:, None].astype(float) - once, axis=2)
    is_own = (once == values[own][:, None]).all(2)
    others = np.sort(np.where(is_own, np.inf, distances), 1)
    np.testing.assert_allclose(search.to_own, distances[is_own], rtol=1e-12)
    found = search.nearest_others(targets)
    expected = np.concatenate([others, np.full((9, 2), np.inf)], 1)[:, :2]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_array_equal(search.nearer, (distances < distances[is_own][:, None]).sum(1))
    np.testing.assert_allclose(search.nearest_two(found)[:, 0], distances.min(1), rtol=1e-12)
    assert targets.distinct == len(once)


@pytest.mark.parametrize("interpolant", [fvjax.linear(), fvjax.constant_noise(0.3), fvjax.brownian_bridge(0.5)])
def test_streamed_minimiser_is_the_exact_one(interpolant):
    """Catches chunks with wrong weights against each other: every size, and points near one pair and far from all."""
    pairs = Pair(points(0, 23), points(1, 23) + 2)
    t = jnp.asarray([0.1, 0.4, 0.5, 0.7, 0.9], jnp.float32)
    near = (1 - t)[:, None] * pairs.x0[:5] + t[:, None] * pairs.x1[:5]
    x = jnp.concatenate([near, 30.0 * points(2, 5)])
    places = PathSample(jnp.concatenate([t, t]), x, x)
    expected = jax.vmap(fvjax.empirical_minimiser(pairs, interpolant), (None, 0, 0))(None, places.t, x)
    for size in (4, 23):
        found = Minimiser(places, interpolant)
        for start in range(0, 23, size):
            found.feed(pairs.x0[start : start + size], pairs.x1[start : start + size], size=size)
        np.testing.assert_allclose(found.velocities(), expected, rtol=2e-3, atol=1e-4)


class Net(eqx.Module):
    """A network with a function among its leaves, as Equinox users have it."""

    first: eqx.nn.Linear
    last: eqx.nn.Linear
    activation: Any

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key)
        self.first = eqx.nn.Linear(5, 6, key=keys[0])
        self.last = eqx.nn.Linear(6, 4, key=keys[1])
        self.activation = jax.nn.silu

    def __call__(self, t: jax.Array, x: jax.Array) -> jax.Array:
        """The velocity of ONE example."""
        hidden = self.activation(self.first(jnp.append(jnp.ravel(x), t)))
        return self.last(hidden).reshape(x.shape)


class NnxNet(nnx.Module):
    """The same in Flax NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(5, 6, rngs=rngs)
        self.last = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, t: jax.Array, x: jax.Array) -> jax.Array:
        """The velocity of ONE example."""
        return self.last(jax.nn.silu(self.first(jnp.append(jnp.ravel(x), t)))).reshape(x.shape)


def equinox_field() -> Field:
    """The module itself as params."""
    return Field.of(lambda net, t, x: net(t, x), Net(jax.random.key(0)))


def nnx_field() -> Field:
    """Graph and state."""
    graph, state = nnx.split(NnxNet(nnx.Rngs(0)))
    return Field.of(lambda state, t, x: nnx.merge(graph, state)(t, x), state)


def linen_field(dtype: Any = jnp.float32) -> Field:
    """Of fvjax.nets."""
    model = nets.mlp((2, 2), width=6, depth=1, time_features=2)
    return Field.of(model.apply, jax.tree.map(lambda leaf: leaf.astype(dtype), model.init(jax.random.key(0))))


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (equinox_field, ["first", "last"]),
        (nnx_field, ["first", "last"]),
        (linen_field, ["block_0", "input", "output"]),
        (lambda: linen_field(jnp.bfloat16), ["block_0", "input", "output"]),
    ],
    ids=["equinox", "nnx", "linen", "bfloat16"],
)
def test_gradients_of_any_framework_are_those_of_vmap_grad(make, layers):
    """Catches a leaf that is lost, layers that are mixed up, and a variance with the wrong ddof or by the wrong bin."""
    field = make()
    dtype = np.dtype(np.float32)
    _inputs.check_field(field, (2, 2), dtype)
    pairs = Pair(*(jnp.asarray(points(k, 24, 4).reshape(24, 2, 2)) for k in (0, 1)))
    paths = fvjax.draw_paths(jax.random.key(1), pairs, fvjax.linear())
    found = gradient_variance(field, paths, bins=2, time_range=(0.0, 1.0))
    assert [layer.name for layer in found.by_layer] == layers
    function, params = field.parts()
    arrays, rest = eqx.partition(params, eqx.is_inexact_array)

    def loss(arrays: Any, sample: PathSample) -> jax.Array:
        predicted = function(eqx.combine(arrays, rest), sample.t, sample.x)
        return jnp.sum((predicted.astype(jnp.float32) - sample.target) ** 2)

    gradients = jax.vmap(jax.grad(loss), (None, 0))(arrays, paths)
    flat = np.concatenate([np.asarray(g, float).reshape(24, -1) for g in jax.tree.leaves(gradients)], 1)
    tolerance = 0.05 if make().arrays[0].dtype == jnp.bfloat16 else 1e-4
    variance = flat.var(0, ddof=1).sum()
    signal = (flat.mean(0) ** 2).sum() - variance / 24
    assert found.parameters == flat.shape[1]
    assert found.variance == pytest.approx(variance, rel=tolerance)
    resolved = variance / signal if 24 * signal > variance else None
    assert found.noise_scale == (resolved and pytest.approx(resolved, rel=2 * tolerance))
    assert sum(layer.variance for layer in found.by_layer) == pytest.approx(found.variance, rel=1e-6)
    ends = _solvers.carried(field, np.asarray(pairs.x0[:3]), Solver("euler", 1))
    first = jax.vmap(lambda x: x + field(jnp.float32(0), x))(pairs.x0[:3])
    np.testing.assert_allclose(ends, first, atol=0.05 if tolerance > 0.01 else 1e-5)
    early = np.asarray(paths.t) < 0.5
    for row, rows in zip(found.by_time, (early, ~early), strict=True):
        assert row.draws == rows.sum()
        assert row.variance == pytest.approx(flat[rows].var(0, ddof=1).sum(), rel=tolerance)


def test_gradients_that_are_not_verified_are_refused(wrong_gradients):
    """Catches an audit that shows a variance which the library itself finds to be wrong."""
    pairs = Pair(*(jnp.asarray(points(k, 8, 4).reshape(8, 2, 2)) for k in (0, 1)))
    paths = fvjax.draw_paths(jax.random.key(1), pairs, fvjax.linear())
    with pytest.raises(DisagreementError, match=r"are not those of vmap\(grad\)"):
        gradient_variance(equinox_field(), paths, bins=2, time_range=(0.0, 1.0))


def test_a_mean_gradient_lost_in_the_draws_has_no_noise_scale():
    """Catches a small number that is read off where the draws themselves make most of |mean of g|^2."""
    assert _gradients._ratio(100.0, 2.0, 100) == (100.0, 50.0)
    assert _gradients._ratio(100.0, 0.5, 100) == (100.0, None)  # 200 examples, of 100 draws
    assert _gradients._ratio(100.0, -0.5, 100) == (100.0, None)


def test_any_field_is_carried_and_answers_in_the_dtype_of_the_pairs():
    """Catches velocities in half precision inside of a solver, and chunks that change the answer."""
    field = linen_field(jnp.bfloat16)
    sources = points(3, 5, 4).reshape(5, 2, 2)
    ends = _solvers.carried(field, sources, Solver("euler", 2))
    assert ends.dtype == np.float32
    function, params = field.parts()
    expected = jax.vmap(lambda x: fvjax.transport(function, params, x, solver="euler", steps=2))(jnp.asarray(sources))
    np.testing.assert_allclose(ends, expected, atol=1e-5)
    half = _inputs.checked_inputs(Pair(*(jnp.asarray(sources, jnp.bfloat16),) * 2), None, None)
    assert half.dtype == half.x1.read(0, 2).dtype == np.float32


def test_parameters_without_names_and_without_numbers():
    """Catches a field without parameters that fails, integers that are differentiated, and an empty name."""
    paths = fvjax.draw_paths(jax.random.key(1), Pair(*(jnp.ones((4, 3)),) * 2), fvjax.linear())
    for nothing in (None, (), {"steps": 3, "table": np.arange(3)}):
        field = Field.of(lambda params, t, x: x, nothing)
        assert gradient_variance(field, paths, bins=2, time_range=(0.0, 1.0)) is None
    assert parameter_names(jnp.ones(3)) == ["params"]
    assert parameter_names({"a": [np.ones(2), np.arange(2)], "b": 1.0}) == ["a.0"]
