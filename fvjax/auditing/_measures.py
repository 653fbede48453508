"""One pass over the pairs, and what it says of where the sources arrived."""

import math
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import NamedTuple

import numpy as np

from fvjax.auditing._inputs import Given
from fvjax.auditing._minimiser import Minimiser
from fvjax.auditing._nearest import Search, Targets
from fvjax.auditing._noise import Spacing
from fvjax.auditing._solvers import Solver
from fvjax.auditing._statistics import number, share_of, summary, wilson
from fvjax.auditing._types import (
    Arrivals,
    OptimalTransport,
    Share,
    SolverRow,
    SolverSensitivity,
)

COARSE = 0.01
"""Share of the targets among which an own target counts as found when the nearest one is too fine a question."""

RATIO = 1 / 3
"""A sample is a copy if its nearest training target is closer than this times the second nearest."""

SPACED = 128
"""Training targets whose distance to the nearest other one is measured."""


class Found(NamedTuple):
    """Of some arrivals [q]: distances to the own target and the nearest other, and how many are nearer than the own."""

    to_own: np.ndarray
    to_other: np.ndarray
    nearer: np.ndarray
    finite: np.ndarray
    targets: int

    def part(self, rows: slice) -> "Found":
        """Some of the arrivals."""
        return Found(self.to_own[rows], self.to_other[rows], self.nearer[rows], self.finite[rows], self.targets)

    @property
    def returned(self) -> np.ndarray:
        """Whether no other target is nearer than the own one."""
        with np.errstate(invalid="ignore"):
            return self.finite & (self.to_own <= self.to_other)

    @property
    def among_nearest(self) -> np.ndarray:
        """Whether the own target is among the nearest COARSE of all, the nearest one at least."""
        return self.returned | (self.finite & (self.nearer < max(1, math.ceil(COARSE * self.targets))))


class Passed(NamedTuple):
    """What one pass over the pairs gives.

    `training` by solver, `copies` [q, 2] the two nearest training targets of the held-out (else the training) arrivals,
    `chance` the same of the held-out targets themselves, `held_out` among training and held-out targets.
    """

    training: Mapping[Solver, Found]
    held_out: Found | None
    copies: np.ndarray
    chance: np.ndarray | None
    target_spacing: float | None
    spread: float
    distinct: int
    midpoint_spacing: float
    velocities: np.ndarray


class Queries(NamedTuple):
    """Arrivals by solver with the own targets; arrivals of held-out sources with theirs (themselves without any)."""

    arrived: Mapping[Solver, np.ndarray]
    own: np.ndarray
    held_out: np.ndarray | None
    held_out_own: np.ndarray | None


def passed(
    given: Given,
    queries: Queries,
    *,
    minimiser: Minimiser,
    spacing: Spacing,
    tell: Callable[[float], None],
) -> Passed:
    """Reads every pair once."""
    centre = queries.own.reshape(len(queries.own), -1).mean(0, dtype=np.float64)
    targets = Targets(centre)
    targets.begin(given.x1)
    spaced = queries.own[:SPACED]
    points = np.concatenate([*queries.arrived.values(), spaced])
    own = np.concatenate([queries.own] * len(queries.arrived) + [spaced])
    training = Search(points, own, centre)
    others = _held_out_search(queries, centre)
    sums = np.zeros((2, centre.size))
    for start, x0, x1 in given.chunks():
        chunk = targets.chunk(start, x1)
        for search in (training, others):
            if search is not None:
                search.feed(chunk)
        minimiser.feed(x0, x1, size=given.x0.chunk)
        spacing.feed(start, x0, x1)
        centred = x1.reshape(len(x1), -1).astype(np.float64) - centre
        sums += np.stack([centred.sum(0), (centred**2).sum(0)])
        tell((start + len(x0)) / len(given.x0))
    nearest = training.nearest_others(targets)
    found = _found(training, nearest[:, 0], targets.distinct)
    count = len(queries.own)
    by_solver = {name: found.part(slice(k * count, (k + 1) * count)) for k, name in enumerate(queries.arrived)}
    to_next = nearest[len(queries.arrived) * count :, 0]
    distinct = targets.distinct
    mean = sums[0] / len(given.x1)
    copies = training.nearest_two(nearest)[:count]
    chance = held_out = None
    if others is not None:
        two = others.nearest_two(others.nearest_others(targets))
        held = len(queries.held_out) if queries.held_out is not None else 0
        copies, chance = two[:held], two[held:] if len(two) > held else None
        held_out = _held_out(others, targets, given, held)
    return Passed(
        training=by_solver,
        held_out=held_out,
        copies=copies,
        chance=chance,
        target_spacing=number(np.median(to_next)),
        spread=float(np.sqrt(np.sum(sums[1] / len(given.x1) - mean**2))),
        distinct=distinct,
        midpoint_spacing=spacing.median(),
        velocities=minimiser.velocities(),
    )


