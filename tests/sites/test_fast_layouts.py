"""The layouts that must stay fast: their values against a loop over `jax.grad`, and the path that each is promised."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvjax.types import Array

N = 5
ROWS, PRODUCTS, PATCHES = "rows of a table", "outer products", "image patches"
CASES: dict[str, tuple[Callable[[Any, Any], Array], Any, Any, dict[str, str]]] = {}
"""Loss, params, batch (all in float32), and the paths that are promised."""


def normal(seed: int, *shape: int) -> np.ndarray:
    """Float32 numbers, about as large as their rows need to have length one."""
    return np.asarray(np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[-1]), np.float32)


def square(x: Array) -> Array:
    """A sum that is not linear, so that the cotangents depend on the data."""
    return jnp.sum(jnp.tanh(x) ** 2 + x)


def constant(like: Array, *shape: int) -> Array:
    """Fixed numbers of both signs, in the dtype of the params that they scale."""
    return normal(9, *shape).astype(like.dtype)


VECTORS, ROWS_OF_DATA = 2 * normal(3, N, 4), normal(7, N, 3, 4)
SEVERAL = np.asarray([[0, 1, 1], [2, 2, 2], [5, 0, 5], [3, 3, 4], [0, 9, -1]], np.int32)
"""Rows of a table of six: repeated, all the same, out of range, counted from the end."""
SINGLE = np.asarray([0, 2, 9, -1, 0], np.int32)


def lookup(loss: Callable[[Array, Array, Array], Array], table: np.ndarray, index: np.ndarray = SEVERAL) -> Any:
    """A case with a table, on (index, x)."""
    return lambda table, example: loss(table, *example), table, (index, VECTORS), {"": ROWS}


def many(index: Array) -> Array:
    """86 places, beyond the number up to which equal ones are found by comparing all pairs."""
    return jnp.concatenate([index, index + 1, jnp.arange(80, dtype=index.dtype) % 5])


TABLE = normal(1, 6, 4)
for _mode in ("clip", "fill", "wrap"):
    CASES[f"take, {_mode}"] = lookup(
        lambda t, i, x, mode=_mode: square(jnp.nan_to_num(jnp.take(t, i, axis=0, mode=mode)) * x), TABLE
    )
CASES |= {
    "one row": lookup(lambda t, i, x: square(t[i] * x), TABLE, SINGLE),
    "several rows": lookup(lambda t, i, x: square(t[i] * x), TABLE),
    "two lookups": lookup(lambda t, i, x: square(t[i] * x) + square(jnp.sin(t[i[0]])), TABLE),
    "columns": lookup(lambda t, i, x: square(t[:, i] * x[:, None]), normal(1, 4, 6)),
    "one column": lookup(lambda t, i, x: square(t[:, i] * x), normal(1, 4, 6), SINGLE),
    "rows of matrices": lookup(lambda t, i, x: square(t[i] * x), normal(1, 6, 2, 4)),
    "middle axis": lookup(lambda t, i, x: square(t[:, i] * x), normal(1, 2, 6, 4)),
    "two axes": lookup(lambda t, i, x: square(t[i, i % 2] * x), normal(1, 6, 2, 4)),
    "axes apart": lookup(lambda t, i, x: square(t[i, :, i % 2] * x), normal(1, 6, 4, 2)),
    "elements": lookup(lambda t, i, x: square(t[i] * x[:3]), normal(1, 6)),
    "dynamic slice": lookup(lambda t, i, x: square(jax.lax.dynamic_index_in_dim(t, i) * x), TABLE, SINGLE),
    "many rows": lookup(lambda t, i, x: square(t[many(i)] * x), TABLE),
    "two tables of one leaf": lookup(lambda t, i, x: square(t[0][i] * x) + square(t[1][i]), normal(1, 2, 6, 4)),
    "cast table": lookup(lambda t, i, x: square(t.astype(jnp.bfloat16)[i].astype(x.dtype) * x), TABLE, SINGLE),
    "scaled table": lookup(lambda t, i, x: square((0.3 * t)[i] * x), TABLE),
    "scaled rows": lookup(lambda t, i, x: square((t * constant(t, 6, 1))[i] * x), TABLE),
    "scaled columns": lookup(lambda t, i, x: square((t * constant(t, 4, 6))[:, i] * x[:, None]), normal(1, 4, 6)),
    "padding row": lookup(lambda t, i, x: square(jnp.where(np.arange(6)[:, None] == 0, 0, t)[i] * x), TABLE),
}

SCALES: dict[str, Callable[[Array], Array]] = {
    "times a number": lambda w: 0.3 * w,
    "times a row": lambda w: w * constant(w, 4),
    "times an array": lambda w: w * constant(w, 4, 4),
    "negative": lambda w: -w,
    "one minus": lambda w: 1 - w,
    "array minus": lambda w: constant(w, 4, 4) - w,
    "where": lambda w: jnp.where(normal(9, 4, 4) > 0, w, 0),
    "else": lambda w: jnp.where(normal(9, 4, 4) > 0, 0.5, w),
    "over a number": lambda w: w / 3,
    "over an array": lambda w: w / constant(w, 4, 4),
    "in turn": lambda w: -(0.3 * w) / constant(w, 4, 4),
    "then transposed": lambda w: (w * constant(w, 4, 4)).T,
    "then reshaped": lambda w: (w.reshape(2, 8) * constant(w, 2, 8)).reshape(4, 4),
    "then sliced": lambda w: (w * constant(w, 4, 4))[:, :2],
    "then reversed": lambda w: (w * constant(w, 4, 4))[::-1],
}


def scaled_twice(scale: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """Two products with one scaled kernel, which is transposed in the second."""

    def loss(w: Array, x: Array) -> Array:
        kernel = scale(w)
        return square(jnp.tanh(x @ kernel) @ kernel.T)

    return loss


for _name, _scale in SCALES.items():
    for _word, _x in (("one row", VECTORS), ("three rows", ROWS_OF_DATA)):
        CASES[f"{_name}, {_word}"] = scaled_twice(_scale), normal(4, 4, 4), _x, {"": PRODUCTS}


def concatenated(axis: int, order: str) -> Callable[[Any, Array], Array]:
    """A dense layer whose kernel has the pieces a, b and c, a constant."""

    def loss(params: Any, x: Array) -> Array:
        shape = (4, 2) if axis == 1 else (1, 3)
        pieces = params | {"c": constant(x, *shape)}
        return square(x @ jnp.concatenate([pieces[name] for name in order], axis))

    return loss


for _word, _x in (("one row", VECTORS), ("three rows", ROWS_OF_DATA)):
    _promise = {"['a']": PRODUCTS, "['b']": PRODUCTS}
    _columns, _rows = {"a": normal(4, 4, 2), "b": normal(5, 4, 3)}, {"a": normal(4, 1, 3), "b": normal(5, 2, 3)}
    for _order in ("ab", "aba", "acb"):
        CASES[f"columns {_order}, {_word}"] = concatenated(1, _order), _columns, _x, _promise
    for _order in ("aab", "bca"):
        CASES[f"rows {_order}, {_word}"] = concatenated(0, _order), _rows, _x, _promise
    CASES[f"scaled pieces, {_word}"] = (
        lambda p, x: square(x @ jnp.concatenate([2 * p["a"], p["b"] * constant(x, 3)], 1)),
        _columns,
        _x,
        _promise,
    )
    CASES[f"concatenated biases, {_word}"] = (
        lambda p, x: square(x @ p["w"] + jnp.concatenate([p["a"], p["b"]])),
        {"w": normal(4, 4, 4), "a": normal(5, 1), "b": normal(6, 3)},
        _x,
        {"['a']": "vjp of add", "['b']": "vjp of add", "['w']": PRODUCTS},
    )


def convolved(image: Array, kernel: Array) -> Array:
    """A convolution of ONE image [5, 6, channels]."""
    spec = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(image[None], kernel, (1, 1), "SAME", dimension_numbers=spec)[0]


for _axis in range(4):
    _shape = [3, 2, 2, 3]
    _shape[_axis] = 1
    CASES[f"concatenated kernels, axis {_axis}"] = (
        lambda p, x, axis=_axis: square(
            convolved(x if axis != 2 else jnp.tile(x, 3)[..., :5], jnp.concatenate([p["a"], p["b"], p["a"]], axis))
        ),
        {"a": normal(4, 3, 2, 2, 3), "b": normal(5, *_shape)},
        normal(3, N, 5, 6, 2),
        {"['a']": PATCHES, "['b']": PATCHES},
    )
for _name, _scale in {
    "masked": lambda k: jnp.where(normal(9, 3, 2, 2, 3) > 0, k, 0),
    "scaled": lambda k: -k / 3,
}.items():
    CASES[f"{_name} convolution"] = (
        lambda k, x, scale=_scale: square(convolved(x, scale(k))),
        normal(4, 3, 2, 2, 3),
        normal(3, N, 5, 6, 2),
        {"": PATCHES},
    )

PULLS: dict[str, Callable[[Array, Array], Array]] = {
    "outer": jnp.outer,
    "dot": lambda x, g: jnp.dot(x[:, None], g[None]),
    "factor": lambda x, g: -jnp.outer(x, g) / 3,
    "of a clipped cotangent": lambda x, g: 2 * jnp.outer(x, jnp.clip(g, -0.3, 0.3)),
    "transposed": lambda x, g: jnp.outer(g, x).T,
    "einsum": lambda x, g: jnp.einsum("i,j->ij", x, g),
}


def declared(pull: Callable[[Array, Array], Array]) -> Callable[[Any, Array], Array]:
    """Two dense layers with kernels w and v and a bias, whose derivatives are declared."""

    @jax.custom_vjp
    def dense(w: Array, b: Array, x: Array) -> Array:
        return x @ w + b

    dense.defvjp(
        lambda w, b, x: (dense(w, b, x), (w, x)),
        lambda kept, g: (pull(kept[1], g), 0.5 * g, g @ kept[0].T),
    )
    return lambda p, x: square(dense(p["v"], p["b"], jnp.tanh(dense(p["w"], p["b"], x))))


for _name, _pull in PULLS.items():
    CASES[f"declared, {_name}"] = (
        declared(_pull),
        {"w": normal(4, 4, 4), "v": normal(5, 4, 4), "b": normal(6, 4)},
        VECTORS,
        {"['w']": PRODUCTS, "['v']": PRODUCTS, "['b']": "vjp of custom_vjp_call"},
    )


def declared_twice(w: Array, x: Array) -> Array:
    """One declared kernel in two calls."""
    layer = declared(jnp.outer)
    return layer({"w": w, "v": w, "b": jnp.zeros_like(x)}, x)


def solved(w: Array, x: Array) -> Array:
    """A linear system of params, solved twice."""
    matrix = w + 4 * jnp.eye(4, dtype=w.dtype)

    def solve(b: Array) -> Array:
        return jax.lax.custom_linear_solve(
            lambda v: matrix @ v,
            b,
            lambda _, b: jnp.linalg.solve(matrix, b),
            lambda _, b: jnp.linalg.solve(matrix.T, b),
        )

    return square(solve(jnp.tanh(solve(x))))


def lstm() -> Any:
    """An LSTM cell, whose kernels are concatenated in every step."""
    cell = nn.OptimizedLSTMCell(3)
    shapes = jax.eval_shape(cell.init, jax.random.key(0), (jnp.zeros(3), jnp.zeros(3)), jnp.zeros(4))
    leaves, structure = jax.tree.flatten(shapes)
    params = structure.unflatten([normal(k, *leaf.shape) for k, leaf in enumerate(leaves)])

    def loss(params: Any, rows: Array) -> Array:
        carry = jnp.zeros(3, rows.dtype), jnp.zeros(3, rows.dtype)
        for row in rows:
            carry, y = cell.apply(params, carry, row)
        return square(y)

    kernels = {f"['params']['{k}']['kernel']": PRODUCTS for k in ("hf", "hg", "hi", "ho", "if", "ig", "ii", "io")}
    return loss, params, ROWS_OF_DATA, kernels


CASES |= {
    "declared, used twice": (declared_twice, normal(4, 4, 4), VECTORS, {"": PRODUCTS}),
    "linear solve": (solved, normal(4, 4, 4), VECTORS, {"": PRODUCTS}),
    "LSTM": lstm(),
}


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("name", CASES)
def test_fast_layout_is_a_loop_over_grad(agree, name, bits):
    """Catches wrong gradients of a fast layout, and layouts that have become slow: their paths are other words.

    Of a cast table the sums are in float32, the least that the sites sum in: to 1e-6, as in `test_primitives`.
    """
    loss, params, batch, promised = CASES[name]
    tolerance = 1e-6 if (name, bits) == ("cast table", 64) else None
    found = agree(f"layout: {name}", (loss, params, batch), bits=bits, tolerance=tolerance)
    assert found.items() >= promised.items(), found
