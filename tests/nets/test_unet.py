"""The U-Net: its topology, initialisation, time, keys and dtypes, its gradients, and the refused sizes.

Its output is compared with torchcfm's in test_convert.py.
"""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fvjax
from fvjax import nets
from fvjax.nets.unet import _GroupNorm, number_of_groups

DIMS = (4, 4, 1)
MODEL = nets.unet(
    DIMS, channels=8, res_blocks=1, multipliers=(1, 2), attention=(), heads=2, head_channels=None, dropout=0.5
)
N = 3


def compiled(function: Any) -> Any:
    """Jitted with little optimisation: compiling is what these tests cost."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


APPLY = compiled(MODEL.apply)


def test_cifar_setting_has_the_published_number_of_parameters() -> None:
    """Catches a layer too many or too few in the network of the published CIFAR-10 results."""
    model = nets.unet((32, 32, 3), dropout=0.1)
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 35_746_307
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    with_attention = {name for name in params if name.endswith("_attention")}
    numbered = {f"input_{i}_attention" for i in (4, 5)} | {f"output_{i}_attention" for i in (6, 7, 8)}
    assert with_attention == numbered | {"middle_1_attention"}
    assert params["output_11_res"]["skip"]["kernel"].shape == (1, 1, 256, 128)


def test_velocity_begins_at_zero_and_kernels_within_their_bounds() -> None:
    """Catches a last layer that does not begin at zero, other bounds, and a key that is ignored."""
    model = nets.unet(DIMS, channels=8, res_blocks=1, multipliers=(1,), attention=(), heads=1, head_channels=None)
    # This generator compiles in half the time of the default one.
    init = compiled(model.init)
    params, other = (init(jax.random.key(seed, impl="unsafe_rbg")) for seed in range(2))
    zero = {"output", "input_1_res/conv_out", "middle_1_attention/output", "output_0_res/conv_out"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [key.key for key in path]
        owner = params
        for name in names[:-1]:
            owner = owner[name]
        if names[-1] == "scale":
            assert np.all(leaf == 1)
        elif "/".join(names[:-1]) in zero or names[-2].startswith("norm"):
            assert np.all(leaf == 0), names
        elif "conv_out" not in names:
            bound = np.prod(owner["kernel"].shape[:-1]) ** -0.5
            assert np.abs(leaf).max() <= bound, names
            assert leaf.size < 50 or abs(np.std(leaf) / bound * np.sqrt(3) - 1) < 0.15, names
    assert type(params["input_1_res"]["time"]) is dict
    assert np.any(params["input_0_conv"]["kernel"] != other["input_0_conv"]["kernel"])
    assert np.all(model.apply(params, 0.3, jnp.ones(DIMS)) == 0)


def test_one_example_time_and_keys(params: Any, batch: fvjax.PathSample) -> None:
    """Catches time that a normalisation removes, dropout without a key, a key that is ignored or hidden state."""
    x = batch.x[0]
    outputs = [APPLY(params, t, x) for t in (0.0, 0.5, 1.0)]
    assert outputs[0].shape == DIMS
    assert all(np.abs(a - b).max() > 1e-3 for a, b in [outputs[:2], outputs[1:], outputs[::2]])
    np.testing.assert_array_equal(APPLY(params, 0.5, x), outputs[1])
    one, two = jax.random.split(jax.random.key(3))
    dropped = APPLY(params, 0.5, x, key=one)
    np.testing.assert_array_equal(APPLY(params, 0.5, x, key=one), dropped)
    assert np.abs(dropped - outputs[1]).max() > 1e-3
    assert np.abs(dropped - APPLY(params, 0.5, x, key=two)).max() > 1e-3


def test_gradients_of_examples_and_exact_norms(params: Any, batch: fvjax.PathSample) -> None:
    """Catches what mixes the examples of a batch (statistics over the batch axis), and sites that are missed."""
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
    rules = dict(found.paths)
    products = {rule for name, rule in rules.items() if "kernel" in name}
    assert products == {"image patches", "outer products"}, products


def test_bfloat16_params_stay_near_float32(params: Any, batch: fvjax.PathSample) -> None:
    """Catches statistics or a softmax in bfloat16, an implicit promotion, and an answer in another dtype than x."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    found, expected = APPLY(half, 0.3, batch.x[0]), APPLY(params, 0.3, batch.x[0])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=0.05 * float(np.abs(expected).max()))


def test_group_norm_is_flaxs_of_one_example() -> None:
    """Catches groups of the wrong channels, and moments that cancel where the mean is large."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 12)) + 1e3 * np.arange(12), jnp.float32)
    weights = {"scale": jnp.arange(12.0) - 3, "bias": jnp.linspace(-1, 1, 12)}
    for groups, image, tolerance in [(12, x, 2e-3), (4, x - 1e3 * np.arange(12, dtype=np.float32), 1e-5)]:
        peer = nn.GroupNorm(groups, epsilon=1e-5, reduction_axes=(-3, -2, -1), use_fast_variance=False)
        found, expected = (compiled(m.apply)({"params": weights}, image) for m in (_GroupNorm(groups), peer))
        np.testing.assert_allclose(found, expected, atol=tolerance)


def test_group_norm_of_bfloat16_has_statistics_in_float32() -> None:
    """Catches a mean that is rounded to bfloat16, whose neighbours of 10.03 are 10 and 10.0625."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 32, 4)) + 10.03, jnp.bfloat16)
    weights = {"scale": jnp.ones(4, jnp.bfloat16), "bias": jnp.zeros(4, jnp.bfloat16)}
    found = compiled(_GroupNorm(2).apply)({"params": weights}, x)
    assert found.dtype == jnp.bfloat16
    groups = np.asarray(found, np.float64).reshape(-1, 2, 2)
    np.testing.assert_allclose(groups.mean(axis=(0, 2)), 0, atol=3e-3)
    np.testing.assert_allclose(groups.std(axis=(0, 2)), 1, atol=3e-3)


