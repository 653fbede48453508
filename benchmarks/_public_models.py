"""Models of public packages, each as the loss of ONE example: for tests/sites and for public_models.py.

Every builder takes `real`: False gives the sizes of a test, True those of a benchmark. It imports its package itself,
so one that is not installed costs the rows of its models only. All params are float32 and random, biases too; losses
run under standard dtype promotion, which the packages rely on. The docstring of a builder says what its model has that
others do not.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Loss = Callable[[Any, Any], Array]


class Problem(NamedTuple):
    """The loss (params, example) -> real scalar of ONE example, params, and examples with a leading axis."""

    loss: Loss
    params: Any
    batch: Any


class Model(NamedTuple):
    """A builder, and what to expect of it.

    `slow`: whether its small form says that part of it costs as much as `vmap(grad)`. `wide`: whether it computes in
    float64 where its params are float64; some packages fix their dtype. `strict`: whether its derivative rules, which
    run outside the loss, do without promotion. `as_given`: whether float32 is to be compared with float32, because
    float64 is another function: it draws other noise, or takes other steps.
    """

    package: str
    title: str
    build: Callable[[bool], Problem]
    slow: bool
    wide: bool
    strict: bool
    as_given: bool


MODELS: dict[str, Model] = {}


def model(
    package: str,
    title: str,
    *,
    slow: bool = False,
    wide: bool = True,
    strict: bool = True,
    as_given: bool = False,
) -> Callable[[Callable[[bool], Problem]], Callable[[bool], Problem]]:
    """Registers a builder under its name; `package` is what pip installs."""

    def register(build: Callable[[bool], Problem]) -> Callable[[bool], Problem]:
        @wraps(build)
        def promoting(real: bool) -> Problem:
            with jax.numpy_dtype_promotion("standard"):
                problem = build(real)

            def promoted(params: Any, example: Any) -> Array:
                with jax.numpy_dtype_promotion("standard"):
                    return problem.loss(params, example)

            return problem._replace(loss=promoted)

        MODELS[build.__name__] = Model(package, title, promoting, slow, wide, strict, as_given)
        return promoting

    return register


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Float32 numbers."""
    return np.asarray(scale * np.random.default_rng(seed).normal(size=shape), np.float32)


def integers(seed: int, high: int, *shape: int) -> np.ndarray:
    """Int32 numbers in [0, high)."""
    return np.random.default_rng(seed).integers(high, size=shape, dtype=np.int32)


def filled(shapes: Any) -> Any:
    """Random params of the given shapes, none of them at its initial zero; no initialization is compiled."""
    generator = np.random.default_rng(7)

    def one(aval: Any) -> np.ndarray:
        fan_in = max(1, int(np.prod(aval.shape[:-1])))
        return np.asarray(generator.normal(size=aval.shape) / np.sqrt(fan_in), np.float32)

    return jax.tree.map(one, shapes)


def moved(params: Any, scale: float = 0.1) -> Any:
    """Params that a package has initialized, each moved a little: those that must stay near where they are."""
    generator = np.random.default_rng(8)
    return jax.tree.map(lambda x: np.asarray(x + scale * generator.normal(size=x.shape), np.float32), params)


def regression(predict: Callable[..., Array], params: Any, x: Any, shape: tuple[int, ...] | None = None) -> Problem:
    """Mean squared error of predict(params, x); `shape` is that of one output."""

    def loss(params: Any, example: Any) -> Array:
        return jnp.mean((predict(params, example[0]) - example[1]) ** 2)

    if shape is None:
        shape = jax.eval_shape(predict, params, jax.tree.map(lambda x: x[0], x)).shape
    return Problem(loss, params, (x, normal(98, len(jax.tree.leaves(x)[0]), *shape)))


def of_linen(module: Any, x: np.ndarray) -> Problem:
    """A regression with a Flax Linen module; what it keeps besides its params is constant."""
    variables = jax.eval_shape(module.init, jax.random.key(0), x[0])
    state = {name: filled(tree) for name, tree in variables.items() if name != "params"}
    return regression(lambda p, x: jnp.asarray(module.apply({"params": p, **state}, x)), filled(variables["params"]), x)


def of_nnx(make: Callable[[Any], Any]) -> tuple[Callable[..., Array], Any]:
    """The apply (params, *args) and the params of a Flax NNX module, made from its `nnx.Rngs`."""
    from flax import nnx

    parts: Any = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)
    definition, params, rest = parts
    return lambda p, *args: nnx.merge(definition, p, rest, copy=True)(*args), filled(params)


