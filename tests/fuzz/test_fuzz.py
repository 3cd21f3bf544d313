"""Damaged files of every kind that the commands read: each is read, or refused by a ValueError or OSError.

A case takes good files, damages one (support/damage.py), and calls what a command calls. Cases are drawn by a seed.
"""

import json
import random
import shutil
import socket

import numpy as np
import pytest
import tokenizers
from PIL import Image
from support import examples
from support.damage import damaged
from support.places import GOLDEN
from support.reported import recipe, write_samples
from support.weight_files import write_torch

from refalign_jax import locks
from refalign_jax.command import load
from refalign_jax.config import ModelConfig, Storage
from refalign_jax.convert import checksums
from refalign_jax.convert.checkpoint import load_params, read_model, save_params
from refalign_jax.convert.files import open_weights, read_config
from refalign_jax.convert.infer import open_transformer
from refalign_jax.data.examples import decode, encode
from refalign_jax.data.images import read_image, read_mask
from refalign_jax.data.manifest import read_manifest
from refalign_jax.data.overview import describe
from refalign_jax.data.shard_writer import ShardWriter
from refalign_jax.data.shards import ShardSource, verify_shards
from refalign_jax.data.sources.jsonl import read_jsonl
from refalign_jax.data.video import read_frames, write_video
from refalign_jax.inference.outputs import read_samples
from refalign_jax.inference.requests import read_requests
from refalign_jax.models.dinov3 import DINOv3Config
from refalign_jax.models.umt5 import load_tokenizer
from refalign_jax.report import sections
from refalign_jax.report.run import read_run
from refalign_jax.trainer.log import read_metrics, write_config
from refalign_jax.verify.dit import model_config, open_model
from refalign_jax.verify.values import open_values

CASES = 200
"""Damaged files of each kind."""
FEWER = {"index of a checkpoint": 60, "model of a checkpoint": 60, "tokenizer": 60, "video": 100}
"""Kinds that take longer."""


def report(folder):
    run = read_run(folder)
    sections.set_up(run)
    sections.pictures(run)
    sections.evaluation(run.evaluation)
    sections.by_subject(run.samples)
    for name in ("loss", "held_out_loss", "seconds"):
        run.series(name)


def read_shards(folder):
    verify_shards(folder / "data")
    source = ShardSource(folder / "data")
    for index in range(len(source)):
        source[index]


def model_of(folder):
    values = open_values(folder)
    model_config(values, open_model(values, folder.parent / "w.safetensors"), "float32")


def write_run(folder):
    folder.mkdir()
    about = {"versions": {"jax": "0.10"}, "time": "2026-11-26T12:00:00+00:00", "commit": "c", "command": "train"}
    write_config(folder, recipe(folder, ""), about)
    lines = [{"start": 0}, {"compile_seconds": 1.0, "parameters": 5}, {"step": 1, "loss": 2.0, "seconds": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_samples(folder)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Good files of every kind."""
    folder = tmp_path_factory.mktemp("good")
    write_run(folder / "run")
    with ShardWriter(folder / "data", storage=Storage(), made={"settings": {}}, examples_per_shard=2) as writer:
        for seed in range(3):
            writer.add(examples.make(seed))
    reference = {"image": "a.png", "mask": "m.png", "subject": "cat"}
    records = [{"video": f"{i}.mp4", "prompt": "p", "references": [reference]} for i in range(3)]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    requests = [{"id": f"{i}", "prompt": "p", "references": [reference]} for i in range(3)]
    (folder / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in requests))
    (folder / "example").write_bytes(encode(examples.make(0), Storage()))
    (folder / "values").mkdir()
    for name in ("config.json", "values.npz"):
        shutil.copy(GOLDEN / "dit_a" / name, folder / "values")
    (folder / "report.json").write_text(json.dumps(REPORT))
    shutil.copy(GOLDEN / "dit_a/weights.safetensors", folder / "w.safetensors")
    write_more(folder)
    return folder


def write_more(folder):
    """Files that came later: a checkpoint without digests, encoders' files, weights in other forms, media, a lock."""
    save_params(folder / "params", {"dit": {"a": np.ones((2, 3), np.float32)}}, ModelConfig())
    for path in (folder / "params").rglob(checksums.FILE):
        path.unlink()
    (folder / "vfm").mkdir()
    shutil.copy(GOLDEN / "encoders_a/dinov3.json", folder / "vfm/config.json")
    (folder / "tokenizer").mkdir()
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2}, unk_token="<pad>"))
    model.save(str(folder / "tokenizer/tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(about))
    (folder / "shards").mkdir()
    shutil.copy(GOLDEN / "dit_a/weights.safetensors", folder / "shards/model-00001-of-00001.safetensors")
    names = open_weights(folder / "w.safetensors").shapes
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "shards/model.safetensors.index.json").write_text(json.dumps(index))
    write_torch(folder / "w.pth", {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16)})
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(folder / "image.png")
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(folder / "mask.tif")
    write_video(folder / "v.mp4", np.zeros((5, 16, 16, 3), np.uint8), 8)
    lock = {
        "host": socket.gethostname(),
        "pid": 2**22 - 1,
        "begun": "x",
        "what": "a run",
        "time": "2026-11-26T12:00:00",
    }
    (folder / "locked").mkdir()
    (folder / "locked" / locks.LOCK).write_text(json.dumps(lock))


