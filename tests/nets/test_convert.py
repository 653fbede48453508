"""Parameters from PyTorch and in files: torchcfm's numbers, every array exactly once, one line for bad input."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvjax import nets
from fvjax.nets import convert

CIFAR = ((32, 32, 3), {"dropout": 0.1})
TINY: tuple[Any, dict[str, Any]] = (
    (4, 4, 1),
    {
        "channels": 32,
        "res_blocks": 1,
        "multipliers": (1, 2),
        "attention": (4,),
        "heads": 2,
        "head_channels": None,
        "groups": 32,
    },
)
MNIST: tuple[Any, dict[str, Any]] = (
    (28, 28, 1),
    {**TINY[1], "multipliers": (1, 2, 2), "attention": (28,), "heads": 1},
)
FLAGS = "--dims 4 4 1 --channels 32 --res-blocks 1 --multipliers 1 2 --attention 4 --heads 2 --head-channels None"
FLAGS = [*FLAGS.split(), "--groups", "32"]
# What torchcfm 1.0.7 answers with the weights of `made_up`: the four pixels in the middle, for each of three times.
TORCHCFMS_ANSWER = [
    [[0.11789531, -0.35433599], [0.68529844, 0.35003245]],
    [[0.29494178, 0.66996425], [0.66021031, 0.69228423]],
    [[0.11245726, 0.60505921], [0.45517132, 0.83221972]],
]


def made_up(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights that any machine can make again, none of them zero, of the size of trained ones."""
    made = {}
    for index, (name, shape) in enumerate(sorted(shapes.items())):
        values = np.random.default_rng(index).normal(size=shape) / np.sqrt(max(1, np.prod(shape[1:])))
        made[name] = np.asarray(values if len(shape) > 1 else 0.5 + 0.3 * values, np.float32)
    return made


