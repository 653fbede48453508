"""The page as text: escaped, self-contained, the same every time, well-formed; and bad input is refused."""

import base64
import hashlib
import itertools
import re
import sys
import types
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import fvjax
from fvjax.report import LEVELS, Page, Picture, Section, Sentence, Table, environment, figure_svg
from fvjax.report._figure import DARK_PAGE, LEAST_CONTRAST, contrast, on_dark

VOID = {"meta", "input", "br", "img", "link", "hr"}
HOSTILE = "<script>alert(1)</script> \"quoted\" 'single' & </title></style></svg> <img src=x onerror=alert(1)>"
SQUARE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"><path d="M0 0h1v1z"/></svg>'


class Document(HTMLParser):
    """Elements and texts in order; every tag must be closed in its turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Opens an element."""
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element that closes itself, as in SVG."""
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """Closes the innermost element."""
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Text belongs to the innermost element."""
        if self._open:
            self.texts.append((self._open[-1], data))

    def values(self, attribute: str) -> list[str]:
        """What an attribute is, wherever there is one."""
        return [attrs[attribute] or "" for _, attrs in self.elements if attribute in attrs]

    def text_in(self, tag: str) -> list[str]:
        """The pieces of text in elements of this kind."""
        return [text for name, text in self.texts if name == tag]


def lines() -> Figure:
    """A black frame, a dark blue and a grey line."""
    figure = Figure(figsize=(3, 2))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], label="navy", color="navy")
    axes.plot([0, 1], [1, 0], marker="o", color="0.3")
    axes.set_xlabel("time t")
    axes.legend()
    return figure


def heat() -> Figure:
    """A colour scale, with rasterized points and white text on it."""
    figure = Figure(figsize=(3, 2))
    axes = figure.subplots()
    mesh = axes.pcolormesh(np.arange(12.0).reshape(3, 4), cmap="viridis")
    axes.scatter(np.arange(3), np.arange(3), color="black", rasterized=True)
    axes.text(1, 1, "inside", color="white")
    figure.colorbar(mesh, ax=axes)
    return figure


@pytest.fixture(scope="module")
def drawings() -> tuple[str, str]:
    """One figure of lines, one with a colour scale."""
    return figure_svg(lines()), figure_svg(heat())


def page(text: str = "plain", drawings: tuple[str, ...] = (), **changes: Any) -> Page:
    """A page with everything in it, and `text` wherever there can be text."""
    content: list[str | Table | Picture] = [
        text,
        Table({"name": "", "value": ".3g"}, [{"name": text, "value": 1.5}], text, {"name": text}),
        *(Picture(svg, text, text) for svg in drawings),
    ]
    options: dict[str, Any] = {
        "sentences": [Sentence(text, level, text) for level in LEVELS],
        "sections": [Section(text, content), Section("second", ["more"])],
        "config": {"steps": 3, "net": {text: [1, None, True]}},
        "environment": {"jax": "1", "command": "python -m nothing"},
        "not_tested": [text],
        "gaussian_panel": True,
    }
    return Page(text, text, **{**options, **changes})


def test_texts_are_escaped(drawings: tuple[str, str]) -> None:
    """Catches any place where a name from a run could become markup."""
    plain, hostile = (Document(page(text, drawings).to_html()) for text in ("plain", HOSTILE))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert hostile.text_in("title")[0] == HOSTILE
    assert "".join(hostile.text_in("h1")) == HOSTILE
    assert sum(attrs.get("onerror") is not None for _, attrs in hostile.elements) == 0


def test_backticks_mark_code() -> None:
    """Catches code that is not shown as code, and an escape that is lost inside of it."""
    document = Document(Page("a `b < c` d", "one ` alone").to_html())
    assert "b < c" in document.text_in("code")
    assert "one ` alone" in document.text_in("p")


