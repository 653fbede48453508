"""Digits, arrays and folders as a user brings them: right pixels and splits, or one line that says what is wrong."""

import os
import re
import subprocess
import sys
import warnings

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from fvjax.data import DataError, Images, batch, load


def noise(n, height=6, width=5, channels=3, seed=0):
    """Images uint8 [n, height, width, channels]."""
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, encode):
    """Writes {relative path: pixels} below a new folder."""

    def write(files):
        for name, pixels in files.items():
            path = tmp_path / "pictures" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(pixels, {"jpg": "jpeg"}.get(path.suffix[1:].lower(), path.suffix[1:])))
        return tmp_path / "pictures"

    return write


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keeps the tests out of the user's cache; returns its place."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fvjax"


def test_digits_are_scaled_and_split_in_the_documented_way():
    """Catches levels that collide or stop short of white, and another split."""
    from sklearn.datasets import load_digits

    images = load("digits")
    values = load_digits().images
    np.testing.assert_array_equal(images.test[..., 0], np.rint(values[9::10] * 255 / 16))
    assert images.train.shape == (1618, 8, 8, 1)
    assert len(np.unique(images.train)) == 17
    assert (images.name, images.flip) == ("digits", False)


def test_importing_the_package_loads_no_library_that_decodes():
    """Catches a command that takes seconds to print its help."""
    heavy = ("tensorflow_datasets", "sklearn", "PIL", "torch", "scipy")
    code = f"import fvjax.data, sys; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_an_array_stays_on_disk(tmp_path):
    """Catches a copy into memory, and a hold-out that overlaps: train and test are views of the file."""
    every = noise(25)
    np.save(tmp_path / "mine.npy", every)
    images = load(tmp_path / "mine.npy")
    np.testing.assert_array_equal(images.train, every[:22])
    np.testing.assert_array_equal(images.test, every[22:])
    assert isinstance(images.train, np.memmap)
    assert images.name == "mine"
    expected = every[:22].astype(np.float32) / np.float32(127.5) - 1
    order = np.argsort([image.tobytes() for image in expected])
    batched = batch(images.train, seed=0, step=0, size=22)
    np.testing.assert_array_equal(batched[np.argsort([image.tobytes() for image in batched])], expected[order])


def test_grey_arrays_get_a_channel(tmp_path):
    """Catches [n, h, w] that is taken for one image."""
    np.save(tmp_path / "grey.npy", noise(20)[..., 0])
    assert load(str(tmp_path / "grey.npy"), size=None).train.shape == (18, 6, 5, 1)


@pytest.mark.parametrize("names", [("train", "test"), ("x_train", "x_test")])
def test_an_npz_brings_its_own_split(tmp_path, names):
    """Catches swapped splits."""
    train, test = noise(4), noise(3, seed=1)
    np.savez_compressed(tmp_path / "both.npz", **dict(zip(names, (train, test), strict=True)), labels=np.arange(4))
    images = load(tmp_path / "both.npz")
    np.testing.assert_array_equal(images.train, train)
    np.testing.assert_array_equal(images.test, test)


def test_the_development_subset_of_cifar10_is_read_as_it_is(shared_data):
    """Catches keys that a file in use has and the reader does not know."""
    images = load(shared_data / "cifar10_subset.npz", size=32)
    assert images.train.shape == (10000, 32, 32, 3)
    assert images.test.shape == (1000, 32, 32, 3)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (noise(9).astype(np.float32) / 255, r"must be uint8, got float32: convert \[-1, 1\] with fvjax.data.to_uint8"),
        (noise(9).astype(int), "must be uint8, got int64"),
        (noise(9).transpose(0, 3, 1, 2)[:, :, :, :2], r"with c = 1 or 3 \(channels last\), got \(9, 3, 6, 2\)"),
        (noise(9)[0, 0], r"must be a non-empty \[n, h, w\] or \[n, h, w, c\].*, got \(5, 3\)"),
        (noise(0), r"must be a non-empty .* got \(0, 6, 5, 3\)"),
        (noise(1), "must hold at least 2 images, one of them to be held out, got 1"),
        (np.array([{}], object), "cannot be read as a .npy file of numbers"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    """Catches floats of an unknown range, channels first, labels, pickles."""
    np.save(tmp_path / "bad.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=rf"^{re.escape(str(tmp_path / 'bad.npy'))} .*{message}"):
        load(tmp_path / "bad.npy")


def test_other_npz_files_are_refused(tmp_path):
    """Catches a KeyError, splits that do not fit together, and arrays under a wrong name."""
    path = tmp_path / "bad.npz"
    np.savez(path, images=noise(3))
    with pytest.raises(DataError, match=r"must hold arrays train and test \(or x_train and x_test\), got \['images'\]"):
        load(path)
    np.savez(path, train=noise(3), test=noise(3, width=6))
    with pytest.raises(DataError, match=r"must have one shape, got \(3, 6, 5, 3\) and \(3, 6, 6, 3\)"):
        load(path)
    np.savez(path, train=noise(3), test=np.zeros(3))
    with pytest.raises(DataError, match=r"bad.npz:test must be uint8, got float64"):
        load(path)


@hypothesis.given(st.sampled_from([".npy", ".npz"]), st.data())
@hypothesis.settings(max_examples=60)
def test_arrays_with_a_damaged_header_are_refused_or_read(tmp_path, suffix, data):
    """Catches an exception of numpy's parser of headers, of zipfile or of zlib that reaches the user as it is."""
    path = tmp_path / f"bad{suffix}"
    if suffix == ".npy":
        np.save(path, noise(5))
    else:
        np.savez_compressed(path, train=noise(5), test=noise(5))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 127))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    message = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy says that it reads a header which Python 2 might have written
        try:
            load(path)
        except DataError as error:
            message = str(error)
    assert message is None or (message.startswith(str(path)) and "\n" not in message)


