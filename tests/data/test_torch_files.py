"""PyTorch's files without PyTorch: every layout of numbers; no file runs code, takes memory or ends in a trace."""

import copy
import io
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from fvjax.data import DataError
from fvjax.data._torch_files import read_state_dict, read_torch

STORAGES = {"<f4": "Float", "<f8": "Double", "<f2": "Half", "<i8": "Long", "<i4": "Int", "|u1": "Byte", "|b1": "Bool"}
NUMBERS = np.arange(12, dtype="<f4")


def text(value: str) -> bytes:
    """A string in a pickle."""
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def integers(*values: int) -> bytes:
    """A tuple of integers in a pickle."""
    return b"(" + b"".join(b"J" + value.to_bytes(4, "little", signed=True) for value in values) + b"t"


def tensor(
    key: str, kind: str, length: int, view: tuple[int, Any, Any], *, rest: bytes = b"\x89ccollections\nOrderedDict\n)R"
) -> bytes:
    """A call of _rebuild_tensor_v2 in a pickle: `view` is (offset, shape, strides)."""
    offset, shape, strides = view
    storage = b"(" + text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(key) + text("cpu")
    storage += integers(length)[1:-1] + b"tQ"
    numbers = integers(offset)[1:-1] + integers(*shape) + integers(*strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers + rest + b"tR"


def pickled(values: Mapping[str, bytes]) -> bytes:
    """A pickle of an ordered dict with attributes, as a module's state dict is one."""
    items = b"".join(text(name) + value for name, value in values.items())
    return b"\x80\x02ccollections\nOrderedDict\n)R(" + items + b"u}" + text("_metadata") + b"}sb."


def write(path: Path, program: bytes, storages: Mapping[str, bytes], **entries: bytes) -> Path:
    """A zip file as torch.save writes it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)
        for name, content in ({"version": b"3\n", "byteorder": b"little"} | entries).items():
            archive.writestr(f"archive/{name}", content)
    return path


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """Contiguous arrays, one storage each."""
    programs, storages = {}, {}
    for index, (name, array) in enumerate(arrays.items()):
        strides = [step // array.itemsize for step in array.strides]
        kind = STORAGES[array.dtype.str]
        programs[name] = tensor(str(index), kind, array.size, (0, array.shape, strides))
        storages[str(index)] = array.tobytes()
    return write(path, pickled(programs), storages)


def one(path: Path, view: tuple[int, Any, Any], **options: Any) -> Path:
    """A file of one tensor, a view of the numbers 0 ... 11."""
    return write(path, pickled({"a": tensor("0", "Float", 12, view, **options)}), {"0": NUMBERS.tobytes()})


def refusal(path: Path) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(DataError) as caught:
        read_state_dict(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(f"{path} ")


@pytest.mark.parametrize("dtype", STORAGES)
def test_every_type_of_numbers_is_read(tmp_path: Path, dtype: str) -> None:
    """Catches a type that is read as another, lost names and order, and arrays of no dimension or no numbers."""
    values = np.asarray(np.random.default_rng(0).integers(0, 2 if dtype == "|b1" else 99, (3, 2, 4)), dtype)
    arrays = {"b.weight": values, "a": values[0, 0, 0], "0": values[:0]}
    found = read_state_dict(save(tmp_path / "x.pt", arrays))
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_bfloat16_becomes_float32(tmp_path: Path) -> None:
    """Catches bits that are taken for integers or for half precision; inf and the sign of zero survive."""
    bits = np.asarray([0x3F80, 0xC049, 0x7F80, 0x8000, 0x0001], "<u2")  # 1, -3.140625, inf, -0, the smallest
    program = pickled({"a": tensor("0", "BFloat16", 5, (0, (5,), (1,)))})
    found = read_state_dict(write(tmp_path / "x.pt", program, {"0": bits.tobytes()}))["a"]
    expected = np.asarray([1, -3.140625, np.inf, -0.0, 2.0**-133], np.float32)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ((0, (3, 4), (4, 1)), NUMBERS.reshape(3, 4)),
        ((0, (4, 3), (1, 4)), NUMBERS.reshape(3, 4).T),
        ((5, (2, 3), (4, 1)), NUMBERS.reshape(3, 4)[1:, 1:]),
        ((1, (3, 2), (4, 2)), NUMBERS.reshape(3, 4)[:, 1::2]),
        ((2, (2, 3), (0, 1)), np.stack([NUMBERS[2:5]] * 2)),
        ((11, (), ()), NUMBERS[11]),
        ((0, (3, 0), (1, 1)), np.zeros((3, 0))),
        ((40, (0,), (1,)), np.zeros(0)),
    ],
)
def test_views_are_read(tmp_path: Path, view: Any, expected: np.ndarray) -> None:
    """Catches a transposed, cut-out, strided or expanded tensor that is read as if it were contiguous."""
    found = read_state_dict(one(tmp_path / "x.pt", view))["a"]
    np.testing.assert_array_equal(found, expected)
    assert found.shape == expected.shape
    assert not found.flags.writeable


@pytest.mark.parametrize(
    "view",
    [
        (0, (13,), (1,)),
        (1, (12,), (1,)),
        (12, (), ()),
        (0, (3, 4), (5, 1)),
        (-1, (2,), (1,)),
        (0, (-2,), (1,)),
        (3, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, (2**31 - 1, 2**31 - 1, 2**31 - 1), (0, 0, 0)),
    ],
)
def test_views_outside_the_storage_are_refused(tmp_path: Path, view: Any) -> None:
    """Catches the memory of the process being read as numbers, and a file of bytes that asks for exabytes."""
    assert refusal(one(tmp_path / "x.pt", view)).startswith("is damaged or no file of torch.save (")


def test_tensors_share_a_storage(tmp_path: Path) -> None:
    """Catches a storage that is read twice, and one that two tensors take for different types."""
    views = {"a": tensor("0", "Float", 12, (0, (12,), (1,))), "b": tensor("0", "Float", 12, (6, (6,), (1,)))}
    found = read_state_dict(write(tmp_path / "x.pt", pickled(views), {"0": NUMBERS.tobytes()}))
    assert np.shares_memory(found["a"], found["b"])
    for other in (tensor("0", "Int", 12, (0, (1,), (1,))), tensor("0", "Float", 11, (0, (1,), (1,)))):
        write(tmp_path / "y.pt", pickled({"a": views["a"], "b": other}), {"0": NUMBERS.tobytes()})
        assert "storage 0 is described in two ways" in refusal(tmp_path / "y.pt")


def test_parameters_and_prefixes(tmp_path: Path) -> None:
    """Catches nn.Parameter, DataParallel's names, and a prefix that only some names have."""
    plain = tensor("0", "Float", 12, (0, (12,), (1,)))
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + plain + b"\x88ccollections\nOrderedDict\n)RtR"
    for names, expected in (
        (["module.a", "module.b"], ["a", "b"]),
        (["module.a", "b"], ["module.a", "b"]),
    ):
        program = pickled(dict(zip(names, [parameter, plain], strict=True)))
        found = read_state_dict(write(tmp_path / "x.pt", program, {"0": NUMBERS.tobytes()}))
        assert list(found) == expected
        np.testing.assert_array_equal(found[expected[0]], NUMBERS)


def hostile(code: str) -> dict[str, bytes]:
    """Programs that would run `code` if their globals were real, by global."""
    command = text(code)
    return {
        "posix.system": b"\x80\x02cposix\nsystem\n(" + command + b"tR.",
        "os.system": b"\x80\x02cos\nsystem\n(" + command + b"tR.",
        "builtins.exec": b"\x80\x02cbuiltins\nexec\n(" + command + b"tR.",
        "builtins.eval": b"\x80\x04" + b"\x8c\x08builtins\x8c\x04eval\x93(" + command + b"tR.",
        "subprocess.Popen": b"\x80\x02(csubprocess\nPopen\n" + command + b"o.",
        "torch.load": b"\x80\x02ctorch\nload\n(" + command + b"tR.",
        "torch.storage._load_from_bytes": b"\x80\x02ctorch.storage\n_load_from_bytes\n(" + command + b"tR.",
        "collections.OrderedDict.__init__": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93)R.",
        "a b" + 197 * "c": b"\x80\x04" + text("a\nb" + 999 * "c") + text("x") + b"\x93.",
        "fvjax.data.load": b"\x80\x02(" + command + b"ifvjax.data\nload\n.",
    }


