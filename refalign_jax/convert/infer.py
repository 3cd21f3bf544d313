"""Which model a weight file holds: as its metadata says, a config.json beside it, or the shapes of its tensors.

An export of ours says in its metadata, under `METADATA`, what no shape shows: the number of heads, the base of the
rotary frequencies, epsilon, dtypes.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refalign_jax.config import AlignmentConfig, DiTConfig, ModelConfig, from_dict
from refalign_jax.convert.dit import Names
from refalign_jax.convert.files import open_weights, read_config
from refalign_jax.convert.other_models import refuse_other_models
from refalign_jax.convert.table import Tensors

METADATA = "refalign_jax"
"""Key of the safetensors metadata under which an export keeps its `ModelConfig` as JSON."""

WAN_HEAD_WIDTH = 128
"""Width of a head in every published Wan model; the number of heads is in no tensor's shape."""

_MACHINE = ("attention", "tiles", "remat", "offload")
"""Fields of `DiTConfig` that suit a machine; a weight file does not keep them."""

_HEADS = {"WanTransformer3DModel": "num_attention_heads", "WanModel": "num_heads"}
"""Classes that a config.json of Wan or diffusers names, and where each keeps the number of heads."""


@dataclasses.dataclass(frozen=True)
class Transformer:
    """An opened weight file of a transformer.

    Attributes:
      tensors: what is in it.
      names: whose names they have.
      config: the model; defaults where neither file nor shapes say otherwise.
      has_projectors: whether projectors are among the weights.
      stated: fields of `DiTConfig` that no shape shows and that the file, or a config.json beside it, states.
    """

    tensors: Tensors
    names: Names
    config: ModelConfig
    has_projectors: bool
    stated: frozenset[str]


def open_transformer(path: str | Path, num_heads: int | None = None) -> Transformer:
    """Opens the published weights of a Wan transformer; no weight is read.

    Args:
      path: as in `open_weights`.
      num_heads: attention heads, where the file does not say; None for D / 128 as in every published Wan model.

    Raises:
      ValueError: as in `open_weights`, or they are no T2V transformer's, or the number of heads is unknown or another.
    """
    tensors = open_weights(path)
    shapes, source = tensors.shapes, tensors.source
    names: Names = "diffusers" if any(name.startswith("condition_embedder.") for name in shapes) else "wan"
    projectors = any(".input_mlp." in name or ".input_conv." in name for name in shapes)
    if METADATA in tensors.metadata:
        config = _recorded(tensors.metadata[METADATA], source)
        _check_heads(num_heads, config.dit.num_heads, source)
        return Transformer(tensors, names, config, projectors, frozenset(("num_heads", "eps", "rope_theta")))
    refuse_other_models(shapes, source)
    beside = _published(Path(source))
    _check_heads(num_heads, beside.get("num_heads"), source)
    dit = _dit(shapes, source, names, beside if num_heads is None else {**beside, "num_heads": num_heads})
    alignment = _alignment(shapes, dit) if projectors else AlignmentConfig(num_blocks=min(9, dit.num_layers))
    return Transformer(tensors, names, ModelConfig(dit=dit, alignment=alignment), projectors, frozenset(beside))


def describe(config: ModelConfig) -> dict[str, str]:
    """The metadata of an export: the model as JSON, without what suits a machine."""
    values = dataclasses.asdict(config)
    values["dit"] = {name: value for name, value in values["dit"].items() if name not in _MACHINE}
    return {METADATA: json.dumps(values, separators=(",", ":"))}


def _recorded(text: str, source: str) -> ModelConfig:
    """The configuration that an export keeps."""
    try:
        values = json.loads(text)
        if not isinstance(values, dict) or not all(isinstance(values.get(name), dict) for name in ("dit", "alignment")):
            raise ValueError("it is no configuration of a model")
        return from_dict(ModelConfig, values, source)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{source} keeps under {METADATA!r} a configuration that can't be read: {reason}.") from error


def _check_heads(asked: int | None, found: int | None, source: str) -> None:
    """Raises ValueError where a caller says another number of heads than the file."""
    if asked is not None and found is not None and asked != found:
        raise ValueError(f"{source} is a model of {found} attention heads; {asked} were asked for.")


def _published(place: Path) -> dict[str, Any]:
    """Fields of `DiTConfig` that a config.json of diffusers or Wan, beside the weights, says."""
    config = read_config(place) or {}
    key = _HEADS.get(str(config.get("_class_name")))
    if key is None:
        return {}
    fields = {key: "num_heads", "eps": "eps", "rope_max_seq_len": "max_position"}
    return {ours: config[theirs] for theirs, ours in fields.items() if theirs in config}


def _dit(shapes: Mapping[str, tuple[int, ...]], source: str, names: Names, beside: Mapping[str, Any]) -> DiTConfig:
    """Sizes from the shapes; the rest from the config.json beside, or defaults."""
    text, time, ffn = {
        "wan": ("text_embedding.0", "time_embedding.0", "ffn.0"),
        "diffusers": (
            "condition_embedder.text_embedder.linear_1",
            "condition_embedder.time_embedder.linear_1",
            "ffn.net.0.proj",
        ),
    }[names]

    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = shapes.get(name)
        if found is None or len(found) != rank:
            what = "lacks it" if found is None else f"has it as {list(found)}"
            raise ValueError(
                f"{source} holds no Wan transformer: that has a tensor {name!r} of {rank} axes, the file {what}."
            )
        return found

    width, channels, *patch = shape("patch_embedding.weight", 5)
    if "num_heads" not in beside and width % WAN_HEAD_WIDTH:
        raise ValueError(
            f"{source} is {width} wide, no multiple of {WAN_HEAD_WIDTH}, which a head is in published Wan models, and "
            "no metadata or config.json says how many attention heads it has; give --num-heads to sample.py or to "
            "convert.py import."
        )
    blocks = {int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
    return DiTConfig(
        width=width,
        num_layers=max(blocks, default=0) + 1,
        ffn_width=shape(f"blocks.0.{ffn}.weight", 2)[0],
        text_width=shape(f"{text}.weight", 2)[1],
        frequency_width=shape(f"{time}.weight", 2)[1],
        latent_channels=channels,
        patch_size=tuple(patch),  # type: ignore[arg-type]
        **{"num_heads": width // WAN_HEAD_WIDTH, **beside},
    )


def _alignment(shapes: Mapping[str, tuple[int, ...]], dit: DiTConfig) -> AlignmentConfig:
    """Number of aligned blocks, width and kind of the projectors."""
    pattern = re.compile(r"blocks\.(\d+)\.input_(mlp\.proj\.2|conv)\.weight")
    found = {int(match[1]): (match[2], shape) for name, shape in shapes.items() if (match := pattern.fullmatch(name))}
    kind, shape = found.get(0, ("mlp", (1024,)))
    return AlignmentConfig(
        num_blocks=min(max(found, default=0) + 1, dit.num_layers),
        vfm_width=max(shape[0], 1) if shape else 1024,
        projector="conv" if kind == "conv" else "mlp",
    )
