"""The command line as a whole: help, version, exit statuses, and one line for everything that can be wrong."""

import importlib
import os
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest

import fvjax
from fvjax.commands import _help

COMMANDS = ("audit", "sigma", "variance", "report")


def test_help_leads_to_every_command(command):
    """Catches a command that no help mentions, and examples with options that do not exist."""
    for arguments in ((), ("--help",)):
        status, out, _ = command(*arguments)
        assert status == 0
        assert all(f"fvjax {name}" in out for name in COMMANDS)
    for name in COMMANDS:
        status, out, _ = command(name, "--help")
        assert status == 0
        for word in (f"fvjax {name} ", "What comes out", "Cost"):
            assert word in out
        used = set(re.findall(r"--[a-z][a-z-]+", _help.LONG[name]))
        listed = set(re.findall(r"^[│|]? *(--[a-z-]+)", out.partition(" options ")[2], re.MULTILINE))
        assert used <= listed
    assert set(_help.LONG) == set(_help.SHORT) == set(COMMANDS)


def test_version(command):
    """Catches a version that is not the package's."""
    assert command("--version") == (0, f"fvjax {fvjax.__version__}\n", "")


def test_console_entry_point_is_the_function_that_is_tested_here(repository):
    """Catches an entry point in pyproject.toml that does not exist."""
    scripts = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["fvjax"].split(":")
    assert getattr(importlib.import_module(module), function) is fvjax.commands.main


