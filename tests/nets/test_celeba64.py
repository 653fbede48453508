"""The networks of the CelebA64 benchmark: PyTorch's numbers and gradients, their sizes, convexity, what is refused."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvjax.nets import celeba64
from fvjax.nets.celeba64 import TorchNetwork

SMALL = {
    "generator": celeba64.generator(latent=5, filters=2, most=16),
    "potential": celeba64.convex_potential(channels=2, rank=3),
}
FULL = {"generator": celeba64.generator(), "potential": celeba64.convex_potential()}
OPTIONS: dict[Any, dict[str, dict[str, int]]] = {
    "small": {"generator": {"latent": 5, "filters": 2, "most": 16}, "potential": {"channels": 2, "rank": 3}},
    "full": {"generator": {}, "potential": {}},
}
# What `torch_module` answers in PyTorch 2.13 for the small networks and `example`: every 31st pixel of the generator's
# image, the whole gradient; the potential's value, and pixels of its gradient.
GENERATED = [
    [[0.3585145, 0.2739595, 0.7830763], [0.0893709, 0.1282548, 0.7028726], [0.1021704, 0.1175122, 0.7048870]],
    [[0.2496821, 0.1546887, 0.6747062], [0.1516704, -0.0502681, 0.5710978], [0.1460315, -0.0643626, 0.5719775]],
    [[0.2466775, 0.1307804, 0.6716286], [0.1270201, -0.0450683, 0.5527832], [0.1398908, -0.0553258, 0.5638619]],
]
GENERATORS_GRADIENT = [0.7469242, 2.9331245, -1.9173300, 0.1295900, 1.2138429]
VALUE = 40.43976
POTENTIALS_GRADIENT = [
    [[-0.0106619, 0.0106087, 0.0063918], [-0.0108780, 0.0225259, -0.0132810], [0.0059428, 0.0043232, -0.0096989]],
    [[-0.0012102, 0.0086582, -0.0141523], [0.0383856, 0.0129775, -0.0241861], [-0.0019545, 0.0073366, -0.0129392]],
    [[0.0099984, -0.0089770, 0.0070482], [-0.0034234, 0.0086518, -0.0154690], [-0.0084778, 0.0061491, -0.0035161]],
]


def made_up(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights that any machine can make again; every one matters, and those that must be are not negative."""
    made = {}
    for index, (name, shape) in enumerate(sorted(shapes.items())):
        values = np.random.default_rng(index).normal(size=shape)
        fan_in = np.prod(shape[1:])
        if name.startswith(("convex_layers", "pos_features")):  # large, beside 0.005 |x|^2, and of both signs for CELU
            values = 4 * np.abs(values) / fan_in if len(shape) > 1 else 4 * values - 4
        elif len(shape) > 1:
            values = values / np.sqrt(fan_in)
        else:
            values = np.abs(0.5 + 0.3 * values) if name.endswith("running_var") else 0.5 + 0.3 * values
        made[name] = np.asarray(values, np.float32)
    return made


def example(kind: str, latent: int = 5) -> np.ndarray:
    """One latent vector or image."""
    shape = (latent,) if kind == "generator" else (64, 64, 3)
    return np.asarray(np.cos(np.arange(np.prod(shape)) ** 1.1).reshape(shape), np.float32)


def scalar(apply: Callable[..., Any], params: Any, x: Any) -> tuple[Any, Any]:
    """Half the sum of squares of the output (of one number: the number), and the output."""
    out = apply(params, x)
    return (out if out.ndim == 0 else 0.5 * jnp.sum(jnp.square(out))), out


