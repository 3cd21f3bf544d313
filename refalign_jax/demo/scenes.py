"""The demo's clips: photographs from scikit-image and scikit-learn that move over photographic backgrounds.

Everything lies on a grid of 6 x 6 cells of 16 pixels; a cell is one token of the DiT behind a codec of stride 8. A
subject is a square photograph of 3 x 3 cells. Its reference shows it on white, at the size and the position that it has
in the first frame of the clip. The subject rests, or moves by one cell per latent frame, in a jump between two latent
frames, so that it rests within each. That makes the demo small enough for a CPU: to show a subject, the model copies
nine tokens from its reference, and the caption says how far they move.

The stand-in text encoder knows words, but not their order. Therefore a position is one word; of two subjects, the one
in the upper half is named first; and the movements of the second have their own words. Otherwise a caption could not
say which movement belongs to which subject.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
from jaxtyping import UInt8
from PIL import Image
from sklearn.datasets import load_sample_image
from tqdm import tqdm

from refalign_jax.atomic import atomic_write
from refalign_jax.data.records import Record, Reference
from refalign_jax.data.video import Box, write_video

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


def _bundled(name: str) -> UInt8[np.ndarray, "h w 3"]:
    """Reads a photograph of scikit-image that its functions would download, although the package contains it."""
    return np.asarray(Image.open(Path(skimage.data.__file__).parent / name).convert("RGB"))


_Source = tuple[Callable[[], np.ndarray], Box]

SUBJECTS: dict[str, _Source] = {
    "astronaut": (skimage.data.astronaut, (150, 0, 300, 150)),
    "cat": (skimage.data.chelsea, (110, 10, 390, 290)),
    "coffee": (skimage.data.coffee, (130, 0, 510, 380)),
    "coin": (skimage.data.coins, (318, 10, 374, 66)),
    "flower": (lambda: load_sample_image("flower.jpg"), (165, 85, 475, 395)),
    "motorcycle": (lambda: _bundled("motorcycle_left.png"), (110, 30, 570, 490)),
    "pagoda": (lambda: load_sample_image("china.jpg"), (60, 20, 340, 300)),
    "photographer": (skimage.data.camera, (90, 30, 350, 290)),
    "retina": (skimage.data.retina, (0, 0, 1411, 1411)),
    "rocket": (skimage.data.rocket, (215, 127, 515, 427)),
    "helmet": (skimage.data.astronaut, (270, 320, 462, 512)),
    "tissue": (skimage.data.immunohistochemistry, (180, 260, 432, 512)),
}
"""A photograph for each subject, and the square in it that shows the subject."""

BACKGROUNDS: dict[str, _Source] = {
    "bricks": (skimage.data.brick, (0, 0, 150, 150)),
    "lake": (lambda: load_sample_image("china.jpg"), (400, 60, 640, 300)),
    "leaves": (lambda: load_sample_image("flower.jpg"), (0, 0, 170, 170)),
    "moon": (skimage.data.moon, (60, 60, 260, 260)),
    "wood": (skimage.data.coffee, (0, 0, 130, 130)),
}
"""A photograph for each background, and the square in it that fills the frame."""

HALVES = {"upper": 0, "lower": GRID - SIZE}
"""Row of a subject's upper left cell."""

COLUMNS = ("left", "mid-left", "mid-right", "right")
"""Names of the columns, from 0, in which a subject's upper left cell can be."""

MOVES = {"still": 0, "left": -1, "right": 1}
"""Columns per latent frame."""

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
        """Describes the scene; different scenes have different captions."""
        parts = [
            f"the {actor.subject} starts {actor.half}-{COLUMNS[actor.column]} and {moves[actor.move]}"
            for actor, moves in zip(self.actors, (_FIRST, _SECOND), strict=False)
        ]
        return f"T{', '.join(parts)[1:]}, over the {self.background}."


@functools.cache
def photograph(name: str, side: int) -> UInt8[np.ndarray, "side side 3"]:
    """A subject or a background at `side` x `side` pixels. The array is cached: do not write to it."""
    read, box = (SUBJECTS | BACKGROUNDS)[name]
    square = Image.fromarray(np.asarray(read())).convert("RGB").crop(box)
    return np.asarray(square.resize((side, side), Image.Resampling.LANCZOS))


