"""The networks of a run as flows that `fvjax audit` reads: with their pairs, held-out ones and the optimal targets."""

import jax.numpy as jnp
import numpy as np

from experiments import report
from experiments.celeba.cells import Cell
from experiments.celeba.evaluation import Row
from experiments.celeba.problem import Problem
from experiments.celeba.training import Trainer
from experiments.common import RunFolder
from fvjax import rectification
from fvjax.types import Pair, Params

INTERPOLANTS = {"constant": "constant_noise", "bridge": "brownian_bridge"}
"""Values of --interpolant as names of `fvjax.interpolants`."""


def keep(
    trainer: Trainer, problem: Problem, cell: Cell, trained: Pair, *, folder: RunFolder, before: Params = None
) -> Row:
    """Saves a network in flows/ and says where it is; not where its pairs are independent: there is none to return.

    Args:
        trainer: of the network.
        problem: of the run.
        cell: the network.
        trained: the pairs that it was trained on.
        folder: of the run.
        before: of stage "reflow": parameters of the flow that made its pairs.
    """
    checkpoints = f"cells/{cell.name}/checkpoints"
    if cell.stage == "independent":
        return {"network": cell.name, "where": f"{checkpoints} (independent pairs: there is none to return)"}
    settings = trainer.settings
    return report.keep_flow(
        folder,
        cell.name,
        params=cell.params,
        otherwise=checkpoints,
        field=f"fvjax.nets:{settings.network}",
        arguments={"dims": settings.dims, **settings.options},
        pairs=trained,
        interpolant=(INTERPOLANTS[settings.interpolant], {"sigma": cell.sigma}),
        held_out=_held_out(trainer, problem, cell.stage, before),
        ot_targets=problem.optimal.x1,
        solver=settings.solver,
        steps=settings.solver_steps,
    )


def _held_out(trainer: Trainer, problem: Problem, stage: str, before: Params) -> Pair:
    """Pairs of the same coupling from held-out images: deranged, made by the flow before, or optimal."""
    x0, x1 = problem.held_out
    if stage == "shuffled":
        return Pair(x0, jnp.asarray(np.roll(x1, 1, axis=0)))
    if stage == "reflow":
        settings = trainer.settings
        return rectification.generate_pairs(
            trainer.model.apply, before, x0, chunk=settings.chunk, **settings.solver_options()
        )
    return problem.held_out
