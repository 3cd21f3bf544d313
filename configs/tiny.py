"""A smoke test: a tiny model on synthetic examples; it runs on a laptop's CPU and learns nothing.

    python tools/train.py configs/tiny.py --train.folder runs/tiny

Hardware: one CPU. One device: as it is. Time: a minute, most of it start and compilation; not measured.
Every number is ours, chosen to be small.
"""

from refalign_jax.config import (
    AlignmentConfig,
    Config,
    DataConfig,
    DiTConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    SyntheticConfig,
    TrainConfig,
)


def get_config() -> Config:
    """The recipe."""
    return Config(
        model=ModelConfig(
            dit=DiTConfig(
                width=24,
                num_layers=3,
                num_heads=2,
                ffn_width=40,
                text_width=16,
                frequency_width=16,
                compute_dtype="float32",
                remat="none",
            ),
            alignment=AlignmentConfig(num_blocks=2, vfm_width=8),
        ),
        data=DataConfig(batch_size=8, max_references=3, text_length=5, held_out=8),
        synthetic=SyntheticConfig(num_examples=40, latent_grid=(2, 4, 6)),
        optimizer=OptimizerConfig(learning_rate=1e-3, ema_decay=0.9),
        sampling=SamplingConfig(num_steps=4),
        train=TrainConfig(steps=12, save_every=4, held_out_every=6, preview_every=12),
    )
