"""The result of an audit: its parts, its words, and how it is written and read."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fvjax.auditing import _json
from fvjax.auditing._types import (
    CriticalNoise,
    DataMemorization,
    GradientVariance,
    Identifiability,
    MinimiserDistance,
    OptimalTransport,
    PairMemorization,
    Settings,
    SolverSensitivity,
    Straightness,
)
from fvjax.report import Sentence

if TYPE_CHECKING:
    from fvjax.report import Page


@dataclass(frozen=True)
class Audit:
    """What `fvjax.audit` found: `str(audit)` is a report in plain text, `to_html` a page, `to_json` all numbers.

    Attributes:
        headline: the verdict on the pairs in one sentence.
        sentences: what was found, in plain words; each with its level and the numbers behind it.
        not_tested: what this audit does not say, and what would have to be given for it.
        pair_memorization: does the flow return the training pairs, and is that memory or a rule?
        data_memorization: are samples copies of training targets, whichever source they came from?
        solvers: does that depend on the solver?
        straightness: of the trajectories of the training sources.
        gradients: variance and noise scale of the gradient; None for a field without floating-point parameters.
        identifiability: does a point on the path still name its pair?
        critical_noise: the noise at which the exact minimiser lets go of the pairs.
        minimiser: is the field just the exact minimiser of the pairs?
        optimal_transport: against given optimal-transport targets, or None.
        settings: what was audited and how.
    """

    headline: str
    sentences: tuple[Sentence, ...]
    not_tested: tuple[str, ...]
    pair_memorization: PairMemorization
    data_memorization: DataMemorization
    solvers: SolverSensitivity
    straightness: Straightness
    gradients: GradientVariance | None
    identifiability: Identifiability
    critical_noise: CriticalNoise
    minimiser: MinimiserDistance
    optimal_transport: OptimalTransport | None
    settings: Settings

    def __str__(self) -> str:
        """The report as plain text: sentences wrapped at 100 characters, tables below."""
        from fvjax.auditing._text import as_text

        return as_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts and lists by field name; floats that are not finite as the strings "Infinity", ..., None stays.

        Returns:
            What `json.dumps` takes.
        """
        found: dict[str, Any] = _json.plain(self)
        return found

    def to_json(self, path: str | Path | None = None) -> str:
        """Strict JSON, from which `from_json` makes an equal Audit.

        Args:
            path: a file to write, too.

        Returns:
            The text.
        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> "Audit":
        """The inverse of `to_json`.

        Args:
            source: the text, or the path of the file (a str that does not begin with "{" is a path).

        Returns:
            Audit, equal to the one that was written.

        Raises:
            ValueError: if it is no JSON, or not that of an Audit (naming the field).
            OSError: if there is no such file.
        """
        text = (
            source if isinstance(source, str) and source.lstrip().startswith("{") else Path(source).read_text("utf-8")
        )
        return _json.restored(cls, json.loads(text))

    def to_page(self, command: str | None = None) -> "Page":
        """The report as a page of sections, tables and figures.

        Args:
            command: what made the audit, shown for repeating it; None shows the command of this process.

        Returns:
            fvjax.report.Page.
        """
        from fvjax.auditing._page import as_page

        return as_page(self, command)

    def to_html(self, path: str | Path | None = None, command: str | None = None) -> str:
        """The page as one self-contained HTML file.

        Args:
            path: a file to write, too.
            command: as in `to_page`.

        Returns:
            The HTML.
        """
        text = self.to_page(command).to_html()
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text