def of_equinox(module: Any) -> tuple[Callable[..., Any], Any]:
    """The apply (params, *args) and the params of an Equinox module."""
    import equinox as eqx

    params, static = eqx.partition(module, eqx.is_inexact_array)
    return lambda p, *args: eqx.combine(p, static)(*args), filled(params)


def of_haiku(function: Callable[[Array], Array], x: np.ndarray) -> Problem:
    """A regression with a Haiku function."""
    import haiku as hk

    transformed = hk.without_apply_rng(hk.transform(function))
    return regression(transformed.apply, filled(jax.eval_shape(transformed.init, jax.random.key(0), x[0])), x)


@model("ott-jax", "velocity field, MLP")
def ott_velocity_mlp(real: bool) -> Problem:
    """It takes a batch: every product has a batch axis of length one."""
    from ott.neural.networks.velocity_field.mlp import MLP

    n, dim, widths = (256, 32, (256, 256, 256)) if real else (6, 2, (4, 4))
    apply, params = of_nnx(lambda rngs: MLP(dim, hidden_dims=widths, time_enc_num_freqs=2, rngs=rngs))
    t = np.linspace(0.1, 0.9, n, dtype=np.float32)
    return regression(lambda p, tx: apply(p, tx[0][None], tx[1][None])[0], params, (t, normal(1, n, dim)), (dim,))


@model("ott-jax", "velocity field, U-Net", wide=False)
def ott_unet(real: bool) -> Problem:
    """Convolutions, attention, skips, time embeddings; it normalizes in float32 whatever its params are."""
    from ott.neural.networks.velocity_field.unet import UNet

    n, side, mult = (16, 16, (1, 2)) if real else (5, 4, (1,))

    def make(rngs: Any) -> UNet:
        return UNet(
            shape=(side, side, 1),
            model_channels=32,
            num_res_blocks=1,
            attention_resolutions=(2,),
            channel_mult=mult,
            time_embed_dim=128 if real else 8,
            rngs=rngs,
        )

    apply, params = of_nnx(make)
    t, x = np.linspace(0.1, 0.9, n, dtype=np.float32), normal(1, n, side, side, 1)
    return regression(lambda p, tx: apply(p, tx[0][None], tx[1][None])[0], params, (t, x), x.shape[1:])


@model("ott-jax", "gradient of an ICNN")
def ott_icnn(real: bool) -> Problem:
    """A transport map that is a gradient: kernels through softplus, used in an inner backward pass, too."""
    from ott.neural.networks.icnn import ICNN

    n, dim, widths = (128, 16, (64, 64)) if real else (5, 3, (4, 4))
    module = ICNN(dim_data=dim, dim_hidden=widths, act_fn=jax.nn.softplus, rectifier_fn=jax.nn.softplus)
    x = normal(1, n, dim)
    params = filled(jax.eval_shape(module.init, jax.random.key(0), x[0])["params"])
    return regression(_gradient(module), params, x)


@model("ott-jax", "gradient of a potential MLP")
def ott_potential_mlp(real: bool) -> Problem:
    """The same with an MLP and the quadratic term of ott-jax."""
    from ott.neural.networks.potentials import PotentialMLP

    n, dim, widths = (256, 16, (128, 128)) if real else (5, 3, (4, 4))
    module = PotentialMLP(dim_hidden=widths, act_fn=jax.nn.silu)
    x = normal(1, n, dim)
    params = filled(jax.eval_shape(module.init, jax.random.key(0), x[0])["params"])
    return regression(_gradient(module), params, x)


def _gradient(module: Any) -> Callable[[Any, Array], Array]:
    return lambda p, x: jax.grad(lambda x: jnp.sum(module.apply({"params": p}, x)))(x)


@model("ott-jax", "Sinkhorn divergence of a cloud", strict=False, as_given=True)
def ott_sinkhorn(real: bool) -> Problem:
    """An example is a cloud of points, moved by a dense layer: a while loop, differentiated implicitly.

    Compared as given: the loop stops by its error, after other iterations in float64.
    """
    from ott.geometry.pointcloud import PointCloud
    from ott.tools.sinkhorn_divergence import sinkhorn_divergence

    n, points, dim = (16, 32, 4) if real else (5, 6, 2)
    target = normal(2, points, dim)

    def loss(params: Any, cloud: Array) -> Array:
        moved = jnp.tanh(cloud @ params["kernel"] + params["bias"])
        return sinkhorn_divergence(PointCloud, moved, target.astype(cloud.dtype), epsilon=0.5)[0]

    return Problem(loss, {"kernel": normal(3, dim, dim), "bias": normal(4, dim)}, normal(1, n, points, dim))


