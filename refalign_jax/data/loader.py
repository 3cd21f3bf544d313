"""Batches of prepared examples, through Grain: shuffled, padded, split over processes, exact on resume.

The global order is a function of (seed, position) alone. In one dataset, position p is in epoch ⌊p/n⌋ at place p mod n,
and a pseudo-random permutation of the n training examples, seeded by seed + epoch, maps the place to an example. Global
batch k has the positions [k·B, (k+1)·B) after the start; process i of N takes rows [i·B/N, (i+1)·B/N) of it. So the
order does not depend on processes, workers or threads, and the iterator's whole state is the number of examples
consumed: seeking is O(1), and a run can continue with another number of processes or another batch size.

The last `held_out` examples of a dataset never appear in training.

Several datasets (`data.mix`) take turns by their weights (order.py). Each has an order of its own, with epochs and a
seed of its own, and holds out its share of the `held_out` examples. The state then has the weights, and what is said
here of a dataset for each.

A dataset may grow at its end while a run is stopped. With `data.grown_from`, the number of examples it had when the run
began, the run goes on with all of them: the epoch that had begun ends in its old order, so that no example is shown
less often than the others, and the epochs after it are over all examples. The last `held_out` of the first `grown_from`
examples stay held out. The state has the digest of the dataset's beginning, and the order's segments: where each number
of examples came into use.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import grain
import numpy as np
from absl import flags

from refalign_jax.config import FIELDS, MAX_TEXT_LENGTH, DataConfig
from refalign_jax.data.examples import MASK, fill
from refalign_jax.data.mixture import Source, parts_of
from refalign_jax.data.order import ENDLESS, Interleaved, Order, grow, one_after_another, seed_of, spread
from refalign_jax.data.shards import CorruptRecordError
from refalign_jax.data.splits import Split, check_same, open_split
from refalign_jax.types import Float, Int

Rows = dict[str, np.ndarray]
"""A batch in the memory of one process, B rows of the global batch:

video_latents [B,F,H,W,C] · reference_latents [B,R,H,W,C] · num_references [B] int32 · subject_ids [B,R] int32, -1 where
padded · text [B,S,text_width] · vfm_features [B,R,P,E] · ids [B] str · index [B] int64, the example's number in the
source · place [B] int64, its number in the split · dataset [B] int32, the number of its dataset · subject_mask [B,R,P]
bool, where the source has it · target_mean [B,E], where it was given. References and text are padded by a suffix of
zeros.
"""

logger = logging.getLogger(__name__)


class BatchIterator:
    """An endless iterator over the batches of one process, as `make_loader` returns it.

    `close` ends its workers; a worker also ends by itself when this process is gone.
    """

    def __init__(
        self,
        config: DataConfig,
        order: Interleaved,
        read: _Read,
        rank: int,
        processes: int,
    ) -> None:
        self._config, self._order, self._read = config, order, read
        self._rank, self._processes = rank, processes
        self._consumed = 0
        self._corrupt: set[str] = set()
        self._running: list[grain.DatasetIterator] = []
        # This also runs at exit, before Grain's own clean-up, which comes when Python is half shut down.
        weakref.finalize(self, _close, self._running)

    def _start(self) -> grain.DatasetIterator:
        """Builds Grain's pipeline from the current position on."""
        _keep_freed_memory()
        config = self._config
        order: grain.MapDataset = grain.MapDataset.source(self._order)
        rows = order[self._consumed : ENDLESS].batch(config.batch_size // self._processes)
        batches = rows[self._rank :: self._processes].map(self._read)
        options = grain.ReadOptions(num_threads=config.num_threads, prefetch_buffer_size=config.prefetch)
        pipeline = batches.to_iter_dataset(options)
        if config.num_workers:
            # Grain reads its settings from absl flags, which only absl apps parse.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            workers = grain.MultiprocessingOptions(num_workers=config.num_workers)
            pipeline = pipeline.mp_prefetch(workers, worker_init_fn=_start_worker)
        return iter(pipeline)

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Rows:
        """Returns the next batch.

        Raises:
          ValueError: more than `max_corrupt` records can't be read.
        """
        if not self._running:
            self._running.append(self._start())
        batch = next(self._running[0])
        for message in batch.pop("corrupt"):
            if message not in self._corrupt:
                self._corrupt.add(message)
                logger.warning("%s It is skipped (%d of %d).", message, len(self._corrupt), self._config.max_corrupt)
            if len(self._corrupt) > self._config.max_corrupt:
                self.close()
                raise ValueError(_too_many(message, self._config.max_corrupt))
        self._consumed += self._config.batch_size
        if self._config.num_workers:
            # Copied out of shared memory, or what a caller still has at exit would be reported as leaked.
            batch = {name: np.array(values) for name, values in batch.items()}
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last batch taken: plain JSON, the same in every process."""
        config, splits = self._config, self._read.splits
        state = {"examples_consumed": self._consumed, "shuffle_seed": config.shuffle_seed}
        orders = self._order.orders
        datasets = [split.state(order) for split, order in zip(splits, orders, strict=True)]
        if not config.mix:
            return state | datasets[0]
        return state | {"proportions": list(config.proportions), "datasets": datasets}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Moves to a position that `get_state` returned, with any number of processes or workers and any batch size.

        Raises:
          ValueError: the state belongs to another order, that is another seed, dataset, split or weights, or to a
            dataset that has grown since without `data.grown_from`.
        """
        config, splits = self._config, self._read.splits
        saved = state.get("datasets", [state])
        if not isinstance(saved, list) or not all(isinstance(one, Mapping) for one in saved):
            raise ValueError(f"The position in the data is damaged: {dict(state)!r:.200}.")
        now: dict[str, Any] = {"shuffle_seed": config.shuffle_seed}
        if config.mix or "datasets" in state:
            now |= {"proportions": list(config.proportions), "datasets": len(splits)}
            state = dict(state) | {"datasets": len(saved), "proportions": state.get("proportions", [1])}
        check_same(state, now)
        for split, before in zip(splits, saved, strict=True):
            split.check(before)
        self.close()
        try:
            consumed = int(state["examples_consumed"])
            parts = [one.get("segments", [(0, one["num_examples"])]) for one in saved]
            segments = [[(int(first), int(size)) for first, size in part] for part in parts]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"The position in the data is damaged: {dict(state)!r:.200}.") from error
        self._consumed = consumed
        orders = []
        for number, (split, before) in enumerate(zip(splits, segments, strict=True)):
            grown = grow(before, split.size, self._order.count(number, consumed))
            orders.append(Order(self._order.orders[number].seed, grown))
        self._order = self._order.change(orders)

    def close(self) -> None:
        """Ends threads and workers; asking for another batch starts new ones."""
        _close(self._running)


