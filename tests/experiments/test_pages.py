"""What reports say: verdicts follow the numbers in either direction, and no half report is left behind."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest
from matplotlib.figure import Figure

from experiments import report
from experiments.architectures import page as architectures
from experiments.celeba import page as celeba
from experiments.cifar10 import page as cifar10
from experiments.common import RunFolder
from experiments.gaussian_mixture import page as mixture
from experiments.gaussian_mixture.statistics import CLAIMS
from experiments.gaussian_rotation import page as rotation
from experiments.systems import page as systems
from experiments.w2_benchmark import page as w2
from fvjax.report import Page, Sentence

SHARES = [(1.0, "bad"), (0.0, "good"), (0.5, "unsure")]
"""Share of wrong pairs that a network returns, and what is to be said of it."""


def level_of(sentences, words):
    """The level of the only sentence with these words."""
    (found,) = [sentence for sentence in sentences if words in sentence.text]
    return found.level


def celeba_results(share, held_out=2.0):
    """One network on shuffled pairs that returns this share of them."""
    common = {"stage": "shuffled", "sigma": 0.5, "solver": "euler", "steps": 100, "loss": 0.1, "n": 100}
    near, far = (0.4125, 6.125) if share > 0.5 else (6.125, 0.4125)
    rows = [
        common | {"split": "train", "target": "ot", "l2_mean": far, "recovered": share},
        common | {"split": "train", "target": "shuffled", "l2_mean": near, "recovered": share},
        common | {"split": "held_out", "target": "ot", "l2_mean": held_out},
    ]
    return {
        "data": "toys",
        "rows": rows,
        "baselines": [{"baseline": "identity", "split": "held_out", "l2_mean": 3.0}],
        "minimiser": [{"sigma": 0.5, "recovered": 1.0, "n": 50}],
        "sigma_c_predicted": 1.0,
        "sigma_c_measured": {"minimiser": 1.1, "networks": None},
        "sweep": {},
        "optimality": None,
        "settings": {"coupling": "shuffled", "pairs": 100},
    }


@pytest.mark.parametrize(("share", "level"), SHARES)
def test_pairs_of_images_are_judged_by_who_returns_them(share, level):
    """Catches a verdict that does not depend on the share, and one without its numbers."""
    results = celeba_results(share)
    first = celeba.sentences(results)[0]
    assert first.level == level
    assert ("L2 0.41 to the pair" if share > 0.5 else "L2 6.12 to the pair") in first.text
    words = {"bad": "returned", "good": "let go", "unsure": "undecided"}[level]
    assert f"100 shuffled pairs of toys: {words} at sigma = 0.5." == celeba.headline(results)
    ideal = [sentence for sentence in celeba.sentences(results) if "an ideal network would return" in sentence.text]
    assert len(ideal) == (level == "good")
    assert "CelebA: the images are toys." in celeba.not_tested(results)


def test_new_images_are_compared_with_leaving_them_as_they_are():
    """Catches a map that is praised though the identity is nearer, and a wrong prediction that is called right."""
    for held_out, level in ((2.0, "good"), (4.0, "bad")):
        assert level_of(celeba.sentences(celeba_results(1.0, held_out)), "new images") == level
    results = celeba_results(1.0)
    assert level_of(celeba.sentences(results), "exact minimiser lets half") == "good"
    results["sigma_c_measured"]["minimiser"] = 2.0
    assert level_of(celeba.sentences(results), "exact minimiser lets half") == "unsure"


EMPTY = {key: [] for key in ("variance", "comparison", "crossing", "selected", "rotation", "learned")}
"""Results of a rotation run without any row."""


def rotation_rows(train, held_out):
    """Two solvers: (L2 to the pair, L2 to OT) on training and on held-out sources."""
    named = {"angle": 150.0, "sigma": 0.0, "steps": None, "angle_out": 149.0}
    return [
        named | {"solver": solver, "split": split, "l2_paired": paired, "l2_ot": optimal}
        for split, ends in (("train", train), ("held_out", held_out))
        for solver, (paired, optimal) in zip(("tsit5", "dopri5"), ends, strict=True)
    ]


@pytest.mark.parametrize(
    ("train", "held_out", "level", "words"),
    [
        ([(0.01, 2.0)] * 2, [(0.02, 2.0)] * 2, "info", "follows the rotation on new sources"),
        ([(0.01, 2.0)] * 2, [(1.9, 2.0)] * 2, "bad", "but not new ones"),
        ([(0.8, 2.0)] * 2, [(0.8, 2.0)] * 2, "info", "turns new sources by 149 degrees"),
        ([(2.0, 0.1)] * 2, [(2.0, 0.1)] * 2, "good", "goes to the optimal transport"),
        ([(0.01, 2.0), (2.0, 0.1)], [(0.01, 2.0), (2.0, 0.1)], "unsure", "goes where the solver takes it"),
        ([(1.0, 1.0)] * 2, [(1.0, 1.1)] * 2, "info", "neither"),
    ],
)
def test_a_rotation_is_memory_a_rule_or_undone(train, held_out, level, words):
    """Catches a rule that is called memory, and one solver that speaks for all."""
    (found,) = rotation.sentences(EMPTY | {"rotation": rotation_rows(train, held_out)}, 20)
    assert (found.level, words in found.text) == (level, True)


def test_variances_and_angles_are_judged_by_their_errors():
    """Catches agreement that is claimed whatever the numbers are."""
    cell = {"target": "gaussian", "angle": 120.0, "sigma": 0.0, "coupling": "rotated"}
    for paired, drawn, levels in ((0.0, 66.5, ("good", "good")), (3.0, 90.0, ("bad", "unsure"))):
        rows = [
            cell | {"field": "pair_optimal", "exact": paired, "monte_carlo": paired, "standard_error": 0.0},
            cell | {"field": "ot", "exact": 66.0, "monte_carlo": drawn, "standard_error": 1.0},
        ]
        found = rotation.sentences(EMPTY | {"variance": rows}, 20)
        assert tuple(sentence.level for sentence in found) == levels
    for expected, level in ((146.0, "good"), (120.0, "bad")):
        rows = [{"angle": 150.0, "sigma": 0.05, "angle_out": 147.0, "angle_expected": expected}]
        rows.append({"angle": 180.0, "sigma": 0.0, "angle_out": 1.0, "angle_expected": float("nan")})
        (found,) = rotation.sentences(EMPTY | {"learned": rows}, 20)
        assert (found.level, "1 networks" in found.evidence) == (level, True)
    for lower, level in ((("ot", "ot"), "good"), (("ot", "pair_optimal"), "unsure"), (("pair_optimal",) * 2, "bad")):
        rows = [cell | {"sigma": sigma, "lower": name} for sigma, name in zip((0.1, 0.2), lower, strict=True)]
        (found,) = rotation.sentences(EMPTY | {"comparison": rows}, 20)
        assert found.level == level


def test_images_are_judged_by_held_out_loss_and_rounds_by_straightness():
    """Catches a network that knows its images and is called good, and copies that are not counted."""

    def said(loss_test, distance, straightness, copies):
        row = {"solver": "euler", "steps": 100, "tolerance": None, "nfe": 100, "distance_test": distance}
        rounds = [
            {"round": k, "straightness": s, "straightness_error": 0.1, "pair_l2_train": None, "memorized": copies}
            | {"memorized_low": copies, "memorized_high": copies}
            for k, s in ((1, 5.0), (2, straightness))
        ]
        results = {"loss": 1.0, "loss_test": loss_test, "distance_test": distance, "distance_floor": 0.3}
        results |= {"distance_train": 0.1, "features": "pixels", "settings": {"samples": 9}, "samples": [row]}
        return [sentence.level for sentence in cifar10.sentences(results | {"training": [], "rounds": rounds})]

    assert said(1.0, 0.2, 1.0, 0.0) == ["good", "good", "good", "good"]
    assert said(1.5, 0.4, 6.0, 0.9) == ["bad", "unsure", "bad", "bad"]
    assert said(1.2, 0.2, 1.0, 0.2) == ["unsure", "good", "good", "unsure"]


@pytest.mark.parametrize(("share", "level"), SHARES)
def test_random_pairs_of_a_mixture_and_claims_about_noise(share, level):
    """Catches claims that are copied from the paper: their answers are those of the intervals."""
    values = {("network", "recovered"): share, ("network", "pair_l2_mean"): 1.25, ("target", "pair_l2_mean"): 6.0}
    summary = [
        {"dim": 3, "map": name, "measure": measure, "sigma": 0.5, "mean": value, "n": 3}
        for (name, measure), value in values.items()
    ]
    answer = {"bad": False, "good": True, "unsure": None}[level]
    row = {"map": "network", "dim": 3, "sigma": 0.5, "reference": 0.0, "mean": 1.0, "low": 0.5, "high": 1.5, "n": 3}
    claim = row | {"claim": CLAIMS[0].name, "came_out": answer}
    content = {"data": [{"dim": 3}], "settings": {"pairs": 100}, "summary": summary, "conclusions": [claim]}
    returned, claimed = mixture.sentences(content)
    assert (returned.level, claimed.level) == (level, level)
    assert "L2 1.25 to the pair, 6 between random ones" in returned.text
    assert f"{share:.0%} at sigma = 0.5" in mixture.headline(content)


@pytest.mark.parametrize(("share", "level"), SHARES)
def test_systems_are_judged_by_the_pairs_they_return(share, level):
    """Catches a system that memorizes and is not named, and a bridge that is reached whatever its covariance is."""
    row = {"problem": "gaussian5", "system": "dsbm", "sampler": "sde", "sigma": 1.0, "n_train": 100, "recovered": share}
    row |= {"n_held_out": 9, "gradient_variance": 1.0, "covariance": 0.6 if share else 0.3, "covariance_error": 0.01}
    content = {"rows": [row], "recursion": [{"sigma": 1.0, "bridge": 0.618}], "conclusions": []}
    pairs, bridge = systems.sentences(content)
    assert pairs.level == level
    assert ("dsbm σ = 1 (SDE)" in pairs.text) == (level != "good")
    assert bridge.level == ("good" if share else "bad")
    assert f"{int(level == 'bad')} of 1 on gaussian5" in systems.headline(content)


def test_the_benchmark_is_judged_against_a_linear_map_and_the_shown_targets():
    """Catches a network that is worse than a linear map and called good, and the two distances exchanged."""

    def said(uvp, shown, optimal):
        row = {"dim": 2, "coupling": "shuffled", "sigma": 0.0, "n": 9, "training_steps": 7, "training_loss": 0.1}
        row |= {"failed": 0, "l2_uvp": uvp}
        trained = row | {"split": "train", "l2_training_mean": shown, "l2_ot_mean": optimal}
        content = {"data": [{"dim": 2}], "minimiser": [], "rows": [row | {"split": "held_out"}, trained]}
        content["baselines"] = [{"dim": 2, "map": "linear", "l2_uvp": 14.0}]
        return [sentence.level for sentence in w2.sentences(content)], w2.headline(content)

    levels, headline = said(5.0, 4.0, 1.0)
    assert (levels, headline.endswith("returned at: none.")) == (["good", "good"], True)
    levels, headline = said(150.0, 1.0, 4.0)
    assert (levels, headline.endswith("returned at: d = 2 with sigma = 0.")) == (["bad", "bad"], True)
    assert said(5.0, 1.0, 1.1)[0][1] == "unsure"


def test_architectures_are_judged_by_their_residual_and_by_their_targets():
    """Catches a network that is said to reach the affine field, or to be free of its pairs, and is not."""

    def said(residual, shuffled):
        known = {"steps": 7, "parameters": 9, "worst_t": 0.5}
        rows = [
            known | {"network": name, "name": name, "residual": r} for name, r in (("mlp", residual), ("affine", 1e-6))
        ]
        digits = {
            "network": "mlp",
            "name": "mlp",
            "sigma": 0.0,
            "n": 9,
            "l2_shuffled_mean": shuffled,
            "l2_ot_mean": 2.0,
        }
        content = {"gaussian": {"rows": rows, "steps": 7, "fits": [], "longer": []}, "digits": {"rows": [digits]}}
        return [sentence.level for sentence in architectures.sentences(content)], architectures.headline(content)

    levels, headline = said(1e-3, 1.0)
    assert (levels, "by mlp." in headline) == (["bad", "bad"], True)
    levels, headline = said(2e-6, 3.0)
    assert (levels, "by none." in headline) == (["good", "good"], True)


def test_shares_have_wilsons_interval():
    """Catches a normal interval, which has no width at 0: the ends of Wilson's solve (p - x)^2 = z^2 x (1 - x) / n."""
    for value, n in ((0.0, 10), (1.0, 10), (0.3, 50)):
        found = report.share(value, n)
        for bound in (found.low, found.high):
            assert (value - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / n, rel=1e-3, abs=1e-12)
        assert 0 <= found.low <= value <= found.high <= 1
    assert [report.share(value, 20).majority for value in (0.9, 0.1, 0.6)] == [True, False, None]


