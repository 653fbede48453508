"""The Wasserstein-2 benchmark: command line, files, resume, and that its couplings and numbers are what they say."""

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

from experiments.common import RunFolder, SettingsError
from experiments.w2_benchmark import cells, references
from experiments.w2_benchmark import main as w2_benchmark
from experiments.w2_benchmark.main import Config, check, find_dims, main
from fvjax import training
from fvjax.data import DataError
from fvjax.data.ot_benchmark import OptimalPairs, mix3tomix10
from fvjax.types import Pair

MATRIX = np.array([[2.0, 0.5], [0.5, 1.0]], np.float32)
"""Symmetric and positive: x -> MATRIX x + 1 is an optimal map."""


def write_mixture(folder, dim, seed=0):
    """A small random problem with the keys of the benchmark's npz files: convex, but not trained to anything."""
    draw = np.random.default_rng(seed)
    widths = (max(2 * dim, 64), max(2 * dim, 64), max(dim, 32))
    arrays = {}
    for name in ("v1", "v2"):
        for i, width in enumerate(widths):
            layer = f"{name}/quadratic_layers/{i}"
            arrays[f"{layer}/quadratic_decomposed"] = draw.normal(0, 0.1, (dim, 1, width))
            arrays[f"{layer}/weight"] = draw.normal(0, 0.3, (width, dim))
            arrays[f"{layer}/bias"] = draw.normal(0, 0.3, width)
        for i in range(2):
            arrays[f"{name}/convex_layers/{i}/weight"] = draw.uniform(0, 0.05, (widths[i + 1], widths[i]))
        arrays[f"{name}/final_layer/weight"] = draw.uniform(0, 0.2, (1, widths[2]))
    maps = draw.normal(size=(3, dim, dim)) / np.sqrt(dim)
    arrays |= {"standardize/scale": np.array(0.7), "standardize/shift": draw.normal(0, 0.1, dim)}
    arrays |= {"mixture/centers": draw.normal(size=(3, dim)), "mixture/maps": maps, "mixture/std": np.array(0.4)}
    arrays |= {"mixture/weights": np.full(3, 1 / 3), "cost_half_w2sq": np.array(1.0)}
    np.savez(folder / f"mix3tomix10_d{dim}.npz", **{key: np.asarray(a, np.float32) for key, a in arrays.items()})


