"""The stages of the demo: clips, prepared examples, training, samples, scores, report.

Each stage skips what it finds done, so the demo continues wherever it was stopped.

    FOLDER/clips, references, dataset     clips of moving photographs, and the prepared examples
    FOLDER/seed-0                         the run: checkpoints, metrics, samples, evaluation.json
    FOLDER/report.html                    its report
    FOLDER/seed-1, seed-0-unaligned,      the other runs of the comparison
    seed-0-options, …
    FOLDER/comparison.html                the report of the comparison
    FOLDER/unseen-3                       all of that, with 3 subjects that only held-out clips show
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from refalign_jax.atomic import write_text
from refalign_jax.config import Config, DemoConfig, GenerateConfig, PrepareConfig
from refalign_jax.convert.checkpoint import find_checkpoint
from refalign_jax.data.examples import fill
from refalign_jax.data.prepare import prepare
from refalign_jax.data.records import Record, Reference
from refalign_jax.data.shards import ShardSource
from refalign_jax.data.video import write_latents
from refalign_jax.demo.photographs import SUBJECTS, UNSEEN
from refalign_jax.demo.scenes import CELL, FPS, GRID, NUM_FRAMES, draw_scenes, read_scene, reference_path, write_clips
from refalign_jax.demo.score import Judged, evaluation, judge_files
from refalign_jax.encoders.open import reopen_video_codec
from refalign_jax.inference.generate import generate
from refalign_jax.inference.opening import open_generator
from refalign_jax.inference.outputs import write_samples
from refalign_jax.inference.requests import Request
from refalign_jax.trainer.loop import train

logger = logging.getLogger(__name__)

EVALUATION = "evaluation.json"

Loss = Literal["recipe", "unaligned", "options"]
LOSSES: Mapping[Loss, Mapping[str, Any]] = {
    "recipe": {},
    "unaligned": {"weight": 0.0},
    "options": {"weight": 3.0, "center_targets": "dataset", "subject_patches_only": True},
}
"""The alignment losses that are compared, by what each changes in the recipe's, which is the published one."""


def demo(demo: DemoConfig, recipe: Config) -> Path:
    """Runs every stage for one seed; returns the path of the report.

    Raises:
      InterruptedError: training was stopped. Run the demo again to continue.
      ValueError: the recipe does not fit the clips, or a file is damaged.
      OSError: a file can't be written.
    """
    run = whole_run(demo, recipe, seed=0)
    report = demo.place / "report.html"
    _write_report(run, report)
    return report


def compare(demo: DemoConfig, recipe: Config) -> Path:
    """Runs every stage with each of `LOSSES` for each seed; returns the path of the comparison's report.

    Raises:
      InterruptedError, ValueError, OSError: as `demo`.
    """
    runs = {
        loss: [whole_run(demo, recipe, seed=seed, loss=loss) for seed in range(demo.seeds)] for loss in LOSSES
    }  # the runs of the first loss come first: stopped early, they are whole
    pairs = {loss: list(zip(runs[loss], runs["unaligned"], strict=True)) for loss in ("recipe", "options")}
    report = demo.place / "comparison.html"
    headings = {
        "recipe": "What alignment changes",
        "options": "What alignment changes with targets that do not contradict themselves",
    }
    _write_report(runs["recipe"][0], report, {headings[loss]: pairs[loss] for loss in pairs})
    return report


def _write_report(run: Path, out: Path, pairs: Mapping[str, Sequence[tuple[Path, Path]]] | None = None) -> None:
    from refalign_jax.report import page  # here, because it imports Matplotlib, which no other stage needs

    page.write_report(run, out, pairs)


def whole_run(demo: DemoConfig, recipe: Config, *, seed: int, loss: Loss = "recipe") -> Path:
    """Prepares, trains, samples and scores one run; returns its folder.

    Raises:
      ValueError: sizes of the demo that don't fit the recipe, before anything is drawn.
    """
    if demo.clips <= recipe.data.held_out:
        raise ValueError(
            f"DemoConfig.clips={demo.clips} leaves none to train on; it must be above {recipe.data.held_out}, the "
            "number of held-out clips."
        )
    config = run_config(demo, recipe, demo.place / "dataset", seed=seed, loss=loss)  # compares numbers of steps
    prepare_dataset(demo, recipe)
    train_run(config)
    run = Path(config.train.folder)
    if not (run / EVALUATION).exists():
        evaluate(run, config, demo.samples)
    return run


def run_config(demo: DemoConfig, recipe: Config, dataset: Path, *, seed: int = 0, loss: Loss = "recipe") -> Config:
    """The recipe of one run of the demo: `recipe` with the dataset, the folder, the seed and the steps filled in.

    Args:
      demo: folder and size of the demo.
      recipe: model and training.
      dataset: folder of the prepared examples.
      seed: of the parameters, of the noise and of the order of the examples.
      loss: which alignment loss.
    """
    run = demo.place / (f"seed-{seed}" if loss == "recipe" else f"seed-{seed}-{loss}")
    alignment = dataclasses.replace(recipe.model.alignment, **LOSSES[loss])
    training = dataclasses.replace(
        recipe.train,
        folder=str(run),
        seed=seed,
        steps=demo.steps or recipe.train.steps,
        compilation_cache=recipe.train.compilation_cache or str(demo.place / "compiled"),
    )
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, alignment=alignment),
        data=dataclasses.replace(recipe.data, path=str(dataset), shuffle_seed=seed),
        train=training,
    )