def make_loader(
    config: DataConfig,
    source: Source,
    *,
    split: Literal["train", "held_out"] = "train",
    process_index: int = 0,
    process_count: int = 1,
    target_mean: Float[np.ndarray, " E"] | None = None,
) -> BatchIterator:
    """Returns the batches of one process.

    Training is reshuffled every epoch and never ends. It drops no remainder: the end of an epoch and the beginning of
    the next may share a batch. The held-out split is in written order and repeats without a gap, whatever the
    batch size.

    Args:
      config: batch size, padding, split and workers.
      source: the examples, such as `mixture.open_dataset(config)`.
      split: "train", or "held_out", the last `config.held_out` examples.
      process_index: jax.process_index().
      process_count: jax.process_count().
      target_mean: of the dataset's VFM tokens, as `targets.target_mean` returns it; given to every row.

    Raises:
      ValueError: a batch that the processes do not divide, no examples in the split, or text that would be cut.
    """
    if config.batch_size % process_count:
        raise ValueError(f"data.batch_size is {config.batch_size}; {process_count} processes must divide it.")
    train = split == "train"
    splits, start = [], 0
    for part, data in zip(parts_of(source), config.parts, strict=True):
        splits.append(open_split(part, data, train, start))
        start += len(part)
    if not any(one.size for one in splits):
        raise ValueError(
            f"data.held_out is {config.held_out} of {len(source)} examples, which leaves none for the split {split}."
        )
    if source.spec.longest_text > config.text_length:
        raise ValueError(
            f"data.text_length is {config.text_length}, but the longest prompt has {source.spec.longest_text} tokens; "
            f"it must be at least that, and the published context has {MAX_TEXT_LENGTH}."
        )
    seeds = [seed_of(number, config.shuffle_seed) if train else None for number in range(len(splits))]
    orders = [Order(seed, [(0, max(one.size, 1))]) for seed, one in zip(seeds, splits, strict=True)]
    turns = spread(config.proportions) if train else one_after_another([one.size for one in splits])
    read = _Read(config, source, splits, target_mean)
    return BatchIterator(config, Interleaved(orders, turns), read, process_index, process_count)


