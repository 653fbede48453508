"""Figures of matplotlib as drawings that follow the page's light and dark."""

import colorsys
import io
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from fvjax.report import _svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DARK_PAGE = "#15171b"
"""The page's background in the dark, as in page.css: what a figure's colours must stand out from."""
LEAST_CONTRAST = 4.5
_KEPT, _KEPT_CELLS, _BACKGROUND = "fvjax-kept", "fvjax-kept-cells", "fvjax-background"
_SAVING: dict[str, Any] = {
    "facecolor": "none",
    "edgecolor": "none",
    "dpi": 150,  # of what is rasterized
    "metadata": dict.fromkeys(("Creator", "Date", "Format", "Type")),
}
_PAINT = re.compile(r"\b(fill|stroke): ?(#[0-9a-f]{6})")


def figure_svg(figure: "Figure") -> str:
    """A matplotlib figure as an inline SVG whose axes and text are light on a dark page.

    ===============================  ===================================================================================
    black                            `currentColor`: the page's ink
    white and greys                  as they are; on a dark page mirrored, white to the page's background
    other colours                    as they are; on a dark page lighter, if their contrast to it were below 4.5
    inside of axes with an image     as it is, with its own background, also where colours are those of a colour map:
                                     they are read off against a scale, and what is drawn on them was chosen for them
    other backgrounds                transparent
    what the figure rasterizes       an embedded PNG (`rasterized=True` for more than some thousand points)
    ===============================  ===================================================================================

    Args:
        figure: the figure; it is as before afterwards.

    Returns:
        One <svg> element with a viewBox in points. The same drawing gives the same text: ids are named by the content,
        there is no time, no script and no reference to anything outside.
    """
    import matplotlib as mpl

    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "fvjax", "svg.image_inline": True}), _marked(figure):
        figure.savefig(stream, format="svg", **_SAVING)
    root = ET.fromstring(stream.getvalue())
    _strip(root)
    _recolour(root)
    _svg.drawing(root)
    root.attrib.pop("height")
    # Black is matplotlib's default and not written out for fills. The joins are those of its own style sheet, which in
    # a page would hold for everything else, too.
    root.attrib.update({"fill": "currentColor", "stroke-linejoin": "round", "stroke-linecap": "butt"})
    root.set("style", f"--width: {root.attrib.pop('width')}")
    _svg.rename(root, _svg.identity(_svg.to_text(root)) + "-")
    return _svg.to_text(root)


@contextmanager
def _marked(figure: "Figure") -> Iterator[None]:
    """Names, while it is drawn, what keeps its colours and what is a mere background."""
    from matplotlib.collections import QuadMesh

    with ExitStack() as stack:

        def mark(artist: Any, name: str) -> None:
            stack.callback(artist.set_gid, artist.get_gid())
            artist.set_gid(name)

        if any(map(_has_scale, figure.axes)):
            figure.draw_without_rendering()  # settles the layout: what lies inside
        for axes in figure.axes:
            if _has_scale(axes):
                for artist in _inside(axes):
                    for part in artist.findobj():
                        mark(part, _KEPT_CELLS if isinstance(part, QuadMesh) else _KEPT)
            elif axes.get_facecolor()[:3] == (1, 1, 1):
                mark(axes.patch, _BACKGROUND)
        yield


def _has_scale(axes: "Axes") -> bool:
    """Whether colours in it stand for values, or are an image's own."""
    return bool(axes.images) or any(item.get_array() is not None for item in axes.collections)


def _inside(axes: "Axes") -> Iterator[Any]:
    """The background and what is drawn on it: not the frame, axes and titles, nor a legend or text beside it."""
    from matplotlib.text import Text

    frame = [axes.xaxis, axes.yaxis, *axes.spines.values()]
    box = axes.get_window_extent()
    for artist in axes.get_children():
        is_title = isinstance(artist, Text) and artist not in axes.texts
        if artist in frame or is_title:
            continue
        if isinstance(artist, Text) or artist is axes.get_legend():
            extent = artist.get_window_extent()
            if not box.contains((extent.x0 + extent.x1) / 2, (extent.y0 + extent.y1) / 2):
                continue
        yield artist


def _strip(root: ET.Element) -> None:
    """Drops style sheets, metadata, white space and plain backgrounds; in place."""
    for parent in root.iter():
        parent.text = parent.tail = None
        for child in list(parent):
            if _svg.local_name(child.tag) in {"style", "metadata"} or child.get("id", "").startswith(_BACKGROUND):
                parent.remove(child)


def _recolour(element: ET.Element) -> None:
    """Gives every colour its counterpart on a dark page, but to what keeps its colours; in place."""
    name = element.get("id", "")
    if name.startswith(_KEPT):
        element.set("style", "color: #000000; fill: currentColor")
        if name.startswith(_KEPT_CELLS):
            element.set("shape-rendering", "crispEdges")  # else what lies behind shows as lines between the cells
        return
    style = element.get("style")
    if style:
        element.set("style", _PAINT.sub(_paint, style))
    for child in element:
        _recolour(child)


def _paint(match: re.Match[str]) -> str:
    name, colour = match.groups()
    if colour == "#000000":
        return f"{name}: currentColor"
    dark = on_dark(colour)
    return match.group() if dark == colour else f"{name}: light-dark({colour}, {dark})"


def on_dark(colour: str) -> str:
    """The colour that stands for `colour` on a dark page: greys are mirrored, dark colours become lighter."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    if max(red, green, blue) - min(red, green, blue) < 0.04:
        page = [int(DARK_PAGE[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return _hex(*(part + (1 - lightness) * (0.9 - part) for part in page))
    while contrast(colour, DARK_PAGE) < LEAST_CONTRAST:
        lightness += 0.01
        colour = _hex(*colorsys.hls_to_rgb(hue, lightness, saturation))
    return colour


def _hex(*parts: float) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def contrast(first: str, second: str) -> float:
    """Ratio of the relative luminances of two #rrggbb colours, 1 to 21 (WCAG 2.2)."""
    brighter, darker = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
