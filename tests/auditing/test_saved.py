"""Flows on disk: what is saved comes back, whole or not at all, and what cannot be used later is refused at once."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fvjax
from fvjax.auditing import _trees, load_flow, save_flow
from fvjax.auditing._trees import read_tree, write_tree
from fvjax.nets import mlp
from fvjax.types import AffineMap, Pair

MLP = {"field": "fvjax.nets:mlp", "arguments": {"dims": [2], "width": 4, "depth": 1}}


@pytest.fixture(scope="module")
def params():
    """Of a small network."""
    return mlp(2, width=4, depth=1).init(jax.random.key(0))


@pytest.fixture(scope="module")
def pairs():
    """Six of them, in two dimensions."""
    x = np.random.default_rng(0).normal(size=(2, 6, 2)).astype(np.float32)
    return Pair(x[0], x[1])


def assert_same(found, wanted):
    """Equal structures, dtypes and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert np.shape(a) == np.shape(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


TREES = {
    "nested dicts": {"a": {"b": np.arange(3.0)}, "c": np.ones((2, 2), np.float16)},
    "lists, tuples, None, empty ones": {"l": [np.arange(2), (np.float32(1.5), {}, ())], "n": None, "e": []},
    "bfloat16": {"w": jnp.array([[1.5, -2.0]], jnp.bfloat16), "s": jnp.array(3, jnp.bfloat16)},
    "names with slashes": {"a/b": np.ones(1), "a": {"b": np.zeros(2)}},
    "integers as names": {3: np.arange(2), 0: {"a": np.ones(1)}},
    "a named tuple": AffineMap(np.eye(2), np.zeros(2)),
    "a leaf alone": np.arange(4),
    "no leaf": {},
    "complex, bool, no rows": {"z": np.array([1j]), "b": np.array([True]), "o": np.zeros((0, 3))},
    "the name of the structure": {"__structure__": np.ones(2)},
}


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", TREES)
def test_trees_come_back_bit_for_bit(tmp_path, name, mapped):
    """Catches a lost container, a dtype that numpy's files do not know, and two leaves under one name."""
    write_tree(tmp_path / "t.npz", TREES[name])
    assert_same(read_tree(tmp_path / "t.npz", mapped=mapped), TREES[name])


def test_files_of_nested_dicts_are_those_of_save_params(tmp_path, params):
    """Catches a format of our own where numpy's and `save_params`' would do."""
    from fvjax.nets.convert import load_params, save_params

    write_tree(tmp_path / "ours.npz", params)
    save_params(tmp_path / "theirs.npz", params)
    assert_same(load_params(tmp_path / "ours.npz"), params)
    assert_same(jax.tree.map(jnp.asarray, read_tree(tmp_path / "theirs.npz")), params)


def test_mapped_arrays_are_read_as_they_are_sliced(tmp_path):
    """Catches pairs that are read into memory whole; np.savez and np.savez_compressed are read too."""
    x = np.arange(24.0).reshape(6, 4)
    np.savez(tmp_path / "plain.npz", x0=x, fortran=np.asfortranarray(x))
    np.savez_compressed(tmp_path / "small.npz", x0=x)
    plain = read_tree(tmp_path / "plain.npz", mapped=True)
    assert isinstance(plain["x0"], np.memmap)
    np.testing.assert_array_equal(plain["x0"][2:4], x[2:4])
    np.testing.assert_array_equal(plain["fortran"], x)
    np.testing.assert_array_equal(read_tree(tmp_path / "small.npz", mapped=True)["x0"], x)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": "text"}, "got str at a"),
        ({"a": {"b": jax.random.key(0)}}, "at a/b"),
        ({"a": object()}, "got object at a"),
        ({(1, 2): np.ones(1)}, "keys of params must be strings or integers"),
        ({"a": {1.5: np.ones(1)}}, "at a"),
        ({"f": jnp.tanh}, "at f"),
    ],
)
def test_what_is_no_tree_of_arrays_is_refused(tmp_path, tree, message):
    """Catches pickled objects, and a file that is left behind when writing fails."""
    with pytest.raises(ValueError, match=message):
        write_tree(tmp_path / "t.npz", tree)
    assert list(tmp_path.iterdir()) == []


def test_files_run_no_code(tmp_path):
    """Catches a reader that unpickles, and one that calls whatever a file names."""
    np.savez(tmp_path / "pickled.npz", a=np.array([object()]))
    structure = {"named": "os:system", "items": [{"array": "a", "dtype": "float64"}]}
    np.savez(tmp_path / "named.npz", a=np.ones(1), **{_trees.STRUCTURE: np.array(json.dumps(structure))})
    for name, message in (("pickled", "Object arrays cannot be loaded"), ("named", "no named tuple")):
        with pytest.raises(ValueError, match=message):
            read_tree(tmp_path / f"{name}.npz")


