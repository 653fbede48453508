"""Pairs that a flow makes, against closed forms: chunks, failures, the way back, and the share of real pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from fvjax import flows
from fvjax.rectification import _pairs, diffuse_pairs, generate_pairs, invert_pairs, mixed
from fvjax.types import Pair


def growth(params, t, x):
    """dx/dt = rate x: x(1) = exp(rate) x(0)."""
    return params * x


def points(n, d=2, seed=0):
    """Gaussian points."""
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


@pytest.mark.parametrize("chunk", [1, 3, 7, 8, 100])
def test_every_chunk_gives_the_rows_of_the_whole(chunk):
    """Catches a lost or doubled last chunk, rows in another order, and filled-up rows that are returned."""
    x0 = points(8)
    pairs = generate_pairs(growth, jnp.float32(0.5), x0, chunk=chunk, solver="dopri5", rtol=1e-6)
    assert pairs.x0.shape == pairs.x1.shape == (8, 2)
    np.testing.assert_array_equal(pairs.x0, x0)
    np.testing.assert_allclose(pairs.x1, np.exp(0.5) * x0, rtol=1e-5)


def test_options_reach_the_solver():
    """Catches options that are accepted and ignored: Euler's answer, and that on a part of the way."""
    x0 = points(3)
    rate = jnp.float32(1.0)
    np.testing.assert_allclose(generate_pairs(growth, rate, x0, solver="euler", steps=2).x1, 1.5**2 * x0, rtol=1e-6)
    part = generate_pairs(growth, rate, x0, solver="heun", steps=50, start=0.25, end=0.75).x1
    np.testing.assert_allclose(part, np.exp(0.5) * x0, rtol=1e-4)


def test_images_of_jax_come_back_as_host_arrays_in_their_dtype():
    """Catches results that pile up on the device, and a change of dtype or shape."""
    x0 = jnp.ones((5, 4, 4, 1), jnp.bfloat16)
    pairs = generate_pairs(growth, jnp.bfloat16(1), x0, chunk=2, solver="euler", steps=1)
    assert isinstance(pairs.x0, np.ndarray)
    assert isinstance(pairs.x1, np.ndarray)
    assert pairs.x1.shape == (5, 4, 4, 1)
    assert pairs.x1.dtype == jnp.bfloat16
    double = generate_pairs(growth, jnp.float32(1), points(2).astype(np.float64), solver="euler", steps=1)
    assert double.x0.dtype == double.x1.dtype == np.float32  # as JAX holds it


def test_a_field_compiles_once_for_all_chunks_params_and_sets():
    """Catches a compilation for every chunk or round; a Partial's arrays are arguments, not constants."""
    traces = []

    def field(scale, params, t, x):
        traces.append(1)
        return scale * params * x

    counts = []
    for scale in (1.0, 2.0):
        for n in (7, 9):
            bound = Partial(field, jnp.float32(scale))
            pairs = generate_pairs(bound, jnp.float32(n), points(n), chunk=3, solver="euler", steps=1)
            np.testing.assert_allclose(pairs.x1, (1 + scale * n) * pairs.x0, rtol=1e-5)
            counts.append(len(traces))
    assert counts == counts[:1] * 4


def test_few_chunks_are_on_the_device(monkeypatch):
    """Catches all chunks sent at once: 50,000 images would not fit. At most two results wait to be fetched."""
    waiting, most = set(), 0
    carried, asarray = _pairs._carried, np.asarray

    class Result:
        def __init__(self, value):
            nonlocal most
            self.value = value
            waiting.add(id(self))
            most = max(most, len(waiting))

        def __array__(self, dtype=None, copy=None):
            waiting.discard(id(self))
            return asarray(self.value)

    kept = []

    def spy(*arguments, **options):
        kept.append(Result(carried(*arguments, **options)))
        return kept[-1]

    monkeypatch.setattr(_pairs, "_carried", spy)
    generate_pairs(growth, jnp.float32(1), points(10), chunk=1, solver="euler", steps=1)
    assert len(kept) == 10
    assert most == 2
    assert not waiting


def test_ends_that_are_not_finite_are_counted():
    """Catches nan that is trained on: 3 of 5 sources meet a singular field, in different chunks."""

    def field(params, t, x):
        return jnp.where(x > 0, x / 0.0, x)

    x0 = np.asarray([[1.0], [-1.0], [2.0], [3.0], [-1.0]], np.float32)
    with pytest.raises(FloatingPointError, match=r"got 3 of 5 that are not .solver = euler, steps = 2."):
        generate_pairs(field, None, x0, chunk=2, solver="euler", steps=2)
    with pytest.raises(FloatingPointError, match=r"got 3 of 5 that are not .the default solver."):
        generate_pairs(field, None, x0)


