"""What every command prints and writes: text on a terminal, bad input as one error, files whole or not at all."""

import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fvjax import report

NARROWEST, WIDEST = 60, 100
"""Bounds on the width of paragraphs, in characters."""


class InputError(ValueError):
    """Something that was given on the command line cannot be used; the message is one line."""


def say(text: str = "") -> None:
    """Prints a line."""
    sys.stdout.write(f"{text}\n")


def paragraph(text: str, *, indent: str = "") -> str:
    """Text that is wrapped to the terminal, indented."""
    width = min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> str:
    """A plain table: `columns` maps a key of the rows to (heading, format); text to the left, numbers to the right."""
    cells = [[heading for heading, _ in columns.values()]]
    cells += [[_cell(row.get(key), form) for key, (_, form) in columns.items()] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    left = [not form for _, form in columns.values()]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(row, widths, left, strict=True)
        ).rstrip()

    return "\n".join(map(line, cells))


def page_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]], caption: str) -> report.Table:
    """The same table for a page."""
    formats = {key: form for key, (_, form) in columns.items()}
    return report.Table(formats, rows, caption, {key: heading for key, (heading, _) in columns.items()})


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def check_new(path: Path, *, force: bool) -> None:
    """Refuses a file that is there already, unless `force`.

    Raises:
        InputError: naming it.
    """
    if path.is_dir():
        raise InputError(f"{path} must be a file, got a folder")
    if path.exists() and not force:
        raise InputError(f"{path} is there already: --force replaces it, --out takes another place")


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all; its folder is made.

    Raises:
        InputError: if it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
