"""Gaussian laws: optimal and rotated maps, couplings, draws, and the matrix root beneath them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvjax import gaussian
from fvjax.couplings import rotation_matrix
from fvjax.gaussian.laws import square_root

seeds = st.integers(0, 2**16)


def random_covariance(seed: int, dim: int = 3, rank: int | None = None) -> np.ndarray:
    """Eigenvalues between 0.3 and 3 in a random basis; `dim - rank` of them 0."""
    random = np.random.default_rng(seed)
    basis = np.linalg.qr(random.normal(size=(dim, dim)))[0]
    values = random.uniform(0.3, 3, dim) * (np.arange(dim) < (dim if rank is None else rank))
    return (basis * values) @ basis.T


def cross_covariance(coupling: gaussian.GaussianCoupling) -> np.ndarray:
    """Cov(X1, X0)."""
    return np.asarray(coupling.factor1 @ coupling.factor0.T)


@given(seed=seeds)
def test_ot_map_carries_one_law_to_the_other_and_is_a_gradient(x64: None, seed: int) -> None:
    """Catches a wrong root or order of factors: the OT map is the symmetric, positive definite A with A S0 A = S1."""
    random = np.random.default_rng(seed)
    mean0, mean1 = random.normal(size=(2, 3))
    cov0, cov1 = random_covariance(seed), random_covariance(seed + 1)
    matrix, shift = gaussian.ot_map(mean1, cov1, source_mean=mean0, source_cov=cov0)
    np.testing.assert_allclose(matrix @ cov0 @ matrix.T, cov1, atol=1e-12)
    np.testing.assert_allclose(matrix @ mean0 + shift, mean1, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    assert np.linalg.eigvalsh(matrix).min() > 0


def test_ot_map_of_commuting_covariances_is_the_ratio_of_deviations(x64: None) -> None:
    """Catches S0 and S1 interchanged: between diagonal covariances the map is sqrt(S1 / S0)."""
    matrix, _ = gaussian.ot_map(
        jnp.zeros(2), jnp.diag(jnp.array([4.0, 0.25])), source_cov=jnp.diag(jnp.array([1, 9.0]))
    )
    np.testing.assert_allclose(matrix, np.diag([2, 1 / 6]), atol=1e-14)


@pytest.mark.parametrize("side", ["source", "target"])
def test_ot_map_of_a_singular_covariance_stays_on_its_support(x64: None, side: str) -> None:
    """Catches nan or 1e8 from the inverse of a zero eigenvalue (the constant pixels of digits)."""
    cov0, cov1 = random_covariance(1), random_covariance(2, rank=2)
    if side == "source":
        cov0, cov1 = cov1, cov0
    matrix, _ = gaussian.ot_map(jnp.ones(3), cov1, source_cov=cov0)
    assert np.linalg.matrix_rank(matrix, tol=1e-7) == 2
    if side == "target":
        np.testing.assert_allclose(matrix @ cov0 @ matrix.T, cov1, atol=1e-12)
    else:
        assert np.abs(matrix).max() < 10


@given(seed=seeds, angle=st.floats(-np.pi, np.pi))
def test_rotated_map_keeps_the_target_law(x64: None, seed: int, angle: float) -> None:
    """Catches R cov^(1/2) in place of cov^(1/2) R: only the latter has the covariance asked for."""
    cov = random_covariance(seed)
    matrix, shift = gaussian.rotated_map(jnp.arange(3.0), cov, rotation_matrix(angle, 3))
    np.testing.assert_allclose(matrix @ matrix.T, cov, atol=1e-12)
    np.testing.assert_array_equal(shift, np.arange(3.0))


@given(seed=seeds)
def test_couplings_have_the_covariances_asked_for(x64: None, seed: int) -> None:
    """Catches a transposed K, and a target whose law depends on the coupling."""
    random = np.random.default_rng(seed)
    mean, cov, source_mean, source_cov = (
        random.normal(size=3),
        random_covariance(seed),
        np.ones(3),
        random_covariance(9),
    )
    cross = random.uniform(-1, 1, (3, 3))
    cross *= 0.09 / np.linalg.norm(cross)
    source = {"source_mean": source_mean, "source_cov": source_cov}
    map = gaussian.ot_map(mean, cov, **source)
    expected = {
        "general": (gaussian.gaussian_coupling(mean, cov, cross, **source), cross),
        "independent": (gaussian.independent_coupling(mean, cov, **source), np.zeros((3, 3))),
        "map": (gaussian.map_coupling(map, **source), map.matrix @ source_cov),
    }
    for coupling, wanted in expected.values():
        np.testing.assert_allclose(cross_covariance(coupling), wanted, atol=1e-12)
        np.testing.assert_allclose(coupling.factor0 @ coupling.factor0.T, source_cov, atol=1e-12)
        np.testing.assert_allclose(coupling.factor1 @ coupling.factor1.T, cov, atol=1e-12)
        np.testing.assert_allclose(coupling.mean0, source_mean, atol=1e-12)
        np.testing.assert_allclose(coupling.mean1, mean, atol=1e-12)


@pytest.mark.parametrize("dim", [2, 50])
def test_a_deterministic_coupling_may_be_given_by_its_cross_covariance(x64: None, dim: int) -> None:
    """Catches rounding error of cov - K S0^-1 K^T that is refused as negative, or taken for noise of size 1e-8."""
    map = gaussian.rotated_map(jnp.ones(dim), random_covariance(3, dim), rotation_matrix(2.0, dim))
    cov = map.matrix @ map.matrix.T
    coupling = gaussian.gaussian_coupling(map.shift, (cov + cov.T) / 2, map.matrix)
    np.testing.assert_array_equal(coupling.factor1[:, dim:], 0)
    np.testing.assert_allclose(coupling.factor1[:, :dim], map.matrix, atol=1e-13)


@pytest.mark.parametrize("kind", ["map", "independent", "general"])
def test_draws_have_the_moments_of_the_coupling(x64: None, kind: str) -> None:
    """Catches factors that are applied transposed, or one xi for x0 and another for x1.

    18 entries per kind within 4 standard errors: another seed would fail in 54 * 6e-5 = 0.3% of cases.
    """
    cov, n = random_covariance(4), 100_000
    map = gaussian.ot_map(jnp.ones(3), cov)
    coupling = {
        "map": gaussian.map_coupling(map),
        "independent": gaussian.independent_coupling(jnp.ones(3), cov),
        "general": gaussian.gaussian_coupling(jnp.ones(3), cov, 0.5 * map.matrix @ rotation_matrix(1.0, 3)),
    }[kind]
    x0, x1 = gaussian.draw_pairs(jax.random.key(0), coupling, n)
    assert x0.shape == x1.shape == (n, 3)
    products = {
        "cross": (x1[:, :, None] * x0[:, None], cross_covariance(coupling)),
        "target": ((x1 - 1)[:, :, None] * (x1 - 1)[:, None], cov),
    }
    for sample, wanted in products.values():
        error = np.asarray(sample.std(0)) / np.sqrt(n)
        assert np.all(np.abs(sample.mean(0) - wanted) < 4 * error)


def test_draws_depend_on_the_key_only(x64: None) -> None:
    """Catches hidden state, and x0 that changes with the coupling (rotated couplings share their sources)."""
    map = gaussian.rotated_map(jnp.zeros(2), jnp.eye(2), rotation_matrix(1.0, 2))
    rotated, optimal = gaussian.map_coupling(map), gaussian.map_coupling(gaussian.ot_map(jnp.zeros(2), jnp.eye(2)))
    first, second = (gaussian.draw_pairs(jax.random.key(0), c, 10) for c in (rotated, optimal))
    np.testing.assert_array_equal(first.x0, second.x0)
    assert not np.allclose(first.x0, gaussian.draw_pairs(jax.random.key(1), rotated, 10).x0)


@pytest.mark.parametrize("cov", [np.eye(3), np.diag([1, 1, 4.0]), random_covariance(5), random_covariance(6, rank=2)])
def test_derivative_of_the_root(x64: None, cov: np.ndarray) -> None:
    """Catches nan from the eigenvectors' derivative where eigenvalues coincide: cov = I is the most common case."""
    random = np.random.default_rng(0)
    direction = random.normal(size=(3, 3))
    direction = cov @ (direction + direction.T) @ cov  # stays positive semi-definite to first order
    step = 1e-5
    _, change = jax.jvp(square_root, (jnp.asarray(cov),), (jnp.asarray(direction),))
    difference = (square_root(jnp.asarray(cov + step * direction)) - square_root(jnp.asarray(cov))) / step
    np.testing.assert_allclose(change, difference, atol=1e-3)
    slope = jax.grad(lambda s: jnp.sum(square_root(s) * direction))(jnp.asarray(cov))
    np.testing.assert_allclose(jnp.sum(slope * direction), jnp.sum(change * direction), rtol=1e-12)


