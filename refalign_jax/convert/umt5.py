"""Names of the UMT5 encoder: Wan2.1's own file and transformers' UMT5EncoderModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from refalign_jax.convert.forms import View
from refalign_jax.convert.table import LINEAR, SAME, Entry, Layout, Tensors
from refalign_jax.models.umt5 import UMT5Config

Names = Literal["wan", "transformers"]
"""Whose tensor names: Wan2.1's `models_t5_umt5-xxl-enc-bf16.pth`, or `UMT5EncoderModel`, as diffusers ships it."""

TIED = "encoder.embed_tokens.weight"
"""Second name that transformers gives to `shared.weight`; files hold either or both."""

TOKENIZER = "spiece_model"
"""Name under which ComfyUI's file keeps the bytes of the tokenizer."""

# ours, layout, Wan2.1's, transformers'
_BLOCK: tuple[tuple[str, Layout, str, str], ...] = (
    ("attention_norm/scale", SAME, "norm1.weight", "layer.0.layer_norm.weight"),
    ("query/kernel", LINEAR, "attn.q.weight", "layer.0.SelfAttention.q.weight"),
    ("key/kernel", LINEAR, "attn.k.weight", "layer.0.SelfAttention.k.weight"),
    ("value/kernel", LINEAR, "attn.v.weight", "layer.0.SelfAttention.v.weight"),
    ("out/kernel", LINEAR, "attn.o.weight", "layer.0.SelfAttention.o.weight"),
    ("position_bias", SAME, "pos_embedding.embedding.weight", "layer.0.SelfAttention.relative_attention_bias.weight"),
    ("ffn_norm/scale", SAME, "norm2.weight", "layer.1.layer_norm.weight"),
    ("ffn_gate/kernel", LINEAR, "ffn.gate.0.weight", "layer.1.DenseReluDense.wi_0.weight"),
    ("ffn_in/kernel", LINEAR, "ffn.fc1.weight", "layer.1.DenseReluDense.wi_1.weight"),
    ("ffn_out/kernel", LINEAR, "ffn.fc2.weight", "layer.1.DenseReluDense.wo.weight"),
)


def umt5_table(config: UMT5Config, names: Names = "wan") -> list[Entry]:
    """The table of `models.umt5.init`.

    Args:
      config: sizes.
      names: whose names. For transformers', read files through `untied`.
    """
    wan = names == "wan"
    entries = [
        Entry("token_embedding", "token_embedding.weight" if wan else "shared.weight"),
        Entry("norm/scale", "norm.weight" if wan else "encoder.final_layer_norm.weight"),
    ]
    for path, layout, wan_name, transformers_name in _BLOCK:
        name = f"blocks.{{i}}.{wan_name}" if wan else f"encoder.block.{{i}}.{transformers_name}"
        entries.append(Entry(f"blocks/{path}", name, layout, config.num_layers))
    return entries


def umt5_names(shapes: Mapping[str, tuple[int, ...]]) -> Names:
    """Finds whose names a file uses; unknown names count as Wan2.1's, and are then reported as unexpected."""
    return "transformers" if any(name.startswith(("encoder.block.", "shared.")) for name in shapes) else "wan"


def untied(tensors: Tensors) -> Tensors:
    """Gives the token embedding of a transformers file one name, `shared.weight`, whichever it is stored under.

    The tokenizer that ComfyUI keeps among the tensors is left out.

    Raises:
      ValueError: both names are there and hold different numbers.
    """
    if TIED not in tensors.shapes and TOKENIZER not in tensors.shapes:
        return tensors
    names = {name: name for name in tensors.shapes if name not in (TIED, TOKENIZER)}
    if TIED in tensors.shapes:
        if "shared.weight" in names and not np.array_equal(tensors.read("shared.weight"), tensors.read(TIED)):
            raise ValueError(f"{tensors.source}: shared.weight and {TIED} differ; UMT5 has one token embedding.")
        names.setdefault("shared.weight", TIED)
    return View(tensors, names)
