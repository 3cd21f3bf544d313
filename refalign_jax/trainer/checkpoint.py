"""Checkpoints of a training run through Orbax, each a folder that is written whole or not at all.

    params · ema · optimizer    arrays; no `ema` where none is kept
    config                      the whole Config as JSON
    progress                    JSON: step, random key, skipped batches, data iterator, versions, commit

A run keeps its checkpoints in one folder, each named after its step. Saving copies to the host what this process's
devices hold, then writes in the background. convert/checkpoint.py reads the parameters alone.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from refalign_jax import remote
from refalign_jax.atomic import first_line
from refalign_jax.convert.checkpoint import (
    ARRAYS,
    JSONS,
    PathLike,
    absolute,
    array_handler,
    read_json,
    save_by_layer,
    unreadable,
)
from refalign_jax.convert.checksums import (
    ArraysRestore,
    DamagedError,
    DigestedJson,
    JsonRestore,
    JsonSave,
    check_digests,
)
from refalign_jax.devices import check_backend
from refalign_jax.types import Params


def _check_progress(progress: Any, step: int) -> None:
    """Raises ValueError unless a checkpoint's progress is of this step and has what a run needs to continue."""
    saved = progress.get("step") if isinstance(progress, dict) else None
    if saved != step:
        raise ValueError(f"it is of step {saved}, not {step}")
    key = progress.get("key")
    whole = isinstance(key, list) and all(type(word) is int and 0 <= word < 2**32 for word in key)
    whole &= type(progress.get("skipped")) is int and 0 <= progress["skipped"] < 2**31
    if not whole or not isinstance(progress.get("data"), dict):
        raise ValueError("its progress lacks the count of skipped batches, the random key, or the position in the data")


class Checkpoints:
    """The checkpoints of one training run; a context manager that waits for the last write when left.

    Args:
      folder: where they are, local or gs://; made if need be. What an interrupted write left is removed.
      keep: number of newest checkpoints that are kept.
      verify: compare a checkpoint's files with their digests before it is restored, which reads them once more;
        several processes share the files.

    Raises:
      ValueError: there is no such bucket, or the package of its store is not installed.
      OSError: the folder can't be written.
    """

    def __init__(self, folder: PathLike, keep: int, verify: bool = True) -> None:
        check_backend()
        remote.check(folder)
        # Where one write fails others do too, and asyncio would print their tracebacks beside our sentence.
        logging.getLogger("asyncio").addFilter(_was_retrieved)
        self.folder = absolute(folder)
        self._verify = verify
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        handlers: dict[str, Any] = {name: array_handler() for name in ARRAYS}
        handlers |= {name: DigestedJson() for name in JSONS}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
        except Exception as error:  # a local or a remote file system's
            taken = isinstance(error, FileExistsError)
            reason = "it is a file" if taken else remote.reason(error)
            raise OSError(f"{self.folder} can't be written: {reason}.") from error

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint, written or being written."""
        return self._manager.latest_step()

    def path(self, step: int) -> epath.Path:
        """Folder of one checkpoint."""
        return self.folder / str(step)

    def save(
        self, step: int, arrays: Mapping[str, Params], progress: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        """Saves one checkpoint; returns when the arrays are copied and may be donated.

        Args:
          step: number of steps done.
          arrays: trees of jax arrays by item, for the items of `ARRAYS`.
          progress: whatever else a run needs to continue, as JSON.
          config: the run's configuration.

        Raises:
          OSError: this or the previous checkpoint can't be written.
        """
        items: dict[str, Any] = {name: save_by_layer(tree) for name, tree in arrays.items()}
        items |= {"config": JsonSave(dict(config)), "progress": JsonSave(dict(progress))}
        self._guard(lambda: self._manager.save(step, args=ocp.args.Composite(**items)))

    def restore(self, step: int, shapes: Mapping[str, Params]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads one checkpoint's arrays onto the devices, and its progress.

        Args:
          step: of the checkpoint.
          shapes: trees of `jax.ShapeDtypeStruct`s; their shardings may differ from those at saving.

        Raises:
          ValueError: a file of it is missing or damaged, or it is of another step than its folder's name.
          OSError, MemoryError, JaxRuntimeError: the machine can't read it; it may be whole.
        """
        items: dict[str, Any] = {
            name: ArraysRestore(item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
            for name, tree in shapes.items()
        }
        every = ocp.args.Composite(**items, progress=JsonRestore())
        with self._damage_named(step):
            if self._verify:
                share = (jax.process_index(), jax.process_count())
                check_digests(self.path(step), (*ARRAYS, *JSONS), share=share)
            restored = self._manager.restore(step, args=every)
            _check_progress(restored["progress"], step)
        return {name: restored[name] for name in shapes}, restored["progress"]

    def read_config(self, step: int) -> dict[str, Any]:
        """Reads the configuration that one checkpoint was saved with; raises as `restore` does."""
        with self._damage_named(step):
            return read_json(self.path(step), "config")

    @contextlib.contextmanager
    def _damage_named(self, step: int) -> Iterator[None]:
        """Adds to an error of damaged data which checkpoint to remove; lets others pass."""
        try:
            yield
        except Exception as error:
            passing = unreadable(error, self.path(step))
            if not isinstance(passing, ValueError):
                raise passing from error
            others = [s for s in self._manager.all_steps() if s < step]
            before = f"from step {max(others)}" if others else "from the beginning"
            reason = str(error).removesuffix(".") if isinstance(error, DamagedError) else first_line(error)
            raise ValueError(
                f"{self.path(step)} can't be restored ({reason}); remove that folder to continue {before}."
            ) from error

    def should_stop(self, step: int) -> bool:
        """Whether the cluster is about to take a machine away; the same in every process."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
          OSError: it can't be written.
        """
        self._guard(self._manager.wait_until_finished)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: object) -> None:
        try:
            self.wait()
        except OSError:
            if value is None:
                raise
        finally:
            self._manager.close()

    def _guard(self, action: Any) -> None:
        """Calls what writes; raises whatever goes wrong there in one sentence."""
        try:
            action()
        except Exception as error:
            whole = [step for step in self._manager.all_steps() if (self.path(step) / "progress").exists()]
            good = f"the last good one is {self.path(max(whole))}" if whole else "there is no earlier one"
            raise OSError(
                f"A checkpoint could not be written to {self.folder} ({first_line(error)}); {good}."
            ) from error


def _was_retrieved(record: logging.LogRecord) -> bool:
    """Whether a message of asyncio is not about the error of a task that nobody waited for."""
    return "never retrieved" not in record.getMessage()