@model("flax", "Linen LSTM")
def linen_lstm(real: bool) -> Problem:
    """A short scan from a state of zeros, with the kernels of all gates concatenated."""
    import flax.linen as nn

    n, steps, features, width = (128, 8, 32, 128) if real else (5, 4, 2, 3)

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Any:
            return nn.RNN(nn.OptimizedLSTMCell(width, param_dtype=x.dtype))(x)

    return of_linen(Network(), normal(1, n, steps, features))


@model("flax", "Linen GRU")
def linen_gru(real: bool) -> Problem:
    """A short scan, some of whose dense layers have no bias."""
    import flax.linen as nn

    n, steps, features, width = (128, 8, 32, 128) if real else (5, 4, 2, 3)

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Any:
            return nn.RNN(nn.GRUCell(width, param_dtype=x.dtype))(x)

    return of_linen(Network(), normal(1, n, steps, features))


@model("flax", "Linen transformer block")
def linen_transformer(real: bool) -> Problem:
    """Attention with kernels of three axes, LayerNorm, and an MLP over the tokens."""
    import flax.linen as nn

    n, tokens, width = (64, 32, 128) if real else (5, 3, 4)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(h)
            return x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x))))

    return of_linen(Block(), normal(1, n, tokens, width))


@model("flax", "Linen language model, tied embedding")
def linen_language_model(real: bool) -> Problem:
    """An embedding that is the output layer as well; cross entropy of optax; tokens are integers."""
    import flax.linen as nn
    import optax

    n, tokens, words, width = (32, 32, 512, 128) if real else (5, 4, 6, 3)

    class Network(nn.Module):
        @nn.compact
        def __call__(self, words_in: Array) -> Array:
            embed = nn.Embed(words, width)
            h = embed(words_in)
            mask = nn.make_causal_mask(words_in)
            h = h + nn.MultiHeadDotProductAttention(num_heads=1)(h, mask=mask)
            return embed.attend(nn.LayerNorm()(h))

    module, text = Network(), integers(1, words, n, tokens)
    params = filled(jax.eval_shape(module.init, jax.random.key(0), text[0])["params"])

    def loss(params: Any, text: Array) -> Array:
        logits = jnp.asarray(module.apply({"params": params}, text[:-1]))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, text[1:]))

    return Problem(loss, params, text)


@model("flax", "Linen conv net, GroupNorm")
def linen_conv_net(real: bool) -> Problem:
    """Strides, groups, and pooling; GroupNorm without a batch axis."""
    import flax.linen as nn

    n, side, width = (64, 16, 64) if real else (5, 4, 4)

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            x = nn.Conv(width, (3, 3), strides=(2, 2))(x)
            x = nn.silu(nn.GroupNorm(2, reduction_axes=(-3, -2, -1))(x))
            x = nn.silu(nn.Conv(width, (3, 3), feature_group_count=2)(x))
            return nn.Dense(3)(jnp.max(x, axis=(0, 1)))

    return of_linen(Network(), normal(1, n, side, side, 2))


@model("flax", "Linen SpectralNorm")
def linen_spectral_norm(real: bool) -> Problem:
    """Kernels divided by a norm that is made of them and of a constant state."""
    import flax.linen as nn

    n, width = (256, 256) if real else (5, 4)

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            x = nn.tanh(nn.SpectralNorm(nn.Dense(width))(x, update_stats=False))
            return nn.SpectralNorm(nn.Dense(3))(x, update_stats=False)

    return of_linen(Network(), normal(1, n, width))


@model("flax", "Linen WeightNorm")
def linen_weight_norm(real: bool) -> Problem:
    """One kernel from two leaves, its direction and its scale."""
    import flax.linen as nn

    n, width = (256, 256) if real else (5, 4)
    return of_linen(
        nn.Sequential([nn.WeightNorm(nn.Dense(width)), nn.tanh, nn.WeightNorm(nn.Dense(3))]), normal(1, n, width)
    )


@model("flax", "NNX MLP")
def nnx_mlp(real: bool) -> Problem:
    """Dense layers with LayerNorm and dropout switched off; the params are an `nnx.State`."""
    from flax import nnx

    n, width = (256, 256) if real else (5, 4)

    def make(rngs: Any) -> Any:
        return nnx.Sequential(
            nnx.Linear(width, width, rngs=rngs),
            nnx.LayerNorm(width, rngs=rngs),
            nnx.silu,
            nnx.Linear(width, 3, rngs=rngs),
        )

    apply, params = of_nnx(make)
    return regression(apply, params, normal(1, n, width))


@model("flax", "NNX attention")
def nnx_attention(real: bool) -> Problem:
    """Queries, keys and values from one input."""
    from flax import nnx

    n, tokens, width = (64, 32, 128) if real else (5, 3, 4)
    apply, params = of_nnx(lambda rngs: nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs))
    return regression(apply, params, normal(1, n, tokens, width))


