"""The verification tool: all golden values agree, and every kind of fault makes it fail."""

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refalign_jax import alignment
from refalign_jax.models.condition import Condition
from refalign_jax.verify import forward, training
from refalign_jax.verify.dit import INPUTS, open_case
from refalign_jax.verify.folder import verify
from refalign_jax.verify.report import Report
from refalign_jax.verify.values import open_values


@pytest.fixture
def folder(golden, tmp_path):
    """A copy of the golden folder to spoil."""
    return shutil.copytree(golden / "dit_a", tmp_path / "values")


def keep(folder, *names):
    """Drops all values but the inputs and those named, so that a check of one thing is quick."""
    values = dict(np.load(folder / "values.npz"))
    kept = {n: v for n, v in values.items() if INPUTS.fullmatch(n) or n in names}
    np.savez(folder / "values.npz", **kept)
    for path in folder.glob("*.safetensors"):
        if path.stem not in ("weights", *names):
            path.unlink()
    return values


def failing(folder):
    report = verify(folder)
    assert not report.passed
    return [row.name for row in report.rows if not row.passed]


def test_every_golden_value_is_compared_and_agrees(golden, tmp_path):
    report = verify(golden / "dit_a")
    assert report.passed, [row for row in report.rows if not row.passed] + report.remarks
    compared = {row.name.split("[")[0] for row in report.rows}
    values = np.load(golden / "dit_a" / "values.npz")
    assert {n for n in values if not INPUTS.fullmatch(n)} <= compared
    weights = set(load_file(golden / "dit_a" / "weights.safetensors"))
    assert {f"gradient {name}" for name in weights} | {f"update {name}" for name in weights} <= compared

    report.write(tmp_path / "ours.npz")
    ours = np.load(tmp_path / "ours.npz")
    assert {f"grad/{name}" for name in weights} | {f"adamw/{name}" for name in weights} <= set(ours)
    after = load_file(golden / "dit_a" / "weights_after_3_adamw.safetensors")
    for name, theirs in after.items():
        np.testing.assert_allclose(ours[f"adamw/{name}"], theirs, atol=1e-6)
    np.testing.assert_allclose(ours["step600_velocity"], values["step600_velocity"], atol=1e-5)


def test_a_changed_weight_fails(folder):
    keep(folder, "velocity_t437.5_refs2")
    weights = load_file(folder / "weights.safetensors")
    weights["blocks.1.self_attn.q.weight"][0, 0] += 0.1
    save_file(weights, folder / "weights.safetensors")
    assert failing(folder) == ["velocity_t437.5_refs2"]


def test_a_missing_gate_fails(folder, monkeypatch):
    keep(folder, "step600_velocity", "step600_scalars")
    monkeypatch.setattr(alignment, "gate", lambda t, config: jnp.ones_like(t))
    forward.loss_terms.clear_cache()
    assert failing(folder) == ["step600_scalars[gate]", "step600_scalars[loss]"]
    forward.loss_terms.clear_cache()


def test_no_weight_decay_fails(folder, monkeypatch):
    keep(folder, "weights_after_3_adamw", "adamw_losses")
    monkeypatch.setitem(training.ADAMW, "weight_decay", 0.0)
    training.update.clear_cache()
    names = failing(folder)
    assert len(names) >= 10, "the norms, whose scales are near 1, feel the decay most"
    assert all(name.startswith("update ") for name in names)
    training.update.clear_cache()


def test_a_name_that_is_not_known_or_not_compared_fails(folder):
    values = keep(folder, "sample_sigmas")
    np.savez(folder / "values.npz", **dict(np.load(folder / "values.npz")), velocity_refs1=values["noise"])
    report = verify(folder)
    assert not report.passed
    assert any("'velocity_refs1'" in remark for remark in report.remarks)
    assert any("sample_sigmas was not compared" in remark for remark in report.remarks)


def test_the_first_block_that_diverges_is_named(folder):
    name = "velocity_t437.5_refs1"
    keep(folder, name)
    case = open_case(open_values(folder), "float32", Report("float32"))
    x, references = (case.values.channels_last(f"{name}_latents") for name in ("video", "reference"))
    condition = Condition(jnp.asarray(case.values.need("text")), references[:, :1])
    states = forward.block_tokens(case.params["dit"], case.config.dit, x, jnp.full((1,), 437.5), condition)
    np.savez(folder / "values.npz", **case.values.arrays, **{f"{name}_blocks": states})
    assert verify(folder).passed

    weights = load_file(folder / "weights.safetensors")
    weights["blocks.1.ffn.0.bias"] += 0.5
    save_file(weights, folder / "weights.safetensors")
    report = verify(folder)
    assert f"{name}: block 1 is the first that diverges." in report.remarks


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda f: (f / "config.json").unlink(), "lacks config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").write_text("{}"), "lacks 'in_dim'"),
        (lambda f: (f / "weights.safetensors").unlink(), "lacks weights.safetensors"),
        (lambda f: (f / "weights.safetensors").write_bytes(b"x" * 100), "not a whole safetensors file"),
    ],
)
def test_a_folder_that_is_none_is_refused_in_a_sentence(folder, spoil, sentence):
    spoil(folder)
    with pytest.raises(ValueError, match=sentence):
        verify(folder)


def test_the_16_bit_profile_computes_in_bfloat16(folder):
    keep(folder, "velocity_t437.5_refs2")
    (row,) = verify(folder, "16bit").rows
    assert row.passed
    assert row.relative > 1e-4
    assert dataclasses.replace(row, relative=float("nan")).passed is False
