"""How the tests of faults start real processes and compare states bit for bit."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

CHILD = Path(__file__).with_name("child.py")
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def child() -> SimpleNamespace:
    """The functions of `child.py`: `state_at(step)`, `same(a, b)` and `names(folder)`."""
    return SimpleNamespace(**runpy.run_path(str(CHILD), run_name="child"))


@pytest.fixture
def start(repository: Path) -> Iterator[Start]:
    """Runs `child.py` with arguments, after the command `before`, on one CPU device; killed at the end of the test."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(repository),
        "PYTHONWARNINGS": "error::UserWarning:fvjax",
    }
    running = []

    def run(*arguments: object, before: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
        command = [*before, sys.executable, str(CHILD), *map(str, arguments)]
        pipe = subprocess.PIPE
        running.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment))
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.communicate()
