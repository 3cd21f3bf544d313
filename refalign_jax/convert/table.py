"""One table per model: published tensor names and layouts beside ours.

A table is a list of `Entry`. Read left to right it exports, read right to left
it imports, so the two directions cannot drift apart. Both are strict: a
missing, extra or misshapen tensor is an error that lists names and shapes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from refalign_jax.trees import flatten, unflatten
from refalign_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one tensor is laid out, both ways; the two functions are inverses.

    They only move elements (transpose, reshape), so a round trip is byte-equal.
    """

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_published: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(lambda x: x.T, lambda x: x.T)
"""torch Linear weight [out, in] <-> kernel [in, out]."""


def convolution(rank: int) -> Layout:
    """Layout of a torch convolution weight [O, I, *k] <-> kernel [*k, I, O] with `rank` spatial axes."""
    spatial = tuple(range(2, 2 + rank))
    return Layout(
        lambda x: x.transpose(*spatial, 1, 0),
        lambda x: x.transpose(rank + 1, rank, *range(rank)),
    )


def reshaped(published: tuple[int, ...], ours: tuple[int, ...]) -> Layout:
    """Layout of a tensor that differs by a reshape alone, such as a gamma [C, 1, 1, 1] <-> scale [C]."""
    return Layout(lambda x: x.reshape(ours), lambda x: x.reshape(published))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our parameters and the published tensor, or stack of tensors, that holds it.

    Attributes:
      path: our parameter, "/"-separated: `blocks/ffn/in/kernel`.
      name: the published name; of a stack it contains `{i}`: `blocks.{i}.ffn.0.weight`.
      layout: how one published tensor becomes ours and back.
      stack: length of our leading layer axis, 0 where there is none.
    """

    path: str
    name: str
    layout: Layout = SAME
    stack: int = 0

    @property
    def names(self) -> list[str]:
        """The published names, in the order of our leading axis."""
        return [self.name.format(i=i) for i in range(self.stack)] if self.stack else [self.name]


class Tensors(Protocol):
    """Named tensors read one at a time, as `files.open_weights` gives them."""

    @property
    def source(self) -> str:
        """The file's name, for errors."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor."""
        ...

    @property
    def dtypes(self) -> Mapping[str, np.dtype]:
        """Element type of every tensor."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """Text that the file keeps beside its tensors, by key; empty where there is none."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor, as stored."""
        ...


