"""How long Monte Carlo takes for what the closed form of the gradient variance gives at once.

    python benchmarks/exact_variance.py --rounds 7
    OPENBLAS_NUM_THREADS=1 python benchmarks/exact_variance.py --rounds 7

2 CPU cores: half a minute each. The peer is `gradient_moments` (site by site, in chunks, jitted) on draws of the same
problem: rotated Gaussian pairs, pair-optimal field, constant noise, float64. A pilot of batches gives the standard
error of one batch and the seconds that it takes; since the error falls as 1 / sqrt(draws), that gives the draws for any
error. These are really drawn wherever that takes less than --limit seconds; otherwise the time is extrapolated, and
marked so. Rounds are interleaved: closed form, run to 10%, run to 1%. The last row of each dimension asks for the
closed form's own error, which is its difference from the same integral over eight times as many panels.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from fvjax import couplings, gaussian, gradients, interpolants, losses

BATCH = 4000
PILOT = 20
PIECES = 8
SIGMA = 0.1
ERRORS = (0.1, 0.01)


@dataclass(frozen=True)
class Options:
    """Measures the closed form against Monte Carlo of the same error."""

    rounds: int = 7
    """How many times each is measured, >= 1."""
    dims: tuple[int, ...] = (2, 10, 50)
    """Dimensions, >= 2."""
    degrees: float = 60.0
    """Angle of the rotation; tails grow heavy, and Monte Carlo slow, as it nears the angle of infinite variance."""
    limit: float = 20.0
    """Seconds that one Monte Carlo run may take; longer ones are extrapolated."""
    out: Path | None = None
    """File for the JSON, besides the table on the terminal."""


Timings = dict[float | None, list[tuple[float, float]]]
Problem = tuple[gaussian.AffineMap, gaussian.GaussianCoupling, interpolants.Interpolant]


def problem(dim: int, degrees: float) -> Problem:
    """Pair-optimal field, rotated pairs with a random covariance, constant noise."""
    root = jax.random.normal(jax.random.key(dim), (dim, dim)) / np.sqrt(dim)
    cov = root @ root.T + 0.5 * jnp.eye(dim)
    rotation = couplings.rotation_matrix(np.deg2rad(degrees), dim)
    pairs = gaussian.rotated_map(jnp.ones(dim), (cov + cov.T) / 2, rotation)
    return gaussian.pair_optimal(pairs), gaussian.map_coupling(pairs), interpolants.constant_noise(SIGMA)


@partial(jax.jit, static_argnames="draws")
def batch_moments(key: jax.Array, case: Problem, draws: int) -> gradients.GradientMoments:
    """Moments of the gradients of one batch."""
    params, law, interpolant = case
    pair_key, path_key = jax.random.split(key)
    paths = interpolants.draw_paths(path_key, gaussian.draw_pairs(pair_key, law, draws), interpolant)
    return gradients.gradient_moments(losses.squared_error(gaussian.affine_field), params, paths, chunk=500)


def monte_carlo(key: jax.Array, case: Problem, draws: int) -> float:
    """One estimate of the total variance, batch by batch (the last one is full too)."""
    size, batches = min(draws, BATCH), -(-draws // BATCH)
    first, *rest = jax.random.split(key, batches)
    moments = batch_moments(first, case, draws=size)
    for other in rest:
        moments = gradients.merge_moments(moments, batch_moments(other, case, draws=size))
    return gradients.total_variance(moments, ddof=1).item()


def finer(case: Problem) -> float:
    """The closed form over PIECES parts of the time range, merged: other and more nodes."""
    params, law, interpolant = case
    cuts = [(k / PIECES, (k + 1) / PIECES) for k in range(PIECES)]
    parts = [gaussian.exact_gradient_moments(params, law, interpolant._replace(time_range=cut)) for cut in cuts]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    return gradients.total_variance(gradients.merge_groups(stacked)).item()


def timed(function: Callable[[], float]) -> tuple[float, float]:
    """Seconds and value of one call."""
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def closed_form(case: Problem) -> float:
    """The exact total variance."""
    return gaussian.exact_gradient_variance(*case).item()


def interleaved(case: Problem, draws: dict[float, int], seconds: dict[float, float], options: Options) -> Timings:
    """Seconds and values of the closed form (key None) and of Monte Carlo for every error that `--limit` allows.

    Every round has all of them, as long as the rounds of one error together stay below the limit.
    """
    keys = iter(jax.random.split(jax.random.key(2), options.rounds * len(draws) + len(draws)))
    affordable = [error for error in draws if seconds[error] <= options.limit]
    for error in affordable:
        monte_carlo(next(keys), case, min(draws[error], BATCH))  # compiles
    found: Timings = {None: []} | {error: [] for error in affordable}
    for index in range(options.rounds):
        found[None].append(timed(partial(closed_form, case)))
        for error in affordable:
            if index * seconds[error] <= options.limit:
                found[error].append(timed(partial(monte_carlo, next(keys), case, draws[error])))
    return found


def measure(dim: int, options: Options) -> dict[str, Any]:
    """Both sides at one dimension."""
    case = problem(dim, options.degrees)
    exact = closed_form(case)
    if not np.isfinite(exact):
        raise ValueError(f"degrees must be below the angle of infinite variance at d = {dim}, got {options.degrees}")
    own_error = max(abs(exact - finer(case)) / exact, float(jnp.finfo(float).eps))

    first, *keys = jax.random.split(jax.random.key(1), PILOT + 1)
    monte_carlo(first, case, BATCH)  # compiles
    pilot = [timed(partial(monte_carlo, key, case, BATCH)) for key in keys]
    spread = statistics.stdev(value for _, value in pilot) / exact  # relative standard error of one batch
    per_draw = statistics.median(seconds for seconds, _ in pilot) / BATCH
    draws = {error: max(2, round(BATCH * (spread / error) ** 2)) for error in (*ERRORS, own_error)}
    predicted = {error: per_draw * n for error, n in draws.items()}
    found = interleaved(case, draws, predicted, options)
    closed_seconds = statistics.median(seconds for seconds, _ in found[None])

    def row(error: float) -> dict[str, Any]:
        runs = found.get(error, [])
        seconds = statistics.median(s for s, _ in runs) if runs else predicted[error]
        return {
            "relative_error": error,
            "draws": draws[error],
            "seconds": seconds,
            "runs": len(runs),
            "extrapolated": not runs,
            "rms_error_of_runs": float(np.sqrt(np.mean([(v / exact - 1) ** 2 for _, v in runs]))) if runs else None,
            "ratio": seconds / closed_seconds,
        }

    return {
        "dim": dim,
        "exact": exact,
        "closed_form_seconds": closed_seconds,
        "closed_form_seconds_of_rounds": [seconds for seconds, _ in found[None]],
        "closed_form_relative_error": own_error,
        "batch_relative_standard_error": spread,
        "seconds_per_draw": per_draw,
        "pilot_deviation_in_standard_errors": (statistics.mean(v for _, v in pilot) / exact - 1) / spread * PILOT**0.5,
        "monte_carlo": [row(error) for error in draws],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each dimension and error."""
    lines = [f"{'d':>3} {'closed form':>12} {'error':>9} {'draws':>9} {'Monte Carlo':>12} {'ratio':>9}  how"]
    for row in rows:
        for run in row["monte_carlo"]:
            how = "extrapolated" if run["extrapolated"] else f"median of {run['runs']}"
            lines.append(
                f"{row['dim']:3d} {1e3 * row['closed_form_seconds']:9.2f} ms {run['relative_error']:9.1e}"
                f" {run['draws']:9.1e} {run['seconds']:10.3g} s {run['ratio']:9.2g}  {how}"
            )
    return "\n".join(lines)


def main() -> None:
    """Command line: exits 2 on bad input."""
    options = tyro.cli(Options)
    if options.rounds < 1 or any(dim < 2 for dim in options.dims):
        print(f"rounds must be >= 1 and dims >= 2, got {options.rounds} and {options.dims}", file=sys.stderr)
        sys.exit(2)
    try:
        with jax.enable_x64(True):
            rows = [measure(dim, options) for dim in options.dims]
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(table(rows))
    if options.out is not None:
        result = {
            "rows": rows,
            "batch": BATCH,
            "rounds": options.rounds,
            "degrees": options.degrees,
            "cores": os.cpu_count(),
            "openblas_num_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
            "python": platform.python_version(),
            "jax": version("jax"),
        }
        options.out.write_text(f"{json.dumps(result, indent=2)}\n", encoding="utf-8")
        print(options.out)


if __name__ == "__main__":
    main()