@model("flax", "NNX conv net")
def nnx_conv_net(real: bool) -> Problem:
    """A convolution and a transposed one."""
    from flax import nnx

    n, side, width = (64, 16, 64) if real else (5, 4, 3)

    def make(rngs: Any) -> Any:
        return nnx.Sequential(
            nnx.Conv(2, width, (3, 3), strides=(2, 2), rngs=rngs),
            nnx.silu,
            nnx.ConvTranspose(width, 2, (3, 3), strides=(2, 2), rngs=rngs),
        )

    apply, params = of_nnx(make)
    return regression(apply, params, normal(1, n, side, side, 2))


@model("equinox", "MLP")
def equinox_mlp(real: bool) -> Problem:
    """Kernels are used from the left, and functions are leaves of the module."""
    import equinox as eqx

    n, width = (256, 256) if real else (5, 4)
    apply, params = of_equinox(eqx.nn.MLP(width, 3, width, 2, key=jax.random.key(0)))
    return regression(apply, params, normal(1, n, width))


@model("equinox", "GRU, 80 steps")
def equinox_gru(real: bool) -> Problem:
    """A scan too long to be unrolled, whose cell has params of its own."""
    import equinox as eqx

    n, features, width = (64, 16, 64) if real else (5, 2, 3)
    cell, params = of_equinox(eqx.nn.GRUCell(features, width, key=jax.random.key(0)))

    def predict(params: Any, x: Array) -> Array:
        return jax.lax.scan(lambda h, x: (cell(params, x, h), None), jnp.zeros(width, x.dtype), x)[0]

    return regression(predict, params, normal(1, n, 80, features))


@model("equinox", "LSTM, 8 steps")
def equinox_lstm(real: bool) -> Problem:
    """A short scan with a state of two parts."""
    import equinox as eqx

    n, steps, features, width = (128, 8, 32, 128) if real else (5, 4, 2, 3)
    cell, params = of_equinox(eqx.nn.LSTMCell(features, width, key=jax.random.key(0)))

    def predict(params: Any, x: Array) -> Array:
        zero = jnp.zeros(width, x.dtype)
        return jax.lax.scan(lambda h, x: (cell(params, x, h), None), (zero, zero), x)[0][0]

    return regression(predict, params, normal(1, n, steps, features))


@model("equinox", "conv net, GroupNorm")
def equinox_conv_net(real: bool) -> Problem:
    """Channels come first, and biases have trailing axes of one."""
    import equinox as eqx

    n, side, width = (64, 16, 64) if real else (5, 4, 4)
    keys = jax.random.split(jax.random.key(0))
    module = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(2, width, 3, stride=2, padding=1, key=keys[0]),
            eqx.nn.GroupNorm(2, width),
            eqx.nn.Lambda(jax.nn.silu),
            eqx.nn.AdaptiveAvgPool2d(2),
            eqx.nn.Conv2d(width, 3, 2, key=keys[1]),
        ]
    )
    apply, params = of_equinox(module)
    return regression(apply, params, normal(1, n, 2, side, side))


@model("equinox", "attention")
def equinox_attention(real: bool) -> Problem:
    """Vmapped dense layers."""
    import equinox as eqx

    n, tokens, width = (64, 32, 128) if real else (5, 3, 4)
    module = eqx.nn.MultiheadAttention(2, width, use_output_bias=True, key=jax.random.key(0))
    apply, params = of_equinox(module)
    return regression(lambda p, x: apply(p, x, x, x), params, normal(1, n, tokens, width))


@model("equinox", "error_if on params")
def equinox_error_if(real: bool) -> Problem:
    """Params that pass through an assertion about the data: an output made of params alone."""
    import equinox as eqx

    n, width = (256, 256) if real else (5, 4)

    def predict(params: Any, x: Array) -> Array:
        checked = eqx.error_if(params, jnp.any(jnp.isnan(x)), "x is nan")
        return jnp.tanh(x @ checked["kernel"] + checked["bias"])

    return regression(
        predict, {"kernel": normal(3, width, 3, scale=width**-0.5), "bias": normal(4, 3)}, normal(1, n, width)
    )


@model("diffrax", "neural ODE, constant steps")
def diffrax_constant(real: bool) -> Problem:
    """Tsit5 with the recursive checkpoints that are diffrax's default; params are the arguments of the field."""
    return _neural_ode(real, adaptive=False)


@model("diffrax", "neural ODE, adaptive steps", as_given=True)
def diffrax_adaptive(real: bool) -> Problem:
    """The number of steps depends on params and data.

    Compared as given: which steps are accepted is decided by errors near the rounding of float32.
    """
    return _neural_ode(real, adaptive=True)


