"""Configuration of a training run: model, data, and everything else that a recipe sets.

A recipe is a Python file with `get_config() -> Config` (recipe.py); tools/train.py overrides any field of it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Annotated, Literal

from tyro.conf import arg

from refalign_jax.config.checks import check_range, check_values, expand_home
from refalign_jax.config.data import DataConfig, SyntheticConfig
from refalign_jax.config.model import ModelConfig
from refalign_jax.config.sample import SamplingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are arranged; see sharding.py. The axes' product is the number of devices.

    Attributes:
      data: Copies of the model that share the batch; 0 for all devices that the other axes leave.
      fsdp: Devices over which batch, parameters, EMA and optimizer state are split.
      context: Devices over which the tokens of a sample are split, and the state as well.
      ring: Parts into which the tokens are split before `context` splits each of them, for sequences that the heads
        don't allow to be split further; the state is split over it as well. TPUs alone.
      tensor: Devices over which heads and hidden widths are split; context times tensor divides the heads.
      slices: TPU slices (or nodes without a fast link between them), over which the data axis is laid.
    """

    data: int = 0
    fsdp: int = 1
    context: int = 1
    ring: int = 1
    tensor: int = 1
    slices: int = 1

    def __post_init__(self) -> None:
        """Refuses empty axes."""
        check_values(self)
        check_range(self, "data", least=0)
        check_range(self, "fsdp", "context", "ring", "tensor", "slices", least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropoutConfig:
    """Conditioning dropout: the fraction of samples that lose their text, their references, or both.

    Attributes:
      text: Fraction that loses its text alone, which becomes the embedding of the empty prompt.
      references: Fraction that loses its references alone, which become as many frames of zero latents, and its
        alignment loss.
      both: Fraction that loses both.
    """

    text: float = 0.1
    references: float = 0.1
    both: float = 0.1

    def __post_init__(self) -> None:
        """Refuses fractions that are negative or sum to more than 1."""
        check_values(self)
        check_range(self, "text", "references", "both", least=0)
        fractions = (self.text, self.references, self.both)
        if sum(fractions) > 1:
            raise ValueError(f"DropoutConfig: text, references, both = {fractions} must sum to at most 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule, and what surrounds it.

    Attributes:
      learning_rate: Peak of the schedule.
      schedule: `constant`, or `cosine` from the peak to `final_share` times the peak at `train.steps`.
      warmup_steps: First steps, over which the rate rises linearly; 0 starts at the peak.
      final_share: Fraction of the peak at which a cosine ends.
      beta1: Decay of the first moment.
      beta2: Decay of the second moment.
      eps: Added to the root of the second moment.
      weight_decay: Decoupled weight decay of every trained parameter, as in torch's AdamW.
      clip: Largest global norm of the gradient; 0 does not clip.
      accumulation: Parts in which a batch is computed, one after the other; the gradient is that of the whole batch.
      ema_decay: Decay of the exponential moving average of the parameters; 0 keeps none.
      freeze: Patterns, as for file names, of parameters that are not trained, such as `dit/blocks/ffn/*`.
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
        check_values(self)
        check_range(self, "learning_rate", "eps", above=0)
        check_range(self, "beta1", "beta2", "ema_decay", least=0, below=1)
        check_range(self, "final_share", least=0, most=1)
        check_range(self, "warmup_steps", "weight_decay", "clip", least=0)
        check_range(self, "accumulation", least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run: where it writes, from what it starts, how long it goes and what it does on the way.

    Attributes:
      folder: Local folder of the run: resolved config, metrics.jsonl, TensorBoard, previews, profile. A run that
        finds checkpoints continues from the newest.
      checkpoint_folder: Folder of the checkpoints, local or gs://, seen by every host; empty for `folder`/checkpoints.
      steps: Steps of the whole run.
      seed: Seed of initial parameters, noise, times and dropout; `data.shuffle_seed` is that of the order of examples.
      init: What a fresh run starts from: a checkpoint of parameters, the folder of another run or one of its
        checkpoints, or published safetensors; empty for random parameters.
      init_ema: Start from the EMA of `init` where that is a training checkpoint.
      save_every: Steps between checkpoints; the last step is always saved.
      keep: Number of newest checkpoints that are kept.
      verify_checkpoints: Compare the files of a checkpoint with the digests that were written with them before the run
        continues from it or starts from it as `init`.
      max_skipped: Consecutive batches with a loss or gradient that is not finite that are skipped before the run stops.
      held_out_every: Steps between held-out losses, at fixed noise and times, over `data.held_out` examples; 0 for
        never.
      preview_every: Steps between previews sampled from the held-out examples; 0 for never.
      previews: Number of previews.
      verify_dump: Steps whose inputs, losses and gradients are written to `folder`/verify, for another framework to
        compute again; see docs/verify.md.
      profile_start: Steps from the start of this process to the start of the profile.
      profile_steps: Steps that are profiled; 0 for none.
      compilation_cache: Folder in which compiled programs are kept between runs; empty for none.
      peak_tflops: Peak TFLOP/s of one device, for MFU; 0 to look it up by the device's name.
      distributed: Join other processes through jax.distributed, usually one per host; see trainer/distributed.py.
      lost_after_seconds: Seconds of silence after which another process counts as lost and this one ends; JAX's own
        default.
      stalled_after_seconds: Seconds without a finished step after which a process ends and prints where it is; 0 for
        never. An hour is more than compiling, a preview or a checkpoint should take.
    """

    folder: str = ""
    checkpoint_folder: str = ""
    steps: int = 1000
    seed: int = 0
    init: str = ""
    init_ema: bool = False
    save_every: int = 500
    keep: int = 3
    verify_checkpoints: bool = True
    max_skipped: int = 0
    held_out_every: int = 0
    preview_every: int = 0
    previews: int = 2
    verify_dump: Annotated[tuple[int, ...], arg(aliases=("--verify-dump",))] = ()
    profile_start: int = 10
    profile_steps: int = 0
    compilation_cache: str = ""
    peak_tflops: float = 0.0
    distributed: bool = False
    lost_after_seconds: float = 100.0
    stalled_after_seconds: float = 3600.0

    def __post_init__(self) -> None:
        """Refuses counts that are too small, and a folder that is not local."""
        check_values(self)
        expand_home(self, "folder", "checkpoint_folder", "init", "compilation_cache")
        check_range(self, "steps", "save_every", "keep", "previews", "lost_after_seconds", least=1)
        check_range(self, "max_skipped", "held_out_every", "preview_every", "profile_start", "profile_steps", least=0)
        check_range(self, "peak_tflops", "stalled_after_seconds", least=0)
        check_range(self, "seed", least=0, below=2**32)
        if any(step < 1 for step in self.verify_dump):
            raise ValueError(f"TrainConfig.verify_dump={self.verify_dump}: steps are counted from 1.")
        if self.verify_dump and self.distributed:
            raise ValueError("TrainConfig.verify_dump works in one process; leave out train.distributed.")
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
                    "data.held_out."
                )
