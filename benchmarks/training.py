"""Claim: a training step of the 35.7M-parameter CIFAR-10 U-Net, beside torchcfm's in PyTorch, part by part.

    python -m pip install -e ".[bench]" -c constraints.txt
    python benchmarks/training.py --docs
    python benchmarks/training.py --small --rounds 3

2 CPU cores: some 8 minutes and 9 GB at batch 8; --small 2 minutes. Expected: 1.1 times PyTorch's step in fvjax, 1.4
times in JAX without fvjax's rule for convolutions (more where other programs want the cores: all three are then slower,
JAX most); loader, log and loop below 0.1% of the step, 2-3% more in the loop of the small network; one trace.

Three processes train: torchcfm's network as its CIFAR-10 example does it (Adam, clipping, EMA 0.9999, eager, default
settings), fvjax, and fvjax with plain jax.value_and_grad. One works at a time; each round asks every process for every
part, in alternating order; the first round, in which parts are compiled, is dropped. Medians and quartiles; a ratio is
one of medians. The parts need not add up to the step: each is compiled and called by itself.

    step       draw x0 and t, forward, backward, clip, Adam, EMA
    gradient   forward and backward at fixed paths, with dropout and without
    forward    the loss at fixed paths, without dropout
    dropout    the dropout layers alone, on arrays of their shapes: mask, scale, product
    update     clip, Adam and EMA, of a gradient that is there

Memory is the peak of resident memory above what the imports took: of the first two steps, with compilation, and of a
later step. A fourth process measures what surrounds the step in `fit`: batches of 32 x 32 x 3 from a memory-mapped
file, rows of the log, and a loop whose step does nothing (an upper bound: the dispatch of the step is in it). Their sum
is given as a share of the step. The difference of two loops with steps of seconds would be lost in the noise of a few
percent, so the whole loop is compared, in alternation, with the bare step of a small network, the harder case. What it
takes beyond that sum is waiting: the host looks at the losses for a row of the log, and the device then waits for the
next step to be dispatched. The bare step with the same waits is given, too.

PyTorch's OpenMP threads spin while they wait, which slows it down, at random, as soon as other programs want the same
cores. OMP_WAIT_POLICY=passive in the environment avoids that; it is recorded in the JSON, as is the load before.
"""

import importlib.util
import json
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib as mpl
import numpy as np
import tyro
from _processes import COLORS, Process, environment, process
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
PACKAGES = ("fvjax", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "torchcfm")
CONTENDERS = {"torch": "PyTorch, torchcfm", "fvjax": "fvjax", "jax": "JAX, plain value_and_grad"}
PROGRAMS = {"torch": ("_train_torch.py", ""), "fvjax": ("_train_jax.py", ""), "jax": ("_train_jax.py", "plain")}
PARTS = {
    "step": "training step",
    "gradient_dropout": "forward + backward, dropout",
    "gradient": "forward + backward",
    "forward": "forward",
    "dropout": "dropout layers",
    "update": "clip, Adam, EMA",
}
"""In this order: PyTorch's update takes the gradient that is there."""
PLAIN_PARTS = ("step", "gradient")
"""Of the plain port: the others are fvjax's."""
FULL: dict[str, Any] = {
    "network": {
        "channels": 128,
        "res_blocks": 2,
        "multipliers": [1, 2, 2, 2],
        "attention": [16],
        "heads": 4,
        "head_channels": 64,
        "dropout": 0.1,
    },
    "dims": [32, 32, 3],
    "images": 50_000,
    "loop_steps": 60,
    "learning_rate": 2e-4,
    "warmup": 5000,
    "clip": 1.0,
    "ema_decay": 0.9999,
}
"""The setting of torchcfm's example, and of the preset paper of experiments.cifar10."""
SMALL: dict[str, Any] = FULL | {
    "network": {
        "channels": 32,
        "res_blocks": 1,
        "multipliers": [1],
        "attention": [8],
        "heads": 4,
        "head_channels": 8,
        "dropout": 0.1,
    },
    "dims": [8, 8, 3],
    "images": 5000,
    "loop_steps": 20,
}


@dataclass(frozen=True)
class Options:
    """Measures a training step of the CIFAR-10 U-Net, its parts and what surrounds it, beside torchcfm in PyTorch."""

    rounds: int = 7
    """How many times everything is measured, >= 1."""
    batch: int = 8
    """Images of a step, >= 1."""
    small: bool = False
    """Whether to take a small network, to see that everything runs."""
    threads: int | None = None
    """Cores that the processes may use; None means all."""
    out: Path | None = None
    """Folder for train_step.json and .png, besides the tables on the terminal."""
    docs: bool = False
    """Whether `out` is docs/figures."""