def answers(network: TorchNetwork, params: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Output, and the gradient of `scalar` in x."""
    function = jax.value_and_grad(lambda params, x: scalar(network.apply, params, x), argnums=1, has_aux=True)
    fast = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
    (_, out), gradient = fast(params, jnp.asarray(x))
    return np.asarray(out), np.asarray(gradient)


def torch_module(kind: str, size: str) -> Any:
    """The benchmark's network as data/README describes it, in PyTorch, in evaluation mode, with made-up weights."""
    torch = pytest.importorskip("torch", reason="the peer is installed for benchmarks only")
    nn, functional = torch.nn, torch.nn.functional

    class Block(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            hidden = min(inputs, outputs)
            self.conv_0 = nn.Conv2d(inputs, hidden, 3, padding=1, bias=False)
            self.bn2d_0 = nn.BatchNorm2d(hidden)
            self.conv_1 = nn.Conv2d(hidden, outputs, 3, padding=1, bias=False)
            self.bn2d_1 = nn.BatchNorm2d(outputs)
            if inputs != outputs:
                self.conv_s = nn.Conv2d(inputs, outputs, 1, bias=False)
                self.bn2d_s = nn.BatchNorm2d(outputs)

        def forward(self, x: Any) -> Any:
            branch = functional.leaky_relu(self.bn2d_0(self.conv_0(x)), 0.2)
            skip = self.bn2d_s(self.conv_s(x)) if hasattr(self, "conv_s") else x
            return functional.leaky_relu(skip + 0.1 * self.bn2d_1(self.conv_1(branch)), 0.2)

    class Generator(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, latent: int = 128, filters: int = 64, most: int = 512) -> None:
            super().__init__()
            widths = [min(filters * factor, most) for factor in (32, 16, 8, 4, 2, 1)]
            self.fc = nn.Linear(latent, 16 * widths[0])
            self.bn1d = nn.BatchNorm1d(16 * widths[0])
            stages: list[Any] = []
            for before, after in itertools.pairwise(widths):
                stages += [Block(before, after), Block(after, after), nn.Upsample(scale_factor=2)]
            self.resnet = nn.Sequential(*stages[:-1])
            self.conv_img = nn.Conv2d(filters, 3, 3, padding=1)

        def forward(self, z: Any) -> Any:
            x = functional.leaky_relu(self.bn1d(self.fc(z)), 0.2)
            return torch.tanh(self.conv_img(self.resnet(x.view(len(z), -1, 4, 4))))

    class Quadratic(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, outputs: int, rank: int, window: dict[str, int]) -> None:
            super().__init__()
            self.quadratic_decomposed = nn.Conv2d(3, outputs * rank, bias=False, **window)
            self.linear = nn.Conv2d(3, outputs, bias=False, **window)
            self.rank = rank

        def forward(self, x: Any) -> Any:
            squares = self.quadratic_decomposed(x) ** 2
            return sum(squares[:, r :: self.rank] for r in range(self.rank)) + self.linear(x)

    class Potential(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, channels: int = 128, rank: int = 4) -> None:
            super().__init__()
            self.convex_layers = nn.ModuleList([nn.Conv2d(channels, 2 * channels, 4, 2, 1)])
            windows = ({"kernel_size": 4, "stride": 2, "padding": 1}, {"kernel_size": 7, "stride": 4, "padding": 2})
            self.quadratic_layers = nn.ModuleList([Quadratic((i + 1) * channels, rank, windows[i]) for i in range(2)])
            self.pos_features = nn.Sequential(
                nn.Dropout(0.02),
                nn.Conv2d(2 * channels, 4 * channels, 4, 2, 1),
                nn.CELU(0.2),
                nn.Dropout(0.02),
                nn.Conv2d(4 * channels, 8 * channels, 4, 2, 1),
                nn.CELU(0.2),
                nn.Dropout(0.02),
                nn.Conv2d(8 * channels, 1, 4),
            )

        def forward(self, x: Any) -> Any:
            h = self.convex_layers[0](self.quadratic_layers[0](x)) + self.quadratic_layers[1](x)
            return self.pos_features(functional.celu(h)).sum() + 0.005 * (x**2).sum()

    module = {"generator": Generator, "potential": Potential}[kind](**OPTIONS[size][kind])
    state = module.state_dict()
    weights = made_up({name: tuple(value.shape) for name, value in state.items() if value.is_floating_point()})
    module.load_state_dict(state | {name: torch.from_numpy(value) for name, value in weights.items()})
    return module.eval()


def torch_answers(module: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `answers`, channels last."""
    torch = pytest.importorskip("torch")
    channels_first = x if x.ndim == 1 else x.transpose(2, 0, 1)
    tensor = torch.from_numpy(channels_first.copy())[None].requires_grad_(True)
    out = module(tensor)
    (out if out.ndim == 0 else 0.5 * (out**2).sum()).backward()
    image = out.detach().numpy() if out.ndim == 0 else out.detach().numpy()[0].transpose(1, 2, 0)
    gradient = tensor.grad.numpy()[0]
    return image, gradient if x.ndim == 1 else gradient.transpose(1, 2, 0)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference / largest number."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("size", ["small", "full"])
@pytest.mark.parametrize("kind", ["generator", "potential"])
def test_outputs_and_gradients_are_pytorchs(kind: str, size: str) -> None:
    """Catches any difference of topology, layout, order, constant or padding, in the map as in its argument."""
    module = torch_module(kind, size)
    network = {"small": SMALL, "full": FULL}[size][kind]
    x = example(kind, 5 if size == "small" else 128)
    state = {name: value.numpy() for name, value in module.state_dict().items()}
    found, expected = answers(network, network.from_torch(state), x), torch_answers(module, x)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-4
    if size == "full":
        expected_size = {"generator": 24_004_675, "potential": 11_247_105}[kind]
        assert sum(parameter.numel() for parameter in module.parameters()) == expected_size


@pytest.fixture(scope="module")
def small() -> dict[str, tuple[Any, tuple[np.ndarray, np.ndarray]]]:
    """Params of the small networks, and their answers."""
    params = {kind: network.from_torch(made_up(network.torch_shapes)) for kind, network in SMALL.items()}
    return {kind: (params[kind], answers(SMALL[kind], params[kind], example(kind))) for kind in SMALL}


def check_record(generator: Any, potential: Any) -> None:
    """Compares answers with the record."""
    np.testing.assert_allclose(generator[0][::31, ::31], GENERATED, atol=1e-5)
    np.testing.assert_allclose(generator[1], GENERATORS_GRADIENT, atol=1e-4)
    np.testing.assert_allclose(potential[0], VALUE, atol=1e-3)
    np.testing.assert_allclose(potential[1][1::31, 1::31], POTENTIALS_GRADIENT, atol=1e-6)


def test_outputs_and_gradients_are_the_recorded_ones(small: Any) -> None:
    """Catches the same differences where PyTorch is not installed."""
    check_record(small["generator"][1], small["potential"][1])


def test_record_is_pytorchs() -> None:
    """Catches a record that was made by anything but PyTorch."""
    check_record(*(torch_answers(torch_module(kind, "small"), example(kind)) for kind in ("generator", "potential")))


def test_sizes_are_the_benchmarks() -> None:
    """Catches other widths than the files', and params that from_torch makes but init does not."""
    for kind, expected in (("generator", 24_004_675), ("potential", 11_247_105)):
        trained = {n: s for n, s in FULL[kind].torch_shapes.items() if not n.endswith(("running_mean", "running_var"))}
        assert sum(int(np.prod(shape)) for shape in trained.values()) == expected
    for kind, latent, shape in (("generator", (128,), (64, 64, 3)), ("potential", (64, 64, 3), ())):
        params = jax.eval_shape(FULL[kind].init, jax.random.key(0))
        out = jax.eval_shape(FULL[kind].apply, params, jax.ShapeDtypeStruct(latent, jnp.float32))
        assert (out.shape, out.dtype) == (shape, jnp.float32)
    # The normalisations' six numbers a channel become one, a bias.
    sizes = {kind: sum(leaf.size for leaf in jax.tree.leaves(init_shapes(FULL[kind]))) for kind in FULL}
    assert sizes == {"generator": 23_981_955, "potential": 11_247_105}


def init_shapes(network: TorchNetwork) -> Any:
    """Shapes and dtypes of the params."""
    return jax.eval_shape(network.init, jax.random.key(0))


@pytest.mark.parametrize("kind", ["generator", "potential"])
def test_params_are_those_of_init(kind: str, small: Any) -> None:
    """Catches a layer that is converted under another name or shape than the network asks for."""
    found = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), small[kind][0])
    assert found == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), init_shapes(SMALL[kind]))