def example(dims: tuple[int, ...], n: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Times 0, ..., 1 and images, [n, H, W, C]."""
    x = np.cos(np.arange(n * np.prod(dims)) ** 1.1).reshape(n, *dims)
    return np.linspace(0.0, 1.0, n, dtype=np.float32), np.asarray(x, np.float32)


def answers(dims: Any, options: dict[str, Any], params: Any) -> np.ndarray:
    """Ours, for `example`."""
    t, x = example(dims)
    field = jax.vmap(nets.unet(dims, **options).apply, in_axes=(None, 0, 0))
    if dims == TINY[0]:  # where compiling costs more than running
        field = jax.jit(field, compiler_options={"xla_backend_optimization_level": 0})
    else:
        field = jax.jit(field)
    return np.asarray(field(params, jnp.asarray(t), jnp.asarray(x)))


def torchcfm_model(dims: Any, options: dict[str, Any]) -> Any:
    """The peer with the weights of `made_up`; skips where it is not installed."""
    unet = pytest.importorskip("torchcfm.models.unet.unet", reason="the peer is installed for benchmarks only")
    torch = pytest.importorskip("torch")
    given = {"channels": 128, "res_blocks": 2, "multipliers": (1, 2, 2, 2), "attention": (16,), "heads": 4, **options}
    height, width, channels = dims
    model = unet.UNetModelWrapper(
        (channels, height, width),
        given["channels"],
        given["res_blocks"],
        channel_mult=list(given["multipliers"]),
        num_heads=given["heads"],
        num_head_channels=given.get("head_channels", 64) or -1,
        attention_resolutions=",".join(map(str, given["attention"])),
        dropout=given.get("dropout", 0.0),
    )
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(value) for name, value in made_up(shapes).items()})
    return model.eval()


def torchcfms_answers(model: Any, dims: Any) -> np.ndarray:
    """The peer's, for `example`, channels last."""
    torch = pytest.importorskip("torch")
    t, x = (torch.from_numpy(a) for a in example(dims))
    with torch.no_grad():
        return model(t, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()


def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """The command line as a user runs it."""
    line = [sys.executable, "-m", "fvjax.nets.convert", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("dims", "options"), [TINY, MNIST, CIFAR], ids=["tiny", "mnist", "cifar"])
def test_output_is_torchcfms(dims: Any, options: dict[str, Any]) -> None:
    """Catches any difference of topology, layout, constant or order, also behind the layers that begin at zero."""
    model = torchcfm_model(dims, options)
    expected = torchcfms_answers(model, dims)
    params = convert.from_torch(model.state_dict(), dims, **options)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(answers(dims, options, params), expected, atol=1e-4)
    if dims == CIFAR[0]:
        assert sum(value.numel() for value in model.state_dict().values()) == 35_746_307


def test_output_is_the_recorded_one() -> None:
    """Catches the same without the peer: numbers of torchcfm 1.0.7 for one tiny network."""
    params = convert.from_torch(made_up(convert.torch_shapes(TINY[0], **TINY[1])), TINY[0], **TINY[1])
    np.testing.assert_allclose(answers(*TINY, params)[:, 1:3, 1:3, 0], TORCHCFMS_ANSWER, atol=1e-4)


def test_recorded_output_is_torchcfms() -> None:
    """Catches a record that was made by anything but the peer."""
    found = torchcfms_answers(torchcfm_model(*TINY), TINY[0])
    np.testing.assert_allclose(found[:, 1:3, 1:3, 0], TORCHCFMS_ANSWER, atol=1e-5)


def test_command_converts_a_training_checkpoint(tmp_path: Path) -> None:
    """Catches the wrong entry of a checkpoint, DataParallel's prefix, and a file that load_params cannot read."""
    model = torchcfm_model(*TINY)
    torch = pytest.importorskip("torch")
    weights = model.state_dict()
    zeros = {f"module.{name}": torch.zeros_like(value) for name, value in weights.items()}
    ema = {f"module.{name}": value for name, value in weights.items()}
    optimizer = torch.optim.Adam(model.parameters()).state_dict()
    torch.save({"net_model": zeros, "ema_model": ema, "optim": optimizer, "step": 3}, tmp_path / "in.pt")
    torch.save(weights, tmp_path / "plain.pt")
    run = command(tmp_path / "in.pt", tmp_path / "out.npz", "--key", "ema_model", *FLAGS)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines()[-1].startswith(f"parameters: {tmp_path / 'out.npz'} (")
    params = convert.load_params(tmp_path / "out.npz")
    chex.assert_trees_all_equal(params, convert.from_torch(weights, TINY[0], **TINY[1]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pt", "out.npz", "plain.pt"]
    np.testing.assert_allclose(answers(*TINY, params), torchcfms_answers(model, TINY[0]), atol=1e-4)
    for name, options, message in [
        ("in.pt", [], "--key must name one of the entries of .* (net_model, ema_model, optim), got none"),
        ("in.pt", ["--key", "ema"], "--key must be one of the entries of .* (net_model, ema_model, optim), got ema"),
        ("in.pt", ["--key", "optim"], "must hold a dict of tensors, got state, param_groups"),
        ("plain.pt", ["--multipliers", "1", "1"], "state_dict must hold exactly the arrays of this architecture"),
        ("plain.pt", ["--groups", "None"], "groups must be 32 as in torchcfm, got 16 groups of 32 channels"),
    ]:
        check_refusal(tmp_path, name, options, message)


def check_refusal(folder: Path, name: str, options: list[str], message: str) -> None:
    """The command's function refuses with one line that holds the parts of `message`; nothing is written."""
    import tyro

    arguments = [str(folder / name), str(folder / "new.npz"), *FLAGS, *options]
    config = tyro.cli(convert.Config, args=arguments, config=(tyro.conf.PositionalRequiredArgs,))
    with pytest.raises(ValueError, match=".*") as caught:
        convert.convert(config)
    found = str(caught.value)
    assert all(part in found for part in message.split(".*")), found
    assert "\n" not in found
    assert not (folder / "new.npz").exists()


class Sneaky:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return print, ("code ran",)


def test_command_refuses_files_that_are_no_weights(tmp_path: Path) -> None:
    """Catches a pickle whose code is run, and PyTorch's pages of advice instead of one line."""
    torch = pytest.importorskip("torch")
    torch.save({"weight": Sneaky()}, tmp_path / "sneaky.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Sneaky()))
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({}, tmp_path / "nothing.pt")
    for name, message in [
        ("sneaky.pt", "must hold tensors only, got .*print, which is not run"),
        ("old.pt", "must be a zip file as PyTorch >= 1.6 writes it"),
        ("empty.pt", "must be a zip file as PyTorch >= 1.6 writes it"),
        ("text.pt", "must be a zip file as PyTorch >= 1.6 writes it"),
        ("list.pt", "must hold a dict of tensors, got list"),
        ("nothing.pt", "must hold a dict of tensors, got an empty one"),
    ]:
        check_refusal(tmp_path, name, [], message)
    run = command(tmp_path / "sneaky.pt", tmp_path / "out.npz", *FLAGS)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1


def test_command_without_a_file(tmp_path: Path) -> None:
    """Catches a traceback, or another exit code than 2."""
    run = command(tmp_path / "none.pt", tmp_path / "out.npz")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == f"error: {tmp_path / 'none.pt'} must be a file of torch.save, and there is none\n"


def test_every_array_is_used_once_and_every_parameter_filled() -> None:
    """Catches an array that is dropped in silence, two names for one array, and errors that come one at a time."""
    state = made_up(convert.torch_shapes(TINY[0], **TINY[1]))
    params = convert.from_torch({f"module.{name}": value for name, value in state.items()}, TINY[0], **TINY[1])
    shapes = jax.eval_shape(nets.unet(TINY[0], **TINY[1]).init, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, shapes)
    sums = sorted(float(np.sum(value, dtype=np.float64)) for value in state.values())
    leaves = sorted(float(np.sum(np.asarray(leaf), dtype=np.float64)) for leaf in jax.tree.leaves(params))
    np.testing.assert_allclose(leaves, sums, atol=1e-9)
    del state["out.2.bias"]
    state |= {"label_emb.weight": np.zeros((10, 128)), "time_embed.0.bias": np.zeros(7), "out.0.bias": np.zeros(8)}
    with pytest.raises(ValueError, match=r"^state_dict must hold exactly the arrays") as caught:
        convert.from_torch(state, TINY[0], **TINY[1])
    message = str(caught.value)
    assert "got missing: out.2.bias; unexpected: label_emb.weight; of another shape: " in message
    assert "time_embed.0.bias (7,) instead of (128,)" in message
    assert "out.0.bias (8,) instead of (32,)" in message
    with pytest.raises(ValueError, match=r"missing: \S+, \S+, \S+, \S+ and \d+ more$"):
        convert.from_torch({}, TINY[0], **TINY[1])


def test_other_groups_than_torchcfms_are_refused() -> None:
    """Catches a converted network that would compute something else: groups leave no trace in the arrays."""
    with pytest.raises(ValueError, match="^groups must be 32 as in torchcfm, got 16 groups of 32 channels"):
        convert.from_torch({}, TINY[0], **{**TINY[1], "groups": None})
    with pytest.raises(ValueError, match="^channels must be a multiple of 32 and groups must be 32"):
        convert.from_torch({}, TINY[0], **{**TINY[1], "groups": None, "channels": 80})


def test_params_survive_a_file(tmp_path: Path) -> None:
    """Catches names or bits that change, a name that is taken for an argument of numpy's, and a half-written file."""
    params = {"file": jnp.arange(3.0), "a": {"b": {"kernel": jnp.ones((2, 1), jnp.float16)}, "c": jnp.array(-0.0)}}
    path = tmp_path / "params"
    convert.save_params(path, params)
    chex.assert_trees_all_equal(convert.load_params(path), params)
    chex.assert_trees_all_equal_dtypes(convert.load_params(path), params)
    before = path.read_bytes()
    for bad, message in [
        ({"a": [jnp.ones(2)]}, r"^params must be nested dicts with names without '/', got \['a'\]\[0\]"),
        ({"a/b": jnp.ones(2)}, r"^params must be nested dicts with names without '/', got \['a/b'\]"),
        ({"a": jnp.ones(2, jnp.bfloat16)}, r"^params must be of a dtype of numpy's own .* got bfloat16"),
        (jnp.ones(2), r"^params must be nested dicts"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert.save_params(path, bad)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["params"]


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps([1]), b"\x93NUMPY"])
def test_files_that_are_no_params_are_refused(tmp_path: Path, content: bytes) -> None:
    """Catches numpy's advice to unpickle what is no array."""
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.npz must be an npz file of arrays, as save_params writes it$"):
        convert.load_params(path)
