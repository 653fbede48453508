"""Sinkhorn with the Schroedinger bridge's epsilon, draws with replacement, and whole data sets in batches."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from fvjax import couplings

KEY = jax.random.key(0)
ONES = jnp.ones((4, 2))


def clouds(n: int, dim: int, scale: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Samples of N(-.1, I) and N(.1, I), scaled."""
    key0, key1 = jax.random.split(jax.random.key(n))
    return scale * (jax.random.normal(key0, (n, dim)) - 0.1), scale * (jax.random.normal(key1, (n, dim)) + 0.1)


def warnings_of(call: Callable[[], Any]) -> list[str]:
    """The messages of all RuntimeWarnings that `call` causes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.block_until_ready(call())
        jax.effects_barrier()
    assert all(w.category is RuntimeWarning for w in caught)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_plan_of_two_points_by_hand(x64: None, scale: float) -> None:
    """Catches epsilon = sigma^2 or 4 sigma^2, and one in units of the spread: the plan of two points is explicit.

    P = [[a, 1/2 - a], [1/2 - a, a]] with 2 log(a / (1/2 - a)) = (c12 + c21 - c11 - c22) / (2 sigma^2).
    """
    sigma = 0.9 * scale
    x0, x1 = scale * jnp.array([[0.0, 1.0], [2.0, 0.5]]), scale * jnp.array([[1.5, 0.0], [0.3, 0.8]])
    cost = np.square(np.asarray(x0)[:, None] - np.asarray(x1)).sum(-1)
    odds = np.exp((cost[0, 1] + cost[1, 0] - cost[0, 0] - cost[1, 1]) / (2 * sigma**2) / 2)
    a = odds / (1 + odds) / 2
    solution = jax.jit(lambda s: couplings.sinkhorn_plan(x0, x1, sigma=s, threshold=1e-12))(sigma)
    np.testing.assert_allclose(solution.plan, [[a, 0.5 - a], [0.5 - a, a]], rtol=1e-9)
    np.testing.assert_allclose(solution.epsilon, 2 * sigma**2, rtol=1e-12)
    assert 0.05 < a < 0.45  # neither end


def partners_of(coupling: Callable[..., Any], draws: int) -> np.ndarray:
    """Index of the partner of each x0 in `clouds(3, 2)`, [draws, 3]."""
    x0, x1 = clouds(3, 2)
    partners = jax.jit(jax.vmap(lambda key: coupling(key, x0, x1).x1))(jax.random.split(KEY, draws))
    return np.argmax(np.all(np.asarray(partners)[:, :, None] == np.asarray(x1), axis=-1), axis=-1)


def test_draws_with_replacement_have_the_law_of_the_plan() -> None:
    """Catches rows that share their noise or hinder each other: all 27 odds are products of the rows'."""
    coupling = couplings.minibatch_ot(method="sinkhorn", sigma=0.8, replace=True)
    rows = 3 * np.asarray(couplings.sinkhorn_plan(*clouds(3, 2), sigma=0.8).plan, float)
    law = np.einsum("i,j,k->ijk", *(row / row.sum() for row in rows)).ravel()
    counts = np.bincount(np.ravel_multi_index(tuple(partners_of(coupling, 20_000).T), (3, 3, 3)), minlength=27)
    assert np.sum((counts - 20_000 * law) ** 2 / (20_000 * law)) < chi2.ppf(0.999, 26)


def test_draws_without_replacement_are_the_default() -> None:
    """Catches sigma that switches to repetitions: every point is used once unless `replace` is given."""
    found = partners_of(couplings.minibatch_ot(method="sinkhorn", sigma=0.8), 200)
    np.testing.assert_array_equal(np.sort(found, 1), np.broadcast_to(np.arange(3), found.shape))


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_coupling_that_does_not_converge_warns_once(transform: Callable[..., Any]) -> None:
    """Catches silence with `replace` or `sigma`, and advice about an epsilon that the caller never gave."""
    x0, x1 = clouds(9, 2)
    coupling = couplings.minibatch_ot(method="sinkhorn", sigma=0.02, max_iterations=3, replace=True)
    error = float(couplings.sinkhorn_plan(x0, x1, sigma=0.02, max_iterations=3).error)
    messages = warnings_of(lambda: transform(coupling)(KEY, x0, x1))
    assert len(messages) == 1
    assert f"within 3 iterations: the marginals are off by {error:.3g} in L1" in messages[0]
    assert messages[0].endswith("raise max_iterations or sigma")


def test_partners_are_those_of_their_rows() -> None:
    """Catches indices in the order of the batches instead of x0's, or into the shuffled targets.

    Far apart the plan is a permutation, here a known one; in one batch, so that every point finds its own.
    """
    permutation = np.array([3, 0, 5, 1, 4, 2])
    x0 = 10 * jnp.arange(6.0)[:, None]
    x1 = x0[permutation] + 0.5
    partners = couplings.entropic_partners(KEY, x0, x1, sigma=0.5, batch=6)
    np.testing.assert_array_equal(permutation[np.asarray(partners.indices)], np.arange(6))
    assert partners.converged == 1
    assert partners.error < 1e-3


