"""Mixtures of Gaussians: their density, their samples, and the population minimiser of flow matching towards them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import multivariate_normal

import fvjax
from fvjax import gaussian, metrics
from fvjax.data import GaussianMixture, gaussian_mixture, sphere_mixture
from fvjax.interpolants import path_at

INTERPOLANTS = {
    "linear": fvjax.linear,
    "constant_noise": lambda: fvjax.constant_noise(0.4),
    "brownian_bridge": lambda: fvjax.brownian_bridge(0.8),
    "bridge_drift": lambda: fvjax.bridge_drift(0.8),
    "smooth_bridge": lambda: fvjax.smooth_bridge(0.5),
    "trigonometric": fvjax.trigonometric,
    "gaussian_source": lambda: fvjax.gaussian_source(0.2),
}
DIFFUSIONS = {"bridge_drift": 0.8}
"""sigma of dX = v dt + sigma dB, where the minimiser is the drift of a diffusion."""

MEANS = np.array([[1.5, -0.5], [-1.0, 2.0], [0.3, -2.0]])
COVARIANCES = np.array([[[0.5, 0.2], [0.2, 0.3]], [[1.2, -0.5], [-0.5, 0.6]], [[0.1, 0.0], [0.0, 0.4]]])
WEIGHTS = np.array([0.5, 0.3, 0.2])


def correlated() -> GaussianMixture:
    """Three components of different shape and weight in two dimensions."""
    return gaussian_mixture(jnp.asarray(MEANS), covariances=COVARIANCES, weights=WEIGHTS)


def law_at(interpolant: fvjax.Interpolant, t: jax.Array, x: jax.Array) -> jax.Array:
    """log p_t(x) of x_t, from JAX's own normal density and no code of the mixture."""
    c = interpolant.coefficients(t)
    eye = jnp.eye(2)
    parts = [
        jnp.log(w) + multivariate_normal.logpdf(x, c.beta * m, (c.alpha**2 + c.gamma**2) * eye + c.beta**2 * s)
        for m, s, w in zip(MEANS, COVARIANCES, WEIGHTS, strict=True)
    ]
    return jax.nn.logsumexp(jnp.stack(parts))


def test_density_and_responsibilities_are_bayes_rule(x64: None) -> None:
    """Catches a lost determinant, a transposed axis or a forgotten weight: compared with JAX's normal density."""
    mixture = correlated()

    @jax.jit
    @jax.vmap
    def expected(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        joint = jnp.stack(
            [
                jnp.log(w) + multivariate_normal.logpdf(x, jnp.asarray(m), jnp.asarray(s))
                for m, s, w in zip(MEANS, COVARIANCES, WEIGHTS, strict=True)
            ]
        )
        return jax.nn.logsumexp(joint), joint - jax.nn.logsumexp(joint)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 2)) * 2)
    found = jax.jit(jax.vmap(lambda x: (mixture.log_density(x), mixture.log_responsibilities(x))))(x)
    for value, exact in zip(found, expected(x), strict=True):
        np.testing.assert_allclose(value, exact, atol=1e-11)


