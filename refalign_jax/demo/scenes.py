"""The demo's clips: subjects cut out of photographs that move over photographic backgrounds.

Everything lies on a grid of 6 x 6 cells of 16 pixels; a cell is one token of the DiT behind a codec of stride 8. A
subject has 3 x 3 cells. It rests, or moves by one cell per latent frame, in a jump between two latent frames, so that
it rests within each.

A reference shows its subject on white around the place where the clip begins, from another side than the clip, which
shows it as photographed: mirrored, turned by up to 15 degrees, smaller, and in another light. The caption says where it
starts and how it moves, but not what it is: only the reference shows that.

The stand-in text encoder knows words, but not their order. Therefore a position is one word; the first subject is the
one in the upper half; and what the second does has words of its own. Otherwise a caption could not say which movement
belongs to which subject.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from refalign_jax.atomic import atomic_write
from refalign_jax.data.records import Record, Reference
from refalign_jax.data.video import write_video
from refalign_jax.demo.photographs import BACKGROUNDS, SUBJECTS, View, background, cut_out, lay

CELL = 16
"""Side of a cell in pixels: one token, two latent pixels of stride 8."""
GRID = 6
"""Cells along a side of the frame."""
SIZE = 3
"""Cells along a side of a subject."""
LATENT_FRAMES = 3
NUM_FRAMES = 4 * (LATENT_FRAMES - 1) + 1
FPS = 8
QUALITY = 8
"""x264's constant rate factor: no visible loss, and unlike lossless files playable everywhere."""

HALVES = {"upper": 0, "lower": GRID - SIZE}
"""Row of a subject's upper left cell."""

COLUMNS = ("left", "mid-left", "mid-right", "right")
"""Names of the columns, from 0, in which a subject's upper left cell can be."""

MOVES = {"still": 0, "left": -1, "right": 1}
"""Columns per latent frame."""

TURN, SCALES, LIGHTS = 15.0, (0.75, 0.95), (0.8, 1.2)
"""How references differ from the clip: largest turn in degrees, ranges of scale and of brightness."""

AS_PHOTOGRAPHED = View(mirrored=False)
"""How the clips show their subjects."""

_FIRST = {"still": "stays", "left": "moves left", "right": "moves right"}
_SECOND = {"still": "rests", "left": "drifts leftwards", "right": "drifts rightwards"}


@dataclasses.dataclass(frozen=True)
class Actor:
    """A subject and its movement through a clip."""

    subject: str
    half: str
    """One of `HALVES`."""
    column: int
    """Column of its upper left cell in the first latent frame, from 0."""
    move: str
    """One of `MOVES`."""
    reference: View
    """How its reference shows it."""

    def cell(self, latent_frame: int) -> tuple[int, int]:
        """Row and column of its upper left cell in a latent frame."""
        return HALVES[self.half], self.column + latent_frame * MOVES[self.move]


@dataclasses.dataclass(frozen=True)
class Scene:
    """The content of a clip."""

    actors: tuple[Actor, ...]
    """One actor, or one in the upper half and one in the lower."""
    background: str

    def caption(self) -> str:
        """Describes the scene without naming its subjects."""
        openings = ("something", "something else")
        parts = [
            f"{opening} starts {actor.half}-{COLUMNS[actor.column]} and {moves[actor.move]}"
            for actor, opening, moves in zip(self.actors, openings, (_FIRST, _SECOND), strict=False)
        ]
        return f"S{', '.join(parts)[1:]}, over the {self.background}."


def draw(
    actor: Actor, latent_frame: int, canvas: UInt8[np.ndarray, "h w 3"], view: View = AS_PHOTOGRAPHED
) -> UInt8[np.ndarray, "h w 3"]:
    """Draws an actor where it is in a latent frame, in a view of it; `canvas` is not changed."""
    row, column = actor.cell(latent_frame)
    centre = ((row + SIZE / 2) * CELL, (column + SIZE / 2) * CELL)
    return lay(cut_out(actor.subject), view, centre, SIZE * CELL, canvas)


