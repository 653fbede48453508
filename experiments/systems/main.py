"""Configuration and order of the comparison; see `python -m experiments.systems --help`."""

import functools
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import tyro

from experiments.common import Cells, RunFolder, SettingsError, Stopped, keep_config
from experiments.systems import measures, methods, problems, report
from experiments.systems.methods import Cell, SystemName
from experiments.systems.problems import BRIDGE_SIGMAS, Name, Problem
from experiments.systems.training import TABLE, Settings, Trainer
from fvjax import _validate, bridges, gaussian
from fvjax.types import Array

NEEDED = "--data must name the folder of Mix3ToMix10's files, as in experiments.w2_benchmark,"


@dataclass(frozen=True)
class Config:
    """CFM, OT-CFM, Rectified Flow, SB-CFM and DSBM on the same pairs, with the same measures.

    Every problem has fixed training pairs at random: who memorizes them, who finds the transport, how straight, at
    which price? Under 10 minutes on 2 CPU cores. Expected: on the Gaussian test DSBM's Cov(X0, X1) near 0.618; on
    digits CFM and ReFlow without noise return more than 9 of 10 sources to their wrong target, minibatch OT almost
    none. Writes config.json, results.json, rows.csv, rounds.csv, cells/, networks/, figures/ and report.html.
    """

    problems: Annotated[
        tuple[Name, ...],
        tyro.conf.arg(help="default: gaussian, mixture, digits, and mix3tomix10 (d = 16) where --data is given"),
    ] = ()
    systems: Annotated[
        tuple[SystemName, ...],
        tyro.conf.arg(help="reflow: cfm, reflow_1, reflow_2; reflow_noise: with --noise; sde_reflow: see Remark 2"),
    ] = methods.SYSTEMS
    noise: Annotated[float, tyro.conf.arg(help="sigma > 0 of reflow_noise, constant in time")] = 0.05
    bridge_sigma: Annotated[
        tuple[float, ...],
        tyro.conf.arg(help="noise > 0 of the bridges; default 1, on digits 0.5 and 2, on mix3tomix10 2"),
    ] = ()
    gaussian_dims: Annotated[
        tuple[int, ...], tyro.conf.arg(help="of the Gaussian test; the first with all systems, the others with dsbm")
    ] = (5, 20, 50)
    pairs: Annotated[
        int | None, tyro.conf.arg(help="training pairs; default 10,000 gaussian, 100 digits, 1000 others")
    ] = None
    rounds: Annotated[int, tyro.conf.arg(help="of DSBM, both directions counted; even")] = 6
    rectifications: Annotated[int, tyro.conf.arg(help="of ReFlow")] = 2
    path_steps: Annotated[int, tyro.conf.arg(help="Euler-Maruyama steps of a diffusion")] = 50
    steps: Annotated[
        int | None,
        tyro.conf.arg(help="training steps of each network; default 1500 gaussian, 3000 mixture, 4000 others"),
    ] = None
    bridge_steps: Annotated[int, tyro.conf.arg(help="training steps of each round of DSBM")] = 1000
    width: Annotated[int, tyro.conf.arg(help="units of each hidden layer")] = 256
    depth: Annotated[int, tyro.conf.arg(help="residual blocks")] = 2
    held_out: Annotated[int, tyro.conf.arg(help="held-out sources; digits have 180")] = 2000
    data: Annotated[Path | None, tyro.conf.arg(help="folder of Mix3ToMix10's files")] = None
    seed: Annotated[int, tyro.conf.arg(help="of every random number")] = 0
    out: Annotated[Path | None, tyro.conf.arg(help="new or empty folder; default runs/systems/<time>")] = None
    resume: Annotated[bool, tyro.conf.arg(help="go on with the run in --out, also in the middle of a round")] = False
    smoke: Annotated[bool, tyro.conf.arg(help="the same parts at toy size, to see that everything runs")] = False


def check(config: Config) -> None:
    """Refuses values outside their range.

    Raises:
        ValueError: naming the option, the rule and the value.
    """
    numbers = ("pairs", "rounds", "rectifications", "path_steps", "steps", "bridge_steps", "width", "depth", "held_out")
    for name in numbers:
        if getattr(config, name) is not None:
            _validate.positive_integer(f"--{name.replace('_', '-')}", getattr(config, name))
    if config.rounds % 2:
        raise ValueError(f"--rounds must be even, a backward and a forward one each time, got {config.rounds}")
    for name in ("pairs", "held_out"):
        value = getattr(config, name)
        if value is not None and not 4 <= value <= TABLE:
            raise ValueError(f"--{name.replace('_', '-')} must be in [4, {TABLE}], got {value}")
    for name, values in (("noise", (config.noise,)), ("bridge-sigma", config.bridge_sigma)):
        for value in values:
            _validate.positive(f"--{name}", value)
    for name in ("problems", "systems", "bridge_sigma", "gaussian_dims"):
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise ValueError(f"--{name.replace('_', '-')} must be distinct, got {values}")
    for name in ("systems", "gaussian_dims"):
        if not getattr(config, name):
            raise ValueError(f"--{name.replace('_', '-')} must hold at least one value, got none")
    for dim in config.gaussian_dims:
        if not 1 <= dim <= 1000:
            raise ValueError(f"--gaussian-dims must be in [1, 1000], got {dim}")
    if "mix3tomix10" in config.problems and config.data is None:
        raise ValueError(f"{NEEDED} where --problems has mix3tomix10, got none")
    if config.data is not None and not config.data.is_dir():
        raise ValueError(f"{NEEDED} got {config.data}")
    if not 0 <= config.seed < 2**31:
        raise ValueError(f"--seed must be in [0, 2^31), got {config.seed}")
    if config.resume and config.out is None:
        raise ValueError("--out must name the run's folder where --resume is given, got none")


