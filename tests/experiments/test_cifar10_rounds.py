"""The later rounds of the image experiment: their pairs, where they are kept, and the order in which they come."""

import functools

import jax
import numpy as np

from experiments.cifar10 import rounds
from experiments.cifar10 import settings as presets
from experiments.cifar10.main import Config, rounds_of, settings_of
from experiments.common import RunFolder
from fvjax import data
from fvjax.types import Pair

DIGITS = data.load("digits")


class Made:
    """Pairs of a round, and how often they were made."""

    def __init__(self, count=4):
        self.count, self.made = count, 0

    def __call__(self, part):
        """Makes them."""
        self.made += 1
        x0 = np.arange(self.count, dtype=np.float32).reshape(-1, 1, 1, 1)
        return Pair(x0, x0 + 1)


def test_stored_pairs_are_made_once_and_again_if_damaged(tmp_path):
    """Catches half-written or damaged pairs that are trained on, and pairs that are made anew at every start."""
    settings, made, place = settings_of(Config(), "cpu", DIGITS), Made(), RunFolder(tmp_path / "2")
    stored = functools.partial(rounds.stored_pairs, settings, presets.Rounds(2, 4), 2, made, place=place, say=print)
    assert stored().x1[3, 0, 0, 0] == 4
    stored()
    assert made.made == 1
    with (place.path / "x1.npy").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    assert stored().x1[3, 0, 0, 0] == 4
    assert made.made == 2
    (place.path / "x0.npy").unlink()
    stored()
    (place.path / "record.json").unlink()  # killed before the record was written
    stored()
    assert made.made == 4
    assert not list(place.path.glob(".*"))


def test_batches_of_a_round_hold_every_pair_once_an_epoch():
    """Catches torn pairs, pairs that never come, and the order of round 2 in round 3."""
    settings, pairs = settings_of(Config(batch=8), "cpu", DIGITS), Made(16)(0)
    second, third = (rounds.batches(settings, index, pairs) for index in (2, 3))
    epoch = [second(step) for step in range(2)]
    assert sorted(np.concatenate([part.x0.ravel() for part in epoch])) == list(range(16))
    np.testing.assert_array_equal(epoch[0].x1, epoch[0].x0 + 1)
    np.testing.assert_array_equal(second(1).x0, epoch[1].x0)
    assert not np.array_equal(third(0).x0, epoch[0].x0)


def test_sources_do_not_depend_on_their_number():
    """Catches noise that changes with --pairs or with the chunk."""
    key = jax.random.key(0)
    many, few = (rounds.sources(key, dims=(2, 2, 1), count=count) for count in (130, 7))
    assert many.shape == (130, 2, 2, 1)
    np.testing.assert_array_equal(many[:7], few)
    assert len(np.unique(many)) == 520


def test_numbers_of_pairs_by_preset():
    """Catches an option that is ignored, and 50,000 pairs on a CPU."""
    for preset, options, expected in (
        ("paper", {}, 50_000),
        ("cpu", {}, 2000),
        ("cpu", {"pairs": 7}, 7),
        ("cpu", {"smoke": True}, 16),
    ):
        config = Config(rounds=3, **options)
        assert rounds_of(config, settings_of(config, preset, DIGITS)) == presets.Rounds(3, expected)
    large = DIGITS._replace(train=np.zeros((40, 32, 32, 3), np.uint8), test=np.zeros((4, 32, 32, 3), np.uint8))
    config = Config(rounds=2)
    assert rounds_of(config, settings_of(config, "cpu", large)).pairs == presets.CPU_LARGE["samples"]