def run_command(*arguments, cwd):
    """The command line in a second process, on one device."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.w2_benchmark", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300, check=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with two dimensions, and values of another solver."""
    folder = tmp_path_factory.mktemp("files")
    for dim in (2, 3):
        write_mixture(folder, dim)
    (folder / "other.csv").write_text("solver,dim,l2_uvp,cosine\nLS,2,5.5,0.9\nLS,3,12,\n")
    return folder


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, files):
    """The command line itself, in a second process, from another directory."""
    out = tmp_path_factory.mktemp("w2") / "run"
    options = ("--couplings", "ot", "shuffled", "independent", "minibatch_ot", "--published", str(files / "other.csv"))
    done = run_command("--smoke", "--data", str(files), *options, "--out", str(out), cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(out=out, done=done, results=json.loads((out / "results.json").read_text()))


@pytest.fixture(scope="module")
def toy():
    """A linear map in two dimensions as known pairs, and sizes of a run on it."""
    matrix, shift = jnp.asarray(MATRIX), jnp.ones(2)

    def sample(key, n):
        x0 = jax.random.normal(key, (n, 2))
        return Pair(x0, x0 @ matrix.T + shift)

    variance = float(np.sum(MATRIX**2))
    cost = float(np.sum((MATRIX - np.eye(2)) ** 2) + 2) / 2
    optimal = OptimalPairs("toy", (2,), sample, lambda x: matrix @ x + shift, cost, variance)
    settings = cells.Settings(32, 1, 10, 50, pool=1024, held_out=256, solver="euler", solver_steps=10)
    return cells.prepare(optimal, cells.COUPLINGS, settings, jax.random.key(0)), settings


def test_smoke_run_writes_every_file_and_names_its_data(smoke):
    """Catches a part that is skipped, a figure without its numbers, or a table that does not say what the data are."""
    assert smoke.done.stdout.strip().splitlines()[-1] == f"results: {smoke.out}"
    assert smoke.done.stdout.startswith("w2_benchmark: mix3tomix10-d2, mix3tomix10-d3; ")
    assert "LS" in smoke.done.stdout
    names = {path.name for path in (smoke.out / "figures").iterdir()}
    figures = ("quality", "memorization", "training")
    assert names == {f"{stem}.{ending}" for stem in figures for ending in ("png", "pdf", "csv")}
    wanted = {"config.json", "results.json", "report.html", "rows.csv", "cells", "figures"}
    assert {path.name for path in smoke.out.iterdir()} == wanted
    with (smoke.out / "rows.csv").open(newline="") as stream:
        assert {row["data"] for row in csv.DictReader(stream)} == {"mix3tomix10-d2", "mix3tomix10-d3"}


def test_the_report_says_what_the_results_say(smoke, read_report):
    """Catches a verdict that was written beforehand."""
    text = read_report(smoke.out)
    assert "transport: mix3tomix10-d2 and mix3tomix10-d3" in text
    for row in smoke.results["rows"]:
        assert f"{row['l2_uvp']:.3g}%" in text or row["split"] == "train"
        assert f"{row['l2_ot_mean']:.3f}" in text


def test_results_have_a_row_for_every_cell_with_solver_steps_and_loss(smoke):
    """Catches a missing cell, a renamed key, and a number without what it depends on."""
    results = smoke.results
    expected = {
        (dim, coupling, sigma, split)
        for dim in (2, 3)
        for coupling in ("ot", "shuffled", "independent", "minibatch_ot")
        for sigma in (0.0, 0.5)
        for split in ("train", "held_out")
    }
    keys = ("dim", "coupling", "sigma", "split")
    assert {tuple(row[key] for key in keys) for row in results["rows"]} == expected
    assert len(results["rows"]) == len(expected)
    for row in results["rows"]:
        assert (row["solver"], row["solver_steps"], row["training_steps"], row["n"]) == ("euler", 4, 32, 32)
        assert np.isfinite([row["training_loss"], row["l2_uvp"], row["cosine"], row["l2_ot_mean"]]).all()
        known = row["split"] == "train" and row["coupling"] != "independent"
        assert ("l2_training_mean" in row) == known
    assert {row["map"] for row in results["baselines"]} == {"identity", "mean", "linear"}
    assert {(row["coupling"], row["sigma_c_predicted"]) for row in results["minimiser"]} == {("shuffled", None)}
    assert [row["l2_uvp"] for row in results["published"]] == [5.5, 12.0]
    assert {row["dim"] for row in results["data"]} == {2, 3}


def test_the_minimiser_without_noise_returns_its_training_pairs(smoke):
    """Catches minimiser rows of other pairs than those that the networks are trained on."""
    rows = [row for row in smoke.results["minimiser"] if row["split"] == "train" and row["sigma"] == 0]
    assert len(rows) == 2
    assert max(row["l2_training_mean"] for row in rows) < 1e-4
    assert min(row["l2_ot_mean"] for row in rows) > 0.1


def test_a_resumed_run_computes_what_is_missing_and_nothing_else(smoke, files, tmp_path):
    """Catches cells that are trained again, a resumed result that differs, and settings that changed in between."""
    couplings = ("ot", "shuffled", "independent", "minibatch_ot")
    config = Config(data=files, couplings=couplings, out=smoke.out, resume=True, smoke=True)
    kept = smoke.out / "cells" / "mix3tomix10-d2_network_ot_0.5.json"
    before, others = (
        kept.read_bytes(),
        {path: path.stat().st_mtime_ns for path in kept.parent.iterdir() if path != kept},
    )
    kept.unlink()
    results = main(config, RunFolder(smoke.out, resume=True))
    again, first = (json.loads(content)["rows"] for content in (kept.read_bytes(), before))
    assert [row["l2_uvp"] for row in again] == pytest.approx([row["l2_uvp"] for row in first], rel=1e-3)
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert len(results["rows"]) == len(smoke.results["rows"])
    with pytest.raises(SettingsError, match="--seed must be that of the run, 0, got 1"):
        main(replace(config, seed=1), RunFolder(smoke.out, resume=True))


def test_the_benchmarks_own_pairs_run(shared_data, tmp_path):
    """Catches an experiment that works on this test's random files only."""
    config = Config(data=shared_data / "mix3tomix10", dims=(16,), couplings=("shuffled",), sigmas=(0.1,), smoke=True)
    results = main(config, RunFolder(tmp_path / "run"))
    assert {row["data"] for row in results["rows"]} == {"mix3tomix10-d16"}
    assert {(row["coupling"], row["sigma"]) for row in results["minimiser"]} == {("shuffled", 0.1)}
    # Half of |x1_i - x1_j| at random is 2.8 in 16 dimensions; the nearest of 31 midpoints lies closer.
    assert all(0.3 < row["sigma_c_predicted"] < 1.5 for row in results["minimiser"])
    assert results["baselines"][0]["l2_uvp"] == pytest.approx(88.9, rel=0.2)  # 32 held-out sources


def test_without_data_one_line_says_what_is_needed(tmp_path, refusal):
    """Catches a traceback, and a run folder left behind, where the benchmark's files are not there."""
    line = refusal(w2_benchmark, cwd=tmp_path)
    assert line.startswith("error: --data must name the folder of the benchmark's files, N_v1.pt and N_v2.pt")
    assert "github.com/iamalexkorotin/Wasserstein2Benchmark" in line
    assert not any(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    line = refusal(w2_benchmark, "--data", "empty", "--out", "out", cwd=tmp_path)
    assert "got empty, which holds none of them" in line
    assert not (tmp_path / "out").exists()


def test_a_full_folder_is_refused_and_left_alone(files, tmp_path):
    """Catches an overwritten run."""
    (tmp_path / "results.json").write_text("precious")
    done = run_command("--smoke", "--data", str(files), "--out", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: --out must be a new or an empty folder, got {tmp_path}"
    assert (tmp_path / "results.json").read_text() == "precious"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps must be an integer >= 1, got 0"),
        ({"width": -1}, "--width must be an integer >= 1, got -1"),
        ({"solver_steps": 0}, "--solver-steps must be an integer >= 1, got 0"),
        ({"pairs": 1}, r"--pairs must be in \[2, 65536\], got 1"),
        ({"pairs": 70_000}, r"--pairs must be in \[2, 65536\], got 70000"),
        ({"held_out": 1}, r"--held-out must be in \[2, 65536\], got 1"),
        ({"seed": -1}, r"--seed must be in \[0, 2\^31\), got -1"),
        ({"sigmas": (0.0, -0.1)}, "--sigmas must be >= 0 and finite, got -0.1"),
        ({"sigmas": ()}, "--sigmas must hold at least one value, got none"),
        ({"couplings": ("ot", "ot")}, "--couplings must be distinct"),
        ({"dims": (2, 512)}, r"--dims must be in \[2, 256\], got 512"),
        ({"resume": True}, "--out must name the run's folder where --resume is given, got none"),
        ({"data": None}, "--data must name the folder"),
    ],
)
def test_bad_options_get_one_clear_error(change, message, files):
    """Catches an option that is not checked before anything is written."""
    with pytest.raises(ValueError, match=message):
        check(replace(Config(data=files), **change))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("solver,dim,cosine\nLS,2,0.5\n", r"\['l2_uvp'\] missing"),
        ("solver,dim,l2_uvp,cosine\nLS,two,1,0.5\n", "must be a CSV file of numbers"),
        ("", "missing"),
    ],
)
def test_published_values_that_cannot_be_read_are_refused(content, message, tmp_path):
    """Catches a table that is drawn with holes, or a traceback of csv."""
    path = tmp_path / "published.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        references.read_published(path)
    with pytest.raises(DataError, match="must be a CSV file of numbers"):
        references.read_published(tmp_path / "nowhere.csv")


