"""The processes of contenders (_worker.py) as the benchmark that asks them sees them; what results depend on."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

COLORS = {"fvjax": "#0072B2", "jax": "#666666", "torch": "#E69F00"}  # Okabe & Ito 2008
"""Of the bars in figures."""


class Process:
    """One contender: the facts that it states at once, its answers, and once it has ended with an error, that."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log
        self.error: str | None = None
        self.facts: dict[str, Any] = self._answer() or {}

    def ask(self, request: str = "") -> Any:
        """The answer to a line, or None if the process has ended."""
        if self.error is not None or self._process.stdin is None:
            return None
        self._process.stdin.write(f"{request}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if line:
            return json.loads(line)
        code = self._process.wait()
        last = self._log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        self.error = f"killed by signal {-code}" if code < 0 or not last else last[0]
        return None


@contextmanager
def process(
    program: Path, arguments: Sequence[str], log: Path, *, variables: Mapping[str, str] | None = None
) -> Iterator[Process]:
    """Starts a contender and waits until it is built; ends its process at last.

    Args:
        program: a worker's file.
        arguments: its command line.
        log: file for what it prints on standard error.
        variables: added to the environment.
    """
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(
            [sys.executable, str(program), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **(variables or {})},
        ) as running,
    ):
        yield Process(running, log)


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """What the numbers depend on besides the options: threads, machine, versions (None: not installed)."""

    def found(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "threads": len(os.sched_getaffinity(0)),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "packages": {package: found(package) for package in packages},
    }
