"""Weights named by their id on the Hugging Face hub.

An id is `Wan-AI/Wan2.1-T2V-1.3B`, `owner/name@revision`, or one file of it, `owner/name/path/in/it.safetensors`. What
has been fetched before is found without a network. The cache is that of huggingface_hub: HF_HOME and HF_HUB_OFFLINE are
its variables.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub

from refalign_jax.atomic import first_line

PATTERNS = ("*.safetensors", "*.json", "*.pth", "*.bin", "*.model", "tokenizer*")
"""The files of a repository that are fetched: weights, configurations and tokenizers."""

_FILES = (".safetensors", ".json", ".pth", ".pt", ".bin", ".ckpt", ".gguf")
_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?P<file>(/[\w.-]+)+)?(@(?P<revision>[\w./-]+))?")


def find_weights(name: str) -> str:
    """Returns where weights are on this machine; those that a hub id names are fetched first.

    Args:
      name: a path, local or `gs://`, or a hub id where no such path exists.

    Raises:
      ValueError: it looks like a hub id, and is neither here nor in the hub's cache, and can't be fetched.
    """
    match = _ID.fullmatch(name)
    if not name or "://" in name or os.path.exists(name) or match is None or Path(name).is_absolute():
        return name
    if any(part in (".", "..") for part in name.split("/")) or (not match["file"] and name.endswith(_FILES)):
        return name
    try:
        return _fetch(match["id"], (match["file"] or "").removeprefix("/"), match["revision"])
    except Exception as error:  # of the network, of the hub, of its cache: each library has its own
        reason = first_line(error) or type(error).__name__
        raise ValueError(
            f"{name} does not exist here, and as an id on the Hugging Face hub it is neither in the cache nor can be "
            f"fetched ({type(error).__name__}: {reason}); give a path, or fetch it where there is a network: hf "
            f"download {match['id']}."
        ) from error


def snapshot(id: str, patterns: Sequence[str], is_whole: Callable[[Path], bool], revision: str | None = None) -> Path:
    """The folder of a repository in the hub's cache: as it is where it is whole, without asking the hub; else fetched.

    Args:
      id: OWNER/NAME.
      patterns: of the files that are wanted.
      is_whole: whether a folder has all of them; an interrupted download leaves some.
      revision: a branch, tag or commit; None for the main branch.

    Raises:
      Exception: whatever huggingface_hub and the network raise where it can't be fetched.
    """
    wanted: dict[str, Any] = {"revision": revision, "allow_patterns": list(patterns)}
    with contextlib.suppress(Exception):  # it is not there, or in part, or the cache is damaged
        cached = Path(huggingface_hub.snapshot_download(id, **wanted, local_files_only=True))
        if is_whole(cached):
            return cached
    return Path(huggingface_hub.snapshot_download(id, **wanted))


def _fetch(id: str, file: str, revision: str | None) -> str:
    """The path of a repository, or of one file of it, in the hub's cache."""
    if file:
        with contextlib.suppress(Exception):
            return huggingface_hub.hf_hub_download(id, file, revision=revision, local_files_only=True)
        return huggingface_hub.hf_hub_download(id, file, revision=revision)
    folder = snapshot(id, PATTERNS, _holds_weights, revision)
    if not _holds_weights(folder):
        raise ValueError("it holds no weights, or only some of their shards")
    return str(folder)


def _holds_weights(folder: Path) -> bool:
    """Whether a folder, with those in it, has weights, and all shards that its indexes name."""
    files = {path for path in folder.rglob("*") if path.is_file()}
    for index in (path for path in files if path.name.endswith(".index.json")):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
        if any(index.parent / str(shard) not in files for shard in shards):
            return False
    return any(path.suffix in (".safetensors", ".pth", ".bin") for path in files)
