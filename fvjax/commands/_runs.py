"""What a run left in its folder, read for comparison: whatever is there, and what is not by name."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvjax.auditing._fields import one_line

Row = Mapping[str, Any]
Curve = tuple[str, list[dict[str, float]]]

IGNORED = {"out", "resume", "format"}
"""Settings that say nothing about a result."""

OTHERS = {"settings", "published", "environment", "config"}
"""Parts of results.json that are no results."""

POINTS = 400
"""Most points of a curve."""


@dataclass
class Run:
    """Everything that was found; `problems` says in a line each what was not."""

    name: str
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    scalars: dict[str, float | bool] = field(default_factory=dict)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    conclusions: list[str] = field(default_factory=list)
    audits: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    pages: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether nothing at all was found."""
        return not (self.settings or self.scalars or self.tables or self.audits or self.curves)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads runs, named by the shortest ends of their paths that tell them apart."""
    return [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    folders = [(path if path.suffix != ".json" else path.parent).absolute() for path in paths]
    for parts in range(1, max(len(folder.parts) for folder in folders)):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [f"{folder.name} ({i})" for i, folder in enumerate(folders, 1)]


def read_run(path: Path, name: str) -> Run:
    """Reads the folder of a run or of a saved flow, or one audit.json; never fails.

    Args:
        path: of the folder or file.
        name: under which the run appears.

    Returns:
        Run.
    """
    if path.suffix == ".json" and not path.is_dir():
        run = Run(name, path.parent)
        _read_audit(run, path, "")
        _add_pages(run)
        return run
    run = Run(name, path)
    if not path.is_dir():
        run.problems.append(f"{path} is no folder")
        return run
    _read_config(run)
    _read_results(run)
    for file in sorted([path / "audit.json", *path.glob("flows/[!.]*/audit.json")]):
        if file.is_file():
            _read_audit(run, file, "" if file.parent == path else file.parent.name)
    _read_curves(run)
    _add_pages(run)
    flows = [file.parent.name for file in path.glob("flows/[!.]*/flow.json")]
    if unaudited := sorted(set(flows) - set(run.audits)):
        run.problems.append(f"flows of {path} that no audit was made of: {', '.join(unaudited)}; `fvjax audit {path}`")
    elif run.is_empty:
        run.problems = [f"{path} has no config.json, results.json, metrics.csv or audit.json that could be read"]
    return run


def _add_pages(run: Run) -> None:
    pages = [run.folder / "report.html", *sorted(run.folder.glob("flows/[!.]*/report.html"))]
    run.pages = [page for page in pages if page.is_file()]


def _json_of(run: Run, name: str) -> Any:
    """The content of a file; None, and a line in `problems`, if it is not there or damaged."""
    try:
        content = json.loads((run.folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        run.problems.append(f"{run.folder / name} cannot be read ({one_line(error)})")
        return None
    if not isinstance(content, dict):
        run.problems.append(f"{run.folder / name} must hold a JSON object")
        return None
    return content


def _read_config(run: Run) -> None:
    content = _json_of(run, "config.json")
    if content is None:
        flow = _json_of(run, "flow.json") or {}
        if isinstance(flow.get("interpolant"), list):
            flow["interpolant"] = dict(zip(("name", "arguments"), flow["interpolant"], strict=False))
        content = {"config": flow}
    parts = [content.get("config", content), content.get("settings", {})]
    for part in parts:  # settings: what the options came to, where a run derives it from them
        run.settings |= {key: value for key, value in flat(part) if key.split(".")[0] not in IGNORED}
    environment = content.get("environment")
    run.environment = environment if isinstance(environment, dict) else {}


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names; everything else as it is."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flat(item, f"{name}.{key}" if name else str(key))
    elif name:
        yield name, value


def _read_results(run: Run) -> None:
    content = _json_of(run, "results.json")
    if content is None:
        if run.settings and (run.folder / "config.json").is_file() and not run.problems:
            run.problems.append(f"{run.folder} has no results.json: that run has not finished")
        return
    for name, value in flat({key: item for key, item in content.items() if key not in OTHERS}):
        if isinstance(value, bool | int | float):
            run.scalars[name] = value
        elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            run.tables[name] = value
        elif name.split(".")[-1] == "conclusions" and isinstance(value, list):
            run.conclusions += [text for text in value if isinstance(text, str)]


def _read_audit(run: Run, path: Path, name: str) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for part in ("pair_memorization", "data_memorization"):
            str(content[part]["verdict"])
        str(content["headline"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        run.problems.append(f"{path} is no audit that could be read ({one_line(error)})")
        return
    run.audits[name] = content


def _read_curves(run: Run) -> None:
    from fvjax.training._logs import read_metrics

    files = [run.folder / "metrics.csv", *sorted(run.folder.glob("*/*/metrics.csv"))]
    for file in files:
        if not file.is_file():
            continue
        try:
            rows = read_metrics(file)
        except (OSError, ValueError) as error:
            run.problems.append(f"{file} cannot be read ({one_line(error)})")
            continue
        label = run.name if file.parent == run.folder else f"{run.name}: {file.parent.name}"
        if len(rows) > 1:
            run.curves.append((label, _thinned(rows)))
    if not run.curves:
        for name, table in run.tables.items():
            if name.split(".")[-1] == "training":
                run.curves += _curves_in(table, run.name)


def _thinned(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    every = -(-len(rows) // POINTS)
    return rows[::every]


def _curves_in(rows: Sequence[Row], name: str) -> Iterator[Curve]:
    """Learning curves one below the other: a new one begins where the step goes back."""
    parts: list[list[Row]] = []
    for row in rows:
        if not isinstance(row.get("step"), int | float):
            return
        if not parts or row["step"] <= parts[-1][-1]["step"]:
            parts.append([])
        parts[-1].append(row)
    for part in parts:
        first = part[0]
        fixed = [key for key, value in first.items() if key != "step" and all(row.get(key) == value for row in part)]
        varied = [key for key in fixed if len(part) > 1 and any(other[0].get(key) != first[key] for other in parts)]
        label = ", ".join(_named(key, first[key]) for key in varied)
        points = [{key: value for key, value in row.items() if is_number(value) and key not in fixed} for row in part]
        if len(points) > 1:
            yield (f"{name}: {label}" if label else name), _thinned(points)


def _named(key: str, value: Any) -> str:
    return value if isinstance(value, str) else f"{key} {value:g}" if is_number(value) else f"{key} {value}"


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
