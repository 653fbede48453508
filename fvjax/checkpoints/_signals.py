"""Ends a run between two steps when the scheduler or the user asks for it."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from fvjax.checkpoints import _processes


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """Turns SIGTERM and the first SIGINT into a flag that the training loop reads; restores the handlers at the end.

    ==============  ==============================================================================================
    SIGTERM         sets the flag, however often it comes
    first SIGINT    sets the flag: Ctrl-C ends the run with a checkpoint
    second SIGINT   goes to the handler that was there before, as a rule KeyboardInterrupt: for a step that hangs
    ==============  ==============================================================================================

    Yields:
        stop(), whether a signal has come. With several processes it is a collective call that asks whether one has
        come to any of them, so that all stop at the same step: call it at the same steps on all processes.

    Raises:
        ValueError: outside the main thread, where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ValueError(
            f"stop_on_sigterm must be used in the main thread, got thread {threading.current_thread().name!r}"
        )
    received = threading.Event()

    def handle(number: int, _: FrameType | None) -> None:
        received.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, old[signal.SIGINT])

    old = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGINT)}
    for number in old:
        signal.signal(number, handle)
    try:
        yield lambda: _processes.any_of(received.is_set())
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