def test_every_coupling_draws_the_pairs_that_it_names(toy):
    """Catches a coupling that draws from the wrong rows: optimal, deranged, independent, or best within a batch."""
    prepared, settings = toy
    image = {tuple(x0): tuple(x1) for x0, x1 in zip(*map(np.asarray, prepared.pool), strict=True)}
    costs = {}
    for coupling in cells.COUPLINGS:
        task = cells.task_of(prepared, coupling, 0.0)
        batches = [cells.draw_batch(task, jax.random.key(k)) for k in range(8)]
        x0, x1 = (np.concatenate([np.asarray(batch[i]) for batch in batches]) for i in (0, 1))
        kept = np.array([image[tuple(a)] == tuple(b) for a, b in zip(x0, x1, strict=True)])
        costs[coupling] = float(np.square(x1 - x0).sum(1).mean())
        rows = len(np.unique(x0, axis=0))
        if coupling in cells.FINITE:
            known = cells.training_pairs(prepared, coupling, settings)
            assert rows == settings.pairs  # 2048 draws miss one of 50 rows with probability 1e-16
            table = {tuple(a): tuple(b) for a, b in zip(*map(np.asarray, known), strict=True)}
            assert all(table[tuple(a)] == tuple(b) for a, b in zip(x0, x1, strict=True))
        else:
            assert rows > 500
        if coupling in {"ot", "ot_finite"}:
            assert kept.all()
        elif coupling == "shuffled":
            assert not kept.any()
    # The exact cost is 4.25, its estimate from 2048 draws has a standard error of 0.1; minibatch OT lies just above.
    assert costs["ot"] == pytest.approx(2 * prepared.optimal.cost, abs=0.5)
    assert costs["ot"] * 0.9 < costs["minibatch_ot"] < 1.2 * costs["ot"]
    assert costs["independent"] > 2 * costs["ot"]


