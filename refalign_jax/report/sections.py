"""The page's sections about one run: its picture, its samples and their evaluation, its losses and its recipe."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from refalign_jax.config import Config
from refalign_jax.data.images import read_image
from refalign_jax.data.video import probe, read_frames
from refalign_jax.report import content, figures
from refalign_jax.report.content import Clip, Section, Still
from refalign_jax.report.render import render
from refalign_jax.report.run import Confusion, Evaluation, Run, Sample

SHOWN = 1
"""Samples shown of each subject; of samples with several subjects, eight times as many."""
PICTURED = 6
"""Samples in the picture at the head of the page."""
STRIP = 5
"""Frames of a video that are shown side by side."""
LOSSES = {"loss": "Total loss", "flow": "Flow matching", "pull": "Pull, L₊", "push": "Push, L₋"}
UNKNOWN = "not recorded"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """One sample as the page shows it."""

    prompt: str
    references: tuple[tuple[Still, str], ...]
    """Reference images and their subjects."""
    frames: tuple[int, ...]
    """Numbers of the frames in the strips, counted from 0."""
    strips: tuple[Still, ...]
    """Frames side by side: of the sampled video and, if there is one, of the true clip."""
    clips: tuple[tuple[Clip, str], ...]
    """The same videos and their captions."""
    scores: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preview:
    """The newest preview that training drew."""

    still: Still
    clips: tuple[Clip, ...]


def set_up(run: Run) -> Section:
    """Numbers of the run, what started it, and its recipe."""
    config, made = run.config, run.about
    last = run.steps[-1]["step"] if run.steps else 0
    seconds = float(np.nansum(run.series("seconds")[1]))
    versions = {"refalign_jax": made.get("refalign_jax"), "python": made.get("python"), **_object(made.get("versions"))}
    alignment = config.model.alignment
    started = [_time(start) for start in run.starts] or [_time(made)]
    facts = [
        ("Steps", f"{last:,} of {config.train.steps:,}", False),
        ("Batch", config.data.batch_size, False),
        ("Seed", config.train.seed, False),
        ("Alignment λ", alignment.weight, False),
        (
            "Aligned blocks",
            f"{alignment.num_blocks if alignment.weight else 0} of {config.model.dit.num_layers}",
            False,
        ),
        ("Parameters", int(run.program["parameters"]) if "parameters" in run.program else UNKNOWN, False),
        ("Width", config.model.dit.width, False),
        ("Time of all steps", _duration(seconds) if seconds else UNKNOWN, False),
        ("Devices", made.get("devices", UNKNOWN), False),
        ("Started", started[0], False),
        *([("Continued", f"{started[-1]}, start {len(started)}", False)] if len(started) > 1 else []),
        ("Data", _data(config), True),
        ("Commit", made.get("commit", "unknown"), True),
        ("Command", made.get("command", UNKNOWN), True),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version), True),
    ]
    return Section(html=render("about.html", facts=facts, recipe=json.dumps(dataclasses.asdict(config), indent=1)))


def _time(made: Mapping[str, Any]) -> str:
    return str(made.get("time", UNKNOWN)).replace("T", " ").replace("+00:00", " UTC")


def pictures(run: Run) -> list[Still]:
    """The first samples, those with most references first: references, then three sampled frames."""
    chosen = sorted(run.samples, key=lambda sample: -len(sample.references))[:PICTURED]
    return [_picture(sample) for sample in sorted(chosen, key=run.samples.index)]


def _picture(sample: Sample) -> Still:
    count = probe(sample.video).num_frames
    frames = list(read_frames(sample.video, np.unique([0, count // 2, count - 1])))
    height, width = frames[0].shape[:2]
    references = [Image.fromarray(read_image(path)) for path, _ in sample.references]
    gap = max(width // 24, 1)
    sheet = Image.new("RGBA", ((len(frames) + len(references)) * (width + gap) + gap, height))
    for place, image in enumerate([*references, *map(Image.fromarray, frames)]):
        image.thumbnail((width, height))
        sheet.paste(image, (place * (width + gap) + 2 * gap * (place >= len(references)), 0))
    size = (sheet.width * _ENLARGED, sheet.height * _ENLARGED)
    shown = np.asarray(sheet.resize(size, Image.Resampling.BICUBIC) if height < 200 else sheet)
    return content.still(shown, f"References and three sampled frames: {sample.prompt}")


_ENLARGED = 2
"""Pixels for each of a small picture."""


def _data(config: Config) -> str:
    """The datasets, those of a mixture with their weights."""
    if config.data.mix:
        return " + ".join(f"{weight:g} {path}" for path, weight in config.data.mix)
    return config.data.path or f"{config.synthetic.num_examples} synthetic examples"


def losses(run: Run) -> Section:
    """The losses over the steps."""
    charts, zero = [], []
    for name, title in LOSSES.items():
        steps, values = run.series(name)
        if np.nan_to_num(values).any():
            charts.append(figures.losses(f"loss_{name}", title, (steps, values), run.series(f"held_out_{name}")))
        else:
            zero.append(title)
    held_out = len(run.series("held_out_loss")[0]) > 0
    html = render("losses.html", steps=run.steps, charts=charts, zero=zero, held_out=held_out)
    return Section(html=html, charts=tuple(charts))


def samples(run: Run) -> Section:
    """The references of each subject beside the videos that were sampled from them."""
    alone, several = by_subject(run.samples)
    chosen = [("Several subjects", several[: 8 * SHOWN])] if several else []
    chosen += [(subject, mine[:SHOWN]) for subject, mine in alone.items()]
    html = render(
        "samples.html",
        groups=[(heading, [_card(sample) for sample in group]) for heading, group in chosen],
        shown=sum(len(group) for _, group in chosen),
        total=len(run.samples),
        lost=run.lost,
        preview=None if run.samples else _preview(run.folder / "previews"),
    )
    return Section(html=html)


def evaluation(found: Evaluation | None) -> Section:
    """Measures and confusion matrices of the samples."""
    confusions = [(c.title, c.labels, _shaded(c)) for c in found.confusions] if found else []
    return Section(html=render("evaluation.html", found=found, confusions=confusions))


def _shaded(confusion: Confusion) -> list[tuple[str, list[tuple[float, float]]]]:
    """The rows of a confusion matrix: a label, and the count and the share of the row of each cell."""
    matrix = confusion.matrix
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    rows = zip(confusion.labels, matrix.tolist(), shares.tolist(), strict=True)
    return [(label, list(zip(counts, part, strict=True))) for label, counts, part in rows]


def _preview(folder: Path) -> Preview | None:
    """The newest preview; None if there is none."""
    pictures = sorted(folder.glob("step-*.png"))
    if not pictures:
        return None
    newest = pictures[-1]
    description = (
        f"The newest preview of training, {newest.stem}. Each row is an example: three sampled frames, the same frames "
        "of the clip, and the references, as colours of the principal components of their latents."
    )
    videos = sorted(folder.glob(f"{newest.stem}-*.mp4"))
    clips = tuple(content.clip(path, path.stem) for path in videos)
    return Preview(still=content.still(read_image(newest), description), clips=clips)


def by_subject(found: Iterable[Sample]) -> tuple[dict[str, list[Sample]], list[Sample]]:
    """Samples with one subject by its name, and the other samples."""
    alone: dict[str, list[Sample]] = {}
    several = []
    for sample in found:
        names = {subject for _, subject in sample.references}
        if len(names) == 1 and (name := names.pop()):
            alone.setdefault(name, []).append(sample)
        else:
            several.append(sample)
    return dict(sorted(alone.items())), _each_subject_early(several, set(alone))


def _each_subject_early(found: Iterable[Sample], seen: set[str | None]) -> list[Sample]:
    """Samples in order, except that samples with a subject that was not `seen` before come first."""
    fresh: list[Sample] = []
    rest: list[Sample] = []
    for sample in found:
        names = {subject for _, subject in sample.references}
        (rest if names <= seen else fresh).append(sample)
        seen = seen | names
    return fresh + rest


def _card(sample: Sample) -> Card:
    """Reads a sample's files."""
    references = []
    for path, subject in sample.references:
        name = subject or "unnamed"
        references.append((content.still(read_image(path), f"Reference image: {name}"), name))
    videos = {"sampled": sample.video} | ({"true clip": sample.truth} if sample.truth else {})
    frames = _evenly(probe(sample.video).num_frames)
    strips = [
        content.still(_strip(path), f"Frames of the video, {kind}, in order: {sample.prompt}")
        for kind, path in videos.items()
    ]
    return Card(
        prompt=sample.prompt,
        references=tuple(references),
        frames=tuple(frames),
        strips=tuple(strips),
        clips=tuple((content.clip(path, f"{kind}: {sample.prompt}"), kind) for kind, path in videos.items()),
        scores=sample.scores,
    )


def _evenly(count: int) -> list[int]:
    """Numbers of at most `STRIP` frames out of `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(STRIP, count)).round().astype(int)).tolist()


def _strip(path: Path) -> UInt8[np.ndarray, "h w 4"]:
    """Evenly spaced frames of a video side by side, with transparent gaps."""
    images = [Image.fromarray(frame) for frame in read_frames(path, _evenly(probe(path).num_frames))]
    for image in images:
        image.thumbnail((320, 320))
    width, height = images[0].size
    gap = max(width // 32, 1)
    sheet = Image.new("RGBA", (len(images) * (width + gap) - gap, height))
    for place, image in enumerate(images):
        sheet.paste(image, (place * (width + gap), 0))
    return np.asarray(sheet)


def _object(value: Any) -> Mapping[str, Any]:
    """A JSON object; empty where it is something else."""
    return value if isinstance(value, dict) else {}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
