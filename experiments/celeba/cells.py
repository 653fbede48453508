"""One network of a run: trained, measured, and kept, so that a resumed run does nothing twice."""

import itertools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.celeba import evaluation
from experiments.celeba.evaluation import Row
from experiments.celeba.problem import Problem
from experiments.celeba.settings import Settings, solver_options
from experiments.celeba.training import Trainer
from experiments.common import RunFolder
from fvjax import pairs as finite
from fvjax import rectification
from fvjax.types import Array, Pair, Params

SHOWN = 10
"""Examples of each split whose images are kept."""

ROUNDS = ("independent", "reflow")
"""Stages that are a round of ReFlow."""

RESULT, IMAGES, GENERATED = "result.json", "images.npz", "generated.npz"


class Cell(NamedTuple):
    """One trained network and what was measured of it."""

    name: str
    stage: str
    sigma: float
    params: Params
    rows: list[Row]
    solvers: list[Row]
    rounds: list[Row]
    training: list[Row]
    images: dict[str, np.ndarray]


def run_cell(
    trainer: Trainer,
    problem: Problem,
    stage: str,
    sigma: float,
    *,
    trained: Pair,
    mixed: bool = False,
    folder: RunFolder,
    smoke: bool,
    first: Params | None = None,
    name: str | None = None,
) -> Cell:
    """Trains a network on `trained` and measures where its flow goes from training and held-out sources.

    Args:
        trainer: of the run.
        problem: its pairs.
        stage: "shuffled", "ot", "independent" or "reflow".
        sigma: noise scale.
        trained: the pairs that it is trained on, with the sources of the problem.
        mixed: whether each batch draws sources and targets of them anew instead.
        folder: of the run.
        smoke: toy sizes.
        first: parameters to begin with.
        name: of the cell's folder; None makes one of stage and sigma.
    """
    settings, name = trainer.settings, name or f"{stage}_sigma_{sigma:g}"
    targets = {"ot": problem.optimal.x1}
    if stage in {"shuffled", "reflow"}:
        targets["generated" if stage == "reflow" else "shuffled"] = trained.x1
    state, log = trainer.train(
        name,
        sigma,
        trained,
        mixed=mixed,
        targets=targets,
        folder=folder.path,
        first=first,
    )
    place = RunFolder(folder.path / "cells" / name, resume=True)
    params = state.ema_params
    if not (place.path / RESULT).exists():
        found, images = _measured(trainer, problem, sigma, params=params, targets=targets, smoke=smoke)
        found["rounds"] = [_round(trainer, problem, trained, params=params)] if stage in ROUNDS else []
        place.write_arrays(IMAGES, images)
        place.write_json(RESULT, found)
    found = json.loads((place.path / RESULT).read_text())
    with np.load(place.path / IMAGES) as arrays:
        images = dict(arrays)
    common = {"data": settings.data, "stage": stage, "sigma": sigma}
    trained_for = {"train_steps": settings.steps, "loss": log[-1]["loss"]}
    return Cell(
        name,
        stage,
        sigma,
        params,
        [common | row | trained_for for row in found["rows"]],
        [common | row | trained_for for row in found["solvers"]],
        [common | row | trained_for for row in found["rounds"]],
        [common | row for row in log],
        images,
    )


def _measured(
    trainer: Trainer, problem: Problem, sigma: float, *, params: Params, targets: dict[str, Array], smoke: bool
) -> tuple[dict[str, list[Row]], dict[str, np.ndarray]]:
    """Rows of the main solver on both splits and of all solvers on the held-out sources; the first images."""
    settings, field = trainer.settings, trainer.model.apply
    interpolant, key = settings.interpolant_of(sigma), jax.random.key(settings.seed + 1)
    named = {"solver": settings.solver, "steps": settings.solver_steps}
    rows, images = [], {}
    own = next((x1 for target, x1 in targets.items() if target != "ot"), targets["ot"])
    for split, sources, wanted in (
        ("train", problem.optimal.x0, targets),
        ("held_out", problem.held_out.x0, {"ot": problem.held_out.x1}),
    ):
        x0 = evaluation.starts(settings, interpolant, sources, key)
        predicted = evaluation.moved(field, params, x0, settings=settings, options=settings.solver_options())
        if predicted is None:
            raise FloatingPointError(f"samples must be finite, got nan or inf at sigma = {sigma:g} ({split})")
        found = evaluation.distances(predicted, wanted)
        share = {"recovered": evaluation.recovered(predicted, own)} if split == "train" else {}
        rows += [{"split": split} | named | row | share for row in found]
        images[split] = predicted[:SHOWN]
    some = {target: x1[: settings.minimiser_sources] for target, x1 in targets.items()}
    x0 = evaluation.starts(settings, interpolant, problem.optimal.x0[: settings.minimiser_sources], key)
    solvers = evaluation.solver_rows(settings, field, params, x0, targets=some, smoke=smoke)
    return {"rows": rows, "solvers": [{"split": "train"} | row for row in solvers]}, images


