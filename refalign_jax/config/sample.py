"""How videos are sampled."""

from __future__ import annotations

import dataclasses
import itertools
import os
import typing
from typing import Annotated, Literal

import tyro

from refalign_jax.config.checks import check_num_frames, check_range, check_values, expand_home
from refalign_jax.config.model import DType, QuantisedDType, WeightsDType

SolverName = Literal["euler", "dpm++", "unipc"]
SigmaTable = Literal["refalign", "wan", "diffusers-0.36", "diffusers-0.37"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling with three-branch guidance.

    Attributes:
      solver: `euler`, as RefAlign samples; `dpm++` (2M) or `unipc` (order 2) need fewer steps.
      num_steps: N, the number of steps; each takes one guided velocity.
      shift: Shift of the sampling schedule, as in `FlowConfig`.
      reference_guidance: s_ref, the guidance scale of the references.
      text_guidance: s_text, the guidance scale of the text.
      batched_guidance: Run the branches of guidance as one forward of so many times the batch (faster where memory
        allows) instead of one after the other. A guidance scale of 1 needs one branch less: with both at 1, as
        timestep-distilled weights want, the prompt's branch alone runs. On a mesh with more devices than videos, the
        branches of the batch run on different devices.
      guidance_interval: Least and largest noise level σ at which guidance applies, in [0, 1]; in the other steps the
        prompt's branch alone runs. 0 and 1: guidance in all steps.
      cache_threshold: Estimated relative change below which a step reuses what the blocks added to the tokens in an
        earlier step, see `caching`; in [0, 1]. 0: the blocks run in each step.
      sigmas: Table of noise levels. `refalign`: from 1, as RefAlign samples. `wan`: what Wan's code has for the solver.
        `diffusers-0.36` and `diffusers-0.37`: diffusers' UniPC up to and from that version.
      sigma_values: The noise levels themselves, descending, without the last 0; they take the place of `sigmas` and
        `shift`, and there are `num_steps` of them.
      integer_timesteps: Cut the times that the transformer is given to whole numbers, as Wan and diffusers do.
    """

    solver: SolverName = "euler"
    num_steps: int = 50
    shift: float = 5.0
    reference_guidance: float = 5.0
    text_guidance: float = 7.5
    batched_guidance: bool = False
    sigmas: SigmaTable = "refalign"
    sigma_values: tuple[float, ...] = ()
    integer_timesteps: bool = False
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    cache_threshold: float = 0.0

    def __post_init__(self) -> None:
        """Refuses an empty schedule, noise levels that do not descend from at most 1, and an empty interval."""
        check_values(self)
        check_range(self, "num_steps", "shift", above=0)
        check_range(self, "sigma_values", above=0, most=1)
        check_range(self, "guidance_interval", "cache_threshold", least=0, most=1)
        if self.guidance_interval[0] >= self.guidance_interval[1]:
            raise ValueError(
                f"SamplingConfig.guidance_interval={self.guidance_interval} must be a noise level and a larger one."
            )
        if self.sigma_values and len(self.sigma_values) != self.num_steps:
            raise ValueError(
                f"SamplingConfig.sigma_values holds {len(self.sigma_values)} noise levels, but num_steps is "
                f"{self.num_steps}; each step has one."
            )
        if any(following >= sigma for sigma, following in itertools.pairwise(self.sigma_values)):
            raise ValueError("SamplingConfig.sigma_values must descend.")

    def num_branches(self, references: bool) -> int:
        """How many velocities guidance takes in each step; branches whose factor is 0 are not computed."""
        if not references or self.reference_guidance == 1:
            return 1 if self.text_guidance == 1 else 2
        return 2 if self.text_guidance == 0 else 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """How a checkpoint's transformer is written as published weights."""

    projectors: bool = False
    """Include the projectors, which training continues with and inference does not need."""
    names: Literal["wan", "diffusers"] = "wan"
    """wan, as RefAlign and Wan2.1 publish, or diffusers."""
    max_shard_gb: float = 10.0
    """Largest size of one file, in 10^9 bytes."""
    ema: bool = False
    """The moving average in place of the parameters."""
    verify_checkpoint: bool = True
    """Compare the checkpoint's files with their digests before it is read."""

    def __post_init__(self) -> None:
        check_values(self)
        check_range(self, "max_shard_gb", above=0)


DATASETS = "(default: the dataset's)"
RUNS = "(default: the run's)"
FOLDERS = "(default: the dataset's, or beside the weights)"
ABSENT = "(default: none)"
SOLVERS = f"{{{','.join(typing.get_args(SolverName))}}}"
DTYPES = f"{{{','.join(typing.get_args(DType))}}}"
WEIGHTS_DTYPES = f"{{{','.join(typing.get_args(WeightsDType))}}}"

WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"  # noqa: RUF001
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"  # noqa: RUF001
    "背景人很多，倒着走"  # noqa: RUF001
)
"""The negative prompt that Wan2.1 and RefAlign publish."""

