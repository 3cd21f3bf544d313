"""Wan2.1's video VAE: published tensor names and diffusers' names beside ours.

The published network numbers the blocks of all levels in one row (`encoder.downsamples.7`); so does diffusers for the
encoder (`encoder.down_blocks.7`), while its decoder counts levels and blocks (`decoder.up_blocks.1.resnets.2`).
Convolutions are [out, in, (frames,) rows, columns] there, and norms have trailing axes of length 1.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from refalign_jax.convert.table import Entry, Layout, convolution
from refalign_jax.models.vae import VAEConfig

Names = Literal["wan", "diffusers"]

CONVOLUTION_3D = convolution(3)
CONVOLUTION_2D = Layout(
    lambda x: convolution(2).to_ours(x)[None],
    lambda x: convolution(2).to_published(x[0]),
)
"""torch Conv2d weight [O, I, y, x] <-> kernel of one frame [1, y, x, I, O]."""


def _scale(trailing: int) -> Layout:
    """Layout of a gamma [C, 1, ...] with `trailing` axes of length 1 <-> scale [C]."""
    return Layout(lambda x: x.reshape(-1), lambda x: np.asarray(x).reshape(-1, *[1] * trailing))


def _convolution(path: str, name: str, layout: Layout = CONVOLUTION_3D) -> list[Entry]:
    return [Entry(f"{path}/kernel", f"{name}.weight", layout), Entry(f"{path}/bias", f"{name}.bias")]


def _norm(path: str, name: str, trailing: int = 3) -> list[Entry]:
    return [Entry(f"{path}/scale", f"{name}.gamma", _scale(trailing))]


def _block(path: str, name: str, names: Names, shortcut: bool) -> list[Entry]:
    """A residual block."""
    wan = names == "wan"
    entries = [
        *_norm(f"{path}/norm1", f"{name}.residual.0" if wan else f"{name}.norm1"),
        *_convolution(f"{path}/conv1", f"{name}.residual.2" if wan else f"{name}.conv1"),
        *_norm(f"{path}/norm2", f"{name}.residual.3" if wan else f"{name}.norm2"),
        *_convolution(f"{path}/conv2", f"{name}.residual.6" if wan else f"{name}.conv2"),
    ]
    if shortcut:
        entries += _convolution(f"{path}/shortcut", f"{name}.shortcut" if wan else f"{name}.conv_shortcut")
    return entries


def _ends(half: str, names: Names) -> list[Entry]:
    """What encoder and decoder share: the first and last convolutions and the middle."""
    wan = names == "wan"
    attention = f"{half}.middle.1" if wan else f"{half}.mid_block.attentions.0"
    middle = [f"{half}.middle.{i}" for i in (0, 2)] if wan else [f"{half}.mid_block.resnets.{i}" for i in (0, 1)]
    return [
        *_convolution(f"{half}/conv_in", f"{half}.conv1" if wan else f"{half}.conv_in"),
        *_block(f"{half}/middle_block0", middle[0], names, False),
        *_norm(f"{half}/middle_attention/norm", f"{attention}.norm", 2),
        *_convolution(f"{half}/middle_attention/qkv", f"{attention}.to_qkv", CONVOLUTION_2D),
        *_convolution(f"{half}/middle_attention/out", f"{attention}.proj", CONVOLUTION_2D),
        *_block(f"{half}/middle_block1", middle[1], names, False),
        *_norm(f"{half}/norm_out", f"{half}.head.0" if wan else f"{half}.norm_out"),
        *_convolution(f"{half}/conv_out", f"{half}.head.2" if wan else f"{half}.conv_out"),
    ]


def _resampling(path: str, name: str, temporal: bool) -> list[Entry]:
    entries = _convolution(f"{path}/space", f"{name}.resample.1", CONVOLUTION_2D)
    return entries + (_convolution(f"{path}/time", f"{name}.time_conv") if temporal else [])


def _encoder(config: VAEConfig, names: Names) -> list[Entry]:
    prefix = "encoder.downsamples" if names == "wan" else "encoder.down_blocks"
    entries = _ends("encoder", names)
    number, channels = 0, config.width
    for level, multiplier in enumerate(config.width_multipliers):
        for block in range(config.num_res_blocks):
            shortcut = channels != config.width * multiplier
            entries += _block(f"encoder/level{level}_block{block}", f"{prefix}.{number}", names, shortcut)
            number, channels = number + 1, config.width * multiplier
        if level < len(config.temporal_downsample):
            temporal = config.temporal_downsample[level]
            entries += _resampling(f"encoder/level{level}_down", f"{prefix}.{number}", temporal)
            number += 1
    return entries


def _decoder(config: VAEConfig, names: Names) -> list[Entry]:
    entries = _ends("decoder", names)
    number, channels = 0, config.width * config.width_multipliers[-1]
    for level, multiplier in enumerate(reversed(config.width_multipliers)):
        for block in range(config.num_res_blocks + 1):
            name = f"decoder.upsamples.{number}" if names == "wan" else f"decoder.up_blocks.{level}.resnets.{block}"
            shortcut = channels != config.width * multiplier
            entries += _block(f"decoder/level{level}_block{block}", name, names, shortcut)
            number, channels = number + 1, config.width * multiplier
        if level < len(config.temporal_downsample):
            name = f"decoder.upsamples.{number}" if names == "wan" else f"decoder.up_blocks.{level}.upsamplers.0"
            entries += _resampling(f"decoder/level{level}_up", name, config.temporal_downsample[-1 - level])
            number, channels = number + 1, channels // 2
    return entries


def vae_table(config: VAEConfig, names: Names = "wan") -> list[Entry]:
    """Our parameters of the VAE (`models.vae.init`) beside the published tensors.

    Args:
      config: sizes.
      names: "wan" for the names of the published `Wan2.1_VAE.pth`, "diffusers" for those of AutoencoderKLWan.

    Raises:
      ValueError: other names.
    """
    if names not in ("wan", "diffusers"):
        raise ValueError(f"names is {names!r}; VAE weights are named as 'wan' or as 'diffusers' names them.")
    outer = {"encoder/moments": ("conv1", "quant_conv"), "decoder/latents": ("conv2", "post_quant_conv")}
    entries = _encoder(config, names) + _decoder(config, names)
    for path, (wan, diffusers) in outer.items():
        entries += _convolution(path, wan if names == "wan" else diffusers)
    return entries
