"""The data of a run: one mixture and one kernel for each dimension, and fresh samples of both laws for each repeat."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import metrics
from fvjax.data.mixtures import GaussianMixture, sphere_mixture
from fvjax.types import Array, Key, Pair

Row = dict[str, Any]

KERNEL_POINTS = 1000
"""Samples of the target law, twice, from whose median distance the widths of the kernel are taken."""

FLOOR_REPEATS = 200
"""Divisions of a sample for its floor; with 20 its tail, which is long in few dimensions, was missed."""

FLOOR_QUANTILES = (0.025, 0.975)


class Law(NamedTuple):
    """The target of one dimension, and how all its cells are measured.

    Attributes:
        mixture: of the target.
        bandwidths: of the kernel of every MMD in this dimension, from two samples of the target law.
        view: the first two principal directions of the law, [d, 2], on which samples are drawn.
        floor_key: of the floors.
        repeat_key: of the repeats.
    """

    mixture: GaussianMixture
    bandwidths: tuple[float, ...]
    view: np.ndarray
    floor_key: Key
    repeat_key: Key


class Samples(NamedTuple):
    """What all cells of one repeat share: every sigma has the same data, the same first parameters and batches.

    Attributes:
        pairs: the training pairs; independent, and fixed from then on.
        fresh: sources and targets that no training has seen, for the generalization; not paired in any way.
        spare: further targets, [2, ...]: as many as there are pairs, and as many as there are fresh ones.
        key: of the network, its batches, and of the bootstrap.
    """

    pairs: Pair
    fresh: Pair
    spare: tuple[Array, Array]
    key: Key


def law_of(dim: int, *, modes: int, radius: float, scale: float, seed: int) -> Law:
    """The mixture of one dimension, its kernel and its view; none of them depends on the other dimensions."""
    key = jax.random.fold_in(jax.random.key(seed), dim)
    law_key, kernel_key, floor_key, repeat_key = jax.random.split(key, 4)
    mixture = sphere_mixture(law_key, modes, dim, radius=radius, scale=scale)
    x = mixture.sample(kernel_key, 2 * KERNEL_POINTS)
    widths = metrics.median_bandwidths(x[:KERNEL_POINTS], x[KERNEL_POINTS:])
    _, directions = np.linalg.eigh(np.asarray(mixture.covariance, np.float64))
    return Law(mixture, tuple(widths.tolist()), directions[:, :-3:-1], floor_key, repeat_key)


def draw(law: Law, repeat: int, *, pairs: int, fresh: int) -> Samples:
    """The samples of one repeat."""
    source_key, target_key, key = jax.random.split(jax.random.fold_in(law.repeat_key, repeat), 3)
    ends = [pairs, pairs + fresh, 2 * pairs + fresh]
    x0 = jax.random.normal(source_key, (pairs + fresh, law.mixture.dim))
    x1, new, *spare = jnp.split(law.mixture.sample(target_key, 2 * (pairs + fresh)), ends)
    return Samples(Pair(x0[:pairs], x1), Pair(x0[pairs:], new), (spare[0], spare[1]), key)


def floor_rows(law: Law, *, pairs: int, fresh: int) -> list[Row]:
    """MMD^2 between two independent samples of the target law, of the sizes and with the kernel of the cells.

    `low` and `high` are the 2.5% and 97.5% quantiles over random divisions of one sample.
    """
    rows = []
    for place, (measure, n) in enumerate((("generalization", fresh), ("memorization", pairs))):
        draw_key, split_key = jax.random.split(jax.random.fold_in(law.floor_key, place))
        x = law.mixture.sample(draw_key, 2 * n)
        for biased in (False, True):
            found = metrics.mmd_floor(split_key, x, repeats=FLOOR_REPEATS, bandwidths=law.bandwidths, biased=biased)
            low, high = np.quantile(found.values, FLOOR_QUANTILES)
            name = f"{measure}_mmd" + ("_biased" if biased else "")
            named = {"map": "floor", "dim": law.mixture.dim, "measure": name, "n": n}
            rows.append(named | {"mean": found.mean, "low": float(low), "high": float(high)})
    return rows
