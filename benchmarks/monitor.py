"""Claim: a VarianceMonitor at its default settings costs less than 3% of the training that it watches.

    python benchmarks/monitor.py --docs
    python benchmarks/monitor.py --rounds 3 --models mlp_small

2 CPU cores: 4 minutes. Expected: an MLP at batch 256 pays for a look 5 to 7 times what it pays for a step, 0.5% to 0.7%
at one look in 1000 steps; a small U-Net at batch 64 16 times, 1.6%.

A plain loop trains on 2000 pairs with held-out ones at hand, a jitted step at a time. A round measures so many steps of
it without the monitor, then a look (gradients, flow, row in CSV and TensorBoard), in this or the other order; the first
round is dropped. The cost is look / (every * step), by round; medians and quartiles, in processor time of all threads
(what the neighbours on a busy machine change least) and by the clock. Beside it, for an upper bound that takes in all
that a loop may lose besides: the same loop with a look in it against the loop without, and the looks' share of it. The
first look, which compiles, is given by itself: it comes once, whatever `every` is.
"""

import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from _processes import environment

import fvjax
from fvjax import nets, training
from fvjax.monitoring import MemorizationWarning, VarianceMonitor

HERE = Path(__file__).parent
PACKAGES = ("fvjax", "jax", "jaxlib", "flax", "optax", "diffrax", "numpy")
PAIRS = 2000
SIGMA = 0.05


class Case(NamedTuple):
    """A network, the shape of an example, the batch, and the steps that are timed at once."""

    model: Callable[[], fvjax.Model]
    dims: tuple[int, ...]
    batch: int
    steps: int


CASES = {
    "mlp_small": Case(lambda: nets.mlp(2), (2,), 256, 200),
    "mlp": Case(lambda: nets.mlp(64, width=512, depth=3), (64,), 256, 50),
    "unet": Case(
        lambda: nets.unet((8, 8, 1), channels=32, res_blocks=1, multipliers=(1, 2), attention=(), head_channels=None),
        (8, 8, 1),
        64,
        15,
    ),
}
"""The default MLP in the plane, and what experiments.celeba trains on digits."""


@dataclass(frozen=True)
class Options:
    """Measures what a VarianceMonitor costs beside the training that it watches."""

    rounds: int = 9
    """How many times everything is measured, >= 1."""
    models: tuple[str, ...] = tuple(CASES)
    """Which networks: mlp_small, mlp, unet."""
    out: Path | None = None
    """Folder for monitor.json, besides the table on the terminal."""
    docs: bool = False
    """Whether `out` is docs/figures."""


class Spent(NamedTuple):
    """Seconds by processor and by the clock."""

    processor: float
    clock: float


class Timer:
    """Times what is done within it."""

    def __enter__(self) -> "Timer":
        self._start = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.spent = Spent(time.process_time() - self._start[0], time.perf_counter() - self._start[1])


