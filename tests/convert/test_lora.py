"""Adapters: four ways of naming, whole changes, scales, and one sentence for each that does not fit."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from support import tiny
from support.weight_files import write_safetensors

from refalign_jax.convert.dit import dit_table
from refalign_jax.convert.lora import merge, open_adapter
from refalign_jax.convert.table import to_published

LAYERS = {  # Wan's name: diffusers'
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.2.cross_attn.o": "blocks.2.attn2.to_out.0",
    "blocks.1.ffn.0": "blocks.1.ffn.net.0.proj",
    "time_projection.1": "condition_embedder.time_proj",
}
RANK = 3


@pytest.fixture(scope="module")
def base():
    """The transformer's parameters by published names."""
    return dict(to_published(dit_table(tiny.DIT), tiny.params()["dit"]))


@pytest.fixture(scope="module")
def factors(base):
    rng = np.random.default_rng(0)
    return {
        name: (
            rng.standard_normal((RANK, base[f"{name}.weight"].shape[1]), np.float32),
            rng.standard_normal((base[f"{name}.weight"].shape[0], RANK), np.float32),
        )
        for name in LAYERS
    }


def peft(factors):
    return {
        f"transformer.{LAYERS[name]}.lora_{part}.weight": value
        for name, pair in factors.items()
        for part, value in zip("AB", pair, strict=True)
    }


def original(factors):
    return {
        f"{name}.lora_{part}.default.weight": value
        for name, pair in factors.items()
        for part, value in zip("AB", pair, strict=True)
    }


def comfyui(factors, alpha=6.0):
    found = {}
    for name, (a, b) in factors.items():
        found |= {f"diffusion_model.{name}.lora_down.weight": a, f"diffusion_model.{name}.lora_up.weight": b}
        found[f"diffusion_model.{name}.alpha"] = np.float32(alpha).reshape(())
    return found


def kohya(factors, alpha=6.0):
    found = {}
    for name, (a, b) in factors.items():
        layer = f"lora_unet_{name.replace('.', '_')}"
        found |= {f"{layer}.lora_down.weight": a, f"{layer}.lora_up.weight": b, f"{layer}.alpha": np.float32([alpha])}
    return found


def merged(path, strength=1.0, params=None):
    params = tiny.params()["dit"] if params is None else params
    adapter = open_adapter(path, strength, tiny.DIT)
    return dict(to_published(dit_table(tiny.DIT), merge(params, [adapter])))


@pytest.mark.parametrize(
    ("write", "scale"), [(peft, 1.0), (original, 1.0), (comfyui, 2.0), (kohya, 2.0)], ids=lambda x: str(x)[:14]
)
def test_four_ways_of_naming_change_what_they_name(tmp_path, base, factors, write, scale):
    found = merged(write_safetensors(tmp_path / "a.safetensors", write(factors)), strength=0.5)
    for name, value in base.items():
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in factors:
            a, b = (x.astype(np.float64) for x in factors[layer])
            expected = value + 0.5 * scale * (b @ a)
            assert tiny.relative(found[name], expected) <= 1e-6, name
            assert tiny.relative(found[name], value) > 1e-2, name
        else:
            assert np.array_equal(found[name], value), name


def test_whole_changes_of_weights_biases_norms_and_modulations(tmp_path, base):
    rng = np.random.default_rng(1)
    names = {
        "blocks.1.modulation.diff": "blocks.1.modulation",
        "diffusion_model.head.modulation.diff": "head.modulation",
        "blocks.0.norm3.diff": "blocks.0.norm3.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm3.bias",
        "blocks.2.self_attn.norm_q.diff": "blocks.2.self_attn.norm_q.weight",
        "patch_embedding.diff": "patch_embedding.weight",
        "head.head.diff_b": "head.head.bias",
    }
    tensors = {name: rng.standard_normal(base[target].shape).astype(np.float32) for name, target in names.items()}
    found = merged(write_safetensors(tmp_path / "a.safetensors", tensors), strength=2.0)
    changed = {target: base[target] + 2 * tensors[name] for name, target in names.items()}
    for name, value in (base | changed).items():
        assert tiny.relative(found[name], value) <= 1e-6, name


