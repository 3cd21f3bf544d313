"""Scores how well the demo's samples show the requested subjects.

Each subject is cut out of every frame at the position that the caption gives. The cut-out is compared

- with all photographs, by correlation over pixels and colours; the nearest photograph is the recognised subject;
- with the true clip of the same caption, by SSIM. The true clip went through the same codec and the same video format.

A subject that is correct but in the wrong place counts as wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from skimage.metrics import structural_similarity

from refalign_jax.data.video import read_frames
from refalign_jax.demo.scenes import CELL, NUM_FRAMES, SIZE, SUBJECTS, Actor, Scene, photograph, region
from refalign_jax.types import Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result for one subject of one sample."""

    requested: str
    """The requested subject."""
    recognised: str
    """The subject recognised in the sample."""
    recognised_in_truth: str
    """The subject recognised in the true clip, which checks the measure."""
    ssim: float
    """SSIM to the true clip, mean over the frames, at most 1."""


def cut_out(video: UInt8[np.ndarray, "T h w 3"], actor: Actor) -> UInt8[np.ndarray, "T s s 3"]:
    """Cuts an actor's region out of each frame."""
    return np.stack([frame[region(actor, (number + 3) // 4)] for number, frame in enumerate(video)])


def correlations(crops: UInt8[np.ndarray, "T s s 3"]) -> Float[np.ndarray, " subjects"]:
    """Correlation with each photograph, in the order of `SUBJECTS`, mean over the frames; in [-1, 1]."""

    def standardised(pixels: np.ndarray) -> np.ndarray:
        rows = pixels.reshape(len(pixels), -1).astype(np.float64)
        rows = rows - rows.mean(1, keepdims=True)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)

    photographs = np.stack([photograph(name, SIZE * CELL) for name in SUBJECTS])
    return (standardised(crops) @ standardised(photographs).T).mean(0)


def nearest(crops: UInt8[np.ndarray, "T s s 3"]) -> str:
    """The subject whose photograph correlates most with the crops."""
    return list(SUBJECTS)[int(np.argmax(correlations(crops)))]


def judge(video: UInt8[np.ndarray, "T h w 3"], truth: UInt8[np.ndarray, "T h w 3"], scene: Scene) -> list[Verdict]:
    """Judges each actor of a sample."""
    verdicts = []
    for actor in scene.actors:
        crops, true_crops = cut_out(video, actor), cut_out(truth, actor)
        similar = [
            structural_similarity(a, b, channel_axis=-1, data_range=255) for a, b in zip(crops, true_crops, strict=True)
        ]
        verdicts.append(
            Verdict(
                requested=actor.subject,
                recognised=nearest(crops),
                recognised_in_truth=nearest(true_crops),
                ssim=float(np.mean(similar)),
            )
        )
    return verdicts


def judge_files(folder: Path, entry: Mapping[str, Any], scene: Scene) -> list[Verdict]:
    """Judges a sample from its files.

    Args:
      folder: of samples.json.
      entry: of samples.json; `video` and `truth` name the sampled video and the true clip.
      scene: the content of the true clip.
    """
    numbers = np.arange(NUM_FRAMES)
    return judge(read_frames(folder / entry["video"], numbers), read_frames(folder / entry["truth"], numbers), scene)


def evaluation(verdicts: Sequence[Sequence[Verdict]]) -> dict[str, Any]:
    """Summarises the verdicts in the form of a run's evaluation.json.

    Args:
      verdicts: for each sample, the verdicts of its one or two subjects.
    """
    every = [verdict for sample in verdicts for verdict in sample]
    parts = {count: [v for sample in verdicts if len(sample) == count for v in sample] for count in (1, 2)}

    def share(chosen: Sequence[Verdict], name: str = "recognised") -> float:
        return float(np.mean([getattr(v, name) == v.requested for v in chosen])) if chosen else float("nan")

    numbers = {
        "samples": len(verdicts),
        "subjects to choose from": len(SUBJECTS),
        "right subject": share(every),
        "right subject, one requested": share(parts[1]),
        "right subject, two requested": share(parts[2]),
        "right subject in the true clips": share(every, "recognised_in_truth"),
        "SSIM to the true clip over the subject": float(np.mean([v.ssim for v in every])),
        "SSIM, one requested": float(np.mean([v.ssim for v in parts[1]])) if parts[1] else float("nan"),
        "SSIM, two requested": float(np.mean([v.ssim for v in parts[2]])) if parts[2] else float("nan"),
    }
    titles = {1: "One subject requested", 2: "Two subjects requested"}
    return {
        "title": "Which subjects the samples show",
        "numbers": {name: value for name, value in numbers.items() if not np.isnan(value)},
        "confusions": [
            {"title": titles[count], "labels": list(SUBJECTS), "matrix": confusion(chosen).tolist()}
            for count, chosen in parts.items()
            if chosen
        ],
        "notes": [
            "A row is the requested subject; a column is the subject whose photograph is most similar to the sample at "
            "the position that the caption gives. The captions were held out from training.",
            "SSIM compares a sample with the true clip of the same caption, encoded and decoded by the same codec.",
        ],
    }


def confusion(verdicts: Sequence[Verdict]) -> np.ndarray:
    """Counts verdicts, int [requested, recognised], both in the order of `SUBJECTS`."""
    order = {name: number for number, name in enumerate(SUBJECTS)}
    matrix = np.zeros((len(order), len(order)), int)
    for verdict in verdicts:
        matrix[order[verdict.requested], order[verdict.recognised]] += 1
    return matrix
