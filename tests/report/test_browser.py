"""The page in a browser: silent, readable, operable by the keyboard; its numbers are the library's."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from fvjax import gaussian
from fvjax.couplings import rotation_matrix
from fvjax.interpolants import constant_noise
from fvjax.report import LEVELS, Page, Picture, Section, Sentence, Table, figure_svg

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra `test`")
CONTROLS = ["angle", "angle-number", "sigma", "sigma-number", "dimension", "angle-plot", "ratio-plot"]
WIDTHS = {"phone": 360, "desk": 1280}
Open = Callable[..., Any]


def example() -> Page:
    """A page with everything that is hard to fit on a phone."""
    figure = Figure(figsize=(9, 3))
    figure.subplots().plot([0, 1], [0, 1])
    row = {f"a rather long heading {k}": 1.5 for k in range(8)} | {"name": "text " * 12}
    table = Table({"name": "", **{key: ".3g" for key in row if key != "name"}}, [row], "A wide table.")
    picture = Picture(figure_svg(figure), "A wide figure.", "A line.")
    return Page(
        "Anextraordinarilylongwordthatdoesnotfitonaphoneatall and `code`",
        "The flow returns its pairs, as `selected_angle` says.",
        [Sentence("A claim that takes more than one line on a phone.", level, "94 of 100.") for level in LEVELS],
        [Section("Numbers", ["Text with `code` in it.", table, picture]), Section("More", ["text"])],
        config={"x" * 30: "y" * 200},
        environment={"jax": "0.10"},
        command="python -m experiments.something " + "--option value " * 30 + "x" * 200,
        not_tested=["Other data."],
        gaussian_panel=True,
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example as a file."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(example().to_html(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for all tests of this file."""
    with sync_api.sync_playwright() as playwright:
        program = shutil.which("chromium") or shutil.which("google-chrome") or playwright.chromium.executable_path
        if not Path(program).is_file():
            pytest.skip("needs chromium on the PATH, or that of `playwright install chromium`")
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]  # as root, and in a container
        started = playwright.chromium.launch(executable_path=program, args=options)
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Any, file: Path) -> Iterator[Open]:
    """Opens the file in a new window; at the end nothing may have been said on the console or been loaded."""
    said: list[str] = []
    loaded: list[str] = []
    contexts = []

    def opened(width: int = 1280, *, scheme: str = "light", path: Path = file, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: loaded.append(request.url))
        page.goto(path.as_uri())
        if options.get("java_script_enabled", True):
            settle(page)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []
    assert all(url.startswith("file:") for url in loaded)
    assert len(loaded) == len(contexts)


