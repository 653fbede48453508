"""Solves that fail, eagerly and under jit, and every option, time and shape that is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvjax.flows import straightness, trajectory, transport


def swirl(speed, t, x):
    """Turns the plane by `speed` over [0, 1], at a rate that depends on time."""
    return speed * 2 * t * jnp.stack([-x[1], x[0]])


def growth(rate, t, x):
    """x' = rate x^2 is infinite at t = 1 / (rate x0)."""
    del t
    return rate * x**2


def broken_after_half(params, t, x):
    """A field that is nan in the second half of the time."""
    del params
    return jnp.where(t > 0.5, jnp.nan, x)


@pytest.mark.parametrize(
    ("field", "x0", "options", "cause"),
    [
        (growth, 2.0, {"solver": "midpoint", "steps": 200}, "not finite"),
        (broken_after_half, 1.0, {}, "step size fell below"),
        (broken_after_half, np.nan, {}, "not finite"),
        (growth, 0.9, {"max_steps": 3}, "max_steps was reached"),
    ],
)
def test_a_failed_solve_raises_with_its_cause(field, x0, options, cause):
    """Catches a silent nan, and the half-way state of a solve that was given up."""
    with pytest.raises(RuntimeError, match=cause):
        transport(field, jnp.float32(1.0), jnp.asarray([0.1, x0], jnp.float32), **options)


def test_a_failed_solve_raises_inside_vmap_and_grad():
    """Catches an error that is lost because the result is a tracer although nothing is compiled around it."""
    x0 = jnp.asarray([[0.1], [2.0]])

    def solve(x):
        return transport(growth, jnp.float32(1.0), x, solver="euler", steps=200)[0]

    with pytest.raises(RuntimeError, match="^euler from t = 0.0 to 1.0 .steps = 200. failed: .* not finite"):
        jax.grad(lambda x: jnp.sum(jax.vmap(solve)(x)))(x0)


def test_under_jit_only_the_failed_example_is_nan():
    """Catches one bad example that spoils its batch, and a failed one that looks like a result."""
    solve = jax.jit(jax.vmap(lambda x: transport(growth, jnp.float32(1.0), x)))
    x1 = solve(jnp.asarray([[0.5, 0.5], [2.0, 0.1], [-1.0, 0.2]]))
    assert np.all(np.isnan(x1[1]))
    np.testing.assert_allclose(x1[jnp.asarray([0, 2])], [[1.0, 1.0], [-0.5, 0.25]], atol=1e-4)


def test_a_failed_trajectory_raises():
    """Catches the check being left out where states are saved on the way: diffrax fills them with inf."""
    with pytest.raises(RuntimeError, match="step size fell below"):
        trajectory(growth, jnp.float32(1.0), jnp.asarray([2.0]), [0.2, 0.9])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "rk4"}, "solver must be one of euler, heun, midpoint, tsit5, dopri5, got 'rk4'"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"steps": 2.0}, "steps must be an integer >= 1, got 2.0"),
        ({"steps": True}, "steps must be an integer >= 1, got True"),
        ({"steps": 4, "rtol": 1e-3}, "rtol must not be given together with steps, got 0.001"),
        ({"steps": 4, "atol": 1e-3}, "atol must not be given together with steps, got 0.001"),
        ({"steps": 4, "max_steps": 8}, "max_steps must not be given together with steps, got 8"),
        ({"solver": "euler"}, "steps must be given for solver euler"),
        ({"solver": "euler", "rtol": 1e-3}, "steps must be given for solver euler"),
        ({"rtol": 0.0}, "rtol must be > 0 and finite, got 0.0"),
        ({"atol": -1e-3}, "atol must be > 0 and finite, got -0.001"),
        ({"rtol": float("nan")}, "rtol must be > 0 and finite, got nan"),
        ({"max_steps": 0}, "max_steps must be an integer >= 1, got 0"),
        ({"start": 1.0}, "start and end must differ in float32, got 1.0 and 1.0"),
        ({"end": 1e-60}, "start and end must differ in float32, got 0.0 and 1e-60"),
        ({"end": float("inf")}, "end must be finite, got inf"),
        ({"start": np.zeros(2)}, r"start must be a scalar, got shape \(2,\)"),
    ],
)
def test_refused_options(options, message):
    """Catches an option that is accepted and ignored, in each of the three functions."""
    x0, speed = jnp.asarray([1.0, 0.0]), jnp.float32(1.0)
    for call in (
        lambda: transport(swirl, speed, x0, **options),
        lambda: trajectory(swirl, speed, x0, [0.5], **options),
        lambda: straightness(swirl, speed, x0, **options),
        lambda: jax.jit(lambda x: transport(swirl, speed, x, **options))(x0),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


@pytest.mark.parametrize(
    ("times", "options"),
    [
        ([0.5, 0.2], {}),
        ([0.5, 0.5], {}),
        ([0.2, 0.5], {"start": 1.0, "end": 0.0}),
        ([-0.1, 0.5], {}),
        ([0.5, 1.1], {}),
        ([0.5, np.nan], {}),
        ([np.nan], {}),
    ],
)
def test_refused_times(times, options):
    """Catches times that diffrax would return as inf, or not at all."""
    with pytest.raises(ValueError, match="^times must run strictly from start"):
        trajectory(swirl, jnp.float32(1.0), jnp.asarray([1.0, 0.0]), times, **options)


def test_refused_shapes():
    """Catches a batch or an integer x0 that would end in a message of the solver's inside."""
    speed, x0 = jnp.float32(1.0), jnp.asarray([1.0, 0.0])
    with pytest.raises(ValueError, match=r"^field\(.*float32\[4, 2\], got float32\[2, 2\]; x0 must be ONE example"):
        transport(swirl, speed, jnp.ones((4, 2)))
    with pytest.raises(ValueError, match=r"^field\(.*shape and dtype of x0.*got float16\[2\]"):
        transport(lambda params, t, x: x.astype(jnp.float16), speed, x0)
    with pytest.raises(ValueError, match=r"^field\(.*got float32\[2\] and float32\[\]; "):
        transport(lambda params, t, x: (x, t), speed, x0)
    with pytest.raises(ValueError, match="^x0 must be floating point, got int32"):
        transport(swirl, speed, jnp.asarray([1, 0]))
    for times in (0.5, [], [[0.5]]):
        with pytest.raises(ValueError, match=r"^times must have shape \[m\] with m >= 1, got"):
            trajectory(swirl, speed, x0, times)
    with pytest.raises(ValueError, match="^nodes must be an integer >= 1, got 0"):
        straightness(swirl, speed, x0, nodes=0)
