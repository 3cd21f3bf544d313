"""Videos that are asked for, as a JSONL file with one request per line.

    {"id": "walk", "prompt": "A cat walks over grass.",
     "references": [{"image": "cat.png", "subject": "cat", "mask": "cat_mask.png"}]}

`id`, `references`, `subject` and `mask` are optional. Paths are relative to the folder of the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from refalign_jax.data.json_lines import check_fields, check_text, read_lines
from refalign_jax.data.records import Reference
from refalign_jax.data.references import load_reference
from refalign_jax.data.sources.jsonl import parse_references

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
        if name in requests or Path(name).name != name or name.startswith(".") or not name.isprintable():
            raise ValueError(f"{where}: id is {name!r:.60}; it must be a file's name that no other line has.")
        if len(name.encode()) > MAX_ID_BYTES:
            raise ValueError(
                f"{where}: id has {len(name.encode())} bytes; at most {MAX_ID_BYTES} leave room for its files' endings."
            )
        references = parse_references(fields.get("references", []), where, path.parent)
        requests[name] = Request(id=name, prompt=fields["prompt"], references=references, where=where)
    if not requests:
        raise ValueError(f'{path} holds no request; a line is {{"prompt": …, "references": […]}}.')
    return list(requests.values())


def check_references(requests: Sequence[Request]) -> None:
    """Reads every reference once, so that what can't be read is found before anything is sampled.

    Raises:
      ValueError: references that can't be read, as `load_reference` says; the first few and how many there are.
    """
    found: list[str] = []
    for request in tqdm(requests, desc="check references", unit="request", delay=5):
        for reference in request.references:
            try:
                load_reference(reference, 16, 16)
            except (ValueError, OSError) as error:
                found.append(f"{request.where or request.id}: {str(error).rstrip('.')}")
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(f"{'; '.join(found[:3])}{more}.")