def test_potential_is_strongly_convex(small: Any, x64: None) -> None:
    """Catches a wrong sign or activation: (grad D(x) - grad D(y)) . (x - y) >= 0.01 |x - y|^2 for convex D."""
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), small["potential"][0])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 64, 64, 3)), jnp.float64)
    x = x.at[3:].set(x[:3] + 0.01 * x[3:])  # pairs that are far away and pairs that are close
    gradient = jax.jit(
        jax.vmap(jax.grad(SMALL["potential"].apply, argnums=1), in_axes=(None, 0)),
        compiler_options={"xla_backend_optimization_level": 0},
    )(params, x)
    assert gradient.dtype == jnp.float64
    for i, j in ((0, 1), (1, 2), (0, 3), (1, 4), (2, 5)):
        difference = x[i] - x[j]
        product, square = jnp.vdot(gradient[i] - gradient[j], difference), jnp.vdot(difference, difference)
        assert float(product / square) > 0.01


def change(kind: str, **changes: Any) -> dict[str, np.ndarray]:
    """A state dict of made-up weights with some arrays replaced (a None drops one)."""
    names = {name.replace(".", "_"): name for name in SMALL[kind].torch_shapes}
    state = made_up(SMALL[kind].torch_shapes)
    state |= {names.get(name, name): value for name, value in changes.items()}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "generator",
            {"fc_weight": None, "label": np.zeros(3, np.float32), "conv_img_bias": np.zeros(7, np.float32)},
            (
                r"^state_dict must hold exactly .*, got missing: fc.weight; unexpected: label; of another shape:"
                r" conv_img.bias \(7,\) instead of \(3,\)$"
            ),
        ),
        (
            "generator",
            {"bn1d_bias": np.full(256, np.nan, np.float32)},
            r"^state_dict must hold finite floating-point numbers, got others in bn1d.bias$",
        ),
        (
            "generator",
            {"bn1d_bias": np.zeros(256, np.int64)},
            r"^state_dict must hold finite floating-point numbers, got others in bn1d.bias$",
        ),
        (
            "generator",
            {"bn1d_running_var": np.full(256, -1, np.float32)},
            r"^bn1d.running_var must be >= 0, got an entry -1$",
        ),
        (
            "potential",
            {"pos_features_7_weight": np.full((1, 16, 4, 4), -0.5, np.float32)},
            r"^pos_features.7.weight must be >= 0 \(else D is not convex\), got an entry -0.5$",
        ),
    ],
)
def test_other_state_dicts_are_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    """Catches weights of another network, or damaged ones, that would be taken for the benchmark's."""
    with pytest.raises(ValueError, match=message):
        SMALL[kind].from_torch(change(kind, **changes))


