"""Measures of a round against closed forms: an accelerated line, a known end, copies of training points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvjax import metrics
from fvjax.rectification import generate_pairs, round_measures
from fvjax.types import Pair


def accelerated(params, t, x):
    """v = 2 t a: from x0 to x0 + a, with S = int |a - 2 t a|^2 dt = |a|^2 / 3, and Euler's end x0 + a (1 - 1/k)."""
    return 2 * t * params


def pairs(n=6):
    """Sources, and targets that are 1 along both axes away."""
    x0 = np.random.default_rng(0).standard_normal((n, 2)).astype(np.float32)
    return Pair(x0, x0 + 1)


A = jnp.asarray([3.0, 4.0])
OPTIONS = {"rtol": 1e-6}


@pytest.mark.parametrize("chunk", [4, 100])
def test_every_measure_has_its_closed_form(chunk):
    """Catches a mean over dimensions, errors against the pairs instead of the accurate solve, mixed-up targets."""
    given = pairs()
    found = round_measures(
        accelerated, A, given, targets=given.x0 + np.asarray(A), euler_steps=(1, 2, 5), nodes=4, chunk=chunk, **OPTIONS
    )
    np.testing.assert_allclose(found.straightness, 25 / 3, rtol=1e-4)
    assert found.straightness_error < 1e-3
    np.testing.assert_allclose(found.pair.mean, np.hypot(2, 3), rtol=1e-4)
    np.testing.assert_allclose(found.target.mean, 0, atol=1e-4)
    assert [entry.steps for entry in found.euler] == [1, 2, 5]
    np.testing.assert_allclose([entry.distance.mean for entry in found.euler], 5 / np.array([1, 2, 5]), rtol=1e-4)
    assert found.pair.count == found.euler[0].distance.count == 6
    assert found.memorized is None


def test_straightness_error_is_the_standard_error_of_the_mean():
    """Catches a standard deviation in its place: S = |x0|^2 / 3 for v = 2 t x0, where x0 = x / (1 + t^2)."""

    def field(params, t, x):
        return 2 * t * x / (1 + t**2)

    given = pairs(40)
    found = round_measures(field, None, given, euler_steps=(), nodes=8, **OPTIONS)
    exact = (given.x0**2).sum(axis=1) / 3
    np.testing.assert_allclose(found.straightness, exact.mean(), rtol=1e-4)
    np.testing.assert_allclose(found.straightness_error, exact.std(ddof=1) / np.sqrt(40), rtol=1e-3)
    assert found.euler == ()
    assert np.isnan(round_measures(field, None, pairs(1), euler_steps=(), nodes=2, **OPTIONS).straightness_error)


def test_memorized_fraction_is_that_of_the_ends():
    """Catches a fraction of the sources or of the pairs' targets: half of the ends are training points."""
    given = pairs(8)
    ends = generate_pairs(accelerated, A, given.x0, **OPTIONS).x1
    points = np.concatenate([ends[:4], ends[:4] + 30])
    key = jax.random.key(0)
    found = round_measures(accelerated, A, given, training_points=points, key=key, euler_steps=(), **OPTIONS)
    assert found.memorized == metrics.memorized_fraction(ends, points, key=key)
    assert 0.5 <= found.memorized.fraction < 1


def test_times_apply_to_the_few_steps_too():
    """Catches Euler on [0, 1] against an accurate solve of a part: from 0 to 1/2 one step is off by |a| / 4."""
    found = round_measures(accelerated, A, pairs(), euler_steps=(1,), nodes=2, start=0.0, end=0.5, **OPTIONS)
    np.testing.assert_allclose(found.euler[0].distance.mean, 5 / 4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"euler_steps": (1, 1)}, r"euler_steps must hold no number twice, got \(1, 1\)"),
        ({"euler_steps": (0,)}, "euler_steps must be an integer >= 1, got 0"),
        ({"nodes": 0}, "nodes must be an integer >= 1, got 0"),
        ({"chunk": 0}, "chunk must be an integer >= 1, got 0"),
        ({"targets": np.ones((3, 2))}, "targets and pairs.x1 must have the same shape"),
        ({"training_points": np.ones((3, 2))}, "key must be given with training_points, got None"),
        ({"pairs": Pair(np.ones((2, 2)), np.ones((3, 2)))}, "pairs.x0 and pairs.x1 must have the same shape"),
    ],
)
def test_bad_input_gets_one_clear_error(options, message):
    """Catches broadcasting of other targets, and a shared key that nobody chose."""
    arguments = {"pairs": pairs()} | options
    with pytest.raises(ValueError, match=f"^{message}"):
        round_measures(accelerated, A, arguments.pop("pairs"), **arguments)