def test_nothing_is_loaded(drawings: tuple[str, str]) -> None:
    """Catches a link to a file or a host, which would make the page depend on them and tell them who reads it."""
    html = page(drawings=drawings).to_html()
    document = Document(html)
    for reference in (*document.values("src"), *document.values("href")):
        assert re.match(r"#\w|data:image/png;base64,", reference), reference
    assert set(re.findall(r"https?://[^\"'\s]+", html)) <= {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"@import|url\((?!#)", html)
    assert {"link", "iframe", "object", "base"}.isdisjoint(tag for tag, _ in document.elements)


def test_policy_admits_these_scripts_alone() -> None:
    """Catches a script that was changed after its hash was taken, and a policy that admits any."""
    html = page().to_html()
    policy = next(a["content"] for _, a in Document(html).elements if a.get("http-equiv") == "Content-Security-Policy")
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert policy.partition("script-src ")[2].split() == [f"'sha256-{value}'" for value in hashes]
    assert len(scripts) == 4
    assert len(re.findall("<script", Page("a", "b").to_html())) == 1


def test_same_page_is_the_same_text(drawings: tuple[str, str]) -> None:
    """Catches a time, a random id or the order of a set in the page: reports could not be compared."""
    again = figure_svg(lines()), figure_svg(heat())
    assert again == drawings
    assert page(drawings=again).to_html() == page(drawings=drawings).to_html()


def test_ids_are_unique_and_references_lead_somewhere(drawings: tuple[str, str]) -> None:
    """Catches two figures that share clip paths or glyphs, and a label that names nothing."""
    document = Document(page(drawings=(*drawings, drawings[0])).to_html())
    ids = document.values("id")
    assert len(ids) == len(set(ids)) > 20
    targets = [name for key in ("aria-labelledby", "aria-describedby", "for") for name in document.values(key)]
    targets = [part for target in targets for part in target.split()]
    targets += [href[1:] for href in document.values("href") if href.startswith("#")]
    targets += [clip[5:-1] for clip in document.values("clip-path")]
    assert set(targets) <= set(ids)


def test_structure_is_accessible(drawings: tuple[str, str]) -> None:
    """Catches a skipped heading level, a header cell without scope, a picture or an input without a name."""
    document = Document(page(drawings=drawings).to_html())
    tags = [tag for tag, _ in document.elements]
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert [tag for tag in tags if tag in {"header", "nav", "main"}] == ["header", "nav", "main"]
    labelled = {attrs.get("for") for tag, attrs in document.elements if tag == "label"}
    for tag, attrs in document.elements:
        if tag == "html":
            assert attrs["lang"] == "en"
        if tag == "th":
            assert attrs["scope"] in {"col", "row"}
        if tag == "svg":
            assert attrs["role"] == "img"
            assert attrs["aria-labelledby"]
        if tag in {"input", "select"}:
            assert "aria-label" in attrs or attrs["id"] in labelled
        assert int(attrs.get("tabindex") or 0) <= 0
    assert "plain" in document.text_in("title")[1:]  # the alternative of a picture


@pytest.mark.parametrize("level", LEVELS)
def test_level_is_a_word(level: str) -> None:
    """Catches a verdict that is told by its colour alone."""
    words = {"good": "good", "bad": "bad", "unsure": "undecided", "info": "note"}
    document = Document(Page("a", "b", [Sentence("claim", level, "94 of 100")]).to_html())
    assert words[level] in "".join(document.text_in("span"))
    assert document.text_in("p")[-2:] == ["claim", "94 of 100"]


def test_cells_are_formatted() -> None:
    """Catches a format that is not applied, an infinity that is not readable, and a missing value shown as 'None'."""
    values = [
        0.123456,
        float("inf"),
        -float("inf"),
        float("nan"),
        None,
        np.float32(2.5),
        jnp.asarray(0.25),
        np.inf,
        -0.0,
    ]
    rows: list[dict[str, Any]] = [{"x": value, "name": "<a>", "flag": np.bool_(True)} for value in values] + [{}]
    table = Table({"name": "", "x": ".3g", "flag": ""}, rows, labels={"x": "Pair L2"})
    html = Page("a", "b", sections=[Section("c", [table])]).to_html()
    cells = re.findall(r"<td>(.*?)</td><td class=\"number\">(.*?)</td><td>(.*?)</td>", html)
    assert [cell[1] for cell in cells] == ["0.123", "∞", "-∞", "nan", "–", "2.5", "0.25", "∞", "0", "–"]
    assert cells[0] == ("&lt;a&gt;", "0.123", "yes")
    assert cells[-1] == ("–", "–", "–")
    assert '<th scope="col" class="number">Pair L2</th>' in html
    empty = Page("a", "b", sections=[Section("c", [Table({"x": ""}, [])])]).to_html()
    assert '<td colspan="1">No rows.</td>' in empty


