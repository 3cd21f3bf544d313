"""Parameters in Orbax checkpoints: written, read as a whole or layer by layer, restored onto the devices.

A checkpoint of parameters alone holds the items `params` and `config` (the ModelConfig as JSON). A checkpoint of a
training run holds the same two, its `config` being the whole Config, beside others (see trainer/checkpoint.py); the
functions here read both. Stacks of layers are stored in chunks of one layer, so that a layer can be read alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from refalign_jax import remote
from refalign_jax.atomic import first_line, partial_path, remove_partials
from refalign_jax.config import ModelConfig, from_dict
from refalign_jax.convert.checksums import (
    ArraysRestore,
    ArraysSave,
    DamagedError,
    DigestedArrays,
    DigestedJson,
    JsonRestore,
    JsonSave,
    check_digests,
    store_url,
    write_digests,
)
from refalign_jax.convert.newest import checkpoint_folder, newest_checkpoint
from refalign_jax.convert.table import check
from refalign_jax.devices import check_backend
from refalign_jax.trees import flatten
from refalign_jax.types import Params

PathLike = str | os.PathLike[str]

ARRAYS = ("params", "ema", "optimizer")
"""Items of a training run's checkpoint that hold arrays; `ema` may be absent."""

JSONS = ("config", "progress")
"""Items of a training run's checkpoint that are JSON."""


