"""Preparation on Ray Data: CPUs that decode, on any number of machines, feed processes that encode.

    one task        iterates over the records
    CPU tasks       load_record: decode, crop, references       as many at a time as there are CPUs
    actors          the encoders, loaded once in each           as many as there are accelerators for them
    this process    writes the shards, in the records' order

Ray Data runs the stages at the same time and holds the faster ones back, so that what waits fits its object store. A
task that is lost with its machine is run again. What a record becomes depends on the record alone and the order is
kept, so the dataset is that of `--engine threads`, byte for byte.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from refalign_jax.atomic import first_line
from refalign_jax.config import PrepareConfig
from refalign_jax.data.clips import load_record
from refalign_jax.data.encode import Described, Made, describe_encoders, encode_in_batches
from refalign_jax.data.records import Entry, Record, Skipped
from refalign_jax.digests import Digests
from refalign_jax.encoders.open import open_encoders

try:
    import pyarrow as pa
    import ray
    import ray.data
    from ray.data.block import BlockMetadata
except ModuleNotFoundError as error:
    raise ValueError(
        f"The package {error.name} is not installed; install what --engine ray needs: pip install -e '.[ray]'."
    ) from error


class RayEngine:
    """Reads and encodes records on Ray. Starts it on this machine unless RAY_ADDRESS names a cluster.

    Args:
      config: encoders, sizes, and the number of processes.
      folder: the dataset's.

    Raises:
      ValueError: Ray can't be started or reached.
    """

    def __init__(self, config: PrepareConfig, folder: epath.Path) -> None:
        self._config, self._folder = config, folder
        if not ray.is_initialized():
            address = os.environ.get("RAY_ADDRESS")
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # errors come as exceptions
            local: dict[str, Any] = {} if address else {"num_cpus": config.workers + 1, "include_dashboard": False}
            try:
                ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
            except Exception as error:
                raise ValueError(f"Ray can't be started: {first_line(error)}.") from error

    def describe(self) -> Described:
        """Opens the encoders in a process of their own and describes them, so that this one takes no accelerator.

        Raises:
          ValueError: they can't be opened, or don't fit each other.
        """
        with _errors_as_they_were():
            task = ray.remote(_describe).options(**self._resources())
            return ray.get(task.remote(self._config))

    def make(self, todo: Iterable[Record | Skipped | Entry]) -> Iterator[Made | Skipped]:
        """Yields what becomes of each record, in their order.

        Args:
          todo: the records, which can be pickled as a whole, as every source can.

        Raises:
          ValueError: as in `encode_in_batches`.
        """
        context = ray.data.DataContext.get_current()
        context.target_max_block_size = 1  # a row is a block: a clip is large, and a record is work for one task
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        config, folder = self._config, os.fspath(self._folder)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        rows = ray.data.read_datasource(_Records(todo))
        # The sizes of the pools differ in kind, which keeps Ray from running both stages in one process.
        readers = ray.data.TaskPoolStrategy(size=config.workers)
        rows = rows.map_batches(
            _load, fn_kwargs={"config": config, "folder": folder}, batch_size=1, batch_format="pyarrow", compute=readers
        )
        pool = ray.data.ActorPoolStrategy(size=config.encoder_processes)
        rows = rows.map_batches(
            _Encode,
            fn_constructor_args=(config,),
            batch_size=config.batch_size,
            batch_format="pyarrow",
            compute=pool,
            **self._resources(),
        )
        with _errors_as_they_were():
            for row in rows.iter_rows():
                yield pickle.loads(row["value"])

    def _resources(self) -> dict[str, Any]:
        """What a process that encodes reserves."""
        config = self._config
        chips = {"resources": {"TPU": config.encoder_tpus}} if config.encoder_tpus else {}
        return {"num_cpus": 0 if config.encoder_gpus or chips else 1, "num_gpus": config.encoder_gpus, **chips}


class _Records(ray.data.Datasource):
    """Records as a source of Ray Data: one task that yields them as it reads them."""

    def __init__(self, todo: Iterable[Record | Skipped | Entry]) -> None:
        super().__init__()
        self._todo = todo

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *arguments: Any, **options: Any) -> list[ray.data.ReadTask]:
        del parallelism, arguments, options
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        todo = self._todo
        return [ray.data.ReadTask(lambda: (_table([entry]) for entry in todo), unknown)]


def _load(rows: pa.Table, config: PrepareConfig, folder: str) -> pa.Table:
    """Reads records."""
    with Digests(folder) as digests:
        return _table([load_record(entry, config, digests) for entry in _values(rows)])


class _Encode:
    """Encoders, loaded once in a process."""

    def __init__(self, config: PrepareConfig) -> None:
        self._encoders, self._batch_size = open_encoders(config), config.batch_size

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Encodes clips together."""
        return _table(encode_in_batches(_values(rows), self._encoders, self._batch_size))


def _describe(config: PrepareConfig) -> Described:
    return describe_encoders(open_encoders(config))


def _table(values: Iterable[Any]) -> pa.Table:
    """Pickles values into the rows of a table."""
    return pa.table({"value": pa.array([pickle.dumps(value) for value in values], pa.large_binary())})


def _values(rows: pa.Table) -> list[Any]:
    """Reads what `_table` pickled."""
    return [pickle.loads(value.as_buffer()) for value in rows["value"]]


@contextlib.contextmanager
def _errors_as_they_were() -> Iterator[None]:
    """Raises what a task raised, without Ray's traceback of it."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        if isinstance(cause, ValueError | OSError):
            raise cause from None
        raise ValueError(f"Ray gave up: {first_line(cause or error)}.") from error
