"""Figures 4 and 5 and their phase diagram: the gradient variance of OT and pair-optimal fields, exact and drawn.

Everything here is in float64; angles are degrees in rows and radians inside.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats
from sklearn.datasets import load_digits

from experiments.common import progress
from fvjax import couplings, gaussian, gradients, losses
from fvjax.gaussian import AffineMap, GaussianCoupling
from fvjax.interpolants import Interpolant, constant_noise, draw_paths
from fvjax.types import Array, Key

COUPLINGS = ("ot", "rotated", "independent")
FIELDS = ("ot", "pair_optimal")
ZERO = 1e-20
CALL = 16
"""Closed forms that one compiled call evaluates, one after the other."""

Row = dict[str, Any]


class Target(NamedTuple):
    """A Gaussian target law N(mean, cov) and the planes in which the pairs are rotated."""

    name: str
    mean: Array
    cov: Array
    basis: Array | None

    def map(self, degrees: float) -> AffineMap:
        """x0 -> mean + cov^(1/2) R x0; the optimal-transport map at 0 degrees."""
        return _map(self.mean, self.cov, self.basis, jnp.asarray(np.deg2rad(degrees), self.mean.dtype))


@jax.jit
def _map(mean: Array, cov: Array, basis: Array | None, angle: Array) -> AffineMap:
    return gaussian.rotated_map(mean, cov, couplings.rotation_matrix(angle, len(mean), basis=basis))


def isotropic_target(dim: int) -> Target:
    """N(5, I), rotated in the coordinate planes (0, 1), (2, 3), ...: the paper's Gaussian to Gaussian."""
    return Target("gaussian", jnp.full(dim, 5.0), jnp.eye(dim), None)


