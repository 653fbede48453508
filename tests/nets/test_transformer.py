"""The diffusion transformer: the documented formula, its beginning, time, keys, dtypes, gradients and refused sizes."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fvjax
from fvjax import nets
from fvjax.nets import _linen
from fvjax.nets.transformer import positions

DIMS, WIDTH, HEADS, DEPTH, PATCH = (4, 6, 2), 8, 2, 1, 2
MODEL = nets.transformer(DIMS, patch=PATCH, width=WIDTH, depth=DEPTH, heads=HEADS, dropout=0.5)
N = 3


def compiled(function: Any) -> Any:
    """Jitted with little optimisation: compiling is what these tests cost."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


APPLY = compiled(MODEL.apply)


def reference(params: Any, t: float, x: Any) -> np.ndarray:
    """The documented formula in numpy and float64, token by token and head by head."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def silu(a: Any) -> Any:
        return a / (1 + np.exp(-a))

    def gelu(a: Any) -> Any:
        return 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))

    def dense(layer: Any, a: Any) -> Any:
        return a @ layer["kernel"] + layer["bias"]

    def norm(a: Any) -> Any:
        return (a - a.mean(1, keepdims=True)) / np.sqrt(a.var(1, keepdims=True) + 1e-6)

    def attend(layer: Any, a: Any) -> Any:
        q, k, v = (part.reshape(len(a), HEADS, -1) for part in np.split(dense(layer, a), 3, axis=1))
        heads = []
        for head in range(HEADS):
            scores = np.exp(q[:, head] @ k[:, head].T / np.sqrt(WIDTH // HEADS))
            heads.append(scores / scores.sum(1, keepdims=True) @ v[:, head])
        return np.concatenate(heads, axis=1)

    angles = t * 10_000.0 ** (-np.arange(128) / 128)
    c = silu(dense(params["time_in"], np.concatenate([np.cos(angles), np.sin(angles)])))
    c = silu(dense(params["time_out"], c))
    corners = [(i, j) for i in range(0, DIMS[0], PATCH) for j in range(0, DIMS[1], PATCH)]
    patches = np.stack([np.asarray(x, np.float64)[i : i + PATCH, j : j + PATCH].ravel() for i, j in corners])
    h = patches @ params["patches"]["kernel"].reshape(-1, WIDTH) + params["patches"]["bias"]
    h = h + positions(DIMS[0] // PATCH, DIMS[1] // PATCH, WIDTH)
    for index in range(DEPTH):
        block = params[f"block_{index}"]
        m1, s1, g1, m2, s2, g2 = np.split(dense(block["modulation"], c), 6)
        h = h + g1 * dense(block["projection"], attend(block["qkv"], norm(h) * (1 + s1) + m1))
        h = h + g2 * dense(block["mlp_out"], gelu(dense(block["mlp_in"], norm(h) * (1 + s2) + m2)))
    shift, scale = np.split(dense(params["modulation"], c), 2)
    tokens = dense(params["output"], norm(h) * (1 + scale) + shift)
    image = np.zeros(DIMS)
    for (i, j), token in zip(corners, tokens, strict=True):
        image[i : i + PATCH, j : j + PATCH] = token.reshape(PATCH, PATCH, -1)
    return image


def test_the_network_is_the_documented_formula(params: Any, batch: fvjax.PathSample) -> None:
    """Catches patches in another order, a lost gate or scale, mixed-up heads and a wrong epsilon or activation."""
    for t, x in zip(batch.t, batch.x, strict=True):
        expected = reference(params, float(t), x)
        np.testing.assert_allclose(APPLY(params, t, x), expected, atol=2e-5 * np.abs(expected).max())


def test_positions_are_sines_and_cosines_of_rows_and_columns() -> None:
    """Catches rows and columns exchanged, and places that two patches share."""
    found = positions(3, 5, 8)
    assert found.shape == (15, 8)
    i, j = 2, 4
    expected = [f(w * p) for p in (i, j) for f in (np.sin, np.cos) for w in (1.0, 0.01)]
    np.testing.assert_allclose(found[i * 5 + j], expected, atol=1e-12)
    assert len(np.unique(found.round(6), axis=0)) == 15


@pytest.mark.parametrize(
    ("dims", "options"), [((32, 32, 3), {}), ((4, 6, 2), {"width": 8, "depth": 2, "heads": 2, "patch": 1})]
)
def test_number_of_parameters_is_the_documented_one(dims: Any, options: dict[str, int]) -> None:
    """Catches a layer or a bias too many, and a trained table of positions."""
    width, depth, patch = (options.get(k, v) for k, v in [("width", 384), ("depth", 12), ("patch", 2)])
    params = jax.eval_shape(nets.transformer(dims, **options).init, jax.random.key(0))
    pixels = patch**2 * dims[2]
    expected = depth * (18 * width**2 + 15 * width) + 3 * width**2 + (261 + pixels) * width + (width + 1) * pixels
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_velocity_and_gates_begin_at_zero() -> None:
    """Catches a block that is not the identity at first, biases that are not zero, and kernels of another size."""
    init = compiled(nets.transformer(DIMS, width=32, depth=1, heads=2).init)
    # This generator compiles in half the time of the default one.
    params, other = (init(jax.random.key(seed, impl="unsafe_rbg")) for seed in range(2))
    for layer in (params["modulation"], params["output"], params["block_0"]["modulation"]):
        assert np.all(layer["kernel"] == 0)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert all(np.all(leaf == 0) for path, leaf in leaves if path[-1].key == "bias")
    for layer, fans in [(params["block_0"]["qkv"], 32 + 96), (params["patches"], 8 + 32)]:
        bound = np.sqrt(6 / fans)
        assert 0.9 * bound < np.abs(layer["kernel"]).max() <= bound
    assert abs(np.std(params["time_in"]["kernel"]) / 0.02 - 1) < 0.1
    assert np.any(params["patches"]["kernel"] != other["patches"]["kernel"])


def test_one_example_time_and_keys(params: Any, batch: fvjax.PathSample) -> None:
    """Catches a time that is ignored, dropout without a key, a key that is ignored or hidden state."""
    x = batch.x[0]
    outputs = [APPLY(params, t, x) for t in (0.0, 0.5, 1.0)]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in [outputs[:2], outputs[1:], outputs[::2]])
    one, two = jax.random.split(jax.random.key(3))
    dropped = APPLY(params, 0.5, x, key=one)
    np.testing.assert_array_equal(APPLY(params, 0.5, x, key=one), dropped)
    assert np.abs(dropped - outputs[1]).max() > 1e-3
    assert np.abs(dropped - APPLY(params, 0.5, x, key=two)).max() > 1e-3


def test_gradients_of_examples_and_exact_norms(params: Any, batch: fvjax.PathSample) -> None:
    """Catches what mixes the examples of a batch, and sites that are missed."""
    loss = fvjax.squared_error(MODEL.apply)
    gradients = compiled(jax.vmap(jax.grad(loss), in_axes=(None, 0)))
    together = gradients(params, batch)
    # Each example alone, N times over: the same compiled function, and nothing else in the batch that could leak in.
    copies = [gradients(params, jax.tree.map(lambda x, i=i: jnp.stack([x[i]] * N), batch)) for i in range(N)]
    alone = jax.tree.map(lambda *leaves: jnp.stack([leaf[0] for leaf in leaves]), *copies)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(alone))
    chex.assert_trees_all_close(together, alone, atol=1e-5 * scale)
    norms = sum(np.sum(np.reshape(leaf, (N, -1)) ** 2, axis=1) for leaf in jax.tree.leaves(alone))
    found = compiled(lambda p, b: fvjax.square_norms(loss, p, b))(params, batch)
    np.testing.assert_allclose(found.square_norms, norms, rtol=1e-5)
    products = {rule for name, rule in dict(found.paths).items() if "kernel" in name}
    assert products <= {"image patches", "outer products"}, products


def test_bfloat16_params_stay_near_float32(params: Any, batch: fvjax.PathSample) -> None:
    """Catches statistics or a softmax in bfloat16, an implicit promotion, and an answer in another dtype than x."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    found, expected = APPLY(half, 0.3, batch.x[0]), APPLY(params, 0.3, batch.x[0])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=0.05 * float(np.abs(expected).max()))


