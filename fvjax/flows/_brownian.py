"""The terms of dX = f(X, t) dt + sigma dB for diffrax; imported on use, like diffrax itself."""

from dataclasses import dataclass
from typing import Any

import diffrax
import equinox
import jax
import jax.numpy as jnp
import lineax

from fvjax.types import Array, Key, Params, VelocityField


class Increments(diffrax.AbstractBrownianPath):
    """Brownian increments of the steps of a grid; those of step k are drawn from fold_in(key, k) when they are needed.

    With W = B(t + h) - B(t) ~ N(0, h I) and the space-time Levy area H = 1/h int_0^h (B(t + s) - B(t) - (s/h) W) ds,
    which is independent of W and ~ N(0, h/12 I).

    Why neither path of diffrax: `UnsafeBrownianPath` derives its keys from the bits of the times and refuses reverse
    mode; `VirtualBrownianTree` descends a tree twice in each step, for values between the steps that nobody asks for.
    In CPU time of Euler against a scan written by hand, 10,000 examples, d = 5, MLP 256 x 2, 20 steps: this one 1.02,
    the first 1.05, the second 1.28.
    """

    t0: Array  # type: ignore[misc]  # mypy takes equinox's AbstractVar for a class variable
    t1: Array  # type: ignore[misc]
    grid: Array
    increment_key: Key
    area_key: Key
    shape: tuple[int, ...] = equinox.field(static=True)
    levy_area: type[Any] = equinox.field(static=True)

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True, use_levy: bool = False) -> Any:
        """The increment over the step from t0 to t1, [*dims]; with `use_levy` the step's length and, if asked, H."""
        del left
        if t1 is None:
            raise ValueError("t1 must be given: there are increments of steps only, got None")
        step, length = jnp.searchsorted(self.grid, t0), t1 - t0
        increment = jnp.sqrt(length) * self._normal(self.increment_key, step)
        if not use_levy:
            return increment
        if self.levy_area is diffrax.BrownianIncrement:
            return diffrax.BrownianIncrement(dt=length, W=increment)
        area = jnp.sqrt(length / 12) * self._normal(self.area_key, step)
        return diffrax.SpaceTimeLevyArea(dt=length, W=increment, H=area)

    def _normal(self, key: Key, step: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(key, step), self.shape, self.grid.dtype)


@dataclass(frozen=True)
class _Drift:
    """A field in diffrax's order of arguments. Two are equal if their fields are, so that one solve compiles once."""

    field: VelocityField

    def __call__(self, t: Array, x: Array, args: tuple[Params, Array]) -> Array:
        return self.field(args[0], t, x)


def _noise(t: Any, x: Any, args: Any) -> lineax.AbstractLinearOperator:
    """sigma I."""
    del t
    return lineax.DiagonalLinearOperator(jnp.full_like(x, args[1]))


def terms(key: Key, field: VelocityField, *, grid: Array, shape: tuple[int, ...], levy_area: str) -> diffrax.MultiTerm:
    """The terms of field(params, t, x) dt + sigma dB, whose arguments are (params, sigma)."""
    increment_key, area_key = jax.random.split(key)
    path = Increments(
        t0=grid[0],
        t1=grid[-1],
        grid=grid,
        increment_key=increment_key,
        area_key=area_key,
        shape=shape,
        levy_area=getattr(diffrax, levy_area),
    )
    drift: Any = _Drift(field)
    return diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(_noise, path))
