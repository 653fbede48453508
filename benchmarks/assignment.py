"""Claim: scipy solves an exact assignment of 5,000 pairs faster than the JAX solver that fvjax couples batches with.

    python benchmarks/assignment.py --sizes 128 1000
    python benchmarks/assignment.py --sizes 5000 --rounds 1 --out assignment.json

2 CPU cores: a minute, and 5 to 10 minutes for n = 5,000 (there the JAX solver is extrapolated). Contenders get the same
two sets and return the permutation, cost matrix included: `fvjax.data.ot_benchmark.optimal_assignment` (scipy),
`fvjax.couplings.assignment` (ott-jax's Hungarian algorithm, jitted, compiled before), and POT's network simplex where
POT is installed (it is no dependency). Source and target are N(0, I) and N(1, I) in d = 2, and in d = 12,288 points
near a random subspace of 64 dimensions, as images are. Rounds are interleaved. A contender that would by n^3 from its
last size take longer than --limit seconds is extrapolated, and marked so: too high where the cost matrix, n^2, is most
of it. The costs of the permutations stand beside the times.
"""

import importlib
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro

from fvjax import couplings
from fvjax.data import ot_benchmark

SCIPY, OTT, POT = "scipy", "ott-jax", "POT"
PILOT = 1000  # points, at most, of the run from which a first size is extrapolated
SUBSPACE = 64
LOW = 2


@dataclass(frozen=True)
class Options:
    """Measures exact assignments."""

    sizes: tuple[int, ...] = (128, 1000)
    """Numbers of pairs, >= 2, in ascending order."""
    dims: tuple[int, ...] = (LOW, 12_288)
    """Dimensions, >= 1."""
    rounds: int = 3
    """How many times each is measured, >= 1."""
    limit: float = 600.0
    """Seconds that one run may take; longer ones are extrapolated."""
    out: Path | None = None
    """File for the JSON, besides the table on the terminal."""


Solver = Callable[[np.ndarray, np.ndarray], np.ndarray]


def points(n: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Source and target, float32 [n, dim]."""
    generator = np.random.default_rng(0)
    if dim <= SUBSPACE:
        x0, x1 = generator.standard_normal((2, n, dim), np.float32)
        return x0, x1 + 1
    basis = generator.standard_normal((SUBSPACE, dim), np.float32) / np.sqrt(dim).astype(np.float32)
    x0, x1 = (
        generator.standard_normal((n, SUBSPACE), np.float32) @ basis
        + np.float32(0.01) * generator.standard_normal((n, dim), np.float32)
        for _ in range(2)
    )
    return x0, x1


def solvers() -> dict[str, Solver]:
    """The contenders; POT only where it is installed."""

    def hungarian(x0: np.ndarray, x1: np.ndarray) -> np.ndarray:
        return np.asarray(couplings.assignment(jnp.asarray(x0), jnp.asarray(x1)))

    found: dict[str, Solver] = {SCIPY: ot_benchmark.optimal_assignment, OTT: hungarian}
    if importlib.util.find_spec("ot") is None:
        return found
    ot: Any = importlib.import_module("ot")

    def simplex(x0: np.ndarray, x1: np.ndarray) -> np.ndarray:
        costs = ot.dist(x0.astype(np.float64), x1.astype(np.float64))
        plan = ot.emd([], [], costs, numItermax=10**8)
        permutation: np.ndarray = np.asarray(plan.argmax(1))
        return permutation

    return found | {POT: simplex}


def seconds_of(solver: Solver, x0: np.ndarray, x1: np.ndarray) -> tuple[float, float]:
    """Seconds of one call, and the mean of |x0 - x1|^2 that it reaches."""
    start = time.perf_counter()
    permutation = solver(x0, x1)
    seconds = time.perf_counter() - start
    return seconds, float(np.square(x0.astype(np.float64) - x1[permutation]).sum(1).mean())


def measure(n: int, dim: int, known: dict[str, tuple[int, float]], options: Options) -> list[dict[str, Any]]:
    """One row a contender; `known` holds size and seconds of its last measurement, and is brought up to date."""
    x0, x1 = points(n, dim)
    contenders = solvers()
    predicted = {name: known[name][1] * (n / known[name][0]) ** 3 for name in contenders}
    running = [name for name in contenders if predicted[name] <= options.limit]
    if OTT in running:
        contenders[OTT](x0, x1)  # compiles
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for index in range(options.rounds):
        for name in running if index % 2 == 0 else reversed(running):
            runs[name].append(seconds_of(contenders[name], x0, x1))
    rows: list[dict[str, Any]] = []
    for name, found in runs.items():
        seconds = statistics.median(run[0] for run in found) if found else predicted[name]
        if found:
            known[name] = (n, seconds)
        rows.append(
            {
                "n": n,
                "dim": dim,
                "solver": name,
                "seconds": seconds,
                "rounds": [run[0] for run in found],
                "extrapolated": not found,
                "mean_square": found[0][1] if found else None,
            }
        )
    reference = next(row["seconds"] for row in rows if row["solver"] == SCIPY)
    return [row | {"ratio_to_scipy": row["seconds"] / reference} for row in rows]


def all_rows(options: Options) -> list[dict[str, Any]]:
    """Every size in every dimension, printed as they come."""
    rows = []
    for dim in options.dims:
        x0, x1 = points(min(PILOT, options.sizes[0]), dim)
        known = {}
        for name, solver in solvers().items():
            solver(x0, x1)  # compiles, imports
            known[name] = (len(x0), seconds_of(solver, x0, x1)[0])
        for n in sorted(options.sizes):
            for row in measure(n, dim, known, options):
                rows.append(row)
                how = "extrapolated" if row["extrapolated"] else f"median of {len(row['rounds'])}"
                print(
                    f"n {row['n']:6d}  d {row['dim']:6d}  {row['solver']:8} {row['seconds']:10.4g} s"
                    f"  {row['ratio_to_scipy']:8.3g} x scipy  mean square {row['mean_square']}  ({how})",
                    flush=True,
                )
    return rows


def main() -> None:
    """Command line: exits 2 on bad input, 1 where the claim does not hold at the largest size."""
    options = tyro.cli(Options)
    if options.rounds < 1 or min(options.sizes, default=0) < 2 or min(options.dims, default=0) < 1:
        print(
            f"rounds and dims must be >= 1 and sizes >= 2, got {options.rounds}, {options.dims}, {options.sizes}",
            file=sys.stderr,
        )
        sys.exit(2)
    rows = all_rows(options)
    largest = max(options.sizes)
    holds = all(row["ratio_to_scipy"] >= 1 for row in rows if row["n"] == largest and row["solver"] == OTT)
    if options.out is not None:
        result = {
            "claim": "scipy solves exact assignments faster than ott-jax at the largest size",
            "holds": holds,
            "rows": rows,
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "packages": {package: version(package) for package in ("jax", "numpy", "ott-jax", "scipy")},
        }
        options.out.write_text(f"{json.dumps(result, indent=2)}\n", encoding="utf-8")
        print(options.out)
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
