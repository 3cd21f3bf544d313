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
from refalign_jax.verify.dit import INPUTS, Options, open_case
from refalign_jax.verify.divergence import FILES, walk
from refalign_jax.verify.folder import verify
from refalign_jax.verify.report import FALL_SHORT, Report
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


def test_the_parts_of_a_step_need_no_velocity(folder):
    keep(folder, "step600_scalars", "sample_sigmas")
    report = verify(folder)
    assert report.passed
    assert report.compared == {"step600_scalars", "sample_sigmas"}


def test_no_weight_decay_fails(folder, monkeypatch):
    keep(folder, "weights_after_3_adamw", "adamw_losses")
    monkeypatch.setattr(training, "ADAMW", dataclasses.replace(training.ADAMW, weight_decay=0.0))
    training.update.clear_cache()
    names = failing(folder)
    assert len(names) >= 10, "the norms, whose scales are near 1, feel the decay most"
    assert all(name.startswith("update ") for name in names)
    training.update.clear_cache()


def test_a_name_that_is_not_known_or_of_another_shape_fails_alone(folder):
    values = keep(folder, "sample_sigmas", "velocity_t437.5_refs0", "adamw_losses")
    kept = dict(np.load(folder / "values.npz"))
    kept |= {"velocity_refs1": values["noise"], "velocity_t437.5_refs0": values["text"]}
    np.savez(folder / "values.npz", **kept)
    report = verify(folder)
    assert report.code == FALL_SHORT
    assert [row.name for row in report.rows if row.passed] == ["sample_sigmas"]
    assert any("'velocity_refs1'" in remark for remark in report.remarks)
    assert any("velocity_t437.5_refs0 has the shape" in remark for remark in report.remarks)
    assert report.skipped == {"adamw_losses": "what it belongs to is missing"}


def test_the_first_block_and_operation_that_diverge_are_named(folder):
    name = "velocity_t437.5_refs1"
    keep(folder, name)
    case = open_case(open_values(folder), "float32", Report("float32"))
    x, references = (case.values.channels_last(f"{name}_latents") for name in ("video", "reference"))
    condition = Condition(jnp.asarray(case.values.need("text")), references[:, :1])
    states = walk(case, (x, jnp.full((1,), 437.5), condition), 0, tuple(FILES))
    added = {f"{name}_{end}": states[op] for op, end in FILES.items()}
    np.savez(folder / "values.npz", **case.values.arrays, **added)
    report = verify(folder)
    assert report.passed
    assert [curves.first for curves in report.curves] == [""]

    for tensor, first in (
        ("blocks.1.ffn.0.bias", "block 1: ffn"),
        ("blocks.2.cross_attn.v.bias", "block 2: cross_attention"),
        ("patch_embedding.bias", "block 0: attention, or the embedding before it"),
        ("head.head.bias", "the head"),
    ):
        weights = load_file(folder / "weights.safetensors")
        save_file({**weights, tensor: 1.5 * weights[tensor]}, folder / "weights.safetensors")
        assert [curves.first for curves in verify(folder).curves] == [first]
        save_file(weights, folder / "weights.safetensors")


@pytest.mark.parametrize(
    "options", [Options(stream=True), Options(devices=2, stream=True), Options(devices=2)], ids=str
)
def test_block_by_block_and_on_a_mesh_it_is_the_same(folder, options):
    keep(folder, "velocity_t437.5_refs2", "step600_scalars", "step600_ref_features", "step600_velocity")
    report = verify(folder, options=options)
    assert report.passed, (report.failed, report.remarks, report.skipped)
    assert report.compared == {
        "velocity_t437.5_refs2", "step600_scalars", "step600_ref_features", "step600_velocity"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda f: (f / "config.json").unlink(), "state num_heads in"),
        (lambda f: (f / "values.npz").unlink(), "lacks values.npz"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").write_text("{}"), "state num_heads in"),
        (
            lambda f: (f / "config.json").write_text('{"num_heads": 2, "dim": 32}'),
            "states dim=32, but the weights show 24",
        ),
        (lambda f: (f / "config.json").write_text('{"num_heads": 2, "eps": "small"}'), "eps"),
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


def test_a_file_in_place_of_a_folder_is_named(folder):
    with pytest.raises(ValueError, match="is a file; name the folder that holds it"):
        verify(folder / "values.npz")
