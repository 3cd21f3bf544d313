"""Time and peak memory of converting a full-shape RefAlign checkpoint of random weights both ways.

python tools/benchmark_convert.py [--size 1.3b] [--dtype bfloat16]
"""

import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from refalign_jax.command import run
from refalign_jax.config import AlignmentConfig, ModelConfig, wan_1_3b, wan_14b
from refalign_jax.convert.dit import model_table
from refalign_jax.convert.files import open_weights, write_weights
from refalign_jax.convert.table import published_shapes
from refalign_jax.params import model_shapes


def main(
    *,
    size: Literal["1.3b", "14b"] = "1.3b",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    folder: Path | None = None,
) -> None:
    """Writes random weights, converts them to a checkpoint and back in processes of their own, compares the bytes.

    Args:
      size: which model, with its nine projectors.
      dtype: of the weights.
      folder: where the files go, some 9 GB for 1.3b in bfloat16; by default a temporary one.
    """
    config = ModelConfig(dit=wan_1_3b() if size == "1.3b" else wan_14b(), alignment=AlignmentConfig())
    shapes = published_shapes(model_table(config.dit, config.alignment), model_shapes(config))
    stored = np.dtype(jnp.dtype(dtype))
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        first, checkpoint, second = (
            Path(temporary) / name for name in ("a.safetensors", "checkpoint", "b.safetensors")
        )
        tensors = ((name, rng.standard_normal(shape, np.float32).astype(stored)) for name, shape in shapes.items())
        write_weights(first, tensors, shapes, dict.fromkeys(shapes, stored), max_shard_bytes=10**12)
        held = first.stat().st_size
        print(f"{first.name}: {len(shapes)} tensors, {held / 2**30:.2f} GiB")
        _timed("import", str(first), str(checkpoint), held=held)
        _timed("export", str(checkpoint), str(second), "--projectors", "--max-shard-gb", "1000", held=held)
        before, after = open_weights(first), open_weights(second)
        equal = all(_digest(before.read(name)) == _digest(after.read(name)) for name in shapes)
        print(f"every tensor byte-equal after both ways: {equal}")


def _timed(*arguments: str, held: int) -> None:
    """Runs one conversion and prints its time and its peak resident memory, absolute and beyond the parameters."""
    code = (
        "import resource, runpy, sys\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    script = str(Path(__file__).with_name("convert.py"))
    started = time.perf_counter()
    command = [sys.executable, "-c", f"import sys; sys.argv = [{script!r}, *sys.argv[1:]]\n{code}", *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds = time.perf_counter() - started
    peak = int(output.split("peak")[-1]) * (1 if sys.platform == "darwin" else 1024)
    print(f"{arguments[0]}: {seconds:.0f} s, peak {peak / 2**30:.2f} GiB, {(peak - held) / 2**30:.2f} GiB beyond them")


def _digest(value: np.ndarray) -> str:
    return hashlib.sha256(value.view(np.uint8).tobytes()).hexdigest()


if __name__ == "__main__":
    run(main)