def read_vfm(folder):
    DINOv3Config.from_json(read_config(folder / "vfm"))


def hold(folder):
    place = folder / "locked"
    before = (place / locks.LOCK).read_bytes()
    with locks.exclusive(place, "x"):
        pass
    (place / locks.LOCK).write_bytes(before)


REPORT = {
    "topology": "v5e:2x2",
    "devices": 4,
    "memory_gib": {"total": 1.0, "device": 2.0},
    "tiles": {},
    "tflops": {"hardware": 2, "model": 1},
    "bound_seconds": {"compute": 1.0, "links": 1.0},
    "mesh": {"fsdp": 4},
    "latent_grid": [1, 2, 2],
    "flags": {},
    "remat": "full",
    "step": "train",
    "residual_dtype": "float32",
    "offload": False,
    "fits": True,
    "spare": 0.5,
} | dict.fromkeys(("slices", "parameters", "batch", "references"), 1)

KINDS = {
    "config of a run": ("run/config.json", lambda folder: report(folder / "run")),
    "metrics": ("run/metrics.jsonl", lambda folder: report(folder / "run")),
    "samples in a report": ("run/samples/samples.json", lambda folder: report(folder / "run")),
    "evaluation": ("run/evaluation.json", lambda folder: report(folder / "run")),
    "samples": ("run/samples/samples.json", lambda folder: read_samples(folder / "run/samples")),
    "records": ("records.jsonl", lambda folder: read_jsonl(folder / "records.jsonl")),
    "requests": ("requests.jsonl", lambda folder: read_requests(folder / "requests.jsonl")),
    "manifest": ("data/manifest.json", lambda folder: describe(read_manifest(folder / "data"))),
    "manifest, its examples read": ("data/manifest.json", read_shards),
    "shard": ("data/examples-00001.array_record", read_shards),
    "example": ("example", lambda folder: decode((folder / "example").read_bytes())),
    "config of values": ("values/config.json", lambda folder: model_of(folder / "values")),
    "values": ("values/values.npz", lambda folder: open_values(folder / "values")),
    "report of a compilation": (
        "report.json",
        lambda folder: load("compile")(["--table", str(folder / "report.json")], "compile"),
    ),
    "metrics, read for a comparison": (
        "run/metrics.jsonl",
        lambda folder: read_metrics(folder / "run/metrics.jsonl"),
    ),
    "model of a checkpoint": ("params/config/metadata", lambda folder: read_model(folder / "params")),
    "index of a checkpoint": ("params/params/_METADATA", lambda folder: load_params(folder / "params", verify=False)),
    "config of a VFM": ("vfm/config.json", read_vfm),
    "tokenizer": ("tokenizer/tokenizer.json", lambda folder: load_tokenizer(folder / "tokenizer")),
    "index of shards": ("shards/model.safetensors.index.json", lambda folder: open_transformer(folder / "shards", 2)),
    "torch file": ("w.pth", lambda folder: [open_weights(folder / "w.pth").read(name) for name in "ab"]),
    "image": ("image.png", lambda folder: read_image(folder / "image.png")),
    "mask": ("mask.tif", lambda folder: read_mask(folder / "mask.tif")),
    "video": ("v.mp4", lambda folder: read_frames(folder / "v.mp4", range(5))),
    "lock": (f"locked/{locks.LOCK}", hold),
    "weights": ("w.safetensors", lambda folder: open_transformer(folder / "w.safetensors", 2)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind, good, monkeypatch):
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0)
    name, call = KINDS[kind]
    path, rng = good / name, random.Random(kind)
    content = path.read_bytes()
    call(good)
    before = sorted(good.rglob("*"))
    faults, read, cases = {}, 0, FEWER.get(kind, CASES)
    try:
        for number in range(cases):
            path.write_bytes(damaged(content, rng))
            try:
                call(good)
                read += 1
            except (ValueError, OSError):
                pass
            except Exception as error:
                faults.setdefault(f"{type(error).__name__}: {error!s:.100}", (number, path.read_bytes()[:300]))
    finally:
        path.write_bytes(content)
    assert not faults
    assert read < cases or kind == "lock"  # a lock that is not readable is taken over
    assert sorted(good.rglob("*")) == before
