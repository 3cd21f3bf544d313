"""Measures the data path: examples read, parsed and batched, against grain's ArrayRecordDataSource alone.

    python tools/benchmark_data.py --examples 32

Writes synthetic examples of the training shape of docs/method.md (21x60x104x16 video latents, three references, 512
text tokens, VFM width 1,024) into a temporary folder, reads them once so that the page cache is warm, and prints the
rates in examples a second, round by round, and the ratios of their medians. One process. The source alone is read first
as it comes, then, in turn with the loader, in the same process with the loader's setting of malloc (see
`loader._keep_freed_memory`), in one thread and in as many as the loader has.
"""

import concurrent.futures
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Literal

import numpy as np
from grain.sources import ArrayRecordDataSource

from refalign_jax.command import run
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


def main(
    examples: int = 32,
    rounds: int = 5,
    batch_size: int = 4,
    num_threads: int = 1,
    vfm_features: Literal["float32", "bfloat16", "int8"] = "bfloat16",
    dtype: Literal["float32", "stored"] = "stored",
    folder: str = "",
) -> None:
    """Runs the measurement.

    Args:
      examples: how many are written and read a round.
      rounds: of each of the three, in turn.
      batch_size: rows a batch.
      num_threads: of the loader.
      vfm_features: storage of the VFM targets.
      dtype: of the batches.
      folder: parent of the temporary folder; the system's by default.
    """
    spec = Spec(
        num_examples=examples,
        video_latents=(21, 60, 104, 16),
        text_width=4096,
        vfm_width=1024,
        longest_text=512,
        most_references=3,
    )
    with tempfile.TemporaryDirectory(dir=folder or None) as temporary:
        write(temporary, spec, Storage(vfm_features=vfm_features))
        source = ShardSource(temporary)
        megabytes = sum(shard.bytes for shard in source.manifest.shards) / examples / 1e6
        alone = ArrayRecordDataSource([os.path.join(temporary, s.name) for s in source.manifest.shards])
        config = DataConfig(path=temporary, batch_size=batch_size, num_threads=num_threads, dtype=dtype)
        order = np.random.default_rng(0).permutation(examples).tolist()

        def one_thread() -> None:
            for index in order:
                alone[index]

        def same_threads() -> None:
            with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
                for _ in pool.map(alone.__getitem__, order):
                    pass

        loader = make_loader(config, source)

        def whole() -> None:
            for _ in range(examples // batch_size):
                next(loader)

        plain = [rate(one_thread, examples) for _ in range(rounds + 1)][1:]  # the first warms the page cache
        rates: dict[str, list[float]] = {
            "source as it comes": plain,
            "source, freed memory kept": [],
            f"the same, {num_threads} threads": [],
            "loader": [],
        }
        for turn in range(rounds + 1):
            for name, read in zip(list(rates)[1:], (one_thread, same_threads, whole), strict=True):
                if read is whole:  # as in the middle of a run: what was ready is taken, and reading has just begun
                    for _ in range(config.prefetch):
                        next(loader)
                measured = rate(read, examples)
                time.sleep(0.5)  # what the loader read ahead must not slow the next
                if turn:  # the first turn starts the loader
                    rates[name].append(measured)
        loader.close()
    print(f"{megabytes:.1f} MB an example; {examples} examples, {rounds} rounds; examples a second, and the ratio:")
    ours = statistics.median(rates["loader"])
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"  {name:26s} median {median:6.1f}  loader/this {ours / median:.2f}  {[round(v) for v in values]}")


if __name__ == "__main__":
    run(main)