SAVED = ("latents", "pixels")
"""What can be saved of a video beside its MP4."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How to sample; what is left open is as the run, or its dataset, has it."""

    dataset: Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint=RUNS)] = None
    """Prepared dataset whose manifest names encoders, size and length."""
    vae: Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint=FOLDERS)] = None
    """`dct`, or the file, folder or hub id of Wan2.1's VAE."""
    text_encoder: Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint=FOLDERS)] = None
    """`words`, or the folder or hub id of UMT5 and its tokenizer."""
    height: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=DATASETS)] = None
    """Rows of a video, pixels; without a dataset 480."""
    width: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=DATASETS)] = None
    """Columns of a video, pixels; without a dataset 832."""
    num_frames: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=DATASETS)] = None
    """Frames of a video, 4k+1; without a dataset 81."""
    fps: Annotated[float, tyro.conf.arg(help_behavior_hint=DATASETS)] = 0.0
    """Frames per second in the file; 0 for the dataset's and, without a dataset, 16."""
    solver: Annotated[SolverName | None, tyro.conf.arg(metavar=SOLVERS, help_behavior_hint=RUNS)] = None
    """Solver of the sampling equation; of published weights euler, of Phantom-Wan unipc."""
    num_steps: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=RUNS)] = None
    """Number of steps; of published weights 50."""
    shift: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=RUNS)] = None
    """Shift of the schedule; of published weights 5."""
    sigmas: Annotated[str | None, tyro.conf.arg(metavar="NAME|FILE", help_behavior_hint=RUNS)] = None
    """Table of noise levels: refalign, wan, diffusers-0.36, diffusers-0.37, or a JSON file that lists them."""
    integer_timesteps: Annotated[bool | None, tyro.conf.arg(metavar="{True,False}", help_behavior_hint=RUNS)] = None
    """Cut times to whole numbers, as Wan and diffusers do; of published weights False, of Phantom-Wan True."""
    reference_guidance: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=RUNS)] = None
    """s_ref, the guidance scale of the references; of published weights 5."""
    text_guidance: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=RUNS)] = None
    """s_text, the guidance scale of the text; of published weights 7.5."""
    guidance_interval: Annotated[
        tuple[float, float] | None, tyro.conf.arg(metavar="LEAST LARGEST", help_behavior_hint=RUNS)
    ] = None
    """Noise levels between which guidance applies; of published weights 0 and 1, in all steps."""
    cache_threshold: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=RUNS)] = None
    """Relative change below which a step reuses what the blocks computed before; of published weights 0, never."""
    batched_guidance: Annotated[bool | None, tyro.conf.arg(metavar="{True,False}", help_behavior_hint=RUNS)] = None
    """Run the branches of guidance as one batch, over the devices where there are more of them than videos."""
    negative_prompt: Annotated[
        str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="(default: Wan's; empty for `words`)")
    ] = None
    """Prompt that the guidance leads away from."""
    seed: int = 0
    """Seed of the noise."""
    ema: bool = False
    """Sample from the moving average of the parameters."""
    lora: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE ...", help_behavior_hint=ABSENT)] = ()
    """Adapters (LoRA) that are merged into the transformer: files, folders or hub ids."""
    lora_scale: Annotated[
        tuple[float, ...], tyro.conf.arg(metavar="FLOAT ...", help_behavior_hint="(default: 1 for each)")
    ] = ()
    """Strength of each adapter."""
    phantom: bool = False
    """The weights are Phantom-Wan's, whose names are Wan2.1's: references pass cross-attention too."""
    remove_background: Annotated[str, tyro.conf.arg(metavar="MODEL", help_behavior_hint="(default: not removed)")] = ""
    """Model of the package rembg that cuts out references without mask and transparency, such as birefnet-general."""
    noise: Annotated[str, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: from the seed)")] = ""
    """safetensors with the noise to begin from: a tensor of the request's id, `noise`, or the only one."""
    embeddings: Annotated[str, tyro.conf.arg(metavar="FILE", help_behavior_hint=ABSENT)] = ""
    """safetensors with `prompt`, `negative` and, if need be, `references` (latents), used instead of the encoders."""
    save: Annotated[str, tyro.conf.arg(metavar="latents,pixels", help_behavior_hint=ABSENT)] = ""
    """What to save beside the MP4 as safetensors."""
    dtype: Annotated[DType | None, tyro.conf.arg(metavar=DTYPES, help_behavior_hint=RUNS)] = None
    """dtype in which all three networks compute, and the transformer's parameters are held."""
    weights_dtype: Annotated[
        WeightsDType | None,
        tyro.conf.arg(metavar=WEIGHTS_DTYPES, help_behavior_hint="(default: --dtype or else float32)"),
    ] = None
    """dtype of the transformer's stored parameters; int8 and float8 quantise the kernels of its blocks, and UMT5's."""
    batch_size: int = 1
    """Videos drawn together; rounded up to a multiple of the devices / context, of which on CPUs each draws one."""
    fsdp: int = 1
    """Devices over which the parameters are split, and the videos of a batch."""
    context: int = 1
    """Devices over which the tokens of each video are split, and the parameters too; it must divide the heads."""
    keep_loaded: bool = False
    """Keep all networks in memory; otherwise each is read when it is needed, and memory holds one at a time."""
    num_heads: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: width / 128)")] = None
    """Attention heads of published weights, where neither the file nor a config.json beside it says."""
    verify_checkpoint: bool = True
    """Compare a checkpoint's files with their digests before it is read."""
    part: tuple[int, int] = (1, 1)
    """Which part of the requests this process makes, and of how many, such as 2 8."""

    def __post_init__(self) -> None:
        """Refuses numbers that make no video."""
        check_values(self)
        expand_home(self, "dataset", "vae", "text_encoder", "noise", "embeddings", "sigmas")
        object.__setattr__(self, "lora", tuple(map(os.path.expanduser, self.lora)))  # the class is frozen
        check_range(self, "height", "width", "num_frames", "batch_size", "fsdp", "context", above=0)
        check_range(self, "num_steps", "shift", "num_heads", above=0)
        check_range(self, "seed", "fps", least=0)
        check_num_frames(self)
        unknown = [name for name in self.saved if name not in SAVED]
        if unknown:
            raise ValueError(f"GenerateConfig.save={self.save!r} has {unknown[0]!r}; known are {', '.join(SAVED)}.")
        if self.lora_scale and len(self.lora_scale) != len(self.lora):
            raise ValueError(
                f"GenerateConfig.lora_scale has {len(self.lora_scale)} numbers for {len(self.lora)} adapters; give one "
                "for each, or none."
            )
        index, parts = self.part
        if not 1 <= index <= parts:
            raise ValueError(f"GenerateConfig.part={self.part} must be two numbers, the first from 1 to the second.")

    @property
    def quantised(self) -> QuantisedDType | None:
        """The dtype of quantised weights; None where weights are not quantised."""
        return self.weights_dtype if self.weights_dtype in typing.get_args(QuantisedDType) else None  # type: ignore[return-value]

    @property
    def saved(self) -> tuple[str, ...]:
        """The names in `save`."""
        return tuple(name.strip() for name in self.save.split(",") if name.strip())
