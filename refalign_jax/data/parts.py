"""A dataset prepared in parts: part i of n takes every n-th record, in a process and a folder of its own.

Whichever part is finished last writes the manifest that makes all of them one dataset.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epath

from refalign_jax.data.manifest import MANIFEST, Manifest, read_manifest, write_manifest


def part_name(index: int, parts: int) -> str:
    """Returns the folder of part `index`, from 1, within the dataset's folder."""
    return f"part-{index:05d}-of-{parts:05d}"


def join_parts(folder: epath.Path, parts: int) -> str:
    """Writes the manifest of the whole dataset if all parts are finished.

    Args:
      folder: the whole dataset's.
      parts: number of parts.

    Returns:
      A sentence: how many examples there are, or which parts are missing.

    Raises:
      ValueError: parts were made with different settings, or have no example together.
      OSError: the manifest can't be written.
    """
    names = [part_name(index, parts) for index in range(1, parts + 1)]
    begun = [name for name in names if (folder / name / MANIFEST).exists()]
    manifests = {name: read_manifest(folder / name) for name in begun}
    missing = [name for name in names if name not in manifests or not manifests[name].complete]
    if missing:
        return f"{len(missing)} of {parts} parts are missing: {', '.join(missing[:4])}."
    filled = {name: manifest for name, manifest in manifests.items() if manifest.num_examples}
    if not filled:
        raise ValueError(f"No record became an example in {folder}; see skipped.jsonl in its {parts} parts.")
    first_name, first = next(iter(filled.items()))
    for name, manifest in filled.items():
        if _kind(manifest) != _kind(first):
            raise ValueError(f"{folder / name} and {first_name} were made with different settings; prepare one again.")
    shards = [
        dataclasses.replace(shard, name=f"{name}/{shard.name}")
        for name, manifest in filled.items()
        for shard in manifest.shards
    ]
    if (folder / MANIFEST).exists():  # shards that are new come last, so that a run can go on with a grown dataset
        places = {shard.name: place for place, shard in enumerate(read_manifest(folder).shards)}
        shards.sort(key=lambda shard: places.get(shard.name, len(places)))
    whole = dataclasses.replace(first, shards=tuple(shards))
    write_manifest(folder, whole)
    return f"All {parts} parts are ready: {whole.num_examples} examples in {folder}."


def _kind(manifest: Manifest) -> Any:
    """Returns everything in which the parts of one dataset agree."""
    settings = {**manifest.made["settings"], "part": None}
    shape = (manifest.video_latents, manifest.text_width, manifest.vfm_width, manifest.subject_mask, manifest.storage)
    return shape, settings, manifest.made["encoders"]
