"""The demo's model: learns on a CPU to put photographs into clips; what `make demo` trains.

python tools/demo.py
Every number is ours, chosen for two CPU cores.
"""

from refalign_jax.config import AlignmentConfig, DiTConfig, ModelConfig, SamplingConfig
from refalign_jax.data.loader import DataConfig
from refalign_jax.train_config import Config, OptimizerConfig, TrainConfig


def get_config() -> Config:
    """The recipe."""
    return Config(
        model=ModelConfig(
            dit=DiTConfig(
                width=240,
                num_layers=4,
                num_heads=5,
                ffn_width=480,
                text_width=64,
                frequency_width=64,
                latent_channels=32,
                rope_theta=100.0,
                max_position=64,
                compute_dtype="float32",
                remat="none",
            ),
            alignment=AlignmentConfig(num_blocks=2, vfm_width=108),
        ),
        data=DataConfig(batch_size=16, max_references=2, text_length=28, held_out=64),
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=50, final_share=0.05),
        sampling=SamplingConfig(num_steps=25, reference_guidance=1.0, text_guidance=1.0),
        train=TrainConfig(steps=1000, save_every=250, keep=1, held_out_every=250),
    )
