"""The size of a transformer, inferred from the names and shapes of its published weights."""

from __future__ import annotations

import re
from collections.abc import Mapping

from refalign_jax.config import AlignmentConfig, DiTConfig, ModelConfig
from refalign_jax.convert.dit import Names

WAN_HEAD_WIDTH = 128
"""Width of a head in every published Wan model; no tensor's shape contains the number of heads."""


def infer_names(shapes: Mapping[str, tuple[int, ...]]) -> Names:
    """Which of the two sets of names a weight file uses."""
    return "diffusers" if any(name.startswith("condition_embedder.") for name in shapes) else "wan"


def infer_config(
    shapes: Mapping[str, tuple[int, ...]], source: str, num_heads: int | None = None
) -> tuple[ModelConfig, bool]:
    """The model whose weights have these names and shapes.

    Args:
      shapes: of a weight file.
      source: its name, for the error.
      num_heads: None for D / 128, as in every published Wan model.

    Returns:
      The configuration, with defaults for what no shape determines, and whether projectors are among the weights.

    Raises:
      ValueError: a tensor whose shape is needed is missing or has another rank: this is no Wan transformer.
    """
    text, time, ffn = {
        "wan": ("text_embedding.0", "time_embedding.0", "ffn.0"),
        "diffusers": (
            "condition_embedder.text_embedder.linear_1",
            "condition_embedder.time_embedder.linear_1",
            "ffn.net.0.proj",
        ),
    }[infer_names(shapes)]

    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = shapes.get(name)
        if found is None or len(found) != rank:
            what = "lacks it" if found is None else f"has it as {list(found)}"
            raise ValueError(
                f"{source} holds no Wan transformer: that has a tensor {name!r} of {rank} axes, the file {what}."
            )
        return found

    width, channels, *patch = shape("patch_embedding.weight", 5)
    blocks = {int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
    dit = DiTConfig(
        width=width,
        num_layers=max(blocks, default=0) + 1,
        num_heads=num_heads or max(width // WAN_HEAD_WIDTH, 1),
        ffn_width=shape(f"blocks.0.{ffn}.weight", 2)[0],
        text_width=shape(f"{text}.weight", 2)[1],
        frequency_width=shape(f"{time}.weight", 2)[1],
        latent_channels=channels,
        patch_size=tuple(patch),  # type: ignore[arg-type]
    )
    aligned = [
        i for i in blocks if any(f"blocks.{i}.input_{kind}" in name for name in shapes for kind in ("mlp", "conv"))
    ]
    if not aligned:
        return ModelConfig(dit=dit, alignment=AlignmentConfig(num_blocks=min(9, dit.num_layers))), False
    conv = "blocks.0.input_conv.weight" in shapes
    vfm_width = shape(*(("blocks.0.input_conv.weight", 4) if conv else ("blocks.0.input_mlp.proj.2.weight", 2)))[0]
    alignment = AlignmentConfig(num_blocks=max(aligned) + 1, vfm_width=vfm_width, projector="conv" if conv else "mlp")
    return ModelConfig(dit=dit, alignment=alignment), True