def _neural_ode(real: bool, *, adaptive: bool) -> Problem:
    import diffrax
    import equinox as eqx

    n, dim, width = (64, 8, 64) if real else (5, 2, 3)
    field, params = of_equinox(eqx.nn.MLP(dim, dim, width, 2, activation=jnp.tanh, key=jax.random.key(0)))
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-4) if adaptive else diffrax.ConstantStepSize()

    def predict(params: Any, x: Array) -> Array:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, p: field(p, y)),  # noqa: ARG005
            diffrax.Tsit5(),
            0.0,
            1.0,
            0.25,
            x,
            params,
            stepsize_controller=controller,
            max_steps=64,
        )
        return solution.ys[0]

    return regression(predict, params, normal(1, n, dim), (dim,))


@model("diffrax", "neural SDE", as_given=True)
def diffrax_sde(real: bool) -> Problem:
    """Drift and diffusion with params, a Brownian path of each example by its key.

    Compared as given: another dtype draws another path.
    """
    import diffrax
    import equinox as eqx

    n, dim, width = (64, 8, 64) if real else (5, 2, 3)
    drift, params = of_equinox(eqx.nn.MLP(dim, dim, width, 1, activation=jnp.tanh, key=jax.random.key(0)))

    def loss(params: Any, example: Any) -> Array:
        x, target, key = example
        path = diffrax.VirtualBrownianTree(0.0, 1.0, 0.05, jax.ShapeDtypeStruct((dim,), x.dtype), key)
        terms: Any = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, p: drift(p["drift"], y)),  # noqa: ARG005
            diffrax.ControlTerm(lambda t, y, p: jnp.diag(p["scale"]), path),  # noqa: ARG005
        )
        end = diffrax.diffeqsolve(terms, diffrax.Euler(), 0.0, 1.0, 0.125, x, params, max_steps=16).ys
        return jnp.mean((end[0] - target) ** 2)

    keys = jax.random.split(jax.random.key(1), n)
    return Problem(loss, {"drift": params, "scale": normal(3, dim)}, (normal(1, n, dim), normal(2, n, dim), keys))


@model("optimistix", "deep equilibrium, Newton")
def optimistix_root(real: bool) -> Problem:
    """A root, differentiated implicitly: params enter a custom_jvp and a linear solve."""
    import optimistix as optx

    n, dim, width = (64, 8, 16) if real else (5, 2, 3)

    def residual(z: Array, inputs: Any) -> Array:
        params, x = inputs
        return z - jnp.tanh(params["hidden"] @ z + params["input"] @ x + params["bias"])

    def predict(params: Any, x: Array) -> Array:
        # Newton's last step doubles the digits: the error that remains is below the rounding of float32, in which a
        # smaller tolerance may not be reached.
        solver: Any = optx.Newton(rtol=1e-4, atol=1e-4)
        return optx.root_find(residual, solver, jnp.zeros(width, x.dtype), (params, x)).value

    params = {"hidden": normal(3, width, width, scale=0.3 * width**-0.5), "input": normal(4, width, dim)}
    return regression(predict, params | {"bias": normal(5, width)}, normal(1, n, dim))


@model("optimistix", "least squares, Levenberg-Marquardt", as_given=True)
def optimistix_least_squares(real: bool) -> Problem:
    """A curve fitted to the points of an example, in features that have params.

    Compared as given: the solver stops at a tolerance, after other iterations in float64.
    """
    import optimistix as optx

    n, points, width = (64, 32, 8) if real else (5, 7, 3)

    def residual(weights: Any, inputs: Any) -> Any:
        params, (x, y) = inputs
        features = jnp.tanh(x[:, None] * params["scale"] + params["shift"])
        return features @ weights - y, 0.3 * weights

    def loss(params: Any, example: Any) -> Array:
        solver: Any = optx.LevenbergMarquardt(rtol=1e-6, atol=1e-7)
        start = jnp.zeros(width, example[0].dtype)
        return jnp.sum(optx.least_squares(residual, solver, start, (params, example), max_steps=64).value ** 2)

    params = {"scale": normal(3, width), "shift": normal(4, width)}
    return Problem(loss, params, (normal(1, n, points), normal(2, n, points)))


@model("lineax", "linear solve")
def lineax_solve(real: bool) -> Problem:
    """A matrix of params alone, a right-hand side of data: `linear_solve` has a derivative rule of its own."""
    import lineax as lx

    n, width = (128, 32) if real else (5, 3)

    def predict(params: Any, x: Array) -> Array:
        matrix = jnp.eye(width, dtype=x.dtype) + 0.3 * params["kernel"]
        return lx.linear_solve(lx.MatrixLinearOperator(matrix), jnp.tanh(x + params["bias"])).value

    return regression(
        predict, {"kernel": normal(3, width, width, scale=width**-0.5), "bias": normal(4, width)}, normal(1, n, width)
    )


