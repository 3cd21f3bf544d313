"""Videos that a page asks for: one is made at a time, in the order of asking, as `tools/sample.py` makes one.

FOLDER/0001.mp4, 0001.json         the first video, and how it was made
FOLDER/0001-reference-0.png, …     its references as the model saw them
FOLDER/references/                 the pictures as they were given
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import itertools
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from refalign_jax.atomic import atomic_write
from refalign_jax.command import judge
from refalign_jax.config import GenerateConfig
from refalign_jax.data.records import Reference
from refalign_jax.data.video import read_frames, to_pixels
from refalign_jax.digests import Digests
from refalign_jax.inference.draw import clean_estimate, cut_prompts
from refalign_jax.inference.generate import Progress, digest_cache, generate_one
from refalign_jax.inference.opening import Generator, open_generator
from refalign_jax.inference.references import has_background, prepare_references
from refalign_jax.inference.requests import Request
from refalign_jax.sampling import noise_levels

REQUEST_ID = "0001"
"""Id of every request, the one that `tools/sample.py` uses: the same seed gives the same noise in both."""

_STAGES = {
    "prompt": "Encoding the prompt",
    "references": "Encoding the references",
    "transformer": "Reading the transformer",
    "decode": "Decoding the video",
}
_MAX_NAME = 80
"""Characters of a picture's name that are kept."""


class CancelledError(Exception):
    """The person who asked for a video wants it no more."""


class Shown(NamedTuple):
    """What a page shows of a job.

    Attributes:
      state: where the job is.
      text: a sentence, or a few words.
      share: the part of the steps that is done, from 0 to 1.
      preview: the first frame of the estimated video, RGB; None before there is one.
      step: the step after which `preview` was estimated.
    """

    state: Literal["waiting", "running", "done", "failed", "cancelled"]
    text: str
    share: float = 0.0
    preview: UInt8[np.ndarray, "h w 3"] | None = None
    step: int = 0