def test_names_are_counted_when_all_are_missing() -> None:
    """Catches pages of names: the file of another network."""
    with pytest.raises(ValueError, match=r"got missing: fc.weight, fc.bias, \S+, \S+ and \d+ more$"):
        SMALL["generator"].from_torch({})


def test_batch_counters_may_be_there_or_not(small: Any) -> None:
    """Catches files of old PyTorch (without the counters) or new (with) that are refused."""
    state = change("generator", **{"bn1d.num_batches_tracked": np.asarray(3)})
    found = SMALL["generator"].from_torch(state)
    jax.tree.map(np.testing.assert_array_equal, found, small["generator"][0])


def test_bad_arguments_are_refused(small: Any) -> None:
    """Catches a batch that is read as one image, integers, and sizes that cannot be."""
    params = small["potential"][0]
    with pytest.raises(ValueError, match=r"^x must be ONE example of shape \(64, 64, 3\) \(jax.vmap for a batch\)"):
        SMALL["potential"].apply(params, jnp.zeros((2, 64, 64, 3)))
    with pytest.raises(ValueError, match=r"^x must be floating point, got uint8$"):
        SMALL["potential"].apply(params, jnp.zeros((64, 64, 3), jnp.uint8))
    with pytest.raises(ValueError, match=r"^filters must be an integer >= 1, got 0$"):
        celeba64.generator(filters=0)
    with pytest.raises(ValueError, match=r"^rank must be an integer >= 1, got 1.5$"):
        celeba64.convex_potential(rank=1.5)  # type: ignore[arg-type]
