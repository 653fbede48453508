"""The rounds of k-ReFlow, around a training function of the caller's."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fvjax import _validate, training
from fvjax.flows import SolverOptions
from fvjax.interpolants import Interpolant
from fvjax.rectification._pairs import CHUNK, generate_pairs, mixed
from fvjax.types import Array, Key, Pair, Params, VelocityField

PairsOf = Callable[[int], Pair]
"""part 0, 1, ... of a round -> pairs [n, *dims]. Part 0 is the fixed set of the round, the others are new sets."""

TrainRound = Callable[[int, PairsOf, Params], Params]
"""(index of the round, its pairs, parameters to start from) -> trained parameters."""

Sources = Array | np.ndarray | Callable[[Key], Array | np.ndarray]
"""x0 [n, *dims], the same in all rounds; or a function of a key that draws new ones."""


class Round(NamedTuple):
    """A finished round.

    Attributes:
        index: 1, 2, ...
        pairs_of: what it was trained on, by part.
        params: what its training returned.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody wants of a round
    pairs_of: PairsOf
    params: Params

    @property
    def pairs(self) -> Pair:
        """Part 0, the fixed pairs of the round; made now if its training has not asked for them."""
        return self.pairs_of(0)


def reflow(
    train: TrainRound,
    field: VelocityField,
    params: Params,
    sources: Sources,
    *,
    key: Key,
    rounds: int,
    first: Pair | None = None,
    first_round: int = 1,
    real: Pair | None = None,
    real_share: float = 0.0,
    chunk: int = CHUNK,
    **options: Unpack[SolverOptions],
) -> Iterator[Round]:
    r"""Runs the rounds of k-ReFlow one after the other and yields each when its training is done.

    Round 1 trains on `first`. Round k > 1 trains, from the parameters theta of round k - 1, on pairs of their flow,

        z0 = sources(key of (round, part)),   z1 = ODE_theta(z0),   `real_share` of them replaced by rows of `real`.

    =============================  =====================================================================================
    one set for the whole round    `train` asks for `pairs_of(0)` only
    regenerated pairs              `train` asks for `pairs_of(0)`, `pairs_of(1)`, ...: new sources, the same theta
    `sources` an array             the same z0 in all rounds (pairs for the training sources); there is only part 0
    a run that was stopped         `first_round` = k and the `params` that round k - 1 returned: the pairs are those of
                                   the uninterrupted run, and so is all that `train` makes of its arguments alone
    =============================  =====================================================================================

    Args:
        train: (index, pairs_of, params) -> params; what it returns generates the next round's pairs, so usually the
            averaged parameters. `pair_trainer` makes one.
        field: the velocity field that `train` trains.
        params: of its first round here.
        sources: x0 [n, *dims], or (key) -> x0.
        key: of sources and mixtures.
        rounds: index of the last round.
        first: the pairs of round 1; needed if first_round = 1.
        first_round: index of the first round to be run, in [1, rounds].
        real: pairs to be mixed in; None takes `first`.
        real_share: in [0, 1], of every generated set (see `mixed`).
        chunk: of `generate_pairs`.
        **options: of `flows.transport`, for the pairs.

    Yields:
        Round(index, pairs_of, params), with the property `pairs`.

    Raises:
        ValueError: at once, if a number is outside of its range, or `first` or `real` is missing; on the way as
            `generate_pairs` and `mixed`, or if a part > 0 is asked for and cannot differ from part 0.
        FloatingPointError: as `generate_pairs`.

    Source: Liu et al. 2023 (Rectified Flow); real pairs against collapse: Zhu et al. 2024.
    """
    _validate.positive_integer("rounds", rounds)
    _validate.positive_integer("first_round", first_round)
    _validate.positive_integer("chunk", chunk)
    if first_round > rounds:
        raise ValueError(f"first_round must be at most rounds = {rounds}, got {first_round}")
    if first_round == 1 and first is None:
        raise ValueError("first must be given where round 1 is run, got None")
    if not 0 <= real_share <= 1:
        raise ValueError(f"real_share must be in [0, 1], got {real_share}")
    real = first if real is None else real
    if real_share > 0 and real is None:
        raise ValueError("real or first must be given where real_share > 0, got None")

    def generated(index: int, params: Params) -> PairsOf:
        def pairs_of(part: int) -> Pair:
            source_key, mix_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, index), part))
            x0 = _drawn(sources, source_key, part)
            pairs = generate_pairs(field, params, x0, chunk=chunk, **options)
            return pairs if real is None or not real_share else mixed(mix_key, pairs, real, real_share)

        return pairs_of

    def run() -> Iterator[Round]:
        current = params
        for index in range(first_round, rounds + 1):
            pairs_of = FirstKept(_given(first) if index == 1 and first is not None else generated(index, current))
            current = train(index, pairs_of, current)
            yield Round(index, pairs_of, current)

    return run()


