"""Diffusions against the laws of their schemes, the Brownian and the Schroedinger bridge, and everything refused."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvjax import flows
from fvjax.flows import diffuse, diffusion_path

RATE, SIGMA, SOURCE = 1.5, 0.8, 1.3
SAMPLES = 40_000


def pull(rate, t, x):
    """The drift of an Ornstein-Uhlenbeck process."""
    del t
    return -rate * x


def blend(weights, t, x):
    """A smooth field, the drift of the Brownian bridge to (2, -1), and a turn by angle t^2: one compilation for all."""
    smooth, bridge, turn = weights
    to_point = (jnp.asarray([2.0, -1.0]) - x) / (1 - t)
    return smooth * (jnp.sin(1.3 * x) + t * x) + bridge * to_point + turn * 2 * t * jnp.stack([-x[1], x[0]])


def drawn(key, weights, x0, *, sigma, solver, start=0.0, end=1.0):
    """Ten steps along `blend`; every number is traced, so that each solver is compiled once."""
    return compiled(key, weights, x0, sigma, start, end, solver=solver)


@partial(jax.jit, static_argnames="solver")
def compiled(key, weights, x0, sigma, start, end, *, solver):
    """As `drawn`."""
    return diffuse(key, blend, weights, x0, sigma=sigma, steps=10, solver=solver, start=start, end=end)


def normals(key, steps, dims):
    """W / sqrt(h) and H / sqrt(h / 12) of each step, by the keys that the docstring names; float64 for numpy."""
    keys = jax.random.split(key)
    draw = [[jax.random.normal(jax.random.fold_in(k, i), dims) for i in range(steps)] for k in keys]
    return np.asarray(draw, np.float64)


def recursion(solver, steps):
    """Mean and variance of the scheme's end for the Ornstein-Uhlenbeck process: one step is x -> r x + w W + h H."""
    a, h = RATE / steps, 1 / steps
    kept, by_increment, by_area = 1 - a, 1.0, 0.0
    if solver == "shark":
        kept, by_increment, by_area = 1 - a + a**2 / 2, 1 - a / 2, -a + a**2 / 2
    mean, variance = SOURCE, 0.0
    for _ in range(steps):
        mean = kept * mean
        variance = kept**2 * variance + SIGMA**2 * h * (by_increment**2 + by_area**2 / 12)
    return mean, variance


def samples_of(solver, steps):
    """Ends of many scalar Ornstein-Uhlenbeck paths."""
    keys = jax.random.split(jax.random.key(3), SAMPLES)
    one = partial(diffuse, field=pull, params=RATE, x0=jnp.float32(SOURCE), sigma=SIGMA, steps=steps, solver=solver)
    return np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)


@pytest.mark.parametrize("solver", flows.DIFFUSION_SOLVERS)
def test_law_of_the_scheme(solver):
    """Catches noise of the wrong size, one that is used twice, in two steps or two examples, and a lost Levy area."""
    ends = samples_of(solver, 2)
    mean, variance = recursion(solver, 2)
    assert abs(ends.mean() - mean) < 4 * np.sqrt(variance / SAMPLES)
    assert abs(ends.var() / variance - 1) < 4 * np.sqrt(2 / SAMPLES)
    # Two steps of size 1/2: the schemes' laws differ from each other and from the process by many standard errors.
    exact = SIGMA**2 * (1 - np.exp(-2 * RATE)) / (2 * RATE)
    assert abs(ends.var() / exact - 1) > 8 * np.sqrt(2 / SAMPLES)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("shark", 2)])
def test_weak_order(solver, order):
    """Catches an untrue docstring: the law that the test above has found converges to the process with this order."""
    exact = np.array([SOURCE * np.exp(-RATE), SIGMA**2 * (1 - np.exp(-2 * RATE)) / (2 * RATE)])
    coarse, fine = (np.abs(np.array(recursion(solver, steps)) - exact) for steps in (200, 400))
    np.testing.assert_allclose(np.log2(coarse / fine), order, atol=0.05)