MACHINE = ("PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
"""Status codes in TensorStore's messages that say nothing about the data."""


@dataclasses.dataclass(frozen=True)
class Unread:
    """An array that `import_params` reads while it writes, layer by layer, so that it is never in memory as a whole.

    Attributes:
      shape: of the array.
      dtype: of the array.
      read: returns the block at an index, a tuple of slices.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[slice, ...]], np.ndarray]

    @property
    def size(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)


def save_params(path: PathLike, params: Params, config: ModelConfig) -> None:
    """Writes parameters and their configuration.

    Args:
      path: a folder that does not exist yet.
      params: {"dit": …} with or without {"projectors": …}; jax arrays of any sharding, or numpy arrays.
      config: the model they belong to.

    Raises:
      ValueError: the folder exists.
      OSError: it can't be written.
    """
    folder = absolute(path)
    _check_new(folder)
    with _writing(folder):
        _save(folder, params, config)


def import_params(path: PathLike, params: Mapping[str, Any], config: ModelConfig) -> None:
    """As `save_params`, for parameters that are read while they are written, so that no stack is in memory as a whole.

    Orbax writes a checkpoint that holds one layer of zeros for each stack. TensorStore then opens its arrays, grows
    each to its number of layers and writes one layer after the other. Beyond the largest layer of the largest tensor
    this takes memory and room on the disk for one layer of every stack: 0.29 GiB and 0.28 GiB for the 1.3B model in
    float32.

    Args:
      path: a local folder that does not exist yet.
      params: {"dit": …} with or without {"projectors": …}; the leaves are `Unread`.
      config: the model they belong to.

    Raises:
      ValueError: the folder exists or is not local, or what `Unread.read` raises; nothing is left behind.
      OSError: it can't be written; nothing is left behind.
    """
    if remote.is_remote(path):  # a folder there has no name that it could take in one step
        raise ValueError(f"{path} is no local folder; name one, and copy it there when it is whole.")
    folder = absolute(path)
    _check_new(folder)
    partial = partial_path(folder)
    remove_partials(folder)
    try:
        with _writing(folder):
            _save(partial, jax.tree.map(_zeros, params), config)
            jax.tree.map(_fill, _open_stores(partial, "params", write=True), params)
            write_digests(partial / "params")
            partial.rename(folder)
    finally:
        remove_partials(folder)  # Orbax writes under a longer name first


def load_params(path: PathLike, ema: bool = False, verify: bool = True) -> tuple[dict[str, Any], ModelConfig]:
    """Reads parameters as numpy arrays of the dtype stored, and nothing else of the checkpoint.

    Args:
      path: a checkpoint of parameters, a checkpoint of a training run, or a run's folder, of which the newest is read.
      ema: the moving average in place of the parameters.
      verify: compare the files with their digests first, which reads them once more.

    Raises:
      ValueError: no such folder, no checkpoint in it, no moving average in it, or a file of it is missing or damaged.
      OSError: a file can't be read, or JAX has no device.
    """
    folder, item = find_checkpoint(path, ema)
    return read_arrays(folder, item, verify), read_model(folder, verify)


def open_params(path: PathLike, ema: bool = False, verify: bool = True) -> tuple[dict[str, Any], ModelConfig]:
    """As `load_params`, but reads no array yet: `np.asarray(array[i])` reads layer i of a stack and no more.

    Returns:
      The parameters as `tensorstore.TensorStore`s, whose numpy dtype is `array.dtype.numpy_dtype`; the model.
    """
    folder, item = find_checkpoint(path, ema)
    if verify:
        verify_items(folder, (item,))
    return _open_stores(folder, item), read_model(folder, verify)


def read_arrays(folder: PathLike, item: str, verify: bool = True) -> dict[str, Any]:
    """One item of one checkpoint as numpy arrays of the dtype stored.

    Raises:
      ValueError: it is missing or damaged.
      OSError: a file can't be read, or JAX has no device.
    """
    folder = absolute(folder)
    if verify:
        verify_items(folder, (item,))
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _shapes(folder, item))
    return _restore_item(folder, item, ArraysRestore(restore_args=restore_args))


def restore_params(path: PathLike, shapes: Params, ema: bool = False, verify: bool = True) -> dict[str, Any]:
    """Reads parameters straight into their place on the devices, cast to the dtype asked for.

    Args:
      path: as in `load_params`.
      shapes: `jax.ShapeDtypeStruct`s with shardings, of the model to fill.
      ema: the moving average in place of the parameters.
      verify: as in `load_params`.

    Returns:
      Parameters as `shapes` has them; without "projectors" where the checkpoint has none.

    Raises:
      ValueError: as in `load_params`, or parameters of another model, listed with their shapes.
    """
    folder, item = find_checkpoint(path, ema)
    if verify:
        verify_items(folder, (item, "config"))
    stored = _shapes(folder, item)
    if "projectors" not in stored:
        shapes = {"dit": shapes["dit"]}
    elif "projectors" not in shapes:
        stored = {"dit": stored["dit"]}  # a model without alignment has no use for them
    found, expected = ({name: tuple(x.shape) for name, x in flatten(tree).items()} for tree in (stored, shapes))
    check(expected, found, str(folder))
    args = ArraysRestore(
        item=dict(shapes), restore_args=ocp.checkpoint_utils.construct_restore_args(dict(shapes)), partial_restore=True
    )
    return _restore_item(folder, item, args)


def find_checkpoint(path: PathLike, ema: bool = False) -> tuple[epath.Path, str]:
    """The folder of one checkpoint and which item of it holds the parameters; arguments as in `load_params`.

    A run's checkpoints are where its config.json names them, and its newest is the newest that is whole: in an object
    store, one that is being written has its name already.
    """
    remote.check(path)
    folder = given = absolute(path)
    if not given.is_dir():
        raise ValueError(f"{given} does not exist; a checkpoint is a folder.")
    if not (given / "config").is_dir():
        place = checkpoint_folder(given)
        newest = newest_checkpoint(given) or newest_checkpoint(place)
        elsewhere = f"; it keeps them in {place}" if place.parent != given else ""
        if newest is None and (elsewhere or place.is_dir()):
            raise ValueError(f"The run {given} has no checkpoint yet{elsewhere}.")
        folder = newest or given
    item = "ema" if ema else "params"
    if ema and (folder / "params").is_dir() and not (folder / "ema").is_dir():
        raise ValueError(f"{folder} holds no moving average, having been trained with optimizer.ema_decay=0.")
    if not (folder / item).is_dir() or not (folder / "config").is_dir():
        raise ValueError(
            f"{given} is no checkpoint of parameters: it needs the folders 'params' and 'config', or to be a training "
            "run's folder."
        )
    return folder, item


def read_json(folder: PathLike, item: str, verify: bool = True) -> dict[str, Any]:
    """One item of one checkpoint that is JSON: `config` (a `ModelConfig`, or a run's `Config`) or `progress`.

    Args:
      folder: of the checkpoint.
      item: which.
      verify: compare its file with its digest first.

    Raises:
      ValueError: it is missing or damaged.
    """
    folder = absolute(folder)
    if verify:
        verify_items(folder, (item,), warn=False)
    return _restore_item(folder, item, JsonRestore())


def read_model(path: PathLike, verify: bool = True) -> ModelConfig:
    """The model of one checkpoint; `verify` as in `read_json`.

    Raises:
      ValueError: a field that this version does not know.
    """
    values = read_json(path, "config", verify)
    return from_dict(ModelConfig, values.get("model", values), str(path))


def array_handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler of an item that holds arrays.

    Weights hardly compress, and compressing them takes four times as long. Writing copies nothing, so it needs no
    limit on the bytes in flight (with a limit, Orbax refuses any array that is larger).
    """
    report_once()
    numpy_arrays = (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False))
    jax_arrays = (jax.Array, ocp.type_handlers.ArrayHandler())
    return DigestedArrays(
        use_compression=False,
        save_concurrent_gb=None,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(numpy_arrays, jax_arrays),
    )


def verify_items(folder: epath.Path, items: Iterable[str], warn: bool = True) -> None:
    """Compares items of a checkpoint with their digests; see `check_digests` for `warn` and what is raised."""
    try:
        check_digests(folder, items, warn)
    except Exception as error:
        raise unreadable(error, folder) from error


def unreadable(error: Exception, path: epath.Path) -> Exception:
    """The error to raise where a checkpoint can't be read.

    Returns:
      An error of the machine, be it of its permissions, memory or devices, as itself, those of TensorStore as an
      OSError; a ValueError, that the checkpoint is damaged, for any other.
    """
    if isinstance(error, DamagedError | MemoryError | jax.errors.JaxRuntimeError):
        return error
    absent = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    if remote.is_answer(error) and not absent:
        return OSError(f"{path} can't be read: {remote.reason(error)}.")
    if isinstance(error, OSError) and not absent:
        if error.errno is None:
            return error
        return type(error)(f"{error.filename or path} can't be read: {error.strerror}.")
    if any(status in str(error) for status in MACHINE):
        return OSError(f"{path} can't be read ({first_line(error)}).")
    return ValueError(f"{path} can't be read ({first_line(error)}); the checkpoint is not whole.")


@functools.cache
def report_once() -> None:
    """From now on a read or write that fails is reported by the error that Orbax raises, and by nothing else.

    Orbax closes its event loop when it raises, and Python prints "Event loop is closed", with a traceback, for every
    other read or write that ends later. Orbax also logs the traceback of every thread that fails.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
    logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))


def save_by_layer(tree: Any) -> ArraysSave:
    """Orbax's arguments to save a tree of arrays, stacks of matrices in chunks of one layer."""
    args = jax.tree.map(lambda x: ocp.SaveArgs(shard_axes=(0,) if _is_stack(x) else ()), tree)
    return ArraysSave(tree, save_args=args)


def absolute(path: PathLike) -> epath.Path:
    """A local path made absolute, as Orbax wants it; a remote one as it is."""
    path = os.fspath(path)
    return epath.Path(path if remote.is_remote(path) else Path(path).absolute())


def _check_new(folder: epath.Path) -> None:
    remote.check(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists; it is not overwritten. Name another folder or remove it.")


def _save(folder: epath.Path, params: Params, config: ModelConfig) -> None:
    """`save_params` into a folder that is known not to exist."""
    items = {"params": save_by_layer(params), "config": JsonSave(dataclasses.asdict(config))}
    with ocp.Checkpointer(_composite()) as checkpointer:
        checkpointer.save(folder, args=ocp.args.Composite(**items))


@contextlib.contextmanager
def _writing(folder: epath.Path) -> Iterator[None]:
    """Raises in one sentence, as an OSError, what the operating system answers to a write."""
    try:
        yield
    except (ValueError, OSError) as error:  # TensorStore raises ValueErrors that quote the operating system
        if "[os_error_code" not in str(error) and getattr(error, "errno", None) is None:
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OSError(f"{folder} can't be written: {reason}.") from error


def _is_stack(array: Any) -> bool:
    """Whether this is a stack of matrices; what has two axes is one matrix, or a stack of vectors, which is small."""
    return len(array.shape) > 2


def _zeros(array: Unread) -> np.ndarray:
    """Zeros in place of an array, of a stack of matrices its first layer alone; they take no memory."""
    shape = (1, *array.shape[1:]) if _is_stack(array) else array.shape
    return np.broadcast_to(np.zeros((), array.dtype), shape)


def _fill(store: ts.TensorStore, array: Unread) -> None:
    """Writes an array over the zeros that stand for it."""
    if not _is_stack(array):
        store.write(array.read(())).result()
        return
    store = store.resize(exclusive_max=array.shape, expand_only=True).result()
    for layer in range(array.shape[0]):
        index = (slice(layer, layer + 1),)
        store[index].write(array.read(index)).result()


def _open_stores(folder: epath.Path, item: str, write: bool = False) -> dict[str, Any]:
    """Every array of an item as a `tensorstore.TensorStore`."""
    base = store_url(os.fspath(folder / item))

    def opened(path: tuple[Any, ...], _: Any) -> ts.TensorStore:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        store = {"driver": "ocdbt", "base": f"{base}/", "path": f"{name}/"}
        return ts.open({"driver": "auto", "kvstore": store}, read=True, write=write, open=True).result()

    try:
        return jax.tree_util.tree_map_with_path(opened, _shapes(folder, item))
    except ValueError as error:
        raise unreadable(error, folder / item) from error


def _composite() -> ocp.CompositeCheckpointHandler:
    """Orbax's handler of every item that a checkpoint of parameters or of a training run may have."""
    handlers: dict[str, Any] = {name: array_handler() for name in ARRAYS}
    return ocp.CompositeCheckpointHandler(**handlers, **{name: DigestedJson() for name in JSONS})


def _shapes(path: epath.Path, item: str) -> dict[str, Any]:
    """Names, shapes and dtypes of an item's arrays."""
    check_backend()
    try:
        return array_handler().metadata(path / item).tree
    except Exception as error:
        raise unreadable(error, path / item) from error


def _restore_item(path: epath.Path, item: str, args: Any) -> Any:
    check_backend()
    try:
        with ocp.Checkpointer(_composite()) as checkpointer:
            return checkpointer.restore(path, args=ocp.args.Composite(**{item: args}))[item]
    except Exception as error:
        raise unreadable(error, path / item) from error
