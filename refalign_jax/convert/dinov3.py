"""Names of the DINOv3 ViT, as transformers writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from refalign_jax.convert.table import LINEAR, SAME, Entry, convolution
from refalign_jax.models.dinov3 import DINOv3Config

Layers = Literal["layer", "model.layer"]
"""What the names of the blocks begin with: `layer` in files, on the hub and as `save_pretrained` writes them,
`model.layer` in the `state_dict` of transformers 5's `DINOv3ViTModel`; the other names agree."""


def dinov3_table(config: DINOv3Config, layers: Layers = "model.layer") -> list[Entry]:
    """The table of `models.dinov3.init`.

    Args:
      config: sizes, and which biases there are.
      layers: what the names of the blocks begin with.
    """
    entries = [
        Entry("cls_token", "embeddings.cls_token"),
        Entry("mask_token", "embeddings.mask_token"),
        Entry("register_tokens", "embeddings.register_tokens"),
        Entry("patch_kernel", "embeddings.patch_embeddings.weight", convolution(2)),
        Entry("patch_bias", "embeddings.patch_embeddings.bias"),
        Entry("norm/scale", "norm.weight"),
        Entry("norm/bias", "norm.bias"),
    ]

    def block(path: str, name: str) -> None:
        layout = LINEAR if path.endswith("kernel") else SAME
        entries.append(Entry(f"blocks/{path}", f"{layers}.{{i}}.{name}", layout, config.num_layers))

    for ours, theirs in (("attention", "1"), ("mlp", "2")):
        block(f"{ours}_norm/scale", f"norm{theirs}.weight")
        block(f"{ours}_norm/bias", f"norm{theirs}.bias")
        block(f"{ours}_scale", f"layer_scale{theirs}.lambda1")
    projections = [
        ("query", "attention.q_proj", config.query_bias),
        ("key", "attention.k_proj", config.key_bias),
        ("value", "attention.v_proj", config.value_bias),
        ("out", "attention.o_proj", config.proj_bias),
        ("mlp_in", "mlp.up_proj", config.mlp_bias),
        ("mlp_out", "mlp.down_proj", config.mlp_bias),
    ]
    if config.use_gated_mlp:
        projections.append(("mlp_gate", "mlp.gate_proj", config.mlp_bias))
    for ours, theirs, use_bias in projections:
        block(f"{ours}/kernel", f"{theirs}.weight")
        if use_bias:
            block(f"{ours}/bias", f"{theirs}.bias")
    return entries


def dinov3_layers(shapes: Mapping[str, tuple[int, ...]]) -> Layers:
    """Finds what the names of the blocks in a file begin with."""
    return "layer" if any(name.startswith("layer.") for name in shapes) else "model.layer"
