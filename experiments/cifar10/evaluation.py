"""What a trained flow makes: its loss, samples by several solvers, and their distances to both splits."""

import functools
from collections import deque
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from experiments.cifar10.settings import Settings
from experiments.cifar10.training import probe_paths
from experiments.common import progress
from fvjax import data, flows, metrics
from fvjax.losses import squared_error
from fvjax.types import Array, Key, Params, PathSample, VelocityField

CHUNK = 100
"""Images that are generated at once on a device."""

LOSS_IMAGES = 1000
"""At most so many images of each split, with one draw of time and noise each, give the loss."""

Row = dict[str, Any]


@functools.partial(jax.jit, static_argnames="field")
def losses(field: Any, params: Params, paths: PathSample) -> Array:
    """Loss of each of the paths, without dropout, [n]."""
    loss = squared_error(field, reduction="mean")
    return jax.lax.map(lambda path: loss(params, path), paths, batch_size=CHUNK)


def final_loss(
    settings: Settings, field: VelocityField, params: Params, images: np.ndarray, *, key: Key, held_out: bool
) -> float:
    """Mean loss over images of the training split, or of the other one (`held_out`), without dropout."""
    paths = probe_paths(settings, images[:LOSS_IMAGES], key, held_out=held_out)
    return float(np.mean(np.asarray(losses(field, params, paths), np.float64)))


def solvers(settings: Settings) -> list[dict[str, Any]]:
    """Options of `flows.transport`: Euler with each number of steps, and one adaptive solver."""
    fixed: list[dict[str, Any]] = [{"solver": "euler", "steps": steps} for steps in settings.euler]
    return [*fixed, {"solver": "dopri5", "rtol": settings.tolerance, "atol": settings.tolerance}]


def generate(
    settings: Settings, field: VelocityField, params: Params, options: dict[str, Any], *, key: Key
) -> tuple[np.ndarray, np.ndarray]:
    """Samples from N(0, I) carried along the flow, as uint8, and the evaluations that each took.

    A flow trained with sigma > 0 starts from the same N(0, I): no noise is added to x0. Sample i depends on (key, i)
    alone. Processes and devices share the work; all processes get all samples.

    Args:
        settings: of the run.
        field: the network.
        params: its parameters.
        options: of `flows.transport`.
        key: of the sources.

    Raises:
        FloatingPointError: if a sample is not finite: the network has diverged, or the adaptive solver has failed.
    """
    sampler = functools.partial(_sampled, field, dims=settings.dims, options=tuple(options.items()))
    devices = jax.local_devices()
    copies = [jax.device_put(params, device) for device in devices]
    share = -(-settings.samples // jax.process_count())
    first = jax.process_index() * share
    starts = range(first, first + share, CHUNK)
    label = f"sampling, {options['solver']} {options.get('steps', '')}".rstrip()
    running: deque[flows.Counted] = deque()
    parts: list[tuple[np.ndarray, np.ndarray]] = []

    def collect() -> None:
        done = running.popleft()
        state = np.asarray(done.state)
        failed = np.count_nonzero(~np.isfinite(state).all(axis=(1, 2, 3)))
        if failed:
            raise FloatingPointError(f"samples must be finite, got {failed} of {len(state)} that are not ({label})")
        parts.append((data.to_uint8(state), np.asarray(done.evaluations)))

    for i, start in enumerate(progress(starts, label, len(starts))):
        keys = jax.vmap(lambda k: jax.random.fold_in(key, k))(start + jnp.arange(CHUNK))
        running.append(sampler(copies[i % len(devices)], jax.device_put(keys, devices[i % len(devices)])))
        if len(running) > len(devices):  # all devices have work; the memory of the finished chunks is freed
            collect()
    while running:
        collect()
    images, counts = (np.concatenate(arrays)[:share] for arrays in zip(*parts, strict=True))
    if jax.process_count() > 1:
        images, counts = (multihost_utils.process_allgather(x, tiled=True) for x in (images, counts))
    return images[: settings.samples], counts[: settings.samples]


@functools.partial(jax.jit, static_argnames=("field", "dims", "options"))
def _sampled(
    field: Any, params: Params, keys: Key, *, dims: tuple[int, ...], options: tuple[tuple[str, Any], ...]
) -> flows.Counted:
    """One sample a key; compiled once for all rounds."""

    def one(key: Key) -> flows.Counted:
        return flows.counted_transport(field, params, jax.random.normal(key, dims), **dict(options))

    return jax.vmap(one)(keys)


def moments_of(features: data.features.Features, images: np.ndarray) -> metrics.FeatureMoments:
    """Streaming moments of the features of images."""
    parts = (images[start : start + 1000] for start in range(0, len(images), 1000))
    return metrics.feature_moments(features(np.asarray(part)) for part in parts)


def compared(
    settings: Settings,
    field: VelocityField,
    params: Params,
    known: Mapping[str, metrics.FeatureMoments],
    *,
    features: data.features.Features,
    key: Key,
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Samples by every solver, with their evaluations and distances to both splits.

    Args:
        settings: of the run.
        field: the network.
        params: its parameters.
        known: moments of the features of "train" and "test".
        features: what the distances are between.
        key: of the sources.

    Returns:
        One row a solver {solver, steps, tolerance, nfe, nfe_max, distance_train, distance_test}, nfe the mean over the
        samples; and the samples, uint8 [n, h, w, c] by name of the solver.
    """
    rows, drawn = [], {}
    for options in solvers(settings):
        samples, counts = generate(settings, field, params, options, key=key)
        name = f"euler_{options['steps']}" if "steps" in options else f"dopri5_{settings.tolerance:g}"
        drawn[name] = samples
        found = moments_of(features, samples)
        row = {"solver": options["solver"], "steps": options.get("steps"), "tolerance": options.get("rtol")}
        row |= {"nfe": float(np.mean(counts)), "nfe_max": int(np.max(counts))}
        row |= {f"distance_{split}": metrics.frechet_distance(found, moments) for split, moments in known.items()}
        rows.append(row)
    return rows, drawn
