"""Forms in which the same weights are passed on: names behind a prefix, float8 with and without scales.

ComfyUI's files name every tensor `model.diffusion_model.…`; others have other prefixes. Float8 comes plain, where a
tensor is its own value, and scaled, where `<layer>.scale_weight` or `<layer>.weight_scale` multiplies it, for the whole
tensor or block by block. `plain` undoes both; what it does not understand it refuses, so that no scale is left out.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from refalign_jax.convert.table import Tensors

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "net.")
"""What the name of every tensor may begin with beyond the published name."""

COMPANIONS = ("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.", "conditioner.")
"""Other models in a file whose transformer is under `model.diffusion_model.`; they are left out."""

FLOAT8: dict[np.dtype, str] = {
    np.dtype(ml_dtypes.float8_e4m3fn): "float8_e4m3fn",
    np.dtype(ml_dtypes.float8_e5m2): "float8_e5m2",
}
"""The types of float8 and what ComfyUI calls them."""

_MARKER = "scaled_fp8"
"""An empty tensor by which ComfyUI marks a file of scaled float8."""

_SCALES = (".scale_weight", ".weight_scale")
_INPUT_SCALES = (".scale_input", ".input_scale")
"""Scales for the inputs of a layer that multiplies in float8; this package does not."""

_FORMAT = ".comfy_quant"
"""JSON, as bytes, on how a layer is stored."""

_FORMATS = "_quantization_metadata"
"""Key of the file's metadata with the same for all layers: {"layers": {name: {"format": …}}}."""


@dataclasses.dataclass(frozen=True)
class View:
    """Tensors of a weight file under other names, some left out, float8 as numbers. Implements `table.Tensors`.

    Attributes:
      tensors: of the file.
      names: a name here, and the file's name.
      scales: a name here, and the file's name of the scale that multiplies it.
    """

    tensors: Tensors
    names: Mapping[str, str]
    scales: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def source(self) -> str:
        """The file's name."""
        return self.tensors.source

    @property
    def metadata(self) -> Mapping[str, str]:
        """The file's metadata."""
        return self.tensors.metadata

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: self.tensors.shapes[theirs] for name, theirs in self.names.items()}

    @functools.cached_property
    def dtypes(self) -> Mapping[str, np.dtype]:
        """Types of what `read` returns: bfloat16 holds float8 exactly, float32 its products with a scale."""
        wide = {name: np.dtype(np.float32 if name in self.scales else ml_dtypes.bfloat16) for name in self.names}
        stored = {name: self.tensors.dtypes[theirs] for name, theirs in self.names.items()}
        return {name: wide[name] if dtype in FLOAT8 else dtype for name, dtype in stored.items()}

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor; float8 times its scale."""
        value = self.tensors.read(self.names[name])
        if value.dtype not in FLOAT8:
            return value
        value = value.astype(self.dtypes[name])
        if name not in self.scales:
            return value
        scale = self.tensors.read(self.scales[name]).astype(np.float32)
        counts = blocks(value.shape, scale.shape)
        assert counts is not None, (name, scale.shape)
        within = [n for axis, count in zip(value.shape, counts, strict=True) for n in (count, axis // count)]
        across = [n for count in counts for n in (count, 1)]
        return (value.reshape(within) * scale.reshape(across)).reshape(value.shape)


def without_counters(tensors: Tensors) -> Tensors:
    """Leaves out torch's `num_batches_tracked`, whole numbers of batch normalisations that only its training uses."""
    return View(tensors, {name: name for name in tensors.shapes if not name.endswith(".num_batches_tracked")})


def blocks(shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...] | None:
    """In how many blocks a scale divides each axis of a weight; None where it does not.

    Args:
      shape: of the weight, output channels first.
      scale: [] or [1] for one number; [out] or [out, 1] for one an output channel; [out, n, 1] for n blocks of each
        channel's inputs; otherwise one axis for each of the weight's, as many blocks as it is long.
    """
    if all(n == 1 for n in scale):
        return (1,) * len(shape)
    if len(scale) == 3 and len(shape) == 2 and scale[2] == 1 and scale[0] == shape[0]:
        scale = scale[:2]
    if len(scale) == 1 and scale[0] == shape[0]:
        scale = scale + (1,) * (len(shape) - 1)
    elif scale[1:] == (1,) and scale[0] == shape[0]:
        scale = scale + (1,) * (len(shape) - 2)
    if len(scale) != len(shape) or any(count < 1 or n % count for n, count in zip(shape, scale, strict=True)):
        return None
    return scale