@pytest.mark.parametrize("solver", flows.DIFFUSION_SOLVERS)
def test_steps_are_those_of_the_docstring(x64, solver):
    """Catches a shifted time, sigma in the wrong place, mixed coordinates, and keys other than those that are named."""
    key, weights, sigma, start, end = jax.random.key(5), np.array([1.0, 0.0, 0.4]), 0.7, 0.2, 1.4
    x0 = np.array([0.3, -1.0])
    h, x = (end - start) / 10, x0
    for k, (increment, area) in enumerate(np.swapaxes(normals(key, 10, (2,)), 0, 1)):
        t, w, levy = start + k * h, sigma * np.sqrt(h) * increment, sigma * np.sqrt(h / 12) * area
        if solver == "euler":
            x = x + h * np.asarray(blend(weights, t, x)) + w
        else:
            first = np.asarray(blend(weights, t, x + levy))
            second = np.asarray(blend(weights, t + 5 / 6 * h, x + 5 / 6 * h * first + 5 / 6 * w + levy))
            x = x + h * (0.4 * first + 0.6 * second) + w
    found = drawn(key, weights, x0, sigma=sigma, solver=solver, start=start, end=end)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, x, atol=1e-13)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("shark", 2)])
def test_without_noise_it_is_the_ode(x64, solver, order):
    """Catches noise that is left at sigma = 0, and an order that is not the ODE's: halving h divides the error by 2^p.

    The turn ends in (cos 1, sin 1).
    """
    solve = partial(drawn, jax.random.key(0), np.array([0.0, 0.0, 1.0]), sigma=0.0, solver=solver)
    x0, exact = np.array([1.0, 0.0]), np.array([np.cos(1.0), np.sin(1.0)])
    coarse, fine = solve(x0), solve(solve(x0, end=0.5), start=0.5)
    assert np.log2(np.linalg.norm(coarse - exact) / np.linalg.norm(fine - exact)) == pytest.approx(order, abs=0.15)


def test_without_noise_euler_is_that_of_transport(x64):
    """Catches another grid of times than that of `transport`."""
    weights, x0 = np.array([1.0, 0.5, 1.0]), np.array([1.0, 0.0])
    moved = flows.transport(blend, weights, x0, solver="euler", steps=10)
    np.testing.assert_allclose(drawn(jax.random.key(0), weights, x0, sigma=0.0, solver="euler"), moved, rtol=1e-14)


@pytest.mark.parametrize(("solver", "weights"), [("euler", (1.0, 0.0)), ("shark", (-2.0, -1.0))])
def test_brownian_bridge_ends_in_its_point(x64, solver, weights):
    """Catches an evaluation at t = 1, where the drift is singular: of the noise only the last step's is left."""
    key, sigma = jax.random.key(7), 0.6
    end = drawn(key, np.array([0.0, 1.0, 0.0]), np.zeros(2), sigma=sigma, solver=solver)
    increment, area = normals(key, 10, (2,))[:, -1]
    left = weights[0] * increment + weights[1] * area / np.sqrt(12)
    np.testing.assert_allclose(end - np.array([2.0, -1.0]), sigma * left / np.sqrt(10), atol=1e-12)


def test_schroedinger_bridge_ends_in_its_law():
    """Catches a drift and a noise that do not belong together: the end has the variance and covariance of the bridge.

    Between N(-0.5, 1) and N(0.5, 1): C = (sqrt(4 + sigma^4) - sigma^2) / 2, and the bias of 20 steps is below 1e-3.
    """
    sigma = 1.0
    cov = (np.sqrt(4 + sigma**4) - sigma**2) / 2

    def drift(cov, t, x):
        variance = (1 - t) ** 2 + t**2 + 2 * t * (1 - t) * cov + sigma**2 * t * (1 - t)
        return 1 + ((2 * t - 1) * (1 - cov) - sigma**2 * t) / variance * (x - (t - 0.5))

    x0 = jax.random.normal(jax.random.key(8), (SAMPLES,)) - 0.5
    keys = jax.random.split(jax.random.key(9), SAMPLES)
    one = partial(diffuse, field=drift, params=jnp.float32(cov), sigma=sigma, steps=20, solver="shark")
    x1 = jax.jit(jax.vmap(lambda key, x: one(key, x0=x)))(keys, x0)
    found = np.cov(x0, x1)
    assert abs(np.mean(x1) - 0.5) < 4 / np.sqrt(SAMPLES)
    assert abs(found[1, 1] - 1) < 4 * np.sqrt(2 / SAMPLES)
    assert abs(found[0, 1] - cov) < 4 * np.sqrt((1 + cov**2) / SAMPLES)


