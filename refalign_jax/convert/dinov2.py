"""Names of DINOv2: the files on the hub, and the `state_dict` of transformers 5's models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from refalign_jax.convert.table import Entry, Tensors, convolution
from refalign_jax.convert.vit import block_entries
from refalign_jax.models.dinov2 import DINOv2Config

Names = Literal["hub", "transformers"]
"""Whose names the attention has: those of files, on the hub and as `save_pretrained` writes them, or those of the
`state_dict` of transformers 5."""

_BLOCK = {
    "attention_norm": "norm1",
    "mlp_norm": "norm2",
    "attention_scale": "layer_scale1.lambda1",
    "mlp_scale": "layer_scale2.lambda1",
}
_ATTENTION: Mapping[Names, Mapping[str, str]] = {
    "hub": {
        "query": "attention.attention.query",
        "key": "attention.attention.key",
        "value": "attention.attention.value",
        "out": "attention.output.dense",
    },
    "transformers": {
        "query": "attention.q_proj",
        "key": "attention.k_proj",
        "value": "attention.v_proj",
        "out": "attention.o_proj",
    },
}
_MLP = {"mlp_in": "mlp.fc1", "mlp_out": "mlp.fc2"}
_GATED_MLP = {"mlp_gate": "mlp.gate_proj", "mlp_in": "mlp.up_proj", "mlp_out": "mlp.down_proj"}
_JOINED, _HALVES, _OUT = "mlp.weights_in", ("mlp.gate_proj", "mlp.up_proj"), "mlp.weights_out"


def dinov2_table(config: DINOv2Config, names: Names = "hub") -> list[Entry]:
    """The table of `models.dinov2.init`.

    Args:
      config: sizes, and which biases there are.
      names: whose names. Read files of gated models through `ungated`.
    """
    block = {**_BLOCK, **_ATTENTION[names], **(_GATED_MLP if config.use_gated_mlp else _MLP)}
    entries = [
        Entry("cls_token", "embeddings.cls_token"),
        Entry("position_embedding", "embeddings.position_embeddings"),
        Entry("patch_kernel", "embeddings.patch_embeddings.projection.weight", convolution(2)),
        Entry("patch_bias", "embeddings.patch_embeddings.projection.bias"),
        Entry("norm/scale", "layernorm.weight"),
        Entry("norm/bias", "layernorm.bias"),
        *block_entries(config, "encoder.layer.{i}", block),
    ]
    if config.num_register_tokens:
        entries.append(Entry("register_tokens", "embeddings.register_tokens"))
    if config.mask_token:
        entries.append(Entry("mask_token", "embeddings.mask_token"))
    return entries


def dinov2_names(shapes: Mapping[str, tuple[int, ...]]) -> Names:
    """Finds whose names a file uses."""
    return "transformers" if any(".attention.q_proj." in name for name in shapes) else "hub"


def ungated(tensors: Tensors) -> Tensors:
    """Gives the joined projection of a gated MLP, as files have it, as two; other tensors stay as they are."""
    if not any(f".{_JOINED}." in name for name in tensors.shapes):
        return tensors
    sources: dict[str, tuple[str, int | None]] = {}
    for name in tensors.shapes:
        if f".{_JOINED}." in name:
            sources |= {name.replace(_JOINED, half): (name, number) for number, half in enumerate(_HALVES)}
        else:
            sources[name.replace(_OUT, _GATED_MLP["mlp_out"])] = (name, None)
    return _Halves(tensors, sources)


@dataclasses.dataclass(frozen=True)
class _Halves:
    """Tensors of a file, some of which are the first or second half of one of its. Implements `table.Tensors`."""

    tensors: Tensors
    sources: Mapping[str, tuple[str, int | None]]

    @property
    def source(self) -> str:
        return self.tensors.source

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.tensors.metadata

    @property
    def dtypes(self) -> Mapping[str, np.dtype]:
        return {name: self.tensors.dtypes[theirs] for name, (theirs, _) in self.sources.items()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        whole = {name: self.tensors.shapes[theirs] for name, (theirs, _) in self.sources.items()}
        halved = [name for name, (_, half) in self.sources.items() if half is not None]
        return whole | {name: (whole[name][0] // 2, *whole[name][1:]) for name in halved}

    def read(self, name: str) -> np.ndarray:
        theirs, half = self.sources[name]
        value = self.tensors.read(theirs)
        return value if half is None else np.split(value, 2)[half]
