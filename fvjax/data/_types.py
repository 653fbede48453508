"""What every data source returns, and the one error that it raises."""

from typing import Any, NamedTuple

import numpy as np


class DataError(ValueError):
    """A data set that cannot be read: one line that says what is wrong and what to run."""


class Images(NamedTuple):
    """Images, uint8 [n, h, w, c] with c = 1 (grey) or 3 (RGB), split into a part to train on and one held out.

    Attributes:
        name: short name for results and file names, such as "celeba64".
        train: uint8 [n, h, w, c]; a read-only memory map where the source was decoded into a cache or is a .npy file.
        test: uint8 [m, h, w, c], never trained on.
        flip: whether a mirrored image is known to be as good as the image (CIFAR-10, CelebA; False for digits and for
            what a user brings); meant for `batch(..., flip=...)`.
        source: where the images came from, for the record of a run.
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    flip: bool
    source: str


def as_images(name: str, array: Any) -> np.ndarray:
    """`array` as uint8 [n, h, w, c]; grey images may come as [n, h, w]. A memory map stays one.

    Raises:
        DataError: for another dtype or shape, with what to do about it.
    """
    if array.dtype != np.uint8:
        raise DataError(
            f"{name} must be uint8, got {array.dtype}: convert [-1, 1] with fvjax.data.to_uint8(x), [0, 1] with"
            " numpy.rint(255 * x).astype('uint8')"
        )
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or 0 in array.shape or array.shape[-1] not in {1, 3}:
        raise DataError(
            f"{name} must be a non-empty [n, h, w] or [n, h, w, c] with c = 1 or 3 (channels last), got {array.shape}"
        )
    return array
