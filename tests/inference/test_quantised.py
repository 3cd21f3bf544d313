"""Sampling with weights in int8 and float8: what is loaded, what the file says, how near the latents are."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import tiny

from refalign_jax.command import load
from refalign_jax.config import GenerateConfig, ModelConfig
from refalign_jax.convert.checkpoint import save_params
from refalign_jax.convert.transfer import export_weights
from refalign_jax.data.video import read_comment
from refalign_jax.inference.opening import open_generator
from refalign_jax.models.quantise import dequantise, is_quantised, quantise, shared_axis
from refalign_jax.trees import flatten

MODEL = ModelConfig(
    dit=dataclasses.replace(tiny.DIT, width=48, ffn_width=96, num_heads=1, latent_channels=4),
    alignment=tiny.MODEL.alignment,
)
OPTIONS = ["--height", "32", "--width", "48", "--num-frames", "5", "--num-steps", "2", "--vae", "dct"]
OPTIONS += ["--text-encoder", "words", "--prompt", "A cat.", "--save", "latents"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, the same weights as published, and an adapter of them."""
    folder = tmp_path_factory.mktemp("weights")
    save_params(folder / "checkpoint", tiny.params(MODEL), MODEL)
    export_weights(folder / "checkpoint", folder / "refalign.safetensors")
    rng = np.random.default_rng(0)
    adapter = {}
    for name in ("blocks.1.ffn.0", "time_embedding.2", "blocks.2.self_attn.q"):
        out = 96 if "ffn" in name else 48
        adapter[f"{name}.lora_A.weight"] = rng.standard_normal((2, 48), np.float32)
        adapter[f"{name}.lora_B.weight"] = rng.standard_normal((out, 2), np.float32)
        adapter[f"{name}.diff_b"] = rng.standard_normal(out, np.float32)
    save_file(adapter, folder / "adapter.safetensors")
    return folder


def config(**values):
    size = {"height": 32, "width": 48, "num_frames": 5, "vae": "dct", "text_encoder": "words"}
    return GenerateConfig(**size, **values)


def parameters(weights, **values):
    return flatten(open_generator(str(weights), config(**values)).transformer())


@pytest.mark.parametrize("dtype", ["int8", "float8"])
def test_every_form_of_weights_gives_the_quantised_ones(place, dtype):
    exact = flatten(tiny.params(MODEL)["dit"])
    found = [parameters(place / name, weights_dtype=dtype, fsdp=2) for name in ("checkpoint", "refalign.safetensors")]
    for path, x in exact.items():
        axis = shared_axis(path)
        expected = np.asarray(x) if axis is None else quantise(np.asarray(x), dtype, axis)
        for leaf in (each[path] for each in found):
            assert is_quantised(leaf) == (axis is not None), path
            jax.tree.map(np.testing.assert_array_equal, leaf, expected)


def test_adapters_are_added_before_weights_are_quantised(place):
    adapted = {"lora": (str(place / "adapter.safetensors"),), "lora_scale": (0.5,)}
    whole = parameters(place / "refalign.safetensors", **adapted)
    for name in ("checkpoint", "refalign.safetensors"):
        found = parameters(place / name, weights_dtype="int8", **adapted)
        for path, leaf in found.items():
            if not is_quantised(leaf):
                np.testing.assert_allclose(leaf, whole[path], rtol=1e-6, atol=1e-6)
                continue
            again = np.asarray(dequantise(leaf, np.dtype(np.float32)))
            assert (np.abs(again - whole[path]) <= 0.501 * np.asarray(leaf.scale)).all(), path


@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.03), ("float8", 0.15)])
def test_the_file_says_so_and_the_latents_are_near(place, tmp_path, dtype, most):
    for name, options in (("exact", []), (dtype, ["--weights-dtype", dtype])):
        out = ["--weights", str(place / "refalign.safetensors"), "--out", str(tmp_path / f"{name}.mp4")]
        load("sample")([*OPTIONS, *out, *options], "sample")
        made = json.loads(read_comment(tmp_path / f"{name}.mp4"))["made"]
        assert made["weights_dtype"] == (dtype if options else "float32")
        assert json.loads((tmp_path / f"{name}.json").read_text())["made"]["weights_dtype"] == made["weights_dtype"]
    latents, exact = (load_file(tmp_path / f"{name}-latents.safetensors")["latents"] for name in (dtype, "exact"))
    assert 1e-4 < tiny.relative(latents, exact) < most


def test_what_is_not_finite_is_refused(place, tmp_path):
    tensors = load_file(place / "refalign.safetensors")
    params = tiny.params(MODEL)
    broken = np.array(params["dit"]["blocks"]["ffn"]["in"]["kernel"])
    broken[1, 3, 5] = np.nan
    params["dit"]["blocks"]["ffn"]["in"]["kernel"] = broken
    save_params(tmp_path / "checkpoint", params, MODEL)
    with pytest.raises(ValueError, match=r"blocks/ffn/in/kernel, layer 1: values that are NaN or infinite"):
        parameters(tmp_path / "checkpoint", weights_dtype="int8")
    tensors["blocks.1.ffn.0.weight"][5, 3] = np.nan
    save_file(tensors, tmp_path / "refalign.safetensors")
    with pytest.raises(ValueError, match=r"refalign\.safetensors.*is a model|blocks\.1\.ffn\.0\.weight holds 1 values"):
        parameters(tmp_path / "refalign.safetensors", weights_dtype="int8", num_heads=1)


def test_a_dtype_that_there_is_not_is_refused(place):
    for dtype in ("int4", "fp8", "INT8", ""):
        with pytest.raises(ValueError, match=r"GenerateConfig\.weights_dtype=.*float32.*bfloat16.*int8.*float8"):
            config(weights_dtype=dtype)
