"""Damaged files of every kind that the commands read: each is read, or refused by a ValueError or OSError.

A case takes good files, damages one, and calls what a command calls. Cases are drawn by a seed: values of other types,
sizes and depths in JSON, missing and further fields, texts cut short, bytes flipped, inserted and left out.
"""

import copy
import json
import random
import shutil

import pytest
from support import examples
from support.places import GOLDEN
from support.reported import recipe, write_samples

from refalign_jax.command import load
from refalign_jax.config import Storage
from refalign_jax.convert.infer import open_transformer
from refalign_jax.data.examples import decode, encode
from refalign_jax.data.manifest import read_manifest
from refalign_jax.data.overview import describe
from refalign_jax.data.shard_writer import ShardWriter
from refalign_jax.data.shards import ShardSource, verify_shards
from refalign_jax.data.sources.jsonl import read_jsonl
from refalign_jax.inference.outputs import read_samples
from refalign_jax.inference.requests import read_requests
from refalign_jax.report import sections
from refalign_jax.report.run import read_run
from refalign_jax.trainer.log import write_config
from refalign_jax.verify.dit import model_config
from refalign_jax.verify.values import open_values

CASES = 200
"""Damaged files of each kind."""

VALUES = (None, True, 0, -1, 1, 2**63, 10**400, 0.5, -1e308, float("nan"), float("inf"), "", "x", "\0", "\ud800", "$_{")
VALUES += ("../../x", "~", "x" * 5000, [], [[]], [1], ["a", 2], {}, {"a": {}}, {"": None}, [None] * 50)


def places(value, path=()):
    """Paths of all values in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def damaged_json(value, rng):
    """The value with one to three places changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(list(places(value)))
        if not path:
            return copy.deepcopy(rng.choice(VALUES))
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        how = rng.random()
        if how < 0.2:
            del holder[path[-1]]
        elif how < 0.3 and isinstance(holder, dict):
            holder[rng.choice(("unknown", "", path[-1] + "x"))] = copy.deepcopy(rng.choice(VALUES))
        elif how < 0.35 and isinstance(holder, list):
            holder.append(copy.deepcopy(rng.choice(VALUES)))
        else:
            holder[path[-1]] = copy.deepcopy(rng.choice(VALUES))
    return value


def damaged_bytes(content, rng):
    """The bytes cut, flipped, doubled or replaced at random."""
    at = rng.randrange(len(content) or 1)
    how = rng.randrange(7)
    if how == 0:
        return content[:at]
    if how == 1:
        return content[:at] + content[at + rng.randrange(1, 20) :]
    if how == 2:
        return content[:at] + rng.randbytes(rng.randrange(1, 9)) + content[at:]
    if how == 3:
        return content + content[at:]
    if how == 4:
        return rng.choice((b"", b"[" * 100_000, b"{}", b"null", b"\xff\xfe", b'{"a":' * 50_000, b"\n\n", content[::-1]))
    flipped = bytearray(content)
    for _ in range(rng.choice((1, 1, 8)) if content else 0):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def damaged(content, rng):
    """A JSON or JSONL file's text, or other bytes, damaged."""
    if rng.random() < 0.3:
        return damaged_bytes(content, rng)
    try:
        return json.dumps(damaged_json(json.loads(content), rng)).encode()
    except ValueError:
        pass
    try:
        lines = [json.loads(line) for line in content.decode().splitlines()]
    except ValueError:
        return damaged_bytes(content, rng)
    number = rng.randrange(len(lines))
    lines[number] = damaged_json(lines[number], rng)
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def report(folder):
    run = read_run(folder)
    sections.about(run)
    sections.evaluation(run.evaluation)
    sections.by_subject(run.samples)
    for name in ("loss", "held_out_loss", "seconds"):
        run.series(name)


def read_shards(folder):
    verify_shards(folder / "data")
    source = ShardSource(folder / "data")
    for index in range(len(source)):
        source[index]


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
    return folder


REPORT = {
    "topology": "v5e:2x2",
    "memory_gib": {"total": 1.0, "chip": 2.0},
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
    "config of values": ("values/config.json", lambda folder: model_config(open_values(folder / "values"), "float32")),
    "values": ("values/values.npz", lambda folder: open_values(folder / "values")),
    "report of a compilation": (
        "report.json",
        lambda folder: load("compile")(["--table", str(folder / "report.json")], "compile"),
    ),
    "weights": ("w.safetensors", lambda folder: open_transformer(folder / "w.safetensors", 2)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind, good, monkeypatch):
    name, call = KINDS[kind]
    path, rng = good / name, random.Random(kind)
    content = path.read_bytes()
    call(good)
    before = sorted(good.rglob("*"))
    faults, read = {}, 0
    try:
        for number in range(CASES):
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
    assert read < CASES
    assert sorted(good.rglob("*")) == before
