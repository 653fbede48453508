"""The rounds of diffusion Schroedinger bridge matching, around a training function of the caller's."""

import functools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _validate, couplings
from fvjax.bridges._fields import DIRECTIONS, STEPS, BridgeParams, bridge_pairs, check_sigma, oriented
from fvjax.rectification import CHUNK, FirstKept, PairsOf, Sources, TrainRound
from fvjax.types import Array, Key, Pair, Params, Scalar, VelocityField

STARTS = ("imf", "ipf")


class BridgeRound(NamedTuple):
    """A finished round.

    Attributes:
        index: 1, 2, ...
        direction: the drift that it trained, "forward" or "backward".
        pairs_of: what that drift was trained on, by part, its own start first: Pair(x1, x0) where it is backward.
        params: of both drifts, after the round.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody wants of a round
    direction: str
    pairs_of: PairsOf
    params: BridgeParams

    @property
    def pairs(self) -> Pair:
        """Part 0 of what the round was trained on, as Pair(x0, x1)."""
        return oriented(self.pairs_of(0), self.direction)


def dsbm(
    train: TrainRound,
    field: VelocityField,
    params: BridgeParams,
    marginals: tuple[Sources, Sources],
    *,
    key: Key,
    rounds: int,
    sigma: Scalar,
    start: Literal["imf", "ipf"] | Pair = "imf",
    directions: Sequence[str] = DIRECTIONS,
    steps: int = STEPS,
    solver: str = "euler",
    first_round: int = 1,
    chunk: int = CHUNK,
) -> Iterator[BridgeRound]:
    r"""Runs the rounds of DSBM one after the other and yields each when its training is done.

    Every round trains one drift, in turn through `directions`, on pairs that the drift of the round before has made of
    REAL samples of the marginal at which it begins:

        forward     x0 ~ p0,   dX = f(X, t) dt + sigma dB,   x1 = X_1
        backward    x1 ~ p1,   dY = b(Y, s) ds + sigma dB,   x0 = Y_1

    The drifts regress (end - x_t) / (1 - t) along Brownian bridges between the pairs: `interpolants.bridge_drift`. The
    backward one is the same problem with the ends swapped and time s = 1 - t, so one training function serves both.
    The fixed point is the Schroedinger bridge: the coupling of the marginals that minimises E|x0 - x1|^2 / (2 sigma^2)
    plus its relative entropy to the independent one (entropy-regularised optimal transport, epsilon = 2 sigma^2).

    =======================================  ===========================================================================
    `start="imf"`                            round 1 trains on independent pairs: iterative Markovian fitting
    `start="ipf"`                            on x1 = x0 + sigma z with x0 ~ p0: iterative proportional fitting
    `start=Pair(x0, x1)`                     on these
    `directions=("backward", "forward")`     DSBM
    `directions=("forward",)`                every round trains and simulates the forward drift: ReFlow with Brownian
                                             noise and SDE sampling (Remark 2). Errors of the law at t = 1 add up,
                                             since no round sees the real targets again
    a run that was stopped                   `first_round` = k and the `params` after round k - 1: the pairs are those
                                             of the uninterrupted run
    =======================================  ===========================================================================

    Args:
        train: (index, pairs_of, params of one drift) -> its new params. `rectification.pair_trainer(field,
            bridge_drift(sigma), ...)` makes one; its weights carry over from round to round and its optimiser restarts.
        field: the network of both drifts, the one that `train` trains.
        params: of both drifts; those of the direction that comes later are used in its first round.
        marginals: samples of p0 and of p1, each an array [n, *dims], from each point of which every part of a round
            begins one path; or a function (key) -> such an array, which may draw from few samples many times.
        key: of samples, paths and pairings.
        rounds: index of the last round.
        sigma: noise scale of the Brownian motion, > 0; that of the interpolant that `train` uses.
        start: the pairs of round 1.
        directions: of rounds 1, 2, ..., repeated.
        steps: of the simulated paths.
        solver: of the simulated paths, as in `flows.diffuse`.
        first_round: index of the first round to be run, in [1, rounds].
        chunk: paths at once.

    Yields:
        BridgeRound(index, direction, pairs_of, params), with the property `pairs`.

    Raises:
        ValueError: at once, if a number, `start` or a direction is outside of its range; where they are drawn, if the
            marginals have different dimensions, or different numbers of samples where they are paired.
        FloatingPointError: as `rectification.diffuse_pairs`.

    Source: Shi et al. 2023 (DSBM), algorithm 1; Remark 2, Reu et al. 2025.
    """
    _check(rounds, first_round, start, directions, sigma=sigma)
    for name, number in (("steps", steps), ("chunk", chunk)):
        _validate.positive_integer(name, number)
    _check_dims(*(None if callable(points) else np.shape(points)[1:] for points in marginals))
    turns = tuple(directions)
    simulate = functools.partial(bridge_pairs, sigma=sigma, steps=steps, solver=solver, chunk=chunk)

    def first(part: int) -> Pair:
        if isinstance(start, Pair):
            return start
        part_key = jax.random.fold_in(jax.random.fold_in(key, 1), part)
        return _first_pairs(part_key, marginals, start, sigma=sigma)

    def simulated(index: int, params: BridgeParams) -> PairsOf:
        made_by = turns[(index - 2) % len(turns)]

        def pairs_of(part: int) -> Pair:
            point_key, path_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, index), part))
            points = _drawn(marginals[made_by == "backward"], point_key)
            return simulate(path_key, field, params, points, direction=made_by)

        return pairs_of

    def run() -> Iterator[BridgeRound]:
        current = params
        for index in range(first_round, rounds + 1):
            direction = turns[(index - 1) % len(turns)]
            made = first if index == 1 else simulated(index, current)
            pairs_of = FirstKept(_oriented(made, direction))
            own: Params = train(index, pairs_of, getattr(current, direction))
            current = current._replace(**{direction: own})
            yield BridgeRound(index, direction, pairs_of, current)

    return run()


def _oriented(pairs_of: PairsOf, direction: str) -> PairsOf:
    def turned(part: int) -> Pair:
        return oriented(pairs_of(part), direction)

    return turned


def _drawn(samples: Sources, key: Key) -> Array | np.ndarray:
    return samples(key) if callable(samples) else samples


def _first_pairs(key: Key, marginals: tuple[Sources, Sources], start: str, *, sigma: Scalar) -> Pair:
    """Independent pairs of the marginals, or sources and where Brownian motion takes them."""
    source_key, target_key, pair_key = jax.random.split(key, 3)
    x0 = jnp.asarray(_drawn(marginals[0], source_key))
    x1 = jnp.asarray(_drawn(marginals[1], target_key))
    _check_dims(x0.shape[1:], x1.shape[1:])
    if start == "ipf":
        noise = jax.random.normal(pair_key, x0.shape, x0.dtype)
        return Pair(x0, x0 + jnp.asarray(sigma, x0.dtype) * noise)
    if len(x0) != len(x1):
        raise ValueError(
            f"marginals must hold as many sources as targets where they are paired, got {len(x0)} and {len(x1)}"
        )
    return couplings.independent(pair_key, x0, x1)


def _check_dims(first: tuple[int, ...] | None, second: tuple[int, ...] | None) -> None:
    if first is not None and second is not None and first != second:
        raise ValueError(f"marginals must have the same dimensions, got examples of shape {first} and {second}")


def _check(rounds: int, first_round: int, start: str | Pair, directions: Sequence[str], *, sigma: Scalar) -> None:
    _validate.positive_integer("rounds", rounds)
    _validate.positive_integer("first_round", first_round)
    if first_round > rounds:
        raise ValueError(f"first_round must be at most rounds = {rounds}, got {first_round}")
    check_sigma(sigma)
    if isinstance(directions, str) or not directions:
        raise ValueError(f"directions must be a non-empty sequence of directions, got {directions!r}")
    for direction in directions:
        _validate.one_of("directions", direction, DIRECTIONS)
    if isinstance(start, Pair):
        _validate.same_shape("start.x0", start.x0, "start.x1", start.x1)
        _validate.batch("start", start)
        return
    _validate.one_of("start", start, STARTS)
    if start == "ipf" and directions[0] != "backward":
        raise ValueError(f"directions must begin with backward where start is ipf, got {tuple(directions)}")
