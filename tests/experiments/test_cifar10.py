"""The image experiment: its command line, its files, what stops it, and that a run is the same bits when resumed."""

import json
import os
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments.cifar10 import evaluation, training
from experiments.cifar10 import settings as presets
from experiments.cifar10.main import Config, check, settings_of
from experiments.common import SettingsError
from fvjax import data, nets

DIGITS = data.load("digits")


def start(*arguments, cwd):
    """The command line in a second process, on one device."""
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.cifar10", "--smoke", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment
    )


def finish(process):
    """Exit status, standard output and standard error."""
    output, errors = process.communicate(timeout=900)
    return process.returncode, output, errors


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A whole run, and one that was killed in the middle and resumed."""
    folder = tmp_path_factory.mktemp("cifar10")
    done = finish(start("--out", "whole", cwd=folder))
    assert done[0] == 0, done[2]
    killed = start("--out", "killed", cwd=folder)  # only now: what it needs is compiled
    half = folder / "killed" / "checkpoints" / "step_000000004"
    while killed.poll() is None and not half.exists():
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    assert half.exists()
    assert not (folder / "killed" / "results.json").exists()
    resumed = finish(start("--out", "killed", "--resume", cwd=folder))
    assert resumed[0] == 0, resumed[2]
    return folder, done[1], resumed[1]


def test_a_run_writes_every_file_and_names_its_folder(smoke):
    """Catches a part that is skipped, a figure that is not drawn, or a half-written file left behind."""
    folder, output, _ = smoke
    lines = output.strip().splitlines()
    assert "NOT CIFAR-10" in lines[0]  # nobody may take the digits for it
    assert lines[-1] == "results: whole"
    out = folder / "whole"
    wanted = {"config.json", "results.json", "metrics.csv", "samples.npz", "tensorboard", "checkpoints", "figures"}
    assert {path.name for path in out.iterdir()} == wanted
    figures = {"samples_euler_4", "samples_dopri5_0.001", "training"}
    names = {f"{name}.{ending}" for name in figures for ending in ("png", "pdf")} | {"training.csv"}
    assert {path.name for path in (out / "figures").iterdir()} == names
    with np.load(out / "samples.npz") as samples:
        assert samples["euler_4"].shape == (16, 8, 8, 1)
        assert samples["euler_4"].dtype == np.uint8


def test_results_have_the_promised_keys(smoke):
    """Catches a renamed key, and numbers of another run: these are read by others."""
    results = json.loads((smoke[0] / "whole" / "results.json").read_text())
    assert results["data"] == "digits"
    assert results["preset"] == "cpu"
    assert results["features"] == "pooled_pixels_8"
    assert results["steps"] == 6
    assert results["nfe"] == 4
    assert [row["step"] for row in results["training"]] == [2, 4, 6]
    for value in (results["loss"], results["distance_train"], results["distance_test"], results["distance_floor"]):
        assert np.isfinite(value)
        assert value > 0
    variances = [results["training"][0][f"gradient_variance_bin_{k}"] for k in range(4)]
    assert min(variances) > 0
    adaptive = next(row for row in results["samples"] if row["solver"] == "dopri5")
    assert adaptive["nfe_max"] % 6 == 1  # six evaluations a step of dopri5, and one more
    assert 7 <= adaptive["nfe"] <= adaptive["nfe_max"]


def test_a_killed_and_resumed_run_ends_in_the_same_bits(smoke):
    """Catches a resume that skips or repeats a batch, another random number, and times in the results."""
    folder = smoke[0]
    for name in ("results.json", "metrics.csv", "samples.npz"):
        assert (folder / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


def test_a_finished_run_resumed_with_another_setting_is_refused(smoke):
    """Catches checkpoints of another configuration taken over silently: one line with the difference, exit 2."""
    folder = smoke[0]
    before = (folder / "whole" / "results.json").read_bytes()
    status, _, errors = finish(start("--out", "whole", "--resume", "--sigma", "0.5", cwd=folder))
    assert status == 2
    assert "sigma: 0.0 -> 0.5" in errors
    assert errors.strip().count("\n") == 0
    assert (folder / "whole" / "results.json").read_bytes() == before


def test_a_loss_that_is_not_finite_ends_the_run_with_exit_code_1(tmp_path):
    """Catches a run that goes on with nan, and one that loses or spoils its last good checkpoint."""
    status, _, errors = finish(
        start("--out", "run", "--learning-rate", "1e30", "--log-every", "1", "--save-every", "1", cwd=tmp_path)
    )
    assert status == 1, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert "the loss must stay finite, got nan or inf at step" in line
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith("step"))
    assert kept, "no good checkpoint was kept"
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.fixture(scope="module")
def reflow(smoke, tmp_path_factory):
    """Two rounds without a break; and the finished single round, resumed with a second one, killed in it, resumed."""
    folder = tmp_path_factory.mktemp("reflow")
    whole = finish(start("--out", "whole", "--rounds", "2", cwd=folder))
    assert whole[0] == 0, whole[2]
    shutil.copytree(smoke[0] / "whole", folder / "extended")
    extended = start("--out", "extended", "--resume", "--rounds", "2", cwd=folder)
    half = folder / "extended" / "rounds" / "2" / "checkpoints" / "step_000000004"
    while extended.poll() is None and not half.exists():
        time.sleep(0.05)
    extended.kill()
    extended.communicate()
    assert half.exists()
    assert "rounds" not in json.loads((folder / "extended" / "results.json").read_text())
    resumed = finish(start("--out", "extended", "--resume", "--rounds", "2", cwd=folder))
    assert resumed[0] == 0, resumed[2]
    return folder


def test_a_second_round_leaves_the_first_as_it_is(smoke, reflow):
    """Catches a round 1 that is trained, sampled or named otherwise because another one follows."""
    one, two = (json.loads((path / "whole" / "results.json").read_text()) for path in (smoke[0], reflow))
    rounds = two.pop("rounds")
    assert one == two
    assert [row["round"] for row in rounds] == [1, 2]


def test_rounds_have_the_promised_keys(reflow):
    """Catches a measure that is left out or is of another round: round 2 keeps the pairs that round 1 made."""
    first, second = json.loads((reflow / "whole" / "results.json").read_text())["rounds"]
    for row in (first, second):
        assert row["straightness"] > 0
        assert 0 <= row["memorized_low"] <= row["memorized"] <= row["memorized_high"] <= 1
        assert [few["steps"] for few in row["euler"]] == [1, 2]
        assert row["euler"][1]["error"] < row["euler"][0]["error"]
        assert min(few[f"distance_{split}"] for few in row["euler"] for split in ("train", "test")) > 0
    assert (first["pairs"], first["pair_l2_train"], first["pair_l2_held_out"]) == (None, None, None)
    assert second["pairs"] == 16
    assert 0 < second["pair_l2_train"] < 1  # two independent images are 8 apart
    assert 0 < second["pair_l2_held_out"] < 1
    assert second["loss_pairs"] < 0.1
    assert [row["step"] for row in second["training"]] == [2, 4, 6]
    assert [row["solver"] for row in second["samples"]] == ["euler", "dopri5"]
    figures = {path.name for path in (reflow / "whole" / "figures").iterdir()}
    assert {"rounds.png", "rounds.pdf", "rounds.csv", "training_round_2.png", "samples_round_2_euler_4.png"} <= figures
    with np.load(reflow / "whole" / "samples.npz") as samples:
        assert samples["round_2_euler_4"].shape == samples["euler_4"].shape


def test_a_round_that_was_killed_and_resumed_ends_in_the_same_bits(reflow):
    """Catches pairs of other noise, a round that starts at other parameters, and batches that are skipped."""
    for name in ("results.json", "samples.npz", "rounds/2/metrics.csv", "rounds/2/x0.npy", "rounds/2/x1.npy"):
        assert (reflow / "extended" / name).read_bytes() == (reflow / "whole" / name).read_bytes(), name


def test_rounds_resumed_with_another_number_of_pairs_are_refused(reflow):
    """Catches pairs of other settings that are taken over silently: one line, exit 2."""
    options = ("--out", "whole", "--resume", "--rounds", "2", "--pairs", "8")
    status, _, errors = finish(start(*options, cwd=reflow))
    assert status == 2
    assert "the pairs of round 2 must be those of the run" in errors
    assert errors.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps must be an integer >= 1, got 0"),
        ({"sigma": -0.1}, "--sigma must be >= 0 and finite, got -0.1"),
        ({"sigma": float("nan")}, "--sigma must be"),
        ({"rounds": 0}, "--rounds must be an integer >= 1, got 0"),
        ({"rounds": 2, "distributed": True, "out": "x"}, r"--rounds must be 1 with --distributed .*, got 2"),
        ({"rounds": 2, "pairs": 1}, "--pairs must be >= 2, got 1"),
        ({"pairs": 10}, "--pairs must come with --rounds above 1, got 10 pairs and 1 round"),
        ({"samples": 1}, "--samples must be >= 2, got 1"),
        ({"euler": (10, 10)}, "--euler must hold at least one number and no number twice"),
        ({"tolerance": 0.0}, "--tolerance must be > 0"),
        ({"learning_rate": 0.0}, "--learning-rate must be > 0"),
        ({"seed": -1}, "--seed must be in"),
        ({"resume": True}, "--out must name the run's folder where --resume is given"),
        ({"coordinator": "127.0.0.1:1"}, "--coordinator, --processes and --process-id must come with --distributed"),
        ({"distributed": True}, "--out must be given with --distributed"),
    ],
)
def test_bad_options_are_refused(options, message):
    """Catches an option that is accepted and ignored or fails minutes later."""
    with pytest.raises(ValueError, match=message):
        check(Config(**options))


def test_settings_that_do_not_fit_are_refused():
    """Catches batches that cannot be divided, and checkpoints between two logs."""
    with pytest.raises(SettingsError, match=f"--batch must be divisible by the {jax.device_count()} devices"):
        settings_of(Config(batch=63), "cpu", DIGITS)
    with pytest.raises(SettingsError, match="--save-every must be a multiple of --log-every = 100, got 250"):
        settings_of(Config(save_every=250), "cpu", DIGITS)


def test_the_command_line_wins_over_the_preset():
    """Catches an option that is accepted and ignored."""
    found = settings_of(Config(steps=7, batch=8, channels=16, samples=5, sigma=0.3, coupling="fixed"), "paper", DIGITS)
    assert (found.steps, found.batch, found.samples, found.sigma) == (7, 8, 5, 0.3)
    assert found.network["channels"] == 16
    assert found.coupling == "fixed"
    assert not found.flip
    assert presets.PAPER["network"]["channels"] == 128  # the preset itself is untouched


def test_fixed_pairs_keep_their_noise_for_the_whole_run():
    """Catches noise that is drawn anew: an image meets the same x0 in every epoch, and no two images share one."""
    settings = settings_of(Config(coupling="fixed", batch=64), "cpu", DIGITS)
    few = DIGITS.train[:80]
    stream = training.batches(settings, few, slice(None))
    seen = {}
    for step in range(4):  # more than three epochs of 80 images
        x0, x1 = stream(step)
        for noise, image in zip(x0, x1, strict=True):
            seen.setdefault(image.tobytes(), set()).add(noise.tobytes())
    assert len(seen) == 80
    assert all(len(noises) == 1 for noises in seen.values())
    assert len(set.union(*seen.values())) == 80
    part = training.batches(settings, few, slice(16, 32))(2)
    np.testing.assert_array_equal(part.x0, stream(2).x0[16:32])


def test_held_out_images_meet_new_noise_under_fixed_pairs():
    """Catches a held-out loss at the training noise, which a network that memorizes knows: x0 = x1 - target."""
    settings = settings_of(Config(coupling="fixed"), "cpu", DIGITS)
    images, key = DIGITS.train[:8], jax.random.key(0)
    x1 = data.batch(images, seed=0, step=0, size=8)
    fixed = training.fixed_sources(0, data.batch_indices(0, 0, 8, 8), DIGITS.train.shape[1:])
    seen, held_out = (training.probe_paths(settings, images, key, held_out=flag) for flag in (False, True))
    np.testing.assert_allclose(x1 - seen.target, fixed, atol=1e-5)
    assert np.abs(x1 - held_out.target - fixed).max() > 1


@pytest.mark.parametrize("options", [{"solver": "euler", "steps": 2}, {"solver": "dopri5", "rtol": 1e-2, "atol": 1e-2}])
def test_samples_that_are_not_finite_are_one_clear_error(options):
    """Catches black or noisy images, and a distance, made of nan."""
    settings = settings_of(Config(samples=3), "cpu", DIGITS)
    with pytest.raises(FloatingPointError, match="samples must be finite, got 100 of 100 that are not .sampling, "):
        evaluation.generate(settings, lambda params, t, x: x / 0.0, None, options, key=jax.random.key(0))


def test_large_images_get_smaller_batches_on_a_cpu():
    """Catches hours instead of minutes for a user's array of 32 x 32 pixels."""
    large = DIGITS._replace(train=np.zeros((40, 32, 32, 3), np.uint8), test=np.zeros((4, 32, 32, 3), np.uint8))
    assert settings_of(Config(), "cpu", large).batch < settings_of(Config(), "cpu", DIGITS).batch
    assert settings_of(Config(batch=64), "cpu", large).batch == 64
    assert settings_of(Config(batch=128), "paper", large).samples == presets.PAPER["samples"]


def test_the_paper_preset_is_the_papers():
    """Catches a drifted default: the network's size is the published one."""
    network = nets.unet((32, 32, 3), **presets.PAPER["network"])
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 35_746_307
    chosen = ("steps", "batch", "learning_rate", "warmup", "schedule", "ema_decay", "save_every")
    assert [presets.PAPER[name] for name in chosen] == [400_001, 128, 2e-4, 5000, "constant", 0.9999, 20_000]


def test_cifar10_that_is_not_prepared_is_one_clear_error(tmp_path):
    """Catches a download that hangs, or digits in the place of the data that were asked for."""
    with pytest.raises(data.DataError, match="tfds.builder"):
        presets.find_data("paper", "auto", tmp_path)
    with pytest.raises(data.DataError, match="tfds.builder"):
        presets.find_data("auto", "cifar10", tmp_path)
