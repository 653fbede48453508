"""The Gaussian-mixture experiment: command line, files, resume, and that its numbers and its verdicts are right."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import RunFolder, SettingsError, command_line
from experiments.gaussian_mixture import cells, problem, statistics
from experiments.gaussian_mixture.main import Config, check, main
from fvjax import training

MAPS = ("network", "minimiser", "population")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The command line itself, in a second process, from another directory."""
    out = tmp_path_factory.mktemp("mixture") / "run"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.gaussian_mixture", "--smoke", "--dims", "3", "5", "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=out.parent, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(out=out, done=done, results=json.loads((out / "results.json").read_text()))


@pytest.fixture(scope="module")
def toy():
    """A law in three dimensions, and sizes of a run on it."""
    law = problem.law_of(3, modes=4, radius=5.0, scale=0.5, seed=0)
    return law, cells.Settings(16, 1, 10, pairs=24, fresh=24, solver="euler", solver_steps=4)


def test_smoke_run_writes_every_file_and_states_its_kernel(smoke):
    """Catches a part that is skipped, a figure without its numbers, and an MMD that does not say of which kernel."""
    assert smoke.done.stdout.strip().splitlines()[-1] == f"results: {smoke.out}"
    assert smoke.done.stdout.startswith("gaussian_mixture: 8 modes on a sphere of radius 5, sd 0.5; 32 random pairs, ")
    for text in ("d = 5: s_b = ", "exp(-|x - y|^2 / (2 s_b^2))", "published", "does not state its kernel", "floors: "):
        assert text in smoke.done.stdout
    names = {path.name for path in (smoke.out / "figures").iterdir()}
    assert names == {f"{stem}.{ending}" for stem in ("measures", "samples") for ending in ("png", "pdf", "csv")}
    assert {path.name for path in smoke.out.iterdir()} == {
        "config.json",
        "results.json",
        "report.html",
        "rows.csv",
        "cells",
        "figures",
    }
    with (smoke.out / "rows.csv").open(newline="") as stream:
        assert {row["map"] for row in csv.DictReader(stream)} == {*MAPS, "target"}


def test_the_report_says_what_the_results_say(smoke, read_report):
    """Catches a verdict that was written beforehand, and an MMD that does not say of which kernel."""
    text = read_report(smoke.out)
    assert "Random pairs from noise to 8 Gaussians on a sphere of radius 5, d = 3 and 5" in text
    assert "exp(-|x - y|^2 / (2 s_b^2))" in text
    for row in smoke.results["summary"]:
        if (row["map"], row["measure"]) == ("network", "pair_l2_mean"):
            assert f"L2 {row['mean']:.3g} to the pair" in text


