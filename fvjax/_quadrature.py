r"""Gauss rules in time and space, and panels in time that stay exact next to a pole of the integrand.

The affine field makes rational integrands of t with poles where I + t Theta is singular. A Gauss rule of fixed order on
[0, 1] silently fails once a pole comes near (at 179 degrees by orders of magnitude), so [0, 1] is cut into panels, each
no longer than the distance from its left end to any pole, and half of that to a pole ahead. There the error of n
Gauss-Legendre nodes is of the order rho^(-2n) with rho >= 4.6: a real pole, ahead or behind, lies one panel length
beyond an end (rho = 5.8), and the worst place is straight above the left end, z = -1 + 2i on [-1, 1], where
rho = |z + sqrt(z^2 - 1)| = 4.6. 16 nodes leave 1e-21.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax.types import Array

PANEL_NODES = 16
MAX_PANELS = 128
"""Enough for one pole at distance 1e-15: panels halve while it is approached, double while it is left behind."""
PANELS_PER_POLE = 16
"""With more than 8 poles there are this many panels for each: 25 planes with different poles, all turned by 179.999
degrees, take 583 for 50 poles."""
LONGEST_PANEL = 0.25
"""Resolves the smooth coefficients (sin^2(pi t), cos(pi t / 2)) to machine precision."""


@functools.cache
def legendre(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on [0, 1], float64, [nodes] each; the weights add up to 1."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    return (x + 1) / 2, w / 2


@functools.cache
def hermite(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Hermite nodes and weights for the standard normal law, float64, [nodes] each; the weights add up to 1."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    return x, w / w.sum()


class Poles(NamedTuple):
    """Complex times real + i imag, [k] each; an infinite real part means none."""

    real: Array
    imag: Array

    def distance(self, time: Array) -> Array:
        """|pole - time| for a real time, [k]."""
        return jnp.hypot(self.real - time, self.imag)


def panels(poles: Poles, removable: Array, start: Array, end: Array) -> tuple[Array, Array]:
    """Cuts [start, end] into panels that are short next to the poles.

    Args:
        poles: [k].
        removable: [k]: the integrand is smooth there. Such a pole only becomes the end of a panel, because no node
            may come close to it (0 / 0), and shortens nothing. Rounding may scatter one over a few epsilons: poles
            closer than epsilon^(2/3) to one another or to an end of [start, end] count as one.
        start: real, [].
        end: real, [], > start.

    Returns:
        Left ends and widths, [max(MAX_PANELS, k PANELS_PER_POLE)] each; unused panels have width 0. Where they did not
        suffice, the last one ends before `end`.
    """
    tiny, merged = jnp.finfo(start.dtype).eps * 8, jnp.finfo(start.dtype).eps ** (2 / 3)
    apart = jnp.where(removable, merged, tiny)
    at_end = removable & (jnp.abs(poles.real - end) <= merged)
    poles = poles._replace(real=jnp.where(at_end, end, poles.real))

    def advance(left: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        ahead = poles.real - left > apart
        distance = poles.distance(left)
        to_pole = jnp.where(removable, jnp.where(ahead, distance, jnp.inf), jnp.where(ahead, distance / 2, distance))
        width = jnp.minimum(jnp.maximum(jnp.minimum(jnp.min(to_pole), LONGEST_PANEL), tiny), end - left)
        return left + width, (left, width)

    length = max(MAX_PANELS, PANELS_PER_POLE * len(poles.real))
    _, (lefts, widths) = jax.lax.scan(advance, start, None, length=length)
    return lefts, widths