def test_partners_of_gaussians_have_the_covariance_of_the_plans() -> None:
    """Catches pairs across batches and draws that do not follow the plan: 4,096 pairs, d = 5, in batches of 64.

    The reference sums x0 x1 over the plans of other batches. Both lie below the bridge's .618 (.562 from 65,536 pairs):
    among 64 targets there is none at the right place. A permutation lies below that.
    """
    x0, x1 = clouds(4096, 5)

    def covariance(a: Any, b: Any) -> tuple[float, float]:
        products = ((a - np.mean(a, 0)) * (b - np.mean(b, 0))).mean(-1)
        return products.mean(), products.std() / math.sqrt(len(products))

    def conditional_mean(a: jax.Array, b: jax.Array) -> jax.Array:
        return 64 * couplings.sinkhorn_plan(a, b, sigma=1.0).plan @ b

    means = jax.lax.map(lambda ab: conditional_mean(*ab), (x0.reshape(64, 64, 5), x1.reshape(64, 64, 5)))
    expected, expected_error = covariance(np.asarray(x0), np.asarray(means).reshape(-1, 5))
    found = {}
    for replace in (True, False):
        partners = couplings.entropic_partners(KEY, x0, x1, sigma=1.0, batch=64, replace=replace)
        assert partners.converged == 1
        assert len(np.unique(partners.indices)) == 4096 if not replace else len(np.unique(partners.indices)) < 3500
        found[replace], error = covariance(np.asarray(x0), np.asarray(x1)[partners.indices])
    assert abs(found[True] - expected) < 4 * math.hypot(error, expected_error)
    assert 0.5 < expected < (math.sqrt(5) - 1) / 2
    assert found[False] < found[True]


def test_partners_report_what_did_not_converge() -> None:
    """Catches a mean error, and a share that is all or nothing: none, one and both of two batches fail, under jit."""
    x0, x1 = clouds(8, 2)
    call = jax.jit(lambda s: couplings.entropic_partners(KEY, x0, x1, sigma=s, batch=4, max_iterations=20))
    reports = {sigma: call(sigma) for sigma in (3.0, 0.4, 0.02)}
    assert [float(report.converged) for report in reports.values()] == [1, 0.5, 0]
    assert reports[3.0].error < 1e-3 <= min(reports[0.4].error, reports[0.02].error)
    assert set(np.asarray(reports[0.02].indices)) <= set(range(8))
    eager = couplings.entropic_partners(KEY, x0, x1, sigma=3.0, batch=4, max_iterations=20)
    np.testing.assert_array_equal(eager.indices, reports[3.0].indices)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: couplings.sinkhorn_plan(ONES, ONES, epsilon=0.1, sigma=1.0),
            r"epsilon and sigma must not be given together, got epsilon = 0\.1 and sigma = 1\.0",
        ),
        (
            lambda: couplings.minibatch_ot(method="sinkhorn", epsilon=0.1, sigma=1.0),
            "epsilon and sigma must not be given together",
        ),
        (
            lambda: couplings.minibatch_ot(method="sinkhorn", sigma=0.0),
            r"sigma must be > 0 and finite \(without noise it is optimal transport: method 'exact'\), got 0\.0",
        ),
        (lambda: couplings.sinkhorn_plan(ONES, ONES, sigma=-1.0), r"sigma must be > 0 and finite .*, got -1\.0"),
        (lambda: couplings.sinkhorn_plan(ONES, ONES, sigma=math.nan), "sigma must be > 0 and finite .*, got nan"),
        (lambda: couplings.sinkhorn_plan(ONES, ONES, sigma=jnp.ones(2)), r"sigma must have shape \(\), got \(2,\)"),
        (lambda: couplings.minibatch_ot(sigma=1.0), r"sigma must be None where method is 'exact' .*, got 1\.0"),
        (lambda: couplings.minibatch_ot(replace=True), "replace must be False where method is 'exact' .*, got True"),
        (
            lambda: couplings.minibatch_ot(method="sinkhorn", replace=1),  # type: ignore[arg-type]
            "replace must be True or False, got 1",
        ),
        (
            lambda: couplings.entropic_partners(KEY, ONES, ONES, sigma=1.0, batch=3),
            "batch must divide the number of examples, 4, got 3",
        ),
        (
            lambda: couplings.entropic_partners(KEY, ONES, ONES, sigma=1.0, batch=0),
            "batch must be an integer >= 1, got 0",
        ),
        (
            lambda: couplings.entropic_partners(KEY, ONES, ONES, sigma=0.0, batch=2),
            r"sigma must be > 0 and finite .*, got 0\.0",
        ),
        (
            lambda: couplings.entropic_partners(KEY, ONES, ONES, sigma=1.0, batch=2, replace="no"),  # type: ignore[arg-type]
            "replace must be True or False, got 'no'",
        ),
        (
            lambda: couplings.entropic_partners(KEY, ONES, ONES[:2], sigma=1.0, batch=2),
            "x0 and x1 must have the same shape",
        ),
        (
            lambda: couplings.entropic_partners(KEY, ONES, ONES * jnp.nan, sigma=1.0, batch=2),
            "x1 must be finite, got 8 of 8 entries that are not",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], message: str) -> None:
    """Catches two units of epsilon at once, a bridge without noise, and options that are ignored."""
    with pytest.raises(ValueError, match=message):
        call()
