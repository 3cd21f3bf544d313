"""What training reads and what preparation writes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

from refalign_jax.config.checks import check_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Examples of noise in place of a dataset, for smoke tests and performance work; they teach nothing.

    Widths and channels are the model's; every example has `data.max_references` references and `data.text_length`
    text tokens.

    Attributes:
      num_examples: how many; 0 reads the dataset `data.path`.
      latent_grid: frames, rows and columns of the video latents.
    """

    num_examples: int = 0
    latent_grid: tuple[int, int, int] = (21, 60, 104)

    def __post_init__(self) -> None:
        """Refuses a negative number or an empty grid."""
        check_least(self, 0, "num_examples")
        if min(self.latent_grid) < 1:
            raise ValueError(f"SyntheticConfig.latent_grid={self.latent_grid} must be positive: frames, rows, columns.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which examples are read, and how they become batches."""

    path: str = ""
    """Folder of a prepared dataset, local or `gs://`."""
    batch_size: int = 8
    """Examples a step over all processes."""
    max_references: int = 3
    """References a row holds; an example's further ones are left out, the first are kept. 0 trains text-to-video."""
    text_length: int = 512
    """Text tokens a row holds; the DiT attends to all of them, padding included."""
    dtype: Literal["float32", "stored"] = "stored"
    """dtype of latents, text and VFM targets in a batch: float32, or as stored (int8 targets always become float32)."""
    shuffle_seed: int = 0
    """Seed of the global order, in [0, 2^32)."""
    held_out: int = 0
    """Examples at the dataset's end that training never sees: a multiple of batch_size, 0 for none."""
    num_workers: int = 0
    """Processes that read and batch; 0 reads in threads of this one. Batches come through /dev/shm, which must hold a
    few of them for each worker."""
    num_threads: int = 2
    """Threads that read and batch, in each worker."""
    prefetch: int = 2
    """Batches kept ready, in each worker."""
    max_corrupt: int = 0
    """Corrupt records that a process replaces by the next readable one and reports, before it stops with an error."""

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "max_references": 0, "text_length": 1, "num_threads": 1, "prefetch": 1}
        least |= {"shuffle_seed": 0, "held_out": 0, "num_workers": 0, "max_corrupt": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be at least {minimum}.")
        if self.text_length > MAX_TEXT_LENGTH:
            raise ValueError(f"data.text_length is {self.text_length}; it must be at most {MAX_TEXT_LENGTH}.")
        if self.shuffle_seed >= 2**32:
            raise ValueError(f"data.shuffle_seed is {self.shuffle_seed}; it must be below 2^32.")
        if self.dtype not in ("float32", "stored"):
            raise ValueError(f"data.dtype is {self.dtype!r}; it must be float32 or stored.")
        if self.held_out % self.batch_size:
            raise ValueError(
                f"data.held_out is {self.held_out}; it must be a multiple of batch_size {self.batch_size}."
            )


MAX_TEXT_LENGTH = 512
"""Text tokens that METHOD.md's encoder gives at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
    """The dtype in which each field is written."""

    video_latents: FloatStorage = "bfloat16"
    """bfloat16 keeps 8 bits of a unit-variance latent: an error of 0.2%, far under the noise that training adds."""
    reference_latents: FloatStorage = "bfloat16"
    """As the video's latents."""
    text: FloatStorage = "bfloat16"
    """Text embeddings."""
    vfm_features: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """VFM targets; int8 keeps one float32 scale a token."""

    def __post_init__(self) -> None:
        for name in FIELDS:
            known = ("float32", "bfloat16", "int8") if name == "vfm_features" else ("float32", "bfloat16")
            if getattr(self, name) not in known:
                raise ValueError(f"Storage of {name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How references cut from the clip itself are altered; the defaults are METHOD.md's."""

    flip: float = 0.5
    """Probability of a mirror image."""
    rotation: float = 45.0
    """Largest angle, degrees, to either side."""
    shear: float = 10.0
    """Largest angle of shear along the rows, degrees, to either side."""
    perspective: float = 0.3
    """How far corners may move inwards at most, in half the height and half the width."""
    perspective_probability: float = 0.5
    """Probability of a change of perspective."""
    shift: float = 0.05
    """Largest shift to any side, in heights and widths of the canvas."""
    scale: tuple[float, float] = (0.9, 1.1)
    """Smallest and largest scale."""
    brightness: tuple[float, float] = (0.9, 1.1)
    """Smallest and largest factor of all channels together."""
    colour: float = 0.05
    """Largest change of each channel by itself, in the range of a pixel; the paper says no more than ± 0.05."""

    def __post_init__(self) -> None:
        for name in ("flip", "perspective", "perspective_probability", "shift", "colour"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} is {getattr(self, name)}; it must be in [0, 1].")
        for name, most in (("rotation", 180), ("shear", 60)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"augment.{name} is {getattr(self, name)}; it must be in [0, {most}] degrees.")
        for name in ("scale", "brightness"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"augment.{name} is {low} to {high}; it must ascend from above 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How clips become examples. The three encoders must be chosen; the stand-ins need no weights."""

    vae: str
    """`dct`, or the file or folder of Wan2.1's VAE."""
    text_encoder: str
    """`words`, or the folder of UMT5 and its tokenizer."""
    vfm: str
    """`daisy`, or the folder of DINOv3."""
    height: int = 480
    """Rows of videos and references, pixels."""
    width: int = 832
    """Columns of videos and references, pixels."""
    num_frames: int = 81
    """Frames of a clip, 4k+1."""
    stride: int = 1
    """Frames of the video from one frame of the clip to the next."""
    max_references: int = 3
    """References of a record that are used, the first ones."""
    seed: int = 0
    """Of starts and alterations."""
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    """How references cut from the clip itself are altered."""
    storage: Storage = dataclasses.field(default_factory=Storage)
    """dtype of each field on disk."""
    examples_per_shard: int = 32
    """Examples a file; those of an unfinished file are made again after an interruption."""
    part: tuple[int, int] = (1, 1)
    """Which part of how many this process prepares, such as 2 8."""
    workers: int = 2
    """Threads that read videos and images."""
    batch_size: int = 1
    """Records encoded together; with several devices a multiple of their number."""
    compute_dtype: ComputeDtype = "bfloat16"
    """Of the networks' matrix products."""
    tile: int = 0
    """Side in pixels of the tiles in which the VAE works, to save memory; 0 for whole frames."""
    dct_stride: int = 8
    """Pixels a latent cell spans in the codec `dct`, 4 or 8."""
    dct_channels: int = 16
    """Latent channels of the codec `dct`."""
    word_width: int = 256
    """Width of the embeddings of `words`."""

    def __post_init__(self) -> None:
        least = {"height": 1, "width": 1, "num_frames": 1, "stride": 1, "max_references": 0, "seed": 0}
        least |= {"examples_per_shard": 1, "workers": 1, "batch_size": 1, "tile": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {minimum}.")
        if self.num_frames % 4 != 1:
            raise ValueError(
                f"num_frames is {self.num_frames}; it must be 4k+1, such as {self.num_frames // 4 * 4 + 1}."
            )
        index, parts = self.part
        if not 1 <= index <= parts:
            raise ValueError(f"part is {index} {parts}; it must be two numbers, the first from 1 to the second.")

    @property
    def settings(self) -> dict[str, Any]:
        """What decides an example's content beside the encoders, as JSON has it."""
        names = ("height", "width", "num_frames", "stride", "max_references", "seed", "augment", "part")
        return json.loads(json.dumps({name: dataclasses.asdict(self)[name] for name in names}))


ComputeDtype = Literal["float32", "bfloat16"]

FIELDS = ("video_latents", "reference_latents", "text", "vfm_features")
"""The floating-point fields, each with a storage dtype of its own."""

FloatStorage = Literal["float32", "bfloat16"]
