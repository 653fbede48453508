"""`fvjax sigma`: its numbers are the library's, its words follow from them, and large sets are cut down audibly."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvjax import pairs
from fvjax.commands import _sigma
from fvjax.interpolants import constant_noise
from fvjax.types import Pair


@pytest.fixture(scope="module")
def arrays():
    """Pairs in as many dimensions as the prediction was calibrated for."""
    x0, x1 = np.random.default_rng(1).normal(size=(2, 20, 10)).astype(np.float32)
    return Pair(x0, x1)


@pytest.fixture(scope="module")
def file(arrays, folder):
    """The same as a file."""
    np.savez(folder / "sigma.npz", x0=arrays.x0, x1=arrays.x1)
    return "sigma.npz"


@pytest.fixture
def result(command, file):
    """What --json prints."""
    status, out, err = command("sigma", file, "--json", "--sigmas", "0.3", "3", "--times", "0.5")
    assert (status, err) == (0, "")
    return json.loads(out)


def test_numbers_are_those_of_the_library(result, arrays):
    """Catches a number of the command's own, or one in the wrong place."""
    found = Pair(*map(jnp.asarray, arrays))
    wanted = pairs.sigma_critical(found)
    assert result["predicted"] == pytest.approx(wanted.predicted, rel=1e-6)
    assert result["measured"] == pytest.approx(wanted.measured, rel=1e-6)
    assert [row["sigma"] for row in result["table"]] == [0.3, 3.0]
    key = jax.random.split(jax.random.key(0), 4)[2]
    for row in result["table"]:
        perplexity = pairs.identifiability(key, found, constant_noise(row["sigma"]), 0.5)
        assert row["perplexity"] == [pytest.approx(float(perplexity.perplexity), rel=1e-4)]
    returned = [row["returned"] for row in result["table"]]
    assert returned[0] == 1.0
    assert returned[1] < 0.3
    assert (result["pairs"], result["compared_pairs"], result["extrapolated"]) == (20, 20, None)


def test_text_and_page_say_the_same(command, file, folder):
    """Catches a table or a page without the measured number, and a page that is written over."""
    status, out, _ = command("sigma", file, "--sigmas", "0.3", "--out", "sigma.html")
    assert status == 0
    measured = out.split("measured sigma_critical")[1].split()[0]
    assert f"At sigma = {measured} the ideal network of these 20 pairs" in " ".join(out.split())
    assert out.strip().splitlines()[-1] == "page: sigma.html"
    page = (folder / "sigma.html").read_text(encoding="utf-8")
    assert f"At sigma = {measured}" in page
    assert page.count("<svg") == 1
    status, out, err = command("sigma", file, "--out", "sigma.html")
    assert (status, out) == (2, "")
    assert "--force replaces it" in err


def test_large_sets_are_cut_down_and_it_is_said(command, file, arrays, monkeypatch):
    """Catches a subset that is passed off as all pairs, or a prediction that is made from the subset."""
    monkeypatch.setattr(_sigma, "MULTIPLES", (1.0,))
    status, out, _ = command("sigma", file, "--subset", "12", "--sources", "8")
    assert status == 0
    assert "compared: 12 random pairs, 8 of their sources" in out
    assert "(of 12 random pairs)" in out
    said = " ".join(out.split())
    assert "the ideal network of 12 random pairs of 20" in said
    assert "has a standard error of 0.18" in said
    assert "For all 20 pairs that makes sigma = " in said
    whole = pairs.predicted_sigma_critical(Pair(*map(jnp.asarray, arrays)))
    assert f"predicted sigma_critical  {whole.predicted:.3g} " in out


def said(**changes):
    """The sentences about a result."""
    result = {"pairs": 50, "compared_pairs": 50, "sources": 50, "dims": [12], "measured": 0.5, "predicted": 0.4}
    result |= {"predicted_of_compared": 0.4, "extrapolated": None}
    return " ".join(text for text, _ in _sigma.sentences(result | changes))


def test_words_for_every_case():
    """Catches a sentence about a critical sigma where there is none."""
    assert "returns half of the sources to their own target." in said()
    assert "standard error of 0.05" in said(sources=100, compared_pairs=200, pairs=200)
    for changes, words in (
        ({"pairs": 1, "compared_pairs": 1, "measured": "inf", "predicted": "inf"}, "One pair cannot be confused"),
        ({"measured": "inf"}, "returns them at every sigma that was tried"),
        ({"measured": 0.0}, "does not return half of the sources even at the smallest sigma"),
        ({"measured": 0.0, "predicted": 0.0}, "meet another one exactly at t = 1/2"),
    ):
        assert words in said(**changes)
        assert "At sigma =" not in said(**changes)
    assert "calibrated for 10 or more dimensions; at 2" in said(dims=[2])
    assert "calibrated" not in said()
    assert "0.5" in said(compared_pairs=20, extrapolated=0.45, pairs=50)


def test_translations_and_single_pairs_have_no_critical_sigma(command, folder):
    """Catches an infinite number in JSON, which no other reader takes, and a table without a centre."""
    x = np.random.default_rng(2).normal(size=(4, 2)).astype(np.float32)
    np.savez(folder / "one.npz", x0=x[:1], x1=x[1:2])
    status, out, _ = command("sigma", "one.npz", "--json", "--times", "0.5")
    assert status == 0
    result = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert result["predicted"] == "inf"
    assert all(row["returned"] == 1.0 for row in result["table"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing.npz",), "nothing.npz must be an npz file"),
        (("affine.npz",), "pairs must be a file with x0 and x1, got affine.npz with a, b"),
        (("pairs.npz", "--sigmas", "0"), "sigmas must be > 0"),
        (("pairs.npz", "--times", "1"), "times must be in (0, 1)"),
        (("pairs.npz", "--subset", "1"), "subset must be >= 2, got 1"),
        (("pairs.npz", "--sources", "0"), "sources must be an integer >= 1, got 0"),
        (("pairs.npz", "--out", "run"), "run must be a file, got a folder"),
        (("pairs.npz", "--out", "pairs.npz"), "is there already"),
    ],
)
def test_bad_input_is_one_line_and_status_2(command, arguments, message):
    """Catches a traceback, and a search that begins before the options were checked."""
    status, out, err = command("sigma", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_folder_of_a_saved_flow_is_a_set_of_pairs(folder):
    """Catches a command that makes its user look for the file in it."""
    from fvjax.commands._problems import read_pairs

    assert read_pairs(folder / "run" / "flows" / "a")["x0"].shape == (16, 3)
