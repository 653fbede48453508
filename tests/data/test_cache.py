"""The cache of decoded images: complete or absent, verified, and safe when two processes build it at once."""

import json
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from fvjax.data import DataError, _cache

TRAIN = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
TEST = TRAIN[:2]

# Two of these meet in the middle of decoding: each waits until the other has begun.
MEET = """
import sys, time, zlib
from pathlib import Path
from fvjax.data import _pixels, load

me, other, pictures, cache = sys.argv[1:]
original, met = _pixels.decoded, []

def decoded(*args, **kwargs):
    if not met:
        met.append(True)
        Path(me).touch()
        end = time.monotonic() + 60
        while not Path(other).exists() and time.monotonic() < end:
            time.sleep(0.01)
    return original(*args, **kwargs)

_pixels.decoded = decoded
images = load(pictures, cache_dir=cache)
print(len(met), images.train.shape, zlib.crc32(images.train.tobytes()), zlib.crc32(images.test.tobytes()))
"""

# The machine goes down in the middle of decoding.
DIE = """
import os, sys
from fvjax.data import _pixels, load

original, seen = _pixels.decoded, []

def decoded(*args, **kwargs):
    seen.append(True)
    return original(*args, **kwargs) if len(seen) < 3 else os._exit(9)

_pixels.decoded = decoded
load(sys.argv[1], cache_dir=sys.argv[2])
"""


def streams(train=TRAIN, test=TEST, length=None):
    """What a source hands to the cache."""
    first = _cache.Stream(len(train) if length is None else length, (4, 5, 3), iter(train))
    return _cache.Streams(first, _cache.Stream(len(test), (4, 5, 3), iter(test)), "somewhere")


def unexpected():
    """A source that must not be asked."""
    raise AssertionError("decoded again")


@pytest.fixture
def pictures(tmp_path, encode):
    """A folder of PNG files."""
    place = tmp_path / "pictures"
    place.mkdir()
    for index, image in enumerate(np.repeat(TRAIN, 4, axis=0)):
        (place / f"{index:02}.png").write_bytes(encode(image))
    return place


def test_what_was_written_is_read_without_decoding(tmp_path):
    """Catches a cache that is rebuilt at every start, is writable, or is not .npy for other readers."""
    _cache.read_or_build(tmp_path / "a", streams)
    cached = _cache.read_or_build(tmp_path / "a", unexpected)
    np.testing.assert_array_equal(cached.train, TRAIN)
    np.testing.assert_array_equal(cached.test, TEST)
    assert cached.source == "somewhere"
    assert isinstance(cached.train, np.memmap)
    assert not cached.train.flags.writeable
    np.testing.assert_array_equal(np.load(tmp_path / "a" / "train.npy"), TRAIN)


@hypothesis.given(st.sampled_from(["train.npy", "test.npy"]), st.data())
@hypothesis.settings(max_examples=60)
def test_every_damaged_byte_is_found(tmp_path, name, data):
    """Catches a header-only check: any changed, missing or added byte of pixels or header, with the way out."""
    folder = tmp_path / "a"
    _cache.read_or_build(folder, streams)
    path = folder / name
    original = path.read_bytes()
    content = bytearray(original)
    damage = data.draw(st.sampled_from(["flip", "cut", "append"]))
    if damage == "flip":
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif damage == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content += b"x"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        _cache.read_or_build(folder, unexpected)
    message = str(caught.value)
    assert message.startswith(f"cache {folder} is damaged (")
    assert message.endswith(f"delete it with rm -r '{folder}' and load again, which rebuilds it")
    assert "\n" not in message
    path.write_bytes(original)


@pytest.mark.parametrize(
    "record",
    [None, "", "[]", "{}", '{"format": 2}', '{"format": 1, "source": "x", "train": 3, "test": 4}', "\x00"],
)
def test_a_damaged_record_is_found(tmp_path, record):
    """Catches a KeyError or TypeError that reaches the user, and an older layout that is read as this one."""
    _cache.read_or_build(tmp_path / "a", streams)
    path = tmp_path / "a" / "record.json"
    path.unlink()
    if record is not None:
        path.write_text(record)
    with pytest.raises(DataError, match=r"^cache .* is damaged .*delete it with rm -r"):
        _cache.read_or_build(tmp_path / "a", unexpected)


def test_deleting_a_damaged_cache_rebuilds_it(tmp_path):
    """Catches advice that does not help."""
    folder = tmp_path / "a b"
    _cache.read_or_build(folder, streams)
    (folder / "train.npy").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        _cache.read_or_build(folder, streams)
    command = str(caught.value).split("delete it with ")[1].split(" and load again")[0]
    subprocess.run(command, shell=True, check=True)
    np.testing.assert_array_equal(_cache.read_or_build(folder, streams).train, TRAIN)


def test_swapped_splits_are_found(tmp_path):
    """Catches the training set being taken for the test set after a manual copy."""
    folder = tmp_path / "a"
    _cache.read_or_build(folder, streams)
    content = (folder / "test.npy").read_bytes()
    (folder / "train.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"train.npy has 248 bytes, not 488"):
        _cache.read_or_build(folder, unexpected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: streams(length=7), r"^somewhere train must hold the 7 .* got 6"),
        (lambda: streams(train=TRAIN[:0]), r"must hold the 0 \(at least 1\) .* got 0"),
        (
            lambda: streams(train=TRAIN[:, :3]),
            r"^somewhere train image 0 must be uint8 \(4, 5, 3\), got uint8 \(3, 5, 3\)",
        ),
        (lambda: streams(train=TRAIN / 2), r"image 0 must be uint8 .*, got float64"),
    ],
)
def test_a_stream_that_breaks_its_word_leaves_nothing(tmp_path, build, message):
    """Catches a short or odd-shaped cache, and temporary folders that pile up."""
    with pytest.raises(DataError, match=message):
        _cache.read_or_build(tmp_path / "a", build)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    """Catches a bare OSError; a read-only or full disk takes the same way."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"^cache .* cannot be written .*: name another folder with cache_dir$"):
        _cache.read_or_build(tmp_path / "file" / "a", streams)


def test_the_disk_runs_full(tmp_path, monkeypatch):
    """Catches a half-written cache that stays; a memory map would have killed the process here (SIGBUS)."""

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_cache.os, "fsync", full)
    with pytest.raises(DataError, match="cannot be written .*No space left on device"):
        _cache.read_or_build(tmp_path / "a", streams)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_build_the_same_cache_at_once(tmp_path, pictures):
    """Catches a torn cache, an error of the slower process, and leftovers: both decode, one cache remains."""
    marks = [str(tmp_path / "first"), str(tmp_path / "second")]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", MEET, me, other, str(pictures), str(tmp_path / "cache")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for me, other in (marks, marks[::-1])
    ]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert outputs[0][0].startswith("1 (22, 4, 5, 3) ")
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["record.json", "test.npy", "train.npy"]
    assert json.loads((folder / "record.json").read_text())["train"]["shape"] == [22, 4, 5, 3]


def test_a_build_that_dies_is_not_taken_for_a_cache(tmp_path, pictures):
    """Catches a cache under its final name before it is complete."""
    from fvjax.data import load

    cache = tmp_path / "cache"
    run = subprocess.run([sys.executable, "-c", DIE, str(pictures), str(cache)], capture_output=True, check=False)
    assert run.returncode == 9, run.stderr
    assert len(list(cache.iterdir())) == 1
    assert load(pictures, cache_dir=cache).train.shape == (22, 4, 5, 3)
