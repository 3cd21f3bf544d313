"""How well the demo's samples show who was asked for.

At the place that its caption gives, each subject's region is cut out of every frame and compared

- with all photographs, by correlation over pixels and colours: the nearest one names the subject;
- with the true clip of the same caption, which went through the same codec and into the same kind of file, by SSIM.

A subject that is right but in the wrong place counts as wrong.
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
    """What is seen of one subject of one sample."""

    asked: str
    named: str
    """Whom the sample shows, by the nearest photograph."""
    named_in_truth: str
    """Whom the true clip shows, by the same measure."""
    ssim: float
    """Mean over the frames of the SSIM to the true clip, at most 1."""


def cut_out(video: UInt8[np.ndarray, "T h w 3"], actor: Actor) -> UInt8[np.ndarray, "T s s 3"]:
    """Cuts an actor's region out of each frame."""
    return np.stack([frame[region(actor, (number + 3) // 4)] for number, frame in enumerate(video)])


def correlations(crops: UInt8[np.ndarray, "T s s 3"]) -> Float[np.ndarray, " subjects"]:
    """Correlation of crops with each photograph in the order of `SUBJECTS`, the mean over frames; in [-1, 1]."""

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
    """Judges each actor of a sample against the true clip."""
    verdicts = []
    for actor in scene.actors:
        crops, true_crops = cut_out(video, actor), cut_out(truth, actor)
        similar = [
            structural_similarity(a, b, channel_axis=-1, data_range=255) for a, b in zip(crops, true_crops, strict=True)
        ]
        verdicts.append(
            Verdict(
                asked=actor.subject,
                named=nearest(crops),
                named_in_truth=nearest(true_crops),
                ssim=float(np.mean(similar)),
            )
        )
    return verdicts


def judge_files(folder: Path, entry: Mapping[str, Any], scene: Scene) -> list[Verdict]:
    """Judges a sample by an entry of samples.json that names `video` and `truth`."""
    numbers = np.arange(NUM_FRAMES)
    return judge(read_frames(folder / entry["video"], numbers), read_frames(folder / entry["truth"], numbers), scene)


def evaluation(verdicts: Sequence[Sequence[Verdict]]) -> dict[str, Any]:
    """Sums up all samples' verdicts in the form of a run's evaluation.json.

    Args:
      verdicts: of each sample, one or two.
    """
    every = [verdict for sample in verdicts for verdict in sample]
    parts = {count: [v for sample in verdicts if len(sample) == count for v in sample] for count in (1, 2)}

    def share(chosen: Sequence[Verdict], name: str = "named") -> float:
        return float(np.mean([getattr(v, name) == v.asked for v in chosen])) if chosen else float("nan")

    numbers = {
        "samples": len(verdicts),
        "subjects to choose from": len(SUBJECTS),
        "right subject": share(every),
        "right subject, one asked for": share(parts[1]),
        "right subject, two asked for": share(parts[2]),
        "right subject in the true clips": share(every, "named_in_truth"),
        "SSIM to the true clip over the subject": float(np.mean([v.ssim for v in every])),
        "SSIM, one asked for": float(np.mean([v.ssim for v in parts[1]])) if parts[1] else float("nan"),
        "SSIM, two asked for": float(np.mean([v.ssim for v in parts[2]])) if parts[2] else float("nan"),
    }
    titles = {1: "One subject asked for", 2: "Two subjects asked for"}
    return {
        "title": "Whom the samples show",
        "numbers": {name: value for name, value in numbers.items() if not np.isnan(value)},
        "confusions": [
            {"title": titles[count], "labels": list(SUBJECTS), "matrix": confusion(chosen).tolist()}
            for count, chosen in parts.items()
            if chosen
        ],
        "notes": [
            "A row is who was asked for, a column whom the nearest photograph names, at the place that the caption "
            "gives; captions were held out from training.",
            "SSIM compares with the true clip of the same caption after the same codec.",
        ],
    }


def confusion(verdicts: Sequence[Verdict]) -> np.ndarray:
    """Counts, int [asked, named], both in the order of `SUBJECTS`."""
    order = {name: number for number, name in enumerate(SUBJECTS)}
    matrix = np.zeros((len(order), len(order)), int)
    for verdict in verdicts:
        matrix[order[verdict.asked], order[verdict.named]] += 1
    return matrix
