"""The metrics that are computed here, each as a `Task`; networks are loaded when the first video needs them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from refalign_jax.evaluate.aesthetic import AestheticScorer
from refalign_jax.evaluate.compute import Task
from refalign_jax.evaluate.faces import FaceEncoder, face_similarity
from refalign_jax.evaluate.motion import motion_amplitude, opencv


def amplitude(videos: Mapping[str, Path]) -> Task:
    """Motion amplitude of videos.

    Raises:
      ValueError: OpenCV is missing.
    """
    opencv()
    return Task(
        file="motion_amplitude",
        key="motion_fb",
        inputs={name: (path,) for name, path in videos.items()},
        compute=lambda name: motion_amplitude(videos[name]),
    )


def aesthetic(videos: Mapping[str, Path], clip: Path, head: Path) -> Task:
    """Aesthetic score of videos.

    Args:
      videos: by id.
      clip: CLIP ViT-L/14, a folder or a file.
      head: the file of the predictor.
    """
    load = functools.cache(lambda: AestheticScorer(clip, head))
    weights = (*_files(clip), head)
    return Task(
        file="aesthetic_score",
        key="aes_score",
        inputs={name: (path, *weights) for name, path in videos.items()},
        compute=lambda name: load().score(videos[name]),
    )


def faces(folder: Path, model: Path, ids: tuple[str, ...] = ()) -> Task:
    """FaceSim of face crops.

    Args:
      folder: one folder per video id.
      model: the file of the network.
      ids: of the benchmark's items; if empty, any.

    Raises:
      ValueError: the folder has no folder of faces, or one whose name is not an item's id.
    """
    found = {path.name: path for path in sorted(folder.glob("*")) if path.is_dir()}
    if not found:
        raise ValueError(f"{folder} has no folders of faces; <id>/reference.png and <id>/*.png are expected.")
    unknown = [name for name in found if ids and name not in ids]
    if unknown:
        raise ValueError(f"{folder} has faces of {', '.join(unknown[:5])}, which the prompts do not have.")
    load = functools.cache(lambda: FaceEncoder(model))
    return Task(
        file="facesim",
        key="cur_score",
        inputs={name: (model, *sorted(path.glob("*.png"))) for name, path in found.items()},
        compute=lambda name: face_similarity(load(), found[name]),
    )


def _files(path: Path) -> tuple[Path, ...]:
    """The files that a folder of weights consists of, or the file itself."""
    if not path.is_dir():
        return (path,)
    return tuple(sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".json")))
