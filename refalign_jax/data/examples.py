"""The prepared example: everything that training reads of one clip, as arrays and as bytes.

The bytes are one safetensors blob, which every framework reads without pickle: a header of names, shapes and dtypes,
then the raw arrays. The metadata key `example` has a JSON of id, prompt and the source's metadata.

Arrays are stored in float32 or bfloat16. VFM features may also be int8 with one scale per token: x̂ = s·q, s =
max|x|/127, q = round(x/s). The alignment loss depends on directions only, and a Gaussian token of width 1,024 and its
rounded form have a cosine of about 1 − 3e-5.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save

from refalign_jax.config import FIELDS, MAX_TEXT_LENGTH, Storage
from refalign_jax.convert.safetensors_files import DTYPES
from refalign_jax.types import Bool, Float, Int

MASK = "subject_mask"
"""Name of the mask's array, which an example may lack."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One training sample, without padding; R may be 0.

    Raises:
      ValueError: the id is empty, or shapes disagree with each other.
    """

    id: str
    """Unique in its dataset."""
    prompt: str
    """The caption that `text` embeds."""
    video_latents: Float[np.ndarray, "F H W C"]
    """Normalised latents of the video, of about unit variance."""
    reference_latents: Float[np.ndarray, "R H W C"]
    """Normalised latents of the reference images, one latent frame each."""
    subject_ids: Int[np.ndarray, " R"]
    """int32, at least 0; two views of one subject have the same number."""
    text: Float[np.ndarray, "S text_width"]
    """Embeddings of the prompt's tokens, 1 ≤ S ≤ 512."""
    vfm_features: Float[np.ndarray, "R P E"]
    """VFM tokens of each reference on the grid (H/2, W/2), row-major: P = H/2·W/2."""
    subject_mask: Bool[np.ndarray, "R P"] | None = None
    """True where the patch shows the subject, False where it is blank; None where this is not known."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Any JSON: source, frame numbers, where the references were cut."""

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("An example has an empty id; give each one a name that is unique in its dataset.")
        arrays = {name: getattr(self, name) for name in (*FIELDS, "subject_ids", MASK)}
        check_shapes({name: array for name, array in arrays.items() if array is not None}, self.id)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What all examples of a dataset have in common, and the extremes of the rest."""

    num_examples: int
    """Number of examples."""
    video_latents: tuple[int, int, int, int]
    """F, H, W, C."""
    text_width: int
    """Width of the text embeddings."""
    vfm_width: int
    """E."""
    longest_text: int
    """Number of tokens of the longest prompt."""
    most_references: int
    """Number of references of the example that has most."""
    fewest_references: int = 0
    """Number of references of the example that has fewest; 0 where it is not known."""
    storage: Storage = dataclasses.field(default_factory=Storage)
    """The dtype of each field."""
    subject_mask: bool = False
    """Whether every example has a subject mask."""

    @property
    def vfm_tokens(self) -> int:
        """P, the number of tokens of one reference: H/2·W/2."""
        return self.video_latents[1] // 2 * (self.video_latents[2] // 2)

    def pads(self, max_references: int) -> bool:
        """Whether an example may have fewer references than a batch with `max_references` of each has room for."""
        return self.fewest_references < max_references


def check_shapes(arrays: Mapping[str, np.ndarray], id: str) -> None:
    """Checks that an example's arrays fit each other.

    Args:
      arrays: `FIELDS`, `subject_ids` and, where there is one, `subject_mask` by name, of the shapes that `Example`
        lists.
      id: the example's id, for the message.

    Raises:
      ValueError: a rank, size or dtype that does not fit, naming the field.
    """
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    if len(shapes["video_latents"]) != 4 or 0 in shapes["video_latents"]:
        raise ValueError(f"Example {id}: video_latents has shape {shapes['video_latents']}; it must be [F, H, W, C].")
    _, H, W, C = shapes["video_latents"]
    if H % 2 or W % 2:
        raise ValueError(f"Example {id}: video_latents has {H}x{W} latent pixels; both must be even (patch 2x2).")
    ids = arrays["subject_ids"]
    R = ids.size
    if ids.ndim != 1 or ids.dtype != np.int32 or (R and ids.min() < 0):
        raise ValueError(f"Example {id}: subject_ids is {ids.dtype} {ids.tolist()}; it must be int32 [R], 0 or more.")
    if shapes["reference_latents"] != (R, H, W, C):
        raise ValueError(
            f"Example {id}: reference_latents has shape {shapes['reference_latents']}; with {R} subject ids and these "
            f"video latents it must be {(R, H, W, C)}."
        )
    P = H // 2 * (W // 2)
    vfm = shapes["vfm_features"]
    if len(vfm) != 3 or vfm[:2] != (R, P) or not vfm[2]:
        raise ValueError(f"Example {id}: vfm_features has shape {vfm}; it must be [R={R}, P={P}, E].")
    if shapes.get(MASK, (R, P)) != (R, P):
        raise ValueError(f"Example {id}: subject_mask has shape {shapes[MASK]}; it must be [R={R}, P={P}].")
    text = shapes["text"]
    if len(text) != 2 or not 1 <= text[0] <= MAX_TEXT_LENGTH or not text[1]:
        raise ValueError(f"Example {id}: text has shape {text}; it must be [1 to {MAX_TEXT_LENGTH} tokens, width].")


def quantize(
    features: Float[np.ndarray, "*tokens E"],
) -> tuple[Int[np.ndarray, "*tokens E"], Float[np.ndarray, "*tokens 1"]]:
    """Rounds each token to int8 with a scale of its own.

    Returns:
      (q, scales): q is int8 in [-127, 127]; scales are float32, max|x|/127 of each token, 0 for a token of zeros.
    """
    values = np.asarray(features, np.float32)
    scales = np.abs(values).max(-1, keepdims=True) / np.float32(127)
    return np.rint(values / np.where(scales > 0, scales, 1)).astype(np.int8), scales


def cosines(a: Float[np.ndarray, "*tokens E"], b: Float[np.ndarray, "*tokens E"]) -> Float[np.ndarray, " tokens"]:
    """Returns the cosine of each token of `a` to its counterpart in `b`, float32 in [-1, 1]; 1 where both are zero."""
    a, b = (np.asarray(x, np.float32).reshape(-1, x.shape[-1]) for x in (a, b))
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    same = (norms == 0) & np.all(a == b, axis=-1)
    return np.where(same, 1, np.sum(a * b, axis=-1) / np.where(norms > 0, norms, 1)).astype(np.float32)


def encode(example: Example, storage: Storage) -> bytes:
    """Writes an example as one safetensors blob.

    Raises:
      ValueError: a value that is not finite, or metadata that is not JSON.
    """
    arrays: dict[str, np.ndarray] = {"subject_ids": example.subject_ids}
    for name in FIELDS:
        values = getattr(example, name)
        if not np.isfinite(values).all():
            raise ValueError(f"Example {example.id}: {name} holds NaN or infinity; every value must be finite.")
        kind = getattr(storage, name)
        if kind == "int8":
            arrays[name], arrays["vfm_scales"] = quantize(values)
        else:
            arrays[name] = np.asarray(values, ml_dtypes.bfloat16 if kind == "bfloat16" else np.float32)
    if example.subject_mask is not None:
        arrays[MASK] = np.asarray(example.subject_mask, np.uint8)
    try:
        about = json.dumps({"id": example.id, "prompt": example.prompt, "metadata": dict(example.metadata)})
    except (TypeError, ValueError) as error:
        raise ValueError(f"Example {example.id}: its metadata is not JSON: {error}.") from error
    # safetensors writes the memory of an array that is not contiguous as if it were.
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, {"example": about})


def parse(blob: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a blob without copying: the arrays are read-only views of it, in their stored dtypes.

    `safetensors.numpy` is not used, because it copies every array and refuses bfloat16.

    Returns:
      (arrays, about): `FIELDS`, `subject_ids`, `vfm_scales` where the VFM features are int8, and `subject_mask`, uint8,
        where it is known; id, prompt, metadata.

    Raises:
      ValueError: not a prepared example, or one whose shapes disagree.
    """
    try:
        (length,) = struct.unpack_from("<Q", blob)
        header = json.loads(blob[8 : 8 + length])
        about = json.loads(header.pop("__metadata__")["example"])
        arrays = {}
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            dtype, count = DTYPES[tensor["dtype"]], math.prod(tensor["shape"])
            if end - begin != count * dtype.itemsize:
                raise ValueError(f"{name} {tensor['shape']} has {end - begin} bytes")
            arrays[name] = np.frombuffer(blob, dtype, count, 8 + length + begin).reshape(tensor["shape"])
        if not all(isinstance(about[name], kind) for name, kind in (("id", str), ("prompt", str), ("metadata", dict))):
            raise ValueError("id and prompt must be texts, metadata an object")
        check_shapes(arrays, about["id"])
    except (struct.error, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{len(blob)} bytes are not a prepared example: {error or type(error).__name__}") from error
    return arrays, about


def fill(out: np.ndarray, arrays: Mapping[str, np.ndarray], name: str) -> None:
    """Copies one field into `out`, cast to its dtype and, for int8 features, scaled back.

    Args:
      out: float32 or the stored dtype; it receives as many rows as it has, from the field's first on.
      arrays: what `parse` returns.
      name: one of `FIELDS`.
    """
    values = arrays[name][: len(out)]
    if values.dtype == np.int8:
        np.multiply(values, arrays["vfm_scales"][: len(out)], out=out)
    else:
        out[...] = values


def decode(blob: bytes) -> Example:
    """Reads an example back, with floating-point fields in float32.

    Raises:
      ValueError: not a prepared example.
    """
    arrays, about = parse(blob)
    values = {name: np.empty(arrays[name].shape, np.float32) for name in FIELDS}
    for name, out in values.items():
        fill(out, arrays, name)
    return Example(
        id=about["id"],
        prompt=about["prompt"],
        metadata=about["metadata"],
        subject_ids=arrays["subject_ids"],
        video_latents=values["video_latents"],
        reference_latents=values["reference_latents"],
        text=values["text"],
        vfm_features=values["vfm_features"],
        subject_mask=arrays[MASK].astype(bool) if MASK in arrays else None,
    )