@model("optax", "CTC loss")
def optax_ctc(real: bool) -> Problem:
    """A dense layer over frames, then a scan over the frames; labels and paddings are data."""
    import optax

    n, frames, features, words, length = (32, 40, 32, 16, 8) if real else (5, 6, 3, 4, 2)

    def loss(params: Any, example: Any) -> Array:
        x, labels, padding = example
        logits = jnp.tanh(x @ params["a"]) @ params["b"] + params["c"]
        none = jnp.zeros((1, length), x.dtype)
        return optax.ctc_loss(logits[None], padding[None], labels[None], none)[0]

    params = {"a": normal(3, features, 2 * features), "b": normal(4, 2 * features, words), "c": normal(5, words)}
    padding = np.asarray(np.arange(frames) >= frames - integers(6, 2, n, 1), np.float32)
    return Problem(loss, params, (normal(1, n, frames, features), 1 + integers(2, words - 1, n, length), padding))


@model("jax", "stax conv net")
def stax_conv_net(real: bool) -> Problem:
    """A batch axis of one in every layer; params are tuples, some of them empty."""
    from jax.example_libraries import stax

    n, side, width = (64, 16, 64) if real else (5, 4, 3)
    init, apply = stax.serial(
        stax.Conv(width, (3, 3), padding="SAME"),
        stax.Relu,
        stax.MaxPool((2, 2), strides=(2, 2)),
        stax.Flatten,
        stax.Dense(5),
        stax.LogSoftmax,
    )
    shapes = jax.eval_shape(lambda key: init(key, (1, side, side, 2))[1], jax.random.key(0))
    return regression(lambda p, x: apply(p, x[None])[0], filled(shapes), normal(1, n, side, side, 2))


@model("dm-haiku", "MLP")
def haiku_mlp(real: bool) -> Problem:
    """Dense layers of a transformed function."""
    import haiku as hk

    n, width = (256, 256) if real else (5, 4)

    def function(x: Array) -> Array:
        return hk.nets.MLP([width, width, 3], activation=jax.nn.silu)(x)

    return of_haiku(function, normal(1, n, width))


@model("dm-haiku", "LSTM, dynamic unroll")
def haiku_lstm(real: bool) -> Problem:
    """A short scan with the gates in one kernel, split after the product."""
    import haiku as hk

    n, steps, features, width = (128, 8, 32, 128) if real else (5, 4, 2, 3)

    def function(x: Array) -> Array:
        cell = hk.LSTM(width)
        return hk.dynamic_unroll(cell, x, cell.initial_state(None))[0]

    return of_haiku(function, normal(1, n, steps, features))


@model("dm-haiku", "conv net")
def haiku_conv_net(real: bool) -> Problem:
    """Convolutions with a stride and a dilation; average pooling."""
    import haiku as hk

    n, side, width = (64, 16, 64) if real else (5, 5, 3)

    def function(x: Array) -> Array:
        x = jax.nn.silu(hk.Conv2D(width, 3, stride=2)(x))
        x = jax.nn.silu(hk.Conv2D(width, 2, rate=2)(x))
        return hk.Linear(3)(jnp.mean(x, (0, 1)))

    return of_haiku(function, normal(1, n, side, side, 2))