def check(options: Options) -> None:
    """Raises ValueError on bad input."""
    cores = len(os.sched_getaffinity(0))
    if options.rounds < 1 or options.batch < 1:
        raise ValueError(f"rounds and batch must be >= 1, got {options.rounds} and {options.batch}")
    if options.threads is not None and not 1 <= options.threads <= cores:
        raise ValueError(f"threads must be in [1, {cores}], got {options.threads}")
    if options.docs and options.out is not None:
        raise ValueError(f"docs and out exclude each other, got out = {options.out}")
    missing = [name for name in ("torch", "torchcfm") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'{" and ".join(missing)} must be installed: python -m pip install -e ".[bench]"')


def answered(name: str, one: Process, request: str | None = None) -> Any:
    """The answer of a process to a request, or its facts.

    Raises:
        RuntimeError: if the process has ended, with its last line.
    """
    answer = one.facts if request is None else one.ask(request)
    if one.error is not None:
        raise RuntimeError(f"the process of {name} ended: {one.error}")
    return answer


def measure(options: Options) -> dict[str, Any]:
    """Everything: `rows` of parts, `processes`, `loop`."""
    settings = (SMALL if options.small else FULL) | {"batch": options.batch}
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    loops: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder, ExitStack() as stack:
        text = json.dumps(settings | {"folder": folder})

        def start(label: str, program: str, argument: str = "") -> Process:
            print(label, file=sys.stderr, flush=True)
            log = Path(folder) / f"{label}.log"
            one = stack.enter_context(process(HERE / program, [argument, text], log))
            answered(label, one)
            return one

        trained = {name: start(CONTENDERS[name], *PROGRAMS[name]) for name in CONTENDERS}
        surround = start("loader, log and loop", "_train_loop.py")
        for index in range(options.rounds + 1):
            print(f"round {index} of {options.rounds}", file=sys.stderr, flush=True)
            for part in PARTS:
                for name in list(trained)[:: 1 if index % 2 else -1]:
                    if name != "jax" or part in PLAIN_PARTS:
                        answer = answered(name, trained[name], part)
                        trained[name].facts |= {key: x for key, x in answer.items() if key != "seconds"}
                        seconds[part, name].append(answer["seconds"])
            loops.append(answered("the loop", surround, "fit bare looked" if index % 2 else "looked bare fit"))
    rows = [row(part, name, seconds) for part in PARTS for name in CONTENDERS if (part, name) in seconds]
    step = next(r["seconds"] for r in rows if (r["part"], r["contender"]) == ("step", "fvjax"))
    processes = [{"contender": name, **one.facts} for name, one in trained.items()]
    return {"rows": rows, "processes": processes, "loop": loop_of(surround.facts, loops[1:], step, options.batch)}


def row(part: str, name: str, seconds: dict[tuple[str, str], list[float]]) -> dict[str, Any]:
    """One part of one contender: median, quartiles, and the ratio to PyTorch; the first round is dropped."""
    rounds = seconds[part, name][1:]
    median = statistics.median(rounds)
    return {
        "part": part,
        "contender": name,
        "seconds": median,
        "quartiles": [float(q) for q in np.quantile(rounds, (0.25, 0.75))],
        "ratio": median / statistics.median(seconds[part, "torch"][1:]),
        "seconds_of_rounds": rounds,
    }


def loop_of(facts: dict[str, Any], rounds: Sequence[dict[str, Any]], step: float, batch: int) -> dict[str, Any]:
    """What surrounds the step: its parts' sum as a share of both networks' steps, and the whole loop's excess."""
    fit, bare, looked = (statistics.median(r[name] for r in rounds) for name in ("fit", "bare", "looked"))
    total = facts["batch_seconds"][str(batch)] + facts["write_seconds"] / facts["log_every"] + facts["idle_seconds"]
    excess = [r["fit"] / r["bare"] - 1 for r in rounds]
    return facts | {
        "sum_seconds": total,
        "share_of_step": total / step,
        "share_of_small_step": total / bare,
        "fit_seconds": fit,
        "bare_seconds": bare,
        "looked_seconds": looked,
        "excess": statistics.median(excess),
        "excess_quartiles": [float(q) for q in np.quantile(excess, (0.25, 0.75))],
        "traces": rounds[-1]["traces"],
    }


