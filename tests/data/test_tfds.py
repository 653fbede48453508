"""CIFAR-10 and CelebA out of small data sets that tensorflow-datasets itself prepared, whole and damaged."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from fvjax.data import DataError, load


def noise(n, height, width):
    """Images uint8 [n, height, width, 3]."""
    return np.random.default_rng(n).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def as_sets(images):
    """Images without their order, which tensorflow-datasets shuffles."""
    return sorted(image.tobytes() for image in images)


@pytest.fixture(scope="module")
def originals(tmp_path_factory, prepare):
    """A data_dir with 12 + 5 images of CIFAR-10's shape and 3 + 2 of CelebA's."""
    folder = tmp_path_factory.mktemp("tfds")
    prepare(folder, "cifar10", {"train": noise(12, 32, 32), "test": noise(5, 32, 32)})
    prepare(folder, "celeb_a", {"train": noise(3, 218, 178), "test": noise(2, 218, 178)})
    return folder


@pytest.fixture
def data_dir(originals, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(originals, tmp_path / "data"))


def shards(data_dir):
    """The files with the records of cifar10's training split."""
    return sorted(data_dir.glob("cifar10/*/cifar10-train.array_record*"))


def test_cifar10_is_decoded_once_and_memory_mapped(data_dir, monkeypatch):
    """Catches lost images, swapped splits, a cache that is not used (the data set is gone the second time)."""
    first = load("cifar10", data_dir=data_dir)
    assert as_sets(first.train) == as_sets(noise(12, 32, 32))
    assert as_sets(first.test) == as_sets(noise(5, 32, 32))
    assert (first.name, first.flip) == ("cifar10", True)
    assert first.source.startswith("tensorflow-datasets cifar10/")
    shutil.rmtree(data_dir / "cifar10")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    second = load("cifar10", data_dir=data_dir, size=32)
    np.testing.assert_array_equal(second.train, first.train)
    assert isinstance(second.train, np.memmap)
    assert not second.train.flags.writeable


def test_celeba_is_the_centre_crop_of_140(data_dir, tmp_path):
    """Catches swapped axes and an off-centre crop; without resizing every pixel is known."""
    images = load("celeba", data_dir=data_dir, cache_dir=tmp_path / "cache", size=140)
    assert as_sets(images.train) == as_sets(noise(3, 218, 178)[:, 39:179, 19:159])
    assert images.name == "celeba140"
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["celeba140"]


def test_celeba_is_resized_with_antialiasing(data_dir):
    """Catches subsampling: noise of standard deviation 74 is averaged over about 2.2 x 2.2 pixels, not picked."""
    images = load("celeba", data_dir=data_dir)
    assert images.train.shape == (3, 64, 64, 3)
    assert images.test.shape == (2, 64, 64, 3)
    assert images.name == "celeba64"
    assert 20 < np.std(images.train) < 40
    assert abs(np.mean(images.train, dtype=float) - 127.5) < 2


def test_celeba_is_what_torchvision_makes_of_it(data_dir):
    """Catches another filter or another rounding of the crop than in the published pre-processing."""
    transforms = pytest.importorskip("torchvision.transforms", exc_type=(ImportError, RuntimeError))
    from PIL import Image

    published = transforms.Compose([transforms.CenterCrop(140), transforms.Resize((64, 64))])
    expected = [np.asarray(published(Image.fromarray(image))) for image in noise(3, 218, 178)]
    assert as_sets(load("celeba", data_dir=data_dir).train) == as_sets(expected)


def test_a_data_set_that_is_not_prepared_says_what_to_run(tmp_path, caplog, capfd):
    """Catches tensorflow-datasets' own answers: a wrong one (TFRECORD), a stack of advice, a silent download."""
    with pytest.raises(DataError) as caught:
        load("celeba", data_dir=tmp_path / "none")
    message = str(caught.value)
    assert message.startswith("celeb_a is not prepared in ")
    code = re.search(r'python -c "([^"]*)"', message)
    assert code is not None
    compile(code[1], "advice", "exec")
    assert f"tfds.builder('celeb_a', data_dir='{tmp_path / 'none'}')" in code[1]
    assert "file_format='array_record'" in code[1]
    assert "\n" not in message
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "none").exists()