def test_results_have_a_row_for_every_cell_with_solver_steps_and_loss(smoke):
    """Catches a missing cell, a renamed key, and a number without what it depends on."""
    rows = smoke.results["rows"]
    expected = {
        (name, dim, repeat, sigma) for name in MAPS for dim in (3, 5) for repeat in (0, 1) for sigma in (0.0, 0.5)
    } | {("target", dim, repeat, None) for dim in (3, 5) for repeat in (0, 1)}
    assert {(row["map"], row["dim"], row["repeat"], row["sigma"]) for row in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert np.isfinite([row["generalization_mmd"], row["generalization_mmd_biased"]]).all()
        assert row["memorized_low"] <= row["memorized"] <= row["memorized_high"]
        knows_pairs = row["map"] != "population"
        for key in ("memorization_mmd", "memorization_mmd_biased", "pair_l2_mean", "recovered"):
            assert (key in row) == knows_pairs
        if row["map"] != "target":
            assert (row["solver"], row["solver_steps"], row["tolerance"], row["failed"]) == ("euler", 4, None, 0)
        assert (row.get("training_steps"), "training_loss" in row) == (
            (32, True) if row["map"] == "network" else (None, False)
        )
    assert {(row["dim"], row["measure"]) for row in smoke.results["floors"]} == {
        (dim, f"{measure}_mmd{form}")
        for dim in (3, 5)
        for measure in ("generalization", "memorization")
        for form in ("", "_biased")
    }
    assert [row["generalization_mmd"] for row in smoke.results["published"]["rows"]] == [0.0034, 0.0018, 0.0021, 0.002]
    assert len(smoke.results["training"]) == 2 * 2 * 2 * 11  # 32 steps, looked at every 3
    claimed = {(row["claim"], row["map"], row["dim"]) for row in smoke.results["conclusions"] if "verdict" in row}
    claims = {claim.name for claim in statistics.CLAIMS}
    assert claimed == {(claim, name, dim) for claim in claims for name in MAPS[:2] for dim in (3, 5)}


def test_the_minimiser_without_noise_returns_its_training_pairs(smoke):
    """Catches minimiser rows of other pairs than those that the networks are trained on, and a biased form that is not.

    A copy of n targets has a biased MMD of 0, and an unbiased one of -2 (1 - mean kernel) / n.
    """
    rows = [row for row in smoke.results["rows"] if row["map"] == "minimiser" and row["sigma"] == 0]
    assert len(rows) == 4
    for row in rows:
        assert row["pair_l2_mean"] < 1e-4
        assert row["recovered"] == 1
        assert row["memorization_mmd_biased"] < 1e-6
        assert -2 / 32 < row["memorization_mmd"] < -0.01
    target = [row for row in smoke.results["rows"] if row["map"] == "target"]
    assert min(row["pair_l2_mean"] for row in target) > 1


def test_a_resumed_run_computes_what_is_missing_and_nothing_else(smoke):
    """Catches cells that are computed again, a resumed result that differs, and settings that changed in between.

    The cell that is removed also holds the points of a figure.
    """
    config = Config(dims=(3, 5), out=smoke.out, resume=True, smoke=True)
    removed = smoke.out / "cells" / "d3_repeat0_sigma0.5_network.json"
    before = json.loads(removed.read_text())
    others = {path: path.stat().st_mtime_ns for path in removed.parent.iterdir() if path != removed}
    removed.unlink()
    results = main(config, RunFolder(smoke.out, resume=True))
    again = json.loads(removed.read_text())
    assert [row["map"] for row in again["rows"]] == ["network", "view"]
    for key in ("generalization_mmd", "pair_l2_mean", "training_loss"):
        assert again["rows"][0][key] == pytest.approx(before["rows"][0][key], rel=1e-3, abs=1e-5)
    np.testing.assert_allclose(again["rows"][1]["points"], before["rows"][1]["points"], atol=1e-2)
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert len(results["rows"]) == len(smoke.results["rows"])
    with pytest.raises(SettingsError, match="--pairs must be that of the run, 32, got 16"):
        main(replace(config, pairs=16), RunFolder(smoke.out, resume=True))


def test_sigmas_share_data_first_parameters_batches_and_one_compilation(toy, monkeypatch):
    """Catches a comparison that is not paired, repeats that are the same, and 18 networks that compile 18 times."""
    law, settings = toy
    traces = []
    original = training.make_train_step

    def counted(*arguments, **options):
        traces.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(training, "make_train_step", counted)
    cells.trainer.cache_clear()
    repeats = [problem.draw(law, k, pairs=settings.pairs, fresh=settings.fresh) for k in (0, 1)]
    found = {
        (k, sigma): cells.network_cell(law, repeats[k], sigma, settings) for k in (0, 1) for sigma in (0.0, 1e-6, 0.5)
    }
    assert len(traces) == 1
    ends = {cell: result[2].fresh for cell, result in found.items()}
    np.testing.assert_allclose(ends[0, 0.0], ends[0, 1e-6], atol=1e-4)
    assert np.abs(ends[0, 0.0] - ends[0, 0.5]).max() > 1e-3
    assert np.abs(ends[0, 0.0] - ends[1, 0.0]).max() > 0.1
    samples = [np.concatenate([*s.pairs, *s.fresh, *s.spare]) for s in repeats]
    rows = np.concatenate(samples).round(5)
    assert len(np.unique(rows, axis=0)) == len(rows)  # no sample stands in two places


def test_measures_of_ends_that_are_known(toy):
    """Catches a measure of the wrong sample: fresh ends that are copies, training ends that are another's target."""
    law, settings = toy
    samples = problem.draw(law, 0, pairs=settings.pairs, fresh=settings.fresh)
    targets = np.asarray(samples.pairs.x1)
    row = cells.measured(law, samples, cells.Ends(trained=np.roll(targets, 1, axis=0), fresh=targets))
    assert (row["memorized"], row["recovered"], row["fresh"], row["pairs"]) == (1, 0, 24, 24)
    assert row["memorization_mmd_biased"] < 1e-6  # the same set, in another order
    expected = np.linalg.norm(np.roll(targets, 1, axis=0) - targets, axis=1)
    assert row["pair_l2_mean"] == pytest.approx(expected.mean(), rel=1e-5)
    assert row["pair_l2_std"] == pytest.approx(expected.std(ddof=1), rel=1e-5)
    own = targets.copy()
    own[3] = np.nan
    row = cells.measured(law, samples, cells.Ends(trained=own, fresh=np.asarray(samples.fresh.x1)))
    assert (row["recovered"], row["pairs"]) == (1, 23)
    assert row["generalization_mmd_biased"] < 1e-6
    with pytest.raises(FloatingPointError, match="the flow must stay finite, got 0 finite ends of 24"):
        cells.measured(law, samples, cells.Ends(None, np.full_like(targets, np.nan)))


def test_flows_are_carried_in_parts_without_mixing_them_up(toy):
    """Catches padding that ends among the results: one more source than a part holds, each against its own map."""
    x0 = jnp.arange(2.0 * (cells.AT_ONCE + 1)).reshape(-1, 2)
    field = jax.tree_util.Partial(lambda params, t, x: params * x)
    ends = cells._carried(field, jnp.float32(1.0), x0, solver="euler", steps=2)
    np.testing.assert_allclose(ends, 2.25 * x0, rtol=1e-6)


def test_the_kernel_the_floor_and_the_view_are_those_of_the_target(toy):
    """Catches widths of another law, a floor that is none, and a view that distorts."""
    law, _ = toy
    x = np.asarray(law.mixture.sample(jax.random.key(9), 600))
    distances = np.linalg.norm(x[:300] - x[300:], axis=1)
    assert law.bandwidths[2] == pytest.approx(np.median(distances), rel=0.2)
    np.testing.assert_allclose(np.divide(law.bandwidths, law.bandwidths[2]), [0.25, 0.5, 1, 2, 4])
    np.testing.assert_allclose(law.view.T @ law.view, np.eye(2), atol=1e-12)
    spread = np.var(x @ law.view, axis=0)
    assert spread[0] > spread[1] > np.var(x, axis=0).sum() - spread.sum()
    floors = {row["measure"]: row for row in problem.floor_rows(law, pairs=40, fresh=80)}
    for name, n in (("generalization", 80), ("memorization", 40)):
        unbiased, biased = floors[f"{name}_mmd"], floors[f"{name}_mmd_biased"]
        assert (unbiased["n"], biased["n"]) == (n, n)
        assert unbiased["low"] < 0 < unbiased["high"]
        assert abs(unbiased["mean"]) < 0.3 * (unbiased["high"] - unbiased["low"])
        assert 0.5 / n < biased["mean"] < 2 / n  # 2 (1 - E k) / n, with E k about 0.5


def rows_of(values):
    """Rows of networks in one dimension: {sigma: a value for each repeat}, the same for every measure."""
    return [
        {"map": "network", "dim": 3, "sigma": sigma, "repeat": k} | dict.fromkeys(statistics.MEASURES, value)
        for sigma, repeats in values.items()
        for k, value in enumerate(repeats)
    ]


def test_the_interval_is_students():
    """Catches a normal interval (0.6 of this one at 3 values) or ddof = 0; one value has none."""
    found = statistics.t_interval([1.0, 2.0, 4.0])
    half = 4.302652729911275 * np.std([1, 2, 4], ddof=1) / 3**0.5
    assert found.mean == pytest.approx(7 / 3)
    assert (found.low, found.high) == pytest.approx((7 / 3 - half, 7 / 3 + half))
    assert statistics.t_interval([1.5]) == (1.5, None, None, 1)


def test_differences_are_paired_by_repeat():
    """Catches intervals of two separate means: repeats differ by 10 times more than what noise changes."""
    rows = rows_of({0.5: [1.1, 11.12, 21.08], 0.0: [1.0, 11.0, 21.0], 0.1: [1.2, 10.9, 21.0]})
    found = {row["sigma"]: row for row in statistics.differences(rows) if row["measure"] == "generalization_mmd"}
    assert set(found) == {0.1, 0.5}
    assert found[0.5]["verdict"] == "higher"
    assert found[0.5]["reference"] == 0.0
    assert found[0.5]["mean"] == pytest.approx(0.1)
    assert found[0.1]["verdict"] == "not told apart"
    (level,) = [
        row for row in statistics.summary(rows) if (row["sigma"], row["measure"]) == (0.5, "generalization_mmd")
    ]
    assert level["low"] < 0 < level["high"]


def test_conclusions_follow_the_numbers():
    """Catches a verdict that is written instead of computed: the same claims on opposite numbers."""
    floors = [{"dim": 3, "measure": "memorization_mmd_biased", "mean": 0.5, "low": 0.3, "high": 0.8}]
    fallen = rows_of({0.0: [5.0, 5.2, 5.1], 0.5: [1.0, 1.1, 1.2]})

    def verdicts(rows):
        found = statistics.conclusions(statistics.summary(rows), statistics.differences(rows), floors)
        return {row["claim"]: row["came_out"] for row in found}, found

    names = [claim.name for claim in statistics.CLAIMS]
    assert verdicts(fallen)[0] == dict(zip(names, (True, False, False), strict=True))
    risen = [row | {"sigma": 0.5 - row["sigma"]} for row in fallen]
    assert verdicts(risen)[0] == dict(zip(names, (False, True, True), strict=True))
    same = rows_of({0.0: [5.0, 5.2, 5.1], 0.5: [5.1, 5.1, 5.1]})
    assert verdicts(same)[0] == dict.fromkeys(names)
    single = rows_of({0.0: [5.0], 0.5: [1.0]})
    assert verdicts(single)[0] == dict.fromkeys(names)
    assert "no interval: one repeat" in verdicts(single)[1][0]["text"]
    assert verdicts(rows_of({0.0: [5.0, 5.2]}))[0] == {}
    copies = [row | {"memorization_mmd_biased": 1e-5, "recovered": 0.2} for row in rows_of({0.0: [1.0, 2.0]})]
    (row,) = verdicts(copies)[1]
    assert (row["came_out"], row["recovered"]) == (False, pytest.approx(0.2))
    assert "20% of the training sources" in row["text"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "--seeds must be an integer >= 1, got 0"),
        ({"seeds": 101}, r"--seeds must be in \[1, 100\], got 101"),
        ({"pairs": 1}, r"--pairs must be in \[2, 20000\], got 1"),
        ({"fresh": 70_000}, r"--fresh must be in \[2, 65536\], got 70000"),
        ({"modes": 0}, "--modes must be an integer >= 1, got 0"),
        ({"steps": 0}, "--steps must be an integer >= 1, got 0"),
        ({"width": -1}, "--width must be an integer >= 1, got -1"),
        ({"solver_steps": 0}, "--solver-steps must be an integer >= 1, got 0"),
        ({"radius": 0.0}, "--radius must be > 0 and finite, got 0.0"),
        ({"scale": float("nan")}, "--scale must be > 0 and finite, got nan"),
        ({"seed": -1}, r"--seed must be in \[0, 2\^31\), got -1"),
        ({"dims": (1,)}, r"--dims must be in \[2, 1024\], got 1"),
        ({"dims": ()}, "--dims must hold at least one value, got none"),
        ({"dims": (3, 3)}, r"--dims must be distinct, got \(3, 3\)"),
        ({"sigmas": (0.0, -0.1)}, "--sigmas must be >= 0 and finite, got -0.1"),
        ({"sigmas": (0.0, float("inf"))}, "--sigmas must be >= 0 and finite, got inf"),
        ({"sigmas": (0.0, 0.5, 0.5)}, "--sigmas must be distinct"),
        ({"resume": True}, "--out must name the run's folder where --resume is given, got none"),
    ],
)
def test_bad_options_get_one_clear_error(change, message):
    """Catches an option that is not checked before anything is written."""
    with pytest.raises(ValueError, match=message):
        check(replace(Config(), **change))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "0"), "--seeds must be an integer >= 1, got 0"),
        (("--dims", "1"), "--dims must be in [2, 1024], got 1"),
        (("--pairs", "1"), "--pairs must be in [2, 20000], got 1"),
        (("--sigmas", "0", "-0.5"), "--sigmas must be >= 0 and finite, got -0.5"),
        (("--resume",), "--out must name the run's folder where --resume is given, got none"),
        (("--out", "full"), "--out must be a new or an empty folder, got full"),
    ],
)
def test_the_command_line_ends_with_one_line_and_exit_2(arguments, message, monkeypatch, capsys, tmp_path):
    """Catches a traceback, a run folder left behind, and an overwritten one."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "results.json").write_text("precious")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gaussian_mixture", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command_line(Config, check, main, "gaussian_mixture")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "results.json").read_text() == "precious"
