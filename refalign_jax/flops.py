"""Floating-point operations of a training step and of sampling, counted from the model's sizes.

A product of [m, k] and [k, n] counts 2·m·k·n, and element-wise operations are not counted. A training step counts as
three forward passes: for each product of the forward pass, the backward pass computes two, of the gradient with the
input and with the weight. Recomputation is not counted, so that MFU compares runs with different remat policies;
`repeated_flops` counts it separately.

    MFU = operations per step / (seconds per step · devices · peak per device)
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from refalign_jax.config import AlignmentConfig, DiTConfig, ModelConfig

Kernel = Literal["splash", "cudnn", "xla"]
"""Kernel of attention."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one sample, padding included, since padding is computed too.

    Attributes:
      grid: latent frames, rows and columns of the video.
      references: R.
      text_length: S.
    """

    grid: tuple[int, int, int]
    references: int
    text_length: int


def tokens(dit: DiTConfig, shape: Shape) -> tuple[int, int]:
    """Video tokens L and reference tokens R·P of one sample."""
    frames, rows, columns = dit.token_grid(*shape.grid)
    return frames * rows * columns, shape.references * rows * columns


def forward_flops(dit: DiTConfig, shape: Shape) -> int:
    """Operations of one forward pass of the transformer on one sample."""
    L, RP = tokens(dit, shape)
    T, S, D = L + RP, shape.text_length, dit.width
    embed = T * dit.patch_values * D + S * (dit.text_width + D) * D + (dit.frequency_width + 7 * D) * D
    self_attention = 4 * T * D * D + 2 * T * T * D
    queries = T if dit.reference_cross_attention else L
    cross_attention = 2 * (queries + S) * D * D + 2 * queries * S * D
    ffn = 2 * T * D * dit.ffn_width
    head = L * D * dit.patch_values
    return 2 * (embed + dit.num_layers * (self_attention + cross_attention + ffn) + head)


def alignment_flops(dit: DiTConfig, alignment: AlignmentConfig, shape: Shape) -> tuple[int, int]:
    """Operations of the alignment loss's forward pass on one sample: (projectors, cosines of student and teacher)."""
    _, RP = tokens(dit, shape)
    D, E, R = dit.width, alignment.vfm_width, shape.references
    per_token = 9 * D * E if alignment.projector == "conv" else D * (D // 2) + (D // 2) * E
    P = RP // max(R, 1)
    cosines = RP * E + R * (R - 1) * P * P * E
    return 2 * alignment.num_blocks * RP * per_token, 2 * alignment.num_blocks * cosines


def train_flops(model: ModelConfig, shape: Shape) -> int:
    """Operations of one training step on one sample."""
    total = 3 * forward_flops(model.dit, shape)
    if model.alignment.weight > 0:
        projectors, cosines = alignment_flops(model.dit, model.alignment, shape)
        total += 3 * projectors + 2 * cosines  # no gradient with respect to the teacher
    return total


def repeated_flops(model: ModelConfig, shape: Shape, kernel: Kernel, alone: bool = False) -> int:
    """Operations that a training step on one sample recomputes, beyond `train_flops`.

    Before a block's backward pass, its forward pass is recomputed, except for the activations that the remat policy
    retains. Even its last product is needed, for the gradient of the gate, except where a device has a single sample
    and the gate is a part of the kernel (`models/gradients.py`). In addition, kernels that do not store the
    scores recompute them: splash's two backward kernels compute seven products per tile where four are counted; its
    fused backward kernel and cuDNN's compute five.

    Args:
      model: gives the sizes and the remat policy.
      shape: of the sample.
      kernel: of attention.
      alone: whether one device has this one sample.
    """
    dit = model.dit
    L, RP = tokens(dit, shape)
    T, S, D = L + RP, shape.text_length, dit.width
    scores = _scores(dit, shape)
    narrow = 4 * T * D * D + 2 * (L + S) * D * D
    wide = T * D * dit.ffn_width
    thin = narrow + 2 * wide
    again = {"none": 0, "dots": 0, "narrow": wide, "attention": thin, "full": thin + 2 * scores}
    total = dit.num_layers * (again[dit.remat] + _attention_again(dit, kernel) * scores)
    if alone and dit.remat in ("attention", "full"):
        # projectors need the outputs of their blocks, of which "attention" retains what they need
        observed = model.alignment.num_blocks if model.alignment.weight > 0 and dit.remat == "full" else 0
        total -= (dit.num_layers - observed) * wide
    if model.alignment.weight > 0:
        projectors, cosines = alignment_flops(dit, model.alignment, shape)
        total += (projectors + cosines) // 2
    return 2 * total


def attention_flops(model: ModelConfig, shape: Shape, kernel: Kernel) -> int:
    """Operations of a training step on one sample between queries, keys and values, those computed twice included.

    They are a part of `train_flops` plus `repeated_flops`, whose arguments these are.
    """
    per_layer = 6 + _attention_again(model.dit, kernel) + (2 if model.dit.remat == "full" else 0)
    return 2 * model.dit.num_layers * per_layer * _scores(model.dit, shape)


def sample_flops(dit: DiTConfig, shape: Shape, forwards: int) -> int:
    """Operations of sampling one video in so many forward passes (`sampling.num_forwards`)."""
    return forwards * forward_flops(dit, shape)


def sample_attention_flops(dit: DiTConfig, shape: Shape, forwards: int) -> int:
    """The part of `sample_flops` between queries, keys and values."""
    return 4 * forwards * dit.num_layers * _scores(dit, shape)


def _scores(dit: DiTConfig, shape: Shape) -> int:
    """Multiply-adds of one product each of self-attention and cross-attention in one block."""
    L, RP = tokens(dit, shape)
    queries = L + RP if dit.reference_cross_attention else L
    return ((L + RP) ** 2 + queries * shape.text_length) * dit.width


def _attention_again(dit: DiTConfig, kernel: Kernel) -> int:
    """Products that a kernel of attention computes again in the backward pass."""
    if kernel == "xla":
        return int(dit.remat in ("dots", "narrow", "attention"))  # no checkpoint name for scores
    return 3 if kernel == "splash" and not dit.tiles.fused_backward else 1
