"""Moments and norms of random small networks, with weights, groups, chunks and blocks, against `vmap(grad)`."""

import functools
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from fvjax import sites
from fvjax.sites import _engine, _program
from fvjax.types import Array

PLAIN = ("dense", "conv", "bias", "scale", "layer norm", "attention", "tied", "transposed", "activation", "scan")
UNROLLED = 2
"""Scans of three steps are long here."""


@jax.custom_vjp
def with_norm(w: Array, h: Array) -> tuple[Array, Array]:
    """(h w, |w|^2); the declared derivative by w takes both cotangents together, and is not linear in them."""
    return h @ w, jnp.sum(w**2)


def _pull_with_norm(kept: tuple[Array, Array], cotangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (w, h), (y, norm) = kept, cotangents
    return h.T @ jnp.tanh(y) + 2 * norm * w * (1 + jnp.sum(y**2)), y @ w.T


with_norm.defvjp(lambda w, h: (with_norm(w, h), (w, h)), _pull_with_norm)


@jax.custom_vjp
def passing(w: Array, h: Array) -> tuple[Array, Array]:
    """(w, h w), with half the gradient for what passes through."""
    return w, h @ w


passing.defvjp(lambda w, h: (passing(w, h), (w, h)), lambda kept, g: (0.5 * g[0] + kept[1].T @ g[1], g[1] @ kept[0].T))


@jax.custom_vjp
def declared_dense(w: Array, h: Array) -> Array:
    """h w, whose declared gradient is -2 / 3 of what it is."""
    return h @ w


declared_dense.defvjp(lambda w, h: (h @ w, (w, h)), lambda kept, g: (-2 * jnp.dot(kept[1].T, g) / 3, g @ kept[0].T))


@jax.custom_jvp
def sloped_norm(w: Array, h: Array) -> tuple[Array, Array]:
    """(h w, |w|^2); the declared slope of the second needs the data."""
    return h @ w, jnp.sum(w**2)


@sloped_norm.defjvp
def _sloped_norm_slope(at: Any, by: Any) -> Any:
    (w, h), (dw, dh) = at, by
    return sloped_norm(w, h), (h @ dw + dh @ w, jnp.sum(w * dw) * jnp.sum(jnp.tanh(h) ** 2))


@jax.custom_jvp
def kept_if_differentiated(h: Array, w: Array) -> Array:
    """h, whose derivative is dropped where w is not differentiated."""
    return h


@functools.partial(kept_if_differentiated.defjvp, symbolic_zeros=True)
def _kept_slope(at: Any, by: Any) -> Any:
    (h, _), (dh, dw) = at, by
    return h, jnp.zeros_like(h) if isinstance(dw, jax.custom_derivatives.SymbolicZero) else dh


@jax.custom_vjp
def clip_gradient(w: Array) -> Array:
    """The identity, whose cotangent is bent: the backward pass is not linear in it."""
    return w


clip_gradient.defvjp(lambda w: (w, None), lambda _, g: (jnp.arctan(g),))


@jax.jit
def clipped_layer(w: Array, h: Array) -> Array:
    """One jitted layer, which is called twice."""
    return jnp.tanh(h @ clip_gradient(w))


@jax.checkpoint
def rematerialized(w: Array, h: Array) -> tuple[Array, Array]:
    """A layer that returns its params."""
    return w, jnp.tanh(h @ w)


def carried(w: Array, h: Array) -> Array:
    """A long scan whose carry has params that change, params that do not, and data."""

    def step(carry: Any, _: None) -> Any:
        kept, changed, h = carry
        return (kept, 0.9 * changed, jnp.tanh(h @ kept + h @ changed)), jnp.sum(changed)

    (kept, changed, h), sums = jax.lax.scan(step, (w, w, h), length=UNROLLED + 1)
    return h @ kept + h * jnp.sum(sums) + jnp.sum(changed)


def branches(w: Array, h: Array) -> Array:
    """A branch that is chosen by no data, and returns params."""
    flag = jnp.arange(3).sum() > 2
    y, again = jax.lax.cond(flag, lambda w, h: (h @ w, 2 * w), lambda w, h: (h, w), w, h)
    return y @ again


def barred(w: Array, h: Array) -> Array:
    """A barrier around params and data."""
    w, h = jax.lax.optimization_barrier((w, h))
    return jnp.tanh(h @ w) @ w


def constants(w: Array, seed: int) -> np.ndarray:
    """Numbers of both signs like w, none of them near zero."""
    return np.random.default_rng(seed).uniform(0.5, 1.5, w.shape) * (-1.0) ** np.arange(w.shape[-1])


def rows_taken(table: Array, h: Array) -> Array:
    """Adds rows of a table of three that the data choose: with repeats, and beyond its end."""
    index = jnp.mod(jnp.floor(2 * jax.lax.stop_gradient(h[:, 0])), 4).astype(jnp.int32)
    index = jnp.concatenate([index, index[:1], jnp.ones(1, jnp.int32)])
    rows = table.at[index].get(mode="fill", fill_value=0.5)
    return h + rows[: len(h)] * h[:1] + jnp.sum(rows[len(h) :], 0)


def both(layer: Callable[[Array, Array], tuple[Array, Array]], after: Callable[[Array, Array], Array]) -> Any:
    """A layer with two outputs, of which a function makes one."""
    return lambda w, h: after(*layer(w, h))


SQUARE: dict[str, Callable[[Array, Array], Array]] = {
    "norm": both(with_norm, lambda y, norm: y * norm + norm),
    "passing": both(passing, lambda again, y: jnp.tanh(y) @ again),
    "declared": lambda w, h: declared_dense(w, jnp.tanh(declared_dense(w, h))),
    "sloped": both(sloped_norm, lambda y, norm: y * norm + norm),
    "symbolic": lambda w, h: kept_if_differentiated(jnp.tanh(h @ w), w),
    "clipped": lambda w, h: clipped_layer(w, clipped_layer(w, h)),
    "checkpoint": both(rematerialized, lambda again, y: rematerialized(again, y)[1]),
    "carried": carried,
    "branches": branches,
    "barrier": barred,
    "third": lambda w, h: h @ (w * 0.3),
    "over": lambda w, h: h @ (w / constants(w, 0)),
    "negative": lambda w, h: h @ -w,
    "mask": lambda w, h: h @ jnp.where(constants(w, 1) > 0.8, w, 0),
    "minus": lambda w, h: h @ (constants(w, 2) - w),
}
"""Layers with a square matrix: equations with outputs of several kinds, declared derivatives, constant scales."""

KINDS = (*PLAIN, *SQUARE, "lookup", "concatenated")


class Network:
    """Layers on a matrix [length, width], with params in float64; the tied layers of one width share one matrix."""

    def __init__(self, layers: list[tuple[str, int]], width: int, *, decay: float, seed: int) -> None:
        self.layers, self.decay, self.generator = layers, decay, np.random.default_rng(seed)
        self.params: dict[str, np.ndarray] = {}
        for i, (kind, size) in enumerate(layers):
            width = self.add(f"{i} {kind}", kind, (width, size))

    def add(self, name: str, kind: str, sizes: tuple[int, int]) -> int:
        """Makes the params of a layer and returns the width of its output."""
        width, size = sizes
        shapes = {
            "dense": (width, size),
            "conv": (2, width, size),
            "bias": (width,),
            "scale": (width,),
            "layer norm": (2, width),
            "attention": (width, 3 * size),
            "tied": (width, width),
            "transposed": (width, width),
            "scan": (3, width, width),
            "lookup": (3, width),
            "concatenated": (width, size),
        } | dict.fromkeys(SQUARE, (width, width))
        if kind in {"tied", "transposed"}:
            name = f"tied {width}"
        if kind in shapes and name not in self.params:
            self.params[name] = self.generator.normal(size=shapes[kind]) / np.sqrt(width)
        if kind == "concatenated":
            self.params[f"{name} too"] = self.generator.normal(size=(width, 1)) / np.sqrt(width)
            return size + 2
        return size if kind in {"dense", "conv", "attention"} else width

    def loss(self, params: dict[str, Array], example: tuple[Array, Array]) -> Array:
        """A squared error whose weight is the example's, and weight decay."""
        h, weight = example
        for i, (kind, size) in enumerate(self.layers):
            tied = kind in {"tied", "transposed"}
            p = params.get(f"tied {h.shape[-1]}" if tied else f"{i} {kind}")
            h = apply(kind, (p, params[f"{i} {kind} too"]) if kind == "concatenated" else p, h, size)
        penalty = sum(jnp.sum(p**2) for p in params.values()) if self.decay else 0.0
        return weight * jnp.sum(h**2) + jnp.sum(jnp.sin(h)) + self.decay * penalty


def apply(kind: str, p: Any, h: Array, size: int) -> Array:
    """One layer."""
    if kind in {"dense", "tied"}:
        return h @ p
    if kind == "transposed":
        return h @ p.T
    if kind == "conv":
        spec = ("NHC", "HIO", "NHC")
        return jax.lax.conv_general_dilated(h[None], p, (1,), ((1, 0),), dimension_numbers=spec)[0]
    if kind == "bias":
        return h + p
    if kind == "scale":
        return h * p
    if kind == "layer norm":
        centred = h - jnp.mean(h, -1, keepdims=True)
        return centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 0.1) * p[0] + p[1]
    if kind == "attention":
        query, key, value = (h @ p[:, i * size : (i + 1) * size] for i in range(3))
        return jax.nn.softmax(query @ key.T) @ value
    if kind in SQUARE:
        return SQUARE[kind](p, h)
    if kind == "lookup":
        return rows_taken(p, h)
    if kind == "concatenated":
        return h @ jnp.concatenate([p[1], p[0], p[1]], 1)
    if kind == "scan":
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p)[0]
    return jnp.tanh(h)


