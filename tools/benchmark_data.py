"""Measures the data path: examples read, parsed and batched, against grain's ArrayRecordDataSource alone.

    python tools/benchmark_data.py --examples 32

Writes synthetic examples of the training shape of docs/method.md (21x60x104x16 video latents, three references, 512
text tokens, VFM width 1,024) into a temporary folder, reads them once so that the page cache is warm, and prints the
rates in examples per second, round by round, and the ratios of their medians. One process. The source alone is read
first as it comes, then, in turn with the loader, in the same process with the loader's setting of malloc, which keeps
freed memory, in one thread and in as many as the loader has.
"""

from refalign_jax.command import run

# isort: split
import concurrent.futures
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Literal

import numpy as np
import tyro
from grain.sources import ArrayRecordDataSource

from refalign_jax.config import FIELDS, DataConfig, Storage
from refalign_jax.data.examples import Example, Spec
from refalign_jax.data.loader import make_loader
from refalign_jax.data.shard_writer import ShardWriter
from refalign_jax.data.shards import ShardSource
from refalign_jax.data.synthetic import SyntheticSource


def write(folder: str, spec: Spec, storage: Storage) -> None:
    """Writes `spec.num_examples` synthetic examples, eight a shard."""
    source = SyntheticSource(spec)
    with ShardWriter(folder, storage=storage, made={"synthetic": True}, examples_per_shard=8) as writer:
        for index in range(spec.num_examples):
            arrays, about = source[index]
            fields = {name: arrays[name].astype(np.float32) for name in FIELDS}
            writer.add(Example(id=about["id"], prompt="", metadata={}, subject_ids=arrays["subject_ids"], **fields))


def rate(read: Callable[[], None], examples: int) -> float:
    """Examples a second of one call that reads `examples`."""
    start = time.perf_counter()
    read()
    return examples / (time.perf_counter() - start)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line.

    Attributes:
      examples: Examples that are written, and read in each round.
      rounds: Rounds of each of the three, in turn.
      batch_size: Rows per batch.
      num_threads: Threads of the loader.
      vfm_features: Storage of the VFM targets.
      dtype: dtype of the batches.
      folder: Parent of the temporary folder; empty for the system's.
    """

    examples: int = 32
    rounds: int = 5
    batch_size: int = 4
    num_threads: int = 1
    vfm_features: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    dtype: Literal["float32", "stored"] = "stored"
    folder: str = ""


def benchmark_data(given: Arguments) -> None:
    """Writes a dataset, reads it in turns, and prints the rates."""
    spec = Spec(
        num_examples=given.examples,
        video_latents=(21, 60, 104, 16),
        text_width=4096,
        vfm_width=1024,
        longest_text=512,
        most_references=3,
    )
    with tempfile.TemporaryDirectory(dir=given.folder or None) as temporary:
        write(temporary, spec, Storage(vfm_features=given.vfm_features))
        source = ShardSource(temporary)
        megabytes = sum(shard.bytes for shard in source.manifest.shards) / given.examples / 1e6
        rates = read_in_turns(given, source)
    print(
        f"{megabytes:.1f} MB per example; {given.examples} examples, {given.rounds} rounds; examples per second, ratio:"
    )
    ours = statistics.median(rates["loader"])
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"  {name:26s} median {median:6.1f}  loader/this {ours / median:.2f}  {[round(v) for v in values]}")


def read_in_turns(given: Arguments, source: ShardSource) -> dict[str, list[float]]:
    """Examples per second of every way to read the dataset, round by round."""
    alone = ArrayRecordDataSource([os.path.join(source.folder, s.name) for s in source.manifest.shards])
    config = DataConfig(
        path=str(source.folder), batch_size=given.batch_size, num_threads=given.num_threads, dtype=given.dtype
    )
    order = np.random.default_rng(0).permutation(given.examples).tolist()

    def one_thread() -> None:
        for index in order:
            alone[index]

    def same_threads() -> None:
        with concurrent.futures.ThreadPoolExecutor(given.num_threads) as pool:
            for _ in pool.map(alone.__getitem__, order):
                pass

    loader = make_loader(config, source)

    def whole() -> None:
        for _ in range(given.examples // given.batch_size):
            next(loader)

    plain = [rate(one_thread, given.examples) for _ in range(given.rounds + 1)][1:]  # the first warms the page cache
    rates: dict[str, list[float]] = {
        "source as it comes": plain,
        "source, freed memory kept": [],
        f"the same, {given.num_threads} threads": [],
        "loader": [],
    }
    for turn in range(given.rounds + 1):
        for name, read in zip(list(rates)[1:], (one_thread, same_threads, whole), strict=True):
            if read is whole:  # as in the middle of a run: what was ready is taken, and reading has just begun
                for _ in range(config.prefetch):
                    next(loader)
            measured = rate(read, given.examples)
            time.sleep(0.5)  # what the loader read ahead must not slow the next
            if turn:  # the first turn starts the loader
                rates[name].append(measured)
    loader.close()
    return rates


def main(arguments: list[str], prog: str) -> None:
    """Parses and measures."""
    benchmark_data(tyro.cli(Arguments, args=arguments, prog=prog, description=__doc__))


if __name__ == "__main__":
    run(main)
