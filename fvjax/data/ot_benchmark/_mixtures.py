"""Mix3ToMix10, the high-dimensional pairs of the Wasserstein-2 benchmark: gradients of input-convex networks."""

import functools
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax.data._types import DataError
from fvjax.data.ot_benchmark import _sampling
from fvjax.data.ot_benchmark._types import OptimalPairs
from fvjax.types import Array, Key, Pair

_DIMS = (2, 256)
_COMPONENTS = 3
_NETWORKS = ("v1", "v2")
_STRONG_CONVEXITY = 0.01
_STD = 0.4  # standard deviation of a component, before the mixture is scaled to E|x|^2 = d
_ESTIMATE = 2**14  # draws behind each moment that the files do not hold, as in the benchmark itself
# What numpy raises for files that are damaged: in a header, in an archive, in compressed data.
_UNREADABLE = (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error)

Weights = dict[str, Array]


class Potential(NamedTuple):
    """psi(x) = scale (u_v1(x) + u_v2(x) + shift . x), convex.

    Attributes:
        v1: weights of the first input-convex network, by the name that they have in the files.
        v2: of the second.
        scale: > 0, [].
        shift: [d].
    """

    v1: Weights
    v2: Weights
    scale: Array
    shift: Array


class _Mixture(NamedTuple):
    """Gaussian mixture: x = centers[k] + std maps[k] z, k with probability weights[k].

    Shapes: `centers` [3, d], `maps` [3, d, d], `std` [], `weights` [3].
    """

    centers: Array
    maps: Array
    std: Array
    weights: Array


class _Moments(NamedTuple):
    """Cost and target variance, as the file or an estimate gives them, and the words for which it was."""

    cost: float
    target_variance: float
    origin: str


def mix3tomix10(path: str | Path, dim: int, *, dtype: Any = jnp.float32) -> OptimalPairs:
    r"""The pairs (x, grad psi(x)) of the continuous Wasserstein-2 benchmark: x from three Gaussians, psi convex.

    Two input-convex networks u_v1, u_v2 of the same form give psi(x) = scale (u_v1 + u_v2 + shift . x):

        q_i(x) = (A_i^T x)^2 + W_i x + b_i,   h_0 = q_0,   h_i = celu(C_(i-1) h_(i-1) + q_i),   i = 1, 2,
        u(x) = w . h_2 + 0.005 |x|^2,   C_i >= 0,   w >= 0,   widths max(2d, 64), max(2d, 64), max(d, 32).

    u is convex (celu is convex and increasing, the q_i are convex, C_i and w are not negative), so x -> grad psi(x) is
    the optimal transport of the law of x to its image (Brenier). The factors `scale` and `shift` make that image
    nearly of mean 0 and of total variance d; x itself has E|x|^2 = d.

    ==========================  ======================================================================================
    mix3tomix10_d{dim}.npz      keys v1/..., v2/... (weights named as in the benchmark, with / for .),
                                standardize/{scale, shift}, mixture/{centers, maps, std, weights}, cost_half_w2sq;
                                output/var (total variance of x1) where there is one
    {dim}_v1.pt, {dim}_v2.pt    the benchmark's own weights, read without executing code. They hold the networks only.
                                The mixture is drawn anew as the benchmark draws it (numpy's legacy generator, seed 0:
                                the same numbers, bit for bit). scale and shift are estimated from 2^14 draws; so does
                                the benchmark at each start, from draws that depend on its device: the same pairs up
                                to that sampling error (about 1%), and exactly optimal either way
    ==========================  ======================================================================================

    `sample` draws example i from fold_in(key, i): the first examples do not depend on n. `transport` differentiates psi
    by reverse mode and follows the dtype of its argument; it is a `jax.tree_util.Partial`, so it may be an argument of
    a jitted function. Error against float64: below 1e-5 (1 + |x1|) in float32 for d <= 64 (matrix products at highest
    precision).

    Args:
        path: a folder with one of the above, or an .npz file.
        dim: d, from 2 to 256; the benchmark has the powers of 2.
        dtype: of what `sample` draws, float32 or (where JAX's x64 is enabled) float64.

    Returns:
        OptimalPairs of dims (d,). `cost` is the file's; where the files hold no cost, or no variance, it is estimated
        from 2^14 draws, and `source` says so.

    Raises:
        DataError: (a ValueError) if there is no such file, it is damaged, lacks a key, holds an array of another
            shape or dimension, one that is not finite, or a network that is not convex.
        ValueError: if `dim` or `dtype` is out of range.

    Source: Korotin et al. 2021 (arXiv 2106.01954); files and code under MIT.
    """
    _validate.positive_integer("dim", dim)
    if not _DIMS[0] <= dim <= _DIMS[1]:
        raise ValueError(f"dim must be from {_DIMS[0]} to {_DIMS[1]}, got {dim}")
    dtype = _sampling.floating_dtype(dtype)
    file, arrays = _read(Path(path).expanduser(), int(dim))
    v1, v2 = (_network(file, arrays, name, int(dim)) for name in _NETWORKS)
    if file.suffix == ".npz":
        get = functools.partial(_array, file, arrays)
        scale, shift = get("standardize/scale", ()), get("standardize/shift", (dim,))
        if scale <= 0:
            raise DataError(f"{file}: standardize/scale must be > 0, got {scale}")
        potential = Potential(v1, v2, jnp.asarray(scale), jnp.asarray(shift))
        mixture = _mixture_of(get, int(dim))
    else:
        mixture = _benchmark_mixture(int(dim))
        potential = _standardised(v1, v2, mixture)
    moments = _moments(file, arrays, potential, mixture)
    return OptimalPairs(
        name=f"mix3tomix10-d{dim}",
        dims=(int(dim),),
        sample=functools.partial(_sample, potential, mixture, dtype),
        transport=jax.tree_util.Partial(_transport, potential),
        cost=moments.cost,
        target_variance=moments.target_variance,
        source=f"{file}; {moments.origin}",
    )