def _held_out_search(queries: Queries, centre: np.ndarray) -> Search | None:
    """Arrivals of held-out sources, then the held-out targets themselves, where there are any."""
    if queries.held_out is None:
        return None
    if queries.held_out_own is None:
        return Search(queries.held_out, queries.held_out, centre)
    own = queries.held_out_own
    return Search(np.concatenate([queries.held_out, own]), np.concatenate([own, own]), centre)


def _held_out(search: Search, targets: Targets, given: Given, count: int) -> Found | None:
    """Of held-out pairs: their targets become candidates, too."""
    rows = given.held_out_targets
    if rows is None:
        return None
    targets.begin(rows)
    for start in range(0, len(rows), rows.chunk):
        search.feed(targets.chunk(start, rows.read(start, min(start + rows.chunk, len(rows)))))
    return _found(search, search.nearest_others(targets)[:, 0], targets.distinct).part(slice(0, count))


def _found(search: Search, to_other: np.ndarray, count: int) -> Found:
    return Found(search.to_own, to_other, search.nearer, search.finite, count)


def arrivals(found: Found, level: float) -> Arrivals:
    """Shares and distances."""
    return Arrivals(
        returned=share_of(found.returned, level),
        among_nearest=share_of(found.among_nearest, level),
        to_own=summary(found.to_own),
        to_other=summary(found.to_other),
        targets=found.targets,
        failed=int(np.count_nonzero(~found.finite)),
    )


def copied(nearest_two: np.ndarray, level: float) -> Share:
    """The share of copies among samples with these two nearest training targets; not finite ones are none."""
    with np.errstate(invalid="ignore"):
        return share_of(nearest_two[:, 0] < RATIO * nearest_two[:, 1], level)


def chance_of_copy(nearest_two: np.ndarray | None, dim: int, level: float) -> tuple[Share, str]:
    """The share of new data that would count as copies, and where the number is from.

    Without held-out targets it is that of a Poisson process, of which the nearest point is closer than r times the
    second nearest with probability r^d.
    """
    if nearest_two is not None:
        return copied(nearest_two, level), "held-out targets"
    chance = RATIO**dim
    return Share(chance, chance, chance, 0), "ratio^d"


def solver_sensitivity(
    found: Mapping[Solver, Found], arrived: Mapping[Solver, np.ndarray], level: float
) -> SolverSensitivity:
    """Returned share, pair L2 and disagreement of the solvers; the first one is the chosen one."""
    rows = []
    for k, (solver, one) in enumerate(found.items()):
        distance = summary(one.to_own).mean
        failed = int(np.count_nonzero(~one.finite))
        rows.append(SolverRow(solver.name, *solver, k == 0, share_of(one.returned, level), distance, failed))
    ends = [x.reshape(len(x), -1).astype(np.float64) for x in arrived.values()]
    gaps = np.stack([np.linalg.norm(a - b, axis=1) for a, b in combinations(ends, 2)])
    known = np.isfinite(gaps).all(0)
    largest = gaps[:, known].max(0) if known.any() else np.full(1, np.nan)
    above, below = (any(test(row.returned) for row in rows) for test in (_mostly, _hardly))
    return SolverSensitivity(tuple(rows), number(largest.max()), number(np.median(largest)), above and below)


def _mostly(share: Share) -> bool:
    return share.low > 0.5


def _hardly(share: Share) -> bool:
    return share.high < 0.5


def optimal_transport(arrived: np.ndarray, own: np.ndarray, optimal: np.ndarray, level: float) -> OptimalTransport:
    """Arrivals against their own and their optimal targets, [n, *dims] each."""
    count = len(arrived)
    ends, pairs, best = (x.reshape(count, -1).astype(np.float64) for x in (arrived, own, optimal))
    to_own, to_best = (np.linalg.norm(ends - x, axis=1) for x in (pairs, best))
    differ = np.any(pairs != best, axis=1)
    with np.errstate(invalid="ignore"):
        closer = (to_best < to_own)[differ]
    return OptimalTransport(summary(to_best), wilson(int(closer.sum()), len(closer), level), int(np.sum(~differ)))
