"""Checkpoints through Orbax, each a folder that is written whole or not at all.

    of parameters alone     params · config (the ModelConfig as JSON)
    of a training run       params · ema · optimizer · config (the whole Config as JSON) · progress (JSON: step, random
                            key, skipped batches, data iterator, versions, commit)

A run keeps its checkpoints in one folder, each under the number of its step. Saving copies to the host what its
devices hold, then writes in the background. Reading parameters reads nothing else. Stacks of layers are stored in
chunks of one layer, so that a layer can be read alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from refalign_jax.atomic import first_line
from refalign_jax.convert.checkpoint import ARRAYS, JSONS, PathLike, absolute, array_handler, save_by_layer
from refalign_jax.types import Params


class Checkpoints:
    """The checkpoints of one training run; a context manager that waits for the last write when left.

    Args:
      folder: where they are, local or gs://; made if need be. Rests of an interrupted write are removed.
      keep: newest checkpoints that stay.

    Raises:
      OSError: the folder can't be written.
    """

    def __init__(self, folder: PathLike, keep: int) -> None:
        self.folder = absolute(folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        handlers: dict[str, Any] = {name: array_handler() for name in ARRAYS}
        handlers |= {name: ocp.JsonCheckpointHandler() for name in JSONS}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
        except Exception as error:  # of the file system, local or not
            reason = getattr(error, "strerror", None) or first_line(error)
            raise OSError(f"{self.folder} can't be written: {reason}.") from error

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint, being written or written."""
        return self._manager.latest_step()

    def path(self, step: int) -> epath.Path:
        """Folder of one checkpoint."""
        return self.folder / str(step)

    def save(
        self, step: int, arrays: Mapping[str, Params], progress: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        """Saves one checkpoint; returns when the arrays are copied and may be donated.

        Args:
          step: its number.
          arrays: trees of jax arrays by name, of `ARRAYS`.
          progress: anything JSON that a run needs to go on.
          config: the run's configuration.

        Raises:
          OSError: this or the previous checkpoint can't be written.
        """
        items: dict[str, Any] = {name: save_by_layer(tree) for name, tree in arrays.items()}
        items |= {"config": ocp.args.JsonSave(dict(config)), "progress": ocp.args.JsonSave(dict(progress))}
        self._guard(lambda: self._manager.save(step, args=ocp.args.Composite(**items)))

    def restore(self, step: int, shapes: Mapping[str, Params]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads one checkpoint's arrays onto the devices, and its progress.

        Args:
          step: its number.
          shapes: trees of `jax.ShapeDtypeStruct`s with shardings, which may differ from those it was saved with.

        Raises:
          ValueError: a file of it is missing or damaged.
        """
        items: dict[str, Any] = {
            name: ocp.args.PyTreeRestore(item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
            for name, tree in shapes.items()
        }
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items, progress=ocp.args.JsonRestore()))
        except Exception as error:
            others = [s for s in self._manager.all_steps() if s < step]
            before = f"from step {max(others)}" if others else "from the beginning"
            raise ValueError(
                f"{self.path(step)} can't be restored ({first_line(error)}); remove that folder to go on {before}."
            ) from error
        return {name: restored[name] for name in shapes}, restored["progress"]

    def should_stop(self, step: int) -> bool:
        """Whether the cluster is about to take the machine away; the same in every process."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Returns when everything is written.

        Raises:
          OSError: it can't be.
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
        """Runs what writes; of whatever goes wrong there, the user needs one sentence."""
        try:
            action()
        except Exception as error:
            whole = [step for step in self._manager.all_steps() if (self.path(step) / "progress").exists()]
            good = f"the last good one is {self.path(max(whole))}" if whole else "there is no earlier one"
            raise OSError(
                f"A checkpoint could not be written to {self.folder} ({first_line(error)}); {good}."
            ) from error
