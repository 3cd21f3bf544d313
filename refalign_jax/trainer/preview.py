"""Samples drawn while training: videos, where the dataset's codec is at hand, and pictures of their latents.

A picture has a row an example: three frames of the sample, the same frames of the clip it was held out from, and the
references, all as principal colours of the latents, which needs no decoder. The latents themselves lie beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from refalign_jax.config import Config
from refalign_jax.data.colours import principal_colours
from refalign_jax.data.video import to_pixels, write_video
from refalign_jax.encoders.interface import VideoCodec
from refalign_jax.objective import Batch
from refalign_jax.sampling import sample
from refalign_jax.types import Array, Float, Params

PREVIEW_FPS = 16
"""Frames a second of preview videos, as Wan2.1 writes its own."""


def write_preview(
    params: Params,
    batch: Batch,
    empty_text: Float[Array, "S text_width"],
    config: Config,
    step: int,
    made: Mapping,
    codec: VideoCodec | None = None,
) -> None:
    """Samples from a batch's prompts and references, at the same noise every time, and writes the first few.

    Args:
      params: of the model.
      batch: held-out examples.
      empty_text: the negative prompt.
      config: of the run.
      step: for the files' names, previews/step-00000100.png and .npz.
      made: what `metrics.about` returned; it goes into both files.
      codec: decodes the samples to previews/step-00000100-0.mp4 and so on; None, no videos.
    """
    noise = jax.random.normal(jax.random.key(config.train.seed), batch.video_latents.shape, jnp.float32)
    latents = sample(
        params["dit"],
        jax.device_put(noise, batch.video_latents.sharding),
        batch.condition,
        batch.condition._replace(text=jnp.broadcast_to(empty_text.astype(batch.text.dtype), batch.text.shape)),
        dit=config.model.dit,
        config=config.sampling,
    )
    rows = jax.tree.map(
        lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True))[: config.train.previews].astype(
            np.float32
        ),
        (latents, batch.video_latents, batch.reference_latents),
    )
    if jax.process_index():
        return
    path = Path(config.train.folder) / "previews" / f"step-{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    about = json.dumps(dict(made))
    np.savez(path.with_suffix(".npz"), latents=rows[0], about=about)
    frames = np.linspace(0, rows[0].shape[1] - 1, 3).astype(int)
    pictures = np.stack([_row(np.concatenate([s[frames], v[frames], r])) for s, v, r in zip(*rows, strict=True)])
    image = Image.fromarray((pictures.reshape(-1, *pictures.shape[2:]) * 255).astype(np.uint8))
    info = PngInfo()
    info.add_text("about", about)
    image.save(path, pnginfo=info)
    if codec is not None:
        for i, latents in enumerate(rows[0]):
            write_video(path.with_name(f"{path.stem}-{i}.mp4"), to_pixels(codec.decode(latents[None])[0]), PREVIEW_FPS)


def _row(frames: Float[np.ndarray, "N H W C"]) -> Float[np.ndarray, "h w rgb"]:
    """Frames side by side, four pixels a latent."""
    colours = principal_colours(frames).repeat(4, axis=1).repeat(4, axis=2)
    return np.concatenate(list(colours), axis=1)
