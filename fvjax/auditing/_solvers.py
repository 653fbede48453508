"""Sources carried to t = 1 by several solvers, in chunks of one size."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _validate, flows
from fvjax.auditing._inputs import Field
from fvjax.types import Array, Scalar

CARRIED = 256
"""Sources at once."""

NODES = 16
"""Of the integral of straightness."""

ADAPTIVE = "dopri5"
"""The adaptive solver that is compared, at its default tolerance, if the chosen one is not adaptive."""


class Solver(NamedTuple):
    """A solver of `fvjax.transport`; without steps it is adaptive."""

    solver: str
    steps: int | None

    @property
    def name(self) -> str:
        """For tables: "euler, 50 steps" or "dopri5, adaptive"."""
        return f"{self.solver}, " + (f"{self.steps} steps" if self.steps is not None else "adaptive")


def chosen_solvers(solver: Any, steps: Any, euler_steps: Any) -> tuple[Solver, ...]:
    """The chosen solver first, then Euler with an odd and an even number of steps, and an adaptive one."""
    _validate.one_of("solver", solver, tuple(flows.SOLVERS))
    if steps is not None:
        _validate.positive_integer("steps", steps)
    elif solver == "euler":
        raise ValueError("steps must be given for solver euler, which has no error estimate, got None")
    if not isinstance(euler_steps, tuple | list):
        raise ValueError(f"euler_steps must be a pair of an odd and an even number, got {euler_steps!r}")
    for count in euler_steps:
        _validate.positive_integer("euler_steps", count)
    if sorted(count % 2 for count in euler_steps) != [0, 1]:
        raise ValueError(f"euler_steps must be a pair of an odd and an even number, got {tuple(euler_steps)}")
    chosen = Solver(solver, None if steps is None else int(steps))
    others = [Solver("euler", int(count)) for count in euler_steps]
    if chosen.steps is not None:
        others.append(Solver(ADAPTIVE, None))
    return (chosen, *(other for other in others if other != chosen))


def carried(field: Field, sources: np.ndarray, solver: Solver) -> np.ndarray:
    """Where each source arrives, numpy [n, *dims]; nan in every entry where its solve failed."""
    found: np.ndarray = in_chunks(partial(_ends, solver=solver), field, sources)
    return found


def straightly_carried(field: Field, sources: np.ndarray, solver: Solver) -> tuple[np.ndarray, np.ndarray]:
    """As `carried`, to rounding, and S of each source as of `fvjax.straightness`, numpy [n], along the same solve."""
    ends, straightness = in_chunks(partial(_ends_and_straightness, solver=solver), field, sources)
    return ends, straightness


def velocities(field: Field, t: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The field at points, numpy [m, *dims]."""
    found: np.ndarray = in_chunks(_velocities, field, x, t)
    return found


def in_chunks(function: Callable[..., Any], field: Field, x: np.ndarray, *others: np.ndarray) -> Any:
    """`function(field, chunk of x, chunks of others)` for chunks of CARRIED rows, the last filled up with its last row.

    Always of that size, so that training sources, held-out sources and points share one compiled program.
    """
    parts = []
    for start in range(0, len(x), CARRIED):
        rows = np.minimum(np.arange(start, start + CARRIED), len(x) - 1)
        parts.append(jax.device_get(function(field, *(jnp.asarray(y[rows]) for y in (x, *others)))))
    return jax.tree.map(lambda *pieces: np.concatenate(pieces)[: len(x)], *parts)


def _apply(field: Field, t: Scalar, x: Array) -> Array:
    """A field as the params of one function, which is what a compiled solve is for."""
    return field(t, x)


@partial(jax.jit, static_argnames="solver")
def _ends(field: Field, x: Array, *, solver: Solver) -> Array:
    return jax.vmap(lambda x: flows.transport(_apply, field, x, solver=solver.solver, steps=solver.steps))(x)


@partial(jax.jit, static_argnames="solver")
def _ends_and_straightness(field: Field, x: Array, *, solver: Solver) -> tuple[Array, Array]:
    points, weights = np.polynomial.legendre.leggauss(NODES)
    times = jnp.asarray(np.append((1 + points) / 2, 1.0), x.dtype)

    def of_source(x0: Array) -> tuple[Array, Array]:
        states = flows.trajectory(_apply, field, x0, times, solver=solver.solver, steps=solver.steps)
        differences = states[-1] - x0 - jax.vmap(field.__call__)(times[:-1], states[:-1])
        squares = jnp.sum(differences.reshape(NODES, -1) ** 2, axis=1)
        return states[-1], jnp.dot(jnp.asarray(weights / 2, x.dtype), squares)

    return jax.vmap(of_source)(x)


@jax.jit
def _velocities(field: Field, x: Array, t: Array) -> Array:
    return jax.vmap(field.__call__)(t, x)
