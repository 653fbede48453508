"""Solvers against closed forms, the two ways of taking a batch, failures, and every refused option."""

import inspect
from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import strategies as st

from fvjax import flows
from fvjax.flows import straightness, trajectory, transport
from fvjax.flows._solve import resolve

ORDERS = {"euler": 1, "heun": 2, "midpoint": 2, "tsit5": 5, "dopri5": 5}
STEPS = {"euler": 500, "heun": 64, "midpoint": 64, "tsit5": 16, "dopri5": 16}
MATRIX = np.array([[0.3, -2.0, 0.4], [1.8, -0.2, 0.1], [-0.5, 0.3, -1.0]])
SHIFT = np.array([0.5, -1.0, 2.0])
SOURCE = np.array([1.0, -0.7, 0.4])


def affine(params, t, x):
    """A x + b."""
    del t
    return params[0] @ x + params[1]


def affine_parameters():
    """(A, b) in the test's dtype."""
    return jnp.asarray(MATRIX), jnp.asarray(SHIFT)


def affine_solution(x0, time):
    """The affine ODE's flow by the exponential of the matrix of homogeneous coordinates."""
    generator = np.zeros((4, 4))
    generator[:3, :3], generator[:3, 3] = MATRIX, SHIFT
    return (scipy.linalg.expm(time * generator) @ np.append(x0, 1.0))[:3]


def swirl(speed, t, x):
    """Turns the plane by `speed` over [0, 1], at a rate that depends on time."""
    return speed * 2 * t * jnp.stack([-x[1], x[0]])


def turn(speed, t, x):
    """Turns the last axis' planes, of length 2, uniformly: image-shaped states too."""
    del t
    return speed * jnp.stack([-x[..., 1], x[..., 0]], axis=-1)


def carried_speed(params, t, x):
    """A turn whose speed is the third coordinate: examples of one batch can be easy or hard."""
    del params, t
    return x[2] * jnp.stack([-x[1], x[0], jnp.zeros_like(x[0])])


@pytest.mark.parametrize("solver", flows.SOLVERS)
def test_observed_order_on_the_affine_ode(x64, solver):
    """Catches a solver behind the wrong name and a wrong step: halving the step divides the error by 2^order."""
    exact = affine_solution(SOURCE, 1.0)

    def solve(x, start, end):
        options = {"solver": solver, "steps": STEPS[solver], "start": start, "end": end}
        return transport(affine, affine_parameters(), x, **options)

    coarse = np.linalg.norm(solve(SOURCE, 0.0, 1.0) - exact)
    fine = np.linalg.norm(solve(solve(SOURCE, 0.0, 0.5), 0.5, 1.0) - exact)
    assert np.log2(coarse / fine) == pytest.approx(ORDERS[solver], abs=0.15)


@pytest.mark.parametrize("solver", ["heun", "tsit5", "dopri5"])
def test_tolerances_control_the_error(x64, solver):
    """Catches tolerances that do not reach the controller: the error falls with them, near to what was asked."""
    exact = affine_solution(SOURCE, 1.0)
    errors = [
        np.linalg.norm(transport(affine, affine_parameters(), SOURCE, solver=solver, rtol=tol) - exact)
        for tol in (1e-4, 1e-6)
    ]
    assert errors[0] < 3e-3
    assert errors[1] < 3e-5


