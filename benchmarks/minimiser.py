"""What the exact minimiser of a finite set of pairs costs, against the matrix products that bound it.

    python benchmarks/minimiser.py
    python benchmarks/minimiser.py --rounds 3 --counts 1000 --dims 64 1024

2 CPU cores: 2.5 minutes, and 6 GB of memory for 50,000 pairs of 12,288 dimensions. One evaluation is that of a
batch of points, each with a time of its own, by `vmap` in float32. It cannot do without the four products X0 X^T,
X1 X^T, W X0 and W X1 of its pairs X0, X1 [N, d], points X [batch, d] and weights W [batch, N]: these alone are the
bound. Both are measured in turn, round by round, and the ratio of medians is reported for four kinds of points:

    spread   sigma = 0.4 sqrt(d), where many pairs share the weight and products are accurate enough
    border   sigma = 0.126 sqrt(d), where the products are least accurate among the sigmas at which many share it
    sharp    sigma = 0.05, where one pair has all of it: products are not accurate enough, differences decide
    hard     sigma = 0.001 and points in a cluster of --cluster pairs at mutual distances of sigma, which all compete:
             each must be compared by differences

Extra memory is what XLA allocates besides pairs, points and result, at once for all four; beside it that of an array
[batch, N, d].
"""

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

import jax
import jax.numpy as jnp
import tyro

import fvjax
from fvjax.pairs import empirical_minimiser

HARD_SIGMA = 1e-3


@dataclass(frozen=True)
class Options:
    """Measures the exact minimiser of finite pairs against its matrix products."""

    rounds: int = 5
    """How many times each is measured, >= 1."""
    counts: tuple[int, ...] = (1000, 5000, 50_000)
    """Numbers of pairs N, above --cluster."""
    dims: tuple[int, ...] = (64, 1024, 12_288)
    """Dimensions d, >= 1."""
    batch: int = 64
    """Points in a batch, >= 1."""
    cluster: int = 256
    """Pairs that compete in the hard case, >= 2."""
    chunk: int | None = None
    """The minimiser's chunk; its own choice by default."""
    out: Path | None = None
    """File for the JSON, besides the table on the terminal."""


@jax.jit
def products(pairs: fvjax.Pair, x: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
    """The four products that bound an evaluation, at the same precision."""

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)

    x0, x1 = pairs
    return product(x0, x.T), product(x1, x.T), product(weights, x0), product(weights, x1)


@jax.jit
def evaluate(field: fvjax.VelocityField, t: jax.Array, x: jax.Array) -> jax.Array:
    """The field at a batch of times [batch] and points [batch, d]."""
    return jax.vmap(field, in_axes=(None, 0, 0))(None, t, x)


def some_pairs(count: int, dim: int, cluster: int) -> fvjax.Pair:
    """Normal pairs, the first `cluster` of them within about the smallest sigma of each other."""

    @jax.jit
    def draw(key: jax.Array) -> jax.Array:
        x = jax.random.normal(key, (count, dim))
        near = jnp.where(jnp.arange(cluster)[:, None] > 0, x[:cluster], 0)
        return jax.lax.dynamic_update_slice(x, x[:1] + HARD_SIGMA / dim**0.5 * near, (0, 0))

    return fvjax.Pair(*map(draw, jax.random.split(jax.random.key(0))))


def on_paths(pairs: fvjax.Pair, t: jax.Array, start: int, sigma: float) -> jax.Array:
    """Points of the paths of the pairs from `start` on, one for each time, blurred by sigma."""
    rows = [x[start + jnp.arange(len(t)) % (len(x) - start)] for x in pairs]
    noise = sigma * jax.random.normal(jax.random.key(1), rows[0].shape)
    return (1 - t)[:, None] * rows[0] + t[:, None] * rows[1] + noise


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Wall clock of one call."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def measure(count: int, dim: int, options: Options) -> dict[str, Any]:
    """One number of pairs and one dimension."""
    pairs = some_pairs(count, dim, options.cluster)
    t = jnp.linspace(0.05, 0.95, options.batch)
    sigmas = {"spread": 0.4 * dim**0.5, "border": 0.126 * dim**0.5, "sharp": 0.05, "hard": HARD_SIGMA}
    cases: dict[str, tuple[Any, ...]] = {}
    for name, sigma in sigmas.items():
        field = empirical_minimiser(pairs, fvjax.constant_noise(sigma), chunk=options.chunk)
        cases[name] = field, t, on_paths(pairs, t, 0 if name == "hard" else options.cluster, sigma)
    weights = jax.random.uniform(jax.random.key(2), (options.batch, count))
    bound = pairs, cases["spread"][2], weights

    memory = evaluate.lower(*cases["spread"]).compile().memory_analysis()
    if memory is None:
        raise ValueError(f"device must tell its memory, got {jax.devices()[0].device_kind}")
    jax.block_until_ready(products(*bound))
    for case in cases.values():
        jax.block_until_ready(evaluate(*case))
    times: dict[str, list[float]] = {name: [] for name in ("products", *cases)}
    for _ in range(options.rounds):
        times["products"].append(seconds(products, *bound))
        for name, case in cases.items():
            times[name].append(seconds(evaluate, *case))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "count": count,
        "dim": dim,
        "sigma": sigmas,
        "seconds": medians,
        "ratio": {name: medians[name] / medians["products"] for name in cases},
        "seconds_of_rounds": times,
        "extra_bytes": memory.temp_size_in_bytes,
        "bytes_of_pairs": 2 * 4 * count * dim,
        "bytes_of_all_differences": 4 * options.batch * count * dim,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each number of pairs and dimension."""
    head = f"{'N':>7} {'d':>6} {'products':>11} {'spread':>8} {'border':>8} {'sharp':>8} {'hard':>8}"
    lines = [f"{head} {'extra memory':>13} {'pairs':>9} {'[batch, N, d]':>14}"]
    for row in rows:
        ratios = " ".join(f"{row['ratio'][name]:7.2f}x" for name in ("spread", "border", "sharp", "hard"))
        sizes = [row[name] / 1e6 for name in ("extra_bytes", "bytes_of_pairs", "bytes_of_all_differences")]
        lines.append(
            f"{row['count']:7d} {row['dim']:6d} {1e3 * row['seconds']['products']:8.2f} ms {ratios}"
            f" {sizes[0]:10.1f} MB {sizes[1]:6.0f} MB {sizes[2]:11.0f} MB"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line: exits 2 on bad input."""
    options = tyro.cli(Options)
    if min(options.rounds, options.batch, *options.dims) < 1 or options.cluster < 2:
        print("rounds, batch and dims must be >= 1 and cluster >= 2", file=sys.stderr)
        sys.exit(2)
    if min(options.counts) <= options.cluster:
        print(f"counts must be above cluster = {options.cluster}, got {options.counts}", file=sys.stderr)
        sys.exit(2)
    try:
        rows = [measure(count, dim, options) for dim in options.dims for count in options.counts]
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(table(rows))
    if options.out is not None:
        result = {
            "rows": rows,
            "batch": options.batch,
            "cluster": options.cluster,
            "chunk": options.chunk,
            "rounds": options.rounds,
            "device": jax.devices()[0].device_kind,
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "jax": version("jax"),
        }
        options.out.write_text(f"{json.dumps(result, indent=2)}\n", encoding="utf-8")
        print(options.out)


if __name__ == "__main__":
    main()
