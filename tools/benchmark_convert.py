"""Measures time and peak memory of converting a full-shape checkpoint of random weights both ways, on Linux.

    python tools/benchmark_convert.py --size 1.3b --dtype float32 --fsdp 8

Each step runs in a process of its own; at the end the tensors are compared byte by byte.
"""

from refalign_jax.command import run

# isort: split
import hashlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tyro.conf import arg

from refalign_jax.config import AlignmentConfig, ExportConfig, MeshConfig, ModelConfig, wan_1_3b, wan_14b
from refalign_jax.convert.checkpoint import read_model, restore_params, save_params
from refalign_jax.convert.dit import model_table
from refalign_jax.convert.files import open_weights
from refalign_jax.convert.table import published_shapes
from refalign_jax.convert.transfer import export_weights, import_weights
from refalign_jax.convert.write import write_weights
from refalign_jax.initial import model_shapes
from refalign_jax.sharding import make_mesh, state_sharding


def benchmark_convert(
    *,
    size: Literal["1.3b", "14b"] = "1.3b",
    dtype: Literal["bfloat16", "float32"] = "float32",
    fsdp: int = 8,
    folder: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: a temporary one)")] = None,
) -> None:
    """Writes random weights, converts them to a checkpoint, spreads that over devices, converts it back.

    Each step runs in a process of its own, whose memory is printed before and at its peak.

    Args:
      size: the model, with its nine projectors.
      dtype: dtype of the weights; float32 is what a training run saves.
      fsdp: simulated devices over which the checkpoint that is exported was saved.
      folder: folder of the files, about 23 GB for 1.3b in float32.
    """
    config = ModelConfig(dit=wan_1_3b() if size == "1.3b" else wan_14b(), alignment=AlignmentConfig())
    shapes = published_shapes(model_table(config.dit, config.alignment), model_shapes(config))
    stored = np.dtype(jnp.dtype(dtype))
    rng = np.random.default_rng(0)
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={fsdp}"  # for the processes to come
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        first, imported, spread, last = (
            Path(temporary) / name for name in ("a.safetensors", "imported", "spread", "b.safetensors")
        )
        tensors = ((name, rng.standard_normal(shape, np.float32).astype(stored)) for name, shape in shapes.items())
        write_weights(first, tensors, shapes, dict.fromkeys(shapes, stored), max_shard_bytes=10**12)
        print(f"{first.name}: {len(shapes)} tensors, {first.stat().st_size / 2**30:.2f} GiB")
        _alone(import_weights, first, imported)
        _alone(_spread, imported, spread, fsdp)
        _alone(export_weights, spread, last, ExportConfig(projectors=True, max_shard_gb=1e3))
        before, after = open_weights(first), open_weights(last)
        equal = all(_digest(before.read(name)) == _digest(after.read(name)) for name in shapes)
        print(f"every tensor byte-equal after all: {equal}")


def _spread(source: Path, target: Path, fsdp: int) -> None:
    """Saves a checkpoint again, now as a run over `fsdp` devices does."""
    model = read_model(source)
    shapes = model_shapes(model)
    stored = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        state_sharding(shapes, make_mesh(MeshConfig(fsdp=fsdp))),
    )
    save_params(target, restore_params(source, stored), model)


def _alone(function: Callable[..., Any], *arguments: Any) -> None:
    """Runs a function in a process of its own and prints what that took."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_measured, args=(queue, function, arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise ValueError(f"{function.__name__} ended with exit code {process.exitcode}.")
    seconds, idle, peak = queue.get()
    print(
        f"{function.__name__}: {seconds:.0f} s; memory {idle:.2f} GiB idle, {peak:.2f} GiB at its peak, "
        f"{peak - idle:.2f} GiB more"
    )


def _measured(queue: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    jax.devices()
    idle, started = _memory("VmRSS"), time.perf_counter()
    function(*arguments)
    queue.put((time.perf_counter() - started, idle, _memory("VmHWM")))


def _memory(field: str) -> float:
    """GiB of resident memory: VmRSS now, VmHWM at the most until now."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def _digest(value: np.ndarray) -> str:
    return hashlib.sha256(value.view(np.uint8).tobytes()).hexdigest()


def main(arguments: list[str], prog: str) -> None:
    """Parses and measures."""
    tyro.cli(benchmark_convert, args=arguments, prog=prog, description=__doc__)


if __name__ == "__main__":
    run(main)
