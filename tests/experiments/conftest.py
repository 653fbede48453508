"""Experiments run in second processes, many of them with the same programs: they share what they have compiled."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import jax
import pytest

from experiments.common import command_line


@pytest.fixture(scope="module", autouse=True)
def quick_children(tmp_path_factory: pytest.TempPathFactory, quick_flags: str) -> Iterator[None]:
    """JAX's cache on disk, common to all workers, and XLA's flags for child processes; one device each.

    This process has read its configuration when it imported JAX, and reads its flags here at the latest.
    """
    jax.devices()
    own = tmp_path_factory.getbasetemp()
    common = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(common / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": quick_flags,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield


class _Text(HTMLParser):
    """What a reader sees of a page from its headline on, without scripts and styles."""

    HIDDEN = ("head", "script", "style")
    INLINE = ("a", "b", "code", "em", "i", "span", "strong", "sub", "sup")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """Blocks are apart, and hidden ones are left out."""
        if tag == "h1":
            self.parts.clear()
        self._hidden += tag in self.HIDDEN
        self.parts.append("" if tag in self.INLINE else " ")

    def handle_endtag(self, tag: str) -> None:
        """The end of either."""
        self._hidden -= tag in self.HIDDEN
        self.parts.append("" if tag in self.INLINE else " ")

    def handle_data(self, data: str) -> None:
        """Text between tags."""
        if not self._hidden:
            self.parts.append(data)


@pytest.fixture(scope="session")
def read_report() -> Callable[[Path], str]:
    """Returns the text of report.html in a run's folder, with single spaces.

    The page is whole, needs no other file, and holds every figure of the run; no partial file is left in the folder.
    """

    def text_of(folder: Path) -> str:
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert page.rstrip().endswith("</html>")
        wanted = re.findall(r'\b(?:src|href|action|data)="([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page)
        assert [found for found in wanted if not found.strip("'\"").startswith(("#", "data:"))] == []
        assert not re.search(r"@import|<(?:link|iframe|object|base)\b", page)
        drawn = [path for path in (folder / "figures").iterdir() if path.suffix == ".pdf"]
        assert page.count('<figure><div class="scroll"') == len(drawn) > 0
        assert not [path for path in folder.glob("**/.*") if "partial" in path.name]
        parser = _Text()
        parser.feed(page)
        return " ".join("".join(parser.parts).split())

    return text_of


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Returns a function that runs a command line which must be refused, in this process, and returns the one line.

    Each experiment has one test of a refusal in a second process, too.
    """

    def run(main: ModuleType, *arguments: str, cwd: Path) -> str:
        name = main.__name__.split(".")[1]
        monkeypatch.chdir(cwd)
        monkeypatch.setenv("HOME", str(cwd))
        monkeypatch.setattr(sys, "argv", [name, "--smoke", *arguments])
        with pytest.raises(SystemExit) as ended:
            command_line(main.Config, main.check, main.main, name)
        errors = capsys.readouterr().err
        assert ended.value.code == 2, errors
        (line,) = errors.strip().splitlines()
        return line

    return run
