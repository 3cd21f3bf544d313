"""Adapters (LoRA): low-rank changes to a transformer's weights, read strictly and added to its parameters.

    W ← W + s·(α/r)·B A,    A [r, in], B [out, r];  α = r where the file has none

Four ways of naming are read, `{A,B}` also as `{down,up}`:

    PEFT, diffusers       transformer.blocks.{i}.attn1.to_q.lora_A.weight
    original, DiffSynth   blocks.{i}.self_attn.q.lora_A[.default].weight
    ComfyUI               diffusion_model.blocks.{i}.self_attn.q.lora_down.weight, .alpha
    kohya, musubi         lora_unet_blocks_{i}_self_attn_q.lora_down.weight, .alpha

and, as in distillation files, whole changes: `<layer>.diff` of a weight, `<layer>.diff_b` of a bias, and
`<modulation>.diff`. Every tensor of a file must belong to the model, or the file is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refalign_jax.config import AlignmentConfig, DiTConfig, ModelConfig
from refalign_jax.convert.dit import dit_table
from refalign_jax.convert.files import open_weights
from refalign_jax.convert.table import Entry, Tensors, check_finite, published_shapes
from refalign_jax.initial import model_shapes
from refalign_jax.trees import flatten, unflatten
from refalign_jax.types import Array, Params

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "model.",
    "dit.",
    "net.",
)
"""What dotted names may begin with; more than one may follow each other."""

_KOHYA = "lora_unet_"
_KINDS = re.compile(
    r"(?P<layer>.+?)\.(?P<kind>lora_A|lora_B|lora_down|lora_up|alpha|diff|diff_b)(\.[a-z]\w*)??(\.weight)?"
)
_OTHERS: tuple[tuple[str, str], ...] = (
    (r"\.dora_scale$|\.lora_magnitude_vector(\.|$)", "DoRA, which rescales the weights"),
    (r"\.lokr_\w+$", "LoKr, a Kronecker product"),
    (r"\.hada_\w+$", "LoHa, a Hadamard product"),
    (r"\.lora_mid\.", "a convolution of three factors"),
    (r"\.lora_B(\.\w+)?\.bias$", "a bias beside its factors"),
)
"""Further kinds of changes, which are not read."""

_ROLES = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B"}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a published tensor lies in our parameters.

    Attributes:
      entry: of the model's table.
      layer: its index in our stack; None where there is no stack.
      shape: of the published tensor.
    """

    entry: Entry
    layer: int | None
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of one published tensor.

    Attributes:
      factors: names in the file of A and B, or of the change itself.
      scale: what multiplies the product, α/r, or the change.
    """

    factors: tuple[str, ...]
    scale: float


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An opened adapter that fits a model; no tensor but the alphas is read yet.

    Attributes:
      tensors: of its file.
      path: of its file or folder.
      strength: what multiplies all changes.
      changes: by the published names of the tensors that they change.
      places: of these tensors.
    """

    tensors: Tensors
    path: str
    strength: float
    changes: Mapping[str, Change]
    places: Mapping[str, Place]

    def delta(self, name: str) -> np.ndarray:
        """The change of a published tensor, strength included, float32, in our layout of one layer.

        Raises:
          ValueError: a number that is not finite.
        """
        change, place = self.changes[name], self.places[name]
        values = []
        for factor in change.factors:
            value = np.ascontiguousarray(self.tensors.read(factor))
            check_finite(value, factor, self.tensors.source)
            values.append(value.astype(np.float32))
        product = values[0] if len(values) == 1 else _product(*values)
        scaled = product.reshape(place.shape) * np.float32(change.scale * self.strength)
        return np.ascontiguousarray(place.entry.layout.to_ours(scaled))