def moments_by_numpy(each: dict[str, np.ndarray], weights: np.ndarray, member: np.ndarray) -> tuple[Any, Any, Any]:
    """Weight, mean and m2 of the examples of one group."""
    weights = np.where(member, weights, 0)
    counted = weights > 0
    weight = np.sum(weights)
    kept = {k: g[counted] for k, g in each.items()}
    mean = {k: np.tensordot(weights[counted], g, 1) / (weight or 1) for k, g in kept.items()}
    return weight, mean, {k: np.tensordot(weights[counted], (g - mean[k]) ** 2, 1) for k, g in kept.items()}


@st.composite
def settings(draw: st.DrawFn) -> dict[str, Any]:
    """Networks, batches and what `moments` takes."""
    n = draw(st.integers(1, 7))
    groups = draw(st.sampled_from([None, 1, 3, 40]))
    # The rarer kinds in front: hypothesis draws the first ones more often.
    kinds = st.sampled_from(KINDS[::-1])
    return {
        "layers": draw(st.lists(st.tuples(kinds, st.integers(1, 4)), min_size=2, max_size=5)),
        "shape": (n, draw(st.integers(1, 3)), draw(st.integers(1, 4))),
        "seed": draw(st.integers(0, 99)),
        "weights": draw(st.none() | st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=n, max_size=n)),
        "by": None if groups is None else draw(st.lists(st.integers(-1, groups), min_size=n, max_size=n)),
        "groups": groups,
        "decay": draw(st.sampled_from([0.0, 0.1])),
        "chunk": draw(st.sampled_from([None, 1, 2, 3])),
        "block": draw(st.sampled_from([_engine.BLOCK, 16])),
    }


