"""A user's folder: pairs in a file, fields in a module of their own, parameters."""

import textwrap

import jax
import numpy as np
import pytest

from fvjax.auditing import save_flow
from fvjax.auditing._trees import write_tree
from fvjax.commands import main
from fvjax.nets import mlp
from fvjax.types import Pair

MINE = """
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    def affine(params, t, x):
        return params["a"] * x + params["b"] * t

    def still(params, t, x):
        return 0 * x

    def wide(params, t, x):
        return jnp.concatenate([x, x])

    def broken(params, t, x):
        raise KeyError("dense")

    def no_field(dims):
        return dims

    class Field(eqx.Module):
        layer: eqx.nn.Linear

        def __call__(self, t, x):
            return self.layer(jnp.append(x, t))

    def make(key):
        return Field(eqx.nn.Linear(4, 3, key=key))

    def load(path):
        model = eqx.tree_deserialise_leaves(path, make(jax.random.key(0)))
        params, static = eqx.partition(model, eqx.is_inexact_array)
        return lambda params, t, x: eqx.combine(params, static)(t, x), params

    constant = 3
"""

SMALL = {"field": "fvjax.nets:mlp", "arguments": {"dims": 3, "width": 4, "depth": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of a user; a module mine_<n>.py is not to be mixed up with that of another test file."""
    place = tmp_path_factory.mktemp("user")
    (place / "mine_field.py").write_text(textwrap.dedent(MINE))
    (place / "mine_failing.py").write_text("raise RuntimeError('no licence')\n")
    (place / "mine_needy.py").write_text("import no_such_dependency\n")
    x0, x1 = np.random.default_rng(0).normal(size=(2, 16, 3)).astype(np.float32)
    np.savez(place / "pairs.npz", x0=x0, x1=x1)
    np.savez(place / "held_out.npz", x0=x1, x1=x0)
    np.savez(place / "affine.npz", a=np.float32(0.5), b=np.ones(3, np.float32))
    params = mlp(3, width=4, depth=1).init(jax.random.key(0))
    write_tree(place / "mlp.npz", params)
    save_flow(place / "run" / "flows" / "a", **SMALL, params=params, pairs=Pair(x0, x1))
    save_flow(
        place / "run" / "flows" / "b",
        field="fvjax.nets:mlp",
        arguments=SMALL["arguments"],
        params=jax.tree.map(lambda leaf: 2 * leaf, params),
        pairs=Pair(x0, x1),
        interpolant=("constant_noise", {"sigma": 0.5}),
        solver="euler",
        steps=4,
    )
    return place


@pytest.fixture
def command_in(monkeypatch, capsys):
    """A function of a folder, whose value calls the command there and returns status, stdout and stderr."""

    def entered(place):
        monkeypatch.chdir(place)

        def called(*arguments):
            capsys.readouterr()
            try:
                status = main([str(argument) for argument in arguments])
            except SystemExit as stopped:
                status = stopped.code
            return status, *capsys.readouterr()

        return called

    return entered


@pytest.fixture
def command(folder, command_in):
    """The command in the user's folder."""
    return command_in(folder)