def open_adapter(path: str | Path, strength: float, config: DiTConfig) -> Adapter:
    """Opens an adapter and checks every tensor of it against a model.

    Args:
      path: safetensors or a torch file, or a folder that holds one.
      strength: s.
      config: of the transformer that it changes.

    Raises:
      ValueError: the file is none, holds another kind of change, names a layer that the model lacks or half of a
        change, or has factors of other shapes; the tensors are listed.
    """
    tensors = open_weights(path)
    for pattern, what in _OTHERS:
        found = next((name for name in tensors.shapes if re.search(pattern, name)), None)
        if found is not None:
            raise ValueError(f"{tensors.source} holds {what} ({found}); read are LoRA factors and whole changes.")
    places, layers = _places(config)
    parts: dict[str, dict[str, str]] = {}
    strange: list[str] = []
    for name in tensors.shapes:
        found_name = _target(name, layers)
        if found_name is None:
            strange.append(name)
            continue
        target, role = found_name
        roles = parts.setdefault(target, {})
        if role in roles:
            raise ValueError(f"{tensors.source} changes {target} twice: {roles[role]} and {name}.")
        roles[role] = name
    if not parts or strange:
        raise ValueError(_misfit(tensors, strange, bool(parts)))
    default = _configured_scale(Path(path), tensors)
    changes = {
        target: _change(target, roles, tensors, places[target].shape, default) for target, roles in parts.items()
    }
    used = {target: places[target] for target in changes}
    return Adapter(tensors, str(path), strength, changes, used)


