"""Conversion of the transformer: byte-equal both ways, strict, and nothing written on an error."""

import json
import shutil

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from refalign_jax.config import ExportConfig
from refalign_jax.convert import files, transfer
from refalign_jax.convert.checkpoint import load_params
from refalign_jax.convert.safetensors_files import DTYPES
from refalign_jax.convert.write import write_weights
from refalign_jax.trees import flatten


@pytest.fixture
def weights(golden):
    return golden / "dit_a" / "weights.safetensors"


def raw(path):
    opened = files.open_weights(path)
    return {name: (opened.dtypes[name], opened.shapes[name], opened.read(name).tobytes()) for name in opened.shapes}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
def test_round_trip_is_byte_equal(weights, tmp_path, dtype, shard_bytes):
    opened = files.open_weights(weights)
    stored = DTYPES["BF16"] if dtype == "bfloat16" else np.dtype(np.float32)
    tensors = ((name, opened.read(name).astype(stored)) for name in opened.shapes)
    source = tmp_path / "in.safetensors"
    written = write_weights(source, tensors, opened.shapes, dict.fromkeys(opened.shapes, stored), shard_bytes)
    assert (len(written) > 1) == (shard_bytes < 10**9)
    source = written[-1]
    transfer.import_weights(source, tmp_path / "checkpoint", num_heads=2)
    transfer.export_weights(tmp_path / "checkpoint", tmp_path / "out.safetensors", ExportConfig(projectors=True))
    assert raw(source) == raw(tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", framework="np") as file:
        assert len(list(file.keys())) == len(opened.shapes)


def test_the_export_holds_the_transformer_alone_unless_asked(weights, tmp_path):
    transfer.import_weights(weights, tmp_path / "checkpoint", num_heads=2)
    params, config = load_params(tmp_path / "checkpoint")
    assert set(params) == {"dit", "projectors"}
    assert (config.dit.num_heads, config.alignment.num_blocks, config.alignment.vfm_width) == (2, 3, 8)
    transfer.export_weights(tmp_path / "checkpoint", tmp_path / "out.safetensors")
    names = set(load_file(tmp_path / "out.safetensors"))
    assert names == {name for name in load_file(weights) if "input_mlp" not in name}


def test_diffusers_names_and_back(weights, tmp_path):
    transfer.import_weights(weights, tmp_path / "a", num_heads=2)
    transfer.export_weights(tmp_path / "a", tmp_path / "diffusers.safetensors", ExportConfig(names="diffusers"))
    names = set(load_file(tmp_path / "diffusers.safetensors"))
    assert "blocks.0.attn1.to_out.0.weight" in names
    assert "condition_embedder.time_proj.bias" in names
    transfer.import_weights(tmp_path / "diffusers.safetensors", tmp_path / "b", num_heads=2)
    (first, _), (second, _) = load_params(tmp_path / "a"), load_params(tmp_path / "b")
    assert set(second) == {"dit"}
    for path, value in flatten(first["dit"]).items():
        np.testing.assert_array_equal(value, flatten(second["dit"])[path])


def missing(tensors):
    del tensors["blocks.1.ffn.0.bias"]


def extra(tensors):
    tensors["blocks.1.ffn.9.bias"] = np.zeros(3, np.float32)


def misshapen(tensors):
    tensors["blocks.1.ffn.0.bias"] = np.zeros(3, np.float32)


def whole_numbers(tensors):
    tensors["blocks.1.ffn.0.bias"] = tensors["blocks.1.ffn.0.bias"].astype(np.int8)


def not_a_number(tensors):
    tensors["blocks.1.ffn.0.bias"][3] = np.nan


def infinite(tensors):
    tensors["head.head.weight"][1, :2] = np.inf, -np.inf


def foreign(tensors):
    tensors.pop("patch_embedding.weight")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (missing, r"1 missing: blocks.1.ffn.0.bias \[40\]"),
        (extra, r"1 unexpected: blocks.1.ffn.9.bias \[3\]"),
        (misshapen, r"blocks.1.ffn.0.bias \[3\], not \[40\]"),
        (whole_numbers, r"blocks.1.ffn.0.bias is stored as int8; weights are floating-point"),
        (not_a_number, r"blocks.1.ffn.0.bias holds 1 values that are NaN or infinite, of 40"),
        (infinite, r"head.head.weight holds 2 values that are NaN or infinite"),
        (foreign, "holds no Wan transformer"),
    ],
)
def test_wrong_tensors_are_refused_in_a_sentence_and_nothing_is_written(weights, tmp_path, spoil, sentence):
    tensors = load_file(weights)
    spoil(tensors)
    save_file(tensors, tmp_path / "spoilt.safetensors")
    with pytest.raises(ValueError, match=sentence):
        transfer.import_weights(tmp_path / "spoilt.safetensors", tmp_path / "checkpoint", num_heads=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spoilt.safetensors"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (lambda whole: whole[:-100], "not a whole safetensors file"),
        (lambda whole: whole[:5], "not a whole safetensors file"),
        (lambda whole: b"", "not a whole safetensors file"),
        (lambda whole: b"PK\x03\x04" + bytes(200), "not a whole safetensors file"),
        (lambda whole: whole.replace(b'"F32"', b'"F8_E4M3"'.ljust(5)[:5]), "not a whole safetensors file"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(weights, tmp_path, content, sentence):
    path = tmp_path / "spoilt.safetensors"
    path.write_bytes(content(weights.read_bytes()))
    with pytest.raises(ValueError, match=sentence):
        transfer.import_weights(path, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_faulty_shards_are_refused(weights, tmp_path):
    opened = files.open_weights(weights)
    tensors = ((name, opened.read(name)) for name in opened.shapes)
    *shards, index = write_weights(tmp_path / "w.safetensors", tensors, opened.shapes, opened.dtypes, 40_000)
    shutil.copy(shards[0], tmp_path / "kept")
    shards[0].unlink()
    with pytest.raises(ValueError, match="names the shard w-00001-of"):
        files.open_weights(tmp_path)
    shutil.copy(shards[1], shards[0])
    with pytest.raises(ValueError, match="disagree"):
        files.open_weights(index)
    shutil.copy(tmp_path / "kept", shards[0])
    assert files.open_weights(index).shapes == opened.shapes
    index.write_text(json.dumps({"weights": 1}))
    with pytest.raises(ValueError, match="no 'weight_map'"):
        files.open_weights(index)


def test_nothing_is_overwritten_and_nothing_is_half_written(weights, tmp_path):
    transfer.import_weights(weights, tmp_path / "checkpoint", num_heads=2)
    with pytest.raises(ValueError, match="is not overwritten"):
        transfer.import_weights(weights, tmp_path / "checkpoint", num_heads=2)
    (tmp_path / "there.safetensors").write_text("mine")
    with pytest.raises(ValueError, match="is not overwritten"):
        transfer.export_weights(tmp_path / "checkpoint", tmp_path / "there.safetensors")
    assert (tmp_path / "there.safetensors").read_text() == "mine"

    def breaks():
        opened = files.open_weights(weights)
        for i, name in enumerate(opened.shapes):
            if i == 5:
                raise OSError(28, "No space left on device")
            yield name, opened.read(name)

    opened = files.open_weights(weights)
    with pytest.raises(OSError, match="No space left on device; nothing was kept"):
        write_weights(tmp_path / "out.safetensors", breaks(), opened.shapes, opened.dtypes, 40_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "there.safetensors"]


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        files.open_weights(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"holds no \*.safetensors"):
        files.open_weights(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint of parameters"):
        transfer.export_weights(tmp_path, tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        write_weights(tmp_path / "out.bin", iter(()), {}, {})
