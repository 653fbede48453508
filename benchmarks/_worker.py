"""One contender in a process of its own: built once, then one timed call for every line on standard input.

A process of its own keeps its allocator, its threads and its peak of resident memory to itself. The first line that it
prints has the facts that do not change (value, memory, compilation), every further line the seconds of one call. What
goes wrong ends the process; the last line of its traceback is the message.
"""

import ctypes
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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


def serve(build: Callable[[str, Path], Contender]) -> None:
    """Command line of a worker: NAME FILE, the contender's name and the problem's arrays."""
    name, file = sys.argv[1:]
    with os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8") as channel:
        os.dup2(2, 1)  # what a library prints must not be taken for an answer
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
