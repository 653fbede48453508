"""One checkpoint on disk: arrays written and read by orbax, beside an index of our own that verifies every file.

    step_000000100/index.json    configuration; shape, dtype and digest of every leaf; size and digest of every file
    step_000000100/state/        orbax, one entry a leaf

The digests of the leaves are those of the host copies, so they cover the whole way to the disk and back. Those of the
files are checked before orbax reads: it names no file, and where one leaf fails, its reads of the others report errors
of their own from closed event loops.
"""

import contextlib
import errno
import functools
import json
import logging
import math
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import jax
import numpy as np

from fvjax.checkpoints import _leaves

UNFINISHED = "unfinished_"
BLOCK = 1 << 20
SYSTEM = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS))


class CheckpointError(RuntimeError):
    """Checkpoints could not be written, or none could be read; the message names the folder and the cause."""


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint could not be read and the one before it is used; the message names the folder and the cause."""


class DamagedError(Exception):
    """A checkpoint's files are not what was written."""


class Entry(TypedDict):
    """A stored leaf: what it is in the state, and the host array that holds its bits (of a typed key: its data)."""

    leaf: _leaves.Spec
    stored: _leaves.Spec
    key_impl: str | None
    digest: str


class File(TypedDict):
    """A stored file."""

    size: int
    digest: str


class Index(TypedDict):
    """What a checkpoint says about itself."""

    step: int
    config: dict[str, Any]
    leaves: dict[str, Entry]
    files: dict[str, File]


def one_line(error: BaseException) -> str:
    """Type and reason of an error: the first line, of long ones (TensorStore's) only the system's reason."""
    first = (str(error).strip().splitlines() or [""])[0]
    reason = first if len(first) < 300 else next((text for text in SYSTEM if text in str(error)), first[:300])
    return f"{type(error).__name__}: {reason}"


@functools.cache
def _orbax() -> Any:
    """A checkpointer in which this process acts alone, and the module of its arguments.

    Uncompressed: random-looking weights shrink by a tenth, and compressing them takes three times as long as writing.
    """
    import orbax.checkpoint as ocp

    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone), ocp.args, ocp.RestoreArgs


def write(path: Path, arrays: Mapping[str, np.ndarray], index: Index) -> None:
    """Writes a checkpoint whole or not at all, and computes the digests.

    Raises:
        CheckpointError: if it could not be written; no part of it is left.
    """
    for name, entry in index["leaves"].items():
        entry["digest"] = _leaves.digest(arrays[name])
    unfinished = path.with_name(UNFINISHED + path.name)
    checkpointer, args, _ = _orbax()
    try:
        _remove(unfinished)
        unfinished.mkdir()
        _check_space(path.parent, sum(array.nbytes for array in arrays.values()))
        with _no_tracebacks_in_the_log():
            checkpointer.save(unfinished / "state", args=args.PyTreeSave({n: a for n, a in arrays.items() if a.size}))
        files = sorted(file for file in unfinished.rglob("*") if file.is_file())
        index["files"] = {str(file.relative_to(unfinished)): _measured(file) for file in files}
        _write_synced(unfinished / "index.json", json.dumps(_sealed(index)))
        unfinished.rename(path)
    except Exception as error:  # of orbax, TensorStore or the system: of many types
        _remove(unfinished)
        raise CheckpointError(
            f"the checkpoint of step {index['step']} could not be written in {path.parent} ({one_line(error)}); older"
            " checkpoints there are intact"
        ) from error


def _check_space(folder: Path, needed: int) -> None:
    """Fails before TensorStore does, whose threads print tracebacks; quotas and inodes are found out by writing."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed / 1e6:.3g} MB needed, {free / 1e6:.3g} free")


def _remove(folder: Path) -> None:
    """Removes a folder into which threads of a failed write may still write for a moment."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


@contextlib.contextmanager
def _no_tracebacks_in_the_log() -> Iterator[None]:
    """Drops what orbax's threads log of an error that its `save` raises as well: two tracebacks for one full disk."""

    def is_no_error_of_orbax(record: logging.LogRecord) -> bool:
        return "_SignalingThread" not in record.getMessage()

    log = logging.getLogger("absl")
    log.addFilter(is_no_error_of_orbax)
    try:
        yield
    finally:
        log.removeFilter(is_no_error_of_orbax)


def _measured(path: Path) -> File:
    size = digest = 0
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(BLOCK):
            size, digest = size + len(block), zlib.crc32(block, digest)
    return {"size": size, "digest": f"{digest:08x}"}


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sealed(index: Index) -> dict[str, Any]:
    text = json.dumps(index, sort_keys=True)
    return {"index": json.loads(text), "digest": f"{zlib.crc32(text.encode()):08x}"}


def read_index(path: Path) -> Index:
    """Reads and verifies a checkpoint's index.

    Raises:
        DamagedError: if it is missing or was changed.
    """
    try:
        found = json.loads((path / "index.json").read_text(encoding="utf-8"))
        index: Index = found["index"]
        intact = _sealed(index)["digest"] == found["digest"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DamagedError(f"index.json: {one_line(error)}") from error
    if not intact:
        raise DamagedError("index.json does not have its digest")
    return index


def read(path: Path, index: Index) -> dict[str, np.ndarray]:
    """Reads and verifies a checkpoint's files and arrays.

    Raises:
        DamagedError: if one is missing or was changed.
    """
    for name, file in index["files"].items():
        _verify_file(path, name, file)
    checkpointer, args, restore_args = _orbax()
    entries = index["leaves"]
    as_numpy = {name: restore_args(restore_type=np.ndarray) for name in entries if not _is_empty(entries[name])}
    try:
        found = checkpointer.restore(path / "state", args=args.PyTreeRestore(restore_args=as_numpy))
    except MemoryError:
        raise
    except Exception as error:  # of orbax, TensorStore or the system: of many types
        raise DamagedError(one_line(error)) from error
    return {name: _verified(name, entry, found) for name, entry in entries.items()}


def _verify_file(path: Path, name: str, expected: File) -> None:
    try:
        found = _measured(path / name)
    except OSError as error:
        raise DamagedError(f"{name}: {one_line(error)}") from error
    if found["size"] != expected["size"]:
        raise DamagedError(f"{name} has {found['size']} bytes instead of {expected['size']}")
    if found["digest"] != expected["digest"]:
        raise DamagedError(f"{name} does not have its digest: its bytes were changed")


def _is_empty(entry: Entry) -> bool:
    return math.prod(entry["stored"]["shape"]) == 0  # orbax refuses to store these


def _verified(name: str, entry: Entry, found: Mapping[str, np.ndarray]) -> np.ndarray:
    stored = entry["stored"]
    array = np.zeros(stored["shape"], np.dtype(stored["dtype"])) if _is_empty(entry) else found.get(name)
    if array is None or _leaves.spec(name, array) != stored:
        raise DamagedError(f"{name} does not have its shape and dtype")
    if _leaves.digest(array) != entry["digest"]:
        raise DamagedError(f"{name} does not have its digest")
    return array
