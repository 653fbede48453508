"""Inline SVG: checked, and with ids that are no other picture's."""

import hashlib
import re
from xml.etree import ElementTree as ET

NAMESPACE = "http://www.w3.org/2000/svg"
_GROUPS = {"svg", "g", "defs", "symbol", "use", "clipPath", "mask", "pattern", "marker", "title", "desc", "metadata"}
_SHAPES = {"path", "rect", "circle", "ellipse", "line", "polyline", "polygon", "text", "tspan", "image"}
_ELEMENTS = _GROUPS | _SHAPES | {"linearGradient", "radialGradient", "stop"}
"""What draws. Not what runs, loads or links, no style sheet (it would hold for the whole page) and no HTML."""
_REFERENCE = re.compile(r"url\(\s*['\"]?(?!['\"]?#)")


def local_name(name: str) -> str:
    """The tag or attribute without its namespace."""
    return name.rpartition("}")[2]


def checked_svg(svg: str) -> ET.Element:
    """Parses one <svg> element; refuses scripts, event handlers, style sheets and anything that would be loaded.

    Raises:
        ValueError: if it is not XML, not one <svg>, or has any of those.
    """
    if not isinstance(svg, str):
        raise ValueError(f"svg must be a text, got {type(svg).__name__}")
    if "<!DOCTYPE" in svg or "<!ENTITY" in svg:
        raise ValueError("svg must have no document type; give the <svg> element alone")
    try:
        root = ET.fromstring(svg)
    except ET.ParseError as error:
        raise ValueError(f"svg must be well-formed, got {error}") from error
    if local_name(root.tag) != "svg":
        raise ValueError(f"svg must be one <svg> element, got <{local_name(root.tag)}>")
    for element in root.iter():
        _check_element(element)
    return root


def _check_element(element: ET.Element) -> None:
    tag = local_name(element.tag)
    if tag not in _ELEMENTS:
        raise ValueError(f"svg must consist of elements that draw, got <{tag}>")
    for full_name, value in element.attrib.items():
        name = local_name(full_name).lower()
        if name.startswith("on"):
            raise ValueError(f"svg must have no event handlers, got {name}")
        outside = name in {"href", "src"} and not re.match(r"#|data:image/(png|jpeg);base64,", value)
        if outside or _REFERENCE.search(value):
            raise ValueError(f"svg must load nothing from outside, got {name}={value[:60]!r}")


def drawing(root: ET.Element) -> None:
    """Drops namespaces (that of the root stays), and ids that nothing refers to; in place."""
    used = {name for element in root.iter() for value in element.attrib.values() for name in _references(value)}
    for element in root.iter():
        element.tag = local_name(element.tag)
        element.attrib = {local_name(name): value for name, value in element.attrib.items()}
        if element.get("id") not in used:
            element.attrib.pop("id", None)
    root.set("xmlns", NAMESPACE)


def _references(value: str) -> list[str]:
    return [value[1:]] if value.startswith("#") else re.findall(r"url\(['\"]?#([^'\")]+)['\"]?\)", value)


def rename(root: ET.Element, prefix: str) -> None:
    """Puts `prefix` before every id and every reference to one; in place."""
    ids = {element.get("id") for element in root.iter()} - {None}
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "id":
                element.set(name, prefix + value)
            elif name == "href" and value[1:] in ids:
                element.set(name, f"#{prefix}{value[1:]}")
            elif "url(" in value:
                element.set(name, re.sub(r"url\(['\"]?#([^'\")]+)['\"]?\)", rf"url(#{prefix}\1)", value))


def identity(content: str) -> str:
    """A short name of a text, a valid id: the same text has the same one."""
    return "f" + hashlib.sha256(content.encode()).hexdigest()[:8]


def to_text(root: ET.Element) -> str:
    """The element as text."""
    return ET.tostring(root, encoding="unicode")
