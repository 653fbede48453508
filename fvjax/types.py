"""The few types that every other module speaks: arrays in, arrays out, one example at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Array = jax.Array
Key = jax.Array
"""A typed PRNG key, `jax.random.key(seed)`."""
Scalar = jax.Array | float
"""A number: an array of shape [], or a Python float."""
Params = Any
"""Any pytree of arrays."""


class Pair(NamedTuple):
    """A source sample and the target sample it is coupled with; a batch has a leading axis in both."""

    x0: Array
    x1: Array


class PathSample(NamedTuple):
    """One draw of the flow-matching regression: at time `t` and place `x`, predict `target`.

    Shapes: `t` [], `x` [*dims], `target` [*dims]; a batch has a leading axis in all three.
    """

    t: Array
    x: Array
    target: Array


class AffineMap(NamedTuple):
    """The map x -> matrix @ x + shift; also the parameters (Theta, theta) of the affine field of Lemma 1.

    Shapes: `matrix` [d, d], `shift` [d].
    """

    matrix: Array
    shift: Array

    def __call__(self, x: Array) -> Array:
        """Maps one example, [d] -> [d]."""
        return self.matrix @ x + self.shift


class GradientMoments(NamedTuple):
    """Weight, mean and weighted sum of squared deviations of gradients; mergeable.

    With G groups every field has a leading axis G (`weight` [G], leaves of `mean` and `m2` [G, *leaf]); without,
    `weight` has shape [] and the leaves those of the params. At least float32. `m2` may hold its trace instead: one
    number a leaf ([], or [G]), the sum over the leaf's coordinates.
    """

    weight: Array
    mean: Params
    m2: Params


ExampleLoss = Callable[[Params, Any], Array]
"""(params, example) -> real scalar, for ONE example: what the gradient layer differentiates."""

VelocityField = Callable[[Params, Scalar, Array], Array]
"""(params, t, x[*dims]) -> velocity[*dims], for ONE example; the caller vmaps."""

Coupling = Callable[[Key, Array, Array], Pair]
"""(key, x0[n, *dims], x1[n, *dims]) -> aligned batch."""


class Model(NamedTuple):
    """A network as two pure functions: `init(key) -> params` and the velocity field `apply(params, t, x)`.

    Networks with dropout also take `apply(params, t, x, key=key)`, and drop out then only.
    """

    init: Callable[[Key], Params]
    apply: Callable[..., Array]