def test_the_way_back_is_the_inverse():
    """Catches x0 and x1 that are swapped, and a flow that runs forward: pairs of real targets keep them."""
    x1 = points(6)
    pairs = invert_pairs(growth, jnp.float32(0.7), x1, chunk=4, rtol=1e-6)
    np.testing.assert_array_equal(pairs.x1, x1)
    np.testing.assert_allclose(pairs.x0, np.exp(-0.7) * x1, rtol=1e-5)
    forth = generate_pairs(growth, jnp.float32(0.7), pairs.x0, rtol=1e-6, start=0.0, end=1.0)
    np.testing.assert_allclose(forth.x1, x1, rtol=1e-4)
    part = invert_pairs(growth, jnp.float32(0.7), x1, rtol=1e-6, start=0.5)
    np.testing.assert_allclose(part.x0, np.exp(-0.35) * x1, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_the_share_of_real_pairs_is_exact(share):
    """Catches a share that holds on average only, real rows that come twice, and pairs that are torn apart."""
    generated = Pair(points(20), points(20) + 10)
    real = Pair(points(30, seed=1) + 100, points(30, seed=1) + 110)
    pairs = mixed(jax.random.key(0), generated, real, share)
    np.testing.assert_allclose(pairs.x1 - pairs.x0, 10, atol=1e-4)
    is_real = pairs.x0[:, 0] > 50
    assert is_real.sum() == round(share * 20)
    assert len(np.unique(pairs.x0[:, 0])) == 20
    np.testing.assert_array_equal(pairs.x0[~is_real], generated.x0[~is_real])
    assert generated.x0.max() < 50  # the given arrays are untouched


def test_places_and_rows_follow_from_the_key():
    """Catches the first rows taken every time, and a key that is ignored."""
    generated, real = Pair(points(40), points(40)), Pair(points(40) + 100, points(40))
    one, same, other = (mixed(jax.random.key(k), generated, real, 0.5).x0 for k in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one > 50, other > 50)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: generate_pairs(growth, 1.0, np.ones((0, 2))), "x0 must hold at least one example, got 0"),
        (lambda: generate_pairs(growth, 1.0, np.ones((2, 2), int)), "x0 must be floating point, got int"),
        (lambda: generate_pairs(growth, 1.0, np.full((2, 2), np.nan)), "x0 must be finite, got 4 of 4 entries"),
        (lambda: generate_pairs(growth, 1.0, np.ones((2, 2)), chunk=0), "chunk must be an integer >= 1, got 0"),
        (lambda: generate_pairs(growth, 1.0, np.ones((2, 2)), solver="rk4"), "solver must be one of euler, heun"),
        (lambda: generate_pairs(growth, 1.0, np.ones((2, 2)), solver="euler"), "steps must be given for solver euler"),
        (lambda: invert_pairs(growth, 1.0, np.ones(())), "x1 must have one common leading axis"),
        (lambda: mixed(None, Pair(points(4), points(4)), Pair(points(1), points(1)), 0.5), r"real must hold at least"),
        (lambda: mixed(None, Pair(points(4), points(4)), Pair(points(4), points(4)), 1.5), r"share must be in \[0, 1"),
        (
            lambda: mixed(None, Pair(points(4), points(4)), Pair(points(4, 3), points(4, 3)), 0.5),
            r"generated and real must hold pairs of one shape, got \(2,\) and \(3,\)",
        ),
    ],
)
def test_bad_input_gets_one_clear_error(call, message):
    """Catches an error of a library below that names nothing the caller wrote, and broadcasting."""
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_row_i_is_what_transport_makes_of_it():
    """Catches a shared error norm: with an adaptive solver each example is carried as if it were alone."""

    def field(params, t, x):
        return jnp.sin(x * 5 * (1 + t))

    x0 = points(4)
    alone = jax.jit(lambda x: flows.transport(field, None, x, rtol=1e-3))
    np.testing.assert_allclose(
        generate_pairs(field, None, x0, rtol=1e-3).x1, np.stack([alone(x) for x in x0]), rtol=1e-5, atol=1e-6
    )


def test_diffused_pairs_do_not_depend_on_chunks_or_neighbours():
    """Catches keys that are drawn by chunk, filled-up rows that are returned, and one path for all examples."""
    x0, key = points(7), jax.random.key(3)
    options = {"sigma": 0.5, "steps": 4}
    whole = diffuse_pairs(key, growth, jnp.float32(0.5), x0, **options)
    parts = diffuse_pairs(key, growth, jnp.float32(0.5), x0, chunk=3, **options)
    np.testing.assert_array_equal(whole.x0, x0)
    np.testing.assert_allclose(parts.x1, whole.x1, rtol=1e-6)
    np.testing.assert_allclose(
        diffuse_pairs(key, growth, jnp.float32(0.5), x0[:2], **options).x1, whole.x1[:2], rtol=1e-6
    )
    same = diffuse_pairs(key, growth, jnp.float32(0.5), np.zeros_like(x0), **options).x1
    assert len(np.unique(same)) == same.size


def test_diffused_pairs_without_noise_are_those_of_euler():
    """Catches noise that survives sigma = 0, and options that do not reach the solver."""
    x0 = points(3)
    pairs = diffuse_pairs(jax.random.key(0), growth, jnp.float32(1), x0, sigma=0.0, steps=2)
    np.testing.assert_allclose(pairs.x1, 1.5**2 * x0, rtol=1e-6)


def test_diffused_pairs_that_explode_are_counted():
    """Catches nan and inf that are handed on as data."""
    with pytest.raises(FloatingPointError, match="got 2 of 2 that are not .solver = euler, steps = 50, sigma = 1.0"):
        diffuse_pairs(jax.random.key(0), growth, jnp.float32(1e30), points(2), sigma=1.0, steps=50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": -0.1}, "sigma must be >= 0 and finite, got -0.1"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"solver": "heun"}, "solver must be one of euler, shark, got 'heun'"),
    ],
)
def test_bad_options_of_a_diffusion_are_named(options, message):
    """Catches a sigma that nobody looks at once it is traced, and options of another solver."""
    given = {"sigma": 1.0, "steps": 2} | options
    with pytest.raises(ValueError, match=message):
        diffuse_pairs(jax.random.key(0), growth, jnp.float32(1), points(2), **given)
