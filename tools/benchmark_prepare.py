"""Measures what reading and writing a clip cost, counts what the encoders compute, and estimates whole datasets.

    python tools/benchmark_prepare.py --clips 6

It makes clips of 1280x720 pixels at 25 frames a second out of scikit-image's photographs, coded as H.264 by this
package's writer, and reads them as preparation does: 81 frames of 480x832, three references cut from the clip and
augmented. Times are processor seconds of all threads, so that they do not depend on what else the machine does. The
encoders are Wan2.1's VAE, UMT5-XXL at 512 tokens and a VFM of the size of ViT-L; the VAE's operations are counted by
XLA, those of the others by the rule of two per parameter and token plus attention's. Their speed on a CPU core is that
of an earlier measurement, `core_gflops`; on an accelerator it is its peak times `share`, an assumption.
"""

from refalign_jax.command import run

# isort: split
import collections
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image
from skimage import data

from refalign_jax.config import PrepareConfig, Storage
from refalign_jax.data.clips import Clip, load_record
from refalign_jax.data.examples import Example
from refalign_jax.data.records import Record, Reference
from refalign_jax.data.shard_writer import ShardWriter
from refalign_jax.data.video import write_video
from refalign_jax.devices import CHIPS
from refalign_jax.digests import Digests
from refalign_jax.models import umt5, vae
from refalign_jax.models.dinov3 import VIT_L16
from refalign_jax.models.dinov3 import init as init_vit
from refalign_jax.trees import count

SIZES = (32_112, 360_000, 5_000_000)
"""Clips: the published subset of OpenS2V-5M, the mixture of the paper's later version, all of OpenS2V-5M."""
ACCELERATORS = ("TPU v5e", "TPU v5", "TPU v6e", "NVIDIA H100")
"""By the beginning of their `device_kind`; TPU v5 is v5p."""
HEIGHT, WIDTH, FRAMES, REFERENCES, TOKENS = 480, 832, 81, 3, 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line.

    Attributes:
      clips: Clips that are read.
      core_gflops: Speed of a CPU core on the encoders, 10^9 operations a second; DINOv3's in docs/benchmarks.md.
      share: Share of an accelerator's peak at which the encoders are assumed to run.
    """

    clips: int = 6
    core_gflops: float = 62.0
    share: float = 0.3


def make_clip(folder: Path, number: int) -> Record:
    """A clip of five seconds in which a photograph moves, and three references that show parts of it."""
    names = (data.astronaut, data.coffee, data.cat)
    picture = np.asarray(Image.fromarray(names[number % 3]()).resize((1600, 900), Image.Resampling.LANCZOS))
    frames = np.stack([picture[t : t + 720, 2 * t : 2 * t + 1280] for t in range(125)])
    path = folder / f"{number}.mp4"
    write_video(path, frames, fps=25)
    boxes = ((100, 50, 500, 450), (500, 100, 900, 650), (800, 200, 1200, 700))
    references = tuple(
        Reference(path=path, frame=40 * i, box=box, subject=str(i), own_clip=True) for i, box in enumerate(boxes)
    )
    return Record(id=str(number), video=path, prompt="", references=references)


def cpu_seconds(call: Callable[[], object]) -> float:
    """Processor seconds of a call, of all threads."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measure_reading(clips: int) -> float:
    """Processor seconds per clip of decoding, cropping, references and digests."""
    config = PrepareConfig(vae="dct", text_encoder="words", vfm="daisy", workers=1)
    with tempfile.TemporaryDirectory() as temporary, Digests(temporary) as digests:
        records = [make_clip(Path(temporary), number) for number in range(clips)]
        loaded: list[object] = []
        seconds = cpu_seconds(lambda: loaded.extend(load_record(record, config, digests) for record in records))
    assert all(isinstance(clip, Clip) for clip in loaded), loaded
    return seconds / clips


