"""What a round of ReFlow has achieved: how straight, how faithful to its pairs, how few steps, how much memorized."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from fvjax import _validate, flows, metrics
from fvjax.flows import SolverOptions
from fvjax.rectification._pairs import CHUNK, as_partial, generate_pairs, hashable, in_chunks
from fvjax.types import Array, Key, Pair, Params, VelocityField

EULER_STEPS = (1, 2, 4, 8, 16, 32)
"""Numbers of Euler steps whose error is measured, each the number of evaluations of the field, too."""


class EulerError(NamedTuple):
    """Distance over examples between Euler's end with `steps` evaluations and that of the accurate solve."""

    steps: int
    distance: metrics.PairDistance


class RoundMeasures(NamedTuple):
    """Measures of one field on n sources.

    Attributes:
        straightness: mean over the sources of S, in units of x squared (`flows.straightness`); 0: one step is exact.
        straightness_error: its standard error; nan for n = 1.
        pair: distance of the accurate ends to the x1 of the pairs.
        target: distance of the accurate ends to the given targets, if there are any.
        euler: one entry a number of Euler steps.
        memorized: share of the accurate ends that are copies of training points, if there are any.
        ends: where the accurate solve ends, numpy [n, *dims].
    """

    straightness: float
    straightness_error: float
    pair: metrics.PairDistance
    target: metrics.PairDistance | None
    euler: tuple[EulerError, ...]
    memorized: metrics.MemorizedFraction | None
    ends: Array


def round_measures(
    field: VelocityField,
    params: Params,
    pairs: Pair,
    *,
    targets: Array | np.ndarray | None = None,
    training_points: Array | np.ndarray | None = None,
    key: Key | None = None,
    euler_steps: Sequence[int] = EULER_STEPS,
    nodes: int = 32,
    chunk: int = CHUNK,
    **options: Unpack[SolverOptions],
) -> RoundMeasures:
    """Measures a field on the sources of pairs, in chunks.

    Args:
        field: velocity field of ONE example.
        params: its first argument.
        pairs: sources and what they were paired with, [n, *dims] each. Those that a round was trained on tell what it
            has learned of them; new ones of the same flow tell what it makes of sources that it has not seen.
        targets: [n, *dims], what the sources should go to: optimal-transport targets, or the pairs of another round.
        training_points: [m, *dims], what an end might be a copy of; needs `key`.
        key: of the bootstrap interval of the memorized fraction.
        euler_steps: numbers of Euler steps, none twice; may be empty.
        nodes: of the integral in `flows.straightness`.
        chunk: examples at once.
        **options: of `flows.transport`, for the accurate solve and the straightness; dopri5 at 1e-5 by default.

    Returns:
        RoundMeasures.

    Raises:
        ValueError: if shapes do not fit, a number of steps is no integer >= 1 or comes twice, or `training_points` come
            without a key; as `generate_pairs` and `metrics.memorized_fraction`.
        FloatingPointError: if a solve, one with few Euler steps too, does not stay finite.
    """
    _validate.same_shape("pairs.x0", pairs.x0, "pairs.x1", pairs.x1)
    if targets is not None:
        _validate.same_shape("targets", targets, "pairs.x1", pairs.x1)
    for steps in euler_steps:
        _validate.positive_integer("euler_steps", steps)
    if len(set(euler_steps)) < len(euler_steps):
        raise ValueError(f"euler_steps must hold no number twice, got {tuple(euler_steps)}")
    _validate.positive_integer("nodes", nodes)
    if training_points is not None and key is None:
        raise ValueError("key must be given with training_points, got None")
    ends = generate_pairs(field, params, pairs.x0, chunk=chunk, **options)
    static, partial = hashable(options), as_partial(field)
    straight = in_chunks(
        lambda part, _: _straightness(partial, params, part, nodes=nodes, options=static),
        np.asarray(ends.x0),
        chunk=chunk,
    ).astype(np.float64)
    found = []
    for steps in euler_steps:
        few: SolverOptions = {"solver": "euler", "steps": int(steps)}
        if "start" in options:
            few["start"] = options["start"]
        if "end" in options:
            few["end"] = options["end"]
        rough = generate_pairs(field, params, pairs.x0, chunk=chunk, **few)
        found.append(EulerError(int(steps), _distance(rough.x1, ends.x1)))
    memorized = None
    if training_points is not None and key is not None:
        memorized = metrics.memorized_fraction(ends.x1, training_points, key=key)
    return RoundMeasures(
        straightness=float(straight.mean()),
        straightness_error=float(straight.std(ddof=1) / np.sqrt(len(straight))) if len(straight) > 1 else float("nan"),
        pair=_distance(ends.x1, pairs.x1),
        target=None if targets is None else _distance(ends.x1, targets),
        euler=tuple(found),
        memorized=memorized,
        ends=ends.x1,
    )


def _distance(predicted: Array | np.ndarray, target: Array | np.ndarray) -> metrics.PairDistance:
    return metrics.pair_l2(jnp.asarray(predicted), jnp.asarray(target))


@functools.partial(jax.jit, static_argnames=("nodes", "options"))
def _straightness(
    field: Partial, params: Params, points: Array, *, nodes: int, options: tuple[tuple[str, Any], ...]
) -> Array:
    return jax.vmap(lambda x: flows.straightness(field, params, x, nodes=nodes, **dict(options)))(points)
