"""Features of images: area means against numpy, Inception against the package that defines it."""

import os
import pickle
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from fvjax.data import DataError
from fvjax.data.features import _area_means, inception, pooled_pixels
from fvjax.metrics import feature_moments, frechet_distance


def noise(n, height, width, channels=3):
    """Images uint8 [n, height, width, channels]."""
    return np.random.default_rng(n).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


def test_pooled_pixels_are_means_of_blocks():
    """Catches swapped axes, mixed channels, sums instead of means, and a part of the images that is left out."""
    images = noise(300, 32, 16)
    features = pooled_pixels()
    blocks = images.reshape(300, 8, 4, 8, 2, 3).mean(axis=(2, 4)) / 255
    np.testing.assert_allclose(features(images), blocks.reshape(300, -1), rtol=1e-5)
    assert features(images).dtype == np.float32
    assert features.name == "pooled_pixels_8"


def test_small_images_are_left_as_they_are():
    """Catches an enlargement to 8 x 8."""
    images = noise(4, 8, 5, 1)
    np.testing.assert_allclose(pooled_pixels()(images), images.reshape(4, -1) / 255, rtol=1e-6)


@hypothesis.given(st.integers(1, 30), st.integers(1, 30))
def test_area_means_weigh_every_pixel_alike(length, cells):
    """Catches cells that overlap or leave a remainder out where the grid does not divide the image."""
    means = _area_means(length, min(cells, length))
    assert np.all(means >= 0)
    np.testing.assert_allclose(means.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(means.sum(axis=0), len(means) / length, rtol=1e-5)


def test_pooled_pixels_tell_colours_from_each_other():
    """Catches features that do not separate what they should: the distance of two halves of one set is far smaller."""
    images = noise(400, 16, 16)
    features = pooled_pixels(2)
    halves = [feature_moments([features(part)]) for part in (images[:200], images[200:])]
    darker = feature_moments([features(images[200:] // 2)])
    assert frechet_distance(*halves) < 0.01 * frechet_distance(halves[0], darker)


def test_features_refuse_what_is_no_picture():
    """Catches floats in [-1, 1] that are taken for levels, and a size of the grid that makes no sense."""
    with pytest.raises(DataError, match="^images must be uint8, got float32"):
        pooled_pixels()(noise(2, 8, 8).astype(np.float32))
    with pytest.raises(DataError, match="^images must be a non-empty"):
        pooled_pixels()(noise(0, 8, 8))
    with pytest.raises(ValueError, match="^max_side must be an integer >= 1, got 0"):
        pooled_pixels(0)


def test_inception_without_the_package_says_what_to_install(monkeypatch, tmp_path):
    """Catches a bare ModuleNotFoundError."""
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match="^inception features need torch-fidelity .*: run python -m pip install"):
        inception(tmp_path / "weights.pth")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights of the right names and shapes; one thread, since two that wait spin on a busy core."""
    torch = pytest.importorskip("torch")
    # RuntimeError: a torchvision that was built for another torch.
    pytest.importorskip("torch_fidelity", exc_type=(ImportError, RuntimeError))
    from torch_fidelity import feature_extractor_inceptionv3 as published

    class Unloaded(published.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, *args, **kwargs):
            """Keeps the weights that the constructor drew."""

    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.save({}, path)
    torch.save(Unloaded("random", ["2048"], feature_extractor_weights_path=str(path)).state_dict(), path)
    yield path
    torch.set_num_threads(threads)


def test_inception_features_are_those_of_torch_fidelity(weights):
    """Catches other channels or scaling, a lost batch, and a file that is not what the network runs with."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = noise(3, 20, 30)
    original = FeatureExtractorInceptionV3("reference", ["2048"], feature_extractor_weights_path=str(weights))
    with torch.inference_mode():
        expected = original(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))[0].numpy()
    features = inception(weights, batch_size=2)
    assert features.name == "inception_2048"
    np.testing.assert_allclose(features(images), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0
    grey = images[:1, ..., :1]
    np.testing.assert_array_equal(features(grey), features(np.repeat(grey, 3, axis=-1)))


def test_inception_reads_a_memory_map(weights, tmp_path):
    """Catches PyTorch's warning about arrays that cannot be written, which is what a cache hands over."""
    np.save(tmp_path / "images.npy", noise(1, 16, 16))
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert inception(weights)(images).shape == (1, 2048)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return (os.mkdir, (self.folder,))


def test_other_files_are_refused_without_running_them(weights, tmp_path):
    """Catches an arbitrary pickle that is executed, a download in place of a missing file, and weights of others."""
    import torch

    trap = Trap(tmp_path / "executed")
    with pytest.raises(ValueError, match=r"^weights must be the file .*got .*none.pth, which is no file"):
        inception(tmp_path / "none.pth")
    for name, content in (("text.pth", b"hello"), ("empty.pth", b""), ("trap.pth", pickle.dumps(trap, 2))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"^weights must be .*got .*{name}, which is not tensors: ") as caught:
            inception(tmp_path / name)
        assert "\n" not in str(caught.value)
    torch.save({"trap": trap}, tmp_path / "zipped_trap.pth")
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:100_000])
    for name in ("zipped_trap.pth", "cut.pth"):
        with pytest.raises(ValueError, match=rf"got .*{name}, which is not tensors: "):
            inception(tmp_path / name)
    assert not (tmp_path / "executed").exists()
    for state in ({"fc.weight": torch.zeros(3)}, [1, 2], torch.zeros(3)):
        torch.save(state, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=r"got .*other.pth, which does not fit: ") as caught:
            inception(tmp_path / "other.pth")
        assert "\n" not in str(caught.value)
