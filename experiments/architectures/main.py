"""Configuration and order of the architectures experiment; see `python -m experiments.architectures --help`."""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import tyro

from experiments.architectures import digits, gaussian_task, report
from experiments.architectures.networks import Row, Size
from experiments.common import Cells, RunFolder, SettingsError, keep_config, progress
from fvjax import _validate, flows

LONGER = 4
"""Factor between the two numbers of steps that tell whether training or the network is the limit."""

TRANSFORMER_BLOCKS = 2
"""Of the part gaussian; and one residual layer on each of the U-Nets' two levels."""

SMOKE_HELP = (
    "the same parts at toy size, to see that everything runs; of both parts together U-Nets take part in digits only,"
    " transformers in gaussian only"
)

Widths = tuple[int, ...]


@dataclass(frozen=True)
class Config:
    """MLP, U-Net, transformer and the exact affine field side by side: what does the architecture change?

    Part gaussian: x1 = mu + A x0 in 16 dimensions with fresh pairs in every batch; the residual of each network against
    the field of Lemma 1 over width and depth, over t, and with 4 times the steps. Part digits: who memorizes shuffled
    optimal pairs of 8x8 images, at which sigma, after how many steps. 2 CPU cores: 10 minutes. Writes config.json,
    results.json, rows.csv, cells/, figures/ and report.html into the run folder.
    """

    parts: Annotated[tuple[Literal["gaussian", "digits"], ...], tyro.conf.arg(help="what to run")] = (
        "gaussian",
        "digits",
    )
    networks: Annotated[
        tuple[Literal["mlp", "unet", "transformer", "affine"], ...],
        tyro.conf.arg(help="architectures; affine, the field of Lemma 1, is in the part gaussian only"),
    ] = ("mlp", "unet", "transformer", "affine")
    widths: Annotated[Widths, tyro.conf.arg(help="gaussian: units of the MLPs' hidden layers")] = (16, 32, 64, 128, 256)
    depths: Annotated[Widths, tyro.conf.arg(help="gaussian: residual blocks of the MLPs, with every width")] = (1, 3)
    unet_channels: Annotated[Widths, tyro.conf.arg(help="gaussian: channels of the U-Nets, even; 2 levels")] = (4, 8)
    transformer_widths: Annotated[
        Widths, tyro.conf.arg(help="gaussian: features of the transformers' tokens, multiples of 4; 2 blocks")
    ] = (16, 32)
    steps: Annotated[
        int,
        tyro.conf.arg(
            help=f"gaussian: training steps; two MLPs, the narrowest and the widest, also take {LONGER} times as many"
        ),
    ] = 4000
    angle: Annotated[float, tyro.conf.arg(help="gaussian: degrees in [0, 180) by which the pairs are rotated")] = 120.0
    sigmas: Annotated[tuple[float, ...], tyro.conf.arg(help="digits: noise scales >= 0 of the constant noise")] = (
        0.0,
        0.5,
        1.0,
    )
    pairs: Annotated[int, tyro.conf.arg(help="digits: shuffled training pairs")] = 200
    digits_steps: Annotated[
        tuple[int, ...],
        tyro.conf.arg(
            help="digits: training steps, one number for all or one for each of --networks but affine; default"
            f" {', '.join(f'{name} {steps}' for name, steps in digits.STEPS.items())}"
        ),
    ] = ()
    points: Annotated[int, tyro.conf.arg(help="digits: points of each learning curve")] = 20
    seed: Annotated[int, tyro.conf.arg(help="of every random number")] = 0
    out: Annotated[Path | None, tyro.conf.arg(help="new or empty folder; default runs/architectures/<time>")] = None
    resume: Annotated[bool, tyro.conf.arg(help="go on with the run in --out: cells that it finished are read")] = False
    smoke: Annotated[bool, tyro.conf.arg(help=SMOKE_HELP)] = False


