"""Makes videos: one into a file of its own, or many into a folder.

The networks are in memory one after another, so that the peak is the largest and not the sum:

    text encoder    prompts
    VAE             references
    transformer     latents; those of each batch are kept on the disk until their video is there
    VAE             videos

Many requests go through this round by round. The noise of a video depends on the seed and the request's id alone, so
neither the other requests nor their order change it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from refalign_jax.atomic import write_text
from refalign_jax.data.records import Reference
from refalign_jax.digests import Digests
from refalign_jax.drawing import Inputs, batches, denoise, rows_per_call, stack
from refalign_jax.inference.draw import cut_prompts, embed, noise_of, references_of
from refalign_jax.inference.gallery import write_gallery
from refalign_jax.inference.opening import Generator
from refalign_jax.inference.outputs import (
    Spool,
    describe_sample,
    digest_files,
    file_names,
    read_samples,
    reason_to_make,
    remove_files,
    summarise,
    write_files,
    write_references,
    write_samples,
)
from refalign_jax.inference.references import has_background, prepare_references
from refalign_jax.inference.requests import Request, unreadable
from refalign_jax.locks import FolderInUseError, exclusive
from refalign_jax.types import Array, Float

ROUND = 64
"""Videos of a round: after so many, the networks are read again."""

WAIT_SECONDS = 60.0
"""How long a process waits for another one to enter its videos into samples.json."""


class Progress(NamedTuple):
    """How far one video is.

    Attributes:
      stage: what is being done: prompt and references are encoded, the transformer is read, steps are taken, the video
        is decoded and written.
      step: the number of steps that are done.
      num_steps: N, the number of all.
      latents: the state after these steps, at the noise level σ_step; the first of the batch is the video's. None
        before and after the sampler runs.
    """

    stage: Literal["prompt", "references", "transformer", "sample", "decode"]
    step: int
    num_steps: int
    latents: Float[Array, "B F H W C"] | Float[np.ndarray, "B F H W C"] | None = None


Watch = Callable[[Progress], None]
"""Is called as a video is made; what it raises ends the making."""


def generate(requests: Sequence[Request], out: Path, generator: Generator) -> list[dict[str, Any]]:
    """Samples a video for each request into a folder, except those that are there, whole and made of the same inputs.

    It prints how many are kept and how many are made for which reason. Entries of other requests stay. A request that
    can't be made is reported, and the others go on.

    Args:
      requests: what to sample; of them, this process makes `generate.part` or, where several processes have joined
        each other, its own share.
      out: the folder, created if it does not exist.
      generator: weights, encoders and settings.

    Returns:
      The entries of samples.json, in the order of the requests.

    Raises:
      ValueError: some requests could not be made, after all others were; the folder is in use by another process; its
        samples.json is not what this function writes.
      OSError: the folder can't be written; finished videos are kept.
    """
    requests = _own_part(requests, generator)
    faults = unreadable(requests)
    good = [request for request in requests if request.id not in faults]
    if not good and faults:
        raise ValueError(_report(faults, requests, out))
    with _writer(out, generator), Digests(out) as digests:
        made = generator.made | {"digests": generator.digests(digests)}
        saved = generator.generate.saved
        wanted = {request.id: describe_sample(request, made, digests, saved) for request in good}
        folder = _Folder(out, digests, {entry["id"]: entry for entry in read_samples(out)}, generator)
        reasons = {id: reason_to_make(out, folder.entries.get(id), entry, digests) for id, entry in wanted.items()}
        reasons = {id: reason for id, reason in reasons.items() if reason}
        print(summarise(len(good), reasons), flush=True)
        kept = {id: folder.entries[id] | entry for id, entry in wanted.items() if id not in reasons}
        folder.enter(kept)  # places may be new
        todo = [request for request in good if request.id in reasons]
        _print_hints(todo, generator)
        for start in range(0, len(todo), ROUND):
            part = todo[start : start + ROUND]
            faults |= _make(part, wanted, folder, f"{start + len(part)} of {len(todo)}" if len(todo) > ROUND else "")
        if _parts(generator)[1] == 1:
            Spool(out).clear()
        write_gallery(out, list(folder.entries.values()))
        if faults:
            raise ValueError(_report(faults, requests, out))
        return [folder.entries[request.id] for request in requests]


def generate_one(
    request: Request, out: Path, generator: Generator, show_references: bool = False, watch: Watch | None = None
) -> dict[str, Any]:
    """Samples one video into a file, and describes it in a JSON file beside it.

    Args:
      request: what to sample.
      out: the MP4; what is there is replaced.
      generator: weights, encoders and settings.
      show_references: whether to write the references as the model sees them, before anything is sampled, as
        <out>-reference-0.png and so on.
      watch: is called when a stage begins and after each step.

    Returns:
      What the JSON file holds.

    Raises:
      ValueError: `out` is no .mp4 in a folder that exists, a reference can't be read, or the sample is not finite.
      OSError: a file can't be written.
    """
    if out.suffix.lower() != ".mp4" or not out.parent.is_dir():
        wrong = "must end in .mp4" if out.suffix.lower() != ".mp4" else f"is in {out.parent}, which is no folder"
        raise ValueError(f"--out {out} {wrong}.")
    faults = unreadable([request])
    if faults:
        raise ValueError(f"{faults[request.id]}.")
    with Digests(digest_cache()) as digests:
        made = generator.made | {"digests": generator.digests(digests)}
        entry = describe_sample(request, made, digests, generator.generate.saved, stem=out.stem)
        if not show_references:
            entry["references"] = [{**about, "image": ""} for about in entry["references"]]
        _print_hints([request], generator)
        stages = _Stages([request], generator, watch)
        images = stages.prepare()
        if stages.faults:
            raise ValueError(f"{stages.faults[request.id]}.")
        write_references(out.parent, entry, images[request.id])
        latents = dict(stages.draw({}))
        if stages.faults:
            raise ValueError(f"{stages.faults[request.id]}.")
        stages.report("decode", generator.config.sampling.num_steps)
        write_files(out.parent, entry, latents[request.id], generator.codec)
        generator.release()
        write_text(out.with_suffix(".json"), json.dumps(entry, indent=1, ensure_ascii=False))
        return entry


def digest_cache() -> Path:
    """The folder that keeps digests of weights from one video to the next."""
    cache = Path.home() / ".cache" / "refalign_jax"
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    return cache


class _Folder(NamedTuple):
    """A folder of samples.

    Attributes:
      path: of the folder.
      digests: of files.
      entries: of samples.json by id.
      generator: what makes the videos.
    """

    path: Path
    digests: Digests
    entries: dict[str, dict[str, Any]]
    generator: Generator

    def enter(self, made: Mapping[str, dict[str, Any]]) -> None:
        """Enters videos into samples.json, beside what other processes have entered."""
        with _entering(self.path, self.generator):
            if _parts(self.generator)[1] > 1:
                self.entries.update({entry["id"]: entry for entry in read_samples(self.path)})
            self.entries.update(made)
            write_samples(self.path, list(self.entries.values()))


def _make(part: Sequence[Request], wanted: Mapping[str, Any], folder: _Folder, which: str) -> dict[str, str]:
    """Makes the videos of one round; returns the reasons of those that could not be made, by id.

    A video is there with all of its files and its entry, or is not. Latents that an earlier process left are used.
    """
    out, generator = folder.path, folder.generator
    spool = Spool(out)
    if which:
        print(f"Videos up to {which}.", flush=True)
    stages = _Stages(part, generator)
    images = stages.prepare()
    ready = [request for request in part if request.id not in stages.faults]
    found = {request.id: latents for request in ready if (latents := spool.read(wanted[request.id])) is not None}
    for id, latents in stages.draw(found):
        spool.write(wanted[id], latents)
    done = [request for request in ready if request.id not in stages.faults]
    for request in tqdm(done, desc="decode", unit="video", delay=5):
        entry = wanted[request.id]
        latents = spool.read(entry)
        assert latents is not None, request.id
        before = folder.entries.get(request.id, {}).get("files")
        old = [name for name in before if isinstance(name, str)] if isinstance(before, dict) else []
        try:
            remove_files(out, old)
            write_references(out, entry, images[request.id])
            write_files(out, entry, latents, generator.codec)
            folder.enter({request.id: entry | {"files": digest_files(out, entry, folder.digests)}})
        except BaseException:
            remove_files(out, file_names(entry))
            raise
        spool.remove(entry)
    generator.release()
    return stages.faults


class _Stages:
    """The stages of some requests before their videos; `faults` collects the reasons of those that fail, by id."""

    def __init__(self, requests: Sequence[Request], generator: Generator, watch: Watch | None = None) -> None:
        self._requests, self._generator, self._watch = requests, generator, watch
        self._images: dict[str, UInt8[np.ndarray, "R h w 3"]] = {}
        self.faults: dict[str, str] = {}

    def report(self, stage: Any, step: int = 0, latents: Any = None) -> None:
        """Calls `watch`, if there is one, with what `Progress` holds."""
        if self._watch:
            self._watch(Progress(stage, step, self._generator.config.sampling.num_steps, latents))

    def prepare(self) -> dict[str, UInt8[np.ndarray, "R h w 3"]]:
        """Reads the references and puts them on white; returns them by id."""
        _, rows, columns = self._generator.size
        for request in self._requests:
            try:
                self._images[request.id] = prepare_references(
                    request.references, (rows, columns), self._generator.cut_out
                )
            except (ValueError, OSError) as error:
                self.faults[request.id] = str(error).rstrip(".")
        return self._images

    def draw(self, found: Mapping[str, Float[np.ndarray, "F H W C"]]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the latents of each request by its id, as they are drawn; those in `found` are not drawn again."""
        generator = self._generator
        todo = [r for r in self._requests if r.id not in self.faults and r.id not in found]
        yield from found.items()
        if not todo:
            return
        inputs = self._inputs(todo)
        config, mesh = generator.config, generator.mesh
        size = rows_per_call(mesh, generator.generate.batch_size, config.sampling.batched_guidance)
        groups = batches(inputs, size)
        self.report("transformer")
        params = generator.transformer()
        with tqdm(total=len(groups) * config.sampling.num_steps, desc="sample", unit="step") as bar:
            for number, ids in enumerate(groups):
                bar.set_postfix_str(f"video {sum(map(len, groups[:number])) + 1} of {len(inputs)}")
                batch = stack([inputs[id] for id in ids], size)
                drawn = denoise(params, batch, dit=config.model.dit, config=config.sampling, mesh=mesh)
                self.report("sample", 0, batch.noise)
                for step, x in enumerate(drawn, 1):
                    x.block_until_ready()
                    bar.update()
                    self.report("sample", step, x)
                for id, latents in zip(ids, np.asarray(x)[: len(ids)], strict=True):
                    if np.isfinite(latents).all():
                        yield id, latents
                    else:
                        self.faults[id] = self._not_finite(id)
        del params
        generator.release()

    def _inputs(self, todo: Sequence[Request]) -> dict[str, Inputs]:
        """What each request is drawn from; text encoder and codec are in memory one after the other."""
        generator = self._generator
        self.report("prompt")
        text = embed(todo, generator)
        generator.release()
        inputs: dict[str, Inputs] = {}
        self.report("references")
        for request in tqdm(todo, desc="encode references", unit="request", delay=5):
            try:
                references = references_of(request, self._images[request.id], generator)
                inputs[request.id] = Inputs(noise_of(request, generator), *text[request.id], references)
            except ValueError as error:
                self.faults[request.id] = str(error).rstrip(".")
        generator.release()
        return inputs

    def _not_finite(self, id: str) -> str:
        sampling = self._generator.config.sampling
        return (
            f"The sample of {id} holds NaN or infinity; the weights {self._generator.weights} or the guidance "
            f"({sampling.reference_guidance:g}, {sampling.text_guidance:g}) are at fault"
        )


