"""Videos that are asked for: OpenS2V-Eval's JSON, or a JSONL file with one request per line.

    {"id": "walk", "prompt": "A cat walks over grass.",
     "references": [{"image": "cat.png", "subject": "cat", "mask": "cat_mask.png"}]}

`id`, `references`, `subject` and `mask` are optional. Paths are relative to the folder of the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Sequence
from pathlib import Path

from tqdm import tqdm

from refalign_jax.data.files import check_file
from refalign_jax.data.json_lines import check_fields, check_text, read_json, read_lines
from refalign_jax.data.records import Reference
from refalign_jax.data.references import load_reference
from refalign_jax.data.sources.jsonl import parse_references
from refalign_jax.data.stored import Stored

MAX_ID_BYTES = 200
"""File systems allow names of 255 bytes."""

_FIELDS = {"prompt": True, "references": False, "id": False}
"""The fields of a line, and whether each is required."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One video that is asked for."""

    id: str
    """Name of its files, unique among the requests of a folder."""
    prompt: str
    """What the video shows; may be empty."""
    references: tuple[Reference, ...] = ()
    """The subjects in it."""
    where: str = ""
    """File and line, for messages."""


def read_requests(path: str | Path) -> list[Request]:
    """Reads a JSONL file of requests in the form that this module describes; a line without an id gets its number.

    Raises:
      ValueError: no such file, a file without lines, a line in another form, or two lines with one id.
    """
    path = Path(path)
    requests: dict[str, Request] = {}
    for number, fields in read_lines(path):
        where = f"{path}, line {number}"
        check_fields(fields, _FIELDS, where)
        check_text(fields["prompt"], "prompt", where, empty=True)
        name = fields.get("id", f"{number:04d}")
        check_text(name, "id", where)
        _check_id(name, requests, where)
        references = parse_references(fields.get("references", []), where, path.parent)
        for file in (file for reference in references for file in (reference.path, reference.mask)):
            if isinstance(file, Stored):
                raise ValueError(f"{where}: {file} is a URL; references to sample with are local files.")
        requests[name] = Request(id=name, prompt=fields["prompt"], references=references, where=where)
    if not requests:
        raise ValueError(f'{path} holds no request; a line is {{"prompt": …, "references": […]}}.')
    return list(requests.values())


def read_eval(path: str | Path, images: str | Path | None = None) -> list[Request]:
    """Reads the prompts of OpenS2V-Eval, {id: {"prompt", "img_paths", "class_label", …}}; other fields are left alone.

    Args:
      path: the JSON file.
      images: what the paths in it are relative to; None for its folder.

    Raises:
      ValueError: no such file, or another form.
    """
    path = Path(path)
    check_file(path, "OpenS2V-Eval's JSON")
    found, folder = read_json(path), path.parent if images is None else Path(images)
    if not isinstance(found, dict) or not found:
        raise ValueError(f'{path} is no file of OpenS2V-Eval, which is an object {{id: {{"prompt", "img_paths"}}}}.')
    requests = []
    for id, item in found.items():
        where = f"{path}, {id!r:.60}"
        if not isinstance(item, dict):
            raise ValueError(f"{where} is {item!r:.60}; it must be an object with prompt and img_paths.")
        _check_id(id, (), where)
        check_text(item.get("prompt"), "prompt", where, empty=True)
        paths, labels = item.get("img_paths"), item.get("class_label")
        if not isinstance(paths, list):
            raise ValueError(f"{where}: img_paths is {paths!r:.60}; it must be a list, [] for none.")
        for number, name in enumerate(paths):
            check_text(name, f"img_paths[{number}]", where)
        named = labels if isinstance(labels, list) and len(labels) == len(paths) else [None] * len(paths)
        subjects = [label if isinstance(label, str) else None for label in named]
        references = tuple(
            Reference(path=folder / name, subject=subject) for name, subject in zip(paths, subjects, strict=True)
        )
        requests.append(Request(id=id, prompt=item["prompt"], references=references, where=where))
    return requests


def _check_id(id: str, others: Container[str], where: str) -> None:
    """Raises ValueError unless an id can name files and is no other request's."""
    if id in others or Path(id).name != id or id.startswith(".") or not id.isprintable():
        raise ValueError(f"{where}: id is {id!r:.60}; it must be a file's name that no other line has.")
    if len(id.encode()) > MAX_ID_BYTES:
        raise ValueError(
            f"{where}: id has {len(id.encode())} bytes; at most {MAX_ID_BYTES} leave room for its files' endings."
        )


def unreadable(requests: Sequence[Request]) -> dict[str, str]:
    """Reads every reference once, so that what can't be read is found before anything is sampled.

    Returns:
      The reason of each request that has such a reference, by its id, without a full stop.
    """
    found: dict[str, str] = {}
    for request in tqdm(requests, desc="check references", unit="request", delay=5):
        for reference in request.references:
            try:
                load_reference(reference, 16, 16)
            except (ValueError, OSError) as error:
                found.setdefault(request.id, str(error).rstrip("."))
    return found
