"""Configuration and order of the image experiment; see `python -m experiments.cifar10 --help`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from experiments import plots
from experiments.cifar10 import evaluation
from experiments.cifar10.comparison import round_rows
from experiments.cifar10.page import make_page
from experiments.cifar10.rounds import Finished, train_rounds
from experiments.cifar10.settings import CPU, CPU_LARGE, LARGE, PAIRS, PAPER, SMOKE, Rounds, Settings, find_data
from experiments.cifar10.training import train
from experiments.common import RunFolder, SettingsError, table
from fvjax import _validate, data, metrics, training
from fvjax.report import environment

GRID = 100
"""Samples that the grid shows; 256 of each solver are kept."""
KEPT = 256
ROUND_COLUMNS = {
    "round": "",
    "straightness": ".4g",
    "pair_l2_train": ".4g",
    "pair_l2_held_out": ".4g",
    "memorized": ".3f",
}


@dataclass(frozen=True)
class Config:
    """Flow matching from N(0, I) to images: CIFAR-10 as in the paper, or any images (no GPU: digits, 5 minutes).

    Preset paper: the U-Net of 35.7M parameters, batch 128, 400,001 steps, FID by --inception. Preset cpu, chosen where
    there is no GPU or no data: a small U-Net on scikit-learn's digits; expected: legible digits and a distance to the
    held-out images near that of the training images. Writes config.json, results.json, metrics.csv, tensorboard/,
    checkpoints/, samples.npz, figures/ and report.html into the run folder. With --rounds K the first results are
    those of round 1, results.json gets "rounds", and round k keeps its pairs, checkpoints and metrics in rounds/<k>/; a
    finished run can be resumed with more rounds.
    """

    preset: Annotated[
        Literal["auto", "paper", "cpu"], tyro.conf.arg(help="auto: paper with a GPU and the data, else cpu")
    ] = "auto"
    data: Annotated[
        str, tyro.conf.arg(help="auto, cifar10, celeba, digits, a folder of images, or an .npy or .npz array")
    ] = "auto"
    data_dir: Annotated[Path | None, tyro.conf.arg(help="where tensorflow-datasets keeps its data")] = None
    sigma: Annotated[float, tyro.conf.arg(help="noise scale >= 0 of the constant-noise interpolant")] = 0.0
    coupling: Annotated[
        Literal["independent", "ot", "sinkhorn", "fixed"],
        tyro.conf.arg(
            help="noise and images of a batch: independent, minibatch OT (exact or entropic), or one fixed noise for"
            " each image"
        ),
    ] = "independent"
    rounds: Annotated[
        int,
        tyro.conf.arg(
            help="ReFlow rounds: each after the first is trained on pairs that the flow before it makes, --steps more"
        ),
    ] = 1
    pairs: Annotated[int | None, tyro.conf.arg(help="of each later round, >= 2; default by preset")] = None
    steps: Annotated[int | None, tyro.conf.arg(help="training steps; default by preset")] = None
    batch: Annotated[int | None, tyro.conf.arg(help="images of a step, over all devices; default by preset")] = None
    channels: Annotated[int | None, tyro.conf.arg(help="channels of the U-Net; default by preset")] = None
    learning_rate: Annotated[float | None, tyro.conf.arg(help="peak; default by preset")] = None
    micro_batches: Annotated[int, tyro.conf.arg(help="parts of a batch that are differentiated in turn")] = 1
    precision: Annotated[
        Literal["float32", "bfloat16"], tyro.conf.arg(help="of the network's computation; params stay float32")
    ] = "float32"
    samples: Annotated[int | None, tyro.conf.arg(help="generated images, >= 2; default by preset")] = None
    euler: Annotated[tuple[int, ...], tyro.conf.arg(help="numbers of Euler steps; the first gives the results")] = (
        100,
        10,
    )
    tolerance: Annotated[float, tyro.conf.arg(help="of the adaptive solver, dopri5")] = 1e-3
    inception: Annotated[
        Path | None, tyro.conf.arg(help="Inception weights of torch-fidelity: distances are then FIDs")
    ] = None
    seed: Annotated[int, tyro.conf.arg(help="of every random number")] = 0
    log_every: Annotated[int | None, tyro.conf.arg(help="steps between two rows of metrics; default by preset")] = None
    save_every: Annotated[
        int | None, tyro.conf.arg(help="steps between two checkpoints, a multiple of --log-every; default by preset")
    ] = None
    out: Annotated[Path | None, tyro.conf.arg(help="new or empty folder; default runs/cifar10/<time>")] = None
    resume: Annotated[bool, tyro.conf.arg(help="go on with the run in --out, from its newest checkpoint")] = False
    distributed: Annotated[
        bool, tyro.conf.arg(help="several processes: join a cluster (Slurm, Open MPI, ...) or the --coordinator")
    ] = False
    coordinator: Annotated[str | None, tyro.conf.arg(help="host:port of process 0")] = None
    processes: Annotated[int | None, tyro.conf.arg(help="how many processes there are, with --coordinator")] = None
    process_id: Annotated[int | None, tyro.conf.arg(help="which of them this is, with --coordinator")] = None
    smoke: Annotated[bool, tyro.conf.arg(help="the same parts at toy size, to see that everything runs")] = False


def check(config: Config) -> None:
    """Refuses values outside their range, and joins the other processes if there are any.

    Raises:
        ValueError: naming the option, the rule and the value.
    """
    for name in ("steps", "batch", "channels", "micro_batches", "samples", "log_every", "save_every", "pairs"):
        if getattr(config, name) is not None:
            _validate.positive_integer(f"--{name.replace('_', '-')}", getattr(config, name))
    for name in ("samples", "pairs"):
        value = getattr(config, name)
        if value is not None and value < 2:
            raise ValueError(f"--{name} must be >= 2, got {value}")
    _validate.nonnegative("--sigma", config.sigma)
    _validate.finite("--sigma", config.sigma)
    _validate.positive("--tolerance", config.tolerance)
    if config.learning_rate is not None:
        _validate.positive("--learning-rate", config.learning_rate)
    if not config.euler or len(set(config.euler)) < len(config.euler):
        raise ValueError(f"--euler must hold at least one number and no number twice, got {config.euler}")
    for steps in config.euler:
        _validate.positive_integer("--euler", steps)
    if not 0 <= config.seed < 2**31:
        raise ValueError(f"--seed must be in [0, 2^31), got {config.seed}")
    _validate.positive_integer("--rounds", config.rounds)
    if config.rounds > 1 and config.distributed:
        raise ValueError(
            f"--rounds must be 1 with --distributed (later rounds run in one process), got {config.rounds}"
        )
    if config.rounds == 1 and config.pairs is not None:
        raise ValueError(f"--pairs must come with --rounds above 1, got {config.pairs} pairs and 1 round")
    if config.resume and config.out is None:
        raise ValueError("--out must name the run's folder where --resume is given, got none")
    if config.distributed:
        if config.out is None:
            raise ValueError("--out must be given with --distributed, so that all processes agree on it, got none")
        training.initialize_distributed(config.coordinator, config.processes, config.process_id)
    elif (config.coordinator, config.processes, config.process_id) != (None, None, None):
        raise ValueError("--coordinator, --processes and --process-id must come with --distributed, got none")


def settings_of(config: Config, preset: str, images: data.Images) -> Settings:
    """Preset, smoke sizes and command line put together, each over the one before it.

    Raises:
        SettingsError: if the parts do not fit each other.
    """
    values = dict(PAPER if preset == "paper" else CPU)
    if preset == "cpu" and images.train.shape[1] * images.train.shape[2] > LARGE:
        values |= CPU_LARGE
    if config.smoke:
        values |= SMOKE
    for name in ("steps", "batch", "learning_rate", "samples", "log_every", "save_every"):
        if getattr(config, name) is not None:
            values[name] = getattr(config, name)
    if config.channels is not None:
        values["network"] = {**values["network"], "channels": config.channels}
    if config.smoke and config.save_every is None:
        values["save_every"] = 2 * values["log_every"]
    if values["save_every"] % values["log_every"]:
        raise SettingsError(
            f"--save-every must be a multiple of --log-every = {values['log_every']}, got {values['save_every']}"
        )
    if values["batch"] % (jax.device_count() * config.micro_batches):
        raise SettingsError(
            f"--batch must be divisible by the {jax.device_count()} devices times --micro-batches ="
            f" {config.micro_batches}, got {values['batch']}"
        )
    return Settings(
        preset=preset,
        data=images.name,
        dims=images.train.shape[1:],
        images=len(images.train),
        flip=images.flip and config.coupling != "fixed",
        sigma=config.sigma,
        coupling=config.coupling,
        micro_batches=config.micro_batches,
        precision=config.precision,
        euler=tuple(min(n, 4) for n in config.euler[:1]) if config.smoke else config.euler,
        tolerance=config.tolerance,
        seed=config.seed,
        **values,
    )


def rounds_of(config: Config, settings: Settings) -> Rounds:
    """The rounds of ReFlow; they are no part of `Settings`, which are those of round 1."""
    pairs = PAIRS[settings.preset]
    if config.smoke or (settings.preset == "cpu" and settings.dims[0] * settings.dims[1] > LARGE):
        pairs = settings.samples
    return Rounds(config.rounds, pairs if config.pairs is None else config.pairs)


def main(config: Config, folder: RunFolder) -> None:
    """Trains, generates and compares, and writes everything into `folder`."""
    preset, images, notice = find_data(config.preset, config.data, config.data_dir)
    settings = settings_of(config, preset, images)
    try:
        features = data.features.inception(config.inception) if config.inception else data.features.pooled_pixels()
        model = settings.model()
    except (ValueError, ImportError) as error:
        raise SettingsError(f"{error}") from error
    say = print if jax.process_index() == 0 else _nothing
    say(f"cifar10: {notice}")
    say(f"data {images.name} ({images.source}), {len(images.train)} + {len(images.test)} images {settings.dims}")
    if not config.resume:
        folder.write_json(
            "config.json", {"config": asdict(config), "settings": asdict(settings), "environment": environment()}
        )
    state, rows = train(settings, model, images, folder=folder.path)
    if int(state.step) < settings.steps:
        say(f"stopped at step {int(state.step)} of {settings.steps}; go on with --out {folder.path} --resume")
        return
    finished: list[Finished] | None = []
    if config.rounds > 1:
        rounds = rounds_of(config, settings)
        finished = train_rounds(settings, rounds, model, state.ema_params, folder=folder.path, say=say)
        if finished is None:
            say(f"go on with --out {folder.path} --resume")
            return
    known = {split: evaluation.moments_of(features, getattr(images, split)) for split in ("train", "test")}
    results, drawn = _results(settings, model, state, images, features=features, known=known)
    results["training"] = rows
    title = f"U-Net on {images.name}, sigma = {settings.sigma:g}, {settings.coupling} pairs"
    if finished:
        every = [Finished(1, state.ema_params, None, rows), *finished]
        table_of_rounds, more = _rounds_results(
            config, settings, model, every, images=images, features=features, known=known
        )
        results["rounds"], drawn = table_of_rounds, drawn | more
        folder.write_figure("rounds", plots.reflow_rounds(table_of_rounds, title=title), _flat(table_of_rounds))
        for done in finished:
            if done.rows:
                figure = plots.image_training(done.rows, title=f"{title}, round {done.index}")
                folder.write_figure(f"training_round_{done.index}", figure, done.rows)
    folder.write_arrays("samples.npz", {name: samples[:KEPT] for name, samples in drawn.items()})
    for name, samples in drawn.items():
        caption = f"{images.name}: {settings.steps} steps, sigma = {settings.sigma:g}, {name.replace('_', ' ')}"
        folder.write_figure(f"samples_{name}", plots.image_grid(samples[:GRID], title=caption), None)
    folder.write_json("results.json", results)
    if rows:
        folder.write_figure("training", plots.image_training(rows, title=title), rows)
    if jax.process_index() == 0:
        folder.write_report(make_page(folder, results, asdict(config), notice))
    say(f"\n{images.name}: loss {results['loss']:.4f} (held out {results['loss_test']:.4f})")
    floor = results["distance_floor"]
    say(f"distances of {settings.samples} samples; features: {features.name}; between the splits: {floor:.4g}")
    columns = {"solver": "", "steps": "", "nfe": ".1f", "distance_train": ".4g", "distance_test": ".4g"}
    say(table(results["samples"], columns))
    if finished:
        say("")
        say(table(results["rounds"], ROUND_COLUMNS))


def _nothing(*_: Any) -> None:
    """What the processes but the first print."""


def _results(
    settings: Settings,
    model: Any,
    state: training.TrainState,
    images: data.Images,
    *,
    features: data.features.Features,
    known: Mapping[str, metrics.FeatureMoments],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Losses and samples of the averaged parameters of round 1, and the samples themselves."""
    key, field, params = jax.random.key(settings.seed), model.apply, state.ema_params
    loss_key, sample_key = (jax.random.fold_in(key, i) for i in (10, 11))
    losses = {
        name: evaluation.final_loss(settings, field, params, split, key=loss_key, held_out=name != "loss")
        for name, split in (("loss", images.train), ("loss_test", images.test))
    }
    rows, drawn = evaluation.compared(settings, field, params, known, features=features, key=sample_key)
    first: Mapping[str, Any] = rows[0]
    return {
        **losses,
        "distance_train": first["distance_train"],
        "distance_test": first["distance_test"],
        "distance_floor": metrics.frechet_distance(known["train"], known["test"]),
        "features": features.name,
        "nfe": first["nfe"],
        "steps": int(state.step),
        "data": settings.data,
        "preset": settings.preset,
        "parameters": int(sum(np.size(leaf) for leaf in jax.tree.leaves(params))),
        "settings": asdict(settings),
        "samples": rows,
    }, drawn