def prepare_dataset(demo: DemoConfig, recipe: Config) -> Path:
    """Writes the clips and prepares the dataset with stand-in encoders that fit the recipe's model.

    Returns:
      Folder of the dataset.
    """
    records, source = _write_records(demo, recipe.data.held_out), {"name": "demo", "clips": demo.clips}
    if demo.unseen:  # which clips are held out depends on their numbers
        source["settings"] = {"unseen": demo.unseen, "clips": demo.clips, "held_out": recipe.data.held_out}
    dit = recipe.model.dit
    settings = PrepareConfig(
        vae="dct",
        text_encoder="words",
        vfm="efficientnet-lite0",
        height=GRID * CELL,
        width=GRID * CELL,
        num_frames=NUM_FRAMES,
        max_references=recipe.data.max_references,
        dct_stride=CELL // 2,
        dct_channels=dit.latent_channels,
        word_width=dit.text_width,
        batch_size=8,
        examples_per_shard=128,
    )
    dataset = demo.place / "dataset"
    logger.info(prepare(records, dataset, settings, source))
    return dataset


def _write_records(demo: DemoConfig, held_out: int) -> list[Record]:
    """Writes the clips; the records of those that are held out come last."""
    if not demo.unseen:
        return write_clips(demo.place, draw_scenes(demo.clips, seed=0))
    unseen = UNSEEN[: demo.unseen]
    known = draw_scenes(demo.clips - held_out, seed=0, subjects=[name for name in SUBJECTS if name not in unseen])
    held = draw_scenes(held_out, seed=1, subjects=unseen)
    return write_clips(demo.place, known) + write_clips(demo.place, held, "unseen-")


def train_run(config: Config) -> None:
    """Trains to the recipe's last step, from the newest checkpoint if there is one.

    Raises:
      InterruptedError: training was stopped before its last step and has saved a checkpoint.
    """
    train(config)
    folder = Path(config.train.folder)
    step = int(find_checkpoint(folder)[0].name)
    if step < config.train.steps:
        raise InterruptedError(f"{folder} was stopped at step {step} of {config.train.steps}; start again to go on.")


def evaluate(run: Path, config: Config, count: int) -> None:
    """Samples held-out captions, writes the true clips beside them, and the scores to samples.json and evaluation.json.

    Args:
      run: folder of the run.
      config: recipe of the run.
      count: number of captions, at most `data.held_out`.
    """
    source = ShardSource(config.data.path)
    first = config.data.first_held_out(len(source))
    examples = [source[index] for index in range(first, first + min(count, config.data.held_out))]
    folder = run / "samples"
    settings = GenerateConfig(batch_size=16, fps=FPS, ema=bool(config.optimizer.ema_decay))
    requests = [_request(about, Path(config.data.path).parent) for _, about in examples]
    entries = generate(requests, folder, open_generator(str(run), settings))
    codec = reopen_video_codec(source.manifest.made["encoders"]["video"])
    judged: list[Judged] = []
    for entry, (arrays, about) in zip(entries, examples, strict=True):
        latents = np.empty(arrays["video_latents"].shape, np.float32)
        fill(latents, arrays, "video_latents")
        entry["truth"] = f"{entry['id']}-truth.mp4"
        write_latents(folder / entry["truth"], latents, codec, FPS)
        judged.append(judge_files(folder, entry, read_scene(about["metadata"]["scene"])))
        verdicts = judged[-1].verdicts
        right = sum(v.recognised == v.requested for v in verdicts)
        entry["scores"] = {
            "right": f"{right} of {len(verdicts)}",
            "SSIM": float(np.mean([v.ssim for v in verdicts])),
        }
    write_samples(folder, entries)
    unseen = source.manifest.made["source"].get("settings", {}).get("unseen", 0)
    found = evaluation(judged) | {"introduction": introduction(config, len(examples), unseen)}
    write_text(run / EVALUATION, json.dumps(found, indent=1, ensure_ascii=False))


def introduction(config: Config, samples: int, unseen: int = 0) -> dict[str, Any]:
    """What the page of a run says first, in the form of evaluation.json.

    Args:
      config: recipe of the run.
      samples: number of samples.
      unseen: number of subjects that the samples show and training did not.
    """
    never = f" They show {unseen} subjects that no clip of training shows." if unseen else ""
    return {
        "title": "RefAlign in small: subjects from reference images in sampled videos",
        "paragraphs": [
            f"A small video diffusion transformer learned on this machine to put a given subject into a video. It gets "
            "reference images, which show the subject mirrored, turned, smaller and in another light, and a caption, "
            "which says where the subject starts, how it moves and over what, but not what it is. Here it is asked "
            f"for {samples} videos whose captions and references it has not seen.{never}",
            f"Why the pictures look as they do: a video has {NUM_FRAMES} frames of {GRID * CELL}x{GRID * CELL} pixels, "
            f"a simple codec retains {config.model.dit.latent_channels} numbers for each block of "
            f"{CELL // 2}x{CELL // 2} pixels, and the model is hundreds of times smaller than the published ones "
            "and trained for minutes. The true clips beside the samples went through the same codec.",
            "What alignment changes was measured beforehand, five seeds of 1,000 steps with and without alignment (to "
            "targets that do not contradict themselves): the nearest neighbour of a reference token is of its subject "
            "more often by 0.27 (95% interval 0.26 to 0.28), both of two subjects are right more often by 0.05 (0.01 "
            "to 0.09).",
            "Try your own photograph: python tools/demo.py --photo me.jpg",
        ],
    }


def _request(about: Mapping[str, Any], folder: Path) -> Request:
    """The request for a video of an example's caption with its references."""
    references = tuple(
        Reference(path=reference_path(folder, about["id"], number), subject=actor.subject)
        for number, actor in enumerate(read_scene(about["metadata"]["scene"]).actors)
    )
    return Request(id=about["id"], prompt=about["prompt"], references=references)
