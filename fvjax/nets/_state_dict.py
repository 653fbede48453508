"""Arrays of a PyTorch model by name: are they those of an architecture?"""

from collections.abc import Mapping
from typing import Any

import numpy as np


def check_arrays(state_dict: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses missing, unexpected and misshapen arrays, all in one error.

    Args:
        state_dict: arrays or tensors by name.
        shapes: those of the architecture.

    Raises:
        ValueError: if they differ.
    """
    found = {name: tuple(np.shape(value)) for name, value in state_dict.items()}
    problems = {
        "missing": [name for name in shapes if name not in found],
        "unexpected": [name for name in found if name not in shapes],
        "of another shape": [
            f"{name} {found[name]} instead of {shape}"
            for name, shape in shapes.items()
            if found.get(name, shape) != shape
        ],
    }
    listed = "; ".join(f"{problem}: {some(which)}" for problem, which in problems.items() if which)
    if listed:
        raise ValueError(f"state_dict must hold exactly the arrays of this architecture, got {listed}")


def some(names: list[str]) -> str:
    """The first four names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
