"""Claim: `import fvjax` costs at most 1.3 times `import jax`.

    python benchmarks/import_cost.py --rounds 15

2 CPU cores: 30 seconds. Each round starts one fresh interpreter for each import, in alternating order, so that drift of
the machine's speed meets both alike. Prints JSON: the seconds of every round, the medians, and their ratio.
"""

import json
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tyro

LIMIT = 1.3


@dataclass(frozen=True)
class Options:
    """Measures the cost of `import fvjax` against that of `import jax`."""

    rounds: int = 15
    """How many times each import is measured, >= 1."""
    out: Path | None = None
    """File for the JSON; the terminal by default."""


def import_seconds(module: str) -> float:
    """Seconds of one `import module` in a fresh interpreter, without the interpreter's own start."""
    code = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout)


def measure(rounds: int) -> dict[str, object]:
    """The result: seconds of each round by module, medians in seconds, ratio of the medians."""
    modules = ("jax", "fvjax")
    for module in modules:  # the first import of all may write bytecode
        import_seconds(module)
    seconds: dict[str, list[float]] = {module: [] for module in modules}
    for index in range(rounds):
        for module in modules if index % 2 == 0 else reversed(modules):
            seconds[module].append(import_seconds(module))
    medians = {module: statistics.median(values) for module, values in seconds.items()}
    ratio = medians["fvjax"] / medians["jax"]
    return {
        "claim": f"import fvjax <= {LIMIT} x import jax",
        "holds": ratio <= LIMIT,
        "ratio": ratio,
        "median_seconds": medians,
        "seconds": seconds,
        "python": platform.python_version(),
        "jax": version("jax"),
    }


def main() -> None:
    """Command line: exits 2 on bad input, 1 where the claim does not hold."""
    options = tyro.cli(Options)
    if options.rounds < 1:
        print(f"rounds must be an integer >= 1, got {options.rounds}", file=sys.stderr)
        sys.exit(2)
    result = measure(options.rounds)
    text = json.dumps(result, indent=2)
    if options.out is None:
        print(text)
    else:
        options.out.write_text(f"{text}\n", encoding="utf-8")
        print(options.out)
    sys.exit(0 if result["holds"] else 1)


if __name__ == "__main__":
    main()
