"""Parameters in other formats: what a training saved comes back as the same arrays."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvjax.commands._params import load_params
from fvjax.commands._text import InputError
from fvjax.nets import mlp


@pytest.fixture(scope="module")
def tree():
    """Dicts and lists, in two dtypes."""
    return {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "l": [jnp.ones(2, jnp.bfloat16), jnp.zeros(1)]}


def assert_same(found, wanted):
    """Equal trees of equal arrays."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_msgpack_of_flax(tmp_path):
    """Catches a reader that expects a template."""
    from flax.serialization import to_bytes

    params = mlp(2, width=3, depth=1).init(jax.random.key(0))
    (tmp_path / "p.msgpack").write_bytes(to_bytes(params))
    assert_same(load_params(tmp_path / "p.msgpack", None), params)


def test_orbax_checkpoints_and_managers(tmp_path, tree):
    """Catches lists that come back as dicts, and an optimizer's state that is taken for the parameters."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "alone", tree)
    assert_same(load_params(tmp_path / "alone", None), tree)
    with ocp.CheckpointManager(tmp_path / "manager") as manager:
        for step in (9, 10):
            state = {"params": tree, "opt_state": {"m": jnp.zeros(2)}, "step": jnp.array(step)}
            manager.save(step, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
    assert_same(load_params(tmp_path / "manager", None), tree)
    assert int(load_params(tmp_path / "manager", "step")) == 10
    with pytest.raises(InputError, match="--params-entry must name a part of .*, which has .*opt_state.*, got ema"):
        load_params(tmp_path / "manager", "ema")


def test_checkpoints_of_fvjax(tmp_path):
    """Catches the newest checkpoint not being taken, and raw parameters where there are averaged ones."""
    from fvjax import training
    from fvjax.checkpoints import Checkpoints

    params = {"a": {"w": jnp.ones((2, 2))}, "l": [jnp.zeros(3), jnp.ones(1)]}
    with Checkpoints(tmp_path / "kept", config={}) as kept:
        for step in (1, 2):
            average = jax.tree.map(lambda leaf, step=step: leaf + step, params)
            kept.save(training.TrainState(jnp.array(step), params, (), average, jax.random.key(0)))
    assert_same(load_params(tmp_path / "kept", "params"), params)
    found = load_params(tmp_path / "kept", None)
    assert float(found["a"]["w"][0, 0]) == 3.0
    file = next((tmp_path / "kept").glob("step_*2/index.json"))
    file.write_text(file.read_text().replace("float32", "float16"))
    with pytest.raises(InputError, match="is damaged: index.json does not have its digest"):
        load_params(tmp_path / "kept", None)


def test_folders_of_nothing_are_refused(tmp_path):
    """Catches orbax's traceback."""
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", Path("nothing")):
        with pytest.raises(InputError, match="--params must be"):
            load_params(path, None)