def check(config: Config) -> None:
    """Refuses values outside their range.

    Raises:
        ValueError: naming the option, the rule and the value.
    """
    for name in ("parts", "networks", "widths", "depths", "unet_channels", "transformer_widths", "sigmas"):
        values = getattr(config, name)
        option = f"--{name.replace('_', '-')}"
        if not values:
            raise ValueError(f"{option} must hold at least one value, got none")
        if len(set(values)) < len(values):
            raise ValueError(f"{option} must be distinct, got {values}")
    for name in ("steps", "points"):
        _validate.positive_integer(f"--{name}", getattr(config, name))
    for name in ("widths", "depths", "digits_steps"):
        for value in getattr(config, name):
            _validate.positive_integer(f"--{name.replace('_', '-')}", value)
    for value in config.unet_channels:
        _validate.even_integer("--unet-channels", value)
    for value in config.transformer_widths:
        if value < 4 or value % 4:
            raise ValueError(f"--transformer-widths must be multiples of 4, got {value}")
    for sigma in config.sigmas:
        _validate.nonnegative("--sigmas", sigma)
    if not 0 <= config.angle < 180:
        raise ValueError(f"--angle must be in [0, 180) degrees, got {config.angle}")
    if config.pairs < 2:
        raise ValueError(f"--pairs must be >= 2, got {config.pairs}")
    if not 0 <= config.seed < 2**31:
        raise ValueError(f"--seed must be in [0, 2^31), got {config.seed}")
    if config.parts == ("digits",) and not _of_digits(config):
        raise ValueError("--networks must name more than affine where --parts is digits, got affine")
    if len(config.digits_steps) > 1 and len(config.digits_steps) != len(_of_digits(config)):
        wanted, found = len(_of_digits(config)), len(config.digits_steps)
        raise ValueError(f"--digits-steps must be one number or {wanted}, one a network, got {found}")
    if config.resume and config.out is None:
        raise ValueError("--out must name the run's folder where --resume is given, got none")


def _of_digits(config: Config) -> list[str]:
    return [name for name in config.networks if name in digits.SIZES and not _left_out(config, name, "transformer")]


def _left_out(config: Config, name: str, which: str) -> bool:
    """In a smoke run of both parts every architecture is compiled once, which is what takes the time."""
    return config.smoke and name == which and len(config.parts) > 1


def _at_toy_size(config: Config) -> Config:
    return replace(
        config,
        widths=(min(config.widths),),
        depths=(min(config.depths),),
        unet_channels=(min(config.unet_channels),),
        transformer_widths=(min(config.transformer_widths),),
        steps=min(config.steps, 10),
        sigmas=tuple(dict.fromkeys((config.sigmas[0], config.sigmas[-1]))),
        pairs=min(config.pairs, 16),
        digits_steps=tuple(min(steps, 10) for steps in config.digits_steps or (10,)),
        points=min(config.points, 2),
    )


class Job(NamedTuple):
    """One entry of cells/: a network of one part; `size` None is the closed form, or the exact minimiser at a sigma."""

    part: str
    size: Size | None
    steps: int = 0
    sigma: float | None = None

    @property
    def name(self) -> str:
        """Of its file."""
        if self.part == "gaussian":
            return "gaussian_closed_form" if self.size is None else f"gaussian_{self.size.label}_{self.steps}"
        label = digits.MINIMISER if self.size is None else self.size.label
        return f"digits_{label}_{self.sigma:g}"


def gaussian_jobs(config: Config) -> list[Job]:
    """The closed form, the affine field, the grid of MLPs with two of them trained longer, transformers, U-Nets."""
    blocks = 1 if config.smoke else TRANSFORMER_BLOCKS
    sizes: dict[str, Sequence[Size]] = {
        "affine": [Size("affine")],
        "mlp": [Size("mlp", width, depth) for depth in config.depths for width in config.widths],
        "transformer": [Size("transformer", width, blocks) for width in config.transformer_widths],
        "unet": [Size("unet", channels, 1) for channels in config.unet_channels],
    }
    names = [name for name in sizes if name in config.networks and not _left_out(config, name, "unet")]
    chosen = [Job("gaussian", size, config.steps) for name in names for size in sizes[name]]
    longer = []
    if "mlp" in config.networks:
        depth = max(config.depths)
        ends = dict.fromkeys((min(config.widths), max(config.widths)))
        longer = [Job("gaussian", Size("mlp", width, depth), LONGER * config.steps) for width in ends]
    return [Job("gaussian", None), *chosen, *longer]


def digits_jobs(config: Config) -> list[Job]:
    """The exact minimiser at every sigma, then network by network."""
    names = _of_digits(config)
    given = config.digits_steps * (len(names) if len(config.digits_steps) == 1 else 1)
    steps = dict(zip(names, given, strict=True)) if given else digits.STEPS
    sizes = digits.SMOKE_SIZES if config.smoke else digits.SIZES
    exact = [Job("digits", None, 0, sigma) for sigma in config.sigmas]
    return exact + [
        Job("digits", size, steps[name], sigma) for name in names for size in sizes[name] for sigma in config.sigmas
    ]


