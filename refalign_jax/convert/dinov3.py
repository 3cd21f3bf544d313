"""Names of the DINOv3 ViT, as transformers writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from refalign_jax.convert.table import Entry, convolution
from refalign_jax.convert.vit import block_entries
from refalign_jax.models.dinov3 import DINOv3Config

Layers = Literal["layer", "model.layer"]
"""What the names of the blocks begin with: `layer` in files, on the hub and as `save_pretrained` writes them,
`model.layer` in the `state_dict` of transformers 5's `DINOv3ViTModel`; the other names agree."""

_BLOCK = {
    "attention_norm": "norm1",
    "mlp_norm": "norm2",
    "attention_scale": "layer_scale1.lambda1",
    "mlp_scale": "layer_scale2.lambda1",
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "out": "attention.o_proj",
    "mlp_in": "mlp.up_proj",
    "mlp_out": "mlp.down_proj",
    "mlp_gate": "mlp.gate_proj",
}


def dinov3_table(config: DINOv3Config, layers: Layers = "model.layer") -> list[Entry]:
    """The table of `models.dinov3.init`.

    Args:
      config: sizes, and which biases there are.
      layers: what the names of the blocks begin with.
    """
    return [
        Entry("cls_token", "embeddings.cls_token"),
        Entry("mask_token", "embeddings.mask_token"),
        Entry("register_tokens", "embeddings.register_tokens"),
        Entry("patch_kernel", "embeddings.patch_embeddings.weight", convolution(2)),
        Entry("patch_bias", "embeddings.patch_embeddings.bias"),
        Entry("norm/scale", "norm.weight"),
        Entry("norm/bias", "norm.bias"),
        *block_entries(config, f"{layers}.{{i}}", _BLOCK),
    ]


def dinov3_layers(shapes: Mapping[str, tuple[int, ...]]) -> Layers:
    """Finds what the names of the blocks in a file begin with."""
    return "layer" if any(name.startswith("layer.") for name in shapes) else "model.layer"
