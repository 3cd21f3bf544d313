"""A folder of samples as a page, gallery.html: every video with its prompt, its references and how it was made."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from refalign_jax.atomic import write_text
from refalign_jax.config import flat_fields

GALLERY = "gallery.html"


def write_gallery(folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Writes the page; it shows the entries whose video is there.

    Args:
      folder: of the samples.
      entries: of its samples.json, as `outputs.read_samples` returns them.

    Raises:
      OSError: it can't be written.
    """
    shown = [_shown(entry) for entry in entries if (folder / entry["video"]).is_file()]
    write_text(folder / GALLERY, _environment().get_template(GALLERY).render(videos=shown))


def _shown(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows of an entry, whose fields may be of any kind."""
    references, made = entry.get("references"), entry.get("made")
    return {
        "id": entry["id"],
        "prompt": entry.get("prompt", ""),
        "video": quote(entry["video"]),
        "references": [
            {"image": quote(str(reference["image"])), "subject": reference.get("subject", "")}
            for reference in (references if isinstance(references, list) else [])
            if isinstance(reference, dict) and reference.get("image")
        ],
        "made": {name: json.dumps(value, ensure_ascii=False) for name, value in flat_fields(made).items()}
        if isinstance(made, dict)
        else {},
    }


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("refalign_jax.inference"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
