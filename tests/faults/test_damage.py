"""Damaged files: the newest checkpoint is reported and passed over, and the run goes on from the one before it."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from fvjax.checkpoints import CheckpointError, Checkpoints, DamagedCheckpointWarning

STEPS = (1, 2, 3)


@pytest.fixture(scope="module")
def original(tmp_path_factory, child):
    """A folder with three checkpoints."""
    folder = tmp_path_factory.mktemp("original")
    with Checkpoints(folder, config=child.CONFIG) as checkpoints:
        for step in STEPS:
            checkpoints.save(child.state_at(step))
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def files(folder, step):
    """Files of a checkpoint, the largest first."""
    found = (path for path in (folder / f"step_{step:09d}").rglob("*") if path.is_file())
    return sorted(found, key=lambda path: (-path.stat().st_size, str(path)))


def damage(path, kind, where=0.5):
    """Damages one file."""
    content = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
    elif kind == "flip":
        content[int(where * (len(content) - 1))] ^= 0x10
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2] if kind == "truncate" else b"")


@pytest.mark.parametrize("kind", ["flip", "truncate", "empty", "delete"])
@pytest.mark.parametrize("file", ["data", "index.json"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_is_used(folder, child, kind, file):
    """Catches a state with wrong numbers, a silent step back, and a run that cannot save the damaged step again."""
    path = files(folder, 3)[0] if file == "data" else folder / "step_000000003" / file
    damage(path, kind)
    with Checkpoints(folder, config=child.CONFIG) as checkpoints:
        with pytest.warns(DamagedCheckpointWarning, match="step_000000003 is damaged and passed over: .") as caught:
            found = checkpoints.restore(child.state_at(0))
        assert len(caught) == 1
        assert str(folder) in str(caught[0].message)
        assert child.same(found, child.state_at(2))
        checkpoints.save(child.state_at(3))
        assert child.same(checkpoints.restore(child.state_at(0)), child.state_at(3))
    assert child.names(folder) == ["damaged_step_000000003", *(f"step_{step:09d}" for step in STEPS)]


@pytest.mark.parametrize("kind", ["flip", "truncate", "empty", "delete"])
def test_damage_to_any_file_is_reported(folder, child, kind):
    """Catches a file that is not looked at: every file of the checkpoint in turn, and the report names it."""
    backup = folder.with_name("backup")
    shutil.copytree(folder, backup)
    for number, path in enumerate(files(folder, 3)):
        damage(path, kind, where=0.9 if number % 2 else 0.1)
        name = str(path.relative_to(folder / "step_000000003"))
        with Checkpoints(folder, config=child.CONFIG, read_only=True) as checkpoints:
            with pytest.warns(DamagedCheckpointWarning, match=f"passed over: {re.escape(name)}"):
                found = checkpoints.restore(child.state_at(0))
            assert child.same(found, child.state_at(2)), path
        shutil.copy(backup / path.relative_to(folder), path)


def test_every_flipped_bit_of_the_arrays_is_found(folder, child):
    """Catches a file format that has no checksum for the numbers: flips over the whole of the largest file."""
    path = files(folder, 3)[0]
    content = path.read_bytes()
    for where in np.random.default_rng(0).uniform(0.05, 0.95, 12):
        damage(path, "flip", where)
        with Checkpoints(folder, config=child.CONFIG, read_only=True) as checkpoints:
            with pytest.warns(DamagedCheckpointWarning):
                found = checkpoints.restore(child.state_at(0))
            assert child.same(found, child.state_at(2))
        path.write_bytes(content)


def test_several_damaged_checkpoints_are_all_reported_and_never_accumulate(folder, child):
    """Catches a search that ends at the second one, and folders of damaged checkpoints that pile up."""
    for step in (2, 3):
        damage(files(folder, step)[0], "truncate")
    with Checkpoints(folder, config=child.CONFIG) as checkpoints:
        with pytest.warns(DamagedCheckpointWarning) as caught:
            assert child.same(checkpoints.restore(child.state_at(0)), child.state_at(1))
        assert ["step_000000003" in str(caught[0].message), "step_000000002" in str(caught[1].message)] == [True, True]
        assert checkpoints.steps() == [1]
        checkpoints.save(child.state_at(2))
        checkpoints.wait()
        damage(files(folder, 2)[0], "flip")
        with pytest.warns(DamagedCheckpointWarning, match="step_000000002"):
            checkpoints.restore(child.state_at(0))
    assert child.names(folder) == ["damaged_step_000000002", "step_000000001"]


def test_if_all_are_damaged_the_run_does_not_start_afresh(folder, child):
    """Catches a silent fresh start, now or at the next try: nothing is renamed, and nothing can be saved over it."""
    before = child.names(folder)
    for step in STEPS:
        damage(files(folder, step)[0], "truncate")
    for _ in range(2):
        with Checkpoints(folder, config=child.CONFIG) as checkpoints:
            with pytest.raises(CheckpointError, match="all checkpoints in .* are damaged .*step 3: .*backup") as caught:
                checkpoints.restore(child.state_at(0))
            assert "\n" not in str(caught.value)
            with pytest.raises(ValueError, match="state.step must be above 3"):
                checkpoints.save(child.state_at(1))
    assert child.names(folder) == before


def test_a_folder_under_another_name_is_not_taken_for_its_step(folder, child):
    """Catches a step number that is believed because of the name of the folder alone."""
    (folder / "step_000000003").rename(folder / "step_000000005")
    report = pytest.warns(DamagedCheckpointWarning, match="step_000000005 .* it is of step 3")
    with Checkpoints(folder, config=child.CONFIG) as checkpoints, report:
        assert child.same(checkpoints.restore(child.state_at(0)), child.state_at(2))
