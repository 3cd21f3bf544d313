"""The few pieces of HTML that the report is made of; every text is escaped here."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from refalign_jax.report.figures import Picture
from refalign_jax.report.theme import STYLE, subject_sign

ABSENT = "\u2013"
"""In place of a number that there is not."""


def number(value: object) -> str:
    """A value as a reader wants it: three digits that count; a dash where there is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return ABSENT
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text, of a class of the style sheet."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def outcome(sentences: Iterable[str]) -> str:
    """Sentences that say how it turned out, set apart."""
    return f'<div class="outcome">{"".join(map(paragraph, sentences))}</div>'


def section(name: str, title: str, parts: Iterable[str]) -> str:
    """A section that `#name` leads to."""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def facts(pairs: Mapping[str, object], wide: Sequence[str] = ()) -> str:
    """Names and values in columns; those of `wide` over the whole width."""
    return (
        "<dl>"
        + "".join(
            f"<div{' class=wide' if name in wide else ''}><dt>{escape(name)}</dt><dd>{escape(number(value))}</dd></div>"
            for name, value in pairs.items()
        )
        + "</dl>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]], total: Sequence[object] = ()) -> str:
    """A table that scrolls inside itself; the first column names the row."""

    def line(row: Sequence[object], kind: str = "") -> str:
        first, *rest = map(number, row)
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        return f'<tr{kind}><th scope="row">{escape(first)}</th>{cells}</tr>'

    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(map(line, rows)) + (line(total, ' class="total"') if total else "")
    return f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def confusion(labels: Sequence[str], matrix: np.ndarray) -> str:
    """A confusion matrix whose cells are shaded by their share of the row."""
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    head = "".join(f'<th scope="col">{escape(label)}</th>' for label in labels)
    rows = ""
    for label, counts, part in zip(labels, matrix.tolist(), shares, strict=True):
        cells = "".join(
            f'<td style="--share:{share:.3f}"{"" if count else " class=none"}>{escape(number(count))}</td>'
            for count, share in zip(counts, part, strict=True)
        )
        rows += f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>'
    return (
        f'<div class="scroll"><table class="confusion"><thead><tr><th scope="col">asked ↓ named →</th>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def figures(pictures: Iterable[Picture], least: int = 300) -> str:
    """Pictures side by side, as many as fit at `least` pixels each."""
    return f'<div class="figures" style="--least:{least}px">{"".join(map(_figure, pictures))}</div>'


def _figure(picture: Picture) -> str:
    light, dark = (_data(data, "image/png") for data in (picture.light, picture.dark))
    return (
        f"<figure><figcaption>{escape(picture.title)}</figcaption>"
        f'<picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img class="chart" src="{light}" alt="{escape(picture.alt)}" width="{picture.size[0]}" '
        f'height="{picture.size[1]}"></picture></figure>'
    )


def image(pixels: UInt8[np.ndarray, "h w _"], alt: str) -> str:
    """A picture, RGB or with transparency, no larger than 1,600 pixels."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((1600, 1600))
    file = io.BytesIO()
    picture.save(file, format="png")
    width, height = picture.size
    return f'<img src="{_data(file.getvalue(), "image/png")}" alt="{escape(alt)}" width="{width}" height="{height}">'


def video(path: Path, label: str) -> str:
    """A playable MP4."""
    source = _data(path.read_bytes(), "video/mp4")
    return f'<video src="{source}" aria-label="{escape(label)}" controls loop muted playsinline preload="auto"></video>'


def legend(names: Sequence[str]) -> str:
    """Subjects beside their signs."""
    signs = [subject_sign(i) for i in range(len(names))]
    items = "".join(
        f'<li><span style="color:{colour}" aria-hidden="true">{sign}</span> {escape(name)}</li>'
        for name, (colour, _, sign) in zip(names, signs, strict=True)
    )
    return f'<ul class="legend">{items}</ul>'


def page(title: str, body: str) -> str:
    """The whole document; it asks for nothing from anywhere."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>'
        f"<body>{body}<script>{SCRIPT}</script></body></html>\n"
    )


SCRIPT = """
for (const button of document.querySelectorAll("button.play")) {
  const videos = document.querySelectorAll("video");
  button.addEventListener("click", () => {
    const play = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", play);
    button.textContent = play ? "Pause all videos" : "Play all videos";
    for (const video of videos) play ? video.play() : video.pause();
  });
}
"""
"""Plays and pauses all videos at one press."""


def _data(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