def test_keys_name_paths():
    """Catches noise that depends on the batch around an example, and keys that are ignored or shared."""
    keys = jax.random.split(jax.random.key(1), 3)
    x0 = jnp.ones((3, 2))
    one = partial(diffuse, field=pull, params=RATE, sigma=SIGMA, steps=5)
    together = jax.jit(jax.vmap(lambda key, x: one(key, x0=x)))(keys, x0)
    loop = np.stack([one(key, x0=x) for key, x in zip(keys, x0, strict=True)])
    np.testing.assert_allclose(together, loop, rtol=1e-5)
    np.testing.assert_array_equal(one(keys[0], x0=x0[0]), loop[0])
    assert len(np.unique(loop)) == 6


def test_a_second_call_compiles_nothing():
    """Catches a closure made on each call, and a sigma, a key or times that are static."""
    traces = []

    def field(params, t, x):
        traces.append(t)
        return params * x

    first = diffuse(jax.random.key(0), field, jnp.float32(1.0), jnp.ones(2), sigma=0.0, steps=3)
    before = len(traces)
    second = diffuse(jax.random.key(1), field, jnp.float32(2.0), jnp.zeros(2), sigma=0.5, steps=3, start=0.1, end=2.0)
    assert before > 0
    assert len(traces) == before
    assert np.all(first > 2)
    assert np.all(second != 0)

    @jax.jit
    @chex.assert_max_traces(1)
    def of_sigma(key, sigma):
        return diffuse(key, field, jnp.float32(1.0), jnp.ones(2), sigma=sigma, steps=3)

    np.testing.assert_allclose(of_sigma(jax.random.key(0), 0.0), first, rtol=1e-6)
    assert np.all(of_sigma(jax.random.key(0), 0.5) != first)


@pytest.mark.parametrize("solver", flows.DIFFUSION_SOLVERS)
def test_gradient_is_the_finite_difference(x64, solver):
    """Catches noise that is drawn anew when the steps are run again backwards, and a gradient that is cut."""
    key = jax.random.key(2)

    def value(point):
        return jnp.sum(drawn(key, point[0], point[1], sigma=point[2], solver=solver) ** 2)

    point = (np.array([0.8, 0.2, 0.5]), np.array([1.0, 0.4]), np.float64(0.5))
    gradient = jax.grad(value)(point)
    for direction in (
        ([1.0, -1.0, 1.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0, 0.0], [0.5, 1.0], 0.0),
        ([0, 0, 0], [0, 0], 1.0),
    ):
        moves = [np.asarray(part, np.float64) for part in direction]
        above, below = ([p + s * d for p, d in zip(point, moves, strict=True)] for s in (1e-5, -1e-5))
        slope = sum(np.vdot(g, d) for g, d in zip(gradient, moves, strict=True))
        np.testing.assert_allclose(slope, (value(above) - value(below)) / 2e-5, rtol=1e-7)


def test_float32_in_float32_out(x64):
    """Catches times, noise or a sigma in float64 that promote the state, under strict promotion and x64."""
    for solver in flows.DIFFUSION_SOLVERS:
        one = partial(diffuse, field=pull, params=np.float32(RATE), steps=3, solver=solver)
        end = jax.eval_shape(one, jax.random.key(0), x0=jnp.zeros((2, 3), jnp.float32), sigma=np.float64(0.3))
        assert end.dtype == jnp.float32
        assert end.shape == (2, 3)


