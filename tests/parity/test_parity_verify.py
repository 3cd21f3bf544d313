"""Verification of folders that torch and diffusers wrote: no false alarm, whatever people have."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from support.places import ROOT, environment

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from safetensors.torch import load_file, save_file
from support import runs
from support import torch_refalign as theirs

from refalign_jax.trainer.loop import train
from refalign_jax.verify.dit import Options
from refalign_jax.verify.folder import verify
from refalign_jax.verify.report import FALL_SHORT, NOT_ALL_COMPARED

CONFIG = {
    **{"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 2, "text_dim": 16, "freq_dim": 16},
    **{"in_dim": 16, "out_dim": 16, "patch_size": [1, 2, 2], "eps": 1e-6, "align_blocks": 2, "vfm_dim": 8},
}
PLAIN = {name: value for name, value in CONFIG.items() if name not in ("align_blocks", "vfm_dim")}
STD = 0.15


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def agree(folder, options=None):
    report = verify(folder, options=options)
    assert report.passed, (report.failed, report.remarks, report.skipped)
    return report


@pytest.mark.parametrize("factor", [1, 3, 10])
def test_larger_weights(tmp_path, factor):
    model = theirs.make_model(CONFIG, STD * factor)
    report = agree(theirs.write_folder(tmp_path, model, theirs.make_inputs(CONFIG), adamw=2))
    assert len(report.rows) > 300


@pytest.mark.parametrize("factor", [3, 10])
def test_larger_weights_without_references(tmp_path, factor):
    model = theirs.make_model(PLAIN, STD * factor)
    agree(theirs.write_folder(tmp_path, model, theirs.make_inputs(PLAIN, references=0), adamw=2))


def test_references_without_projectors(tmp_path):
    agree(theirs.write_folder(tmp_path, theirs.make_model(PLAIN, STD), theirs.make_inputs(PLAIN)))


def test_gradients_that_are_zero(tmp_path):
    """With one text token, attention to it does not depend on queries and keys; flash attention leaves rounding."""
    model, inputs = theirs.make_model(PLAIN, STD), theirs.make_inputs(PLAIN, references=0, text=1)
    folder = theirs.write_folder(tmp_path, model, inputs, indices=(600,), adamw=3)
    agree(folder)
    gradients = load_file(folder / "grads_step600.safetensors")
    zero = [name for name in gradients if "cross_attn.q" in name or "cross_attn.k" in name]
    sizes = {name: float(x.norm()) for name, x in gradients.items()}
    rounding = 1e-7 * max(size for name, size in sizes.items() if "cross_attn" in name)
    assert zero
    assert all(sizes[name] <= rounding for name in zero)
    torch.manual_seed(1)
    for name in zero:  # as another kernel might leave it
        gradients[name] = torch.randn_like(gradients[name]) * rounding / gradients[name].numel() ** 0.5
    save_file(gradients, folder / "grads_step600.safetensors")
    agree(folder)
    save_file({**gradients, zero[0]: 1000 * gradients[zero[0]]}, folder / "grads_step600.safetensors")
    assert [row.name for row in verify(folder).failed] == [f"gradient {zero[0]}"]


def test_a_head_of_zeros_makes_every_other_gradient_zero(tmp_path):
    model = theirs.make_model(CONFIG, STD)
    with torch.no_grad():
        model.head.head.weight.zero_()
        model.head.head.bias.zero_()
    agree(theirs.write_folder(tmp_path, model, theirs.make_inputs(CONFIG), indices=(600,), adamw=2))


@pytest.mark.parametrize("sigmas", ["subtracted", "accumulated"])
def test_schedules_computed_in_float32(tmp_path, sigmas):
    step = torch.tensor(0.001, dtype=torch.float32)
    u = 1 - torch.arange(1000, dtype=torch.float32) * step
    if sigmas == "accumulated":
        u = torch.linspace(1, 0, 1001, dtype=torch.float32)[:-1]
    t = 1000 * (5 * u / (1 + 4 * u))
    y = torch.exp(-2 * ((t - 500) / 1000) ** 2)
    y = y - y.min()
    times = t, y * (1000 / y.sum())
    inputs = theirs.make_inputs(CONFIG)
    folder = theirs.write_folder(tmp_path, theirs.make_model(CONFIG, STD), inputs, indices=(1, 998, 999), times=times)
    agree(folder)
    with np.load(folder / "values.npz") as file:
        values = {name: file[name] for name in file.files}
    values["train_weights"][998] *= 1.01
    np.savez(folder / "values.npz", **values)
    assert verify(folder).code == FALL_SHORT


def test_every_form_of_weights(tmp_path):
    model, inputs = theirs.make_model(PLAIN, STD), theirs.make_inputs(PLAIN, references=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    folder = theirs.write_folder(tmp_path / "values", model, inputs, indices=())
    weights = load_file(folder / "weights.safetensors")
    (folder / "weights.safetensors").unlink()
    half = {name: x.bfloat16() for name, x in weights.items()}
    names = list(weights)
    forms = {
        "bf16.safetensors": half,
        "comfy.safetensors": {f"model.diffusion_model.{name}": x for name, x in half.items()},
    }
    for name, tensors in forms.items():
        save_file(tensors, tmp_path / name)
        agree(folder, Options(weights=tmp_path / name))
    for i, part in enumerate((names[:9], names[9:])):
        save_file({name: weights[name] for name in part}, folder / f"model-{i + 1:05d}-of-00002.safetensors")
    agree(folder)  # shards without an index, beside the values
    agree(folder, Options(stream=True))


def test_what_lacks_an_input_is_left_out_and_the_rest_is_compared(tmp_path):
    folder = theirs.write_folder(tmp_path, theirs.make_model(CONFIG, STD), theirs.make_inputs(CONFIG), indices=(600,))
    whole = dict(np.load(folder / "values.npz"))
    compared = agree(folder).compared
    for lacking, kept in (
        ("vfm_features", {"velocity_t437.5_refs2", "step600_velocity", "step600_scalars", "step600_ref_features"}),
        ("noise", {"velocity_t437.5_refs2", "step600_timestep"}),
        ("text", {"step600_noisy", "step600_target", "step600_timestep", "train_weights"}),
        ("reference_latents", {"velocity_t437.5_refs0", "step600_noisy"}),
    ):
        np.savez(folder / "values.npz", **{name: x for name, x in whole.items() if name != lacking})
        report = verify(folder)
        assert report.code == NOT_ALL_COMPARED, (lacking, report.failed, report.remarks)
        assert kept <= report.compared < compared, lacking
        assert all(lacking in reason for reason in report.skipped.values()), report.skipped
    np.savez(folder / "values.npz", **whole)
    weights = load_file(folder / "weights.safetensors")
    save_file({n: x for n, x in weights.items() if "input_mlp" not in n}, folder / "weights.safetensors")
    report = verify(folder)
    assert report.code == NOT_ALL_COMPARED
    assert "step600_scalars[loss]" in report.skipped
    assert "grads_step600.safetensors" in report.skipped


def run(*arguments, cwd=ROOT):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(COLUMNS="160"), capture_output=True, text=True)


def test_diffusers_model_dumped_by_the_script(tmp_path):
    """The commands of docs/verify.md for a person who only has diffusers, those after the installation."""
    done = run("docs/dump_torch.py", tmp_path / "values", "tiny")
    assert done.returncode == 0, done.stderr
    page = tmp_path / "values.html"
    done = run("tools/verify.py", tmp_path / "values", "--html", page)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("velocity_t500_refs0_attention", "velocity_t500_refs0_ffn", "gradient blocks.1.attn2.to_q.weight"):
        assert name in done.stdout
    assert "0 fall short" in done.stdout
    assert "velocity_t500_refs0" in page.read_text()

    from diffusers import WanTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 40}
    WanTransformer3DModel(**sizes, num_layers=2).save_pretrained(tmp_path / "model")
    assert run("docs/dump_torch.py", tmp_path / "own", tmp_path / "model").returncode == 0
    assert not (tmp_path / "own" / "weights.safetensors").exists()
    assert run("tools/verify.py", tmp_path / "own", "--weights", tmp_path / "model").returncode == 0


def test_the_published_codes_names_dumped_by_the_script(tmp_path):
    """`dump` of a model with published names and references, and a fault in one operation of it is found."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from dump_torch import dump
    finally:
        sys.path.pop(0)
    model = theirs.make_model(PLAIN, STD)
    model.num_heads = 2
    for references in (0, 2):
        folder = tmp_path / str(references)
        folder.mkdir()
        save_file(dict(model.state_dict()), folder / "weights.safetensors")
        dump(model, folder, lambda *inputs: model(*inputs)[0], references, text_width=16)
        assert len(agree(folder).rows) >= 5

    forward = model.blocks[1].cross_attn.forward
    model.blocks[1].cross_attn.forward = lambda x, text: 1.01 * forward(x, text)
    shutil.rmtree(folder)
    folder.mkdir()
    save_file(dict(model.state_dict()), folder / "weights.safetensors")
    dump(model, folder, lambda *inputs: model(*inputs)[0], 2, text_width=16)
    report = verify(folder)
    assert [curves.first for curves in report.curves] == ["block 1: cross_attention"]