def test_alpha_of_pefts_configuration_and_of_diffusers_metadata(tmp_path, base, factors):
    name = "blocks.0.self_attn.q"
    expected = base[f"{name}.weight"] + 4 * (factors[name][1] @ factors[name][0])
    write_safetensors(tmp_path / "peft/adapter_model.safetensors", peft(factors))
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 12}))
    assert tiny.relative(merged(tmp_path / "peft")[f"{name}.weight"], expected) <= 1e-6
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 12, "transformer.r": 3})}
    file = write_safetensors(tmp_path / "b.safetensors", peft(factors), metadata)
    assert tiny.relative(merged(file)[f"{name}.weight"], expected) <= 1e-6


def test_bfloat16_is_the_sum_rounded_once(tmp_path, base, factors):
    params = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), tiny.params()["dit"])
    found = merged(write_safetensors(tmp_path / "a.safetensors", peft(factors)), params=params)
    name = "blocks.1.ffn.0"
    a, b = factors[name]
    rounded = base[f"{name}.weight"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(found[f"{name}.weight"], (rounded + b @ a).astype(ml_dtypes.bfloat16))


def of_another_model(tensors):
    return {name.replace("blocks.2", "blocks.30"): value for name, value in tensors.items()}


def narrow(tensors):
    return {name: value[:, :-1] if "lora_A" in name else value for name, value in tensors.items()}


def without_b(tensors):
    return {name: value for name, value in tensors.items() if "lora_B" not in name or "to_q" not in name}


def dora(tensors):
    return tensors | {"transformer.blocks.0.attn1.to_q.dora_scale": np.ones((24, 1), np.float32)}


def lycoris(tensors):
    return tensors | {"lora_unet_blocks_0_self_attn_k.lokr_w1": np.ones((4, 4), np.float32)}


def image_model(tensors):
    return tensors | {"transformer.blocks.0.attn2.add_k_proj.lora_A.weight": np.ones((3, 24), np.float32)}


def alone(tensors):
    return {"transformer.blocks.0.attn1.to_q.alpha": np.ones((), np.float32)}


def nothing(tensors):
    return {f"x.{name}": value for name, value in tensors.items()}


def twice(tensors):
    return tensors | {
        "lora_unet_blocks_0_self_attn_q.lora_down.weight": tensors["transformer.blocks.0.attn1.to_q.lora_A.weight"]
    }


def two_kinds(tensors):
    return tensors | {"blocks.0.self_attn.q.diff": np.ones((24, 24), np.float32)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (of_another_model, r"fits this model in part only: 2 of 8 tensors .*blocks\.30\.attn2"),
        (narrow, r"to_q\.lora_A\.weight \[3, 23\] .* do not multiply to blocks\.0\.self_attn\.q\.weight \[24, 24\]"),
        (without_b, r"holds half of a change: .*to_q\.lora_A\.weight, but no B \(up\)"),
        (dora, r"holds DoRA, which rescales the weights \(.*dora_scale\)"),
        (lycoris, "holds LoKr"),
        (image_model, r"in part only: 1 of 9 tensors .*add_k_proj"),
        (alone, r"holds half of a change: .*alpha, but no A \(down\) and B \(up\)"),
        (nothing, "is no adapter of this model: none of its tensors"),
        (twice, r"changes blocks\.0\.self_attn\.q\.weight twice"),
        (two_kinds, r"changes blocks\.0\.self_attn\.q\.weight twice"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, factors, damage, message):
    file = write_safetensors(tmp_path / "a.safetensors", damage(peft(factors)))
    with pytest.raises(ValueError, match=message) as error:
        open_adapter(file, 1.0, tiny.DIT)
    assert "\n" not in str(error.value)


def test_numbers_that_are_not_finite_are_refused(tmp_path, factors):
    tensors = peft(factors)
    tensors["transformer.blocks.0.attn1.to_q.lora_B.weight"] = np.full((24, 3), np.nan, np.float32)
    file = write_safetensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match=r"to_q\.lora_B\.weight holds 72 values that are NaN"):
        merged(file)


def test_a_model_is_no_adapter(tmp_path, base):
    file = write_safetensors(tmp_path / "a.safetensors", base)
    with pytest.raises(ValueError, match="is no adapter of this model"):
        open_adapter(file, 1.0, tiny.DIT)
