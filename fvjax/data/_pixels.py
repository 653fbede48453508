"""One encoded image as uint8 [h, w, c]: decoding, centre crop, resizing."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from fvjax.data._types import DataError

GREY_MODES = frozenset({"1", "L", "LA"})
_COLOUR_MODES = frozenset({"P", "RGB", "RGBA", "CMYK", "YCbCr"})


def header(path: Path) -> tuple[str, tuple[int, int]]:
    """Mode and (width, height) of an image file, without decoding it."""
    with _opened(path, str(path)) as image:
        mode, extent = image.mode, image.size
    if mode not in GREY_MODES | _COLOUR_MODES:
        raise DataError(f"{path} must be an image of 8 bits a channel, got mode {mode}: convert it to 8 bits")
    return mode, extent


def decoded(
    data: Path | bytes, name: str, *, channels: int, crop: int | None = None, size: int | None = None
) -> np.ndarray:
    """The image, centre-cropped and then resized (bilinear, antialiased).

    Args:
        data: a file, or its content.
        name: what an error calls the image.
        channels: 1 (grey) or 3 (RGB); transparency is dropped.
        crop: side of the centre square; None means the shorter side if there is a `size`, else no crop.
        size: side of the result; None means no resizing.

    Returns:
        uint8 [h, w, channels].

    Raises:
        DataError: if the image is damaged, or smaller than the crop.
    """
    from PIL import Image

    with _opened(data, name) as opened:
        try:
            image = opened.convert("L" if channels == 1 else "RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{name} cannot be decoded ({error}): replace or delete it") from error
    if size is not None:
        side = crop or min(image.size)
        if side > min(image.size):
            raise DataError(f"{name} must be at least {side} pixels wide and high, got {image.size}")
        left, top = (round((extent - side) / 2) for extent in image.size)
        image = image.crop((left, top, left + side, top + side))
        if side != size:
            image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(image.height, image.width, channels)


def _opened(data: Path | bytes, name: str) -> Any:
    """An image whose header was read."""
    from PIL import Image

    try:
        return Image.open(data if isinstance(data, Path) else io.BytesIO(data))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} cannot be read as an image ({error}): replace or delete it") from error
