"""`fvjax report`: runs side by side on one page."""

import html
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import tyro

from fvjax import report
from fvjax.commands._runs import Curve, Run, is_number, read_runs
from fvjax.commands._text import InputError, check_new, paragraph, say, write

SCALARS, ROWS, COLUMNS, CURVES, MEASURES = 100, 24, 24, 14, 4
"""What a page shows at most: scalar results, rows of a table of one run, its columns, curves, and panels of them."""

PREFERRED = ("loss", "gradient_variance", "gradient_noise_scale", "total_variance", "noise_scale")

LEVELS = {"memorizes": "bad", "undecided": "unsure", "follows a rule": "good"}


@dataclass(frozen=True)
class Report:
    """Compares runs."""

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="RUN", help="folders of runs or of saved flows, or audit.json files; one or more"),
    ]
    out: Annotated[Path, tyro.conf.arg(metavar="PAGE.html", help="the page")] = Path("report.html")
    title: Annotated[str | None, tyro.conf.arg(help="of the page")] = None
    force: Annotated[bool, tyro.conf.arg(help="replace the page if it is there")] = False


def run(options: Report) -> int:
    """The command; returns its exit status."""
    if not options.runs:
        raise InputError("RUN must be given, one or more")
    check_new(options.out, force=options.force)
    runs = read_runs(options.runs)
    for problem in (problem for found in runs for problem in found.problems):
        say(problem)
    readable = [found for found in runs if not found.is_empty]
    if not readable:
        raise InputError("RUN must be a folder with a run, got none that could be read")
    page = make_page(runs, title=options.title)
    write(options.out, linked(page.to_html(), [page for found in readable for page in found.pages], options.out.parent))
    for found in readable:
        say(paragraph(f"{found.name}: {_summary(found)}"))
    say(f"page: {options.out}")
    return 0


def _summary(found: Run) -> str:
    counts: dict[str, Any] = {"scalar results": found.scalars, "tables": found.tables, "learning curves": found.curves}
    said = [f"{len(part)} {name}" for name, part in counts.items() if part]
    said += [f"{name or 'audit'}: {content['headline'].rstrip('.')}" for name, content in found.audits.items()]
    return "; ".join(said) or "settings only"


def make_page(runs: Sequence[Run], *, title: str | None = None) -> report.Page:
    """The page of a comparison.

    Args:
        runs: one or more; those in which nothing was found are named only.
        title: of the page.

    Returns:
        Page.
    """
    shown = [found for found in runs if not found.is_empty]
    settings = _settings(shown)
    verdicts = Counter(content["pair_memorization"]["verdict"] for found in shown for content in found.audits.values())
    headline = f"{len(shown)} run{'s' * (len(shown) != 1)}"
    if len(shown) > 1:
        headline += f", {len(settings)} setting{'s' * (len(settings) != 1)} that differ" + "s" * (len(settings) == 1)
    if verdicts:
        headline += "; pairs: " + ", ".join(f"{count} x {verdict}" for verdict, count in verdicts.items())
    sections = [_overview(shown)]
    if settings:
        sections.append(_section("Settings that differ", settings, "setting", shown))
    if scalars := _scalars(shown):
        sections.append(_section("Results", scalars, "result", shown))
    sections += [*_conclusions(shown), *_curves(shown), *_tables(shown)]
    return report.Page(
        title=title or "Comparison of runs",
        headline=f"{headline}.",
        sentences=[*_sentences(shown), *_problems(runs)],
        sections=sections,
        config={},
        environment=report.environment(),
    )


def _sentences(runs: Sequence[Run]) -> list[report.Sentence]:
    said = []
    for found in runs:
        for name, content in found.audits.items():
            pairs, samples = (content[part]["verdict"] for part in ("pair_memorization", "data_memorization"))
            level = LEVELS.get(pairs, "info")
            who = f"{found.name}/{name}" if name else found.name
            said.append(report.Sentence(f"{who}: {content['headline']}", level, f"pairs: {pairs}; data: {samples}"))
    return said


def _problems(runs: Sequence[Run]) -> list[report.Sentence]:
    return [report.Sentence(f"Left out: {problem}.", "unsure") for found in runs for problem in found.problems]


def _overview(runs: Sequence[Run]) -> report.Section:
    rows = []
    for found in runs:
        command = str(found.environment.get("command", ""))
        rows.append({"run": found.name, "command": command or None, "device": found.environment.get("device")})
    content: list[Any] = [report.Table({"run": "", "command": "", "device": ""}, rows, "Runs, and what made them.")]
    if any(found.pages for found in runs):
        content += [f"{found.name}: `{_token(page)}`" for found in runs for page in found.pages]
    return report.Section("Runs", content)


