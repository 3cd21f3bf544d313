"""Opens published weights, whatever their form: the one function through which every command reads a weight file.

A file is safetensors, a torch checkpoint, or GGUF. Shards are named by an index, or numbered. A folder holds one of
these, or is a whole pipeline of diffusers, or holds variants of one model (`.fp16.`). What is opened then passes
through `forms.plain`, which strips prefixes and multiplies float8 weights by their scales.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refalign_jax import remote
from refalign_jax.convert.forms import plain
from refalign_jax.convert.gguf_files import open_gguf
from refalign_jax.convert.pickle_files import open_pickle_weights
from refalign_jax.convert.safetensors_files import open_safetensors
from refalign_jax.convert.table import Tensors

TORCH = (".pth", ".pt", ".bin", ".ckpt")
"""Suffixes of torch checkpoints."""

_INDEX = re.compile(r".+\.(safetensors|bin)\.index(\.\w+)?\.json")
_SHARD = re.compile(r"(?P<stem>.+?)-(?P<number>\d{5})(-of-(?P<total>\d{5}))?(?P<suffix>\.[a-z]+)")
_VARIANT = re.compile(r"\.(fp16|bf16|fp32|fp8|ema|non_ema)\b")


@dataclasses.dataclass(frozen=True)
class _Shards:
    """Tensors of several files. Implements `table.Tensors`."""

    source: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]
    metadata: Mapping[str, str]
    parts: Mapping[str, Tensors]

    def read(self, name: str) -> np.ndarray:
        return self.parts[name].read(name)


def open_weights(path: str | Path) -> Tensors:
    """Opens published weights without reading a tensor.

    Args:
      path: a safetensors file, a torch checkpoint, a GGUF file, an index of shards, or a folder that holds one of
        these, numbered shards, or a pipeline of diffusers, whose transformer is opened.

    Raises:
      ValueError: no such file on this machine, one that is not whole, a shard that is missing or disagrees with its
        index, several models in a folder, a GGUF file without the package gguf, or a scale that is not understood.
    """
    if remote.is_remote(path):
        raise ValueError(f"{path} is not on this machine; published weights are read from local files: copy it here.")
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected a safetensors file, an index, or a folder that holds one.")
    if path.is_dir():
        found = _find(path)
        if found is None:
            raise ValueError(f"{path} holds no *.safetensors file and no *.safetensors.index.json, nor a torch file.")
        if isinstance(found, list):
            return plain(_join(f"{found[0]} to {found[-1].name}", found, [_open_file(file) for file in found]))
        path = found
    return plain(_open_index(path) if path.suffix == ".json" else _open_file(path))


def holds_weights(path: str | Path) -> bool:
    """Whether this is a weight file by its name, or a folder that `open_weights` would look into.

    Raises:
      ValueError: as `open_weights`, for several models in a folder or for shards that are missing.
    """
    path = Path(path)
    if path.is_dir():
        return _find(path) is not None
    return path.is_file() or path.suffix in (".safetensors", ".json", ".gguf", *TORCH)


def read_config(path: Path) -> dict[str, Any] | None:
    """Reads the config.json in a folder, or beside a file; None where there is none.

    Raises:
      ValueError: it is not a JSON object.
    """
    path = (path if path.is_dir() else path.parent) / "config.json"
    if not path.is_file():
        return None
    try:
        published = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(published, dict):
        raise ValueError(f"{path} holds a {type(published).__name__}, not an object.")
    return published


def _open_file(path: Path) -> Tensors:
    """Opens one file."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected safetensors or a torch checkpoint.")
    with path.open("rb") as file:
        start = file.read(4)
    if path.suffix == ".gguf" or start == b"GGUF":
        return open_gguf(path)
    return open_pickle_weights(path) if path.suffix in TORCH else open_safetensors(path)


def _find(folder: Path) -> Path | list[Path] | None:
    """The file, the index or the numbered shards that a folder holds; None where it holds no weights."""
    children = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    names = [path.name for path in children]
    if "high_noise_model" in names and "low_noise_model" in names:
        raise ValueError(_two_models(folder, "high_noise_model", "low_noise_model"))
    if "model_index.json" in names:
        if "transformer_2" in names:
            raise ValueError(_two_models(folder, "transformer", "transformer_2"))
        found = _find(folder / "transformer") if "transformer" in names else None
        if found is None:
            raise ValueError(f"{folder} is a pipeline (model_index.json) without weights in its folder transformer/.")
        return found
    indexes = [path for path in children if _INDEX.fullmatch(path.name)]
    for suffixes in ((".safetensors",), TORCH):
        listed = [path for path in indexes if path.name.split(".index")[0].endswith(suffixes)]
        files = _series([path for path in children if path.suffix in suffixes and path.is_file()])
        for variants in (False, True):
            for kind in (listed, files):
                chosen = [one for one in kind if bool(_VARIANT.search(_first(one).name)) == variants]
                if len(chosen) > 1:
                    some = [_first(one).name for one in chosen[:4]]
                    raise ValueError(
                        f"{folder} holds {len(chosen)} files *{_first(chosen[0]).suffix}; name one: {some}."
                    )
                if chosen:
                    _check_whole(chosen[0])
                    return chosen[0]
    return None


