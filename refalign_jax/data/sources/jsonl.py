"""Your own data: a JSONL file with one clip per line.

    {"video": "clips/cat.mp4", "prompt": "A cat walks over grass.",
     "references": [{"image": "cat.png", "mask": "cat_mask.png", "subject": "cat"}]}

`mask` and `subject` are optional. Paths are relative to the folder of the file; URLs of fsspec, such as
`gs://bucket/cat.mp4`, are files elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from refalign_jax.data.json_lines import check_fields, check_text, read_lines
from refalign_jax.data.records import Record, Reference
from refalign_jax.data.stored import file_at

_FIELDS = {"video": True, "prompt": True, "references": True}
_REFERENCE_FIELDS = {"image": True, "subject": False, "mask": False}
"""The fields of a line and of a reference in it, and whether each is required."""


def read_jsonl(path: str | Path) -> list[Record]:
    """Reads a JSONL file of records in the form that this module describes.

    A record's id is the video's name and eight digits of a hash of the line's content, so it does not depend on the
    line's number.

    Raises:
      ValueError: no such file, a file without lines, a line in another form, or two equal lines.
    """
    path = Path(path)
    records: dict[str, Record] = {}
    numbers: dict[str, int] = {}
    for number, fields in read_lines(path):
        record = _parse(fields, f"{path}, line {number}", path.parent)
        if record.id in records:
            raise ValueError(f"{path}, line {number} says the same as line {numbers[record.id]}; remove one of them.")
        records[record.id], numbers[record.id] = record, number
    if not records:
        raise ValueError(f'{path} holds no record; a line is {{"video": …, "prompt": …, "references": […]}}.')
    return list(records.values())


def parse_references(entries: Any, where: str, folder: Path) -> tuple[Reference, ...]:
    """Reads the field `references` of a line.

    Args:
      entries: the field's value.
      where: file and line, for messages.
      folder: what the paths in it are relative to.

    Raises:
      ValueError: it is not a list of {"image", "subject"?, "mask"?}.
    """
    if not isinstance(entries, list):
        raise ValueError(f"{where}: references is {entries!r:.60}; it must be a list, [] for none.")
    for index, entry in enumerate(entries):
        name = f"references[{index}]"
        check_fields(entry, _REFERENCE_FIELDS, f"{where}: {name}")
        for key, value in entry.items():
            check_text(value, f"{name}.{key}", where)
    return tuple(
        Reference(
            path=file_at(entry["image"], folder),
            mask=file_at(entry["mask"], folder) if "mask" in entry else None,
            subject=entry.get("subject"),
        )
        for entry in entries
    )


def _parse(fields: Any, where: str, folder: Path) -> Record:
    """Reads one line."""
    check_fields(fields, _FIELDS, where)
    for name in ("video", "prompt"):
        check_text(fields[name], name, where, empty=name == "prompt")
    references = parse_references(fields["references"], where, folder)
    content = json.dumps(fields, sort_keys=True, ensure_ascii=False)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    return Record(
        id=f"{Path(fields['video']).stem}-{digest}",
        video=file_at(fields["video"], folder),
        prompt=fields["prompt"],
        references=references,
        metadata={"video": fields["video"], "references": fields["references"]},
    )
