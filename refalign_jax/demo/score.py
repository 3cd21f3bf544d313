"""Scores how well the demo's samples show the requested subjects.

Each subject is cut out of every frame at the position that the caption gives. The cut-out is compared

- with drawings of all subjects in its place, as the clip should show them, by correlation over pixels and colours; the
  nearest drawing is the recognised subject;
- with a drawing of its reference's view in its place: if that is nearer than the requested view, the pose was copied;
- with the true clip of the same caption, by SSIM. The true clip went through the same codec and the same video format.

A subject that is correct but in the wrong place counts as wrong.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from skimage.metrics import structural_similarity

from refalign_jax.data.video import read_frames
from refalign_jax.demo.photographs import SUBJECTS, View, background
from refalign_jax.demo.scenes import (
    AS_PHOTOGRAPHED,
    CELL,
    GRID,
    LATENT_FRAMES,
    NUM_FRAMES,
    Actor,
    Scene,
    draw,
    region,
)
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
    copied: bool
    """Whether the sample is nearer to the reference's view of the subject than to the requested one."""
    copied_in_truth: bool
    """The same of the true clip, which checks the measure."""
    ssim: float
    """SSIM to the true clip, mean over the frames, at most 1."""


def latent_frame(number: int) -> int:
    """Number of the latent frame that a frame belongs to."""
    return (number + 3) // 4


def cut_out_frames(video: UInt8[np.ndarray, "T h w 3"], actor: Actor) -> UInt8[np.ndarray, "T s s 3"]:
    """Cuts an actor's region out of each frame."""
    return np.stack([frame[region(actor, latent_frame(number))] for number, frame in enumerate(video)])


@functools.lru_cache(maxsize=4096)
def _drawing(actor: Actor, number: int, place: str, view: View) -> Float[np.ndarray, " values"]:
    """An actor's region of a latent frame of a clip without other actors, standardised."""
    canvas = background(place, GRID * CELL)
    return _standardised(draw(actor, number, canvas, view)[region(actor, number)])


def _standardised(pixels: UInt8[np.ndarray, "s s 3"]) -> Float[np.ndarray, " values"]:
    values = pixels.reshape(-1).astype(np.float64)
    values -= values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-9)


def correlation(crops: UInt8[np.ndarray, "T s s 3"], actor: Actor, place: str, view: View) -> float:
    """Correlation of an actor's region in the frames with drawings of a view of it there, mean over the latent frames.

    Args:
      crops: the region in every frame.
      actor: what is drawn, and where.
      place: the background.
      view: how it is drawn.

    Returns:
      In [-1, 1].
    """
    # A drawing depends on where the actor stands, but not on how it came there.
    still = [dataclasses.replace(actor, column=actor.cell(n)[1], move="still") for n in range(LATENT_FRAMES)]
    still = [dataclasses.replace(each, reference=AS_PHOTOGRAPHED) for each in still]
    shown = np.stack([_standardised(crop) for crop in crops])
    drawn = np.stack([_drawing(still[latent_frame(number)], 0, place, view) for number in range(len(crops))])
    return float(np.sum(shown * drawn, axis=1).mean())


def nearest(crops: UInt8[np.ndarray, "T s s 3"], actor: Actor, place: str) -> str:
    """The subject whose drawing, as the clips show it, correlates most with the crops."""
    others = {name: dataclasses.replace(actor, subject=name) for name in SUBJECTS}
    return max(others, key=lambda name: correlation(crops, others[name], place, AS_PHOTOGRAPHED))


def copied(crops: UInt8[np.ndarray, "T s s 3"], actor: Actor, place: str) -> bool:
    """Whether the crops are nearer to the reference's view than to the requested one, both at the light of the clip."""
    views = dataclasses.replace(actor.reference, light=1.0), AS_PHOTOGRAPHED
    of_reference, requested = (correlation(crops, actor, place, view) for view in views)
    return of_reference > requested