def test_layer_norm_and_attention_of_bfloat16_compute_in_float32() -> None:
    """Catches a mean that is rounded to bfloat16 (10.03 lies between 10 and 10.0625), and rounded scores."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4096)) + 10.03, jnp.bfloat16)
    found = np.asarray(_linen.standardize(x, 1e-6), np.float64)
    np.testing.assert_allclose([found.mean(), found.std()], [0, 1], atol=3e-3)
    # Scores of 256 and 256.5, which bfloat16 cannot tell apart.
    v = jnp.asarray([[[0.0]], [[1.0]]], jnp.bfloat16)
    k = jnp.asarray([[[256.0, 0.0]], [[256.0, 0.5]]], jnp.bfloat16)
    q = jnp.asarray([[[np.sqrt(2), np.sqrt(2)]]], jnp.bfloat16)
    weight = float(_linen.attention(q, k, v)[0, 0])
    assert abs(weight - 1 / (1 + np.exp(-0.5))) < 0.01


@pytest.mark.parametrize(
    ("dims", "options", "message"),
    [
        ((32, 32), {}, r"dims must be \(H, W, C\) of one image, got \(32, 32\)"),
        ((32, 32, 0), {}, "dims must be an integer >= 1, got 0"),
        ((32, 33, 3), {}, r"patch must divide the height and width of dims, \(32, 33, 3\), got 2"),
        ((33, 32, 3), {}, r"patch must divide the height and width of dims, \(33, 32, 3\), got 2"),
        ((32, 32, 3), {"patch": 0}, "patch must be an integer >= 1, got 0"),
        ((32, 32, 3), {"depth": 0}, "depth must be an integer >= 1, got 0"),
        ((32, 32, 3), {"width": 6}, "width must be divisible by 4 .* got 6"),
        ((32, 32, 3), {"heads": 5}, "heads must divide the width 384, got 5"),
        ((32, 32, 3), {"heads": True}, "heads must be an integer >= 1, got True"),
        ((32, 32, 3), {"dropout": 1}, r"dropout must be in \[0, 1\), got 1"),
    ],
)
def test_refused_sizes(dims: Any, options: dict[str, Any], message: str) -> None:
    """Catches sizes that would only fail inside Flax, or be rounded down in silence."""
    with pytest.raises(ValueError, match=f"^{message}"):
        nets.transformer(dims, **options)


def test_a_batch_is_not_one_example(params: Any, batch: fvjax.PathSample) -> None:
    """Catches a leading axis that the reshapes would swallow."""
    with pytest.raises(ValueError, match=r"^x must be ONE example of shape \(4, 6, 2\) .* got shape \(3, 4, 6, 2\)"):
        MODEL.apply(params, 0.3, batch.x)
