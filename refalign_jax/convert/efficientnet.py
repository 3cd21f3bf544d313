"""Names of EfficientNet-lite, as its PyTorch port writes them."""

from __future__ import annotations

from refalign_jax.convert.table import LINEAR, Entry, convolution
from refalign_jax.models.efficientnet import EfficientNetConfig

_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}


def efficientnet_table(config: EfficientNetConfig) -> list[Entry]:
    """The table of `models.efficientnet.init`."""
    entries = [
        Entry("classifier/kernel", "_fc.weight", LINEAR),
        Entry("classifier/bias", "_fc.bias"),
        *_conv_norm("stem", "_conv_stem", "_bn0"),
        *_conv_norm("head", "_conv_head", "_bn1"),
    ]
    for i, (_, stage) in enumerate(config.blocks()):
        ours, theirs = f"blocks/{i}", f"_blocks.{i}."
        if stage.expansion > 1:
            entries += _conv_norm(f"{ours}/expand", f"{theirs}_expand_conv", f"{theirs}_bn0")
        entries += _conv_norm(f"{ours}/filter", f"{theirs}_depthwise_conv", f"{theirs}_bn1")
        entries += _conv_norm(f"{ours}/narrow", f"{theirs}_project_conv", f"{theirs}_bn2")
    return entries


def _conv_norm(ours: str, conv: str, norm: str) -> list[Entry]:
    return [
        Entry(f"{ours}/kernel", f"{conv}.weight", convolution(2)),
        *(Entry(f"{ours}/{name}", f"{norm}.{published}") for name, published in _NORM.items()),
    ]
