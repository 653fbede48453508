"""Moments of given gradients: against numpy, merged, in chunks, in groups, in bfloat16 and near zero variance."""

import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fvjax.gradients import (
    GradientMoments,
    elementwise_variance,
    gradient_moments,
    gradient_noise_scale,
    merge_groups,
    merge_moments,
    per_example_gradients,
    time_bins,
    total_variance,
    variance_by_leaf,
)
from fvjax.interpolants import brownian_bridge
from fvjax.types import Array, Params

N = 10
PARAMS = {"a": jnp.zeros(3, jnp.float32), "b": jnp.zeros((2, 2), jnp.float32)}
values = st.floats(-10, 10)
flat_gradients = hnp.arrays(np.float64, (N, 7), elements=values)
positive_weights = hnp.arrays(np.float64, N, elements=st.floats(0.01, 5))


def inner(params: Params, example: Params) -> Array:
    """A loss whose gradient IS the example, so that a test can choose the gradients."""
    return jnp.sum(params["a"] * example["a"]) + jnp.sum(params["b"] * example["b"])


def tree(flat: Any) -> dict[str, Array]:
    """Gradients [n, 7] as a batch of examples of `inner`, leaves [n, 3] and [n, 2, 2]."""
    return {"a": flat[:, :3], "b": flat[:, 3:].reshape(-1, 2, 2)}


@functools.partial(jax.jit, static_argnames=("groups", "chunk"))
def moments(flat: Any, **options: Any) -> GradientMoments:
    """Moments of the given gradients, in their dtype."""
    batch = tree(flat)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), batch)
    return gradient_moments(inner, params, batch, elementwise=True, **options)


merge = jax.jit(merge_moments)
merge_all = jax.jit(merge_groups)


def flatten(params: Params, lead: int = 0) -> np.ndarray:
    """All leaves side by side, [*lead, 7]."""
    return np.concatenate([np.asarray(x).reshape(*x.shape[:lead], -1) for x in jax.tree.leaves(params)], -1)


