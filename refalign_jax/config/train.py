"""Configuration of a training run: the model's, the data's, and everything else that a recipe under configs/ sets.

A recipe is a file with `get_config() -> Config`; tools/train.py overrides any field from the command line.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Literal

from refalign_jax.config.checks import check_least
from refalign_jax.config.data import DataConfig, SyntheticConfig
from refalign_jax.config.model import ModelConfig
from refalign_jax.config.sample import SamplingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are arranged; see sharding.py. The axes' product is the number of devices.

    Attributes:
      data: copies of the model that share the batch; 0, all devices that the other axes leave.
      fsdp: devices over which batch, parameters, EMA and optimizer state are split.
      context: devices over which the tokens of a sample are split, and the state as well.
      tensor: devices over which heads and hidden widths are split; context times tensor divides the heads.
      slices: TPU slices (or nodes without a fast link between them), over which the data axis is laid.
    """

    data: int = 0
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    slices: int = 1

    def __post_init__(self) -> None:
        """Refuses empty axes."""
        if self.data < 0:
            raise ValueError(f"MeshConfig.data={self.data} must be at least 0, which takes what is left.")
        for name in ("fsdp", "context", "tensor", "slices"):
            if getattr(self, name) < 1:
                raise ValueError(f"MeshConfig.{name}={getattr(self, name)} must be at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropoutConfig:
    """Conditioning dropout: the share of samples that lose their text, their references, or both.

    Attributes:
      text: loses its text alone, which becomes the embedding of the empty prompt.
      references: loses its references alone, which become as many frames of zero latents, and its alignment loss.
      both: loses both.
    """

    text: float = 0.1
    references: float = 0.1
    both: float = 0.1

    def __post_init__(self) -> None:
        """Refuses shares that are none."""
        shares = (self.text, self.references, self.both)
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(f"DropoutConfig: text, references, both = {shares} are shares; none is below 0, sum ≤ 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule, and what surrounds it.

    Attributes:
      learning_rate: peak of the schedule.
      schedule: `constant`, or `cosine` from the peak to `final_share` of it at `train.steps`.
      warmup_steps: the first steps, over which the rate rises linearly; 0 starts at the peak.
      final_share: of the peak, where a cosine ends.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      eps: beside the root of the second moment.
      weight_decay: decoupled, of every trained parameter, as torch's AdamW has it.
      clip: largest global norm of the gradient; 0 doesn't clip.
      accumulation: parts a batch is computed in, one after the other; the gradient is that of the whole batch.
      ema_decay: of the exponential moving average of the parameters; 0 keeps none.
      freeze: patterns (as of file names) of parameters that stay as they are, such as `dit/blocks/ffn/*`.
    """

    learning_rate: float = 5e-5
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    final_share: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    accumulation: int = 1
    ema_decay: float = 0.0
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuses numbers with which AdamW or its schedule has no meaning."""
        if not self.learning_rate > 0 or not self.eps > 0:
            raise ValueError(
                f"OptimizerConfig: learning_rate={self.learning_rate} and eps={self.eps} must both be positive."
            )
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"OptimizerConfig.{name}={getattr(self, name)} must be at least 0 and below 1.")
        if not 0 <= self.final_share <= 1:
            raise ValueError(f"OptimizerConfig.final_share={self.final_share} is a share, from 0 to 1.")
        check_least(self, 0, "warmup_steps", "weight_decay", "clip")
        check_least(self, 1, "accumulation")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"OptimizerConfig.schedule={self.schedule!r} is unknown; choose constant or cosine.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run: where it writes, from what it starts, how long it goes and what it does on the way.

    Attributes:
      folder: local folder of the run: resolved config, metrics.jsonl, TensorBoard, previews, profile. A run that
        finds checkpoints goes on from the newest.
      checkpoint_folder: where checkpoints go, local or gs://, seen by every host; empty, `folder`/checkpoints.
      steps: of the whole run.
      seed: of initial parameters, noise, times and dropout; the order of examples has `data.shuffle_seed`.
      init: what a fresh run starts from: a checkpoint of parameters, the folder of another run or one of its
        checkpoints, or published safetensors; empty, random parameters.
      init_ema: start from the EMA of `init` where that is a training checkpoint.
      save_every: steps between checkpoints; the last step is always saved.
      keep: newest checkpoints that are kept.
      max_skipped: batches in a row whose loss or gradient is not finite and that are skipped before the run stops.
      held_out_every: steps between held-out losses, at fixed noise and times, over `data.held_out` examples; 0, never.
      preview_every: steps between previews sampled from the held-out examples; 0, never.
      previews: how many of them.
      profile_start: steps after the start at which the profiler's window opens.
      profile_steps: its length; 0, no profile.
      compilation_cache: folder where compiled programs are kept between runs; empty, nowhere.
      peak_tflops: of one device, for MFU; 0, known by the device's name.
      distributed: join other processes through jax.distributed, usually one a host; see `refalign_jax.distributed`.
      lost_after_seconds: of silence, after which another process counts as lost and this one ends; JAX's own default.
      stalled_after_seconds: without a finished step, after which a process ends, telling where it is; 0, never. An
        hour is more than compiling, a preview or a checkpoint should take.
    """

    folder: str = ""
    checkpoint_folder: str = ""
    steps: int = 1000
    seed: int = 0
    init: str = ""
    init_ema: bool = False
    save_every: int = 500
    keep: int = 3
    max_skipped: int = 0
    held_out_every: int = 0
    preview_every: int = 0
    previews: int = 2
    profile_start: int = 10
    profile_steps: int = 0
    compilation_cache: str = ""
    peak_tflops: float = 0.0
    distributed: bool = False
    lost_after_seconds: float = 100.0
    stalled_after_seconds: float = 3600.0

    def __post_init__(self) -> None:
        """Refuses counts below their least."""
        check_least(self, 1, "steps", "save_every", "keep", "previews")
        check_least(self, 0, "max_skipped", "held_out_every", "preview_every", "profile_start", "profile_steps")
        check_least(self, 0, "peak_tflops", "seed", "stalled_after_seconds")
        check_least(self, 1, "lost_after_seconds")
        if self.seed >= 2**32:
            raise ValueError(f"TrainConfig.seed={self.seed} must be below 2^32.")
        if "://" in self.folder:
            raise ValueError(
                f"TrainConfig.folder={self.folder!r} must be local, since its files are appended to; checkpoints alone "
                "may go elsewhere, by checkpoint_folder."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        """Checks what one part demands of another."""
        if self.data.batch_size % self.optimizer.accumulation:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} is not divisible by optimizer.accumulation="
                f"{self.optimizer.accumulation}; each part needs equally many examples."
            )
        if self.optimizer.schedule == "cosine" and self.optimizer.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} leaves nothing of train.steps="
                f"{self.train.steps} for the cosine."
            )
        for name in ("held_out_every", "preview_every"):
            if getattr(self.train, name) and not self.data.held_out:
                raise ValueError(
                    f"train.{name}={getattr(self.train, name)} needs examples that training never sees; set "
                    "data.held_out to a multiple of data.batch_size."
                )
