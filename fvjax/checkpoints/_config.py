"""Configurations as JSON values: what is stored with a checkpoint, and how two of them differ."""

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

ABSENT = "(absent)"


class ConfigMismatchError(ValueError):
    """The checkpoints were made with another configuration; the message lists every difference."""


def as_json(value: Any, name: str = "config") -> Any:
    """`value` as JSON holds it: tuples become lists, numpy scalars plain numbers, keys strings.

    Raises:
        ValueError: if it holds anything else than JSON can (paths, arrays, classes, ...).
    """
    if isinstance(value, Mapping):
        return {str(key): as_json(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, np.generic):
        return as_json(value.item(), name)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{name} must be a JSON value (or left out of the config), got {type(value).__name__}")


def diff_configs(saved: Mapping[str, Any], asked: Mapping[str, Any], *, ignore: Collection[str] = ()) -> list[str]:
    """Lists what differs between two configurations.

    ==================  ====================================
    1 and 1.0           equal: numbers compare by value
    True and 1          different
    nan and nan         equal
    a tuple and a list  equal where their entries are
    ==================  ====================================

    Args:
        saved: nested mapping of JSON values.
        asked: the same.
        ignore: names that do not count, nested ones with dots; "model" ignores all that begins with "model.".

    Returns:
        One "name: saved -> asked" for every difference, in the order of `saved`, then of `asked`; empty if none.

    Raises:
        ValueError: if a value that counts is no JSON value.
    """
    old, new = (dict(_flatten(config, ignore)) for config in (saved, asked))
    return [
        f"{name}: {_show(old, name)} -> {_show(new, name)}"
        for name in dict.fromkeys([*old, *new])
        if name not in old or name not in new or not _equal(old[name], new[name])
    ]


def _flatten(value: Any, ignore: Collection[str], name: str = "") -> Iterator[tuple[str, Any]]:
    if name and name in ignore:
        return
    if isinstance(value, Mapping) and (value or not name):
        for key, item in value.items():
            yield from _flatten(item, ignore, f"{name}.{key}" if name else str(key))
    else:
        yield name, as_json(value, f"config.{name}")


def _equal(a: Any, b: Any) -> bool:
    if json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True):
        return True
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return all(map(_equal, a, b))
    numbers = (isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))
    return all(numbers) and bool(a == b)


def _show(config: Mapping[str, Any], name: str) -> str:
    return json.dumps(config[name]) if name in config else ABSENT