def published_shapes(table: Sequence[Entry], params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that `params` (arrays or `jax.eval_shape` leaves) exports to.

    Raises:
      AssertionError: the table and the parameters do not cover each other.
    """
    leaves = flatten(params)
    paths = [entry.path for entry in table]
    assert sorted(paths) == sorted(leaves), f"table and parameters differ: {sorted(set(paths) ^ set(leaves))}"
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in table:
        shape = tuple(leaves[entry.path].shape)
        if entry.stack:
            assert shape[0] == entry.stack, f"{entry.path}: {shape[0]} layers, the table says {entry.stack}"
            shape = shape[1:]
        published = entry.layout.to_published(np.broadcast_to(np.int8(0), shape)).shape
        shapes |= dict.fromkeys(entry.names, published)
    return shapes


def check(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: str, most: int = 6
) -> None:
    """Compares the tensors a model needs with those a file has.

    Raises:
      ValueError: names and shapes that are missing, unexpected or differ, at most `most` of each kind.
    """
    missing = [f"{name} {list(expected[name])}" for name in expected if name not in found]
    extra = [f"{name} {list(found[name])}" for name in found if name not in expected]
    misshapen = [
        f"{name} {list(found[name])}, not {list(expected[name])}"
        for name in expected
        if name in found and tuple(found[name]) != tuple(expected[name])
    ]
    problems = []
    for label, names in (("missing", missing), ("unexpected", extra), ("of another shape", misshapen)):
        if names:
            more = f" and {len(names) - most} more" if len(names) > most else ""
            problems.append(f"{len(names)} {label}: {'; '.join(names[:most])}{more}")
    if problems:
        raise ValueError(f"{source} does not hold the weights of this model: {' | '.join(problems)}.")


@dataclasses.dataclass(frozen=True)
class Stored:
    """One of our parameters as it lies in a weight file; indexing it reads, a published tensor at a time.

    Attributes:
      entry: of the table.
      tensors: an opened weight file.
      shape: of the parameter.
    """

    entry: Entry
    tensors: Tensors
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """The type stored; of a stack whose layers have several, the smallest float that holds them all exactly."""
        return functools.reduce(jnp.promote_types, (self.tensors.dtypes[name] for name in self.entry.names))

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a block, of `dtype`; of a stack only the layers that lie in it are read.

        Args:
          index: a slice of each axis; axes that are left out are whole.

        Raises:
          ValueError: a number that is not finite, naming the tensor.
        """
        if not self.entry.stack:
            block = np.array(self.entry.layout.to_ours(self.tensors.read(self.entry.name))[index], order="C")
            check_finite(block, self.entry.name, self.tensors.source)
            return block
        layers, within = (index[0], index[1:]) if index else (slice(None), ())
        names = self.entry.names[layers]
        stack: np.ndarray | None = None
        for place, name in enumerate(names):
            value = self.entry.layout.to_ours(self.tensors.read(name))[within]
            if stack is None:
                stack = np.empty((len(names), *value.shape), self.dtype)
            stack[place] = value
            check_finite(stack[place], name, self.tensors.source)
        assert stack is not None, (self.entry.path, index)
        return stack


def check_finite(value: np.ndarray, name: str, source: str) -> None:
    """Checks that a contiguous array of floats holds no NaN and no infinity: in these all bits of the exponent are set.

    Raises:
      ValueError: it holds one.
    """
    info = ml_dtypes.finfo(value.dtype)
    bits = value.reshape(-1).view(f"u{value.dtype.itemsize}")
    magnitude = bits.dtype.type(2 ** (8 * value.dtype.itemsize - 1) - 1)
    infinite = bits.dtype.type((2**info.nexp - 1) << info.nmant)
    parts = (bits[start : start + 2**18] & magnitude for start in range(0, bits.size, 2**18))  # no copy of the whole
    count = sum(np.count_nonzero(part >= infinite) for part in parts)
    if count:
        raise ValueError(
            f"{source}: {name} holds {count:,} values that are NaN or infinite, of {bits.size:,}; the file is damaged "
            "or was saved from a run that diverged."
        )


def stored(table: Sequence[Entry], params: Mapping[str, Any], tensors: Tensors) -> Params:
    """Finds our parameters in a weight file without reading them.

    Args:
      table: names and layouts.
      params: shapes of our parameters (`jax.eval_shape` of the model's init).
      tensors: an opened weight file.

    Returns:
      Our parameters, each a `Stored`.

    Raises:
      ValueError: the file lacks a tensor, has one too many, one of another shape, or one of whole numbers.
    """
    check(published_shapes(table, params), tensors.shapes, tensors.source)
    for name in (name for entry in table for name in entry.names):
        if not jnp.issubdtype(tensors.dtypes[name], jnp.floating):
            raise ValueError(
                f"{tensors.source}: {name} is stored as {tensors.dtypes[name]}; weights are floating-point numbers."
            )
    leaves = flatten(params)
    return unflatten({entry.path: Stored(entry, tensors, tuple(leaves[entry.path].shape)) for entry in table})


def to_ours(table: Sequence[Entry], params: Mapping[str, Any], tensors: Tensors) -> Params:
    """Reads published tensors into our layout, one tensor at a time; arguments and errors as in `stored`.

    Returns:
      Our parameters as numpy arrays of the dtype stored; beyond them at most one tensor is held.

    Raises:
      ValueError: as in `stored`, or a number that is not finite.
    """
    return read_stored(stored(table, params, tensors))


def read_stored(params: Params) -> Params:
    """Reads what `stored` found, as `to_ours` does.

    Raises:
      ValueError: a number that is not finite.
    """
    return unflatten({path: leaf[()] for path, leaf in flatten(params).items()})


def to_published(table: Sequence[Entry], params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields our parameters under the published names and layouts, one tensor at a time (dtype kept).

    A stacked device array is fetched layer by layer, so no more than one layer of it is on the host.
    """
    published_shapes(table, params)
    leaves = flatten(params)
    for entry in table:
        leaf = leaves[entry.path]
        for i, name in enumerate(entry.names):
            value = np.asarray(leaf[i] if entry.stack else leaf)
            yield name, np.ascontiguousarray(entry.layout.to_published(value))