@pytest.mark.parametrize("mapped", [False, True])
def test_damaged_files_say_so_in_one_line(tmp_path, mapped):
    """Catches a traceback of zipfile or numpy at a cut-off, empty, foreign or missing file."""
    write_tree(tmp_path / "good.npz", {"x": np.arange(100.0)})
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:-40])
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_text("x0,x1\n1,2\n")
    np.save(tmp_path / "array.npy", np.ones(3))
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("readme.txt", "no arrays")
    for name in ("cut.npz", "empty.npz", "text.npz", "array.npy", "other.npz", "missing.npz"):
        with pytest.raises(ValueError, match=f"{name} must be an npz file") as caught:
            read_tree(tmp_path / name, mapped=mapped)
        assert "\n" not in str(caught.value)


def test_flows_come_back(tmp_path, params, pairs):
    """Catches a part of a flow that is saved and not read, or read as another."""
    held_out, targets = Pair(pairs.x0[:3] + 1, pairs.x1[:3]), pairs.x1[::-1]
    folder = save_flow(
        tmp_path / "run" / "flows" / "a",
        **MLP,
        params=params,
        pairs=pairs,
        interpolant=("constant_noise", {"sigma": 0.05}),
        held_out=held_out,
        ot_targets=targets,
        solver="euler",
        steps=7,
    )
    assert {path.name for path in folder.iterdir()} == {"flow.json", "params.npz", "pairs.npz"}
    flow = load_flow(folder)
    assert_same(flow.params, params)
    assert_same(Pair(*map(np.asarray, flow.pairs)), pairs)
    assert_same(Pair(*map(np.asarray, flow.held_out)), held_out)
    np.testing.assert_array_equal(flow.ot_targets, targets)
    assert (flow.solver, flow.steps) == ("euler", 7)
    assert float(flow.interpolant.coefficients(0.5).gamma) == pytest.approx(0.05)
    x = jnp.asarray(pairs.x0[0])
    np.testing.assert_array_equal(flow.field(flow.params, 0.5, x), mlp(2, width=4, depth=1).apply(params, 0.5, x))


def write_module(folder, monkeypatch, name, text):
    """A user's file that can be imported."""
    (folder / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(folder)


def test_fields_may_be_functions_or_made_with_their_own_params(tmp_path, monkeypatch, pairs):
    """Catches a factory of (field, params) whose params are lost, and fields that need none."""
    write_module(
        tmp_path,
        monkeypatch,
        "saved_fields",
        """
        import jax.numpy as jnp
        def still(params, t, x):
            return 0 * x
        def linear(params, t, x):
            return params["a"] * x
        def bound(factor, shape=()):
            return linear, {"a": jnp.full(shape, factor)}
        """,
    )
    still = load_flow(save_flow(tmp_path / "still", field="saved_fields:still", params=None, pairs=pairs))
    assert still.params is None
    assert not (tmp_path / "still" / "params.npz").exists()
    made = {"field": "saved_fields:bound", "arguments": {"factor": 2.0}}
    bound = load_flow(save_flow(tmp_path / "bound", **made, params=None, pairs=pairs, held_out=pairs.x0))
    np.testing.assert_array_equal(bound.field(bound.params, 0.0, jnp.ones(2)), [2, 2])
    assert np.shape(bound.held_out) == (6, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"field": "nothing"}, "field must be module:function, of a module that can be imported"),
        ({"field": "__main__:f"}, "of a module that can be imported"),
        ({"field": "no_such_module:f"}, "there is no module no_such_module"),
        ({"field": "fvjax.nets:nothing"}, "fvjax.nets has no such function"),
        ({"field": "fvjax:__version__"}, "has no such function"),
        ({"arguments": {"dims": 3}}, "params must be those of the field's init"),
        ({"arguments": {"size": 3}}, "must return a field, got TypeError"),
        ({"arguments": {"dims": np.ones(2)}}, "arguments must be JSON values"),
        ({"params": {}}, "params must be those of the field's init, got nothing"),
        ({"field": "fvjax:linear", "arguments": {}, "params": None}, "must return a velocity field"),
        ({"field": "fvjax.losses:batch_loss", "arguments": None}, "must take ONE x of shape (2,), got"),
        ({"field": "jax.numpy:sum", "arguments": None}, "field(params, t, x) must"),
        ({"interpolant": "straight"}, "interpolant must be one of linear, constant_noise"),
        ({"interpolant": ("linear", {"sigma": 1.0})}, "the arguments of linear must be"),
        ({"interpolant": ("constant_noise", {"sigma": -1.0})}, "sigma must be >= 0"),
        ({"held_out": np.ones((3, 5), np.float32)}, "held_out must hold examples of shape (2,), got (3, 5)"),
        ({"held_out": np.ones((3, 2))}, "must have the same dtype, got float64 and float32"),
        ({"ot_targets": np.ones((3, 2), np.float32)}, "ot_targets and x0 must have the same shape"),
    ],
)
def test_what_could_not_be_audited_later_is_refused_at_once(tmp_path, params, pairs, changes, message):
    """Catches a run that saves for hours what nobody can load; and a folder that is left behind."""
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        save_flow(tmp_path / "flow", **({**MLP, "params": params, "pairs": pairs} | changes))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("x0", "x1", "message"),
    [
        (np.ones((4, 2), int), np.ones((4, 2), int), "x0 must be floating point"),
        (np.ones((4, 2), np.float32), np.ones((4, 2)), "same dtype, got float32 and float64"),
        (np.ones((4, 2)), np.ones((5, 2)), "must have the same shape"),
        (np.ones(4), np.ones(4), "must have shape"),
        (np.ones((0, 2)), np.ones((0, 2)), "N >= 1"),
    ],
)
def test_pairs_that_are_none_are_refused(tmp_path, params, x0, x1, message):
    """Catches mixed dtypes above all: JAX would turn both into float32 without a word."""
    with pytest.raises(ValueError, match=message):
        save_flow(tmp_path / "flow", **MLP, params=params, pairs=Pair(x0, x1))


