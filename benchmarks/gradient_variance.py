"""Claim: the exact variance of the gradients costs about as much as the gradient.

    python -m pip install -e ".[bench]" -c constraints.txt
    python benchmarks/gradient_variance.py --rounds 11 --docs
    python benchmarks/gradient_variance.py --rounds 2 --models mlp lstm --batch 64

2 CPU cores: some 20 minutes at 11 rounds, of which the CIFAR-10 U-Net of 35.7M parameters takes a third (--models mlp
unet leaves it out); the largest contender takes 6 GB. Expected: squared norms and the trace take 0.8-1.3 times one
plain value_and_grad of the same model in the same framework, every coordinate below 2 times, at about the memory of the
gradient; vmap(grad) takes hundreds of times as long for the MLP, and 2-15 times for the U-Net. `fastest` is the ratio
to the fastest plain gradient that is measured: PyTorch's, JAX's, or JAX's with the convolutions' derivatives of
fvjax._convolutions.

Besides the three large models there are small ones, each for a layer or a use: a lookup in a table, an LSTM, kernels
that are scaled, masked, or have a derivative of their own (jax.custom_vjp), an ensemble of four by `jax.vmap` around
the call, and the variance within 10, 32 and 33 groups of the batch (`by`; the sum over groups of m2).

`compile` is tracing, lowering and compiling in seconds, and its ratio to that of the plain gradient. Contenders that
are called outside jit compile themselves, without the branches for cancelling sums: there it is the first call less the
second. jax_privacy clips, at norm 1, and adds up; what is checked are its norms before clipping.

Every contender runs in a process of its own (_worker.py), one process works at a time, and rounds are interleaved over
all of them, JAX and PyTorch, in alternating order; medians. Weights and data are the same in both frameworks. `memory`
is the peak of resident memory during one call above what was resident before it, in that process: allocators round up,
keep what was freed, and own arenas by thread, so it is an upper figure. For JAX the memory that XLA plans (temporaries
and outputs) is given, too. `error` is the relative difference of what is computed (mean |g|^2, total variance; for the
plain gradient the loss) from a float64 reference, one example after the other.

glibc maps and unmaps blocks above 32 MB at every call, which costs a contender just above that size some ms of page
faults. With --keep-memory the workers keep what they have allocated (MALLOC_* in the environment), all of them at once.

PyTorch's OpenMP threads spin while they wait, which makes its calls up to 20 times slower, at random, as soon as other
programs want the same cores. OMP_WAIT_POLICY=passive, the default here unless the environment has it, avoids that; it
is recorded in the JSON.

A peer that is not installed, or does not cover a layer, gives a row that says so. jax_privacy (2.0.0) is not in the
extra: with it comes a package that wants older attrs than the tested set has.
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
PLAIN = ("plain", "plain_refined")
"""Contenders that only take the gradient."""
TITLES = {
    "mlp": "MLP",
    "unet": "conv U-Net with attention",
    "cifar": "CIFAR-10 U-Net",
    "embedding": "Embedding",
    "lstm": "LSTM, 8 steps",
    "custom": "MLP, custom_vjp",
    "scaled": "MLP, scaled kernels",
    "masked": "MLP, masked kernels",
    "ensemble": "MLP, 4 by vmap",
    "groups10": "MLP, 10 groups",
    "groups32": "MLP, 32 groups",
    "groups33": "MLP, 33 groups",
}
"""Of the models in _problems.PROBLEMS, which is not imported here: it takes JAX."""
LARGE = ("mlp", "unet", "cifar")
"""Memory is drawn of these, too; the others are drawn in a figure of their own."""
PACKAGES = (
    "fvjax",
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "torch",
    "torchcfm",
    "opacus",
    "backpack-for-pytorch",
    "jax-privacy",
)
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
    Kind("jax", "plain_refined", "JAX value_and_grad, fvjax's rule", "loss"),
    Kind("jax", "sites_norms", "fvjax squared norms", "norm"),
    Kind("jax", "sites_norms_eager", "fvjax squared norms, no jit", "norm"),
    Kind("jax", "sites_trace", "fvjax variance, trace", "variance"),
    Kind("jax", "sites_trace_eager", "fvjax variance, trace, no jit", "variance"),
    Kind("jax", "sites_elementwise", "fvjax variance, every coordinate", "variance"),
    Kind("jax", "vmap_grad", "JAX vmap(grad)", "variance"),
    Kind("jax", "vmap_grad_chunked", "JAX vmap(grad), chunks", "variance"),
    Kind("jax", "privacy_clipped", "jax_privacy, clipped sum", "norm"),
    Kind("torch", "plain", "PyTorch backward", "loss"),
    Kind("torch", "func", "torch.func", "variance"),
    Kind("torch", "func_chunked", "torch.func, chunks", "variance"),
    Kind("torch", "opacus_samples", "Opacus per-sample gradients", "norm"),
    Kind("torch", "opacus_ghost", "Opacus ghost norms", "norm"),
    Kind("torch", "backpack_l2", "BackPACK L2", "norm"),
    Kind("torch", "backpack_squares", "BackPACK sum of squares", "norm"),
    Kind("torch", "backpack_variance", "BackPACK variance", "variance"),
)

IN_JAX = tuple(
    f"jax.{name}"
    for name in (
        "plain",
        "sites_norms",
        "sites_norms_eager",
        "sites_trace",
        "sites_trace_eager",
        "sites_elementwise",
        "vmap_grad",
        "vmap_grad_chunked",
        "privacy_clipped",
    )
)
IN_TORCH = ("torch.plain", "torch.func", "torch.func_chunked")
LAYERS = (*IN_JAX, *IN_TORCH, "torch.opacus_ghost", "torch.backpack_l2")
GROUPED = (
    "jax.plain",
    "jax.sites_trace",
    "jax.sites_trace_eager",
    "jax.sites_elementwise",
    "jax.vmap_grad",
    "jax.vmap_grad_chunked",
    *IN_TORCH,
)
CONTENDERS = {
    "cifar": (
        "jax.plain",
        "jax.plain_refined",
        "jax.sites_norms",
        "jax.sites_trace",
        "jax.sites_trace_eager",
        "jax.sites_elementwise",
        "jax.vmap_grad",
        "torch.plain",
        "torch.func",
        "torch.opacus_ghost",
    ),
    **dict.fromkeys(("embedding", "lstm", "scaled", "masked"), LAYERS),
    "custom": IN_JAX,
    "ensemble": ("jax.plain", "jax.sites_trace", "jax.vmap_grad", "jax.vmap_grad_chunked"),
    **dict.fromkeys(("groups10", "groups32", "groups33"), GROUPED),
}
"""Of models that are not measured with all: what has a meaning there, and of a library the quickest that it has; for
cifar also what compiles within a minute."""


@dataclass(frozen=True)
class Options:
    """Measures what the exact gradient variance costs, against one gradient."""

    models: tuple[str, ...] = tuple(TITLES)
    """Of mlp, unet, cifar, embedding, lstm, custom, scaled, masked, ensemble, groups10, groups32, groups33."""
    rounds: int = 15
    """How many times each contender is measured, >= 1."""
    batch: int | None = None
    """Examples, a multiple of the model's chunk (unet 8, cifar 2, others 16); None means the model's own
    number."""
    only: tuple[str, ...] = ()
    """Contenders such as jax.sites_trace, besides the plain gradients; none means all."""
    threads: int | None = None
    """Cores that the workers may use; None means all."""
    limit: float = 10.0
    """Seconds that the rounds of one contender may take; a slower one gets fewer rounds."""
    keep_memory: bool = False
    """Whether the workers keep freed memory."""
    out: Path | None = None
    """Folder for gradient_variance.json and the figures, besides the table on the terminal."""
    docs: bool = False
    """Whether `out` is docs/figures."""


def check(options: Options) -> None:
    """Raises ValueError on bad input."""
    keys = {kind.key for kind in KINDS}
    cores = len(os.sched_getaffinity(0))
    if options.rounds < 1 or (options.batch is not None and options.batch < 1):
        raise ValueError(f"rounds and batch must be >= 1, got {options.rounds} and {options.batch}")
    if not options.models or not set(options.models) <= set(TITLES):
        raise ValueError(f"models must be among {', '.join(TITLES)}, got {options.models}")
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
    from _problems import prepare

    print(model, file=sys.stderr, flush=True)
    arrays = prepare(model, options.batch)
    chosen = [kind for kind in KINDS if model not in CONTENDERS or kind.key in CONTENDERS[model]]
    chosen = [kind for kind in chosen if not options.only or kind.name in PLAIN or kind.key in options.only]
    if arrays["batch/1"].ndim != 4:
        chosen = [kind for kind in chosen if kind.name != "plain_refined"]  # no convolutions: it is the plain one
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
        "batch": len(arrays["batch/0"]),
        "chunk": arrays["chunk"],
        "parameters": sum(x.size for name, x in arrays.items() if name.startswith("params/")),
    }
    rows = [
        about | row(kind, one, plain[kind.framework], float(arrays[kind.quantity]))
        for kind, one in zip(chosen, workers, strict=True)
    ]
    gradients = [r["seconds"] for kind, r in zip(chosen, rows, strict=True) if kind.name in PLAIN and "seconds" in r]
    return [r | {"fastest_ratio": r["seconds"] / min(gradients)} if gradients and "seconds" in r else r for r in rows]


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
        if "compile_seconds" in facts:
            found["compile_ratio"] = facts["compile_seconds"] / plain.process.facts["compile_seconds"]
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each model and contender; `fastest` is the ratio to the fastest plain gradient of all."""
    heads = ("ms", "ratio", "fastest", "compile", "ratio", "MB", "ratio", "XLA MB", "error", "rounds")
    lines = [" " * 44 + "".join(f" {head:>8}" for head in heads)]
    for r in rows:
        name = f"{r['model']:9} {r['label']:34}"
        if r["error"] is not None:
            lines.append(f"{name} {r['error']}")
            continue
        planned = [r[key] for key in ("xla_temp_bytes", "xla_output_bytes") if key in r]
        cells = (
            f"{1e3 * r['seconds']:.1f}",
            *(f"{r[key]:.2f}" if key in r else "-" for key in ("time_ratio", "fastest_ratio")),
            *(f"{r[key]:.2f}" if key in r else "-" for key in ("compile_seconds", "compile_ratio")),
            f"{r['resident_bytes'] / 1e6:.0f}",
            f"{r['memory_ratio']:.2f}" if "memory_ratio" in r else "-",
            f"{sum(planned) / 1e6:.0f}" if planned else "-",
            f"{r['relative_error']:.0e}",
            f"{len(r['seconds_of_rounds'])}",
        )
        lines.append(name + "".join(f" {cell:>8}" for cell in cells))
    return "\n".join(lines)


