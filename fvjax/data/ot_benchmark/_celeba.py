"""The CelebA64 pairs of the Wasserstein-2 benchmark: generated faces and their images under a convex gradient."""

import contextlib
import functools
import hashlib
import logging
import uuid
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax.data import _cache
from fvjax.data._torch_files import read_state_dict
from fvjax.data._types import DataError
from fvjax.data.ot_benchmark._types import OptimalPairs
from fvjax.types import Array, Key, Pair, Params

if TYPE_CHECKING:  # flax is imported by `celeba64` only
    from fvjax.nets.celeba64 import TorchNetwork

_WHICH = ("Early", "Mid", "Late")
_NOISE = 0.01  # standard deviation of what is added to generated images, so that their law has a density
_CHUNK = 32  # pairs that are made at once: 0.4 GB with the full networks on a CPU
_ESTIMATE = 1024  # draws behind cost and target variance
_FORMAT = 1  # of the cache; to be raised when the conversion changes
# What numpy and zipfile raise for a damaged .npz file, besides what load_params turns into a ValueError.
_UNREADABLE = (OSError, ValueError, RuntimeError, MemoryError, SyntaxError, zipfile.BadZipFile, zlib.error)

_logger = logging.getLogger("fvjax.data")


class _Networks(NamedTuple):
    """The generator and the form of both potentials."""

    generator: "TorchNetwork"
    potential: "TorchNetwork"


class _Weights(NamedTuple):
    """Params of the generator and of the two potentials."""

    generator: Params
    potentials: tuple[Params, Params]


class _EstimatedPairs(OptimalPairs):
    """OptimalPairs whose two moments are nan in the tuple and estimated when they are asked for by name.

    They take more time than everything else: 1024 pairs. Every instance estimates them once.
    """

    @functools.cached_property
    def _moments(self) -> tuple[float, float]:
        """Cost and target variance."""
        x0, x1 = (np.asarray(x, np.float64).reshape(_ESTIMATE, -1) for x in self.sample(jax.random.key(0), _ESTIMATE))
        cost = 0.5 * np.square(x1 - x0).sum(1).mean()
        return float(cost), float(x1.var(0, ddof=1).sum())

    @property
    def cost(self) -> float:
        """E|x0 - x1|^2 / 2, from 1024 draws."""
        return self._moments[0]

    @property
    def target_variance(self) -> float:
        """E|x1 - E x1|^2, from the same draws."""
        return self._moments[1]


def celeba64(path: str | Path, which: str = "Early", *, cache_dir: str | Path | None = None) -> OptimalPairs:
    r"""The image pairs (x0, grad psi(x0)) of the continuous Wasserstein-2 benchmark: x0 a generated face, psi convex.

        x0 = G(z) + 0.01 n,   z ~ N(0, I_128),   n ~ N(0, I),        psi = (D_v1 + D_v2) / 2,

    with `fvjax.nets.celeba64.generator` and two networks `convex_potential`, so that x -> grad psi(x) is the optimal
    transport of the law of x0 to its image (Brenier; psi is strongly convex with constant 0.01). Nothing is clipped or
    standardised: x0 is in [-1, 1] up to the noise, x1 need not be. "Early", "Mid" and "Late" are potentials from three
    times of one training.

    Images are [64, 64, 3], row, column, channel. The benchmark's own are flat vectors of channel, row, column:
    x.transpose(2, 0, 1).reshape(-1) turns one of ours into one of its; distances and costs are the same.

    The files are read without PyTorch and without running code from them (`read_state_dict`), checked (names, shapes,
    finite numbers, no negative weight where psi would not be convex), and converted once into a cache of .npz files,
    which is bound to the place, size and time of each file. Each load verifies the cache (a CRC-32 of every byte, names
    and shapes) and rebuilds what is damaged.

    `sample` draws example i from fold_in(key, i), in chunks of at most 32: its examples do not depend on n, up to
    rounding (1e-5 of the largest pixel). It runs on the host, not under jit. `transport` follows the dtype of its
    argument. It is a `jax.tree_util.Partial`: give it to a jitted function as an argument, for in a closure its 22
    million weights are constants, which XLA folds. On two CPU cores a pair takes 0.1 s, half of it the map.

    Args:
        path: folder with Final_G.pt, {which}_v1.pt and {which}_v2.pt, zip files of PyTorch >= 1.6.
        which: "Early", "Mid" or "Late".
        cache_dir: where the cache is kept; None means $XDG_CACHE_HOME/fvjax or ~/.cache/fvjax.

    Returns:
        OptimalPairs of dims (64, 64, 3). `cost` and `target_variance` are estimated from the 1024 pairs of
        `sample(jax.random.key(0), 1024)` when one of them is first asked for by name (in the tuple they are nan): two
        minutes on two CPU cores.

    Raises:
        DataError: (a ValueError, one line) if a file is missing, damaged, or not these networks, or if the cache cannot
            be written.
        ValueError: if `which` is something else.

    Source: the CelebA64 pairs of Korotin et al. 2021 (arXiv 2106.01954).
    """
    return _load(path, which, networks=_full_networks(), cache_dir=cache_dir)


@functools.cache
def _full_networks() -> _Networks:
    """The same functions for every load, so that a second one compiles nothing anew."""
    from fvjax.nets.celeba64 import convex_potential, generator

    return _Networks(generator(), convex_potential())


