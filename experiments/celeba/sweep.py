"""The noise at which pairs are let go: predicted from midpoints, of the exact minimiser, and of trained networks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax

from experiments.celeba.cells import Cell, crossing, run_cell
from experiments.celeba.problem import Source, draw
from experiments.celeba.settings import INTERPOLANTS, Settings, log_and_save
from experiments.celeba.training import Trainer
from experiments.common import RunFolder
from fvjax import pairs as finite
from fvjax.types import Key, Pair

MULTIPLES = (0.0, 0.4, 0.6, 0.8, 1.0, 1.25, 1.6)
"""Noise scales of the sweep, in units of the predicted critical one."""
SMOKE_MULTIPLES = (0.0, 1.6)

REFERENCE = 200
"""Pairs for which a network is trained for the run's number of steps; N pairs get N / REFERENCE times as many, within
LENGTHS: what few pairs need to be memorized does not suffice for many."""
LENGTHS = (0.5, 2.0)


def critical(settings: Settings, trained: Pair, cells: Sequence[Cell]) -> dict[str, Any]:
    """sigma_c of one set of pairs: the prediction, and where half of the sources no longer return, measured twice.

    Returns:
        {"sigma_c_predicted", "sigma_c_predicted_range", "sigma_c_measured": {"minimiser", "networks"}}; the last is
        None if the share of the networks does not pass one half between two of their sigmas.
    """
    measured = finite.sigma_critical(
        trained, interpolant=INTERPOLANTS[settings.interpolant], **_sources(settings, trained)
    )
    shares = {cell.sigma: row["recovered"] for cell in cells for row in cell.rows if row["split"] == "train"}
    return {
        "sigma_c_predicted": measured.predicted,
        "sigma_c_predicted_range": [measured.low, measured.high],
        "sigma_c_measured": {
            "minimiser": measured.measured,
            "networks": crossing(list(shares), list(shares.values())),
        },
    }


def _sources(settings: Settings, trained: Pair) -> dict[str, Any]:
    """The sources that show where the exact minimiser lets go."""
    return {"sources": min(settings.minimiser_sources, len(trained.x0)), "key": jax.random.key(settings.seed)}


def run(
    settings: Settings, source: Source, sizes: Sequence[int], *, key: Key, folder: RunFolder, smoke: bool
) -> dict[str, Any]:
    """Trains networks over a grid of sigmas for every number of pairs.

    Returns:
        {} without sizes, else "critical", one row a size, and "rows", one a network.
    """
    if not sizes:
        return {}
    rows, found = [], []
    for size in sorted(sizes):
        problem = draw(
            jax.random.fold_in(key, size), source, "shuffled", pairs=size, held_out=min(size, settings.held_out)
        )
        steps = round(settings.steps * min(max(size / REFERENCE, LENGTHS[0]), LENGTHS[1]))
        log_every, save_every = log_and_save(steps)
        scaled = replace(settings, pairs=size, steps=steps, log_every=log_every, save_every=save_every)
        trainer = Trainer(scaled)
        predicted = finite.predicted_sigma_critical(
            problem.trained, INTERPOLANTS[settings.interpolant], **_sources(scaled, problem.trained)
        ).predicted
        cells = [
            run_cell(
                trainer,
                problem,
                "shuffled",
                multiple * predicted,
                trained=problem.trained,
                name=f"pairs_{size}_multiple_{multiple:g}",
                folder=folder,
                smoke=smoke,
            )
            for multiple in (SMOKE_MULTIPLES if smoke else MULTIPLES)
        ]
        rows += [{"pairs": size} | row for cell in cells for row in cell.rows]
        known = critical(scaled, problem.trained, cells)
        low, high = known["sigma_c_predicted_range"]
        found.append(
            {"data": settings.data, "pairs": size, "predicted": known["sigma_c_predicted"], "low": low, "high": high}
            | known["sigma_c_measured"]
            | {"train_steps": steps}
        )
    return {"critical": found, "rows": rows}
