"""Finite sets: their exact optimal assignment, and a check of whether given pairs are optimal."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fvjax import _validate
from fvjax.data.ot_benchmark import _sampling
from fvjax.data.ot_benchmark._types import OptimalPairs
from fvjax.types import Array, Key, Pair

MAX_BYTES = 2**32
"""Default limit of the cost matrix, 8 n^2 bytes: n = 23,170."""
_ASSIGNED = 2000  # examples, at most, whose assignment `verify_optimal` solves
_ROWS = 512  # of a matrix of products that are held at once
_FEATURES = 1024  # coordinates that are converted to float64 at once
_CYCLE_CHUNK = 64


def discrete_pairs(x0: ArrayLike, x1: ArrayLike, *, max_bytes: int = MAX_BYTES) -> OptimalPairs:
    """Two finite sets of n points, paired by their exact optimal assignment, cost |x0 - x1|^2.

    ========================  ========================================================================================
    x0 of the set             `transport` returns its x1, of equal ones that of the first
    any other x0              nan: the optimal map is known on the set, and nowhere else. It has no derivative
    ties                      one of the optimal assignments; all have the same cost
    ========================  ========================================================================================

    Args:
        x0: source samples, floating point [n, *dims], n >= 1.
        x1: target samples, [n, *dims], of the same dtype.
        max_bytes: limit of the cost matrix, see `optimal_assignment`.

    Returns:
        OptimalPairs of size n and of the dtype of x0: `sample` draws pairs without replacement, on the host; `cost`
        and `target_variance` are those of the set, exactly. `transport` takes n d operations.

    Raises:
        ValueError: what `optimal_assignment` raises, or if x0 or x1 is not floating point, or their dtypes differ.
    """
    _validate.floating("x0", x0)
    _validate.floating("x1", x1)
    _validate.same_dtype("x0", x0, "x1", x1)
    source = np.asarray(x0)
    target = np.asarray(x1)[optimal_assignment(x0, x1, max_bytes=max_bytes)]
    difference = target.astype(np.float64) - source
    dims = source.shape[1:]
    return OptimalPairs(
        name="discrete",
        dims=dims,
        sample=functools.partial(_sample, source, target),
        transport=jax.tree_util.Partial(_look_up, jnp.asarray(source), jnp.asarray(target)),
        cost=float(0.5 * np.square(difference).sum() / len(source)),
        target_variance=float(target.astype(np.float64).var(0).sum()),
        size=len(source),
        source=f"exact assignment of two sets of {len(source)}; cost and target variance exact",
    )


def optimal_assignment(x0: ArrayLike, x1: ArrayLike, *, max_bytes: int = MAX_BYTES) -> np.ndarray:
    """The permutation s that minimises sum_i |x0_i - x1_s(i)|^2 over all n! of them, on the host (examples flattened).

    By scipy's `linear_sum_assignment`, O(n^3). Of the dependencies it is the fastest (`benchmarks/assignment.py`, two
    busy cores): n = 1,000, d = 2 in 0.08 s, where ott-jax's Hungarian algorithm, which `fvjax.couplings.assignment`
    uses within jit, took 16 times as long; n = 5,000 in 6 s (d = 2) and 96 s (d = 12,288, mostly the cost matrix),
    where that would take more than ten times as long. Costs are float64 of both sets less their own means, which
    changes every assignment's cost by the same number: far from the origin nothing is lost to cancellation.

    Args:
        x0: source samples, [n, *dims], n >= 1.
        x1: target samples, [n, *dims].
        max_bytes: where the cost matrix, 8 n^2 bytes, would take more it is refused. The peak is twice that.

    Returns:
        Indices into x1, int[n].

    Raises:
        ValueError: if the shapes of x0 and x1 differ, n = 0, an entry is not finite, or the cost matrix is too large.

    Source: Crouse 2016, through scipy.
    """
    from scipy.optimize import linear_sum_assignment

    sets = _Sets(*_flat(x0, x1))
    _validate.positive_integer("max_bytes", max_bytes)
    size = len(sets.x0)
    needed = 8 * size**2
    if needed > max_bytes:
        raise ValueError(
            f"max_bytes must be at least {needed}, 8 bytes for each of {size}^2 costs, got {max_bytes}: take fewer"
            " examples, raise it, or couple batches with fvjax.couplings.minibatch_ot"
        )
    permutation: np.ndarray = linear_sum_assignment(sets.costs(np.arange(size)))[1]
    return permutation


class OptimalityReport(NamedTuple):
    """What `verify_optimal` looked at, and what it found.

    A cycle i_1, ..., i_m gives each x0 the x1 of the next pair; its gain is the fall of sum |x0 - x1|^2 by that. Gains
    are per pair of the cycle, and relative to 2 |x0 - E x0| |x1 - E x1| (root mean squares over the set).

    Attributes:
        optimal: whether no gain is above `tolerance`.
        largest_gain: of all that was looked at; <= 0, up to rounding, for optimal pairs; -inf where there was nothing.
        tolerance: what was forgiven to rounding, and to ties.
        cycle: indices of the cycle of the largest gain.
        size: number of pairs n.
        two_cycles: number of 2-cycles, all n (n - 1) / 2 of them.
        longer_cycles: number of random cycles of 3 to `longest` pairs.
        longest: of the random cycles.
        assigned: number of pairs whose exact assignment was compared with the identity; 0 if none.
    """

    optimal: bool
    largest_gain: float
    tolerance: float
    cycle: tuple[int, ...]
    size: int
    two_cycles: int
    longer_cycles: int
    longest: int
    assigned: int


def verify_optimal(
    pairs: Pair | OptimalPairs,
    *,
    key: Key | None = None,
    n: int = 1000,
    cycles: int = 1000,
    longest: int = 6,
    tolerance: float | None = None,
) -> OptimalityReport:
    r"""Whether pairs are optimally coupled for the cost |x0 - x1|^2: cyclical monotonicity, and the exact assignment.

    Pairs are optimal if and only if no cycle i_1, ..., i_m of them gains:

        gain = 2 sum_k x0_(i_k) . (x1_(i_(k+1)) - x1_(i_k))  <=  0,     i_(m+1) = i_1.

    Looked at are all 2-cycles, `cycles` random ones of each length from 3 to `longest`, and the cycles by which the
    exact assignment of the pairs differs from the identity: for n <= 2,000 of all pairs, which decides the question,
    else of 2,000 random ones, which does not (a part of optimal pairs is optimal, the reverse need not hold).
    Arithmetic is float64 on the host, of sets less their means.

    ======================  ==========================================================================================
    float32 pairs           rounding of x0 and x1 alone makes gains of some 1e-7 between near neighbours: `tolerance`
    ties (equal x0 or x1)   gain 0: optimal
    n = 1                   optimal; nothing to look at
    x0 or x1 all equal      every coupling is optimal
    ======================  ==========================================================================================

    Args:
        pairs: aligned x0 and x1, each [n, *dims]; or OptimalPairs, of which `n` (or all, if there are fewer) are drawn.
        key: of the draws; None means `jax.random.key(0)`.
        n: pairs to draw from OptimalPairs.
        cycles: random cycles of each length.
        longest: their largest length, >= 2 (2: none).
        tolerance: gain (relative, see OptimalityReport) that is still called optimal; None means 100 machine epsilons
            of the coarser dtype of x0 and x1, times their distance from the origin in units of their spread (rounding
            is relative to the former, the gains to the latter).

    Returns:
        OptimalityReport.

    Raises:
        ValueError: if the shapes of x0 and x1 differ, there is no pair, an entry is not finite or an option is out of
            range.

    Source: Rockafellar 1966; Villani 2009, theorem 5.10.
    """
    for name, value in (("n", n), ("cycles", cycles), ("longest", longest)):
        _validate.positive_integer(name, value)
    if longest < 2:
        raise ValueError(f"longest must be an integer >= 2, got {longest}")
    key = jax.random.key(0) if key is None else key
    draw_key, cycle_key, subset_key = jax.random.split(key, 3)
    if isinstance(pairs, OptimalPairs):
        pairs = pairs.sample(draw_key, n if pairs.size is None else min(n, pairs.size))
    x0, x1 = _flat(pairs.x0, pairs.x1)
    sets = _Sets(x0, x1)
    if tolerance is None:
        tolerance = 100 * max(float(jnp.finfo(x.dtype).eps) for x in (x0, x1)) * sets.remoteness
    _validate.nonnegative("tolerance", tolerance)
    size = len(x0)
    subset = np.sort(_sampling.without_replacement(subset_key, min(size, _ASSIGNED), size))
    found = [_best_two_cycle(sets), _best_random_cycle(sets, cycle_key, cycles, longest), _best_exchange(sets, subset)]
    largest, cycle = max(found, key=_gain)
    return OptimalityReport(
        optimal=bool(largest <= tolerance),
        largest_gain=float(largest),
        tolerance=float(tolerance),
        cycle=tuple(int(index) for index in cycle),
        size=size,
        two_cycles=size * (size - 1) // 2,
        longer_cycles=cycles * (longest - 2),
        longest=longest,
        assigned=len(subset),
    )


_Found = tuple[float, Any]  # a relative gain, and the indices of its cycle
_NOTHING: _Found = (-np.inf, ())


class _Sets:
    """Both sets, [n, d] as they came, and what float64 arithmetic on them needs: blocks of them are converted."""

    def __init__(self, x0: np.ndarray, x1: np.ndarray) -> None:
        self.x0, self.x1 = x0, x1
        self.mean0, self.mean1 = (x.mean(0, dtype=np.float64) for x in (x0, x1))
        self.squares0, self.squares1 = _squares(x0, self.mean0), _squares(x1, self.mean1)
        spreads = [float(np.sqrt(squares.mean())) for squares in (self.squares0, self.squares1)]
        sizes = [float(np.hypot(s, np.linalg.norm(m))) for s, m in zip(spreads, (self.mean0, self.mean1), strict=True)]
        distinct = all(s > 1e3 * np.finfo(float).eps * size for s, size in zip(spreads, sizes, strict=True))
        # Where all points of a set are equal, every gain is 0: what is left of them is the rounding of the mean.
        self.unit = 2 * spreads[0] * spreads[1] if distinct else np.inf
        self.remoteness = 0.5 * (sizes[0] / spreads[0] + sizes[1] / spreads[1]) if distinct else 1.0

    def products(self, rows0: np.ndarray, rows1: np.ndarray) -> np.ndarray:
        """Scalar products of some of x0 with some of x1, each less its mean, [len(rows0), len(rows1)]."""
        total = np.zeros((len(rows0), len(rows1)))
        for start in range(0, len(self.mean0), _FEATURES):
            block = slice(start, start + _FEATURES)
            total += (self.x0[rows0, block] - self.mean0[block]) @ (self.x1[rows1, block] - self.mean1[block]).T
        return total

    def costs(self, rows: np.ndarray) -> np.ndarray:
        """Squared distances of some of x0 from the same of x1, each less its mean, [len(rows), len(rows)]."""
        costs = self.products(rows, rows)
        costs *= -2
        costs += self.squares0[rows, None]
        costs += self.squares1[rows]
        return costs

    def relative(self, gain: Any, length: int) -> Any:
        """Gains of cycles of that length, given as the fall of the sum of squared distances."""
        return gain / (length * self.unit)


def _squares(x: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """|x_i - mean|^2, [n]."""
    blocks = (slice(start, start + _FEATURES) for start in range(0, len(mean), _FEATURES))
    return sum((np.square(x[:, block] - mean[block]).sum(1) for block in blocks), np.zeros(len(x)))


def _flat(x0: ArrayLike, x1: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both sets on the host as [n, d], floating point, checked."""
    _validate.same_shape("x0", x0, "x1", x1)
    if np.ndim(x0) < 1 or np.size(x0) == 0:
        raise ValueError(f"x0 and x1 must be [n, *dims] with at least one example, got shape {np.shape(x0)}")
    _validate.finite("x0", x0)
    _validate.finite("x1", x1)
    flat = [np.asarray(x).reshape(np.shape(x)[0], -1) for x in (x0, x1)]
    x0, x1 = (x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(np.float64) for x in flat)
    return x0, x1


