"""What every experiment does around its computation: command line, run folder, results, progress."""

import contextlib
import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure

from fvjax.checkpoints import (
    CheckpointError,
    Checkpoints,
    ConfigMismatchError,
    StateMismatchError,
    stop_on_sigterm,
)
from fvjax.data import DataError
from fvjax.report import Page, environment, figure_svg
from fvjax.training import MetricsLog, NonFiniteLossError, Progress, TrainState, TrainStep, fit

Config = TypeVar("Config")
Item = TypeVar("Item")


class SettingsError(ValueError):
    """Options that do not fit the data or the machine, which is known only when the run has begun."""


class RunFolder:
    """A new folder that receives the files of one run, each written whole or not at all.

    Attributes:
        path: of the folder.
        drawn: the figures of this run as SVG, by name, in the order in which they were drawn.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        """Creates the folder, or takes that of an earlier run to `resume`. Only the first process writes into it.

        Raises:
            ValueError: if it exists and is not an empty folder, or does not where there is a run to resume.
        """
        self.path = path
        self.drawn: dict[str, str] = {}
        self._writes = jax.process_index() == 0
        if resume and not path.is_dir():
            raise ValueError(f"--out must be the folder of a run where --resume is given, got {path}")
        if not self._writes:
            return
        if not resume and path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"--out must be a new or an empty folder, got {path}")
        path.mkdir(parents=True, exist_ok=True)

    def remove_if_empty(self) -> None:
        """Removes the folder if nothing has been written into it."""
        if self._writes and not any(self.path.iterdir()):
            self.path.rmdir()

    def write_json(self, name: str, content: Any) -> None:
        """Writes JSON; non-finite numbers as NaN and Infinity, which Python's json reads back."""
        self._write(name, (json.dumps(_plain(content), indent=1) + "\n").encode())

    def write_csv(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes rows as CSV; a key that a row lacks is left empty."""
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(_plain(list(rows)))
        self._write(name, stream.getvalue().encode())

    def write_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes arrays as .npz."""
        stream = io.BytesIO()
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
        self._write(name, stream.getvalue())

    def write_figure(self, name: str, figure: Figure, rows: Sequence[Mapping[str, Any]] | None) -> None:
        """Writes a figure as PNG and PDF, and the numbers that it shows, if it shows numbers, as CSV beside it.

        Its drawing is kept in `drawn` for the report.
        """
        if not self._writes:
            return
        folder = RunFolder(self.path / "figures", resume=(self.path / "figures").is_dir())
        for ending in ("png", "pdf"):
            with _whole(folder.path / f"{name}.{ending}") as partial:
                figure.savefig(partial, dpi=150, metadata={"CreationDate": None} if ending == "pdf" else None)
            figure.set_layout_engine(None)  # the layout is done, and the slowest part; "none" would still draw twice
        if rows is not None:
            folder.write_csv(f"{name}.csv", rows)
        self.drawn[name] = figure_svg(figure)

    def write_report(self, page: Page) -> None:
        """Writes report.html: one file that needs no other."""
        self._write("report.html", page.to_html().encode())

    def _write(self, name: str, content: bytes) -> None:
        if not self._writes:
            return
        with _whole(self.path / name) as partial:
            partial.write_bytes(content)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Another path, which takes the place of `path` in the end, or is removed if that is not reached."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Arrays, numpy scalars and paths as what json and csv understand."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return np.asarray(value).tolist()
    return str(value) if isinstance(value, Path) else value


def open_run(experiment: str, out: Path | None, *, resume: bool = False) -> RunFolder:
    """The folder `out`, or runs/<experiment>/<time> in the current directory.

    Raises:
        ValueError: if it exists and is not an empty folder, or does not where there is a run to resume.
    """
    stamp = f"{datetime.now():%Y%m%d-%H%M%S-%f}"
    return RunFolder(out if out is not None else Path("runs") / experiment / stamp, resume=resume)


class Cells:
    """The rows of a run made of independent cells: each is computed, or read where an earlier start finished it.

    Attributes:
        rows: of all cells so far.
        training: their learning curves.
    """

    def __init__(self, folder: RunFolder) -> None:
        """Cells are kept in cells/ of the run's folder."""
        self._path = folder.path / "cells"
        self._folder = RunFolder(self._path, resume=self._path.is_dir())
        self.rows: list[dict[str, Any]] = []
        self.training: list[dict[str, Any]] = []

    def add(self, name: str, compute: Callable[[], tuple[list[dict[str, Any]], list[dict[str, Any]]]]) -> None:
        """Adds the rows and the learning curve of one cell, which are then kept under its name."""
        path = self._path / f"{name}.json"
        if path.is_file():
            kept = json.loads(path.read_text())
            rows, training = kept["rows"], kept["training"]
        else:
            rows, training = compute()
            self._folder.write_json(path.name, {"rows": rows, "training": training})
        self.rows += rows
        self.training += training


def keep_config(wanted: Mapping[str, Any], folder: RunFolder, *, resume: bool) -> None:
    """Writes config.json, or compares it with that of the run that is resumed.

    Args:
        wanted: every option that the results depend on.
        folder: of the run.
        resume: whether a run in that folder goes on.

    Raises:
        SettingsError: if that run had other settings.
    """
    wanted = json.loads(json.dumps(wanted, default=str))
    path = folder.path / "config.json"
    if resume and path.is_file():
        kept = json.loads(path.read_text())["config"]
        other = sorted(key for key in wanted if wanted[key] != kept.get(key))
        if other:
            option = other[0].replace("_", "-")
            raise SettingsError(f"--{option} must be that of the run, {kept.get(other[0])}, got {wanted[other[0]]}")
        return
    folder.write_json("config.json", {"config": wanted, "environment": environment()})


class Stopped(Exception):
    """SIGTERM came: the checkpoint is written, the run can be resumed."""


def fit_kept(
    place: Path,
    first: Callable[[], TrainState],
    step: TrainStep,
    task: Any,
    *,
    like: TrainState,
    config: Mapping[str, Any],
    steps: int,
    log_every: int,
    save_every: int,
    measure: Callable[[TrainState], Mapping[str, Any]],
    label: str,
) -> tuple[TrainState, list[dict[str, float]]]:
    """`training.fit` with checkpoints and metrics.csv in a folder, from its newest checkpoint on.

    Args:
        place: folder of this network, made if it does not exist.
        first: makes the state of a new training.
        step: of the training.
        task: what every step is given.
        like: shapes of the state.
        config: all that the training depends on.
        steps: in all; a training that has them already returns at once.
        log_every: as in `fit`.
        save_every: as in `fit`.
        measure: (state) -> numbers that are logged beside the loss.
        label: of the progress line.

    Returns:
        The final state, and the rows of metrics.csv.

    Raises:
        Stopped: on SIGTERM.
        NonFiniteLossError, CheckpointError, ConfigMismatchError: see there.
    """
    place.mkdir(parents=True, exist_ok=True)
    with Checkpoints(place / "checkpoints", config=config, keep_last=1) as kept, stop_on_sigterm() as stop:
        state = kept.restore(like)
        state = first() if state is None else state
        with MetricsLog(place, step=int(state.step)) as log:

            def on_log(state: TrainState, loss: float) -> None:
                log.write(int(state.step), loss=loss, **{k: float(v) for k, v in measure(state).items()})

            options = {"log_every": log_every, "on_log": on_log, "save_every": save_every, "save": kept.save}
            state, _ = fit(state, step, task, steps=steps, stop=stop, progress=label, **options)  # type: ignore[arg-type]
            if int(state.step) < steps:
                raise Stopped(f"{label} at step {int(state.step)} of {steps}")
            return state, log.rows


def progress(items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
    """Passes `items` on and shows how far they are: a bar with rate and ETA on a terminal, plain lines in a log."""
    bar = Progress(label, total)
    for done, item in enumerate(items, 1):
        yield item
        bar.update(done)
    bar.close()


def compiled_quickly(function: Callable[..., Any]) -> Callable[..., Any]:
    """For a function that runs once: the draws of a U-Net's parameters take 20 s to compile with all optimizations."""
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=quick)


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A plain text table: `columns` maps a key of the rows to a format such as ".3g" ("" for text)."""
    cells = [list(columns)] + [[_cell(row.get(key), form) for key, form in columns.items()] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def command_line(
    config_type: type[Config], check: Callable[[Config], None], main: Callable[[Config, RunFolder], Any], name: str
) -> None:
    """Parses, checks and runs; then prints the names of the report and of the folder.

    One line and exit 2 on bad input, one line and exit 1 on a loss or a sample that is not finite or a checkpoint that
    cannot be written. A folder that is still empty then is removed.

    Args:
        config_type: frozen dataclass with a field `out: Path | None`, and `resume: bool` if runs can be resumed; its
            docstring is the help text.
        check: raises ValueError on bad values.
        main: the experiment; DataError, ConfigMismatchError and SettingsError in it count as bad input.
        name: of the experiment.
    """
    config = tyro.cli(config_type, prog=f"python -m experiments.{name}")
    try:
        check(config)
        folder = open_run(name, config.out, resume=getattr(config, "resume", False))  # type: ignore[attr-defined]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        main(config, folder)
    except (DataError, ConfigMismatchError, StateMismatchError, SettingsError) as error:
        print(f"error: {error}", file=sys.stderr)
        folder.remove_if_empty()
        sys.exit(2)
    except (NonFiniteLossError, CheckpointError, FloatingPointError) as error:
        print(f"error: {error}; what was finished is in {folder.path}", file=sys.stderr)
        sys.exit(1)
    if jax.process_index() == 0:
        if (folder.path / "report.html").is_file():
            print(f"report: {folder.path / 'report.html'}")
        print(f"results: {folder.path}")
