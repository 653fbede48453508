"""Configuration and order of the Gaussian-mixture experiment; see `python -m experiments.gaussian_mixture --help`."""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from experiments.common import Cells, RunFolder, keep_config, progress
from experiments.gaussian_mixture import cells, problem, report, statistics
from experiments.gaussian_mixture.cells import Settings
from experiments.gaussian_mixture.problem import Law, Row, Samples
from fvjax import _validate

MOST_PAIRS, MOST_FRESH, MOST_SEEDS = 20_000, 65_536, 100


@dataclass(frozen=True)
class Config:
    """Table 1 of Reu et al. 2025: flows from N(0, I) to a Gaussian mixture, trained on fixed random pairs, with noise.

    Trains one network for each dimension, repeat and sigma; all sigmas of a repeat share pairs, first parameters and
    batches. Reports squared MMDs (generalization, memorization) beside their floor, the L2 to the training target, and
    the same of the exact minimiser of the same pairs and of infinitely many. Flows start at x0 itself. 2 CPU cores: 6
    minutes. Expected at d = 50: noise lowers the generalization MMD, and at 0.05 nearly all training sources still end
    nearest to their own target. Writes config.json, results.json, rows.csv, cells/, figures/ and report.html.
    """

    dims: Annotated[tuple[int, ...], tyro.conf.arg(help="dimensions, each with a mixture and a kernel of its own")] = (
        3,
        50,
    )
    sigmas: Annotated[tuple[float, ...], tyro.conf.arg(help="noise scales >= 0 of the constant-noise interpolant")] = (
        0.0,
        0.05,
        0.5,
    )
    seeds: Annotated[int, tyro.conf.arg(help="repeats with their own pairs, network and batches")] = 3
    pairs: Annotated[int, tyro.conf.arg(help="random pairs that are trained on, fixed")] = 1000
    fresh: Annotated[int, tyro.conf.arg(help="new sources, and new targets, for the generalization")] = 2048
    modes: Annotated[int, tyro.conf.arg(help="components of the mixture, in random directions")] = 8
    radius: Annotated[float, tyro.conf.arg(help="distance of their means from the origin")] = 5.0
    scale: Annotated[float, tyro.conf.arg(help="standard deviation of each component")] = 0.5
    steps: Annotated[int, tyro.conf.arg(help="training steps of each network")] = 5000
    width: Annotated[int, tyro.conf.arg(help="units of each hidden layer")] = 256
    depth: Annotated[int, tyro.conf.arg(help="residual blocks")] = 3
    solver: Annotated[Literal["euler", "heun", "midpoint", "tsit5", "dopri5"], tyro.conf.arg(help="of the flows")] = (
        "euler"
    )
    solver_steps: Annotated[
        int | None, tyro.conf.arg(help="fixed steps; default 100 for euler, and a tolerance of 1e-5 for the others")
    ] = None
    seed: Annotated[int, tyro.conf.arg(help="of every random number, those of the mixture and of all repeats")] = 0
    out: Annotated[Path | None, tyro.conf.arg(help="new or empty folder; default runs/gaussian_mixture/<time>")] = None
    resume: Annotated[bool, tyro.conf.arg(help="go on with the run in --out: cells that it finished are read")] = False
    smoke: Annotated[bool, tyro.conf.arg(help="the same parts at toy size, to see that everything runs")] = False


def check(config: Config) -> None:
    """Refuses values outside their range.

    Raises:
        ValueError: naming the option, the rule and the value.
    """
    for name in ("seeds", "pairs", "fresh", "modes", "steps", "width", "depth"):
        _validate.positive_integer(f"--{name}", getattr(config, name))
    if config.solver_steps is not None:
        _validate.positive_integer("--solver-steps", config.solver_steps)
    for name, least, most in (("seeds", 1, MOST_SEEDS), ("pairs", 2, MOST_PAIRS), ("fresh", 2, MOST_FRESH)):
        if not least <= getattr(config, name) <= most:
            raise ValueError(f"--{name} must be in [{least}, {most}], got {getattr(config, name)}")
    for name in ("radius", "scale"):
        _validate.positive(f"--{name}", getattr(config, name))
    if not 0 <= config.seed < 2**31:
        raise ValueError(f"--seed must be in [0, 2^31), got {config.seed}")
    for name in ("dims", "sigmas"):
        values = getattr(config, name)
        if not values:
            raise ValueError(f"--{name} must hold at least one value, got none")
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} must be distinct, got {values}")
    for dim in config.dims:
        if not 2 <= dim <= 1024:
            raise ValueError(f"--dims must be in [2, 1024], got {dim}")
    for sigma in config.sigmas:
        _validate.nonnegative("--sigmas", sigma)
    if config.resume and config.out is None:
        raise ValueError("--out must name the run's folder where --resume is given, got none")


def _at_toy_size(config: Config) -> Config:
    sizes = {name: min(getattr(config, name), 32) for name in ("pairs", "fresh", "steps", "width")}
    sigmas = tuple(dict.fromkeys((config.sigmas[0], config.sigmas[-1])))
    steps = min(config.solver_steps or 4, 4) if config.solver in {"euler", "heun", "midpoint"} else config.solver_steps
    return replace(config, **sizes, sigmas=sigmas, seeds=min(config.seeds, 2), depth=1, solver_steps=steps)


