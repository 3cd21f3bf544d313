"""A recipe against a dataset: sizes taken from it, and everything that differs listed at once."""

import dataclasses
import logging

import numpy as np
import pytest

from refalign_jax.config import Config, DataConfig, Storage, SyntheticConfig, read_recipe
from refalign_jax.data.examples import Example
from refalign_jax.data.shard_writer import ShardWriter
from refalign_jax.trainer.preflight import fit_to_dataset, open_source


@pytest.fixture
def dataset(tmp_path) -> str:
    """Three examples of 2x4x6 latents with 8 channels, text of width 12 and 7 tokens, VFM width 5, two references."""
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "d", storage=Storage(), made={}, examples_per_shard=2) as writer:
        for i in range(3):
            normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
            writer.add(
                Example(
                    id=f"clip-{i}",
                    prompt="",
                    video_latents=normal(2, 4, 6, 8),
                    reference_latents=normal(2, 4, 6, 8),
                    subject_ids=np.arange(2, dtype=np.int32),
                    text=normal(5 + i, 12),
                    vfm_features=normal(2, 6, 5),
                )
            )
    return str(tmp_path / "d")


def recipe(path: str) -> Config:
    config = read_recipe("tiny")
    data = dataclasses.replace(config.data, path=path, batch_size=1, held_out=0)
    train = dataclasses.replace(config.train, held_out_every=0, preview_every=0)
    return dataclasses.replace(config, data=data, train=train, synthetic=SyntheticConfig())


def test_sizes_are_taken_from_the_dataset_and_logged(dataset, caplog):
    with pytest.raises(
        ValueError, match=r"VFM width 5, .* longest prompt has 7 tokens .--from-dataset takes these sizes"
    ):
        open_source(recipe(dataset))
    caplog.set_level(logging.INFO)
    fitted = fit_to_dataset(dataclasses.replace(recipe(dataset), synthetic=SyntheticConfig(num_examples=40)))
    dit, alignment, data = fitted.model.dit, fitted.model.alignment, fitted.data
    assert (dit.latent_channels, dit.text_width, alignment.vfm_width) == (8, 12, 5)
    assert (data.text_length, data.max_references) == (7, 2)
    assert len(open_source(fitted)) == 3
    lines = [record.getMessage() for record in caplog.records]
    assert f"model.dit.text_width is 12, as in {dataset}; the recipe says 16." in lines
    assert len(lines) == 5


def test_a_longer_text_is_kept(dataset):
    """The model attends to padding, so that a shorter text would be another computation."""
    config = recipe(dataset)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, text_length=9))
    assert fit_to_dataset(config).data.text_length == 9


def test_without_a_dataset_there_are_no_sizes(tmp_path):
    with pytest.raises(ValueError, match=r"--from-dataset needs data\.path"):
        fit_to_dataset(Config())
    with pytest.raises(ValueError, match=r"manifest\.json can't be read .No such file"):
        fit_to_dataset(Config(data=DataConfig(path=str(tmp_path / "none"))))


def test_masks_that_are_missing_are_named_where_the_loss_needs_them(dataset):
    config = fit_to_dataset(recipe(dataset))
    for changes in ({"center_targets": "dataset"}, {"subject_patches_only": True}):
        alignment = dataclasses.replace(config.model.alignment, **changes)
        masked = dataclasses.replace(config, model=dataclasses.replace(config.model, alignment=alignment))
        with pytest.raises(
            ValueError, match=r"they have no subject masks, which .* need; prepare them again in another"
        ):
            open_source(masked)
        off = dataclasses.replace(masked.model, alignment=dataclasses.replace(alignment, weight=0.0))
        open_source(dataclasses.replace(masked, model=off))