def _print_hints(requests: Sequence[Request], generator: Generator) -> None:
    """Prints what may make videos worse than they need be: prompts that are cut, references with a background."""
    for sentence in cut_prompts(requests, generator):
        print(sentence, flush=True)
    if generator.cut_out is None:
        whole = [r.path for request in requests for r in request.references if _has_background(r)]
        if whole:
            which = f"{whole[0]} has" if len(whole) == 1 else f"{whole[0]} and {len(whole) - 1} other references have"
            print(
                f"{which} a background, which is not removed; the model was trained with subjects on white. Give masks "
                "or cut-outs, or --remove-background.",
                flush=True,
            )


def _has_background(reference: Reference) -> bool:
    with contextlib.suppress(ValueError, OSError):
        return has_background(reference)
    return False  # what is wrong with it is said elsewhere


def _report(faults: Mapping[str, str], requests: Sequence[Request], out: Path) -> str:
    """The sentence for requests that could not be made: the first few, and how many there are."""
    named = [f"{request.where or request.id}: {faults[request.id]}" for request in requests if request.id in faults]
    more = f"; and {len(named) - 3} more" if len(named) > 3 else ""
    rest = f" The other {len(requests) - len(named)} are in {out}." if len(named) < len(requests) else ""
    return f"{len(named)} of {len(requests)} videos were not made. {'; '.join(named[:3])}{more}.{rest}"


