"""The files of a folder of sampled videos.

<id>.mp4                            the video of a request; its comment is JSON that says how it was made
<id>-reference-0.png, -1.png, …     its references as the model received them
<id>-latents.safetensors, -pixels…  its latents and pixels, if they are to be saved
samples.json                        one entry per video: prompt, files, and how it was made
gallery.html                        all videos on a page
.latents/                           latents whose video is not there yet

An entry has digests of all that decides its video (references, masks, weights, encoders) and of its files. A video is
kept if these are what they would be now, and made again otherwise. Entries of other requests are left alone.
"""

from __future__ import annotations

import collections
import contextlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from refalign_jax.atomic import atomic_write, write_text
from refalign_jax.config import flat_fields
from refalign_jax.convert.safetensors_files import open_safetensors
from refalign_jax.data.inputs import digest_array
from refalign_jax.data.records import Reference
from refalign_jax.data.video import write_latents
from refalign_jax.digests import Digests, differences, digest_json
from refalign_jax.encoders.interface import VideoCodec
from refalign_jax.inference.requests import Request
from refalign_jax.inference.tensors import channels_first, save_tensor
from refalign_jax.types import Float

SAMPLES = "samples.json"
_CHANGED = "its files were changed"


def describe_sample(
    request: Request, made: Mapping[str, Any], digests: Digests, saved: Sequence[str] = (), stem: str = ""
) -> dict[str, Any]:
    """Returns the entry of samples.json for a request, without the digests of its files.

    Args:
      request: the request.
      made: JSON: everything that decides the video beside prompt and references.
      digests: of the folder of samples.
      saved: names of tensors that are saved beside the video.
      stem: what the names of its files begin with; empty for the request's id.

    Raises:
      ValueError, OSError: a reference can't be read.
    """
    stem = stem or request.id
    references = [
        {"image": f"{stem}-reference-{number}.png", **_describe_reference(reference, digests)}
        for number, reference in enumerate(request.references)
    ]
    entry = {
        "id": request.id,
        "prompt": request.prompt,
        "video": f"{stem}.mp4",
        "references": references,
        "made": json.loads(json.dumps(dict(made))),
    }
    return entry | ({"tensors": {name: f"{stem}-{name}.safetensors" for name in saved}} if saved else {})


def _describe_reference(reference: Reference, digests: Digests) -> dict[str, Any]:
    """What decides a reference: digests of image and mask, where they are, and regions where there are any."""
    described: dict[str, Any] = {} if reference.subject is None else {"subject": reference.subject}
    assert isinstance(reference.path, Path), "requests name local files"
    described |= {"source": str(reference.path), "sha256": digests.file(reference.path)}
    if isinstance(reference.mask, np.ndarray):
        described["mask_sha256"] = digest_array(reference.mask)
    elif isinstance(reference.mask, Path):
        described |= {"mask": str(reference.mask), "mask_sha256": digests.file(reference.mask)}
    regions = {"frame": reference.frame, "crop": reference.crop, "box": reference.box}
    return described | {name: value for name, value in json.loads(json.dumps(regions)).items() if value is not None}


def digest_files(folder: Path, entry: Mapping[str, Any], digests: Digests) -> dict[str, str]:
    """Digests of the files of an entry by their names: the video and the references as the model received them.

    Raises:
      ValueError, OSError: one is missing or can't be read.
    """
    for name in file_names(entry):
        digests.forget(folder / name)
    return {name: digests.file(folder / name) for name in file_names(entry)}


def file_names(entry: Mapping[str, Any]) -> list[str]:
    """Names of the files of an entry."""
    references = [reference["image"] for reference in entry["references"] if reference["image"]]
    return [entry["video"], *references, *entry.get("tensors", {}).values()]


def reason_to_make(folder: Path, before: Mapping[str, Any] | None, wanted: Mapping[str, Any], digests: Digests) -> str:
    """Why a video must be made; empty where the one that is there is what is wanted.

    Contents are compared: where references, weights and encoders lie does not matter.

    Args:
      folder: where the videos are.
      before: the folder's entry; None where it has none.
      wanted: the entry as `describe_sample` returns it.
      digests: of the folder.
    """
    if before is None:
        return "new"
    files, old, new = before.get("files"), _content(before), _content(wanted)
    if not isinstance(files, dict) or "digests" not in old["made"]:
        return "made by an older version"
    if old != new:
        parts = [name for name in ("prompt", "references") if old[name] != new[name]]
        made = differences(flat_fields(old["made"]), flat_fields(new["made"]))
        return f"other {', '.join([*parts, *(name.removeprefix('digests.') for name in made)])}"
    try:
        now = digest_files(folder, wanted, digests)
        return "" if all(files.get(name) == digest for name, digest in now.items()) else _CHANGED
    except (ValueError, OSError):
        return "its files are missing"


