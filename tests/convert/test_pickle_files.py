"""Torch checkpoints read without torch; malicious, truncated and legacy ones refused."""

import collections
import io
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from refalign_jax.convert import forms
from refalign_jax.convert.pickle_files import open_pickle_weights
from refalign_jax.convert.pickle_reader import STORAGES
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
    del expected["scalar"]  # of whole numbers, which no weight is
    weights = forms.View(weights, {name: name for name in expected})
    table = [Entry(f"ours/{name}", name) for name in expected]
    params = to_ours(table, {"ours": expected}, weights)
    assert params["ours"]["half"].dtype == expected["half"].dtype
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


def test_refuses_other_files(tmp_path):
    (tmp_path / "text.pth").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"no torch checkpoint: neither a zip nor the format from before torch 1\.6"):
        open_pickle_weights(tmp_path / "text.pth")
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


def write_legacy(path, content, storages, version=1001, little_endian=True):
    """Writes what torch wrote before 1.6; `storages` are (key, array, number of elements that the file says)."""
    stream = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, version, {"protocol_version": version, "little_endian": little_endian}):
        pickle.dump(part, stream, protocol=2)
    Pickler(stream, protocol=2).dump(content)
    pickle.dump([key for key, _, _ in storages], stream, protocol=2)
    for _, array, length in storages:
        stream.write(np.int64(length).tobytes() + array.tobytes())
    path.write_bytes(stream.getvalue())
    return path


def legacy(tmp_path, **changes):
    a, b = np.arange(6, dtype=np.float32), np.arange(5).astype(np.float16)
    content = {
        "state_dict": {
            "a": View(Storage("FloatStorage", "94463250851840", 6), 0, (2, 3), (3, 1)),
            "a_column": View(Storage("FloatStorage", "94463250851840", 6), 1, (2,), (3,)),
            "b": View(Storage("HalfStorage", "7", 5), 2, (3,), (1,)),
        },
        "optimizer": [View(Storage("LongStorage", "8", 1), 0, (1,), (1,))],
    }
    storages = [("7", b, 5), ("8", np.array([3]), 1), ("94463250851840", a, 6)]
    expected = {"a": a.reshape(2, 3), "a_column": a[[1, 4]], "b": b[2:]}
    return write_legacy(tmp_path / "old.pth", content, changes.pop("storages", storages), **changes), expected


def test_reads_the_format_from_before_torch_1_6(tmp_path):
    path, expected = legacy(tmp_path)
    weights = open_pickle_weights(path)
    assert {name: (value.shape, value.dtype) for name, value in expected.items()} == {
        name: (weights.shapes[name], weights.dtypes[name]) for name in weights.shapes
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(weights.read(name), value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": 1002}, "is of version 1002"),
        ({"little_endian": False}, "big-endian"),
        ({"storages": [("7", np.zeros(5, np.float16), 4)]}, "storage of b has 8 bytes, not 10"),
        ({"storages": [("7", np.zeros(5, np.float16), -5)]}, "storage of b has -10 bytes, not 10"),
        ({"storages": [("7", np.zeros(3, np.float16), 5)]}, "storage of b has 6 bytes, not 10"),
        ({"storages": [("7", np.zeros(5, np.float16), 5)]}, r"storage of a has 0 bytes, not 24"),
        ({"storages": [("9", np.zeros(5, np.float16), 5)]}, "a storage 9 that is of no tensor"),
    ],
)
def test_refuses_a_faulty_old_file(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        open_pickle_weights(legacy(tmp_path, **changes)[0])


def test_refuses_a_truncated_or_longer_old_file(tmp_path):
    data = legacy(tmp_path)[0].read_bytes()
    for length in range(20, len(data), 11):
        (tmp_path / "short.pth").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"short\.pth"):
            open_pickle_weights(tmp_path / "short.pth")
    (tmp_path / "long.pth").write_bytes(data + b"more")
    with pytest.raises(ValueError, match="4 bytes behind its last tensor"):
        open_pickle_weights(tmp_path / "long.pth")


def test_refuses_code_in_an_old_file(tmp_path):
    mark = tmp_path / "ran"
    path = write_legacy(tmp_path / "bad.pth", {"x": Call(os.mkdir, str(mark))}, [])
    with pytest.raises(ValueError, match="refused and nothing was run"):
        open_pickle_weights(path)
    assert not mark.exists()


