"""The architectures side by side: command line, files, resume; residuals, fits and verdicts are what they say."""

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

from experiments.architectures import digits, gaussian_task, report
from experiments.architectures.main import LONGER, Config, check, digits_jobs, gaussian_jobs, main
from experiments.architectures.networks import Size, count_parameters
from experiments.common import RunFolder, SettingsError
from fvjax import training
from fvjax.types import AffineMap


def run_command(*arguments, cwd):
    """The command line in a second process, on one device."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.architectures", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=600, check=False)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The command line itself, in a second process, from another directory."""
    out = tmp_path_factory.mktemp("architectures") / "run"
    networks = ("--networks", "mlp", "affine", "transformer")  # a U-Net would take a third of the time
    done = run_command("--smoke", *networks, "--out", str(out), cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(out=out, done=done, results=json.loads((out / "results.json").read_text()))


def test_smoke_run_writes_every_file(smoke):
    """Catches a part that is skipped, a figure without its numbers, and conclusions that are not printed."""
    assert smoke.done.stdout.strip().splitlines()[-1] == f"results: {smoke.out}"
    assert {path.name for path in smoke.out.iterdir()} == {
        "config.json",
        "results.json",
        "report.html",
        "rows.csv",
        "cells",
        "figures",
    }
    names = {path.name for path in (smoke.out / "figures").iterdir()}
    assert names == {f"{stem}.{ending}" for stem in ("gaussian", "digits") for ending in ("png", "pdf", "csv")}
    for sentence in smoke.results["conclusions"]:
        assert f"- {sentence}" in smoke.done.stdout
    with (smoke.out / "rows.csv").open(newline="") as stream:
        assert {row["part"] for row in csv.DictReader(stream)} == {"gaussian", "digits"}


def test_the_report_says_what_the_results_say(smoke, read_report):
    """Catches a verdict that was written beforehand, and a network that is left out."""
    text = read_report(smoke.out)
    assert "Architectures side by side on Gaussian pairs and shuffled pairs of digits" in text
    for row in smoke.results["gaussian"]["rows"]:
        assert f"{row['residual']:.2e}" in text
    for row in smoke.results["digits"]["rows"]:
        assert f"{row['name']} {row['l2_shuffled_mean']:.2f}/{row['l2_ot_mean']:.2f}" in text


def test_smoke_results_have_a_row_for_every_network_with_its_steps(smoke):
    """Catches a missing network, one that is trained twice, and a number without what it depends on."""
    rows = smoke.results["gaussian"]["rows"]
    assert [(row["name"], row["steps"]) for row in rows] == [
        ("closed_form", 0),
        ("affine", 10),
        ("mlp_16x1", 10),
        ("transformer_16x1", 10),
        ("mlp_16x1", 10 * LONGER),
    ]
    for row in rows:
        assert np.isfinite([row["residual"], row["l2_euler_mean"], row["gradient_variance"]]).all()
        assert row["steps"] == 0 or np.isfinite(row["loss"])
    assert len(smoke.results["gaussian"]["profile"]) == 4 * len(rows)
    found = smoke.results["digits"]["rows"]
    names = ("minimiser", "mlp_16x1")  # with both parts, transformers are in the first one only
    assert [(row["name"], row["sigma"]) for row in found] == [(name, sigma) for name in names for sigma in (0.0, 1.0)]
    for row in found:
        assert np.isfinite([row["l2_shuffled_mean"], row["l2_ot_mean"], row["l2_held_out_ot_mean"]]).all()
        assert (row["solver"], row["solver_steps"], row["n"]) == ("euler", 50, 16)
        if row["name"] != "minimiser":
            assert (row["steps"], row["batch"]) == (10, digits.BATCH)
            assert np.isfinite([row["loss"], row["gradient_variance"]]).all()
    assert {row["step"] for row in smoke.results["digits"]["training"]} == {5, 10}


def test_the_references_of_both_parts_are_exact(smoke):
    """Catches a closed form for another map than the networks train on, and a minimiser of other pairs than theirs."""
    exact, affine = smoke.results["gaussian"]["rows"][:2]
    assert exact["residual"] < 1e-12
    assert exact["l2_euler_mean"] < 1e-4
    assert exact["gradient_variance"] < 1e-9
    assert exact["gradient_variance_exact"] == 0
    # 10 steps from Theta = 0; 16 draws estimate a variance to a factor 3.
    assert affine["gradient_variance"] / affine["gradient_variance_exact"] == pytest.approx(1, abs=0.7)
    (memorizing,) = [row for row in smoke.results["digits"]["rows"] if (row["name"], row["sigma"]) == ("minimiser", 0)]
    assert memorizing["l2_shuffled_mean"] < 1e-3
    assert memorizing["l2_ot_mean"] == pytest.approx(
        smoke.results["digits"]["baselines"]["l2_shuffled_to_ot"], abs=1e-3
    )


def test_the_residual_is_relative_to_the_mean_square_velocity():
    """Catches another scale, and a profile that does not average to the residual: a field of 0 misses all of u."""
    settings = gaussian_task.Settings(2048, 4, 5, 8, (("euler", 2),))
    problem = gaussian_task.make_problem(jax.random.key(0), 120.0, settings)
    size = Size("affine")
    still = AffineMap(jnp.zeros((16, 16)), jnp.zeros(16))
    row, *profile = gaussian_task.rows_of(
        problem, size, size.model(gaussian_task.DIMS).apply, still, settings=settings, known={"steps": 0}
    )
    assert row["residual"] == pytest.approx(1, abs=4 * row["residual_error"])
    assert 0 < row["residual_error"] < 0.02
    assert np.mean([entry["residual"] for entry in profile]) == pytest.approx(row["residual"], rel=1e-6)
    # M has eigenvalues .5 to 2 and the rotation leaves them: A A^T = M.
    matrix = np.asarray(problem.map.matrix, float)
    np.testing.assert_allclose(np.linalg.eigvalsh(matrix @ matrix.T)[[0, -1]], gaussian_task.EIGENVALUES, rtol=1e-4)
    singular = [entry["smallest_singular_value"] for entry in profile]
    assert min(singular) == pytest.approx(problem.smallest_singular_values().min())
    assert 0.2 < min(singular) < 0.7  # exactly 0.5 at t = 1/2 for M = I


def test_networks_share_one_compilation_over_sigmas_and_a_resumed_run_keeps_its_cells(tmp_path, monkeypatch):
    """Catches a step compiled for every sigma, cells that are trained again, and settings that changed in between."""
    traces = []
    original = training.make_train_step

    def counted(*arguments, **options):
        traces.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(training, "make_train_step", counted)
    out = tmp_path / "run"
    config = Config(parts=("digits",), networks=("mlp",), sigmas=(0.0, 0.5), digits_steps=(4,), out=out, smoke=True)
    first = main(config, RunFolder(out))
    assert len(traces) == 1
    kept = out / "cells" / "digits_mlp_16x1_0.5.json"
    others = {path: path.stat().st_mtime_ns for path in kept.parent.iterdir() if path != kept}
    assert len(others) == 3
    kept.unlink()
    again = main(replace(config, resume=True), RunFolder(out, resume=True))
    assert {path: path.stat().st_mtime_ns for path in others} == others
    numbers = [[row["l2_shuffled_mean"] for row in run["digits"]["rows"]] for run in (first, again)]
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-5)
    with pytest.raises(SettingsError, match="--seed must be that of the run, 0, got 1"):
        main(replace(config, seed=1, resume=True), RunFolder(out, resume=True))