def table(result: dict[str, Any]) -> str:
    """The parts, the processes and the loop, a line each."""
    lines = [f"{'':29}{'':27}{'ms':>9} {'quartiles':>19} {'ratio':>6}"]
    for r in result["rows"]:
        low, high = (f"{1e3 * q:.1f}" for q in r["quartiles"])
        name = f"{PARTS[r['part']]:29}{CONTENDERS[r['contender']]:27}"
        lines.append(f"{name}{1e3 * r['seconds']:9.1f} {low + ' - ' + high:>19} {r['ratio']:6.2f}")
    for p in result["processes"]:
        memory = f"{p['step_bytes'] / 1e6:.0f} MB a step, {p['first_bytes'] / 1e6:.0f} MB at first"
        traced = f", traced {p['traces']} times" if "traces" in p else ""
        first = f"first step {p['first_seconds']:.1f} s{traced}"
        lines.append(f"{CONTENDERS[p['contender']]:27}{p['parameters']:,} parameters; {memory}; {first}")
    loop = result["loop"]
    batches = ", ".join(f"{1e3 * x:.3f} ms at batch {size}" for size, x in loop["batch_seconds"].items())
    low, high = loop["excess_quartiles"]
    write, idle, total = (1e3 * loop[f"{name}_seconds"] for name in ("write", "idle", "sum"))
    fit, bare, looked = (f"{1e3 * loop[f'{name}_seconds']:.1f} ms" for name in ("fit", "bare", "looked"))
    traced = f"traced {loop['traces']} times"
    share, of_small = loop["share_of_step"], loop["share_of_small_step"]
    lines += [
        f"loader {batches}; a row of the log {write:.3f} ms; idle step of fit {idle:.3f} ms",
        f"sum, a row in {loop['log_every']} steps: {total:.3f} ms, {share:.3%} of a step, {of_small:.2%} of a small",
        f"small network: in fit {fit}, bare {bare}, {loop['excess']:+.1%} ({low:+.1%} to {high:+.1%}); {traced}",
        f"the bare step, waited for every {loop['log_every']} steps: {looked}",
    ]
    return "\n".join(lines)


def bar(axes: Axes, index: int, name: str, *, value: float, text: str) -> None:
    """The horizontal bar of a contender in the group number `index`, with a number at its end."""
    place = index + 0.28 * (list(CONTENDERS).index(name) - 1)
    axes.barh(place, value, color=COLORS[name], height=0.26)
    axes.text(value, place, f" {text}", va="center", fontsize=8)


def figure_of(result: dict[str, Any], title: str) -> Figure:
    """Time by part, with the ratios to PyTorch, and the memory of a training process."""
    with mpl.rc_context({"axes.titlesize": 10, "axes.titlelocation": "left"}):
        figure = Figure(figsize=(9.5, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2.2, 1))
        for r in result["rows"]:
            text = f"{r['ratio']:.2f}" if r["contender"] != "torch" else f"{r['seconds']:.3g} s"
            bar(left, list(PARTS).index(r["part"]), r["contender"], value=r["seconds"], text=text)
        for p in result["processes"]:
            for index, key in enumerate(("step_bytes", "first_bytes")):
                bar(right, index, p["contender"], value=p[key] / 1e9, text=f"{p[key] / 1e9:.2f}")
        left.set_yticks(range(len(PARTS)), list(PARTS.values()), fontsize=8)
        left.set_title(title)
        left.set_xlabel("seconds; at the bars: PyTorch's, and ratios to it")
        right.set_yticks(range(2), ["a step", "first steps,\nwith compilation"], fontsize=8)
        right.set_xlabel("peak resident memory\nabove the imports', GB")
        handles = [mpl.patches.Patch(color=COLORS[name], label=label) for name, label in CONTENDERS.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        for axes, count in ((left, len(PARTS)), (right, 2)):
            axes.set(ylim=(count - 0.5, -0.5))
            axes.margins(x=0.12)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
    return figure


def main() -> None:
    """Command line: exits 2 on bad input, 1 if a contender fails."""
    options = tyro.cli(Options)
    try:
        check(options)
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
        load = os.getloadavg()[0]
        result = measure(options)
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    print(table(result))
    folder = HERE.parent / "docs" / "figures" if options.docs else options.out
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        about = {"rounds": options.rounds, "batch": options.batch, "small": options.small, "load_before": load}
        text = json.dumps({**about, **environment(PACKAGES), **result}, indent=2)
        (folder / "train_step.json").write_text(f"{text}\n", encoding="utf-8")
        title = f"U-Net, {result['processes'][0]['parameters']:,} parameters, batch {options.batch}"
        figure_of(result, title).savefig(folder / "train_step.png", dpi=150)
        print(folder)


if __name__ == "__main__":
    main()
