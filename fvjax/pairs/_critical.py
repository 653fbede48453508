r"""The noise at which the exact minimiser lets go of its pairs: measured along its flow, and predicted without any.

With constant noise sigma the minimiser of a finite set of pairs takes a training source x0_i to its own x1_i as long as
sigma is small against the distance between the pairs' paths, and somewhere else when it is not. sigma_c is where half
of the sources still arrive. It depends on the pairs alone: no network, no training.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax.flows import SolverOptions, transport
from fvjax.interpolants import Interpolant, as_pytree, constant_noise
from fvjax.pairs._checks import checked_pairs, checked_weights
from fvjax.pairs._minimiser import empirical_minimiser
from fvjax.pairs._spacing import Factory, block_rows, blocks, chosen, own_and_nearest, predicted_sigma_critical
from fvjax.types import Array, Key, Pair, Params, Scalar

Frozen = tuple[tuple[str, Any], ...]
"""Options of `transport` as a hashable value."""

FURTHEST_DOUBLINGS = 24
"""How often the search for a bracket doubles or halves sigma: by 1.7e7 from the prediction either way."""


class SigmaCritical(NamedTuple):
    """sigma_c as measured; `PredictedSigma` of the same pairs; and every (sigma, fraction) that the search visited.

    `sigmas` and `recovered` are numpy arrays [k], sorted by sigma.
    """

    measured: float
    predicted: float
    low: float
    high: float
    spacing: float
    sigmas: np.ndarray
    recovered: np.ndarray


def nearest_target_is_own(arrived: Array, targets: Array, index: Array | None = None) -> Array:
    """Whether no target is nearer to where a source arrived than its own: what `recovered_fraction` counts.

    For samples of any origin, a trained network's too. Equal targets are not told apart.

    Args:
        arrived: where the sources arrived, [m, *dims].
        targets: all targets x1, [N, *dims], of the same dtype.
        index: the number of each one's own target, integers in [0, N), [m]; None if m = N and they are in order.

    Returns:
        Booleans, [m]. False where `arrived` has a nan.

    Raises:
        ValueError: if the shapes or dtypes do not fit.
    """
    arrived, targets = jnp.asarray(arrived), jnp.asarray(targets)
    _validate.floating("arrived", arrived)
    _validate.same_dtype("arrived", arrived, "targets", targets)
    index = jnp.arange(_validate.batch("targets", targets)) if index is None else jnp.asarray(index)
    _validate.integers("index", index)
    _validate.shape("arrived", arrived, (*index.shape, *targets.shape[1:]))
    flat = arrived.reshape(len(arrived), -1)
    to_own, to_other = own_and_nearest(flat, targets.reshape(len(targets), -1), index)
    return to_own <= to_other


def recovered_fraction(
    pairs: Pair,
    interpolant: Interpolant,
    *,
    weights: Array | None = None,
    sources: int | None = None,
    key: Key | None = None,
    **options: Unpack[SolverOptions],
) -> Array:
    r"""The share of training sources that the flow of the exact minimiser returns to their own target.

    x0_i is carried from t = 0 to 1 along `empirical_minimiser(pairs, interpolant, weights)`, from x0_i itself (not from
    x0_i + gamma(0) z), and is returned if no other target is nearer to where it arrives than x1_i. Equal targets are
    not told apart.

    Args:
        pairs: x0 and x1, [N, *dims] each, floating point.
        interpolant: gamma > 0, or gamma = 0 for the memorizing field.
        weights: pi, [N], of the minimiser; the share counts sources with the same weights. None means 1/N each.
        sources: carry that many random sources only, drawn without replacement; None means all. The standard error of
            a share f is sqrt(f (1 - f) / sources).
        key: PRNG key of that choice.
        **options: of `fvjax.transport`; by default 100 Euler steps.

    Returns:
        Share in [0, 1], shape [], in the dtype of x0.

    Raises:
        ValueError: as `nearest_midpoint_distances`, `empirical_minimiser` and `fvjax.transport`.
        RuntimeError: if a solve fails, and this is called eagerly.
    """
    pairs = checked_pairs(pairs)
    weights = checked_weights(weights, len(pairs.x0))
    index = chosen(len(pairs.x0), sources, key)
    return _share(
        _arrivals(pairs, weights, as_pytree(interpolant), index, options=_frozen(options)), pairs, weights, index
    )


def sigma_critical(
    pairs: Pair,
    *,
    interpolant: Factory = constant_noise,
    fraction: float = 0.5,
    rtol: float = 0.02,
    weights: Array | None = None,
    sources: int | None = None,
    key: Key | None = None,
    solver: str = "euler",
    steps: int | None = 100,
) -> SigmaCritical:
    r"""The sigma at which the exact minimiser returns only `fraction` of the sources to their own pair.

    `recovered_fraction` at the prediction, then at sigmas twice as large or half as large until it has crossed
    `fraction`, then by bisection in log sigma. sigma is traced: nothing compiles twice. With N sources out of N pairs
    one evaluation costs steps x N^2 x dim multiplications; `sources` brings one N down.

    =====================================  ============================================================================
    never below `fraction`                 inf: the minimiser cannot or need not let go (N = 1, equal pairs, a
                                           translation x1 = x0 + b); sigma was doubled 24 times
    never at or above `fraction`           0: not even the smallest sigma (2^-24 of the prediction) returns the pairs
    the prediction is 0 (equal midpoints)  the search starts from the standard deviation of the data instead
    several crossings                      one of them; `sigmas` and `recovered` show what was seen
    =====================================  ============================================================================

    Args:
        pairs: x0 and x1, [N, *dims] each, floating point.
        interpolant: sigma -> Interpolant, gamma proportional to sigma; hashable, and traced with sigma.
        fraction: in (0, 1).
        rtol: relative width of the last bracket; `measured` is its geometric mean. The answer is a step function of
            sigma with steps of 1/N (or 1/sources) in the fraction.
        weights: pi, [N], as in `recovered_fraction`.
        sources: carry that many random sources only, the same for every sigma; None means all.
        key: PRNG key of that choice.
        solver: of `fvjax.transport`.
        steps: fixed steps; None for an adaptive solver with its default tolerances.

    Returns:
        SigmaCritical; `predicted`, `low` and `high` are those of `predicted_sigma_critical`.

    Raises:
        ValueError: as `predicted_sigma_critical`, or if `fraction` is outside (0, 1) or `rtol` not above 0.
        RuntimeError: if a solve fails.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be in (0, 1), got {fraction}")
    _validate.positive("rtol", rtol)
    pairs = checked_pairs(pairs)
    weights = checked_weights(weights, len(pairs.x0))
    index = chosen(len(pairs.x0), sources, key)
    prediction = predicted_sigma_critical(pairs, interpolant, sources=sources, key=key)
    options = _frozen({"solver": solver, "steps": steps})
    seen: dict[float, float] = {}

    def holds(sigma: float) -> bool:
        arrived = _arrivals_at(
            jnp.asarray(sigma, pairs.x0.dtype), pairs, weights, index, factory=interpolant, options=options
        )
        seen[sigma] = float(_share(arrived, pairs, weights, index))
        return seen[sigma] >= fraction

    measured = _crossing(holds, _start(prediction.predicted, pairs), rtol)
    sigmas = np.array(sorted(seen))
    return SigmaCritical(measured, *prediction, sigmas, np.array([seen[sigma] for sigma in sigmas]))


