"""The systems: which pairs each of them trains on, with which noise, and how it samples.

=====================  ===============================================================================================
system                 what it is
=====================  ===============================================================================================
cfm                    flow matching on the fixed training pairs; with `noise`, CFM(sigma). Round 1 of ReFlow
reflow_1, reflow_2     once, twice rectified: trained further on the fixed pairs that the flow before made of the
                       training sources
cfm_independent        sources and targets drawn independently of each other: the given pairs are not used
ot_cfm                 minibatch optimal transport (exact) between the sources and the targets
cfm_bridge             flow matching on Brownian bridges between the fixed pairs: DSBM's noise without its rounds
sb_cfm                 Brownian bridges between pairs of the Schroedinger plan (Sinkhorn, epsilon = 2 sigma^2)
dsbm                   Schroedinger bridge matching that starts at the fixed pairs (IMF): backward, forward, ...
dsbm_ipf               the same, started at Brownian paths from the sources (IPF): the fixed pairs are not used
sde_reflow             ReFlow with Brownian noise and SDE sampling (Remark 2): the forward drift only, starting there
=====================  ===============================================================================================
"""

import functools
import time
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.systems import measures
from experiments.systems.measures import Kernel, Row
from experiments.systems.problems import Problem
from experiments.systems.training import Trained, Trainer, tabulated
from fvjax import bridges, couplings, interpolants, pairs, rectification
from fvjax.bridges import BridgeParams
from fvjax.rectification import PairsOf, TrainRound
from fvjax.types import Array, Key, Pair, Params, Scalar, VelocityField

SystemName = Literal[
    "reflow", "reflow_noise", "cfm_independent", "ot_cfm", "cfm_bridge", "sb_cfm", "dsbm", "dsbm_ipf", "sde_reflow"
]
SYSTEMS: tuple[SystemName, ...] = typing.get_args(SystemName)
"""Values of --systems; the first two are cfm, reflow_1, reflow_2 without and with noise."""

WITH_BRIDGE = ("cfm_bridge", "sb_cfm", "dsbm", "dsbm_ipf", "sde_reflow")

Found = tuple[list[Row], list[Row]]
"""Rows of a system, and its rows by round."""


class Cell(NamedTuple):
    """One system on one problem, with its noise: what is computed, and kept, at once."""

    trainer: Trainer
    kernel: Kernel
    system: str
    sigma: float

    @property
    def problem(self) -> Problem:
        """That of the trainer."""
        return self.trainer.problem

    @property
    def name(self) -> str:
        """Of its file and folders."""
        return f"{self.system}_{self.sigma:g}"


def run(cell: Cell) -> Found:
    """Trains and measures one system."""
    return METHODS[cell.system](cell)


def _row(cell: Cell, system: str, sampler: str, trained: Trained, *, trainings: float, seconds: float) -> Row:
    """What names a row, and what is known of its training."""
    settings = cell.trainer.settings
    return {
        "problem": cell.problem.name,
        "dim": cell.problem.dim,
        "system": system,
        "sigma": cell.sigma,
        "sampler": sampler,
        "training_pairs": len(cell.problem.pairs.x0),
        "steps": trainings,
        "batch": settings.batch,
        "loss": trained.loss,
        "gradient_variance": trained.gradient_variance,
        "gradient_noise_scale": trained.gradient_noise_scale,
        "seconds": seconds,
    }


def _by_flow(cell: Cell, field: VelocityField, params: Params) -> Row:
    measured, smoke = cell.trainer.settings.measured, cell.trainer.settings.smoke
    carry = measures.carried_by_ode(field, params, smoke=smoke)
    row = measures.ends_row(cell.problem, cell.kernel, carry, measured=measured)
    return row | measures.flow_row(field, params, cell.problem, measured=measured, smoke=smoke)


