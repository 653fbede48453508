"""The CelebA64 pairs, from files that the tests write: draws, the map, moments, the cache, and what is refused."""

import itertools
import logging
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvjax.data import DataError
from fvjax.data.ot_benchmark import OptimalPairs, _celeba, celeba64
from fvjax.nets.celeba64 import TorchNetwork, convex_potential, generator
from fvjax.types import Pair

SMALL = _celeba._Networks(generator(filters=2, most=16), convex_potential(channels=2, rank=3))
KEY = jax.random.key(3)


def save(path: Path, network: TorchNetwork, seed: int, **changes: np.ndarray) -> None:
    """A file as torch.save writes it, of random weights for a network; by hand, for PyTorch is not installed."""
    rng = np.random.default_rng(seed)
    items = [b"\x80\x02}("]
    with zipfile.ZipFile(path, "w") as archive:
        for key, (name, shape) in enumerate(network.torch_shapes.items()):
            array = changes.get(name.replace(".", "_"))
            if array is None:
                array = rng.standard_normal(shape, np.float32)
                if len(shape) > 1:
                    array /= np.float32(np.sqrt(np.prod(shape[1:])))
                if name.startswith(("convex_layers", "pos_features")):
                    array = np.abs(array)
                if name.endswith("running_var"):
                    array = np.float32(0.5) + np.abs(array)
            numbers = [array.size, 0, *array.shape, *(step // array.itemsize for step in array.strides)]
            size, offset, *layout = (b"J" + n.to_bytes(4, "little") for n in numbers)
            items += [
                _text(name),
                b"ctorch._utils\n_rebuild_tensor_v2\n((",
                _text("storage"),
                b"ctorch\nFloatStorage\n",
            ]
            items += [_text(str(key)), _text("cpu"), size, b"tQ", offset]
            items += [b"(", *layout[: array.ndim], b"t(", *layout[array.ndim :], b"t\x89}tR"]
            archive.writestr(f"x/data/{key}", array.tobytes())
        archive.writestr("x/data.pkl", b"".join([*items, b"u."]))


def _text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three files of "Mid", small."""
    place = tmp_path_factory.mktemp("CelebA64")
    save(place / "Final_G.pt", SMALL.generator, 0)
    save(place / "Mid_v1.pt", SMALL.potential, 1)
    save(place / "Mid_v2.pt", SMALL.potential, 2)
    return place


@pytest.fixture(scope="module")
def pairs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> OptimalPairs:
    """Loaded once."""
    return load(folder, tmp_path_factory.mktemp("cache"))


def load(folder: Path, cache: Path, which: str = "Mid") -> OptimalPairs:
    """`celeba64` with small networks."""
    return _celeba._load(folder, which, networks=SMALL, cache_dir=cache)


@pytest.fixture(scope="module")
def drawn(pairs: OptimalPairs) -> Pair:
    """Seven pairs, in one chunk of eight."""
    return pairs.sample(KEY, 7)


@pytest.fixture(scope="module")
def transport(pairs: OptimalPairs) -> Callable[[Any], Any]:
    """The map, compiled as an argument of a function."""
    compiled = fast(lambda transport, x: transport(x))
    return lambda x: compiled(pairs.transport, x)


def params(pairs: OptimalPairs) -> Any:
    """The weights that `sample` has bound."""
    return pairs.sample.args[1]  # type: ignore[attr-defined]


def leaves(pairs: OptimalPairs) -> list[np.ndarray]:
    """All weights."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params(pairs))]


def fast(function: Any) -> Any:
    """Compiled without optimization, which takes longer than it saves here."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def test_draws_are_noisy_faces_and_their_images(pairs: OptimalPairs, drawn: Pair, transport: Any) -> None:
    """Catches missing, clipped or shared noise, one latent vector for all, and x1 that is not the map's."""
    assert (pairs.name, pairs.dims, pairs.size) == ("celeba64-mid", (64, 64, 3), None)
    for x in drawn:
        assert isinstance(x, jax.Array)
        assert (x.shape, x.dtype) == ((7, 64, 64, 3), jnp.float32)
    keys = [jax.random.split(jax.random.fold_in(KEY, index)) for index in range(3)]
    latent = jnp.stack([jax.random.normal(key[0], (128,), jnp.float32) for key in keys])
    faces = fast(jax.vmap(SMALL.generator.apply, in_axes=(None, 0)))(params(pairs).generator, latent)
    noise = np.asarray(drawn.x0[:3] - faces).reshape(3, -1)
    np.testing.assert_allclose(noise.std(1), 0.01, rtol=0.03)  # 12,288 numbers: 4.7 standard errors
    np.testing.assert_allclose(np.corrcoef(noise), np.eye(3), atol=0.05)
    assert np.std(np.asarray(faces), axis=0).max() > 0.1
    np.testing.assert_allclose(transport(drawn.x0[6]), drawn.x1[6], atol=1e-5 * float(jnp.abs(drawn.x1).max()))


def test_map_is_the_mean_of_both_gradients(pairs: OptimalPairs, drawn: Pair, transport: Any) -> None:
    """Catches a sum instead of the mean, and one of the potentials used twice."""
    gradient = fast(jax.grad(SMALL.potential.apply, argnums=1))
    both = [gradient(potential, drawn.x0[0]) for potential in params(pairs).potentials]
    expected = (both[0] + both[1]) / 2
    assert float(jnp.abs(both[0] - both[1]).max() / jnp.abs(expected).max()) > 0.1
    np.testing.assert_allclose(transport(drawn.x0[0]), expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_pairs_are_optimal(drawn: Pair) -> None:
    """Catches a map that is no gradient of a convex function: every exchange of two targets must cost more."""
    x0, x1 = (np.asarray(x, np.float64).reshape(7, -1) for x in drawn)
    products = x0 @ x1.T
    for i, j in itertools.combinations(range(7), 2):
        assert products[i, i] + products[j, j] > products[i, j] + products[j, i]


def test_examples_do_not_depend_on_chunks(pairs: OptimalPairs, drawn: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an example that depends on n or on its place in a chunk, and chunks that are glued together wrongly."""
    first = pairs.sample(KEY, 3)
    monkeypatch.setattr(_celeba, "_CHUNK", 4)
    chunked = pairs.sample(KEY, 7)
    for found, part, expected in zip(chunked, first, drawn, strict=True):
        tolerance = 1e-5 * float(jnp.abs(expected).max())
        np.testing.assert_allclose(found, expected, atol=tolerance)
        np.testing.assert_allclose(part, expected[:3], atol=tolerance)
    assert not np.allclose(drawn.x0[:3], pairs.sample(jax.random.key(4), 3).x0, atol=0.1)


def test_transport_follows_the_dtype(drawn: Pair, transport: Any, x64: None) -> None:
    """Catches a map that is computed in float32 for float64 images, and its error in float32."""
    double, single = (transport(jnp.asarray(drawn.x0[0], dtype)) for dtype in (jnp.float64, jnp.float32))
    assert (double.dtype, single.dtype) == (jnp.float64, jnp.float32)
    error = float(jnp.abs(double - jnp.asarray(single, jnp.float64)).max() / jnp.abs(double).max())
    assert 0 < error < 1e-5


def test_moments_are_estimated_once_and_on_demand(pairs: OptimalPairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches minutes at load, a factor 2, a mean over coordinates, and an estimate for every look."""
    asked = []

    def sample(key: Any, n: int) -> Any:
        asked.append(n)
        return pairs.sample(key, n)

    monkeypatch.setattr(_celeba, "_ESTIMATE", 4)
    lazy = pairs._replace(sample=sample)
    assert (asked, np.isnan(lazy[4]), np.isnan(lazy[5])) == ([], True, True)
    x0, x1 = (np.asarray(x, np.float64) for x in pairs.sample(jax.random.key(0), 4))
    assert lazy.cost == pytest.approx(np.mean([np.sum((a - b) ** 2) for a, b in zip(x0, x1, strict=True)]) / 2)
    assert lazy.target_variance == pytest.approx(np.sum((x1 - x1.mean(0)) ** 2) / 3)
    assert (lazy.cost, asked) == (lazy.cost, [4])
    assert "cost and target variance from 1024 draws" in pairs.source


def test_bad_arguments_are_refused(pairs: OptimalPairs, folder: Path) -> None:
    """Catches a batch that is taken for an image, a number of pairs that is none, and an unknown potential."""
    with pytest.raises(ValueError, match=r"^x0 must have shape \(64, 64, 3\), got \(2, 64, 64, 3\)$"):
        pairs.transport(jnp.zeros((2, 64, 64, 3)))
    with pytest.raises(ValueError, match=r"^x0 must be floating point, got uint8$"):
        pairs.transport(jnp.zeros((64, 64, 3), jnp.uint8))
    with pytest.raises(ValueError, match=r"^n must be an integer >= 1, got 0$"):
        pairs.sample(KEY, 0)
    with pytest.raises(ValueError, match=r"^which must be one of Early, Mid, Late, got 'mid'$"):
        celeba64(folder, "mid")


def refusal(folder: Path, cache: Path, which: str = "Mid") -> str:
    """The one line with which files are refused."""
    with pytest.raises(DataError) as caught:
        load(folder, cache, which)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def copy(folder: Path, target: Path) -> Path:
    """The files, to be changed."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    """Catches an error that names one file at a time, or a folder that is not there without its name."""
    assert refusal(folder, tmp_path, "Late") == (
        f"{folder} must hold Final_G.pt, Late_v1.pt, Late_v2.pt of the benchmark's CelebA64 folder, got none named"
        " Late_v1.pt or Late_v2.pt"
    )
    assert "got none named Final_G.pt or Mid_v1.pt or Mid_v2.pt" in refusal(tmp_path / "none", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_refused(folder: Path, tmp_path: Path) -> None:
    """Catches another network, a damaged one, and one that is not convex; none of them reaches the cache."""
    place, cache = copy(folder, tmp_path / "files"), tmp_path / "cache"
    other = place / "Mid_v2.pt"
    cases: list[tuple[Mapping[str, Any] | bytes, str]] = [
        (b"hello", "must be a zip file as PyTorch >= 1.6 writes it, got another kind"),
        ((place / "Mid_v1.pt").read_bytes()[:-100], "is damaged or no file of torch.save"),
        (
            (place / "Final_G.pt").read_bytes(),
            "is not a file of this benchmark: state_dict must hold exactly the arrays",
        ),
        ({"pos_features_7_bias": np.full(1, np.inf, np.float32)}, "must hold finite floating-point numbers"),
        ({"convex_layers_0_bias": np.zeros(3, np.float32)}, "convex_layers.0.bias (3,) instead of (4,)"),
        ({"pos_features_7_weight": np.full((1, 16, 4, 4), -1, np.float32)}, "must be >= 0 (else D is not convex)"),
    ]
    for content, message in cases:
        if isinstance(content, bytes):
            other.write_bytes(content)
        else:
            save(other, SMALL.potential, 2, **content)
        found = refusal(place, cache)
        assert found.startswith(f"{other} ")
        assert message in found
        assert sorted(file.name.split("-")[1] for file in cache.iterdir()) == ["Final_G", "Mid_v1"]


def test_small_files_are_not_the_benchmarks(folder: Path, tmp_path: Path) -> None:
    """Catches `celeba64` that takes networks of any width."""
    with pytest.raises(DataError, match=r"Final_G.pt is not a file of this benchmark: .* fc.bias \(256,\) instead of"):
        celeba64(folder, "Mid", cache_dir=tmp_path)


def test_cache_is_read_instead_of_the_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a conversion at every start, a cache that changes numbers, and one that outlives its file."""
    place, cache = copy(folder, tmp_path / "files"), tmp_path / "a" / "cache"
    expected = leaves(load(place, cache))
    names = sorted(file.name for file in cache.iterdir())
    assert [name.split("-")[1] for name in names] == ["Final_G", "Mid_v1", "Mid_v2"]
    original, read = _celeba.read_state_dict, []
    monkeypatch.setattr(_celeba, "read_state_dict", lambda file: read.append(file.name) or original(file))
    for found, array in zip(leaves(load(place, cache)), expected, strict=True):
        np.testing.assert_array_equal(found, array)
    assert read == []
    save(place / "Mid_v1.pt", SMALL.potential, 9)
    os.utime(place / "Mid_v1.pt", ns=(1, 1))  # a clock may be too coarse to tell the two apart
    changed = leaves(load(place, cache))
    assert read == ["Mid_v1.pt"]
    assert not all(np.array_equal(found, array) for found, array in zip(changed, expected, strict=True))


@pytest.mark.parametrize("damage", ["empty", "cut", "header", "number", "directory", "other"])
def test_a_damaged_cache_is_built_again(
    folder: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches damaged numbers that are used, an error for a file that can be made anew, and leftovers."""
    expected = leaves(load(folder, tmp_path))
    (cached,) = (file for file in tmp_path.iterdir() if "-Mid_v1-" in file.name)
    content = bytearray(cached.read_bytes())
    position = {"header": 90, "number": len(content) // 2, "directory": len(content) - 40}.get(damage)
    if position is not None:
        content[position] ^= 0x10
    elif damage == "other":
        (generator_cache,) = (file for file in tmp_path.iterdir() if "-Final_G-" in file.name)
        content = bytearray(generator_cache.read_bytes())
    else:
        content = content[: len(content) // 2 if damage == "cut" else 0]
    cached.write_bytes(content)
    with caplog.at_level(logging.WARNING, "fvjax.data"):
        found = leaves(load(folder, tmp_path))
    assert f"cache {cached} is damaged (" in caplog.text
    for array, original in zip(found, expected, strict=True):
        np.testing.assert_array_equal(array, original)
    assert len(list(tmp_path.iterdir())) == 3
    caplog.clear()
    load(folder, tmp_path)
    assert caplog.text == ""


def test_a_cache_that_cannot_be_written_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bare OSError, and half a file of a full disk."""
    (tmp_path / "file").write_text("in the way")
    message = refusal(folder, tmp_path / "file")
    assert message.startswith(f"cache {tmp_path / 'file' / 'celeba64-Final_G-'}")
    assert message.endswith("name another folder with cache_dir")

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    assert "No space left on device" in refusal(folder, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_files_of_the_benchmarks_size(tmp_path: Path) -> None:
    """Catches full networks that do not fit the files: 190 MB of them."""
    save(tmp_path / "Final_G.pt", generator(), 0)
    for index in (1, 2):
        save(tmp_path / f"Early_v{index}.pt", convex_potential(), index)
    pairs = celeba64(tmp_path, cache_dir=tmp_path / "cache")
    assert (pairs.name, len(list((tmp_path / "cache").iterdir()))) == ("celeba64-early", 3)
    assert sum(leaf.size for leaf in leaves(pairs)) == 23_981_955 + 2 * 11_247_105
    x = jnp.zeros(pairs.dims, jnp.float32)
    out = jax.eval_shape(pairs.transport, x)
    assert (out.shape, out.dtype) == (pairs.dims, jnp.float32)
