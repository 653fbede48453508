"""What every test runs under: CPU as four devices, quick compilation, strict dtype promotion; and fixtures."""

import os
from importlib import metadata

# The suite compiles thousands of small programs and runs most of them once. XLA's older generator of code for the CPU
# takes half the time for them, and two thirds of that where it does not cut each program into 32 parts for its threads.
# By version: XLA ends the process at a flag that it does not know.
QUICK_FLAGS = (
    ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    if metadata.version("jaxlib").startswith("0.10.")
    else []
)
# Before the first import of jax, which reads these.
for _flag in ["--xla_force_host_platform_device_count=4", *QUICK_FLAGS]:
    if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["MPLBACKEND"] = "Agg"

import gc  # noqa: E402
import io  # noqa: E402
from collections.abc import Callable, Iterator, Mapping  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Tracing makes many objects and little garbage, and each collection looks through all of JAX.
gc.set_threshold(50_000, 20, 50)

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


COMPILED_IN_FULL = {"parallel", "interpolants", "test_interpolants.py"}
"""Where tests compare bits of different programs: these may round otherwise without."""


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly(request: pytest.FixtureRequest) -> Iterator[bool]:
    """XLA rewrites, fuses and partitions programs as ever, LLVM spends little on them; says whether it is so here.

    Experiments in child processes are compiled as `--smoke` says, without most optimizations, and with QUICK_FLAGS.
    """
    parts = request.path.relative_to(Path(__file__).parent).parts
    quick = COMPILED_IN_FULL.isdisjoint(parts)
    jax.config.update("jax_disable_most_optimizations", quick)
    yield quick
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def compiled_in_full(compiled_quickly: bool) -> Iterator[None]:
    """For one test that trains so long that what LLVM does pays."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", compiled_quickly)


@pytest.fixture(scope="module", autouse=True)
def forget_compilations() -> Iterator[None]:
    """What one file has traced and compiled is of no use to the next; kept, it grows to 5 GB, and all gets slower."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def quick_flags() -> str:
    """QUICK_FLAGS, for the environment of child processes."""
    return " ".join(QUICK_FLAGS)


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def wrong_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fault of `fvjax.sites` might do: the cotangents of two channels of every layer are 3% too large."""
    from fvjax.sites import _engine

    @jax.custom_jvp
    def probe(value: jax.Array, _delta: jax.Array) -> jax.Array:
        return value

    @probe.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        value, more = tangents
        return primals[0], value + (more * jnp.where(jnp.arange(more.shape[-1]) < 2, 1.03, 1.0) if more.ndim else more)

    monkeypatch.setattr(_engine, "_probe", probe)


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
