"""The exact minimiser of pairs that go by in chunks, at given points; and how far a field is from it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from fvjax.auditing._statistics import number
from fvjax.auditing._types import VelocityDistance
from fvjax.interpolants import Interpolant
from fvjax.pairs import pair_log_weights
from fvjax.types import Array, Pair, PathSample


class Minimiser:
    r"""v(x, t) of `fvjax.empirical_minimiser` at m points, one chunk of the pairs after the other.

    Within a chunk the weights are those of `fvjax.pairs.pair_log_weights`. With k its heaviest pair and w_k that pair's
    weight within the chunk, the chunk as a whole weighs exp(-|x - m_k|^2 / (2 gamma^2)) / w_k against the others; where
    gamma = 0 the chunk with the nearest pair takes all.
    """

    def __init__(self, points: PathSample, interpolant: Interpolant) -> None:
        """Points t [m] and x [m, *dims]; the targets are not used."""
        self._t, self._x = points.t, points.x
        self._interpolant = interpolant
        count, dim = len(points.t), points.x[0].size
        self._log_mass = np.full(count, -np.inf)
        self._cost = np.full(count, np.inf)
        self._means = np.zeros((2, count, dim))
        self._coefficients = tuple(np.asarray(value, np.float64) for value in _coefficients(interpolant, points.t))
        # As `empirical_minimiser`: gamma below the rounding error of x_t counts as 0.
        rounding = float(jnp.finfo(points.x.dtype).eps) * float(jnp.sqrt(jnp.mean(points.x**2)))
        self._silent = self._coefficients[2] <= max(rounding, float(np.finfo(np.float32).tiny) ** 0.5)

    def feed(self, x0: np.ndarray, x1: np.ndarray, *, size: int) -> None:
        """A chunk of pairs, filled up to `size` by copies of the last one, which take no part."""
        count = len(x0)
        weights = None
        if count < size:
            rows = np.minimum(np.arange(size), count - 1)
            x0, x1 = x0[rows], x1[rows]
            weights = jnp.asarray(np.where(np.arange(size) < count, 1 / count, 0), jnp.float32)
        pairs = Pair(jnp.asarray(x0), jnp.asarray(x1))
        log_weights = pair_log_weights(pairs, self._interpolant, weights)
        heaviest, log_weight, means = _of_chunk(log_weights, pairs, self._t, self._x)
        cost = self._costs(x0, x1, np.asarray(heaviest))
        self._merge(cost, np.asarray(log_weight, np.float64), np.asarray(means, np.float64))

    def _costs(self, x0: np.ndarray, x1: np.ndarray, index: np.ndarray) -> np.ndarray:
        """|x - m_k|^2 in float64."""
        alpha, beta = self._coefficients[:2]
        count = len(index)
        a, b = (x[index].reshape(count, -1).astype(np.float64) for x in (x0, x1))
        offset = np.asarray(self._x, np.float64).reshape(count, -1) - alpha[:, None] * a - beta[:, None] * b
        return np.sum(offset**2, 1)

    def _merge(self, cost: np.ndarray, log_weight: np.ndarray, means: np.ndarray) -> None:
        silent = self._silent
        spread = np.where(silent, 1.0, 2 * self._coefficients[2] ** 2)
        mass = np.where(silent, 0.0, -cost / spread) - log_weight
        # Without noise the nearest takes all; equally near ones (as computed) share by their number.
        mass = np.where(silent & (cost > self._cost), -np.inf, mass)
        kept = np.where(silent & (cost < self._cost), -np.inf, self._log_mass)
        total = np.logaddexp(kept, mass)
        old, new = np.exp(kept - total), np.exp(mass - total)
        self._means = old[:, None] * self._means + new[:, None] * means
        self._log_mass, self._cost = total, np.minimum(cost, self._cost)

    def velocities(self) -> np.ndarray:
        """v(x, t) [m, d], float64."""
        alpha, beta, gamma, alpha_rate, beta_rate, drift = (value[:, None] for value in self._coefficients)
        x0, x1 = self._means
        x = np.asarray(self._x, np.float64).reshape(len(x0), -1)
        pull = np.where(self._silent[:, None], 0.0, drift) / np.where(self._silent[:, None], 1.0, gamma) ** 2
        return alpha_rate * x0 + beta_rate * x1 + pull * (x - alpha * x0 - beta * x1)


@jax.jit
def _of_chunk(log_weights: Partial, pairs: Pair, t: Array, x: Array) -> tuple[Array, Array, Array]:
    logs = jax.vmap(log_weights)(t, x)
    weights = jnp.exp(logs)
    count = len(pairs.x0)
    means = [jnp.matmul(weights, y.reshape(count, -1), precision=jax.lax.Precision.HIGHEST) for y in pairs]
    return jnp.argmax(logs, 1), jnp.max(logs, 1), jnp.stack(means)


def _coefficients(interpolant: Interpolant, t: Array) -> tuple[Array, ...]:
    """alpha, beta, gamma, alpha', beta' and gamma gamma' at times [m]."""
    c = jax.vmap(interpolant.coefficients)(t)
    return c.alpha, c.beta, c.gamma, c.alpha_rate, c.beta_rate, jax.vmap(interpolant.noise_drift)(t)


def velocity_distance(field: np.ndarray, minimiser: np.ndarray, target: np.ndarray | None) -> VelocityDistance:
    """Relative distances of velocities, [m, d] each."""

    def relative(a: np.ndarray, b: np.ndarray) -> float | None:
        with np.errstate(divide="ignore", invalid="ignore"):
            return number(np.sqrt(np.sum((a - b) ** 2) / np.sum(b**2)))

    if target is None:
        return VelocityDistance(relative(field, minimiser), None, None, len(field))
    return VelocityDistance(
        relative(field, minimiser), relative(field, target), relative(minimiser, target), len(field)
    )
