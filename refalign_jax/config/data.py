"""What training reads and what preparation writes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from fractions import Fraction
from typing import Any, Literal

from refalign_jax.config.checks import check_num_frames, check_range, check_values, expand_home

ComputeDtype = Literal["float32", "bfloat16"]

FIELDS = ("video_latents", "reference_latents", "text", "vfm_features")
"""The floating-point fields, each with a storage dtype of its own."""

FloatStorage = Literal["float32", "bfloat16"]

_LONGEST_PERIOD = 100_000
"""Most examples in a row after which the turns of a mixture repeat."""

MAX_TEXT_LENGTH = 512
"""Text tokens that the published text encoder gives at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Examples of noise in place of a dataset, for smoke tests and performance work; they teach nothing.

    Widths and channels are the model's; every example has `data.max_references` references and `data.text_length`
    text tokens.
    """

    num_examples: int = 0
    """Number of examples; 0 reads the dataset `data.path`."""
    latent_grid: tuple[int, int, int] = (21, 60, 104)
    """Frames, rows and columns of the video latents."""
    padded_references: bool = True
    """Compile for padded references too, as for a dataset whose examples differ in their number of references."""

    def __post_init__(self) -> None:
        check_values(self)
        check_range(self, "num_examples", least=0)
        check_range(self, "latent_grid", above=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which examples are read, and how they become batches."""

    path: str = ""
    """Folder of a prepared dataset, local or `gs://`."""
    mix: tuple[tuple[str, float], ...] = ()
    """Several prepared datasets in place of `path`, each followed by its weight: of a 6 b 4, six of ten examples are
    from a. Weights decide how often a dataset is read, whatever its size."""
    batch_size: int = 8
    """Examples per step over all processes."""
    max_references: int = 3
    """References per row; the first of an example are kept, the others left out. 0 trains text-to-video."""
    text_length: int = 512
    """Text tokens per row; the DiT attends to all of them, padding included."""
    dtype: Literal["float32", "stored"] = "stored"
    """dtype of latents, text and VFM targets in a batch: float32, or as stored (int8 targets always become float32)."""
    shuffle_seed: int = 0
    """Seed of the global order, in [0, 2^32)."""
    held_out: int = 0
    """Examples at the dataset's end that training never sees, 0 for none. Of a mixture, each dataset holds out its
    share by weight."""
    grown_from: int | tuple[int, ...] = 0
    """Number of examples that the dataset had when the run began, where it has grown since: the run goes on with all of
    them after the epoch that has begun, and what was held out stays so. 0: it has not grown. Of a mixture, one number
    for each dataset."""
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
        check_values(self)
        expand_home(self, "path")
        object.__setattr__(self, "mix", tuple((os.path.expanduser(path), weight) for path, weight in self.mix))
        check_range(self, "batch_size", "num_threads", "prefetch", least=1)
        check_range(self, "max_references", "held_out", "grown_from", "num_workers", "max_corrupt", least=0)
        check_range(self, "text_length", least=1, most=MAX_TEXT_LENGTH)
        check_range(self, "shuffle_seed", least=0, below=2**32)
        if self.mix:
            self._check_mix()
        elif isinstance(self.grown_from, tuple):
            raise ValueError(f"DataConfig.grown_from={self.grown_from} must be one number, for the dataset `path`.")
        elif self.grown_from and self.held_out >= self.grown_from:
            raise ValueError(f"DataConfig.held_out={self.held_out} must be below grown_from={self.grown_from}.")

    def _check_mix(self) -> None:
        """Checks what a mixture demands."""
        if self.path:
            raise ValueError(
                f"DataConfig.path={self.path!r} and DataConfig.mix exclude each other; set one to nothing."
            )
        if "" in self.paths or len(set(self.paths)) < len(self.paths):
            raise ValueError(f"DataConfig.mix={self.mix} must name different folders, each once.")
        if any(weight <= 0 for _, weight in self.mix) or sum(self.proportions) > _LONGEST_PERIOD:
            raise ValueError(
                f"DataConfig.mix={self.mix} must have positive weights in a ratio of small whole numbers, as 6 and 4."
            )
        if self.grown_from and (not isinstance(self.grown_from, tuple) or len(self.grown_from) != len(self.mix)):
            raise ValueError(
                f"DataConfig.grown_from={self.grown_from} must have a number for each of the {len(self.mix)} datasets "
                "of mix, 0 for one that has not grown."
            )
        _ = self.parts

    @property
    def paths(self) -> tuple[str, ...]:
        """The datasets' folders; none for synthetic examples."""
        return tuple(path for path, _ in self.mix) or ((self.path,) if self.path else ())

    @property
    def proportions(self) -> tuple[int, ...]:
        """How many of so many examples in a row are of which dataset: 6 and 4, or 0.6 and 0.4, are 3 and 2."""
        if not self.mix:
            return (1,)
        ratios = [Fraction(weight).limit_denominator(10_000) for _, weight in self.mix]
        whole = [int(ratio * math.lcm(*(one.denominator for one in ratios))) for ratio in ratios]
        return tuple(one // (math.gcd(*whole) or 1) for one in whole)

    @property
    def parts(self) -> tuple[DataConfig, ...]:
        """The configuration of each dataset by itself: its folder, what it holds out and what it has grown from."""
        if not self.mix:
            return (self,)
        grown = self.grown_from if isinstance(self.grown_from, tuple) else (0,) * len(self.mix)
        exact = [Fraction(self.held_out * one, sum(self.proportions)) for one in self.proportions]
        shares = [int(share) for share in exact]
        left = sorted(range(len(exact)), key=lambda number: (shares[number] - exact[number], number))
        for number in left[: self.held_out - sum(shares)]:
            shares[number] += 1
        return tuple(
            dataclasses.replace(self, mix=(), path=path, held_out=share, grown_from=size)
            for path, share, size in zip(self.paths, shares, grown, strict=True)
        )

    def began_with(self, num_examples: int) -> int:
        """Number of examples that a dataset, not a mixture, of so many examples had when the run began."""
        assert isinstance(self.grown_from, int)
        return self.grown_from or num_examples

    def first_held_out(self, num_examples: int) -> int:
        """Index of the first held-out example in a dataset, not in a mixture, of so many examples."""
        return self.began_with(num_examples) - self.held_out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
    """The dtype in which each field is written."""

    video_latents: FloatStorage = "bfloat16"
    """bfloat16 keeps 8 bits of a unit-variance latent: an error of 0.2%, far below the noise that training adds."""
    reference_latents: FloatStorage = "bfloat16"
    """As for the video's latents."""
    text: FloatStorage = "bfloat16"
    """Text embeddings."""
    vfm_features: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """VFM targets; int8 keeps one float32 scale per token."""

    def __post_init__(self) -> None:
        check_values(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How references cut from the clip itself are altered; the defaults are the published ones."""

    flip: float = 0.5
    """Probability of a mirror image."""
    rotation: float = 45.0
    """Largest angle to either side, degrees."""
    shear: float = 10.0
    """Largest angle of shear along the rows to either side, degrees."""
    perspective: float = 0.3
    """How far corners may move inwards, as a fraction of half the height and half the width."""
    perspective_probability: float = 0.5
    """Probability of a change of perspective."""
    shift: float = 0.05
    """Largest shift to any side, as a fraction of the canvas's height and width."""
    scale: tuple[float, float] = (0.9, 1.1)
    """Smallest and largest scale."""
    brightness: tuple[float, float] = (0.9, 1.1)
    """Smallest and largest factor of all channels together."""
    blur: float = 0.0
    """Largest standard deviation of a Gaussian blur, in pixels of the canvas; 0 for none, as in the published code."""
    colour: float = 0.05
    """Largest change of each channel by itself, as a fraction of a pixel's range; the paper says at most 0.05."""

    def __post_init__(self) -> None:
        check_values(self)
        check_range(self, "flip", "perspective", "perspective_probability", "shift", "colour", least=0, most=1)
        check_range(self, "rotation", least=0, most=180)
        check_range(self, "blur", least=0)
        check_range(self, "shear", least=0, most=60)
        check_range(self, "scale", "brightness", above=0)
        for name, (low, high) in (("scale", self.scale), ("brightness", self.brightness)):
            if low > high:
                raise ValueError(f"AugmentConfig.{name}={low, high} must ascend: the smallest first.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How clips become examples. The three encoders must be chosen; the stand-ins need no weights."""

    vae: str
    """`dct`, or the file or folder of Wan2.1's VAE."""
    text_encoder: str
    """`words`, or the folder of UMT5 and its tokenizer."""
    vfm: str
    """`daisy`, `efficientnet-lite0`, or the folder of DINOv3."""
    height: int = 480
    """Rows of videos and references, pixels."""
    width: int = 832
    """Columns of videos and references, pixels."""
    num_frames: int = 81
    """Frames of a clip, 4k+1."""
    fps: float = 0.0
    """Frames of the clip a second, chosen by time whatever the video's rate; 0 chooses them by `stride`."""
    stride: int = 1
    """Frames of the video from one frame of the clip to the next where `fps` is 0: the video's rate / stride."""
    max_references: int = 3
    """References of a record that are used, the first ones."""
    seed: int = 0
    """Seed of where clips start and how references are altered."""
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    """How references cut from the clip itself are altered."""
    storage: Storage = dataclasses.field(default_factory=Storage)
    """dtype of each field on disk."""
    examples_per_shard: int = 32
    """Examples per file; those of an unfinished file are made again after an interruption."""
    redo: bool = False
    """Make examples again whose videos, images or masks have changed since; otherwise such a run is refused."""
    part: tuple[int, int] = (1, 1)
    """Which part this process prepares, and of how many, such as 2 8."""
    workers: int = 2
    """Threads that read videos and images; of the engine ray, CPUs in all."""
    engine: Literal["threads", "ray"] = "threads"
    """What reads and encodes: threads of this process, or Ray Data on this machine or a cluster (RAY_ADDRESS)."""
    encoder_processes: int = 1
    """Processes of the engine ray that encode, each with encoders of its own."""
    encoder_gpus: float = 0.0
    """GPUs that each of these processes has."""
    encoder_tpus: int = 0
    """TPU chips that each of these processes has."""
    batch_size: int = 1
    """Records encoded together; with several devices a multiple of their number."""
    compute_dtype: ComputeDtype = "bfloat16"
    """dtype of the networks' matrix products."""
    tile: int = 0
    """Side in pixels of the tiles in which the VAE works, to save memory; 0 for whole frames."""
    dct_stride: int = 8
    """Pixels per latent cell in the codec `dct`, 4 or 8."""
    dct_channels: int = 16
    """Latent channels of the codec `dct`."""
    word_width: int = 256
    """Width of the embeddings of `words`."""

    def __post_init__(self) -> None:
        check_values(self)
        expand_home(self, "vae", "text_encoder", "vfm")
        check_range(self, "height", "width", "num_frames", "stride", "examples_per_shard", least=1)
        check_range(self, "workers", "batch_size", "dct_channels", "word_width", "encoder_processes", least=1)
        check_range(self, "encoder_gpus", "encoder_tpus", least=0)
        check_range(self, "max_references", "seed", "tile", "fps", least=0)
        if self.fps and self.stride != 1:
            raise ValueError(
                f"PrepareConfig.stride={self.stride} has no effect beside fps={self.fps:g}; give one of them."
            )
        check_num_frames(self)
        index, parts = self.part
        if not 1 <= index <= parts:
            raise ValueError(f"PrepareConfig.part={self.part} must be two numbers, the first from 1 to the second.")

    @property
    def settings(self) -> dict[str, Any]:
        """What decides an example's content beside the encoders, as JSON."""
        names = ("height", "width", "num_frames", "fps", "stride", "max_references", "seed", "augment", "part")
        return json.loads(json.dumps({name: dataclasses.asdict(self)[name] for name in names}))