def test_a_data_set_prepared_as_tfrecord_says_how_to_get_another(data_dir):
    """Catches the NotImplementedError of tensorflow-datasets, which names no command."""
    (info,) = data_dir.glob("cifar10/*/dataset_info.json")
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    for path in data_dir.glob("cifar10/*/*array_record*"):
        path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
    with pytest.raises(
        DataError, match=r"was prepared as tfrecord, which only TensorFlow reads: run: python -c"
    ) as caught:
        load("cifar10", data_dir=data_dir)
    assert isinstance(caught.value.__cause__, NotImplementedError)
    assert f"data_dir='{data_dir}/array_record'" in str(caught.value)


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    """Catches the traceback of whatever tensorflow-datasets meets; nothing half-made may stay in the cache."""
    import tensorflow_datasets as tfds

    def no_network(self, **kwargs):
        raise ConnectionError(f"Failed to resolve\n host of {self.name} as {kwargs['file_format']}")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", no_network)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    message = (
        r"^cifar10 could not be prepared \(ConnectionError: Failed to resolve host of cifar10 as array_record\): run"
    )
    with pytest.raises(DataError, match=message) as caught:
        load("cifar10", data_dir=tmp_path, download=True)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.npy"))


def test_a_download_without_tensorflow_is_refused_before_it_starts(tmp_path, monkeypatch):
    """Catches a download of gigabytes that cannot be written in the end."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="^cifar10 cannot be prepared without tensorflow: run"):
        load("cifar10", data_dir=tmp_path, download=True)


@pytest.mark.parametrize("damage", ["truncated", "missing", "overwritten"])
def test_damaged_records_are_reported_and_leave_no_cache(data_dir, damage):
    """Catches a cache built from a part of the data set."""
    (shard,) = shards(data_dir)
    content = shard.read_bytes()
    shard.unlink()
    if damage == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    elif damage == "overwritten":
        shard.write_bytes(bytes(1000) + content[1000:])
    with pytest.raises(
        DataError, match=r"cifar10/.* train is damaged at record \d+ \(.*\): delete it with rm -r .*python"
    ):
        load("cifar10", data_dir=data_dir)
    assert list((data_dir / "fvjax").iterdir()) == []


def test_images_of_another_shape_are_refused(tmp_path, prepare, monkeypatch):
    """Catches a data set that only has the name, and a crop beyond the edge."""
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.features.Image, "shape", (None, None, 3))
    prepare(tmp_path, "celeb_a", {"train": noise(2, 100, 178), "test": noise(2, 218, 178)})
    with pytest.raises(DataError, match=r"image 0 must be at least 140 pixels wide and high, got \(178, 100\)"):
        load("celeba", data_dir=tmp_path)


def test_a_missing_split_is_reported(tmp_path, prepare):
    """Catches a data set that was prepared in part."""
    prepare(tmp_path, "cifar10", {"train": noise(2, 32, 32)})
    with pytest.raises(DataError, match="has no split test"):
        load("cifar10", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("source", "size", "message"),
    [
        ("cifar10", 64, "size must be None or 32 for cifar10, got 64"),
        ("celeba", 141, "size must be at most 140, the side of the centre crop of celeba, got 141"),
        ("celeba", 0, "size must be an integer >= 1, got 0"),
    ],
)
def test_sizes_that_do_not_exist_are_refused(tmp_path, source, size, message):
    """Catches a size that is accepted and ignored, and enlarged images."""
    with pytest.raises(ValueError, match=f"^{message}"):
        load(source, data_dir=tmp_path, size=size)
