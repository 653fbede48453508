"""CIFAR-10 and CelebA through tensorflow-datasets, without TensorFlow: decoded once into a cache."""

import contextlib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fvjax.data import _cache, _pixels
from fvjax.data._types import DataError, Images


class _Spec(NamedTuple):
    """A data set: its name there, the side of its images here, and the centre crop before they are resized."""

    name: str
    size: int
    crop: int | None


TFDS = {"cifar10": _Spec("cifar10", 32, None), "celeba": _Spec("celeb_a", 64, 140)}


def load_tfds(
    source: str, *, data_dir: Path | None, cache_dir: Path | None, size: int | None, download: bool
) -> Images:
    """A data set of TFDS, see `images.load`; tensorflow-datasets is imported only to build the cache."""
    spec = TFDS[source]
    side = spec.size if size is None else size
    if spec.crop is None and side != spec.size:
        raise ValueError(f"size must be None or {spec.size} for {source}, got {size}")
    if spec.crop is not None and side > spec.crop:
        raise ValueError(f"size must be at most {spec.crop}, the side of the centre crop of {source}, got {size}")
    name = source if spec.crop is None else f"{source}{side}"
    root = cache_dir or (_cache.default_folder() if data_dir is None else data_dir / "fvjax")

    def decode() -> _cache.Streams:
        builder = _prepared(spec, data_dir, download)
        train, test = (_stream(builder, spec, split, side) for split in ("train", "test"))
        return _cache.Streams(train, test, f"tensorflow-datasets {builder.info.full_name}")

    cached = _cache.read_or_build(root / name, decode)
    return Images(name, cached.train, cached.test, True, cached.source)


def _command(spec: _Spec, builder: Any, *, anew: bool = False) -> str:
    """What prepares the data set, `anew`: in a folder of its own, from what is already downloaded.

    In Python, since the command line `tfds build` imports more than tensorflow-datasets installs.
    """
    root = builder.data_dir_root
    place = f"{root}/array_record" if anew else f"{root}"
    downloads = f"download_dir='{root}/downloads', " if anew else ""
    code = (
        f"import tensorflow_datasets as tfds; tfds.builder('{spec.name}', data_dir='{place}')"
        f".download_and_prepare({downloads}file_format='array_record')"
    )
    then = f", then load with data_dir='{place}'" if anew else ""
    return f'python -c "{code}"{then} (it needs a network, and tensorflow to write; reading needs neither)'


def _prepared(spec: _Spec, data_dir: Path | None, download: bool) -> Any:
    """The builder of a data set whose files are there."""
    with _quiet():
        import tensorflow_datasets as tfds

        builder = tfds.builder(spec.name, data_dir=None if data_dir is None else str(data_dir))
        if not builder.is_prepared():
            if not download:
                raise DataError(f"{spec.name} is not prepared in {builder.data_dir}: run: {_command(spec, builder)}")
            _download(spec, builder)
    return builder


def _download(spec: _Spec, builder: Any) -> None:
    """Lets tensorflow-datasets download and prepare; whatever goes wrong there becomes one line."""
    if importlib.util.find_spec("tensorflow") is None:  # found out only after the download otherwise
        raise DataError(f"{spec.name} cannot be prepared without tensorflow: run: {_command(spec, builder)}")
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{spec.name} could not be prepared ({type(error).__name__}: {reason}): run: {_command(spec, builder)}"
        ) from error


def _stream(builder: Any, spec: _Spec, split: str, side: int) -> _cache.Stream:
    """One split; images are decoded as they are asked for."""
    try:
        with _quiet():
            import tensorflow_datasets as tfds

            records = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise DataError(
            f"{spec.name} in {builder.data_dir} was prepared as {builder.info.file_format.value}, which only TensorFlow"
            f" reads: run: {_command(spec, builder, anew=True)}"
        ) from error
    except ValueError as error:
        raise DataError(f"{spec.name} in {builder.data_dir} has no split {split} ({error})") from error
    advice = f"delete it with rm -r '{builder.data_dir}' and run: {_command(spec, builder)}"
    images = _decoded(records, spec, side, place=f"{builder.data_dir} {split}", advice=advice)
    return _cache.Stream(len(records), (side, side, 3), images)


def _decoded(records: Sequence[Any], spec: _Spec, side: int, *, place: str, advice: str) -> Iterator[np.ndarray]:
    """Decodes the records one after another; `place` and `advice` are for errors."""
    size = None if spec.crop is None else side
    for index in range(len(records)):
        try:
            data = bytes(records[index]["image"])
        except (RuntimeError, OSError, ValueError, TypeError, LookupError) as error:  # TypeError: truncated to nothing
            reason = " ".join(str(error).split())
            raise DataError(f"{place} is damaged at record {index} ({reason}): {advice}") from error
        yield _pixels.decoded(data, f"{place} image {index}", channels=3, crop=spec.crop, size=size)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps absl's log, through which tensorflow-datasets gives advice on installation, below errors."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
