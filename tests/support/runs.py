"""One small recipe, shared by the tests of training, so that its program is compiled once."""

import dataclasses
import getpass
import os
import tempfile
from pathlib import Path

import jax

from refalign_jax.config import (
    AlignmentConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    SyntheticConfig,
    TrainConfig,
)
from support import tiny

CACHE = Path(
    os.environ.get("JAX_COMPILATION_CACHE_DIR", Path(tempfile.gettempdir()) / f"refalign_jax_{getpass.getuser()}")
)
"""Compiled programs; their keys hold the program and the versions, so the folder never grows stale."""
jax.config.update("jax_compilation_cache_dir", str(CACHE))

FAST_COMPILE = {"xla_backend_optimization_level": 0}
"""Compiler options that halve the time of a program that runs once or twice."""

MODEL: ModelConfig = dataclasses.replace(tiny.MODEL, alignment=AlignmentConfig(num_blocks=3, vfm_width=8))
"""All blocks aligned: one scan instead of two takes half of the time to compile."""


def recipe(folder: Path, **train: object) -> Config:
    """Twelve steps on synthetic examples over four times two devices, saved after every fifth."""
    settings = {"steps": 12, "save_every": 5, "held_out_every": 6, "preview_every": 12} | train
    return Config(
        model=MODEL,
        data=DataConfig(batch_size=8, text_length=5, held_out=8),
        synthetic=SyntheticConfig(num_examples=29, latent_grid=tiny.GRID),
        optimizer=OptimizerConfig(learning_rate=1e-3, ema_decay=0.9, schedule="cosine", warmup_steps=2),
        mesh=MeshConfig(fsdp=2),
        sampling=SamplingConfig(num_steps=2),
        train=TrainConfig(folder=str(folder), compilation_cache=str(CACHE), **settings),  # type: ignore[arg-type]
    )
