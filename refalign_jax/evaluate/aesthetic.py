"""Aesthetic score of a video, as OpenS2V-Eval computes it: CLIP ViT-L/14 and a head of linear layers.

    score = mean over 32 frames of head(e / ‖e‖),   e = CLIP's image embedding of the frame

The head is LAION's predictor (sac+logos+ava1-l14-linearMSE): linear layers of 768-1024-128-64-16-1 without activations
between them, which together are one affine map.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from refalign_jax.convert.clip import clip_table, vision_part
from refalign_jax.convert.files import open_weights, read_config
from refalign_jax.convert.table import LINEAR, Entry, to_ours
from refalign_jax.data.video import probe, read_frames
from refalign_jax.encoders.network import in_batches, replicate
from refalign_jax.models import clip
from refalign_jax.types import Array, Float, Params

NUM_FRAMES = 32
"""Frames of a video that are scored, evenly spread from the first to the last."""

HEAD_WIDTHS = (768, 1024, 128, 64, 16, 1)
_HEAD_LAYERS = (0, 2, 4, 6, 7)
"""Numbers of the linear layers in the published head; dropout is between the first ones."""


class AestheticScorer:
    """CLIP and the head.

    Args:
      folder: CLIP ViT-L/14 as transformers publishes it, or its file of weights with config.json beside it.
      head: the head's file, .pth or safetensors.
      batch_size: frames per call.

    Raises:
      ValueError: a file is missing or not of this model.
    """

    def __init__(self, folder: Path, head: Path, batch_size: int = 8) -> None:
        published = read_config(folder)
        if published is None:
            raise ValueError(f"{folder} has no config.json; name CLIP ViT-L/14 as transformers publishes it.")
        self._config, self._batch_size = clip.CLIPConfig.from_json(published), batch_size
        shapes = jax.eval_shape(lambda: clip.init(self._config, jax.random.key(0)))
        weights = vision_part(open_weights(folder))
        self._params = replicate(to_ours(clip_table(self._config), shapes, weights))
        self._head = load_head(head)

    def score(self, path: Path) -> float:
        """Returns a video's `aes_score`, about 0 to 10.

        Raises:
          ValueError: the video can't be decoded.
        """
        chosen = np.linspace(0, probe(path).num_frames - 1, NUM_FRAMES, dtype=int)
        return self.score_frames(read_frames(path, chosen))

    def score_frames(self, frames: Sequence[UInt8[np.ndarray, "h w 3"]] | UInt8[np.ndarray, "N h w 3"]) -> float:
        """Returns the mean score of frames, RGB."""
        pixels = np.stack([fit(frame, self._config.image_size) for frame in frames])
        embeddings = in_batches(
            lambda x: clip.embed(self._params, clip.normalize(x), self._config), pixels, self._batch_size
        )
        return float(np.mean(head_scores(self._head, embeddings)))


def fit(frame: UInt8[np.ndarray, "h w 3"], size: int) -> Float[np.ndarray, "size size 3"]:
    """Resizes a frame's shorter side to `size`, bicubically, and cuts out the centre; RGB in [0, 1]."""
    rows, columns = frame.shape[:2]
    scale = size / min(rows, columns)
    shape = (max(size, int(columns * scale)), max(size, int(rows * scale)))
    resized = np.asarray(Image.fromarray(frame).resize(shape, Image.Resampling.BICUBIC))
    top, left = (round((side - size) / 2) for side in resized.shape[:2])
    return resized[top : top + size, left : left + size].astype(np.float32) / 255


def head_table() -> list[Entry]:
    """The table of the head's parameters."""
    return [
        entry
        for i, layer in enumerate(_HEAD_LAYERS)
        for entry in (
            Entry(f"{i}/kernel", f"layers.{layer}.weight", LINEAR),
            Entry(f"{i}/bias", f"layers.{layer}.bias"),
        )
    ]


def load_head(path: Path) -> Params:
    """Reads the head.

    Raises:
      ValueError: the file is not the head's.
    """
    shapes = {
        str(i): {"kernel": jnp.zeros((width, after)), "bias": jnp.zeros(after)}
        for i, (width, after) in enumerate(itertools.pairwise(HEAD_WIDTHS))
    }
    return to_ours(head_table(), shapes, open_weights(path))


def head_scores(head: Params, embeddings: Float[Array, "N E"] | Float[np.ndarray, "N E"]) -> Float[np.ndarray, " N"]:
    """Applies the head to normalised embeddings, in float64."""
    x = np.asarray(embeddings, np.float64)
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    for i in range(len(HEAD_WIDTHS) - 1):
        x = x @ np.asarray(head[str(i)]["kernel"], np.float64) + np.asarray(head[str(i)]["bias"], np.float64)
    return x[:, 0]
