"""`verify`: wrong gradients are noticed, leaf by leaf, and right ones let through; what is refused; what warns."""

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvjax import per_example_gradients, sites, total_variance
from fvjax.types import Array

N = 6
_RNG = np.random.default_rng(0)
PARAMS = {
    "kernel": jnp.asarray(_RNG.normal(size=(3, 4)), jnp.float32),
    "bias": jnp.asarray(_RNG.normal(size=4), jnp.float32),
    "table": jnp.asarray(_RNG.normal(size=(5, 3)), jnp.float32),
}
BATCH = jnp.asarray(_RNG.normal(size=(N, 3)), jnp.float32), jnp.asarray(_RNG.integers(0, 5, (N, 2)), jnp.int32)


def loss(params: Any, example: tuple[Array, Array]) -> Array:
    """A layer, a table and weight decay."""
    x, rows = example
    h = jnp.tanh(x @ params["kernel"] + params["bias"])
    return jnp.sum(h**2) + jnp.sum(params["table"][rows] @ x) + 0.1 * jnp.sum(params["kernel"] ** 2)


def run(function: Any, *arguments: Any) -> Any:
    """The result, once its callbacks have been called."""
    found = function(*arguments)
    jax.effects_barrier()
    return found


FUNCTIONS = [sites.square_norms, sites.moments]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("bits", [32, 64])
def test_right_gradients_pass(function: Any, bits: int) -> None:
    """Catches a false alarm, and results that `verify` changes."""
    with jax.enable_x64(bits == 64), warnings.catch_warnings():
        warnings.simplefilter("ignore", sites.SlowPathWarning)
        dtype = jnp.dtype(f"float{bits}")
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), PARAMS)
        batch = jnp.asarray(np.asarray(BATCH[0]), dtype), BATCH[1]
        plain, verified = (function(loss, params, batch, verify=k) for k in (0, 3))
        jax.tree.map(np.testing.assert_array_equal, plain, verified)
        inside = jax.jit(lambda p, b: function(loss, p, b, verify=N + 5))(params, batch)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(inside))
        sites.verify(loss, params, batch)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrong_gradients_are_refused(function: Any, wrong_gradients: None) -> None:
    """Catches a disagreement of 3% in two channels that nobody notices: the leaf is named, and under jit all is nan."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sites.SlowPathWarning)
        own = {name: PARAMS[name] for name in ("bias",)}

        def of_bias(params: Any, x: Array) -> Array:
            return jnp.sum(jnp.tanh(x @ PARAMS["kernel"] + params["bias"]) ** 2)

        with pytest.raises(sites.DisagreementError, match=r"the gradients of \['bias'\] are not those of vmap\(grad\)"):
            function(of_bias, own, BATCH[0], verify=2)
        with pytest.warns(sites.DisagreementWarning, match=r"\['bias'\]"):
            found = run(jax.jit(lambda p, b: function(of_bias, p, b, verify=2)), own, BATCH[0])
        assert all(np.all(np.isnan(x)) for x in jax.tree.leaves(found))
        with pytest.raises(sites.DisagreementError, match="please report"):
            sites.verify(of_bias, own, BATCH[0])


@pytest.mark.parametrize("count", [-1, 1.5, True])
def test_refuses_what_is_no_count(count: Any) -> None:
    """Catches a number of examples that is rounded or ignored."""
    with pytest.raises(ValueError, match=f"verify must be an integer >= 0, got {count}"):
        sites.moments(loss, PARAMS, BATCH, verify=count)


REFUSED = {
    "loss and more": (
        lambda p, e: (loss(p, e), {}),
        PARAMS,
        BATCH,
        r"got a tuple of 2; of \(loss, aux\) give the first",
    ),
    "no example": (loss, PARAMS, jax.tree.map(lambda x: x[:0], BATCH), "batch must have at least one example, got 0"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("function", [*FUNCTIONS, sites.paths, sites.verify])
def test_refuses_by_name(function: Any, name: str) -> None:
    """Catches nan, or an error deep inside jax, in place of one that names the argument."""
    own, params, batch, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        function(own, params, batch)


def test_a_module_is_taken_apart_first() -> None:
    """Catches an Equinox module whose functions are taken for params."""
    module = eqx.nn.MLP(3, 2, 4, 2, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"params must be arrays only, got \w+; .* = eqx.partition\(module"):
        sites.square_norms(lambda p, x: jnp.sum(p(x)), module, BATCH[0])


def test_no_rows_and_no_params() -> None:
    """Catches a division by the number of rows of data, or by that of leaves."""

    def empty(params: Any, x: Array) -> Array:
        return jnp.sum(jnp.reshape(x[:0], (0, 3)) @ params) + jnp.sum(x)

    for elementwise in (False, True):
        found = sites.moments(empty, PARAMS["kernel"], BATCH[0], elementwise=elementwise)
        np.testing.assert_array_equal(total_variance(found), 0)
    np.testing.assert_array_equal(sites.square_norms(empty, PARAMS["kernel"], BATCH[0]).square_norms, np.zeros(N))
    np.testing.assert_array_equal(total_variance(sites.moments(lambda _, x: jnp.sum(x), {}, BATCH[0])), 0)


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("elementwise", [False, True])
def test_strict_modes_of_jax(groups: int | None, elementwise: bool) -> None:
    """Catches arrays of different rank that are added, and a key that the library itself takes twice."""
    by = None if groups is None else jnp.arange(N) % groups

    def noisy(params: Any, example: Any) -> Array:
        inputs, key = example
        return loss(params, (inputs[0] + jax.random.normal(key, (3,), inputs[0].dtype), inputs[1]))

    batch = BATCH, jax.random.split(jax.random.key(0), N)
    options = {"by": by, "groups": groups, "elementwise": elementwise}
    with jax.numpy_rank_promotion("raise"), jax.debug_key_reuse(True), warnings.catch_warnings():
        warnings.simplefilter("ignore", sites.SlowPathWarning)
        found = sites.moments(noisy, PARAMS, batch, verify=2, **options)
        sites.square_norms(noisy, PARAMS, (BATCH, jax.random.split(jax.random.key(0), N)), verify=2)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))


WIDE = jnp.asarray(_RNG.normal(size=(64, 64)) / 8, jnp.float32)
MANY = jnp.asarray(_RNG.normal(size=(N, 64)), jnp.float32)
SLOW = {
    "a check that holds the params back": lambda w, x: jnp.sum((x @ eqx.error_if(w, jnp.any(x > 1e3), "large")) ** 2),
    "normalized by its largest element": lambda w, x: jnp.sum(jnp.tanh(x @ (w / jnp.max(w)))),
    "a loop": lambda w, x: jnp.sum(jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, length=70)[0]),
    "a choice": lambda w, x: jnp.sum(jax.lax.cond(x[0] > 0, lambda w: jnp.tanh(x @ w), lambda w: x @ w, w)),
    "tied to a table": lambda w, x: jnp.sum(jnp.tanh(w[jnp.argmax(x)] @ w)),
    "as it is": lambda w, x: jnp.sum(w**2 * jnp.outer(x, x)),
}
FAST = {
    "a product": lambda w, x: jnp.sum(jnp.tanh(x @ w) ** 2),
    "a barrier": lambda w, x: jnp.sum(jnp.tanh(jnp.matmul(*jax.lax.optimization_barrier((x, w))))),
    "a solve": lambda w, x: jnp.sum(jnp.linalg.solve(w + 4 * jnp.eye(64, dtype=w.dtype), x) ** 2),
    "scaled and masked": lambda w, x: jnp.sum(jnp.tanh(x @ jnp.tril(w / 8))),
}


@pytest.mark.parametrize("name", SLOW)
def test_slow_layouts_warn(name: str) -> None:
    """Catches a layer that forms 64 x 64 numbers an example without a word."""
    with pytest.warns(sites.SlowPathWarning, match=r"1 of 1 leaves .* which takes some [\d.e+]+ times the operations"):
        found = sites.square_norms(SLOW[name], WIDE, MANY)
    exact = per_example_gradients(SLOW[name], WIDE, MANY)
    np.testing.assert_allclose(found.square_norms, np.sum(np.asarray(exact, float) ** 2, (1, 2)), rtol=1e-4)


@pytest.mark.parametrize("name", FAST)
def test_fast_layouts_do_not_warn(name: str) -> None:
    """Catches a warning where nothing is slow (warnings are errors here)."""
    found = sites.square_norms(FAST[name], WIDE, MANY)
    exact = per_example_gradients(FAST[name], WIDE, MANY)
    np.testing.assert_allclose(found.square_norms, np.sum(np.asarray(exact, float) ** 2, (1, 2)), rtol=1e-4)
