"""The experiment on pairs of images: command line, files, resume, and that it measures what it says."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.celeba import cells, evaluation, problem
from experiments.celeba import main as celeba
from experiments.celeba.main import Config, check, settings_of
from experiments.celeba.training import Task, Trainer, drawn
from experiments.common import SettingsError
from fvjax.auditing import load_flow
from fvjax.flows import transport
from fvjax.interpolants import linear
from fvjax.metrics import pair_l2
from fvjax.types import Pair

CONVEX = {"ot_source": "convex", "which": "Early", "amount": 1.0, "sharpness": 1.5}
DIGITS = problem.find_source("digits", data_dir=None, size=None, **CONVEX)


def start(*arguments, cwd):
    """The command line in a second process, on one device."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HOME": str(cwd)}
    command = [sys.executable, "-m", "experiments.celeba", "--smoke", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment
    )


def finish(process):
    """Exit status, standard output and standard error."""
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A whole run with every part, and one that was killed in the middle of its second network and resumed."""
    folder = tmp_path_factory.mktemp("celeba")
    options = ("--sigma", "0", "0.5", "--reflow", "--sizes", "16")  # the number of pairs: compiled already
    done = finish(start(*options, "--out", "whole", cwd=folder))
    assert done[0] == 0, done[2]
    killed = start(*options, "--out", "killed", cwd=folder)  # only now: what it needs is compiled
    half = folder / "killed" / "cells" / "independent_sigma_0" / "checkpoints"
    while killed.poll() is None and not half.exists():
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    assert half.exists()
    assert not (folder / "killed" / "results.json").exists()
    resumed = finish(start(*options, "--out", "killed", "--resume", cwd=folder))
    assert resumed[0] == 0, resumed[2]
    return folder, done[1]


def test_a_run_writes_every_file_and_says_what_the_data_are(smoke):
    """Catches a part that is skipped, a figure that is not drawn, and digits that pass for CelebA."""
    folder, output = smoke
    lines = output.strip().splitlines()
    assert "NOT CelebA" in lines[0]
    assert lines[-1] == "results: whole"
    out = folder / "whole"
    tables = {"rows.csv", "solvers.csv", "rounds.csv", "minimiser.csv", "baselines.csv", "sweep.csv"}
    others = {"config.json", "results.json", "report.html", "cells", "figures", "flows"}
    assert {path.name for path in out.iterdir()} == others | tables
    images = {
        f"images_{stage}_{split}" for stage in ("shuffled", "independent", "reflow") for split in ("train", "held_out")
    }
    numbers = {"training_shuffled", "training_independent", "training_reflow", "sigma", "sigma_critical"}
    names = {f"{name}.{ending}" for name in images | numbers for ending in ("png", "pdf")}
    assert {path.name for path in (out / "figures").iterdir()} == names | {f"{name}.csv" for name in numbers}


@pytest.mark.parametrize("run", ["whole", "killed"])
def test_the_report_says_what_the_results_say(smoke, read_report, run):
    """Catches a verdict that was written beforehand, digits that pass for CelebA, and a half report when resumed."""
    text = read_report(smoke[0] / run)
    results = json.loads((smoke[0] / run / "results.json").read_text())
    assert "NOT CelebA" in text
    assert "Flows on shuffled pairs of digits" in text
    for row in results["rows"]:
        if (row["split"], row["target"]) == (
            "train",
            {"shuffled": "shuffled", "reflow": "generated"}.get(row["stage"]),
        ):
            assert f"L2 {row['l2_mean']:.2f} to the pair" in text
        assert f"{row['l2_mean']:.3f}" in text
    assert f"{results['sigma_c_measured']['minimiser']:.3g}, predicted {results['sigma_c_predicted']:.3g}" in text
    assert ("--out killed --resume" in text) == (run == "killed")


def test_networks_are_kept_as_flows(smoke):
    """Catches a flow of other parameters or pairs than its name says: its ends have the distance of results.json."""
    out = smoke[0] / "whole"
    kept = {f"{stage}_sigma_{sigma}" for stage in ("shuffled", "reflow") for sigma in ("0", "0.5")}
    assert {path.name for path in (out / "flows").iterdir()} == kept
    rows = json.loads((out / "results.json").read_text())["rows"]
    flow = load_flow(out / "flows" / "shuffled_sigma_0.5")
    x0, x1 = (jnp.asarray(np.asarray(x)) for x in flow.pairs)
    ends = jax.vmap(lambda x: transport(flow.field, flow.params, x, solver=flow.solver, steps=flow.steps))(x0)
    for target, targets in (("shuffled", x1), ("ot", jnp.asarray(np.asarray(flow.ot_targets)))):
        (row,) = [
            r for r in rows if (r["stage"], r["sigma"], r["split"], r["target"]) == ("shuffled", 0.5, "train", target)
        ]
        assert float(pair_l2(ends, targets).mean) == pytest.approx(row["l2_mean"], rel=1e-4)
    assert flow.held_out.x0.shape == (8, 8, 8, 1)
    assert np.abs(np.asarray(flow.held_out.x1)[:, None] - np.asarray(x1)[None]).max(axis=(2, 3, 4)).min() > 0


def test_results_have_the_promised_keys(smoke):
    """Catches a renamed key, a row that is missing, and numbers without the data they belong to."""
    results = json.loads((smoke[0] / "whole" / "results.json").read_text())
    wanted = {
        "data",
        "ot_source",
        "rows",
        "baselines",
        "minimiser",
        "sigma_c_predicted",
        "sigma_c_measured",
        "training",
    }
    assert wanted <= set(results)
    assert (results["data"], results["ot_source"]) == ("digits", "convex-digits-train")
    rows = results["rows"]
    for name in ("sigma", "split", "solver", "steps", "target", "l2_mean", "l2_std", "n", "train_steps", "loss"):
        assert all(name in row for row in rows), name
    assert all(
        row["data"] == "digits" for part in ("rows", "baselines", "minimiser", "training") for row in results[part]
    )
    found = {(row["stage"], row["sigma"], row["split"], row["target"]) for row in rows}
    expected = {
        (stage, sigma, split, target)
        for stage, own in (("shuffled", "shuffled"), ("independent", None), ("reflow", "generated"))
        for sigma in (0.0, 0.5)
        for split, target in (("train", "ot"), ("train", own), ("held_out", "ot"))
        if target is not None
    }
    assert found == expected
    assert all(np.isfinite(row["l2_mean"]) and row["l2_mean"] > 0 for row in rows)
    assert {row["baseline"] for row in results["baselines"]} == {"identity", "mean", "training_target"}
    assert min(row["gradient_variance"] for row in results["training"]) > 0
    assert [(row["stage"], row["sigma"]) for row in results["rounds"]] == [
        (stage, sigma) for sigma in (0.0, 0.5) for stage in ("independent", "reflow")
    ]
    assert all(row["straightness"] > 0 and 0 <= row["memorized"] <= 1 for row in results["rounds"])
    assert results["optimality"]["optimal"]
    assert results["sigma_c_predicted"] > 0
    assert results["sigma_c_measured"]["minimiser"] > 0
    assert results["sweep"]["critical"][0]["pairs"] == 16


def test_the_exact_minimiser_returns_its_pairs_without_noise(smoke):
    """Catches a minimiser's row that is a network's, or of other pairs."""
    results = json.loads((smoke[0] / "whole" / "results.json").read_text())
    chosen = [row for row in results["minimiser"] if (row["sigma"], row["split"]) == (0.0, "train")]
    assert {row["target"]: row["l2_mean"] for row in chosen}["shuffled"] < 1e-3
    assert {row["target"]: row["l2_mean"] for row in chosen}["ot"] > 1
    assert chosen[0]["recovered"] == 1


def test_a_killed_and_resumed_run_ends_in_the_same_numbers(smoke):
    """Catches a resume that trains a network twice, skips one, or draws other pairs."""
    folder = smoke[0]
    for name in ("results.json", "rows.csv", "sweep.csv"):
        assert (folder / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


def test_a_resumed_run_with_another_setting_is_refused(smoke):
    """Catches finished networks of another configuration taken over silently: one line with the difference, exit 2."""
    folder = smoke[0]
    status, _, errors = finish(start("--sigma", "0", "--steps", "7", "--out", "whole", "--resume", cwd=folder))
    assert status == 2
    assert "steps: 6 -> 7" in errors
    assert errors.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pairs", "5000"), "--pairs must be at most 1618, the training images of digits, got 5000"),
        (("--sigma", "-1"), "--sigma must be >= 0 and finite, got -1.0"),
        (("--ot-source", "nowhere"), "nowhere"),
        (("--data", "odd.npy", "--net", "unet"), "--net unet does not fit the images of odd"),
        (("--data", "missing.npy"), "missing.npy"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, tmp_path, refusal):
    """Catches a traceback, a run folder that stays, and an image size found out about after training began."""
    np.save(tmp_path / "odd.npy", np.zeros((30, 9, 9), np.uint8))
    assert message in refusal(celeba, *arguments, "--out", "run", cwd=tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": ()}, "--sigma must hold at least one number"),
        ({"sigma": (0.1, 0.1)}, "--sigma must be distinct"),
        ({"sigma": (float("nan"),)}, "--sigma must be >= 0 and finite"),
        ({"pairs": 1}, "--pairs and --sizes must be >= 2, got 1"),
        ({"sizes": (1, 50)}, "--pairs and --sizes must be >= 2, got 1"),
        ({"sizes": (50,), "coupling": "ot"}, "--coupling must be shuffled with --sizes, got ot"),
        ({"steps": 0}, "--steps must be an integer >= 1, got 0"),
        ({"solver_steps": 0}, "--solver-steps must be an integer >= 1, got 0"),
        ({"ot_amount": 1.5}, "--ot-amount must be from 0 to 1, got 1.5"),
        ({"ot_sharpness": 0.0}, "--ot-sharpness must be from 0.001 to 100, got 0.0"),
        ({"seed": -1}, "--seed must be in"),
        ({"resume": True}, "--out must name the run's folder where --resume is given"),
    ],
)
def test_bad_options_are_refused(options, message):
    """Catches an option that is accepted and ignored or fails minutes later."""
    with pytest.raises(ValueError, match=message):
        check(Config(**options))


def test_the_command_line_wins_over_the_preset():
    """Catches an option that is accepted and ignored."""
    config = Config(pairs=50, steps=70, batch=8, net="unet", solver="dopri5", start="noisy", interpolant="bridge")
    found = settings_of(config, DIGITS)
    assert (found.pairs, found.steps, found.batch, found.network) == (50, 70, 8, "unet")
    assert (found.solver, found.solver_steps, found.start, found.interpolant) == ("dopri5", None, "noisy", "bridge")
    assert settings_of(Config(solver="heun"), DIGITS).solver_steps == 50
    assert settings_of(Config(), DIGITS).network == "mlp"


def test_a_default_number_of_pairs_is_cut_but_one_that_was_asked_for_is_refused():
    """Catches fewer pairs than the user believes."""
    few = DIGITS._replace(train=DIGITS.train._replace(size=100))
    assert settings_of(Config(), few).pairs == 100
    with pytest.raises(SettingsError, match="--pairs must be at most 100"):
        settings_of(Config(sizes=(200,)), few)


def test_auto_takes_celeba_where_it_is_prepared(tmp_path, prepare):
    """Catches digits where the real data are there: read through tensorflow-datasets, named as CelebA."""
    faces = np.random.default_rng(0).integers(0, 256, (6, 218, 178, 3), np.uint8)
    prepare(tmp_path, "celeb_a", {"train": faces[:4], "validation": faces[:1], "test": faces[4:]})
    found = problem.find_source("auto", data_dir=tmp_path, size=16, **CONVEX)
    assert found.data == "celeba16"
    assert found.dims == (16, 16, 3)
    assert "NOT CelebA" not in found.notice
    drawn_pairs = problem.draw(jax.random.key(0), found, "shuffled", pairs=4, held_out=2)
    assert drawn_pairs.optimal.x0.shape == (4, 16, 16, 3)


def test_the_couplings_are_what_they_say():
    """Catches shuffled pairs that are optimal by accident, and held-out images among the training ones."""
    problems = {
        name: problem.draw(jax.random.key(0), DIGITS, name, pairs=30, held_out=20) for name in problem.COUPLINGS
    }
    optimal = problems["ot"].optimal
    np.testing.assert_array_equal(problems["ot"].trained.x1, optimal.x1)
    assert [problems[name].mixed for name in ("shuffled", "ot", "independent")] == [False, False, True]
    shuffled = problems["shuffled"].trained.x1
    assert not np.any(np.all(np.asarray(shuffled == optimal.x1), axis=(1, 2, 3)))
    np.testing.assert_array_equal(np.sort(np.ravel(shuffled)), np.sort(np.ravel(optimal.x1)))
    images = {np.asarray(image).tobytes() for image in optimal.x1}
    assert not images & {np.asarray(image).tobytes() for image in problems["ot"].held_out.x1}


def test_independent_batches_mix_sources_and_targets():
    """Catches independent training that sees the given pairs, and fixed training that does not."""
    pairs = Pair(jnp.arange(50.0)[:, None], jnp.arange(50.0)[:, None])
    fixed, mixed = (drawn(jax.random.key(0), Task(pairs, linear(), jnp.asarray(flag)), 200) for flag in (False, True))
    np.testing.assert_array_equal(fixed.x0, fixed.x1)
    assert np.mean(np.asarray(mixed.x0 == mixed.x1)) < 0.1
    assert len(np.unique(mixed.x1)) > 40


def test_recovered_counts_the_nearest_target():
    """Catches a count of distances below a bound, or of targets of other rows."""
    targets = jnp.asarray([[0.0], [1.0], [2.0], [3.0]])
    ends = np.asarray([[0.4], [1.6], [2.1]])
    assert evaluation.recovered(ends, targets) == pytest.approx(2 / 3)
    assert np.isnan(evaluation.recovered(None, targets))


def test_the_crossing_is_interpolated():
    """Catches an end of the bracket reported as the critical sigma."""
    assert cells.crossing([1.0, 0.0, 2.0], [0.75, 1.0, 0.25]) == pytest.approx(1.5)
    assert cells.crossing([0.0, 1.0], [1.0, 0.9]) is None


def test_a_flow_may_start_where_training_did():
    """Catches --start noisy that is ignored: at t = 0 the constant noise has scale sigma, the bridge (almost) none."""
    x0 = jnp.zeros((2000, 2))
    for interpolant, scale in (("constant", 0.5), ("bridge", 0.5 * np.sqrt(1e-3 * (1 - 1e-3)))):
        settings = settings_of(Config(start="noisy", interpolant=interpolant), DIGITS)
        begun = evaluation.starts(settings, settings.interpolant_of(0.5), x0, jax.random.key(0))
        assert np.std(begun) == pytest.approx(scale, rel=0.05)
    source = settings_of(Config(), DIGITS)
    np.testing.assert_array_equal(evaluation.starts(source, source.interpolant_of(0.5), x0, jax.random.key(0)), x0)


def test_a_small_network_memorizes_shuffled_pairs_without_noise(tmp_path):
    """Catches distances to exchanged targets, and training on the optimal pairs: the paper's claim in small."""
    given = problem.draw(jax.random.key(0), DIGITS, "shuffled", pairs=16, held_out=2)
    settings = settings_of(Config(pairs=16, steps=600, batch=32, solver_steps=20), DIGITS)
    trainer = Trainer(replace(settings, options={"width": 128, "depth": 2}))
    targets = {"ot": given.optimal.x1, "shuffled": given.trained.x1}
    _, log = trainer.train("one", 0.0, given.trained, mixed=False, targets=targets, folder=tmp_path)
    assert log[-1]["l2_shuffled"] < 1.5 < 4 < log[-1]["l2_ot"]
    assert log[-1]["loss"] < log[0]["loss"] / 5
