"""Versions, machine and command of the running process."""

import platform
import shlex
import sys
from pathlib import Path

import jax
import numpy as np


def environment() -> dict[str, str]:
    """Versions, machine and the exact command: what a reader needs to compare two runs, or to repeat one.

    Returns:
        Versions of jax, numpy, fvjax and python; `platform`, `device` (kind of JAX's first device), and `command` as it
        can be pasted into a shell.
    """
    return {
        "jax": jax.__version__,
        "numpy": np.__version__,
        "fvjax": sys.modules["fvjax"].__version__,  # not imported: it imports everything that lies above this package
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": jax.devices()[0].device_kind,
        "command": shlex.join(_command()),
    }


def _command() -> list[str]:
    """A module as `python -m`, a script by its name (with the interpreter if it is a Python file)."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return ["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    script = Path(sys.argv[0])
    return (["python", str(script)] if script.suffix == ".py" else [script.name]) + sys.argv[1:]