def test_run_is_described() -> None:
    """Catches options of a nested configuration that are lost, and a command that is shown twice or not at all."""
    config = {"net": {"width": 64, "layers": (1, 2)}, "out": Path("runs/x"), "resume": False, "seed": None}
    html = Page("a", "b", config=config, environment={"jax": "0.10", "command": "python -m x --a '<b>'"}).to_html()
    rows = dict(re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', html))
    expected = {"net.width": "64", "net.layers": "1, 2", "out": "runs/x", "resume": "no", "seed": "none", "jax": "0.10"}
    assert rows == expected
    assert html.count("<pre><code>python -m x --a &#x27;&lt;b&gt;&#x27;</code></pre>") == 1
    other = Page("a", "b", environment={"command": "first"}, command="second").to_html()
    assert "<pre><code>second</code></pre>" in other
    assert "first" not in other
    assert "How it was made" not in Page("a", "b").to_html()


@pytest.mark.parametrize(
    ("svg", "message"),
    [
        ("<svg><script>alert(1)</script></svg>", "svg must consist of elements that draw, got <script>"),
        ("<svg><SCRIPT>alert(1)</SCRIPT></svg>", "got <SCRIPT>"),
        ("<svg><style>*{color:red}</style></svg>", "got <style>"),
        ("<svg><foreignObject/></svg>", "got <foreignObject>"),
        ("<svg><a href='#x'/></svg>", "got <a>"),
        ("<svg onload='alert(1)'/>", "svg must have no event handlers, got onload"),
        ("<svg><image href='https://example.org/x.png'/></svg>", "svg must load nothing from outside, got href"),
        ("<svg xmlns:x='http://www.w3.org/1999/xlink'><image x:href='x.png'/></svg>", "from outside, got href"),
        ("<svg><use href='data:image/svg+xml,x'/></svg>", "from outside, got href"),
        ("<svg><path style='fill: url(\"https://example.org\")'/></svg>", "from outside, got style"),
        ("<!DOCTYPE svg [<!ENTITY a 'b'>]><svg/>", "svg must have no document type"),
        ("<svg>", "svg must be well-formed, got no element found"),
        ("<div/>", "svg must be one <svg> element, got <div>"),
    ],
)
def test_dangerous_drawing_is_refused(svg: str, message: str) -> None:
    """Catches a picture that would run, load or restyle something."""
    with pytest.raises(ValueError, match=re.escape(message)):
        Page("a", "b", sections=[Section("c", [Picture(svg, "", "alternative")])])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"title": " "}, "title must be a text that is not empty, got ' '"),
        ({"headline": 3}, "headline must be a text that is not empty, got 3"),
        ({"sentences": [Sentence("a", "fine")]}, "level must be one of good, bad, unsure, info, got 'fine'"),
        ({"sentences": ["a"]}, "sentences must be a sequence of Sentence, got 'a' in it"),
        ({"sentences": [Sentence("a", "good", None)]}, "evidence must be a text, got None"),  # type: ignore[arg-type]
        ({"not_tested": "solvers"}, "not_tested must be a sequence of str, got 'solvers'"),
        ({"sections": [Section("a", "text")]}, "content must be a sequence of str, Table and Picture, got 'text'"),
        ({"sections": [Section("a", [3])]}, "content must be a sequence of str, Table and Picture, got int in it"),  # type: ignore[list-item]
        ({"sections": [Section("", [])]}, "a section's title must be a text that is not empty, got ''"),
        ({"sections": [Section("a", [Picture(SQUARE, "b", "")])]}, "a picture's alternative must be a text"),
        ({"sections": [Section("a", [Picture(b"", "b", "c")])]}, "svg must be a text, got bytes"),  # type: ignore[arg-type]
        ({"sections": [Section("a", [Table({}, [])])]}, "columns must map keys to formats, one at least, got {}"),
        ({"sections": [Section("a", [Table({"x": ""}, [[1]])])]}, "rows must be a sequence of Mapping, got [1]"),  # type: ignore[list-item]
        (
            {"sections": [Section("a", [Table({"x": ""}, [], "", {"y": "Y"})])]},
            "labels must be those of columns, got y",
        ),
        ({"config": [1]}, "config must be a mapping, got [1]"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], message: str) -> None:
    """Catches a mistake that would come out as a broken page long after the run."""
    with pytest.raises(ValueError, match=re.escape(message)):
        Page(**{"title": "a", "headline": "b", **arguments})