def _mlp(width, depth, residual, steps=100):
    return {
        "network": "mlp",
        "name": f"mlp_{width}x{depth}",
        "width": width,
        "depth": depth,
        "parameters": width**2,
        "steps": steps,
        "residual": residual,
    }


def test_fits_find_the_exponent_of_a_power_law_and_its_error():
    """Catches natural against decimal logarithms, rows with other steps among the points, and an error left out."""
    rows = [_mlp(width, depth, 3.0 * width**-1.5 / depth) for width in (16, 64, 256) for depth in (1, 2)]
    rows.append(_mlp(16, 1, 1e-9, steps=400))
    found = report.fits(rows, 100)
    by_width = [fit for fit in found if fit["against"] == "width"]
    assert [(fit["fixed"], fit["points"]) for fit in by_width] == [("depth 1", 3), ("depth 2", 3)]
    for fit in by_width:
        assert fit["slope"] == pytest.approx(-1.5)
        assert fit["standard_error"] == pytest.approx(0, abs=1e-6)
    assert not [fit for fit in found if fit["against"] == "depth"]  # two depths are no line
    rough = [_mlp(width, 1, residual) for width, residual in ((1, 1.0), (np.e, np.e), (np.e**2, 1.0))]
    (fit,) = [fit for fit in report.fits(rough, 100) if fit["against"] == "width"]
    # y = 0, 1, 0 over x = 0, 1, 2: residuals -1/3, 2/3, -1/3, so s^2 = 2/3 with 1 degree of freedom, Sxx = 2.
    assert fit["slope"] == pytest.approx(0)
    assert fit["standard_error"] == pytest.approx(np.sqrt(1 / 3))


