"""Floating-point operations of a training or sampling step, counted from the model's sizes.

A matmul of [m, k] and [k, n] counts 2·m·k·n; element-wise work counts nothing. A training step counts three times
the forward pass: the backward pass computes two products, of the gradient with the input and with the weight, for each
of the forward's. What is computed a second time is not counted, so that MFU compares runs of different memory policies;
`repeated_flops` counts it apart.

    MFU = operations of a step / (seconds a step · devices · peak of a device)
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from refalign_jax.config import AlignmentConfig, DiTConfig, ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What one sample is made of, padding included, since padding is computed too.

    Attributes:
      grid: latent frames, rows, columns of the video.
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
    """Of one pass of the transformer over one sample."""
    L, RP = tokens(dit, shape)
    T, S, D = L + RP, shape.text_length, dit.width
    embed = T * dit.patch_values * D + S * (dit.text_width + D) * D + (dit.frequency_width + 7 * D) * D
    self_attention = 4 * T * D * D + 2 * T * T * D
    cross_attention = 2 * (L + S) * D * D + 2 * L * S * D
    ffn = 2 * T * D * dit.ffn_width
    head = L * D * dit.patch_values
    return 2 * (embed + dit.num_layers * (self_attention + cross_attention + ffn) + head)


def alignment_flops(dit: DiTConfig, alignment: AlignmentConfig, shape: Shape) -> tuple[int, int]:
    """Of one sample's forward pass: of the projectors, and of the cosines between student and teacher."""
    _, RP = tokens(dit, shape)
    D, E, R = dit.width, alignment.vfm_width, shape.references
    per_token = 9 * D * E if alignment.projector == "conv" else D * (D // 2) + (D // 2) * E
    P = RP // max(R, 1)
    cosines = RP * E + R * (R - 1) * P * P * E
    return 2 * alignment.num_blocks * RP * per_token, 2 * alignment.num_blocks * cosines


def train_flops(model: ModelConfig, shape: Shape) -> int:
    """Of one training step on one sample."""
    total = 3 * forward_flops(model.dit, shape)
    if model.alignment.weight > 0:
        projectors, cosines = alignment_flops(model.dit, model.alignment, shape)
        total += 3 * projectors + 2 * cosines  # the teacher has no gradient
    return total


def repeated_flops(model: ModelConfig, shape: Shape, kernel: Literal["splash", "cudnn", "xla"]) -> int:
    """What a training step on one sample computes a second time, beyond `train_flops`.

    The backward pass begins with the forward pass of each block, as far as the remat policy has not kept it (all of it
    is needed: its last product for the gate's gradient). Beside that, kernels that never store the scores compute them
    again: splash's two backward kernels take seven products a tile where four are counted, its fused one and cuDNN's
    five.
    """
    dit = model.dit
    L, RP = tokens(dit, shape)
    T, S, D = L + RP, shape.text_length, dit.width
    scores = T * T * D + L * S * D  # one product of self- and of cross-attention
    narrow = 4 * T * D * D + 2 * (L + S) * D * D
    wide = T * D * dit.ffn_width
    thin = narrow + 2 * wide
    again = {"none": 0, "dots": 0, "narrow": wide, "attention": thin, "full": thin + 2 * scores}
    if kernel == "xla":
        kernel_again = scores if dit.remat in ("dots", "narrow", "attention") else 0  # scores themselves have no name
    elif kernel == "splash" and not dit.tiles.fused_backward:
        kernel_again = 3 * scores
    else:
        kernel_again = scores
    total = dit.num_layers * (again[dit.remat] + kernel_again)
    if model.alignment.weight > 0:
        projectors, cosines = alignment_flops(dit, model.alignment, shape)
        total += (projectors + cosines) // 2
    return 2 * total


def sample_flops(dit: DiTConfig, shape: Shape, num_steps: int) -> int:
    """Of sampling one video: three branches of guidance a step, two without references."""
    return num_steps * (3 if shape.references else 2) * forward_flops(dit, shape)