def test_all_couplings_and_sigmas_share_one_compilation(toy, monkeypatch):
    """Catches a cell that compiles the training step anew: 27 cells would then take as many times 20 seconds."""
    prepared, settings = toy
    traces = []
    original = training.make_train_step

    def counted(*arguments, **options):
        traces.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(training, "make_train_step", counted)
    cells._trainer.cache_clear()
    for coupling, sigma in (("ot", 0.0), ("shuffled", 0.5), ("independent", 0.1)):
        cells.run_cell(prepared, coupling, sigma, settings)
    assert len(traces) == 1


def test_the_true_map_and_the_mean_have_the_uvp_that_they_must(toy):
    """Catches a UVP that is not 0 at the truth or 100 at the mean, and a cosine with the wrong sign."""
    prepared, _ = toy
    pairs, optimal = prepared.held_out, prepared.optimal
    exact = cells.measured(optimal, pairs, jax.vmap(optimal.transport)(pairs.x0))
    assert exact["l2_uvp"] < 1e-6
    assert exact["cosine"] == pytest.approx(1, abs=1e-6)
    rows = {row["map"]: row for row in references.baseline_rows(prepared)}
    assert rows["identity"]["cosine"] is None
    assert rows["mean"]["l2_uvp"] == pytest.approx(100, abs=25)  # 256 held-out samples: standard error 8
    # For this map of a Gaussian the linear one is exact, up to the sampling error of 1024 covariances.
    assert rows["linear"]["l2_uvp"] < 0.5


def test_failed_solves_are_counted_and_left_out(toy):
    """Catches one nan that turns a whole row into nan, and a flow that fails everywhere and passes for a result."""
    prepared, settings = toy
    cell = cells.cell_of(prepared, "ot_finite", 0.0)

    def broken(x0):
        return (x0 @ MATRIX.T + 1).at[:3].set(jnp.nan)

    train, held_out = cells.rows_of(prepared, cell, settings, broken)
    assert (train["failed"], train["n"]) == (3, settings.pairs - 3)
    assert train["l2_training_mean"] == train["l2_ot_mean"] < 1e-5
    assert (held_out["failed"], held_out["n"]) == (3, settings.held_out - 3)
    assert "l2_training_mean" not in held_out
    with pytest.raises(FloatingPointError, match="the flow must stay finite"):
        cells.rows_of(prepared, cell, settings, lambda x0: jnp.full_like(x0, jnp.nan))


def test_a_trained_network_on_optimal_pairs_finds_the_map_and_on_independent_ones_does_not(toy):
    """Catches a flow that is integrated backwards, parameters that were not trained, and a wrong coupling."""
    prepared, settings = toy
    settings = settings._replace(steps=600, width=64)
    found = {
        coupling: next(
            row for row in cells.run_cell(prepared, coupling, 0.0, settings)[0] if row["split"] == "held_out"
        )
        for coupling in ("ot", "independent")
    }
    assert found["ot"]["l2_uvp"] < 2
    assert found["independent"]["l2_uvp"] > 3 * found["ot"]["l2_uvp"]


def test_dimensions_are_those_of_the_files(tmp_path):
    """Catches a missed file format, text order (16 before 2), and 256 in a default run."""
    for name in ("mix3tomix10_d16.npz", "2_v1.pt", "2_v2.pt", "256_v1.pt", "8_v1_conj.pt", "LICENSE"):
        (tmp_path / name).touch()
    assert find_dims(tmp_path) == (2, 16)


@pytest.mark.parametrize(("dim", "identity", "linear"), [(2, 33.1, 13.8), (16, 88.9, 41.5), (64, 134.9, 63.4)])
def test_baselines_of_the_benchmark(dim, identity, linear, shared_data):
    """Catches baselines that moved: identity by the files' cost and variance, the linear map as first measured here."""
    optimal = mix3tomix10(shared_data / "mix3tomix10", dim)
    settings = cells.Settings(8, 1, 1, 10, pool=2**14, held_out=4096, solver="euler", solver_steps=1)
    rows = {
        row["map"]: row for row in references.baseline_rows(cells.prepare(optimal, (), settings, jax.random.key(0)))
    }
    assert rows["identity"]["l2_uvp"] == pytest.approx(identity, rel=0.05)
    assert 200 * optimal.cost / optimal.target_variance == pytest.approx(identity, rel=0.02)
    assert rows["linear"]["l2_uvp"] == pytest.approx(linear, rel=0.05)
