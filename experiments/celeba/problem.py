"""The pairs of a run: sources with their optimal targets, for training and held out, and how training sees them."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments.common import SettingsError
from fvjax import couplings, data
from fvjax.data import ot_benchmark
from fvjax.types import Coupling, Key, Pair

COUPLINGS: dict[str, Coupling] = {
    "shuffled": couplings.shuffled,
    "ot": couplings.paired,
    "independent": couplings.paired,
}
"""Values of --coupling. With independent ones each batch draws sources and targets anew; the pairs are not used."""


class Source(NamedTuple):
    """Where pairs come from."""

    data: str
    ot_source: str
    notice: str
    train: ot_benchmark.OptimalPairs
    held_out: ot_benchmark.OptimalPairs

    @property
    def dims(self) -> tuple[int, int, int]:
        """(h, w, c) of the images."""
        height, width, channels = self.train.dims
        return height, width, channels


class Problem(NamedTuple):
    """The pairs of one run: the optimal ones, as training sees them, and whether it mixes their sources and targets."""

    optimal: Pair
    held_out: Pair
    trained: Pair
    mixed: bool


def find_source(
    name: str,
    *,
    data_dir: Path | None,
    size: int | None,
    ot_source: str,
    which: str,
    amount: float,
    sharpness: float,
) -> Source:
    """The source of the pairs and a sentence about how it was chosen.

    Args:
        name: "auto", or as in `data.load`.
        data_dir: of tensorflow-datasets.
        size: side of the images, as in `data.load`.
        ot_source: "convex", or a folder with the files of the Wasserstein-2 benchmark.
        which: its checkpoint, "Early", "Mid" or "Late".
        amount: of the convex map, as in `ot_benchmark.convex_pairs`.
        sharpness: of the convex map.

    Raises:
        DataError: if what was asked for cannot be read.
        SettingsError: if the options do not fit each other.
    """
    if ot_source != "convex":
        if name not in {"auto", "celeba"} or size not in {None, 64}:
            raise SettingsError(
                "--data must be auto or celeba, and --size 64, with the files of the benchmark as --ot-source, got"
                f" --data {name} --size {size}"
            )
        pairs = ot_benchmark.celeba64(ot_source, which)
        notice = f"the Wasserstein-2 benchmark's CelebA64 pairs ({which}): generated faces, no data set"
        return Source(pairs.name, "wasserstein2_benchmark", notice, pairs, pairs)
    images, notice = _images(name, data_dir, size)
    train, test = (
        ot_benchmark.convex_pairs(images, split=split, amount=amount, sharpness=sharpness)
        for split in ("train", "test")
    )
    return Source(images.name, train.name, notice, train, test)


def _images(name: str, data_dir: Path | None, size: int | None) -> tuple[data.Images, str]:
    if name != "auto":
        images = data.load(name, data_dir=data_dir, size=size)
        return images, f"{images.source}; exact OT pairs by a convex map"
    try:
        images = data.load("celeba", data_dir=data_dir, size=size)
    except data.DataError as error:
        if size not in {None, 8}:
            raise
        reason = str(error).partition(": run:")[0]
        return data.load("digits"), f"NOT CelebA: scikit-learn's 8x8 digits, exact OT pairs by a convex map ({reason})"
    return images, f"{images.source}; exact OT pairs by a convex map"


def counts(source: Source, pairs: int, held_out: int, *, asked: bool) -> tuple[int, int]:
    """Pairs to train on and held out: as many as wanted, fewer where a default exceeds the images.

    Raises:
        SettingsError: if more were `asked` for than there are images, or fewer than 2 remain.
    """
    if source.train.size is not None and source.held_out.size is not None:
        if asked and pairs > source.train.size:
            raise SettingsError(
                f"--pairs must be at most {source.train.size}, the training images of {source.data}, got {pairs}"
            )
        pairs, held_out = min(pairs, source.train.size), min(held_out, source.held_out.size)
    if pairs < 2 or held_out < 2:
        raise SettingsError(f"{source.data} must hold at least 2 + 2 images, got {pairs} + {held_out}")
    return pairs, held_out


def draw(key: Key, source: Source, coupling: str, *, pairs: int, held_out: int) -> Problem:
    """Draws the pairs: a function of the key alone."""
    train_key, held_out_key, coupling_key = jax.random.split(key, 3)
    optimal = source.train.sample(train_key, pairs)
    trained = COUPLINGS[coupling](coupling_key, *optimal)
    return Problem(optimal, source.held_out.sample(held_out_key, held_out), trained, coupling == "independent")


def baselines(problem: Problem) -> list[dict[str, object]]:
    """What needs no training: distances to the optimal targets, with mean, standard deviation and number."""
    train, held_out = problem.optimal, problem.held_out
    mean = np.asarray(train.x1).mean(axis=0)
    rows = [
        _distance("identity", "train", np.asarray(train.x0), train.x1),
        _distance("identity", "held_out", np.asarray(held_out.x0), held_out.x1),
        _distance("mean", "train", mean, train.x1),
        _distance("mean", "held_out", mean, held_out.x1),
    ]
    if not problem.mixed:
        rows.append(_distance("training_target", "train", np.asarray(problem.trained.x1), train.x1))
    return rows


def _distance(baseline: str, split: str, predicted: np.ndarray, target: object) -> dict[str, object]:
    values = np.asarray(target)
    distances = np.linalg.norm((predicted - values).reshape(len(values), -1), axis=1)
    measured = {"l2_mean": float(distances.mean()), "l2_std": float(distances.std(ddof=1)), "n": len(values)}
    return {"baseline": baseline, "split": split, "target": "ot", **measured}
