"""Configuration and order of the Gaussian rotation experiment; see `python -m experiments.gaussian_rotation --help`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from experiments import plots, report
from experiments.common import RunFolder, progress, table
from experiments.gaussian_rotation import rotation, variance
from experiments.gaussian_rotation.page import make_page
from fvjax import _validate, gaussian
from fvjax.report import environment

PHASE_RUNS = ((60.0, 0.5), (120.0, 0.2), (120.0, 0.5), (165.0, 0.1), (170.0, 0.02))
"""(angle, sigma) of further networks, trained for half the steps, that test the phase diagram away from Figure 6."""

Angles = Annotated[tuple[float, ...], tyro.conf.arg(help="degrees in [0, 180]: rotations to train networks on")]
Sigmas = Annotated[tuple[float, ...], tyro.conf.arg(help="noise scales >= 0 of the constant-noise interpolant")]


@dataclass(frozen=True)
class Config:
    """Gradient variance of Gaussian transport, exactly, and what flows make of rotated pairs (Figures 4, 5, 6).

    2 CPU cores: 4.5 minutes. Expected: at 150 degrees and sigma = 0 trained networks return their
    pairs to an L2 below 0.02 with every solver; at sigma = 0.05 the learned angle is 146.8 degrees; at 180 degrees the
    answer depends on the solver. Writes config.json, results.json, figures/, flows/ (for `fvjax audit`) and report.html
    into the run folder.
    """

    dim: Annotated[int, tyro.conf.arg(help="dimension of the Gaussians, >= 2; all coordinate planes are rotated")] = 2
    angles: Angles = (150.0, 180.0)
    sigmas: Sigmas = (0.0, 0.01, 0.05, 0.2)
    target: Annotated[
        Literal["both", "gaussian", "digits"],
        tyro.conf.arg(help="gaussian: N(5, I) and trained networks; digits: covariance of real images, analytic part"),
    ] = "both"
    steps: Annotated[int, tyro.conf.arg(help="training steps of each network")] = 6000
    width: Annotated[int, tyro.conf.arg(help="units of each hidden layer")] = 128
    pairs: Annotated[int, tyro.conf.arg(help="training pairs of each network, and as many held-out ones")] = 1000
    repeats: Annotated[
        int, tyro.conf.arg(help="independent Monte Carlo estimates, >= 2, behind each error and p-value")
    ] = 20
    draws: Annotated[
        int | None, tyro.conf.arg(help="draws of each estimate; by default 2000, fewer in high dimension")
    ] = None
    seed: Annotated[int, tyro.conf.arg(help="of every random number")] = 0
    out: Annotated[Path | None, tyro.conf.arg(help="new or empty folder; default runs/gaussian_rotation/<time>")] = None
    smoke: Annotated[bool, tyro.conf.arg(help="the same parts at toy size, to see that everything runs")] = False


def check(config: Config) -> None:
    """Refuses values outside their range.

    Raises:
        ValueError: naming the option, the rule and the value.
    """
    for name in ("dim", "steps", "width", "pairs", "repeats"):
        _validate.positive_integer(f"--{name}", getattr(config, name))
    for name in ("dim", "repeats", "pairs"):
        if getattr(config, name) < 2:
            raise ValueError(f"--{name} must be >= 2, got {getattr(config, name)}")
    if config.draws is not None and config.draws < 2:
        raise ValueError(f"--draws must be >= 2, got {config.draws}")
    if not 0 <= config.seed < 2**31:
        raise ValueError(f"--seed must be in [0, 2^31), got {config.seed}")
    for name, values in (("angles", config.angles), ("sigmas", config.sigmas)):
        if not values:
            raise ValueError(f"--{name} must hold at least one number, got none")
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} must be distinct, got {values}")
    for angle in config.angles:
        if not 0 <= angle <= 180:
            raise ValueError(f"--angles must be in [0, 180] degrees, got {angle}")
    for sigma in config.sigmas:
        _validate.nonnegative("--sigmas", sigma)


@dataclass(frozen=True)
class Sizes:
    """How fine the grids are: (angles, sigmas) of each part."""

    points: Sequence[float]
    lines: Sequence[float]
    phase: tuple[Sequence[float], Sequence[float]]
    selected: tuple[Sequence[float], Sequence[float]]


def _grid(angles: int, sigmas: int) -> tuple[Sequence[float], Sequence[float]]:
    return np.linspace(0, 180, angles).tolist(), np.logspace(-2.5, 0.3, sigmas).tolist()


def _sizes(config: Config, target: str) -> Sizes:
    if config.smoke:
        points: Sequence[float] = (0.0, 120.0, 180.0) if target == "gaussian" else (0.0, 120.0)
        return Sizes(points, points, _grid(4, 2), _grid(3, 2))
    if target == "gaussian" and config.dim <= 10:
        points = sorted({*np.linspace(0, 180, 13).tolist(), *config.angles})
        return Sizes(points, np.linspace(0, 180, 91).tolist(), _grid(91, 57), _grid(10, 7))
    return Sizes(np.linspace(0, 180, 7).tolist(), np.linspace(0, 180, 19).tolist(), _grid(19, 9), _grid(13, 7))


@dataclass(frozen=True)
class Run:
    """One run: what was asked for, where its files go, and the results so far."""

    config: Config
    folder: RunFolder
    results: dict[str, list[variance.Row]]
    flows: list[variance.Row]

    @property
    def key(self) -> jax.Array:
        """The key of every random number."""
        return jax.random.key(self.config.seed)

    def add(self, **found: list[variance.Row]) -> None:
        """Appends rows to the results."""
        for name, rows in found.items():
            self.results[name] += rows


SECTIONS = (
    "variance",
    "comparison",
    "phase",
    "crossing",
    "selected",
    "rotation",
    "rotation_minimiser",
    "training",
    "learned",
)


def _at_toy_size(config: Config) -> Config:
    sigmas = tuple(dict.fromkeys((config.sigmas[0], config.sigmas[-1])))
    steps, width = min(config.steps, 60), min(config.width, 32)
    return replace(config, sigmas=sigmas, steps=steps, width=width, repeats=3, draws=50)


def main(config: Config, folder: RunFolder) -> dict[str, list[variance.Row]]:
    """Runs every part that the configuration asks for, writes it into `folder` and returns the results."""
    config = _at_toy_size(config) if config.smoke else config
    print(f"gaussian_rotation: target {config.target}, dim {config.dim}, seed {config.seed}")
    folder.write_json("config.json", {"config": asdict(config), "environment": environment()})
    run = Run(config, folder, {name: [] for name in SECTIONS}, [])
    if config.target != "digits":
        _train_all(run)
    with jax.enable_x64(True):
        if config.target != "digits":
            _analytic(run, variance.isotropic_target(config.dim))
        if config.target != "gaussian":
            _digits(run)
    folder.write_json("results.json", run.results)
    folder.write_report(make_page(folder, run.results, asdict(config), run.flows))
    _report(run.results)
    return run.results


def _digits(run: Run) -> None:
    """The analytic part on the 61 pixels that vary, and on all 64, whose covariance is singular, in a few cells."""
    whole, varying = variance.digits_targets(jax.random.fold_in(run.key, 2), stride=2 if run.config.smoke else 1)
    _analytic(run, varying)
    angles, sigmas = ((60.0,) if run.config.smoke else (0.0, 60.0, 120.0)), (0.0, 0.05)
    draws = _draws(run.config, len(whole.mean))
    rows, comparisons = variance.variance_rows(
        whole, angles, sigmas, key=run.key, repeats=run.config.repeats, draws=draws
    )
    run.add(variance=rows, comparison=comparisons)


def _draws(config: Config, dim: int) -> int:
    return config.draws or max(50, min(2000, 500_000 // dim**2))


def _analytic(run: Run, target: variance.Target) -> None:
    """Figures 4 and 5 and both phase diagrams of one target."""
    config, dim = run.config, len(target.mean)
    sizes = _sizes(config, target.name)
    key, draws = jax.random.fold_in(run.key, dim), _draws(config, dim)
    rows, comparisons = variance.variance_rows(
        target, sizes.points, config.sigmas, key=key, repeats=config.repeats, draws=draws
    )
    lines = variance.exact_lines(target, sizes.lines, config.sigmas)
    phase = variance.phase_rows(target, *sizes.phase)
    integrated = rotation.selected_points(target, *sizes.selected)
    crossing = [{"target": target.name} | row for row in variance.crossings(phase)]
    run.add(variance=rows, comparison=comparisons, phase=phase, crossing=crossing, selected=integrated)

    title = f"{target.name}, d = {dim}"
    for coupling in variance.COUPLINGS:
        figure = plots.variance_by_field(lines, rows, coupling=coupling, title=title)
        run.folder.write_figure(f"variance_{target.name}_{coupling}", figure, lines)
    figure = plots.variance_by_coupling(lines, rows, title=title)
    run.folder.write_figure(f"couplings_{target.name}", figure, rows)
    run.folder.write_figure(f"phase_{target.name}", plots.variance_phase(phase, title=title), phase)
    # The formula holds where every axis is rotated; an odd dimension leaves one alone, and digits are not isotropic.
    known = target.basis is None and dim % 2 == 0
    background = _formula(sizes.phase) if known else integrated
    points, trained = (integrated, run.results["learned"]) if known else ([], [])
    figure = plots.angle_phase(background, points, trained, title=f"{title}: rotation that the flow applies")
    run.folder.write_figure(f"selected_{target.name}", figure, [*background, *points, *trained])


def _formula(grid: tuple[Sequence[float], Sequence[float]]) -> list[variance.Row]:
    """`selected_angle` on a grid, degrees."""
    angles, sigmas = np.meshgrid(*grid)
    out = np.rad2deg(gaussian.selected_angle(np.deg2rad(angles), sigmas))
    columns = zip(angles.ravel(), sigmas.ravel(), out.ravel(), strict=True)
    return [{"angle": float(a), "sigma": float(s), "angle_out": float(o)} for a, s, o in columns]


def _train_all(run: Run) -> None:
    """Figure 6: trains every network, measures its flow with every solver, and draws its figures."""
    config = run.config
    solvers = rotation.SMOKE_SOLVERS if config.smoke else rotation.SOLVERS
    cells = [(angle, sigma, config.steps) for angle in config.angles for sigma in config.sigmas]
    extra = [] if config.smoke else [(angle, sigma, max(1, config.steps // 2)) for angle, sigma in PHASE_RUNS]
    shown: list[dict[str, Any]] = []
    jobs = progress([*cells, *extra], "training", len(cells) + len(extra))
    for index, (angle, sigma, steps) in enumerate(jobs):
        settings = rotation.Settings(config.dim, config.width, steps, config.pairs, probes=64 if config.smoke else 512)
        trained = rotation.train(angle, sigma, settings, key=jax.random.fold_in(run.key, 100 + index))
        rows = rotation.rotation_rows(trained, solvers)
        expected = {"angle_expected": rotation.expected_angle(trained)}
        accurate = [row | expected for row in rows if (row["solver"], row["split"]) == ("dopri5", "held_out")]
        run.add(learned=accurate)
        run.flows.append(_kept(run.folder, trained, settings))
        if index < len(cells):
            exact = rotation.minimiser_rows(trained, solvers)
            run.add(rotation=rows, rotation_minimiser=exact, training=trained.log)
            paths = rotation.trajectories(trained)[..., :2]
            x1 = np.asarray(trained.held_out.x1)[: len(paths), :2]
            shown.append({"angle": angle, "sigma": sigma, "paths": paths, "x1": x1})
    _trained_figures(run, shown)


def _kept(folder: RunFolder, trained: rotation.Trained, settings: rotation.Settings) -> variance.Row:
    """Keeps a network for `fvjax audit`, with the targets of optimal transport, x0 + 5."""
    return report.keep_flow(
        folder,
        f"angle_{trained.angle:g}_sigma_{trained.sigma:g}",
        params=trained.params,
        otherwise="nowhere",
        field="fvjax.nets:mlp",
        arguments={"dims": settings.dim, "width": settings.width},
        pairs=trained.train,
        interpolant=("constant_noise", {"sigma": trained.sigma}),
        held_out=trained.held_out,
        ot_targets=trained.train.x0 + 5,
    )


def _trained_figures(run: Run, shown: Sequence[dict[str, Any]]) -> None:
    config, results = run.config, run.results
    title = f"MLP on x1 = R x0 + 5, d = {config.dim}, {config.pairs} pairs, {config.steps} steps"
    for name, figure, rows in (
        ("trajectories", plots.flow_trajectories(shown, title=f"{title}; Euler 100"), _path_rows(shown)),
        ("solvers", plots.solver_distances(results["rotation"], title=title), results["rotation"]),
        ("training", plots.training_variance(results["training"], title=title), results["training"]),
    ):
        run.folder.write_figure(name, figure, rows)


def _path_rows(shown: Sequence[dict[str, Any]]) -> list[variance.Row]:
    return [
        {"angle": flow["angle"], "sigma": flow["sigma"], "source": i, "time": k / (path.shape[0] - 1), "x": x, "y": y}
        for flow in shown
        for i, path in enumerate(flow["paths"])
        for k, (x, y) in enumerate(path)
    ]


def _report(results: dict[str, list[variance.Row]]) -> None:
    """The closing tables on the terminal."""
    rotated = [row for row in results["variance"] if row["coupling"] == "rotated" and row["angle"] in {60, 120, 180}]
    columns = {"target": "", "angle": "g", "sigma": "g", "field": "", "exact": ".4g", "monte_carlo": ".4g"}
    print("\ntotal gradient variance on rotated pairs")
    print(table(rotated, columns | {"standard_error": ".1g"}))
    print("\nangle from which on the OT field has the lower variance (-: never)")
    step = max(1, len(results["crossing"]) // 8)
    print(table(results["crossing"][::step], {"target": "", "sigma": ".3g", "angle": ".1f"}))
    if results["rotation"]:
        print("\ntrained networks, held-out sources: mean L2 to the paired and to the OT target, learned angle")
        rows = [
            row | {"theory": float(np.rad2deg(gaussian.selected_angle(np.deg2rad(row["angle"]), row["sigma"])))}
            for row in results["rotation"]
            if row["split"] == "held_out"
        ]
        columns = {"angle": "g", "sigma": "g", "solver": "", "steps": "", "l2_paired": ".3f", "l2_ot": ".3f"}
        print(table(rows, columns | {"angle_out": ".2f", "theory": ".2f"}))
        print("\nlearned angle (dopri5) against the exact minimiser for the training sample's own mean and covariance")
        columns = {"angle": "g", "sigma": "g", "angle_out": ".2f", "angle_expected": ".2f"}
        print(table(results["learned"], columns))
    print()
