"""What the rounds of ReFlow have changed: straightness, samples by few steps, kept pairs, copies of images."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cifar10 import evaluation
from experiments.cifar10.rounds import CHUNK, Finished, ends_of, first_pairs, paths_of, sources
from experiments.cifar10.settings import Settings
from fvjax import data, metrics, rectification
from fvjax.types import Array, Key, Model, Pair, Params

MEASURED = 1000
"""At most so many new sources, and pairs of the training, give the measures of a round."""

EULER = (1, 2, 4, 8, 16, 32)
"""Numbers of steps whose samples are compared with an accurate solve and with the images."""
SMOKE_EULER = (1, 2)

Row = dict[str, Any]


def round_rows(
    settings: Settings,
    model: Model,
    finished: Sequence[Finished],
    images: data.Images,
    *,
    known: Mapping[str, metrics.FeatureMoments],
    features: data.features.Features,
    smoke: bool,
) -> list[Row]:
    """One row a round, all of them on the same new noise.

    Args:
        settings: of the run.
        model: the network.
        finished: all rounds, the first one included.
        images: both splits.
        known: moments of the features of "train" and "test".
        features: what the distances are between.
        smoke: whether fewer numbers of steps do.

    Returns:
        Rows {round, straightness, straightness_error, memorized, memorized_low, memorized_high, euler, loss_pairs,
        pair_l2_train, pair_l2_held_out}. `euler` lists {steps, error (mean L2 to the accurate solve), distance_train,
        distance_test}. The last three are None in round 1: mean loss on the round's pairs, mean L2 of the flow's ends
        to its pairs, and on new noise to the ends of the round before. Accurate: dopri5 at the run's tolerance.

    Raises:
        FloatingPointError: if a sample is not finite.
    """
    measure_key = jax.random.fold_in(jax.random.key(settings.seed), 14)
    count = min(settings.samples, MEASURED)
    x0 = sources(measure_key, dims=settings.dims, count=count)
    accurate: dict[str, Any] = {"solver": "dopri5", "rtol": settings.tolerance, "atol": settings.tolerance}
    rows: list[Row] = []
    before: Array | None = None
    for done in finished:
        found = rectification.round_measures(
            model.apply,
            done.params,
            Pair(x0, x0 if before is None else before),
            euler_steps=(),
            nodes=8,
            chunk=CHUNK,
            **accurate,
        )
        ends = found.ends
        copies = metrics.memorized_fraction(data.to_uint8(ends), images.train, key=measure_key)
        row: Row = {
            "round": done.index,
            "straightness": found.straightness,
            "straightness_error": found.straightness_error,
            "memorized": copies.fraction,
            "memorized_low": copies.low,
            "memorized_high": copies.high,
        }
        row |= {"loss_pairs": None, "pair_l2_train": None, "pair_l2_held_out": None}
        if done.pairs is not None and before is not None:
            row |= _kept(settings, model, done.params, done.pairs, key=measure_key, options=accurate)
            row["pair_l2_held_out"] = float(found.pair.mean)
        row["euler"] = [
            {"steps": steps} | _few_steps(model, done.params, x0, steps, accurate=ends, known=known, features=features)
            for steps in (SMOKE_EULER if smoke else EULER)
        ]
        rows.append(row)
        before = ends
    return rows


def _kept(settings: Settings, model: Model, params: Params, pairs: Pair, *, key: Key, options: dict[str, Any]) -> Row:
    """Loss on the pairs of a round's training, and distance of its flow to them."""
    some = first_pairs(pairs, MEASURED)
    losses = evaluation.losses(model.apply, params, paths_of(settings, some, key))
    return {
        "loss_pairs": float(np.mean(np.asarray(losses, np.float64))),
        "pair_l2_train": _distance(ends_of(model, params, some.x0, **options), some.x1),
    }


def _few_steps(
    model: Model,
    params: Params,
    x0: Array,
    steps: int,
    *,
    accurate: Array,
    known: Mapping[str, metrics.FeatureMoments],
    features: data.features.Features,
) -> Row:
    """Error and distances of samples by Euler with few steps."""
    ends = ends_of(model, params, x0, solver="euler", steps=steps)
    moments = evaluation.moments_of(features, data.to_uint8(ends))
    distances = {f"distance_{split}": metrics.frechet_distance(moments, other) for split, other in known.items()}
    return {"error": _distance(ends, accurate), **distances}


def _distance(predicted: Array, target: Array) -> float:
    return float(metrics.pair_l2(jnp.asarray(predicted), jnp.asarray(target)).mean)
