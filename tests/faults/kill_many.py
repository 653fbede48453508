"""Kills a training run at random moments until it is done, again and again, and compares it with one that was not.

    python tests/faults/kill_many.py --runs 20

2 CPU cores, shared with other work: 7 minutes. Expected: every run ends with the state and the metrics.csv of the
uninterrupted one, bit for bit; exits 1 if one does not. `test_training_kill.py` does the same with three kills.
"""

import argparse
import os
import random
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

TRAIN = Path(__file__).with_name("train.py")
REPOSITORY = Path(__file__).resolve().parents[2]


class Life(NamedTuple):
    """One process: after how long it was killed (None: it ended by itself), its first and last step, its digest."""

    killed: float | None
    first: int | None
    last: int | None
    digest: str | None


def train():
    """What `train.py` defines."""
    return SimpleNamespace(**runpy.run_path(str(TRAIN), run_name="train"))


def start(folder, *arguments, devices=1):
    """A process that trains in `folder`; all share what was compiled, so that they start quickly."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    platform = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(REPOSITORY),
    }
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, str(TRAIN), str(folder), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | platform | cache,
    )


def live(process, seconds=None, *, lines=0):
    """Kills the process so long after its start, or after it has said so many lines; or waits for its end."""
    said = "".join(process.stdout.readline() for _ in range(lines))
    try:
        rest, errors = process.communicate(timeout=120 if seconds is None else seconds)
        seconds = None
    except subprocess.TimeoutExpired:
        process.kill()
        rest, errors = process.communicate()
    if seconds is None and process.returncode != 0:
        raise RuntimeError(f"the run must end or be killed, got {process.returncode}:\n{errors}")
    words = [line.split() for line in (said + rest).splitlines()]
    steps = [int(first) for first, *_ in words if first != "end"] or [None]
    return Life(seconds, steps[0], steps[-1], words[-1][2] if words and words[-1][0] == "end" else None)


def run_with_kills(folder, moment, kills):
    """The lives of a run that is killed at `moment()` = (lines, seconds), at most `kills` times, until it ends."""
    lives = []
    while not lives or lives[-1].digest is None:
        lines, seconds = moment() if len(lives) < kills else (0, None)
        lives.append(live(start(folder), seconds, lines=lines))
    return lives


def main():
    """Prints a table, one line a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=6, help="at most so many in one run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, wrong, done = random.Random(options.seed), 0, 0
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        for name in ("compiling", "whole"):  # the first fills the cache of compiled programs
            now = time.monotonic()
            expected = live(start(Path(root, name)))
            duration = time.monotonic() - now
        metrics = Path(root, "whole", "metrics.csv").read_bytes()
        say(f"uninterrupted: {duration:.1f} s, {expected.digest[:12]}")
        say(f"{'run':>4} {'kills':>5}  {'first and last step of each process':60} state   metrics")
        while done < options.runs:
            folder = Path(root, f"run_{done}")
            lives = run_with_kills(folder, lambda: (0, chance.uniform(0, duration)), options.kills)
            if len(lives) == 1:  # it ended before its first moment: another try
                shutil.rmtree(folder)
                continue
            done += 1
            same = lives[-1].digest == expected.digest, (folder / "metrics.csv").read_bytes() == metrics
            wrong += not all(same)
            steps = " ".join("-" if life.first is None else f"{life.first}..{life.last}" for life in lives)
            verdict = " ".join(f"{'same' if right else 'WRONG':7}" for right in same)
            say(f"{done:4} {len(lives) - 1:5}  {steps:60} {verdict}")
    say(f"{done} runs, {wrong} wrong, {time.monotonic() - begun:.0f} s")
    sys.exit(wrong > 0)


def say(line):
    """Prints at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
