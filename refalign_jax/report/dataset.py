"""A prepared dataset as one HTML file: what it holds, what was left out and why, and clips that play.

Clips and references are decoded from the latents that training reads, by the codec that made them.
"""

from __future__ import annotations

import collections
import dataclasses
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from refalign_jax.atomic import write_text
from refalign_jax.data.examples import fill
from refalign_jax.data.manifest import Manifest
from refalign_jax.data.shards import ShardSource
from refalign_jax.data.skips import read_skipped
from refalign_jax.data.video import to_pixels, write_latents
from refalign_jax.encoders.interface import VideoCodec
from refalign_jax.encoders.open import reopen_video_codec
from refalign_jax.provenance import about
from refalign_jax.report import content
from refalign_jax.report.content import Clip, Section, Still
from refalign_jax.report.render import render


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """One example."""

    id: str
    prompt: str
    clip: Clip
    frames: str
    """The first and the last frame of the video that the clip shows."""
    fps: float
    references: tuple[tuple[Still, str], ...]
    """Image and name of each."""
    dropped: tuple[tuple[str, str, str], ...]
    """Name, reason and detail of references that were left out."""


def write_dataset_page(dataset: str, out: Path, rows: int) -> None:
    """Writes a dataset as one HTML file that needs no other.

    Args:
      dataset: its folder, local or gs://.
      out: the HTML file.
      rows: number of examples to show, spread evenly over the dataset.

    Raises:
      ValueError: no such dataset, an example that can't be read, a codec whose weights are no longer where they were,
        or `out` is not an .html file in a folder that exists.
      OSError: the page can't be written.
    """
    if out.suffix != ".html" or not out.parent.is_dir() or rows < 1:
        raise ValueError(f"--page {out} with --rows {rows}: name an .html in a folder that exists, and 1 row or more.")
    source = ShardSource(dataset)
    manifest = source.manifest
    codec = reopen_video_codec(manifest.made["encoders"]["video"])
    indices = np.unique(np.linspace(0, len(source) - 1, rows).round().astype(int)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        cards = [_card(source, index, codec, Path(folder) / "clip.mp4") for index in tqdm(indices, "examples", delay=5)]
    examples = render("examples.html", cards=cards, total=manifest.num_examples)
    skipped = render("skipped.html", rows=_skipped(dataset, manifest.num_examples))
    made = render("about.html", facts=_facts(manifest), recipe=_pretty(manifest.made))
    page = render(
        "page.html",
        title=f"Prepared dataset {Path(dataset).name}",
        summary=_summary(manifest),
        paragraphs=(),
        pictures=(),
        sections=[
            ("examples", "Examples", Section(html=examples)),
            ("skipped", "Left out", Section(html=skipped)),
            ("set-up", "Set-up", Section(html=made)),
        ],
        made=about(),
    )
    write_text(out, page)


def _card(source: ShardSource, index: int, codec: VideoCodec, path: Path) -> Card:
    """Decodes one example."""
    arrays, about = source[index]
    metadata = about["metadata"]
    video = np.empty(arrays["video_latents"].shape, np.float32)
    fill(video, arrays, "video_latents")
    images = np.empty(arrays["reference_latents"].shape, np.float32)
    fill(images, arrays, "reference_latents")
    fps = float(metadata.get("fps") or 16)
    write_latents(path, video, codec, fps)
    pixels: Iterable[np.ndarray] = to_pixels(codec.decode(images[:, None]))[:, 0] if len(images) else []
    names = metadata.get("subjects") or []
    frames = metadata.get("frames") or [0]
    references = []
    for number, image in enumerate(pixels):
        name = (names[number] if number < len(names) else None) or f"subject {arrays['subject_ids'][number]}"
        references.append((content.still(image, f"Reference image: {name}"), name))
    return Card(
        id=about["id"],
        prompt=about["prompt"],
        clip=content.clip(path, f"The clip: {about['prompt']}"),
        frames=f"{frames[0]} to {frames[-1]}",
        fps=fps,
        references=tuple(references),
        dropped=tuple((d["subject"], d["reason"], d["detail"]) for d in metadata.get("dropped", ())),
    )


def _summary(manifest: Manifest) -> str:
    """The dataset in a sentence."""
    name = manifest.made.get("source", {}).get("name", "unknown")
    F, H, W, C = manifest.video_latents
    state = "" if manifest.complete else " It is unfinished."
    return (
        f"{manifest.num_examples:,} prepared examples from the source {name}, with video latents of {F} frames of "
        f"{H}x{W} and {C} channels.{state}"
    )


def _facts(manifest: Manifest) -> list[tuple[str, object, bool]]:
    """Names and values, and whether each takes the whole width."""
    spec, size = manifest.spec, sum(shard.bytes for shard in manifest.shards)
    counts = collections.Counter(count for shard in manifest.shards for count in shard.references)
    encoders = {name: described.get("name") for name, described in manifest.made.get("encoders", {}).items()}
    return [
        ("examples", manifest.num_examples, False),
        ("shards", len(manifest.shards), False),
        ("gigabytes", round(size / 1e9, 3), False),
        ("VFM tokens per reference", spec.vfm_tokens, False),
        ("longest prompt, tokens", spec.longest_text, False),
        ("examples by references", ", ".join(f"{counts[n]} with {n}" for n in sorted(counts)), True),
        ("encoders", ", ".join(f"{name} {kind}" for name, kind in encoders.items()), True),
    ]


def _pretty(made: Any) -> str:
    """How the dataset was made, a line per value."""
    lines = []
    for name, value in made.items():
        if name == "empty_text":  # thousands of numbers
            continue
        if isinstance(value, dict):
            lines += [f"{name}.{key} = {inner!r}" for key, inner in value.items()]
        else:
            lines.append(f"{name} = {value!r}")
    return "\n".join(lines)


def _skipped(dataset: str, examples: int) -> list[tuple[str, int, str, str]]:
    """Reason, count, share of all records and an example of what was left out, the most frequent first."""
    counts: collections.Counter[str] = collections.Counter()
    such: dict[str, str] = {}
    for entry in read_skipped(dataset):
        counts[entry.reason] += 1
        such.setdefault(entry.reason, entry.detail or entry.id)
    total = sum(counts.values()) + examples
    return [(reason, count, f"{count / total:.1%}", such[reason][:200]) for reason, count in counts.most_common()]