def merge(params: Params, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Adds adapters to a transformer's parameters, tensor by tensor; the sum is rounded once to the parameters' dtype.

    Args:
      params: of the transformer; their memory is used again, so they can't be used afterwards.
      adapters: opened for this model.

    Returns:
      The parameters, placed as before.
    """
    leaves = flatten(params)
    for adapter in adapters:
        for name, place in adapter.places.items():
            path = place.entry.path
            delta = adapter.delta(name)
            leaves[path] = (
                _add(leaves[path], delta) if place.layer is None else _add_to(leaves[path], delta, place.layer)
            )
    return unflatten(leaves)


def deltas_of(
    adapters: Sequence[Adapter], path: str, layer: int | None = None
) -> Iterator[tuple[int | None, np.ndarray]]:
    """Yields the changes of one of our parameters, float32, each with its layer (None where there is no stack).

    Args:
      adapters: opened for this model.
      path: of the parameter, as the model's table has it.
      layer: of a stack, the only one to yield; None for all.

    Raises:
      ValueError: a number that is not finite.
    """
    for adapter in adapters:
        for name, place in adapter.places.items():
            if place.entry.path == path and layer in (None, place.layer):
                yield place.layer, adapter.delta(name)


@functools.partial(jax.jit, donate_argnums=0)
def _add(value: Array, delta: Array) -> Array:
    return (value.astype(jnp.float32) + delta).astype(value.dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _add_to(stack: Array, delta: Array, layer: Array) -> Array:
    return stack.at[layer].set((stack[layer].astype(jnp.float32) + delta).astype(stack.dtype))


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """B A, of factors of linear layers and of convolutions whose B has kernel 1."""
    return b.reshape(b.shape[0], b.shape[1]) @ a.reshape(a.shape[0], -1)


def _places(config: DiTConfig) -> tuple[dict[str, Place], dict[str, str]]:
    """Places of the model's tensors by Wan's names, and Wan's names of layers by all names that they have."""
    model = ModelConfig(dit=config, alignment=AlignmentConfig(num_blocks=1))
    params = model_shapes(model)["dit"]
    tables = [dit_table(config, names) for names in ("wan", "diffusers")]
    shapes = published_shapes(tables[0], params)
    places: dict[str, Place] = {}
    layers: dict[str, str] = {}
    for ours, theirs in zip(*(sorted(table, key=lambda entry: entry.path) for table in tables), strict=True):
        for index, (name, other) in enumerate(zip(ours.names, theirs.names, strict=True)):
            places[name] = Place(ours, index if ours.stack else None, shapes[name])
            layer = re.sub(r"\.(weight|bias)$", "", name)
            for known in (layer, re.sub(r"\.(weight|bias)$", "", other)):
                layers[known] = layers[_KOHYA + known.replace(".", "_")] = layer
    return places, layers


def _target(name: str, layers: Mapping[str, str]) -> tuple[str, str] | None:
    """The published tensor that a tensor of an adapter changes, and its part in that; None where there is none."""
    match = _KINDS.fullmatch(name)
    if match is None:
        return None
    layer, kind = match["layer"], match["kind"]
    while layer not in layers:
        prefix = next((prefix for prefix in PREFIXES if layer.startswith(prefix)), None)
        if prefix is None:
            return None
        layer = layer.removeprefix(prefix)
    known = layers[layer]
    if kind == "diff_b":
        return f"{known}.bias", "diff"
    return known if known.endswith("modulation") else f"{known}.weight", _ROLES.get(kind, kind)


def _change(
    target: str, roles: Mapping[str, str], tensors: Tensors, shape: tuple[int, ...], default: tuple[str, float] | None
) -> Change:
    """Checks the parts of one change.

    Args:
      target: the published tensor.
      roles: names in the file by role: A, B, alpha, diff.
      tensors: of the file.
      shape: of the published tensor.
      default: whether a configuration gives "alpha" or the "scale", and its value.
    """
    source, sizes = tensors.source, tensors.shapes
    if "diff" in roles:
        others = [name for role, name in roles.items() if role != "diff"]
        if others:
            raise ValueError(f"{source} changes {target} twice: {roles['diff']} and {others[0]}.")
        if math.prod(sizes[roles["diff"]]) != math.prod(shape) or sizes[roles["diff"]][-1:] != shape[-1:]:
            raise ValueError(f"{source}: {roles['diff']} is {list(sizes[roles['diff']])}, {target} {list(shape)}.")
        return Change((roles["diff"],), 1.0)
    if "A" not in roles or "B" not in roles:
        half = next(iter(roles.values()))
        lacking = " and ".join(part for part in ("A (down)", "B (up)") if part[0] not in roles)
        raise ValueError(f"{source} holds half of a change: {half}, but no {lacking} of {target}.")
    a, b = sizes[roles["A"]], sizes[roles["B"]]
    fits = len(a) >= 2 and len(b) >= 2 and b[1] == a[0] > 0 and math.prod(b[2:]) == 1
    if not fits or b[0] != shape[0] or a[1:] not in (shape[1:], (math.prod(shape[1:]),)):
        raise ValueError(
            f"{source}: {roles['A']} {list(a)} and {roles['B']} {list(b)} do not multiply to {target} {list(shape)}; "
            "the adapter is of another model."
        )
    scale = 1.0
    if "alpha" in roles:
        if math.prod(sizes[roles["alpha"]]) != 1:
            raise ValueError(f"{source}: {roles['alpha']} is {list(sizes[roles['alpha']])}; it must be one number.")
        scale = float(np.asarray(tensors.read(roles["alpha"]), np.float64).reshape(())) / a[0]
        if not math.isfinite(scale):
            raise ValueError(f"{source}: {roles['alpha']} is not finite.")
    elif default is not None:
        scale = default[1] / a[0] if default[0] == "alpha" else default[1] / math.sqrt(a[0])
    return Change((roles["A"], roles["B"]), scale)


def _configured_scale(path: Path, tensors: Tensors) -> tuple[str, float] | None:
    """α as PEFT's adapter_config.json beside a file, or diffusers' metadata in it, gives it; None where neither does.

    Returns:
      "alpha" or, of rank-stabilised adapters (divided by √r), "root", and α.

    Raises:
      ValueError: they can't be read, or give α by layer.
    """
    beside = (path if path.is_dir() else path.parent) / "adapter_config.json"
    text, where = tensors.metadata.get("lora_adapter_metadata"), f"{tensors.source}: lora_adapter_metadata"
    if text is None and beside.is_file():
        text, where = beside.read_text(encoding="utf-8", errors="replace"), str(beside)
    if text is None:
        return None
    try:
        values = {name.removeprefix("transformer."): value for name, value in json.loads(text).items()}
        alpha = values.get("lora_alpha")
        if values.get("alpha_pattern") or values.get("use_dora"):
            raise ValueError("it has alpha_pattern or use_dora, which are not read")
        if alpha is None:
            return None
        return "root" if values.get("use_rslora") else "alpha", float(alpha)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where} is not a configuration of an adapter that can be read: {error}.") from error


def _misfit(tensors: Tensors, strange: Sequence[str], some_fit: bool) -> str:
    """The sentence for an adapter with tensors that belong to nothing."""
    if not strange:
        return f"{tensors.source} holds no tensor."
    shown = ", ".join(strange[:4]) + (f" and {len(strange) - 4} more" if len(strange) > 4 else "")
    if not some_fit:
        return f"{tensors.source} is no adapter of this model: none of its tensors changes a weight of it ({shown})."
    return (
        f"{tensors.source} fits this model in part only: {len(strange)} of {len(tensors.shapes)} tensors change "
        f"nothing of it ({shown}); it was made for another model."
    )
