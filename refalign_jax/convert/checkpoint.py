"""Parameters in Orbax checkpoints: written, read as a whole or layer by layer, restored onto the devices."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from refalign_jax.config import ModelConfig, from_dict
from refalign_jax.convert.table import check
from refalign_jax.trees import flatten
from refalign_jax.types import Params

PathLike = str | os.PathLike[str]

ARRAYS = ("params", "ema", "optimizer")
"""Items that hold arrays; `ema` may be absent."""

JSONS = ("config", "progress")
"""Items that are JSON."""


@dataclasses.dataclass(frozen=True)
class Unread:
    """An array that `save_params` reads while it writes, layer by layer, so that it is never in memory as a whole.

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
      params: {"dit": …} with or without {"projectors": …}; jax arrays of any sharding, or all of them `Unread` (numpy
        arrays work too, but Orbax copies those whole).
      config: the model they belong to.

    Raises:
      ValueError: the folder exists.
    """
    folder = _absolute(path)
    if folder.exists():
        raise ValueError(f"{folder} exists; it is not overwritten. Name another folder or remove it.")
    unread = isinstance(jax.tree.leaves(params)[0], Unread)
    with ocp.Checkpointer(_composite(unread)) as checkpointer:
        checkpointer.save(
            folder,
            args=ocp.args.Composite(
                params=_by_layer(params),
                config=ocp.args.JsonSave(dataclasses.asdict(config)),
            ),
        )


def load_params(path: PathLike, ema: bool = False) -> tuple[dict[str, Any], ModelConfig]:
    """Reads parameters as numpy arrays of the dtype stored, and nothing else of the checkpoint.

    Args:
      path: a checkpoint of parameters, a checkpoint of a training run, or a run's folder, of which the newest is read.
      ema: the moving average in place of the parameters.

    Raises:
      ValueError: no such folder, no checkpoint in it, no moving average in it, or a file of it is missing.
    """
    folder, item = find_checkpoint(path, ema)
    return read_arrays(folder, item), read_model(folder)


def open_params(path: PathLike, ema: bool = False) -> tuple[dict[str, Any], ModelConfig]:
    """As `load_params`, but reads nothing yet: `np.asarray(array[i])` reads layer i of a stack and no more.

    Returns:
      The parameters as `tensorstore.TensorStore`s, whose numpy dtype is `array.dtype.numpy_dtype`; the model.
    """
    folder, item = find_checkpoint(path, ema)
    base = os.fspath(folder / item)
    base = base if "://" in base else f"file://{base}"

    def opened(path: tuple[Any, ...], _: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        store = {"driver": "ocdbt", "base": f"{base}/", "path": f"{name}/"}
        return ts.open({"driver": "auto", "kvstore": store}, read=True, open=True).result()

    try:
        return jax.tree_util.tree_map_with_path(opened, _shapes(folder, item)), read_model(folder)
    except ValueError as error:
        raise ValueError(f"{base} can't be read ({_first_line(error)}); the checkpoint is not whole.") from error


def read_arrays(folder: PathLike, item: str) -> dict[str, Any]:
    """One item of one checkpoint as numpy arrays of the dtype stored.

    Raises:
      ValueError: it is missing or damaged.
    """
    folder = _absolute(folder)
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _shapes(folder, item))
    return _restore_item(folder, item, ocp.args.PyTreeRestore(restore_args=restore_args))


def restore_params(path: PathLike, shapes: Params, ema: bool = False) -> dict[str, Any]:
    """Reads parameters straight into their place on the devices, cast to the dtype asked for.

    Args:
      path: as in `load_params`.
      shapes: `jax.ShapeDtypeStruct`s with shardings, of the model to fill.
      ema: the moving average in place of the parameters.

    Returns:
      Parameters as `shapes` has them; without "projectors" where the checkpoint has none.

    Raises:
      ValueError: as in `load_params`, or parameters of another model, listed with their shapes.
    """
    folder, item = find_checkpoint(path, ema)
    stored = _shapes(folder, item)
    if "projectors" not in stored:
        shapes = {"dit": shapes["dit"]}
    elif "projectors" not in shapes:
        stored = {"dit": stored["dit"]}  # a model without alignment has no use for them
    found, expected = ({name: tuple(x.shape) for name, x in flatten(tree).items()} for tree in (stored, shapes))
    check(expected, found, str(folder))
    args = ocp.args.PyTreeRestore(
        item=dict(shapes), restore_args=ocp.checkpoint_utils.construct_restore_args(dict(shapes)), partial_restore=True
    )
    return _restore_item(folder, item, args)


def find_checkpoint(path: PathLike, ema: bool = False) -> tuple[epath.Path, str]:
    """The folder of one checkpoint and which item of it holds the parameters; arguments as in `load_params`."""
    folder = given = _absolute(path)
    if not given.is_dir():
        raise ValueError(f"{given} does not exist; a checkpoint is a folder.")
    if not (given / "config").is_dir():
        for parent in (given, given / "checkpoints"):
            steps = [int(child.name) for child in parent.iterdir() if child.name.isdigit()] if parent.is_dir() else []
            if steps:
                folder = parent / str(max(steps))
                break
    item = "ema" if ema else "params"
    if ema and (folder / "params").is_dir() and not (folder / "ema").is_dir():
        raise ValueError(f"{folder} holds no moving average, having been trained with optimizer.ema_decay=0.")
    if not (folder / item).is_dir() or not (folder / "config").is_dir():
        raise ValueError(
            f"{given} is no checkpoint of parameters: it needs the folders 'params' and 'config', or to be a training "
            "run's folder."
        )
    return folder, item


def read_json(folder: PathLike, item: str) -> dict[str, Any]:
    """One item of one checkpoint that is JSON: `config` (a `ModelConfig`, or a run's `Config`) or `progress`.

    Raises:
      ValueError: it is missing or damaged.
    """
    return _restore_item(_absolute(folder), item, ocp.args.JsonRestore())


def read_model(path: PathLike) -> ModelConfig:
    """The model of one checkpoint.

    Raises:
      ValueError: a field that this version does not know.
    """
    values = read_json(path, "config")
    return from_dict(ModelConfig, values.get("model", values), str(path))


class _UnreadHandler(ocp.type_handlers.NumpyHandler):
    """Writes `Unread` arrays one after the other, a layer at a time; they look as if numpy arrays had been saved."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._turn = asyncio.Lock()

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        layers = range(value.shape[0]) if _is_stack(value) else [...]
        async with self._turn:
            store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            for i in layers:
                index = () if i is ... else (slice(i, i + 1),)
                await store[index].write(value.read(index))


def _is_stack(array: Any) -> bool:
    """Whether this is a stack of matrices; what has two axes is a single one, or a stack of vectors, which is small."""
    return len(array.shape) > 2


def _by_layer(tree: Any) -> ocp.args.PyTreeSave:
    """Saves arrays, stacks of matrices in chunks of one layer."""
    args = jax.tree.map(lambda x: ocp.SaveArgs(shard_axes=(0,) if _is_stack(x) else ()), tree)
    return ocp.args.PyTreeSave(tree, save_args=args)


def _arrays(unread: bool = False) -> ocp.PyTreeCheckpointHandler:
    """Writes and reads arrays, or writes `Unread` ones.

    Weights hardly compress, and compressing them costs four times the time. Writing copies nothing, so it needs no
    limit on what is on its way (with one, Orbax refuses any array that is larger).
    """
    sys.unraisablehook = _without_late_callbacks
    handlers = ocp.type_handlers.create_type_handler_registry((Unread, _UnreadHandler()))
    more = {"type_handler_registry": handlers} if unread else {}
    return ocp.PyTreeCheckpointHandler(use_compression=False, save_concurrent_gb=None, **more)


def _composite(unread: bool = False) -> ocp.CompositeCheckpointHandler:
    handlers: dict[str, Any] = {name: _arrays(unread) for name in ARRAYS}
    return ocp.CompositeCheckpointHandler(**handlers, **{name: ocp.JsonCheckpointHandler() for name in JSONS})


def _shapes(path: epath.Path, item: str) -> dict[str, Any]:
    """Names, shapes and dtypes of an item's arrays."""
    try:
        return _arrays().metadata(path / item).tree
    except Exception as error:
        raise ValueError(f"{path / item} can't be read ({_first_line(error)}); the checkpoint is not whole.") from error


def _restore_item(path: epath.Path, item: str, args: Any) -> Any:
    try:
        with ocp.Checkpointer(_composite()) as checkpointer:
            return checkpointer.restore(path, args=ocp.args.Composite(**{item: args}))[item]
    except Exception as error:
        raise ValueError(f"{path / item} can't be read ({_first_line(error)}); the checkpoint is not whole.") from error


def _absolute(path: PathLike) -> epath.Path:
    path = os.fspath(path)
    return epath.Path(path if "://" in path else Path(path).absolute())


def _first_line(error: Exception) -> str:
    """What went wrong: the operating system's word where TensorStore quotes it, else the error's first line."""
    line = (str(error).splitlines() or [type(error).__name__])[0].strip().rstrip(".")
    quoted = re.search(r": ([^:]+) \[os_error_code", line)
    return quoted[1] if quoted else line[:300]


def _without_late_callbacks(unraisable: Any) -> None:
    """Drops what Python can't raise and would print as a traceback, where it says nothing that is not raised too.

    When one file fails, Orbax closes its event loop, and operations on other files that end later complain of that.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
