"""An audit as plain text."""

import textwrap
from typing import TYPE_CHECKING

from fvjax.auditing._tables import tables, text_table

if TYPE_CHECKING:
    from fvjax.auditing._result import Audit

WIDTH = 100
SIGNS = {"good": "+", "bad": "!", "unsure": "?", "info": "-"}


def as_text(audit: "Audit") -> str:
    """Headline, sentences with their evidence, what was not tested, and the tables."""
    lines = [*textwrap.wrap(audit.headline, WIDTH), ""]
    for sentence in audit.sentences:
        lines += _item(sentence.text, SIGNS[sentence.level])
        if sentence.evidence:
            lines += textwrap.wrap(f"({sentence.evidence})", WIDTH, initial_indent="    ", subsequent_indent="     ")
    lines += ["", "Not tested"]
    for text in audit.not_tested:
        lines += _item(text, "-")
    for title, found in tables(audit):
        lines += ["", title]
        for table in found:
            lines += textwrap.wrap(table.caption, WIDTH - 2, initial_indent="  ", subsequent_indent="  ")
            lines += [f"    {line}" for line in text_table(table)]
    settings = audit.settings
    chosen = next(row.name for row in audit.solvers.rows if row.chosen)
    lines += [
        "",
        *textwrap.wrap(
            f"{settings.pairs} pairs of shape {list(settings.dims)}, {settings.dtype}; interpolant"
            f" {settings.interpolant}; {settings.sources} training sources, {settings.held_out_sources} held-out ones,"
            f" solver {chosen}, {settings.draws} path samples; shares with {100 * settings.level:.3g}% Wilson"
            " intervals.",
            WIDTH,
        ),
    ]
    return "\n".join(lines)


def _item(text: str, sign: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{sign} ", subsequent_indent="  ")