class Training:
    """A network in training and its monitor."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, model = case, case.model()
        interpolant, optimizer = fvjax.constant_noise(SIGMA), training.adam(100_000)
        step = training.make_train_step(model.apply, interpolant, optimizer)
        draws = jax.random.normal(jax.random.key(0), (4, PAIRS, *case.dims))
        self.pairs, held_out = fvjax.Pair(draws[0], draws[1] + 2), fvjax.Pair(draws[2], draws[3] + 2)
        self.state = jax.jit(lambda key: training.init_state(key, model, optimizer))(jax.random.key(1))
        self.monitor = VarianceMonitor(
            model.apply, self.pairs, interpolant, key=jax.random.key(2), held_out=held_out, log=folder
        )
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

        @jax.jit
        def update(state: training.TrainState, pairs: fvjax.Pair) -> Any:
            batch = training.minibatch(pairs, jax.random.fold_in(state.key, state.step), case.batch)
            return step(state, batch)

        self._update = update

    def steps(self, look_at: int | None = None) -> Spent:
        """So many steps, waited for; with a look after step `look_at` of them."""
        with Timer() as timer:
            for index in range(self.case.steps):
                self.state, loss = self._update(self.state, self.pairs)
                if index == look_at:
                    self.look(loss)
            jax.block_until_ready(self.state)
        return timer.spent

    def look(self, loss: Any) -> Spent:
        """One look."""
        with Timer() as timer:
            self.monitor.measure(int(self.state.step), self.state.params, average=self.state.ema_params, loss=loss)
        return timer.spent


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One network: seconds of a step and of a look, and their ratios, round by round."""
    case, found = CASES[name], []
    with tempfile.TemporaryDirectory() as folder:
        one = Training(case, Path(folder))
        first_step, first_look = one.steps(), one.look(0.0)
        for index in range(rounds + 1):
            calls = [("bare", one.steps), ("look", lambda: one.look(0.0)), ("with", lambda: one.steps(case.steps // 2))]
            found.append({label: call() for label, call in calls[:: 1 if index % 2 else -1]})
        every = one.monitor.every
        sizes = {"parameters": one.parameters, "every": every}
    del found[0]
    row: dict[str, Any] = {"model": name, "batch": case.batch, "dims": case.dims, **sizes, "timed_steps": case.steps}
    row |= {"first_look_seconds": first_look.processor, "first_steps_seconds": first_step.processor}
    for kind in Spent._fields:
        bare, look, looked = (
            np.asarray([getattr(r[label], kind) for r in found]) for label in ("bare", "look", "with")
        )
        step = bare / case.steps
        row[kind] = {
            "step_seconds": statistics.median(step),
            "look_seconds": statistics.median(look),
            "look_in_steps": spread(look / step),
            "cost": spread(look / step / every),
            "cost_in_the_loop": spread((looked - bare) / step / every),
        }
    return row


def spread(values: np.ndarray) -> dict[str, Any]:
    """Median and quartiles."""
    low, middle, high = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": middle, "quartiles": [low, high]}


def table(rows: list[dict[str, Any]]) -> str:
    """Two lines for each network: by processor and by the clock."""
    lines = [
        f"{'':11}{'':11}{'step ms':>9} {'look ms':>9} {'in steps':>9} {'cost':>7} {'quartiles':>17} {'in the loop':>12}"
    ]
    for row in rows:
        for kind in Spent._fields:
            r = row[kind]
            low, high = r["cost"]["quartiles"]
            lines.append(
                f"{row['model']:11}{kind:11}{1e3 * r['step_seconds']:9.2f} {1e3 * r['look_seconds']:9.1f}"
                f" {r['look_in_steps']['median']:9.1f} {r['cost']['median']:7.2%} {low:7.2%} - {high:7.2%}"
                f" {r['cost_in_the_loop']['median']:12.2%}"
            )
        lines.append(
            f"{row['model']:11}first look, with compilation: {row['first_look_seconds']:.1f} s of processor time"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line: exits 2 on bad input."""
    options = tyro.cli(Options)
    unknown = [name for name in options.models if name not in CASES]
    if options.rounds < 1 or unknown or (options.docs and options.out is not None):
        print(f"rounds must be >= 1, models among {', '.join(CASES)}, docs without out, got {options}", file=sys.stderr)
        sys.exit(2)
    warnings.simplefilter("ignore", MemorizationWarning)  # the pairs are random, so that long trainings do memorize
    load = os.getloadavg()[0]
    rows = []
    for name in options.models:
        print(name, file=sys.stderr, flush=True)
        rows.append(measure(name, options.rounds))
    print(table(rows))
    folder = HERE.parent / "docs" / "figures" if options.docs else options.out
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        about = {"rounds": options.rounds, "load_before": load, **environment(PACKAGES), "rows": rows}
        (folder / "monitor.json").write_text(f"{json.dumps(about, indent=2)}\n", encoding="utf-8")
        print(folder / "monitor.json")


if __name__ == "__main__":
    main()
