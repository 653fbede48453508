"""How long Monte Carlo takes for what the closed form of the gradient variance gives at once.

    python benchmarks/exact_variance.py --rounds 7

2 CPU cores: half a minute. The peer is `gradient_moments` (vmap(grad) in chunks, jitted) on draws of the same problem:
rotated Gaussian pairs, pair-optimal field, constant noise. Rounds are interleaved. A standard error falls as
1 / sqrt(draws), so one batch of draws gives the seconds that an error needs; `extrapolated` marks those that were not
run. The closed form's own error is measured against another cut of time. Prints JSON.
"""

import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from fvjax import couplings, gaussian, gradients, interpolants, losses

BATCH = 4000
REPEATS = 8
SIGMA = 0.1
DEGREES = 60.0
ERRORS = (0.1, 0.01, 1e-9)


@dataclass(frozen=True)
class Options:
    """Measures the closed form against Monte Carlo of the same error."""

    rounds: int = 7
    """How many times each is measured, >= 1."""
    dims: tuple[int, ...] = (2, 10, 50)
    """Dimensions."""
    out: Path | None = None
    """File for the JSON; the terminal by default."""


def problem(dim: int) -> tuple[gaussian.AffineMap, gaussian.GaussianCoupling, interpolants.Interpolant]:
    """Pair-optimal field, rotated pairs with a random covariance, constant noise."""
    root = jax.random.normal(jax.random.key(dim), (dim, dim)) / np.sqrt(dim)
    cov = root @ root.T + 0.5 * jnp.eye(dim)
    rotation = couplings.rotation_matrix(np.deg2rad(DEGREES), dim)
    pairs = gaussian.rotated_map(jnp.ones(dim), (cov + cov.T) / 2, rotation)
    return gaussian.pair_optimal(pairs), gaussian.map_coupling(pairs), interpolants.constant_noise(SIGMA)


@jax.jit
def monte_carlo(key: jax.Array, params: Any, law: Any, interpolant: Any) -> jax.Array:
    """One estimate of the total variance from BATCH draws."""
    pair_key, path_key = jax.random.split(key)
    paths = interpolants.draw_paths(path_key, gaussian.draw_pairs(pair_key, law, BATCH), interpolant)
    loss = losses.squared_error(gaussian.affine_field)
    return gradients.total_variance(gradients.gradient_moments(loss, params, paths, chunk=500), ddof=1)


def timed(function: Any, *arguments: Any) -> tuple[float, float]:
    """Seconds and value of one call."""
    start = time.perf_counter()
    value = float(function(*arguments))
    return time.perf_counter() - start, value


def measure(dim: int, rounds: int) -> dict[str, Any]:
    """Both sides at one dimension."""
    params, law, interpolant = problem(dim)
    exact = gaussian.exact_gradient_variance(params, law, interpolant).item()
    halves = [interpolant._replace(time_range=half) for half in ((0.0, 0.37), (0.37, 1.0))]
    parts = [gaussian.exact_gradient_moments(params, law, half) for half in halves]
    weighted = [
        moments._replace(weight=w * moments.weight, m2=jax.tree.map(lambda m, w=w: w * m, moments.m2))
        for moments, w in zip(parts, (0.37, 0.63), strict=True)
    ]
    finer = gradients.total_variance(gradients.merge_moments(*weighted)).item()
    monte_carlo(jax.random.key(0), params, law, interpolant).block_until_ready()
    closed, drawn, estimates = [], [], []
    for index in range(max(rounds, REPEATS)):
        seconds, estimate = timed(monte_carlo, jax.random.key(index), params, law, interpolant)
        drawn.append(seconds)
        estimates.append(estimate)
        closed.append(timed(gaussian.exact_gradient_variance, params, law, interpolant)[0])
    spread = statistics.stdev(estimates) / exact  # relative standard error of one batch
    seconds, batch_seconds = statistics.median(closed), statistics.median(drawn)
    needed = {error: batch_seconds * (spread / error) ** 2 for error in ERRORS}
    return {
        "dim": dim,
        "exact": exact,
        "relative_error_of_closed_form": abs(exact - finer) / exact,
        "closed_form_seconds": seconds,
        "batch_seconds": batch_seconds,
        "batch_relative_standard_error": spread,
        "difference_in_standard_errors": (statistics.mean(estimates) - exact)
        / (statistics.stdev(estimates) / len(estimates) ** 0.5),
        "monte_carlo_over_closed_form": {
            f"{error:g}": {"ratio": time_needed / seconds, "extrapolated": time_needed > sum(drawn)}
            for error, time_needed in needed.items()
        },
    }


def main() -> None:
    """Command line: exits 2 on bad input."""
    options = tyro.cli(Options)
    if options.rounds < 1 or any(dim < 2 for dim in options.dims):
        print(f"rounds must be >= 1 and dims >= 2, got {options.rounds} and {options.dims}", file=sys.stderr)
        sys.exit(2)
    with jax.enable_x64(True):
        rows = [measure(dim, options.rounds) for dim in options.dims]
    result = {"rows": rows, "batch": BATCH, "python": platform.python_version(), "jax": version("jax")}
    text = json.dumps(result, indent=2)
    if options.out is None:
        print(text)
    else:
        options.out.write_text(f"{text}\n", encoding="utf-8")
        print(options.out)


if __name__ == "__main__":
    main()