def frames(scene: Scene) -> UInt8[np.ndarray, "T h w 3"]:
    """Renders a scene."""
    shots = []
    for number in range(LATENT_FRAMES):
        shot = background(scene.background, GRID * CELL)
        for actor in scene.actors:
            shot = draw(actor, number, shot)
        shots.append(shot)
    return np.stack(shots)[[0, *np.repeat(np.arange(1, LATENT_FRAMES), 4)]]


def region(actor: Actor, latent_frame: int) -> tuple[slice, slice]:
    """Rows and columns of the pixels that an actor covers in a latent frame."""
    return tuple(slice(cell * CELL, (cell + SIZE) * CELL) for cell in actor.cell(latent_frame))  # type: ignore[return-value]


def reference(actor: Actor) -> UInt8[np.ndarray, "h w 3"]:
    """Renders an actor's reference image: its subject on white, where it starts, from another side."""
    return draw(actor, 0, np.full((GRID * CELL, GRID * CELL, 3), 255, np.uint8), actor.reference)


def reference_path(folder: Path, clip: str, number: int) -> Path:
    """Path of the reference image of a clip's actor, as `write_clips` writes it."""
    return folder / "references" / f"{clip}-{number}.png"


def draw_scenes(number: int, seed: int, subjects: Sequence[str] = tuple(SUBJECTS)) -> list[Scene]:
    """Draws scenes, each with one subject or two.

    Raises:
      ValueError: `number` is not between 1 and 100000.
    """
    if not 1 <= number <= 100_000:
        raise ValueError(f"The demo can't draw {number} clips; ask for 1 to 100000.")
    rng = np.random.default_rng(seed)
    return [_draw(rng, subjects) for _ in range(number)]


def _draw(rng: np.random.Generator, known: Sequence[str]) -> Scene:
    """Draws one scene."""
    subjects = rng.choice(list(known), size=rng.integers(1, 3), replace=False).tolist()
    halves = list(HALVES) if len(subjects) == 2 else [str(rng.choice(list(HALVES)))]
    actors = [
        Actor(subject, half, *_draw_way(rng), _draw_view(rng)) for subject, half in zip(subjects, halves, strict=True)
    ]
    return Scene(tuple(actors), str(rng.choice(list(BACKGROUNDS))))


def _draw_way(rng: np.random.Generator) -> tuple[int, str]:
    """Draws a start column and a movement that stays inside the frame."""
    while True:
        column, move = int(rng.integers(len(COLUMNS))), str(rng.choice(list(MOVES)))
        if 0 <= column + (LATENT_FRAMES - 1) * MOVES[move] < len(COLUMNS):
            return column, move


def _draw_view(rng: np.random.Generator) -> View:
    """Draws how a reference shows its subject."""
    turn, scale, light = (round(float(rng.uniform(*ends)), 3) for ends in ((-TURN, TURN), SCALES, LIGHTS))
    return View(True, turn, scale, light)


def write_clips(folder: Path, scenes: Sequence[Scene], prefix: str = "") -> list[Record]:
    """Writes the clips and references that do not exist yet, and returns the records of all scenes.

    Args:
      folder: gets `clips` and `references`.
      scenes: what the clips show; the same number shows the same scene whenever the folder is written to.
      prefix: what the ids begin with, before the number.
    """
    for name in ("clips", "references"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    records = []
    for number, scene in enumerate(tqdm(scenes, unit="clip", desc="clips")):
        path = folder / "clips" / f"{prefix}{number:05d}.mp4"
        if not path.exists():
            write_video(path, frames(scene), FPS, QUALITY)
        references = []
        for place, actor in enumerate(scene.actors):
            if not (image := reference_path(folder, path.stem, place)).exists():
                write_png(image, reference(actor))
            references.append(Reference(path=image, subject=actor.subject))
        records.append(
            Record(
                id=path.stem,
                video=path,
                prompt=scene.caption(),
                references=tuple(references),
                metadata={"scene": dataclasses.asdict(scene)},
            )
        )
    return records


def write_png(path: Path, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
    """Writes an image."""
    with atomic_write(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="png")


def read_scene(values: Mapping[str, Any]) -> Scene:
    """Reads a scene from an example's metadata, where `dataclasses.asdict` wrote it."""
    actors = tuple(Actor(**{**actor, "reference": View(**actor["reference"])}) for actor in values["actors"])
    return Scene(actors, values["background"])
