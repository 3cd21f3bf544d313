"""The verification tool on encoders: golden values agree, and a fault in any of the three makes it fail."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refalign_jax.verify.folder import verify
from refalign_jax.verify.report import NOT_ALL_COMPARED

COMPARED = {"vae_latents", "vae_image_latents", "vae_decoded", "t5_embeddings", "dino_tokens"}


def test_every_golden_value_agrees(golden):
    report = verify(golden / "encoders_a")
    assert report.passed, [row for row in report.rows if not row.passed] + report.remarks
    assert {row.name for row in report.rows} == COMPARED


@pytest.mark.parametrize(
    ("model", "tensor", "value"),
    [
        ("umt5", "blocks.1.attn.q.weight", "t5_embeddings"),
        ("dinov3", "model.layer.1.layer_scale2.lambda1", "dino_tokens"),
    ],
)
def test_a_changed_weight_of_one_encoder_fails(golden, tmp_path, model, tensor, value):
    for name in (f"{model}.safetensors", "config.json", "dinov3.json"):
        shutil.copy(golden / "encoders_a" / name, tmp_path / name)
    values = np.load(golden / "encoders_a" / "values.npz")
    np.savez(tmp_path / "values.npz", **{n: values[n] for n in values if n.startswith(value.split("_")[0])})
    assert verify(tmp_path).passed
    weights = load_file(tmp_path / f"{model}.safetensors")
    weights[tensor][0] += 0.3
    save_file(weights, tmp_path / f"{model}.safetensors")
    assert [row.name for row in verify(tmp_path).rows if not row.passed] == [value]


def test_values_without_their_weights_are_listed(golden, tmp_path):
    for name in ("umt5.safetensors", "config.json", "values.npz"):
        shutil.copy(golden / "encoders_a" / name, tmp_path / name)
    report = verify(tmp_path)
    assert not report.passed
    assert len(report.skipped) == 4
    assert report.code == NOT_ALL_COMPARED
