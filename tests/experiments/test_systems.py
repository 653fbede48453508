"""The systems side by side: files, a run killed in the middle of a round, what each system trains on, bad input."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import RunFolder
from experiments.systems import measures, methods, problems, report
from experiments.systems.main import Config, check, exact_rounds, main
from experiments.systems.training import Settings, Trainer, tabulated
from fvjax import couplings
from fvjax.types import Pair

SECONDS = ("seconds", "pair_seconds")
"""Columns that no two runs share."""


def start(*arguments, cwd):
    """The command line in a second process, on one device."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.systems", "--smoke", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment
    )


def finish(process):
    """Exit status, standard output and standard error."""
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Every system on digits and DSBM on the Gaussian test: a whole run, and one killed in the middle of a round."""
    folder = tmp_path_factory.mktemp("systems")
    options = ("--problems", "gaussian", "digits", "--bridge-sigma", "1", "--gaussian-dims", "64")  # that of the digits
    done = finish(start(*options, "--out", "whole", cwd=folder))
    assert done[0] == 0, done[2]
    killed = start(*options, "--out", "killed", cwd=folder)
    half = folder / "killed" / "networks" / "digits_dsbm_1_2" / "checkpoints"  # the second round of DSBM
    while killed.poll() is None and not half.exists():
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert half.exists()
    assert not (folder / "killed" / "cells" / "digits_dsbm_1.json").exists()
    resumed = finish(start(*options, "--out", "killed", "--resume", cwd=folder))
    assert resumed[0] == 0, resumed[2]
    return folder, done[1]


def results(folder):
    """results.json without what no two runs share."""
    content = json.loads((folder / "results.json").read_text())
    for row in content["rows"]:
        for name in SECONDS:
            row.pop(name, None)
    return content


def test_a_run_killed_in_a_round_and_resumed_ends_in_the_same_numbers(smoke):
    """Catches pairs, weights or random numbers of a resumed round that are not those of the uninterrupted one."""
    folder, _ = smoke
    assert results(folder / "killed") == results(folder / "whole")


def test_a_run_leaves_its_tables_and_figures(smoke):
    """Catches a missing file, an empty table, and figures without their numbers."""
    folder, output = smoke
    whole = folder / "whole"
    for name in ("config.json", "results.json", "rows.csv", "rounds.csv"):
        assert (whole / name).stat().st_size > 0
    for name in ("systems", "rounds"):
        for ending in ("png", "pdf", "csv"):
            assert (whole / "figures" / f"{name}.{ending}").stat().st_size > 0
    with (whole / "rows.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == len(results(whole)["rows"])
    for word in ("generalization", "memorization", "price", "Sinkhorn", "Cov(x0, x1)"):
        assert word in output


def test_the_report_says_what_the_results_say(smoke, read_report):
    """Catches a verdict that was written beforehand, and a resumed run whose report lacks what came before."""
    for run in ("whole", "killed"):
        text, content = read_report(smoke[0] / run), results(smoke[0] / run)
        assert "Systems side by side on gaussian64 and digits" in text
        for row in content["rows"]:
            assert f"{row['train_l2_pair_mean']:.3f}" in text
        nearest = min(row["l2_ot_mean"] for row in content["rows"] if row["problem"] == "digits")
        assert f"is nearest to the optimal targets, L2 {nearest:.3g};" in text


def test_every_system_has_its_row_with_every_measure(smoke):
    """Catches a system that is skipped, and a measure that is not filled in."""
    rows = [row for row in results(smoke[0] / "whole")["rows"] if row["problem"] == "digits"]
    assert [(row["system"], row["sampler"], row["sigma"]) for row in rows] == [
        ("cfm", "ode", 0),
        ("reflow_1", "ode", 0),
        ("cfm", "ode", 0.05),
        ("reflow_1", "ode", 0.05),
        ("cfm_independent", "ode", 0),
        ("ot_cfm", "ode", 0),
        ("cfm_bridge", "ode", 1),
        ("sb_cfm", "ode", 1),
        ("dsbm", "sde", 1),
        ("dsbm", "ode", 1),
        ("dsbm_ipf", "sde", 1),
        ("dsbm_ipf", "ode", 1),
        ("sde_reflow", "sde", 1),
    ]
    everywhere = ("mmd", "mmd_floor", "train_l2_pair_mean", "recovered", "memorized", "gradient_variance", "l2_ot_mean")
    for row in rows:
        assert all(np.isfinite(row[name]) for name in everywhere)
        assert row["gradient_variance"] > 0
        for name in ("straightness", "evaluations", "euler_4"):
            assert (name in row) == (row["sampler"] == "ode")
    sinkhorn = next(row for row in rows if row["system"] == "sb_cfm")
    assert 0 <= sinkhorn["sinkhorn_converged"] <= 1
    assert np.isfinite(sinkhorn["sinkhorn_error"])


def test_a_full_folder_and_other_settings_are_refused(smoke):
    """Catches a run that overwrites another one, or goes on with other settings."""
    folder, _ = smoke
    status, _, errors = finish(start("--out", "whole", cwd=folder))
    assert (status, errors) == (2, "error: --out must be a new or an empty folder, got whole\n")
    status, _, errors = finish(start("--out", "whole", "--resume", "--noise", "0.1", cwd=folder))
    assert status == 2
    assert errors.startswith("error: --")
    assert errors.count("\n") == 1


def test_a_terminated_run_says_how_to_go_on(tmp_path):
    """Catches SIGTERM that loses the steps since the last save, or ends in a traceback."""
    options = ("--problems", "mixture", "--systems", "dsbm", "--bridge-steps", "100000", "--out", "run")
    running = start(*options, cwd=tmp_path)
    place = tmp_path / "run" / "networks" / "mixture_dsbm_1_1" / "checkpoints"
    while running.poll() is None and not place.exists():
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    status, output, errors = finish(running)
    assert status == 0, errors
    assert "stopped: mixture dsbm_1_1 at step" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "--rounds must be an integer >= 1, got 0"),
        ({"rounds": 3}, "--rounds must be even, a backward and a forward one each time, got 3"),
        ({"bridge_sigma": (0.0,)}, "--bridge-sigma must be > 0 and finite, got 0.0"),
        ({"noise": 0.0}, "--noise must be > 0 and finite, got 0.0"),
        ({"pairs": 3}, "--pairs must be in [4, 16384], got 3"),
        ({"systems": ()}, "--systems must hold at least one value, got none"),
        ({"bridge_sigma": (1.0, 1.0)}, "--bridge-sigma must be distinct, got (1.0, 1.0)"),
        ({"gaussian_dims": (0,)}, "--gaussian-dims must be in [1, 1000], got 0"),
        ({"problems": ("mix3tomix10",)}, "--data must name the folder of Mix3ToMix10's files"),
        ({"seed": -1}, "--seed must be in [0, 2^31), got -1"),
        ({"resume": True}, "--out must name the run's folder where --resume is given, got none"),
        ({"steps": 0}, "--steps must be an integer >= 1, got 0"),
    ],
)
def test_bad_options_are_named(options, message):
    """Catches a late or nameless failure."""
    with pytest.raises(
        ValueError,
        match="^" + message.replace("(", r"\(").replace(")", r"\)").replace("[", r"\[").replace("^31", r"\^31"),
    ):
        check(Config(**options))


def test_more_pairs_than_images_are_refused(tmp_path):
    """Catches a traceback from the data: there are fewer digits than pairs."""
    config = Config(problems=("digits",), pairs=5000, out=tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(ValueError, match="--pairs must fit the data of digits"):
        main(config, folder)


SMALL = Settings(
    width=8,
    depth=1,
    steps=8,
    bridge_steps=8,
    batch=8,
    rounds=2,
    rectifications=1,
    path_steps=2,
    probes=8,
    measured=20,
    coupling_batch=8,
    table=64,
    seed=0,
    smoke=True,
)


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Cells whose trainings only keep what they were given; a function that runs one and returns the pairs."""

    def run(system, sigma, problem):
        seen = {}

        class Recorded(Exception):
            pass

        def train(self, name, pairs, interpolant, params, *, index, steps):
            seen.update(pairs=pairs(), interpolant=interpolant)
            raise Recorded

        monkeypatch.setattr(Trainer, "train", train)
        cell = methods.Cell(Trainer(problem, SMALL, tmp_path), None, system, sigma)
        with pytest.raises(Recorded):
            methods.run(cell)
        return Pair(*(np.asarray(x) for x in seen["pairs"])), seen["interpolant"]

    return run


