"""Exact bridges of Gaussians: closed form, laws on the way, Markovian fitting, divergences with their floors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from fvjax.bridges import _gaussian as bridges
from fvjax.gaussian import (
    GaussianCoupling,
    draw_pairs,
    gaussian_coupling,
    independent_coupling,
    map_coupling,
    ot_map,
    population_minimiser,
)
from fvjax.interpolants import bridge_drift, brownian_bridge
from fvjax.types import Pair

MEAN0, MEAN1 = np.array([-1.0, 0.5]), np.array([1.0, 2.0])
COV0 = np.array([[1.0, 0.6], [0.6, 0.8]])
COV1 = np.array([[0.5, -0.3], [-0.3, 1.5]])
SOURCE = {"source_mean": MEAN0, "source_cov": COV0}
GOLDEN = {  # sigma: covariances of exact IMF from independent ends, d = 1, unit variances
    1.0: (0, 0.54629, 0.61114, 0.61739, 0.61797, 0.61803),
    0.5: (0, 0.83351, 0.88095, 0.88272, 0.88278),
    0.05: (0, 0.99804, 0.99875),
}


def bridge(sigma: float) -> GaussianCoupling:
    """The Schroedinger coupling of the two correlated laws, whose covariances do not commute."""
    return bridges.schroedinger_coupling(MEAN1, COV1, sigma, **SOURCE)


def any_coupling() -> GaussianCoupling:
    """Correlated ends with a cross-covariance that is neither symmetric nor that of a bridge."""
    contraction = np.array([[0.3, -0.6], [0.5, 0.2]])
    roots = np.linalg.cholesky(COV0), np.linalg.cholesky(COV1)
    return gaussian_coupling(MEAN1, COV1, roots[1] @ contraction @ roots[0].T, **SOURCE)


def cross(coupling: GaussianCoupling) -> np.ndarray:
    """Cov(X1, X0)."""
    return np.asarray(coupling.factor1 @ coupling.factor0.T)


def covariance(coupling: GaussianCoupling) -> np.ndarray:
    """Covariance of (x0, x1), [2d, 2d]."""
    factor = np.concatenate([coupling.factor0, coupling.factor1])
    return factor @ factor.T


def drift_matrix(joint: np.ndarray, sigma: float, t: float) -> np.ndarray:
    """A_t = S_t V_t^-1 of the forward drift, from the covariances, in numpy."""
    d = len(joint) // 2
    cov0, cov1, c = joint[:d, :d], joint[d:, d:], joint[:d, d:]
    law = (1 - t) ** 2 * cov0 + t**2 * cov1 + t * (1 - t) * (c + c.T + sigma**2 * np.eye(d))
    slope = t * cov1 + (1 - t) * c.T - t * c - (1 - t) * cov0 - sigma**2 * t * np.eye(d)
    return slope @ np.linalg.inv(law)


@pytest.mark.parametrize("sigma", GOLDEN)
def test_recursion_of_unit_variances_has_the_golden_values(x64: None, sigma: float) -> None:
    """Catches a wrong drift, time or factor in any round, and a fixed point that is not the closed form."""
    coupling = independent_coupling(np.zeros(2), np.eye(2))
    found = [cross(coupling)]
    for _ in GOLDEN[sigma][1:]:
        coupling = bridges.markov_coupling(coupling, sigma)
        found.append(cross(coupling))
    np.testing.assert_allclose(found, np.multiply.outer(GOLDEN[sigma], np.eye(2)), atol=1e-5)
    for _ in range(6):
        coupling = bridges.markov_coupling(coupling, sigma)
    closed = bridges.schroedinger_coupling(np.zeros(2), np.eye(2), sigma)
    np.testing.assert_allclose(cross(coupling), cross(closed), atol=1e-7)
    np.testing.assert_allclose(cross(closed), (np.sqrt(4 + sigma**4) - sigma**2) / 2 * np.eye(2), atol=1e-14)


@pytest.mark.parametrize(
    ("sigma", "first", "second"), [(1.0, 0.0, -0.3), (0.5, -0.6, 0.1), (0.05, 0.9, 0), (0, 0.4, 1)]
)
def test_step_of_commuting_matrices_is_the_quadrature(x64: None, sigma: float, first: float, second: float) -> None:
    """Catches unit variances that are taken for granted: c <- S0 exp(int S_t / V_t dt) by 400 Gauss-Legendre nodes."""
    laws = [np.array([[2.0, first], [first, 0.7]]), np.array([[0.5, second], [second, 3.0]])]
    nodes, weights = np.polynomial.legendre.leggauss(400)
    expected = [
        law[0, 0] * np.exp(np.dot(weights / 2, [drift_matrix(law, sigma, (1 + node) / 2).item() for node in nodes]))
        for law in laws
    ]
    cov0, cov1, c = (np.diag([law[i, j] for law in laws]) for i, j in ((0, 0), (1, 1), (0, 1)))
    coupling = gaussian_coupling(np.ones(2), cov1, c, source_cov=cov0)
    np.testing.assert_allclose(cross(bridges.markov_coupling(coupling, sigma)), np.diag(expected), atol=1e-9)


@pytest.mark.parametrize("sigma", [1.0, 0.05, 0.0])
def test_step_of_matrices_is_the_matrix_equation(x64: None, sigma: float) -> None:
    """Catches a scalar formula (an exponential of an integral) where A_t at different times do not commute."""
    coupling = any_coupling()
    joint = covariance(coupling)

    def rate(t: float, phi: np.ndarray) -> np.ndarray:
        return (drift_matrix(joint, sigma, t) @ phi.reshape(2, 2)).ravel()

    phi = solve_ivp(rate, (0, 1), np.eye(2).ravel(), "DOP853", rtol=1e-12, atol=1e-12).y[:, -1].reshape(2, 2)
    step = bridges.markov_coupling(coupling, sigma)
    np.testing.assert_allclose(cross(step), phi @ COV0, atol=1e-9)
    np.testing.assert_allclose(covariance(step)[:2, :2], COV0, atol=1e-13)
    np.testing.assert_allclose(covariance(step)[2:, 2:], COV1, atol=1e-9)
    np.testing.assert_array_equal(step.mean0, coupling.mean0)
    np.testing.assert_array_equal(step.mean1, coupling.mean1)
    assert np.abs(cross(step) - cross(coupling)).max() > 0.05  # the step does something
    if sigma == 0:
        np.testing.assert_allclose(step.factor1[:, 2:], 0, atol=1e-9)  # x1 is a function of x0


def test_step_is_the_same_forward_and_backward(x64: None) -> None:
    """Catches a coupling that is swapped half: both diffusions of one Markov process have the same ends."""
    coupling = any_coupling()
    forward = bridges.markov_coupling(coupling, 0.7)
    backward = bridges.swapped(bridges.markov_coupling(bridges.swapped(coupling), 0.7))
    np.testing.assert_allclose(covariance(forward), covariance(backward), atol=1e-9)


@pytest.mark.parametrize("sigma", [3.0, 1.0, 0.05])
def test_closed_form_is_the_schroedinger_bridge(x64: None, sigma: float) -> None:
    """Catches a transpose and a lost factor 2, by what defines it: marginals, and a density f(x0) g(x1) exp(-c / 2).

    With c = |x0 - x1|^2 / sigma^2 the off-diagonal block of the joint precision is -I / sigma^2.
    """
    assert np.abs(COV0 @ COV1 - COV1 @ COV0).max() > 0.1
    coupling = bridge(sigma)
    joint = covariance(coupling)
    np.testing.assert_allclose(joint[:2, :2], COV0, atol=1e-14)
    np.testing.assert_allclose(joint[2:, 2:], COV1, atol=1e-14)
    np.testing.assert_allclose(np.linalg.inv(joint)[:2, 2:] * sigma**2, -np.eye(2), atol=1e-10)
    np.testing.assert_allclose(coupling.mean0, MEAN0)
    np.testing.assert_allclose(coupling.mean1, MEAN1)
    assert np.abs(cross(coupling) - cross(coupling).T).max() > 0.01  # the transpose could be told


@pytest.mark.parametrize("sigma", [1.0, 0.05])
def test_closed_form_is_a_fixed_point(x64: None, sigma: float) -> None:
    """Catches a step that does not stop at the bridge, with matrices that do not commute."""
    np.testing.assert_allclose(cross(bridges.markov_coupling(bridge(sigma), sigma)), cross(bridge(sigma)), atol=1e-10)


def test_repeated_steps_converge_to_the_closed_form(x64: None) -> None:
    """Catches a fixed point that nothing is drawn to: every round divides the divergence by 3 or more."""
    coupling, target = any_coupling(), bridge(1.0)
    divergences = [float(bridges.coupling_divergence(coupling, target))]
    for _ in range(8):
        coupling = bridges.markov_coupling(coupling, 1.0)
        divergences.append(float(bridges.coupling_divergence(coupling, target)))
    assert divergences[0] > 0.1
    assert np.all(np.divide(divergences[:-1], divergences[1:]) > 3)


def test_bridge_backward_is_the_bridge_of_the_swapped_ends(x64: None) -> None:
    """Catches a closed form that treats the two ends differently, and a swap that loses a mean."""
    back = bridges.schroedinger_coupling(MEAN0, COV0, 0.6, source_mean=MEAN1, source_cov=COV1)
    there = bridges.swapped(bridge(0.6))
    np.testing.assert_allclose(covariance(there), covariance(back), atol=1e-14)
    np.testing.assert_array_equal(there.mean0, back.mean0)
    np.testing.assert_array_equal(there.mean1, back.mean1)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9, 1.0])
def test_fields_of_the_bridge(x64: None, t: float) -> None:
    """Catches a wrong drift, law or swap: f by its formula, f + b = sigma^2 score, velocity = (f - b) / 2."""
    sigma, coupling, x = 0.8, bridge(0.8), np.array([0.7, -1.2])
    mean, cov = bridges.bridge_law(coupling, sigma, t)
    c = cross(coupling).T
    middle = t * (1 - t) * (c + c.T + sigma**2 * np.eye(2))
    np.testing.assert_allclose(mean, (1 - t) * MEAN0 + t * MEAN1, atol=1e-14)
    np.testing.assert_allclose(cov, (1 - t) ** 2 * COV0 + t**2 * COV1 + middle, atol=1e-14)

    forward = population_minimiser(coupling, bridge_drift(sigma))(None, t, x)
    backward = population_minimiser(bridges.swapped(coupling), bridge_drift(sigma))(None, 1 - t, x)
    velocity = population_minimiser(coupling, brownian_bridge(sigma))(None, t, x)
    expected = MEAN1 - MEAN0 + drift_matrix(covariance(coupling), sigma, t) @ (x - mean)
    np.testing.assert_allclose(forward, expected, atol=1e-10)
    np.testing.assert_allclose(forward + backward, -(sigma**2) * np.linalg.solve(cov, x - mean), atol=1e-10)
    np.testing.assert_allclose(velocity, (forward - backward) / 2, atol=1e-10)


def test_simulated_diffusion_ends_in_the_target_and_the_coupling(x64: None) -> None:
    """Catches a drift whose diffusion goes elsewhere: 20,000 Euler-Maruyama paths in two dimensions.

    Means and covariances of (X_0, X_1) within 4.5 standard errors of the scheme's own law, which follows exactly from
    its linear recursion; and that law tends to the bridge's, with an error that halves with the step.
    """
    sigma, coupling, n, steps = 0.8, bridge(0.8), 20_000, 40
    joint = covariance(coupling)

    def scheme(steps: int) -> np.ndarray:
        law = np.tile(COV0, (2, 2))
        for k in range(steps):
            move = np.eye(4)
            move[2:, 2:] += drift_matrix(joint, sigma, k / steps) / steps
            law = move @ law @ move.T
            law[2:, 2:] += sigma**2 / steps * np.eye(2)
        return law

    biases = [np.abs(scheme(k) - joint).max() for k in (steps, 2 * steps, 4 * steps)]
    assert biases[0] < 0.05
    np.testing.assert_allclose(np.divide(biases[:2], biases[1:]), 2, atol=0.1)

    field = population_minimiser(coupling, bridge_drift(sigma))

    @jax.jit
    def simulate(key: jax.Array) -> jax.Array:
        start_key, noise_key = jax.random.split(key)
        x0 = draw_pairs(start_key, coupling, n).x0

        def step(x: jax.Array, k: jax.Array) -> tuple[jax.Array, None]:
            drift = jax.vmap(field, (None, None, 0))(None, k / steps, x)
            noise = jax.random.normal(jax.random.fold_in(noise_key, k), x.shape)
            return x + drift / steps + sigma * noise / steps**0.5, None

        x1, _ = jax.lax.scan(step, x0, jnp.arange(steps))
        return jnp.concatenate([x0, x1], 1)

    points = np.asarray(simulate(jax.random.key(0)))
    expected = scheme(steps)
    spread = np.diag(expected)
    errors = np.sqrt((np.outer(spread, spread) + expected**2) / n)
    assert np.all(np.abs(np.cov(points.T) - expected) < 4.5 * errors)
    assert np.all(np.abs(points.mean(0) - np.concatenate([MEAN0, MEAN1])) < 4.5 * np.sqrt(spread / n))


def test_without_noise_it_is_optimal_transport(x64: None) -> None:
    """Catches 0 / 0 at sigma = 0 and a limit that jumps: sigma^2 = 1e-12 is OT to 1e-6 of the width, too."""
    exact = map_coupling(ot_map(MEAN1, COV1, **SOURCE), **SOURCE)
    np.testing.assert_allclose(covariance(bridge(0.0)), covariance(exact), atol=1e-13)
    np.testing.assert_allclose(covariance(bridge(1e-6)), covariance(exact), atol=1e-11)
    own = bridge(1e-6).factor1[:, 2:]
    np.testing.assert_allclose(own @ own.T / 1e-12, covariance_per_noise(), rtol=1e-6)


def covariance_per_noise() -> np.ndarray:
    """Cov(X1 | X0) / sigma^2 as sigma -> 0: the OT map itself, since x1 given x0 has the Hessian of its potential."""
    return np.asarray(ot_map(MEAN1, COV1, **SOURCE).matrix)


@pytest.mark.parametrize("sigma", [30.0, 1e4, 0.01])
def test_single_precision_keeps_its_digits(x64: None, sigma: float) -> None:
    """Catches (D - sigma^2 I) / 2: at sigma = 30 that difference is 1e-3 of 900, and 4e-7 of 1e8 at 1e4."""
    single = bridges.schroedinger_coupling(
        jnp.float32(MEAN1), jnp.float32(COV1), sigma, source_cov=jnp.float32(COV0), source_mean=jnp.float32(MEAN0)
    )
    assert {part.dtype for part in single} == {jnp.dtype(jnp.float32)}
    exact = cross(bridge(sigma))
    np.testing.assert_allclose(cross(single), exact, rtol=0, atol=5e-6 * np.abs(exact).max())
    if sigma > 1:
        np.testing.assert_allclose(exact, (COV0 @ COV1).T / sigma**2, rtol=0, atol=5e-3 * np.abs(exact).max())


@pytest.mark.parametrize("sigma", [0.5, 0.0])
@pytest.mark.parametrize("singular", ["source", "target", "both"])
def test_singular_covariances(x64: None, singular: str, sigma: float) -> None:
    """Catches nan or 1e8 from a zero eigenvalue: marginals kept, and the limit of nearly singular covariances."""
    lines = np.outer([1, 2.0], [1, 2.0]) / 5, np.outer([3, 1.0], [3, 1.0]) / 5
    cov0 = lines[0] if singular != "target" else COV0
    cov1 = lines[1] if singular != "source" else COV1
    coupling = bridges.schroedinger_coupling(MEAN1, cov1, sigma, source_cov=cov0)
    np.testing.assert_allclose(covariance(coupling)[:2, :2], cov0, atol=1e-14)
    np.testing.assert_allclose(covariance(coupling)[2:, 2:], cov1, atol=1e-14)
    near = [cov + 1e-12 * np.eye(2) for cov in (cov0, cov1)]
    close = bridges.schroedinger_coupling(MEAN1, near[1], sigma, source_cov=near[0])
    np.testing.assert_allclose(cross(coupling), cross(close), atol=5e-6)
    if sigma > 0:
        np.testing.assert_allclose(cross(bridges.markov_coupling(coupling, sigma)), cross(coupling), atol=1e-9)


def test_sigma_may_be_traced() -> None:
    """Catches a Python branch on sigma, a check that breaks under jit, and a step that only works eagerly."""
    step = jax.jit(lambda s: bridges.markov_coupling(bridge(s), s))
    for sigma in (0.0, 0.7):
        np.testing.assert_allclose(cross(step(sigma)), cross(bridge(sigma)), atol=1e-5)


def test_divergence_is_the_one_of_the_joint_laws(x64: None) -> None:
    """Catches a marginal instead of the joint law, a lost 1/2 and interchanged arguments."""
    coupling, reference = any_coupling(), bridge(0.8)._replace(mean0=MEAN0 + 0.3)
    j, r = covariance(coupling), covariance(reference)
    offset = np.array([0.3, 0.3, 0, 0])
    expected = np.trace(np.linalg.solve(r, j)) - 4 + offset @ np.linalg.solve(r, offset)
    expected += np.linalg.slogdet(r)[1] - np.linalg.slogdet(j)[1]
    np.testing.assert_allclose(bridges.coupling_divergence(coupling, reference), expected / 2, rtol=1e-12)
    assert abs(bridges.coupling_divergence(reference, coupling) - expected / 2) > 0.05
    narrow = GaussianCoupling(*(jnp.asarray(part, jnp.float32) for part in bridge(0.8)))
    assert 0 <= bridges.coupling_divergence(narrow, narrow) < 1e-10
    widened = GaussianCoupling(MEAN0, np.eye(2, 5), MEAN1, np.eye(2, 5, 2))  # more noise than dimensions
    assert bridges.coupling_divergence(widened, widened) == pytest.approx(0, abs=1e-14)


def test_divergence_of_deterministic_couplings(x64: None) -> None:
    """Catches a large finite number that depends on rounding where the answer is infinite, or unknown."""
    flat, bulk = bridge(0.0), bridge(1.0)
    assert bridges.coupling_divergence(flat, bulk) == np.inf
    assert bridges.coupling_divergence(bulk, flat) == np.inf
    assert np.isnan(bridges.coupling_divergence(flat, bridge(0.0)))


def test_floor_is_what_samples_of_the_law_give() -> None:
    """Catches ddof, a wrong number of degrees of freedom and a lost mean: 4,000 samples of 12 pairs, d = 2.

    So small a sample that p (p + 3) / (4 n) is 16% too small; and 0.066 nats at p = 50, n = 10,000.
    """
    coupling, n, repeats = bridge(0.8), 12, 4000
    keys = jax.random.split(jax.random.key(0), repeats)
    draw = jax.jit(jax.vmap(lambda key: bridges.sample_divergence(draw_pairs(key, coupling, n), coupling).divergence))
    found = np.asarray(draw(keys))
    floor, deviation = bridges.divergence_floor(n, 4)
    assert abs(found.mean() - floor) < 4 * found.std() / repeats**0.5
    tail = np.sqrt(((found - found.mean()) ** 4).mean() / found.var() ** 2 - 1) / 2  # relative error of the deviation
    assert abs(found.std() / deviation - 1) < 4 * tail / repeats**0.5
    assert floor > 1.15 * 4 * 7 / (4 * n)
    assert bridges.divergence_floor(10_000, 50)[0] == pytest.approx(0.066, abs=5e-4)


def test_sample_divergence_tells_couplings_apart() -> None:
    """Catches an estimate that does not see the cross-covariance: marginals agree, only the coupling differs."""
    target = bridge(0.8)
    pairs = draw_pairs(jax.random.key(1), target, 2000)
    right = bridges.sample_divergence(pairs, target)
    assert abs(right.divergence - right.floor) < 4 * right.floor_std
    wrong = bridges.sample_divergence(Pair(pairs.x0, pairs.x1[::-1]), target)
    expected = float(bridges.coupling_divergence(independent_coupling(MEAN1, COV1, **SOURCE), target))
    assert abs(wrong.divergence - expected) < 0.2 * expected
    assert wrong.divergence > 20 * right.floor


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bridge(-0.1), r"sigma must be >= 0 and finite, got -0\.1"),
        (lambda: bridge(np.nan), "sigma must be >= 0 and finite, got nan"),
        (lambda: bridge(np.inf), "sigma must be >= 0 and finite, got inf"),
        (lambda: bridge(np.ones(2)), r"sigma must have shape \(\), got \(2,\)"),
        (
            lambda: bridges.schroedinger_coupling(MEAN1, COV1, 1.0, source_cov=np.eye(3)),
            r"source_cov must have shape \(2, 2\), got \(3, 3\)",
        ),
        (
            lambda: bridges.schroedinger_coupling(MEAN1, COV1, 1.0, source_mean=np.ones(3)),
            r"source_mean must have shape \(2,\), got \(3,\)",
        ),
        (lambda: bridges.schroedinger_coupling(np.ones(3), COV1, 1.0), r"mean must have shape \(2,\), got \(3,\)"),
        (lambda: bridges.schroedinger_coupling(MEAN1, -COV1, 1.0), "cov must be positive semi-definite"),
        (lambda: bridges.markov_coupling(any_coupling(), -1.0), r"sigma must be >= 0 and finite, got -1\.0"),
        (lambda: bridges.bridge_law(any_coupling(), -1.0, 0.5), r"sigma must be >= 0 and finite, got -1\.0"),
        (lambda: bridges.bridge_law(any_coupling(), 1.0, 1.5), r"t must be in \[0, 1\], got 1\.5"),
        (lambda: bridges.bridge_law(any_coupling(), 1.0, np.nan), r"t must be in \[0, 1\], got nan"),
        (lambda: bridges.bridge_law(any_coupling(), 1.0, np.ones(3)), r"t must have shape \(\), got \(3,\)"),
        (
            lambda: bridges.coupling_divergence(any_coupling(), independent_coupling(np.ones(3), np.eye(3))),
            "reference must have the dimension of coupling, 2, got 3",
        ),
        (lambda: bridges.divergence_floor(4, 4), "count must be >= dim \\+ 1 = 5, else .*, got 4"),
        (lambda: bridges.divergence_floor(9, 0), "dim must be an integer >= 1, got 0"),
        (lambda: bridges.divergence_floor(9.0, 2), r"count must be an integer >= 1, got 9\.0"),
        (
            lambda: bridges.sample_divergence(Pair(jnp.ones((9, 3)), jnp.ones((9, 3))), any_coupling()),
            r"pairs.x0 must have shape \(9, 2\), got \(9, 3\)",
        ),
        (
            lambda: bridges.sample_divergence(Pair(jnp.ones((9, 2)), jnp.full((9, 2), jnp.nan)), any_coupling()),
            "pairs.x1 must be finite, got 18 of 18 entries that are not",
        ),
    ],
)
def test_bad_input_is_named(call, message) -> None:
    """Catches bad input that ends in nan or in a traceback from inside jax."""
    with pytest.raises(ValueError, match=message):
        call()