class _Read:
    """Reads the examples of a batch, each directly into its row, so a thread has one record in memory at a time.

    Args:
      config: padding.
      source: the examples.
      splits: of each dataset.
      target_mean: as in `make_loader`.
    """

    def __init__(
        self, config: DataConfig, source: Source, splits: Sequence[Split], target_mean: np.ndarray | None
    ) -> None:
        self._target_mean = target_mean
        self._config, self._spec, self.splits = config, source.spec, tuple(splits)
        self._places = np.cumsum([0, *(split.size for split in splits)])

    def __call__(self, turns: Int[np.ndarray, "B 2"]) -> dict[str, Any]:
        """Returns `Rows` of the examples at these turns, (dataset, place), and messages on corrupt records."""
        B, R = len(turns), self._config.max_references
        corrupt: list[str] = []
        ids: list[str] = []
        batch: dict[str, Any] = {
            "num_references": np.zeros(B, np.int32),
            "subject_ids": np.full((B, R), -1, np.int32),
            "index": np.zeros(B, np.int64),
            "place": np.zeros(B, np.int64),
            "dataset": np.zeros(B, np.int32),
        }
        if self._spec.subject_mask:
            batch[MASK] = np.zeros((B, R, self._spec.vfm_tokens), bool)
        if self._target_mean is not None:
            batch["target_mean"] = np.tile(self._target_mean, (B, 1))
        for row, (number, place) in enumerate(turns.tolist()):
            split = self.splits[number]
            place, arrays, about = self._readable(split, place, corrupt)
            if row == 0:
                batch |= self._allocate(B, arrays)
            for name in FIELDS:
                out = batch[name][row]
                used = min(len(arrays[name]), len(out))
                fill(out[:used], arrays, name)
                out[used:] = 0
            used = min(len(arrays["subject_ids"]), R)
            batch["subject_ids"][row, :used] = arrays["subject_ids"][:used]
            if MASK in batch:
                batch[MASK][row, :used] = arrays[MASK][:used]
            batch["num_references"][row] = used
            batch["index"][row] = split.start + split.index(place)
            batch["place"][row] = self._places[number] + place
            batch["dataset"][row] = number
            ids.append(about["id"])
        return {**batch, "ids": np.array(ids), "corrupt": corrupt}

    def _readable(
        self, split: Split, place: int, corrupt: list[str]
    ) -> tuple[int, dict[str, np.ndarray], dict[str, Any]]:
        """Returns the example at a place or, if its record is corrupt, at the next readable place; and the place."""
        for step in range(split.size):
            here = (place + step) % split.size
            try:
                return here, *split.source[split.index(here)]
            except CorruptRecordError as error:
                corrupt.append(str(error))
                if step >= self._config.max_corrupt:
                    break
        raise ValueError(_too_many(corrupt[-1], self._config.max_corrupt))

    def _allocate(self, B: int, arrays: Mapping[str, np.ndarray]) -> Rows:
        """Returns empty arrays for a batch; `arrays` is any example, for dtypes and the shapes that all share."""
        R = self._config.max_references
        shapes = {
            "video_latents": arrays["video_latents"].shape,
            "reference_latents": (R, *arrays["video_latents"].shape[1:]),
            "text": (self._config.text_length, arrays["text"].shape[1]),
            "vfm_features": (R, *arrays["vfm_features"].shape[1:]),
        }
        whole = self._config.dtype == "float32"
        dtypes = {n: np.dtype(np.float32) if whole or a.dtype == np.int8 else a.dtype for n, a in arrays.items()}
        return {name: np.empty((B, *shapes[name]), dtypes[name]) for name in FIELDS}


def _close(running: list[grain.DatasetIterator]) -> None:
    """Closes the iterator in the list, if there is one, and frees everything that it refers to."""
    if running:
        running.pop().close()
        gc.collect()  # Grain's iterators refer to each other in cycles


def _too_many(message: str, limit: int) -> str:
    """Returns the sentence for the corrupt record that is one too many."""
    return f"More than {limit} corrupt records (data.max_corrupt), the last: {message}"


def _keep_freed_memory() -> None:
    """Lets glibc keep up to 1 GiB of freed memory, in blocks of up to 256 MiB, for the next records.

    By default glibc returns a record's memory to the kernel after each batch and gets it back page by page, which takes
    twice as long as the reading itself. Without glibc this does nothing.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**30)
        libc.mallopt(mmap_threshold, 2**28)


def _start_worker(index: int, count: int) -> None:
    """Makes a worker end when its parent ends, and ignore signals, to which the parent reacts.

    A parent that is killed can't stop its workers, so a thread in each worker waits for the parent's end. The kernel's
    parent-death signal does not work here, because it is sent when the thread that started the worker ends, and Grain
    starts workers from a thread of its own.
    """
    del index, count
    _keep_freed_memory()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    # Ctrl-C and a preemption's SIGTERM reach the whole process group; the parent decides when the workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