def _two_models(folder: Path, high: str, low: str) -> str:
    return (
        f"{folder} is Wan2.2 A14B, two transformers that share a video's noise levels ({high}/ above 0.875, {low}/ "
        f"below); one transformer is trained and sampled here. Give Wan2.1 T2V 14B or RefAlign, or, to begin a run "
        f"from one of the two, its folder {folder / low}."
    )


def _first(found: Path | list[Path]) -> Path:
    return found[0] if isinstance(found, list) else found


def _series(files: Sequence[Path]) -> list[Path | list[Path]]:
    """Single files, and numbered shards as one list; numbers with large gaps count steps and not shards."""
    found: list[Path | list[Path]] = []
    groups: dict[tuple[str, ...], list[Path]] = {}
    for path in files:
        match = _SHARD.fullmatch(path.name)
        if match is None:
            found.append(path)
        else:
            groups.setdefault((match["stem"], match["total"] or "", match["suffix"]), []).append(path)
    for shards in groups.values():
        numbers, total = _numbers(shards)
        found += [shards] if total or 2 * len(shards) > max(numbers) else shards
    return found


def _numbers(shards: Sequence[Path]) -> tuple[list[int], int]:
    """The numbers in the names of shards, and how many there are in all, or 0 where the names don't say."""
    matches = [match for path in shards if (match := _SHARD.fullmatch(path.name))]
    return [int(match["number"]) for match in matches], int(matches[0]["total"] or 0)


def _check_whole(found: Path | list[Path]) -> None:
    """Raises ValueError where numbered shards, which begin at 0 or 1, lack one."""
    if isinstance(found, Path):
        return
    numbers, total = _numbers(found)
    wanted = range(1, total + 1) if total else range(min(*numbers, 1), max(numbers) + 1)
    lacking = [f"{number:05d}" for number in wanted if number not in numbers]
    if lacking:
        raise ValueError(
            f"{found[0].parent} holds {len(found)} of {len(wanted)} shards like {found[0].name} and lacks number "
            f"{', '.join(lacking[:4])}."
        )


def _join(source: str, paths: Sequence[Path], parts: Sequence[Tensors]) -> Tensors:
    """Puts shards together."""
    where: dict[str, Tensors] = {}
    metadata: dict[str, str] = {}
    for path, part in zip(paths, parts, strict=True):
        twice = next((name for name in part.shapes if name in where), None)
        if twice is not None:
            raise ValueError(f"{path} and {where[twice].source} both hold {twice}; shards hold each tensor once.")
        where |= dict.fromkeys(part.shapes, part)
        for key, value in part.metadata.items():
            if metadata.setdefault(key, value) != value:
                raise ValueError(
                    f"{path} differs from {paths[0].name} in its metadata {key!r}; they are of two models."
                )
    shapes = {name: part.shapes[name] for name, part in where.items()}
    return _Shards(source, shapes, {name: part.dtypes[name] for name, part in where.items()}, metadata, where)


def _open_index(index: Path) -> Tensors:
    """Opens the shards that an index names and checks that they hold what it says."""
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: index.parent / Path(shard).name for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not a safetensors index: it has no 'weight_map' of name to file.") from error
    paths = sorted(set(files.values()))
    if not paths:
        raise ValueError(f"{index} is not a safetensors index: its 'weight_map' is empty.")
    parts = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{index} names the shard {path.name}, which is not beside it.")
        part = _open_file(path)
        lacking = [name for name, file in files.items() if file == path and name not in part.shapes]
        unlisted = [name for name in part.shapes if files.get(name) != path]
        if lacking or unlisted:
            raise ValueError(
                f"{path} and {index.name} disagree: in the index alone {lacking[:4]}, "
                f"in the shard alone {unlisted[:4]}."
            )
        parts.append(part)
    return _join(str(index), paths, parts)