def test_a_child_process_says_one_line_and_exits_with_2(folder, repository):
    """Catches a traceback where there is no test around: `python -m fvjax`, a user's module, a missing file."""
    paths = os.pathsep.join([str(repository), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "fvjax", "variance", "--field", "mine_field:affine", "--pairs", "nothing.npz"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error: nothing.npz must be an npz file, got no file of that name\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments", [("nothing",), ("audit", "--nothing"), ("sigma",), ("audit", "run", "--solver", "rk4"), ("--nothing",)]
)
def test_unknown_words_exit_with_2(command, arguments):
    """Catches an option that is ignored."""
    status, out, err = command(*arguments)
    assert status == 2
    assert "Traceback" not in err
    assert out == ""


GIVEN = {"field": "mine_field:affine", "params": "affine.npz", "pairs": "pairs.npz"}

ERRORS = {
    "nothing at all": ({"field": None, "params": None, "pairs": None}, "RUN, or --field and --pairs, must be given"),
    "no pairs": ({"pairs": None}, "RUN, or --field and --pairs, must be given"),
    "a flow without a run": ({"flow": "a"}, "--flow must come with RUN"),
    "no colon": ({"field": "mine_field.affine"}, "field must be module:function, of a module that can be imported"),
    "no such module": ({"field": "mine_nothing:affine"}, "and there is no module mine_nothing"),
    "a module that fails": ({"field": "mine_failing:f"}, "whose import fails: RuntimeError: no licence"),
    "a module that needs another": ({"field": "mine_needy:f"}, "whose import fails: ModuleNotFoundError: No module"),
    "no such function": ({"field": "mine_field:nothing"}, "and mine_field has no such function"),
    "no function": ({"field": "mine_field:constant"}, "and mine_field has no such function"),
    "a wrong shape": ({"field": "mine_field:wide"}, "must return the like of x, float32[3], got float32[6]"),
    "a field that fails": ({"field": "mine_field:broken"}, "must take ONE x of shape (3,), got KeyError: 'dense'"),
    "no field": ({"field": "mine_field:no_field", "arguments": '{"dims": 2}'}, "a Model, or one of them with its par"),
    "wrong arguments": ({"arguments": '{"size": 2}'}, "must return a field, got TypeError"),
    "no JSON": ({"arguments": "dims=2"}, "--arguments must be a JSON object such as"),
    "JSON of another kind": ({"arguments": "[2]"}, "--arguments must be a JSON object such as"),
    "params of another network": (
        {"field": "fvjax.nets:mlp", "arguments": '{"dims": 3}'},
        "params must be those of the field's init, got nothing for params['block_0']['bias'] where it has (128,)",
    ),
    "a network without params": (
        {"field": "fvjax.nets:mlp", "arguments": '{"dims": 3}', "params": None},
        "--params must be given",
    ),
    "no params": ({"params": None}, "must take ONE x of shape (3,), got TypeError"),
    "missing params": ({"params": "nothing.npz"}, "--params must be a file or a folder, got nothing.npz"),
    "params of another kind": ({"params": "mine_field.py"}, "--params must be .npz, .msgpack or the folder of a"),
    "a folder of no checkpoint": ({"params": "run"}, "--params must be a checkpoint of orbax or fvjax.checkpoints"),
    "damaged params": ({"params": "text.npz"}, "text.npz must be an npz file of arrays"),
    "damaged msgpack": ({"params": "text.msgpack"}, "text.msgpack must be a msgpack file of flax.serialization"),
    "no such part of the params": ({"params_entry": "ema"}, "--params-entry must name a part of affine.npz, which has"),
    "missing pairs": ({"pairs": "nothing.npz"}, "nothing.npz must be an npz file, got no file"),
    "pairs that are text": ({"pairs": "text.npz"}, "text.npz must be an npz file of arrays"),
    "pairs without x1": ({"pairs": "half.npz"}, "pairs must be a file with x0 and x1, got half.npz with x0, targets"),
    "pairs of integers": ({"pairs": "integers.npz"}, "x0 must be floating point, got int"),
    "pairs of two dtypes": ({"pairs": "mixed.npz"}, "x0 and x1 must have the same dtype, got float32 and float64"),
    "pairs of two shapes": ({"pairs": "shapes.npz"}, "x0 and x1 must have the same shape, got (4, 3) and (5, 3)"),
    "sigma where there is none": ({"interpolant": "linear", "sigma": "1"}, "--sigma must not be given with"),
    "no sigma where there is one": ({"interpolant": "brownian_bridge"}, "--sigma must be given with --interpolant bro"),
    "a negative sigma": ({"sigma": "-1"}, "sigma must be >= 0"),
    "a page that is there": ({"out": "pairs.npz"}, "pairs.npz is there already: --force replaces it"),
    "no bins": ({"bins": "0"}, "bins must be an integer >= 1, got 0"),
    "odd draws": ({"draws": "3"}, "draws must be an even integer >= 2, got 3"),
}


@pytest.fixture(scope="module")
def bad_files(folder):
    """Files that are not what they are named."""
    (folder / "text.npz").write_text("x0,x1\n")
    (folder / "text.msgpack").write_bytes(b"\xc1")
    ones = np.ones((4, 3), np.float32)
    np.savez(folder / "half.npz", x0=ones, targets=ones)
    np.savez(folder / "integers.npz", x0=ones.astype(int), x1=ones.astype(int))
    np.savez(folder / "mixed.npz", x0=ones, x1=ones.astype(float))
    np.savez(folder / "shapes.npz", x0=ones, x1=np.ones((5, 3), np.float32))


def as_options(given):
    """{"held_out": "file"} -> ["--held-out", "file"]."""
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in given.items() if value is not None]
    return [word for pair in pairs for word in pair]


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_one_line_and_status_2(command, bad_files, name):
    """Catches a traceback, a second line, a wrong status, and output before the input was checked."""
    changes, message = ERRORS[name]
    status, out, err = command("variance", *as_options(GIVEN | changes))
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


RUN_ERRORS = {
    "no folder": (("nothing",), "RUN must be a folder, got nothing"),
    "a folder without flows": (("run/flows",), "RUN must hold flow.json or flows/*/flow.json"),
    "another flow": (("run", "--flow", "c"), "--flow must be one of a, b, got c"),
    "a flow of a flow": (("run/flows/a", "--flow", "a"), "--flow must name a folder in RUN/flows"),
    "a field, too": (("run", "--field", "mine_field:affine"), "--field must not be given together with RUN"),
    "a sigma, too": (("run", "--sigma", "1"), "--sigma must not be given together with RUN"),
}


@pytest.mark.parametrize("name", RUN_ERRORS)
@pytest.mark.parametrize("which", ["audit", "variance"])
def test_bad_runs_are_one_line_and_status_2(command, which, name):
    """Catches options that are accepted beside RUN and ignored."""
    arguments, message = RUN_ERRORS[name]
    status, out, err = command(which, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_the_path_of_imports_is_put_back(command):
    """Catches a current directory that stays in front of the module path of a program that calls `main`."""
    before = list(sys.path)
    command("variance", "--field", "mine_nothing:f", "--pairs", "pairs.npz")
    assert sys.path == before
