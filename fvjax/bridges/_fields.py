"""What two drifts, forward and backward in time, make together: samples, an ordinary flow, and a score."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from fvjax import _validate
from fvjax.rectification import CHUNK, diffuse_pairs
from fvjax.types import Array, Key, Pair, Params, Scalar, VelocityField

DIRECTIONS = ("backward", "forward")
"""In the order in which DSBM trains them."""

STEPS = 20
"""Steps of a simulated path: those of Shi et al. 2023 for the Gaussian test."""


class BridgeParams(NamedTuple):
    """Parameters of the two drifts of one network; each is called with the time along its own direction."""

    forward: Params
    backward: Params


def probability_flow(field: VelocityField) -> VelocityField:
    r"""The velocity whose ODE has the law of the diffusion at every time, v(x, t) = (f(x, t) - b(x, 1 - t)) / 2.

    f and b are the drifts of dX = f dt + sigma dB forward and of dY = b(Y, s) ds + sigma dB with s = 1 - t; where both
    describe one process, f + b = sigma^2 score (Nelson's relation), so that v = f - sigma^2 score / 2. Two trained
    drifts describe nearly one process: the ODE ends near the target's law as far as they do.

    Args:
        field: the network of both drifts, for ONE example.

    Returns:
        A VelocityField with BridgeParams as its params, for `fvjax.flows` and all else that takes one; a
        `jax.tree_util.Partial`, so that it can be an argument of jitted functions, which compile once for each `field`.

    Source: Song et al. 2021, eq. 13; Shi et al. 2023 (DSBM).
    """
    return Partial(_velocity, Partial(field))


def _velocity(field: VelocityField, params: BridgeParams, t: Scalar, x: Array) -> Array:
    return (field(params.forward, t, x) - field(params.backward, 1 - jnp.asarray(t), x)) / 2


def bridge_score(field: VelocityField, sigma: Scalar) -> VelocityField:
    r"""The score of the diffusion's law, grad log p_t(x) = (f(x, t) + b(x, 1 - t)) / sigma^2.

    Args:
        field: as in `probability_flow`.
        sigma: noise scale, > 0.

    Returns:
        (BridgeParams, t, x) -> score, for ONE example.

    Raises:
        ValueError: if `sigma` is concrete and not > 0.

    Source: Nelson 1967; as `probability_flow`.
    """
    check_sigma(sigma)
    return Partial(_score, (Partial(field), sigma))


def _score(bridge: tuple[VelocityField, Scalar], params: BridgeParams, t: Scalar, x: Array) -> Array:
    field, sigma = bridge
    both = field(params.forward, t, x) + field(params.backward, 1 - jnp.asarray(t), x)
    return both / jnp.asarray(sigma, both.dtype) ** 2


def bridge_pairs(
    key: Key,
    field: VelocityField,
    params: BridgeParams,
    points: Array | np.ndarray,
    *,
    direction: str,
    sigma: Scalar,
    steps: int = STEPS,
    solver: str = "euler",
    chunk: int = CHUNK,
) -> Pair:
    """Pairs that the diffusion makes of real sources (forward) or of real targets (backward).

    Args:
        key: of the paths.
        field: the network of both drifts, for ONE example.
        params: of both.
        points: x0 [n, *dims] where `direction` is "forward", x1 where it is "backward".
        direction: which drift is simulated.
        sigma: noise scale of the Brownian motion, > 0.
        steps: of the solver.
        solver: of `flows.diffuse`.
        chunk: examples at once.

    Returns:
        Pair(x0, x1), two numpy arrays, in this order for both directions.

    Raises:
        ValueError: if `direction` is unknown or `sigma` not > 0; as `rectification.diffuse_pairs`.
        FloatingPointError: as `rectification.diffuse_pairs`.
    """
    _validate.one_of("direction", direction, DIRECTIONS)
    check_sigma(sigma)
    own = params.forward if direction == "forward" else params.backward
    pairs = diffuse_pairs(key, field, own, points, sigma=sigma, steps=steps, solver=solver, chunk=chunk)
    return oriented(pairs, direction)


def oriented(pairs: Pair, direction: str) -> Pair:
    """Pairs as the drift of `direction` sees them, its own start first; the same again gives Pair(x0, x1) back."""
    return pairs if direction == "forward" else Pair(pairs.x1, pairs.x0)


def check_sigma(sigma: Scalar) -> None:
    """Refuses a bridge without noise."""
    if _validate.is_concrete(sigma) and not bool(np.all(np.isfinite(sigma) & (np.asarray(sigma) > 0))):
        raise ValueError(
            f"sigma must be > 0 and finite for a bridge (without noise it is rectification.reflow), got {sigma}"
        )
