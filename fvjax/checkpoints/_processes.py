"""What the first process does, and all processes learn."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from fvjax.checkpoints._config import ConfigMismatchError
from fvjax.checkpoints._disk import CheckpointError, one_line
from fvjax.checkpoints._leaves import StateMismatchError

T = TypeVar("T")
SHARED_ERRORS = {error.__name__: error for error in (CheckpointError, ConfigMismatchError, StateMismatchError)}


def is_first() -> bool:
    """Whether this process writes."""
    return jax.process_index() == 0


def on_first(task: Callable[[], T]) -> T:
    """Runs a task on the first process; all processes return its result or raise its error. A collective call.

    Args:
        task: returns a JSON value.

    Raises:
        CheckpointError: on the other processes, if the task failed with an error that is not one of this package.
    """
    if jax.process_count() == 1:
        return task()
    answer: dict[str, Any] = {}
    failure = None
    if is_first():
        try:
            answer = {"result": task()}
        except Exception as error:  # noqa: BLE001 - the others wait for an answer; raised again below
            failure = error
            known = type(error).__name__ in SHARED_ERRORS
            answer = {"error": type(error).__name__, "message": str(error) if known else one_line(error)}
    answer = json.loads(_broadcast(json.dumps(answer).encode()))
    if failure is not None:
        raise failure
    if "error" in answer:
        raise SHARED_ERRORS.get(answer["error"], CheckpointError)(answer["message"])
    result: T = answer["result"]
    return result


def _broadcast(message: bytes) -> bytes:
    from jax.experimental import multihost_utils

    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    content = np.frombuffer(message, np.uint8) if is_first() else np.zeros(length, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(content)))


def any_of(flag: bool) -> bool:
    """Whether `flag` is true on any process. A collective call."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))
