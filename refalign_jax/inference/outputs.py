"""The files of a folder of sampled videos.

<id>.mp4                            the video of a request
<id>-reference-0.png, -1.png, …     its references as the model received them
samples.json                        one entry per video: prompt, files, and how it was made
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from refalign_jax.atomic import atomic_write, write_text
from refalign_jax.inference.requests import Request

SAMPLES = "samples.json"


def describe_sample(request: Request, made: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entry of samples.json for a request.

    Args:
      request: the request.
      made: JSON: everything that decides the video beside prompt and references.
    """
    references = [
        {"image": _reference_name(request.id, number)}
        | ({} if reference.subject is None else {"subject": reference.subject})
        | {"source": str(reference.path)}
        for number, reference in enumerate(request.references)
    ]
    return {
        "id": request.id,
        "prompt": request.prompt,
        "video": f"{request.id}.mp4",
        "references": references,
        "made": dict(made),
    }


def find_done(folder: Path, wanted: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the entries of a folder's samples.json by id, without those that must be made or made again.

    Args:
      folder: where the videos are.
      wanted: entries as `describe_sample` returns them. The folder's entry of the same id is dropped unless it agrees
        with the wanted one (further fields, such as scores, may be there) and its video exists.

    Raises:
      ValueError: samples.json is not JSON.
    """
    found = {entry["id"]: entry for entry in read_samples(folder)}
    for entry in wanted:
        before = found.get(entry["id"])
        if before is not None and not (before | dict(entry) == before and (folder / entry["video"]).exists()):
            del found[entry["id"]]
    return found


def write_references(folder: Path, id: str, images: UInt8[np.ndarray, "R h w 3"]) -> None:
    """Writes the references of a request as PNG files.

    Raises:
      OSError: a file can't be written.
    """
    for number, image in enumerate(images):
        with atomic_write(folder / _reference_name(id, number)) as temporary:
            Image.fromarray(image).save(temporary, format="PNG")


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Reads the entries of a folder's samples.json; none if there is no such file.

    Raises:
      ValueError: it is not JSON.
    """
    path = folder / SAMPLES
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; remove it.") from error


def write_samples(folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Writes a folder's samples.json.

    Raises:
      OSError: it can't be written; the one that was there stays.
    """
    write_text(folder / SAMPLES, json.dumps(entries, indent=1, ensure_ascii=False))


def _reference_name(id: str, number: int) -> str:
    return f"{id}-reference-{number}.png"
