"""The page's sections about one run: what it was, its losses, its samples, its evaluation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from html import escape
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from refalign_jax.data.video import probe, read_frames, read_image
from refalign_jax.report import figures, html
from refalign_jax.report.measures import Part
from refalign_jax.report.run import Evaluation, Run, Sample

SHOWN = 4
"""Samples of one subject that the page shows; of those with several subjects, three times as many."""
STRIP = 5
"""Frames of a sampled video that lie side by side."""
LOSSES = {"loss": "Total loss", "flow": "Flow matching", "pull": "Pull, L₊", "push": "Push, L₋"}


def about(run: Run) -> str:
    """What the run was."""
    config, made = run.config, run.about
    last = run.steps[-1]["step"] if run.steps else 0
    seconds = float(np.nansum(run.series("seconds")[1]))
    versions = {"refalign_jax": made.get("refalign_jax"), "python": made.get("python"), **made.get("versions", {})}
    alignment = config.model.alignment
    facts: dict[str, object] = {
        "Steps": f"{last:,} of {config.train.steps:,}",
        "Batch": config.data.batch_size,
        "Seed": config.train.seed,
        "Alignment λ": alignment.weight,
        "Aligned blocks": f"{alignment.num_blocks if alignment.weight else 0} of {config.model.dit.num_layers}",
        "Parameters": int(run.program["parameters"]) if "parameters" in run.program else "not told",
        "Width": config.model.dit.width,
        "Training time": _duration(seconds) if seconds else "not told",
        "Devices": made.get("devices", "not told"),
        "Started": made.get("time", "not told").replace("T", " ").replace("+00:00", " UTC"),
        "Data": config.data.path or f"{config.synthetic.num_examples} synthetic examples",
        "Commit": made.get("commit", "unknown"),
        "Command": made.get("command", "not told"),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
    }
    recipe = json.dumps(dataclasses.asdict(config), indent=1)
    return (
        html.facts(facts, wide=("Data", "Commit", "Command", "Versions"))
        + "<details><summary>The whole configuration</summary>"
        + f'<div class="scroll"><pre>{escape(recipe)}</pre></div></details>'
    )


def losses(run: Run) -> Part:
    """The losses over the steps."""
    if not run.steps:
        return Part(html=html.paragraph("The run has no metrics.jsonl with steps, so there are no losses to draw."))
    pictures, absent = [], []
    for name, title in LOSSES.items():
        steps, values = run.series(name)
        if np.nan_to_num(values).any():
            pictures.append(figures.losses(f"loss_{name}", title, (steps, values), run.series(f"held_out_{name}")))
        else:
            absent.append(title)
    parts = [html.figures(pictures, 440)]
    if absent:
        parts.append(html.paragraph(f"Zero throughout, and not drawn: {'; '.join(absent)}.", "note"))
    if not len(run.series("held_out_loss")[0]):
        parts.append(html.paragraph("The run measured no held-out losses.", "note"))
    return Part(html="".join(parts), pictures=tuple(pictures))


def samples(run: Run) -> str:
    """Each subject's references beside what was sampled from them."""
    if not run.samples:
        lost = f" ({run.lost} are listed, but their files are gone)" if run.lost else ""
        return html.paragraph(f"The run's folder has no sampled videos{lost}.") + _preview(run)
    alone, several = _by_subject(run.samples)
    parts = ['<p><button type="button" class="play" aria-pressed="false">Play all videos</button></p>']
    for subject, mine in alone.items():
        parts.append(f"<h3>{escape(subject)}</h3>")
        parts += map(_card, mine[:SHOWN])
    if several:
        parts += ["<h3>Several subjects</h3>", *map(_card, several[: 3 * SHOWN])]
    shown = sum(len(mine[:SHOWN]) for mine in alone.values()) + len(several[: 3 * SHOWN])
    if shown < len(run.samples):
        parts.append(html.paragraph(f"{shown} of {len(run.samples)} samples are shown.", "note"))
    if run.lost:
        parts.append(html.paragraph(f"{run.lost} samples are listed whose files are gone.", "note"))
    return "".join(parts)


