"""Near zero variance and where terms cancel, in float32: against the same float32 factors multiplied in float64."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvjax import sites
from fvjax._moments import Weighting
from fvjax.gradients import total_variance
from fvjax.sites import _products
from fvjax.types import Array, Params

N, ROWS, COLUMNS = 256, 20, 30
ALL = Weighting(None, None, None)


def bilinear(params: Params, example: tuple[Array, Array]) -> Array:
    """A loss whose gradient is x^T y, so that a test can choose the gradients: x [L, 20], y [L, 30]."""
    return jnp.sum((example[0] @ params) * example[1])


def nearly_constant(length: int) -> Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]:
    """Factors that differ by 1e-5 of themselves: the variance is 2e-10 of the squared mean."""

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        x, y = (rng.normal(size=(1, length, k)) * (1 + 1e-5 * rng.normal(size=(N, length, k))) for k in (ROWS, COLUMNS))
        return x, y

    return draw


def one_sign(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) or (-x, -y): the factors vary, the gradient does not."""
    signs = rng.choice([-1, 1], size=(N, 1, 1))
    return signs * rng.normal(size=(1, 1, ROWS)), signs * rng.normal(size=(1, 1, COLUMNS))


def one_scale(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(c x, y / c): the factors vary by e, the gradient by rounding only."""
    scale = np.exp(rng.normal(size=(N, 1, 1)))
    return scale * rng.normal(size=(1, 1, ROWS)), rng.normal(size=(1, 1, COLUMNS)) / scale


def far_target(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A residual of mean 20 and standard deviation 1, as at initialisation with a far target."""
    return 3 + 0.5 * rng.normal(size=(N, 1, ROWS)), 20 + rng.normal(size=(N, 1, COLUMNS))


def outlier(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The first example has a gradient 1e4 times as large as the others: no reference for shifted data."""
    size = np.where(np.arange(N) == 0, 1e4, 1)[:, None, None]
    return rng.normal(size=(N, 1, ROWS)), size * rng.normal(size=(N, 1, COLUMNS))


CASES = {
    "1e-10, one row": nearly_constant(1),
    "1e-10, few rows": nearly_constant(4),
    "1e-10, many rows": nearly_constant(64),
    "far target": far_target,
    "outlier": outlier,
    "one scale": one_scale,
}


def drawn(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factors in float32, and their gradients in float64."""
    x, y = (np.asarray(f, np.float32) for f in CASES[name](np.random.default_rng(0)))
    return x, y, np.einsum("nlr,nlc->nrc", x.astype(float), y.astype(float))


@pytest.mark.parametrize(
    ("name", "chunk"), [*((name, None) for name in CASES), *((name, 100) for name in list(CASES)[:2])]
)
@pytest.mark.filterwarnings("ignore::fvjax.sites.SlowPathWarning")  # coordinates of several rows are formed
def test_variance_where_plain_sums_cancel(name: str, chunk: int | None) -> None:
    """Catches E|g|^2 - |E g|^2, a reference that is an outlier, and chunks that merge badly.

    The variance must be right to 1e-5 of itself, plus what the rounding of float32 gradients and means adds to it,
    some 1e-13 of the squared mean (6e-8 squared, a few times); of a single coordinate up to 5e-12.
    """
    x, y, gradients = drawn(name)
    mean = gradients.mean(0)
    exact = np.sum((gradients - mean) ** 2, 0)
    params = jnp.zeros((ROWS, COLUMNS))
    for elementwise in (False, True):
        found = jax.jit(lambda p, b, e=elementwise: sites.moments(bilinear, p, b, elementwise=e, chunk=chunk))(
            params, (x, y)
        )
        rounding = 1e-13 * N * np.sum(mean**2)
        np.testing.assert_allclose(np.sum(found.m2, dtype=float), exact.sum(), rtol=1e-5, atol=rounding)
        np.testing.assert_allclose(found.mean, mean, rtol=1e-5, atol=1e-6 * np.abs(gradients).max())
    terms = np.einsum("nlr,nlc->rc", np.abs(x), np.abs(y)) / N  # what is rounded before it is summed over the rows
    error = np.abs(found.m2 - exact)
    assert np.all(error <= 1e-5 * exact.max() + 5e-12 * N * terms**2)


def test_constant_gradient_of_varying_factors_has_no_variance() -> None:
    """Catches a variance that is the rounding of factors which cancel in every single product."""
    x, y = (np.asarray(f, np.float32) for f in one_sign(np.random.default_rng(0)))
    for elementwise in (False, True):
        moments = jax.jit(
            lambda b, e=elementwise: sites.moments(bilinear, jnp.zeros((ROWS, COLUMNS)), b, elementwise=e)
        )((x, y))
        assert 0 <= total_variance(moments) <= 1e-13 * np.sum(np.asarray(moments.mean) ** 2)


def test_the_first_two_ways_would_be_wrong() -> None:
    """Catches guards that never act: the plain way must fail where the moments above are right, and be seen to."""
    for name in ("1e-10, one row", "far target", "one scale"):
        x, y, gradients = drawn(name)
        exact = np.sum((gradients - gradients.mean(0)) ** 2)
        factors = _products.Factors(jnp.asarray(x)[:, None], jnp.asarray(y)[:, None])
        plain, sound = _products.plain(factors, ALL, _products.mean(factors, ALL), trace=True)
        assert not sound
        if name != "far target":
            assert abs(plain - exact) > 0.1 * exact
    assert not _products.shifted(factors, ALL, trace=True)[1]


def test_norms_where_the_passes_of_one_layer_nearly_cancel() -> None:
    """Catches a Gram matrix that is trusted: |x^T y - x'^T y|^2 with x' = x (1 + 1e-4 e) came out wrong by 29%."""
    rng = np.random.default_rng(1)
    x, y = (rng.normal(size=(N, 1, k)).astype(np.float32) for k in (ROWS, COLUMNS))
    near = (x * (1 + 1e-4 * rng.normal(size=x.shape))).astype(np.float32)

    def loss(params: Params, example: tuple[Array, Array, Array]) -> Array:
        first, second, y = example
        return jnp.sum((first @ params - second @ params) * y)

    exact = np.sum(((x.astype(float) - near) * np.swapaxes(y.astype(float), 1, 2)) ** 2, (1, 2))
    found = jax.jit(lambda b: sites.square_norms(loss, jnp.zeros((ROWS, COLUMNS)), b))((x, near, y))
    assert dict(found.paths) == {"": "outer products"}
    # Each of the two passes is rounded by 6e-8, which is 6e-4 of their difference.
    np.testing.assert_allclose(found.square_norms, exact, rtol=1e-3)
    grams = _products.squares(
        _products.Factors(jnp.concatenate([x, -near], 1)[:, None], jnp.concatenate([y, y], 1)[:, None])
    )[0]
    assert np.max(np.abs(grams / exact - 1)) > 0.05


def test_groups_keep_the_variance_within() -> None:
    """Catches a reference that is shared by groups whose means are 1e4 standard deviations apart."""
    rng = np.random.default_rng(2)
    centre = np.where(np.arange(N) % 2 == 0, 1.0, -3.0)[:, None, None]
    x = (1 + 1e-4 * rng.normal(size=(N, 1, ROWS))).astype(np.float32)
    y = (centre * (1 + 1e-4 * rng.normal(size=(N, 1, COLUMNS)))).astype(np.float32)
    gradients = np.einsum("nlr,nlc->nrc", x.astype(float), y.astype(float))
    by = jnp.arange(N) % 2
    for elementwise in (False, True):
        moments = jax.jit(
            lambda b, e=elementwise: sites.moments(
                bilinear, jnp.zeros((ROWS, COLUMNS)), b, by=by, groups=2, elementwise=e
            )
        )((x, y))
        exact = [np.sum(np.var(gradients[g::2], axis=0)) for g in range(2)]
        np.testing.assert_allclose(total_variance(moments), exact, rtol=1e-4)


MASK = np.random.default_rng(3).normal(size=(ROWS, COLUMNS)).astype(np.float32)


@jax.custom_vjp
def declared(params: Params, x: Array) -> Array:
    """A dense layer with a derivative of its own."""
    return x @ params


declared.defvjp(lambda p, x: (x @ p, (p, x)), lambda kept, g: (jnp.dot(kept[1].T, g), g @ kept[0].T))

LAYOUTS: dict[str, tuple[Callable[[Params, tuple[Array, Array]], Array], np.ndarray]] = {
    "scaled": (lambda p, e: bilinear(-p / 2, e), -np.ones_like(MASK) / 2),
    "weighed": (lambda p, e: bilinear(p * MASK, e), MASK),
    "masked": (lambda p, e: bilinear(jnp.where(MASK > 0, p, 0), e), np.where(MASK > 0, 1, 0)),
    "minus": (lambda p, e: bilinear(1 - p, e), -np.ones_like(MASK)),
    "piece": (
        lambda p, e: jnp.sum((e[0] @ jnp.concatenate([jnp.ones((ROWS, 1)), p], 1))[:, 1:] * e[1]),
        np.ones_like(MASK),
    ),
    "declared": (lambda p, e: jnp.sum(declared(p, e[0]) * e[1]), np.ones_like(MASK)),
    "row of a table": (
        lambda p, e: jnp.sum(p[(e[0][0, 0] > 1e9).astype(jnp.int32)] * e[1]),
        np.eye(1, ROWS).T * np.ones_like(MASK),
    ),
}
"""Losses, and what each coordinate of x^T y (of a column of ones and y, for the table) is multiplied by."""


@pytest.mark.parametrize("size", [None, 1, 2], ids=["whole", "groups of one", "groups of two"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_variance_of_nearly_equal_gradients_in_each_layout(name: str, size: int | None) -> None:
    """Catches a fast layout, or a small group, in which the variance is a difference: 1e-10 of the squared mean.

    The tolerance is that of `test_variance_where_plain_sums_cancel`, which averages over 256 examples, and, for the few
    of a group, six standard errors of 2 sum (g - mean) r, where the rounding r of a float32 gradient g is uniform
    within 2^-24 of |g|. An example alone has exactly no variance.
    """
    loss, scale = LAYOUTS[name]
    x, y, gradients = drawn("1e-10, one row")
    if name == "row of a table":
        gradients = np.broadcast_to(y.astype(float), gradients.shape)
    gradients = gradients * scale
    groups = 1 if size is None else N // size
    options = {} if size is None else {"by": jnp.arange(N) // size, "groups": groups}
    own = gradients.reshape(groups, -1, ROWS, COLUMNS)
    deviations = own - own.mean(1, keepdims=True)
    exact = np.sum(deviations**2, (1, 2, 3))
    error = 2 * 2.0**-24 / np.sqrt(3) * np.sqrt(np.sum((deviations * own) ** 2, (1, 2, 3)))
    rounding = 6 * error + 1e-13 * N / groups * np.sum(own.mean(1) ** 2, (1, 2))
    for elementwise in (False, True):
        found = jax.jit(
            lambda b, e=elementwise: sites.moments(loss, jnp.zeros(MASK.shape), b, elementwise=e, **options)
        )
        m2 = np.asarray(found((x, y)).m2, float).reshape(groups, -1).sum(1)
        assert np.all(np.abs(m2 - exact) <= 1e-5 * exact + rounding), np.max(np.abs(m2 / exact - 1))
        assert size != 1 or np.all(m2 == 0)
