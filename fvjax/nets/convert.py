"""Parameters of PyTorch's flow-matching U-Net as those of `fvjax.nets.unet`, and parameters in npz files.

    python -m fvjax.nets.convert IN.pt OUT.npz --key ema_model --dims 32 32 3 --channels 128

reads a checkpoint of torchcfm's training, or any file of `torch.save(model.state_dict(), IN.pt)`, and writes OUT.npz
for `load_params`. The options are those of `unet`. PyTorch is not needed, and no code of the file is run. It takes
seconds.
"""

import dataclasses
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict, unflatten_dict

from fvjax.data._torch_files import read_torch
from fvjax.nets._state_dict import check_arrays, some
from fvjax.nets.unet import number_of_groups, unet
from fvjax.types import Array, Params

TORCH_GROUPS = 32
"""Groups of every normalisation in torchcfm."""

_TORCH = {
    "time_in": "time_embed.0",
    "time_out": "time_embed.2",
    "norm": "out.0",
    "output": "out.2",
    "conv": "",
    "down": ".op",
    "up": ".conv",
    "res/norm_in": ".in_layers.0",
    "res/conv_in": ".in_layers.2",
    "res/time": ".emb_layers.1",
    "res/norm_out": ".out_layers.0",
    "res/conv_out": ".out_layers.3",
    "res/skip": ".skip_connection",
    "attention/norm": ".norm",
    "attention/qkv": ".qkv",
    "attention/output": ".proj_out",
}
"""Our name of an array, without the block before it and the leaf behind it -> torchcfm's."""


def from_torch(state_dict: Mapping[str, Any], dims: tuple[int, int, int], **options: Any) -> Params:
    r"""Returns the parameters of `unet(dims, **options)` from those of torchcfm's `UNetModelWrapper`.

    ===================  =====================  =====================
    array                PyTorch                here
    ===================  =====================  =====================
    convolution          [out, in, h, w]        [h, w, in, out]
    linear               [out, in]              [in, out]
    attention's linear   [out, in, 1]           [in, out]
    ===================  =====================  =====================

    The names tell neither the number of heads nor the order of the channels of q, k and v: `heads` must be the model's
    (channels / num_head_channels), and the order that of `use_new_attention_order=False`, torchcfm's default.

    Args:
        state_dict: arrays or CPU tensors by name; "module." before all of them (DataParallel) is dropped.
        dims: (H, W, C) of one image.
        **options: the keyword arguments of `unet`. torchcfm's attention at `image_size // resolution`, rounded down, is
            here `attention` at the width that a level really has: (28,) for its "16" at 28 pixels.

    Returns:
        The nested dict of `unet(dims, **options).init`, in float32.

    Raises:
        ValueError: if an array is missing, not used, or of another shape than this architecture's (one error names all
            three), if `unet` refuses the options, or if its normalisations have not torchcfm's 32 groups.
    """
    names = _names(dims, options)
    if all(name.startswith("module.") for name in state_dict):
        state_dict = {name.removeprefix("module."): value for name, value in state_dict.items()}
    shapes = dict(names.values())
    check_arrays(state_dict, shapes)
    arrays = {ours: _from_torch_layout(_array(state_dict[theirs])) for ours, (theirs, _) in names.items()}
    return unflatten_dict(arrays, sep="/")


def torch_shapes(dims: tuple[int, int, int], **options: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all arrays that `from_torch` expects.

    Args:
        dims: as in `from_torch`.
        **options: as in `from_torch`.

    Returns:
        Shapes by torchcfm's names.

    Raises:
        ValueError: if `unet` refuses the options, or if its normalisations have not torchcfm's 32 groups.
    """
    return dict(_names(dims, options).values())


def _names(dims: tuple[int, int, int], options: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our name -> torchcfm's name and shape."""
    leaves = flatten_dict(jax.eval_shape(unet(dims, **options).init, jax.random.key(0)), sep="/")
    _check_groups(leaves, options.get("groups"))
    return {name: (_torch_name(name, leaves), _torch_shape(name, leaf.shape)) for name, leaf in leaves.items()}


def _check_groups(leaves: Mapping[str, Any], groups: int | None) -> None:
    for channels in {leaf.shape[0] for name, leaf in leaves.items() if name.endswith("/scale")}:
        found = number_of_groups(channels, groups)
        if found != TORCH_GROUPS:
            rule = "groups" if channels % TORCH_GROUPS == 0 else "channels must be a multiple of 32 and groups"
            raise ValueError(f"{rule} must be 32 as in torchcfm, got {found} groups of {channels} channels")


def _torch_name(name: str, names: Iterable[str]) -> str:
    """torchcfm's name of ours: input_4_attention/qkv/kernel -> input_blocks.4.1.qkv.weight."""
    path, leaf = name.rsplit("/", 1)
    ending = "bias" if leaf == "bias" else "weight"
    part, *numbered = path.split("_", 2)
    if part not in {"input", "middle", "output"} or not numbered:
        return f"{_TORCH[path]}.{ending}"
    index, rest = numbered
    kind = rest.split("/")[0]
    if part == "middle":
        return f"middle_block.{index}{_TORCH[rest]}.{ending}"
    has_attention = f"{part}_{index}_attention/norm/bias" in names
    position = {"attention": 1, "up": 1 + has_attention}.get(kind, 0)
    return f"{part}_blocks.{index}.{position}{_TORCH[rest]}.{ending}"


def _torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 4:
        height, width, inputs, outputs = shape
        return outputs, inputs, height, width
    return (*shape[::-1], 1) if "_attention/" in name and len(shape) == 2 else shape[::-1]


def _from_torch_layout(array: np.ndarray) -> Array:
    if array.ndim == 3:
        array = array[:, :, 0]
    return jnp.asarray(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T)


def _array(value: Any) -> np.ndarray:
    """A tensor or an array in float32; numpy itself reads no half precision of PyTorch's."""
    return np.asarray(value.detach().float() if hasattr(value, "detach") else value, np.float32)


def save_params(path: str | Path, params: Params) -> None:
    """Writes parameters as an npz file, one array a leaf, its name the keys joined by "/"; whole or not at all.

    Args:
        path: of the file, which is replaced if it exists.
        params: nested dicts of arrays, with strings without "/" as keys.

    Raises:
        ValueError: if `params` is something else, or of a dtype that numpy's files do not know, such as bfloat16.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    arrays = {}
    for keys, leaf in leaves:
        names = [key.key if isinstance(key, jax.tree_util.DictKey) else key for key in keys]
        if not names or not all(isinstance(name, str) and name and "/" not in name for name in names):
            raise ValueError(f"params must be nested dicts with names without '/', got {jax.tree_util.keystr(keys)}")
        array = np.asarray(leaf)
        if array.dtype.kind not in "fiub":
            raise ValueError(f"params must be of a dtype of numpy's own (float32, ...), got {leaf.dtype}")
        arrays["/".join(names)] = array
    write_arrays(Path(path), arrays)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays of numpy's own dtypes as an npz file, under any names; whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        # Not np.savez, whose own arguments could not be names of arrays.
        with zipfile.ZipFile(partial, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, array, allow_pickle=False)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_params(path: str | Path) -> Params:
    """Reads parameters that `save_params` or this module's command wrote.

    Args:
        path: of the npz file.

    Returns:
        Nested dicts of arrays, as JAX holds them (float64 only under x64).

    Raises:
        ValueError: if the file is not an npz file of arrays.
        OSError: if it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: jnp.asarray(file[name]) for name in file.files}
    except (ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} must be an npz file of arrays, as save_params writes it") from error
    return unflatten_dict(arrays, sep="/")