def _start(predicted: float, pairs: Pair) -> float:
    if 0 < predicted < math.inf:
        return predicted
    spread = float(jnp.maximum(jnp.std(pairs.x0), jnp.std(pairs.x1)))
    return spread or 1.0


def _crossing(holds: Callable[[float], bool], start: float, rtol: float) -> float:
    """Where `holds` turns from true to false: doubling from `start`, then bisection of log sigma."""
    inside = holds(start)
    factor = 2.0 if inside else 0.5
    low = high = start
    for _ in range(FURTHEST_DOUBLINGS):
        low, high = (high, high * factor) if inside else (low * factor, low)
        if holds(high if inside else low) != inside:
            break
    else:
        return math.inf if inside else 0.0
    while high > low * (1 + rtol):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return math.sqrt(low * high)


def _frozen(options: Any) -> Frozen:
    given = {"solver": "euler", **options}
    if given["solver"] == "euler":
        given.setdefault("steps", 100)
    return tuple(sorted(given.items()))


def _apply(field: Params, t: Scalar, x: Array) -> Array:
    """A field as the params of one function: what `transport` compiles for does not change with the pairs."""
    return field(None, t, x)


@functools.partial(jax.jit, static_argnames="options")
def _arrivals(pairs: Pair, weights: Array | None, interpolant: Interpolant, index: Array, *, options: Frozen) -> Array:
    """Where the flow of the minimiser takes the sources `index`, [m, *dims]."""
    field = empirical_minimiser(pairs, interpolant, weights)

    def arrival(x0: Array) -> Array:
        return transport(_apply, field, x0, **dict(options))

    rows = min(block_rows(*pairs.x0.reshape(len(pairs.x0), -1).shape), len(index))
    arrived = jax.lax.map(jax.vmap(arrival), pairs.x0[blocks(index, rows)])
    return arrived.reshape(-1, *pairs.x0.shape[1:])[: len(index)]


@functools.partial(jax.jit, static_argnames=("factory", "options"))
def _arrivals_at(
    sigma: Array, pairs: Pair, weights: Array | None, index: Array, *, factory: Factory, options: Frozen
) -> Array:
    return _arrivals(pairs, weights, as_pytree(factory(sigma)), index, options=options)


def _share(arrived: Array, pairs: Pair, weights: Array | None, index: Array) -> Array:
    if _validate.is_concrete(arrived):
        failed = int(jnp.sum(~jnp.all(jnp.isfinite(arrived).reshape(len(arrived), -1), 1)))
        if failed:
            raise RuntimeError(f"the flow of the minimiser failed for {failed} of {len(arrived)} sources: not finite")
    returned = nearest_target_is_own(arrived, pairs.x1, index).astype(arrived.dtype)
    counted = jnp.ones_like(returned) if weights is None else weights.astype(arrived.dtype)[index]
    return jnp.sum(counted * returned) / jnp.sum(counted)