def _rounds_results(
    config: Config,
    settings: Settings,
    model: Any,
    every: Sequence[Finished],
    *,
    images: data.Images,
    features: data.features.Features,
    known: Mapping[str, metrics.FeatureMoments],
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The measures of all rounds, and the samples of the later ones by all solvers, from the same noise as round 1."""
    rows = round_rows(settings, model, every, images, known=known, features=features, smoke=config.smoke)
    sample_key = jax.random.fold_in(jax.random.key(settings.seed), 11)
    drawn: dict[str, np.ndarray] = {}
    for row, done in zip(rows, every, strict=True):
        row["steps"] = settings.steps
        row["pairs"] = None if done.pairs is None else len(done.pairs.x0)
        if done.pairs is None:
            continue  # the samples of round 1 are the results themselves
        row["samples"], samples = evaluation.compared(
            settings, model.apply, done.params, known, features=features, key=sample_key
        )
        row["training"] = done.rows
        drawn |= {f"round_{done.index}_{name}": part for name, part in samples.items()}
    return rows, drawn


def _flat(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The numbers that the figure shows: one row a round and number of Euler steps."""
    plain = [{key: value for key, value in row.items() if not isinstance(value, list)} for row in rows]
    return [
        shown | {f"euler_{key}": value for key, value in few.items()}
        for row, shown in zip(rows, plain, strict=True)
        for few in row["euler"]
    ]
