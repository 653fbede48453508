"""A tensorflow-datasets data set of a few images, prepared for real and offline, of any name that is registered."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Prepare = Callable[[Path, str, Mapping[str, Any]], None]


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """Turns uint8 [h, w, c] into the bytes of an image file."""
    from PIL import Image

    def encoded(pixels: np.ndarray, suffix: str = "png") -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, suffix)
        return file.getvalue()

    return encoded


@pytest.fixture(scope="session")
def prepare(encode: Callable[..., bytes]) -> Prepare:
    """Prepares {split: images} under the name and with the features of a registered data set, as array_record."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    def example(feature: Any, pixels: np.ndarray) -> Any:
        if isinstance(feature, tfds.features.FeaturesDict):
            return {name: example(feature[name], pixels) for name in feature}
        if isinstance(feature, tfds.features.Image):
            return io.BytesIO(encode(pixels))
        return "" if isinstance(feature, tfds.features.Text) else 0

    def prepared(folder: Path, name: str, splits: Mapping[str, Any]) -> None:
        original = tfds.builder(name, data_dir=str(folder))
        with registered.skip_registration():

            class Tiny(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]
                VERSION = original.version

                def _info(self) -> Any:
                    return tfds.core.DatasetInfo(builder=self, features=original.info.features)

                def _split_generators(self, dl_manager: Any) -> Any:
                    return {split: self._generate_examples(images) for split, images in splits.items()}

                def _generate_examples(self, images: Any) -> Any:
                    for index, pixels in enumerate(images):
                        yield index, example(self.info.features, pixels)

        Tiny.name = name
        Tiny(data_dir=str(folder)).download_and_prepare(file_format="array_record")

    return prepared
