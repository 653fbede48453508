"""What surrounds the step in a run of fvjax: batches, the log, the loop of `fit`. A worker's program (_worker.py).

A small network whose step takes some 30 ms, on purpose: what is little beside it is nothing beside a long step.
"""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _train_jax import counted_step, model_of, optimizer_of
from _worker import serve_parts

from fvjax import data, training

NETWORK = {
    "channels": 8,
    "res_blocks": 1,
    "multipliers": [1, 1, 1],
    "attention": [],
    "heads": 4,
    "head_channels": None,
    "dropout": 0.1,
}
DIMS = [32, 32, 3]
IDLE_STEPS = 400
"""Of a run with a step that does nothing."""
LOG_EVERY = 10
"""Steps between two rows of the log; the CIFAR-10 experiment has 500."""
WRITES = 100


def image_file(folder: Path, count: int) -> np.ndarray:
    """Random images of 32 x 32 x 3 pixels in a memory-mapped file."""
    file = folder / "images.npy"
    np.save(file, np.random.default_rng(0).integers(0, 256, (count, *DIMS), np.uint8))
    return np.load(file, mmap_mode="r")


def epoch_seconds(images: np.ndarray, size: int, seed: int) -> float:
    """Seconds of a batch, mean over an epoch with its permutation, mirrored at random as in the experiment."""
    steps = len(images) // size
    start = time.perf_counter()
    for step in range(steps):
        data.batch(images, seed=seed, step=step, size=size, flip=True)
    return (time.perf_counter() - start) / steps


def write_seconds() -> float:
    """Seconds of a row in the log."""
    with TemporaryDirectory() as folder, training.MetricsLog(Path(folder)) as log:
        start = time.perf_counter()
        for step in range(WRITES):
            log.write(step, loss=0.1)
        return (time.perf_counter() - start) / WRITES


def idle_seconds(batch: np.ndarray) -> float:
    """Seconds of a step of `fit` whose step does nothing; the dispatch of a compiled step is included."""
    zero = jnp.zeros((), jnp.int32)
    state = training.TrainState(zero, jnp.zeros(1), (), jnp.zeros(1), jax.random.key(0))
    step = training.parallelize(lambda state, batch: (state._replace(step=state.step + 1), jnp.mean(batch[:, 0, 0, 0])))

    def run() -> float:
        start = time.perf_counter()
        training.fit(state, step, lambda _: batch, steps=IDLE_STEPS, log_every=LOG_EVERY, progress="idle")
        return (time.perf_counter() - start) / IDLE_STEPS

    run()
    return run()


class Loop:
    """The small network, its compiled step and its images."""

    def __init__(self, settings: dict[str, Any], images: np.ndarray) -> None:
        settings = {**settings, "network": NETWORK, "dims": DIMS}
        model, optimizer = model_of(settings), optimizer_of(settings)
        self.counted = counted_step(settings, model, optimizer)
        self.step = training.parallelize(self.counted)
        self.state = jax.jit(lambda key: training.init_state(key, model, optimizer))(jax.random.key(0))
        self.images = images
        self.size, self.steps = settings["batch"], settings["loop_steps"]

    def batch(self, step: int) -> np.ndarray:
        """The loader."""
        return data.batch(self.images, seed=0, step=step, size=self.size, flip=True)

    def bare(self, look_every: int = 0) -> float:
        """Seconds of a step: the compiled step on a fixed batch, waited for at the end or every so many steps."""
        start = time.perf_counter()
        state, batch = jax.tree.map(jnp.copy, self.state), self.batch(0)  # `fit` copies, too
        for index in range(self.steps):
            state, loss = self.step(state, batch)
            if look_every and index % look_every == look_every - 1:
                jax.block_until_ready(loss)
        jax.block_until_ready((state, loss))
        return (time.perf_counter() - start) / self.steps

    def fit(self) -> float:
        """Seconds of a step: `fit` with the loader, the log and the line of progress."""
        with TemporaryDirectory() as folder, training.MetricsLog(Path(folder)) as log:
            start = time.perf_counter()
            state, _ = training.fit(
                self.state,
                self.step,
                self.batch,
                steps=self.steps,
                log_every=LOG_EVERY,
                on_log=lambda state, loss: log.write(int(state.step), loss=loss),
                progress="training",
            )
            jax.block_until_ready(state)
            return (time.perf_counter() - start) / self.steps


def build(_: str, settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[str], Any]]:
    """Measures the parts by themselves; then the loops, in the order of the request.

    They are `fit`; `bare`; and `looked`, which is bare but waited for at every row of the log.
    """
    images = image_file(Path(settings["folder"]), settings["images"])
    loop = Loop(settings, images)
    loop.bare()
    loop.fit()
    loaded = {n: [epoch_seconds(images, n, seed) for seed in range(3)] for n in (settings["batch"], 128)}
    facts = {
        "batch_seconds": {size: float(np.median(seconds)) for size, seconds in loaded.items()},
        "write_seconds": float(np.median([write_seconds() for _ in range(3)])),
        "idle_seconds": float(np.median([idle_seconds(loop.batch(0)) for _ in range(3)])),
        "steps": loop.steps,
        "log_every": LOG_EVERY,
        "images": settings["images"],
        "parameters": sum(p.size for p in jax.tree.leaves(loop.state.params)),
    }

    def measured(order: str) -> dict[str, Any]:
        calls = {"fit": loop.fit, "bare": loop.bare, "looked": lambda: loop.bare(LOG_EVERY)}
        found = {name: calls[name]() for name in order.split()}
        return {**found, "traces": loop.counted.traces}

    return facts, measured


if __name__ == "__main__":
    serve_parts(build)
