"""Tensors from files and into files, for comparisons with other frameworks: noise, embeddings, latents, pixels.

Latents may have channels first, [C, F, H, W], as torch has them, or last, [F, H, W, C], with or without a leading batch
axis of 1. They are saved with channels first.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save

from refalign_jax.atomic import atomic_write
from refalign_jax.convert.safetensors_files import open_safetensors
from refalign_jax.convert.table import Tensors, check_finite
from refalign_jax.data.files import check_file
from refalign_jax.types import Float


class Given(NamedTuple):
    """Opened files; None where there is none."""

    noise: Tensors | None = None
    embeddings: Tensors | None = None


def open_given(noise: str, embeddings: str) -> Given:
    """Opens the files of `--noise` and `--embeddings`; empty for none.

    Raises:
      ValueError: no such file, or not safetensors.
    """
    return Given(*(_open(path) if path else None for path in (noise, embeddings)))


def given_noise(given: Given, id: str, shape: tuple[int, int, int, int]) -> Float[np.ndarray, "F H W C"] | None:
    """The noise of a request; None where no file is given.

    Args:
      given: the files.
      id: of the request; a tensor of this name comes before `noise` and before the only tensor.
      shape: F, H, W, C.

    Raises:
      ValueError: the file holds none for it, or one of another shape.
    """
    if given.noise is None:
        return None
    names = list(given.noise.shapes)
    name = next((name for name in (id, "noise", names[0] if len(names) == 1 else "") if name in names), None)
    if name is None:
        raise ValueError(f"{given.noise.source} holds no noise for {id}: no tensor of this name, and no `noise`.")
    return _channels_last(given.noise, name, shape)


def given_text(given: Given, id: str, width: int) -> dict[str, Float[np.ndarray, "S width"]]:
    """The embeddings of a request under `prompt` and `negative`, as far as the file has them.

    Args:
      given: the files.
      id: of the request; `<id>.prompt` comes before `prompt`.
      width: of the model's text.

    Raises:
      ValueError: the file has no prompt, or one of another width.
    """
    if given.embeddings is None:
        return {}
    found: dict[str, np.ndarray] = {}
    for part in ("prompt", "negative"):
        name = _find(given.embeddings, id, part)
        if name is not None:
            value = _read(given.embeddings, name)
            value = value[0] if value.ndim == 3 and len(value) == 1 else value
            if value.ndim != 2 or value.shape[1] != width or not len(value):
                raise ValueError(
                    f"{given.embeddings.source}: {name} is {list(given.embeddings.shapes[name])}; it must be "
                    f"[tokens, {width}]."
                )
            found[part] = value
    if "prompt" not in found:
        raise ValueError(f"{given.embeddings.source} holds no embedding for {id}: neither {id}.prompt nor prompt.")
    return found


def given_references(given: Given, id: str, shape: tuple[int, int, int]) -> Float[np.ndarray, "R H W C"] | None:
    """The latents of a request's references, `<id>.references` or `references`; None where there are none.

    Args:
      given: the files.
      id: of the request.
      shape: H, W, C.

    Raises:
      ValueError: another shape.
    """
    name = _find(given.embeddings, id, "references") if given.embeddings else None
    if given.embeddings is None or name is None:
        return None
    found = given.embeddings.shapes[name]
    found = found[1:] if len(found) == 5 and found[0] == 1 else found
    H, W, C = shape
    R = found[1] if len(found) == 4 and (found[0], *found[2:]) == (C, H, W) else found[0] if found else 0
    return _channels_last(given.embeddings, name, (R, H, W, C))


def save_tensor(path: Path, name: str, value: np.ndarray) -> None:
    """Writes one tensor as safetensors.

    Raises:
      OSError: the file can't be written.
    """
    with atomic_write(path) as temporary:
        temporary.write_bytes(save({name: np.ascontiguousarray(value)}))


def channels_first(latents: Float[np.ndarray, "F H W C"]) -> Float[np.ndarray, "C F H W"]:
    """Latents as they are saved."""
    return np.moveaxis(latents, -1, 0)


def _open(path: str) -> Tensors:
    check_file(path, "a safetensors file")
    return open_safetensors(Path(path))


def _find(tensors: Tensors, id: str, part: str) -> str | None:
    return next((name for name in (f"{id}.{part}", part) if name in tensors.shapes), None)


def _read(tensors: Tensors, name: str) -> np.ndarray:
    """One tensor, float32.

    Raises:
      ValueError: it holds whole numbers, or numbers that are not finite.
    """
    if tensors.dtypes[name].name not in ("float64", "float32", "float16", "bfloat16"):
        raise ValueError(f"{tensors.source}: {name} is stored as {tensors.dtypes[name]}; it must be a float.")
    value = np.ascontiguousarray(tensors.read(name))
    check_finite(value, name, tensors.source)
    return value.astype(np.float32)


def _channels_last(tensors: Tensors, name: str, shape: tuple[int, int, int, int]) -> Float[np.ndarray, "F H W C"]:
    """Latents of a shape F, H, W, C; where channels could be first as well as last, they are first."""
    value = _read(tensors, name)
    value = value[0] if value.ndim == 5 and len(value) == 1 else value
    F, H, W, C = shape
    if value.shape == (C, F, H, W):
        return np.ascontiguousarray(np.moveaxis(value, 0, -1))
    if value.shape == shape:
        return value
    raise ValueError(
        f"{tensors.source}: {name} is {list(tensors.shapes[name])}; it must be [{C}, {F}, {H}, {W}] (channels, frames, "
        f"rows, columns) or [{F}, {H}, {W}, {C}]."
    )