@hypothesis.settings(max_examples=12)
@hypothesis.given(drawn=settings())
def test_moments_of_random_networks(x64, quickly, drawn):
    """Catches layers that spoil each other's gradients, and rows lost or counted twice by chunks, blocks and groups.

    Examples of weight 0 are made nan: they may spoil nothing (of `vmap(grad)`, nan in one example spoils all of a
    convolution, so it gets finite ones). Blocks of 16 elements make the sites form the gradients
    of one or few examples at a time, which networks of this size would never do.
    """
    network = Network(drawn["layers"], drawn["shape"][-1], decay=drawn["decay"], seed=drawn["seed"])
    n, groups, chunk = drawn["shape"][0], drawn["groups"], drawn["chunk"]
    generator = np.random.default_rng(drawn["seed"] + 1)
    weights = np.ones(n) if drawn["weights"] is None else np.asarray(drawn["weights"])
    x = generator.normal(size=drawn["shape"])
    poisoned = np.where((weights > 0)[:, None, None], x, np.nan)
    by = None if groups is None else np.asarray(drawn["by"], np.int32)
    given = None if drawn["weights"] is None else weights

    def measure(params: Any, clean: Any, batch: Any, given: Any, by: Any) -> tuple[Any, ...]:
        each = jax.vmap(jax.grad(network.loss), (None, 0))(params, clean)
        norms = sites.square_norms(network.loss, params, batch, by_leaf=True, weights=given, chunk=chunk)
        options = {"weights": given, "by": by, "groups": groups, "chunk": chunk}
        found = (sites.moments(network.loss, params, batch, elementwise=e, **options) for e in (True, False))
        return each, norms, *found

    with (
        mock.patch.object(_engine, "BLOCK", drawn["block"]),
        mock.patch.object(_program, "UNROLLED", UNROLLED),
        warnings.catch_warnings(),
    ):
        # Long scans and branches are slow, and so are norms of single gradients with their cross term with a decay.
        warnings.simplefilter("ignore", sites.SlowPathWarning)
        factor = generator.normal(size=n)
        found = quickly(measure, network.params, (x, factor), (poisoned, factor), given, by)
    each, norms, full, trace = jax.tree.map(np.asarray, found)

    scale = max((float(np.max(np.abs(g[weights > 0]), initial=0)) for g in each.values()), default=0) or 1.0
    near = {"rtol": 1e-11, "atol": 1e-11 * scale}
    square = {"rtol": 1e-11, "atol": 1e-11 * scale**2}
    for name, g in each.items():
        squares = np.sum(g**2, tuple(range(1, g.ndim)))
        np.testing.assert_allclose(norms.by_leaf[name][weights > 0], squares[weights > 0], **square)
    for k in range(groups or 1):
        member = np.ones(n, bool) if by is None else by == k
        own = [jax.tree.map(lambda a, k=k: a if groups is None else a[k], found) for found in (full, trace)]
        weight, mean, m2 = moments_by_numpy(each, weights, member)
        for name in each:
            for found in own:
                np.testing.assert_allclose(found.weight, weight, rtol=1e-14)
                np.testing.assert_allclose(found.mean[name], mean[name], **near)
            np.testing.assert_allclose(own[0].m2[name], m2[name], **square)
            np.testing.assert_allclose(own[1].m2[name], np.sum(m2[name]), **square)
    if np.any(weights > 0):
        mean = moments_by_numpy(each, weights, np.ones(n, bool))[1]
        for name in each:
            np.testing.assert_allclose(norms.mean[name], mean[name], **near)
