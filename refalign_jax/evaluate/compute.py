"""Computes the metrics that need no foreign judge, and writes them as the benchmark's own scripts do.

A score file keeps entries of other origin. What was computed here is computed again only if the video, the faces or the
weights have changed: `computed.json` beside the score files has their digests.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from refalign_jax.atomic import write_text
from refalign_jax.data.json_lines import read_json
from refalign_jax.digests import Digests, digest_json

COMPUTED = "computed.json"
"""File in the folder of scores: metric → id → digest of what the entry was computed from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A metric to compute.

    Attributes:
      file: of scores, without .json.
      key: of the value in a video's entry.
      inputs: the files that each video's value depends on.
      compute: a video's id to its value; None where it has none.
    """

    file: str
    key: str
    inputs: Mapping[str, tuple[Path, ...]]
    compute: Callable[[str], float | None]


def videos_of(folder: Path, ids: tuple[str, ...]) -> dict[str, Path]:
    """Finds <id>.mp4 for every id.

    Args:
      folder: of the videos.
      ids: of the benchmark's items; if empty, every MP4 of the folder is an item.

    Raises:
      ValueError: the folder has none, or lacks some.
    """
    found = {path.stem: path for path in sorted(folder.glob("*.mp4"))}
    if not ids:
        ids = tuple(found)
    missing = [name for name in ids if name not in found]
    if missing or not found:
        listed = ", ".join(f"{name}.mp4" for name in missing[:5]) + (" …" if len(missing) > 5 else "")
        raise ValueError(
            f"{folder} lacks {len(missing)} videos: {listed}." if missing else f"{folder} has no <id>.mp4."
        )
    return {name: found[name] for name in ids}


def read_ids(prompts: Path) -> tuple[str, ...]:
    """Reads the ids of an OpenS2V-Eval file of prompts.

    Raises:
      ValueError: it is not an object of items.
    """
    items = read_json(prompts)
    if not isinstance(items, dict) or not items or not all(isinstance(item, dict) for item in items.values()):
        raise ValueError(f"{prompts} is no file of OpenS2V-Eval: an object of ids and items is expected.")
    return tuple(items)


def compute(task: Task, folder: Path, digests: Digests) -> int:
    """Computes what is missing of a metric and writes it into its score file, after each video.

    Args:
      task: the metric.
      folder: of the score files; made if it is missing.
      digests: of the inputs.

    Returns:
      How many videos were computed.

    Raises:
      ValueError: a video can't be scored, or a file of the folder is not in its form.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, record = folder / f"{task.file}.json", folder / COMPUTED
    scores, known = _object(path), _object(record)
    mine = known.setdefault(task.file, {})
    wanted = {name: digest_json([digests.file(file) for file in files]) for name, files in task.inputs.items()}
    open_ids = [name for name in wanted if (name in mine or name not in scores) and mine.get(name) != wanted[name]]
    for name in tqdm(open_ids, desc=task.file, unit="video", disable=not open_ids):
        value = task.compute(name)
        scores.pop(name, None)
        if value is not None:
            scores[name] = {task.key: value}
        mine[name] = wanted[name]
        write_text(path, json.dumps(scores, indent=1) + "\n")
        write_text(record, json.dumps(known, indent=1) + "\n")
    return len(open_ids)


def _object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file."""
    if not path.exists():
        return {}
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no object of video ids and their values.")
    return found