class Stop(BaseException):
    """Somebody pressed a key."""


@pytest.fixture
def folder(tmp_path):
    """A run that has kept its configuration."""
    made = RunFolder(tmp_path / "run")
    made.write_json("config.json", {"config": {"smoke": True}, "environment": {"jax": "0", "command": "python -m one"}})
    return made


def page_of(folder, *, smoke):
    """A page with one good sentence."""
    good = [Sentence("It came out.", "good")]
    options = {"title": "toys", "headline": "All is well.", "sentences": good, "sections": [], "not_tested": []}
    return report.page_of(folder, smoke=smoke, **options)


def test_a_smoke_run_says_that_it_shows_nothing(folder):
    """Catches a smoke run with a good verdict; and a page whose versions or command are not those of config.json."""
    real, toy = page_of(folder, smoke=False), page_of(folder, smoke=True)
    assert [sentence.level for sentence in real.sentences] == ["good"]
    assert [sentence.level for sentence in toy.sentences] == ["unsure", "info"]
    assert "nothing is shown" in toy.headline
    assert "nothing is shown" not in real.headline
    assert real.command == "python -m one"
    assert real.environment["jax"] == "0"
    assert real.environment["resumed by"] != "python -m one"


def test_an_interrupted_figure_or_report_leaves_no_half_file(folder, monkeypatch):
    """Catches a truncated file under its final name, and a partial one that stays beside it."""
    figure = Figure()
    folder.write_report(page_of(folder, smoke=False))
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}

    def half(path, content):
        with Path(path).open("wb") as stream:
            stream.write(content[:20])
        raise Stop

    monkeypatch.setattr(Path, "write_bytes", half)
    monkeypatch.setattr(figure, "savefig", lambda path, **_: half(path, b"\x89PNG and so on, at length"))
    with pytest.raises(Stop):
        folder.write_report(page_of(folder, smoke=True))
    with pytest.raises(Stop):
        folder.write_figure("one", figure, None)
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before
    assert folder.drawn == {}


def test_a_page_that_cannot_be_made_leaves_no_file(folder):
    """Catches a report that is opened before it is known what is in it."""
    broken = Page("title", "headline", sections=[report.Section("one", report.tabled([{"a": "x"}], {"a": ".3f"}, ""))])
    with pytest.raises(ValueError, match="x"):
        folder.write_report(broken)
    assert {path.name for path in folder.path.iterdir()} == {"config.json"}


def test_large_networks_are_not_kept_twice(folder, monkeypatch):
    """Catches gigabytes that are written a second time, and a page that does not say so."""
    monkeypatch.setattr(report, "LARGEST", 1e-3)
    row = report.keep_flow(folder, "big", params={"w": jnp.zeros(1000)}, otherwise="cells/big/checkpoints")
    assert row["where"].startswith("cells/big/checkpoints (more than 0.001 MB")
    assert not (folder.path / "flows").exists()
    assert "cells/big/checkpoints" in json.dumps(report.networks_section([row]).content)
