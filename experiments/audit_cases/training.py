"""Training of one case, and what is true of it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.audit_cases.cases import Case, Problem, Recipe
from experiments.common import compiled_quickly
from fvjax import flows, metrics, training
from fvjax.interpolants import Interpolant, constant_noise
from fvjax.types import Array, Key, Model, Pair, Params

Row = dict[str, Any]

SOLVER, SOLVER_STEPS = "euler", 100
"""Of the flows behind the truth."""

AT_ONCE = 50
"""Sources that are carried in one call."""

TRUTHS = ("memorizes", "follows a rule", "lets go")
"""What can be true of a case; the audit may also be undecided."""


class Task(NamedTuple):
    """What a training step is given; sigma is a leaf of the interpolant, so that all sigmas share one compilation."""

    pairs: Pair
    interpolant: Interpolant


class Trainer(NamedTuple):
    """A network, the state before its first step, and the step."""

    model: Model
    first: Any
    step: training.TrainStep


@functools.cache
def trainer_of(recipe: Recipe) -> Trainer:
    """Made once for a recipe, so that its cases share compilations."""
    model, optimizer = recipe.model(), training.adam(recipe.steps)

    def step(state: training.TrainState, task: Task) -> tuple[training.TrainState, Array]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)
        batch = training.minibatch(task.pairs, key, recipe.batch)
        return training.make_train_step(model.apply, task.interpolant, optimizer)(state, batch)

    def first(key: Key) -> training.TrainState:
        return training.init_state(key, model, optimizer)

    return Trainer(model, compiled_quickly(first), step)


def train(case: Case, problem: Problem, recipe: Recipe) -> tuple[Params, list[Row]]:
    """The parameters (averaged) of one case after training, and its losses.

    Raises:
        NonFiniteLossError: from training.
    """
    trainer, log = trainer_of(recipe), []
    state, _ = training.fit(
        trainer.first(problem.key),
        trainer.step,
        Task(problem.train, constant_noise(jnp.asarray(case.sigma, jnp.float32))),
        steps=recipe.steps,
        log_every=max(1, recipe.steps // 10),
        on_log=lambda state, loss: log.append({"case": case.name, "step": int(state.step), "loss": loss}),
        progress=case.name,
    )
    return state.ema_params, log


def truth(case: Case, problem: Problem, recipe: Recipe, params: Params) -> Row:
    """What is true of a trained case, from targets that the audit is not given.

    The training pairs are *returned* if the flow takes training sources nearer to their own targets than to those of
    optimal transport (mean L2, the criterion of Table 2); where both are the same, nearer to their own target than
    other targets are. Returned pairs are *a rule* if the flow takes unseen sources nearer to their partner under the
    rule than the nearest training target is: no list of targets could do that. A shuffled coupling follows no rule.

    Returns:
        The truth, one of `TRUTHS`, and the mean distances behind it.

    Raises:
        FloatingPointError: if a flow does not stay finite.
    """
    field = trainer_of(recipe).model.apply
    ends = {name: _moved(field, params, x0) for name, x0 in (("train", problem.train.x0), ("fresh", problem.fresh.x0))}
    if not all(np.isfinite(end).all() for end in ends.values()):
        raise FloatingPointError(f"the flow must stay finite, got nan or inf for {case.name}")
    own = float(metrics.pair_l2(ends["train"], problem.train.x1).mean)
    optimal = float(metrics.pair_l2(ends["train"], jnp.asarray(problem.optimal)).mean)
    fresh = float(metrics.pair_l2(ends["fresh"], problem.fresh.x1).mean)
    between = _nearest(problem.train.x1, problem.train.x1, others=True)
    copies = _nearest(problem.fresh.x1, problem.train.x1, others=False)
    returned = own < (between if case.coupling == "optimal" else optimal)
    rule = case.coupling != "shuffled" and fresh < copies
    return {
        "truth": "lets go" if not returned else "follows a rule" if rule else "memorizes",
        "l2_own": own,
        "l2_ot": optimal,
        "l2_fresh": fresh,
        "l2_between_targets": between,
        "l2_best_copy": copies,
    }


def _nearest(points: Array, targets: Array, *, others: bool) -> float:
    """Mean distance to the nearest target, leaving out the point itself where it is one of them."""
    x, y = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (points, targets))
    distances = np.sqrt(np.maximum(np.sum(x**2, 1)[:, None] + np.sum(y**2, 1) - 2 * x @ y.T, 0))
    if others:
        np.fill_diagonal(distances, np.inf)
    return float(distances.min(axis=1).mean())


def _moved(field: Any, params: Params, x0: Array) -> Array:
    """Where the flow takes all sources, in calls of one shape."""
    rest = -len(x0) % AT_ONCE
    padded = np.concatenate([np.asarray(x0), np.repeat(np.asarray(x0[-1:]), rest, axis=0)])
    parts = np.split(padded, len(padded) // AT_ONCE)
    return jnp.concatenate([_carried(params, jnp.asarray(part), field=field) for part in parts])[: len(x0)]


@functools.partial(jax.jit, static_argnames="field")
def _carried(params: Params, x0: Array, *, field: Any) -> Array:
    return jax.vmap(lambda x: flows.transport(field, params, x, solver=SOLVER, steps=SOLVER_STEPS))(x0)
