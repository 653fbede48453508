"""Pairs that a flow makes: large sets in chunks, and their mixture with real ones."""

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from fvjax import _validate, flows
from fvjax.flows import SolverOptions
from fvjax.training import Progress
from fvjax.types import Array, Key, Pair, Params, Scalar, VelocityField

CHUNK = 1000
"""Examples that are carried at once."""


def generate_pairs(
    field: VelocityField,
    params: Params,
    x0: Array | np.ndarray,
    *,
    chunk: int = CHUNK,
    progress: str | None = None,
    **options: Unpack[SolverOptions],
) -> Pair:
    r"""Pairs every source with the end of its trajectory, z1 = ODE(z0).

    The examples are carried in chunks of one shape, each as by `jax.vmap(flows.transport)`: every example has its own
    step sizes. Only two chunks are on the device at a time; x0 and the result stay with the host. Row i depends on row
    i of x0 alone, so that the chunk changes nothing but, on some devices, the last bits of matrix products.

    Args:
        field: velocity field of ONE example; compiled once for each field, shape of a chunk and set of options. A
            `jax.tree_util.Partial` may hold arrays, which are then arguments of the compiled function.
        params: its first argument.
        x0: [n, *dims], n >= 1, floating point, of numpy (also memory-mapped) or JAX.
        chunk: examples at once; a smaller n is one chunk.
        progress: label of a progress line on stderr; None for none.
        **options: those of `flows.transport`: solver, steps, rtol, atol, start, end, max_steps.

    Returns:
        Pair(x0, x1), two numpy arrays [n, *dims] in the dtype in which JAX holds x0.

    Raises:
        ValueError: as `flows.transport`, or if x0 is empty, not floating point or not finite, or `chunk` is not an
            integer >= 1.
        FloatingPointError: if ends are not finite: the field has diverged or the solver has failed. Says how many.
    """
    sources = _points("x0", x0)
    ends = _ends(field, params, sources, chunk=chunk, progress=progress, options=options)
    return Pair(sources, ends)  # type: ignore[arg-type]  # host arrays


def diffuse_pairs(
    key: Key,
    field: VelocityField,
    params: Params,
    x0: Array | np.ndarray,
    *,
    sigma: Scalar,
    steps: int,
    solver: str = "euler",
    chunk: int = CHUNK,
    progress: str | None = None,
) -> Pair:
    r"""Pairs every source with the end of a path of the diffusion dX = field dt + sigma dB, X_0 = x0.

    As `generate_pairs`, with noise: z1 is drawn, given z0. Example i uses `fold_in(key, i)`, so that neither the chunk
    nor the number of examples changes the path of another one.

    Args:
        key: of the paths.
        field: drift of ONE example, (params, t, x[*dims]) -> [*dims]; compiled as in `generate_pairs`.
        params: its first argument.
        x0: [n, *dims], n >= 1, floating point, of numpy or JAX.
        sigma: noise scale of the Brownian motion, >= 0, traced.
        steps: of the solver, from t = 0 to t = 1.
        solver: of `flows.diffuse`.
        chunk: examples at once.
        progress: label of a progress line on stderr; None for none.

    Returns:
        Pair(x0, x1), two numpy arrays [n, *dims].

    Raises:
        ValueError: as `flows.diffuse` and `generate_pairs`.
        FloatingPointError: if ends are not finite. Says how many.
    """
    _validate.nonnegative("sigma", sigma)  # traced, and not looked at, further down
    sources, partial = _points("x0", x0), as_partial(field)

    def diffused(part: Array, rows: Array) -> Array:
        return _diffused(key, partial, params, part, rows=rows, sigma=sigma, steps=steps, solver=solver)

    ends = in_chunks(diffused, sources, chunk=chunk, progress=progress)
    _check_ends(ends, f"solver = {solver}, steps = {steps}, sigma = {sigma}")
    return Pair(sources, ends)  # type: ignore[arg-type]  # host arrays


def invert_pairs(
    field: VelocityField,
    params: Params,
    x1: Array | np.ndarray,
    *,
    chunk: int = CHUNK,
    progress: str | None = None,
    **options: Unpack[SolverOptions],
) -> Pair:
    """Pairs every target with the start of the trajectory that ends there: the flow run from t = 1 back to t = 0.

    Real data as targets make the real pairs of `mixed` and `reflow`. Whether x0 then follows the law of the sources is
    for the caller to see: it does as far as the flow carries that law to the data's.

    Args:
        field: as in `generate_pairs`.
        params: as in `generate_pairs`.
        x1: [n, *dims], n >= 1, floating point.
        chunk: as in `generate_pairs`.
        progress: as in `generate_pairs`.
        **options: those of `flows.transport`; start and end are still the times of x0 and x1, 0 and 1 by default.

    Returns:
        Pair(x0, x1), two numpy arrays [n, *dims].

    Raises:
        ValueError: as `generate_pairs`.
        FloatingPointError: as `generate_pairs`.
    """
    targets = _points("x1", x1)
    start, end = options.pop("start", 0.0), options.pop("end", 1.0)
    backwards: SolverOptions = {**options, "start": end, "end": start}
    starts = _ends(field, params, targets, chunk=chunk, progress=progress, options=backwards)
    return Pair(starts, targets)  # type: ignore[arg-type]  # host arrays


