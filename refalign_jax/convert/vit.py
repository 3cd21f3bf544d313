"""The names of the blocks of vision transformers, which differ from model to model in the names alone."""

from __future__ import annotations

from collections.abc import Mapping

from refalign_jax.convert.table import LINEAR, SAME, Entry
from refalign_jax.models.vit import ViTConfig

CLIP_BLOCK: Mapping[str, str] = {
    "attention_norm": "layer_norm1",
    "mlp_norm": "layer_norm2",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}
"""The names that transformers gives to the parts of a block of CLIP and of SigLIP."""


def block_entries(config: ViTConfig, stem: str, names: Mapping[str, str]) -> list[Entry]:
    """The table of the stacked blocks.

    Args:
      config: sizes, and which biases there are.
      stem: what their names begin with, with {i} for the number of the block: `encoder.layer.{i}`.
      names: the published name of each part of a block, without `.weight` and `.bias`: of the norms `attention_norm`
        and `mlp_norm`, the scales `attention_scale` and `mlp_scale`, and the projections `query`, `key`, `value`,
        `out`, `mlp_in`, `mlp_out` and, in gated models, `mlp_gate`.
    """

    def entry(ours: str, theirs: str) -> Entry:
        layout = LINEAR if ours.endswith("kernel") else SAME
        return Entry(f"blocks/{ours}", f"{stem}.{theirs}", layout, config.num_layers)

    entries = []
    for norm in ("attention_norm", "mlp_norm"):
        entries += [entry(f"{norm}/scale", f"{names[norm]}.weight"), entry(f"{norm}/bias", f"{names[norm]}.bias")]
    if config.layerscale is not None:
        entries += [entry(scale, names[scale]) for scale in ("attention_scale", "mlp_scale")]
    biases = {
        "query": config.query_bias,
        "key": config.key_bias,
        "value": config.value_bias,
        "out": config.proj_bias,
        "mlp_in": config.mlp_bias,
        "mlp_out": config.mlp_bias,
    }
    if config.use_gated_mlp:
        biases["mlp_gate"] = config.mlp_bias
    for part, use_bias in biases.items():
        entries.append(entry(f"{part}/kernel", f"{names[part]}.weight"))
        if use_bias:
            entries.append(entry(f"{part}/bias", f"{names[part]}.bias"))
    return entries
