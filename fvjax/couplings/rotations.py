"""Rotations by one angle in many planes, and random orthonormal bases to turn them in."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax.types import Array, Key, Scalar


def _cos_sin(angle: Scalar) -> tuple[Array, Array]:
    """Both functions with the multiples of pi / 2 taken out first, so that quarter turns give exactly 0 and +-1.

    angle = k pi/2 + r; at k = round(angle / (pi/2)) the rounded pi of any precision leaves r = 0 exactly, where
    sin(float32(pi)) is -8.7e-8. A concrete angle is reduced on the host: a Python float keeps its 53 bits.
    """
    xp = np if _validate.is_concrete(angle) else jnp
    radians: Any = xp.asarray(angle)
    if not jnp.issubdtype(radians.dtype, jnp.floating):
        radians = radians.astype(jnp.result_type(float))
    quarter = xp.asarray(np.pi / 2, radians.dtype)
    turns = xp.round(radians / quarter)
    rest = radians - turns * quarter
    odd = turns % 2 == 1
    sign = xp.where(turns % 4 >= 2, -1, 1).astype(radians.dtype)
    cos, sin = xp.cos(rest), xp.sin(rest)
    return sign * xp.where(odd, -sin, cos), sign * xp.where(odd, cos, sin)


def rotation_matrix(angle: Scalar, dim: int, *, basis: Array | None = None) -> Array:
    r"""Rotation by one angle in floor(dim / 2) orthogonal planes at once.

    With Q = `basis` (I by default), J the quarter turn in the planes of columns (0, 1), (2, 3), ... of Q and q the
    last column of Q where `dim` is odd (0 otherwise):

        R = cos(angle) I + sin(angle) Q J Q^T + (1 - cos(angle)) q q^T.

    ==============  =====================================================
    angle = pi      -I exactly for even dim, also for float32 pi
    odd dim         the last axis (last column of Q) is left fixed
    dim = 1         no plane: the identity
    ==============  =====================================================

    R(a) R(b) = R(a + b) in the same basis, and det R = 1.

    Args:
        angle: radians, shape [], may be traced.
        dim: d, an integer >= 1.
        basis: orthogonal [d, d]; random planes by `random_basis`.

    Returns:
        [d, d] in the dtype of `basis`, else of `angle` (the default float type if that is a Python number).

    Raises:
        ValueError: if `dim` is no integer >= 1, `angle` is not one finite number, or `basis` is not [d, d] or, when
            concrete, not orthogonal.
    """
    _validate.positive_integer("dim", dim)
    _validate.shape("angle", angle, ())
    _validate.finite("angle", angle)
    if basis is not None:
        _validate.shape("basis", basis, (dim, dim))
        _validate.orthogonal("basis", basis)
    dtype = jnp.asarray(angle if basis is None else basis).dtype
    dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
    cos, sin = (jnp.asarray(value, dtype) for value in _cos_sin(angle))
    first = np.arange(0, dim - 1, 2)
    quarter_turn = jnp.zeros((dim, dim), dtype).at[first, first + 1].set(-1).at[first + 1, first].set(1)
    q = jnp.asarray(np.eye(dim) if basis is None else basis, dtype)
    if basis is not None:
        with jax.default_matmul_precision("highest"):
            quarter_turn = q @ quarter_turn @ q.T
    matrix = cos * jnp.eye(dim, dtype=dtype) + sin * quarter_turn
    return matrix + (1 - cos) * jnp.outer(q[:, -1], q[:, -1]) if dim % 2 else matrix


def random_basis(key: Key, dim: int) -> Array:
    """Draws an orthogonal matrix from the Haar measure: Q of a Gaussian matrix = Q R, signs chosen so that diag R > 0.

    Without the signs Q depends on the convention of the QR routine and is not Haar distributed.

    Args:
        key: PRNG key.
        dim: d, an integer >= 1.

    Returns:
        [d, d] in the default float type; its determinant is +1 or -1 with equal probability.

    Raises:
        ValueError: if `dim` is no integer >= 1.

    Source: Mezzadri 2007, How to generate random matrices from the classical compact groups.
    """
    _validate.positive_integer("dim", dim)
    q, r = jnp.linalg.qr(jax.random.normal(key, (dim, dim)))
    return q * jnp.where(jnp.diag(r) < 0, -1, 1).astype(q.dtype)
