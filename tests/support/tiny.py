"""A tiny model and batches of it, shared by the tests."""

import jax
import jax.numpy as jnp
import numpy as np

from refalign_jax.config import AlignmentConfig, DiTConfig, ModelConfig
from refalign_jax.initial import init_model
from refalign_jax.objective import Batch

DIT = DiTConfig(
    width=24,
    num_layers=3,
    num_heads=2,
    ffn_width=40,
    text_width=16,
    frequency_width=16,
    compute_dtype="float32",
    remat="none",
)
MODEL = ModelConfig(dit=DIT, alignment=AlignmentConfig(num_blocks=2, vfm_width=8))
GRID = (2, 4, 6)
"""Latent frames, rows, columns."""


def params(config: ModelConfig = MODEL, seed: int = 0, spread: float = 0.1) -> dict:
    """Random parameters with nothing left at zero, so that every path carries a signal."""
    tree = jax.jit(init_model, static_argnums=0)(config, jax.random.key(seed))
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return structure.unflatten(
        [x + spread * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    )


def batch(
    counts: list[int],
    references: int = 3,
    seed: int = 0,
    config: ModelConfig = MODEL,
    grid: tuple[int, int, int] = GRID,
) -> Batch:
    """Random samples with so many real references each; the padding holds random numbers too."""
    rng = np.random.default_rng(seed)
    F, H, W = grid
    B, C, P = len(counts), config.dit.latent_channels, H * W // 4

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return Batch(
        video_latents=normal(B, F, H, W, C),
        text=normal(B, 5, config.dit.text_width),
        reference_latents=normal(B, references, H, W, C),
        num_references=jnp.asarray(counts, jnp.int32),
        subject_ids=jnp.tile(jnp.arange(references), (B, 1)),
        vfm_features=normal(B, references, P, config.alignment.vfm_width),
        aligned=jnp.ones(B, bool),
    )


def relative(ours: object, theirs: object) -> float:
    """‖ours - theirs‖ / ‖theirs‖ in float64; where theirs is 0, ‖ours‖."""
    a, b = (np.asarray(x, np.float64).ravel() for x in (ours, theirs))
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0))
