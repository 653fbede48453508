"""What a page is made of, and its checks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fvjax import _validate
from fvjax.report._svg import checked_svg

LEVELS = ("good", "bad", "unsure", "info")
"""What a sentence can be: each has a word, a sign and a colour on the page."""


class Sentence(NamedTuple):
    """One line of a verdict. `level` is one of LEVELS; `evidence` has the numbers behind it."""

    text: str
    level: str
    evidence: str = ""


class Table(NamedTuple):
    """Rows of numbers and words.

    `columns` maps a key of the rows to a format spec such as ".3g", or "" for text; a key that a row lacks, or None, is
    shown as a dash. `labels` maps keys to headings, by default the key itself.
    """

    columns: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]
    caption: str = ""
    labels: Mapping[str, str] | None = None


class Picture(NamedTuple):
    """An inline SVG, such as `figure_svg` makes. `alternative` tells what it shows to those who cannot see it."""

    svg: str
    caption: str
    alternative: str


class Section(NamedTuple):
    """A part of a page; a str is a paragraph of plain text, in which `backticks` mark code."""

    title: str
    content: Sequence[str | Table | Picture]


def check_text(name: str, value: Any) -> None:
    """Refuses anything but a string that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a text that is not empty, got {value!r}")


def check_sequence(name: str, value: Any, kind: type) -> None:
    """Refuses anything but a sequence of `kind`."""
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise ValueError(f"{name} must be a sequence of {kind.__name__}, got {value!r}")
    for item in value:
        if not isinstance(item, kind):
            raise ValueError(f"{name} must be a sequence of {kind.__name__}, got {item!r} in it")


def check_sentence(sentence: Sentence) -> None:
    """Refuses a level that is not known and texts that are none."""
    check_text("a sentence", sentence.text)
    _validate.one_of("level", sentence.level, LEVELS)
    if not isinstance(sentence.evidence, str):
        raise ValueError(f"evidence must be a text, got {sentence.evidence!r}")


def check_section(section: Section) -> None:
    """Refuses content that is neither text, Table nor Picture, and each of these if it is malformed."""
    check_text("a section's title", section.title)
    if isinstance(section.content, str) or not isinstance(section.content, Sequence):
        raise ValueError(f"content must be a sequence of str, Table and Picture, got {section.content!r}")
    for item in section.content:
        if isinstance(item, Table):
            _check_table(item)
        elif isinstance(item, Picture):
            check_text("a picture's alternative", item.alternative)
            checked_svg(item.svg)
        elif not isinstance(item, str):
            raise ValueError(f"content must be a sequence of str, Table and Picture, got {type(item).__name__} in it")


def _check_table(table: Table) -> None:
    if not isinstance(table.columns, Mapping) or not table.columns:
        raise ValueError(f"columns must map keys to formats, one at least, got {table.columns!r}")
    check_sequence("rows", table.rows, Mapping)
    unknown = sorted(set(table.labels or {}) - set(table.columns))
    if unknown:
        raise ValueError(f"labels must be those of columns, got {', '.join(unknown)}")
