"""The one type that every source of optimal pairs returns."""

from collections.abc import Callable
from typing import NamedTuple

from fvjax.types import Array, Key, Pair


class OptimalPairs(NamedTuple):
    """Pairs whose optimal transport is known, cost |x0 - x1|^2.

    Of the three sources the law of x0 is a formula (`mix3tomix10`), a generator's (`celeba64`) or that of a finite set
    (`convex_pairs`, `discrete_pairs`); the pairs are optimal all the same, which `verify_optimal` looks at.

    Attributes:
        name: short name for results and file names, such as "mix3tomix10-d16".
        dims: shape of one example, of x0 as of x1.
        sample: (key, n) -> Pair of x0 and x1, each [n, *dims], a pure function of both arguments. Where `size` is a
            number it draws from the set without replacement, on the host: not under jit, and ValueError for n > size.
        transport: the optimal map x0 [*dims] -> x1 [*dims] of ONE example: vmap, jit, differentiate it. It follows
            the dtype of x0.
        cost: E|x0 - x1|^2 / 2: the squared Wasserstein-2 distance in the benchmark's convention, with the factor 1/2.
        target_variance: E|x1 - E x1|^2, summed over coordinates: the unit of L2-UVP.
        size: number of pairs in a finite set; None for a law that can be drawn from without end.
        source: where the pairs come from, and how `cost` and `target_variance` were obtained (exactly, or estimated
            from how many draws), for the record of a run.
    """

    name: str
    dims: tuple[int, ...]
    sample: Callable[[Key, int], Pair]
    transport: Callable[[Array], Array]
    cost: float
    target_variance: float
    size: int | None = None
    source: str = ""
