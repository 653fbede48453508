"""An exact optimal-transport pair from any set of images: the source is the gradient of a convex function of the image.

The map x1 -> x0 is explicit, its inverse x0 -> x1 is the solution of a strongly convex problem.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.sparse import linalg
from jax.typing import ArrayLike

from fvjax import _validate
from fvjax.data import images as image_sets
from fvjax.data._types import DataError, Images, as_images
from fvjax.data.ot_benchmark import _sampling
from fvjax.data.ot_benchmark._types import OptimalPairs
from fvjax.types import Array, Key, Pair

_LINEAR = 0.2  # what the map keeps of the image itself; the smallest eigenvalue of its derivative
_GAIN = 2.0  # of the saturated blur
_MOMENTS = 10_000  # images, at most, behind shift, cost and target variance
_MOMENTS_CHUNK = 500
_STOP = 1  # machine epsilons, see `transport` in the docstring of `convex_pairs`
_SHARPNESS = (1e-3, 100.0)


class Degradation(NamedTuple):
    """The map x1 -> x0 = keep x1 + gain B tanh(sharpness B x1) / tanh(sharpness) + shift.

    Leaves are float64 of numpy, so that the map is the same in float32 and float64.

    Attributes:
        rows: the blur's factor on the row index, symmetric, [h, h]; B x = rows @ x @ columns for each channel.
        columns: its factor on the column index, symmetric, [w, w].
        keep: a > 0, [].
        gain: 2 amount >= 0, [].
        sharpness: s > 0, [].
        shift: [h, w, c].
    """

    rows: ArrayLike
    columns: ArrayLike
    keep: ArrayLike
    gain: ArrayLike
    sharpness: ArrayLike
    shift: ArrayLike


def convex_pairs(
    images: Images | Any = None,
    *,
    split: str | None = None,
    amount: float = 1.0,
    sharpness: float = 1.5,
    blur: float = 0.5,
    shift: Any = None,
    dtype: Any = jnp.float32,
) -> OptimalPairs:
    r"""Exact optimal pairs of ANY images, without a trained network: x1 a real image, x0 = grad phi(x1), phi convex.

        x0 = (1 - amount) x1 + amount [0.2 x1 + 2 B tanh(s B x1) / tanh(s)] + shift,      s = sharpness,

    with B = exp(-blur L), L the graph Laplacian of the pixel grid (4 neighbours, free ends), each channel for itself.
    So x0 is a smooth image of saturated strokes; grey values between the extremes shrink to details of x0.

    Proof of optimality. B is symmetric and 0 < B <= I. Let a = 1 - 0.8 amount, c = 2 amount / tanh(s). Then x0 is the
    gradient at x1 of

        phi(x) = a |x|^2 / 2 + (c / s) sum_k log cosh(s (B x)_k) + shift . x,
        Hessian phi = a I + c s B diag(sech^2(s B x)) B  >=  a I,      a >= 0.2.

    So phi is strongly convex, and grad phi one-to-one from R^d onto R^d. For any x, y: phi(y) >= phi(x) +
    grad phi(x) . (y - x). Added up over a cycle y_1, ..., y_m, y_(m+1) = y_1 of images it says
    sum_k grad phi(y_k) . (y_(k+1) - y_k) <= 0: the pairs (x0, x1) are cyclically monotone, which means that no other
    assignment of the same images has a smaller sum of |x0 - x1|^2 (Rockafellar 1966). The finite set of pairs and its
    every subset are optimally coupled, as is the law of any random image. The map x0 -> x1 is grad phi*, the gradient
    of the convex conjugate, and Lipschitz with constant 1 / a.

    ====================  ============================================================================================
    amount = 0            x0 = x1 (and shift, if one is given): cost 0
    0 <= amount <= 1      x0 - x1 is proportional to `amount`, and the cost to its square, with the default shift
    sharpness -> 0        a linear map: 0.2 x1 + 2 B^2 x1; sharper maps saturate earlier (almost the sign of B x1)
    blur = 0              B = I: each pixel for itself
    blur -> inf           x0 tells only the mean of the image, except for its part a x1
    shift = None          the image E[x1 - x0] that gives x0 the mean of x1, pixel by pixel: transport then has to
                          change the shape of the law, not to move it
    ====================  ============================================================================================

    `transport` (x0 -> x1) minimises phi(x) - x0 . x by accelerated gradient steps, which converge at the rate
    1 - sqrt(a / (a + c s)) from anywhere. It stops where |grad phi(x) - x0| <= machine epsilon times the larger of
    |x0| and 1 (root mean squares), so that x is within 1 / a times that of x1, or after the steps that the rate needs
    for it, where rounding alone is larger. At the defaults 50 steps in float32, each two blurs;
    the largest error against x1 is 2e-6 (float64: 3e-14), and 5e-6 at sharpness 5, 3e-5 at 50. Derivatives, of both
    modes, come from the implicit function theorem, by conjugate gradients. Every x0 [h, w, c] has its x1; whether that
    looks like an image is another question.

    Args:
        images: `fvjax.data.Images`; or an array [n, h, w, c] or [n, h, w], uint8 (scaled to u / 127.5 - 1) or floating
            in [-1, 1]. None: `fvjax.data.load("digits")`. Memory maps are read when needed.
        split: "train" (the default) or "test", for `Images` only: both splits have the same map, of which the default
            shift comes from the training images.
        amount: how far x0 is from x1, in [0, 1].
        sharpness: slope of the saturation, in [0.001, 100].
        blur: time of diffusion >= 0, in squared pixels / 2: a point spreads to a standard deviation of sqrt(2 blur).
        shift: number or array that broadcasts to [h, w, c]. None estimates it from the images (the training images of
            `Images`), so that two arrays have two maps, unless the same shift is given for both.
        dtype: of what `sample` returns, float32 or (where JAX's x64 is enabled) float64.

    Returns:
        OptimalPairs of dims (h, w, c), size n: `sample` draws without replacement, on the host. Default shift, cost
        and target variance are those of the finite set: exact up to 10,000 images, above that from 10,000 of them.

    Raises:
        ValueError: if an option is out of range, or `split` is given for an array.
        DataError: (a ValueError) if an array is no such images.

    Source: derived here; Brenier 1991 and Rockafellar 1966 for gradients of convex functions, Nesterov 2004 for the
        steps.
    """
    if not 0 <= amount <= 1:
        raise ValueError(f"amount must be in [0, 1], got {amount}")
    if not _SHARPNESS[0] <= sharpness <= _SHARPNESS[1]:
        raise ValueError(f"sharpness must be from {_SHARPNESS[0]:g} to {_SHARPNESS[1]:g}, got {sharpness}")
    _validate.nonnegative("blur", blur)
    dtype = _sampling.floating_dtype(dtype)
    name, chosen, reference = _chosen(images, split)
    dims = tuple(int(side) for side in chosen.shape[1:])
    unshifted = Degradation(
        rows=_blur(dims[0], blur),
        columns=_blur(dims[1], blur),
        keep=np.asarray(1 - (1 - _LINEAR) * amount),
        gain=np.asarray(_GAIN * amount),
        sharpness=np.asarray(float(sharpness)),
        shift=np.zeros(dims),
    )
    moments = _moments(unshifted, chosen)
    if shift is None:
        centre = (moments if chosen is reference else _moments(unshifted, reference)).difference
    else:
        centre = _given_shift(shift, dims)
    degradation = unshifted._replace(shift=centre)
    return OptimalPairs(
        name=f"convex-{name}",
        dims=dims,
        sample=functools.partial(_sample, chosen, degradation, dtype),
        transport=jax.tree_util.Partial(_transport, degradation),
        cost=moments.cost(centre),
        target_variance=moments.target_variance,
        size=len(chosen),
        source=f"gradient of a convex function of {len(chosen)} images ({name}), amount {amount:g}, sharpness"
        f" {sharpness:g}, blur {blur:g}; cost and target variance from {moments.images} of them",
    )


def degrade(degradation: Degradation, x1: Array) -> Array:
    """Grad phi(x1) of one image, [h, w, c] -> [h, w, c], in the dtype of x1."""
    rows, columns, keep, gain, sharpness, shift = (jnp.asarray(leaf, x1.dtype) for leaf in degradation)

    def blurred(x: Array) -> Array:
        return jnp.einsum("ij,jkc,kl->ilc", rows, x, columns, precision=jax.lax.Precision.HIGHEST)

    return keep * x1 + gain * blurred(jnp.tanh(sharpness * blurred(x1)) / jnp.tanh(sharpness)) + shift


_degrade_all = jax.jit(lambda degradation, x1: _sampling.in_chunks(functools.partial(degrade, degradation), x1))


def _transport(degradation: Degradation, x0: ArrayLike) -> Array:
    """The image x1 with grad phi(x1) = x0, [h, w, c] -> [h, w, c]."""
    x0 = jnp.asarray(x0)
    _validate.floating("x0", x0)
    _validate.shape("x0", x0, np.shape(degradation.shift))
    return _inverse(degradation, x0)


def _curvatures(degradation: Degradation, dtype: Any) -> tuple[Array, Array]:
    """Bounds of the Hessian's eigenvalues, at any image: a and a + c s."""
    _, _, keep, gain, sharpness, _ = (jnp.asarray(leaf, dtype) for leaf in degradation)
    return keep, keep + gain * sharpness / jnp.tanh(sharpness)


@jax.custom_jvp
def _inverse(degradation: Degradation, x0: Array) -> Array:
    """The minimiser of phi(x) - x0 . x, by Nesterov's scheme of constant steps.

    The distance to the minimiser falls at least by sqrt(1 - sqrt(m / M)) a step, m and M the bounds of the curvature,
    so that 2 sqrt(M / m) log(M / (m tolerance)) steps reach any tolerance.
    """
    smallest, largest = _curvatures(degradation, x0.dtype)
    root = jnp.sqrt(largest / smallest)
    momentum = (root - 1) / (root + 1)
    tolerance = _STOP * jnp.finfo(x0.dtype).eps
    threshold = tolerance * jnp.maximum(_root_mean_square(x0), 1)
    most = jnp.ceil(2 * root * jnp.log(root**2 / tolerance)).astype(jnp.int32)

    def unfinished(state: _Descent) -> Array:
        return (state.residual > threshold) & (state.steps < most)

    def step(state: _Descent) -> _Descent:
        ahead = state.x + momentum * (state.x - state.previous)
        gradient = degrade(degradation, ahead) - x0
        return _Descent(ahead - gradient / largest, state.x, _root_mean_square(gradient), state.steps + 1)

    start = jnp.clip(x0, -1, 1)
    first = _Descent(start, start, jnp.asarray(jnp.inf, x0.dtype), jnp.asarray(0, jnp.int32))
    return jax.lax.while_loop(unfinished, step, first).x


@_inverse.defjvp
def _inverse_jvp(primals: tuple[Degradation, Array], tangents: tuple[Degradation, Array]) -> tuple[Array, Array]:
    """Of grad phi(x1) = x0: H dx1 = dx0 - (d grad phi)(x1), H the Hessian of phi at x1."""
    (degradation, x0), (degradation_rate, x0_rate) = primals, tangents
    x1 = _inverse(degradation, x0)
    epsilon = float(jnp.finfo(x0.dtype).eps)

    def hessian(v: Array) -> Array:
        return jax.jvp(functools.partial(degrade, degradation), (x1,), (v,))[1]

    def solve(product: Callable[[Array], Array], right: Array) -> Array:
        solution: Array = linalg.cg(product, right, tol=4 * epsilon)[0]
        return solution

    rate = jax.jvp(lambda parameters: degrade(parameters, x1), (degradation,), (degradation_rate,))[1]
    # H is symmetric, which makes the solve transposable: reverse mode costs one more of the same.
    return x1, jax.lax.custom_linear_solve(hessian, x0_rate - rate, solve, symmetric=True)


class _Descent(NamedTuple):
    """Iterate, the one before, root mean square of the last gradient, number of steps."""

    x: Array
    previous: Array
    residual: Array
    steps: Array


def _root_mean_square(x: Array) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def _sample(chosen: np.ndarray, degradation: Degradation, dtype: Any, key: Key, n: int) -> Pair:  # noqa: PLR0917
    """N pairs without replacement; the first three arguments are bound by a partial."""
    x1 = jnp.asarray(_scaled(chosen[_sampling.without_replacement(key, n, len(chosen))], dtype))
    return Pair(_degrade_all(degradation, x1), x1)


def _scaled(picked: np.ndarray, dtype: Any) -> np.ndarray:
    """Images in [-1, 1]: uint8 becomes u / 127.5 - 1."""
    if picked.dtype != np.uint8:
        return picked.astype(dtype)
    scaled = np.divide(picked, np.asarray(127.5, dtype), dtype=dtype)
    scaled -= 1
    return scaled


def _blur(side: int, time: float) -> np.ndarray:
    """exp(-time L) of the path graph with `side` nodes, [side, side], symmetric, rows sum to 1.

    L is diagonal in the cosine basis v_k(i) = cos(pi k (i + 1/2) / side), eigenvalues 2 - 2 cos(pi k / side). On the
    grid L = L_rows (x) I + I (x) L_columns, so exp(-time L) is the product of its two factors.
    """
    k = np.arange(side)
    basis = np.cos(np.pi * np.outer(k + 0.5, k) / side)
    basis /= np.linalg.norm(basis, axis=0)
    decay = np.exp(-time * (2 - 2 * np.cos(np.pi * k / side)))
    return (basis * decay) @ basis.T


def _chosen(images: Any, split: str | None) -> tuple[str, np.ndarray, np.ndarray]:
    """Name of the set, the images that are paired, and those that the default shift comes from."""
    images = image_sets.load("digits") if images is None else images
    if not isinstance(images, Images):
        if split is not None:
            raise ValueError(f"split must be left out where images is an array, got {split!r}")
        array = _as_array(images)
        return "images", array, array
    split = "train" if split is None else split
    _validate.one_of("split", split, ("train", "test"))
    train = _as_array(images.train)
    return f"{images.name}-{split}", train if split == "train" else _as_array(images.test), train


def _as_array(images: Any) -> np.ndarray:
    """Images [n, h, w, c], uint8 or floating in [-1, 1]; a memory map stays one."""
    array = images if isinstance(images, np.ndarray) else np.asarray(images)
    if not np.issubdtype(array.dtype, np.floating):
        return as_images("images", array)
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or 0 in array.shape:
        raise DataError(f"images must be a non-empty [n, h, w] or [n, h, w, c], got {array.shape}")
    low, high = array.min(), array.max()
    if not (low >= -1 and high <= 1):  # nan fails too
        raise DataError(f"images must be in [-1, 1] where they are floating point, got values from {low} to {high}")
    return array


def _given_shift(shift: Any, dims: tuple[int, ...]) -> np.ndarray:
    _validate.finite("shift", shift)
    try:
        return np.array(np.broadcast_to(np.asarray(shift, np.float64), dims))
    except ValueError as error:
        raise ValueError(f"shift must broadcast to {dims}, got shape {np.shape(shift)}") from error


class _Moments(NamedTuple):
    """Means over images, of x1 and of e = x1 - grad phi(x1), the latter without a shift."""

    difference: np.ndarray
    difference_square: float
    target_variance: float
    images: int

    def cost(self, shift: np.ndarray) -> float:
        """E|x0 - x1|^2 / 2 with a shift: E|e - shift|^2 = (E|e|^2 - |E e|^2) + |E e - shift|^2."""
        spread = max(self.difference_square - float(np.square(self.difference).sum()), 0.0)
        return 0.5 * (spread + float(np.square(self.difference - shift).sum()))


def _moments(degradation: Degradation, images: np.ndarray) -> _Moments:
    """Exact for up to 10,000 images, else from 10,000 that are spread evenly; sums in float64."""
    count = min(len(images), _MOMENTS)
    indices = np.linspace(0, len(images) - 1, count).astype(int)
    sums = np.zeros((2, *images.shape[1:]))
    squares = np.zeros(2)
    for start in range(0, count, _MOMENTS_CHUNK):
        x1 = _scaled(images[indices[start : start + _MOMENTS_CHUNK]], np.float32)
        difference = x1.astype(np.float64) - np.asarray(_degrade_all(degradation, x1), np.float64)
        for index, values in enumerate((difference, x1.astype(np.float64))):
            sums[index] += values.sum(0)
            squares[index] += np.square(values).sum()
    means = sums / count
    variance = squares[1] / count - float(np.square(means[1]).sum())
    return _Moments(means[0], float(squares[0]) / count, float(max(variance, 0.0)), count)
