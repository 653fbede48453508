"""Files of `torch.save`, read without PyTorch and without running code from them.

A file of PyTorch >= 1.6 is a zip archive: `NAME/data.pkl`, a pickle of everything but the numbers, and one stored entry
`NAME/data/KEY` for each storage of numbers. A pickle is a program; here it may name the few constructors of dicts and
tensors, and each of them is replaced by one of this module's own. So nothing is ever imported or called.
"""

import pickle
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fvjax.data._types import DataError

_BFLOAT16 = "bfloat16"
_STORAGES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": _BFLOAT16,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "|i1",
    "ByteStorage": "|u1",
    "BoolStorage": "|b1",
}
_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # the first pickle in a file of PyTorch < 1.6
_ADVICE = "save it anew in PyTorch by torch.save(model.state_dict(), path)"
# What the unpickler and zipfile raise for a damaged or hostile stream: any operation on an object of a wrong type.
_DAMAGED = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    RuntimeError,
    TypeError,
    UnicodeError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a file of `torch.save(model.state_dict(), path)`, by name; no code of the file is run.

    =========================  ===========================================================================
    strides, offsets, sharing  as saved: every array is a read-only view of its storage, transposed or not
    bfloat16                   float32, which holds every bfloat16 exactly; numpy has no such type
    other types                float16, float32, float64, int8-int64, uint8, bool: as saved
    "module." (DataParallel)   dropped if every name begins with it
    device                     ignored: everything is in main memory
    =========================  ===========================================================================

    Args:
        path: of a zip file as PyTorch >= 1.6 writes it.

    Returns:
        Arrays by name, in the order of the file.

    Raises:
        DataError: (a ValueError, one line) if there is no such file, it is no zip file of PyTorch's (truncated,
            damaged, of PyTorch < 1.6), is big-endian, holds anything but a dict of tensors, or names a global that is
            not needed for one, such as `os.system`: the message names that global.
    """
    content = read_torch(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a dict of tensors, got {type(content).__name__}: {_ADVICE}")
    other = [str(name) for name, value in content.items() if not (isinstance(name, str) and _is_array(value))]
    if other or not content:
        found = _one_line(_some(other)) or "an empty one"
        raise DataError(f"{path} must hold a dict of tensors, got {found}: {_ADVICE}")
    if all(name.startswith("module.") for name in content):
        return {name.removeprefix("module."): value for name, value in content.items()}
    return dict(content)


def read_torch(path: str | Path) -> Any:
    """Everything that a file of `torch.save` holds: dicts, lists, numbers, and arrays for the tensors.

    Args:
        path: as in `read_state_dict`.

    Returns:
        What was saved; tensors and parameters are arrays as in `read_state_dict`.

    Raises:
        DataError: as `read_state_dict`, for whatever is not made of these.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(len(_LEGACY))
            if start == _LEGACY:
                raise DataError(f"{path} must be a zip file, got the format of PyTorch < 1.6: {_ADVICE}")
            if start[:4] != b"PK\x03\x04":
                raise DataError(f"{path} must be a zip file as PyTorch >= 1.6 writes it, got another kind: {_ADVICE}")
            with zipfile.ZipFile(file) as archive:
                return _read_archive(archive, path.stat().st_size)
    except DataError as error:
        raise error if str(error).startswith(str(path)) else DataError(f"{path} {error}") from error
    except FileNotFoundError as error:
        raise DataError(f"{path} must be a file of torch.save, and there is none") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or type(error).__name__})") from error
    except _DAMAGED as error:
        reason = _one_line(str(error)) or type(error).__name__
        raise DataError(f"{path} is damaged or no file of torch.save ({reason}): copy it anew") from error


def _read_archive(archive: zipfile.ZipFile, size: int) -> Any:
    """What an archive of `size` bytes holds. A DataError raised here lacks the path in front."""
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise DataError(f"must hold one entry NAME/data.pkl, as torch.save writes it, got {len(pickles)}")
    folder = pickles[0].removesuffix("data.pkl")
    kinds = {entry.compress_type for entry in entries.values()}
    if kinds != {zipfile.ZIP_STORED} or sum(entry.file_size for entry in entries.values()) > size:
        # Otherwise a small file could ask for any amount of memory.
        raise DataError(
            f"must hold stored entries, as torch.save writes them, got compressed or overlapping ones: {_ADVICE}"
        )
    if f"{folder}byteorder" in entries:  # absent before PyTorch 2.1, when all were little-endian in practice
        order = archive.read(f"{folder}byteorder").decode("ascii", "replace")
        if order != "little":
            raise DataError(f"must be little-endian, got {order!r}: save it anew on a little-endian machine")
    with archive.open(pickles[0]) as stream:
        return _Unpickler(stream, lambda key: archive.read(f"{folder}data/{key}")).load()


