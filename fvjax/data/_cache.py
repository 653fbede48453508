"""Decoded images on disk: uint8 .npy files beside a record of their shapes and checksums, written atomically.

A cache is a folder {train.npy, test.npy, record.json}. It is written under a temporary name beside its place and then
renamed, so that it is there completely or not at all, whatever else writes the same one at that time.
"""

import io
import json
import logging
import math
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fvjax.data._types import DataError

_FORMAT = 1
_RECORD = "record.json"
_CHUNK = 1 << 24  # bytes that are read for a checksum at a time

_logger = logging.getLogger("fvjax.data")


class Stream(NamedTuple):
    """Images that are decoded one by one: `length` arrays uint8 of shape `shape` = (h, w, c)."""

    length: int
    shape: tuple[int, int, int]
    images: Iterator[np.ndarray]


class Streams(NamedTuple):
    """Both splits, and where they come from."""

    train: Stream
    test: Stream
    source: str


class Cached(NamedTuple):
    """Both splits as read-only memory maps, and where they come from."""

    train: np.ndarray
    test: np.ndarray
    source: str


def default_folder() -> Path:
    """$XDG_CACHE_HOME/fvjax, or ~/.cache/fvjax."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fvjax"


def read_or_build(folder: Path, decode: Callable[[], Streams]) -> Cached:
    """The cache in `folder`; if there is none, what `decode()` yields is written to it first.

    Raises:
        DataError: if the cache is damaged or cannot be written, or a stream is not what it says.
    """
    if not folder.exists():
        _build(folder, decode())
    return _read(folder)


def _build(folder: Path, streams: Streams) -> None:
    """Writes a cache next to `folder` and renames it, unless another process was faster."""
    _logger.info("decoding %d + %d images into %s", streams.train.length, streams.test.length, folder)
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        unfinished.mkdir(parents=True)
        record: dict[str, Any] = {"format": _FORMAT, "source": streams.source}
        for split, stream in (("train", streams.train), ("test", streams.test)):
            checksum = _write(unfinished / f"{split}.npy", stream, f"{streams.source} {split}")
            record[split] = {"shape": [stream.length, *stream.shape], "crc32": checksum}
        (unfinished / _RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    except OSError as error:
        raise DataError(f"cache {folder} cannot be written ({error}): name another folder with cache_dir") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(path: Path, stream: Stream, name: str) -> int:
    """Writes a stream as .npy and returns the CRC-32 of its pixels.

    Through a file rather than a memory map, where a full disk would kill the process instead of raising.
    """
    checksum = written = 0
    with path.open("wb") as file:
        file.write(_header((stream.length, *stream.shape)))
        for image in stream.images:
            if image.shape != stream.shape or image.dtype != np.uint8:
                raise DataError(f"{name} image {written} must be uint8 {stream.shape}, got {image.dtype} {image.shape}")
            pixels = image.tobytes()
            checksum = zlib.crc32(pixels, checksum)
            file.write(pixels)
            written += 1
        if written != stream.length or written == 0:
            raise DataError(
                f"{name} must hold the {stream.length} (at least 1) images that it announces, got {written}"
            )
        file.flush()
        os.fsync(file.fileno())
    return checksum


def _read(folder: Path) -> Cached:
    """Opens and verifies a cache: shapes, dtype, file sizes and the checksum of every byte."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        if record["format"] != _FORMAT:
            raise ValueError(f"format {record['format']}, not {_FORMAT}")
        train, test = (_open(folder / f"{split}.npy", record[split]) for split in ("train", "test"))
        return Cached(train, test, str(record["source"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else error
        raise DataError(
            f"cache {folder} is damaged ({reason}): delete it with rm -r '{folder}' and load again, which rebuilds it"
        ) from error


def _open(path: Path, expected: dict[str, Any]) -> np.ndarray:
    """A verified memory map of one split; a plain ValueError if anything is off."""
    shape = tuple(expected["shape"])
    header = _header(shape)
    size, needed = path.stat().st_size, len(header) + math.prod(shape)
    if size != needed:
        raise ValueError(f"{path.name} has {size} bytes, not {needed}")
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            raise ValueError(f"{path.name} has another header than uint8 {shape}")
    array = np.memmap(path, np.uint8, "r", offset=len(header), shape=shape)
    if _checksum(array) != expected["crc32"]:
        raise ValueError(f"{path.name} has a wrong checksum")
    return array


def _header(shape: tuple[int, ...]) -> bytes:
    """What a .npy file of a uint8 array begins with."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


def _checksum(array: np.ndarray) -> int:
    """CRC-32 of the bytes of a contiguous uint8 array."""
    pixels = np.asarray(array).reshape(-1)
    checksum = 0
    for start in range(0, pixels.size, _CHUNK):
        checksum = zlib.crc32(pixels[start : start + _CHUNK].data, checksum)
    return checksum
