"""Measures what the digests of a checkpoint cost: their share of a save's time, and the time to check them.

    python tools/benchmark_checkpoint.py --size 1.3b --items params
    python tools/benchmark_checkpoint.py --size tiny --items params ema optimizer

Random parameters of the model's shapes are saved as a run saves them, several times; the arrays of the other items are
the same ones, so that a whole state takes the memory of the parameters alone. The digests are written before a save
ends; their share of its time is printed.
"""

from refalign_jax.command import run

# isort: split
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest import mock

import tyro
from tyro.conf import arg

from refalign_jax.config import AlignmentConfig, ModelConfig, wan_1_3b

Item = Literal["params", "ema", "optimizer"]


def benchmark_checkpoint(
    *,
    size: Literal["tiny", "1.3b"] = "1.3b",
    items: tuple[Item, ...] = ("params",),
    saves: int = 3,
    folder: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: a temporary one)")] = None,
) -> None:
    """Saves random parameters, prints the digests' share of each save's time, and checks the last checkpoint.

    Args:
      size: the model, with its nine projectors; tiny is its first layer alone.
      items: what is saved; the optimizer has two moments of every parameter, the moving average one.
      saves: how many times; the first one also makes the file system's room.
      folder: of the checkpoints, one at a time: 5.8 GB for params of 1.3b, 23 GB for all items.
    """
    from refalign_jax.convert import checksums
    from refalign_jax.trainer.checkpoint import Checkpoints

    dit = wan_1_3b() if size == "1.3b" else dataclasses.replace(wan_1_3b(), num_layers=1)
    params = _random(ModelConfig(dit=dit, alignment=AlignmentConfig(num_blocks=min(9, dit.num_layers))))
    trees = {"params": params, "ema": params, "optimizer": {"mu": params, "nu": params}}
    arrays: dict[str, Any] = {name: trees[name] for name in items}
    shares, seconds = [], list[float]()
    write = checksums.write_digests

    def timed(item: Any) -> None:
        began = time.perf_counter()
        write(item)
        seconds.append(time.perf_counter() - began)

    with tempfile.TemporaryDirectory(dir=folder) as place, mock.patch.object(checksums, "write_digests", timed):
        for step in range(1, saves + 1):
            seconds.clear()
            with Checkpoints(place, keep=1) as checkpoints:
                began = time.perf_counter()
                checkpoints.save(step, arrays, {"step": step}, {})
                blocked = time.perf_counter() - began
                checkpoints.wait()
                total = time.perf_counter() - began
                last = Path(checkpoints.path(step))
            bytes_ = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
            shares.append(sum(seconds) / total)
            print(
                f"save {step}: {bytes_ / 1e9:.2f} GB in {total:.2f} s, of which training waits {blocked:.2f} s; "
                f"digests {sum(seconds):.2f} s, {shares[-1]:.1%}",
                flush=True,
            )
        began = time.perf_counter()
        checksums.check_digests(checkpoints.path(saves), items)
        print(f"check: {time.perf_counter() - began:.2f} s")
    print(f"The digests take {statistics.median(shares):.1%} of a save's time, the median of {saves}.")


def _random(model: ModelConfig) -> Any:
    """Random parameters of a model in float32, as JAX arrays."""
    import jax
    import numpy as np

    from refalign_jax.initial import model_shapes

    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jax.device_put(rng.random(x.shape, np.float32)), model_shapes(model))


def main(arguments: Sequence[str], prog: str) -> None:
    """Parses and measures."""
    tyro.cli(benchmark_checkpoint, args=arguments, prog=prog, description=__doc__)


if __name__ == "__main__":
    run(main)
