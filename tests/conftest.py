"""What every test runs under: CPU as four devices, strict dtype promotion, reproducible properties; and fixtures."""

import os

# Before the first import of jax, which reads these.
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=4".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["MPLBACKEND"] = "Agg"

import io  # noqa: E402
from collections.abc import Callable, Iterator, Mapping  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")

# No deadline: the first example compiles. Derandomized: a run can be repeated, and CI does not fail by chance.
# The fixture `x64` is a mode, not a state that an example could spoil, so properties may use it.
hypothesis.settings.register_profile(
    "fvjax",
    deadline=None,
    derandomize=True,
    max_examples=15,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fvjax")


@pytest.fixture(scope="module", autouse=True)
def forget_compilations() -> Iterator[None]:
    """What one file has traced and compiled is of no use to the next; kept, it grows to 5 GB, and all gets slower."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data(repository: Path) -> Path:
    """The folder of development data beside the checkout; it is not part of the project."""
    folder = repository.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no folder ../shared/data beside the checkout")
    return folder


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
