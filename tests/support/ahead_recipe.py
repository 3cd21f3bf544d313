"""Two blocks of a head width that TPUs like, for test_ahead.py."""

from refalign_jax.config import AlignmentConfig, Config, DataConfig, DiTConfig, MeshConfig, ModelConfig, SyntheticConfig


def get_config() -> Config:
    """The recipe."""
    return Config(
        model=ModelConfig(
            dit=DiTConfig(width=256, num_layers=2, num_heads=2, ffn_width=512, text_width=64),
            alignment=AlignmentConfig(num_blocks=2, vfm_width=64),
        ),
        data=DataConfig(batch_size=2, max_references=2, text_length=16),
        synthetic=SyntheticConfig(num_examples=2, latent_grid=(3, 48, 48)),
        mesh=MeshConfig(fsdp=2, context=2),
    )
