"""Configuration and order of the Wasserstein-2 benchmark; see `python -m experiments.w2_benchmark --help`."""

import functools
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import tyro

from experiments.common import Cells, RunFolder, SettingsError, keep_config, progress
from experiments.w2_benchmark import cells, references, report
from experiments.w2_benchmark.cells import Prepared, Row, Settings
from fvjax import _validate
from fvjax.data import DataError
from fvjax.data.ot_benchmark import mix3tomix10

FILES = re.compile(r"mix3tomix10_d(\d+)\.npz|(\d+)_v1\.pt")
WHAT_IS_NEEDED = (
    "--data must name the folder of the benchmark's files, N_v1.pt and N_v2.pt (benchmarks/Mix3toMix10 of"
    " github.com/iamalexkorotin/Wasserstein2Benchmark, not part of fvjax) or mix3tomix10_dN.npz"
)


@dataclass(frozen=True)
class Config:
    """Flows on Mix3ToMix10, pairs whose optimal transport is known (Korotin et al. 2021): does the coupling matter?

    Trains one network for each dimension, coupling and sigma, and reports L2-UVP and cosine on held-out sources as that
    benchmark does, and the distance to the optimal and to the training target on training sources. d = 2, 16, 64 take
    10 minutes of CPU time. Expected where sigma = 0: L2-UVP below 20% with OT pairs, and above 100% with shuffled pairs
    of d >= 16. Writes config.json, results.json, rows.csv, cells/, figures/ and report.html.
    """

    data: Annotated[
        Path | None, tyro.conf.arg(help="folder of the benchmark's N_v1.pt and N_v2.pt, or of mix3tomix10_dN.npz")
    ] = None
    dims: Annotated[tuple[int, ...], tyro.conf.arg(help="dimensions; default: those in --data up to 128")] = ()
    couplings: Annotated[
        tuple[Literal["ot", "minibatch_ot", "ot_finite", "shuffled", "independent"], ...],
        tyro.conf.arg(
            help="ot, independent: from 65,536 samples; minibatch_ot: these in batches of 256, each solved exactly;"
            " ot_finite, shuffled: --pairs optimal pairs, as they are or deranged once"
        ),
    ] = ("ot", "shuffled", "independent")
    sigmas: Annotated[tuple[float, ...], tyro.conf.arg(help="noise scales >= 0 of the constant-noise interpolant")] = (
        0.0,
        0.05,
        0.5,
    )
    pairs: Annotated[int, tyro.conf.arg(help="pairs of a finite set, and training sources that are evaluated")] = 1000
    steps: Annotated[int, tyro.conf.arg(help="training steps of each network")] = 4000
    width: Annotated[int, tyro.conf.arg(help="units of each hidden layer")] = 256
    depth: Annotated[int, tyro.conf.arg(help="residual blocks")] = 3
    held_out: Annotated[int, tyro.conf.arg(help="held-out sources; 4096 as in the benchmark")] = 4096
    solver: Annotated[Literal["euler", "heun", "midpoint", "tsit5", "dopri5"], tyro.conf.arg(help="of the flows")] = (
        "euler"
    )
    solver_steps: Annotated[
        int | None, tyro.conf.arg(help="fixed steps; default 100 for euler, and a tolerance of 1e-5 for the others")
    ] = None
    published: Annotated[
        Path | None,
        tyro.conf.arg(help="CSV with solver,dim,l2_uvp,cosine: values of other solvers, for the figure and the table"),
    ] = None
    seed: Annotated[int, tyro.conf.arg(help="of every random number")] = 0
    out: Annotated[Path | None, tyro.conf.arg(help="new or empty folder; default runs/w2_benchmark/<time>")] = None
    resume: Annotated[bool, tyro.conf.arg(help="go on with the run in --out: cells that it finished are read")] = False
    smoke: Annotated[bool, tyro.conf.arg(help="the same parts at toy size, to see that everything runs")] = False


def check(config: Config) -> None:
    """Refuses values outside their range, and a missing folder of data.

    Raises:
        ValueError: naming the option, the rule and the value.
    """
    if config.data is None or not config.data.is_dir():
        raise ValueError(f"{WHAT_IS_NEEDED}, got {config.data or 'none'}")
    for name in ("pairs", "steps", "width", "depth", "held_out"):
        _validate.positive_integer(f"--{name.replace('_', '-')}", getattr(config, name))
    if config.solver_steps is not None:
        _validate.positive_integer("--solver-steps", config.solver_steps)
    for name in ("pairs", "held_out"):
        if not 2 <= getattr(config, name) <= cells.POOL:
            raise ValueError(f"--{name.replace('_', '-')} must be in [2, {cells.POOL}], got {getattr(config, name)}")
    if not 0 <= config.seed < 2**31:
        raise ValueError(f"--seed must be in [0, 2^31), got {config.seed}")
    for name in ("dims", "couplings", "sigmas"):
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} must be distinct, got {values}")
    for name in ("couplings", "sigmas"):
        if not getattr(config, name):
            raise ValueError(f"--{name} must hold at least one value, got none")
    for dim in config.dims:
        if not 2 <= dim <= 256:
            raise ValueError(f"--dims must be in [2, 256], got {dim}")
    for sigma in config.sigmas:
        _validate.nonnegative("--sigmas", sigma)
    if config.resume and config.out is None:
        raise ValueError("--out must name the run's folder where --resume is given, got none")