@hypothesis.given(st.sampled_from([".npy", ".npz"]), st.floats(0, 1, exclude_max=True))
@hypothesis.settings(max_examples=40)
def test_truncated_arrays_are_refused(tmp_path, suffix, fraction):
    """Catches a zipfile, zlib or numpy error that reaches the user as it is, wherever the file was cut."""
    path = tmp_path / f"cut{suffix}"
    if suffix == ".npy":
        np.save(path, noise(5))
    else:
        np.savez_compressed(path, train=noise(5), test=noise(5))
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(DataError, match="cannot be read as a .np[yz] file of numbers .*: save it anew$"):
        load(path)


def test_a_folder_is_sorted_split_and_memory_mapped(folder, own_cache):
    """Catches an order that the file system chooses, lost subfolders, hidden files, and other files read as images."""
    pictures = noise(21)
    names = sorted(f"{'ab'[k % 2]}/{k // 7}/{k}.{['png', 'PNG', 'bmp'][k % 3]}" for k in range(21))
    place = folder(dict(zip(names, pictures, strict=True)) | {".hidden/x.png": noise(1)[0], "a/._y.png": noise(1)[0]})
    (place / "labels.csv").write_text("no image")
    images = load(place)
    held_out = np.arange(21) % 10 == 9
    np.testing.assert_array_equal(images.test, pictures[held_out])
    np.testing.assert_array_equal(images.train, pictures[~held_out])
    assert isinstance(images.train, np.memmap)
    assert images[3:] == (False, str(place))
    assert len(list(own_cache.iterdir())) == 1


def test_train_and_test_folders_are_the_split(folder):
    """Catches test images in the training set where the user separated them, and grey ones among colours."""
    grey, colour = noise(1, channels=1)[0], noise(1)[0]
    images = load(folder({"train/a.png": colour, "train/b/c.png": grey, "test/z.png": colour}))
    np.testing.assert_array_equal(images.train, [colour, np.repeat(grey, 3, axis=-1)])
    np.testing.assert_array_equal(images.test, [colour])


def test_grey_folders_have_one_channel(folder):
    """Catches three equal channels of digits or scans."""
    pictures = noise(3, channels=1)
    images = load(folder({f"{k}.png": picture for k, picture in enumerate(pictures)}))
    np.testing.assert_array_equal(images.train, pictures[:2])


def test_a_size_crops_the_centre_and_resizes(folder):
    """Catches distorted images and crops off the centre: four blocks in the middle of a wide image."""
    wide = np.zeros((8, 14, 3), np.uint8)
    wide[:, 3:11] = np.kron(noise(1, 2, 2)[0], np.ones((4, 4, 1), np.uint8))
    images = load(folder({"a.png": wide, "b.jpg": noise(1, 30, 40)[0]}), size=2)
    blocks = wide[:, 3:11].reshape(2, 4, 2, 4, 3).mean(axis=(1, 3))
    assert images.train.shape == (1, 2, 2, 3)
    # The triangle of half-width 4 about the block's centre: weights (5 7 7 5 | 3 1) / 28, so 1/7 for the neighbour.
    expected = (6 * blocks + blocks[::-1]) / 7
    expected = (6 * expected + expected[:, ::-1]) / 7
    assert np.abs(images.train[0] - expected).max() < 1.5
    assert images.test.shape == (1, 2, 2, 3)


