"""The nearest targets of many points, exactly, while the targets go by in chunks."""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fvjax.types import Array

CANDIDATES = 8
"""Nearest targets by |x|^2 - 2 q.x, which cancels, whose distances are computed again from differences in float64."""

GATHERED = 2**23
"""Numbers of candidates at once: 64 MiB in float64."""


class Readable(Protocol):
    """What targets are read from again: `Rows`, or something that computes rows from them."""

    def __len__(self) -> int: ...

    @property
    def chunk(self) -> int:
        """Rows in a chunk."""

    def take(self, index: np.ndarray) -> np.ndarray:
        """The rows `index`."""


def digests(rows: np.ndarray) -> list[bytes]:
    """Equal rows have equal digests; -0 is 0."""
    flat = np.ascontiguousarray(rows.reshape(len(rows), -1) + np.zeros((), rows.dtype))
    return [hashlib.blake2b(row, digest_size=12).digest() for row in flat]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some targets, filled up to a fixed number of rows.

    Attributes:
        place: of the first one among all targets.
        points: centred, float32 [size, d]; zeros as filling.
        names: digests of the rows that are no filling.
        new: which of the rows were not seen before, [size].
    """

    place: int
    points: Array
    names: list[bytes]
    new: np.ndarray


class Targets:
    """All targets that were fed so far, of several arrays one after the other, and how many different ones."""

    def __init__(self, centre: np.ndarray) -> None:
        self.centre = centre
        self._seen: set[bytes] = set()
        self._sources: list[tuple[int, Readable]] = []

    @property
    def distinct(self) -> int:
        """Targets that differ."""
        return len(self._seen)

    def begin(self, rows: Readable) -> None:
        """The chunks that follow are those of `rows`."""
        self._sources.append((sum(len(before) for _, before in self._sources), rows))

    def chunk(self, start: int, rows: np.ndarray) -> Chunk:
        """Rows `start` and following of the present array, filled up so that every chunk compiles to one program."""
        place, source = self._sources[-1]
        names = digests(rows)
        new = np.zeros(source.chunk, bool)
        for k, name in enumerate(names):
            new[k] = name not in self._seen
            self._seen.add(name)
        padded = np.zeros((source.chunk, self.centre.size), np.float32)
        padded[: len(rows)] = rows.reshape(len(rows), -1) - self.centre
        return Chunk(place + start, jnp.asarray(padded), names, new)

    def take(self, places: np.ndarray) -> np.ndarray:
        """Targets by their place, float64 [*places.shape, d]."""
        values = np.empty((*places.shape, self.centre.size))
        for offset, rows in self._sources:
            here = (places >= offset) & (places < offset + len(rows))
            if here.any():
                values[here] = rows.take(places[here] - offset).reshape(-1, self.centre.size)
        return values


class Search:
    """For every query its own target, the nearest others, and how many are nearer than its own.

    Of equal targets only the first counts, and those equal to a query's own target are its own. Queries that are not
    finite find nothing: nan.

    Attributes:
        finite: which queries are, [q].
        to_own: distance to the own target, float64 [q].
        nearer: number of different targets that are nearer than the own one, [q].
        own_found: whether the own target was among those that were fed, [q].
    """

    def __init__(self, queries: np.ndarray, own: np.ndarray, centre: np.ndarray) -> None:
        """Queries [q, *dims], and the target [q, *dims] that belongs to each."""
        count = len(queries)
        self._queries = queries.reshape(count, -1).astype(np.float64)
        self.finite = np.asarray(np.isfinite(self._queries).all(1))
        self._queries[~self.finite] = 0
        self.to_own = np.linalg.norm(self._queries - own.reshape(count, -1), axis=1)
        self.to_own[~self.finite] = np.nan
        self._labels: dict[bytes, int] = {}
        self._label = np.array([self._labels.setdefault(name, len(self._labels)) for name in digests(own)], np.int32)
        centred = self._queries - centre
        size = np.sum(centred**2, 1)
        self._points = jnp.asarray(centred, jnp.float32)
        # Rounding of the products must not make a target at the same distance a nearer one.
        self._bound = jnp.asarray(self.to_own**2 * (1 - 1e-5) - size * (1 + 1e-6), jnp.float32)
        self._scores = np.full((count, CANDIDATES), np.inf, np.float32)
        self._places = np.full((count, CANDIDATES), -1, np.int64)
        self.nearer = np.zeros(count, np.int64)
        self.own_found = np.zeros(count, bool)

    def feed(self, chunk: Chunk) -> None:
        """Looks at a chunk of targets."""
        label = np.full(len(chunk.new), -1, np.int32)
        label[: len(chunk.names)] = [self._labels.get(name, -1) for name in chunk.names]
        self.own_found |= np.isin(self._label, label[label >= 0])
        scores, local, nearer = _scan(
            self._points, chunk.points, new=chunk.new, label=label, own=self._label, bound=self._bound
        )
        self.nearer += np.asarray(nearer, np.int64)
        scores = np.concatenate([self._scores, np.asarray(scores)], 1)
        places = np.concatenate([self._places, chunk.place + np.asarray(local, np.int64)], 1)
        order = np.argsort(scores, axis=1, kind="stable")[:, :CANDIDATES]
        self._scores, self._places = np.take_along_axis(scores, order, 1), np.take_along_axis(places, order, 1)

    def nearest_others(self, targets: Targets) -> np.ndarray:
        """Distances to the nearest and the second nearest other target, float64 [q, 2]; inf where there is none."""
        found = np.full((len(self._queries), 2), np.inf)
        rows = max(1, GATHERED // (CANDIDATES * self._queries.shape[1]))
        for start in range(0, len(found), rows):
            part = slice(start, start + rows)
            valid = np.isfinite(self._scores[part])
            values = targets.take(np.where(valid, self._places[part], 0))
            distances = np.sqrt(np.sum((values - self._queries[part, None]) ** 2, 2))
            found[part] = np.sort(np.where(valid, distances, np.inf), 1)[:, :2]
        found[~self.finite] = np.nan
        return found

    def nearest_two(self, others: np.ndarray) -> np.ndarray:
        """As `nearest_others`, whose result is given, with the own target where it was fed, too, float64 [q, 2]."""
        own = np.where(self.own_found, self.to_own, np.inf)
        return np.sort(np.concatenate([others, own[:, None]], 1), 1)[:, :2]


@jax.jit
def _scan(
    queries: Array, points: Array, *, new: Array, label: Array, own: Array, bound: Array
) -> tuple[Array, Array, Array]:
    """The smallest |x|^2 - 2 q.x of other targets [q, k], their rows [q, k], and how many are below the bound [q]."""
    products = jnp.matmul(queries, points.T, precision=jax.lax.Precision.HIGHEST)
    scores = jnp.sum(points**2, 1) - 2 * products
    scores = jnp.where(new & (label != own[:, None]), scores, jnp.inf)
    nearer = jnp.sum(scores < bound[:, None], 1)
    wanted = min(CANDIDATES, len(points))
    best, rows = jax.lax.top_k(-scores, wanted)
    return -best, rows, nearer
