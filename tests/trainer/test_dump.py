"""Values dumped during training are verified from the folder alone, and a torch run agrees with them (parity)."""

import dataclasses

import numpy as np
from safetensors.numpy import load_file, save_file
from support import runs

from refalign_jax.config import DropoutConfig
from refalign_jax.trainer.log import read_metrics
from refalign_jax.trainer.loop import train
from refalign_jax.verify.folder import verify


def recipe(folder):
    config = runs.recipe(folder, steps=3, save_every=3, held_out_every=0, preview_every=0, verify_dump=(2,))
    return dataclasses.replace(config, dropout=DropoutConfig(text=0.2, references=0.2, both=0.1))


def test_a_dumped_step_is_verified_and_is_what_was_trained_on(tmp_path):
    train(recipe(tmp_path / "run"))
    folder = tmp_path / "run" / "verify" / "step-00000002"
    report = verify(folder)
    assert report.passed, (report.failed, report.remarks, report.skipped)
    assert {"step_velocity", "step_scalars", "step_ref_features"} <= report.compared

    recorded = read_metrics(tmp_path / "run" / "metrics.jsonl")[1]
    with np.load(folder / "values.npz") as file:
        values = {name: file[name] for name in file.files}
    assert not values["aligned"].all(), "some references are dropped"
    assert len(set(values["index"].tolist())) > 1
    np.testing.assert_allclose(values["step_scalars"][-1], recorded["loss"], rtol=1e-5)
    gradients = load_file(folder / "grads_step.safetensors")
    norm = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in gradients.values()))
    np.testing.assert_allclose(norm, recorded["grad_norm"], rtol=1e-4)

    gradients["blocks.1.ffn.0.bias"] *= 1.001
    save_file(gradients, folder / "grads_step.safetensors")
    assert [row.name for row in verify(folder).failed] == ["gradient blocks.1.ffn.0.bias"]


def test_a_step_without_references_is_verified_too(tmp_path):
    config = runs.recipe(tmp_path / "run", steps=3, save_every=3, held_out_every=0, preview_every=0, verify_dump=(3,))
    train(dataclasses.replace(config, data=dataclasses.replace(config.data, max_references=0)))
    report = verify(tmp_path / "run" / "verify" / "step-00000003")
    assert report.passed, (report.failed, report.remarks, report.skipped)
    assert {"step_velocity", "step_scalars", "step_timestep"} <= report.compared
    assert len([row for row in report.rows if row.name.startswith("gradient ")]) > 20
    assert not report.skipped
