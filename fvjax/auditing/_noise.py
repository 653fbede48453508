"""What the noise does to the pairs themselves: identifiability and the sigma at which the exact minimiser lets go."""

import math

import jax.numpy as jnp
import numpy as np

from fvjax import pairs as finite
from fvjax._quadrature import legendre
from fvjax.auditing._inputs import Given, as_pair, chosen_rows
from fvjax.auditing._nearest import Search, Targets
from fvjax.auditing._types import CriticalNoise, Identifiability, Perplexity
from fvjax.interpolants import Interpolant, constant_noise
from fvjax.pairs._spacing import HIGHEST_RATIO, LOWEST_RATIO, RATIO
from fvjax.types import Key, Pair

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where the perplexity is measured, with the noise of the audit."""

FACTORS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Constant noise at which it is measured at t = 1/2, as multiples of sigma_c (else of the standard deviation of x1)."""

COMPARED = 4096
"""Pairs that a point may come from; of more a random subset is taken."""

DRAWS = 128
"""Points of each mean perplexity."""

SOURCES = 100
"""Sources that the minimiser carries at every sigma of the search for sigma_c."""

STEPS = 50
"""Euler steps of that search."""

OPERATIONS = 1e11
"""What the search for sigma_c may cost; above, only the prediction is made."""


def rms_noise(interpolant: Interpolant, dtype: np.dtype) -> float:
    """The root mean square over t of gamma(t)."""
    nodes, weights = legendre(32)
    start, end = interpolant.time_range
    gammas = [float(interpolant.coefficients(jnp.asarray(start + (end - start) * t, dtype)).gamma) for t in nodes]
    return math.sqrt(float(np.dot(weights, np.square(gammas))))


class Midpoints:
    """m = alpha(1/2) x0 + beta(1/2) x1 of every pair, read as `Rows` are."""

    def __init__(self, given: Given, interpolant: Interpolant) -> None:
        self._given = given
        c = interpolant.coefficients(jnp.asarray(0.5, given.dtype))
        self._alpha, self._beta = float(c.alpha), float(c.beta)

    def __len__(self) -> int:
        return len(self._given.x0)

    @property
    def chunk(self) -> int:
        """As that of the pairs."""
        return self._given.x0.chunk

    def between(self, x0: np.ndarray, x1: np.ndarray) -> np.ndarray:
        """[n, *dims] each."""
        return self._alpha * x0.astype(np.float64) + self._beta * x1.astype(np.float64)

    def take(self, index: np.ndarray) -> np.ndarray:
        """The midpoints of the pairs `index`."""
        return self.between(self._given.x0.take(index), self._given.x1.take(index))


class Spacing:
    """Distances of some pairs' midpoints to the nearest midpoint of any other pair, while the pairs go by."""

    def __init__(self, key: Key, given: Given, interpolant: Interpolant) -> None:
        self._midpoints = Midpoints(given, interpolant)
        queries = self._midpoints.take(chosen_rows(key, len(given.x0), SOURCES))
        centre = queries.reshape(len(queries), -1).mean(0)
        self._targets = Targets(centre)
        self._targets.begin(self._midpoints)
        self._search = Search(queries, queries, centre)

    def feed(self, start: int, x0: np.ndarray, x1: np.ndarray) -> None:
        """A chunk of the pairs."""
        self._search.feed(self._targets.chunk(start, self._midpoints.between(x0, x1)))

    def median(self) -> float:
        """0 where all midpoints are equal, as far as their dtype tells: nothing names a pair there."""
        found = float(np.median(self._search.nearest_others(self._targets)[:, 0]))
        return found if math.isfinite(found) else 0.0


def critical_noise(key: Key, given: Given, spacing: float, *, subset: Pair, gamma: float) -> CriticalNoise:
    """sigma_c predicted from the spacing of all pairs, and measured on the subset where that is not too much work."""
    count, used = len(given.x0), len(subset.x0)
    width = math.sqrt(math.log(count))
    predicted, low, high = (ratio * spacing / width for ratio in (RATIO, LOWEST_RATIO, HIGHEST_RATIO))
    sources = min(SOURCES, used)
    measured = None
    if 40.0 * STEPS * sources * used * given.x0.dim <= OPERATIONS:
        found = finite.sigma_critical(subset, sources=sources, key=key, steps=STEPS, rtol=0.05)
        measured = found.measured
    return CriticalNoise(
        measured=measured,
        measured_pairs=None if measured is None else used,
        predicted=predicted,
        low=low,
        high=high,
        spacing=spacing,
        predicted_pairs=count,
        interpolant=gamma,
    )


def identifiability_of(
    key: Key, subset: Pair, interpolant: Interpolant, *, critical: CriticalNoise, of: int
) -> Identifiability:
    """By t with the noise of the audit, and by sigma at t = 1/2."""

    def measured(t: float, noise: Interpolant, sigma: float) -> Perplexity:
        found = finite.identifiability(key, subset, noise, t, draws=DRAWS)
        return Perplexity(t, sigma, float(found.perplexity), float(found.standard_error))

    start, end = interpolant.time_range
    by_time = [measured(start + (end - start) * t, interpolant, critical.interpolant) for t in TIMES]
    unit = critical.best if 0 < critical.best < math.inf else float(jnp.std(subset.x1)) or 1.0
    sigmas = [factor * unit for factor in FACTORS]
    by_sigma = [measured(0.5, constant_noise(sigma), sigma) for sigma in sigmas]
    return Identifiability(tuple(by_time), tuple(by_sigma), len(subset.x0), of)


def subset_of(key: Key, given: Given) -> Pair:
    """At most COMPARED random pairs on the device."""
    index = chosen_rows(key, len(given.x0), COMPARED)
    return as_pair(given.x0.take(index), given.x1.take(index))