def _settings(config: Config) -> Settings:
    steps = 100 if config.solver == "euler" and config.solver_steps is None else config.solver_steps
    return Settings(
        config.width,
        config.depth,
        config.steps,
        config.pairs,
        config.fresh,
        solver=config.solver,
        solver_steps=steps,
    )


class Job(NamedTuple):
    """One entry of cells/; floors have no repeat, targets no sigma."""

    map: str
    dim: int
    repeat: int | None = None
    sigma: float | None = None

    @property
    def name(self) -> str:
        """Of its file."""
        parts = {"d": self.dim, "repeat": self.repeat, "sigma": self.sigma}
        return "_".join((*(f"{key}{part}" for key, part in parts.items() if part is not None), self.map))


def _jobs(config: Config) -> list[Job]:
    """All cells, one dimension after the other, so that its data are drawn once."""
    jobs = []
    for dim in config.dims:
        jobs.append(Job("floor", dim))
        for repeat in range(config.seeds):
            jobs.append(Job("target", dim, repeat))
            jobs += [
                Job(name, dim, repeat, sigma)
                for name in ("population", "minimiser", "network")
                for sigma in config.sigmas
            ]
    return jobs


def main(config: Config, folder: RunFolder) -> dict[str, Any]:
    """Trains and measures every cell, writes everything into `folder` and returns the results."""
    config = _at_toy_size(config) if config.smoke else config
    settings = _settings(config)
    wanted = {key: value for key, value in asdict(config).items() if key not in {"out", "resume"}}
    keep_config(wanted, folder, resume=config.resume)
    what = f"{config.modes} modes on a sphere of radius {config.radius:g}, sd {config.scale:g}"
    print(f"gaussian_mixture: {what}; {config.pairs} random pairs, {config.seeds} repeats, seed {config.seed}")

    @functools.lru_cache(maxsize=1)
    def law(dim: int) -> Law:
        shape = {"modes": config.modes, "radius": config.radius, "scale": config.scale}
        return problem.law_of(dim, **shape, seed=config.seed)  # type: ignore[arg-type]

    @functools.lru_cache(maxsize=1)
    def samples(dim: int, repeat: int) -> Samples:
        return problem.draw(law(dim), repeat, pairs=config.pairs, fresh=config.fresh)

    shown = {min(config.sigmas), max(config.sigmas)}
    found, jobs = Cells(folder), _jobs(config)
    for job in progress(jobs, "cells", len(jobs)):
        found.add(job.name, functools.partial(_run, job, law, samples, settings=settings, shown=shown))
    content = _content(config, settings, found, {dim: law(dim) for dim in config.dims})
    report.write(folder, content)
    return content


def _run(
    job: Job,
    law_of: Callable[[int], Law],
    samples_of: Callable[[int, int], Samples],
    *,
    settings: Settings,
    shown: set[float],
) -> tuple[list[Row], list[Row]]:
    """The rows and the losses of one job, and of the first repeat the points that the figure shows."""
    law = law_of(job.dim)
    if job.repeat is None:
        return problem.floor_rows(law, pairs=settings.pairs, fresh=settings.fresh), []
    samples = samples_of(job.dim, job.repeat)
    cell = {"dim": job.dim, "sigma": job.sigma, "repeat": job.repeat}
    if job.sigma is None:
        views = [cells.view_of(law, "training targets", samples.pairs.x1)] if job.repeat == 0 else []
        return [cell | cells.target_row(law, samples), *(cell | view for view in views)], []
    if job.map != "network":
        row_of = cells.population_row if job.map == "population" else cells.minimiser_row
        return [cell | row_of(law, samples, job.sigma, settings)], []
    row, log, ends = cells.network_cell(law, samples, job.sigma, settings)
    rows = [cell | row]
    if job.repeat == 0 and job.sigma in shown:
        rows.append(cell | cells.view_of(law, "flow", ends.fresh))
    return rows, [cell | entry for entry in log]


def _content(config: Config, settings: Settings, found: Cells, laws: dict[int, Law]) -> dict[str, Any]:
    rows = [row for row in found.rows if row["map"] not in {"floor", "view"}]
    floors = [row for row in found.rows if row["map"] == "floor"]
    summaries, changes = statistics.summary(rows), statistics.differences(rows)
    data = [{"dim": dim, "means": law.mixture.means, "bandwidths": law.bandwidths} for dim, law in laws.items()]
    numbers = {"batch": cells.BATCH, "seed": config.seed, "seeds": config.seeds, "smoke": config.smoke}
    shape = {"modes": config.modes, "radius": config.radius, "scale": config.scale, "tolerance": settings.tolerance}
    return {
        "data": data,
        "kernel": report.KERNEL,
        "settings": settings._asdict() | numbers | shape,
        "rows": rows,
        "floors": floors,
        "summary": summaries,
        "differences": changes,
        "conclusions": statistics.conclusions(summaries, changes, floors),
        "published": {"note": statistics.PUBLISHED_NOTE, "rows": list(statistics.PUBLISHED)},
        "training": found.training,
        "views": [row for row in found.rows if row["map"] == "view"],
    }