def _at_toy_size(config: Config) -> Config:
    smaller = {"width": 16, "depth": 1, "bridge_steps": 16, "held_out": 32, "rounds": 2, "path_steps": 4}
    sizes = {name: min(getattr(config, name), size) for name, size in smaller.items()}
    sizes |= {name: min(getattr(config, name) or size, size) for name, size in (("pairs", 32), ("steps", 16))}
    sizes["rectifications"] = 1
    return replace(config, **sizes, gaussian_dims=config.gaussian_dims[:1])


def _settings(config: Config, kind: Name) -> Settings:
    return Settings(
        config.width,
        config.depth,
        problems.STEPS[kind] if config.steps is None else config.steps,
        config.bridge_steps,
        batch=32 if config.smoke else 128,
        rounds=config.rounds,
        rectifications=config.rectifications,
        path_steps=config.path_steps,
        probes=64 if config.smoke else 1024,
        measured=32 if config.smoke else 1000,
        coupling_batch=16 if config.smoke else 256,
        table=128 if config.smoke else TABLE,
        seed=config.seed,
        smoke=config.smoke,
    )


def main(config: Config, folder: RunFolder) -> dict[str, Any] | None:
    """Trains and measures every system on every problem; returns the results, None if it was stopped.

    Raises:
        SettingsError: if the options do not fit the data, or the run that is resumed.
        DataError: if the data cannot be read.
    """
    config = _at_toy_size(config) if config.smoke else config
    wanted = {key: value for key, value in asdict(config).items() if key not in {"out", "resume"}}
    keep_config(wanted, folder, resume=config.resume)
    results, bases = Cells(folder), []
    try:
        for problem, systems in _problems(config):
            print(f"{problem.name}: {len(problem.pairs.x0)} pairs, d = {problem.dim}")
            bases.append({"problem": problem.name} | measures.baseline_row(problem))
            _run_problem(config, problem, systems, folder=folder, results=results)
    except Stopped as stopped:
        print(f"stopped: {stopped}; go on with --out {folder.path} --resume")
        return None
    content = {
        "settings": wanted
        | {"solver": measures.solver_options(smoke=config.smoke)["solver"], "batch": _settings(config, "digits").batch},
        "rows": results.rows,
        "baselines": bases,
        "rounds": results.training,
        "recursion": exact_rounds(_bridge_sigmas(config, "gaussian"), config.rounds),
        "conclusions": report.conclusions(results.rows),
    }
    report.write(folder, content)
    return content


def _problems(config: Config) -> list[tuple[Problem, tuple[SystemName, ...]]]:
    """Every problem, and the systems that run on it."""
    kinds = config.problems or tuple(name for name in problems.NAMES if name != "mix3tomix10" or config.data)
    made = functools.partial(
        problems.make_problem, pairs=config.pairs, held_out=config.held_out, data_dir=config.data, seed=config.seed
    )
    found = []
    for kind in kinds:
        try:
            if kind != "gaussian":
                found.append((made(kind, dim=None), config.systems))
                continue
            for k, dim in enumerate(config.gaussian_dims):
                some = tuple(name for name in config.systems if name.startswith("dsbm") or k == 0)
                found.append((made(kind, dim=dim), some))
        except ValueError as error:
            raise SettingsError(f"--pairs must fit the data of {kind}: {error}") from error
    return found


def _bridge_sigmas(config: Config, kind: str) -> tuple[float, ...]:
    return config.bridge_sigma or BRIDGE_SIGMAS[kind]


def _run_problem(
    config: Config,
    problem: Problem,
    systems: tuple[SystemName, ...],
    *,
    folder: RunFolder,
    results: Cells,
) -> None:
    trainer = Trainer(problem, _settings(config, problem.kind), folder.path)
    kernel = measures.kernel_of(problem)
    for system in systems:
        sigmas: tuple[float, ...] = (0.0,)
        if system == "reflow_noise":
            sigmas = (config.noise,)
        elif system in methods.WITH_BRIDGE:
            sigmas = _bridge_sigmas(config, problem.kind)
        for sigma in sigmas:
            cell = Cell(trainer, kernel, system, sigma)
            results.add(f"{problem.name}_{cell.name}", functools.partial(methods.run, cell))


def exact_rounds(sigmas: tuple[float, ...], rounds: int) -> list[dict[str, float]]:
    """Cov(x0, x1) per coordinate of the Gaussian test after each exact round, and of the Schroedinger bridge."""
    mean, cov, source = jnp.asarray([problems.OFFSET]), jnp.eye(1), jnp.asarray([-problems.OFFSET])
    rows = []
    for sigma in sigmas:
        optimal = bridges.schroedinger_coupling(mean, cov, sigma, source_mean=source)
        coupling = gaussian.independent_coupling(mean, cov, source_mean=source)
        for index in range(rounds + 1):
            found = {"sigma": sigma, "round": index, "covariance": _cross(coupling), "bridge": _cross(optimal)}
            rows.append(found)
            coupling = bridges.markov_coupling(coupling, sigma)
    return rows


def _cross(coupling: gaussian.GaussianCoupling) -> float:
    product: Array = coupling.factor1 @ coupling.factor0.T
    return float(product[0, 0])
