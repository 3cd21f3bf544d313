"""How videos are sampled."""

from __future__ import annotations

import dataclasses
from typing import Literal

from refalign_jax.config.checks import check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Euler sampling with three-branch guidance.

    Attributes:
      num_steps: N.
      shift: of the sampling schedule, as in `FlowConfig`.
      reference_guidance: s_ref.
      text_guidance: s_text.
      batched_guidance: run the three branches as one forward of three times the batch (faster where memory allows)
        or one after the other.
    """

    num_steps: int = 50
    shift: float = 5.0
    reference_guidance: float = 5.0
    text_guidance: float = 7.5
    batched_guidance: bool = False

    def __post_init__(self) -> None:
        """Refuses an empty schedule."""
        check_positive(self, "num_steps")
        check_positive(self, "shift")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How to sample; what is left at None is as the run has it, or its dataset."""

    dataset: str | None = None
    """The prepared dataset whose manifest names encoders, size and length."""
    vae: str | None = None
    """`dct`, or the file or folder of Wan2.1's VAE, in place of the dataset's."""
    text_encoder: str | None = None
    """`words`, or the folder of UMT5 and its tokenizer, in place of the dataset's."""
    height: int | None = None
    """Rows of a video, pixels; without a dataset 480."""
    width: int | None = None
    """Columns of a video, pixels; without a dataset 832."""
    num_frames: int | None = None
    """Frames of a video, 4k+1; without a dataset 81."""
    fps: float = 16.0
    """Frames a second in the file."""
    num_steps: int | None = None
    """Euler steps."""
    shift: float | None = None
    """Of the schedule."""
    reference_guidance: float | None = None
    """s_ref."""
    text_guidance: float | None = None
    """s_text."""
    negative_prompt: str = ""
    """What the guidance leads away from."""
    seed: int = 0
    """Of the noise."""
    ema: bool = False
    """Sample from the moving average of the parameters."""
    batch_size: int = 1
    """Videos drawn together; rounded up to a multiple of the devices."""
    fsdp: int = 1
    """Devices over which the parameters are split."""
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the parameters are held; what they compute in is the model's."""

    def __post_init__(self) -> None:
        """Refuses numbers that make no video."""
        for name in ("height", "width", "num_frames", "fps", "batch_size", "fsdp"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0.")
        if self.num_frames is not None and self.num_frames % 4 != 1:
            raise ValueError(f"num_frames is {self.num_frames}; it must be 4k+1, such as 81.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative.")