def bars(axes: Axes, rows: Sequence[dict[str, Any] | None], key: str) -> None:
    """Horizontal bars from 1, a ratio each, on a logarithmic axis; None is a row that does not apply."""
    ratios = [None if r is None else r.get(key) for r in rows]
    known = [ratio for ratio in ratios if ratio is not None]
    low, high = min([0.7, *known]), max([2.0, *known])
    for place, (r, ratio) in enumerate(zip(rows, ratios, strict=True)):
        if r is None:
            axes.text(1.04, place, "–", va="center", fontsize=8, color="#666666")
            continue
        framework = "fvjax" if ".sites" in r["contender"] else r["contender"].split(".")[0]
        if ratio is None:
            missing = "not supported" if str(r["error"]).startswith("NotImplementedError") else "not run"
            axes.text(1.04, place, missing, va="center", fontsize=8, style="italic", color="#666666")
            continue
        axes.barh(place, ratio - 1, left=1, color=COLORS[framework], height=0.72)
        axes.text(max(ratio, 1) * 1.04, place, f"{ratio:.3g}", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlim=(low / 1.15, high * (high / low) ** 0.3), ylim=(len(rows) - 0.4, -0.6))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 20 else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)


def title(rows: Sequence[dict[str, Any]], separator: str) -> str:
    """Of the panel of one model."""
    return f"{TITLES[rows[0]['model']]}{separator}{rows[0]['parameters']:,} parameters, batch {rows[0]['batch']:,}"