def test_groups_leave_two_channels() -> None:
    """Catches torchcfm's rule for small networks, where groups of one channel hide the time from the network."""
    found = {channels: number_of_groups(channels, None) for channels in (2, 6, 8, 16, 32, 48, 64, 96, 128, 512)}
    assert found == {2: 1, 6: 3, 8: 4, 16: 8, 32: 16, 48: 24, 64: 32, 96: 32, 128: 32, 512: 32}
    assert number_of_groups(32, 32) == 32


def test_heads_follow_from_each_other() -> None:
    """Catches head_channels that are ignored: three ways to the same heads, and other heads that are not the same."""
    options = {"res_blocks": 1, "multipliers": (1,), "attention": (), "channels": 8}
    given = [(2, None), (None, 4), (2, 4), (4, None)]
    models = [nets.unet((4, 4, 8), heads=h, head_channels=c, **options) for h, c in given]
    shapes = jax.eval_shape(models[0].init, jax.random.key(0))
    programs = [str(jax.make_jaxpr(model.apply)(shapes, 0.3, np.zeros((4, 4, 8), np.float32))) for model in models]
    assert programs[0] == programs[1] == programs[2]
    assert programs[0] != programs[3]


@pytest.mark.parametrize(
    ("dims", "options", "message"),
    [
        ((32, 32), {}, r"dims must be \(H, W, C\) of one image, got \(32, 32\)"),
        (32, {}, r"dims must be \(H, W, C\) of one image, got 32"),
        ((32, 0, 3), {}, "dims must be an integer >= 1, got 0"),
        ((36, 36, 3), {}, r"dims must be divisible by 8 for 4 levels, got \(36, 36, 3\)"),
        ((32, 36, 3), {}, r"dims must be divisible by 8 for 4 levels, got \(32, 36, 3\)"),
        ((32, 32, 3), {"channels": 7}, "channels must be an even integer >= 2, got 7"),
        ((32, 32, 3), {"res_blocks": 0}, "res_blocks must be an integer >= 1, got 0"),
        ((32, 32, 3), {"multipliers": ()}, r"multipliers must name at least one level, got \(\)"),
        ((32, 32, 3), {"multipliers": (1, 0.5)}, "multipliers must be an integer >= 1, got 0.5"),
        (
            (32, 32, 3),
            {"attention": (16, 7)},
            r"attention must be among the widths of the levels, \[32, 16, 8, 4\], got 7",
        ),
        ((28, 28, 1), {"multipliers": (1, 2)}, r"attention must be among the widths of the levels, \[28, 14\], got 16"),
        (
            (32, 32, 3),
            {"channels": 64},
            r"heads \* head_channels must be the 128 channels .* heads=4 and head_channels=64",
        ),
        ((32, 32, 3), {"heads": 3, "head_channels": None}, "heads must divide the 256 channels of a level .* got 3"),
        ((32, 32, 3), {"heads": None, "head_channels": 48}, "head_channels must divide the 256 channels .* got 48"),
        (
            (32, 32, 3),
            {"heads": None, "head_channels": None},
            "heads or head_channels must be given, got None for both",
        ),
        ((32, 32, 3), {"heads": 0}, "heads must be an integer >= 1, got 0"),
        ((32, 32, 3), {"groups": 48}, r"groups must divide the channels of each level, \[128, 256, 256, 256\], got 48"),
        ((32, 32, 3), {"groups": 0}, "groups must be an integer >= 1, got 0"),
        ((32, 32, 3), {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ((32, 32, 3), {"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
    ],
)
def test_refused_sizes(dims: Any, options: dict[str, Any], message: str) -> None:
    """Catches an option that is ignored (torchcfm ignores num_heads and unknown resolutions), and a late error."""
    with pytest.raises(ValueError, match=f"^{message}"):
        nets.unet(dims, **options)


def test_refused_calls(params: Any, batch: fvjax.PathSample) -> None:
    """Catches a batch that is taken for one example, a vector of times, and integer pixels that would be rounded."""
    with pytest.raises(ValueError, match=r"^x must be ONE example of shape \(4, 4, 1\) .* got shape \(3, 4, 4, 1\)"):
        MODEL.apply(params, 0.3, batch.x)
    with pytest.raises(ValueError, match=r"^t must have shape \(\), got \(3,\)"):
        MODEL.apply(params, batch.t, batch.x[0])
    with pytest.raises(ValueError, match="^x must be floating point, got int32"):
        MODEL.apply(params, 0.3, jnp.ones(DIMS, jnp.int32))
