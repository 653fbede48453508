"""A contender in a process of its own (_processes.py starts it): built once, then one answer for every line on stdin.

A process of its own keeps its allocator, its threads and its peak of resident memory to itself. The first line that it
prints has the facts that do not change (value, memory, compilation), every further line what was measured. What goes
wrong ends the process; the last line of its traceback is the message.
"""

import ctypes
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

WARM = 1.0
"""Calls below this many seconds are made twice a round, and the second is timed: caches and threads are awake then."""


class Contender(NamedTuple):
    """`call()` does all the work; `value(result)` is the number to check, `clear()` drops what a call left behind."""

    call: Callable[[], Any]
    value: Callable[[Any], float]
    clear: Callable[[], None]
    facts: dict[str, float]


class Call(NamedTuple):
    """One call: its seconds, the peak of resident bytes since the last reset, and the number that it gives."""

    seconds: float
    peak: int
    value: float


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (peak)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    if found is None:
        raise OSError(f"no {field} in /proc/self/status")
    return 1024 * int(found[1])


def reset_peak() -> int:
    """Returns free memory to the system, forgets the peak (and with it `ru_maxrss`), and gives the resident bytes."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return resident("VmRSS")


def called(contender: Contender) -> Call:
    """One call; only the work is timed, not the reading of its value."""
    start = time.perf_counter()
    result = contender.call()
    seconds = time.perf_counter() - start
    peak = resident("VmHWM")
    value = contender.value(result)
    del result
    contender.clear()
    return Call(seconds, peak, value)


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call; of a second one where the first is short."""
    for _ in range(2):
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        if seconds >= WARM:
            break
    return seconds


def started(step: Callable[[], Any], base: int) -> dict[str, float]:
    """Makes the first three steps of a training, and gives what they cost.

    Args:
        step: one training step, until its result is there.
        base: resident bytes when the imports were done.

    Returns:
        `first_seconds`, of the first step with its compilation; `first_bytes`, the peak up to the second step above
        `base`; `step_bytes`, the peak of the third step above `base`: what a long run takes.
    """
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    step()
    first = resident("VmHWM")
    reset_peak()
    step()
    return {"first_seconds": seconds, "first_bytes": first - base, "step_bytes": resident("VmHWM") - base}


@contextmanager
def answers() -> Iterator[TextIO]:
    """Standard output; what a library prints must not be taken for an answer and goes to standard error."""
    with os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8") as channel:
        os.dup2(2, 1)
        yield channel


def serve(build: Callable[[str, Path], Contender]) -> None:
    """Command line of a worker that makes one call: NAME FILE, the contender's name and the problem's arrays."""
    name, file = sys.argv[1:]
    with answers() as channel:
        contender = build(name, Path(file))
        called(contender)  # whatever is made on the first call only is made here
        base = reset_peak()
        call = called(contender)
        facts = {"value": call.value, "resident_bytes": call.peak - base, **contender.facts}
        print(json.dumps(facts), file=channel)
        for _ in sys.stdin:
            if call.seconds < WARM:
                called(contender)
            call = called(contender)
            print(json.dumps(call.seconds), file=channel)


def serve_parts(build: Callable[[str, dict[str, Any]], tuple[dict[str, Any], Callable[[str], Any]]]) -> None:
    """Command line of a worker that measures what each line asks for: NAME SETTINGS, the latter as JSON.

    `build(name, settings)` gives the facts, and the function from a request to what was measured.
    """
    name, settings = sys.argv[1:]
    with answers() as channel:
        facts, measured = build(name, json.loads(settings))
        print(json.dumps(facts), file=channel)
        for line in sys.stdin:
            print(json.dumps(measured(line.strip())), file=channel)
