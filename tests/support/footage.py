"""Tiny videos and records out of scikit-image's photographs, shared by the tests of preparation."""

import functools
import json
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from refalign_jax.data.video import write_video

SUBJECTS = {"astronaut": data.astronaut, "cat": data.cat, "coffee": data.coffee}


@functools.cache
def photograph(name: str, height: int = 96, width: int = 128) -> np.ndarray:
    """One photograph, uint8 [height, width, 3]."""
    return np.asarray(Image.fromarray(SUBJECTS[name]()).resize((width, height), Image.Resampling.LANCZOS))


def panned(name: str, num_frames: int = 12) -> np.ndarray:
    """The photograph moving to the left by two pixels a frame, uint8 [num_frames, 64, 96, 3]."""
    return np.stack([photograph(name)[16:80, 2 * t : 2 * t + 96] for t in range(num_frames)])


def write_records(folder: Path, num_frames: int = 12) -> Path:
    """Three videos with one, two and no references, and the JSONL that tells of them; returns its path."""
    lines = []
    for count, name in zip((1, 2, 0), SUBJECTS, strict=True):
        write_video(folder / f"{name}.mp4", panned(name, num_frames), fps=8)
        Image.fromarray(photograph(name)).save(folder / f"{name}.png")
        mask = np.zeros((96, 128), np.uint8)
        mask[20:80, 30:60] = 255
        Image.fromarray(mask).save(folder / f"{name}_mask.png")
        references = [{"image": f"{name}.png"}, {"image": f"{name}.png", "mask": f"{name}_mask.png", "subject": name}]
        lines.append({"video": f"{name}.mp4", "prompt": f"The {name} moves left.", "references": references[:count]})
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
