"""Your own photograph as the demo's reference: the trained model is sampled with it at several places.

    FOLDER/photo/reference-0.png, …   the references that are made of the photograph
    FOLDER/photo/0.mp4, …             what the model samples
    FOLDER/photo/picture.png          all of them side by side

The demo's model has seen 16 subjects, so it can be expected to draw the one of them that the photograph resembles.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from scipy.ndimage import binary_fill_holes

from refalign_jax.config import GenerateConfig
from refalign_jax.convert.checkpoint import find_checkpoint
from refalign_jax.data.images import read_image
from refalign_jax.data.records import Reference
from refalign_jax.data.video import read_frames
from refalign_jax.demo.photographs import STORED, SUBJECTS, View, lay
from refalign_jax.demo.scenes import CELL, FPS, GRID, NUM_FRAMES, SIZE, Actor, Scene, write_png
from refalign_jax.demo.score import cut_out_frames, nearest
from refalign_jax.inference.generate import generate
from refalign_jax.inference.opening import open_generator
from refalign_jax.inference.requests import Request

_WHITE = 245
"""Smallest value of all three channels of a pixel that counts as white."""

SCENES = tuple(
    Scene((Actor("", half, column, move, View(mirrored=True, scale=0.85)),), background)
    for half, column, move, background in (
        ("upper", 0, "right", "studio"),
        ("lower", 3, "left", "leaves"),
        ("lower", 1, "still", "dusk"),
        ("upper", 2, "still", "wood"),
    )
)
"""Where the photograph's subject is put; the actors have no name."""


def cut_photograph(pixels: UInt8[np.ndarray, "h w 3"]) -> Image.Image:
    """Cuts the subject out of a photograph, as `photographs.cut_out` returns those of the demo.

    On a white ground, the subject is what is not white; otherwise it is the disc in the middle.
    """
    height, width = pixels.shape[:2]
    white = np.asarray((pixels >= _WHITE).all(-1))
    border = np.concatenate([white[0], white[-1], white[:, 0], white[:, -1]])
    if border.mean() > 0.6 and not white.all():
        inside = binary_fill_holes(~white)
        rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
        box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    else:
        y, x = np.mgrid[:height, :width]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        inside = np.hypot(y + 0.5 - top - side / 2, x + 0.5 - left - side / 2) <= side / 2
        box = (left, top, left + side, top + side)
    whole = np.dstack([pixels, 255 * inside]).astype(np.uint8)
    left, top, right, bottom = map(int, box)
    cut = Image.fromarray(whole).crop((left, top, right, bottom))
    square = Image.new("RGBA", (max(cut.size),) * 2, (0, 0, 0, 0))
    square.paste(cut, ((square.width - cut.width) // 2, (square.height - cut.height) // 2))
    return square.resize((STORED, STORED), Image.Resampling.LANCZOS)


def sample_photograph(photograph: Path, run: Path) -> tuple[Path, str]:
    """Samples a trained run with a photograph as its reference.

    Args:
      photograph: the image file.
      run: folder of the run; the results go beside it.

    Returns:
      Path of the picture, and a sentence that says which of the demo's subjects the samples resemble.

    Raises:
      ValueError: there is no trained run, or the file is no image.
      OSError: a file can't be written.
    """
    subject = cut_photograph(read_image(photograph))
    if not (run / "evaluation.json").is_file():
        raise ValueError(f"{run} holds no finished run of the demo; run the demo without --photo first.")
    find_checkpoint(run)
    folder = run.parent / "photo"
    folder.mkdir(exist_ok=True)
    requests, images = [], []
    for number, scene in enumerate(SCENES):
        images.append(_reference(subject, scene.actors[0]))
        path = folder / f"reference-{number}.png"
        write_png(path, images[-1])
        references = (Reference(path=path, subject="photograph"),)
        requests.append(Request(id=str(number), prompt=scene.caption(), references=references))
    entries = generate(requests, folder, open_generator(str(run), GenerateConfig(batch_size=len(SCENES), fps=FPS)))
    rows, found = [], []
    for entry, image, scene in zip(entries, images, SCENES, strict=True):
        video = read_frames(folder / entry["video"], np.arange(NUM_FRAMES))
        rows.append(np.concatenate([image, *video[[0, NUM_FRAMES // 2, -1]]], axis=1))
        found.append(_resembled(video, scene))
    picture = np.concatenate(rows).repeat(2, axis=0).repeat(2, axis=1)
    write_png(folder / "picture.png", picture)
    counts = ", ".join(f"{name} ({count} of {len(found)})" for name, count in Counter(found).most_common())
    return folder / "picture.png", (
        f"Of the {len(SUBJECTS)} subjects of the demo, the samples resemble most: {counts}."
    )


def _reference(subject: Image.Image, actor: Actor) -> UInt8[np.ndarray, "h w 3"]:
    """The photograph's subject on white, as the demo's references show theirs."""
    row, column = actor.cell(0)
    centre = ((row + SIZE / 2) * CELL, (column + SIZE / 2) * CELL)
    return lay(subject, actor.reference, centre, SIZE * CELL, np.full((GRID * CELL, GRID * CELL, 3), 255, np.uint8))


def _resembled(video: UInt8[np.ndarray, "T h w 3"], scene: Scene) -> str:
    actor = dataclasses.replace(scene.actors[0], subject=next(iter(SUBJECTS)))
    return nearest(cut_out_frames(video, actor), actor, scene.background)
