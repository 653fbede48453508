"""Configuration and order of the experiment on pairs of images; see `python -m experiments.celeba --help`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from experiments import plots
from experiments.celeba import cells, kept, sweep
from experiments.celeba.cells import Cell
from experiments.celeba.page import make_page
from experiments.celeba.problem import Problem, Source, baselines, counts, draw, find_source
from experiments.celeba.settings import Settings, log_and_save, preset_of
from experiments.celeba.training import Trainer
from experiments.common import RunFolder, SettingsError, Stopped, table
from fvjax import _validate, data
from fvjax.data import ot_benchmark
from fvjax.report import environment
from fvjax.types import Pair, Params

VERIFIED = 2000
"""Up to so many pairs are checked to be optimally coupled."""

Sigmas = Annotated[tuple[float, ...], tyro.conf.arg(help="noise scales >= 0 of the interpolant, one or several")]
Sizes = Annotated[
    tuple[int, ...], tyro.conf.arg(help="numbers of pairs: the critical noise of each, networks over a grid of sigmas")
]


@dataclass(frozen=True)
class Config:
    """Flows trained on shuffled pairs of images whose optimal transport is known (Tables 2 and 3).

    CelebA where tensorflow-datasets has prepared it, otherwise scikit-learn's 8x8 digits (under 6 minutes on 2 CPU
    cores). Expected on digits: sigma 0 returns its shuffled pairs (L2 below 1), sigma 1 is closer to the optimal
    transport. Writes config.json, results.json, tables as CSV, cells/ (checkpoints, metrics), flows/ (for `fvjax
    audit`), figures/ and report.html into the run folder.
    """

    sigma: Sigmas = (0.0, 0.05, 0.5, 1.0)
    interpolant: Annotated[
        Literal["constant", "bridge"], tyro.conf.arg(help="noise sigma, or that of a Brownian bridge")
    ] = "constant"
    coupling: Annotated[
        Literal["shuffled", "ot", "independent"],
        tyro.conf.arg(help="the optimal pairs deranged, as they are, or coupled anew at random in each batch"),
    ] = "shuffled"
    pairs: Annotated[int | None, tyro.conf.arg(help="training pairs; default 5000 with a GPU, else 200")] = None
    data: Annotated[
        str, tyro.conf.arg(help="auto, celeba, digits, cifar10, a folder of images, or an .npy or .npz array")
    ] = "auto"
    data_dir: Annotated[Path | None, tyro.conf.arg(help="where tensorflow-datasets keeps its data")] = None
    size: Annotated[int | None, tyro.conf.arg(help="side of the square images, of celeba (64) and folders")] = None
    ot_source: Annotated[
        str,
        tyro.conf.arg(
            help="convex: exact pairs by a convex map; or a folder with Final_G.pt and {Early,Mid,Late}_v*.pt"
        ),
    ] = "convex"
    ot_which: Annotated[Literal["Early", "Mid", "Late"], tyro.conf.arg(help="checkpoint of that folder")] = "Early"
    ot_amount: Annotated[float, tyro.conf.arg(help="how far the convex map moves the images, in [0, 1]")] = 1.0
    ot_sharpness: Annotated[float, tyro.conf.arg(help="how early it saturates them, 0.001 to 100")] = 1.5
    net: Annotated[
        Literal["auto", "unet", "mlp", "transformer"], tyro.conf.arg(help="auto: mlp for small images, else unet")
    ] = "auto"
    reflow: Annotated[
        bool, tyro.conf.arg(help="Table 3 too: independent pairs, pairs generated from the sources, training on them")
    ] = False
    sizes: Sizes = ()
    steps: Annotated[int | None, tyro.conf.arg(help="training steps of each network; default by images")] = None
    batch: Annotated[int | None, tyro.conf.arg(help="pairs of a step; default by images")] = None
    solver: Annotated[
        Literal["euler", "heun", "midpoint", "tsit5", "dopri5"], tyro.conf.arg(help="of the main results")
    ] = "euler"
    solver_steps: Annotated[
        int | None, tyro.conf.arg(help="its steps; default 100 (euler), 50 (heun, midpoint), adaptive (tsit5, dopri5)")
    ] = None
    start: Annotated[
        Literal["source", "noisy"],
        tyro.conf.arg(help="where flows start: at x0, or at x0 + gamma z as in training"),
    ] = "source"
    seed: Annotated[int, tyro.conf.arg(help="of every random number")] = 0
    out: Annotated[Path | None, tyro.conf.arg(help="new or empty folder; default runs/celeba/<time>")] = None
    resume: Annotated[bool, tyro.conf.arg(help="go on with the run in --out, from its newest checkpoint")] = False
    smoke: Annotated[bool, tyro.conf.arg(help="the same parts at toy size, to see that everything runs")] = False


def check(config: Config) -> None:
    """Refuses values outside their range.

    Raises:
        ValueError: naming the option, the rule and the value.
    """
    for name in ("pairs", "size", "steps", "batch", "solver_steps"):
        if getattr(config, name) is not None:
            _validate.positive_integer(f"--{name.replace('_', '-')}", getattr(config, name))
    for size in (*config.sizes, *(() if config.pairs is None else (config.pairs,))):
        if size < 2:
            raise ValueError(f"--pairs and --sizes must be >= 2, got {size}")
    if not config.sigma:
        raise ValueError("--sigma must hold at least one number, got none")
    for name in ("sigma", "sizes"):
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} must be distinct, got {values}")
    for sigma in config.sigma:
        _validate.nonnegative("--sigma", sigma)
    for name, value, low, high in (
        ("amount", config.ot_amount, 0.0, 1.0),
        ("sharpness", config.ot_sharpness, 1e-3, 100.0),
    ):
        if not low <= value <= high:
            raise ValueError(f"--ot-{name} must be from {low:g} to {high:g}, got {value}")
    if config.sizes and config.coupling != "shuffled":
        raise ValueError(f"--coupling must be shuffled with --sizes, got {config.coupling}")
    if not 0 <= config.seed < 2**31:
        raise ValueError(f"--seed must be in [0, 2^31), got {config.seed}")
    if config.resume and config.out is None:
        raise ValueError("--out must name the run's folder where --resume is given, got none")


def settings_of(config: Config, source: Source) -> Settings:
    """Preset, smoke sizes and command line put together, each over the one before it.

    Raises:
        SettingsError: if they do not fit the data.
    """
    values = preset_of(source.dims, None if config.net == "auto" else config.net, smoke=config.smoke)
    given = {name: getattr(config, name) for name in ("pairs", "steps", "batch")}
    values |= {name: value for name, value in given.items() if value is not None}
    wanted = max((values["pairs"], *config.sizes))
    counts(source, wanted, values["held_out"], asked=config.pairs is not None or bool(config.sizes))
    pairs, held_out = counts(source, values["pairs"], values["held_out"], asked=config.pairs is not None)
    log_every, save_every = log_and_save(values["steps"])
    fixed = {"euler": 100, "heun": 50, "midpoint": 50}
    solver_steps = fixed.get(config.solver) if config.solver_steps is None else config.solver_steps
    if config.smoke:
        solver_steps = min(solver_steps or 4, 4)
    settings = Settings(
        data=source.data,
        ot_source=source.ot_source,
        dims=source.dims,
        interpolant=config.interpolant,
        coupling=config.coupling,
        log_every=log_every,
        save_every=save_every,
        solver=config.solver,
        solver_steps=solver_steps,
        start=config.start,
        seed=config.seed,
        **values | {"pairs": pairs, "held_out": held_out},
    )
    try:
        settings.model()
    except ValueError as error:
        raise SettingsError(f"--net {settings.network} does not fit the images of {source.data}: {error}") from error
    return settings


def main(config: Config, folder: RunFolder) -> None:
    """Trains and measures every network, and writes everything into `folder`."""
    source = find_source(
        config.data,
        data_dir=config.data_dir,
        size=config.size,
        ot_source=config.ot_source,
        which=config.ot_which,
        amount=config.ot_amount,
        sharpness=config.ot_sharpness,
    )
    settings = settings_of(config, source)
    print(f"celeba: {source.notice}")
    print(
        f"data {source.data}, {settings.pairs} + {settings.held_out} pairs {settings.dims}, OT from {source.ot_source};"
        f" {settings.network}, {settings.steps} steps of {settings.batch}"
    )
    record = {"config": asdict(config), "settings": asdict(settings), "environment": environment()}
    if not config.resume:
        folder.write_json("config.json", record)
    key = jax.random.fold_in(jax.random.key(settings.seed), 7)
    problem = draw(key, source, settings.coupling, pairs=settings.pairs, held_out=settings.held_out)
    try:
        done, flows = _all_cells(config, settings, problem, folder)
        swept = sweep.run(settings, source, config.sizes, key=key, folder=folder, smoke=config.smoke)
    except Stopped as stopped:
        print(f"stopped: {stopped}; go on with --out {folder.path} --resume")
        return
    results = _results(settings, problem, done, swept=swept)
    folder.write_json("config.json", record)  # a resumed run may have further sigmas and sizes
    folder.write_json("results.json", results)
    for name in ("rows", "solvers", "rounds", "minimiser", "baselines"):
        if results[name]:
            folder.write_csv(f"{name}.csv", results[name])
    _figures(settings, problem, done, results, folder=folder)
    folder.write_report(make_page(folder, results, notice=source.notice, flows=flows, smoke=config.smoke))
    _report(settings, results)


def _all_cells(
    config: Config, settings: Settings, problem: Problem, folder: RunFolder
) -> tuple[list[Cell], list[dict[str, Any]]]:
    """Table 2's networks, and with --reflow those of Table 3: independent pairs, then pairs that they generate.

    And where each of them is kept.
    """
    trainer = Trainer(settings)
    common: dict[str, Any] = {"folder": folder, "smoke": config.smoke}
    done: list[Cell] = []
    flows: list[dict[str, Any]] = []

    def add(cell: Cell, trained: Pair, before: Params = None) -> None:
        done.append(cell)
        flows.append(kept.keep(trainer, problem, cell, trained, folder=folder, before=before))

    for sigma in config.sigma:
        cell = cells.run_cell(
            trainer, problem, settings.coupling, sigma, trained=problem.trained, mixed=problem.mixed, **common
        )
        add(cell, problem.trained)
        if not config.reflow:
            continue
        if settings.coupling != "independent":
            cell = cells.run_cell(trainer, problem, "independent", sigma, trained=problem.optimal, mixed=True, **common)
            add(cell, problem.optimal)
        pairs = cells.generated(trainer, cell, problem.optimal.x0, folder=folder)
        second = cells.run_cell(trainer, problem, "reflow", sigma, trained=pairs, first=cell.params, **common)
        add(second, pairs, cell.params)
    return done, flows


def _results(settings: Settings, problem: Problem, done: list[Cell], *, swept: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that results.json holds."""
    sigmas = dict.fromkeys(cell.sigma for cell in done)
    minimiser = [row for sigma in sigmas for row in cells.minimiser_rows(settings, problem, sigma)]
    critical: dict[str, Any] = {"sigma_c_predicted": None, "sigma_c_measured": None}
    if settings.coupling == "shuffled":
        critical = sweep.critical(settings, problem.trained, [cell for cell in done if cell.stage == "shuffled"])
    verified = None
    if settings.pairs <= VERIFIED:
        verified = ot_benchmark.verify_optimal(problem.optimal)._asdict()
    return {
        "data": settings.data,
        "ot_source": settings.ot_source,
        "rows": [row for cell in done for row in cell.rows],
        "baselines": [{"data": settings.data} | row for row in baselines(problem)],
        "minimiser": minimiser,
        **critical,
        "solvers": [row for cell in done for row in cell.solvers],
        "rounds": [row for cell in done for row in cell.rounds],
        "training": [row for cell in done for row in cell.training],
        "sweep": swept,
        "optimality": verified,
        "settings": asdict(settings),
    }