def settle(page: Any) -> None:
    """Waits until what was changed is drawn: the panel draws in the next frame, after observers of sizes."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def value(page: Any, name: str) -> float:
    """The full number behind an output of the panel."""
    return float(page.locator(f"#{name}").get_attribute("data-value").replace("Infinity", "inf"))


def channels(color: str) -> np.ndarray:
    """Red, green, blue and opacity of a computed colour."""
    parts = [float(part) for part in re.findall(r"[\d.]+", color)]
    return np.array(parts if len(parts) == 4 else [*parts, 1.0])


def contrast(first: str, second: str) -> float:
    """Contrast of two computed colours, written anew from WCAG 2.2."""

    def luminance(color: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels(color)[:3] / 255]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    low, high = sorted([luminance(first), luminance(second)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", WIDTHS)
def test_fits_the_screen_and_is_silent(open_page: Open, scheme: str, screen: str) -> None:
    """Catches a page that must be scrolled sideways, and (in the fixture) an error, a warning or a request."""
    page = open_page(WIDTHS[screen], scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[screen]
    boxes = page.evaluate(
        "[...document.querySelectorAll('.scroll')].map((b) => [b.scrollWidth > b.clientWidth + 1, b.tabIndex])"
    )
    assert all((tab_index == 0) == scrolls for scrolls, tab_index in boxes)
    assert any(scrolls for scrolls, _ in boxes)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(open_page: Open, scheme: str) -> None:
    """Catches a text whose contrast to what lies behind it is below 4.5 (WCAG AA), in the light or in the dark."""
    page = open_page(scheme=scheme)
    found = page.evaluate(
        """() => [...document.querySelectorAll("body *")].flatMap((element) => {
          const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
          if (!own || element.closest("script, style, noscript, svg title, option, [hidden]")) return [];
          let behind = element.closest("svg")?.parentElement ?? element;
          const back = () => getComputedStyle(behind).backgroundColor;
          while (behind.parentElement && back() === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
          const style = getComputedStyle(element);
          return [[element.tagName, element.tagName === "text" ? style.fill : style.color, back()]];
        })"""
    )
    kinds = {name for name, *_ in found}
    assert {"P", "H1", "H2", "H3", "TH", "TD", "A", "CODE", "SPAN", "LI", "BUTTON", "text", "SMALL", "OUTPUT"} <= kinds
    too_low = {(name, ink, back) for name, ink, back in found if contrast(ink, back) < 4.5}
    assert too_low == set()
    page_color = channels(page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3].mean()
    assert page_color < 40 if scheme == "dark" else page_color > 240


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lines_can_be_seen(open_page: Open, scheme: str) -> None:
    """Catches curves, figures and borders of controls below 3 to 1 on the page."""
    page = open_page(scheme=scheme)
    strokes = page.evaluate(
        """() => [".plot .ot", ".plot .pair-optimal", "#flow-plot g", "figure [role=img] path[style*=currentColor]"]
          .flatMap((name) => [...document.querySelectorAll(name)]).map((element) => getComputedStyle(element).stroke)"""
    )
    controls = "button, input:not([type=range]), select"
    strokes += page.evaluate(
        f"[...document.querySelectorAll('{controls}')].map((element) => getComputedStyle(element).borderColor)"
    )
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert len(strokes) > 2 + 7 + 5  # curves, trajectories, controls, and what the figure has
    assert min(contrast(stroke, back) for stroke in strokes if stroke.startswith("rgb")) >= 3


def test_theme_is_switched_by_the_keyboard(open_page: Open) -> None:
    """Catches a switch that cannot be reached, that says nothing, or that leaves drawings as they were."""
    page = open_page()

    def colors() -> list[str]:
        return page.evaluate(
            """() => [["body", "backgroundColor"], ["body", "color"], ["#angle-plot text", "fill"],
                ["figure [role=img] path[style*=currentColor]", "stroke"], ["#profile-plot .ot", "stroke"]]
              .map(([name, property]) => getComputedStyle(document.querySelector(name))[property])"""
        )

    before = colors()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "theme"
    assert page.locator("#theme").get_attribute("aria-pressed") == "false"
    page.keyboard.press("Enter")
    assert page.locator("#theme").get_attribute("aria-pressed") == "true"
    after = colors()
    assert after[0] == "rgb(21, 23, 27)"
    assert all(a != b for a, b in zip(before, after, strict=True))
    page.keyboard.press("Space")
    assert colors() == before


def test_keyboard_reaches_everything(open_page: Open) -> None:
    """Catches a control that the tab key passes by, an order that is not the page's, a focus that cannot be seen."""
    page = open_page()
    reached, seen = [], []
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => {
              const focused = document.activeElement;
              const { outlineStyle, outlineWidth } = getComputedStyle(focused);
              const name = focused.id || focused.className || focused.getAttribute("href");
              return [name, outlineStyle === "none" ? 0 : parseFloat(outlineWidth)];
            }"""
        )
        if not name:
            break
        reached.append(name)
        seen.append(outline)
    assert reached[:3] == ["skip", "theme", "#section-1"]
    assert [name for name in reached if name in CONTROLS] == CONTROLS
    assert reached[-1] == "copy"
    assert min(seen) >= 2


def test_skip_link_leads_to_the_content(open_page: Open) -> None:
    """Catches a link that moves the view but not the focus."""
    page = open_page()
    page.keyboard.press("Tab")
    assert page.locator(".skip").bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_sliders_change_the_numbers(open_page: Open) -> None:
    """Catches a slider that is not connected, in either direction, or whose value no screen reader would say."""
    page = open_page()
    names = ["selected-angle", "variance-ot", "variance-pair-optimal", "variance-ratio", "equal-sigma"]
    before = [value(page, name) for name in names]
    page.locator("#angle").focus()
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
    after = [value(page, name) for name in names]
    assert page.evaluate("fvjaxPanel.state()") == {"degrees": 145, "sigma": 0.3, "dimension": 2}
    assert page.locator("#angle-number").input_value() == "145"
    assert page.locator("#angle").get_attribute("aria-valuetext") == "145 degrees"
    assert all(a != b for a, b in zip(before, after, strict=True))
    page.locator("#sigma").focus()
    page.keyboard.press("Home")
    assert page.evaluate("fvjaxPanel.state().sigma") == 0
    assert value(page, "selected-angle") == pytest.approx(145)
    page.keyboard.press("End")
    assert page.evaluate("fvjaxPanel.state().sigma") == 10
    page.locator("#dimension").select_option("10")
    assert value(page, "variance-ot") == pytest.approx(page.evaluate("fvjaxPanel.varianceOt(145, 10, 10)"))


def test_number_that_makes_no_sense_is_refused(open_page: Open) -> None:
    """Catches nan in every curve after an empty or a negative number was typed."""
    page = open_page()
    for text, good in (("-1", False), ("", False), ("11", False), ("0.055", True)):
        page.locator("#sigma-number").fill(text)
        assert page.locator("#sigma-number").get_attribute("aria-invalid") == str(not good).lower()
        assert page.evaluate("fvjaxPanel.state().sigma") == (0.055 if good else 0.3)
    page.locator("#angle-number").fill("200")
    page.keyboard.press("Tab")
    assert page.locator("#angle-number").input_value() == "150"
    assert "NaN" not in page.locator("#panel").inner_html()


def library_numbers(degrees: np.ndarray, sigmas: np.ndarray, dimension: int) -> np.ndarray:
    """Selected angle, both variances, and both at t = 0.3, as the library has them; [angles, sigmas, 5]."""
    mean, cov = jnp.zeros(dimension), jnp.eye(dimension)
    ot = gaussian.pair_optimal(gaussian.ot_map(mean, cov))

    def numbers(angle: float, sigma: float) -> list[float]:
        rotated = gaussian.rotated_map(mean, cov, rotation_matrix(np.deg2rad(angle), dimension))
        coupling, noise = gaussian.map_coupling(rotated), constant_noise(sigma)
        fields = ot, gaussian.pair_optimal(rotated)
        return [
            float(jnp.rad2deg(gaussian.selected_angle(np.deg2rad(angle), sigma))),
            *(float(gaussian.exact_gradient_variance(field, coupling, noise)) for field in fields),
            *(
                float(gaussian.variance_profile(field, coupling, noise, jnp.array([0.3])).variance[0])
                for field in fields
            ),
        ]

    return np.array([[numbers(angle, sigma) for sigma in sigmas] for angle in degrees])


@pytest.mark.parametrize("dimension", [2, 10])
def test_numbers_are_those_of_the_library(open_page: Open, x64: None, dimension: int) -> None:
    """Catches a lost factor 2 or d, a wrong power of w, and an infinity that came out as a large number or as nan."""
    degrees = np.array([0, 0.01, 45, 150, 179.5, 180.0]) if dimension == 2 else np.array([120, 180.0])
    sigmas = np.array([0, 1e-3, 0.05, 0.3, 5.0]) if dimension == 2 else np.array([0.3])
    page = open_page()
    found = page.evaluate(
        """([degrees, sigmas, dimension]) => degrees.map((phi) => sigmas.map((sigma) => {
          const p = fvjaxPanel.profile(phi, sigma, dimension, 0.3);
          return [fvjaxPanel.selectedAngle(phi, sigma), fvjaxPanel.varianceOt(phi, sigma, dimension),
            fvjaxPanel.variancePairOptimal(phi, sigma, dimension), p.ot, p.pairOptimal].map(String);
        }))""",
        [degrees.tolist(), sigmas.tolist(), dimension],
    )
    numbers = np.array([[[float(text) for text in cell] for cell in row] for row in found])
    expected = library_numbers(degrees, sigmas, dimension)
    np.testing.assert_allclose(numbers, expected, rtol=1e-9)
    assert np.isinf(expected[-1, -1, 2])
    ratios = page.evaluate(
        "([d, s, n]) => d.map((phi) => s.map((x) => String(fvjaxPanel.varianceRatio(phi, x, n))))",
        [degrees.tolist(), sigmas.tolist(), dimension],
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        np.testing.assert_allclose(np.array(ratios, float), expected[..., 1] / expected[..., 2], rtol=1e-9)


def test_shown_numbers_are_those_of_the_functions(open_page: Open) -> None:
    """Catches a table that shows another number than the one that was tested, or rounds it wrongly."""
    page = open_page()
    page.evaluate("fvjaxPanel.set({degrees: 170, sigma: 0.05, dimension: 10})")
    for name, call in {
        "selected-angle": "selectedAngle(170, 0.05)",
        "variance-ot": "varianceOt(170, 0.05, 10)",
        "variance-pair-optimal": "variancePairOptimal(170, 0.05, 10)",
        "variance-ratio": "varianceRatio(170, 0.05, 10)",
        "equal-sigma": "equalSigma(170, 10)",
    }.items():
        exact = page.evaluate(f"fvjaxPanel.{call}")
        assert value(page, name) == exact
        shown = page.locator(f"#{name}").inner_text().removesuffix("°")
        assert float(shown) == pytest.approx(exact, rel=1e-4)
    at_equality = page.evaluate(
        "[30, 150, 179].map((phi) => fvjaxPanel.varianceRatio(phi, fvjaxPanel.equalSigma(phi, 2), 2))"
    )
    np.testing.assert_allclose(at_equality, 1, rtol=1e-12)


@pytest.mark.parametrize(
    ("degrees", "sigma", "shown", "reason"),
    [
        (180, 0.3, {"selected-angle": "0°", "variance-pair-optimal": "∞", "variance-ratio": "0"}, "pole at t = 1/2"),
        (180, 0, {"selected-angle": "undefined", "variance-pair-optimal": "0"}, "meet in one point"),
        (150, 0, {"selected-angle": "150°", "variance-pair-optimal": "0", "variance-ratio": "∞"}, "Without noise"),
        (0, 0.3, {"variance-ot": "0", "variance-ratio": "undefined"}, "both fields are the same"),
    ],
)
def test_edges_are_explained(open_page: Open, degrees: float, sigma: float, shown: dict[str, str], reason: str) -> None:
    """Catches a bare NaN or infinity, and an edge at which a drawing breaks."""
    page = open_page()
    page.evaluate(f"fvjaxPanel.set({{degrees: {degrees}, sigma: {sigma}}})")
    settle(page)
    assert {name: page.locator(f"#{name}").inner_text() for name in shown} == shown
    assert reason in page.locator("#panel-summary").inner_text()
    assert not re.search("NaN|Infinity", page.locator(".plots").inner_html())


def test_trajectories_follow_the_minimiser(open_page: Open, x64: None) -> None:
    """Catches a wrong sign or scale of the drawn flow: its derivative is the library's field at every place."""
    degrees, sigma, step = 150.0, 0.2, 1e-5
    page = open_page()
    mean = jnp.zeros(2)
    rotated = gaussian.rotated_map(mean, jnp.eye(2), rotation_matrix(np.deg2rad(degrees), 2))
    field = gaussian.population_minimiser(gaussian.map_coupling(rotated), constant_noise(sigma))
    times = np.linspace(0.05, 0.95, 7)
    at = np.stack([times - step, times, times + step])
    places = np.array(
        page.evaluate(
            "([phi, sigma, at]) => at.map((row) => row.map((t) => fvjaxPanel.flow(phi, sigma, t, [0.8, -0.3])))",
            [degrees, sigma, at.tolist()],
        )
    )
    expected = jax.vmap(lambda t, x: field(None, t, x))(jnp.asarray(times), jnp.asarray(places[1]))
    np.testing.assert_allclose((places[2] - places[0]) / (2 * step), expected, rtol=1e-6, atol=1e-8)
    start, end = page.evaluate(f"[0, 1].map((t) => fvjaxPanel.flow({degrees}, {sigma}, t, [1, 0]))")
    assert start == pytest.approx([1, 0])
    assert np.rad2deg(np.arctan2(end[1], end[0])) == pytest.approx(
        page.evaluate(f"fvjaxPanel.selectedAngle({degrees}, {sigma})")
    )


def test_point_is_moved_in_the_diagrams(open_page: Open) -> None:
    """Catches axes that are upside down, a marker beside its point, and arrow keys that do nothing."""
    page = open_page()
    page.locator("#angle-plot").scroll_into_view_if_needed()
    box = page.locator("#angle-plot canvas").bounding_box()
    # The canvas covers 0 to 180 degrees, and three decades above the band of sigma = 0, which is 18 px high.
    rows = box["height"] - 18
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + rows / 3)
    settle(page)
    state = page.evaluate("fvjaxPanel.state()")
    assert state["degrees"] == pytest.approx(90, abs=1)
    assert state["sigma"] == pytest.approx(1, rel=0.05)
    marker = page.locator("#ratio-plot .point").bounding_box()
    other = page.locator("#ratio-plot canvas").bounding_box()
    assert marker["x"] + marker["width"] / 2 == pytest.approx(other["x"] + other["width"] / 2, abs=2)
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] - 3)
    assert page.evaluate("fvjaxPanel.state().sigma") == 0
    page.locator("#ratio-plot").focus()
    page.keyboard.press("ArrowUp")
    assert page.evaluate("fvjaxPanel.state().sigma") == 0.01
    page.keyboard.press("Shift+ArrowRight")
    assert page.evaluate("fvjaxPanel.state().degrees") == state["degrees"] + 10
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("fvjaxPanel.state()") == {"degrees": state["degrees"] + 9, "sigma": 0, "dimension": 2}


