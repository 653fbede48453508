"""Claim: exact gradient variance of models that know nothing of fvjax, for about the price of one gradient.

    python -m pip install -e ".[bench]" -c constraints.txt
    python benchmarks/public_models.py --docs
    python benchmarks/public_models.py --rounds 3 --models equinox_mlp linen_lstm

2 CPU cores: some 20 minutes. Expected: an error below 1e-5 for every model, with or without a slow path; times of one
gradient where there is none.

The models are those of _public_models.py, of which tests/sites/test_public_models.py tests a small form. Each runs in a
process of its own (_public_worker.py), one after the other. `time` is the median over rounds, divided by that of one
jitted `value_and_grad` of the mean loss, the four functions of a model interleaved in alternating order; `compile` is
tracing and compiling, divided likewise. `error` is that of the total variance, relative to `jax.grad` of one example
after the other in float64 (in float32 where float64 draws other noise, or takes other steps).

A package that is not installed gives rows that say so.
"""

import csv
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tyro
from _processes import environment, process

HERE = Path(__file__).parent
COLUMNS = ("plain", "trace", "norms", "vmap_grad")
"""As in _public_worker.functions, which is not imported here: it takes JAX."""
HEADER = ("package", "model", "params", "batch", "error", "trace", "norms", "vmap(grad)", "compile", "slow path")


@dataclass(frozen=True)
class Options:
    """Measures exact gradient variance of models of public packages, against one gradient."""

    models: tuple[str, ...] = ()
    """Of those in _public_models.py; none means all."""
    rounds: int = 9
    """How many times each function is measured, >= 1."""
    limit: float = 60.0
    """Seconds that the rounds of one function may take; a slower one gets fewer rounds."""
    smoke: bool = False
    """Whether to take the sizes of the tests: their times say nothing."""
    out: Path | None = None
    """Folder for public_models.json and .csv, besides the table on the terminal."""
    docs: bool = False
    """Whether `out` is docs/figures."""


def check(options: Options, known: Sequence[str]) -> None:
    """Raises ValueError on bad input."""
    if options.rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {options.rounds}")
    if not set(options.models) <= set(known):
        raise ValueError(f"models must be among {', '.join(known)}, got {options.models}")
    if options.docs and options.out is not None:
        raise ValueError(f"docs and out exclude each other, got out = {options.out}")


def measure(name: str, options: Options, folder: Path) -> dict[str, Any]:
    """What the worker of one model says, and its rounds; `error` is why it ended, or None."""
    settings = json.dumps({"real": not options.smoke})
    seconds: dict[str, list[float]] = {column: [] for column in COLUMNS}
    with process(HERE / "_public_worker.py", [name, settings], folder / f"{name}.log") as running:
        for index in range(options.rounds):
            for column in COLUMNS if index % 2 == 0 else reversed(COLUMNS):
                if sum(seconds[column]) <= options.limit:
                    answer = running.ask(column)
                    seconds[column] += [] if answer is None else [answer]
        found = {"error": running.error, **running.facts}
    if found["error"] is not None:
        return found
    medians = {column: statistics.median(values) for column, values in seconds.items()}
    compiling = found["compile_seconds"]
    return found | {
        "seconds_of_rounds": seconds,
        "seconds": medians,
        "time_ratios": {column: medians[column] / medians["plain"] for column in COLUMNS[1:]},
        "compile_ratios": {column: compiling[column] / compiling["plain"] for column in COLUMNS[1:]},
    }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table, as HEADER names it."""
    if row["error"] is not None:
        missing = str(row["error"]).startswith("ModuleNotFoundError")
        why = "not installed" if missing else str(row["error"])
        return (row["package"], row["title"], why, *("" for _ in HEADER[3:]))
    times = (f"{row['time_ratios'][column]:.2f}" for column in COLUMNS[1:])
    return (
        row["package"],
        row["title"],
        f"{row['parameters']:,}",
        f"{row['batch']:,}",
        f"{abs(row['variance_error']):.0e}",
        *times,
        f"{row['compile_ratios']['trace']:.1f}",
        "yes" if row["slow_path"] else "",
    )


def table(lines: Sequence[Sequence[str]]) -> str:
    """Aligned columns for a terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def save(rows: Sequence[dict[str, Any]], options: Options, folder: Path) -> None:
    """Writes what is measured so far: public_models.json and the table as public_models.csv."""
    from _public_models import MODELS

    packages = ["fvjax", "jaxlib", "numpy", *dict.fromkeys(model.package for model in MODELS.values())]
    result = {"rounds": options.rounds, "smoke": options.smoke, **environment(packages), "rows": rows}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "public_models.json").write_text(f"{json.dumps(result, indent=2)}\n", encoding="utf-8")
    with (folder / "public_models.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *map(cells, rows)])


def main() -> None:
    """Command line: exits 2 on bad input, 1 where a model of an installed package fails."""
    options = tyro.cli(Options)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    os.environ["JAX_TRACEBACK_FILTERING"] = "off"  # so that the last line that a worker prints is the message
    from _public_models import MODELS

    try:
        check(options, list(MODELS))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    out = HERE.parent / "docs" / "figures" if options.docs else options.out
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        for name in options.models or MODELS:
            model = MODELS[name]
            about = {"model": name, "package": model.package, "title": model.title, "as_given": model.as_given}
            rows.append(about | measure(name, options, Path(folder)))
            print("  ".join(cells(rows[-1])), file=sys.stderr, flush=True)
            if out is not None:
                save(rows, options, out)
    print(table([HEADER, *map(cells, rows)]))
    if out is not None:
        print(out)
    sys.exit(any(cells(row)[2] != "not installed" for row in rows if row["error"] is not None))


if __name__ == "__main__":
    main()
