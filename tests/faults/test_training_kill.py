"""A training run that is killed, or told to stop, ends in the bits of one that was left alone."""

import csv
import random
import runpy
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

KILLS = 3
MANY = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("kill_many.py")), run_name="kill_many"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the runs lie, side by side."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(folder):
    """The uninterrupted run."""
    return MANY.live(MANY.start(folder / "whole"))


@pytest.fixture(scope="module")
def train():
    """What `train.py` defines."""
    return MANY.train()


def rows(path):
    """metrics.csv by step, as text."""
    with (path / "metrics.csv").open(newline="") as stream:
        return {int(row["step"]): row["loss"] for row in csv.DictReader(stream)}


def test_kills_change_nothing(folder, whole, train):
    """Catches a state that is not all in the checkpoint, rows of lost steps, and a batch that is made twice.

    The save of step 12 waits for that of step 6: from the 13th step of a process on there is one to resume from.
    `kill_many.py` kills at any moment.
    """
    chance = random.Random(0)
    moment = lambda: (chance.randint(13, 17), chance.uniform(0, 3 * train.PAUSE))  # noqa: E731
    lives = MANY.run_with_kills(folder / "killed", moment, KILLS)
    assert len(lives) == KILLS + 1, lives
    assert all(life.first > 0 for life in lives[1:]), lives  # each went on from a checkpoint
    assert all(life.first % train.SAVE_EVERY == 0 for life in lives)
    assert lives[-1].digest == whole.digest == train.digest(train.restored(folder / "killed"))
    assert (folder / "killed" / "metrics.csv").read_bytes() == (folder / "whole" / "metrics.csv").read_bytes()
    assert list(rows(folder / "killed")) == list(range(train.LOG_EVERY, train.STEPS + 1, train.LOG_EVERY))


def test_sigterm_saves_at_once_and_the_run_goes_on_from_there(folder, whole, train):
    """Catches an exit without a checkpoint, and a resume from the last regular one instead.

    The mean of the interval in which the run stopped is over the steps after the stop; every other row is the same.
    """
    process = MANY.start(folder / "stopped")
    while int(process.stdout.readline()) < 20:
        pass
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    _, step, digest = output.splitlines()[-1].split()
    assert 20 < int(step) < train.STEPS
    assert train.digest(train.restored(folder / "stopped")) == digest
    rest = MANY.live(MANY.start(folder / "stopped"))
    assert (rest.first, rest.last, rest.digest) == (int(step), train.STEPS - 1, whole.digest)
    found, expected = rows(folder / "stopped"), rows(folder / "whole")
    cut = -(-int(step) // train.LOG_EVERY) * train.LOG_EVERY if int(step) % train.LOG_EVERY else None
    assert {s: v for s, v in found.items() if s != cut} == {s: v for s, v in expected.items() if s != cut}
    assert found.keys() == expected.keys()
