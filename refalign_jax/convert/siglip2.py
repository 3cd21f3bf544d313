"""Names of SigLIP2's vision model: transformers' `SiglipVisionModel` and `Siglip2VisionModel`."""

from __future__ import annotations

from refalign_jax.convert.forms import View
from refalign_jax.convert.table import Entry, Layout, Tensors, convolution
from refalign_jax.convert.vit import CLIP_BLOCK, block_entries
from refalign_jax.models.siglip2 import SigLIP2Config

_PREFIX, _OTHERS = "vision_model.", ("text_model.", "logit_scale", "logit_bias")


def siglip2_table(config: SigLIP2Config) -> list[Entry]:
    """The table of `models.siglip2.init`; read files through `vision_part`."""
    size, width = config.patch_size, config.width
    flat = Layout(lambda x: x.T.reshape(size, size, 3, width), lambda x: x.reshape(-1, width).T)
    return [
        Entry("patch_kernel", "embeddings.patch_embedding.weight", flat if config.naflex else convolution(2)),
        Entry("patch_bias", "embeddings.patch_embedding.bias"),
        Entry("position_embedding", "embeddings.position_embedding.weight"),
        Entry("norm/scale", "post_layernorm.weight"),
        Entry("norm/bias", "post_layernorm.bias"),
        *block_entries(config, "encoder.layers.{i}", CLIP_BLOCK),
    ]


def vision_part(tensors: Tensors) -> Tensors:
    """Leaves the text model and the pooling head out, and strips the prefix that the whole model gives to names."""
    names = {name.removeprefix(_PREFIX): name for name in tensors.shapes if not name.startswith(_OTHERS)}
    return View(tensors, {ours: name for ours, name in names.items() if not ours.startswith("head.")})
