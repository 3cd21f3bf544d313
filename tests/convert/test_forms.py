"""Weights in every form that people have: the same numbers, exactly, or a sentence that says what they are."""

import dataclasses
import json
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.weight_files import write_safetensors, write_torch

from refalign_jax.config import ExportConfig
from refalign_jax.convert.checkpoint import load_params, save_params
from refalign_jax.convert.dit import model_table
from refalign_jax.convert.files import holds_weights, open_weights
from refalign_jax.convert.forms import blocks
from refalign_jax.convert.infer import METADATA, open_transformer
from refalign_jax.convert.load import initial_params, is_checkpoint
from refalign_jax.convert.other_models import refuse_other_vaes
from refalign_jax.convert.table import to_ours, to_published
from refalign_jax.convert.transfer import export_weights, import_weights
from refalign_jax.initial import model_shapes
from refalign_jax.trees import flatten

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HEADS = 2


@pytest.fixture(scope="module")
def tensors(golden):
    """A transformer of Wan2.1's names, 24 wide, without projectors."""
    return {n: v for n, v in load_file(golden / "dit_a" / "weights.safetensors").items() if ".input_" not in n}


@pytest.fixture(scope="module")
def diffusers(golden, tmp_path_factory):
    """The same under diffusers' names."""
    folder = tmp_path_factory.mktemp("diffusers")
    import_weights(golden / "dit_a" / "weights.safetensors", folder / "checkpoint", HEADS)
    export_weights(folder / "checkpoint", folder / "w.safetensors", ExportConfig(names="diffusers"))
    return load_file(folder / "w.safetensors")


def values(path, num_heads=HEADS):
    """What is read, through the package's layout and back, by published name."""
    opened = open_transformer(path, num_heads)
    table = model_table(opened.config.dit, None, opened.names)
    return dict(to_published(table, to_ours(table, {"dit": model_shapes(opened.config)["dit"]}, opened.tensors)))


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name].astype(np.float64), value.astype(np.float64), err_msg=name)


def half(tensors):
    return {name: value.astype(np.float16) for name, value in tensors.items()}


def split(tensors):
    names = list(tensors)
    return [{n: tensors[n] for n in names[i::3]} for i in range(3)]


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "model.", "net."])
def test_prefixes(tensors, tmp_path, prefix):
    named = {prefix + name: value for name, value in tensors.items()}
    assert_equal(values(write_safetensors(tmp_path / "w.safetensors", named)), tensors)


def test_a_whole_file_of_comfyui(tensors, tmp_path):
    named = {f"model.diffusion_model.{name}": value for name, value in tensors.items()}
    named |= {"vae.conv1.weight": np.zeros(3, np.float32), "text_encoders.umt5.x": np.zeros(3, np.int8)}
    assert_equal(values(write_safetensors(tmp_path / "w.safetensors", named)), tensors)


def test_a_prefix_of_some_names_is_not_stripped(tensors, tmp_path):
    named = {f"net.{name}" if "ffn" in name else name: value for name, value in tensors.items()}
    with pytest.raises(ValueError, match=r"blocks.0.ffn.0.weight"):
        values(write_safetensors(tmp_path / "w.safetensors", named))