def main(config: Config, folder: RunFolder) -> dict[str, Any]:
    """Trains and measures every cell, writes everything into `folder` and returns the results.

    Raises:
        SettingsError: if there are fewer digits than --pairs, or the run that is resumed had other settings.
    """
    config = _at_toy_size(config) if config.smoke else config
    if "digits" in config.parts and config.pairs > digits.training_images():
        raise SettingsError(f"--pairs must be at most {digits.training_images()}, the digits, got {config.pairs}")
    wanted = {key: value for key, value in asdict(config).items() if key not in {"out", "resume"}}
    keep_config(wanted, folder, resume=config.resume)
    print(f"architectures: {', '.join(config.parts)}; networks {', '.join(config.networks)}; seed {config.seed}")
    gaussian_key, digits_key = jax.random.split(jax.random.key(config.seed))
    settings = gaussian_task.Settings(16, 8, 4, 16, (("euler", 4),)) if config.smoke else gaussian_task.Settings()
    gaussian = gaussian_task.make_problem(gaussian_key, config.angle, settings) if "gaussian" in config.parts else None
    pairs = digits.make_problem(digits_key, config.pairs) if "digits" in config.parts else None

    jobs = (gaussian_jobs(config) if gaussian else []) + (digits_jobs(config) if pairs else [])
    cells = Cells(folder)
    for job in progress(jobs, "networks", len(jobs)):
        if gaussian is not None and job.part == "gaussian":
            cells.add(job.name, functools.partial(_run_gaussian, job, gaussian, settings))
        elif pairs is not None:
            cells.add(job.name, functools.partial(_run_digits, job, pairs, config))
    content = _content(config, cells, gaussian, pairs)
    if gaussian is not None:
        named = (f"{solver} {steps or flows.TOLERANCE}" for solver, steps in settings.solvers)
        content["gaussian"]["solvers"] = ", ".join(named)
    report.write(folder, content)
    return content


def _run_gaussian(
    job: Job, problem: gaussian_task.Problem, settings: gaussian_task.Settings
) -> tuple[list[Row], list[Row]]:
    if job.size is None:
        return gaussian_task.closed_form_rows(problem, settings), []
    return gaussian_task.run_cell(problem, job.size, job.steps, settings)


def _run_digits(job: Job, problem: digits.Problem, config: Config) -> tuple[list[Row], list[Row]]:
    sigma = job.sigma or 0.0
    if job.size is None:
        return digits.minimiser_rows(problem, sigma), []
    probes = 8 if config.smoke else 256
    return digits.run_cell(problem, job.size, sigma, steps=job.steps, points=config.points, probes=probes)


def _content(
    config: Config, cells: Cells, gaussian: gaussian_task.Problem | None, pairs: digits.Problem | None
) -> dict[str, Any]:
    def of(part: str, rows: list[Row]) -> list[Row]:
        return [row for row in rows if row["part"] == part]

    content: dict[str, Any] = {"seed": config.seed, "smoke": config.smoke, "parts": config.parts}
    if gaussian is not None:
        singular = gaussian.smallest_singular_values()
        content["gaussian"] = {
            "dim": gaussian_task.DIMS[0] * gaussian_task.DIMS[1],
            "angle": config.angle,
            "covariance_eigenvalues": gaussian_task.EIGENVALUES,
            "batch": gaussian_task.BATCH,
            "scale": gaussian.scale,
            "smallest_singular_value": float(singular.min()),
            "ill_conditioned_t": float(gaussian.times[int(singular.argmin())]),
            "steps": config.steps,
            "rows": of("gaussian", cells.rows),
            "profile": of("gaussian_profile", cells.rows),
            "training": of("gaussian", cells.training),
        }
    if pairs is not None:
        content["digits"] = {
            "pairs": len(pairs.optimal.x0),
            "held_out": len(pairs.held_out.x0),
            "batch": digits.BATCH,
            "solver": f"{digits.SOLVER} {digits.SOLVER_STEPS}",
            "baselines": digits.baselines(pairs),
            "rows": of("digits", cells.rows),
            "training": of("digits", cells.training),
        }
    return content
