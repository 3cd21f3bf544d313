"""Clips to examples: the step that runs the encoders. Each clip's example depends on the clip alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from refalign_jax.config import MAX_TEXT_LENGTH
from refalign_jax.data.clips import Clip
from refalign_jax.data.examples import Example
from refalign_jax.data.records import Dropped, Skipped
from refalign_jax.data.references import encode_references
from refalign_jax.data.video import to_float
from refalign_jax.encoders.interface import FeatureEncoder
from refalign_jax.encoders.open import Encoders
from refalign_jax.types import Bool, Float

NOT_FINITE = "the encoders gave NaN or infinity"
SHOWN_FROM = 0.1
"""Share of a patch that its subject covers at least; a patch with less is blank."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """What a manifest says of encoders."""

    about: Mapping[str, Any]
    """What each describes itself as, by name."""
    empty_text: Float[np.ndarray, "S text_width"]
    """Embedding of the empty prompt."""


def describe_encoders(encoders: Encoders) -> Described:
    """Describes encoders."""
    (empty,) = encoders.text.encode([""])
    return Described(about=encoders.describe(), empty_text=empty)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """An example, and what its record gave beside it; it can be pickled."""

    example: Example
    inputs: str
    """Digest of everything that it was made of."""
    cut: int
    """Tokens that the prompt lost."""
    dropped: tuple[Dropped, ...]
    """References that the record lost."""


def encode_in_batches(
    loaded: Iterable[Clip | Skipped], encoders: Encoders, batch_size: int
) -> Iterator[Made | Skipped]:
    """Encodes clips as they come, so many together, and yields what becomes of each record, in their order.

    Where a value is not finite, the clip is left out with this reason.

    Raises:
      ValueError: the encoders' outputs don't fit each other.
    """
    waiting: list[Clip | Skipped] = []
    for one in loaded:
        waiting.append(one)
        if sum(isinstance(entry, Clip) for entry in waiting) == batch_size:
            yield from _encode_all(waiting, encoders)
            waiting = []
    yield from _encode_all(waiting, encoders)


def _encode_all(loaded: Sequence[Clip | Skipped], encoders: Encoders) -> Iterator[Made | Skipped]:
    """Encodes the clips among these together."""
    clips = [one for one in loaded if isinstance(one, Clip)]
    counts = iter(encoders.text.count_tokens([clip.record.prompt for clip in clips]) if clips else [])
    examples = iter(encode(clips, encoders) if clips else [])
    for one in loaded:
        if isinstance(one, Skipped):
            yield one
            continue
        example, cut = next(examples), max(next(counts) - MAX_TEXT_LENGTH, 0)
        values = (example.video_latents, example.reference_latents, example.text, example.vfm_features)
        if all(np.isfinite(array).all() for array in values):
            yield Made(example=example, inputs=one.inputs, cut=cut, dropped=one.record.dropped)
        else:
            yield Skipped(id=example.id, reason=NOT_FINITE)


def encode(clips: Sequence[Clip], encoders: Encoders) -> list[Example]:
    """Encodes clips of one size together.

    Raises:
      ValueError: the encoders' outputs don't fit each other.
    """
    videos = encoders.video.encode(np.stack([to_float(clip.video) for clip in clips]))
    texts = encoders.text.encode([clip.record.prompt for clip in clips])
    images = np.concatenate([clip.references for clip in clips])
    latents = encode_references(images, encoders.video)
    features = _features(images, encoders.vfm)
    masks = subject_patches(np.concatenate([clip.subjects for clip in clips]), encoders.vfm.patch_size)
    ends = np.cumsum([len(clip.references) for clip in clips])[:-1]
    parts = zip(clips, videos, texts, *(np.split(x, ends) for x in (latents, features, masks)), strict=True)
    return [
        Example(
            id=clip.record.id,
            prompt=clip.record.prompt,
            video_latents=video,
            reference_latents=reference_latents,
            subject_ids=clip.subject_ids,
            text=text,
            vfm_features=vfm_features,
            subject_mask=subject_mask,
            metadata=clip.metadata,
        )
        for clip, video, text, reference_latents, vfm_features, subject_mask in parts
    ]


def subject_patches(subjects: Bool[np.ndarray, "R h w"], patch_size: int) -> Bool[np.ndarray, "R P"]:
    """Which patches show the subject: those of which it covers at least `SHOWN_FROM`; the others are blank."""
    R, h, w = subjects.shape
    rows, columns = h // patch_size, w // patch_size
    shares = subjects.reshape(R, rows, patch_size, columns, patch_size).mean((2, 4))
    return (shares >= SHOWN_FROM).reshape(R, rows * columns)


def _features(images: UInt8[np.ndarray, "R h w 3"], vfm: FeatureEncoder) -> Float[np.ndarray, "R P E"]:
    """Computes the VFM's features of references, P patches in row-major order; R may be 0."""
    R, h, w, _ = images.shape
    P = h // vfm.patch_size * (w // vfm.patch_size)
    return vfm.encode(to_float(images)).reshape(R, P, vfm.width) if R else np.empty((0, P, vfm.width), np.float32)