def frames(scene: Scene) -> UInt8[np.ndarray, "T h w 3"]:
    """Renders a scene."""
    shots = np.stack([photograph(scene.background, GRID * CELL)] * LATENT_FRAMES)
    for number, shot in enumerate(shots):
        for actor in scene.actors:
            shot[region(actor, number)] = photograph(actor.subject, SIZE * CELL)
    return shots[[0, *np.repeat(np.arange(1, LATENT_FRAMES), 4)]]


def region(actor: Actor, latent_frame: int) -> tuple[slice, slice]:
    """Rows and columns of the pixels that an actor covers in a latent frame."""
    return tuple(slice(cell * CELL, (cell + SIZE) * CELL) for cell in actor.cell(latent_frame))  # type: ignore[return-value]


def reference(actor: Actor) -> UInt8[np.ndarray, "h w 3"]:
    """Renders an actor's reference image: its subject on white, where it starts."""
    canvas = np.full((GRID * CELL, GRID * CELL, 3), 255, np.uint8)
    canvas[region(actor, 0)] = photograph(actor.subject, SIZE * CELL)
    return canvas


def reference_path(folder: Path, actor: Actor) -> Path:
    """Path of an actor's reference image, as `write_clips` writes it."""
    return folder / "references" / f"{actor.subject}-{actor.half}-{COLUMNS[actor.column]}.png"


def draw_scenes(number: int, seed: int) -> list[Scene]:
    """Draws different scenes, each with one subject or two.

    Raises:
      ValueError: `number` is not between 1 and 10000; there are not many more different scenes.
    """
    if not 1 <= number <= 10_000:
        raise ValueError(f"The demo can't draw {number} clips; ask for 1 to 10000.")
    rng = np.random.default_rng(seed)
    scenes: dict[Scene, None] = {}
    while len(scenes) < number:
        scenes[_draw(rng)] = None
    return list(scenes)


def _draw(rng: np.random.Generator) -> Scene:
    """Draws one scene."""
    subjects = rng.choice(list(SUBJECTS), size=rng.integers(1, 3), replace=False).tolist()
    halves = list(HALVES) if len(subjects) == 2 else [str(rng.choice(list(HALVES)))]
    actors = [Actor(subject, half, *_draw_way(rng)) for subject, half in zip(subjects, halves, strict=True)]
    return Scene(tuple(actors), str(rng.choice(list(BACKGROUNDS))))


def _draw_way(rng: np.random.Generator) -> tuple[int, str]:
    """Draws a start column and a movement that stays inside the frame."""
    while True:
        column, move = int(rng.integers(len(COLUMNS))), str(rng.choice(list(MOVES)))
        if 0 <= column + (LATENT_FRAMES - 1) * MOVES[move] < len(COLUMNS):
            return column, move


def write_clips(folder: Path, scenes: Sequence[Scene]) -> list[Record]:
    """Writes the clips and references that do not exist yet, and returns the records of all scenes."""
    for name in ("clips", "references"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    records = []
    for number, scene in enumerate(tqdm(scenes, unit="clip", desc="clips")):
        path = folder / "clips" / f"{number:05d}.mp4"
        if not path.exists():
            write_video(path, frames(scene), FPS, QUALITY)
        for actor in scene.actors:
            if not (image := reference_path(folder, actor)).exists():
                _write_png(image, reference(actor))
        records.append(
            Record(
                id=path.stem,
                video=path,
                prompt=scene.caption(),
                references=tuple(
                    Reference(path=reference_path(folder, actor), subject=actor.subject) for actor in scene.actors
                ),
                metadata={"scene": dataclasses.asdict(scene)},
            )
        )
    return records


def _write_png(path: Path, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
    with atomic_write(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="png")


def read_scene(values: Mapping[str, Any]) -> Scene:
    """Reads a scene from an example's metadata, where `dataclasses.asdict` wrote it."""
    return Scene(tuple(Actor(**actor) for actor in values["actors"]), values["background"])
