"""The API reference: one page for every public module, written from the package at every build.

A public name without a docstring stops the build (`write_pages`), whatever the options of sphinx-build are.
"""

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from public_names import PublicName, UndocumentedError, documents_itself, public_modules, public_names, undocumented
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform


def write_pages(package: ModuleType, folder: Path) -> list[Path]:
    """Writes a page for every public module that holds a name which no other page has.

    Raises:
        UndocumentedError: if a public name has no docstring; the message lists all.
    """
    if missing := undocumented(package):
        raise UndocumentedError("public names without a docstring: " + ", ".join(missing))
    modules = {module.__name__: public_names(module) for module in public_modules(package)}
    homes: dict[int, str] = {}
    # A name is described in the module where its user finds it: the shallowest, the root of the package aside.
    for module in sorted(modules, key=lambda name: (name == package.__name__, name.count("."), name)):
        for public in modules[module]:
            if documents_itself(public.value) and (public.value.__module__ == module or id(public.value) not in homes):
                homes.setdefault(id(public.value), module)
    for module, names in modules.items():  # ... unless a module at the same depth defines it
        for public in names:
            home = homes.get(id(public.value), module)
            if getattr(public.value, "__module__", "") == module and home.count(".") == module.count("."):
                homes[id(public.value)] = module
    pages = []
    for module, names in modules.items():
        here = [public for public in names if homes.get(id(public.value), module) == module]
        elsewhere = [public for public in names if public not in here]
        if here or module == package.__name__:
            page = folder / f"{module}.rst"
            _write(page, _page(module, here, {public.name: homes[id(public.value)] for public in elsewhere}))
            pages.append(page)
    for stale in set(folder.glob(f"{package.__name__}*.rst")) - set(pages):
        stale.unlink()
    return pages


def _write(page: Path, text: str) -> None:
    if not page.exists() or page.read_text(encoding="utf-8") != text:  # an unchanged page is not read again
        page.write_text(text, encoding="utf-8")


def _page(module: str, here: list[PublicName], elsewhere: dict[str, str]) -> str:
    lines = [module, "=" * len(module), "", f".. automodule:: {module}", "   :no-members:", ""]
    objects = [public for public in here if documents_itself(public.value)]
    if objects:
        lines += [".. autosummary::", "   :signatures: none", ""]
        lines += [f"   {public.name}" for public in objects] + [""]
    if elsewhere:
        lines += ["Also importable from here:", ""]
        lines += [f"- :py:obj:`{module}.{name} <{home}.{name}>`" for name, home in sorted(elsewhere.items())] + [""]
    for public in here:
        if public not in objects:
            lines += [f".. py:data:: {public.path}", ""]
            lines += [f"   {line}".rstrip() for line in plain_text(public.text.splitlines())] + [""]
    for public in objects:
        directive = "autoclass" if inspect.isclass(public.value) else "autofunction"
        lines += [f".. {directive}:: {public.path}"] + ["   :members:"] * inspect.isclass(public.value) + [""]
    return "\n".join(lines).rstrip() + "\n"


# Characters that are marks in reStructuredText and mathematics in a docstring. They are replaced one for one, so that
# tables keep their columns, and come back in the document (`RestoreMarks`).
_MARKS = {"|": "\ue000", "*": "\ue001", "_": "\ue002", "\\": "\ue003"}
_PROTECTED = re.compile(r"\||\*|\\|(?<=\w)_(?!\w)")
_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Example|Examples|Note|Notes|Source):\s*$")


def plain_text(lines: list[str]) -> list[str]:
    """Docstrings as reStructuredText: indented formulas and code as they stand; no mark but `code` in prose."""
    out: list[str] = []
    literal = section = False
    for line in lines:
        indented = line.startswith("    ")
        if line and not indented:
            literal, section = False, bool(_SECTION.match(line))
        if indented and not literal and not section and (not out or not out[-1]):
            out += ["::", ""]
            literal = True
        parts = re.split(r"(`+[^`]*`+)", line)
        protected = [
            part if part.startswith("`") else _PROTECTED.sub(lambda found: _MARKS[found[0]], part) for part in parts
        ]
        out.append(line if literal else "".join(protected))
    return out


class RestoreMarks(SphinxTransform):
    """Puts the characters back that `plain_text` replaced."""

    default_priority = 1

    def apply(self, **_: Any) -> None:
        """Changes the text of the document in place."""
        back = str.maketrans({private: mark for mark, private in _MARKS.items()})
        for text in list(self.document.findall(nodes.Text)):
            if any(private in text for private in _MARKS.values()):
                text.parent.replace(text, nodes.Text(text.translate(back)))


def _process(_app: Sphinx, *event: Any) -> None:
    lines = event[-1]
    lines[:] = plain_text(lines)


def _skip(_app: Sphinx, _what: str, _name: str, member: Any, *_: Any) -> bool | None:
    """Fields of a NamedTuple are documented by their class."""
    return True if (inspect.getdoc(member) or "").startswith("Alias for field number") else None


def _write_all(app: Sphinx) -> None:
    write_pages(importlib.import_module("fvjax"), Path(app.srcdir) / "api")


def setup(app: Sphinx) -> dict[str, Any]:
    """Writes the pages before Sphinx looks for them, and reads docstrings as plain text."""
    app.connect("builder-inited", _write_all)
    app.connect("autodoc-process-docstring", _process, priority=400)  # before napoleon, which reads Google's sections
    app.connect("autodoc-skip-member", _skip)
    app.add_transform(RestoreMarks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