def _token(page: Path) -> str:
    """What stands for a link until `linked` puts it in: unique, and harmless if it stays."""
    return page.absolute().as_posix()


def linked(text: str, pages: Sequence[Path], folder: Path) -> str:
    """Turns the paths of pages into links that are relative to the `folder` of the page."""
    for page in pages:
        relative = os.path.relpath(page.absolute(), folder.absolute())
        link = f'<a href="{html.escape(quote(relative))}">{html.escape(relative)}</a>'
        text = text.replace(f"<code>{html.escape(_token(page))}</code>", link)
    return text


def _section(title: str, values: dict[str, list[Any]], heading: str, runs: Sequence[Run]) -> report.Section:
    """A table of names by runs."""
    rows = [
        {"name": name, **{f"run{i}": _shown(value) for i, value in enumerate(line)}} for name, line in values.items()
    ]
    columns = {"name": "", **{f"run{i}": "" for i in range(len(runs))}}
    labels = {"name": heading, **{f"run{i}": found.name for i, found in enumerate(runs)}}
    content: list[Any] = [report.Table(columns, rows[:SCALARS], "", labels)]
    if len(rows) > SCALARS:
        content.append(f"{len(rows) - SCALARS} more are not shown; they are in the runs' own files.")
    return report.Section(title, content)


def _shown(value: Any) -> str | None:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: None}[value]
    if isinstance(value, int | float):
        return f"{value:.5g}" if isinstance(value, float) else f"{value}"
    return value if isinstance(value, str) else json.dumps(value)


def _settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for found in runs for name in found.settings)
    lines = {name: [found.settings.get(name) for found in runs] for name in names}
    return {name: line for name, line in lines.items() if any(value != line[0] for value in line)}


def _scalars(runs: Sequence[Run]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for found in runs for name in found.scalars)
    return {name: [found.scalars.get(name) for found in runs] for name in names}


def _conclusions(runs: Sequence[Run]) -> list[report.Section]:
    said = [f"{found.name}: {text}" for found in runs for text in found.conclusions]
    return [report.Section("What the runs conclude", said)] if said else []


def _curves(runs: Sequence[Run]) -> list[report.Section]:
    """The learning curves, as many of each run as there is room for."""
    from fvjax.commands import _figures

    room = max(1, CURVES // len(runs))
    curves: list[Curve] = [curve for found in runs for curve in found.curves[:room]]
    if not curves:
        return []
    counts = Counter(
        key for _, points in curves for key, n in Counter(k for row in points for k in row).items() if n > 1
    )
    known = [key for key in counts if key not in {"step", "seconds"} and "_bin_" not in key]
    known.sort(key=lambda key: (PREFERRED.index(key) if key in PREFERRED else len(PREFERRED), -counts[key]))
    figure = report.figure_svg(_figures.learning_curves(curves, known[:MEASURES]))
    total = sum(len(found.curves) for found in runs)
    caption = "Learning curves." if total == len(curves) else f"Learning curves: {len(curves)} of {total}."
    alternative = f"{', '.join(known[:MEASURES])} over training steps, one line for each of {len(curves)} curves."
    return [report.Section("Training", [report.Picture(figure, caption, alternative)])]


def _tables(runs: Sequence[Run]) -> list[report.Section]:
    """Tables of results.json that are small in every run, with the run as their first column."""
    content: list[Any] = []
    left_out = []
    for name in dict.fromkeys(name for found in runs for name in found.tables):
        if name.split(".")[-1] == "training":
            continue
        parts = [(found.name, found.tables.get(name, [])) for found in runs]
        if max(len(part) for _, part in parts) > ROWS:
            left_out.append(f"{name} ({', '.join(f'{run}: {len(part)} rows' for run, part in parts)})")
            continue
        rows = [
            {"run": run, **{key: _cell(value) for key, value in row.items()}} for run, part in parts for row in part
        ]
        keys = list(dict.fromkeys(key for row in rows for key in row))[:COLUMNS]
        content.append(report.Table({key: _format(rows, key) for key in keys}, rows, name))
    if left_out:
        content.append(f"Not shown, too long: {'; '.join(left_out)}. They are in results.json of the runs.")
    return [report.Section("Tables", content)] if content else []


def _cell(value: Any) -> Any:
    return value if is_number(value) or value is None else _shown(value)


def _format(rows: Sequence[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    return ".5g" if values and all(is_number(value) for value in values) else ""