def _content(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a video, without the places of its inputs."""
    made = dict(entry["made"]) if isinstance(entry.get("made"), dict) else {}
    encoders = made.get("encoders")
    if isinstance(encoders, dict):
        made["encoders"] = {name: _without(described, "path", "tokenizer") for name, described in encoders.items()}
    found = entry.get("references")
    references = [_without(reference, "source", "mask") for reference in found] if isinstance(found, list) else found
    return {"prompt": entry.get("prompt"), "references": references, "made": _without(made, "weights")}


def _without(value: Any, *names: str) -> Any:
    return {name: field for name, field in value.items() if name not in names} if isinstance(value, dict) else value


def summarise(count: int, reasons: Mapping[str, str]) -> str:
    """Says how many of the requested videos are kept, and how many are made for which reason."""
    if not reasons:
        return f"All {count} videos are there, made of the same inputs; they are kept."
    found = collections.Counter(reasons.values()).most_common()
    clauses = [f"{number} {reason}" if reason == "new" else f"{number} again ({reason})" for reason, number in found]
    return f"{count - len(reasons)} of {count} videos are kept; to be made: {', '.join(clauses)}."


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Removes files of a folder, as far as they are there."""
    for name in names:
        if Path(name).name == name:
            with contextlib.suppress(OSError):
                (folder / name).unlink()


def write_references(folder: Path, entry: Mapping[str, Any], images: UInt8[np.ndarray, "R h w 3"]) -> None:
    """Writes the references of an entry as PNG files; those without a name are not written.

    Raises:
      OSError: a file can't be written.
    """
    for reference, image in zip(entry["references"], images, strict=True):
        if reference["image"]:
            with atomic_write(folder / reference["image"]) as temporary:
                Image.fromarray(image).save(temporary, format="PNG")


def write_files(
    folder: Path, entry: Mapping[str, Any], latents: Float[np.ndarray, "F H W C"], codec: VideoCodec
) -> None:
    """Decodes latents and writes an entry's video, with its description inside, and the tensors that it names.

    Raises:
      OSError: a file can't be written.
    """
    about = {"id": entry["id"], **_content(entry)}
    about["references"] = [_without(reference, "image") for reference in about["references"]]
    comment = json.dumps(about, ensure_ascii=False, sort_keys=True)
    pixels = write_latents(folder / entry["video"], latents, codec, entry["made"]["fps"], comment)
    tensors = {"latents": channels_first(latents), "pixels": pixels}
    for name, file in entry.get("tensors", {}).items():
        save_tensor(folder / file, name, tensors[name])


class Spool:
    """Latents on the disk between the transformer and the VAE, so that a process that is killed loses one batch.

    Args:
      folder: of the samples.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / ".latents"

    def write(self, entry: Mapping[str, Any], latents: Float[np.ndarray, "F H W C"]) -> None:
        """Keeps the latents of an entry.

        Raises:
          OSError: they can't be written.
        """
        self._folder.mkdir(exist_ok=True)
        save_tensor(self._path(entry), "latents", latents)

    def read(self, entry: Mapping[str, Any]) -> Float[np.ndarray, "F H W C"] | None:
        """Returns what was kept for an entry of the same content; None where there is nothing, or it is damaged."""
        path = self._path(entry)
        if not path.is_file():
            return None
        try:
            return np.array(open_safetensors(path).read("latents"))
        except (ValueError, OSError, KeyError):
            return None

    def remove(self, entry: Mapping[str, Any]) -> None:
        """Removes what was kept, and the folder with the last of it."""
        with contextlib.suppress(OSError):
            self._path(entry).unlink(missing_ok=True)
            self._folder.rmdir()

    def clear(self) -> None:
        """Removes all that is kept, and what processes that were killed left half written; for the only writer."""
        shutil.rmtree(self._folder, ignore_errors=True)
        for left in self._folder.parent.glob(".*.partial"):
            with contextlib.suppress(OSError):
                left.unlink()

    def _path(self, entry: Mapping[str, Any]) -> Path:
        return self._folder / f"{digest_json([entry['id'], _content(entry)])}.safetensors"


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Reads the entries of a folder's samples.json; none if there is no such file.

    Raises:
      ValueError: it is not JSON, or not a list of entries with unique ids and the names of their videos.
    """
    path = folder / SAMPLES
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; remove it.") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds a {type(entries).__name__}, not a list; remove it.")
    ids: set[str] = set()
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in ("id", "video")):
            raise ValueError(
                f"{path}: entry {number} is not an object with id and video, two strings; remove the file."
            )
        if entry["id"] in ids:
            raise ValueError(f"{path}: entry {number} has the id {entry['id']!r:.60} of another; remove the file.")
        ids.add(entry["id"])
    return entries


def write_samples(folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Writes a folder's samples.json.

    Raises:
      OSError: it can't be written; the one that was there stays.
    """
    write_text(folder / SAMPLES, json.dumps(entries, indent=1, ensure_ascii=False))