def judge(video: UInt8[np.ndarray, "T h w 3"], truth: UInt8[np.ndarray, "T h w 3"], scene: Scene) -> list[Verdict]:
    """Judges each actor of a sample."""
    verdicts = []
    for actor in scene.actors:
        crops, true_crops = cut_out_frames(video, actor), cut_out_frames(truth, actor)
        similar = [
            structural_similarity(a, b, channel_axis=-1, data_range=255) for a, b in zip(crops, true_crops, strict=True)
        ]
        verdicts.append(
            Verdict(
                requested=actor.subject,
                recognised=nearest(crops, actor, scene.background),
                recognised_in_truth=nearest(true_crops, actor, scene.background),
                copied=copied(crops, actor, scene.background),
                copied_in_truth=copied(true_crops, actor, scene.background),
                ssim=float(np.mean(similar)),
            )
        )
    return verdicts


def background_error(video: UInt8[np.ndarray, "T h w 3"], truth: UInt8[np.ndarray, "T h w 3"], scene: Scene) -> float:
    """Mean absolute difference from the true clip outside the actors' regions, in levels of 0 to 255."""
    outside = np.ones(video.shape[:3], bool)
    for actor in scene.actors:
        for number, frame in enumerate(outside):
            frame[region(actor, latent_frame(number))] = False
    return float(np.abs(video.astype(np.float64) - truth)[outside].mean())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """The result for a sample."""

    verdicts: Sequence[Verdict]
    """One for each requested subject."""
    background_error: float
    """As `background_error` returns it."""


def judge_files(folder: Path, entry: Mapping[str, Any], scene: Scene) -> Judged:
    """Judges a sample from its files.

    Args:
      folder: of samples.json.
      entry: of samples.json; `video` and `truth` name the sampled video and the true clip.
      scene: the content of the true clip.
    """
    video, truth = (read_frames(folder / entry[name], np.arange(NUM_FRAMES)) for name in ("video", "truth"))
    return Judged(verdicts=judge(video, truth, scene), background_error=background_error(video, truth, scene))


def evaluation(judged: Sequence[Judged]) -> dict[str, Any]:
    """Summarises the results of all samples in the form of a run's evaluation.json."""
    samples = [each.verdicts for each in judged]
    every = [verdict for sample in samples for verdict in sample]
    parts = {count: [v for sample in samples if len(sample) == count for v in sample] for count in (1, 2)}
    pairs = [sample for sample in samples if len(sample) == 2]

    def right(chosen: Sequence[Verdict], name: str = "recognised") -> float:
        return _mean([getattr(v, name) == v.requested for v in chosen])

    numbers = {
        "samples": len(samples),
        "subjects to choose from": len(SUBJECTS),
        "right subject": right(every),
        "right subject, one requested": right(parts[1]),
        "right subject, two requested": right(parts[2]),
        "both subjects right, two requested": _mean([right(sample) == 1 for sample in pairs]),
        "right subject by chance": 1 / len(SUBJECTS),
        "right subject in the true clips": right(every, "recognised_in_truth"),
        "pose copied from the reference": _mean([v.copied for v in every]),
        "pose copied, in the true clips": _mean([v.copied_in_truth for v in every]),
        "SSIM to the true clip over the subject": _mean([v.ssim for v in every]),
        "SSIM, one requested": _mean([v.ssim for v in parts[1]]),
        "SSIM, two requested": _mean([v.ssim for v in parts[2]]),
        "background's difference from the true clip, of 255": _mean([each.background_error for each in judged]),
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
            f"Right: of drawings of all {len(SUBJECTS)} subjects at the requested place, that of the requested one is "
            "most similar to the sample. A guess is right in "
            f"{1 / len(SUBJECTS):.0%} of cases. In the table, a row is the requested subject, a column the recognised "
            "one. The captions and references were held out from training.",
            "SSIM compares a sample with the true clip of the same caption, encoded and decoded by the same codec: 1 "
            "for the same pixels, about 0 for unrelated ones. A pose is copied if the sample is nearer to the view of "
            "its reference than to the requested one.",
        ],
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def confusion(verdicts: Sequence[Verdict]) -> np.ndarray:
    """Counts verdicts, int [requested, recognised], both in the order of `SUBJECTS`."""
    order = {name: number for number, name in enumerate(SUBJECTS)}
    matrix = np.zeros((len(order), len(order)), int)
    for verdict in verdicts:
        matrix[order[verdict.requested], order[verdict.recognised]] += 1
    return matrix