def test_diagrams_show_the_formula(open_page: Open) -> None:
    """Catches a picture that is mirrored or on another scale than its axes, and one not as sharp as the screen."""
    page = open_page(360, device_scale_factor=2)
    canvas = page.locator("#angle-plot canvas")
    assert canvas.evaluate("(c) => [c.width / c.clientWidth, c.height / c.clientHeight]") == pytest.approx(
        [2, 2], abs=0.02
    )
    pixels = np.array(
        canvas.evaluate(
            """(canvas) => {
              const { data, width, height } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
              return [0.25, 0.5, 0.9].map((x) => [0.2, 0.5, 0.8].map((y) => {
                const start = 4 * (Math.floor(y * (height - 36)) * width + Math.floor(x * width));
                return [...data.slice(start, start + 3)];
              }));
            }"""
        )
    )
    from matplotlib import colormaps

    degrees, decades = np.meshgrid([45, 90, 162], [0.4, -0.5, -1.4], indexing="ij")
    angles = np.rad2deg(
        gaussian.selected_angle(np.deg2rad(degrees).astype(np.float32), 10 ** decades.astype(np.float32))
    )
    expected = colormaps["viridis"](np.asarray(angles) / 180)[..., :3] * 255
    np.testing.assert_allclose(pixels, expected, atol=12)  # nine stops instead of 256, and pixels are wide
    page.set_viewport_size({"width": 700, "height": 900})
    settle(page)
    settle(page)
    assert canvas.evaluate("(c) => c.width / c.clientWidth") == pytest.approx(2, abs=0.02)
    assert canvas.bounding_box()["width"] > 400


