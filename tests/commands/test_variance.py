"""`fvjax variance`: exact numbers, split by time and layer, of saved flows and of fields in a user's file."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvjax import gradients, pairs
from fvjax.auditing._trees import read_tree
from fvjax.commands._variance import sentences, suggested_batch
from fvjax.interpolants import linear
from fvjax.losses import squared_error
from fvjax.types import Pair

GIVEN = ("--field", "mine_field:affine", "--params", "affine.npz", "--pairs", "pairs.npz")


def affine(params, t, x):
    """The field of the user's file."""
    return params["a"] * x + params["b"] * t


@pytest.fixture
def result(command):
    """What --json prints."""
    status, out, err = command("variance", *GIVEN, "--bins", "4", "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


def test_numbers_are_exact(result, folder):
    """Catches a lost weight between bins: the whole is one quadrature over all of the time."""
    arrays = read_tree(folder / "pairs.npz")
    params = {"a": jnp.float32(0.5), "b": jnp.ones(3)}
    found = Pair(jnp.asarray(arrays["x0"]), jnp.asarray(arrays["x1"]))
    moments = pairs.exact_gradient_moments(squared_error(affine), params, found, linear())
    assert result["variance"] == pytest.approx(float(gradients.total_variance(moments)), rel=1e-4)
    assert result["noise_scale"] == pytest.approx(float(gradients.gradient_noise_scale(moments)), rel=1e-4)
    by_leaf = gradients.variance_by_leaf(moments)
    assert {row["layer"]: row["parameters"] for row in result["by_layer"]} == {"a": 1, "b": 3}
    for row in result["by_layer"]:
        assert row["variance"] == pytest.approx(float(by_leaf[row["layer"]]), rel=1e-4)
    assert sum(row["share"] for row in result["by_layer"]) == pytest.approx(1)
    last = linear()._replace(time_range=(0.75, 1.0))
    moments = pairs.exact_gradient_moments(squared_error(affine), params, found, last)
    assert result["by_time"][3]["variance"] == pytest.approx(float(gradients.total_variance(moments)), rel=1e-4)
    assert (result["compared_pairs"], result["draws"], result["parameters"]) == (16, None, 4)


def test_every_flow_of_a_run_with_and_without_noise(command, folder):
    """Catches a flow that is left out, noise that is not drawn, and a page without the numbers."""
    status, out, err = command("variance", "run", "--bins", "2", "--draws", "4", "--out", "variance.html")
    assert (status, err) == (0, "")
    first, second = out.split("\nb: ")
    assert first.startswith("a: 83 parameters, linear\npairs: all 16; quadrature in time\n")
    assert second.startswith("83 parameters, constant_noise (sigma = 0.5)\npairs: all 16; quadrature in time, 4 noises")
    for part in (first, second):
        assert "a batch of about" in part
        assert all(name in part for name in ("input", "block_0", "output", "noise scale"))
    assert out.strip().splitlines()[-1] == "page: variance.html"
    assert "block_0" in (folder / "variance.html").read_text(encoding="utf-8")


def test_equinox_models_that_read_their_own_file(command, folder):
    """Catches a factory of (field, params) that works for saved flows only."""
    import equinox as eqx

    key = jax.random.key(3)
    linear_layer = eqx.nn.Linear(4, 3, key=key)
    eqx.tree_serialise_leaves(folder / "model.eqx", linear_layer)
    arguments = ("--field", "mine_field:load", "--arguments", '{"path": "model.eqx"}', "--pairs", "pairs.npz")
    status, out, err = command("variance", *arguments, "--bins", "2", "--json")
    assert (status, err) == (0, "")
    assert {row["layer"]: row["parameters"] for row in json.loads(out)["by_layer"]} == {"layer": 15}


def test_subsets_are_said(command):
    """Catches a subset that is passed off as all pairs."""
    status, out, _ = command("variance", *GIVEN, "--bins", "2", "--subset", "5")
    assert status == 0
    assert "pairs: 5 random pairs of the 16 (--subset)" in out


def test_a_field_without_parameters_has_no_gradient(command):
    """Catches a variance of 0 where there is nothing to vary."""
    status, out, err = command("variance", "--field", "mine_field:still", "--pairs", "pairs.npz")
    assert (status, out) == (2, "")
    assert "mine_field:still must have parameters to differentiate by (--params), got none" in err


def test_a_field_that_is_not_finite_exits_with_1(command, folder):
    """Catches nan in a table with status 0."""
    np.savez(folder / "nan.npz", a=np.float32(np.nan), b=np.ones(3, np.float32))
    status, _, err = command("variance", *GIVEN[:2], "--params", "nan.npz", *GIVEN[4:], "--bins", "2")
    assert status == 1
    assert err == "error: the gradient variance of mine_field:affine is nan: the field is not finite somewhere\n"


def test_gradients_that_are_not_verified_exit_with_1(command, wrong_gradients):
    """Catches a table of numbers that the library itself finds to be wrong."""
    status, out, err = command("variance", *GIVEN, "--bins", "2")
    assert (status, out) == (1, "")
    assert err.startswith("error: the gradients of ['a'], ['b'] are not those of vmap(grad)")


@pytest.mark.parametrize(
    ("scale", "batch"), [(0.1, 1), (1.0, 1), (3.0, 4), (26.0, 32), (1e5, 131072), (math.inf, None), (math.nan, None)]
)
def test_batch_sizes_are_powers_of_two_near_the_noise_scale(scale, batch):
    """Catches a batch of 0 examples, and one for a noise scale that does not exist."""
    assert suggested_batch(scale) == batch


def test_words_for_every_noise_scale():
    """Catches a batch size that is recommended from a mean gradient of 0."""
    row = {"start": 0.0, "end": 0.5, "variance": 1.0, "share": 0.75, "layer": "dense"}
    result = {"compared_pairs": 10, "by_time": [row], "by_layer": [row]}
    for scale, words in (
        (60.0, "Noise scale 60 examples: a batch of about 64 makes half of the progress"),
        (1e5, "many times the number of pairs"),
        ("inf", "The mean gradient is 0"),
    ):
        said = " ".join(sentences(result | {"noise_scale": scale, "batch": suggested_batch(float(scale))}))
        assert words in said
        assert "at t in [0, 0.5]: 75% of the sum over bins; and in the layer dense: 75% of the total." in said
