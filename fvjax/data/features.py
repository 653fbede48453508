"""Feature extractors: images in, vectors out, for `fvjax.metrics.feature_moments` and `frechet_distance`.

A Fréchet distance is a number about features; write their name beside it. Only the one between `inception` features is
an FID.
"""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fvjax import _validate
from fvjax.data._types import as_images

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""Name of the file with the weights of torch-fidelity's Inception network, as it is published."""
_IMAGES_AT_ONCE = 128  # bounds the memory for pixels in float32
_INSTALL = "python -m pip install 'torch-fidelity>=0.4'"


class Features(NamedTuple):
    """A named function from images, uint8 [n, h, w, c], to features, float32 [n, k]; call it like a function."""

    name: str
    extract: Callable[[np.ndarray], np.ndarray]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features of checked images.

        Raises:
            DataError: (a ValueError) if `images` is not a non-empty uint8 [n, h, w, c] with c = 1 or 3.
        """
        return self.extract(as_images("images", images))


def pooled_pixels(max_side: int = 8) -> Features:
    """Pixels in [0, 1], averaged over a grid of at most max_side x max_side cells: needs no network and no download.

    Each cell is the mean over its area; where the side of the image is no multiple of the grid's, pixels count by the
    part of them that lies in the cell. A side of at most `max_side` pixels is left as it is.

    The Fréchet distance of these features compares colours and layout, no texture and no content. It is NOT an FID and
    not on its scale: never call it one.

    Args:
        max_side: cells along each side of the grid, integer >= 1.

    Returns:
        Features named "pooled_pixels_<max_side>": [n, h, w, c] -> [n, min(h, max_side) * min(w, max_side) * c].

    Raises:
        ValueError: if `max_side` is not an integer >= 1.
    """
    _validate.positive_integer("max_side", max_side)

    def extract(images: np.ndarray) -> np.ndarray:
        height, width, channels = images.shape[1:]
        rows, columns = (_area_means(side, min(side, max_side)) for side in (height, width))
        # Columns in one matrix product for all rows of pixels, whose channels are interleaved.
        spread = np.kron(columns.T, np.eye(channels, dtype=np.float32))
        parts = []
        for start in range(0, len(images), _IMAGES_AT_ONCE):
            part = images[start : start + _IMAGES_AT_ONCE].astype(np.float32).reshape(-1, height, width * channels)
            parts.append((rows @ (part @ spread)).reshape(len(part), -1) / np.float32(255))
        return np.concatenate(parts)

    return Features(f"pooled_pixels_{max_side}", extract)


def inception(weights: str | Path, *, device: str = "cpu", batch_size: int = 64) -> Features:
    """The 2048 features of the Inception network that FID is defined with, by torch-fidelity (extra `fid`).

    Images are resized to 299x299 as in the original TensorFlow code, whatever their size; grey ones are repeated in
    three channels. Nothing is ever downloaded: `weights` is torch-fidelity's file weights-inception-2015-12-05-
    6726825d.pth, from the release v0.2.0 of its repository. It is read as tensors only, without running what a pickle
    may contain. For an FID that can be compared with published ones use as many images as they did (mostly 50,000).

    Args:
        weights: the file with the weights.
        device: of PyTorch, such as "cpu" or "cuda".
        batch_size: images at a time, integer >= 1; memory only, not the result.

    Returns:
        Features named "inception_2048": [n, h, w, c] -> [n, 2048].

    Raises:
        ImportError: if torch-fidelity cannot be imported; says how to install it.
        ValueError: if the file is missing or holds something else, or `batch_size` is not an integer >= 1.

    Source: Heusel et al. 2017 (FID); Obukhov et al. 2020, torch-fidelity (equal to the TensorFlow original).
    """
    _validate.positive_integer("batch_size", batch_size)
    try:
        import torch
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, OSError, RuntimeError) as error:  # a torchvision built for another torch: RuntimeError
        raise ImportError(f"inception features need torch-fidelity ({_line(error)}): run {_INSTALL}") from error
    checked = _safe_copy(torch, Path(weights).expanduser())
    try:
        network = FeatureExtractorInceptionV3("inception_2048", ["2048"], feature_extractor_weights_path=checked)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"weights must be {INCEPTION_FILE}, got {weights}, which does not fit: {_line(error)}"
        ) from error
    network.to(device)

    def extract(images: np.ndarray) -> np.ndarray:
        parts = []
        with torch.inference_mode():
            for start in range(0, len(images), batch_size):
                part = np.moveaxis(np.asarray(images[start : start + batch_size]), -1, 1)
                part = np.ascontiguousarray(np.broadcast_to(part, (len(part), 3, *part.shape[2:])))
                parts.append(network(torch.from_numpy(part).to(device))[0].cpu().numpy())
        return np.concatenate(parts)

    return Features("inception_2048", extract)


def _area_means(length: int, cells: int) -> np.ndarray:
    """Matrix [cells, length] that averages `length` pixels over equal cells; rows sum to 1."""
    edges = np.linspace(0, length, cells + 1)
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.maximum(overlap, 0) * (cells / length)).astype(np.float32)


def _safe_copy(torch: Any, path: Path) -> io.BytesIO:
    """The tensors of a file of weights, written anew in memory.

    torch-fidelity unpickles what it is given, which may run code; `weights_only` reads tensors and nothing else.
    """
    if not path.is_file():
        raise ValueError(f"weights must be the file {INCEPTION_FILE} of torch-fidelity, got {path}, which is no file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError) as error:
        raise ValueError(
            f"weights must be {INCEPTION_FILE}, got {path}, which is not tensors: {_line(error)}"
        ) from error
    copy = io.BytesIO()
    torch.save(state, copy)
    copy.seek(0)
    return copy


def _line(error: Exception) -> str:
    """The beginning of an error's message, on one line."""
    return " ".join(str(error).split())[:200]
