"""How videos are sampled."""

from __future__ import annotations

import dataclasses
import typing
from typing import Annotated, Literal

import tyro

from refalign_jax.config.checks import check_num_frames, check_range, check_values, expand_home

SolverName = Literal["euler", "dpm++", "unipc"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling with three-branch guidance.

    Attributes:
      solver: `euler`, as RefAlign samples; `dpm++` (2M) or `unipc` (order 2) need fewer steps.
      num_steps: N, the number of steps; each takes one guided velocity.
      shift: Shift of the sampling schedule, as in `FlowConfig`.
      reference_guidance: s_ref, the guidance scale of the references.
      text_guidance: s_text, the guidance scale of the text.
      batched_guidance: Run the three branches as one forward of three times the batch (faster where memory allows)
        instead of one after the other.
    """

    solver: SolverName = "euler"
    num_steps: int = 50
    shift: float = 5.0
    reference_guidance: float = 5.0
    text_guidance: float = 7.5
    batched_guidance: bool = False

    def __post_init__(self) -> None:
        """Refuses an empty schedule."""
        check_values(self)
        check_range(self, "num_steps", "shift", above=0)


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
SOLVERS = f"{{{','.join(typing.get_args(SolverName))}}}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How to sample; what is left at None is the run's, or its dataset's."""

    dataset: Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint=RUNS)] = None
    """Prepared dataset whose manifest names encoders, size and length."""
    vae: Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint=DATASETS)] = None
    """`dct`, or the file or folder of Wan2.1's VAE."""
    text_encoder: Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint=DATASETS)] = None
    """`words`, or the folder of UMT5 and its tokenizer."""
    height: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=DATASETS)] = None
    """Rows of a video, pixels; without a dataset 480."""
    width: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=DATASETS)] = None
    """Columns of a video, pixels; without a dataset 832."""
    num_frames: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=DATASETS)] = None
    """Frames of a video, 4k+1; without a dataset 81."""
    fps: Annotated[float, tyro.conf.arg(help_behavior_hint=DATASETS)] = 0.0
    """Frames per second in the file; 0 for the dataset's and, without a dataset, 16."""
    solver: Annotated[SolverName | None, tyro.conf.arg(metavar=SOLVERS, help_behavior_hint=RUNS)] = None
    """Solver of the sampling equation; of published weights euler."""
    num_steps: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=RUNS)] = None
    """Number of steps; of published weights 50."""
    shift: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=RUNS)] = None
    """Shift of the schedule; of published weights 5."""
    reference_guidance: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=RUNS)] = None
    """s_ref, the guidance scale of the references; of published weights 5."""
    text_guidance: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=RUNS)] = None
    """s_text, the guidance scale of the text; of published weights 7.5."""
    negative_prompt: str = ""
    """Prompt that the guidance leads away from."""
    seed: int = 0
    """Seed of the noise."""
    ema: bool = False
    """Sample from the moving average of the parameters."""
    batch_size: int = 1
    """Videos drawn together; rounded up to a multiple of the devices."""
    fsdp: int = 1
    """Devices over which the parameters are split."""
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the stored parameters; the dtype of the computation is the model's."""
    num_heads: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: width / 128)")] = None
    """Attention heads of published weights, where neither the file nor a config.json beside it says."""
    verify_checkpoint: bool = True
    """Compare a checkpoint's files with their digests before it is read."""

    def __post_init__(self) -> None:
        """Refuses numbers that make no video."""
        check_values(self)
        expand_home(self, "dataset", "vae", "text_encoder")
        check_range(self, "height", "width", "num_frames", "batch_size", "fsdp", above=0)
        check_range(self, "num_steps", "shift", "num_heads", above=0)
        check_range(self, "seed", "fps", least=0)
        check_num_frames(self)