BAD_COVARIANCES = [
    (np.ones((2, 3)), "cov must be a square matrix, got shape"),
    (np.array([[1, 0.5], [0.4, 1]]), "cov must be symmetric, got a largest"),
    (np.diag([1, -0.1]), "cov must be positive semi-definite, got a smallest eigenvalue of -0.1"),
    (np.diag([1, np.nan]), "cov must be finite"),
]


@pytest.mark.parametrize(("cov", "message"), BAD_COVARIANCES)
def test_bad_covariances_are_refused(cov: np.ndarray, message: str) -> None:
    """Catches a root that silently drops a negative eigenvalue or half of an asymmetric matrix."""
    mean = np.zeros(2)
    calls = [
        lambda: gaussian.ot_map(mean, cov),
        lambda: gaussian.rotated_map(mean, cov, np.eye(2)),
        lambda: gaussian.independent_coupling(mean, cov),
        lambda: gaussian.gaussian_coupling(mean, cov, np.zeros((2, 2))),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian.ot_map(np.zeros(3), np.eye(2)), r"mean must have shape \(2,\), got \(3,\)"),
        (lambda: gaussian.ot_map(np.zeros(2), np.eye(2), source_mean=np.zeros(3)), "source_mean must have shape"),
        (lambda: gaussian.ot_map(np.zeros(2), np.eye(2), source_cov=np.eye(3)), "source_cov must have shape"),
        (lambda: gaussian.ot_map(np.zeros(2), np.eye(2), source_cov=-np.eye(2)), "source_cov must be positive"),
        (lambda: gaussian.rotated_map(np.zeros(2), np.eye(2), np.eye(3)), "rotation must have shape"),
        (lambda: gaussian.rotated_map(np.zeros(2), np.eye(2), 1.01 * np.eye(2)), "rotation must be orthogonal, got"),
        (lambda: gaussian.map_coupling(gaussian.AffineMap(np.ones((2, 3)), np.ones(2))), "map.matrix must be a square"),
        (lambda: gaussian.map_coupling(gaussian.AffineMap(np.eye(2), np.ones(3))), "map.shift must have shape"),
        (lambda: gaussian.gaussian_coupling(np.zeros(2), np.eye(2), np.eye(3)), "cross must have shape"),
        (lambda: gaussian.gaussian_coupling(np.zeros(2), np.eye(2), 1.1 * np.eye(2)), "smallest eigenvalue of -0.21"),
        (
            lambda: gaussian.gaussian_coupling(
                np.zeros(2), np.eye(2), 0.5 * np.eye(2), source_cov=np.diag(np.array([1.0, 0]))
            ),
            "cross must be 0 where source_cov is singular, got 0.5",
        ),
        (
            lambda: gaussian.draw_pairs(jax.random.key(0), gaussian.independent_coupling(jnp.zeros(2), jnp.eye(2)), 0),
            "n must be an integer >= 1, got 0",
        ),
    ],
)
def test_other_bad_input_is_refused(call, message: str) -> None:
    """Catches a wrong shape that broadcasts, a matrix that is no rotation, and a joint law that does not exist."""
    with pytest.raises(ValueError, match=message):
        call()


def test_traced_arguments_pass_unchecked() -> None:
    """Catches a check on the host that breaks jit or vmap."""
    matrices = jax.jit(
        jax.vmap(lambda a: gaussian.rotated_map(jnp.zeros(2), jnp.eye(2), rotation_matrix(a, 2)).matrix)
    )(jnp.linspace(0, 1, 3))
    np.testing.assert_allclose(matrices[2], rotation_matrix(1.0, 2), atol=1e-6)
    roots = jax.vmap(lambda s: gaussian.ot_map(jnp.zeros(2), s * jnp.eye(2)).matrix)(jnp.array([1.0, 4.0]))
    np.testing.assert_allclose(roots, np.eye(2) * np.array([1, 2])[:, None, None], atol=1e-6)
