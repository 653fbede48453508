"""Figures 4 and 5 and their phase diagram: the gradient variance of OT and pair-optimal fields, exact and drawn.

Everything here is in float64; angles are degrees in rows and radians inside.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
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
Row = dict[str, Any]


class Target(NamedTuple):
    """A Gaussian target law N(mean, cov) and the planes in which the pairs are rotated."""

    name: str
    mean: Array
    cov: Array
    basis: Array | None

    def map(self, degrees: float) -> AffineMap:
        """x0 -> mean + cov^(1/2) R x0; the optimal-transport map at 0 degrees."""
        rotation = couplings.rotation_matrix(np.deg2rad(degrees), len(self.mean), basis=self.basis)
        return gaussian.rotated_map(self.mean, self.cov, rotation)


def isotropic_target(dim: int) -> Target:
    """N(5, I), rotated in the coordinate planes (0, 1), (2, 3), ...: the paper's Gaussian to Gaussian."""
    return Target("gaussian", jnp.full(dim, 5.0), jnp.eye(dim), None)


def digits_targets(key: Key) -> tuple[Target, Target]:
    """Mean and covariance of scikit-learn's digits in [-1, 1], with random planes: all 64 pixels, and the 61 that vary.

    Three pixels are constant, so the covariance of all 64 is singular: A has the eigenvalue 0, I + t (A - I) is
    singular at t = 1, and with noise the variance of every field of Lemma 1 is infinite. The pixels that vary are the
    same data without that.
    """
    images = load_digits().data / 8 - 1
    varying = images[:, images.std(0) > 0]
    targets = []
    for name, data in (("digits", images), ("digits_varying", varying)):
        basis = couplings.random_basis(key, data.shape[1])
        targets.append(Target(name, jnp.asarray(data.mean(0)), jnp.asarray(np.cov(data.T)), basis))
    return targets[0], targets[1]


def problems(target: Target, degrees: float) -> Iterator[tuple[str, str, AffineMap, GaussianCoupling]]:
    """The six (coupling, field) of an angle, with the field's parameters and the coupling's law."""
    optimal, rotated = target.map(0.0), target.map(degrees)
    laws = {
        "ot": gaussian.map_coupling(optimal),
        "rotated": gaussian.map_coupling(rotated),
        "independent": gaussian.independent_coupling(target.mean, target.cov),
    }
    fields = {"ot": gaussian.pair_optimal(optimal), "pair_optimal": gaussian.pair_optimal(rotated)}
    for coupling in COUPLINGS:
        for field in FIELDS:
            yield coupling, field, fields[field], laws[coupling]


@functools.partial(jax.jit, static_argnames=("repeats", "draws"))
def monte_carlo(
    key: Key, params: AffineMap, coupling: GaussianCoupling, interpolant: Interpolant, *, repeats: int, draws: int
) -> Array:
    """Independent unbiased estimates of the total variance from draws and `vmap(grad)`, [repeats]; no closed form."""
    loss = losses.squared_error(gaussian.affine_field)

    def estimate(repeat_key: Key) -> Array:
        pair_key, path_key = jax.random.split(repeat_key)
        paths = draw_paths(path_key, gaussian.draw_pairs(pair_key, coupling, draws), interpolant)
        return gradients.total_variance(gradients.gradient_moments(loss, params, paths, chunk=500), ddof=1)

    return jax.lax.map(estimate, jax.random.split(key, repeats))


