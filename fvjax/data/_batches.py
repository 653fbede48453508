"""Batches as a pure function of (seed, step): a resumed run needs no state of an iterator.

Position p = step * size + row counts examples since the start of the run; it belongs to epoch p // n and is entry
p mod n of that epoch's permutation. Permutations and flips come from raw streams of numpy's bit generators, whose
values numpy promises to keep (NEP 19; it does not promise that of `Generator.permutation`).
"""

import functools
from typing import Any

import numpy as np

from fvjax import _validate

_FLIP_STREAM = 1  # separates the flips' random numbers from those of the permutations
_WORDS = 4  # random words of one step of Philox's counter


def batch_indices(seed: int, step: int, size: int, n: int) -> np.ndarray:
    """Which of n examples are in the global batch number `step`, without replacement within an epoch.

    Every epoch visits each example exactly once, in an order of its own; a batch may straddle epochs (and hold an
    example twice then), and `size` may exceed `n`.

    Args:
        seed: integer >= 0.
        step: number of the batch, integer >= 0.
        size: examples in a batch over all processes, integer >= 1.
        n: examples in the data set, integer >= 1.

    Returns:
        Indices in [0, n), int64 [size].

    Raises:
        ValueError: if an argument is not such an integer.
    """
    _nonnegative_integer("seed", seed)
    _nonnegative_integer("step", step)
    _validate.positive_integer("size", size)
    _validate.positive_integer("n", n)
    start, stop = int(step) * int(size), (int(step) + 1) * int(size)
    parts = []
    for epoch in range(start // n, (stop - 1) // n + 1):
        first = epoch * n
        parts.append(_permutation(int(seed), epoch, int(n))[max(start - first, 0) : stop - first])
    return np.concatenate(parts)


def batch(
    images: np.ndarray, *, seed: int, step: int, size: int, flip: bool = False, rows: slice = slice(None)
) -> np.ndarray:
    """The examples `rows` of the global batch number `step`, scaled to [-1, 1]: a pure function of (seed, step).

    Pixels become u / 127.5 - 1. With `flip` each example is mirrored left to right with probability 1/2, by a random
    bit of (seed, position in the run), so that it does not matter how a batch is cut among processes:
    `batch(...)[rows]` equals `batch(..., rows=rows)`, which touches only those images.

    Args:
        images: uint8 [n, h, w, c], in memory or memory-mapped.
        seed: integer >= 0.
        step: number of the batch, integer >= 0.
        size: examples in a batch over all processes, integer >= 1.
        flip: whether to mirror images at random.
        rows: the part of the batch that this process feeds.

    Returns:
        float32 [rows, h, w, c] in [-1, 1].

    Raises:
        ValueError: if `images` is not uint8 [n, h, w, c] with n >= 1, `rows` not a slice, or an integer out of range.
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 [n, h, w, c], got {images.dtype} {images.shape}")
    if not isinstance(rows, slice):
        raise ValueError(f"rows must be a slice of the batch, got {rows!r}")
    indices = batch_indices(seed, step, size, len(images))[rows]
    picked = np.asarray(images)[indices]  # a plain array: a memory map's own indexing is slower
    if flip:
        mirrored = _flips(int(seed), int(step) * int(size), int(size))[rows]
        picked[mirrored] = picked[mirrored, :, ::-1]
    scaled = np.divide(picked, np.float32(127.5), dtype=np.float32)
    scaled -= 1
    return scaled


def to_uint8(x: Any) -> np.ndarray:
    """Images in [-1, 1] as uint8: round(127.5 (x + 1)), clipped to [0, 255]; undoes the scaling of `batch` exactly.

    Args:
        x: floating point, any shape; values outside of [-1, 1] are clipped, infinities too.

    Returns:
        uint8, the shape of x.

    Raises:
        ValueError: if `x` is not floating point or holds nan.
    """
    _validate.floating("x", x)
    values = np.asarray(x).astype(np.float32)
    unknown = np.count_nonzero(np.isnan(values))
    if unknown:
        raise ValueError(f"x must not hold nan, got {unknown} of {values.size} entries that are")
    values = np.clip(values, -1, 1)
    return np.rint((values + 1) * np.float32(127.5)).astype(np.uint8)


# A batch needs the permutation of its epoch, or of two; the training and the test set, or two runs, may alternate.
@functools.lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of the n examples in one epoch, int64 [n]: the ranks of n random 64-bit words."""
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(words, kind="stable")


@functools.lru_cache(maxsize=8)
def _flip_key(seed: int) -> np.ndarray:
    """Key of the counter-based generator of the flips."""
    return np.random.SeedSequence(seed, spawn_key=(_FLIP_STREAM,)).generate_state(2, np.uint64)


def _flips(seed: int, position: int, count: int) -> np.ndarray:
    """Random bits of the positions [position, position + count), bool [count], each a function of (seed, position)."""
    block, offset = divmod(position, _WORDS)
    words = np.random.Philox(key=_flip_key(seed), counter=block).random_raw(offset + count)[offset:]
    return (words >> np.uint64(63)).astype(bool)


def _nonnegative_integer(name: str, value: Any) -> None:
    """Refuses anything but an integer >= 0 (a bool is not an integer here)."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or value < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