@dataclasses.dataclass(kw_only=True, eq=False)
class Job:
    """One video that was asked for."""

    request: Request
    generator: Generator
    out: Path
    """The MP4."""
    preview_every: int
    """Steps from one preview to the next; 0 for none."""
    shown: Shown = dataclasses.field(default_factory=lambda: Shown("waiting", "Waiting"))
    entry: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the JSON file beside the video holds, once it is there."""
    stop: bool = False
    """Whether the job is to end after the step that is being taken."""

    @property
    def still(self) -> Path:
        """The PNG of the first frame."""
        return self.out.parent / "stills" / f"{self.out.stem}.png"


class Studio:
    """The networks and the queue of jobs.

    Args:
      weights: as `open_generator` takes them.
      config: how to sample, where a page asks for nothing else.
      out: where a folder of this studio's own is made for its videos.

    Raises:
      ValueError: as `open_generator`.
      OSError: no folder can be made.
    """

    def __init__(self, weights: str, config: GenerateConfig, out: Path) -> None:
        self._weights, self._config = weights, config
        self._loaded: tuple[dict[str, str], Generator] | None = None
        self.generator = open_generator(weights, config)
        self.folder = _new_folder(out)
        self.max_references = self.generator.config.data.max_references
        self.finished: list[Job] = []
        self._queue: list[Job] = []
        self._count, self._closing = 0, False
        self._changed = threading.Condition()
        self._worker = threading.Thread(target=self._work, name="studio", daemon=True)
        self._worker.start()

    def open(self, settings: Mapping[str, Any]) -> Generator:
        """Opens the generator for some settings of `GenerateConfig`; None leaves one as it was at the start.

        Raises:
          ValueError: a setting that makes no video.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        generator = open_generator(self._weights, dataclasses.replace(self._config, **given))
        if not self._config.keep_loaded:
            return generator
        with Digests(digest_cache()) as digests:
            files = generator.digests(digests)
        if self._loaded is None or self._loaded[0] != files:  # the files are others than those that were read
            self._loaded = files, generator
        loaded = self._loaded[1]
        return dataclasses.replace(generator, transformer=loaded.transformer, codec=loaded.codec, text=loaded.text)

    def see(
        self, pictures: Sequence[Path], settings: Mapping[str, Any]
    ) -> tuple[UInt8[np.ndarray, "R h w 3"], list[str]]:
        """Returns the pictures as the model will see them, and sentences about what could be better.

        Raises:
          ValueError: one can't be read, or there are too many.
        """
        self._check_count(pictures)
        generator = self.open(settings)
        references = [Reference(path=path) for path in pictures]
        images = prepare_references(references, generator.size[1:], generator.cut_out)
        notes = []
        if generator.cut_out is None:
            notes = [
                f"{path.name} has a background, which is not removed; the model was trained with subjects on white."
                for path, reference in zip(pictures, references, strict=True)
                if has_background(reference)
            ]
        return images, notes

    def ask(
        self, prompt: str, pictures: Sequence[tuple[Path, str]], settings: Mapping[str, Any], preview_every: int
    ) -> Job:
        """Puts a video at the end of the queue.

        Args:
          prompt: what it shows.
          pictures: the file of each reference, which is copied, and a word for its subject; it may be empty.
          settings: as `open` takes them.
          preview_every: steps from one preview to the next; 0 for none.

        Raises:
          ValueError: there is nothing to draw, or a setting that makes no video.
          OSError: a picture can't be copied.
        """
        if not prompt.strip() and not pictures:
            raise ValueError("There is nothing to draw; type a prompt or give a picture.")
        self._check_count(pictures)
        if preview_every < 0:
            raise ValueError(f"Previews come every {preview_every} steps; give a number from 1, or 0 for none.")
        generator = self.open(settings)
        references = tuple(
            Reference(path=self._keep(path), subject=subject.strip() or None) for path, subject in pictures
        )
        request = Request(id=REQUEST_ID, prompt=prompt, references=references)
        with self._changed:
            self._count += 1
            out = self.folder / f"{self._count:04d}.mp4"
            job = Job(request=request, generator=generator, out=out, preview_every=preview_every)
            self._queue.append(job)
            self._changed.notify_all()
        return job

    def updates(self, job: Job) -> Iterator[Shown]:
        """Yields what there is to show of a job now, and again when it has changed, until it has ended."""
        before: Shown | None = None
        while before is None or before.state in ("waiting", "running"):
            with self._changed:
                self._changed.wait_for(lambda: _differ(before, self._shown(job)))  # noqa: B023 (called in this round)
                before = self._shown(job)
            yield before

    def cancel(self, job: Job) -> None:
        """Ends a job: at once if it waits, else after its step; one that has ended stays as it is."""
        with self._changed:
            job.stop = True
            if job in self._queue[1:]:
                self._queue.remove(job)
                job.shown = Shown("cancelled", "Cancelled.")
            elif job in self._queue:
                job.shown = job.shown._replace(text="Stopping after this step")
            self._changed.notify_all()

    def close(self) -> None:
        """Cancels all jobs, waits for the end of the current step, and removes the folder if it is empty."""
        with self._changed:
            self._closing = True
            for job in self._queue:
                job.stop = True
            self._changed.notify_all()
        self._worker.join()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def explain(self, error: BaseException, pictures: Sequence[Path] = ()) -> str:
        """The sentence for an error, with pictures by their names alone and settings by theirs."""
        sentence = judge(error)[1].removeprefix("error: ").replace("GenerateConfig.", "").replace("SamplingConfig.", "")
        for path in pictures:
            sentence = sentence.replace(str(path), path.name)
        return sentence

    def _check_count(self, pictures: Sequence[Any]) -> None:
        if len(pictures) > self.max_references:
            raise ValueError(
                f"{len(pictures)} pictures are given; the model was trained with at most {self.max_references} "
                "references."
            )

    def _keep(self, picture: Path) -> Path:
        """Copies a picture into the folder, so that what the JSON file names stays there."""
        data = picture.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        kept = self.folder / "references" / digest[:16] / (re.sub(r"[^\w.-]", "_", picture.name)[-_MAX_NAME:])
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(kept) as temporary:
                temporary.write_bytes(data)
        return kept

    def _shown(self, job: Job) -> Shown:
        """What to show of a job now; of one that waits, its place in the queue."""
        if job.shown.state != "waiting" or job not in self._queue:
            return job.shown
        ahead = self._queue.index(job)
        if not ahead:
            return job.shown
        return Shown("waiting", f"Waiting for {ahead} video{'s' * (ahead > 1)} before this one")

    def _work(self) -> None:
        """Makes one video after the other."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if self._closing:
                    return
                job = self._queue[0]
                job.shown = Shown("running", "Starting")
                self._changed.notify_all()
            shown = self._make(job)
            with self._changed:
                job.shown = shown
                self._queue.remove(job)
                if shown.state == "done":
                    self.finished.append(job)
                self._changed.notify_all()

    def _make(self, job: Job) -> Shown:
        """Makes one video; returns how it ended, and never raises."""
        began, watch = time.monotonic(), _Watch(self, job)
        try:
            entry = generate_one(job.request, job.out, job.generator, True, watch)
            self._write_still(job)
            job.entry = entry
        except CancelledError:
            return Shown("cancelled", "Cancelled.")
        except Exception as error:
            paths = [reference.path for reference in job.request.references if isinstance(reference.path, Path)]
            return Shown("failed", self.explain(error, paths))
        finally:
            job.generator.release()
            if not job.entry:
                for left in job.out.parent.glob(f"{job.out.stem}*"):
                    left.unlink(missing_ok=True)
        notes = cut_prompts([job.request], job.generator)
        cut = " ".join(note.replace(f"The prompt of {REQUEST_ID}", "The prompt") for note in notes)
        return Shown("done", f"Done in {duration(time.monotonic() - began)}. {cut}".strip(), 1.0)

    def _write_still(self, job: Job) -> None:
        """Writes a video's first frame, by which it is found among others."""
        job.still.parent.mkdir(exist_ok=True)
        with atomic_write(job.still) as temporary:
            Image.fromarray(read_frames(job.out, [0])[0]).save(temporary, format="PNG")

    def show(self, job: Job, shown: Shown) -> None:
        """Shows something new of the job that runs.

        Raises:
          CancelledError: it is to end.
        """
        with self._changed:
            if job.stop:
                raise CancelledError
            job.shown = shown
            self._changed.notify_all()