def test_the_first_gradient_that_diverges_is_named(tmp_path):
    folder = theirs.write_folder(
        tmp_path, theirs.make_model(PLAIN, STD), theirs.make_inputs(PLAIN, references=0), indices=(600,)
    )
    gradients = load_file(folder / "grads_step600.safetensors")
    for name in gradients:  # a fault in block 1's cross-attention reaches all that lies before it
        if name.startswith(("blocks.0", "blocks.1.cross", "blocks.1.self", "blocks.1.mod", "patch")):
            gradients[name] *= 1.01
    save_file(gradients, folder / "grads_step600.safetensors")
    report = verify(folder)
    assert [curves.first for curves in report.curves] == ["block 1: cross_attention (backwards)"]


def test_heads_that_no_file_states_are_asked_for(tmp_path):
    folder = theirs.write_folder(
        tmp_path, theirs.make_model(PLAIN, STD), theirs.make_inputs(PLAIN, references=0), indices=()
    )
    os.remove(folder / "config.json")
    with pytest.raises(ValueError, match=r"state num_heads in .*config\.json"):
        verify(folder)
    (folder / "config.json").write_text(json.dumps({"num_heads": 2}))
    agree(folder)


def test_a_torch_program_computes_the_values_dumped_in_training(tmp_path):
    train(runs.recipe(tmp_path, steps=3, save_every=3, held_out_every=0, preview_every=0, verify_dump=(3,)))
    folder = tmp_path / "verify" / "step-00000003"
    model = theirs.RefAlign({**CONFIG, "num_layers": 3, "align_blocks": 3})
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    with np.load(folder / "values.npz") as file:
        values = {name: torch.from_numpy(file[name]) for name in file.files}
    whole = [i for i, count in enumerate(values["num_references"]) if count == values["reference_latents"].shape[2]]
    assert whole, "the torch model knows no padded references"
    names = ("step_noisy", "step_timestep", "text", "reference_latents")
    with torch.no_grad():
        velocity, features = model(*(values[name][whole] for name in names))
    for ours, expected in (
        (values["step_velocity"][whole], velocity),
        (values["step_ref_features"][:, whole], torch.stack(features)),
    ):
        assert float((ours - expected).norm() / expected.norm()) <= 1e-5