def convex_potential(potential: Potential, x: Array) -> Array:
    """psi(x) of one example: [d] -> [], in the dtype of x."""
    potential = jax.tree.map(lambda leaf: leaf.astype(x.dtype), potential)
    with jax.default_matmul_precision("highest"):
        total = _convex_network(potential.v1, x) + _convex_network(potential.v2, x) + potential.shift @ x
    return potential.scale * total


def _convex_network(weights: Weights, x: Array) -> Array:
    """u(x) of one example: [d] -> []."""

    def quadratic(index: int) -> Array:
        layer = f"quadratic_layers/{index}"
        square = jnp.square(x @ weights[f"{layer}/quadratic_decomposed"][:, 0, :])
        return square + weights[f"{layer}/weight"] @ x + weights[f"{layer}/bias"]

    hidden = quadratic(0)
    for index in (1, 2):
        hidden = jax.nn.celu(weights[f"convex_layers/{index - 1}/weight"] @ hidden + quadratic(index))
    return weights["final_layer/weight"][0] @ hidden + 0.5 * _STRONG_CONVEXITY * (x @ x)


def _transport(potential: Potential, x: Array) -> Array:
    """Grad psi(x) of one example, [d] -> [d]."""
    x = jnp.asarray(x)
    _validate.floating("x0", x)
    _validate.shape("x0", x, potential.shift.shape)
    return jax.grad(convex_potential, argnums=1)(potential, x)


def _draw(mixture: _Mixture, dtype: Any, key: Key) -> Array:
    """One draw from the mixture, [d]."""
    component_key, normal_key = jax.random.split(key)
    centers, maps, std, weights = (leaf.astype(dtype) for leaf in mixture)
    component = jax.random.categorical(component_key, jnp.log(weights))
    z = jax.random.normal(normal_key, (centers.shape[1],), dtype)
    with jax.default_matmul_precision("highest"):
        # All three products, then one of them: under vmap, choosing maps[component] first would copy a d x d matrix
        # for every example.
        spread = jnp.einsum("kij,j->ki", maps, z)[component]
    return centers[component] + std * spread


@functools.partial(jax.jit, static_argnames=("dtype", "n"))
def _sample_jit(key: Key, potential: Potential, mixture: _Mixture, *, dtype: Any, n: int) -> Pair:
    def one(index: Array) -> Pair:
        x0 = _draw(mixture, dtype, jax.random.fold_in(key, index))
        return Pair(x0, _transport(potential, x0))

    return _sampling.in_chunks(one, jnp.arange(n))


def _sample(potential: Potential, mixture: _Mixture, dtype: Any, key: Key, n: int) -> Pair:  # noqa: PLR0917
    """N pairs; its first three arguments are bound by a partial."""
    _validate.positive_integer("n", n)
    return _sample_jit(key, potential, mixture, dtype=dtype, n=int(n))


def _read(path: Path, dim: int) -> tuple[Path, dict[str, np.ndarray]]:
    """The file that was found (of two .pt files the first), and its arrays by their names in the .npz."""
    if path.is_dir():
        archive, *networks = path / f"mix3tomix10_d{dim}.npz", *(path / f"{dim}_{name}.pt" for name in _NETWORKS)
        if archive.is_file():
            return archive, _read_archive(archive)
        if all(file.is_file() for file in networks):
            from fvjax.data._torch_files import read_state_dict

            arrays = {
                f"{name}/{key.replace('.', '/')}": value
                for name, file in zip(_NETWORKS, networks, strict=True)
                for key, value in read_state_dict(file).items()
            }
            return networks[0], arrays
        raise DataError(f"{path} must hold {archive.name}, or {networks[0].name} and {networks[1].name}: found neither")
    if path.suffix == ".npz" and path.is_file():
        return path, _read_archive(path)
    raise DataError(f"path must be a folder or an .npz file that exists, got {str(path)!r}")