class _Watch:
    """Follows a job through `generate_one`: text, time left and previews."""

    def __init__(self, studio: Studio, job: Job) -> None:
        self._studio, self._job = studio, job
        self._first = 0.0
        self._before: Any = None

    def __call__(self, progress: Progress) -> None:
        """Shows how far the video is; `CancelledError` ends it."""
        shown, step, count = self._job.shown, progress.step, progress.num_steps
        text = _STAGES.get(progress.stage, "")
        if progress.stage == "sample":
            if step <= 1:
                self._first = time.monotonic()
            text = f"Step {step} of {count}"
            if step > 1:
                left = (time.monotonic() - self._first) / (step - 1) * (count - step)
                text += f", about {duration(left)} left"
            elif not step:
                text += "; the first one may take longer, since the sampler is compiled"
        shown = shown._replace(text=text, share=step / count)
        every = self._job.preview_every
        if every and 0 < step < count and step % every == 0 and progress.stage == "sample":
            shown = shown._replace(preview=self._preview(progress), step=step)
        self._before = progress.latents
        self._studio.show(self._job, shown)

    def _preview(self, progress: Progress) -> UInt8[np.ndarray, "h w 3"]:
        """The first frame of the video that the last step points to; the codec needs no other frame for it."""
        generator, step = self._job.generator, progress.step
        sigmas = [float(sigma) for sigma in np.append(noise_levels(generator.config.sampling), 0)]
        before, after = (np.asarray(x)[0] for x in (self._before, progress.latents))
        clean = clean_estimate(before, after, (sigmas[step - 1], sigmas[step]))
        return to_pixels(generator.codec.decode(clean[None, :1])[0, 0])


def _new_folder(out: Path) -> Path:
    """Makes a folder that is named by the time, and that was not there before."""
    stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    for number in itertools.count():
        folder = (out / (f"{stamp}-{number}" if number else stamp)).absolute()
        out.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise AssertionError


def _differ(before: Shown | None, now: Shown) -> bool:
    return before is None or (before.state, before.text, before.step) != (now.state, now.text, now.step)


def duration(seconds: float) -> str:
    """A duration in words, at least 1 s: 14 s, 3 min 20 s, 2 h 5 min."""
    whole = max(round(seconds), 1)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