def _sample(source: np.ndarray, target: np.ndarray, key: Key, n: int) -> Pair:
    """N pairs without replacement; the first two arguments are bound by a partial."""
    chosen = _sampling.without_replacement(key, n, len(source))
    return Pair(jnp.asarray(source[chosen]), jnp.asarray(target[chosen]))


def _look_up(source: Array, target: Array, x0: ArrayLike) -> Array:
    """The partner of x0 [*dims] in the set, nan if it has none."""
    x0 = jnp.asarray(x0)
    _validate.floating("x0", x0)
    _validate.shape("x0", x0, source.shape[1:])
    equal = jnp.all(source.astype(x0.dtype) == x0, axis=tuple(range(1, source.ndim)))
    return jnp.where(equal.any(), target[jnp.argmax(equal)].astype(x0.dtype), jnp.nan)


def _blocks(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _best_two_cycle(sets: _Sets) -> _Found:
    """Of all 2-cycles the one of the largest gain."""
    everyone = np.arange(len(sets.x0))
    # |x0 - x1|^2 of the pairs without their squares, which cancel.
    own = np.concatenate([np.diagonal(sets.products(rows, rows)) for rows in _blocks(everyone, _CYCLE_CHUNK)])
    best = _NOTHING
    for rows in _blocks(everyone, _ROWS):
        later = everyone[rows[0] + 1 :]
        if len(later) == 0:
            break
        gain = sets.products(rows, later) + sets.products(later, rows).T - own[rows, None] - own[later]
        gain[later <= rows[:, None]] = -np.inf
        row, column = np.unravel_index(np.argmax(gain), gain.shape)
        best = max(best, (sets.relative(2 * gain[row, column], 2), (rows[row], later[column])), key=_gain)
    return best


def _best_random_cycle(sets: _Sets, key: Key, cycles: int, longest: int) -> _Found:
    """Of `cycles` random ones of each length from 3 to `longest`; an index may come twice."""
    best = _NOTHING
    for length in range(3, longest + 1):
        drawn = _sampling.integers(jax.random.fold_in(key, length), (cycles, length), len(sets.x0))
        for cycle in _blocks(drawn, _CYCLE_CHUNK):
            gain = np.zeros(len(cycle))
            for start in range(0, len(sets.mean0), _FEATURES):
                block = slice(start, start + _FEATURES)
                x0, x1 = sets.x0[cycle, block] - sets.mean0[block], sets.x1[cycle, block] - sets.mean1[block]
                gain += 2 * np.einsum("nkd,nkd->n", x0, np.roll(x1, -1, axis=1) - x1)
            index = int(np.argmax(gain))
            best = max(best, (sets.relative(gain[index], length), cycle[index]), key=_gain)
    return best


def _best_exchange(sets: _Sets, subset: np.ndarray) -> _Found:
    """Of the cycles by which the exact assignment of a subset differs from the identity."""
    from scipy.optimize import linear_sum_assignment

    costs = sets.costs(subset)
    permutation = linear_sum_assignment(costs)[1]
    gains = costs.diagonal() - costs[np.arange(len(subset)), permutation]
    best, seen = _NOTHING, np.zeros(len(subset), bool)
    for first in np.flatnonzero(permutation != np.arange(len(subset))):
        cycle: list[int] = []
        while not seen[first]:
            seen[first] = True
            cycle.append(int(first))
            first = permutation[first]  # noqa: PLW2901
        if cycle:
            best = max(best, (sets.relative(gains[cycle].sum(), len(cycle)), subset[cycle]), key=_gain)
    return best


def _gain(found: _Found) -> float:
    return found[0]