@model("dm-haiku", "transformer block")
def haiku_transformer(real: bool) -> Problem:
    """Attention with kernels of two axes, its output reshaped; LayerNorm."""
    import haiku as hk

    n, tokens, width = (64, 32, 128) if real else (5, 3, 4)

    def function(x: Array) -> Array:
        h = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        attention = hk.MultiHeadAttention(2, width // 2, w_init=hk.initializers.VarianceScaling(), model_size=width)
        x = x + attention(h, h, h)
        h = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        return x + hk.Linear(width)(jax.nn.gelu(hk.Linear(4 * width)(h)))

    return of_haiku(function, normal(1, n, tokens, width))


def _ring(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Senders and receivers of the edges of a ring and of some chords."""
    start = np.arange(nodes, dtype=np.int32)
    return np.concatenate([start, start[::2]]), np.concatenate([(start + 1) % nodes, (start[::2] + 2) % nodes])


def _graph(x: Array, edges: Any, world: Any) -> Any:
    import jraph

    senders, receivers = map(jnp.asarray, _ring(len(x)))
    counts = jnp.asarray([len(x)]), jnp.asarray([len(senders)])
    return jraph.GraphsTuple(x, edges, receivers, senders, world, *counts)


@model("jraph", "graph network")
def jraph_network(real: bool) -> Problem:
    """Edges, nodes and a global, each with a dense layer, between gathers and segment sums."""
    import jraph

    n, nodes, width = (64, 16, 64) if real else (5, 4, 3)
    sizes = {"edge": 4 * width, "node": 4 * width, "world": 3 * width}
    params = {
        name: {"kernel": normal(k, size, width, scale=size**-0.5), "bias": normal(9 + k, width)}
        for k, (name, size) in enumerate(sizes.items())
    }

    def predict(params: Any, x: Array) -> Array:
        def dense(name: str) -> Callable[..., Array]:
            return lambda *parts: jnp.tanh(
                jnp.concatenate(parts, axis=-1) @ params[name]["kernel"] + params[name]["bias"]
            )

        senders, receivers = _ring(nodes)
        graph = _graph(x, x[senders] - x[receivers], jnp.ones((1, width), x.dtype))
        apply = jraph.GraphNetwork(dense("edge"), dense("node"), dense("world"))
        found = apply(apply(graph))
        return jnp.concatenate([found.nodes, found.globals])

    return regression(predict, params, normal(1, n, nodes, width))


@model("jraph", "graph convolution")
def jraph_convolution(real: bool) -> Problem:
    """Two layers whose messages are normalized by the degrees of a fixed graph."""
    import jraph

    n, nodes, width = (64, 16, 64) if real else (5, 4, 3)
    params = [{"kernel": normal(k, width, width, scale=width**-0.5), "bias": normal(9 + k, width)} for k in range(2)]

    def predict(params: Any, x: Array) -> Array:
        graph = _graph(x, None, None)
        for layer in params:
            update = lambda h, p=layer: jnp.tanh(h @ p["kernel"] + p["bias"])  # noqa: E731
            graph = jraph.GraphConvolution(update, add_self_edges=True)(graph)
        return graph.nodes

    return regression(predict, params, normal(1, n, nodes, width))


def _kalman(real: bool, steps: int) -> Problem:
    from dynamax.linear_gaussian_ssm import LinearGaussianSSM

    n, state, emission = (32, 4, 6) if real else (5, 2, 3)
    module = LinearGaussianSSM(state, emission)
    params = moved(module.initialize(jax.random.key(0))[0], 0.02)

    def loss(params: Any, emissions: Array) -> Array:
        found = module.filter(params, emissions)
        variances = jnp.diagonal(found.filtered_covariances, axis1=-2, axis2=-1)
        return jnp.mean(found.filtered_means**2 / variances) - found.marginal_loglik / steps

    return Problem(loss, params, normal(1, n, steps, emission))


@model("dynamax", "Kalman filter, 8 steps")
def dynamax_kalman(real: bool) -> Problem:
    """Covariances that depend on params alone beside means that depend on data: outputs of one scan."""
    return _kalman(real, 8 if real else 4)


@model("dynamax", "Kalman filter, 80 steps", slow=True)
def dynamax_kalman_long(real: bool) -> Problem:
    """The same in a scan that is too long to be unrolled."""
    return _kalman(real, 80)


@model("dynamax", "hidden Markov model", slow=True)
def dynamax_hmm(real: bool) -> Problem:
    """The forward algorithm, over 80 steps: its first state is made of params alone."""
    from dynamax.hidden_markov_model import DiagonalGaussianHMM

    n, states, emission = (32, 6, 4) if real else (5, 3, 2)
    module = DiagonalGaussianHMM(states, emission)
    even = np.full((states, states), 1 / states, np.float32)
    start = module.initialize(
        jax.random.key(0),
        initial_probs=even[0],
        transition_matrix=even,
        emission_means=normal(2, states, emission),
        emission_scale_diags=np.ones((states, emission), np.float32),
    )
    params = moved(start[0], 0.02)
    return Problem(lambda p, y: -module.marginal_log_prob(p, y) / 80, params, normal(1, n, 80, emission))


def _flow(make: Callable[..., Any], n: int, dim: int, **options: Any) -> Problem:
    """Negative log density of a flow of flowjax; what the package holds fixed is not among the params."""
    import equinox as eqx
    import paramax
    from flowjax.distributions import Normal

    flow = make(jax.random.key(0), base_dist=Normal(jnp.zeros(dim)), **options)
    params, static = eqx.partition(
        flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )
    return Problem(lambda p, x: -paramax.unwrap(eqx.combine(p, static)).log_prob(x), moved(params), normal(1, n, dim))


@model("flowjax", "masked autoregressive flow")
def flowjax_masked(real: bool) -> Problem:
    """Masked kernels; a scan over stacked layers."""
    from flowjax.flows import masked_autoregressive_flow

    n, dim, width = (128, 8, 64) if real else (5, 3, 5)
    return _flow(masked_autoregressive_flow, n, dim, nn_width=width, flow_layers=4 if real else 2)


@model("flowjax", "coupling flow, splines")
def flowjax_coupling(real: bool) -> Problem:
    """Rational quadratic splines, whose knots are searched."""
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.flows import coupling_flow

    n, dim, width = (128, 8, 64) if real else (5, 3, 4)
    spline = RationalQuadraticSpline(knots=6 if real else 3, interval=4)
    return _flow(coupling_flow, n, dim, transformer=spline, nn_width=width, flow_layers=4 if real else 2)


@model("flowjax", "block neural autoregressive flow")
def flowjax_block(real: bool) -> Problem:
    """Kernels that are normalized and made triangular with a positive diagonal."""
    from flowjax.flows import block_neural_autoregressive_flow

    n, dim, width = (128, 8, 8) if real else (5, 2, 2)
    return _flow(block_neural_autoregressive_flow, n, dim, nn_block_dim=width)


@model("flowjax", "planar flow")
def flowjax_planar(real: bool) -> Problem:
    """Layers of vectors, whose inverse has no network in it."""
    from flowjax.flows import planar_flow

    n, dim, layers = (256, 16, 8) if real else (5, 3, 2)
    return _flow(planar_flow, n, dim, flow_layers=layers, negative_slope=0.1)


@model("distrax", "masked coupling flow")
def distrax_coupling(real: bool) -> Problem:
    """Log densities of chained bijectors, conditioned by dense layers."""
    import distrax

    n, dim, width = (256, 16, 128) if real else (5, 4, 3)
    masks = [np.arange(dim) % 2 == k for k in range(2)]
    params = [
        {
            "a": normal(k, dim, width, scale=dim**-0.5),
            "b": normal(3 + k, width),
            "c": normal(6 + k, width, 2 * dim, scale=0.3 * width**-0.5),
        }
        for k in range(2)
    ]

    def loss(params: Any, x: Array) -> Array:
        def layer(mask: np.ndarray, p: Any) -> Any:
            return distrax.MaskedCoupling(
                mask,
                lambda h: jnp.tanh(h @ p["a"] + p["b"]) @ p["c"],
                lambda h: distrax.ScalarAffine(h[..., :dim], log_scale=h[..., dim:]),
            )

        base = distrax.MultivariateNormalDiag(jnp.zeros(dim, x.dtype), jnp.ones(dim, x.dtype))
        flow = distrax.Chain([layer(mask, p) for mask, p in zip(masks, params, strict=True)])
        return -distrax.Transformed(base, distrax.Inverse(flow)).log_prob(x)

    return Problem(loss, params, normal(1, n, dim))


@model("numpyro", "Bayesian network, log density")
def numpyro_network(real: bool) -> Problem:
    """A prior, the same for every example, beside the likelihood of one example."""
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer.util import log_density

    n, inputs, width = (256, 64, 128) if real else (5, 3, 4)

    def density(x: Array, y: Array) -> None:
        a = numpyro.sample("a", dist.Normal(0.0, 1.0).expand([inputs, width]).to_event(2))
        b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([width]).to_event(1))
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        numpyro.sample("y", dist.StudentT(4.0, jnp.tanh(x @ a) @ b, scale), obs=y)

    def loss(params: Any, example: Any) -> Array:
        return -log_density(density, example, {}, params)[0]

    params = {"a": normal(3, inputs, width, scale=inputs**-0.5), "b": normal(4, width), "scale": np.float32(0.7)}
    return Problem(loss, params, (normal(1, n, inputs), normal(2, n)))


@model("tinygp", "Gaussian process, marginal likelihood")
def tinygp_likelihood(real: bool) -> Problem:
    """A Cholesky factor of a matrix that is made of params and of the points of an example."""
    from tinygp import GaussianProcess, kernels

    n, points = (64, 24) if real else (5, 6)

    def loss(params: Any, example: Any) -> Array:
        x, y = example
        kernel = jnp.exp(params["scale"]) * kernels.Matern52(jnp.exp(params["length"]))
        return -GaussianProcess(kernel, x, diag=0.1 + jnp.exp(params["noise"]), mean=params["mean"]).log_probability(y)

    params = {name: np.float32(0.1 * k - 0.2) for k, name in enumerate(["scale", "length", "noise", "mean"])}
    return Problem(loss, params, (normal(1, n, points), normal(2, n, points)))
