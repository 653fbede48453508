"""Images from wherever they are: `load(source)` and, from them, batches that depend on (seed, step) alone."""

import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fvjax import _validate
from fvjax.data._batches import batch, batch_indices, to_uint8
from fvjax.data._folder import load_folder
from fvjax.data._tfds import TFDS, load_tfds
from fvjax.data._types import DataError, Images, as_images

__all__ = ["DataError", "Images", "batch", "batch_indices", "load", "to_uint8"]

_HELD_OUT = 10  # one example in so many is held out where the source has no split of its own
_ZIP = b"PK"  # begins an .npz file
# What numpy raises for files that are damaged: in a header, in an archive, in compressed data.
_UNREADABLE = (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error)


def load(
    source: str | Path,
    *,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    size: int | None = None,
    download: bool = False,
) -> Images:
    """Images of a named data set or of a path, uint8 [n, h, w, c].

    ==================  ==========================================================================================
    "digits"            scikit-learn's 1,797 digits 8x8x1, values 0-16 scaled to 0-255; no download. Every tenth
                        image is held out
    "cifar10"           32x32x3, 50,000 + 10,000, through tensorflow-datasets
    "celeba"            `size` (64) square, 162,770 + 19,962 (the validation split is left out), through
                        tensorflow-datasets: centre crop of 140x140, then bilinear with antialiasing
    folder of images    .png .jpg .jpeg .bmp .webp .tif .tiff .ppm .pgm, any nesting, sorted by path; its subfolders
                        train/ and test/ where it has both, else every tenth image is held out
    .npy                uint8 [n, h, w] or [n, h, w, c], memory-mapped; the last tenth is held out
    .npz                uint8 arrays train and test, or x_train and x_test; read into memory
    ==================  ==========================================================================================

    CelebA's crop is the one of score_sde (Song et al. 2021) and of the Wasserstein-2 benchmark (Korotin et al. 2021),
    whose pairs the paper uses: the face without most of the background. With a `size`, an image of a folder is
    centre-cropped to a square and resized likewise; without, all must have one size. A folder of grey images has one
    channel, any other three; transparency is dropped.

    CIFAR-10, CelebA (3 minutes) and folders are decoded once, image by image, into a cache of uint8 .npy files that is
    memory-mapped afterwards. Each `load` verifies the cache by its shapes, dtype, sizes and a CRC-32 of all bytes
    (about 2 GB/s from memory: 0.1 s for CIFAR-10, 1.1 s for CelebA at 64). Several processes may build one at once:
    each writes a folder of its own, the first renames it into place. The cache of a data set is used as it is found,
    so delete it when the data are prepared anew; that of a folder is bound to names, sizes and times of its files.

    Args:
        source: one of the names above, or a path.
        data_dir: where tensorflow-datasets keeps its data ("cifar10" and "celeba" only); None means its default.
        cache_dir: where caches are kept; None means `data_dir`/fvjax if that is given, else $XDG_CACHE_HOME/fvjax
            or ~/.cache/fvjax. Unused where nothing is decoded.
        size: side of the square images, of "celeba" (at most 140) and folders; for others None or what they have.
        download: whether tensorflow-datasets may download and prepare a missing data set ("cifar10", "celeba").

    Returns:
        Images(name, train, test, flip, source).

    Raises:
        DataError: (a ValueError) if the source is unknown, not prepared, empty, damaged or of the wrong shape; it says
            what to run.
        ValueError: if an argument does not fit the source.
    """
    if size is not None:
        _validate.positive_integer("size", size)
    cache = None if cache_dir is None else Path(cache_dir).expanduser()
    if source in TFDS:
        folder = None if data_dir is None else Path(data_dir).expanduser()
        return load_tfds(str(source), data_dir=folder, cache_dir=cache, size=size, download=download)
    if data_dir is not None or download:
        raise ValueError(
            f"data_dir and download must be left out for source {str(source)!r}: only {' and '.join(TFDS)} use them"
        )
    if source == "digits":
        return _expect_size(_digits(), size)
    path = Path(source).expanduser()
    if path.is_dir():
        return load_folder(path, cache_dir=cache, size=size, hold_out=_HELD_OUT)
    if path.suffix in {".npy", ".npz"} and path.is_file():
        return _expect_size(_array(path), size)
    raise DataError(
        f"source must be digits, {', '.join(TFDS)}, a folder of images, or a .npy or .npz file that exists, got"
        f" {str(source)!r}"
    )


def _expect_size(images: Images, size: int | None) -> Images:
    """`images`, if they have the wanted size: arrays are used as they are."""
    height, width = images.train.shape[1:3]
    if size is not None and (height, width) != (size, size):
        raise ValueError(f"size must be None or what {images.source} has, {height}x{width}, got {size}")
    return images


def _digits() -> Images:
    """scikit-learn's digits; round(255 v / 16) keeps the 17 levels apart."""
    from sklearn import datasets

    values = datasets.load_digits().images
    pixels = np.rint(values * (255 / 16)).astype(np.uint8)[..., None]
    held_out = np.arange(len(pixels)) % _HELD_OUT == _HELD_OUT - 1
    return Images("digits", pixels[~held_out], pixels[held_out], False, "scikit-learn load_digits")


def _array(path: Path) -> Images:
    """Images of a .npy or .npz file; the former stays on disk."""
    try:
        with path.open("rb") as file:
            is_archive = file.read(len(_ZIP)) == _ZIP
            file.seek(0)
            if is_archive:  # from an open file, since numpy leaves one that it cannot read open
                with np.load(file, allow_pickle=False) as arrays:
                    train, test = _both(path, arrays)
            else:
                train, test = _hold_out(path, as_images(str(path), np.load(path, mmap_mode="r", allow_pickle=False)))
    except DataError:
        raise
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read as a {path.suffix} file of numbers ({reason}): save it anew") from error
    return Images(path.stem, train, test, False, str(path))


def _hold_out(path: Path, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All but the last tenth, and the last tenth (rounded up): both are views of the file."""
    if len(images) < 2:
        raise DataError(f"{path} must hold at least 2 images, one of them to be held out, got {len(images)}")
    first = len(images) - -(-len(images) // _HELD_OUT)
    return images[:first], images[first:]


def _both(path: Path, arrays: Any) -> tuple[np.ndarray, np.ndarray]:
    """The two splits of an .npz file."""
    pair = next((names for names in (("train", "test"), ("x_train", "x_test")) if {*names} <= {*arrays.files}), None)
    if pair is None:
        raise DataError(f"{path} must hold arrays train and test (or x_train and x_test), got {arrays.files}")
    train, test = (as_images(f"{path}:{name}", arrays[name]) for name in pair)
    if train.shape[1:] != test.shape[1:]:
        raise DataError(f"{path}: train and test images must have one shape, got {train.shape} and {test.shape}")
    return train, test