def test_more_steps_against_more_width_says_what_gains_more():
    """Catches a verdict that does not follow from the numbers, in either direction, and one where there is none."""
    rows = [_mlp(16, 1, 0.8), _mlp(64, 1, 0.1), _mlp(256, 1, 0.05)]
    found = report.longer([*rows, _mlp(16, 1, 0.4, 400), _mlp(256, 1, 0.01, 400), _mlp(32, 1, 0.3, 400)], 100)
    assert [(row["name"], row["gains_more"]) for row in found] == [("mlp_16x1", "width"), ("mlp_256x1", "steps")]
    assert [row["gain_steps"] for row in found] == pytest.approx([2, 5])
    assert [row["gain_width"] for row in found] == pytest.approx([8, 2])
    assert [row["widths"] for row in found] == [[16, 64], [64, 256]]
    (alone,) = report.longer([_mlp(16, 1, 0.8), _mlp(16, 1, 0.4, 400)], 100)
    assert (alone["gain_width"], alone["gains_more"]) == (None, None)


def test_the_crossing_is_the_first_point_nearer_to_the_shuffled_target():
    """Catches the two distances exchanged, the last instead of the first crossing, and a crossing that never was."""
    curve = [
        {"step": step, "l2_shuffled": shuffled, "l2_ot": ot}
        for step, shuffled, ot in ((10, 5.0, 3.0), (20, 3.0, 4.0), (30, 4.0, 3.5), (40, 1.0, 5.0))
    ]
    assert digits.crossing_step(curve) == 20
    assert digits.crossing_step(curve[:1]) is None


def test_the_verdict_on_digits_follows_the_numbers():
    """Catches sentences that are written instead of computed: the same network with its distances exchanged."""
    common = {"network": "mlp", "name": "mlp_8x1", "sigma": 0.5, "steps": 7}
    near = common | {"l2_shuffled_mean": 1.0, "l2_ot_mean": 2.0, "crossing_step": 4}
    far = common | {"l2_shuffled_mean": 2.0, "l2_ot_mean": 1.0, "crossing_step": None}
    (first,), (second,) = (report.digits_conclusions({"rows": [row]}) for row in (near, far))
    assert (
        "nearer to the shuffled target mlp_8x1 1.00/2.00 (7 steps, crossing at 4); nearer to the OT target none"
        in first
    )
    assert "nearer to the shuffled target none; nearer to the OT target mlp_8x1 2.00/1.00 (7 steps)" in second


