"""Distances of a learned map to the right one, row by row, and the angle of the rotation that fits it."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax.types import Array, Scalar


class PairDistance(NamedTuple):
    """Mean and sample standard deviation (ddof = 1) of a distance over `count` examples, in units of x."""

    mean: Array
    standard_deviation: Array
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody wants of a measurement


def pair_l2(predicted: Array, target: Array) -> PairDistance:
    r"""Mean and spread over examples of the Euclidean distance |predicted_i - target_i|_2.

    With the true optimal-transport targets it measures generalization, with the training targets memorization (Reu et
    al. 2025). It compares aligned rows: unlike a distance of sets it tells a pair from its neighbour. The norm sums
    over all dimensions of an example, without division by their number.

    =========  ==========================================
    n = 1      the standard deviation (ddof = 1) is nan
    n = 0      refused
    =========  ==========================================

    Args:
        predicted: [n, *dims], floating point.
        target: [n, *dims], row i belongs to row i of `predicted`.

    Returns:
        PairDistance(mean [], standard_deviation [], count), at least in float32. The standard error of the mean is
        standard_deviation / sqrt(count).

    Raises:
        ValueError: if the shapes differ, there is no example, or an array is not floating point.
    """
    predicted, target = _examples(("predicted", "target"), predicted, target)
    count = len(predicted)
    distances = jnp.linalg.norm(predicted - target, axis=1)
    deviation = jnp.std(distances, ddof=1) if count > 1 else jnp.full((), jnp.nan, distances.dtype)
    return PairDistance(jnp.mean(distances), deviation, count)


def fitted_rotation(x0: Array, x1_hat: Array, *, planes_basis: Array | None = None) -> Array:
    r"""Angle of the rotation that fits a map best, in least squares over centred samples.

    In the planes (0, 1), (2, 3), ... with z = y_(2k) + i y_(2k+1) of the centred samples y,

        angle = arg sum over samples and planes of conj(z0) z1 = argmin_phi sum |x1_hat - R(phi) x0|^2,

    where R(phi) turns each of these planes by phi and leaves a last odd coordinate alone. (Expand the square: only
    -2 Re exp(-i phi) sum conj(z0) z1 depends on phi.) In two dimensions the argument is atan2(C_10 - C_01, C_00 + C_11)
    of the cross moment C = sum x1_hat x0^T: the antisymmetric over the symmetric part, and for x0 of isotropic sample
    covariance that of the least-squares linear map. There x1 = S R(phi) x0 with S symmetric positive definite still
    gives phi.

    Positive is counter-clockwise, R = [[cos phi, -sin phi], [sin phi, cos phi]], from the even to the odd coordinate.

    =========================================  =======================================================
    x1_hat = R(phi) x0 + shift                 phi exactly, for any sample that is not constant
    half a turn                                pi, never -pi (rounding may fall on either side of it)
    sum = 0 (constant x0 or x1_hat, n = 1)     undefined: nan
    =========================================  =======================================================

    Args:
        x0: sources, [n, d], d >= 2, floating point.
        x1_hat: what the map makes of them, [n, d].
        planes_basis: orthogonal [d, d]; its columns (0, 1), (2, 3), ... span the planes, for a rotation
            planes_basis @ blocks @ planes_basis.T. None means the coordinate axes.

    Returns:
        The angle in radians in (-pi, pi], shape [], at least in float32.

    Raises:
        ValueError: if the shapes differ or are not [n, d] with n >= 1, d >= 2, an array is not floating point, or
            `planes_basis` is not an orthogonal [d, d] matrix.
    """
    _validate.same_shape("x0", x0, "x1_hat", x1_hat)
    if jnp.ndim(x0) != 2 or x0.shape[0] < 1 or x0.shape[1] < 2:
        raise ValueError(f"x0 must have shape [n, d] with n >= 1 and d >= 2, got {jnp.shape(x0)}")
    dimension = x0.shape[1]
    source, image = _at_least_float32(("x0", "x1_hat"), x0, x1_hat)
    source, image = source - jnp.mean(source, axis=0), image - jnp.mean(image, axis=0)
    if planes_basis is not None:
        _validate.shape("planes_basis", planes_basis, (dimension, dimension))
        _validate.orthogonal("planes_basis", planes_basis)
        source = source @ jnp.asarray(planes_basis, source.dtype)
        image = image @ jnp.asarray(planes_basis, image.dtype)
    even, odd = slice(0, dimension - dimension % 2, 2), slice(1, None, 2)
    real = jnp.sum(source[:, even] * image[:, even]) + jnp.sum(source[:, odd] * image[:, odd])
    imaginary = jnp.sum(source[:, even] * image[:, odd]) - jnp.sum(source[:, odd] * image[:, even])
    angle = jnp.arctan2(imaginary, real)
    angle = jnp.where(angle <= -jnp.pi, jnp.asarray(jnp.pi, angle.dtype), angle)
    return jnp.where((real == 0) & (imaginary == 0), jnp.nan, angle)


def l2_uvp(predicted: Array, target: Array, *, variance: Scalar | None = None) -> Array:
    r"""Unexplained variance of a transport map in per cent, L2-UVP of Korotin et al.

        100 E|predicted - target|^2 / Var(target),   Var = E|target - E target|^2, the trace of the covariance.

    0 is the true map, 100 that of a map to the mean of the target.

    =============================  =======================================================================
    predicted = mean(target)       100 exactly, up to rounding (ddof = 0 in the sample's variance)
    Var(target) = 0                inf, or nan where predicted = target, too; so for n = 1 without `variance`
    =============================  =======================================================================

    Args:
        predicted: [n, *dims], floating point.
        target: the true images of the same sources, [n, *dims].
        variance: total variance of the target law, > 0, []; None takes that of `target`, with ddof = 0.

    Returns:
        Per cent, >= 0, shape [], at least in float32.

    Raises:
        ValueError: if the shapes differ, there is no example, an array is not floating point, or `variance` is not > 0.

    Source: Korotin et al. 2021 (Wasserstein-2 benchmark).
    """
    predicted, target = _examples(("predicted", "target"), predicted, target)
    if variance is None:
        variance = jnp.mean(jnp.sum((target - jnp.mean(target, axis=0)) ** 2, axis=1))
    else:
        _validate.shape("variance", variance, ())
        _validate.positive("variance", variance)
    error = jnp.mean(jnp.sum((predicted - target) ** 2, axis=1))
    return 100 * error / jnp.asarray(variance, error.dtype)


def direction_cosine(x0: Array, predicted: Array, target: Array) -> Array:
    r"""Cosine between the displacements of a learned map and of the true one, in L2 of the source.

        <T_hat - id, T - id> / (|T_hat - id| |T - id|),   <f, g> = E f(x0) . g(x0).

    One angle for the whole map, not a mean of angles; the length of the displacements does not count.

    ==================================  ========================
    predicted = x0 + c (target - x0)    1 for c > 0, -1 for c < 0
    predicted = x0, or target = x0      undefined: nan
    ==================================  ========================

    Args:
        x0: sources, [n, *dims], floating point.
        predicted: their images under the learned map, [n, *dims].
        target: under the true map, [n, *dims].

    Returns:
        In [-1, 1], shape [], at least in float32.

    Raises:
        ValueError: if the shapes differ, there is no example, or an array is not floating point.

    Source: Korotin et al. 2021 (Wasserstein-2 benchmark).
    """
    learned = jnp.subtract(*_examples(("predicted", "x0"), predicted, x0))
    true = jnp.subtract(*_examples(("target", "x0"), target, x0))
    learned, true = _at_least_float32(("predicted", "target"), learned, true)
    # Scaled to a largest entry of 1, so that no square overflows or is lost.
    learned, true = (part / jnp.max(jnp.abs(part)) for part in (learned, true))
    cosine = jnp.sum(learned * true) / (jnp.linalg.norm(learned) * jnp.linalg.norm(true))
    return jnp.clip(cosine, -1, 1)


def _examples(names: tuple[str, str], x: Array, y: Array) -> tuple[Array, Array]:
    """Both arrays as rows [n, d], n >= 1."""
    _validate.same_shape(names[0], x, names[1], y)
    count = _validate.batch(names[0], x)
    if count == 0:
        raise ValueError(f"{names[0]} must hold at least one example, got 0")
    x, y = _at_least_float32(names, x, y)
    return x.reshape(count, -1), y.reshape(count, -1)


def _at_least_float32(names: tuple[str, str], x: Array, y: Array) -> tuple[Array, Array]:
    """Both arrays in the wider of their dtypes, or in float32."""
    _validate.floating(names[0], x)
    _validate.floating(names[1], y)
    dtype = _validate.common_dtype(x, y)
    if jnp.finfo(dtype).bits < 32:
        dtype = np.dtype(np.float32)
    return jnp.asarray(x, dtype), jnp.asarray(y, dtype)