def test_cell_that_cannot_be_formatted_is_refused() -> None:
    """Catches an error that does not say which column is meant."""
    table = Table({"x": ".3g"}, [{"x": "text"}])
    with pytest.raises(ValueError, match=re.escape("column x must hold values that '.3g' can format, got 'text'")):
        Page("a", "b", sections=[Section("c", [table])]).to_html()


def test_figure_follows_the_page(drawings: tuple[str, str]) -> None:
    """Catches black on a dark page: axes must be ink, a dark line lighter in the dark; a colour scale stays."""
    plain, mapped = drawings
    assert "stroke: currentColor" in plain
    assert "#000000;" not in plain
    assert f"light-dark(#000080, {on_dark('#000080')})" in plain
    assert "#440154" in mapped  # the darkest of viridis
    assert not re.search(r"light-dark\(#440154", mapped)
    assert 'style="color: #000000; fill: currentColor"' in mapped
    assert mapped.count('shape-rendering="crispEdges"') == 1  # the cells; the scale beside them is rasterized
    assert "data:image/png;base64," in mapped
    for svg in drawings:
        assert re.match(r'<svg [^>]*viewBox="0 0 [\d.]+ [\d.]+"', svg)
        assert not re.search(r"<script|<style|<metadata|<!--|\bid=\"(figure|axes|patch|text)_", svg)


@pytest.mark.parametrize("colour", ["#000080", "#0072b2", "#8b0000", "#1f77b4", "#404040", "#101010", "#ffe119"])
def test_colour_is_visible_on_a_dark_page(colour: str) -> None:
    """Catches a data colour that vanishes in the dark."""
    assert contrast(on_dark(colour), DARK_PAGE) >= LEAST_CONTRAST


def test_dark_background_is_that_of_the_style_sheet() -> None:
    """Catches figures whose colours are chosen for another background than the page's."""
    style = resources.files("fvjax.report").joinpath("page.css").read_text(encoding="utf-8")
    assert f"--page: light-dark(#ffffff, {DARK_PAGE});" in style
    assert on_dark("#ffffff") == DARK_PAGE
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_figure_is_not_changed() -> None:
    """Catches marks for the drawing that stay on the caller's figure."""
    figure = heat()
    figure.axes[0].collections[0].set_gid("mine")
    before = [artist.get_gid() for artist in figure.findobj()]
    size = tuple(figure.get_size_inches())
    figure_svg(figure)
    assert [artist.get_gid() for artist in figure.findobj()] == before
    assert tuple(figure.get_size_inches()) == size


def test_environment_names_versions_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a command that cannot be pasted into a shell."""
    monkeypatch.setattr("sys.argv", ["/usr/bin/fvjax", "audit", "my run"])
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    found = environment()
    assert found["command"] == "fvjax audit 'my run'"
    assert found["fvjax"] == fvjax.__version__
    assert set(found) == {"jax", "numpy", "fvjax", "python", "platform", "device", "command"}
    monkeypatch.setattr("sys.argv", ["train.py", "--steps", "3"])
    assert environment()["command"] == "python train.py --steps 3"
