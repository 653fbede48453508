"""Claim: the exact variance of the gradients costs about as much as the gradient.

    python -m pip install -e ".[bench]" -c constraints.txt
    python benchmarks/gradient_variance.py --rounds 15 --docs
    python benchmarks/gradient_variance.py --rounds 2 --models mlp --batch 64

2 CPU cores: some 12 minutes; the largest contender takes 6 GB. Expected: squared norms and the trace take 0.9-1.3 times
one plain value_and_grad of the same model in the same framework, every coordinate below 2 times, at about the memory of
the gradient; vmap(grad) takes hundreds of times as long for the MLP, and 2-15 times for the U-Net.

Every contender runs in a process of its own (_worker.py), one process works at a time, and rounds are interleaved over
all of them, JAX and PyTorch, in alternating order; medians. Weights and data are the same in both frameworks. `memory`
is the peak of resident memory during one call above what was resident before it, in that process: allocators round up,
keep what was freed, and own arenas by thread, so it is an upper figure. For JAX the memory that XLA plans (temporaries
and outputs) is given, too. `error` is the relative difference of what is computed (mean |g|^2, total variance; for the
plain gradient the loss) from a float64 reference, one example after the other.

glibc maps and unmaps blocks above 32 MB at every call, which costs a contender just above that size some ms of page
faults. With --keep-memory the workers keep what they have allocated (MALLOC_* in the environment), all of them at once.

PyTorch's OpenMP threads spin while they wait, which makes its calls up to 20 times slower, at random, as soon as other
programs want the same cores. OMP_WAIT_POLICY=passive in the environment avoids that; it is recorded in the JSON.

A peer that is not installed, or does not cover a layer, gives a row that says so.
"""

import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import tyro
from _processes import COLORS, Process, environment, process
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

HERE = Path(__file__).parent
MODELS = ("mlp", "unet")
"""As in _jax_contenders.PROBLEMS, which is not imported here: it takes JAX."""
TITLES = {"mlp": "MLP", "unet": "conv U-Net with attention"}
PACKAGES = ("fvjax", "jax", "jaxlib", "flax", "numpy", "torch", "opacus", "backpack-for-pytorch")
KEEP = {
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "500000000",
}


class Kind(NamedTuple):
    """A contender: the program of its framework, its name there, its label, and which reference it computes."""

    framework: str
    name: str
    label: str
    quantity: str

    @property
    def key(self) -> str:
        """Unique name."""
        return f"{self.framework}.{self.name}"


KINDS = (
    Kind("jax", "plain", "JAX value_and_grad", "loss"),
    Kind("jax", "sites_norms", "fvjax squared norms", "norm"),
    Kind("jax", "sites_trace", "fvjax variance, trace", "variance"),
    Kind("jax", "sites_elementwise", "fvjax variance, every coordinate", "variance"),
    Kind("jax", "vmap_grad", "JAX vmap(grad)", "variance"),
    Kind("jax", "vmap_grad_chunked", "JAX vmap(grad), chunks", "variance"),
    Kind("torch", "plain", "PyTorch backward", "loss"),
    Kind("torch", "func", "torch.func", "variance"),
    Kind("torch", "func_chunked", "torch.func, chunks", "variance"),
    Kind("torch", "opacus_samples", "Opacus per-sample gradients", "norm"),
    Kind("torch", "opacus_ghost", "Opacus ghost norms", "norm"),
    Kind("torch", "backpack_l2", "BackPACK L2", "norm"),
    Kind("torch", "backpack_squares", "BackPACK sum of squares", "norm"),
    Kind("torch", "backpack_variance", "BackPACK variance", "variance"),
)


