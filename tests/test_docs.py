"""The documentation's own checks: no public name without a docstring (docs/_ext/public_names.py)."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]

FILES = {
    "__init__.py": (
        '"""A package."""\nfrom dummy._private import LIMIT as LIMIT\nfrom dummy._private import hidden as hidden\n'
    ),
    "_private.py": (
        "LIMIT = 3\n"
        "def hidden(): ...\n"
        "def not_exported(): ...\n"
        "def written():\n    'Does it.'\n"
        "class Kind:\n    'A kind.'\n    def method(self): ...\n    def _own(self): ...\n"
        "    @property\n    def told(self):\n        'It is told.'\n"
    ),
    "shapes.py": (
        '"""Shapes."""\n'
        "from typing import NamedTuple\n"
        "from dummy._private import Kind as Kind\n"
        "from dummy._private import written as written\n"
        "SIDES = 4\n'''How many.'''\nEDGES = 4\n_own = 1\n"
        "class Point(NamedTuple):\n    x: int\n"
    ),
    "bare.py": "",
}


@pytest.fixture
def public_names(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The checker, from docs/."""
    path = ROOT / "docs" / "_ext" / "public_names.py"
    spec = importlib.util.spec_from_file_location("public_names", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "public_names", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def dummy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package with names of every kind, documented and not."""
    (tmp_path / "dummy").mkdir()
    for name, text in FILES.items():
        (tmp_path / "dummy" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("dummy")
    for name in [name for name in sys.modules if name.partition(".")[0] == "dummy"]:
        del sys.modules[name]


def test_every_kind_of_undocumented_name_is_found_and_nothing_else(public_names, dummy):
    """Catches a checker that misses re-exports, constants, methods or what Python documents, or asks too much."""
    assert sorted(public_names.undocumented(dummy)) == [
        "dummy.LIMIT",
        "dummy.bare",
        "dummy.hidden",
        "dummy.shapes.EDGES",
        "dummy.shapes.Kind.method",
        "dummy.shapes.Point",
    ]


def test_no_public_name_of_fvjax_lacks_a_docstring(public_names):
    """Catches a new public function, class, method or constant that the API reference could say nothing about."""
    import fvjax

    assert public_names.undocumented(fvjax) == []