def test_every_default_size_is_a_network_of_its_images_and_those_of_digits_are_comparable():
    """Catches a default that no network takes, found minutes into a run, and sizes that are compared but far apart."""
    counts = {}
    every = {(gaussian_task.DIMS, job.size) for job in gaussian_jobs(Config()) if job.size is not None}
    every = {(dims, size) for dims, size in every if size.network != "mlp"}
    every |= {(digits.DIMS, size) for sizes in digits.SIZES.values() for size in sizes}
    for dims, size in every:
        model = size.model(dims)
        params = jax.eval_shape(model.init, jax.random.key(0))
        if size.network in {"unet", "transformer"}:
            velocity = jax.eval_shape(model.apply, params, jnp.zeros(()), jnp.zeros(dims))
            assert velocity.shape == dims
        counts[dims, size] = count_parameters(params)
    small = [counts[digits.DIMS, sizes[-1]] for sizes in digits.SIZES.values()]
    assert max(small) < 1.1 * min(small)


def test_every_network_of_a_run_has_a_file_of_its_own():
    """Catches two cells under one name: the second would be read from the first, not computed."""
    config = Config()
    names = [job.name for job in (*gaussian_jobs(config), *digits_jobs(config))]
    assert len(set(names)) == len(names)
    longer = [job.size.label for job in gaussian_jobs(config) if job.steps == LONGER * config.steps]
    assert longer == [f"mlp_{width}x{max(config.depths)}" for width in (min(config.widths), max(config.widths))]
    steps = {job.size.network: job.steps for job in digits_jobs(config) if job.size is not None}
    assert steps == digits.STEPS
    given = replace(config, networks=("unet", "affine", "mlp"), digits_steps=(5, 6))
    assert {(job.size.network, job.steps) for job in digits_jobs(given) if job.size} == {("unet", 5), ("mlp", 6)}


def test_more_pairs_than_digits_are_one_line_and_exit_2(tmp_path):
    """Catches a traceback and a folder left behind where an option does not fit the data."""
    done = run_command("--parts", "digits", "--pairs", "5000", "--out", "run", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: --pairs must be at most 16")
    assert line.endswith("the digits, got 5000")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps must be an integer >= 1, got 0"),
        ({"points": 0}, "--points must be an integer >= 1, got 0"),
        ({"widths": (16, 0)}, "--widths must be an integer >= 1, got 0"),
        ({"widths": (16, 16)}, "--widths must be distinct"),
        ({"depths": ()}, "--depths must hold at least one value, got none"),
        ({"unet_channels": (5,)}, "--unet-channels must be an even integer >= 2, got 5"),
        ({"transformer_widths": (18,)}, "--transformer-widths must be multiples of 4, got 18"),
        ({"angle": 180.0}, r"--angle must be in \[0, 180\) degrees, got 180"),
        ({"angle": float("nan")}, r"--angle must be in \[0, 180\) degrees, got nan"),
        ({"sigmas": (0.0, -0.1)}, "--sigmas must be >= 0 and finite, got -0.1"),
        ({"pairs": 1}, "--pairs must be >= 2, got 1"),
        ({"digits_steps": (0,)}, "--digits-steps must be an integer >= 1, got 0"),
        ({"digits_steps": (5, 6)}, "--digits-steps must be one number or 3, one a network, got 2"),
        ({"networks": ("affine",), "parts": ("digits",)}, "--networks must name more than affine"),
        ({"networks": ()}, "--networks must hold at least one value, got none"),
        ({"seed": 2**31}, r"--seed must be in \[0, 2\^31\), got 2147483648"),
        ({"resume": True}, "--out must name the run's folder where --resume is given, got none"),
    ],
)
def test_bad_options_get_one_clear_error(change, message):
    """Catches an option that is not checked before anything is written."""
    with pytest.raises(ValueError, match=message):
        check(replace(Config(), **change))