class _Storage(NamedTuple):
    """The numbers of one storage, flat."""

    numbers: np.ndarray


class _Dict(dict[Any, Any]):
    """Stands for dicts with attributes, such as the `_metadata` of a state dict: these are dropped."""

    def __setstate__(self, state: Any) -> None:
        del state


class _Kind(NamedTuple):
    """Stands for a type of storage."""

    dtype: str


class _Rebuild:
    """Stands for a function of PyTorch's that builds a tensor. Without attributes, so that no file can change it."""

    __slots__ = ()


class _RebuildTensor(_Rebuild):
    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> np.ndarray:
        """A view of `storage`; `rest` is requires_grad, hooks and, where bits like "negated" are set, metadata."""
        if not isinstance(storage, _Storage):
            raise ValueError(f"a tensor of a {type(storage).__name__}")
        if len(rest) > 2 and rest[2]:
            raise DataError(
                f"must hold plain tensors, got one with pending operations (conjugation, negation): {_ADVICE}"
            )
        numbers = storage.numbers
        if not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) != len(strides):
            raise ValueError(f"a tensor of shape {shape} and strides {strides}")
        if not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
            raise ValueError(f"a tensor of shape {shape}, strides {strides} and offset {offset}")
        empty = 0 in shape
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if not empty and last >= len(numbers):
            raise ValueError(f"a tensor that reads number {last} of a storage of {len(numbers)}")
        start = numbers[:0] if empty else numbers[offset:]
        steps = tuple(stride * numbers.itemsize for stride in strides)
        return np.lib.stride_tricks.as_strided(start, shape, steps, writeable=False)


class _RebuildParameter(_Rebuild):
    __slots__ = ()

    def __call__(self, data: Any, *rest: Any) -> np.ndarray:
        """The array itself; `rest` is requires_grad and hooks."""
        del rest
        if not _is_array(data):
            raise ValueError(f"a parameter of a {type(data).__name__}")
        return data


class _Unpickler(pickle.Unpickler):
    """Knows the globals of state dicts only."""

    def __init__(self, stream: Any, read: Callable[[str], bytes]) -> None:
        super().__init__(stream)
        self._read = read
        self._storages: dict[str, tuple[str, _Storage]] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        """What stands for `module.name`; anything unknown is refused and never imported."""
        if module == "torch" and name in _STORAGES:
            return _Kind(_STORAGES[name])
        known: Mapping[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): _Dict,
            ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
            ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
        }
        if (module, name) not in known:
            raise DataError(f"must hold tensors only, got {_one_line(f'{module}.{name}')}, which is not run: {_ADVICE}")
        return known[module, name]

    def persistent_load(self, pid: Any, /) -> _Storage:
        """The storage ("storage", kind, key, device, length); each is read once."""
        tag, kind, key, _, length = pid
        if tag != "storage" or not isinstance(kind, _Kind) or not isinstance(key, str) or type(length) is not int:
            raise ValueError("a storage that is not described as one")
        if key not in self._storages:
            self._storages[key] = (kind.dtype, _Storage(_numbers(self._read(key), kind.dtype, length)))
        dtype, storage = self._storages[key]
        if dtype != kind.dtype or len(storage.numbers) != length:
            raise ValueError(f"storage {key} is described in two ways")
        return storage


def _numbers(content: bytes, dtype: str, length: int) -> np.ndarray:
    """The numbers of one storage; a ValueError if there are more or fewer than `length`."""
    raw = np.dtype("<u2" if dtype == _BFLOAT16 else dtype)
    if len(content) != length * raw.itemsize:
        raise ValueError(f"a storage of {len(content)} bytes instead of {length * raw.itemsize}")
    numbers = np.frombuffer(content, raw)
    # A bfloat16 is the upper half of a float32.
    return (numbers.astype("<u4") << 16).view("<f4") if dtype == _BFLOAT16 else numbers


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def _one_line(text: str) -> str:
    """`text`, which a file may have chosen, fit for an error."""
    return " ".join(text.split())[:200]


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
