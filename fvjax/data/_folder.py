"""A folder of images, decoded once into a cache that is bound to the names, sizes and times of its files."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fvjax.data import _cache, _pixels
from fvjax.data._types import DataError, Images

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def load_folder(folder: Path, *, cache_dir: Path | None, size: int | None, hold_out: int) -> Images:
    """Images below `folder`, see `images.load`; without train/ and test/ every `hold_out`-th file is held out."""
    folder = folder.resolve()
    train, test = _split(folder, hold_out)
    key = _fingerprint(folder, [*train, *test], size)

    def decode() -> _cache.Streams:
        shape = _common_shape([*train, *test], size)
        streams = [_cache.Stream(len(files), shape, _decoded(files, shape, size)) for files in (train, test)]
        return _cache.Streams(train=streams[0], test=streams[1], source=str(folder))

    cached = _cache.read_or_build((cache_dir or _cache.default_folder()) / f"{folder.name}-{key}", decode)
    return Images(folder.name, cached.train, cached.test, False, str(folder))


def _files(folder: Path) -> list[Path]:
    """Image files at any depth, sorted by their path as bytes; hidden ones are left out."""
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    if not found:
        raise DataError(f"{folder} must hold images ({', '.join(sorted(SUFFIXES))}), got none: name another folder")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix().encode("utf-8", "surrogateescape"))


def _split(folder: Path, hold_out: int) -> tuple[list[Path], list[Path]]:
    """Files to train on and files held out."""
    parts = folder / "train", folder / "test"
    if all(part.is_dir() for part in parts):
        return _files(parts[0]), _files(parts[1])
    files = _files(folder)
    # At least one: with fewer than `hold_out` files the last one.
    test = files[hold_out - 1 :: hold_out] or files[-1:]
    held_out = set(test)
    train = [path for path in files if path not in held_out]
    if not train:
        raise DataError(f"{folder} must hold at least 2 images, one of them to be held out, got {len(files)}")
    return train, test


def _fingerprint(folder: Path, files: Sequence[Path], size: int | None) -> str:
    """Changes with the place, the size that is asked for, and every file's name, length and time."""
    digest = hashlib.sha256(f"{folder}\n{size}\n".encode("utf-8", "surrogateescape"))
    for path in files:
        status = path.stat()
        line = f"{path.relative_to(folder)}\n{status.st_size} {status.st_mtime_ns}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _common_shape(files: Sequence[Path], size: int | None) -> tuple[int, int, int]:
    """(h, w, c) of all images, from their headers: grey only if all are, any sizes only if they will be resized."""
    headers = [_pixels.header(path) for path in files]
    channels = 1 if all(mode in _pixels.GREY_MODES for mode, _ in headers) else 3
    if size is not None:
        return size, size, channels
    width, height = headers[0][1]
    for path, (_, extent) in zip(files, headers, strict=True):
        if extent != (width, height):
            raise DataError(
                f"images must all have one size, or be loaded with a size: {files[0]} has {width}x{height},"
                f" {path} has {extent[0]}x{extent[1]}"
            )
    return height, width, channels


def _decoded(files: Sequence[Path], shape: tuple[int, int, int], size: int | None) -> Iterator[np.ndarray]:
    for path in files:
        yield _pixels.decoded(path, str(path), channels=shape[2], size=size)
