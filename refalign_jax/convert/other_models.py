"""Weights that people give for a Wan2.1 T2V transformer and that are something else, each named for what it is."""

from __future__ import annotations

import re
from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]

RIGHT = "Give the transformer of Wan2.1 T2V (1.3B or 14B) or of RefAlign."

_LORA = re.compile(r"(^|\.|_)(lora_[a-zA-Z]+|lokr_\w+|hada_\w+|dora_scale|diff|diff_b)(\.|$)")
_RANK = re.compile(r"\.lora_(A|down)(\.\w+)?\.weight$")

# what a name begins with or contains, and the model that has it
_MARKS: tuple[tuple[str, str], ...] = (
    (r"^vace_(blocks|patch_embedding)\.", "Wan VACE, whose control branch (vace_blocks) edits videos"),
    (r"^(casual_audio_encoder|audio_injector|trainable_cond_mask)", "Wan2.2 S2V, which is driven by speech"),
    (
        r"^(motion_encoder|face_adapter|face_encoder|pose_patch_embedding)\.",
        "Wan2.2 Animate, which is driven by a pose",
    ),
    (r"^(control_adapter|ref_conv)\.", "Wan Fun Control, which follows a camera or a control video"),
    (r"^img_emb\.|^condition_embedder\.image_embedder\.", "Wan2.1 I2V, which begins at a given image (img_emb)"),
    (r"\.cross_attn\.k_img\.|\.attn2\.add_k_proj\.", "Wan2.1 I2V, which begins at a given image (k_img)"),
)


def refuse_other_models(shapes: Shapes, source: str) -> None:
    """Checks that weights may be a T2V transformer.

    Args:
      shapes: of an opened file.
      source: its name, for the error.

    Raises:
      ValueError: they are another model's, or changes to a model's.
    """
    lora = next((name for name in shapes if name.startswith("lora_") or _LORA.search(name)), None)
    if lora is not None:
        ranks = sorted({shape[0] for name, shape in shapes.items() if shape and _RANK.search(name)})
        rank = f" of rank {', '.join(map(str, ranks))}" if ranks else ""
        raise ValueError(
            f"{source} holds a LoRA{rank} ({lora}): changes to a model's weights, not a model. Merge it into the model "
            f"that it was trained on. {RIGHT}"
        )
    for pattern, model in _MARKS:
        found = next((name for name in shapes if re.search(pattern, name)), None)
        if found is not None:
            raise ValueError(f"{source} is {model}: it has {found}. {RIGHT}")
    if "patch_embedding.weight" not in shapes:
        _refuse_encoder(shapes, source)
        return
    patch = shapes["patch_embedding.weight"]
    head = next((shapes[name] for name in ("head.head.weight", "proj_out.weight") if name in shapes), ())
    if len(patch) != 5 or not head:
        return
    channels, out = patch[1], head[0] // max(patch[2] * patch[3] * patch[4], 1)
    if (channels, out) == (48, 48):
        raise ValueError(f"{source} is Wan2.2 TI2V 5B: its latents have 48 channels, of a VAE of its own. {RIGHT}")
    if channels == out:
        return
    model = "another model"
    if (channels, out) == (36, 16):
        model = "Wan I2V (Wan2.2 I2V A14B, or Wan2.1 Fun), which begins at a given image"
    elif (channels, out) in ((32, 16), (48, 16), (52, 16)):
        model = "Wan Fun Control, which follows a control video"
    raise ValueError(f"{source} is {model}: it takes {channels} channels and returns {out}. {RIGHT}")


def _refuse_encoder(shapes: Shapes, source: str) -> None:
    """Refuses a VAE, a text encoder and a vision model."""
    if "encoder.conv1.weight" in shapes or "encoder.conv_in.weight" in shapes:
        raise ValueError(f"{source} is a VAE; give it with --vae. {RIGHT}")
    if "shared.weight" in shapes or "token_embedding.weight" in shapes or "encoder.embed_tokens.weight" in shapes:
        raise ValueError(f"{source} is a text encoder; give it with --text-encoder. {RIGHT}")
    if any(name.startswith(("visual.", "vision_model.", "embeddings.patch_embeddings.")) for name in shapes):
        raise ValueError(f"{source} is a vision model. {RIGHT}")


def refuse_other_vaes(shapes: Shapes, source: str) -> None:
    """Checks that weights may be Wan2.1's VAE.

    Raises:
      ValueError: they are Wan2.2's, of 48 channels, or a transformer's.
    """
    first = shapes.get("encoder.conv1.weight", shapes.get("encoder.conv_in.weight", ()))
    if len(first) == 5 and first[1] == 12:
        raise ValueError(
            f"{source} is the VAE of Wan2.2 TI2V 5B: it takes patches of 2x2 pixels and has 48 channels. Give "
            "Wan2.1_VAE.pth, or AutoencoderKLWan of Wan2.1, which Wan2.2 A14B shares."
        )
    if "patch_embedding.weight" in shapes:
        raise ValueError(f"{source} is a transformer, not a VAE; give Wan2.1_VAE.pth, or AutoencoderKLWan of Wan2.1.")
