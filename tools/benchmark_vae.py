"""Measures the full-size VAE with random weights on a real video: memory, time and the error of tiling.

    python tools/benchmark_vae.py VIDEO.mp4 --height 96 --width 224 --frames 0

Memory is what the compiler plans and what the system reports.
"""

from refalign_jax.command import run

# isort: split
import resource
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from refalign_jax.data.clip_frames import resize_and_crop
from refalign_jax.data.video import probe, read_frames, to_float
from refalign_jax.models import vae
from refalign_jax.models.streaming import Tiling

CONFIG = vae.VAEConfig()


def temporary_memory(height: int, width: int, frames: int) -> tuple[int, int]:
    """Bytes of temporaries the compiler plans for encoding and for decoding so many frames; nothing is run."""
    shapes = jax.eval_shape(lambda: vae.init(CONFIG, jax.random.key(0)))
    video = jax.ShapeDtypeStruct((1, frames, height, width, 3), jnp.float32)
    latents = jax.ShapeDtypeStruct((1, (frames - 1) // 4 + 1, height // 8, width // 8, 16), jnp.float32)
    planned = []
    shaped: Any = ((vae.encode, video), (vae.decode, latents))
    for function, x in shaped:
        analysis: Any = jax.jit(lambda p, x, f=function: f(p, x, CONFIG)).lower(shapes, x).compile().memory_analysis()
        planned.append(analysis.temp_size_in_bytes)
    return planned[0], planned[1]


def benchmark_vae(
    video: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    height: int = 96,
    width: int = 224,
    frames: int = 0,
    plan: bool = False,
) -> None:
    """Encodes and decodes a video.

    Args:
      video: a video file that PyAV reads.
      height: rows to which it is resized and cropped, a multiple of 16.
      width: columns to which it is resized and cropped, a multiple of 16.
      frames: number of its frames, 4k+1; 0 for all.
      plan: also compile for 17 and 81 frames of 480x832 and print the temporary memory (minutes, nothing is run).
    """
    if plan:
        for count in (17, 81):
            encode, decode = temporary_memory(480, 832, count)
            print(
                f"{count} frames of 480x832: temporaries {encode:,} bytes to encode, {decode:,} to decode", flush=True
            )
    info = probe(video)
    count = frames or (info.num_frames - 1) // 4 * 4 + 1
    pixels = read_frames(video, np.arange(count))
    clip = jnp.asarray(to_float(resize_and_crop(pixels, height, width)))[None]
    params = jax.jit(vae.init, static_argnums=0)(CONFIG, jax.random.key(0))
    encoder = jax.jit(lambda p, x: vae.encode(p, x, CONFIG)).lower(params, clip).compile()
    started = time.perf_counter()
    latents = encoder(params, clip).block_until_ready()
    print(f"encoded {count} frames of {height}x{width} in {time.perf_counter() - started:.0f} s", flush=True)
    decoder = jax.jit(lambda p, x: vae.decode(p, x, CONFIG)).lower(params, latents).compile()
    started = time.perf_counter()
    decoded = decoder(params, latents).block_until_ready()
    print(f"decoded them in {time.perf_counter() - started:.0f} s, all finite: {bool(jnp.isfinite(decoded).all())}")
    print(f"peak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB", flush=True)

    few, tiling = clip[:, :5], Tiling(size=64, overlap=32)
    whole = vae.encode(params, few, CONFIG)
    for name, function, x in (("encode", vae.encode, few), ("decode", vae.decode, whole)):
        exact, tiled = function(params, x, CONFIG), function(params, x, CONFIG, tiling)
        error = float(jnp.linalg.norm(tiled - exact) / jnp.linalg.norm(exact))
        print(f"{name} of 5 frames in tiles of 64 with 32 overlapping: relative difference {error:.1e}", flush=True)


def main(arguments: list[str], prog: str) -> None:
    """Parses and measures."""
    tyro.cli(benchmark_vae, args=arguments, prog=prog, description=__doc__)


if __name__ == "__main__":
    run(main)