def _figures(
    settings: Settings, problem: Problem, done: list[Cell], results: Mapping[str, Any], *, folder: RunFolder
) -> None:
    title = f"{settings.data}, {settings.pairs} pairs, {settings.network}, {settings.steps} steps"
    solver = f"{settings.solver} {settings.solver_steps or 'adaptive'}"
    for stage in dict.fromkeys(cell.stage for cell in done):
        chosen = [cell for cell in done if cell.stage == stage]
        for split, pairs in (("train", problem.optimal), ("held_out", problem.held_out)):
            strips: dict[str, Any] = {"source": pairs.x0, "OT": pairs.x1}
            if split == "train" and stage == "shuffled":
                strips["shuffled"] = problem.trained.x1
            strips |= {f"$\\sigma$ = {cell.sigma:g}": cell.images[split] for cell in chosen}
            strips = {name: data.to_uint8(np.asarray(x[: cells.SHOWN])) for name, x in strips.items()}
            label = "training sources" if split == "train" else "held-out sources"
            figure = plots.image_rows(strips, title=f"{title}; {stage} pairs, {label}, {solver}")
            folder.write_figure(f"images_{stage}_{split}", figure, None)
        training = [row for cell in chosen for row in cell.training]
        figure = plots.pair_training(training, title=f"{title}; {stage} pairs")
        folder.write_figure(f"training_{stage}", figure, training)
    if settings.coupling == "shuffled":
        rows = [row for row in results["rows"] if row["stage"] == "shuffled"]
        critical = {"predicted": results["sigma_c_predicted"], "measured": results["sigma_c_measured"]}
        figure = plots.sigma_curve(rows, results["minimiser"], critical, title=f"{title}; {solver}")
        folder.write_figure("sigma", figure, [*rows, *results["minimiser"]])
    if results["sweep"]:
        figure = plots.critical_sigma(results["sweep"], title=f"{settings.data}, {settings.network}; {solver}")
        folder.write_figure("sigma_critical", figure, results["sweep"]["critical"])
        folder.write_csv("sweep.csv", results["sweep"]["rows"])