def _load(path: str | Path, which: str, *, networks: _Networks, cache_dir: str | Path | None) -> OptimalPairs:
    """`celeba64` for networks of any width."""
    _validate.one_of("which", which, _WHICH)
    folder = Path(path).expanduser()
    files = [folder / name for name in ("Final_G.pt", f"{which}_v1.pt", f"{which}_v2.pt")]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"{folder} must hold {', '.join(file.name for file in files)} of the benchmark's CelebA64 folder, got none"
            f" named {' or '.join(missing)}"
        )
    cache = _cache.default_folder() if cache_dir is None else Path(cache_dir).expanduser()
    kinds = (networks.generator, networks.potential, networks.potential)
    generator, first, second = (_params(file, kind, cache) for file, kind in zip(files, kinds, strict=True))
    weights = _Weights(generator, (first, second))
    return _EstimatedPairs(
        name=f"celeba64-{which.lower()}",
        dims=(64, 64, 3),
        sample=functools.partial(_sample, networks, weights),
        transport=jax.tree_util.Partial(functools.partial(_transport, networks.potential.apply), weights.potentials),
        cost=np.nan,
        target_variance=np.nan,
        source=f"{folder}, {which}; cost and target variance from {_ESTIMATE} draws",
    )


def _potential(apply: Any, weights: tuple[Params, Params], x: Array) -> Array:
    """psi(x) of one image, []."""
    return 0.5 * (apply(weights[0], x) + apply(weights[1], x))


def _transport(apply: Any, weights: tuple[Params, Params], x: Array) -> Array:
    """Grad psi(x) of one image."""
    x = jnp.asarray(x)
    _validate.floating("x0", x)
    _validate.shape("x0", x, (64, 64, 3))
    return jax.grad(_potential, argnums=2)(apply, weights, x)


@functools.partial(jax.jit, static_argnames=("generate", "potential"))
def _chunk(key: Key, indices: Array, weights: _Weights, *, generate: Any, potential: Any) -> Pair:
    """The pairs of some indices, each a function of (key, index) alone."""

    def one(index: Array) -> Pair:
        latent_key, noise_key = jax.random.split(jax.random.fold_in(key, index))
        image = generate(weights.generator, jax.random.normal(latent_key, (128,), jnp.float32))
        x0 = image + _NOISE * jax.random.normal(noise_key, image.shape, image.dtype)
        return Pair(x0, _transport(potential, weights.potentials, x0))

    return jax.vmap(one)(indices)


def _sample(networks: _Networks, weights: _Weights, key: Key, n: int) -> Pair:
    """N pairs; the first two arguments are bound by a partial.

    A loop in Python, for the device then holds one chunk at a time, and the host the rest. The last chunk is filled up
    to a power of two, so that few sizes are ever compiled.
    """
    _validate.positive_integer("n", n)
    x0, x1 = (np.empty((n, 64, 64, 3), np.float32) for _ in range(2))
    for start in range(0, n, _CHUNK):
        count = min(_CHUNK, n - start)
        indices = jnp.arange(start, start + (1 << (count - 1).bit_length()))
        made = _chunk(key, indices, weights, generate=networks.generator.apply, potential=networks.potential.apply)
        x0[start : start + count] = np.asarray(made.x0)[:count]
        x1[start : start + count] = np.asarray(made.x1)[:count]
    return Pair(jnp.asarray(x0), jnp.asarray(x1))


def _params(file: Path, network: "TorchNetwork", cache: Path) -> Params:
    """The params of a file: from the cache, or converted and written to it."""
    status = file.stat()
    place = f"{_FORMAT} {file.resolve()} {status.st_size} {status.st_mtime_ns}"
    cached = cache / f"celeba64-{file.stem}-{hashlib.sha256(place.encode()).hexdigest()[:16]}.npz"
    params = _read_cache(cached, network) if cached.exists() else None
    if params is not None:
        return params
    _logger.info("converting %s into %s", file, cached)
    try:
        params = network.from_torch(read_state_dict(file))
    except DataError:
        raise
    except ValueError as error:
        reason = " ".join(str(error).split())  # names of arrays are the file's
        raise DataError(f"{file} is not a file of this benchmark: {reason}") from error
    _write_cache(cached, params)
    return params


def _read_cache(path: Path, network: "TorchNetwork") -> Params | None:
    """What is in a cache; None, with a warning in the log, if it is damaged."""
    from fvjax.nets.convert import load_params

    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        params = load_params(path) if damaged is None else {}
        expected = jax.eval_shape(network.init, jax.random.key(0))
        if _shapes(params) == _shapes(expected):
            return params
        reason = damaged or "other arrays"
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    _logger.warning("cache %s is damaged (%s): it is built again", path, reason)
    return None


def _shapes(params: Params) -> Mapping[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(keys): (leaf.shape, leaf.dtype) for keys, leaf in leaves}


def _write_cache(path: Path, params: Params) -> None:
    """Writes a cache under a name of its own and renames it: complete or absent, whoever else writes it."""
    from fvjax.nets.convert import save_params

    unfinished = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_params(unfinished, params)
        unfinished.replace(path)
    except OSError as error:
        raise DataError(f"cache {path} cannot be written ({error}): name another folder with cache_dir") from error
    finally:
        with contextlib.suppress(OSError):  # where even the folder cannot be made, this is not the error to show
            unfinished.unlink(missing_ok=True)
