"""Reads and checks a run's folder for the report.

    config.json            the recipe, and the versions and the command that started the run
    metrics.jsonl          a line for each step, and a line for each start
    samples/samples.json   sampled videos: a list of {"id", "prompt", "video", "references": [{"image", "subject"}],
                           "truth", "scores"}, the last two optional, paths relative to samples/
    evaluation.json        {"title", "numbers": {name: value}, "confusions": [{"title", "labels", "matrix"}], "notes",
                           "introduction": {"title", "paragraphs"}}, the last optional: how the page begins

The last two files may be missing.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refalign_jax.config import Config
from refalign_jax.config.recipe import from_dict
from refalign_jax.data.json_lines import read_json
from refalign_jax.types import Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """A sampled video, and the prompt and the references that it was sampled from."""

    id: str
    prompt: str
    video: Path
    references: tuple[tuple[Path, str | None], ...]
    """Image and subject of each."""
    truth: Path | None
    """The clip that the prompt describes, if there is one."""
    scores: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Confusion:
    """How often each requested label (row) was recognised as each label (column)."""

    title: str
    labels: tuple[str, ...]
    matrix: Float[np.ndarray, "n n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Measures of the samples, written by another program."""

    title: str
    numbers: Mapping[str, float]
    confusions: tuple[Confusion, ...]
    notes: tuple[str, ...]
    heading: str = ""
    """Title of the page; empty for the run's name."""
    paragraphs: tuple[str, ...] = ()
    """What the page says first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run's folder, read."""

    folder: Path
    config: Config
    about: Mapping[str, Any]
    """What `provenance.about` returned at the last start."""
    starts: tuple[Mapping[str, Any], ...]
    """The lines of metrics.jsonl that open a start, in order."""
    program: Mapping[str, Any]
    """The line of metrics.jsonl about compilation at the last start; may be empty."""
    steps: tuple[Mapping[str, Any], ...]
    """The step lines of metrics.jsonl."""
    samples: tuple[Sample, ...]
    lost: int
    """Number of samples in samples.json whose video or reference is missing."""
    evaluation: Evaluation | None

    def series(self, name: str) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Steps at which a metric was logged, and its values; NaN where it was not finite."""
        logged = [(line["step"], line[name]) for line in self.steps if name in line]
        values = [_number(value) for _, value in logged]
        return np.array([step for step, _ in logged], np.int64), np.array(values, np.float64)


def read_run(folder: Path) -> Run:
    """Reads a run's folder.

    Raises:
      ValueError: the folder is not a run's, or one of its files can't be read.
    """
    if not folder.is_dir():
        raise ValueError(f"The run {folder} does not exist; name the train.folder of a run.")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no run's folder: it has no config.json; name the train.folder of a run.")
    recipe = read_json(folder / "config.json")
    if not isinstance(recipe, dict) or not all(isinstance(recipe.get(name), dict) for name in ("config", "about")):
        raise ValueError(
            f"{folder / 'config.json'} is not one that a run wrote: it needs the objects config and about."
        )
    config, about = from_dict(Config, recipe["config"], str(folder / "config.json")), recipe["about"]
    lines = _metrics(folder / "metrics.jsonl")
    listed = list(_samples(folder / "samples"))
    whole = [s for s in listed if s.video.is_file() and all(image.is_file() for image, _ in s.references)]
    return Run(
        folder=folder,
        config=config,
        about=about,
        starts=tuple(line for line in lines if "start" in line),
        program=([line for line in lines if "compile_seconds" in line] or [{}])[-1],
        steps=tuple(line for line in lines if "step" in line),
        samples=tuple(whole),
        lost=len(listed) - len(whole),
        evaluation=_evaluation(folder / "evaluation.json"),
    )


def _metrics(path: Path) -> list[dict[str, Any]]:
    """All lines, except a last one that is still being written."""
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read: {error}.") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} can't be read: {error}.") from error
        counts = [value[name] for name in ("step", "parameters") if name in value] if isinstance(value, dict) else [""]
        if not all(type(count) is int and 0 <= count < 2**53 for count in counts):
            raise ValueError(f"{path}, line {number} is {line[:60]!r}; it must be an object, its counts whole numbers.")
        found.append(value)
    return found


def _number(value: Any) -> float:
    """A logged value; NaN for what is no number."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def _samples(folder: Path) -> Iterator[Sample]:
    path = folder / "samples.json"
    if not path.is_file():
        return
    try:
        for entry in read_json(path):
            truth, scores = entry.get("truth"), entry.get("scores") or {}
            texts = [entry["id"], entry["prompt"], entry["video"], truth or "", *scores]
            texts += [text or "" for r in entry["references"] for text in (r["image"], r.get("subject"))]
            if not all(isinstance(text, str) and "\0" not in text for text in texts):
                raise TypeError("a text or a file's name is of another type")
            yield Sample(
                id=entry["id"],
                prompt=entry["prompt"],
                video=folder / entry["video"],
                references=tuple((folder / r["image"], r.get("subject")) for r in entry["references"]),
                truth=folder / truth if truth and (folder / truth).is_file() else None,
                scores=scores,
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no list of samples ({error!r}); each needs id, prompt, video and references."
        ) from error


def _evaluation(path: Path) -> Evaluation | None:
    if not path.is_file():
        return None
    found = read_json(path)
    try:
        confusions = tuple(
            Confusion(
                title=str(c["title"]), labels=tuple(map(str, c["labels"])), matrix=np.array(c["matrix"], np.float64)
            )
            for c in found.get("confusions", [])
        )
        for confusion in confusions:
            if confusion.matrix.shape != (len(confusion.labels),) * 2:
                raise ValueError(
                    f"{confusion.title!r} has {len(confusion.labels)} labels and a matrix of {confusion.matrix.shape}"
                )
        return Evaluation(
            title=str(found.get("title", "Evaluation")),
            numbers={name: float(value) for name, value in found.get("numbers", {}).items()},
            confusions=confusions,
            notes=tuple(map(str, found.get("notes", ()))),
            heading=str(found.get("introduction", {}).get("title", "")),
            paragraphs=tuple(map(str, found.get("introduction", {}).get("paragraphs", ()))),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is no evaluation ({error}); see refalign_jax/report/run.py.") from error