def _drawn(sources: Sources, key: Key, part: int) -> Array | np.ndarray:
    if callable(sources):
        return sources(key)
    if part:
        raise ValueError(f"sources must be a function of a key where pairs are regenerated, got an array (part {part})")
    return sources


def _given(pairs: Pair) -> PairsOf:
    def pairs_of(part: int) -> Pair:
        del part  # round 1 has no other pairs than those that it was given
        return pairs

    return pairs_of


class FirstKept:
    """A PairsOf that remembers part 0, which training and caller ask for, and lets go of the others."""

    def __init__(self, pairs_of: PairsOf) -> None:
        self._pairs_of = pairs_of
        self._first: Pair | None = None

    def __call__(self, part: int) -> Pair:
        if isinstance(part, bool) or not isinstance(part, int | np.integer) or part < 0:
            raise ValueError(f"part must be an integer >= 0, got {part!r}")
        if part:
            return self._pairs_of(int(part))
        if self._first is None:
            self._first = self._pairs_of(0)
        return self._first


def pair_trainer(
    field: VelocityField,
    interpolant: Interpolant,
    optimizer: optax.GradientTransformation,
    *,
    key: Key,
    steps: int,
    batch: int = 256,
    regenerations: int = 1,
    log_every: int = 1000,
    on_log: Callable[[int, training.TrainState, float], None] | None = None,
    **step_options: Any,
) -> TrainRound:
    """A training function for `reflow`: `fvjax.training.fit` on pairs that are held in memory.

    Each round starts a new optimiser state at the given parameters and takes `steps` steps on batches that are drawn
    with replacement; it returns the averaged parameters. All rounds share one compilation.

    Args:
        field: velocity field of one example.
        interpolant: how pairs are joined, in every round; its noise is a knob of ReFlow.
        optimizer: any optax transformation; its schedule runs anew in every round.
        key: of batches, times and noise; the index of the round is folded in. Not that of `reflow` or `bridges.dsbm`.
        steps: updates of each round.
        batch: pairs in a batch, drawn from the set with replacement.
        regenerations: sets of pairs that each round (but the first, which has one) goes through, one after the other,
            in equal shares of the steps; 1 keeps the pairs fixed.
        log_every: as in `fit`.
        on_log: (index of the round, state, mean loss since the last call).
        **step_options: of `training.make_train_step`: ema_decay, reduction, coupling, micro_batches, ...

    Returns:
        train(index, pairs_of, params) -> averaged parameters.

    Raises:
        ValueError: if a number is no integer >= 1 or `regenerations` exceeds `steps`; as `make_train_step` and `fit`.
        NonFiniteLossError: as `fit`.
    """
    for name, value in (("steps", steps), ("batch", batch), ("regenerations", regenerations)):
        _validate.positive_integer(name, value)
    if regenerations > steps:
        raise ValueError(f"regenerations must be at most steps = {steps}, got {regenerations}")
    update = training.make_train_step(field, interpolant, optimizer, **step_options)

    def step(state: training.TrainState, pairs: Pair) -> tuple[training.TrainState, Array]:
        batch_key = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)
        return update(state, training.minibatch(pairs, batch_key, batch))

    def train(index: int, pairs_of: PairsOf, params: Params) -> Params:
        run_key = jax.random.fold_in(key, index)
        state = training.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), params, run_key)
        logged = None if on_log is None else lambda state, loss: on_log(index, state, loss)
        parts = regenerations if index > 1 else 1
        for part in range(parts):
            pairs = jax.tree.map(jnp.asarray, pairs_of(part))
            until = steps * (part + 1) // parts
            state, _ = training.fit(state, step, pairs, steps=until, log_every=log_every, on_log=logged)
        return state.ema_params

    return train