def _on_pairs(cell: Cell, made: Callable[[], Pair], interpolant: interpolants.Interpolant, **more: Any) -> Found:
    """One training on pairs that are made beforehand."""
    trainer, steps = cell.trainer, cell.trainer.settings.steps
    timed = _Timed(made)
    trained = trainer.train(cell.name, timed, interpolant, trainer.first(), index=1, steps=steps)
    row = _row(cell, cell.system, "ode", trained, trainings=steps, seconds=trained.seconds)
    row |= {"pair_seconds": timed.seconds} | more
    return [row | _by_flow(cell, trainer.model.apply, trained.params)], []


def _reflow(cell: Cell) -> Found:
    """CFM on the fixed pairs, then rectified."""
    trainer, problem = cell.trainer, cell.problem
    settings, field = trainer.settings, trainer.model.apply
    interpolant = interpolants.constant_noise(jnp.float32(cell.sigma))
    done: list[Trained] = []
    made_in: list[float] = []

    def train(index: int, pairs_of: PairsOf, params: Params) -> Params:
        made = _Timed(functools.partial(pairs_of, 0))
        name = f"{cell.name}_{index}"
        done.append(trainer.train(name, made, interpolant, params, index=index, steps=settings.steps))
        made_in.append(made.seconds)
        return done[-1].params

    sources = np.asarray(problem.pairs.x0)
    chunk = min(len(sources), rectification.CHUNK)
    rounds = rectification.reflow(
        train,
        field,
        trainer.first(),
        sources,
        key=jax.random.fold_in(problem.key, 6),
        rounds=1 + settings.rectifications,
        first=problem.pairs,
        chunk=chunk,
        **measures.solver_options(smoke=settings.smoke),
    )
    rows, by_round = [], []
    for finished in rounds:
        system = "cfm" if finished.index == 1 else f"reflow_{finished.index - 1}"
        total = sum(trained.seconds for trained in done)
        row = _row(cell, system, "ode", done[-1], trainings=settings.steps * finished.index, seconds=total)
        row["pair_seconds"] = sum(made_in)
        rows.append(row | _by_flow(cell, field, finished.params))
        by_round.append(_round_row(rows[-1], finished.index, "forward"))
    return rows, by_round


KEPT = ("problem", "dim", "system", "sigma", "sampler", "covariance", "covariance_error", "recovered", "n_train", "mmd")


def _round_row(row: Row, index: int, direction: str) -> Row:
    """What is drawn over the rounds."""
    distances = [name for name in row if name.startswith(("train_l2", "l2_ot"))]
    return {"round": index, "direction": direction} | {name: row[name] for name in (*KEPT, *distances)}


def _independent(cell: Cell) -> Found:
    def made() -> Pair:
        source_key, target_key = jax.random.split(jax.random.fold_in(cell.problem.key, 7))
        return _resampled(cell, source_key, target_key)

    return _on_pairs(cell, made, interpolants.constant_noise(jnp.float32(0)))  # linear; compiled for CFM already


def _resampled(cell: Cell, source_key: Key, target_key: Key) -> Pair:
    """A table's rows of sources and targets, drawn independently with replacement."""
    x0, x1 = cell.problem.pairs
    rows = cell.trainer.settings.table
    return Pair(_points(x0, source_key, rows), _points(x1, target_key, rows))


def _points(x: Array, key: Key, rows: int) -> Array:
    return x[jax.random.randint(key, (rows,), 0, len(x))]


def _batches(cell: Cell) -> Pair:
    """The table's sources and targets, cut into batches of different points where there are enough of them."""
    batch = min(cell.trainer.settings.coupling_batch, len(cell.problem.pairs.x0))
    rows = cell.trainer.settings.table // batch
    source_key, target_key = jax.random.split(jax.random.fold_in(cell.problem.key, 8))
    x0, x1 = cell.problem.pairs
    return Pair(_different(x0, source_key, rows, batch), _different(x1, target_key, rows, batch))


def _different(x: Array, key: Key, rows: int, batch: int) -> Array:
    index = jax.vmap(lambda k: jax.random.permutation(k, len(x))[:batch])(jax.random.split(key, rows))
    return x[index]