def _read_archive(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (*_UNREADABLE, AttributeError) as error:  # AttributeError: a plain .npy, which np.load returns as an array
        reason = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read as an .npz file of numbers ({reason}): copy it anew") from error


def _array(file: Path, arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One array of a file, of the expected shape and finite."""
    if name not in arrays:
        raise DataError(f"{file} must hold an array {name}, got {len(arrays)} arrays without it")
    array = arrays[name]
    if array.shape != shape:
        raise DataError(f"{file}: {name} must have shape {shape}, got {array.shape}: is it of this dimension?")
    if not np.issubdtype(array.dtype, np.floating) or not np.all(np.isfinite(array)):
        raise DataError(f"{file}: {name} must hold finite floating-point numbers, got others ({array.dtype})")
    return array


def _network(file: Path, arrays: Mapping[str, np.ndarray], name: str, dim: int) -> Weights:
    """The checked weights of one network."""
    widths = (max(2 * dim, 64), max(2 * dim, 64), max(dim, 32))
    shapes: dict[str, tuple[int, ...]] = {}
    for index, width in enumerate(widths):
        layer = f"quadratic_layers/{index}"
        shapes |= {
            f"{layer}/quadratic_decomposed": (dim, 1, width),
            f"{layer}/weight": (width, dim),
            f"{layer}/bias": (width,),
        }
    convex = {
        "convex_layers/0/weight": (widths[1], widths[0]),
        "convex_layers/1/weight": (widths[2], widths[1]),
        "final_layer/weight": (1, widths[2]),
    }
    weights = {key: _array(file, arrays, f"{name}/{key}", shape) for key, shape in (shapes | convex).items()}
    for key in convex:
        smallest = weights[key].min()
        if smallest < 0:
            raise DataError(f"{file}: {name}/{key} must be >= 0 (else psi is not convex), got an entry {smallest}")
    return {key: jnp.asarray(value) for key, value in weights.items()}


def _mixture_of(get: Any, dim: int) -> _Mixture:
    """The mixture of an .npz file."""
    return _Mixture(
        *(
            jnp.asarray(get(f"mixture/{name}", shape))
            for name, shape in (
                ("centers", (_COMPONENTS, dim)),
                ("maps", (_COMPONENTS, dim, dim)),
                ("std", ()),
                ("weights", (_COMPONENTS,)),
            )
        )
    )


def _benchmark_mixture(dim: int) -> _Mixture:
    """The three components as the benchmark draws them at every start: numpy's legacy generator with seed 0.

    Every coordinate of the three centres is a permutation of (-1, 0, 1). The rows of the maps are random unit vectors.
    Both are scaled to E|x|^2 = d. That generator's stream is frozen (NEP 19), so these are the benchmark's numbers.
    """
    generator = np.random.RandomState(0)
    columns = [generator.choice(_COMPONENTS, _COMPONENTS, replace=False) for _ in range(dim)]
    centers = np.stack(columns, axis=1).astype(np.float32) - np.float32((_COMPONENTS - 1) / 2)
    maps = generator.normal(size=(_COMPONENTS, dim, dim)).astype(np.float32)
    maps /= np.sqrt(np.square(maps).sum(2, keepdims=True))
    scale = np.sqrt(np.square(centers).sum(1).mean() + dim * _STD**2) / np.sqrt(dim)
    weights = np.full(_COMPONENTS, 1 / _COMPONENTS, np.float32)
    parts = (centers / scale, maps / scale, np.array(_STD), weights)
    return _Mixture(*(jnp.asarray(part, jnp.float32) for part in parts))


def _standardised(v1: Weights, v2: Weights, mixture: _Mixture) -> Potential:
    """Psi whose gradient has, over 2^14 draws, mean 0 and variance 1 on average over the coordinates."""
    dim = mixture.centers.shape[1]
    plain = Potential(v1, v2, jnp.ones((), jnp.float32), jnp.zeros(dim, jnp.float32))
    x1 = np.asarray(_sample(plain, mixture, np.dtype(np.float32), jax.random.key(0), _ESTIMATE).x1, np.float64)
    scale = 1 / np.sqrt(x1.var(0).mean())
    return plain._replace(scale=jnp.asarray(scale, jnp.float32), shift=jnp.asarray(-x1.mean(0), jnp.float32))


def _moments(file: Path, arrays: Mapping[str, np.ndarray], potential: Potential, mixture: _Mixture) -> _Moments:
    """Cost and target variance from the file; what it does not hold is estimated."""
    from_file = file.suffix == ".npz"
    cost = float(_array(file, arrays, "cost_half_w2sq", ())) if from_file else None
    variance = float(_array(file, arrays, "output/var", ())) if "output/var" in arrays else None
    if cost is not None and variance is not None:
        return _Moments(cost, variance, "cost and target variance from the file")
    drawn = _sample(potential, mixture, np.dtype(np.float32), jax.random.key(1), _ESTIMATE)
    x0, x1 = (np.asarray(x, np.float64) for x in drawn)
    estimated = float(x1.var(0).sum())
    if cost is not None:
        return _Moments(cost, estimated, f"cost from the file, target variance from {_ESTIMATE} draws")
    half = 0.5 * float(np.square(x1 - x0).sum(1).mean())
    return _Moments(half, estimated, f"cost and target variance from {_ESTIMATE} draws")
