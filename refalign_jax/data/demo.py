"""The demo's records: photographs that scikit-image and scikit-learn carry, moved over photographic backgrounds.

Everything lies on a grid of 6 x 6 cells of 16 pixels, each one token of the DiT behind a codec of stride 8. A subject
is a square photograph of 3 x 3 cells; a reference shows it on white at the very size it has in the clips. It rests or
moves by one cell a latent frame, in a jump between two of them, so that every latent frame shows it at rest. That makes
the demo small enough for a CPU: to place a subject is to copy nine tokens out of its reference.

The stand-in text encoder knows words, but not their order. So captions speak of their second subject in words of its
own (tier for row, place for column, drifts for moves): else nobody could tell whose row is whose.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
from jaxtyping import UInt8
from PIL import Image
from sklearn.datasets import load_sample_image
from tqdm import tqdm

from refalign_jax.data.records import Record, Reference
from refalign_jax.data.video import Box, write_video

CELL = 16
"""Side of a cell in pixels: a token, two latent pixels of stride 8."""
GRID = 6
"""Cells along a side of the frame."""
SIZE = 3
"""Cells along a side of a subject."""
HOME = 1
"""Row and column, from 0, of the subject's first cell in a reference."""
LATENT_FRAMES = 3
NUM_FRAMES = 4 * (LATENT_FRAMES - 1) + 1
FPS = 8
QUALITY = 8
"""x264's rate factor of the clips: of no visible loss, and playable everywhere, as lossless files are not."""


def _bundled(name: str) -> UInt8[np.ndarray, "h w 3"]:
    """A photograph that lies in scikit-image's package but has no function that needs no download."""
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
"""Each a photograph and the square of it that shows the subject."""

BACKGROUNDS: dict[str, _Source] = {
    "grass": (skimage.data.grass, (0, 0, 384, 384)),
    "gravel": (skimage.data.gravel, (0, 0, 384, 384)),
    "bricks": (skimage.data.brick, (0, 0, 512, 512)),
    "stars": (skimage.data.hubble_deep_field, (100, 100, 484, 484)),
    "wood": (skimage.data.coffee, (0, 0, 130, 130)),
}
"""Each a photograph and the square of it that fills the frame."""

MOVES = {"still": (0, 0), "left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Rows and columns of cells a latent frame."""


@dataclasses.dataclass(frozen=True)
class Actor:
    """A subject on its way through a clip."""

    subject: str
    row: int
    """Of its first cell in the first latent frame, from 0."""
    column: int
    move: str
    """One of `MOVES`."""

    def cell(self, latent_frame: int) -> tuple[int, int]:
        """Row and column of its first cell in a latent frame."""
        down, right = MOVES[self.move]
        return self.row + latent_frame * down, self.column + latent_frame * right


@dataclasses.dataclass(frozen=True)
class Scene:
    """All that a clip shows."""

    actors: tuple[Actor, ...]
    """One or two, who never overlap."""
    background: str

    def caption(self) -> str:
        """Who, where it starts, how it moves, over what: no two scenes have one caption."""
        first, *second = self.actors
        how = "stays" if first.move == "still" else f"moves {first.move}"
        said = f"The {first.subject} starts at row-{first.row + 1}, column-{first.column + 1} and {how}"
        for actor in second:
            how = "rests" if actor.move == "still" else f"drifts {actor.move}wards"
            said += f", while the {actor.subject} begins at tier-{actor.row + 1}, place-{actor.column + 1} and {how}"
        return f"{said}, over {self.background}."


@functools.cache
def photograph(name: str, side: int) -> UInt8[np.ndarray, "side side 3"]:
    """A subject or a background at `side` x `side` pixels; not to be written to."""
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
    """Rows and columns of pixels that an actor covers in a latent frame."""
    return tuple(slice(cell * CELL, (cell + SIZE) * CELL) for cell in actor.cell(latent_frame))  # type: ignore[return-value]


def reference(subject: str) -> UInt8[np.ndarray, "h w 3"]:
    """Renders a subject on white."""
    canvas = np.full((GRID * CELL, GRID * CELL, 3), 255, np.uint8)
    home = slice(HOME * CELL, (HOME + SIZE) * CELL)
    canvas[home, home] = photograph(subject, SIZE * CELL)
    return canvas


def draw_scenes(number: int, seed: int) -> list[Scene]:
    """Draws scenes, no two the same, half of them with two subjects: one in the upper half, one in the lower.

    Raises:
      ValueError: more than a fifth of all that there are, of which ever fewer would be new.
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
    alone, last = len(subjects) == 1, GRID - SIZE
    halves = rng.permutation([0, last]).tolist()
    actors = []
    for subject, half in zip(subjects, halves, strict=False):
        while True:
            row = int(rng.integers(last + 1)) if alone else half
            actor = Actor(subject, row, int(rng.integers(last + 1)), str(rng.choice(list(MOVES))))
            ends = actor.cell(LATENT_FRAMES - 1)
            if min(ends) >= 0 and max(ends) <= last and (alone or ends[0] == row):
                break
        actors.append(actor)
    return Scene(tuple(actors), str(rng.choice(list(BACKGROUNDS))))


def write_clips(folder: Path, scenes: Sequence[Scene]) -> list[Record]:
    """Writes the scenes' clips and references as files, those that are not there yet, and returns their records."""
    clips, references = folder / "clips", folder / "references"
    for place in (clips, references):
        place.mkdir(parents=True, exist_ok=True)
    for subject in SUBJECTS:
        _write_png(references / f"{subject}.png", reference(subject))
    records = []
    for number, scene in enumerate(tqdm(scenes, unit="clip", desc="clips")):
        path = clips / f"{number:05d}.mp4"
        if not path.exists():
            write_video(path, frames(scene), FPS, QUALITY)
        records.append(
            Record(
                id=path.stem,
                video=path,
                prompt=scene.caption(),
                references=tuple(
                    Reference(path=references / f"{actor.subject}.png", subject=actor.subject) for actor in scene.actors
                ),
                metadata={"scene": dataclasses.asdict(scene)},
            )
        )
    return records


def _write_png(path: Path, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
    """Writes an image, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    Image.fromarray(pixels).save(partial, format="png")
    partial.replace(path)


def read_scene(values: Mapping[str, Any]) -> Scene:
    """The scene that an example's metadata tells of, as `dataclasses.asdict` made it."""
    return Scene(tuple(Actor(**actor) for actor in values["actors"]), values["background"])
