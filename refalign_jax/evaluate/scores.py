"""Score files of OpenS2V-Eval and the total that they add up to.

Each metric is a JSON file that maps a video's id to its values, as the benchmark's own scripts write it. A video's
value is normalised to [0, 1]; a metric is the mean over the videos that have a value, in percent; the total is the
weighted sum

    TotalScore = Σ_m weight_m · metric_m,

whose weights depend on the domain. A metric without values has no score, and then there is no total: nothing counts as
zero. Sources: OpenS2V-Nexus (arXiv 2505.20292) and the score files of OpenS2V-Eval v1.1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from refalign_jax.data.json_lines import read_json

Domain = Literal["open", "single", "human"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """One column of the benchmark.

    Attributes:
      name: as the leaderboard has it.
      files: without .json; several are repeated runs, whose values are averaged for each video.
      key: of the value within a video's entry; None where the entry is the value.
      scale: what one value becomes, in [0, 1]; None for a value that does not count.
      weights: in the total of each domain; a domain without the metric has none.
    """

    name: str
    files: tuple[str, ...]
    key: str | None
    scale: Callable[[float], float | None]
    weights: Mapping[Domain, float]


def _clamped(low: float, high: float) -> Callable[[float], float]:
    """Maps [low, high] to [0, 1]; values beyond are clamped."""
    return lambda value: (min(max(value, low), high) - low) / (high - low)


def _nexus(value: float) -> float | None:
    """Clipped to 0.05; a video in which no subject was found has 0, which does not count."""
    return None if value == 0 else _clamped(0, 0.05)(value)


def _same(value: float) -> float:
    return value


METRICS: tuple[Metric, ...] = (
    Metric(
        name="Aesthetic",
        files=("aesthetic_score",),
        key="aes_score",
        scale=_clamped(4, 7),
        weights={"open": 0.16, "single": 0.16, "human": 0.18},
    ),
    Metric(
        name="Smoothness",
        files=("motion_smoothness",),
        key="motion_smoothness",
        scale=_same,
        weights={"open": 0.06, "single": 0.06, "human": 0.09},
    ),
    Metric(
        name="Amplitude",
        files=("motion_amplitude",),
        key="motion_fb",
        scale=_clamped(0, 1),
        weights={"open": 0.02, "single": 0.02, "human": 0.03},
    ),
    Metric(
        name="FaceSim",
        files=("facesim",),
        key="cur_score",
        scale=_same,
        weights={"open": 0.20, "single": 0.20, "human": 0.25},
    ),
    Metric(
        name="Gme",
        files=("gmescore",),
        key="gme_score",
        scale=_same,
        weights={"open": 0.12, "single": 0.12, "human": 0.15},
    ),
    Metric(
        name="Nexus",
        files=("nexusscore",),
        key="nexus_score",
        scale=_nexus,
        weights={"open": 0.20, "single": 0.20},
    ),
    Metric(
        name="Natural",
        files=("naturalscore_1", "naturalscore_2", "naturalscore_3"),
        key=None,
        scale=_clamped(1, 5),
        weights={"open": 0.24, "single": 0.24, "human": 0.30},
    ),
)
"""The columns, in the leaderboard's order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """A metric over all videos.

    Attributes:
      percent: mean of the normalised values, in percent; None where no video has one.
      videos: how many videos it is the mean of.
      skipped: ids whose entry holds no number, such as a judge's "error", or does not count.
    """

    percent: float | None
    videos: int
    skipped: tuple[str, ...] = ()


def metrics_of(domain: Domain) -> tuple[Metric, ...]:
    """Returns the metrics that count in a domain."""
    return tuple(metric for metric in METRICS if domain in metric.weights)


def read_scores(folder: Path, domain: Domain, ids: Collection[str] | None = None) -> dict[str, Score]:
    """Reads the score files of a folder.

    Args:
      folder: holds <metric>.json; a missing file leaves its metric without a score.
      domain: whose metrics are read.
      ids: of the videos that count; None for all that the files have.

    Returns:
      Each metric of the domain by name.

    Raises:
      ValueError: the folder does not exist, or a file is not in the form that the benchmark's scripts write.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no folder of score files; the benchmark's scripts write one JSON file per metric."
        )
    return {metric.name: _score(metric, folder, ids) for metric in metrics_of(domain)}


def total(scores: Mapping[str, float | None], domain: Domain) -> float | None:
    """Returns the TotalScore of metrics in percent, or None where one of the domain is missing."""
    summed = 0.0
    for metric in metrics_of(domain):
        percent = scores.get(metric.name)
        if percent is None:
            return None
        summed += metric.weights[domain] * percent
    return summed


def _score(metric: Metric, folder: Path, ids: Collection[str] | None) -> Score:
    """Averages a metric over the runs of each video, then over videos."""
    runs: dict[str, list[float]] = {}
    seen: set[str] = set()
    for name in metric.files:
        path = folder / f"{name}.json"
        if path.exists():
            for video, value in _values(path, metric):
                seen.add(video)
                if value is not None:
                    runs.setdefault(video, []).append(value)
    scaled = {
        video: metric.scale(sum(values) / len(values)) for video, values in runs.items() if ids is None or video in ids
    }
    counted = [value for value in scaled.values() if value is not None]
    skipped = {video for video in seen if ids is None or video in ids} - {v for v, x in scaled.items() if x is not None}
    percent = 100 * math.fsum(counted) / len(counted) if counted else None
    return Score(percent=percent, videos=len(counted), skipped=tuple(sorted(skipped)))


def _values(path: Path, metric: Metric) -> Iterator[tuple[str, float | None]]:
    """Yields each video's id and value; None where a judge wrote no number."""
    entries = read_json(path)
    if not isinstance(entries, dict):
        raise ValueError(f"{path} is no object of video ids and their values.")
    for video, entry in entries.items():
        if metric.key is None:
            yield video, _judged(entry, f"{path}, {video!r}")
            continue
        if not isinstance(entry, dict) or metric.key not in entry:
            raise ValueError(f"{path}, {video!r} has no {metric.key!r}: {entry!r:.80}.")
        yield video, _number(entry[metric.key], f"{path}, {video!r}, {metric.key!r}")


def _judged(entry: Any, where: str) -> float | None:
    """A judge's score, which is text and may be no number."""
    if isinstance(entry, str):
        try:
            entry = float(entry)
        except ValueError:
            return None
        if not math.isfinite(entry):
            return None
    return _number(entry, where)


def _number(value: Any, where: str) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where} is {value!r:.80}; a finite number is expected.")
    return float(value)