def toy(n=40):
    """Sources 0, 1, ... on a line and their targets, paired at random."""
    x0 = jnp.arange(n, dtype=jnp.float32)[:, None]
    x1 = x0 + 1000
    order = np.random.default_rng(0).permutation(n)
    return problems.Problem("toy", "digits", Pair(x0, x1[order]), x1, Pair(x0, x1), x1, jax.random.key(0))


def as_set(pairs):
    """Pairs of one dimension, whatever their order and how often they come."""
    return {(float(a), float(b)) for a, b in zip(np.ravel(pairs.x0), np.ravel(pairs.x1), strict=True)}


def test_each_system_trains_on_its_pairs(recorded):
    """Catches a coupling under the wrong name: what every system sees of sorted points, and with which noise."""
    problem = toy()
    given = as_set(problem.pairs)
    found = {}
    for system, sigma in (("reflow", 0.0), ("reflow_noise", 0.1), ("cfm_bridge", 0.5), ("dsbm", 0.5)):
        pairs, interpolant = recorded(system, sigma, problem)
        own = pairs if system != "dsbm" else Pair(pairs.x1, pairs.x0)  # backward: the target is its own start
        assert as_set(own) == given
        found[system] = interpolant.coefficients(0.25)
    assert found["reflow"].gamma == 0
    np.testing.assert_allclose(found["reflow_noise"].gamma, 0.1, rtol=1e-6)
    np.testing.assert_allclose(found["cfm_bridge"].gamma, 0.5 * np.sqrt(3) / 4, rtol=1e-6)
    np.testing.assert_allclose(found["dsbm"].gamma_rate, -0.5 / np.sqrt(3), rtol=1e-6)
    pairs, _ = recorded("dsbm_ipf", 0.5, problem)
    assert np.all(pairs.x1 < 50)  # backward: sources are its ends, and its starts are near them
    assert np.all(np.abs(pairs.x0 - pairs.x1) < 5 * 0.5)
    pairs, _ = recorded("ot_cfm", 0.0, problem)
    for batch in range(8):
        rows = slice(8 * batch, 8 * batch + 8)
        order = np.argsort(pairs.x0[rows, 0])
        assert np.all(np.diff(pairs.x1[rows, 0][order]) > 0)  # on a line optimal pairs are sorted
    small = toy(8)  # one batch
    pairs, interpolant = recorded("sb_cfm", 0.5, small)
    share = float(jnp.trace(couplings.sinkhorn_plan(small.pairs.x0, small.optimal, sigma=0.5).plan))
    assert 0.5 < share < 0.95
    error = np.sqrt(share * (1 - share) / len(pairs.x0))
    assert abs(np.mean(pairs.x1 - pairs.x0 == 1000) - share) < 4 * error
    assert interpolant.time_range == (1e-3, 1 - 1e-3)
    pairs, _ = recorded("cfm_independent", 0.0, problem)
    assert len(as_set(pairs) - given) > 20