def _parts(generator: Generator) -> tuple[int, int]:
    """Which part of the requests this process makes, from 1, and of how many."""
    part = generator.generate.part
    return (jax.process_index() + 1, jax.process_count()) if part == (1, 1) else part


def _own_part(requests: Sequence[Request], generator: Generator) -> list[Request]:
    """Every n-th request, so that parts are alike in their kinds of requests."""
    index, count = _parts(generator)
    return list(requests)[index - 1 :: count]


@contextlib.contextmanager
def _writer(out: Path, generator: Generator) -> Iterator[None]:
    """Holds the folder as its only writer or, where there are several parts, as the only one of this part."""
    index, count = _parts(generator)
    place = out if count == 1 else out / f".part-{index}-of-{count}"
    with exclusive(place, "tools/sample.py"):
        yield
    if count > 1:
        with contextlib.suppress(OSError):
            place.rmdir()


@contextlib.contextmanager
def _entering(out: Path, generator: Generator) -> Iterator[None]:
    """Holds the folder for the moment in which samples.json is read and written, where there are several parts.

    Raises:
      FolderInUseError: another process holds it for long.
    """
    if _parts(generator)[1] == 1:
        yield
        return
    deadline = time.monotonic() + WAIT_SECONDS
    with contextlib.ExitStack() as stack_:
        while True:
            try:
                stack_.enter_context(exclusive(out, "tools/sample.py"))
                break
            except FolderInUseError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield
