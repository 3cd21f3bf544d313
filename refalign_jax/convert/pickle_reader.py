"""A reader of the pickles in torch checkpoints that can call nothing, because it has nothing to call.

A pickle is a program for a stack machine; among its instructions are "look up any function" and "call it", and
Python's unpickler obeys. The machine here knows the instructions that a dict of tensors needs and no other. A global
name is compared with a short list and becomes a record of that name; "calling" one of them records where a tensor
lies. It works through the program in a loop, so no nesting can exhaust the interpreter's stack, and it holds no more
than the program is long: what it reads, counts and nests is limited beforehand.
"""

from __future__ import annotations

import io
import pickletools
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
"""The storage types of module `torch` that a pickle may name, and their element types."""

TYPES: dict[str, np.dtype] = {
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
    "uint64": np.dtype("<u8"),
}
"""The element types of module `torch` that have no storage type of their own; their tensors name them."""

MOST_PICKLE_BYTES = 32 * 2**20
"""A pickle of names and shapes alone is far smaller (0.2 MB for 14B); no more than this is read into memory."""

MOST_OPCODES = 500_000
"""Instructions of one pickle; a tensor takes about 40."""

MOST_NESTING = 16
"""Containers within each other; a checkpoint has three or four."""

MOST_REPEATED = 2**24
"""Elements of a tensor that is larger than its storage, which it shows several times."""

_VALUES = frozenset(f"{short}BIN{kind}" for short in ("", "SHORT_") for kind in ("UNICODE", "STRING", "BYTES")) | {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE8",
}
"""Instructions that push their argument."""

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_CALLABLE = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
}


class RefusedError(ValueError):
    """A refusal that already says in a sentence what is wrong."""


class Name(NamedTuple):
    """A global name of the list; it stands for itself."""

    module: str
    name: str


class Storage(NamedTuple):
    """A run of `length` elements under a key; of a storage without a type the elements are bytes."""

    dtype: np.dtype
    key: str
    length: int


