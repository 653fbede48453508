"""ReFlow: later rounds, each trained on the fixed pairs that the flow of the round before makes of its own noise."""

import functools
import json
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cifar10 import training as first_round
from experiments.cifar10.settings import Rounds, Settings
from experiments.common import RunFolder, SettingsError
from fvjax import couplings, data, rectification, training
from fvjax.interpolants import constant_noise, draw_paths
from fvjax.types import Array, Key, Model, Pair, Params, PathSample

CHUNK = 100
"""Images that are generated at once."""

RECORD = "record.json"


class Finished(NamedTuple):
    """A round: its averaged parameters, the pairs that it was trained on (none in round 1) and its metrics.csv."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody wants of a round
    params: Params
    pairs: Pair | None
    rows: list[dict[str, Any]]


def folder_of(folder: Path, index: int) -> Path:
    """Where round `index` >= 2 keeps its pairs, checkpoints and metrics."""
    return folder / "rounds" / str(index)


def train_rounds(
    settings: Settings,
    rounds: Rounds,
    model: Model,
    params: Params,
    *,
    folder: Path,
    say: Callable[[str], None],
) -> list[Finished] | None:
    """Trains rounds 2, 3, ... or goes on with them, from the averaged parameters of round 1.

    Each starts from the averaged parameters of the round before, whose flow (Euler, as many steps as the results are
    of) makes its pairs, with a new optimiser, a new average and the same number of steps.

    Returns:
        The rounds; None if one was stopped by SIGTERM (it has said where).

    Raises:
        SettingsError: if the stored pairs are another number.
        FloatingPointError: if a pair is not finite.
        NonFiniteLossError, CheckpointError, ConfigMismatchError: see there.
    """
    finished: list[Finished] = []
    stopped = False

    def train(index: int, pairs_of: rectification.PairsOf, params: Params) -> Params:
        nonlocal stopped
        place = RunFolder(folder_of(folder, index), resume=folder_of(folder, index).is_dir())
        pairs = stored_pairs(settings, rounds, index, pairs_of, place=place, say=say)
        state, rows = _train_on(settings, rounds, model, params, index=index, pairs=pairs, folder=place.path)
        if int(state.step) < settings.steps:
            stopped = True
            say(f"stopped in round {index} at step {int(state.step)} of {settings.steps}")
        finished.append(Finished(index, state.ema_params, pairs, rows))
        return state.ema_params

    key = jax.random.fold_in(jax.random.key(settings.seed), 12)
    for _ in rectification.reflow(
        train,
        model.apply,
        params,
        functools.partial(sources, dims=settings.dims, count=rounds.pairs),
        key=key,
        rounds=rounds.rounds,
        first_round=2,
        chunk=CHUNK,
        solver="euler",
        steps=settings.euler[0],
    ):
        if stopped:
            return None
    return finished


def sources(key: Key, *, dims: tuple[int, ...], count: int) -> Any:
    """Noise from N(0, I) on the host, float32 [count, *dims]; row i depends on (key, i) alone."""
    draw = jax.jit(jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), dims)))
    parts = (np.asarray(draw(start + jnp.arange(CHUNK))) for start in range(0, count, CHUNK))
    return np.concatenate(list(parts))[:count]


def stored_pairs(
    settings: Settings,
    rounds: Rounds,
    index: int,
    pairs_of: rectification.PairsOf,
    *,
    place: RunFolder,
    say: Callable[[str], None],
) -> Pair:
    """The pairs of a round, memory-mapped from its folder; made first if they are not there whole.

    Raises:
        SettingsError: if those in the folder were made with other settings.
    """
    record = {"round": index, "pairs": rounds.pairs, "euler": settings.euler[0], "seed": settings.seed}
    known = _read_record(place.path / RECORD)
    if known is not None and known["record"] != record:
        raise SettingsError(f"the pairs of round {index} must be those of the run, {known['record']}, got {record}")
    names = ("x0.npy", "x1.npy")
    if known is None or any(_digest(place.path / name) != known["digests"][name] for name in names):
        say(f"round {index}: {rounds.pairs} pairs, Euler {settings.euler[0]}")
        (place.path / RECORD).unlink(missing_ok=True)
        for name, array in zip(names, pairs_of(0), strict=True):
            _write_array(place.path / name, np.asarray(array))
        place.write_json(RECORD, {"record": record, "digests": {name: _digest(place.path / name) for name in names}})
    return Pair(*(np.load(place.path / name, mmap_mode="r") for name in names))


def _read_record(path: Path) -> dict[str, Any] | None:
    """What is known of the stored pairs; None if they were not finished."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return found


def _write_array(path: Path, array: np.ndarray) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as stream:
        np.save(stream, array)
    partial.replace(path)


def _digest(path: Path) -> int | None:
    """CRC of a file, None if there is none."""
    if not path.exists():
        return None
    digest = 0
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(1 << 20):
            digest = zlib.crc32(block, digest)
    return digest


def _train_on(
    settings: Settings,
    rounds: Rounds,
    model: Model,
    params: Params,
    *,
    index: int,
    pairs: Pair,
    folder: Path,
) -> tuple[training.TrainState, list[dict[str, Any]]]:
    """Trains on fixed pairs, or goes on from the newest checkpoint of the round."""
    optimizer = first_round.optimizer_of(settings)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(settings.seed), 13), index)
    run_key, probe_key = jax.random.split(key)

    def first_state() -> training.TrainState:
        return training.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), params, run_key)

    config = asdict(settings) | {"round": index, "pairs": rounds.pairs}
    start = first_round.Start(jax.eval_shape(first_state), first_state, config)
    return first_round.run(
        settings,
        start,
        step=first_round.step_of(settings, model, coupling=couplings.paired, source=None),
        batches=batches(settings, index, pairs),
        monitor=first_round.monitor_of(settings, model, pairs, probe_key),
        folder=folder,
        label=f"round {index}",
    )


def batches(settings: Settings, index: int, pairs: Pair) -> Callable[[int], Pair]:
    """The pairs of each step: each of them once an epoch, in an order of the round's own."""
    seed = settings.seed + index * 2**32  # above the seeds of --seed

    def pairs_of(step: int) -> Pair:
        chosen = data.batch_indices(seed, step, settings.batch, len(pairs.x0))
        return Pair(pairs.x0[chosen], pairs.x1[chosen])

    return pairs_of


def first_pairs(pairs: Pair, count: int) -> Pair:
    """The first `count` pairs, on the device."""
    return Pair(*(jnp.asarray(np.asarray(part[:count])) for part in pairs))


def paths_of(settings: Settings, pairs: Pair, key: Key) -> PathSample:
    """One draw of time and noise for each pair."""
    return draw_paths(key, pairs, constant_noise(settings.sigma))


def ends_of(model: Model, params: Params, x0: Array, **options: Any) -> Any:
    """Where the flow takes x0, on the host."""
    return rectification.generate_pairs(model.apply, params, x0, chunk=CHUNK, **options).x1
