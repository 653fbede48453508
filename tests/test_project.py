"""The promises of the project files: a cheap import, one version, the README's commands, documented names."""

import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fvjax

HEAVY = (
    "flax",
    "optax",
    "diffrax",
    "equinox",
    "lineax",
    "ott",
    "orbax",
    "tensorflow_datasets",
    "matplotlib",
    "sklearn",
    "scipy.stats",
)
SET_UP = [
    "python -m pip install -e . -c constraints.txt && python -m experiments.gaussian_rotation",
    'python -m pip install -e ".[test]" -c constraints.txt && python -m pytest',
]


def loaded_by(statement: str) -> set[str]:
    """Names in `sys.modules` after `statement` in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_fvjax_loads_no_heavy_library() -> None:
    """Catches a library that is imported at the top of a module instead of inside the function that uses it."""
    added = loaded_by("import fvjax") - loaded_by("import jax")
    assert "fvjax" in added
    assert not [name for name in sorted(added) if f"{name}.".startswith(tuple(f"{heavy}." for heavy in HEAVY))]


def test_installed_version_is_the_one_in_the_source() -> None:
    """Catches a second place where the version is typed, and a stale installation."""
    assert fvjax.__version__ == importlib.metadata.version("fvjax")


@pytest.mark.parametrize(
    ("name", "pattern"), [("CITATION.cff", r"^version: (\S+)$"), ("CHANGELOG.md", r"^## \[(\S+)\] - ")]
)
def test_project_files_name_the_version(repository: Path, name: str, pattern: str) -> None:
    """Catches a release that forgets the citation or the changelog, whose first entry is the current version."""
    found = re.search(pattern, (repository / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert found is not None
    assert found.group(1) == fvjax.__version__


def test_readme_has_exactly_the_two_set_up_commands(repository: Path) -> None:
    """Catches a set-up command that drifts from the one that CI runs, and a third one beside the two."""
    lines = [line.strip() for line in (repository / "README.md").read_text(encoding="utf-8").splitlines()]
    assert [line for line in lines if line.startswith("python -m pip install")] == SET_UP


def documentation(value: Any) -> str:
    """The docstring that was written for `value`: not one that it inherits, nor a NamedTuple's automatic signature."""
    text = value.__doc__ or ""
    return "" if inspect.isclass(value) and text.startswith(f"{value.__name__}(") else text


@pytest.mark.parametrize("name", fvjax.__all__)
def test_public_name_is_documented(name: str) -> None:
    """Catches a name that is exported without existing, or without a docstring (type aliases cannot carry one)."""
    value = getattr(fvjax, name)
    if inspect.isroutine(value) or inspect.isclass(value) or isinstance(value, ModuleType):
        assert documentation(value).strip()
