"""The demo from nothing to a report: clips, examples, training, samples, scores, page.

Each stage passes over what it finds done, so that the demo goes on wherever it was stopped.

    FOLDER/clips, references, dataset     photographs moved about, and the examples made of them
    FOLDER/seed-0                         the run: checkpoints, metrics, samples, evaluation.json
    FOLDER/report.html                    what to look at
    FOLDER/seed-1, seed-0-unaligned …     the other runs of the comparison
    FOLDER/comparison.html
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refalign_jax.config import Config, DemoConfig, GenerateConfig, PrepareConfig
from refalign_jax.convert.checkpoint import find_checkpoint
from refalign_jax.data.examples import fill
from refalign_jax.data.prepare import prepare
from refalign_jax.data.records import Reference
from refalign_jax.data.shards import ShardSource
from refalign_jax.data.video import to_pixels, write_video
from refalign_jax.demo.scenes import CELL, FPS, GRID, NUM_FRAMES, draw_scenes, read_scene, reference_path, write_clips
from refalign_jax.demo.score import Verdict, evaluation, judge_files
from refalign_jax.encoders.open import reopen_video_codec
from refalign_jax.inference.generate import Request, generate, open_generator, write_samples
from refalign_jax.report.page import write_report
from refalign_jax.trainer.loop import train

logger = logging.getLogger(__name__)

EVALUATION = "evaluation.json"


def demo(demo: DemoConfig, recipe: Config) -> Path:
    """Runs every stage for one seed; returns the report.

    Raises:
      InterruptedError: training was asked to stop; started again, the demo goes on.
      ValueError, OSError: what a user can mend, in one sentence.
    """
    run = whole_run(demo, recipe, seed=0, aligned=True)
    report = demo.folder / "report.html"
    write_report(run, report)
    return report


def compare(demo: DemoConfig, recipe: Config) -> Path:
    """Runs every stage with and without alignment for each seed; returns the comparison's report.

    Raises:
      As `demo`.
    """
    runs = [
        [whole_run(demo, recipe, seed=seed, aligned=aligned) for aligned in (True, False)] for seed in range(demo.seeds)
    ]
    report = demo.folder / "comparison.html"
    write_report(runs[0][0], report, [(aligned, unaligned) for aligned, unaligned in runs])
    return report


def whole_run(demo: DemoConfig, recipe: Config, *, seed: int, aligned: bool) -> Path:
    """Prepares, trains, samples and scores one run; returns its folder."""
    run = demo.folder / (f"seed-{seed}" if aligned else f"seed-{seed}-unaligned")
    dataset = prepare_dataset(demo, recipe)
    alignment = recipe.model.alignment if aligned else dataclasses.replace(recipe.model.alignment, weight=0.0)
    training = dataclasses.replace(
        recipe.train,
        folder=str(run),
        seed=seed,
        steps=demo.steps or recipe.train.steps,
        compilation_cache=recipe.train.compilation_cache or str(demo.folder / "compiled"),
    )
    config = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, alignment=alignment),
        data=dataclasses.replace(recipe.data, path=str(dataset), shuffle_seed=seed),
        train=training,
    )
    train_run(config)
    if not (run / EVALUATION).exists():
        evaluate(run, config, demo.samples)
    return run


def prepare_dataset(demo: DemoConfig, recipe: Config) -> Path:
    """Writes clips and references, and prepares the dataset with stand-in encoders as wide as the recipe's model."""
    records = write_clips(demo.folder, draw_scenes(demo.clips, seed=0))
    dit = recipe.model.dit
    settings = PrepareConfig(
        vae="dct",
        text_encoder="words",
        vfm="daisy",
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
    dataset = demo.folder / "dataset"
    logger.info(prepare(records, dataset, settings, {"name": "demo", "clips": demo.clips}))
    return dataset


def train_run(config: Config) -> None:
    """Trains to the recipe's last step, or goes on to it.

    Raises:
      InterruptedError: it was asked to stop before, and has saved what it did.
    """
    train(config)
    folder = Path(config.train.folder)
    step = int(find_checkpoint(folder)[0].name)
    if step < config.train.steps:
        raise InterruptedError(f"{folder} was stopped at step {step} of {config.train.steps}; start again to go on.")


def evaluate(run: Path, config: Config, count: int) -> None:
    """Samples held-out captions with the true clips beside, and writes scores into samples.json and evaluation.json."""
    source = ShardSource(config.data.path)
    first = len(source) - config.data.held_out
    examples = [source[index] for index in range(first, first + min(count, config.data.held_out))]
    folder = run / "samples"
    settings = GenerateConfig(batch_size=16, fps=FPS, ema=bool(config.optimizer.ema_decay))
    requests = [_request(about, Path(config.data.path).parent) for _, about in examples]
    entries = generate(requests, folder, open_generator(str(run), settings))
    codec = reopen_video_codec(source.manifest.made["encoders"]["video"])
    verdicts: list[list[Verdict]] = []
    for entry, (arrays, about) in zip(entries, examples, strict=True):
        latents = np.empty((1, *arrays["video_latents"].shape), np.float32)
        fill(latents[0], arrays, "video_latents")
        entry["truth"] = f"{entry['id']}-truth.mp4"
        write_video(folder / entry["truth"], to_pixels(codec.decode(latents)[0]), FPS)
        verdicts.append(judge_files(folder, entry, read_scene(about["metadata"]["scene"])))
        entry["scores"] = {
            "right": float(np.mean([v.named == v.asked for v in verdicts[-1]])),
            "ssim": float(np.mean([v.ssim for v in verdicts[-1]])),
        }
    write_samples(folder, entries)
    partial = run / f".{EVALUATION}.{os.getpid()}.partial"
    partial.write_text(json.dumps(evaluation(verdicts), indent=1, ensure_ascii=False), encoding="utf-8")
    partial.replace(run / EVALUATION)


def _request(about: Mapping[str, Any], folder: Path) -> Request:
    """The video that an example's caption and references ask for."""
    references = tuple(
        Reference(path=reference_path(folder, actor), subject=actor.subject)
        for actor in read_scene(about["metadata"]["scene"]).actors
    )
    return Request(id=about["id"], prompt=about["prompt"], references=references)