DEEP = 2_000_000
START, END = b"\x80\x02", b"."
PAIRS = b"](" + b"".join(b"M" + n.to_bytes(2, "little") + b"K\x00\x86" for n in range(50_000)) + b"e\x85q\x00"
"""A tuple with a list of 50,000 pairs, in the memo at 0."""


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        (START + b"]" * DEEP + b"a" * (DEEP - 1) + END, "more than 500,000 instructions"),
        (START + b"(" * DEEP + b"t" * DEEP + END, "nests more than 16"),
        (START + b")" + b"\x85" * DEEP + END, "nests more than 16"),
        (START + b"}" + b"K\x00}" * DEEP + b"s" * DEEP + END, "more than 500,000 instructions"),
        (START + b"]" + b"K\x000" * DEEP + END, "instruction POP"),
        (START + b"K\x00" * (DEEP + 9) + END, "more than 500,000 instructions"),
        (START + b"Kar\xff\xff\xff\xff" + END, "holds a int"),  # an array of a memo that long would take 32 GiB
        (START + b"\x8d" + (2**62).to_bytes(8, "little") + b"short" + END, "damaged"),
        (START + b"\x8b" + (10**6).to_bytes(4, "little") + bytes(10**6) + END, "instruction LONG4"),
        (START + b"\x96" + (2**40).to_bytes(8, "little") + END, "damaged|instruction BYTEARRAY8"),
        (START + b"(" + b"K\x01" * 50 + b"t" + b"0" * 50 + END, "instruction POP"),
        (START + b"ctorch\nFloatStorage\n)\x81" + END, "instruction NEWOBJ"),
        (START + b"}(K\x01K\x02\x86K\x03u" + END, "neither text nor a number"),
        (START + b"N" * 3 + END, "leaves 3 values"),
        (START + b"\x86" + END, "takes more values"),
        (START + b"t" + END, "damaged"),
        (
            START + PAIRS + b"ccollections\nOrderedDict\nq\x01]" + b"h\x01h\x00R" * 50_000 + END,
            "copies more than 500,000",
        ),
        (START + b"(" + b"K\x01" * 50_000 + b"tq\x00" + b"h\x00Q" * 50_000 + END, "something else than a storage"),
    ],
    ids=range(18),
)
def test_survives_programs_that_exhaust_an_interpreter(tmp_path, program, sentence):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w") as archive:
        archive.writestr("archive/data.pkl", program)
    with pytest.raises(ValueError, match=sentence):
        open_pickle_weights(tmp_path / "bomb.pth")


def test_refuses_zips_that_hold_more_than_they_can(tmp_path):
    content = {"x": View(Storage("FloatStorage", "0", 10**7), 0, (10**7,), (1,))}
    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(content)
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        archive.writestr("archive/data/0", bytes(4 * 10**7))
    with pytest.raises(ValueError, match="compressed"):
        open_pickle_weights(tmp_path / "bomb.pth")
    with zipfile.ZipFile(tmp_path / "stored.pth", "w") as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        archive.writestr("archive/data/0", bytes(40))
    data = (tmp_path / "stored.pth").read_bytes()
    sizes = np.array([40, 40], "<u4").tobytes()
    assert data.count(sizes) == 2
    (tmp_path / "stored.pth").write_bytes(data.replace(sizes, np.array([4 * 10**7] * 2, "<u4").tobytes()))
    with pytest.raises(ValueError, match="claims 40,000,000 for 'archive/data/0'"):
        open_pickle_weights(tmp_path / "stored.pth")
    with zipfile.ZipFile(tmp_path / "large.pth", "w") as archive:
        archive.writestr("archive/data.pkl", bytes(33 * 2**20))
    with pytest.raises(ValueError, match="a pickle of more than"):
        open_pickle_weights(tmp_path / "large.pth")
    end = b"PK\x05\x06" + np.zeros(4, "<u2").tobytes() + np.array([2**30, 0], "<u4").tobytes() + bytes(2)
    (tmp_path / "many.pth").write_bytes(b"PK\x03\x04" + bytes(100) + end)
    with pytest.raises(ValueError, match="1,073,741,824 bytes of file names"):
        open_pickle_weights(tmp_path / "many.pth")


def test_refuses_a_small_storage_that_is_shown_as_a_large_tensor(tmp_path):
    content = {"x": View(Storage("FloatStorage", "0", 1), 0, (10**6, 10**6), (0, 0))}
    with pytest.raises(ValueError, match="repeats a storage of only 1 elements"):
        open_pickle_weights(write_checkpoint(tmp_path / "a.pth", content, {"0": np.zeros(1, np.float32)}))


def test_leaves_out_the_attributes_of_a_dict(tmp_path):
    """`state_dict()` has an attribute `_metadata`."""
    tensors = collections.OrderedDict(x=View(Storage("FloatStorage", "0", 2), 0, (2,), (1,)))
    content = Altered(tensors, {"_metadata": {"": {"version": 1}}})
    weights = open_pickle_weights(write_checkpoint(tmp_path / "a.pth", content, {"0": np.ones(2, np.float32)}))
    assert list(weights.shapes) == ["x"]
