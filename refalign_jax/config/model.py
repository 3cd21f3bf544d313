"""Every configuration, every default; imports no JAX, so that a command can refuse a mistake at once.

Defaults are RefAlign-1.3B at the paper's training shape. Numbers without a remark are the published ones.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Literal

from refalign_jax.config.checks import check_choice, check_positive

DType = Literal["float32", "bfloat16"]
RematPolicy = Literal["none", "dots", "narrow", "attention", "full"]
AttentionKernel = Literal["auto", "xla", "splash", "cudnn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionTiles:
    """Tiles of the splash kernel, in tokens; a sequence shorter than a tile takes a smaller one.

    Attributes:
      q: queries of a tile in the forward pass.
      kv: keys and values that are fetched together.
      kv_compute: of those, how many are computed together; divides `kv`.
      backward_q: queries of a tile in the backward pass.
      backward_kv: keys and values of a tile in the backward pass.
      backward_kv_compute: of those, how many are computed together; divides `backward_kv`.
      fused_backward: one backward kernel of five products a tile in place of two with seven; it needs memory for a
        partial query gradient from every tile of keys, T / backward_kv times the queries: in 16 bits, at 37,440 tokens
        and 10 heads on a device, 3.3 GiB.
    """

    q: int = 1024
    kv: int = 1024
    kv_compute: int = 512
    backward_q: int = 1024
    backward_kv: int = 1024
    backward_kv_compute: int = 512
    fused_backward: bool = True

    def __post_init__(self) -> None:
        """Refuses tiles that no TPU has, or that don't divide each other."""
        for name in ("q", "kv", "kv_compute", "backward_q", "backward_kv", "backward_kv_compute"):
            value = getattr(self, name)
            if value < 128 or value & (value - 1):
                raise ValueError(f"AttentionTiles.{name}={value} must be a power of two from 128 up.")
        for name in ("kv", "backward_kv"):
            if getattr(self, f"{name}_compute") > getattr(self, name):
                raise ValueError(f"AttentionTiles.{name}_compute must not be larger than {name}={getattr(self, name)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """The diffusion transformer: Wan2.1 T2V with a reference branch.

    Attributes:
      width: D, of the residual stream.
      num_layers: transformer blocks.
      num_heads: N; the head width is D / N.
      ffn_width: hidden width of the feed-forward network.
      text_width: width of the text encoder's embeddings.
      frequency_width: of the sinusoid that encodes t.
      latent_channels: C, in and out.
      patch_size: latent frames, rows and columns in one token; a token never spans frames, since a reference has one.
      eps: of every norm.
      rope_theta: base of the rotary frequencies.
      max_position: rotary positions reach from 0 to this, exclusive, on each axis.
      compute_dtype: of matmuls and what they read and write; norms, softmax, RoPE, time and head stay float32.
      residual_dtype: of the stream that the blocks add to. float32, as in Wan2.1's code, halves bfloat16's error; in
        bfloat16 the stream, which is most of what remat keeps, takes half the memory.
      attention: kernel; in bfloat16 `auto` is splash on TPUs and cuDNN on NVIDIA; else XLA.
      tiles: of the splash kernel.
      remat: what a block keeps for the backward pass beside its input: `none` recomputes nothing, `dots` keeps the
        outputs of linear layers and of attention, `narrow` those without the hidden layer of the feed-forward network,
        `attention` attention's alone, `full` nothing.
      offload: the blocks' inputs wait for the backward pass in the host's memory.
    """

    width: int = 1536
    num_layers: int = 30
    num_heads: int = 12
    ffn_width: int = 8960
    text_width: int = 4096
    frequency_width: int = 256
    latent_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position: int = 1024
    compute_dtype: DType = "bfloat16"
    residual_dtype: DType = "float32"
    attention: AttentionKernel = "auto"
    tiles: AttentionTiles = field(default_factory=AttentionTiles)
    remat: RematPolicy = "full"
    offload: bool = False

    def __post_init__(self) -> None:
        """Refuses sizes that no Wan transformer has, each with a sentence."""
        for name in ("width", "num_layers", "num_heads", "ffn_width", "text_width", "latent_channels", "max_position"):
            check_positive(self, name)
        if self.width % self.num_heads:
            raise ValueError(
                f"DiTConfig.width={self.width} is not divisible by num_heads={self.num_heads}; "
                "each head needs the same width."
            )
        if any(size % 2 or size == 0 for size in self.rope_widths):
            raise ValueError(
                f"DiTConfig: a head width of {self.head_width} (width {self.width} / num_heads {self.num_heads}) "
                f"splits into {self.rope_widths} for time, rows and columns; RoPE rotates pairs, so each must be even "
                "and positive."
            )
        if self.frequency_width < 2 or self.frequency_width % 2:
            raise ValueError(
                f"DiTConfig.frequency_width={self.frequency_width} must be even: half cosines, half sines."
            )
        if len(self.patch_size) != 3 or min(self.patch_size) < 1 or self.patch_size[0] != 1:
            raise ValueError(
                f"DiTConfig.patch_size={self.patch_size} must be (1, rows, columns): a reference is a single frame, so "
                "a token can't span several."
            )
        check_choice(self, "compute_dtype", DType)
        check_choice(self, "residual_dtype", DType)
        check_choice(self, "attention", AttentionKernel)
        check_choice(self, "remat", RematPolicy)
        if self.offload and self.remat == "none":
            raise ValueError("DiTConfig.offload needs a remat policy that recomputes: remat is 'none'.")

    @property
    def head_width(self) -> int:
        """K, the width of one head."""
        return self.width // self.num_heads

    @property
    def rope_widths(self) -> tuple[int, int, int]:
        """Parts of the head width that encode time, rows and columns."""
        spatial = self.head_width // 3
        return (self.head_width - 2 * spatial, spatial, spatial)

    @property
    def patch_values(self) -> int:
        """Latent values in one token: channels times patch."""
        pt, ph, pw = self.patch_size
        return pt * ph * pw * self.latent_channels

    def token_grid(self, frames: int, rows: int, columns: int) -> tuple[int, int, int]:
        """Tokens along frames, rows and columns of a latent grid.

        Raises:
          ValueError: the grid is not divisible by the patch, or reaches beyond `max_position`.
        """
        _, ph, pw = self.patch_size
        if rows % ph or columns % pw:
            raise ValueError(
                f"A latent grid of {rows}x{columns} is not divisible by the patch {ph}x{pw}; in pixels, height and "
                f"width must be multiples of {8 * ph} and {8 * pw}."
            )
        grid = (frames, rows // ph, columns // pw)
        if max(grid) > self.max_position:
            raise ValueError(f"A token grid of {grid} reaches beyond DiTConfig.max_position={self.max_position}.")
        return grid


def wan_1_3b() -> DiTConfig:
    """The 1.3B model, the default."""
    return DiTConfig()


def wan_14b() -> DiTConfig:
    """The 14B model."""
    return DiTConfig(width=5120, num_layers=40, num_heads=40, ffn_width=13824)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """The reference alignment loss.

    Attributes:
      weight: λ of the sample total; 0 trains without alignment.
      num_blocks: A; the outputs of blocks 0..A-1 are aligned.
      vfm_width: E, of the targets: 1024 for DINOv3 ViT-L/16, 768 for ViT-B/16.
      pull_weight: of L₊; 0 leaves the push alone.
      push_weight: β, of L₋; 0 leaves the pull alone.
      pull_margin: m₊; a cosine distance below it costs nothing.
      push_margin: m₋; a cosine distance above it costs nothing.
      gate_power: exponent of g(t) = (t/1000)^power.
      projector: `mlp` as published; `conv`, one 3x3 convolution over the token grid (iREPA, arXiv 2512.10794).
      normalize_targets: iREPA's other half: targets lose their mean over the reference's tokens and are divided by
        their standard deviation there, per channel.
      target_mean_removed: share of that spatial mean that is removed.
      stop_step: from this training step on the loss is not aligned (HASTE, arXiv 2505.16792); 0 means never.
    """

    weight: float = 1.0
    num_blocks: int = 9
    vfm_width: int = 1024
    pull_weight: float = 1.0
    push_weight: float = 1.0
    pull_margin: float = 0.0
    push_margin: float = 1.0
    gate_power: float = 3.0
    projector: Literal["mlp", "conv"] = "mlp"
    normalize_targets: bool = False
    target_mean_removed: float = 1.0
    stop_step: int = 0

    def __post_init__(self) -> None:
        """Refuses values for which the loss has no meaning."""
        for name in ("num_blocks", "vfm_width"):
            check_positive(self, name)
        for name in ("weight", "pull_weight", "push_weight", "gate_power", "stop_step"):
            if getattr(self, name) < 0:
                raise ValueError(f"AlignmentConfig.{name}={getattr(self, name)} must not be negative; 0 turns it off.")
        for name in ("pull_margin", "push_margin"):
            if not 0 <= getattr(self, name) <= 2:
                raise ValueError(
                    f"AlignmentConfig.{name}={getattr(self, name)} is a cosine distance and must lie between 0 and 2."
                )
        if not 0 <= self.target_mean_removed <= 1:
            raise ValueError(f"AlignmentConfig.target_mean_removed={self.target_mean_removed} is a share, from 0 to 1.")
        if not 0 <= self.stop_step < 2**31:
            raise ValueError(f"AlignmentConfig.stop_step={self.stop_step} must be a step below 2^31, or 0 for never.")
        check_choice(self, "projector", Literal["mlp", "conv"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Flow matching.

    Attributes:
      num_train_steps: length of the training schedule, from which the index is drawn uniformly.
      shift: s of σ' = s·σ / (1 + (s-1)·σ).
    """

    num_train_steps: int = 1000
    shift: float = 5.0

    def __post_init__(self) -> None:
        """Refuses an empty schedule."""
        check_positive(self, "num_train_steps")
        check_positive(self, "shift")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained: the DiT, its alignment, its flow. Written beside every checkpoint."""

    dit: DiTConfig = field(default_factory=DiTConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)

    def __post_init__(self) -> None:
        """Checks what one part demands of another."""
        if self.alignment.num_blocks > self.dit.num_layers:
            raise ValueError(
                f"AlignmentConfig.num_blocks={self.alignment.num_blocks} is more than DiTConfig.num_layers="
                f"{self.dit.num_layers}; at most every block can be aligned."
            )
