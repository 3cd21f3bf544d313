"""FaceSim on face crops that are given: how much the faces of a video are those of its reference.

    FaceSim = mean over frames of max(0, cos(e_frame, e_reference)), frames with 0 left out

Finding and aligning faces is insightface's work (detection at 320 pixels, the largest face, `norm_crop` to 112x112) and
is not done here. A folder holds one folder per video id with `reference.png` and any number of other PNG files, one per
frame. The benchmark uses ids of humans alone, and as reference the first one with a man or a woman.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from jaxtyping import UInt8

from refalign_jax.convert.files import open_weights
from refalign_jax.convert.forms import without_counters
from refalign_jax.convert.iresnet import iresnet_config, iresnet_table
from refalign_jax.convert.table import to_ours
from refalign_jax.data.images import read_image
from refalign_jax.encoders.network import in_batches, replicate
from refalign_jax.models import iresnet
from refalign_jax.types import Float

REFERENCE = "reference.png"


class FaceEncoder:
    """IR-101.

    Args:
      path: CurricularFace's backbone, as published.
      batch_size: faces per call.

    Raises:
      ValueError: the file is not this model's.
    """

    def __init__(self, path: Path, batch_size: int = 16) -> None:
        weights = without_counters(open_weights(path))
        self._config, self._batch_size = iresnet_config(weights), batch_size
        shapes = jax.eval_shape(lambda: iresnet.init(self._config, jax.random.key(0)))
        self._params = replicate(to_ours(iresnet_table(self._config), shapes, weights))

    def embed(self, faces: UInt8[np.ndarray, "N 112 112 3"]) -> Float[np.ndarray, "N E"]:
        """Returns the embeddings of aligned faces, RGB, with norm 1."""
        pixels = (faces.astype(np.float32) / 255 - 0.5) / 0.5
        found = in_batches(lambda x: iresnet.embed(self._params, x, self._config), pixels, self._batch_size)
        return found / np.linalg.norm(found, axis=-1, keepdims=True)


def face_similarity(encoder: FaceEncoder, folder: Path) -> float | None:
    """Returns the `cur_score` of a video's faces; None where no frame shows the person.

    Args:
      encoder: of faces.
      folder: holds the reference's face and those of frames.

    Raises:
      ValueError: there is no reference or no frame, or an image is not 112x112.
    """
    paths = sorted(path for path in folder.glob("*.png") if path.name != REFERENCE)
    if not (folder / REFERENCE).is_file() or not paths:
        raise ValueError(f"{folder} needs {REFERENCE} and the faces of frames as other PNG files.")
    faces = [_face(path) for path in (folder / REFERENCE, *paths)]
    reference, *others = encoder.embed(np.stack(faces))
    cosines = np.maximum(0, np.stack(others) @ reference)
    counted = cosines[cosines > 0]
    return float(np.mean(counted)) if len(counted) else None


def _face(path: Path) -> UInt8[np.ndarray, "112 112 3"]:
    """Reads an aligned face."""
    face = read_image(path)
    size = iresnet.IMAGE_SIZE
    if face.shape != (size, size, 3):
        raise ValueError(f"{path} is {face.shape[1]}x{face.shape[0]}; an aligned face is {size}x{size}.")
    return face
