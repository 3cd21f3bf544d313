"""Names of CLIP's vision model: transformers' `CLIPModel` and `CLIPVisionModelWithProjection`."""

from __future__ import annotations

from refalign_jax.convert.forms import View
from refalign_jax.convert.table import LINEAR, Entry, Tensors, convolution
from refalign_jax.convert.vit import CLIP_BLOCK, block_entries
from refalign_jax.models.clip import CLIPConfig

_OTHERS = ("text_model.", "text_projection.", "logit_scale", "vision_model.embeddings.position_ids")


def clip_table(config: CLIPConfig) -> list[Entry]:
    """The table of `models.clip.init`; read files through `vision_part`."""
    stem = "vision_model."
    return [
        Entry("cls", f"{stem}embeddings.class_embedding"),
        Entry("patch_kernel", f"{stem}embeddings.patch_embedding.weight", convolution(2)),
        Entry("position_embedding", f"{stem}embeddings.position_embedding.weight"),
        Entry("first_norm/scale", f"{stem}pre_layrnorm.weight"),
        Entry("first_norm/bias", f"{stem}pre_layrnorm.bias"),
        Entry("norm/scale", f"{stem}post_layernorm.weight"),
        Entry("norm/bias", f"{stem}post_layernorm.bias"),
        Entry("projection", "visual_projection.weight", LINEAR),
        *block_entries(config, f"{stem}encoder.layers.{{i}}", CLIP_BLOCK),
    ]


def vision_part(tensors: Tensors) -> Tensors:
    """Leaves the text model out."""
    return View(tensors, {name: name for name in tensors.shapes if not name.startswith(_OTHERS)})
