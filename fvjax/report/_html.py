"""The parts of a page as HTML. Every text that comes from outside is escaped here."""

import base64
import hashlib
import html
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from fvjax.report import _svg
from fvjax.report._content import Picture, Section, Sentence, Table

_SIGNS = {"good": ("✓", "good"), "bad": ("✕", "bad"), "unsure": ("?", "undecided"), "info": ("i", "note")}
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; script-src "
)


Names = Callable[[str], str]
"""(kind) -> an id such as "table-2" that was not given before on this page."""


def make_names() -> Names:
    """Numbers every kind on its own."""
    given: Counter[str] = Counter()

    def name(kind: str) -> str:
        given[kind] += 1
        return f"{kind}-{given[kind]}"

    return name


def asset(name: str) -> str:
    """A file of this package."""
    return resources.files("fvjax.report").joinpath(name).read_text(encoding="utf-8")


def text(value: str) -> str:
    """Escaped, with `code` between backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(value))


def verdict(headline: str, sentences: Sequence[Sentence], not_tested: Sequence[str]) -> str:
    """Headline, sentences with their levels, and what was not tested."""
    items = "".join(map(_sentence, sentences))
    listed = f'<ul class="sentences">{items}</ul>' if items else ""
    missing = "".join(f"<li>{text(item)}</li>" for item in not_tested)
    untested = f'<div class="not-tested"><h3>What was not tested</h3><ul>{missing}</ul></div>' if missing else ""
    return (
        '<section class="verdict" aria-labelledby="verdict"><h2 id="verdict">Verdict</h2>'
        f'<p class="headline">{text(headline)}</p>{listed}{untested}</section>'
    )


def _sentence(sentence: Sentence) -> str:
    sign, word = _SIGNS[sentence.level]
    evidence = f'<p class="evidence">{text(sentence.evidence)}</p>' if sentence.evidence else ""
    return (
        f'<li class="sentence {sentence.level}"><span class="badge"><span class="sign" aria-hidden="true">{sign}</span>'
        f' {word}</span><div><p class="claim">{text(sentence.text)}</p>{evidence}</div></li>'
    )


def section(content: Section, name: str, names: Names) -> str:
    """A heading and what stands under it."""
    parts = [_part(item, names) for item in content.content]
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{text(content.title)}</h2>{"".join(parts)}</section>'


def _part(item: str | Table | Picture, names: Names) -> str:
    if isinstance(item, Table):
        return _table(item, names("table"))
    return _picture(item, names("figure")) if isinstance(item, Picture) else f"<p>{text(item)}</p>"


def _picture(picture: Picture, name: str) -> str:
    root = _svg.checked_svg(picture.svg)
    _svg.drawing(root)
    _svg.rename(root, f"{name}-")  # the same figure may stand on a page twice
    title = root.makeelement("title", {"id": f"{name}-title"})
    title.text = picture.alternative
    root.insert(0, title)
    root.attrib.update({"role": "img", "aria-labelledby": f"{name}-title"})
    caption = f'<figcaption id="{name}">{text(picture.caption)}</figcaption>' if picture.caption else ""
    label = f'aria-labelledby="{name}"' if caption else 'aria-label="Figure"'
    return f'<figure><div class="scroll" role="group" {label}>{_svg.to_text(root)}</div>{caption}</figure>'


def _table(table: Table, name: str) -> str:
    """The caption stands before the box that scrolls, not in it: it would be as wide as the table."""
    labels = table.labels or {}
    heads = "".join(
        f'<th scope="col"{_number(form)}>{text(str(labels.get(key, key)))}</th>' for key, form in table.columns.items()
    )
    rows = "".join(f"<tr>{_row(row, table.columns)}</tr>" for row in table.rows)
    rows = rows or f'<tr><td colspan="{len(table.columns)}">No rows.</td></tr>'
    caption = f'<p class="label" id="{name}">{text(table.caption)}</p>' if table.caption else ""
    label = f'aria-labelledby="{name}"' if caption else 'aria-label="Table"'
    return (
        f'<div class="table">{caption}<div class="scroll" role="group" {label}><table {label}><thead><tr>{heads}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div></div>"
    )


def _row(row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    return "".join(f"<td{_number(form)}>{_cell(row, key, form)}</td>" for key, form in columns.items())


def _number(form: str) -> str:
    return ' class="number"' if form else ""


def _cell(row: Mapping[str, Any], key: str, form: str) -> str:
    value = row.get(key)
    if value is None:
        return "–"
    value = value.item() if hasattr(value, "item") and np.ndim(value) == 0 else value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not form:
        return text(str(value))
    try:
        if isinstance(value, float) and math.isinf(value):
            return "∞" if value > 0 else "-∞"
        shown = html.escape(format(value, form))
    except (TypeError, ValueError) as error:
        raise ValueError(f"column {key} must hold values that {form!r} can format, got {value!r}") from error
    return shown.removeprefix("-") if re.fullmatch(r"-0(\.0*)?%?", shown) else shown


def run(config: Mapping[str, Any], environment: Mapping[str, str], command: str | None) -> str:
    """Command, configuration and environment."""
    parts = []
    if command:
        parts.append(
            '<h3>Command</h3><div class="command"><pre><code>'
            f'{html.escape(command)}</code></pre><button type="button" class="copy" hidden>Copy</button></div>'
        )
    for title, entries in (("Configuration", config), ("Environment", environment)):
        rows = "".join(
            f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>'
            for name, value in _flat(entries)
        )
        if rows:
            parts.append(
                f'<h3>{title}</h3><div class="scroll" role="group" aria-label="{title}"><table class="settings">'
                f"<tbody>{rows}</tbody></table></div>"
            )
    return f'<section aria-labelledby="run"><h2 id="run">How it was made</h2>{"".join(parts)}</section>'


def _flat(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in entries.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)


def document(title: str, contents: Sequence[tuple[str, str]], parts: Sequence[str], *, panel: bool) -> str:
    """The whole file."""
    style = asset("page.css") + (asset("panel.css") if panel else "")
    scripts = [asset("page.js")] + [asset(name) for name in ("theory.js", "plots.js", "panel.js") if panel]
    hashes = " ".join(f"'sha256-{_hash(script)}'" for script in scripts)
    entries = "".join(f'<li><a href="#{name}">{text(label)}</a></li>' for name, label in contents)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}{hashes}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            '<a class="skip" href="#main">Skip to the content</a>',
            f"<header><h1>{text(title)}</h1>",
            '<button type="button" id="theme" aria-label="Dark theme" hidden>Dark</button></header>',
            f'<nav aria-label="Contents"><ul>{entries}</ul></nav>' if len(contents) > 1 else "",
            '<main id="main" tabindex="-1">',
            *parts,
            "</main>",
            *(f"<script>{script}</script>" for script in scripts),
            "</body>",
            "</html>",
            "",
        ]
    )


def _hash(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