@dataclass(frozen=True)
class Options:
    """Measures what the exact gradient variance costs, against one gradient."""

    models: tuple[str, ...] = MODELS
    """Of mlp, unet."""
    rounds: int = 15
    """How many times each contender is measured, >= 1."""
    batch: int | None = None
    """Examples, a multiple of the model's chunk (mlp 64, unet 8); None means the model's own number."""
    only: tuple[str, ...] = ()
    """Contenders such as jax.sites_trace, besides the plain gradients; none means all."""
    threads: int | None = None
    """Cores that the workers may use; None means all."""
    limit: float = 60.0
    """Seconds that the rounds of one contender may take; a slower one gets fewer rounds."""
    keep_memory: bool = False
    """Whether the workers keep freed memory."""
    out: Path | None = None
    """Folder for gradient_variance.json and .png, besides the table on the terminal."""
    docs: bool = False
    """Whether `out` is docs/figures."""


def check(options: Options) -> None:
    """Raises ValueError on bad input."""
    keys = {kind.key for kind in KINDS}
    cores = len(os.sched_getaffinity(0))
    if options.rounds < 1 or (options.batch is not None and options.batch < 1):
        raise ValueError(f"rounds and batch must be >= 1, got {options.rounds} and {options.batch}")
    if not options.models or not set(options.models) <= set(MODELS):
        raise ValueError(f"models must be among {', '.join(MODELS)}, got {options.models}")
    if not set(options.only) <= keys:
        raise ValueError(f"only must be among {', '.join(sorted(keys))}, got {options.only}")
    if options.threads is not None and not 1 <= options.threads <= cores:
        raise ValueError(f"threads must be in [1, {cores}], got {options.threads}")
    if options.docs and options.out is not None:
        raise ValueError(f"docs and out exclude each other, got out = {options.out}")


class Worker:
    """One contender in its process, and the seconds of its rounds so far."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.seconds: list[float] = []

    def measure(self) -> None:
        """One more round, unless the process has ended."""
        seconds = self.process.ask()
        self.seconds += [] if seconds is None else [seconds]


@contextmanager
def worker(kind: Kind, file: Path, keep_memory: bool) -> Iterator[Worker]:
    """Starts a contender and waits until it is built; ends its process at last."""
    program = HERE / {"jax": "_jax_contenders.py", "torch": "_torch_peers.py"}[kind.framework]
    log = file.with_name(f"{kind.key}.log")
    with process(program, [kind.name, str(file)], log, variables=KEEP if keep_memory else {}) as running:
        print(f"  {kind.label}", file=sys.stderr, flush=True)
        yield Worker(running)


def measure(model: str, options: Options) -> list[dict[str, Any]]:
    """Rows of one model."""
    from _jax_contenders import prepare

    print(model, file=sys.stderr, flush=True)
    arrays = prepare(model, options.batch)
    chosen = [kind for kind in KINDS if not options.only or kind.name == "plain" or kind.key in options.only]
    with TemporaryDirectory() as folder, ExitStack() as stack:
        file = Path(folder) / "problem.npz"
        np.savez(file, **arrays)
        workers = [stack.enter_context(worker(kind, file, options.keep_memory)) for kind in chosen]
        for index in range(options.rounds):
            for one in workers if index % 2 == 0 else reversed(workers):
                if sum(one.seconds) <= options.limit:
                    one.measure()
    plain = {kind.framework: one for kind, one in zip(chosen, workers, strict=True) if kind.name == "plain"}
    about = {
        "model": model,
        "batch": len(arrays["t"]),
        "chunk": arrays["chunk"],
        "parameters": sum(x.size for name, x in arrays.items() if name.startswith("params/")),
    }
    rows = zip(chosen, workers, strict=True)
    return [about | row(kind, one, plain[kind.framework], float(arrays[kind.quantity])) for kind, one in rows]


def row(kind: Kind, one: Worker, plain: Worker, reference: float) -> dict[str, Any]:
    """One contender: medians, and ratios to the plain gradient of its framework."""
    found: dict[str, Any] = {
        "contender": kind.key,
        "label": kind.label,
        "quantity": kind.quantity,
        "error": one.process.error,
    }
    if one.process.error is not None or not one.seconds:
        return found
    facts = one.process.facts
    seconds = statistics.median(one.seconds)
    found |= facts | {
        "reference": reference,
        "relative_error": facts["value"] / reference - 1,
        "seconds": seconds,
        "seconds_of_rounds": one.seconds,
    }
    if plain.process.error is None:
        found["time_ratio"] = seconds / statistics.median(plain.seconds)
        found["memory_ratio"] = facts["resident_bytes"] / plain.process.facts["resident_bytes"]
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each model and contender."""
    lines = [f"{'':40} {'ms':>9} {'ratio':>7} {'MB':>7} {'ratio':>7} {'XLA MB':>7} {'error':>8} {'rounds':>6}"]
    for r in rows:
        name = f"{r['model']:5} {r['label']:34}"
        if r["error"] is not None:
            lines.append(f"{name} {r['error']}")
            continue
        planned = sum(r[key] for key in ("xla_temp_bytes", "xla_output_bytes")) if "xla_temp_bytes" in r else None
        lines.append(
            f"{name} {1e3 * r['seconds']:9.1f} {r.get('time_ratio', np.nan):7.2f} {r['resident_bytes'] / 1e6:7.0f}"
            f" {r.get('memory_ratio', np.nan):7.2f} {'-' if planned is None else f'{planned / 1e6:.0f}':>7}"
            f" {r['relative_error']:8.0e} {len(r['seconds_of_rounds']):6d}"
        )
    return "\n".join(lines)


