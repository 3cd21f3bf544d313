"""transformers' vision models with random weights that all matter, and what they compute of images in [-1, 1]."""

import numpy as np
import torch
import transformers
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def randomize(model):
    """Draws every parameter again, so that biases, norms and scales matter; returns the model in evaluation mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            near_one = ("norm" in name and name.endswith("weight")) or "layer_scale" in name
            position = "position" in name or "token" in name
            spread = 0.2 if parameter.ndim == 1 else 0.5 if position else 0.05
            parameter.normal_(1.0 if near_one else 0.0, spread)
    return model.eval()


def fitted(pixels, patch):
    """Images [N, h, w, 3] as torch's [N, 3, h·patch/16, w·patch/16]."""
    x = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    size = (x.shape[2] // 16 * patch, x.shape[3] // 16 * patch)
    return x if patch == 16 else torch.nn.functional.interpolate(x, size, mode="bicubic", antialias=True)


def features(model, pixels):
    """Last hidden states of the patches, [N, h/16, w/16, E]."""
    config = model.config
    x = fitted(pixels, config.patch_size)
    with torch.inference_mode():
        if config.model_type == "siglip_vision_model":
            out = model(x, interpolate_pos_encoding=True).last_hidden_state
        elif config.model_type == "siglip2_vision_model":
            rows, columns, size = x.shape[2] // config.patch_size, x.shape[3] // config.patch_size, config.patch_size
            patches = x.reshape(len(x), 3, rows, size, columns, size).permute(0, 2, 4, 3, 5, 1)
            patches = patches.reshape(len(x), rows * columns, -1)
            mask = torch.ones(len(x), rows * columns, dtype=torch.int64)
            out = model(patches, mask, torch.tensor([[rows, columns]] * len(x))).last_hidden_state
        else:
            mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
            out = model(((x + 1) / 2 - mean) / std).last_hidden_state
            out = out[:, 1 + getattr(config, "num_register_tokens", 0) :]
    return out.numpy().reshape(len(pixels), pixels.shape[1] // 16, pixels.shape[2] // 16, -1)


def dinov2(registers, **options):
    """DINOv2; its defaults are ViT-B's."""
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(**{"image_size": 518, "patch_size": 14} | options)
    return randomize(getattr(transformers, f"{kind}Model")(config))


def siglip2(naflex, **options):
    """SigLIP2's vision model; its defaults are ViT-B's."""
    kind = "Siglip2" if naflex else "Siglip"
    sizes = {"num_patches": 256} if naflex else {"image_size": 256}
    config = getattr(transformers, f"{kind}VisionConfig")(**sizes | options)
    return randomize(getattr(transformers, f"{kind}VisionModel")(config))


def pixels_of(height, width, count=1):
    """Random images, RGB in [-1, 1]."""
    return np.random.default_rng(0).uniform(-1, 1, (count, height, width, 3)).astype(np.float32)