def digits_targets(key: Key, *, stride: int = 1) -> tuple[Target, Target]:
    """Mean and covariance of scikit-learn's digits in [-1, 1], with random planes: all 64 pixels, and the 61 that vary.

    Three pixels are constant, so the covariance of all 64 is singular: A has the eigenvalue 0, I + t (A - I) is
    singular at t = 1, and with noise the variance of every field of Lemma 1 is infinite. The pixels that vary are the
    same data without that. `stride` > 1 takes every stride-th row and column, for a smoke run.
    """
    images = load_digits().images[:, ::stride, ::stride].reshape(-1, (8 // stride) ** 2) / 8 - 1
    varying = images[:, images.std(0) > 0]
    targets = []
    for name, data in (("digits", images), ("digits_varying", varying)):
        basis = couplings.random_basis(key, data.shape[1])
        targets.append(Target(name, jnp.asarray(data.mean(0)), jnp.asarray(np.cov(data.T)), basis))
    return targets[0], targets[1]


class Case(NamedTuple):
    """A field and the pairs it meets: names, parameters of the field, law of the pairs."""

    coupling: str
    field: str
    params: AffineMap
    law: GaussianCoupling


def cases_at(target: Target, degrees: float) -> list[Case]:
    """The six (coupling, field) of an angle, all of one shape, so that they share one compilation."""
    laws, fields = _laws_and_fields(target.map(0.0), target.map(degrees), target.mean, target.cov)
    return [Case(name, field, fields[field], laws[name]) for name in COUPLINGS for field in FIELDS]


@jax.jit
def _laws_and_fields(
    optimal: AffineMap, rotated: AffineMap, mean: Array, cov: Array
) -> tuple[dict[str, GaussianCoupling], dict[str, AffineMap]]:
    def widened(law: GaussianCoupling) -> GaussianCoupling:
        # The factors of an independent coupling, [d, 2 d], with zeros for the second half of xi.
        zeros = jnp.zeros_like(law.factor0)
        return law._replace(
            factor0=jnp.concatenate([law.factor0, zeros], 1), factor1=jnp.concatenate([law.factor1, zeros], 1)
        )

    laws = {
        "ot": widened(gaussian.map_coupling(optimal)),
        "rotated": widened(gaussian.map_coupling(rotated)),
        "independent": gaussian.independent_coupling(mean, cov),
    }
    return laws, {"ot": gaussian.pair_optimal(optimal), "pair_optimal": gaussian.pair_optimal(rotated)}


def exact_values(cases: Sequence[tuple[Case, float]], label: str) -> np.ndarray:
    """The closed form of every (case, sigma), in calls of one size: one compilation for each dimension."""
    stacked = [(case.params, case.law, np.asarray(sigma)) for case, sigma in cases]
    parts = [stacked[k : k + CALL] for k in range(0, len(stacked), CALL)]
    values = []
    for part in progress(parts, label, len(parts)):
        padded = part + part[-1:] * (CALL - len(part))
        values.append(np.asarray(_exact(*jax.tree.map(lambda *x: np.stack(x), *padded)))[: len(part)])
    return np.concatenate(values)


@jax.jit
def _exact(params: AffineMap, law: GaussianCoupling, sigma: Array) -> Array:
    def value(case: tuple[AffineMap, GaussianCoupling, Array]) -> Array:
        return gaussian.exact_gradient_variance(case[0], case[1], constant_noise(case[2]))

    return jax.lax.map(value, (params, law, sigma))


@functools.partial(jax.jit, static_argnames=("repeats", "draws"))
def monte_carlo(
    key: Key, params: AffineMap, coupling: GaussianCoupling, interpolant: Interpolant, *, repeats: int, draws: int
) -> Array:
    """Independent unbiased estimates of the total variance from the gradients of draws, [repeats]; no closed form."""
    loss = losses.squared_error(gaussian.affine_field)

    def estimate(repeat_key: Key) -> Array:
        pair_key, path_key = jax.random.split(repeat_key)
        paths = draw_paths(path_key, gaussian.draw_pairs(pair_key, coupling, draws), interpolant)
        return gradients.total_variance(gradients.gradient_moments(loss, params, paths), ddof=1)

    return jax.lax.map(estimate, jax.random.split(key, repeats))


def variance_rows(
    target: Target, angles: Sequence[float], sigmas: Sequence[float], *, key: Key, repeats: int, draws: int
) -> tuple[list[Row], list[Row]]:
    """Exact and drawn variance of every (angle, sigma, coupling, field), and the tests OT against pair-optimal.

    Returns:
        Rows of variances (`exact` is inf where the integral diverges, and then the drawn number means nothing), and
        rows of comparisons with the two-sided p-value of Welch's t-test between the `repeats` estimates of both fields.
    """
    cells = [(case, angle, sigma) for angle in angles for case in cases_at(target, angle) for sigma in sigmas]
    exact = exact_values([(case, sigma) for case, _, sigma in cells], f"closed form, {target.name}")
    rows, estimates = [], {}
    for index, (case, angle, sigma) in enumerate(progress(cells, f"draws, {target.name}", len(cells))):
        cell_key = jax.random.fold_in(key, index)
        interpolant = constant_noise(jnp.asarray(sigma))
        drawn = np.asarray(monte_carlo(cell_key, case.params, case.law, interpolant, repeats=repeats, draws=draws))
        estimates[angle, sigma, case.coupling, case.field] = drawn, float(exact[index])
        row = _named(target, angle, sigma, case)
        row |= {"exact": float(exact[index]), "monte_carlo": float(drawn.mean())}
        rows.append(row | {"standard_error": float(drawn.std(ddof=1) / np.sqrt(repeats))})
    comparisons = [
        {"target": target.name, "angle": angle, "sigma": sigma, "coupling": coupling}
        | _test(*zip(*(estimates[angle, sigma, coupling, field] for field in FIELDS), strict=True))
        for angle in angles
        for sigma in sigmas
        for coupling in COUPLINGS
    ]
    return rows, comparisons


def _named(target: Target, angle: float, sigma: float, case: Case) -> Row:
    return {
        "target": target.name,
        "angle": angle,
        "sigma": sigma,
        "coupling": case.coupling,
        "field": case.field,
    }


def _test(estimates: Sequence[np.ndarray], exact: Sequence[float]) -> Row:
    """Which field has the lower variance, exactly and by the draws, and Welch's p-value of the drawn difference.

    Variances below 1e-20 are rounding errors of 0; between two of them there is no difference to test, p = 1.
    """
    first, second = (float(values.mean()) for values in estimates)
    lower = "equal" if exact[0] == exact[1] or max(exact) < ZERO else FIELDS[int(exact[0] > exact[1])]
    drawn = "equal" if max(first, second) < ZERO else FIELDS[int(first > second)]
    p_value = 1.0 if drawn == "equal" else float(stats.ttest_ind(*estimates, equal_var=False).pvalue)
    return {"lower": lower, "lower_drawn": drawn, "p_value": p_value}


def exact_lines(target: Target, angles: Sequence[float], sigmas: Sequence[float]) -> list[Row]:
    """The closed form alone on a fine grid of angles: the lines of the figures."""
    cells = [(case, angle, sigma) for angle in angles for case in cases_at(target, angle) for sigma in sigmas]
    exact = exact_values([(case, sigma) for case, _, sigma in cells], f"lines, {target.name}")
    return [
        _named(target, angle, sigma, case) | {"exact": float(value)}
        for (case, angle, sigma), value in zip(cells, exact, strict=True)
    ]


def phase_rows(target: Target, angles: Sequence[float], sigmas: Sequence[float]) -> list[Row]:
    """log10 Var(OT field) / Var(pair-optimal field) on rotated pairs over (angle, sigma).

    0 where the two are equal (both 0 or both infinite), -inf where only the pair-optimal variance is infinite.
    """
    rotated = [case for angle in angles for case in cases_at(target, angle) if case.coupling == "rotated"]
    cells = [(case, float(sigma)) for case in rotated for sigma in sigmas]
    values = exact_values(cells, f"phase diagram, {target.name}").reshape(len(angles), len(FIELDS), len(sigmas))
    optimal, paired = values[:, 0], values[:, 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(optimal == paired, 0.0, np.log10(optimal) - np.log10(paired))
    return [
        {"target": target.name, "angle": angle, "sigma": float(sigma), "log10_ratio": float(ratios[i, j])}
        for i, angle in enumerate(angles)
        for j, sigma in enumerate(sigmas)
    ]


def crossings(rows: Sequence[Row]) -> list[Row]:
    """For every sigma the angle from which on up to 180 degrees the OT field has the lower variance on rotated pairs.

    By linear interpolation of the logarithm; 0 where it is lower at every angle of the grid, None where it is not lower
    at 180 degrees.
    """
    found = []
    for sigma in sorted({row["sigma"] for row in rows}):
        line = sorted((row["angle"], row["log10_ratio"]) for row in rows if row["sigma"] == sigma and row["angle"] > 0)
        angle = 0.0
        for (a, ratio), (b, following) in itertools.pairwise(line):
            if ratio >= 0 > following:
                angle = b if np.isinf(following) else a + (b - a) * ratio / (ratio - following)
        found.append({"sigma": sigma, "angle": angle if line[-1][1] < 0 else None})
    return found
