"""Torch checkpoints read without torch; malicious, truncated and legacy ones refused."""

import collections
import io
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from refalign_jax.convert.pickle_files import STORAGES, open_pickle_weights
from refalign_jax.convert.table import Entry, to_ours

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Name:
    """Pickles as the bare global `module.name`, which need not exist here."""

    def __init__(self, module, name):
        self.text = f"c{module}\n{name}\n".encode()


class View:
    """Pickles as torch pickles a tensor."""

    def __init__(self, storage, offset, shape, strides):
        self.arguments = (storage, offset, shape, strides, False, collections.OrderedDict())


class Storage:
    def __init__(self, kind, key, length):
        self.kind, self.key, self.length = kind, key, length


class Altered:
    """Pickles as an object to which a state is then given."""

    def __init__(self, target, state):
        self.target, self.state = target, state


class Pickler(pickle._Pickler):
    """The pure Python pickler, taught to write the globals and storages of torch without having it."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Name):
            self.write(obj.text)
        elif isinstance(obj, Storage):
            self.save(("storage", Name("torch", obj.kind), obj.key, "cpu", obj.length))
            self.write(pickle.BINPERSID)
        elif isinstance(obj, View):
            self.save(Name("torch._utils", "_rebuild_tensor_v2"))
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        elif isinstance(obj, Altered):
            self.save(obj.target)
            self.save(obj.state)
            self.write(pickle.BUILD)
        else:
            super().save(obj, save_persistent_id)


def write_checkpoint(path, content, storages=None, folder="archive/"):
    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{folder}data.pkl", stream.getvalue())
        archive.writestr(f"{folder}byteorder", b"little")
        for key, array in (storages or {}).items():
            archive.writestr(f"{folder}data/{key}", array.tobytes())
    return path


@pytest.fixture
def plain(tmp_path):
    """(path, what it holds): float32, bfloat16 and views that share a storage."""
    base = np.arange(24, dtype=np.float32)
    half = np.linspace(-3, 3, 10).astype(BFLOAT16)
    shared = Storage("FloatStorage", "0", 24)
    content = collections.OrderedDict(
        {
            "whole": View(shared, 0, (4, 6), (6, 1)),
            "transposed": View(shared, 0, (6, 4), (1, 6)),
            "slice": View(shared, 7, (2, 3), (6, 2)),
            "half": View(Storage("BFloat16Storage", "1", 10), 0, (2, 5), (5, 1)),
            "scalar": View(Storage("LongStorage", "2", 1), 0, (), ()),
            "empty": View(Storage("FloatStorage", "3", 0), 0, (0, 3), (3, 1)),
        }
    )
    storages = {"0": base, "1": half, "2": np.array([7], np.int64), "3": np.zeros(0, np.float32)}
    expected = {
        "whole": base.reshape(4, 6),
        "transposed": base.reshape(4, 6).T,
        "slice": base.reshape(4, 6)[1:3, 1::2],
        "half": half.reshape(2, 5),
        "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }
    return write_checkpoint(tmp_path / "plain.pth", content, storages), expected


def test_reads_every_tensor_as_stored(plain):
    path, expected = plain
    weights = open_pickle_weights(path)
    assert weights.source == str(path)
    assert dict(weights.shapes) == {name: value.shape for name, value in expected.items()}
    for name, value in expected.items():
        found = weights.read(name)
        assert found.dtype == value.dtype == weights.dtypes[name]
        np.testing.assert_array_equal(found, value)


def test_serves_a_table(plain):
    path, expected = plain
    weights = open_pickle_weights(path)
    table = [Entry(f"ours/{name}", name) for name in expected]
    params = to_ours(table, {"ours": expected}, weights)
    np.testing.assert_array_equal(params["ours"]["transposed"], expected["transposed"])


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_reads_nested_weights(tmp_path, key):
    tensor = View(Storage("HalfStorage", "0", 2), 0, (2,), (1,))
    path = write_checkpoint(tmp_path / "a.pth", {key: {"x": tensor}, "epoch": 3}, {"0": np.array([1, 2], np.float16)})
    np.testing.assert_array_equal(open_pickle_weights(path).read("x"), np.array([1, 2], np.float16))


@pytest.mark.parametrize("kind", STORAGES)
def test_reads_every_storage_type(tmp_path, kind):
    values = np.array([0, 1, 1], STORAGES[kind])
    content = {"x": View(Storage(kind, "0", 3), 1, (2,), (1,))}
    weights = open_pickle_weights(write_checkpoint(tmp_path / "a.pth", content, {"0": values}))
    np.testing.assert_array_equal(weights.read("x"), values[1:])


class Call:
    """Pickles as a call that loading would run."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("call", ["os.system", "builtins.open", "builtins.eval", "os.mkdir", "torch.load"])
