"""The inverse without LAPACK."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fvjax.gaussian._inverse import inverse


@given(seed=st.integers(0, 2**16), dim=st.sampled_from([1, 2, 7]))
def test_inverse_is_that_of_lapack(x64: None, seed: int, dim: int) -> None:
    """Catches rows or columns left in the order of the pivots, and elimination without pivoting: zeros come first."""
    matrices = np.random.default_rng(seed).normal(size=(3, dim, dim)) * (np.arange(dim * dim).reshape(dim, dim) > 0)
    matrices = matrices if dim > 1 else matrices + 2.0
    expected = np.linalg.inv(matrices)
    scale = np.linalg.cond(matrices).max() * np.abs(expected).max()
    np.testing.assert_allclose(jax.vmap(inverse)(matrices), expected, rtol=0, atol=1e-13 * scale)


def test_derivative_of_the_inverse(x64: None) -> None:
    """Catches a wrong sign or order in -X dA X, also in reverse."""
    random = np.random.default_rng(0)
    matrix, direction, weight = jnp.asarray(random.normal(size=(3, 4, 4)))

    def along(step: float) -> jax.Array:
        return jnp.sum(weight * inverse(matrix + step * direction))

    difference = (along(1e-6) - along(-1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(along)(0.0), difference, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(along, (0.0,), (1.0,))[1], difference, rtol=1e-6)


def test_a_singular_matrix_is_not_finite(x64: None) -> None:
    """Catches a finite inverse of a matrix that has none."""
    assert not np.all(np.isfinite(inverse(jnp.zeros((2, 2)))))
    assert not np.all(np.isfinite(inverse(jnp.ones((3, 3)))))
