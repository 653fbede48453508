"""The problems: training pairs, what their sources should go to, and held-out samples; examples are vectors."""

import typing
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import couplings, data
from fvjax.data import ot_benchmark
from fvjax.types import Array, Key, Pair

Name = Literal["gaussian", "mixture", "digits", "mix3tomix10"]
NAMES: tuple[Name, ...] = typing.get_args(Name)
BRIDGE_SIGMAS = {"gaussian": (1.0,), "mixture": (1.0,), "digits": (0.5, 2.0), "mix3tomix10": (2.0,)}
"""Noise of the bridges by default, in units of x. On digits one far below, one far above the critical noise."""

PAIRS = {"gaussian": 10_000, "mixture": 1000, "digits": 100, "mix3tomix10": 1000}
STEPS = {"gaussian": 1500, "mixture": 3000, "digits": 4000, "mix3tomix10": 4000}
"""Training steps of a network by default: on digits as many as it takes to memorize the pairs if that is possible."""

MIX_DIM = 16
MIXTURE_DIM, MODES, RADIUS, SCALE = 3, 8, 5.0, 0.5
OFFSET = 0.1
"""N(-0.1, I) to N(0.1, I): the Gaussian test of Shi et al. 2023."""


class Problem(NamedTuple):
    """One problem.

    Attributes:
        name: of the problem, with its dimension where that is an option.
        kind: one of `NAMES`.
        pairs: the training pairs, FIXED at random: sources and targets [n, d].
        optimal: optimal targets of these sources, [n, d]; None where they are not known.
        held_out: sources that no training sees, and their optimal targets, or new samples of the targets' law, [m, d].
        reference: further samples of the targets' law, [m, d].
        key: of everything that is drawn for it.
    """

    name: str
    kind: Name
    pairs: Pair
    optimal: Array | None
    held_out: Pair
    reference: Array
    key: Key

    @property
    def dim(self) -> int:
        """The dimension d."""
        return int(self.pairs.x0.shape[1])


def make_problem(
    kind: Name, *, dim: int | None, pairs: int | None, held_out: int, data_dir: Path | None, seed: int
) -> Problem:
    """Draws a problem: a function of its arguments.

    Args:
        kind: one of `NAMES`.
        dim: of the Gaussian test.
        pairs: number of training pairs; None is `PAIRS`.
        held_out: number of held-out sources; fewer where there are no more images.
        data_dir: of Mix3ToMix10.
        seed: of all problems.

    Raises:
        DataError: if the data cannot be read.
        ValueError: if there are fewer images than pairs.
    """
    name = f"gaussian{dim}" if kind == "gaussian" else kind
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()) % 2**31)
    data_key, own_key = jax.random.split(key)
    n = PAIRS[kind] if pairs is None else pairs
    if kind == "gaussian":
        return _gaussian(name, data_key, own_key, sizes=(n, held_out, int(dim or 0)))
    if kind == "mixture":
        return _mixture(name, data_key, own_key, sizes=(n, held_out))
    if kind == "digits":
        train, test = (ot_benchmark.convex_pairs(data.load("digits"), split=split) for split in ("train", "test"))
    else:
        train = test = ot_benchmark.mix3tomix10(data_dir, MIX_DIM)  # type: ignore[arg-type]  # checked before
    return _optimal(name, kind, (train, test), (data_key, own_key), sizes=(n, held_out))


def _gaussian(name: str, key: Key, own: Key, *, sizes: tuple[int, int, int]) -> Problem:
    n, m, dim = sizes
    keys = jax.random.split(key, 4)
    x0, x1 = (jax.random.normal(k, (n, dim)) for k in keys[:2])
    new, reference = (jax.random.normal(k, (m, dim)) for k in keys[2:])
    pairs, shift = Pair(x0 - OFFSET, x1 + OFFSET), 2 * OFFSET
    return Problem(name, "gaussian", pairs, pairs.x0 + shift, Pair(new - OFFSET, new + OFFSET), reference + OFFSET, own)


def _mixture(name: str, key: Key, own: Key, *, sizes: tuple[int, int]) -> Problem:
    n, m = sizes
    keys = jax.random.split(key, 6)
    law = data.sphere_mixture(keys[0], MODES, MIXTURE_DIM, radius=RADIUS, scale=SCALE)
    pairs = Pair(jax.random.normal(keys[1], (n, MIXTURE_DIM)), law.sample(keys[2], n))
    held_out = Pair(jax.random.normal(keys[3], (m, MIXTURE_DIM)), law.sample(keys[4], m))
    return Problem(name, "mixture", pairs, None, held_out, law.sample(keys[5], m), own)


def _optimal(
    name: str,
    kind: Name,
    laws: tuple[ot_benchmark.OptimalPairs, ot_benchmark.OptimalPairs],
    keys: tuple[Key, Key],
    *,
    sizes: tuple[int, int],
) -> Problem:
    """Optimal pairs, deranged for training: every source is paired with the wrong target."""
    (train, test), (n, m) = laws, sizes
    if test.size is not None:
        m = min(m, test.size // 2)
    train_key, test_key, shuffle_key = jax.random.split(keys[0], 3)
    optimal, new = (_flat(pairs) for pairs in (train.sample(train_key, n), test.sample(test_key, 2 * m)))
    shuffled = couplings.shuffled(shuffle_key, *optimal)
    held_out = Pair(new.x0[:m], new.x1[:m])
    return Problem(name, kind, shuffled, optimal.x1, held_out, new.x1[m:], keys[1])


def _flat(pairs: Pair) -> Pair:
    x0, x1 = (jnp.asarray(np.asarray(x).reshape(len(x), -1)) for x in pairs)
    return Pair(x0, x1)