def test_jpegs_are_read(folder):
    """Catches a missing suffix, and channels in another order."""
    red = np.zeros((16, 16, 3), np.uint8) + np.array([250, 10, 10], np.uint8)
    images = load(folder({"a.jpg": red, "b.jpg": red}))
    assert np.abs(images.train[0].astype(int) - red).max() < 8


def test_a_changed_folder_is_decoded_anew(folder, own_cache):
    """Catches a stale cache: same name and length of the file, other pixels and time."""
    first = load(folder({"a.bmp": noise(1)[0], "b.bmp": noise(1)[0]}))
    place = folder({"a.bmp": noise(1, seed=5)[0]})
    os.utime(place / "a.bmp", ns=(1, 1))
    second = load(place)
    assert not np.array_equal(first.train, second.train)
    np.testing.assert_array_equal(second.train, noise(1, seed=5))
    assert len(list(own_cache.iterdir())) == 2


def test_folders_that_cannot_be_used_say_why(folder, tmp_path, own_cache):
    """Catches an empty data set, a lone image, and an array of images of unequal size; the files are named."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty must hold images \(.bmp, .*\), got none: name another folder"):
        load(tmp_path / "empty")
    place = folder({"one.png": noise(1)[0]})
    with pytest.raises(DataError, match="pictures must hold at least 2 images, one of them to be held out, got 1"):
        load(place)
    folder({"two.png": noise(1, 7, 9)[0]})
    with pytest.raises(DataError, match=r"one\.png has 5x6, \S*two\.png has 9x7"):
        load(place)
    assert not own_cache.exists()


@pytest.mark.parametrize("content", ["text", "truncated"])
def test_an_unreadable_image_is_named(folder, own_cache, content):
    """Catches an error without the name of the file among thousands, and a cache that lacks it."""
    place = folder({f"{k}.png": picture for k, picture in enumerate(noise(4, 40, 40))})
    bad = place / "2.png"
    bad.write_bytes(b"not an image" if content == "text" else bad.read_bytes()[:2000])
    with pytest.raises(DataError, match=rf"^{re.escape(str(bad))} cannot be .*: replace or delete it$"):
        load(place)
    assert not own_cache.exists() or not list(own_cache.iterdir())


@hypothesis.given(st.sampled_from(["png", "jpg", "bmp", "webp"]), st.data())
@hypothesis.settings(max_examples=60)
def test_a_damaged_image_is_read_or_named(folder, encode, suffix, data):
    """Catches an exception of a decoder that is not turned into one line with the file's name."""
    place = folder({"a.png": noise(1, 20, 20)[0]})
    content = bytearray(encode(noise(1, 20, 20)[0], {"jpg": "jpeg"}.get(suffix, suffix)))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    bad = place / f"b.{suffix}"
    bad.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    message = None
    try:
        shape = load(place, size=8).test.shape
    except DataError as error:
        message = str(error)
    bad.unlink()
    if message is None:
        assert shape == (1, 8, 8, 3)
    else:
        assert str(bad) in message
        assert "\n" not in message


def test_images_of_16_bits_are_refused(tmp_path):
    """Catches the clipping to white that a conversion to 8 bits would do."""
    from PIL import Image

    for name in ("a", "b"):
        Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / f"{name}.png")
    with pytest.raises(DataError, match=r"a.png must be an image of 8 bits a channel, got mode I;16"):
        load(tmp_path, cache_dir=tmp_path / "cache")


def test_unknown_sources_and_misplaced_arguments_are_refused(tmp_path):
    """Catches a typing error that starts a search for a folder, and options that would be ignored."""
    with pytest.raises(DataError, match=r"^source must be digits, cifar10, celeba, a folder .*, got 'cifar'"):
        load("cifar")
    with pytest.raises(DataError, match="^source must be"):
        load(tmp_path / "none.npy")
    with pytest.raises(ValueError, match="^data_dir and download must be left out for source 'digits'"):
        load("digits", data_dir=tmp_path)
    with pytest.raises(ValueError, match="^data_dir and download must be left out for source 'digits'"):
        load("digits", download=True)
    with pytest.raises(ValueError, match="^size must be None or what scikit-learn load_digits has, 8x8, got 16"):
        load("digits", size=16)
    with pytest.raises(ValueError, match="^size must be an integer >= 1, got 0"):
        load("digits", size=0)


def test_images_is_what_its_fields_say():
    """Catches a reordering of the fields, which positional unpacking relies on."""
    assert Images._fields == ("name", "train", "test", "flip", "source")