def plain(tensors: Tensors) -> Tensors:
    """Undoes prefixes and float8; a file that has neither is returned as it is.

    Raises:
      ValueError: a scale that is of no float8 weight, is not a number, or does not divide it into blocks; two scales
        for one weight; a layer stored in another quantised format.
    """
    names = _without_prefix(tensors)
    _check_formats(tensors, names)
    scales: dict[str, str] = {}
    dropped: set[str] = set()
    for name, theirs in names.items():
        layer, dot, kind = name.rpartition(".")
        weight, kind = f"{layer}.weight", dot + kind
        is_marker = name == _MARKER and tensors.dtypes[theirs] in FLOAT8
        if is_marker or (kind in (*_INPUT_SCALES, _FORMAT) and weight in names):
            dropped.add(name)
        elif kind in _SCALES:
            _check_scale(tensors, theirs, names.get(weight))
            if weight in scales:
                raise ValueError(f"{tensors.source}: {weight} has two scales, {scales[weight]} and {theirs}.")
            scales[weight] = theirs
            dropped.add(name)
    for name, theirs in names.items():
        if name.endswith(_FORMAT) and f"{name.removesuffix(_FORMAT)}.weight" not in scales:
            raise ValueError(f"{tensors.source}: {theirs} says that its layer is scaled, but there is no scale for it.")
    if not dropped and list(names.values()) == list(names) and not FLOAT8.keys() & set(tensors.dtypes.values()):
        return tensors
    return View(tensors, {name: theirs for name, theirs in names.items() if name not in dropped}, scales)


def _without_prefix(tensors: Tensors) -> dict[str, str]:
    """Names without their common prefix, and as they are in the file."""
    names = [name for name in tensors.shapes if name != _MARKER]
    for prefix in PREFIXES:
        within = [name for name in names if name.startswith(prefix)]
        others = [name for name in names if not name.startswith(prefix)]
        if within and all(prefix == PREFIXES[0] and name.startswith(COMPANIONS) for name in others):
            marker = [_MARKER] if _MARKER in tensors.shapes else []
            return {name.removeprefix(prefix): name for name in (*within, *marker)}
    return {name: name for name in tensors.shapes}


def _check_scale(tensors: Tensors, scale: str, weight: str | None) -> None:
    """Raises ValueError unless a scale fits its weight."""
    if weight is None or tensors.dtypes[weight] not in FLOAT8:
        what = f"{weight} is stored as {tensors.dtypes[weight]}" if weight else "its layer has no weight"
        raise ValueError(f"{tensors.source}: {scale} scales float8 weights, but {what}.")
    if tensors.dtypes[scale].name not in ("float64", "float32", "float16", "bfloat16"):
        raise ValueError(f"{tensors.source}: {scale} is stored as {tensors.dtypes[scale]}; a scale is a float.")
    if blocks(tensors.shapes[weight], tensors.shapes[scale]) is None:
        raise ValueError(
            f"{tensors.source}: {scale} {list(tensors.shapes[scale])} divides {weight} {list(tensors.shapes[weight])} "
            "into no whole blocks."
        )
    if not np.isfinite(tensors.read(scale).astype(np.float32)).all():
        raise ValueError(f"{tensors.source}: {scale} holds a number that is NaN or infinite.")


def _check_formats(tensors: Tensors, names: Mapping[str, str]) -> None:
    """Raises ValueError where a layer is said to be stored as anything but scaled float8 of its weight's type."""
    formats: dict[str, Any] = {}
    try:
        formats |= json.loads(tensors.metadata.get(_FORMATS, "{}")).get("layers", {})
        for name, theirs in names.items():
            if name.endswith(_FORMAT):
                formats[name.removesuffix(_FORMAT)] = json.loads(tensors.read(theirs).tobytes())
        kinds = {layer: note["format"] for layer, note in formats.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{tensors.source}: its notes on quantised layers ({_FORMAT}) are not JSON as known."
        ) from error
    for layer, kind in kinds.items():
        for prefix in ("", *PREFIXES):
            weight = names.get(f"{layer.removeprefix(prefix)}.weight")
            if weight is not None:
                break
        stored = FLOAT8.get(tensors.dtypes[weight]) if weight else kind
        if kind not in FLOAT8.values() or kind != stored:
            raise ValueError(
                f"{tensors.source}: the layer {layer} is stored as {kind!r:.60}"
                f"{f' but its weight as {tensors.dtypes[weight]}' if weight and kind in FLOAT8.values() else ''}; read "
                f"are {' and '.join(FLOAT8.values())}, with a scale."
            )
