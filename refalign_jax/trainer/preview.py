"""Samples drawn while training: videos, where the dataset's codec is available, and pictures of their latents.

A picture has one row per example: three frames of the sample, the same frames of the clip, and the references, all in
principal colours of the latents, which need no decoder. The latents themselves are saved beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from refalign_jax.atomic import atomic_write
from refalign_jax.config import Config
from refalign_jax.data.colours import principal_colours
from refalign_jax.encoders.interface import VideoCodec
from refalign_jax.objective import Batch
from refalign_jax.sampling import sample
from refalign_jax.types import Array, Float, Params


class Preview(NamedTuple):
    """The first few samples of a batch and what they are compared with, as latents on the host.

    Attributes:
      latents: the samples.
      video_latents: the clips that the prompts and references belong to.
      reference_latents: the references.
    """

    latents: Float[np.ndarray, "N F H W C"]
    video_latents: Float[np.ndarray, "N F H W C"]
    reference_latents: Float[np.ndarray, "N R H W C"]


def draw_preview(params: Params, batch: Batch, empty_text: Float[Array, "S text_width"], config: Config) -> Preview:
    """Samples from a batch's prompts and references, at the same noise every time.

    Args:
      params: of the model.
      batch: held-out examples.
      empty_text: the negative prompt.
      config: of the run.
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

    def first_few(x: Array) -> np.ndarray:
        everywhere = multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(everywhere)[: config.train.previews].astype(np.float32)

    return Preview(first_few(latents), first_few(batch.video_latents), first_few(batch.reference_latents))


def write_preview(
    path: Path, preview: Preview, made: Mapping[str, Any], codec: VideoCodec | None = None, fps: float = 16.0
) -> None:
    """Writes a preview: <path>.png, its latents <path>.npz, and <path>-0.mp4 and so on.

    Args:
      path: without a suffix; its folder is made if need be.
      preview: what `draw_preview` returned.
      made: what `provenance.about` returned; it goes into the PNG and the NPZ.
      codec: decodes the samples to videos; None writes no videos.
      fps: frames per second of the videos.
    """
    path.parent.mkdir(exist_ok=True)
    about = json.dumps(dict(made))
    with atomic_write(path.with_suffix(".npz")) as temporary, temporary.open("wb") as file:
        np.savez(file, latents=preview.latents, about=about)
    frames = np.linspace(0, preview.latents.shape[1] - 1, 3).astype(int)
    rows = [_row(np.concatenate([s[frames], v[frames], r])) for s, v, r in zip(*preview, strict=True)]
    image = Image.fromarray((np.concatenate(rows) * 255).astype(np.uint8))
    info = PngInfo()
    info.add_text("about", about)
    with atomic_write(path.with_suffix(".png")) as temporary, temporary.open("wb") as file:
        image.save(file, "PNG", pnginfo=info)
    if codec is None:
        return
    from refalign_jax.data.video import write_latents  # FFmpeg, which most runs don't need

    videos = [path.with_name(f"{path.name}-{i}.mp4") for i in range(len(preview.latents))]
    write_latents(videos, preview.latents, codec, fps)


def _row(frames: Float[np.ndarray, "N H W C"]) -> Float[np.ndarray, "h w rgb"]:
    """Frames side by side, four pixels for each latent."""
    colours = principal_colours(frames).repeat(4, axis=1).repeat(4, axis=2)
    return np.concatenate(list(colours), axis=1)