def test_one_tolerance_stands_for_both(x64):
    """Catches an rtol of 1e-9 spoilt by a default atol of 1e-5."""
    params = affine_parameters()
    both = transport(affine, params, SOURCE, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(transport(affine, params, SOURCE, rtol=1e-9), both)
    np.testing.assert_array_equal(transport(affine, params, SOURCE, atol=1e-9), both)
    default = transport(affine, params, SOURCE)
    np.testing.assert_array_equal(default, transport(affine, params, SOURCE, rtol=1e-5, atol=1e-5))
    assert np.any(default != both)


def test_fixed_steps_are_euler_steps(x64):
    """Catches a step too many or too few, and a shifted time."""
    x = np.array([1.0, 0.5])
    for k in range(7):
        x = x + (np.float64((k + 1) / 7) - np.float64(k / 7)) * np.asarray(swirl(1.3, k / 7, x))
    result = transport(swirl, jnp.float64(1.3), np.array([1.0, 0.5]), solver="euler", steps=7)
    np.testing.assert_allclose(result, x, atol=2e-15)


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize(("steps", "hits"), [(11, 0), (98, 1)])
def test_even_steps_meet_one_half_exactly(start, end, steps, hits):
    """Catches times such as 49 * (1 / 98), an ulp beside 1/2: there the singular field would not be seen."""

    def pulse(params, t, x):
        del params
        return jnp.where(t == 0.5, jnp.ones_like(x), jnp.zeros_like(x))

    moved = transport(pulse, None, jnp.zeros(1), solver="euler", steps=steps, start=start, end=end)
    np.testing.assert_allclose(moved[0] * steps, hits * (end - start), rtol=1e-5)


def test_forward_then_backward_returns_the_start(x64):
    """Catches a sign lost in backward integration, in the time as well as in the step."""
    x0 = jnp.asarray([0.3, -1.2])
    x1 = transport(swirl, jnp.float64(2.0), x0, steps=50)
    assert np.linalg.norm(x1 - x0) > 1
    back = transport(swirl, jnp.float64(2.0), x1, start=1.0, end=0.0, steps=50)
    np.testing.assert_allclose(back, x0, atol=1e-8)


def test_any_interval(x64):
    """Catches a solve that ignores `start` or `end`: the swirl turns by speed (end^2 - start^2)."""
    for start, end in ((0.2, 0.7), (0.7, 0.2), (-0.5, 2.0)):
        angle = 1.5 * (end**2 - start**2)
        x1 = transport(swirl, jnp.float64(1.5), jnp.asarray([1.0, 0.0]), rtol=1e-10, start=start, end=end)
        np.testing.assert_allclose(x1, [np.cos(angle), np.sin(angle)], atol=1e-8)


def carried_speed_batch(params, t, x):
    """The batch as one state."""
    return jax.vmap(carried_speed, in_axes=(None, None, 0))(params, t, x)


@jax.jit
def each_alone(x0, tolerance):
    """The batch as many states."""
    return jax.vmap(lambda x: transport(carried_speed, None, x, rtol=tolerance))(x0)


def batch_of_speeds(speeds):
    """One example on the unit circle for each speed."""
    angles = np.arange(len(speeds)) + 0.5
    return jnp.asarray(np.stack([np.cos(angles), np.sin(angles), speeds], axis=1))


def test_vmap_is_the_loop(x64):
    """Catches examples that disturb each other's step sizes: under vmap each is solved as if it were alone."""
    x0 = batch_of_speeds(np.geomspace(0.1, 30.0, 32))
    loop = np.stack([transport(carried_speed, None, x, rtol=1e-5) for x in x0])
    np.testing.assert_allclose(each_alone(x0, 1e-5), loop, atol=1e-12)


def test_a_batch_as_one_state_shares_its_error_norm(x64):
    """Catches rows that mix, and an untrue docstring: in one norm the error of a hard example hides among easy ones."""
    x0 = batch_of_speeds([30.0] + 31 * [0.1])
    angles = np.arange(32) + 0.5 + np.asarray(x0[:, 2])
    exact = np.stack([np.cos(angles), np.sin(angles)], axis=1)

    def error(states):
        return np.abs(states[:, :2] - exact).max()

    assert error(transport(carried_speed_batch, None, x0, rtol=1e-9)) < 1e-5
    assert error(transport(carried_speed_batch, None, x0, rtol=1e-5)) > 3 * error(each_alone(x0, 1e-5))


@pytest.mark.parametrize("options", [{}, {"steps": 3}])
def test_a_second_call_compiles_nothing(options):
    """Catches a closure made on each call: with it every solve of a training run would compile anew."""
    traces = []

    def field(params, t, x):
        traces.append(t)
        return params * x

    first = transport(field, jnp.float32(1.0), jnp.ones(2), **options)
    before = len(traces)
    second = transport(field, jnp.float32(2.0), jnp.zeros(2), start=0.1, **options)
    assert before > 0
    assert len(traces) == before
    assert np.all(first > 2)
    assert np.all(second == 0)


@pytest.mark.parametrize("options", [{"solver": "heun", "steps": 6}, {"rtol": 1e-11}])
def test_gradient_is_the_finite_difference(x64, options):
    """Catches a solve that stops gradients to params or x0."""

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1))
    def value_and_gradient(speed, x0):
        return transport(swirl, speed, x0, **options)[0] ** 2

    speed, x0, step = jnp.float64(0.8), jnp.asarray([1.0, 0.4]), 1e-4
    by_speed, by_state = value_and_gradient(speed, x0)[1]
    rise = value_and_gradient(speed + step, x0)[0] - value_and_gradient(speed - step, x0)[0]
    np.testing.assert_allclose(by_speed, rise / (2 * step), rtol=1e-6)
    moved = jnp.asarray([0.0, step])
    rise = value_and_gradient(speed, x0 + moved)[0] - value_and_gradient(speed, x0 - moved)[0]
    np.testing.assert_allclose(by_state[1], rise / (2 * step), rtol=1e-6)


def test_float32_in_float32_out(x64):
    """Catches times or tolerances in float64 that promote the state, under strict promotion and x64."""
    calls = (
        partial(trajectory, swirl, times=np.linspace(0.0, 1.0, 3), solver="euler", steps=3),
        partial(straightness, swirl),
    )
    for call in calls:
        assert jax.eval_shape(call, params=jnp.float32(1.0), x0=jnp.zeros(2, jnp.float32)).dtype == jnp.float32