def quantise(tensors, dtype=E4M3, kind=".scale_weight", shape=lambda weight: ()):
    """(a file's tensors, the values) of linear layers in float8 with scales of a shape."""
    rng = np.random.default_rng(0)
    stored, expected = {"scaled_fp8": np.zeros(2, dtype)}, {}
    for name, value in tensors.items():
        if value.ndim != 2 or "embedding" in name:
            stored[name] = expected[name] = value.astype(np.float16)
            continue
        scale = rng.uniform(0.01, 3, shape(value)).astype(np.float32)
        stored[name] = (value * 20).astype(dtype)
        stored[name.removesuffix(".weight") + kind] = scale
        stored[name.removesuffix(".weight") + ".scale_input"] = np.ones((), np.float32)
        wide = scale
        if scale.ndim == 3:
            wide = np.repeat(scale[..., 0], value.shape[1] // scale.shape[1], 1)
        elif scale.ndim == 2:
            wide = np.repeat(np.repeat(scale, value.shape[0] // scale.shape[0], 0), value.shape[1] // scale.shape[1], 1)
        elif scale.shape == value.shape[:1]:
            wide = scale[:, None]
        expected[name] = stored[name].astype(np.float32) * wide
    return stored, expected


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("kind", [".scale_weight", ".weight_scale"])
@pytest.mark.parametrize(
    "shape",
    [
        lambda w: (),
        lambda w: (1,),
        lambda w: w.shape[:1],
        lambda w: (w.shape[0], 1),
        lambda w: (w.shape[0], 4),
        lambda w: (w.shape[0], 4, 1),
        lambda w: (2, 4),
    ],
    ids=["scalar", "one", "channel", "column", "blocks of inputs", "blocks with an axis more", "blocks"],
)
def test_scaled_float8(tensors, tmp_path, dtype, kind, shape):
    stored, expected = quantise(tensors, dtype, kind, shape)
    found = values(write_safetensors(tmp_path / "w.safetensors", stored))
    assert_equal(found, expected)
    assert found["blocks.0.ffn.0.weight"].dtype == np.float32


def test_scaled_float8_under_a_prefix_through_import(tensors, tmp_path):
    stored, expected = quantise(tensors)
    named = {f"model.diffusion_model.{name}": value for name, value in stored.items()}
    import_weights(write_safetensors(tmp_path / "w.safetensors", named), tmp_path / "checkpoint", HEADS)
    params, config = load_params(tmp_path / "checkpoint")
    assert_equal(dict(to_published(model_table(config.dit, None), params)), expected)
    assert flatten(params)["dit/blocks/ffn/in/kernel"].dtype == np.float32


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_float8_without_a_scale_is_the_value(tensors, tmp_path, dtype):
    stored = {name: value.astype(dtype if value.ndim == 2 else np.float32) for name, value in tensors.items()}
    found = values(write_safetensors(tmp_path / "w.safetensors", stored))
    assert_equal(found, stored)
    assert found["blocks.0.ffn.0.weight"].dtype == BFLOAT16


def note(kind):
    return np.frombuffer(json.dumps({"format": kind}).encode(), np.uint8)


def noted(stored, kind):
    notes = {n.replace(".scale_weight", ".comfy_quant"): note(kind) for n in stored if n.endswith(".scale_weight")}
    return stored | notes


def test_comfyui_notes(tensors, tmp_path):
    stored, expected = quantise(tensors)
    layers = {f"model.diffusion_model.{n[:-13]}": {"format": "float8_e4m3fn"} for n in stored if ".scale_weight" in n}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    path = write_safetensors(tmp_path / "w.safetensors", noted(stored, "float8_e4m3fn"), metadata)
    assert_equal(values(path), expected)


LAYER = "blocks.1.self_attn.q"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        ({f"{LAYER}.scale_weight": np.ones((5,), np.float32)}, r"q.scale_weight \[5\] divides .* no whole blocks"),
        ({f"{LAYER}.scale_weight": np.ones((24, 7), np.float32)}, r"\[24, 7\] divides .* no whole blocks"),
        ({f"{LAYER}.scale_weight": np.array(np.nan, np.float32)}, r"q.scale_weight holds a number that is NaN"),
        ({f"{LAYER}.scale_weight": np.ones((24,), np.uint8)}, r"q.scale_weight is stored as uint8; a scale is a float"),
        ({f"{LAYER}.weight_scale": np.ones((), np.float32)}, r"q.weight has two scales"),
        ({f"{LAYER}.weight_scale_2": np.ones((), np.float32)}, r"1 unexpected: blocks.1.self_attn.q.weight_scale_2"),
        ({f"{LAYER}.weight": np.ones((24, 24), np.float16)}, r"q.scale_weight scales float8 weights, but .* float16"),
        ({"patch_embedding.scale_weight": np.ones((), np.float32)}, r"patch_embedding.weight is stored as float16"),
        ({"blocks.7.scale_weight": np.ones((), np.float32)}, r"blocks.7.scale_weight .* its layer has no weight"),
        ({f"{LAYER}.comfy_quant": note("nvfp4")}, r"self_attn.q is stored as 'nvfp4'; read are float8_e4m3fn and"),
        ({f"{LAYER}.comfy_quant": note("float8_e5m2")}, r"as 'float8_e5m2' but its weight as float8_e4m3fn"),
        ({f"{LAYER}.comfy_quant": note([1])}, r"self_attn.q is stored as"),
        ({f"{LAYER}.comfy_quant": np.zeros(3, np.uint8)}, r"are not JSON as known"),
        ({"head.head.comfy_quant": note("float8_e4m3fn"), "head.head.scale_weight": None}, "there is no scale for it"),
    ],
)
def test_no_scale_is_left_out(tensors, tmp_path, spoil, sentence):
    stored = {name: value for name, value in (quantise(tensors)[0] | spoil).items() if value is not None}
    with pytest.raises(ValueError, match=sentence):
        values(write_safetensors(tmp_path / "w.safetensors", stored))


def test_blocks_of_a_convolution():
    assert blocks((8, 4, 1, 2, 2), ()) == (1, 1, 1, 1, 1)
    assert blocks((8, 4, 1, 2, 2), (8,)) == blocks((8, 4, 1, 2, 2), (8, 1)) == (8, 1, 1, 1, 1)
    assert blocks((8, 4, 1, 2, 2), (8, 2)) is None


@pytest.mark.parametrize(
    ("kinds", "result"),
    [
        ((np.float16, np.float32, np.float32), np.float32),
        ((BFLOAT16, np.float16, np.float16), np.float32),
        ((BFLOAT16, E4M3, E5M2), BFLOAT16),
        ((np.float16, np.float16, np.float16), np.float16),
    ],
    ids=str,
)
def test_layers_of_several_types_are_kept_exactly(tensors, tmp_path, kinds, result):
    stored = {n: v.astype(kinds[int(n.split(".")[1])]) if n.startswith("blocks") else v for n, v in tensors.items()}
    found = values(write_safetensors(tmp_path / "w.safetensors", stored))
    assert_equal(found, stored)
    assert {v.dtype for n, v in found.items() if n.startswith("blocks")} == {np.dtype(result)}


def test_variants_of_diffusers(diffusers, tmp_path):
    config = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 12, "eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored = half(diffusers)
    weight_map = {}
    for i, shard in enumerate(split(stored)):
        path = tmp_path / f"diffusion_pytorch_model.fp16-{i + 1:05d}-of-00003.safetensors"
        weight_map |= dict.fromkeys(shard, write_safetensors(path, shard).name)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_equal(values(tmp_path, None), stored)
    assert open_transformer(tmp_path).config.dit.eps == 1e-5
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", diffusers)
    assert_equal(values(tmp_path, None), diffusers)  # the plain one, where there is one
    index.unlink()
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    assert_equal(values(tmp_path, None), stored)


@pytest.mark.parametrize("begin", [0, 1])
def test_shards_without_an_index(tensors, tmp_path, begin):
    paths = [tmp_path / f"model-{begin + i:05d}.safetensors" for i in range(3)]
    for path, shard in zip(paths, split(tensors), strict=True):
        write_safetensors(path, shard)
    assert_equal(values(tmp_path), tensors)
    write_safetensors(tmp_path / f"model-{begin + 3:05d}.safetensors", {"head.head.bias": tensors["head.head.bias"]})
    with pytest.raises(ValueError, match=r"both hold head.head.bias"):
        values(tmp_path)
    paths[1].unlink()
    with pytest.raises(ValueError, match=f"holds 3 of 4 shards .* lacks number {begin + 1:05d}"):
        values(tmp_path)


def test_a_shard_that_its_siblings_count(tensors, tmp_path):
    for i, shard in enumerate(split(tensors)[:2]):
        write_safetensors(tmp_path / f"w-{i + 1:05d}-of-00003.safetensors", shard)
    with pytest.raises(ValueError, match="lacks number 00003"):
        values(tmp_path)


def test_several_models_in_a_folder(tensors, tmp_path):
    for step in (1000, 2000):
        write_safetensors(tmp_path / f"step-{step:05d}.safetensors", tensors)
    with pytest.raises(ValueError, match=r"2 files \*.safetensors; name one: \['step-01000"):
        values(tmp_path)


def test_a_pipeline(diffusers, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ValueError, match=r"a pipeline .* without weights in its folder transformer/"):
        values(tmp_path)
    write_safetensors(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", diffusers)
    write_safetensors(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", {"x": np.zeros(2, np.float32)})
    config = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 2}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    assert_equal(values(tmp_path, None), diffusers)
    (tmp_path / "transformer_2").mkdir()
    with pytest.raises(ValueError, match=r"is Wan2.2 A14B, two transformers"):
        values(tmp_path, None)


@pytest.mark.parametrize("name", ["w.pth", "pytorch_model.bin", "w.pt"])
def test_torch_files(tensors, tmp_path, name):
    path = write_torch(tmp_path / "in" / name, half(tensors))
    assert_equal(values(path), half(tensors))
    assert_equal(values(path.parent), half(tensors))


def test_torch_shards_with_an_index(tensors, tmp_path):
    weight_map = {}
    for i, shard in enumerate(split(tensors)):
        path = write_torch(tmp_path / f"diffusion_pytorch_model-{i + 1:05d}-of-00003.bin", shard)
        weight_map |= dict.fromkeys(shard, path.name)
    index = tmp_path / "diffusion_pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_equal(values(tmp_path), tensors)
    assert_equal(values(index), tensors)


def widened(tensors, channels, out=16):
    rows, columns = tensors["head.head.weight"].shape
    return tensors | {
        "patch_embedding.weight": np.zeros((24, channels, 1, 2, 2), np.float32),
        "head.head.weight": np.zeros((rows * out // 16, columns), np.float32),
        "head.head.bias": np.zeros((rows * out // 16,), np.float32),
    }


ONE = np.zeros((4, 24), np.float32)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: widened(t, 36) | {"img_emb.proj.0.weight": ONE}, "is Wan2.1 I2V, .* it has img_emb.proj.0.weight"),
        (lambda t: widened(t, 36), r"is Wan I2V \(Wan2.2 I2V A14B, .*: it takes 36 channels and returns 16"),
        (lambda t: t | {"blocks.0.cross_attn.k_img.weight": ONE}, "is Wan2.1 I2V, .* it has blocks.0.cross_attn.k_img"),
        (lambda t: t | {"vace_blocks.0.ffn.0.weight": ONE}, "is Wan VACE, .* it has vace_blocks"),
        (lambda t: widened(t, 48, 48), "is Wan2.2 TI2V 5B: its latents have 48 channels"),
        (lambda t: widened(t, 48), "is Wan Fun Control"),
        (lambda t: widened(t, 20), "is another model: it takes 20 channels and returns 16"),
        (lambda t: t | {"face_adapter.x": ONE}, "is Wan2.2 Animate"),
        (lambda t: {f"{LAYER}.lora_A.default.weight": ONE, f"{LAYER}.lora_B.weight": ONE}, "a LoRA of rank 4"),
        (lambda t: {f"diffusion_model.{LAYER}.lora_down.weight": ONE}, "a LoRA of rank 4"),
        (lambda t: {"lora_unet_blocks_0_self_attn_q.lora_down.weight": ONE}, "a LoRA of rank 4"),
        (lambda t: {"transformer.blocks.0.attn1.to_q.lora_A.weight": ONE}, "a LoRA of rank 4"),
        (lambda t: {f"{LAYER}.diff_b": ONE}, "holds a LoRA"),
        (lambda t: {"encoder.conv1.weight": ONE}, "is a VAE; give it with --vae"),
        (lambda t: {"shared.weight": ONE}, "is a text encoder; give it with --text-encoder"),
        (lambda t: {"vision_model.x": ONE}, "is a vision model"),
        (lambda t: {"x": ONE}, "holds no Wan transformer"),
    ],
)
def test_other_models_are_named(tensors, tmp_path, change, sentence):
    path = write_safetensors(tmp_path / "w.safetensors", change(tensors))
    with pytest.raises(ValueError, match=sentence):
        import_weights(path, tmp_path / "checkpoint", HEADS)
    assert not (tmp_path / "checkpoint").exists()


def test_the_two_models_of_wan_2_2(tensors, tmp_path):
    for name in ("high_noise_model", "low_noise_model"):
        write_safetensors(tmp_path / name / "diffusion_pytorch_model.safetensors", tensors)
    with pytest.raises(ValueError, match=r"Wan2.2 A14B, two transformers .*above 0.875.*its folder .*low_noise_model"):
        values(tmp_path)
    assert_equal(values(tmp_path / "low_noise_model"), tensors)


def write_gguf(path, architecture="wan"):
    """Quantised, half and single precision, and a tensor of five axes as ComfyUI's converters store it."""
    import gguf

    rng = np.random.default_rng(0)
    five = rng.standard_normal((6, 4, 1, 2, 2), np.float32)
    quantised = gguf.quants.quantize(rng.standard_normal((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    expected = {
        "patch_embedding.weight": five,
        "q.weight": gguf.quants.dequantize(quantised, gguf.GGMLQuantizationType.Q8_0),
        "half": rng.standard_normal(5, np.float32).astype(np.float16),
        "single": rng.standard_normal((2, 3), np.float32),
    }
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_array("comfy.gguf.orig_shape.patch_embedding.weight", list(five.shape))
    writer.add_tensor("patch_embedding.weight", five.reshape(12, 8))
    writer.add_tensor("q.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("half", "single"):
        writer.add_tensor(name, expected[name])
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    return expected


@pytest.mark.parametrize("name", ["w.gguf", "w.safetensors"])
def test_gguf(tmp_path, name):
    pytest.importorskip("gguf")
    expected = write_gguf(tmp_path / name)
    opened = open_weights(tmp_path / name)
    assert dict(opened.shapes) == {key: value.shape for key, value in expected.items()}
    for key, value in expected.items():
        np.testing.assert_array_equal(opened.read(key), value)
        assert opened.read(key).dtype == opened.dtypes[key] == value.dtype
    content = (tmp_path / name).read_bytes()
    for cut in (4, 100, len(content) // 2):
        (tmp_path / name).write_bytes(content[:cut])
        with pytest.raises(ValueError, match="can't be read as GGUF"):
            open_weights(tmp_path / name)
    write_gguf(tmp_path / "llama.gguf", "llama")
    with pytest.raises(ValueError, match="is a GGUF file of 'llama'; a Wan model says 'wan' there"):
        open_weights(tmp_path / "llama.gguf")


def test_gguf_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for name in ("w.gguf", "w.safetensors"):
        (tmp_path / name).write_bytes(b"GGUF" + bytes(100))
        with pytest.raises(ValueError, match=r"is a GGUF file; reading it needs the package gguf: pip install"):
            open_weights(tmp_path / name)


def test_the_vae_of_wan_2_2():
    with pytest.raises(ValueError, match=r"the VAE of Wan2.2 TI2V 5B"):
        refuse_other_vaes({"encoder.conv1.weight": (160, 12, 3, 3, 3)}, "w.pth")
    with pytest.raises(ValueError, match="is a transformer, not a VAE"):
        refuse_other_vaes({"patch_embedding.weight": (24, 16, 1, 2, 2)}, "w.pth")
    refuse_other_vaes({"encoder.conv1.weight": (96, 3, 3, 3, 3)}, "w.pth")


def test_heads_are_asked_for(tensors, tmp_path):
    path = write_safetensors(tmp_path / "w.safetensors", tensors)
    with pytest.raises(ValueError, match=r"24 wide, no multiple of 128, .* give --num-heads"):
        import_weights(path, tmp_path / "checkpoint")
    config = {"_class_name": "WanModel", "num_heads": 2, "model_type": "t2v"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_transformer(path).config.dit.num_heads == 2
    with pytest.raises(ValueError, match="of 2 attention heads; 4 were asked for"):
        open_transformer(path, 4)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "Other", "num_heads": 2}))
    with pytest.raises(ValueError, match="give --num-heads"):
        open_transformer(path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not JSON"):
        open_transformer(path)


@pytest.fixture(scope="module")
def exported(golden, tmp_path_factory):
    """(folder of exports, the model): what no shape shows differs from the defaults."""
    folder = tmp_path_factory.mktemp("exported")
    import_weights(golden / "dit_a" / "weights.safetensors", folder / "imported", HEADS)
    params, config = load_params(folder / "imported")
    dit = dataclasses.replace(config.dit, eps=1e-5, rope_theta=500.0, compute_dtype="float32", remat="dots")
    flow = dataclasses.replace(config.flow, shift=3.0)
    config = dataclasses.replace(config, dit=dit, flow=flow)
    save_params(folder / "checkpoint", params, config)
    return folder, config


@pytest.mark.parametrize("options", [{}, {"projectors": True}, {"names": "diffusers"}, {"max_shard_gb": 40e-6}])
def test_an_export_carries_its_configuration(exported, tmp_path, options):
    folder, config = exported
    export_weights(folder / "checkpoint", tmp_path / "w.safetensors", ExportConfig(**options))
    opened = open_transformer(tmp_path)
    expected = dataclasses.replace(config, dit=dataclasses.replace(config.dit, remat="full"))
    assert opened.config == expected
    assert opened.has_projectors == ("projectors" in options)
    import_weights(tmp_path, tmp_path / "checkpoint")
    params, found = load_params(tmp_path / "checkpoint")
    assert found == expected
    before = flatten(load_params(folder / "checkpoint")[0])
    for path, value in flatten(params).items():
        np.testing.assert_array_equal(value, before[path])


def test_another_model_than_the_recipes_is_refused(exported, tmp_path):
    folder, config = exported
    export_weights(folder / "checkpoint", tmp_path / "w.safetensors")

    def start(**changes):
        model = dataclasses.replace(config, dit=dataclasses.replace(config.dit, **changes))
        mesh = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh), {"dit": model_shapes(model)["dit"]}
        )
        return initial_params(str(tmp_path / "w.safetensors"), False, model, shapes, jax.random.key(0))

    assert "w.safetensors" in start()[1]
    for changes, sentence in (
        ({"rope_theta": 10000.0}, "a model with rope_theta=500.0, and model.dit.rope_theta is 10000.0"),
        ({"eps": 1e-6}, "a model with eps=1e-05"),
        ({"num_heads": 1}, "of 2 attention heads; 1 were asked for"),
    ):
        with pytest.raises(ValueError, match=sentence):
            start(**changes)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{}", '{"dit": 3}', '{"dit": {}, "alignment": {}, "x": 1}', '{"dit": {"width": "a"}}', "[" * 10**5],
)
def test_a_damaged_configuration_is_refused(tensors, tmp_path, text):
    path = write_safetensors(tmp_path / "w.safetensors", tensors, {METADATA: text})
    with pytest.raises(
        ValueError, match=r"w\.safetensors keeps under 'refalign_jax' a configuration that can't be read"
    ):
        open_transformer(path)


def test_what_is_a_checkpoint_and_what_are_weights(exported, tensors, tmp_path):
    folder, _ = exported
    assert is_checkpoint(str(folder / "checkpoint"))
    path = write_safetensors(tmp_path / "in" / "model-00000.safetensors", tensors)
    assert not is_checkpoint(str(path))
    assert not is_checkpoint(str(path.parent))
    assert holds_weights(path.parent)
    (tmp_path / "empty").mkdir()
    assert is_checkpoint(str(tmp_path / "empty"))
    assert not holds_weights(tmp_path / "empty")


def damage(data, rng, most):
    """Bytes cut short, changed, inserted or left out within the first `most`."""
    place = int(rng.integers(min(most, len(data))))
    kind = rng.integers(4)
    if kind == 0:
        return data[:place]
    if kind == 1:
        changed = bytearray(data)
        for index in rng.integers(min(most, len(data)), size=rng.integers(1, 6)):
            changed[index] = rng.integers(256)
        return bytes(changed)
    inserted = rng.integers(0, 256, rng.integers(1, 9), dtype=np.uint8).tobytes() if kind == 2 else b""
    return data[:place] + inserted + data[place + (int(rng.integers(1, 40)) if kind == 3 else 0) :]


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_refused_in_a_sentence(tensors, tmp_path, seed):
    """250 files a seed: headers, pickles and indexes; what still opens is read."""
    rng = np.random.default_rng(seed)
    few = {name: tensors[name] for name in list(tensors)[:5]}
    write_safetensors(tmp_path / "a.safetensors", few, {METADATA: '{"dit": {}, "alignment": {}}'})
    write_torch(tmp_path / "a.pth", few)
    (tmp_path / "a.json").write_text(json.dumps({"weight_map": dict.fromkeys(few, "a.safetensors")}))
    sentences = []
    for i in range(250):
        source = tmp_path / ("a.safetensors", "a.pth", "a.json")[i % 3]
        path = tmp_path / f"damaged{source.suffix}"
        path.write_bytes(damage(source.read_bytes(), rng, 10**6 if source.suffix == ".pth" else 1000))
        try:
            opened = open_weights(path)
            for name in opened.shapes:
                np.array(opened.read(name))
            open_transformer(path)
        except ValueError as error:
            sentences.append(str(error))
    assert all(sentence.endswith(".") for sentence in sentences)
    assert len(sentences) > 150
