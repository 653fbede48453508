"""The checkpoints of one run: which are kept, which is restored, and what happens when a write fails."""

import contextlib
import fcntl
import re
import shutil
import warnings
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import numpy as np

from fvjax import _validate
from fvjax.checkpoints import _config, _disk, _leaves, _processes
from fvjax.checkpoints._disk import CheckpointError, DamagedCheckpointWarning, DamagedError
from fvjax.training import TrainState

State = TypeVar("State", bound=TrainState)
NAME = re.compile(r"step_(\d+)")
DAMAGED = "damaged_"
REMOVED = "removed_"


class Checkpoints:
    """The checkpoints of one run in one folder; a context manager, which waits for the last write at its end.

        with Checkpoints(folder, config=config) as checkpoints:
            state = checkpoints.restore(state) or state
            ...
            checkpoints.save(state)

    A write is in the background: digest, files, the rename that makes it complete, the removal of older ones. Disk
    space is needed for one checkpoint more than are kept; host memory for two copies of the state.

    Args:
        folder: of the checkpoints; made if it does not exist. Several processes must share it.
        config: JSON values that the run depends on, stored with every checkpoint. A folder whose checkpoints have
            another configuration is refused: leave out what may change between two parts of a run (the length of the
            run, where results go), or name it in `ignore`.
        keep_last: how many of the newest checkpoints are kept.
        keep_every: checkpoints whose step is a multiple of it are kept too; None for no such.
        ignore: names in `config` that are stored, but may differ; nested ones with dots.
        read_only: restore only, change nothing in the folder; works beside the run that writes.

    Raises:
        ValueError: if `keep_last` or `keep_every` is no integer >= 1, or `config` holds other than JSON values.
        ConfigMismatchError: if the checkpoints in the folder were made with another configuration.
        CheckpointError: if the folder cannot be written, or another process uses it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: Mapping[str, Any],
        keep_last: int = 3,
        keep_every: int | None = None,
        ignore: Collection[str] = (),
        read_only: bool = False,
    ) -> None:
        _validate.positive_integer("keep_last", keep_last)
        if keep_every is not None:
            _validate.positive_integer("keep_every", keep_every)
        self._config = _config.as_json(config)
        self._folder = Path(folder).absolute()
        self._keep_last, self._keep_every = keep_last, keep_every
        self._ignore = frozenset(ignore)
        self._read_only = read_only
        self._resources = contextlib.ExitStack()
        self._buffers: dict[str, np.ndarray] = {}
        self._pending: Future[None] | None = None
        self._current: int | None = None  # the step that was saved or restored last
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        try:
            _processes.on_first(self._open)
        except BaseException:
            self._resources.close()
            raise

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # the first error is the one to see

    def close(self) -> None:
        """Waits for the last write and lets go of the folder.

        Raises:
            CheckpointError: if that write failed.
        """
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._resources.close()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints in the folder, in ascending order; none of them has been read."""
        found = (NAME.fullmatch(path.name) for path in self._folder.iterdir()) if self._folder.is_dir() else ()
        return sorted(int(match[1]) for match in found if match)

    def save(self, state: TrainState) -> None:
        """Copies the state to the host and writes it in the background; the state may be donated afterwards.

        Waits for the write before it, if that is not finished. Saving the step that was saved or restored last does
        nothing. With several processes the first one writes; the others return at once.

        Raises:
            CheckpointError: if the write before this one failed; nothing of this one has been begun.
            ValueError: if a checkpoint of this or a later step exists that was not restored, if a leaf is neither an
                array nor a number or is not whole on this process, or if this object is read-only or closed.
        """
        if not _processes.is_first():
            return
        self.wait()
        if self._read_only:
            raise ValueError(f"read_only must be False to save, got True for {self._folder}")
        step = int(state.step)
        if step == self._current:
            return
        newest = max(self.steps(), default=-1)
        if step <= newest:
            raise ValueError(
                f"state.step must be above {newest}, the newest checkpoint in {self._folder} (restore it, or use"
                f" another folder), got {step}"
            )
        leaves = _leaves.named_leaves(state)
        entries = {name: _entry(name, leaf) for name, leaf in leaves.items()}
        _leaves.start_copies(leaves)
        self._buffers = {name: _leaves.to_host(name, leaf, self._buffers.get(name)) for name, leaf in leaves.items()}
        for name, entry in entries.items():
            entry["stored"] = _leaves.spec(name, self._buffers[name])
        index: _disk.Index = {"step": step, "config": self._config, "leaves": entries, "files": {}}
        self._pending = self._writer.submit(self._write, index)

    def wait(self) -> None:
        """Returns when everything that was saved is on disk.

        Raises:
            CheckpointError: if it could not be written; then the checkpoints before it are intact.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(self, like: State) -> State | None:
        """Reads the newest good checkpoint: bit for bit what was saved.

        Every array is verified. Damaged checkpoints that are newer than a good one are reported and renamed to
        damaged_step_<number> (those of an earlier time are removed), so that the run can save these steps again.
        With several processes it is a collective call, and all of them get the same state.

        Args:
            like: a state, or one of `jax.ShapeDtypeStruct`, that gives tree, shapes, dtypes and devices.

        Returns:
            The state; None if the folder holds no checkpoint.

        Warns:
            DamagedCheckpointWarning: for every checkpoint that is passed over (on the first process).

        Raises:
            CheckpointError: if there are checkpoints and none of them is good, or a write before this call failed.
            ConfigMismatchError: if it was made with another configuration.
            StateMismatchError: if it does not hold the leaves of `like`.
        """
        arrays: dict[str, np.ndarray] = {}
        index: _disk.Index | None = None
        leaves = _leaves.named_leaves(like)

        def choose() -> dict[str, Any]:
            nonlocal arrays, index
            self.wait()
            damaged = {}
            for step in reversed(self.steps()):
                try:
                    index = self._read_index(step)
                    self._check_config(index)
                    _leaves.compare({name: entry["leaf"] for name, entry in index["leaves"].items()}, leaves)
                    arrays = _disk.read(self._path(step), index)
                except DamagedError as error:
                    damaged[step] = str(error)
                else:
                    return {"step": step, "reports": self._set_aside(damaged)}
            if damaged:
                raise CheckpointError(self._none_is_good(damaged))
            return {"step": None, "reports": []}

        answer = _processes.on_first(choose)
        if _processes.is_first():
            for report in answer["reports"]:
                warnings.warn(report, DamagedCheckpointWarning, stacklevel=2)
        if answer["step"] is None:
            return None
        index, arrays = self._read_as_chosen(answer["step"], index, arrays)
        self._current = answer["step"]
        restored = [
            _leaves.from_host(arrays[name], leaf, index["leaves"][name]["key_impl"]) for name, leaf in leaves.items()
        ]
        state: State = jax.tree.unflatten(jax.tree.structure(like), restored)
        return state

    def _open(self) -> None:
        """Takes hold of the folder, removes what unfinished writes left, and compares configurations."""
        if not self._read_only:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._lock()
                for path in self._folder.iterdir():
                    if path.name.startswith((REMOVED, _disk.UNFINISHED)):
                        shutil.rmtree(path)
            except OSError as error:
                raise CheckpointError(
                    f"the folder of checkpoints must be writable, got {self._folder} ({_disk.one_line(error)})"
                ) from error
        for step in reversed(self.steps()):
            with contextlib.suppress(DamagedError):  # `restore` reports it
                return self._check_config(self._read_index(step))
        return None

    def _lock(self) -> None:
        """Holds a lock on the folder until `close`, or until the process ends in any way."""
        stream = self._resources.enter_context((self._folder / ".lock").open("a+"))
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"the folder of checkpoints must not be in use, got {self._folder}, which another process or another"
                " Checkpoints that was not closed writes to"
            ) from error
        except OSError:  # a file system without locks: as good as it gets
            return

    def _path(self, step: int) -> Path:
        return self._folder / f"step_{step:09d}"

    def _read_index(self, step: int) -> _disk.Index:
        index = _disk.read_index(self._path(step))
        if index["step"] != step:
            raise DamagedError(f"it is of step {index['step']}")
        return index

    def _check_config(self, index: _disk.Index) -> None:
        found = _config.diff_configs(index["config"], self._config, ignore=self._ignore)
        if found:
            raise _config.ConfigMismatchError(
                f"config must be that of the checkpoints in {self._folder}, got (saved -> asked) " + "; ".join(found)
            )

    def _read_as_chosen(
        self, step: int, index: _disk.Index | None, arrays: dict[str, np.ndarray]
    ) -> tuple[_disk.Index, dict[str, np.ndarray]]:
        """What the first process has read already, and the others read now; they fail together."""
        cause = None
        if index is None:
            try:
                index = self._read_index(step)
                arrays = _disk.read(self._path(step), index)
            except DamagedError as error:
                cause = error
        if _processes.any_of(cause is not None) or index is None:
            raise CheckpointError(
                f"all processes must share the folder of checkpoints, got {self._folder}, where step {step} is good"
                f" for the first process only ({cause or 'see the other processes'})"
            ) from cause
        return index, arrays

    def _set_aside(self, damaged: Mapping[int, str]) -> list[str]:
        """Renames damaged checkpoints; returns what to say about each."""
        reports = [f"checkpoint {self._path(step)} is damaged and passed over: {why}" for step, why in damaged.items()]
        if not damaged or self._read_only:
            return reports
        try:
            for old in self._folder.glob(f"{DAMAGED}*"):
                shutil.rmtree(old)
            for path in map(self._path, damaged):
                path.rename(path.with_name(DAMAGED + path.name))
        except OSError as error:
            raise CheckpointError(
                f"the damaged checkpoints in {self._folder} could not be renamed ({_disk.one_line(error)})"
            ) from error
        return [f"{report}; renamed to {DAMAGED}step_<number>, safe to delete" for report in reports]

    def _none_is_good(self, damaged: Mapping[int, str]) -> str:
        found = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
        return (
            f"all checkpoints in {self._folder} are damaged ({found}): bring one back from a backup, or begin a new run"
            " in another folder"
        )

    def _write(self, index: _disk.Index) -> None:
        """In the background: one checkpoint, then the removal of those that are no longer kept."""
        _disk.write(self._path(index["step"]), self._buffers, index)
        self._current = index["step"]
        for step in self.steps()[: -self._keep_last]:
            if self._keep_every and step % self._keep_every == 0:
                continue
            path = self._path(step)
            gone = path.with_name(REMOVED + path.name)
            try:
                path.rename(gone)  # at once, so that a kill leaves no half of a checkpoint under its name
                shutil.rmtree(gone)
            except OSError as error:
                raise CheckpointError(f"{path} could not be removed ({_disk.one_line(error)})") from error


def _entry(name: str, leaf: Any) -> _disk.Entry:
    found = _leaves.spec(name, leaf)
    return {"leaf": found, "stored": found, "key_impl": _leaves.key_impl(leaf), "digest": ""}