def mixed(key: Key, generated: Pair, real: Pair, share: float) -> Pair:
    """Replaces a share of generated pairs by real ones.

    Of n generated pairs exactly round(share n), at random places, are replaced by as many different rows of `real`.

    Args:
        key: of the places and of the rows.
        generated: [n, *dims] each.
        real: [m, *dims] each, m >= round(share n).
        share: in [0, 1]; 0 keeps `generated` as it is.

    Returns:
        Pair of n, two numpy arrays, in the dtype of `generated`.

    Raises:
        ValueError: if `share` is outside [0, 1], the shapes do not fit, or there are too few real pairs.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    n, available = _validate.batch("generated", generated), _validate.batch("real", real)
    if np.shape(generated.x0)[1:] != np.shape(real.x0)[1:] or np.shape(generated.x1)[1:] != np.shape(real.x1)[1:]:
        raise ValueError(
            f"generated and real must hold pairs of one shape, got {np.shape(generated.x0)[1:]} and"
            f" {np.shape(real.x0)[1:]}"
        )
    count = round(share * n)
    if count > available:
        raise ValueError(f"real must hold at least round(share n) = {count} pairs, got {available}")
    places_key, rows_key = jax.random.split(key)
    places = np.asarray(jax.random.permutation(places_key, n))[:count]
    rows = np.asarray(jax.random.permutation(rows_key, available))[:count]
    x0, x1 = (np.array(part) for part in generated)
    x0[places], x1[places] = np.asarray(real.x0)[rows], np.asarray(real.x1)[rows]
    return Pair(x0, x1)  # type: ignore[arg-type]  # host arrays


def hashable(options: SolverOptions) -> tuple[tuple[str, Any], ...]:
    """Options as a static argument: times and tolerances as plain numbers."""
    plain = {"start", "end", "rtol", "atol"}
    return tuple(
        (name, float(value) if name in plain and value is not None else value)  # type: ignore[arg-type]
        for name, value in sorted(options.items())
    )


def as_partial(field: VelocityField) -> Partial:
    """The field as a pytree, an argument of compiled functions."""
    return field if isinstance(field, Partial) else Partial(field)


def in_chunks(
    function: Callable[[Array, Array], Array], x0: np.ndarray, *, chunk: int, progress: str | None = None
) -> np.ndarray:
    """`function` of chunks [chunk, *dims] and their rows -> [chunk, ...], gathered on the host.

    The last chunk is filled up with copies of the last row, so that all have one shape.

    The device computes a chunk while the one before it is fetched.
    """
    _validate.positive_integer("chunk", chunk)
    n = len(x0)
    size = min(chunk, n)
    running: deque[Array] = deque()
    parts: list[np.ndarray] = []
    bar = None if progress is None else Progress(progress, -(-n // size))
    try:
        for start in range(0, n, size):
            rows = np.minimum(np.arange(start, start + size), n - 1)
            part = x0[start : start + size] if start + size <= n else x0[rows]
            running.append(function(jnp.asarray(part), jnp.asarray(rows)))
            if len(running) > 1:
                parts.append(np.asarray(running.popleft()))
            if bar is not None:
                bar.update(start // size + 1)
    finally:
        if bar is not None:
            bar.close()
    parts.extend(np.asarray(part) for part in running)
    return np.concatenate(parts)[:n]


def _points(name: str, x: Any) -> np.ndarray:
    """The given points as a host array, in the dtype in which JAX holds them."""
    _validate.floating(name, x)
    if _validate.batch(name, x) < 1:
        raise ValueError(f"{name} must hold at least one example, got 0")
    points = np.asarray(x).astype(jnp.result_type(x), copy=False)
    _validate.finite(name, points)
    return points


def _ends(
    field: VelocityField,
    params: Params,
    points: np.ndarray,
    *,
    chunk: int,
    progress: str | None,
    options: SolverOptions,
) -> np.ndarray:
    static, partial = hashable(options), as_partial(field)
    ends = in_chunks(
        lambda part, _: _carried(partial, params, part, options=static), points, chunk=chunk, progress=progress
    )
    how = ", ".join(f"{name} = {value}" for name, value in static if value is not None) or "the default solver"
    _check_ends(ends, how)
    return ends


def _check_ends(ends: np.ndarray, how: str) -> None:
    failed = np.count_nonzero(~np.isfinite(ends).reshape(len(ends), -1).all(axis=1))
    if failed:
        raise FloatingPointError(f"ends of the flow must be finite, got {failed} of {len(ends)} that are not ({how})")


@functools.partial(jax.jit, static_argnames="options")
def _carried(field: Partial, params: Params, points: Array, *, options: tuple[tuple[str, Any], ...]) -> Array:
    return jax.vmap(lambda x: flows.transport(field, params, x, **dict(options)))(points)


@functools.partial(jax.jit, static_argnames=("steps", "solver"))
def _diffused(
    key: Key, field: Partial, params: Params, points: Array, *, rows: Array, sigma: Scalar, steps: int, solver: str
) -> Array:
    def end(row: Array, x: Array) -> Array:
        path_key = jax.random.fold_in(key, row)
        return flows.diffuse(path_key, field, params, x, sigma=sigma, steps=steps, solver=solver)

    return jax.vmap(end)(rows, points)
