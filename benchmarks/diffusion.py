"""Claim: a diffusion through `flows.diffuse` costs what a loop written by hand costs.

    python benchmarks/diffusion.py
    python benchmarks/diffusion.py --examples 10000 --dim 64 --steps 100 --out diffusion.json

2 CPU cores: a minute. Contenders draw the ends of the same number of paths of dX = field dt + sigma dB, field an MLP of
256 x 2, in one jitted call: a `lax.scan` of Euler-Maruyama over the whole batch with one normal array a step (the
peer), `fvjax.flows.diffuse` with "euler" and "shark" (two evaluations a step), and diffrax's own Euler along its
VirtualBrownianTree. Rounds are interleaved; a call's time is its CPU time, because the wall clock of a shared machine
says more about the others. Ratios are medians over rounds of the ratio to the peer in the same round. The means and
variances of the ends stand beside them.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import lineax
import tyro

from fvjax import flows, nets
from fvjax.types import Array, Key, Params

PEER = "scan by hand"
SIGMA = 1.0


@dataclass(frozen=True)
class Options:
    """Measures diffusions."""

    examples: int = 10_000
    """Paths in a call, >= 1."""
    dim: int = 5
    """Dimension, >= 1."""
    steps: int = 20
    """Steps of a path, >= 1."""
    rounds: int = 9
    """How many times each is measured, >= 1."""
    out: Path | None = None
    """File for the JSON, besides the table on the terminal."""


Draw = Callable[[Key, Params, Array], Array]


def contenders(options: Options) -> tuple[dict[str, Draw], Params]:
    """Jitted (key, params, x0 [n, d]) -> ends [n, d], and the params of their network."""
    model = nets.mlp(options.dim, width=256, depth=2)
    steps = options.steps

    def scan(key: Key, params: Params, x0: Array) -> Array:
        def step(x: Array, part: tuple[Array, Key]) -> tuple[Array, None]:
            t, step_key = part
            drift = jax.vmap(model.apply, (None, None, 0))(params, t, x)
            return x + drift / steps + SIGMA * steps**-0.5 * jax.random.normal(step_key, x.shape), None

        times = jnp.arange(steps, dtype=x0.dtype) / steps
        return jax.lax.scan(step, x0, (times, jax.random.split(key, steps)))[0]

    def diffuse(solver: str) -> Draw:
        def draw(key: Key, params: Params, x0: Array) -> Array:
            def end(k: Key, x: Array) -> Array:
                return flows.diffuse(k, model.apply, params, x, sigma=SIGMA, steps=steps, solver=solver)

            return jax.vmap(end)(jax.random.split(key, len(x0)), x0)

        return draw

    def tree(key: Key, params: Params, x0: Array) -> Array:
        def end(k: Key, x: Array) -> Array:
            path = diffrax.VirtualBrownianTree(0.0, 1.0, 0.5 / steps, x.shape, k)
            noise = diffrax.ControlTerm(lambda *_: lineax.DiagonalLinearOperator(jnp.full_like(x, SIGMA)), path)
            drift = diffrax.ODETerm(lambda t, y, args: model.apply(args, t, y))
            terms: Any = diffrax.MultiTerm(drift, noise)
            return diffrax.diffeqsolve(terms, diffrax.Euler(), 0.0, 1.0, 1.0 / steps, x, params).ys[0]

        return jax.vmap(end)(jax.random.split(key, len(x0)), x0)

    found = {PEER: scan, "diffuse euler": diffuse("euler"), "diffuse shark": diffuse("shark"), "diffrax tree": tree}
    return {name: jax.jit(draw) for name, draw in found.items()}, model.init(jax.random.key(0))


def measure(options: Options) -> list[dict[str, Any]]:
    """One row a contender."""
    draws, params = contenders(options)
    x0 = jax.random.normal(jax.random.key(1), (options.examples, options.dim))
    compiled, ends = {}, {}
    for name, draw in draws.items():
        start = time.perf_counter()
        ends[name] = jax.block_until_ready(draw(jax.random.key(2), params, x0))
        compiled[name] = time.perf_counter() - start
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    for index in range(options.rounds):
        names = list(draws) if index % 2 == 0 else list(reversed(draws))
        for name in names:
            start = time.process_time()
            jax.block_until_ready(draws[name](jax.random.fold_in(jax.random.key(3), index), params, x0))
            seconds[name].append(time.process_time() - start)
    return [
        {
            "contender": name,
            "cpu_seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(own / peer for own, peer in zip(seconds[name], seconds[PEER], strict=True)),
            "first_call_seconds": compiled[name],
            "mean": float(ends[name].mean()),
            "variance": float(ends[name].var(0).mean()),
        }
        for name in draws
    ]


def main(options: Options) -> None:
    """Measures, prints and writes."""
    for name in ("examples", "dim", "steps", "rounds"):
        if getattr(options, name) < 1:
            print(f"error: --{name} must be >= 1, got {getattr(options, name)}", file=sys.stderr)
            sys.exit(2)
    rows = measure(options)
    for row in rows:
        print(
            f"{row['contender']:14} {1000 * row['cpu_seconds']:8.1f} ms CPU  ratio {row['ratio']:5.2f}"
            f"  first call {row['first_call_seconds']:5.2f} s  mean {row['mean']:+.3f}  variance {row['variance']:.3f}"
        )
    if options.out is not None:
        versions = {name: version(name) for name in ("jax", "diffrax")}
        machine = {"cpus": os.cpu_count(), "platform": platform.platform(terse=True), "versions": versions}
        content = {
            "options": {k: v for k, v in asdict(options).items() if k != "out"},
            "machine": machine,
            "rows": rows,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