def load_msgpack(path: str | Path) -> Params:
    """Reads parameters that `flax.serialization.to_bytes` or `msgpack_serialize` wrote.

    Args:
        path: of the file.

    Returns:
        Nested dicts of numpy arrays; what were lists or tuples are dicts with the keys "0", "1", ...

    Raises:
        ValueError: if it is no such file.
        OSError: if it cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        tree = msgpack_restore(content)
    except Exception as error:  # of msgpack, of many types
        raise ValueError(f"{path} must be a msgpack file of flax.serialization, got {_one_line(error)}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold nested dicts of arrays, got {type(tree).__name__}")
    return tree


@dataclasses.dataclass(frozen=True)
class Config:
    """Converts a PyTorch file of torchcfm's U-Net to parameters of fvjax.nets.unet."""

    source: Path
    """file of torch.save; read without running code from it"""
    target: Path
    """npz file to write; replaced if it exists"""
    key: str | None = None
    """entry of the file that holds the model, such as ema_model or net_model; None: the file is the model"""
    dims: tuple[int, int, int] = (32, 32, 3)
    """height, width and channels of one image"""
    channels: int = 128
    """channels of the first level"""
    res_blocks: int = 2
    """residual blocks of each level"""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """channels of each level, in units of --channels"""
    attention: tuple[int, ...] = (16,)
    """widths with attention"""
    heads: int | None = None
    """attention heads; None: from --head-channels"""
    head_channels: int | None = 64
    """channels of an attention head; None: from --heads"""
    groups: int | None = None
    """groups of each normalisation; 32 where a level has 32 channels"""


def convert(config: Config) -> int:
    """Converts a file as the command line does.

    Args:
        config: the command line.

    Returns:
        The number of parameters written.

    Raises:
        ValueError: if the file is unreadable, needs code, is older than PyTorch 1.6, or is not of this architecture.
    """
    options = dataclasses.asdict(config)
    source, target, key = (options.pop(name) for name in ("source", "target", "key"))
    params = from_torch(_entry(read_torch(source), source, key), options.pop("dims"), **options)
    try:
        save_params(target, params)
    except OSError as error:
        raise ValueError(f"{target} cannot be written: {_one_line(error)}") from error
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _entry(content: Any, path: Path, key: str | None) -> Mapping[str, Any]:
    """The entry `key` of the content, a dict of tensors."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(content).__name__}")
    models = [str(name) for name, value in content.items() if isinstance(value, Mapping)]
    if key is not None and key not in models:
        raise ValueError(f"--key must be one of the entries of {path} ({', '.join(models) or 'none'}), got {key}")
    if key is None and models:
        raise ValueError(f"--key must name one of the entries of {path} ({', '.join(models)}), got none")
    chosen = content if key is None else content[key]
    other = [
        str(name) for name, value in chosen.items() if not (isinstance(name, str) and isinstance(value, np.ndarray))
    ]
    if other or not chosen:
        raise ValueError(f"{path} must hold a dict of tensors, got {some(other) or 'an empty one'}")
    return chosen


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def main() -> None:
    """Parses the command line and converts; bad input is one line and exit code 2."""
    import tyro

    config = tyro.cli(Config, prog="python -m fvjax.nets.convert", config=(tyro.conf.PositionalRequiredArgs,))
    try:
        size = convert(config)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    sys.stdout.write(f"parameters: {config.target} ({size:,} numbers)\n")


if __name__ == "__main__":
    main()