def test_samples_have_the_moments_and_the_weights_of_the_law(x64: None) -> None:
    """Catches standard deviations for variances, axes of another component, and weights that are ignored."""
    mixture, n = correlated(), 200_000
    x = mixture.sample(jax.random.key(0), n)
    assert x.shape == (n, 2)
    assert x.dtype == jnp.float64
    # Standard deviations of one coordinate and of products are below 2 and 5.
    np.testing.assert_allclose(x.mean(0), mixture.mean, atol=4 * 2 / n**0.5)
    np.testing.assert_allclose(np.cov(np.asarray(x).T), mixture.covariance, atol=4 * 5 / n**0.5)
    # Exact posteriors: their mean over samples of the law is the prior.
    posterior = jnp.exp(jax.jit(jax.vmap(mixture.log_responsibilities))(x)).mean(0)
    np.testing.assert_allclose(posterior, WEIGHTS, atol=4 * 0.5 / n**0.5)
    np.testing.assert_array_equal(x, mixture.sample(jax.random.key(0), n))


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_velocity_is_the_regression_of_the_target(x64: None, name: str) -> None:
    """Catches a wrong sign, gain or posterior: u_t - v(x_t) is uncorrelated with functions of x_t, by Monte Carlo.

    5 functions x 2 coordinates x 2 times x 7 interpolants are 140 numbers within 4 standard errors: 1% of the seeds
    would fail one.
    """
    interpolant, mixture, n = INTERPOLANTS[name](), correlated(), 100_000
    field = mixture.velocity(interpolant)

    @jax.jit
    def residuals(key: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        x0_key, x1_key, z_key = jax.random.split(key, 3)
        pairs = fvjax.Pair(jax.random.normal(x0_key, (n, 2)), mixture.sample(x1_key, n))
        z = jax.random.normal(z_key, (n, 2))
        paths = jax.vmap(lambda pair, z: path_at(pair, interpolant, t, z))(pairs, z)
        off = paths.target - jax.vmap(field, (None, None, 0))(None, t, paths.x)
        features = jnp.concatenate([jnp.ones((n, 1)), paths.x, jnp.sin(2 * paths.x)], 1)
        products = off[:, :, None] * features[:, None]
        return jnp.mean(products, 0), jnp.std(products, 0) / n**0.5

    for t in (0.3, 0.8):
        mean, error = residuals(jax.random.key(1), t)
        assert np.all(np.abs(mean) <= 4 * error)
        assert np.all(error < 0.03)


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_velocity_carries_the_law_of_x_t(x64: None, name: str) -> None:
    """Catches what draws are too coarse to show: the continuity equation d_t p + div(p v) = sigma^2 / 2 Laplacian p.

    Divided by p: d_t log p + div v + v . s = sigma^2 / 2 (div s + |s|^2), s = grad log p; sigma = 0 but for a drift.
    """
    interpolant, mixture = INTERPOLANTS[name](), correlated()
    field, sigma = mixture.velocity(interpolant), DIFFUSIONS.get(name, 0.0)

    @jax.jit
    @jax.vmap
    def violation(t: jax.Array, x: jax.Array) -> jax.Array:
        rate, s = jax.grad(law_at, (1, 2))(interpolant, t, x)
        v = field(None, t, x)
        divergence = jnp.trace(jax.jacfwd(lambda x: field(None, t, x))(x))
        laplacian = jnp.trace(jax.hessian(law_at, 2)(interpolant, t, x)) + s @ s
        return rate + divergence + v @ s - sigma**2 / 2 * laplacian

    random = np.random.default_rng(0)
    t, x = jnp.asarray(random.uniform(0.05, 0.95, 40)), jnp.asarray(random.normal(size=(40, 2)) * 1.5)
    np.testing.assert_allclose(violation(t, x), 0, atol=1e-9)


def test_velocity_is_the_integral_over_pairs(x64: None) -> None:
    """Catches what the two tests above share: E[u_t | x_t = x] by quadrature over x0 and x1, in one dimension."""
    mixture = gaussian_mixture(jnp.array([[1.0], [-2.0]]), scale=jnp.array([0.5, 0.3]), weights=jnp.array([0.7, 0.3]))
    t, sigma, x = 0.4, 0.6, jnp.array([0.5])
    grid = jnp.linspace(-8, 8, 1601)
    x0, x1 = grid[:, None], grid[None, :]
    log_x1 = jax.jit(jax.vmap(lambda point: mixture.log_density(point[None])))(grid)
    log_weight = -(x0**2) / 2 + log_x1[None, :] - (x[0] - (1 - t) * x0 - t * x1) ** 2 / (2 * sigma**2)
    weight = jnp.exp(log_weight)
    expected = jnp.sum(weight * (x1 - x0)) / jnp.sum(weight)  # smooth and 0 at the ends: the sum is spectral
    found = jax.jit(lambda x: mixture.velocity(fvjax.constant_noise(sigma))(None, t, x))(x)
    np.testing.assert_allclose(found, expected[None], rtol=1e-10)


def test_velocity_of_one_component_is_that_of_gaussian_pairs(x64: None) -> None:
    """Catches two minimisers in one library that disagree, at the ends of the Brownian bridge too."""
    mixture = gaussian_mixture(MEANS[:1], covariances=COVARIANCES[0])
    coupling = gaussian.independent_coupling(MEANS[0], COVARIANCES[0])
    x = jnp.array([0.5, -0.7])
    times = jnp.array([0.0, 0.6, 1.0])
    for name in ("constant_noise", "brownian_bridge", "bridge_drift", "trigonometric"):
        interpolant = INTERPOLANTS[name]()
        fields = (mixture.velocity(interpolant), gaussian.population_minimiser(coupling, interpolant))
        found = jax.jit(lambda t, fields=fields: [jax.vmap(f, (None, 0, None))(None, t, x) for f in fields])(times)
        np.testing.assert_allclose(*found, rtol=1e-9, atol=1e-14)


def test_velocity_at_the_ends_of_time(x64: None) -> None:
    """Catches a posterior that is lost at t = 0, or 0 / 0 at t = 1: mean - x and x for straight lines."""
    mixture, x = correlated(), jnp.array([0.4, -1.0])
    field = mixture.velocity(fvjax.linear())
    np.testing.assert_allclose(field(None, 0.0, x), mixture.mean - x, rtol=1e-13)
    np.testing.assert_allclose(field(None, 1.0, x), x, rtol=1e-13)


def test_a_component_of_weight_zero_takes_no_part() -> None:
    """Catches nan from log 0, and samples of a component that is not there."""
    weights = jnp.array([0.25, 0.75, 0.0])
    mixture = gaussian_mixture(jnp.asarray(MEANS, jnp.float32), scale=0.5, weights=weights)
    fewer = gaussian_mixture(jnp.asarray(MEANS[:2], jnp.float32), scale=0.5, weights=weights[:2])
    x = jnp.array([0.3, -2.0])  # the mean of the third
    at = jax.jit(lambda law: (law.log_density(x), law.velocity(fvjax.constant_noise(0.1))(None, 0.7, x)))
    for value, expected in zip(at(mixture), at(fewer), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    drawn = jax.jit(jax.vmap(mixture.log_responsibilities))(mixture.sample(jax.random.key(0), 500)).argmax(1)
    assert set(np.asarray(drawn).tolist()) == {0, 1}


def test_the_flow_of_the_velocity_ends_in_the_mixture() -> None:
    """Catches a field that is right at single times but not a flow: the ends are samples of the law, by their MMD."""
    mixture = sphere_mixture(jax.random.key(3), 8, 10, radius=5.0, scale=0.5)
    x0 = jax.random.normal(jax.random.key(0), (256, 10))
    carried = jax.jit(
        lambda field, x: jax.vmap(lambda x: fvjax.transport(field, None, x, solver="euler", steps=100))(x)
    )
    ends, wanted = carried(mixture.velocity(fvjax.linear()), x0), mixture.sample(jax.random.key(1), 256)
    floor = metrics.mmd_floor(jax.random.key(2), ends, wanted, repeats=50)
    found = metrics.squared_mmd(ends, wanted)
    assert found < floor.mean + 4 * floor.standard_deviation
    assert metrics.squared_mmd(x0, wanted) > 20 * floor.standard_deviation


def test_single_precision_follows_double() -> None:
    """Catches cancellation far from the modes, in 50 dimensions, and a dtype that does not follow the means."""
    single = sphere_mixture(jax.random.key(0), 8, 50, radius=5.0, scale=0.5)
    points = np.random.default_rng(0).normal(size=(20, 50)) * 2

    @jax.jit
    def measured(mixture: GaussianMixture, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        field = mixture.velocity(fvjax.constant_noise(0.05))
        return jax.vmap(field, (None, None, 0))(None, 0.6, x), jax.vmap(mixture.log_density)(x)

    with jax.enable_x64(True):
        double = gaussian_mixture(np.asarray(single.means, np.float64), scale=0.5)
        velocities, densities = map(np.asarray, measured(double, jnp.asarray(points)))
        assert velocities.dtype == densities.dtype == np.float64
    found = measured(single, jnp.asarray(points, jnp.float32))
    assert found[0].dtype == found[1].dtype == single.sample(jax.random.key(0), 2).dtype == jnp.float32
    np.testing.assert_allclose(found[0], velocities, atol=2e-4)
    np.testing.assert_allclose(found[1], densities, rtol=2e-6)


def test_the_sphere_is_a_sphere_of_independent_directions() -> None:
    """Catches directions that crowd, those of a cube's corners for instance, and a radius that depends on dim."""
    mixture = sphere_mixture(jax.random.key(0), 4000, 3, radius=5.0, scale=0.5)
    assert (mixture.modes, mixture.dim) == (4000, 3)
    np.testing.assert_allclose(np.linalg.norm(mixture.means, axis=1), 5, rtol=1e-5)
    # On a sphere in three dimensions every coordinate is uniform (Archimedes): 4000 of them in 10 bins.
    counts = np.histogram(np.asarray(mixture.means), bins=10, range=(-5, 5))[0]
    assert np.all(np.abs(counts - 1200) < 5 * 1200**0.5)
    np.testing.assert_array_equal(np.unique(mixture.variances), np.float32(0.25))


MEAN = jnp.zeros((2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian_mixture(jnp.zeros(3), scale=1.0), r"means must have shape \[k, d\]"),
        (lambda: gaussian_mixture(jnp.zeros((0, 3)), scale=1.0), r"means must have shape \[k, d\]"),
        (lambda: gaussian_mixture(MEAN + jnp.nan, scale=1.0), "means must be finite, got 6 of 6"),
        (lambda: gaussian_mixture(MEAN), "exactly one of scale and covariances must be given, got none"),
        (lambda: gaussian_mixture(MEAN, scale=1.0, covariances=np.eye(3)), "must be given, got both"),
        (lambda: gaussian_mixture(MEAN, scale=0.0), "scale must be > 0 and finite, got 0.0"),
        (lambda: gaussian_mixture(MEAN, scale=np.ones(3)), r"scale must have shape \(\) or \(2,\), got \(3,\)"),
        (lambda: gaussian_mixture(MEAN, covariances=np.eye(2)), r"covariances must have shape \(3, 3\) or"),
        (lambda: gaussian_mixture(MEAN, covariances=np.diag([1.0, 0, 1])), "must be positive definite, got a smallest"),
        (
            lambda: gaussian_mixture(MEAN, covariances=np.stack([np.eye(3), np.tri(3)])),
            r"covariances\[1\] must be symmetric",
        ),
        (lambda: gaussian_mixture(MEAN, scale=1.0, weights=np.ones(3) / 3), r"weights must have shape \(2,\)"),
        (lambda: gaussian_mixture(MEAN, scale=1.0, weights=np.array([0.5, 0.6])), "weights must add up to 1, got"),
        (lambda: gaussian_mixture(MEAN, scale=1.0, weights=np.array([1.5, -0.5])), "weights must be >= 0"),
        (lambda: sphere_mixture(jax.random.key(0), 0, 3, radius=5.0, scale=0.5), "modes must be an integer >= 1"),
        (lambda: sphere_mixture(jax.random.key(0), 8, 0, radius=5.0, scale=0.5), "dim must be an integer >= 1"),
        (lambda: sphere_mixture(jax.random.key(0), 8, 3, radius=-5.0, scale=0.5), "radius must be > 0 and finite"),
        (lambda: sphere_mixture(jax.random.key(0), 8, 3, radius=5.0, scale=np.ones(2)), r"scale must have shape \(\)"),
        (lambda: gaussian_mixture(MEAN, scale=1.0).sample(jax.random.key(0), 0), "n must be an integer >= 1, got 0"),
        (lambda: gaussian_mixture(MEAN, scale=1.0).log_density(MEAN), r"x must be ONE example of shape \(3,\)"),
        (
            lambda: gaussian_mixture(MEAN, scale=1.0).velocity(fvjax.linear())(None, 0.5, jnp.zeros(2)),
            "use jax.vmap for a batch",
        ),
        (
            lambda: gaussian_mixture(MEAN, scale=1.0).log_responsibilities(jnp.zeros(3, jnp.int32)),
            r"and dtype float32, got \(3,\) and int32",
        ),
    ],
)
def test_bad_input_is_refused(call, message: str) -> None:
    """Catches laws that are none, and shapes that would broadcast into something else."""
    with pytest.raises(ValueError, match=message):
        call()