@given(flat=flat_gradients, weights=positive_weights)
def test_moments_are_numpy_moments(x64: None, flat: np.ndarray, weights: np.ndarray) -> None:
    """Catches a wrong normalisation of mean, m2 or either ddof, with weights and without."""
    for w, found in ((np.ones(N), moments(flat)), (weights, moments(flat, weights=jnp.asarray(weights)))):
        mean = np.average(flat, axis=0, weights=w)
        m2 = w @ (flat - mean) ** 2
        np.testing.assert_allclose(found.weight, w.sum(), rtol=1e-14)
        np.testing.assert_allclose(flatten(found.mean), mean, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(flatten(found.m2), m2, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(total_variance(found), m2.sum() / w.sum(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(total_variance(moments(flat), ddof=1), flat.var(0, ddof=1).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("chunk", "groups"), [(1, None), (3, None), (7, None), (N, None), (N + 5, None), (3, 3)])
def test_chunks_change_nothing(x64: None, chunk: int, groups: int | None) -> None:
    """Catches a ragged last chunk that is dropped or counted twice, and groups that are lost between chunks."""
    rng = np.random.default_rng(chunk)
    flat, weights = rng.normal(size=(N, 7)) + 3, jnp.asarray(rng.uniform(size=N))
    by = None if groups is None else jnp.asarray(rng.integers(0, groups, N))
    whole, cut = (moments(flat, weights=weights, by=by, groups=groups, chunk=c) for c in (None, chunk))
    chex.assert_trees_all_close(cut, whole, rtol=1e-12)


@given(flat=flat_gradients, weights=positive_weights, cuts=st.tuples(st.integers(0, 5), st.integers(5, N)))
def test_merging(x64: None, flat: np.ndarray, weights: np.ndarray, cuts: tuple[int, int]) -> None:
    """Catches a merge that is not that of the union, not associative, not commutative, or changed by an empty part."""
    edges = (0, *cuts, N)
    w, index = weights, np.arange(N)
    x, y, z = (moments(flat, weights=w * ((index >= a) & (index < b))) for a, b in itertools.pairwise(edges))
    empty = moments(flat, weights=0 * w)
    union = moments(flat, weights=w)
    for merged in (
        merge(merge(x, y), z),
        merge(x, merge(y, z)),
        merge(z, merge(y, x)),
        merge(merge(union, empty), merge(empty, empty)),
    ):
        chex.assert_trees_all_close(merged, union, rtol=1e-11, atol=1e-12)
    assert all(np.all(leaf >= 0) for leaf in jax.tree.leaves(union.m2))


@given(flat=flat_gradients, weights=positive_weights, by=hnp.arrays(np.int32, N, elements=st.integers(-1, 4)))
def test_groups_are_separate_calls(x64: None, flat: np.ndarray, weights: np.ndarray, by: np.ndarray) -> None:
    """Catches examples in the wrong group, indices -1 and 4 that wrap or clamp, and an empty group that is not nan.

    Then the law of total variance: E_c tr Cov(g | c) + tr Cov_c E[g | c] must be what `merge_groups` says.
    """
    grouped = moments(flat, weights=jnp.asarray(weights), by=jnp.asarray(by), groups=4)
    variance = np.asarray(total_variance(grouped))
    for group in range(4):
        inside = by == group
        own = moments(flat, weights=jnp.asarray(weights * inside))
        chex.assert_trees_all_close(jax.tree.map(lambda x, g=group: x[g], grouped), own, rtol=1e-11, atol=1e-11)
        assert np.isnan(variance[group]) == (not inside.any())
    kept = (by >= 0) & (by < 4)
    if kept.any():
        share = np.asarray(grouped.weight) / weights[kept].sum()
        means = flatten(grouped.mean, 1)
        within = np.sum(share[share > 0] * variance[share > 0])
        between = np.sum(share[:, None] * (means - share @ means) ** 2)
        merged = merge_all(grouped)
        np.testing.assert_allclose(total_variance(merged), within + between, rtol=1e-10, atol=1e-10)
        chex.assert_trees_all_close(merged, moments(flat, weights=jnp.asarray(weights * kept)), rtol=1e-10, atol=1e-10)


def test_time_bins() -> None:
    """Catches a bin that is off by one: left ends belong to their bin, the end of the range to the last."""
    t = jnp.asarray([0.0, 0.24, 0.25, 0.5, 0.99, 1.0])
    np.testing.assert_array_equal(time_bins(t, 4), [0, 0, 1, 2, 3, 3])
    outside = jnp.asarray([0.1, 0.25, 0.49, 0.5, 0.75, 0.9])
    np.testing.assert_array_equal(time_bins(outside, 2, time_range=(0.25, 0.75)), [0, 0, 0, 1, 1, 1])
    bridge = brownian_bridge(0.1)
    traced = jax.jit(lambda interpolant, t: time_bins(t, 3, time_range=interpolant.time_range))(bridge, t)
    np.testing.assert_array_equal(traced, [0, 0, 0, 1, 2, 2])


@pytest.mark.parametrize("ddof", [0, 1])
def test_trace_is_the_sum_of_its_parts(x64: None, ddof: int) -> None:
    """Catches a leaf, a coordinate or a group axis that is summed away or left out."""
    flat, by = np.random.default_rng(0).normal(size=(N, 7)), np.arange(N) % 2
    grouped = moments(flat, by=jnp.asarray(by), groups=2)
    total = np.stack([flat[by == g].var(0, ddof=ddof).sum() for g in range(2)])
    leaves = variance_by_leaf(grouped, ddof=ddof)
    each = elementwise_variance(grouped, ddof=ddof)
    assert jax.tree.map(jnp.shape, leaves) == {"a": (2,), "b": (2,)}
    assert jax.tree.map(jnp.shape, each) == {"a": (2, 3), "b": (2, 2, 2)}
    np.testing.assert_allclose(total_variance(grouped, ddof=ddof), total, rtol=1e-13)
    np.testing.assert_allclose(sum(jax.tree.leaves(leaves)), total, rtol=1e-13)
    np.testing.assert_allclose(flatten(each, 1).sum(1), total, rtol=1e-13)
    assert np.isnan(total_variance(moments(flat[:1]), ddof=1))


def test_gradient_noise_scale_is_its_definition(x64: None) -> None:
    """Catches a wrong ratio, a lost group axis, and a crash instead of inf or nan where the mean vanishes."""
    flat, by = np.random.default_rng(0).normal(size=(N, 7)) + 1, np.arange(N) % 2
    expected = [flat[by == g].var(0).sum() / np.sum(flat[by == g].mean(0) ** 2) for g in range(2)]
    grouped = moments(flat, by=jnp.asarray(by), groups=2)
    np.testing.assert_allclose(gradient_noise_scale(grouped), expected, rtol=1e-13)
    np.testing.assert_allclose(gradient_noise_scale(moments(flat[by == 0])), expected[0], rtol=1e-13)
    assert gradient_noise_scale(moments(np.stack([flat[0], -flat[0]]))) == np.inf
    assert np.isnan(gradient_noise_scale(moments(0 * flat)))


def test_ddof_one_is_unbiased(x64: None) -> None:
    """Catches n in place of n - 1, and |mean|^2 without its correction: 20,000 sets of 4 draws.

    The averages must lie within 4 standard errors of the truth, and the plug-in forms must not.
    """
    sets, n = 20_000, 4
    mean, deviation = np.linspace(-1, 1, 7), np.linspace(0.5, 2, 7)
    flat = mean + deviation * np.asarray(jax.random.normal(jax.random.key(0), (sets, n, 7)))

    def estimates(ddof: int) -> tuple[Array, Array]:
        def one(gradients: Array) -> tuple[Array, Array]:
            found = moments(gradients)
            variance = total_variance(found, ddof=ddof)
            return variance, variance / gradient_noise_scale(found, ddof=ddof)

        return jax.jit(jax.vmap(one))(flat)

    for ddof in (0, 1):
        for samples, truth in zip(estimates(ddof), (np.sum(deviation**2), np.sum(mean**2)), strict=True):
            standard_error = samples.std() / sets**0.5
            assert (abs(samples.mean() - truth) < 4 * standard_error) == (ddof == 1)


def test_bfloat16_accumulates_in_float32() -> None:
    """Catches sums in bfloat16, which stop at 256 ones: 1000 gradients of value 1 or 3, weights in bfloat16 too."""
    flat = jnp.asarray(np.where(np.arange(1000) % 4 == 0, 3.0, 1.0)[:, None] * np.ones(7), jnp.bfloat16)
    weights = jnp.ones(1000, jnp.bfloat16)
    for options in (
        {},
        {"weights": weights, "chunk": 16},
        {"by": jnp.zeros(1000, int), "groups": 1},
    ):
        found = moments(flat, **options)
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
        np.testing.assert_allclose(flatten(found.mean), 1.5, rtol=1e-6)
        np.testing.assert_allclose(total_variance(found), 7 * 0.75, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"chunk": 1}, {"chunk": 64}, {"groups": 4}, {"groups": 4, "chunk": 64}])
def test_tiny_variance_survives_float32(options: dict[str, Any]) -> None:
    """Catches E|g|^2 - |E g|^2 and every sum whose rounding error is squared into the variance.

    The true variance is 1e-10 of the squared mean, n = 20,000; float64 of the same float32 gradients is the reference.
    """
    n = 20_000
    rng = np.random.default_rng(0)
    flat = (3 * rng.normal(size=7) * (1 + 1e-5 * rng.normal(size=(n, 7)))).astype(np.float32)
    exact = flat.astype(np.float64).var(0)
    by = {"by": jnp.asarray(rng.integers(0, 4, n))} if "groups" in options else {}
    found = moments(flat, **options, **by)
    found = merge_groups(found) if by else found
    np.testing.assert_allclose(flatten(elementwise_variance(found)), exact, rtol=1e-3)
    naive = np.mean(flat**2, 0) - np.mean(flat, 0) ** 2
    assert np.all(np.abs(naive - exact) > 10 * exact)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "chunk": ({"chunk": 0}, "chunk must be an integer >= 1, got 0"),
    "fraction": ({"chunk": 2.5}, "chunk must be an integer >= 1, got 2.5"),
    "groups": ({"by": jnp.zeros(N, int), "groups": 0}, "groups must be an integer >= 1, got 0"),
    "groups alone": ({"groups": 2}, "groups must be given with by only, got groups=2"),
    "by shape": ({"by": jnp.zeros(3, int), "groups": 2}, r"by must have shape \(10,\), got \(3,\)"),
    "by dtype": ({"by": jnp.zeros(N), "groups": 2}, "by must be integers, got float32"),
    "weights": ({"weights": -jnp.ones(N)}, "weights must be >= 0 and finite"),
    "weight shape": ({"weights": jnp.ones((N, 1))}, r"weights must have shape \(10,\), got \(10, 1\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_bad_options(case: str) -> None:
    """Catches options that would be ignored, broadcast or fail deep inside jax."""
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        gradient_moments(inner, PARAMS, tree(jnp.ones((N, 7))), **options)


def test_groups_are_counted_where_by_is_known() -> None:
    """Catches a last group that is missing, and a traced `by` that fails deep inside jax."""
    batch, by = tree(jnp.ones((N, 7))), jnp.arange(N) // 4
    assert gradient_moments(inner, PARAMS, batch, by=by).weight.tolist() == [4, 4, 2]
    with pytest.raises(ValueError, match="groups must be given where by is traced"):
        jax.jit(lambda by: gradient_moments(inner, PARAMS, batch, by=by))(by)


def test_refuses_bad_params_batches_and_ddof() -> None:
    """Catches complex params (whose variance would be a complex number), ragged batches, and another ddof."""
    with pytest.raises(ValueError, match="params must be floating point, got complex64"):
        per_example_gradients(lambda p, e: jnp.abs(p), jnp.ones((), complex), jnp.ones(3))
    for function in (per_example_gradients, gradient_moments):
        with pytest.raises(ValueError, match="batch must have one common leading axis"):
            function(inner, PARAMS, {"a": jnp.ones((3, 3)), "b": jnp.ones((2, 2, 2))})
    found = moments(jnp.ones((3, 7)))
    for measure in (elementwise_variance, variance_by_leaf, total_variance, gradient_noise_scale):
        with pytest.raises(ValueError, match="ddof must be 0 or 1, got 2"):
            measure(found, ddof=2)
    with pytest.raises(ValueError, match="bins must be an integer >= 1, got 0"):
        time_bins(jnp.ones(3), 0)
    with pytest.raises(ValueError, match="time_range must be a pair"):
        time_bins(jnp.ones(3), 2, time_range=(0.5, 0.5))