def _round(trainer: Trainer, problem: Problem, trained: Pair, *, params: Params) -> Row:
    """Straightness, error of few Euler steps against dopri5, and memorized fraction, from some training sources."""
    settings = trainer.settings
    count = settings.minimiser_sources
    measured = rectification.round_measures(
        trainer.model.apply,
        params,
        Pair(trained.x0[:count], trained.x1[:count]),
        training_points=problem.optimal.x1,
        key=jax.random.key(settings.seed + 2),
        chunk=settings.chunk,
        **solver_options("dopri5", None),
    )
    row: Row = {"n": min(count, len(trained.x0)), "straightness": measured.straightness}
    row["straightness_error"] = measured.straightness_error
    row |= {f"euler_{error.steps}": float(error.distance.mean) for error in measured.euler}
    if measured.memorized is not None:
        found = measured.memorized
        row |= {"memorized": found.fraction, "memorized_low": found.low, "memorized_high": found.high}
    return row


def generated(trainer: Trainer, cell: Cell, sources: Array, *, folder: RunFolder) -> Pair:
    """The training sources and where the flow of `cell` takes them; written once, read back when resumed."""
    place = RunFolder(folder.path / "cells" / cell.name, resume=True)
    if not (place.path / GENERATED).exists():
        pairs = rectification.generate_pairs(
            trainer.model.apply,
            cell.params,
            sources,
            chunk=trainer.settings.chunk,
            **trainer.settings.solver_options(),
        )
        place.write_arrays(GENERATED, {"x1": np.asarray(pairs.x1)})
    with np.load(place.path / GENERATED) as arrays:
        return Pair(sources, jnp.asarray(arrays["x1"]))


def minimiser_rows(settings: Settings, problem: Problem, sigma: float) -> list[Row]:
    """The same distances for the exact minimiser of the fixed pairs: what an ideal network would do."""
    if problem.mixed:
        return []
    interpolant, key = settings.interpolant_of(sigma), jax.random.key(settings.seed + 1)
    field = finite.empirical_minimiser(problem.trained, interpolant)
    count, named = settings.minimiser_sources, {"solver": settings.solver, "steps": settings.solver_steps}
    rows = []
    for split, known in (("train", problem.optimal), ("held_out", problem.held_out)):
        pairs = Pair(known.x0[:count], known.x1[:count])
        targets = {"ot": pairs.x1}
        if split == "train" and settings.coupling == "shuffled":
            targets["shuffled"] = problem.trained.x1[:count]
        x0 = evaluation.starts(settings, interpolant, pairs.x0, key)
        predicted = evaluation.moved(field, None, x0, settings=settings, options=settings.solver_options())
        share = {"recovered": evaluation.recovered(predicted, problem.trained.x1)} if split == "train" else {}
        common = {"data": settings.data, "sigma": sigma, "split": split} | named
        rows += [common | row | share for row in evaluation.distances(predicted, targets)]
    return rows


def crossing(sigmas: list[float], shares: list[float], level: float = 0.5) -> float | None:
    """The sigma at which a falling share passes `level`, linearly between two sigmas; None if it does not."""
    points = sorted(zip(sigmas, shares, strict=True))
    for (low, before), (high, after) in itertools.pairwise(points):
        if before >= level > after:
            return low + (high - low) * (before - level) / (before - after)
    return None