def _at_toy_size(config: Config) -> Config:
    sizes = {name: min(getattr(config, name), 32) for name in ("pairs", "width", "held_out", "steps")}
    sigmas = tuple(dict.fromkeys((config.sigmas[0], config.sigmas[-1])))
    steps = min(config.solver_steps or 4, 4) if config.solver in {"euler", "heun", "midpoint"} else config.solver_steps
    return replace(config, **sizes, sigmas=sigmas, depth=1, solver_steps=steps)


def _settings(config: Config) -> Settings:
    steps = 100 if config.solver == "euler" and config.solver_steps is None else config.solver_steps
    return Settings(
        config.width,
        config.depth,
        config.steps,
        config.pairs,
        pool=2 * cells.BATCH if config.smoke else cells.POOL,
        held_out=config.held_out,
        solver=config.solver,
        solver_steps=steps,
    )


def find_dims(folder: Path) -> tuple[int, ...]:
    """The dimensions, up to 128, whose files lie in a folder.

    Raises:
        DataError: if there are none.
    """
    found = {int(match[1] or match[2]) for path in folder.iterdir() if (match := FILES.fullmatch(path.name))}
    dims = tuple(sorted(dim for dim in found if 2 <= dim <= 128))
    if not dims:
        raise DataError(f"{WHAT_IS_NEEDED}, got {folder}, which holds none of them")
    return dims


def main(config: Config, folder: RunFolder) -> dict[str, Any]:
    """Trains and evaluates every cell, writes everything into `folder` and returns the results."""
    config = _at_toy_size(config) if config.smoke else config
    if config.data is None:
        raise SettingsError(f"{WHAT_IS_NEEDED}, got none")
    dims = config.dims or find_dims(config.data)
    published = references.read_published(config.published) if config.published else []
    optimal = [mix3tomix10(config.data, dim) for dim in dims]
    settings = _settings(config)
    wanted = {key: value for key, value in asdict(config).items() if key not in {"out", "resume", "published"}}
    keep_config(wanted | {"dims": dims}, folder, resume=config.resume)
    names = ", ".join(pairs.name for pairs in optimal)
    print(f"w2_benchmark: {names}; couplings {', '.join(config.couplings)}; seed {config.seed}")

    @functools.lru_cache(maxsize=1)  # one dimension at a time, and none whose cells are all there
    def prepared(place: int) -> Prepared:
        key = jax.random.fold_in(jax.random.key(config.seed), dims[place])
        return cells.prepare(optimal[place], config.couplings, settings, key)

    results, jobs = Cells(folder), _jobs(config, len(dims))
    for job in progress(jobs, "cells", len(jobs)):
        name = "_".join(str(part) for part in (optimal[job.place].name, *job[1:]) if part is not None)
        results.add(name, functools.partial(_run, job, prepared, settings))
    content = _content(config, settings, optimal, results) | {"published": published}
    report.write(folder, content)
    return content


class Job(NamedTuple):
    """One entry of cells/: the dimension by its place in the list, and which map; networks and minimisers have more."""

    place: int
    map: str
    coupling: str | None = None
    sigma: float | None = None


def _jobs(config: Config, dims: int) -> list[Job]:
    jobs = []
    for place in range(dims):
        cell = [Job(place, "network", coupling, sigma) for coupling in config.couplings for sigma in config.sigmas]
        exact = [job._replace(map="minimiser") for job in cell if job.coupling in cells.FINITE]
        jobs += [Job(place, "baselines"), *exact, *cell]
    return jobs


def _run(job: Job, prepared: Callable[[int], Prepared], settings: Settings) -> tuple[list[Row], list[Row]]:
    """The rows and the losses of one job."""
    samples = prepared(job.place)
    if job.coupling is None or job.sigma is None:
        return references.baseline_rows(samples), []
    if job.map == "minimiser":
        return references.minimiser_rows(samples, job.coupling, job.sigma, settings), []
    return cells.run_cell(samples, job.coupling, job.sigma, settings)


def _content(config: Config, settings: Settings, optimal: list[Any], results: Cells) -> dict[str, Any]:
    data = [
        {"name": p.name, "dim": p.dims[0], "cost": p.cost, "target_variance": p.target_variance, "source": p.source}
        for p in optimal
    ]
    numbers = {"batch": cells.BATCH, "seed": config.seed, "smoke": config.smoke, "tolerance": settings.tolerance}
    return {
        "data": data,
        "settings": settings._asdict() | numbers,
        "rows": [row for row in results.rows if row["map"] == "network"],
        "baselines": [row for row in results.rows if row["map"] in references.BASELINES],
        "minimiser": [row for row in results.rows if row["map"] == "minimiser"],
        "training": results.training,
    }