def test_page_without_scripts_says_so(open_page: Open) -> None:
    """Catches controls that do nothing, and a verdict that needs a script."""
    page = open_page(360, java_script_enabled=False)
    assert page.locator(".notice").is_visible()
    assert not page.locator(".panel-body").is_visible()
    assert not page.locator("#theme").is_visible()
    assert page.locator(".headline").is_visible()


def test_hostile_text_stays_text(open_page: Open, tmp_path: Path) -> None:
    """Catches an escape that satisfies a parser of ours, but not the browser's."""
    text = "</title></style></script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"
    section = Section(text, [text, Table({"x": ""}, [{"x": text}], text, {"x": text})])
    page = Page(text, text, [Sentence(text, "bad", text)], [section], {text: text}, {text: text}, command=text)
    path = tmp_path / "hostile.html"
    path.write_text(page.to_html(), encoding="utf-8")
    shown = open_page(path=path)
    assert shown.evaluate("window.broken") is None
    assert shown.title() == text
    assert shown.locator("h1").inner_text() == text
    assert shown.locator("pre").inner_text() == text
    assert shown.locator("img").count() == 0


def test_command_is_copied(open_page: Open) -> None:
    """Catches a button that copies nothing, or something else than the command."""
    page = open_page()
    page.locator(".copy").click()
    page.wait_for_function("document.querySelector('.copy').textContent !== 'Copy'")
    assert page.evaluate("getSelection().toString().trim()") == example().command


def test_print_is_black_on_white(open_page: Open) -> None:
    """Catches a dark page on paper, with buttons."""
    page = open_page(scheme="dark")
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("#theme").is_visible()
    assert page.locator(".headline").is_visible()
