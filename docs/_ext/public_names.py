"""The public names of a package, and those without a docstring; it needs nothing but Python.

Public is what a module re-exports (`from ... import name as name`, or `__all__`) or defines without a leading
underscore; a module is public if no part of its path has one. A class or function documents
itself by its docstring, a constant or alias by a string below its assignment.
"""

import ast
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple


class UndocumentedError(Exception):
    """Public names have no docstring."""


class PublicName(NamedTuple):
    """A public name of a module: what it is, and what documents it ("" if nothing does)."""

    module: str
    name: str
    value: Any
    text: str

    @property
    def path(self) -> str:
        """Where it is imported from."""
        return f"{self.module}.{self.name}"


def public_modules(package: ModuleType) -> list[ModuleType]:
    """The package and all of its public modules; not one that its package hides behind a function of the same name."""
    found = [package]
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not any(part.startswith("_") for part in info.name.split(".")):
            module = importlib.import_module(info.name)
            parent, _, name = info.name.rpartition(".")
            if getattr(sys.modules[parent], name) is module:
                found.append(module)
    return found


def public_names(module: ModuleType) -> list[PublicName]:
    """Everything public in a module, but for modules: these have a page of their own."""
    names: dict[str, str] = {}  # the text is that below an assignment
    tree = ast.parse(_source(module))
    for statement, below in zip(tree.body, [*tree.body, None][1:], strict=True):
        match statement:
            case ast.ImportFrom(names=aliases):
                names |= dict.fromkeys((alias.name for alias in aliases if alias.asname == alias.name), "")
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names[name] = ""
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                names[name] = _string(below)
    names |= dict.fromkeys(set(getattr(module, "__all__", ())) - set(names), "")
    values = {name: getattr(module, name) for name in names if not name.startswith("_")}
    return [
        PublicName(module.__name__, name, value, names[name] or _text_of(module, name, value))
        for name, value in values.items()
        if not inspect.ismodule(value)
    ]


def _string(statement: ast.stmt | None) -> str:
    match statement:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return inspect.cleandoc(text)
    return ""


def documents_itself(value: Any) -> bool:
    """Classes and functions have a docstring; constants and aliases cannot."""
    return inspect.isclass(value) or inspect.isroutine(value)


def _text_of(module: ModuleType, name: str, value: Any) -> str:
    if documents_itself(value):
        return inspect.cleandoc(_own_docstring(value))
    return _string_at_origin(module, name)


def _own_docstring(value: Any) -> str:
    """Neither inherited nor written by Python itself, as `Point(x, y)` is for a NamedTuple or a dataclass."""
    text = (value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__) or ""
    return "" if text.startswith(f"{value.__name__}(") else text


def _source(module: ModuleType) -> str:
    return Path(str(module.__file__)).read_text(encoding="utf-8")


def _string_at_origin(module: ModuleType, name: str) -> str:
    """The string below a re-exported constant, where it is assigned."""
    for statement in ast.parse(_source(module)).body:
        match statement:
            case ast.ImportFrom(module=str(origin), names=aliases) if any(alias.name == name for alias in aliases):
                found = public_names(importlib.import_module(origin))
                return next((public.text for public in found if public.name == name), "")
    return ""


def undocumented(package: ModuleType) -> list[str]:
    """Paths of the public modules, names, methods and properties without a docstring of their own."""
    missing: dict[str, None] = {}
    for module in public_modules(package):
        if not module.__doc__:
            missing[module.__name__] = None
        for public in public_names(module):
            if not public.text:
                missing[public.path] = None
            if inspect.isclass(public.value) and public.value.__module__.startswith(package.__name__):
                missing |= dict.fromkeys(f"{public.path}.{name}" for name in _undocumented_members(public.value))
    return list(missing)


def _undocumented_members(cls: type) -> Iterator[str]:
    for name, member in vars(cls).items():
        is_member = inspect.isroutine(member) or isinstance(member, property | classmethod | staticmethod)
        if is_member and not name.startswith("_") and not inspect.getdoc(getattr(cls, name)):
            yield name
