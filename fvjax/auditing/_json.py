"""Frozen dataclasses of plain numbers as strict JSON and back, exactly."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

Record = TypeVar("Record")

_NOT_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def plain(value: Any) -> Any:
    """Dataclasses and named tuples as dicts, tuples as lists; floats that are not finite as "Infinity" and so on.

    Strict JSON has no number for these. Everything else is a str, an int, a finite float, a bool or None.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(item) for name, item in value._asdict().items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def restored(kind: type[Record], content: Any, name: str = "the audit") -> Record:
    """The inverse of `plain` for one dataclass or named tuple.

    Raises:
        ValueError: if a field is missing, unknown, or not of its type.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} must be an object of JSON, got {type(content).__name__}")
    hints = typing.get_type_hints(kind)
    differing = sorted(set(hints) ^ set(content))
    if differing:
        raise ValueError(f"{name} must have the fields of {kind.__name__}, differs in {', '.join(differing)}")
    return kind(**{key: _value(hint, content[key], f"{name}.{key}") for key, hint in hints.items()})


def _value(hint: Any, content: Any, name: str) -> Any:
    if typing.get_origin(hint) is types.UnionType:
        if content is None:
            return None
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(content, list):
            raise ValueError(f"{name} must be a list, got {type(content).__name__}")
        return tuple(_value(typing.get_args(hint)[0], item, f"{name}[{k}]") for k, item in enumerate(content))
    if dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"):
        return restored(hint, content, name)
    if hint is float and isinstance(content, str):
        if content not in _NOT_FINITE:
            raise ValueError(f"{name} must be a number, got {content!r}")
        return _NOT_FINITE[content]
    if hint is float and isinstance(content, int) and not isinstance(content, bool):
        return float(content)
    if type(content) is not hint:
        raise ValueError(f"{name} must be of type {hint.__name__}, got {content!r}")
    return content
