"""Models by their name on the hub: out of the cache without a network, else one sentence."""

import json

import huggingface_hub
import huggingface_hub.errors
import jax
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from refalign_jax.convert.dinov2 import dinov2_table
from refalign_jax.convert.table import published_shapes
from refalign_jax.encoders.hub import fetch
from refalign_jax.encoders.open import open_feature_encoder
from refalign_jax.models import dinov2

NAME, COMMIT = "someone/some-vit", "0" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a hub that can't be reached."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def put(cache, files):
    """Puts a model into the cache, as a download does."""
    folder = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for name, write in files.items():
        write(snapshot / name)
    return snapshot


def test_a_cached_model_is_opened_without_a_network(cache):
    published = {"model_type": "dinov2", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    published |= {"image_size": 28}
    config = dinov2.DINOv2Config.from_json(published)
    shapes = published_shapes(dinov2_table(config), jax.eval_shape(lambda: dinov2.init(config, jax.random.key(0))))
    params = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    snapshot = put(
        cache,
        {
            "config.json": lambda path: path.write_text(json.dumps(published)),
            "model.safetensors": lambda path: save_file(params, path),
        },
    )
    assert fetch(NAME) == snapshot
    encoder = open_feature_encoder(NAME)
    assert encoder.width == 8
    assert encoder.describe()["path"] == str(snapshot)


def test_a_model_that_is_neither_cached_nor_reachable(cache):
    with pytest.raises(ValueError, match=r"^--vfm someone/some-vit: there is no such path, and .* not in the cache"):
        open_feature_encoder(NAME)
    put(cache, {"config.json": lambda path: path.write_text("{}")})  # an interrupted download
    with pytest.raises(ValueError, match=r"not in the cache|no config\.json with safetensors"):
        open_feature_encoder(NAME)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (huggingface_hub.errors.GatedRepoError, "the hub gives this model only to those whose request was granted"),
        (huggingface_hub.errors.RepositoryNotFoundError, "no such model on the hub"),
        (OSError, "can't be fetched"),
    ],
)
def test_what_the_hub_refuses_is_said(cache, monkeypatch, error, sentence):
    real = huggingface_hub.snapshot_download

    def refuse(*arguments, local_files_only=False, **options):
        if local_files_only:
            return real(*arguments, local_files_only=True, **options)
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=sentence):
        fetch(NAME)


@pytest.mark.parametrize("choice", ["daisy", "./a/b/c", "/a/b", "a b/c", ""])
def test_what_can_be_no_name_is_a_path(choice):
    assert fetch(choice) is None