def by_model(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of each model."""
    return [[r for r in rows if r["model"] == model] for model in dict.fromkeys(r["model"] for r in rows)]


def figure_of(rows: Sequence[dict[str, Any]]) -> Figure:
    """Time and memory of every contender, as ratios to the plain gradient of its framework."""
    models = by_model(rows)
    with mpl.rc_context({"axes.titlesize": 10, "axes.titlelocation": "left"}):
        figure = Figure(figsize=(9.5, 0.9 + 4.1 * len(models)), layout="constrained")
        panels = figure.subplots(len(models), 2, sharey="row", squeeze=False)
        for line, chosen in zip(panels, models, strict=True):
            bars(line[0], chosen, "time_ratio")
            bars(line[1], chosen, "memory_ratio")
            line[0].set_yticks(range(len(chosen)), [r["label"] for r in chosen], fontsize=8)
            line[0].set_title(title(chosen, ": "))
            line[0].set_xlabel("time / time of one gradient in the same framework")
            line[1].tick_params(axis="y", length=0)
            line[1].set_xlabel("peak resident memory / that of one gradient")
    return figure


def figure_of_layers(rows: Sequence[dict[str, Any]]) -> Figure:
    """Time of every contender for the small models, three in a line, which share their contenders' names."""
    models = by_model(rows)
    lines = [models[k : k + 3] for k in range(0, len(models), 3)]
    kinds = [[kind for kind in KINDS if any(r["contender"] == kind.key for m in line for r in m)] for line in lines]
    heights = [1.0 + 0.2 * len(own) for own in kinds]
    with mpl.rc_context({"axes.titlesize": 9, "axes.titlelocation": "left"}):
        figure = Figure(figsize=(11.5, sum(heights)), layout="constrained")
        panels = figure.subplots(len(lines), 3, sharey="row", squeeze=False, height_ratios=heights)
        for panel in panels.flat:
            panel.set_axis_off()
        for line, own, places in zip(lines, kinds, panels, strict=True):
            for chosen, axes in zip(line, places, strict=False):
                axes.set_axis_on()
                found = {r["contender"]: r for r in chosen}
                bars(axes, [found.get(kind.key) for kind in own], "time_ratio")
                axes.set_title(title(chosen, "\n"))
                axes.tick_params(axis="y", length=0)
                axes.set_xlabel("time / time of one gradient", fontsize=8)
            places[0].set_yticks(range(len(own)), [kind.label for kind in own], fontsize=8)
    return figure


def save(rows: Sequence[dict[str, Any]], options: Options, folder: Path) -> None:
    """Writes gradient_variance.json, and the figures of the large and of the small models."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"rounds": options.rounds, "keep_memory": options.keep_memory}
    result = {**about, **environment(PACKAGES), "rows": rows}
    (folder / "gradient_variance.json").write_text(f"{json.dumps(result, indent=2)}\n", encoding="utf-8")
    large = [r for r in rows if r["model"] in LARGE]
    small = [r for r in rows if r["model"] not in LARGE]
    if large:
        figure_of(large).savefig(folder / "gradient_variance.png", dpi=150)
    if small:
        figure_of_layers(small).savefig(folder / "gradient_variance_layers.png", dpi=150)


def main() -> None:
    """Command line: exits 2 on bad input."""
    options = tyro.cli(Options)
    try:
        check(options)
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
        rows = [row for model in options.models for row in measure(model, options)]
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(table(rows))
    folder = HERE.parent / "docs" / "figures" if options.docs else options.out
    if folder is not None:
        save(rows, options, folder)
        print(folder)


if __name__ == "__main__":
    main()
