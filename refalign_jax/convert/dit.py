"""Names and layouts of the DiT's and the projectors' published weights.

`wan` are the names of Wan2.1's and RefAlign's own checkpoints, `diffusers` those of diffusers' WanTransformer3DModel.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from refalign_jax.config import AlignmentConfig, DiTConfig
from refalign_jax.convert.table import LINEAR, SAME, Entry, Layout, convolution, reshaped

Names = Literal["wan", "diffusers"]

# ours: (wan, diffusers)
_TOP = {
    "text_embedding/in": ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    "text_embedding/out": ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    "time_in": ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    "time_out": ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    "time_projection": ("time_projection.1", "condition_embedder.time_proj"),
    "head/linear": ("head.head", "proj_out"),
}
_BLOCK_LINEAR = {
    "ffn/in": ("ffn.0", "ffn.net.0.proj"),
    "ffn/out": ("ffn.2", "ffn.net.2"),
    **{
        f"{ours}/{part}": (f"{wan}.{part[0]}", f"{theirs}.to_{part[0] if part != 'out' else 'out.0'}")
        for ours, wan, theirs in (("self_attention", "self_attn", "attn1"), ("cross_attention", "cross_attn", "attn2"))
        for part in ("query", "key", "value", "out")
    },
}
_BLOCK_NORM = {
    f"{ours}/{part}_norm": (f"{wan}.norm_{part[0]}", f"{theirs}.norm_{part[0]}")
    for ours, wan, theirs in (("self_attention", "self_attn", "attn1"), ("cross_attention", "cross_attn", "attn2"))
    for part in ("query", "key")
}


def dit_table(config: DiTConfig, names: Names = "wan") -> list[Entry]:
    """The DiT's parameters and their published names."""
    which = ("wan", "diffusers").index(names)
    n = config.num_layers
    table = [
        Entry("patch_embedding/kernel", "patch_embedding.weight", _patch_layout(config)),
        Entry("patch_embedding/bias", "patch_embedding.bias"),
        Entry(
            "head/modulation",
            ("head.modulation", "scale_shift_table")[which],
            reshaped((1, 2, config.width), (2, config.width)),
        ),
        Entry(
            "blocks/modulation",
            ("blocks.{i}.modulation", "blocks.{i}.scale_shift_table")[which],
            reshaped((1, 6, config.width), (6, config.width)),
            n,
        ),
    ]
    for ours, theirs in _TOP.items():
        table += _linear(ours, theirs[which])
    for ours, theirs in _BLOCK_LINEAR.items():
        table += _linear(f"blocks/{ours}", f"blocks.{{i}}.{theirs[which]}", n)
    for ours, theirs in _BLOCK_NORM.items():
        table.append(Entry(f"blocks/{ours}/scale", f"blocks.{{i}}.{theirs[which]}.weight", SAME, n))
    norm = ("norm3", "norm2")[which]
    table.append(Entry("blocks/cross_norm/scale", f"blocks.{{i}}.{norm}.weight", SAME, n))
    table.append(Entry("blocks/cross_norm/bias", f"blocks.{{i}}.{norm}.bias", SAME, n))
    return table


def projector_table(config: AlignmentConfig) -> list[Entry]:
    """The projectors' parameters and their names in RefAlign's training checkpoints.

    The convolutional projector is not published; its name is ours.
    """
    n = config.num_blocks
    if config.projector == "conv":
        name = "blocks.{i}.input_conv"
        return [Entry("kernel", f"{name}.weight", convolution(2), n), Entry("bias", f"{name}.bias", SAME, n)]
    return [
        Entry("in", "blocks.{i}.input_mlp.proj.0.weight", LINEAR, n),
        Entry("out", "blocks.{i}.input_mlp.proj.2.weight", LINEAR, n),
    ]


def model_table(dit: DiTConfig, alignment: AlignmentConfig | None, names: Names = "wan") -> list[Entry]:
    """The table of {"dit": …} or, with an alignment, of {"dit": …, "projectors": …}."""
    table = [dataclasses.replace(entry, path=f"dit/{entry.path}") for entry in dit_table(dit, names)]
    if alignment is not None:
        table += [dataclasses.replace(entry, path=f"projectors/{entry.path}") for entry in projector_table(alignment)]
    return table


def _linear(ours: str, name: str, stack: int = 0) -> list[Entry]:
    """Kernel and bias of one linear layer."""
    return [
        Entry(f"{ours}/kernel", f"{name}.weight", LINEAR, stack),
        Entry(f"{ours}/bias", f"{name}.bias", SAME, stack),
    ]


def _patch_layout(config: DiTConfig) -> Layout:
    """Conv3d weight [D, C, 1, ph, pw] <-> kernel [ph·pw·C, D] of the matmul over patch values."""
    _, ph, pw = config.patch_size
    C, D = config.latent_channels, config.width
    return Layout(
        lambda x: x.transpose(2, 3, 4, 1, 0).reshape(-1, D),
        lambda x: x.reshape(1, ph, pw, C, D).transpose(4, 3, 0, 1, 2),
    )