def test_refuses_code_without_running_it(tmp_path, call):
    """The same pickle does leave its mark when Python's own unpickler loads it (but for the missing torch)."""
    mark = tmp_path / "ran"
    calls = {
        "os.system": Call(os.system, f"echo > {mark}"),
        "builtins.open": Call(open, str(mark), "w"),
        "builtins.eval": Call(eval, f"open({str(mark)!r}, 'w')"),
        "os.mkdir": Call(os.mkdir, str(mark)),
        "torch.load": {"x": Name("torch", "load")},
    }
    path = write_checkpoint(tmp_path / "bad.pth", {"weight": calls[call]})
    with pytest.raises(ValueError, match=r"names \S+, which .* refused and nothing was run") as caught:
        open_pickle_weights(path)
    module, name = call.split(".")
    assert f".{name}, which" in str(caught.value)
    assert not mark.exists()
    if module != "torch":
        with zipfile.ZipFile(path) as archive:
            pickle.loads(archive.read("archive/data.pkl"))
        assert mark.exists()


@pytest.mark.parametrize("state", [{"offset": 10**9}, (None, {"offset": 10**9})])
@pytest.mark.parametrize("what", ["tensor", "storage", "type", "function", "dict"])
def test_refuses_to_alter_what_was_checked(tmp_path, what, state):
    """BUILD sets attributes: on a tensor it would move the view out of the storage that it was checked against."""
    targets = {
        "tensor": View(Storage("FloatStorage", "0", 4), 0, (4,), (1,)),
        "storage": Storage("FloatStorage", "0", 4),
        "type": Name("torch", "FloatStorage"),
        "function": Name("torch._utils", "_rebuild_tensor_v2"),
        "dict": Name("collections", "OrderedDict"),
    }
    path = write_checkpoint(tmp_path / "bad.pth", {"x": Altered(targets[what], state)}, {"0": np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match="damaged torch checkpoint"):
        open_pickle_weights(path)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(0, (25,), (1,)), (20, (2, 3), (3, 1)), (-1, (2,), (1,)), (0, (2,), (-1,)), (0, (2, 2), (1,)), (0, (2.0,), (1,))],
)
def test_refuses_views_outside_their_storage(tmp_path, offset, shape, strides):
    content = {"x": View(Storage("FloatStorage", "0", 24), offset, shape, strides)}
    path = write_checkpoint(tmp_path / "bad.pth", content, {"0": np.zeros(24, np.float32)})
    with pytest.raises(ValueError, match="damaged torch checkpoint: a tensor"):
        open_pickle_weights(path)


def test_refuses_a_storage_that_is_missing_or_short(tmp_path):
    content = {"x": View(Storage("FloatStorage", "0", 4), 0, (4,), (1,))}
    for storages, size in (({}, 0), ({"0": np.zeros(3, np.float32)}, 12)):
        with pytest.raises(ValueError, match=f"storage of x has {size} bytes, not 16"):
            open_pickle_weights(write_checkpoint(tmp_path / "bad.pth", content, storages))


def test_refuses_truncated_files(plain, tmp_path):
    data = plain[0].read_bytes()
    for length in (len(data) - 30, len(data) // 2, 10):
        (tmp_path / "short.pth").write_bytes(data[:length])
        with pytest.raises(ValueError, match="truncated torch checkpoint"):
            open_pickle_weights(tmp_path / "short.pth")


def test_refuses_a_damaged_pickle(tmp_path):
    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump({"x": View(Storage("FloatStorage", "0", 4), 0, (4,), (1,))})
    for length in range(2, len(stream.getvalue()), 7):
        with zipfile.ZipFile(tmp_path / "bad.pth", "w") as archive:
            archive.writestr("archive/data.pkl", stream.getvalue()[:length])
        with pytest.raises(ValueError, match=r"bad\.pth"):
            open_pickle_weights(tmp_path / "bad.pth")


def test_notices_flipped_bytes_when_reading(plain):
    path, expected = plain
    data = bytearray(path.read_bytes())
    data[data.index(expected["whole"].tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="bytes of whole are damaged"):
        open_pickle_weights(path).read("whole")


def test_refuses_legacy_and_other_files(tmp_path):
    (tmp_path / "legacy.pth").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2))
    with pytest.raises(ValueError, match=r"not a zip checkpoint; one from before torch 1\.6"):
        open_pickle_weights(tmp_path / "legacy.pth")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme", b"")
    with pytest.raises(ValueError, match=r"0 files data\.pkl"):
        open_pickle_weights(tmp_path / "other.zip")
    with pytest.raises(ValueError, match="is not a file"):
        open_pickle_weights(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [([1], "holds a list"), ({"epoch": 3}, "are not tensors"), ({}, "no tensor"), ({1: {}}, "are not tensors")],
)
def test_refuses_what_is_not_a_dict_of_tensors(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        open_pickle_weights(write_checkpoint(tmp_path / "a.pth", content))
