"""Configuration of the model: the transformer, its alignment loss and its flow.

Defaults are RefAlign-1.3B at the paper's training shape. Numbers without a remark are the published ones.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Literal

from refalign_jax.config.checks import check_range, check_values

DType = Literal["float32", "bfloat16"]
QuantisedDType = Literal["int8", "float8"]
WeightsDType = Literal["float32", "bfloat16", "int8", "float8"]
RematPolicy = Literal["none", "dots", "narrow", "attention", "full"]
CenterTargets = Literal["none", "reference", "dataset"]
AttentionKernel = Literal["auto", "xla", "splash", "cudnn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionTiles:
    """Tiles of the splash kernel, in tokens; a sequence shorter than a tile takes a smaller one.

    Attributes:
      q: Queries per tile in the forward pass.
      kv: Keys and values that are fetched together.
      kv_compute: Keys and values that are computed together; divides `kv`.
      backward_q: Queries per tile in the backward pass.
      backward_kv: Keys and values per tile in the backward pass. 0 chooses by the device: 1024, or 2048 where the
        partial query gradients described below would take more than a sixth of its memory.
      backward_kv_compute: Keys and values that are computed together in the backward pass; divides `backward_kv`.
      fused_backward: Use one backward kernel with five products per tile in place of two kernels with seven. It needs
        memory for a partial query gradient from every tile of keys, T / backward_kv times the queries: in 16 bits, at
        37,440 tokens and 10 heads per device, 3.3 GiB.
    """

    q: int = 1024
    kv: int = 1024
    kv_compute: int = 512
    backward_q: int = 1024
    backward_kv: int = 0
    backward_kv_compute: int = 512
    fused_backward: bool = True

    def __post_init__(self) -> None:
        """Refuses tiles that no TPU has, or that do not divide each other."""
        check_values(self)
        for name in ("q", "kv", "kv_compute", "backward_q", "backward_kv", "backward_kv_compute"):
            value = getattr(self, name)
            chosen = name == "backward_kv" and value == 0
            if not chosen and (value < 128 or value & (value - 1)):
                raise ValueError(f"AttentionTiles.{name}={value} must be a power of two from 128 up.")
        for name in ("kv", "backward_kv"):
            if getattr(self, f"{name}_compute") > (getattr(self, name) or 1024):
                raise ValueError(f"AttentionTiles.{name}_compute must not be larger than {name}={getattr(self, name)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """The diffusion transformer: Wan2.1 T2V with a reference branch.

    Attributes:
      width: D, the width of the residual stream.
      num_layers: Number of transformer blocks.
      num_heads: N, the attention heads; the head width is D / N.
      ffn_width: Hidden width of the feed-forward network.
      text_width: Width of the text encoder's embeddings.
      frequency_width: Width of the sinusoidal encoding of t.
      latent_channels: C, the latent channels, in and out.
      patch_size: Latent frames, rows and columns per token; a token never spans frames, since a reference has one.
      eps: Epsilon of every norm.
      rope_theta: Base of the rotary frequencies.
      max_position: Rotary positions lie in [0, max_position) on each axis.
      reference_cross_attention: References attend to the text too, as in Phantom-Wan; in RefAlign they don't.
      compute_dtype: dtype of matrix products, their inputs and outputs; norms, softmax, RoPE, time and head stay
        float32.
      residual_dtype: dtype of the residual stream. float32, as in Wan2.1's code, halves bfloat16's error; in bfloat16
        the stream, which is most of what activation checkpointing retains, takes half the memory.
      attention: Attention kernel. `auto` in bfloat16 is splash on TPUs and cuDNN on NVIDIA GPUs, otherwise XLA.
      tiles: Tiles of the splash kernel.
      remat: Activation checkpointing: what a block retains for the backward pass beside its input. `none` recomputes
        nothing, `dots` retains the outputs of linear layers and of attention, `narrow` those without the hidden layer
        of the feed-forward network, `attention` attention's output alone, `full` nothing.
      offload: Keep the blocks' inputs in the host's memory until the backward pass.
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
    reference_cross_attention: bool = False
    compute_dtype: DType = "bfloat16"
    residual_dtype: DType = "float32"
    attention: AttentionKernel = "auto"
    tiles: AttentionTiles = field(default_factory=AttentionTiles)
    remat: RematPolicy = "full"
    offload: bool = False

    def __post_init__(self) -> None:
        """Refuses sizes that no Wan transformer has, each with a sentence."""
        check_values(self)
        check_range(self, "width", "num_layers", "num_heads", "ffn_width", "text_width", "latent_channels", above=0)
        check_range(self, "max_position", "eps", "rope_theta", above=0)
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
        if min(self.patch_size) < 1 or self.patch_size[0] != 1:
            raise ValueError(
                f"DiTConfig.patch_size={self.patch_size} must be (1, rows, columns): a reference is a single frame, so "
                "a token cannot span several."
            )
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
      weight: λ, the weight of the alignment loss; 0 trains without alignment.
      num_blocks: A, the number of aligned blocks: the outputs of blocks 0 to A-1.
      vfm_width: E, the width of the VFM's features: 1024 for DINOv3 ViT-L/16, 768 for ViT-B/16.
      pull_weight: Weight of L₊; 0 leaves the push alone.
      push_weight: β, the weight of L₋; 0 leaves the pull alone.
      pull_margin: m₊; a cosine distance below it costs nothing.
      push_margin: m₋; a cosine distance above it costs nothing.
      gate_power: Exponent of g(t) = (t/1000)^power.
      projector: `mlp` as published, or `conv`, one 3x3 convolution over the token grid (iREPA, arXiv 2512.10794).
      normalize_targets: Subtract each channel's mean over the reference's tokens from the targets and divide by its
        standard deviation there, as iREPA does.
      target_mean_removed: Fraction of that mean that is subtracted.
      center_targets: Subtract a mean from the targets, so that those of different subjects no longer share a direction:
        `reference`, the mean over the tokens of the reference that show its subject; `dataset`, the mean over all such
        tokens of the dataset.
      subject_patches_only: Leave tokens that show no subject, such as white padding, out of L₊ and L₋.
      stop_step: Training step from which on the alignment loss is left out (HASTE, arXiv 2505.16792); 0 for never.
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
    center_targets: CenterTargets = "none"
    subject_patches_only: bool = False
    stop_step: int = 0

    def __post_init__(self) -> None:
        """Refuses values for which the loss has no meaning."""
        check_values(self)
        check_range(self, "num_blocks", "vfm_width", above=0)
        check_range(self, "weight", "pull_weight", "push_weight", "gate_power", least=0)
        check_range(self, "pull_margin", "push_margin", least=0, most=2)
        check_range(self, "target_mean_removed", least=0, most=1)
        check_range(self, "stop_step", least=0, below=2**31)
        if self.normalize_targets and self.center_targets != "none":
            raise ValueError(
                f"AlignmentConfig.normalize_targets subtracts a mean already; choose it or center_targets="
                f"{self.center_targets!r}."
            )

    @property
    def needs_subject_mask(self) -> bool:
        """Whether the loss depends on which tokens show a subject."""
        return self.weight > 0 and (self.subject_patches_only or self.center_targets != "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Flow matching.

    Attributes:
      num_train_steps: Length of the training schedule, from which the index is drawn uniformly.
      shift: s in σ' = s·σ / (1 + (s-1)·σ).
    """

    num_train_steps: int = 1000
    shift: float = 5.0

    def __post_init__(self) -> None:
        """Refuses an empty schedule."""
        check_values(self)
        check_range(self, "num_train_steps", "shift", above=0)


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