def _preview(run: Run) -> str:
    """The newest preview that training drew, where it drew any."""
    pictures = sorted((run.folder / "previews").glob("step-*.png"))
    if not pictures:
        return ""
    newest = pictures[-1]
    said = (
        f"The newest preview of training, {newest.stem}: a row an example; three frames sampled, the same of the clip, "
        "and the references, in principal colours of their latents."
    )
    videos = "".join(
        f'<figure class="video">{html.video(path, path.stem)}</figure>'
        for path in sorted(newest.parent.glob(f"{newest.stem}-*.mp4"))
    )
    picture = f'<figure class="frames">{html.image(read_image(newest), said)}</figure>'
    return f'{html.paragraph(said)}<div class="media">{picture}{videos}</div>'


def evaluation(found: Evaluation | None) -> str:
    """Numbers and confusion matrices of the samples."""
    if found is None:
        return html.paragraph("The run's folder has no evaluation.json.")
    parts = [html.paragraph(found.title, "lead")]
    if found.numbers:
        parts.append(html.table(("number", "value"), found.numbers.items()))
    matrices = [
        f"<div><h3>{escape(confusion.title)}</h3>{html.confusion(confusion.labels, confusion.matrix)}</div>"
        for confusion in found.confusions
    ]
    parts.append(f'<div class="confusions">{"".join(matrices)}</div>')
    parts += [html.paragraph(note, "note") for note in found.notes]
    return "".join(parts)


def _by_subject(found: Iterable[Sample]) -> tuple[dict[str, list[Sample]], list[Sample]]:
    """Samples of one subject by its name, and those of none or several."""
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
    """Samples in order, but first those that show somebody who was not `seen` before."""
    fresh: list[Sample] = []
    rest: list[Sample] = []
    for sample in found:
        names = {subject for _, subject in sample.references}
        (rest if names <= seen else fresh).append(sample)
        seen = seen | names
    return fresh + rest


def _card(sample: Sample) -> str:
    """One sample: references, frames, video, scores."""
    media = []
    for path, subject in sample.references:
        who = subject or "reference"
        media.append(
            f'<figure class="reference">{html.image(read_image(path), f"Reference: {who}")}'
            f"<figcaption>{escape(who)}, as given</figcaption></figure>"
        )
    rows = [("sampled", sample.video)] + ([("true", sample.truth)] if sample.truth else [])
    strips, numbers = "", list[int]()
    for kind, path in rows:
        numbers, pixels = _strip(path)
        strips += html.image(pixels, f"Frames of the {kind} video, in order: {sample.prompt}")
    order = ": sampled, and the true clip below" if sample.truth else ", sampled"
    told = f"Frames {', '.join(map(str, numbers))}{order}"
    media.append(f'<figure class="frames">{strips}<figcaption>{told}</figcaption></figure>')
    for kind, path in rows:
        caption = "sampled" if kind == "sampled" else "true clip"
        media.append(
            f'<figure class="video">{html.video(path, f"{caption}: {sample.prompt}")}'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    scores = "".join(f"<li>{escape(name)} <b>{escape(html.number(v))}</b></li>" for name, v in sample.scores.items())
    return (
        f'<article class="sample"><p class="prompt">{escape(sample.prompt)}</p>'
        f'<div class="media">{"".join(media)}</div>'
        + (f'<ul class="scores">{scores}</ul>' if scores else "")
        + "</article>"
    )


def _strip(path: Any) -> tuple[list[int], UInt8[np.ndarray, "h w 4"]]:
    """Numbers of evenly spread frames of a video, and the frames side by side with a transparent gap."""
    count = probe(path).num_frames
    numbers = np.unique(np.linspace(0, count - 1, min(STRIP, count)).round().astype(int)).tolist()
    images = [Image.fromarray(frame) for frame in read_frames(path, numbers)]
    for image in images:
        image.thumbnail((320, 320))
    width, height = images[0].size
    gap = max(width // 32, 1)
    sheet = Image.new("RGBA", (len(images) * (width + gap) - gap, height))
    for place, image in enumerate(images):
        sheet.paste(image, (place * (width + gap), 0))
    return numbers, np.asarray(sheet)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
