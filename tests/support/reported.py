"""Runs of the trainer's own making but for the training: checkpoints, metrics, samples and evaluation, in a second."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from refalign_jax.config import Config, DataConfig, OptimizerConfig, Storage, SyntheticConfig, TrainConfig
from refalign_jax.data.examples import Example
from refalign_jax.data.shard_writer import ShardWriter
from refalign_jax.data.video import write_video
from refalign_jax.provenance import about
from refalign_jax.trainer.checkpoint import Checkpoints
from refalign_jax.trainer.log import Log, write_config
from refalign_jax.trainer.state import init_state, save
from support import (
    runs,  # noqa: F401, keeps compiled programs
    tiny,
)

SUBJECTS = ("cat", "coin", "rocket")
EXAMPLES = 8
WHITE = 2.5
"""Value of the latents of the reference's left third."""


def write_dataset(folder: Path, names: bool = True, masks: bool = True) -> Path:
    """Eight examples with one or two references, each the picture of its subject, white on the left."""
    rng = np.random.default_rng(0)
    F, H, W = tiny.GRID
    C, E = tiny.DIT.latent_channels, tiny.MODEL.alignment.vfm_width
    pictures = rng.standard_normal((len(SUBJECTS), H, W, C)).astype(np.float32)
    pictures[:, :, :2] = WHITE
    targets = rng.standard_normal((len(SUBJECTS), H * W // 4, E)).astype(np.float32)
    mask = np.arange(H * W // 4) % (W // 2) > 0  # the white third has no subject
    storage = Storage(video_latents="float32", reference_latents="float32", text="float32", vfm_features="float32")
    with ShardWriter(folder, storage=storage, made={}) as writer:
        for i in range(EXAMPLES):
            shown = [i % 3, (i + 1) % 3][: 1 + i % 2]
            writer.add(
                Example(
                    id=f"clip-{i}",
                    prompt="a prompt",
                    video_latents=rng.standard_normal((F, H, W, C)).astype(np.float32),
                    reference_latents=pictures[shown],
                    subject_ids=np.arange(len(shown), dtype=np.int32),
                    text=rng.standard_normal((4, tiny.DIT.text_width)).astype(np.float32),
                    vfm_features=targets[shown],
                    subject_mask=np.tile(mask, (len(shown), 1)) if masks else None,
                    metadata={"subjects": [SUBJECTS[s] for s in shown]} if names else {},
                )
            )
    return folder


def recipe(folder: Path, dataset: str, weight: float = 1.0, seed: int = 0) -> Config:
    """A recipe on such a dataset, or on synthetic examples where none is named."""
    alignment = dataclasses.replace(tiny.MODEL.alignment, weight=weight)
    return Config(
        model=dataclasses.replace(tiny.MODEL, alignment=alignment),
        data=DataConfig(path=dataset, batch_size=8, max_references=2, text_length=5, held_out=8 if dataset else 0),
        synthetic=SyntheticConfig(num_examples=0 if dataset else 8, latent_grid=tiny.GRID),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(folder=str(folder), steps=40, seed=seed),
    )


def write_run(config: Config, trained: dict) -> Path:
    """config.json, metrics.jsonl of forty steps, and a checkpoint of the parameters given."""
    folder, made = Path(config.train.folder), about()
    folder.mkdir(parents=True)
    write_config(folder, config, made)
    rng = np.random.default_rng(config.train.seed)
    with Log(config.train, 0, made) as log:
        log.note({"compile_seconds": 1.0, "parameters": 1234, "temporary_bytes": 5})
        for step in range(1, 41):
            aligned = rng.uniform(0.4, 0.6, 2) * bool(config.model.alignment.weight)
            line = {"loss": 30 / step, "flow": 2.0, "pull": aligned[0], "push": aligned[1], "seconds": 0.5}
            log.step(step, [], line | ({"held_out_loss": 25 / step} if step % 10 == 0 else {}))
    params = trained if config.model.alignment.weight else {"dit": trained["dit"]}
    with Checkpoints(folder / "checkpoints", 1) as checkpoints:
        state = init_state(params, jax.random.key(0), config)._replace(step=jax.numpy.int32(40))
        save(state, {}, config, made, checkpoints)
    return folder


def write_samples(run: Path) -> None:
    """Three samples, the last of two subjects, and their evaluation."""
    folder = run / "samples"
    folder.mkdir()
    rng = np.random.default_rng(0)
    entries = []
    for i, subjects in enumerate((("cat",), ("rocket",), ("cat", "coin"))):
        entry = {"id": f"{i}", "prompt": f"A <{subjects[0]}> & more.", "video": f"{i}.mp4", "scores": {"SSIM": 0.5}}
        entry["references"] = [{"image": f"{i}-reference-{r}.png", "subject": s} for r, s in enumerate(subjects)]
        for reference in entry["references"]:
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / reference["image"])
        for name in (f"{i}.mp4", f"{i}-truth.mp4")[: 2 - i % 2]:
            write_video(folder / name, rng.integers(0, 256, (5, 32, 32, 3), np.uint8), 8)
        entries.append(entry | ({"truth": f"{i}-truth.mp4"} if i % 2 == 0 else {}))
    (folder / "samples.json").write_text(json.dumps(entries))
    evaluation = {
        "title": "A classifier",
        "numbers": {"accuracy": 0.875, "SSIM": 0.61},
        "confusions": [{"title": "One subject", "labels": list(SUBJECTS), "matrix": [[3, 1, 0], [0, 4, 0], [1, 0, 3]]}],
        "notes": ["A note."],
        "introduction": {"title": "A demo of three subjects", "paragraphs": ["What this is, in a sentence."]},
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation))