@jax.jit
def _assigned(batches: Pair) -> Pair:
    def join(batch: Pair) -> Pair:
        return Pair(batch.x0, batch.x1[couplings.assignment(*batch)])

    return jax.lax.map(join, batches)


def _rows(batches: Pair) -> Pair:
    return Pair(*(x.reshape(-1, x.shape[-1]) for x in batches))


def _ot_cfm(cell: Cell) -> Found:
    return _on_pairs(cell, lambda: _rows(_assigned(_batches(cell))), interpolants.constant_noise(jnp.float32(0)))


def _cfm_bridge(cell: Cell) -> Found:
    return _on_pairs(cell, lambda: cell.problem.pairs, interpolants.brownian_bridge(jnp.float32(cell.sigma)))


def _sb_cfm(cell: Cell) -> Found:
    """The plans are computed first, whether or not the training is complete: their errors are reported."""
    x0, x1 = cell.problem.pairs
    n, settings = len(x0), cell.trainer.settings
    batch = max(size for size in range(1, settings.coupling_batch + 1) if n % size == 0)
    epochs = max(1, settings.table // n)
    sigma, key = jnp.float32(cell.sigma), jax.random.fold_in(cell.problem.key, 9)
    made = [_entropic(jax.random.fold_in(key, epoch), x0, x1, sigma=sigma, batch=batch) for epoch in range(epochs)]
    more = {
        "coupling_batch": batch,
        "sinkhorn_error": max(float(partners.error) for partners in made),
        "sinkhorn_converged": float(np.mean([float(partners.converged) for partners in made])),
    }

    def joined() -> Pair:
        targets = [x1[partners.indices] for partners in made]
        return Pair(jnp.tile(x0, (epochs, 1)), jnp.concatenate(targets))

    return _on_pairs(cell, joined, interpolants.brownian_bridge(sigma), **more)


def _entropic(key: Key, x0: Array, x1: Array, *, sigma: Array, batch: int) -> couplings.Partners:
    return couplings.entropic_partners(key, x0, x1, sigma=sigma, batch=batch, max_iterations=SINKHORN_ITERATIONS)


SINKHORN_ITERATIONS = 10_000
"""At most; sigma = 0.05 takes about 3,000 of them where distances are of the order of 1."""


def _dsbm(cell: Cell) -> Found:
    """Rounds of DSBM, or of its forward half; rows by round for the forward drift, and for the exact minimiser's."""
    trainer, problem, settings = cell.trainer, cell.problem, cell.trainer.settings
    forward_only = cell.system == "sde_reflow"
    directions = ("forward",) if forward_only else bridges.DIRECTIONS
    field, done = trainer.model.apply, dict[str, Trained]()
    interpolant = interpolants.bridge_drift(jnp.float32(cell.sigma))
    clock: list[float] = []
    made_in: list[float] = []

    def train(index: int, pairs_of: PairsOf, params: Params) -> Params:
        direction = directions[(index - 1) % len(directions)]
        timed = _Timed(functools.partial(pairs_of, 0))
        name = f"{cell.name}_{index}"
        found = trainer.train(name, timed, interpolant, params, index=index, steps=settings.bridge_steps)
        done[direction] = found
        clock.append(found.seconds)
        made_in.append(timed.seconds)
        return found.params

    first = BridgeParams(trainer.first(), trainer.first(1))
    by_round = []
    for finished in _rounds(cell, train, field, first, directions=directions):
        if finished.direction == "backward":
            continue
        params = finished.params
        trainings = settings.bridge_steps * finished.index
        carry = measures.carried_by_sde(field, params.forward, sigma=cell.sigma, steps=settings.path_steps)
        row = _row(cell, cell.system, "sde", done["forward"], trainings=trainings, seconds=sum(clock))
        row |= {"path_steps": settings.path_steps, "rounds": finished.index, "pair_seconds": sum(made_in)}
        row |= measures.ends_row(problem, cell.kernel, carry, measured=settings.measured)
        by_round.append(_round_row(row, finished.index, "forward"))
    rows = [row]
    if not forward_only:
        flow = bridges.probability_flow(field)
        rows.append(row | {"sampler": "ode"} | _by_flow(cell, flow, params))
    return rows, by_round + _exact_rounds(cell, directions)


def _rounds(
    cell: Cell, train: TrainRound, field: VelocityField, params: BridgeParams, *, directions: tuple[str, ...]
) -> Iterator[bridges.BridgeRound]:
    """DSBM from the fixed pairs, on a table's rows of paths from the training sources and targets in every round."""
    settings, (x0, x1) = cell.trainer.settings, cell.problem.pairs
    rounds = settings.rounds * len(directions) // 2  # as many forward drifts in one direction as in two
    marginals = tuple(functools.partial(lambda x, key: _points(x, key, settings.table), x) for x in (x0, x1))
    return bridges.dsbm(
        train,
        field,
        params,
        marginals,  # type: ignore[arg-type]  # of two
        key=jax.random.fold_in(cell.problem.key, 10),
        rounds=rounds,
        sigma=jnp.float32(cell.sigma),
        start="ipf" if cell.system == "dsbm_ipf" else cell.problem.pairs,
        directions=directions,
        steps=settings.path_steps,
        chunk=min(settings.table, 4096),
    )


EXACT_PAIRS = 400
"""Up to so many training pairs the rounds are also run with the exact minimiser in place of a network."""


def _exact_rounds(cell: Cell, directions: tuple[str, ...]) -> list[Row]:
    """The same rounds where each drift is the exact minimiser for a finite set of pairs: no network, no training."""
    problem, settings = cell.problem, cell.trainer.settings
    n = len(problem.pairs.x0)
    if n > EXACT_PAIRS or problem.kind == "gaussian":
        return []
    paths = EXACT_PATHS * n

    def train(index: int, pairs_of: PairsOf, params: Params) -> Params:
        del index, params
        repeated, _ = tabulated(pairs_of(0), paths)  # the same minimiser, and one shape for all rounds
        return repeated, jnp.float32(cell.sigma)

    small = cell._replace(trainer=_resized(cell.trainer, table=paths))
    rows, untrained = [], BridgeParams(None, None)
    for finished in _rounds(small, train, _exact_drift, untrained, directions=directions):
        if finished.direction == "backward":
            continue
        exact = finished.params.forward
        carry = measures.carried_by_sde(_exact_drift, exact, sigma=cell.sigma, steps=settings.path_steps)
        key = jax.random.fold_in(problem.key, 11)
        named = {"problem": problem.name, "dim": problem.dim, "system": f"{cell.system}_exact", "sigma": cell.sigma}
        row = named | {"sampler": "sde", "round": finished.index, "direction": "forward"}
        rows.append(row | measures.train_row(problem, carry, key, measured=settings.measured))
    return rows


def _exact_drift(params: Params, t: Scalar, x: Array) -> Array:
    """The drift that an ideal network would learn; its parameters are the pairs and sigma."""
    known, sigma = params
    return pairs.empirical_minimiser(known, interpolants.bridge_drift(sigma))(None, t, x)


EXACT_PATHS = 5
"""Paths from each training point in a round of exact minimisers."""


def _resized(trainer: Trainer, *, table: int) -> Trainer:
    return Trainer(trainer.problem, trainer.settings._replace(table=table), trainer.folder)


class _Timed:
    """A function without arguments that remembers how long it took; 0 if it was not called."""

    def __init__(self, function: Callable[[], Pair]) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self) -> Pair:
        start = time.perf_counter()
        found = jax.block_until_ready(self._function())
        self.seconds += time.perf_counter() - start
        return found


METHODS: dict[str, Callable[[Cell], Found]] = {
    "reflow": _reflow,
    "reflow_noise": _reflow,
    "cfm_independent": _independent,
    "ot_cfm": _ot_cfm,
    "cfm_bridge": _cfm_bridge,
    "sb_cfm": _sb_cfm,
    "dsbm": _dsbm,
    "dsbm_ipf": _dsbm,
    "sde_reflow": _dsbm,
}
