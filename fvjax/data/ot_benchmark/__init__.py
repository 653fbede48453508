"""Pairs whose optimal transport is known: the Wasserstein-2 benchmark, any image set, finite sets.

`mix3tomix10`, `celeba64`, `convex_pairs` and `discrete_pairs` return `OptimalPairs`; `verify_optimal` checks any pairs.
"""

from fvjax.data.ot_benchmark._celeba import celeba64 as celeba64
from fvjax.data.ot_benchmark._convex import convex_pairs as convex_pairs
from fvjax.data.ot_benchmark._discrete import OptimalityReport as OptimalityReport
from fvjax.data.ot_benchmark._discrete import discrete_pairs as discrete_pairs
from fvjax.data.ot_benchmark._discrete import optimal_assignment as optimal_assignment
from fvjax.data.ot_benchmark._discrete import verify_optimal as verify_optimal
from fvjax.data.ot_benchmark._mixtures import mix3tomix10 as mix3tomix10
from fvjax.data.ot_benchmark._types import OptimalPairs as OptimalPairs

__all__ = [
    "OptimalPairs",
    "OptimalityReport",
    "celeba64",
    "convex_pairs",
    "discrete_pairs",
    "mix3tomix10",
    "optimal_assignment",
    "verify_optimal",
]