@pytest.mark.parametrize("name", hostile(""))
def test_code_is_refused_and_not_run(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a reader that imports or calls what a file names: the mark that the code would leave is not there."""
    monkeypatch.chdir(tmp_path)
    program = hostile("touch mark")[name]
    pickletools.dis(program, out=io.StringIO())  # well-formed, or it would be refused for nothing
    assert f"must hold tensors only, got {name}, which is not run" in refusal(write(tmp_path / "x.pt", program, {}))
    assert not (tmp_path / "mark").exists()


class Sneaky:
    """What runs code when it is unpickled by any other reader."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, ("touch mark",)


def test_a_real_hostile_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches what hand-written programs may miss: the same of pickle.dumps, at every protocol, behind a tensor."""
    monkeypatch.chdir(tmp_path)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        program = pickle.dumps({"weight": [1.0, Sneaky()]}, protocol)
        assert "must hold tensors only, got posix.system" in refusal(write(tmp_path / "x.pt", program, {}))
    pickle.loads(program)  # the mark can be made
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n}" + text("__defaults__") + b"(tsb.",  # attributes of the reader's own
        b"ctorch._utils\n_rebuild_tensor_v2\n}N}" + text("x") + b"K\x01s\x86b.",
        b"ctorch\nFloatStorage\nN}" + text("dtype") + text("<f8") + b"s\x86b.",
        b"ccollections\nOrderedDict\nN}" + text("keys") + b"Ns\x86b.",
        b"ctorch\nFloatStorage\n)R.",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"ctorch._utils\n_rebuild_parameter\n(K\x01tR.",
        b"(K\x01K\x02tQ.",
        b"K\x01Q.",
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("../version") + text("cpu") + b"K\x01tQ.",
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("9") + text("cpu") + b"K\x01tQ.",
        b"(" + text("other") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x01tQ.",
        b"\x82\x01.",  # a global by a number that nobody registered
        b"r\xff\xff\xff\xff.",
        b"0.",
        b"}",
        b"",
        b"\xff",
    ],
)
def test_senseless_programs_are_refused(tmp_path: Path, program: bytes) -> None:
    """Catches a trace of the unpickler, and a file that changes this module for the files after it."""
    path = write(tmp_path / "x.pt", b"\x80\x02" + program, {"0": NUMBERS.tobytes()})
    assert refusal(path).startswith("is damaged or no file of torch.save (")
    np.testing.assert_array_equal(read_state_dict(one(tmp_path / "y.pt", (0, (12,), (1,))))["a"], NUMBERS)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=200)
def test_damage_is_one_line_or_nothing(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Catches any other exception for a file with a changed, missing or added byte, and changed numbers (CRC-32)."""
    folder = tmp_path_factory.mktemp("damage")
    arrays = {"a": NUMBERS, "b": np.arange(3)}
    content = bytearray(save(folder / "x.pt", arrays).read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content = content[:position]
    (folder / "x.pt").write_bytes(content)
    try:
        found = read_state_dict(folder / "x.pt")
    except DataError:
        refusal(folder / "x.pt")
    else:  # in a date or another field that does not matter
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"",
            "must be a zip file as PyTorch >= 1.6 writes it, got another kind: save it anew in PyTorch by torch.save(",
        ),
        (b"hello", "must be a zip file as PyTorch >= 1.6 writes it, got another kind"),
        (pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"\x80\x02M\xe9\x03.", "got the format of PyTorch < 1.6"),
        (pickle.dumps({"a": 1}, 2), "got another kind"),
        (b"PK\x03\x04", "is damaged or no file of torch.save (File is not a zip file): copy it anew"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    """Catches a trace for an old, an empty or a foreign file."""
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    assert message in refusal(path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    """Catches an OSError that reaches the user."""
    assert refusal(tmp_path / "x.pt") == "must be a file of torch.save, and there is none"
    assert refusal(tmp_path) == "cannot be read (Is a directory)"


def test_archives_that_are_not_torchs_are_refused(tmp_path: Path) -> None:
    """Catches numbers in the wrong byte order, a compression bomb, a storage that is too short, an npz file."""
    path = tmp_path / "x.pt"
    program = pickled({"a": tensor("0", "Float", 12, (0, (12,), (1,)))})
    write(path, program, {"0": NUMBERS.tobytes()}, byteorder=b"big")
    assert refusal(path).startswith("must be little-endian, got 'big'")
    write(path, program, {"0": NUMBERS.tobytes()[:-1]})
    assert "a storage of 47 bytes instead of 48" in refusal(path)
    np.savez(tmp_path / "x.npz", a=NUMBERS)
    assert refusal(tmp_path / "x.npz").startswith("must hold one entry NAME/data.pkl, as torch.save writes it, got 0")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", bytes(1 << 20))
    assert refusal(path).startswith(
        "must hold stored entries, as torch.save writes them, got compressed or overlapping"
    )
    write(path, program, {"0": NUMBERS.tobytes()})
    with zipfile.ZipFile(path, "a") as archive:
        for index in range(1, 99):  # the same bytes under many names
            again = copy.copy(archive.getinfo("archive/data/0"))
            again.filename, again.file_size, again.compress_size = f"archive/data/{index}", 1000, 1000
            archive.filelist.append(again)
        archive.writestr("archive/end", b"")
    assert "compressed or overlapping ones" in refusal(path)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"](K\x01e.", "must hold a dict of tensors, got list: save it anew in PyTorch by torch.save("),
        (b"}.", "must hold a dict of tensors, got an empty one"),
        (b"}" + text("step") + b"K\x01s.", "must hold a dict of tensors, got step: "),
        (b"}" + text("model") + b"}s.", "must hold a dict of tensors, got model: "),
        (b"}K\x01N" + b"s.", "must hold a dict of tensors, got 1: "),
        (b"}" + text("a\nb") + b"Ns.", "must hold a dict of tensors, got a b: "),
    ],
)
def test_contents_that_are_no_state_dict_are_refused(tmp_path: Path, program: bytes, message: str) -> None:
    """Catches a training checkpoint or a list that is taken for weights."""
    assert message in refusal(write(tmp_path / "x.pt", b"\x80\x02" + program, {}))


