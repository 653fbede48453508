"""The page as a whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fvjax.report import _html
from fvjax.report._content import Section, Sentence, check_section, check_sentence, check_sequence, check_text


@dataclass(frozen=True)
class Page:
    """What a run found, what stands behind it, and how it can be repeated.

    Attributes:
        title: of the page.
        headline: the result in one sentence.
        sentences: of the verdict, each with its level and the numbers behind it.
        sections: everything else, in order.
        config: every option of the run; mappings in it are shown as dotted names.
        environment: versions and machine, as of `environment()`.
        command: that made the run; by default the one in `environment`, if there is one.
        not_tested: what a reader might think was tested, and was not.
        gaussian_panel: whether to show the interactive panel of the Gaussian theory (docs/theory.md, sections 4 and 5).

    Raises:
        ValueError: for a level that is not known, text that is empty, content of another type, or an SVG that would run
            or load something.
    """

    title: str
    headline: str
    sentences: Sequence[Sentence] = ()
    sections: Sequence[Section] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None
    not_tested: Sequence[str] = ()
    gaussian_panel: bool = False

    def __post_init__(self) -> None:
        check_text("title", self.title)
        check_text("headline", self.headline)
        check_sequence("sentences", self.sentences, Sentence)
        check_sequence("sections", self.sections, Section)
        check_sequence("not_tested", self.not_tested, str)
        for name in ("config", "environment"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} must be a mapping, got {getattr(self, name)!r}")
        for sentence in self.sentences:
            check_sentence(sentence)
        for section in self.sections:
            check_section(section)

    def to_html(self) -> str:
        """The page as one file with all styles, scripts and drawings; its content security policy forbids to load any.

        Returns:
            HTML; the same page gives the same text.

        Raises:
            ValueError: if a cell of a table cannot be formatted as its column says.
        """
        names = _html.make_names()
        parts = [_html.verdict(self.headline, self.sentences, self.not_tested)]
        contents = []
        for section in self.sections:
            name = names("section")
            contents.append((name, section.title))
            parts.append(_html.section(section, name, names))
        if self.gaussian_panel:
            contents.append(("gaussian-theory", "Gaussian theory"))
            parts.append(_html.asset("panel.html"))
        command = self.command if self.command is not None else self.environment.get("command")
        shown = {name: value for name, value in self.environment.items() if name != "command"}
        if self.config or shown or command:
            contents.append(("run", "How it was made"))
            parts.append(_html.run(self.config, shown, command))
        return _html.document(self.title, contents, parts, panel=self.gaussian_panel)
