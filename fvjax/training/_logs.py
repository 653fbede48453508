"""What a run tells: a progress line on stderr, and its metrics as CSV and TensorBoard files."""

import csv
import math
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from tqdm import tqdm

LOG_SECONDS = 10.0
"""How often a run without a terminal prints a line of progress."""


class Progress:
    """How far a loop is: a bar with rate and remaining time on a terminal, plain lines in a log; stderr."""

    def __init__(self, label: str, total: int, first: int = 0) -> None:
        """Begins at `first` of `total`; only the first process of several prints."""
        self._label, self._total, self._first = label, total, first
        self._silent = jax.process_index() != 0
        self._start = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty() and not self._silent:
            self._bar = tqdm(desc=label, total=total, initial=first, leave=False)

    def update(self, done: int, loss: float | None = None) -> None:
        """Shows that `done` are done, and the loss where there is one."""
        if self._bar is not None:
            if loss is not None:
                self._bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if not self._silent and (now - self._last >= LOG_SECONDS or done == self._total):
            self._last, rate = now, (done - self._first) / (now - self._start)
            left = f"{rate:.3g}/s, {(self._total - done) / rate:.0f} s left"
            shown = "" if loss is None else f", loss {loss:.4g}"
            print(f"{self._label}: {done}/{self._total}, {left}{shown}", file=sys.stderr)  # noqa: T201

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()


class MetricsLog:
    """Scalars by step: metrics.csv, and TensorBoard event files in tensorboard/ beside it.

    A resumed run begins with what was written up to its step; later rows, of steps that were lost, are removed from
    the CSV file and hidden by TensorBoard. When `write` returns the row is in the CSV file, also if the process is
    killed then; the event file follows in the background. Only the first process of several writes.
    """

    def __init__(self, folder: Path, *, step: int = 0) -> None:
        """Opens the log of the run in `folder`, which must exist, at a run's `step`."""
        self._path = folder / "metrics.csv"
        self._active = jax.process_index() == 0
        self.rows: list[dict[str, Any]] = []
        self._board = None
        if not self._active:
            return
        self.rows = [row for row in read_metrics(self._path) if row["step"] <= step]
        self._rewrite()
        from tensorboardX import SummaryWriter

        # tensorboardX names files by the second: two starts within one would write to the same file.
        suffix = f".{time.time_ns()}"
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1, filename_suffix=suffix)

    def write(self, step: int, **values: float) -> None:
        """Adds one row; a new name adds a column."""
        if not self._active:
            return
        known = self._columns()
        # As floats, so that the row of a resumed run, which was read from the file, is written with the same digits.
        values = {name: float(value) for name, value in values.items()}
        self.rows.append({"step": step, **values})
        if self._columns() == known and len(self.rows) > 1:
            with self._path.open("a", newline="") as stream:
                csv.DictWriter(stream, known).writerow(self.rows[-1])
        else:
            self._rewrite()
        for name, value in values.items():
            if not math.isfinite(value):
                continue  # TensorBoard cannot draw it, and tensorboardX would complain in every row
            self._board.add_scalar(name, value, step)  # type: ignore[union-attr]
        self._board.flush()  # type: ignore[union-attr]

    def _columns(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def _rewrite(self) -> None:
        partial = self._path.with_name(".metrics.csv.partial")
        with partial.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, self._columns() or ["step"])
            writer.writeheader()
            writer.writerows(self.rows)
        partial.replace(self._path)

    def close(self) -> None:
        """Closes the event file."""
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.csv as numbers; a last line that was cut off by a kill is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    rows = list(csv.DictReader(whole.splitlines()))
    return [{name: (int if name == "step" else float)(value) for name, value in row.items() if value} for row in rows]