def test_negated_views_are_refused(tmp_path: Path) -> None:
    """Catches numbers of the wrong sign: PyTorch keeps a pending negation beside the numbers."""
    rest = b"\x89ccollections\nOrderedDict\n)R}" + text("neg") + b"\x88s"
    assert "must hold plain tensors, got one with pending operations" in refusal(
        one(tmp_path / "x.pt", (0, (12,), (1,)), rest=rest)
    )


def test_checkpoints_of_a_training_are_read(tmp_path: Path) -> None:
    """Catches an entry beside the weights that read_torch, which has no opinion about entries, would refuse."""
    model = pickled({"a": tensor("0", "Float", 12, (0, (12,), (1,)))})[2:-1]
    program = (
        b"\x80\x02}(" + text("model") + model + text("step") + b"K\x03" + text("lr") + b"G?\xe0" + bytes(6) + b"u."
    )
    found = read_torch(write(tmp_path / "x.pt", program, {"0": NUMBERS.tobytes()}))
    assert (list(found), found["step"], found["lr"]) == (["model", "step", "lr"], 3, 0.5)
    np.testing.assert_array_equal(found["model"]["a"], NUMBERS)


def test_files_of_pytorch(tmp_path: Path) -> None:
    """Catches a difference between hand-written files and PyTorch's own: modules, views, types, protocols."""
    torch = pytest.importorskip("torch", reason="the peer is installed for benchmarks only")
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Linear(3, 2).bfloat16())
    state = dict(module.state_dict())
    numbers = torch.arange(24.0).reshape(4, 6)
    state |= {
        "t": numbers.T,
        "cut": numbers[1:, ::2],
        "wide": numbers[0].expand(2, 6),
        "p": torch.nn.Parameter(numbers),
    }
    state |= {"h": numbers.half(), "i": numbers.int(), "b": numbers > 3, "s": numbers.short(), "d": numbers.double()}
    for protocol in (2, 4, 5):
        torch.save(state, tmp_path / "x.pt", pickle_protocol=protocol)
        found = read_state_dict(tmp_path / "x.pt")
        assert list(found) == list(state)
        for name, value in state.items():
            expected = (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
            assert found[name].dtype == expected.dtype
            np.testing.assert_array_equal(found[name], expected)
    torch.save(torch.nn.DataParallel(module).state_dict(), tmp_path / "x.pt")
    assert list(read_state_dict(tmp_path / "x.pt")) == list(module.state_dict())
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert "got the format of PyTorch < 1.6" in refusal(tmp_path / "x.pt")
    torch.save(module, tmp_path / "x.pt")
    assert "must hold tensors only, got torch.nn.modules.container.Sequential" in refusal(tmp_path / "x.pt")
    torch.save({"a": torch.ones(2, dtype=torch.complex64)}, tmp_path / "x.pt")
    assert "must hold tensors only, got torch.ComplexFloatStorage" in refusal(tmp_path / "x.pt")