def test_path_goes_through_the_same_solve(x64):
    """Catches another Brownian motion than that of `diffuse`, and an untrue docstring: between steps it is a line."""
    key, weights, x0 = jax.random.key(4), np.array([1.0, 0.0, 1.0]), np.array([0.5, -0.3])
    times = [0.0, 0.2, 0.25, 0.3, 1.0]
    states = diffusion_path(key, blend, weights, x0, times=times, sigma=SIGMA, steps=10, solver="shark")
    np.testing.assert_allclose(states[0], x0, rtol=1e-14)
    np.testing.assert_allclose(states[2], (states[1] + states[3]) / 2, rtol=1e-12)
    np.testing.assert_allclose(states[4], drawn(key, weights, x0, sigma=SIGMA, solver="shark"), rtol=1e-12)
    noise = diffusion_path(key, blend, 0 * weights, x0, times=times, sigma=SIGMA, steps=10, solver="shark")
    sums = SIGMA * np.sqrt(0.1) * np.cumsum(normals(key, 10, (2,))[0], axis=0)
    np.testing.assert_allclose(noise[jnp.array([1, 3, 4])] - x0, sums[[1, 2, 9]], atol=1e-12)


def explode(rate, t, x):
    """x' = rate x^2 is infinite at t = 1 / (rate x0)."""
    del t
    return rate * x**2


def test_a_failed_solve():
    """Catches a silent nan or inf, and one bad example that spoils its batch."""
    key, rate = jax.random.key(0), jnp.float32(1.0)

    def solve(x, start):
        return diffuse(key, explode, rate, x, sigma=0.1, steps=60, start=start)

    x0, starts = jnp.asarray([[0.1], [30.0], [-1.0], [0.2]]), jnp.asarray([0.0, 0.0, 0.5, 1.5])
    with pytest.raises(RuntimeError, match="^euler from t = .* to 1.0 .steps = 60. failed: .* not finite"):
        jax.vmap(solve)(x0, starts / 2)
    with pytest.raises(RuntimeError, match="failed: end must be above start"):
        jax.vmap(solve)(x0, starts)
    ends = jax.jit(jax.vmap(solve))(x0, starts)
    np.testing.assert_array_equal(np.isnan(ends), [[False], [True], [False], [True]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "heun"}, "solver must be one of euler, shark, got 'heun'"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"steps": None}, "steps must be an integer >= 1, got None"),
        ({"sigma": -0.1}, "sigma must be >= 0 and finite, got -0.1"),
        ({"sigma": float("nan")}, "sigma must be >= 0 and finite, got nan"),
        ({"sigma": np.ones(2)}, r"sigma must be a scalar, got shape \(2,\)"),
        ({"start": 1.0}, "start and end must differ in float32, got 1.0 and 1.0"),
        ({"start": 1.0, "end": 0.0}, "end must be above start, got start = 1.0 and end = 0.0; backward in time"),
        ({"end": float("inf")}, "end must be finite, got inf"),
    ],
)
def test_refused_options(options, message):
    """Catches an option that is accepted and ignored, in each of the two functions, eagerly and under jit."""
    given = {"sigma": 0.5, "steps": 3, **options}
    key, x0 = jax.random.key(0), jnp.ones(2)
    for call in (
        lambda: diffuse(key, pull, RATE, x0, **given),
        lambda: diffusion_path(key, pull, RATE, x0, times=[0.5], **given),
        lambda: jax.jit(lambda x: diffuse(key, pull, RATE, x, **given))(x0),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


def test_refused_arguments():
    """Catches a batch, an integer x0 or bad times that would end in a message of the solver's inside."""
    key, x0, options = jax.random.key(0), jnp.ones(2), {"sigma": 0.5, "steps": 3}
    with pytest.raises(ValueError, match=r"^field\(.*float32\[4, 2\], got float32\[2\]; x0 must be ONE example"):
        diffuse(key, lambda params, t, x: x[0], None, jnp.ones((4, 2)), **options)
    with pytest.raises(ValueError, match="^x0 must be floating point, got int32"):
        diffuse(key, pull, RATE, jnp.asarray([1, 0]), **options)
    with pytest.raises(ValueError, match=r"^times must have shape \[m\] with m >= 1, got"):
        diffusion_path(key, pull, RATE, x0, times=0.5, **options)
    for times in ([0.5, 0.2], [0.5, 0.5], [-0.1], [1.1]):
        with pytest.raises(ValueError, match="^times must run strictly from start"):
            diffusion_path(key, pull, RATE, x0, times=times, **options)