def test_saving_again_replaces_the_flow_and_its_audit_and_nothing_else(tmp_path, params, pairs):
    """Catches an audit that outlives the flow that it is of, and a folder of other things that is overwritten."""
    folder = save_flow(tmp_path / "flow", **MLP, params=params, pairs=pairs)
    (folder / "audit.json").write_text("{}")
    save_flow(folder, **MLP, params=params, pairs=pairs._replace(x1=pairs.x0))
    assert not (folder / "audit.json").exists()
    np.testing.assert_array_equal(load_flow(folder).pairs.x1, pairs.x0)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="folder must be new, empty or that of a saved flow, got .* with notes.txt"):
        save_flow(folder, **MLP, params=params, pairs=pairs)
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("stage", ["params.npz", "rename"])
def test_a_failed_save_leaves_the_old_flow(tmp_path, monkeypatch, params, pairs, stage):
    """Catches a flow that is half old and half new after a full disk."""
    folder = save_flow(tmp_path / "flow", **MLP, params=params, pairs=pairs)

    def fail(path, *rest):
        if stage == "rename" or path.name == stage:
            raise OSError("no space left on device")
        return write_tree(path, *rest)

    monkeypatch.setattr("fvjax.auditing._saved.write_tree", fail)
    with pytest.raises(OSError, match="no space"):
        save_flow(folder, **MLP, params=params, pairs=pairs._replace(x1=pairs.x0))
    assert [path.name for path in tmp_path.iterdir()] == ["flow"]
    np.testing.assert_array_equal(load_flow(folder).pairs.x1, pairs.x1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("flow.json", None, "without flow.json"),
        ("flow.json", "{", "got a damaged file"),
        ("flow.json", '{"format": 1}', "got a damaged file"),
        ("pairs.npz", "nothing", "pairs.npz must be an npz file"),
        ("pairs.npz", None, "pairs.npz must be an npz file, got no file"),
        ("params.npz", "nothing", "params.npz must be an npz file"),
        ("params.npz", None, "params must be those of the field's init"),
    ],
)
def test_damaged_folders_say_so(tmp_path, params, pairs, name, content, message):
    """Catches a traceback, or a flow of random parameters in place of lost ones."""
    folder = save_flow(tmp_path / "flow", **MLP, params=params, pairs=pairs)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_flow(folder)


def test_newer_formats_are_refused(tmp_path, params, pairs):
    """Catches a file of a later version that is read as if it were understood."""
    folder = save_flow(tmp_path / "flow", **MLP, params=params, pairs=pairs)
    config = json.loads((folder / "flow.json").read_text())
    (folder / "flow.json").write_text(json.dumps(config | {"format": 99}))
    with pytest.raises(ValueError, match="got 99: update fvjax"):
        load_flow(folder)


def test_kill_leaves_a_whole_flow_or_none(tmp_path, params, pairs):
    """Catches files that are written in place: the process is killed by itself while it writes parameters."""
    child = """
        import os, signal
        import numpy as np
        from fvjax.auditing import _saved
        from fvjax.types import Pair
        def kill(path, tree):
            if path.name == "params.npz":
                path.write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            return write(path, tree)
        write, _saved.write_tree = _saved.write_tree, kill
        x = np.ones((3, 2), np.float32)  # where(params, t, x) is a field of two dimensions
        _saved.save_flow("flow", field="jax.numpy:where", params=np.ones(2, bool), pairs=Pair(x, x))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(child)],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "flow").exists()
    save_flow(tmp_path / "flow", **MLP, params=params, pairs=pairs)
    assert [path.name for path in tmp_path.iterdir()] == ["flow"]


def test_they_are_public():
    """Catches a name that is documented and not exported."""
    assert fvjax.auditing.save_flow is save_flow
    assert fvjax.auditing.load_flow is load_flow
