"""Samples drawn while training: videos, where the dataset's codec is available, and pictures of their latents.

A picture has one row per example: three frames of the sample, the same frames of the clip, and the references, all in
principal colours of the latents, which need no decoder. The latents themselves are saved beside it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from refalign_jax.atomic import atomic_write
from refalign_jax.config import Config
from refalign_jax.data.colours import principal_colours
from refalign_jax.data.loader import Rows, make_loader
from refalign_jax.data.mixture import Source
from refalign_jax.data.shards import WAN_FPS
from refalign_jax.drawing import Inputs, batches, denoise, rows_per_call, seeded_noise, stack
from refalign_jax.encoders.interface import VideoCodec
from refalign_jax.types import Array, Float, Params


class Preview(NamedTuple):
    """Samples of the first held-out examples and what they are compared with, as latents on the host.

    Attributes:
      ids: of the examples.
      latents: the samples.
      video_latents: the clips that the prompts and references belong to.
      reference_latents: the references, behind them zeros.
    """

    ids: tuple[str, ...]
    latents: Float[np.ndarray, "N F H W C"]
    video_latents: Float[np.ndarray, "N F H W C"]
    reference_latents: Float[np.ndarray, "N R H W C"]


def preview_rows(config: Config, source: Source) -> Rows:
    """The examples that are previewed, the first held-out ones; every process reads all of them."""
    count = min(config.train.previews, config.data.held_out)
    data = dataclasses.replace(config.data, batch_size=count, num_workers=0)
    with contextlib.closing(make_loader(data, source, split="held_out")) as loader:
        return next(loader)


def draw_preview(
    params: Params, rows: Rows, empty_text: Float[Array, "S text_width"], config: Config, mesh: Mesh
) -> Preview:
    """Samples what `tools/sample.py` does of the same weights, embeddings, references, ids and seed.

    A device draws one video at a time, since the training state fills its memory.

    Args:
      params: of the model, on the mesh.
      rows: held-out examples, the same in every process.
      empty_text: the negative prompt.
      config: of the run; its seed is the noise's.
      mesh: the devices.
    """
    real: list[int] = rows["num_references"].tolist()
    ids: list[str] = rows["ids"].tolist()
    text, videos, references = (
        rows[name].astype(np.float32) for name in ("text", "video_latents", "reference_latents")
    )
    negative = np.asarray(empty_text, np.float32)
    F, H, W, C = videos.shape[1:]
    inputs = {
        i: Inputs(
            noise=seeded_noise(id, config.train.seed, (F, H, W, C)),
            prompt=text[i],
            negative=negative,
            references=references[i, : real[i]] if real[i] else None,
        )
        for i, id in enumerate(ids)
    }
    size, latents = rows_per_call(mesh, 1, config.sampling.batched_guidance), np.empty_like(videos)
    for group in batches(inputs, size):
        batch = stack([inputs[i] for i in group], size)
        drawn = denoise(params["dit"], batch, dit=config.model.dit, config=config.sampling, mesh=mesh)
        (last,) = collections.deque(drawn, maxlen=1)
        latents[group] = multihost_utils.process_allgather(last, tiled=True)[: len(group)]
    return Preview(tuple(ids), latents, videos, references)


def write_preview(
    path: Path, preview: Preview, made: Mapping[str, Any], codec: VideoCodec | None = None, fps: float = WAN_FPS
) -> None:
    """Writes a preview: <path>.png, its latents and ids <path>.npz, and <path>-0.mp4 and so on.

    Args:
      path: without a suffix; its folder is made if need be.
      preview: what `draw_preview` returned.
      made: what `provenance.about` returned; it goes into every file.
      codec: decodes the samples to videos; None writes no videos.
      fps: frames per second of the videos.
    """
    path.parent.mkdir(exist_ok=True)
    about = json.dumps(dict(made))
    with atomic_write(path.with_suffix(".npz")) as temporary, temporary.open("wb") as file:
        np.savez(file, latents=preview.latents, ids=np.array(preview.ids), about=about)
    frames = np.linspace(0, preview.latents.shape[1] - 1, 3).astype(int)
    shown = zip(preview.latents, preview.video_latents, preview.reference_latents, strict=True)
    rows = [_row(np.concatenate([s[frames], v[frames], r])) for s, v, r in shown]
    image = Image.fromarray((np.concatenate(rows) * 255).astype(np.uint8))
    info = PngInfo()
    info.add_text("about", about)
    with atomic_write(path.with_suffix(".png")) as temporary, temporary.open("wb") as file:
        image.save(file, "PNG", pnginfo=info)
    if codec is None:
        return
    from refalign_jax.data.video import write_latents  # FFmpeg, which most runs don't need

    for i, (id, latents) in enumerate(zip(preview.ids, preview.latents, strict=True)):
        comment = json.dumps({"id": id, **made}, ensure_ascii=False)
        write_latents(path.with_name(f"{path.name}-{i}.mp4"), latents, codec, fps, comment)


def _row(frames: Float[np.ndarray, "N H W C"]) -> Float[np.ndarray, "h w rgb"]:
    """Frames side by side, four pixels for each latent."""
    colours = principal_colours(frames).repeat(4, axis=1).repeat(4, axis=2)
    return np.concatenate(list(colours), axis=1)