class Tensor(NamedTuple):
    """A strided view of a storage; offset and strides count elements of `dtype`."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from the first to the last that the view touches."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))


class Pickle(NamedTuple):
    """What one pickle holds."""

    content: Any
    storages: dict[str, Storage]
    """Every storage that it names, by key, whether or not a tensor of the content lies in it."""


class _Item(NamedTuple):
    """A value on the stack and how many containers deep it is."""

    value: Any
    depth: int


def read_pickle(file: io.BytesIO, source: str) -> Pickle:
    """Reads one pickle of dicts, lists, tuples, numbers, text and tensors; the file is left behind its end.

    Args:
      file: the pickle's bytes, at most `MOST_PICKLE_BYTES`; others may follow.
      source: the checkpoint's name, for errors.

    Returns:
      The content; tensors as `Tensor`.

    Raises:
      RefusedError: names beyond those of tensors, instructions that no dict of tensors needs, or too much of them.
      ValueError, TypeError, IndexError, KeyError: a damaged pickle.
    """
    machine = _Machine(source)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count >= MOST_OPCODES:
            raise RefusedError(
                f"{source} has a pickle of more than {MOST_OPCODES:,} instructions, far beyond a list of tensors; it "
                "was refused and nothing was run."
            )
        machine.step(opcode.name, argument)
    return Pickle(machine.result(), machine.storages)


class _Machine:
    """The stack, the marks on it and the memo of one pickle."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._stack: list[_Item] = []
        self._marks: list[int] = []
        self._copied = 0
        self._memo: dict[int, _Item] = {}
        self.storages: dict[str, Storage] = {}

    def result(self) -> Any:
        """Returns the one value that is left."""
        if len(self._stack) != 1:
            raise ValueError(f"its pickle leaves {len(self._stack)} values and not one")
        return self._stack[0].value

    def step(self, name: str, argument: Any) -> None:
        """Executes one instruction."""
        if name in _VALUES:
            if isinstance(argument, int) and argument.bit_length() > 128:
                raise ValueError("its pickle holds a number of more than 128 bits")
            self._push(argument)
        elif name in _CONSTANTS:
            self._push(_CONSTANTS[name])
        elif name in _EMPTY:
            self._push(_EMPTY[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = self._stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif name == "MARK":
            if len(self._marks) >= MOST_NESTING:
                self._refuse_nesting()
            self._marks.append(len(self._stack))
        elif name == "TUPLE" or name in _TUPLES:
            items = self._pop(_TUPLES.get(name))
            self._push(tuple(item.value for item in items), items)
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
            self._fill(name)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            module, _, name = (
                argument.partition(" ") if argument else (self._stack[-2].value, "", self._stack[-1].value)
            )
            if not argument:
                self._pop(2)
            self._push(self._look_up(module, name))
        elif name == "BINPERSID":
            storage = _storage(self._pop(1)[0].value)
            if self.storages.setdefault(storage.key, storage) != storage:
                raise ValueError(f"two tensors disagree on the type or length of their storage {storage.key:.40}")
            self._push(storage)
        elif name in ("REDUCE", "BUILD"):
            target, given = self._pop(2)
            self._count_pairs(given.value)
            self._push(*(_call(target, given) if name == "REDUCE" else (_build(target, given), [])))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise RefusedError(
                f"{self._source} has a pickle with the instruction {name}, which no dict of tensors needs; it was "
                "refused and nothing was run."
            )

    def _push(self, value: Any, within: list[_Item] | None = None) -> None:
        """Pushes a value; `within` are the values that it holds."""
        depth = 1 + max(item.depth for item in within) if within else int(isinstance(value, dict | list))
        if depth > MOST_NESTING:
            self._refuse_nesting()
        self._stack.append(_Item(value, depth))

    def _pop(self, count: int | None) -> list[_Item]:
        """Pops that many values; None: those above the last mark, and the mark."""
        start = self._marks.pop() if count is None else len(self._stack) - count
        if start < (self._marks[-1] if self._marks else 0):
            raise ValueError("its pickle takes more values than there are")
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _fill(self, name: str) -> None:
        """Appends to the list, or sets keys of the dict, that lies below the values."""
        single = {"APPEND": 1, "SETITEM": 2}
        items = self._pop(single.get(name))
        (target, _), *_ = self._pop(1)
        values = [item.value for item in items]
        if name.startswith("APPEND"):
            if type(target) is not list:
                raise TypeError("its pickle appends to something else than a list")
            target.extend(values)
        else:
            if type(target) is not dict or len(values) % 2:
                raise TypeError("its pickle sets keys of something else than a dict")
            if any(type(key) not in (str, int) for key in values[::2]):
                raise TypeError("a key of a dict is neither text nor a number")
            target.update(zip(values[::2], values[1::2], strict=True))
        self._push(target, items)

    def _count_pairs(self, given: Any) -> None:
        """Limits what calls copy in all, because one list can be given to many."""
        if isinstance(given, tuple) and given and isinstance(given[0], list | tuple | dict):
            self._copied += len(given[0])
        if self._copied > MOST_OPCODES:
            raise RefusedError(
                f"{self._source} has a pickle that copies more than {MOST_OPCODES:,} values; it was refused and "
                "nothing was run."
            )

    def _look_up(self, module: Any, name: Any) -> Name:
        """Returns the record of a name of the list; nothing is imported."""
        known = (module, name) in _CALLABLE or (
            name in STORAGES or name in TYPES if module == "torch" else (module, name) == _UNTYPED
        )
        if not known:
            raise RefusedError(
                f"{self._source} names {module!s:.80}.{name!s:.80}, which is not part of a plain dict of tensors; it "
                "was refused and nothing was run."
            )
        return Name(module, name)

    def _refuse_nesting(self) -> None:
        raise RefusedError(
            f"{self._source} has a pickle that nests more than {MOST_NESTING} containers within each other, which no "
            "dict of tensors does; it was refused and nothing was run."
        )


_UNTYPED = Name("torch.storage", "UntypedStorage")


def _storage(pid: Any) -> Storage:
    """Reads ("storage", type, key, device, elements), and from before torch 1.6 also a view, which must be None."""
    if type(pid) is not tuple or not 5 <= len(pid) <= 6:
        raise TypeError("something else than a storage is named as one")
    kind, storage_type, key, _, length, *view = pid
    if kind != "storage" or type(storage_type) is not Name or type(key) is not str or type(length) is not int:
        raise TypeError("something else than a storage is named as one")
    if any(part is not None for part in view):
        raise TypeError("a storage is a view of another, as before torch 0.4; let torch load and save it again")
    dtype = np.dtype("u1") if storage_type == _UNTYPED else STORAGES[storage_type.name]
    return Storage(dtype, key, length)


def _call(function: _Item, arguments: _Item) -> tuple[Any, list[_Item]]:
    """Records what a call of the list would build, and what that holds."""
    if type(function.value) is not Name or type(arguments.value) is not tuple:
        raise TypeError("its pickle calls something that is no function")
    name, given = function.value.name, arguments.value
    if name == "OrderedDict":
        pairs = given[0] if given and type(given[0]) in (list, tuple) else ()
        if any(type(pair) not in (list, tuple) or len(pair) != 2 or type(pair[0]) not in (str, int) for pair in pairs):
            raise TypeError("an OrderedDict is built from something else than pairs")
        return dict(pairs), [arguments]
    if name == "_rebuild_parameter" and type(given[0]) is Tensor:
        return given[0], []
    if name == "_rebuild_tensor":
        return _tensor(given, None), []
    if name == "_rebuild_tensor_v2":
        return _tensor(given[:4], None), []
    if name == "_rebuild_tensor_v3" and type(given[6]) is Name:
        return _tensor(given[:4], TYPES[given[6].name]), []
    raise TypeError("its pickle calls something that is no function of tensors")


def _tensor(view: tuple[Any, ...], dtype: np.dtype | None) -> Tensor:
    """Records a view (storage, offset, shape, strides), after checking that it lies inside its storage."""
    storage, offset, shape, strides = view
    if type(storage) is not Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise TypeError("a tensor is built from something else than a storage, a shape and as many strides")
    if len(shape) != len(strides) or len(shape) > 16:
        raise TypeError("a tensor is built from something else than a storage, a shape and as many strides")
    if any(type(n) is not int or not 0 <= n < 2**63 for n in (offset, *shape, *strides, storage.length)):
        raise TypeError("a tensor has an offset, a shape or strides that are no whole numbers from 0 to 2^63")
    dtype = dtype or storage.dtype
    tensor = Tensor(storage, dtype, offset, shape, strides)
    length = storage.length * storage.dtype.itemsize // dtype.itemsize
    elements = 1
    for n in shape:
        elements *= n
    if tensor.span and offset + tensor.span > length:
        raise TypeError(f"a tensor of shape {list(shape)} reaches beyond its storage of {length} elements")
    if elements > max(length, MOST_REPEATED):
        raise TypeError(f"a tensor of shape {list(shape)} repeats a storage of only {length} elements")
    return tensor


def _build(target: _Item, state: _Item) -> Any:
    """Leaves out the attributes that torch gives to a dict of weights (`_metadata`); others have none."""
    if type(target.value) is not dict or type(state.value) is not dict:
        raise TypeError("its pickle alters something else than a dict")
    return target.value
