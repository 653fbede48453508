"""The checks at the public boundary: what passes, what is refused, and in which words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvjax import _validate

ASYMMETRIC = np.array([[1.0, 0.5], [0.4, 1.0]])
INDEFINITE = np.array([[1.0, 2.0], [2.0, 1.0]])
ROTATION = np.array([[0.6, -0.8], [0.8, 0.6]])

REFUSED = {
    "negative": (lambda: _validate.nonnegative("sigma", -0.1), "sigma must be >= 0 and finite, got -0.1"),
    "one negative": (lambda: _validate.nonnegative("w", jnp.asarray([1.0, -1.0])), "w must be >= 0 and finite, got"),
    "nan": (lambda: _validate.nonnegative("sigma", float("nan")), "sigma must be >= 0 and finite, got nan"),
    "zero": (lambda: _validate.positive("rtol", 0.0), "rtol must be > 0 and finite, got 0.0"),
    "steps": (lambda: _validate.positive_integer("steps", 0), "steps must be an integer >= 1, got 0"),
    "float steps": (lambda: _validate.positive_integer("steps", 2.0), "steps must be an integer >= 1, got 2.0"),
    "bool steps": (lambda: _validate.positive_integer("steps", True), "steps must be an integer >= 1, got True"),
    "odd": (lambda: _validate.even_integer("nodes", 3), "nodes must be an even integer >= 2, got 3"),
    "option": (
        lambda: _validate.one_of("solver", "rk", ["euler", "heun"]),
        "solver must be one of euler, heun, got 'rk'",
    ),
    "not square": (lambda: _validate.square("cov", np.ones((2, 3))), r"cov must be a square matrix, got shape (2, 3)"),
    "asymmetric": (
        lambda: _validate.covariance("cov", ASYMMETRIC),
        "cov must be symmetric, got a largest |S - S^T| of 0.1",
    ),
    "indefinite": (
        lambda: _validate.covariance("cov", INDEFINITE),
        "cov must be positive semi-definite, got a smallest eigenvalue of -1",
    ),
    "nan covariance": (lambda: _validate.covariance("cov", np.full((2, 2), np.nan)), "cov must be finite, got"),
    "not orthogonal": (
        lambda: _validate.orthogonal("rotation", 2 * np.eye(2)),
        "rotation must be orthogonal, got a largest |Q Q^T - I| of 3",
    ),
    "nan rotation": (lambda: _validate.orthogonal("rotation", np.full((2, 2), np.nan)), "rotation must be orthogonal"),
    "shape": (lambda: _validate.shape("x", np.ones(2), (3,)), "x must have shape (3,), got (2,)"),
    "same shape": (
        lambda: _validate.same_shape("x0", np.ones(2), "x1", np.ones((2, 1))),
        "x0 and x1 must have the same shape, got (2,) and (2, 1)",
    ),
    "same dtype": (
        lambda: _validate.same_dtype("x0", jnp.ones(2), "x1", jnp.ones(2, int)),
        "x0 and x1 must have the same dtype, got float32 and int32",
    ),
    "ragged batch": (
        lambda: _validate.batch("batch", (np.ones((2, 3)), np.ones(3))),
        "batch must have one common leading axis, got leading axes [(2,), (3,)]",
    ),
    "scalar leaf": (lambda: _validate.batch("batch", (np.ones(2), 1.0)), "got leading axes [(), (2,)]"),
    "no leaf": (lambda: _validate.batch("batch", ()), "batch must have one common leading axis, got leading axes []"),
    "reversed": (
        lambda: _validate.interval("t", (0.7, 0.2), 0, 1),
        "t must be a pair with 0 <= start < end <= 1, got (0.7, 0.2)",
    ),
    "no pair": (lambda: _validate.interval("t", 0.5, 0, 1), "t must be a pair with 0 <= start < end <= 1, got 0.5"),
    "infinite": (lambda: _validate.finite("x", np.inf), "x must be finite, got inf"),
    "some infinite": (
        lambda: _validate.finite("x", np.array([0, np.inf, np.nan])),
        "x must be finite, got 2 of 3 entries",
    ),
    "integer x": (lambda: _validate.floating("x", jnp.ones(2, int)), "x must be floating point, got int32"),
    "complex x": (lambda: _validate.floating("x", jnp.ones(2, complex)), "x must be floating point, got complex64"),
    "float index": (lambda: _validate.integers("by", jnp.ones(2)), "by must be integers, got float32"),
    "bool index": (lambda: _validate.integers("by", jnp.ones(2, bool)), "by must be integers, got bool"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_rule_and_the_value(case: str) -> None:
    """Catches a check that lets its case pass, raises another type, or does not say what it got."""
    check, message = REFUSED[case]
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the message is compared as text, below
        check()
    assert message in str(raised.value)


def test_edges_that_pass() -> None:
    """Catches a check that is stricter than its rule: no noise, singular covariances, numpy integers, empty batches."""
    _validate.nonnegative("sigma", 0)
    _validate.positive_integer("steps", np.int64(1))
    _validate.even_integer("nodes", np.int32(2))
    _validate.covariance("cov", np.zeros((2, 2)))
    _validate.covariance("cov", np.ones((3, 3)))
    _validate.covariance("cov", np.ones((2, 2), int))
    _validate.interval("t", (0, 1), 0.0, 1.0)
    _validate.interval("t", [0.2, 0.3], 0.0, 1.0)
    _validate.finite("x", np.arange(3))
    _validate.floating("x", 0.5)
    _validate.same_dtype("x0", np.ones(2), "x1", jnp.ones(2))
    assert _validate.batch("batch", {"a": np.ones((0, 2)), "b": np.ones(0)}) == 0
    assert _validate.batch("batch", (jax.random.split(jax.random.key(0), 3), np.ones((3, 2)))) == 3


@given(scale=st.floats(-30, 30), seed=st.integers(0, 100), dim=st.integers(1, 6))
def test_covariance_forgives_rounding_at_any_scale(scale: float, seed: int, dim: int) -> None:
    """Catches an absolute tolerance: a computed rank-one covariance passes, with an error of 1% it does not."""
    factor = np.random.default_rng(seed).normal(size=(dim, 1)) * 10 ** (scale / 2)
    cov = (factor @ factor.T).astype(np.float32)
    _validate.covariance("cov", cov)
    with pytest.raises(ValueError, match="positive semi-definite"):
        _validate.covariance("cov", cov - 0.01 * np.abs(cov).max() * np.eye(dim) - np.diag(cov.diagonal()) * (dim == 1))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_precision_is_that_of_the_dtype(dtype: jnp.dtype) -> None:
    """Catches a rotation in low precision that is measured by float64's epsilon, and a wrong one that passes."""
    _validate.orthogonal("rotation", jnp.asarray(ROTATION, dtype))
    _validate.covariance("cov", jnp.asarray(ROTATION @ np.diag([1.0, 0.0]) @ ROTATION.T, dtype))
    with pytest.raises(ValueError, match="orthogonal"):
        _validate.orthogonal("rotation", jnp.asarray(4 * ROTATION, dtype))