def bars(axes: Axes, rows: Sequence[dict[str, Any]], key: str) -> None:
    """Horizontal bars from 1, a ratio each, on a logarithmic axis."""
    ratios = [r.get(key) for r in rows]
    known = [ratio for ratio in ratios if ratio is not None]
    low, high = min([0.7, *known]), max([2.0, *known])
    for place, (r, ratio) in enumerate(zip(rows, ratios, strict=True)):
        framework = "fvjax" if ".sites" in r["contender"] else r["contender"].split(".")[0]
        if ratio is None:
            missing = "not supported" if str(r["error"]).startswith("NotImplementedError") else "not run"
            axes.text(1.04, place, missing, va="center", fontsize=8, style="italic", color="#666666")
            continue
        axes.barh(place, ratio - 1, left=1, color=COLORS[framework], height=0.72)
        axes.text(max(ratio, 1) * 1.04, place, f"{ratio:.3g}", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlim=(low / 1.15, high * (high / low) ** 0.2), ylim=(len(rows) - 0.4, -0.6))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 20 else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)


def figure_of(rows: Sequence[dict[str, Any]]) -> Figure:
    """Time and memory of every contender, as ratios to the plain gradient of its framework."""
    models = list(dict.fromkeys(r["model"] for r in rows))
    with mpl.rc_context({"axes.titlesize": 10, "axes.titlelocation": "left"}):
        figure = Figure(figsize=(9.5, 0.9 + 3.6 * len(models)), layout="constrained")
        panels = figure.subplots(len(models), 2, sharey="row", squeeze=False)
        for line, model in zip(panels, models, strict=True):
            chosen = [r for r in rows if r["model"] == model]
            about = chosen[0]
            bars(line[0], chosen, "time_ratio")
            bars(line[1], chosen, "memory_ratio")
            line[0].set_yticks(range(len(chosen)), [r["label"] for r in chosen], fontsize=8)
            line[0].set_title(
                f"{TITLES.get(model, model)}: {about['parameters']:,} parameters, batch {about['batch']:,}"
            )
            line[0].set_xlabel("time / time of one gradient in the same framework")
            line[1].tick_params(axis="y", length=0)
            line[1].set_xlabel("peak resident memory / that of one gradient")
    return figure


def main() -> None:
    """Command line: exits 2 on bad input."""
    options = tyro.cli(Options)
    try:
        check(options)
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
        rows = [row for model in options.models for row in measure(model, options)]
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(table(rows))
    folder = HERE.parent / "docs" / "figures" if options.docs else options.out
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        about = {"rounds": options.rounds, "keep_memory": options.keep_memory}
        result = {**about, **environment(PACKAGES), "rows": rows}
        path = folder / "gradient_variance.json"
        path.write_text(f"{json.dumps(result, indent=2)}\n", encoding="utf-8")
        figure_of(rows).savefig(folder / "gradient_variance.png", dpi=150)
        print(folder)


if __name__ == "__main__":
    main()