def measure_writing(clips: int) -> tuple[float, float]:
    """Processor seconds and MB per clip of writing examples."""
    F, H, W, P, E = (FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8, HEIGHT * WIDTH // 256, VIT_L16.width
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    fields: dict[str, Any] = {
        "video_latents": random(F, H, W, 16),
        "reference_latents": random(REFERENCES, H, W, 16),
        "text": random(TOKENS, 4096),
        "vfm_features": random(REFERENCES, P, E),
    }
    examples = [
        Example(id=str(i), prompt="", subject_ids=np.arange(REFERENCES, dtype=np.int32), **fields) for i in range(clips)
    ]
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(folder, storage=Storage(), made={}) as writer:
            seconds = cpu_seconds(lambda: collections.deque(map(writer.add, examples), maxlen=0))
        size = sum(path.stat().st_size for path in Path(folder).glob("*.array_record"))
    return seconds / clips, size / clips / 1e6


def vae_flops(config: vae.VAEConfig, height: int, width: int, frames: int) -> float:
    """Operations of encoding a video: those of the first frame, and of each group of four after it."""
    shapes = jax.eval_shape(lambda: vae.init(config, jax.random.key(0)))

    def counted(T: int) -> float:
        pixels = jax.ShapeDtypeStruct((1, T, height, width, 3), jnp.float32)
        lowered = jax.jit(lambda params, x: vae.encode(params, x, config)).lower(shapes, pixels)
        costs: Any = lowered.cost_analysis()
        return float(costs["flops"])

    first = counted(1)
    return first + (frames - 1) // 4 * (counted(5) - first)


def transformer_flops(parameters: int, layers: int, width: int, tokens: int) -> float:
    """Operations of an encoder: two per parameter and token, and attention's two products of all pairs."""
    return 2.0 * parameters * tokens + 4.0 * layers * width * tokens**2


def encoder_flops() -> dict[str, float]:
    """Operations per clip of each encoder, 10^12."""
    config = vae.VAEConfig()
    xxl = umt5.UMT5Config()
    text = jax.eval_shape(lambda: umt5.init(xxl, jax.random.key(0)))
    inner = count(text) - count(text["token_embedding"])
    patches = HEIGHT * WIDTH // 256 + 5
    vit = count(jax.eval_shape(lambda: init_vit(VIT_L16, jax.random.key(0))))
    image = transformer_flops(vit, VIT_L16.num_layers, VIT_L16.width, patches)
    found = {
        "VAE, the clip": vae_flops(config, HEIGHT, WIDTH, FRAMES),
        "VAE, three references": REFERENCES * vae_flops(config, HEIGHT, WIDTH, 1),
        "UMT5-XXL": transformer_flops(inner, xxl.num_layers, xxl.width, TOKENS),
        "VFM, three references": REFERENCES * image,
    }
    return {name: flops / 1e12 for name, flops in found.items()}


def main(arguments: list[str], prog: str) -> None:
    """Parses, measures and prints."""
    given = tyro.cli(Arguments, args=arguments, prog=prog, description=__doc__)
    reading = measure_reading(given.clips)
    writing, size = measure_writing(given.clips)
    print(f"reading {reading:.2f} and writing {writing:.3f} processor seconds per clip, {size:.1f} MB on disk")
    flops = encoder_flops()
    total = sum(flops.values())
    print("; ".join(f"{name} {value:.1f}" for name, value in flops.items()), f"= {total:.1f} TFLOP per clip")
    print(f"\n{'':32}" + "".join(f"{clips:>14,}" for clips in SIZES))
    rows = {"reading and writing, core hours": (reading + writing) / 3600}
    rows["encoders on CPUs, core hours"] = total * 1e3 / given.core_gflops / 3600
    for chip in (chip for chip in CHIPS if chip.kind in ACCELERATORS):
        rows[f"encoders, {chip.kind} hours"] = total / (chip.tflops * given.share) / 3600
    rows["on disk, TB"] = size / 1e6
    for name, value in rows.items():
        print(f"{name:32}" + "".join(f"{clips * value:>14,.1f}" for clips in SIZES))


if __name__ == "__main__":
    run(main)