def test_a_table_repeats_its_pairs():
    """Catches rows beyond the given ones, or pairs that are torn apart."""
    table, used = tabulated(Pair(np.arange(5.0)[:, None], np.arange(5.0)[:, None] + 10), 12)
    assert (table.x0.shape, int(used)) == ((12, 1), 5)
    np.testing.assert_array_equal(table.x1 - table.x0, 10)
    assert int(tabulated(Pair(np.zeros((20, 1)), np.zeros((20, 1))), 12)[1]) == 12


def test_covariance_and_its_error():
    """Catches a covariance of the wrong scale, and an error that does not shrink with the examples."""
    x = np.random.default_rng(1).standard_normal((2, 4000, 5))
    value, error = measures.covariance(x[0], 0.6 * x[0] + 0.8 * x[1])
    assert abs(value - 0.6) < 4 * error
    np.testing.assert_allclose(error, np.sqrt((1 + 0.36) / (4000 * 5)), rtol=0.1)


def test_the_exact_rounds_are_the_golden_ones(x64):
    """Catches a recursion that starts or ends elsewhere."""
    found = [row["covariance"] for row in exact_rounds((1.0,), 3)]
    np.testing.assert_allclose(found, [0, 0.54629, 0.61114, 0.61739], atol=1e-5)
    assert abs(exact_rounds((1.0,), 1)[0]["bridge"] - (np.sqrt(5) - 1) / 2) < 1e-12


def test_conclusions_follow_from_the_rows():
    """Catches a verdict that does not depend on the numbers."""

    def row(system, sampler, sigma, share):
        named = {"problem": "digits", "system": system, "sampler": sampler, "sigma": sigma, "n_train": 100}
        return named | {"recovered": share, "train_l2_pair_mean": 1.0}

    rows = [row("reflow_1", "ode", 0, 0.2), row("reflow_2", "ode", 0, 0.9), row("reflow_2", "ode", 0.05, 0.0)]
    for share, verdict in ((0.4, True), (0.6, False), (0.88, False)):
        (found,) = report.conclusions([*rows, row("dsbm", "sde", 1.0, 0.0), row("dsbm", "ode", 1.0, share)])
        assert (found["escapes"], found["reflow_2_recovered"]) == (verdict, 0.9)
    free = [row("reflow_2", "ode", 0, 0.1), row("dsbm", "ode", 1.0, 0.0)]
    assert report.conclusions(free) == []  # nothing to escape from
