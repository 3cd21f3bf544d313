"""Measures the speed of the three encoders on this CPU beside the torch originals, in float32 with the same weights.

    make parity && .venv/bin/python tools/benchmark_encoders.py

It needs the extra `parity` (torch, diffusers). Runs alternate between the two; the best of `repeats` is printed, with
the relative difference of what they computed.
"""

from __future__ import annotations

from refalign_jax.command import run

# isort: split
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from refalign_jax.encoders.umt5 import load_umt5
from refalign_jax.encoders.vit import load_dinov3
from refalign_jax.encoders.wan_vae import load_vae
from refalign_jax.models import dinov3, umt5, vae


@dataclasses.dataclass(frozen=True)
class StateDict:
    """A torch module's tensors, as `table.Tensors`."""

    tensors: Mapping[str, Any]
    source: str = "state dict"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: tuple(value.shape) for name, value in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """Element type of every tensor."""
        return {name: value.numpy().dtype for name, value in self.tensors.items()}

    @property
    def metadata(self) -> dict[str, str]:
        """There is none."""
        return {}

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor."""
        return self.tensors[name].numpy()


def benchmark_encoders(*, repeats: int = 5) -> None:
    """Measures VAE (encode, decode), UMT5 and DINOv3.

    Args:
      repeats: runs of each.
    """
    import torch

    torch.manual_seed(0)
    with torch.inference_mode():
        _vae(torch, repeats)
        _umt5(torch, repeats)
        _dinov3(torch, repeats)


def _report(
    name: str, amount: float, unit: str, ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int
) -> None:
    """Prints rates, their ratio and the relative difference of the results."""
    a, b = np.asarray(ours()), np.asarray(theirs())
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    best = [np.inf, np.inf]
    for _ in range(repeats):
        for i, call in enumerate((ours, theirs)):
            started = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - started)
    rates = [amount / seconds for seconds in best]
    print(
        f"{name}: {rates[0]:.3g} {unit}/s here, {rates[1]:.3g} in torch, ratio {rates[0] / rates[1]:.2f}; "
        f"difference {error:.1e}",
        flush=True,
    )


def _vae(torch: Any, repeats: int) -> None:
    """Full size, 17 frames of 96x96, against diffusers."""
    from diffusers import AutoencoderKLWan

    model: Any = AutoencoderKLWan()
    model.eval()
    config = vae.VAEConfig()
    params = jax.device_put(load_vae(config, StateDict(model.state_dict())))
    video = np.random.default_rng(0).uniform(-1, 1, (1, 17, 96, 96, 3)).astype(np.float32)
    mean, std = (np.asarray(x, np.float32) for x in (config.latent_mean, config.latent_std))
    pixels = torch.from_numpy(np.moveaxis(video, -1, 1).copy())
    encode = jax.jit(lambda p, x: vae.encode(p, x, config))
    decode = jax.jit(lambda p, x: vae.decode(p, x, config))
    latents = np.asarray(encode(params, video))
    raw = torch.from_numpy(np.moveaxis(latents * std + mean, -1, 1).copy())

    def their_latents() -> np.ndarray:
        return (np.moveaxis(model.encode(pixels).latent_dist.mode().numpy(), 1, -1) - mean) / std

    _report("VAE encode", 17, "frames", lambda: encode(params, video).block_until_ready(), their_latents, repeats)
    _report(
        "VAE decode",
        17,
        "frames",
        lambda: jnp.clip(decode(params, latents), -1, 1).block_until_ready(),
        lambda: np.moveaxis(model.decode(raw).sample.numpy(), 1, -1),
        repeats,
    )


def _umt5(torch: Any, repeats: int) -> None:
    """Width 1024, 8 layers (XXL has 4096 and 24), 512 tokens of which 400 are real."""
    from transformers import UMT5Config, UMT5EncoderModel

    sizes: Any = {"vocab_size": 1000, "d_model": 1024, "d_kv": 64, "d_ff": 2560, "num_heads": 16, "num_layers": 8}
    model = UMT5EncoderModel(UMT5Config(**sizes)).eval()
    config = umt5.UMT5Config(
        vocab_size=1000, width=1024, attention_width=1024, ffn_width=2560, num_heads=16, num_layers=8
    )
    ids = np.random.default_rng(0).integers(2, 1000, (1, 512)).astype(np.int32)
    mask = (np.arange(512) < 400).astype(np.int32)[None]
    params = jax.device_put(load_umt5(config, StateDict(model.state_dict())))
    inputs = {"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.from_numpy(mask).long()}
    _report(
        "UMT5 (1024 wide, 8 layers)",
        1,
        "prompts",
        lambda: umt5.encode(params, ids, mask, config).block_until_ready(),
        lambda: model(**inputs).last_hidden_state.numpy() * mask[..., None],
        repeats,
    )


def _dinov3(torch: Any, repeats: int) -> None:
    """ViT-B/16 at 480x832."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    sizes: Any = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_register_tokens": 4}
    model = DINOv3ViTModel(DINOv3ViTConfig(**sizes)).eval()
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    config = dinov3.DINOv3Config.from_json(model.config.to_dict())
    params = jax.device_put(load_dinov3(config, StateDict(model.state_dict())))
    pixels = np.random.default_rng(0).standard_normal((1, 480, 832, 3)).astype(np.float32)
    theirs = torch.from_numpy(np.moveaxis(pixels, -1, 1).copy())
    _report(
        "DINOv3 ViT-B/16 at 480x832",
        1,
        "images",
        lambda: dinov3.encode_tokens(params, jnp.asarray(pixels), config).block_until_ready(),
        lambda: model(theirs).last_hidden_state.numpy(),
        repeats,
    )


def main(arguments: list[str], prog: str) -> None:
    """Parses and measures."""
    tyro.cli(benchmark_encoders, args=arguments, prog=prog, description=__doc__)


if __name__ == "__main__":
    run(main)
