"""Couplings that look at no distance: as given, permuted at random, or replaced by an affine map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fvjax import _validate
from fvjax.types import AffineMap, Array, Coupling, Key, Pair


def aligned(x0: Array, x1: Array) -> tuple[Array, Array]:
    """Both batches as jax arrays; refuses shapes that differ or have no leading axis."""
    _validate.same_shape("x0", x0, "x1", x1)
    _validate.batch("x0 and x1", (x0, x1))
    return jnp.asarray(x0), jnp.asarray(x1)


def paired(key: Key, x0: Array, x1: Array) -> Pair:
    """Leaves the pairs as they are: x1_i stays with x0_i.

    Args:
        key: not needed; here for the signature of a Coupling.
        x0: source samples, [n, *dims].
        x1: target samples, [n, *dims].

    Returns:
        Pair(x0, x1).

    Raises:
        ValueError: if the shapes of x0 and x1 differ.
    """
    del key
    return Pair(*aligned(x0, x1))


def independent(key: Key, x0: Array, x1: Array) -> Pair:
    """Joins x0 with a uniformly random permutation of x1: every partner is equally likely, the old one included.

    Args:
        key: PRNG key of the permutation.
        x0: source samples, [n, *dims].
        x1: target samples, [n, *dims].

    Returns:
        Pair(x0, permuted x1); every point is used exactly once.

    Raises:
        ValueError: if the shapes of x0 and x1 differ.
    """
    x0, x1 = aligned(x0, x1)
    return Pair(x0, x1[jax.random.permutation(key, len(x1))])


@functools.partial(jax.jit, static_argnums=1)
def _derangement(key: Key, n: int) -> Array:
    identity = jnp.arange(n)

    def draw(state: tuple[Key, Array]) -> tuple[Key, Array]:
        next_key, key = jax.random.split(state[0])
        return next_key, jax.random.permutation(key, identity)

    return jax.lax.while_loop(lambda state: jnp.any(state[1] == identity), draw, (key, identity))[1]


def derangement(key: Key, n: int) -> Array:
    """Draws a permutation without fixed point, uniformly among all of them.

    By rejection: a permutation has no fixed point with probability 1/2 (n = 2), 1/3 (n = 3), ... -> 1/e, so that
    about e permutations are drawn on average, whatever n.

    Args:
        key: PRNG key.
        n: number of elements, >= 2 (static).

    Returns:
        Indices, int[n], with result[i] != i for every i.

    Raises:
        ValueError: if `n` is not an integer >= 2.
    """
    _validate.positive_integer("n", n)
    if n < 2:
        raise ValueError(f"n must be >= 2 (one element has no derangement), got {n}")
    return _derangement(key, int(n))


def shuffled(key: Key, x0: Array, x1: Array) -> Pair:
    """Joins x0 with a uniformly random derangement of x1: no x1_i stays with its x0_i, so every given pair is broken.

    Equal rows of x1 are different points here: x0_i may meet a copy of its own x1_i.

    Args:
        key: PRNG key of the derangement.
        x0: source samples, [n, *dims], n >= 2.
        x1: target samples, [n, *dims].

    Returns:
        Pair(x0, deranged x1); every point is used exactly once.

    Raises:
        ValueError: if the shapes of x0 and x1 differ, or n < 2.
    """
    x0, x1 = aligned(x0, x1)
    return Pair(x0, x1[derangement(key, len(x1))])


def affine(map: AffineMap) -> Coupling:
    """The deterministic coupling x1 = A x0 + b.

    The coupling REPLACES the x1 that it is given (which only has to have the shape of x0). The law of the targets is
    kept where x1 ~ law of A x0 + b; elsewhere it becomes that law.

    Args:
        map: matrix A [d, d] and shift b [d]; both are cast to the dtype of x0.

    Returns:
        A coupling of floating-point x0 [n, d]; it uses no randomness.

    Raises:
        ValueError: if the matrix is not square or the shift does not fit; by the coupling, if x0 is not [n, d] or not
            floating point, or the shapes of x0 and x1 differ.
    """
    _validate.square("map.matrix", map.matrix)
    dim = np.shape(map.matrix)[0]
    _validate.shape("map.shift", map.shift, (dim,))

    def coupling(key: Key, x0: Array, x1: Array) -> Pair:
        del key
        x0, x1 = aligned(x0, x1)
        _validate.shape("x0", x0, (len(x0), dim))
        if not jnp.issubdtype(x0.dtype, jnp.floating):
            raise ValueError(f"x0 must be floating point, got {x0.dtype}")
        cast = AffineMap(jnp.asarray(map.matrix, x0.dtype), jnp.asarray(map.shift, x0.dtype))
        # Pairs are data: an accelerator's fast low-precision product would move the targets by a part in a thousand.
        with jax.default_matmul_precision("highest"):
            return Pair(x0, jax.vmap(cast.__call__)(x0))

    return coupling


def rotated(rotation: Array, shift: Array | float | None = None) -> Coupling:
    """The deterministic coupling x1 = R x0 + shift, `affine` with an orthogonal matrix.

    Like `affine` it REPLACES the x1 that it is given. R = rotation_matrix(pi, d), shift = 5 is Counter Example 1.

    Args:
        rotation: R, orthogonal [d, d]; reflections (determinant -1) pass too.
        shift: [d], or one number for all coordinates; None is 0.

    Returns:
        A coupling of floating-point x0 [n, d]; it uses no randomness.

    Raises:
        ValueError: if `rotation` is not square or, when concrete, not orthogonal (to 1e3 machine epsilons of its
            dtype), or the shift does not fit; by the coupling, as in `affine`.

    Source: Counter Example 1, Reu et al. 2025.
    """
    _validate.orthogonal("rotation", rotation)
    dim = np.shape(rotation)[0]
    offset = jnp.asarray(0.0 if shift is None else shift)
    if offset.shape not in ((), (dim,)):
        raise ValueError(f"shift must have shape () or {(dim,)}, got {offset.shape}")
    return affine(AffineMap(jnp.asarray(rotation), jnp.broadcast_to(offset, (dim,))))