def test_traced_values_pass_unchecked() -> None:
    """Catches a check that looks at a tracer: every one of them must be usable under jit and vmap."""

    def check(x: jax.Array) -> jax.Array:
        matrix = x * jnp.ones((2, 2))
        _validate.nonnegative("x", x)
        _validate.positive("x", x)
        _validate.finite("x", x)
        _validate.covariance("x", matrix)
        _validate.orthogonal("x", matrix)
        _validate.interval("x", (x, x), 0.0, 1.0)
        _validate.on_one_device("x", x)
        assert not _validate.is_concrete({"x": x, "y": 1.0})
        return x

    assert jax.jit(check)(-jnp.inf) == -jnp.inf
    np.testing.assert_array_equal(jax.vmap(check)(jnp.asarray([-1.0, jnp.nan])), [-1.0, jnp.nan])
    assert _validate.is_concrete({"x": jnp.ones(2), "y": 1.0, "z": None})


def test_shapes_are_checked_under_jit() -> None:
    """Catches a shape check that is skipped together with the values: shapes are known to a tracer."""
    with pytest.raises(ValueError, match="square matrix"):
        jax.jit(lambda x: _validate.covariance("cov", x))(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="floating point"):
        jax.jit(lambda x: _validate.floating("x", x))(jnp.ones(2, int))


def test_common_dtype(x64: None) -> None:
    """Catches integers that make the computation integer, and half precision that no linear algebra accepts."""
    assert _validate.common_dtype(jnp.ones(2, jnp.float32), jnp.ones(2)) == np.float64
    assert _validate.common_dtype(jnp.ones(2, jnp.float32), jnp.ones(2, int)) == np.float32
    assert _validate.common_dtype(jnp.ones(2, int)) == np.float64
    assert _validate.common_dtype(jnp.ones(2, jnp.bfloat16)) == np.float32
    with jax.enable_x64(False):
        assert _validate.common_dtype(np.ones(2), [1, 2]) == np.float32