@pytest.mark.parametrize(("solver", "tolerance"), [("euler", 1e-2), ("dopri5", 1e-5)])
def test_trajectory_follows_the_exact_solution(x64, solver, tolerance):
    """Catches states that are not those of the asked times, and ends that are not those of `transport`."""
    times = [0.0, 0.13, 0.5, 0.87, 1.0]
    exact = np.stack([affine_solution(SOURCE, time) for time in times])
    states = trajectory(affine, affine_parameters(), SOURCE, times, solver=solver, steps=STEPS[solver])
    np.testing.assert_allclose(states, exact, atol=tolerance)
    end = transport(affine, affine_parameters(), SOURCE, solver=solver, steps=STEPS[solver])
    np.testing.assert_allclose(states[-1], end, rtol=1e-13)
    np.testing.assert_allclose(states[0], SOURCE, rtol=1e-13)


def test_trajectory_backward_and_adaptive(x64):
    """Catches saved times in the wrong order when time runs backward."""
    times = [0.9, 0.4]
    states = trajectory(swirl, jnp.float64(1.5), jnp.asarray([1.0, 0.0]), times, rtol=1e-9, start=1.0, end=0.0)
    angles = 1.5 * (np.array(times) ** 2 - 1)
    np.testing.assert_allclose(states, np.stack([np.cos(angles), np.sin(angles)], axis=1), atol=1e-6)


def rotation_straightness(speed, radius):
    """|v|^2 = r^2 w^2 less the squared chord."""
    return radius**2 * (speed**2 - 4 * np.sin(speed / 2) ** 2)


def test_image_shaped_states(x64):
    """Catches a flattened or transposed state: every pixel pair turns as it would alone."""
    image = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 2)))
    speed = jnp.float64(0.9)
    turned = transport(turn, speed, image, rtol=1e-10)
    rotation = np.array([[np.cos(0.9), -np.sin(0.9)], [np.sin(0.9), np.cos(0.9)]])
    np.testing.assert_allclose(turned, np.asarray(image) @ rotation.T, atol=1e-8)
    exact = rotation_straightness(0.9, np.linalg.norm(image))
    result = jax.jit(partial(straightness, turn, rtol=1e-10))(speed, image)
    np.testing.assert_allclose(result, exact, rtol=1e-7)


def test_straight_flow_has_straightness_zero(x64):
    """Catches a chord that is not the displacement: for a constant field it equals the velocity."""

    def constant(velocity, t, x):
        del t, x
        return velocity

    velocity = jnp.asarray([3.0, -4.0])
    for options in ({}, {"start": 0.25, "end": 0.75}, {"start": 1.0, "end": 0.0}):
        assert straightness(constant, velocity, jnp.asarray([5.0, 1.0]), **options) < 1e-28


@hypothesis.given(st.floats(-3.0, 3.0), st.floats(0.1, 3.0))
def test_straightness_of_a_rotation(x64, speed, radius):
    """Catches a lost factor, a mean over dimensions and unnormalised nodes: S = r^2 (w^2 - 4 sin^2(w / 2))."""
    result = straightness(turn, jnp.float64(speed), jnp.asarray([radius, 0.0]), rtol=1e-8)
    np.testing.assert_allclose(result, rotation_straightness(speed, radius), atol=1e-5)


def test_straightness_does_not_depend_on_the_direction_of_time(x64):
    """Catches |dt| without its absolute value, and a chord of the wrong sign or length on other intervals."""
    x0, speed, options = jnp.asarray([1.0, 0.2]), jnp.float64(2.0), {"rtol": 1e-9}
    x1 = transport(swirl, speed, x0, end=0.6, **options)
    forward = straightness(swirl, speed, x0, end=0.6, **options)
    assert forward > 0.01
    backward = straightness(swirl, speed, x1, start=0.6, end=0.0, **options)
    np.testing.assert_allclose(backward, forward, rtol=1e-6)


def test_the_three_functions_have_the_same_options():
    """Catches a default or a name that is changed in one place only."""
    shared = inspect.signature(resolve).parameters
    spelled = inspect.signature(transport).parameters
    names = [name for name in shared if name != "x0"]
    assert names == list(flows.SolverOptions.__annotations__)
    assert names == [name for name in spelled if name not in ("field", "params", "x0")]
    assert all(shared[name].default == spelled[name].default for name in names)


@pytest.mark.parametrize("options", [{"solver": s, "steps": 3} for s in flows.SOLVERS] + [{"solver": "dopri5"}])
def test_evaluations_are_counted(options):
    """Catches a wrong number of stages or of steps: the field counts its own calls on the host."""
    calls = []

    def field(params, t, x):
        t = jax.pure_callback(lambda t: (calls.append(1), t)[1], jax.ShapeDtypeStruct((), x.dtype), t)
        return jnp.sin(20 * t) * x

    result = jax.jit(lambda x: flows.counted_transport(field, None, x, **options))(jnp.ones(3))
    assert int(result.evaluations) == len(calls) > 1
    np.testing.assert_array_equal(result.state, flows.transport(field, None, jnp.ones(3), **options))