def variance_rows(
    target: Target, angles: Sequence[float], sigmas: Sequence[float], *, key: Key, repeats: int, draws: int
) -> tuple[list[Row], list[Row]]:
    """Exact and drawn variance of every (angle, sigma, coupling, field), and the tests OT against pair-optimal.

    Returns:
        Rows of variances (`exact` is inf where the integral diverges, and then the drawn number means nothing), and
        rows of comparisons with the two-sided p-value of Welch's t-test between the `repeats` estimates of both fields.
    """
    rows: list[Row] = []
    comparisons: list[Row] = []
    cells = [(angle, sigma) for angle in angles for sigma in sigmas]
    for index, (angle, sigma) in enumerate(progress(cells, f"variance, {target.name}", len(cells))):
        interpolant = constant_noise(sigma)
        estimates = {}
        for number, (coupling, field, params, law) in enumerate(problems(target, angle)):
            cell_key = jax.random.fold_in(jax.random.fold_in(key, index), number)
            drawn = np.asarray(monte_carlo(cell_key, params, law, interpolant, repeats=repeats, draws=draws))
            estimates[coupling, field] = drawn
            rows.append(
                {
                    "target": target.name,
                    "angle": angle,
                    "sigma": sigma,
                    "coupling": coupling,
                    "field": field,
                    "exact": float(gaussian.exact_gradient_variance(params, law, interpolant)),
                    "monte_carlo": float(drawn.mean()),
                    "standard_error": float(drawn.std(ddof=1) / np.sqrt(repeats)),
                }
            )
        for coupling in COUPLINGS:
            pair = [estimates[coupling, field] for field in FIELDS]
            exact = [row["exact"] for row in rows[-6:] if row["coupling"] == coupling]
            comparisons.append(_comparison(target.name, angle, sigma, coupling) | _test(pair, exact))
    return rows, comparisons


def _comparison(target: str, angle: float, sigma: float, coupling: str) -> Row:
    return {"target": target, "angle": angle, "sigma": sigma, "coupling": coupling}


def _test(estimates: list[np.ndarray], exact: list[float]) -> Row:
    """Which field has the lower variance, exactly and by the draws, and Welch's p-value of the drawn difference."""
    first, second = (float(values.mean()) for values in estimates)
    scale = max(first, second)
    same = scale == 0 or abs(first - second) <= 1e-12 * scale or exact[0] == exact[1]
    spread = max(values.std() for values in estimates)
    p_value = float(stats.ttest_ind(*estimates, equal_var=False).pvalue) if spread > 1e-12 * scale else float(same)
    lower = "equal" if same else FIELDS[int(exact[0] > exact[1])]
    return {"lower": lower, "lower_drawn": FIELDS[int(first > second)], "p_value": p_value}


def exact_lines(target: Target, angles: Sequence[float], sigmas: Sequence[float]) -> list[Row]:
    """The closed form alone on a fine grid of angles: the lines of the figures."""
    rows = []
    for angle in progress(angles, f"closed form, {target.name}", len(angles)):
        for coupling, field, params, law in problems(target, angle):
            for sigma in sigmas:
                value = float(gaussian.exact_gradient_variance(params, law, constant_noise(sigma)))
                row = {"angle": angle, "sigma": sigma, "coupling": coupling, "field": field, "exact": value}
                rows.append({"target": target.name} | row)
    return rows


def phase_rows(target: Target, angles: Sequence[float], sigmas: Sequence[float]) -> list[Row]:
    """log10 Var(OT field) / Var(pair-optimal field) on rotated pairs over (angle, sigma).

    0 where the two are equal (both 0 or both infinite), -inf where only the pair-optimal variance is infinite.
    """
    rows = []
    for angle in progress(angles, f"phase diagram, {target.name}", len(angles)):
        cases = [(params, law) for coupling, _, params, law in problems(target, angle) if coupling == "rotated"]
        optimal, paired = (np.asarray(_over_sigmas(params, law, jnp.asarray(sigmas))) for params, law in cases)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(optimal == paired, 0.0, np.log10(optimal) - np.log10(paired))
        for sigma, ratio in zip(sigmas, ratios, strict=True):
            rows.append({"target": target.name, "angle": angle, "sigma": float(sigma), "log10_ratio": float(ratio)})
    return rows


@jax.jit
def _over_sigmas(params: AffineMap, law: GaussianCoupling, sigmas: Array) -> Array:
    return jax.lax.map(lambda s: gaussian.exact_gradient_variance(params, law, constant_noise(s)), sigmas)


def crossings(rows: Sequence[Row]) -> list[Row]:
    """For every sigma the angle from which on the OT field has the lower variance on rotated pairs, by interpolation.

    None where the order never reverses below 180 degrees.
    """
    found = []
    for sigma in sorted({row["sigma"] for row in rows}):
        line = sorted((row["angle"], row["log10_ratio"]) for row in rows if row["sigma"] == sigma)
        angle = None
        for (a, ratio), (b, following) in itertools.pairwise(line):
            if ratio > 0 >= following:
                angle = b if np.isinf(following) else a + (b - a) * ratio / (ratio - following)
        found.append({"sigma": sigma, "angle": angle})
    return found
