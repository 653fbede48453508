"""The image experiment: its command line, its files, what stops it, and that a run is the same bits when resumed."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.cifar10 import evaluation, training
from experiments.cifar10 import main as cifar10
from experiments.cifar10 import settings as presets
from experiments.cifar10.main import Config, check, settings_of
from experiments.common import SettingsError
from fvjax import data, nets

DIGITS = data.load("digits")


def start(*arguments, cwd):
    """The command line in a second process, on one device."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.cifar10", "--smoke", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment
    )


def finish(process):
    """Exit status, standard output and standard error."""
    output, errors = process.communicate(timeout=900)
    return process.returncode, output, errors


def killed_at(checkpoint, *arguments, cwd):
    """Starts a run, and kills it as soon as that checkpoint is there."""
    process = start(*arguments, cwd=cwd)
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert checkpoint.exists()


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A whole run of one round."""
    folder = tmp_path_factory.mktemp("cifar10")
    done = finish(start("--out", "whole", cwd=folder))
    assert done[0] == 0, done[2]
    return folder, done[1]


def test_a_run_writes_every_file_and_names_its_folder(smoke):
    """Catches a part that is skipped, a figure that is not drawn, or a half-written file left behind."""
    folder, output = smoke
    lines = output.strip().splitlines()
    assert "NOT CIFAR-10" in lines[0]  # nobody may take the digits for it
    assert lines[-1] == "results: whole"
    out = folder / "whole"
    wanted = {"config.json", "results.json", "metrics.csv", "samples.npz", "tensorboard", "checkpoints", "figures"}
    wanted |= {"report.html"}
    assert {path.name for path in out.iterdir()} == wanted
    figures = {"samples_euler_4", "samples_dopri5_0.001", "training"}
    names = {f"{name}.{ending}" for name in figures for ending in ("png", "pdf")} | {"training.csv"}
    assert {path.name for path in (out / "figures").iterdir()} == names
    with np.load(out / "samples.npz") as samples:
        assert samples["euler_4"].shape == (16, 8, 8, 1)
        assert samples["euler_4"].dtype == np.uint8


def test_the_report_says_what_the_results_say(smoke, reflow, read_report):
    """Catches a verdict that was written beforehand, digits that pass for CIFAR-10, and rounds that are left out."""
    for out, rounds in ((smoke[0] / "whole", 1), (reflow / "extended", 2), (reflow / "killed", 2)):
        text, results = read_report(out), json.loads((out / "results.json").read_text())
        assert "From noise to images: digits" in text
        assert "CIFAR-10: the images are digits." in text
        told = f"loss {results['loss_test']:.3g} on held-out images, {results['loss']:.3g} on training images"
        assert told in text
        assert f"{results['distance_test']:.3g} against {results['distance_floor']:.3g}" in text
        assert ("Rounds of ReFlow" in text) == (rounds > 1)
        for row in results.get("rounds", [])[1:]:
            assert f"Round 2 ends {row['pair_l2_train']:.3g} from the pairs that it was trained on" in text


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


def test_a_finished_run_resumed_with_another_setting_is_refused(smoke, refusal):
    """Catches checkpoints of another configuration taken over silently: one line with the difference, exit 2."""
    folder = smoke[0]
    before = (folder / "whole" / "results.json").read_bytes()
    assert "sigma: 0.0 -> 0.5" in refusal(cifar10, "--out", "whole", "--resume", "--sigma", "0.5", cwd=folder)
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
    """The finished single round, continued by a second one; and two rounds that were killed in each and resumed."""
    folder = tmp_path_factory.mktemp("reflow")
    shutil.copytree(smoke[0] / "whole", folder / "extended")
    extended = finish(start("--out", "extended", "--resume", "--rounds", "2", cwd=folder))
    assert extended[0] == 0, extended[2]
    run = ("--out", "killed", "--rounds", "2")  # only now: what it needs is compiled
    half = Path("checkpoints") / "step_000000004"
    killed_at(folder / "killed" / half, *run, cwd=folder)
    assert not (folder / "killed" / "rounds").exists()
    killed_at(folder / "killed" / "rounds" / "2" / half, *run, "--resume", cwd=folder)
    assert not (folder / "killed" / "results.json").exists()
    resumed = finish(start(*run, "--resume", cwd=folder))
    assert resumed[0] == 0, resumed[2]
    return folder


def test_a_killed_and_resumed_run_ends_in_the_same_bits(smoke, reflow):
    """Catches a resume that skips or repeats a batch, another random number, and times in the results."""
    assert (reflow / "killed" / "metrics.csv").read_bytes() == (smoke[0] / "whole" / "metrics.csv").read_bytes()


def test_a_second_round_leaves_the_first_as_it_is(smoke, reflow):
    """Catches a round 1 that is trained, sampled or named otherwise because another one follows."""
    one, two = (json.loads((path / "results.json").read_text()) for path in (smoke[0] / "whole", reflow / "killed"))
    rounds = two.pop("rounds")
    assert one == two
    assert [row["round"] for row in rounds] == [1, 2]
    with np.load(smoke[0] / "whole" / "samples.npz") as first, np.load(reflow / "killed" / "samples.npz") as both:
        for name in first:
            np.testing.assert_array_equal(both[name], first[name])


def test_rounds_have_the_promised_keys(reflow):
    """Catches a measure that is left out or is of another round: round 2 keeps the pairs that round 1 made."""
    first, second = json.loads((reflow / "extended" / "results.json").read_text())["rounds"]
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
    figures = {path.name for path in (reflow / "extended" / "figures").iterdir()}
    assert {"rounds.png", "rounds.pdf", "rounds.csv", "training_round_2.png", "samples_round_2_euler_4.png"} <= figures
    with np.load(reflow / "extended" / "samples.npz") as samples:
        assert samples["round_2_euler_4"].shape == samples["euler_4"].shape


def test_a_round_that_was_killed_and_resumed_ends_in_the_same_bits(reflow):
    """Catches pairs of other noise, a round that starts at other parameters, and batches that are skipped.

    One side made round 2 after its own round 1, was killed in both and resumed; the other went on from a finished run.
    """
    for name in ("results.json", "samples.npz", "rounds/2/metrics.csv", "rounds/2/x0.npy", "rounds/2/x1.npy"):
        assert (reflow / "extended" / name).read_bytes() == (reflow / "killed" / name).read_bytes(), name


def test_rounds_resumed_with_another_number_of_pairs_are_refused(reflow, refusal):
    """Catches pairs of other settings that are taken over silently: one line, exit 2."""
    errors = refusal(cifar10, "--out", "extended", "--resume", "--rounds", "2", "--pairs", "8", cwd=reflow)
    assert "the pairs of round 2 must be those of the run" in errors


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