def _report(settings: Settings, results: Mapping[str, Any]) -> None:
    """The closing tables on the terminal."""
    data_name = settings.data
    columns = {"stage": "", "sigma": "g", "split": "", "target": "", "l2_mean": ".3f", "l2_std": ".3f", "n": ""}
    columns |= {"recovered": ".3f", "loss": ".4g"}
    solver = f"{settings.solver} {settings.solver_steps or 'adaptive'}"
    print(f"\n{data_name}: mean L2 over images, {solver}, {settings.steps} training steps")
    print(table(results["rows"], columns))
    print(f"\n{data_name}: baselines")
    columns = {"baseline": "", "split": "", "target": "", "l2_mean": ".3f", "l2_std": ".3f", "n": ""}
    print(table(results["baselines"], columns))
    if results["minimiser"]:
        print(f"\n{data_name}: the exact minimiser of the fixed pairs, {solver}")
        columns = {"sigma": "g", "split": "", "target": "", "l2_mean": ".3f", "l2_std": ".3f", "recovered": ".3f"}
        print(table(results["minimiser"], columns))
    print(f"\n{data_name}: solvers, training sources")
    columns = {"stage": "", "sigma": "g", "solver": "", "steps": "", "target": "", "l2_mean": ".3f", "n": ""}
    print(table(results["solvers"], columns))
    if results["rounds"]:
        print(f"\n{data_name}: rounds of ReFlow, training sources; errors of few Euler steps against dopri5")
        columns = {"stage": "", "sigma": "g", "straightness": ".3f", "euler_1": ".3f", "euler_4": ".3f"}
        print(table(results["rounds"], columns | {"euler_16": ".3f", "memorized": ".3f", "n": ""}))
    if results["sigma_c_predicted"] is not None:
        measured = results["sigma_c_measured"]
        found = measured["networks"]
        networks = (
            "not between the given ones" if found is None else f"about {found:.2g}, between two of the given ones"
        )
        print(
            f"\ncritical sigma: predicted {results['sigma_c_predicted']:.3g}, exact minimiser"
            f" {measured['minimiser']:.3g}, networks {networks}"
        )
    if results["sweep"]:
        columns = dict.fromkeys(("predicted", "low", "high", "minimiser", "networks"), ".3g")
        print(table(results["sweep"]["critical"], {"pairs": ""} | columns | {"train_steps": ""}))
    print()
