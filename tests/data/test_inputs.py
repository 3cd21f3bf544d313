"""Prepared examples belong to the contents of their files; one writer a folder; one bad record ends nothing."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.footage import panned, photograph, write_records
from support.places import environment

import refalign_jax.data.clips as clips_module
import refalign_jax.data.encode as encode_module
import refalign_jax.data.prepare as prepare_module
from refalign_jax.config import PrepareConfig
from refalign_jax.data.manifest import MANIFEST, read_manifest
from refalign_jax.data.prepare import prepare
from refalign_jax.data.shards import ShardSource, verify_shards
from refalign_jax.data.sources.jsonl import read_jsonl
from refalign_jax.data.video import write_video
from refalign_jax.locks import exclusive

SMALL = PrepareConfig(
    vae="dct",
    text_encoder="words",
    vfm="daisy",
    height=48,
    width=64,
    num_frames=5,
    dct_stride=4,
    dct_channels=6,
    word_width=12,
    examples_per_shard=2,
)
REDO = dataclasses.replace(SMALL, redo=True)


def run(path, out, config=SMALL):
    return prepare(read_jsonl(path), out, config, {})


def contents(folder):
    source = ShardSource(folder)
    return {about["id"]: arrays for arrays, about in (source[i] for i in range(len(source)))}


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if not path.name.startswith(".")}


def new_video(folder):
    write_video(folder / "cat.mp4", panned("coffee", 12), fps=8)


def new_image(folder):
    Image.fromarray(photograph("astronaut")).save(folder / "cat.png")


def new_mask(folder):
    mask = np.zeros((96, 128), np.uint8)
    mask[:50, :60] = 255
    Image.fromarray(mask).save(folder / "cat_mask.png")


@pytest.fixture
def records(tmp_path):
    """Three records, of which the second, cat, has a video, an image and an image with a mask of its own."""
    path = write_records(tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    new_mask(tmp_path)
    Image.fromarray(np.full((96, 128), 255, np.uint8)).save(tmp_path / "cat_mask.png")
    lines[1]["references"] = [{"image": "cat.png"}, {"image": "cat.png", "mask": "cat_mask.png"}]
    lines[0]["references"] = lines[2]["references"] = []
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("change", "named"),
    [(new_video, r"cat\.mp4"), (new_image, r"cat\.png, \S*cat\.png"), (new_mask, r"cat_mask\.png")],
)
def test_an_example_whose_file_changed_is_refused_by_name_and_made_again_by_redo(records, tmp_path, change, named):
    folder = tmp_path / "d"
    run(records, folder)
    before, files_before = contents(folder), files(folder)
    change(tmp_path)
    message = rf"1 examples whose inputs have changed since, such as cat-\w+ \(\S*{named}\); start with --redo"
    with pytest.raises(ValueError, match=message):
        run(records, folder)
    assert files(folder) == files_before
    said = run(records, folder, REDO)
    assert "3 examples are in" in said
    assert "1 of them new" in said
    assert said.endswith(" Made again, because inputs had changed: 1.")
    assert verify_shards(folder) == []
    assert [shard.name for shard in read_manifest(folder).shards] == [
        f"examples-{n:05d}.array_record" for n in (2, 1, 3)
    ]
    run(records, tmp_path / "fresh")
    fresh, again = contents(tmp_path / "fresh"), contents(folder)
    assert again.keys() == fresh.keys()
    for id, arrays in fresh.items():
        for field, values in arrays.items():
            np.testing.assert_array_equal(values, again[id][field])
    (changed,) = (id for id in before if id.startswith("cat"))
    assert any(
        (before[changed][field] != fresh[changed][field]).any() for field in ("video_latents", "reference_latents")
    )
    assert "0 of them new; none was left out." in run(records, folder)


def test_moved_files_are_the_same_and_gone_ones_are_kept(records, tmp_path):
    run(records, tmp_path / "d")
    (tmp_path / "elsewhere").mkdir()
    for path in tmp_path.glob("*.*"):
        shutil.copy(path, tmp_path / "elsewhere")
    assert "0 of them new; none was left out." in run(tmp_path / "elsewhere" / records.name, tmp_path / "d")
    (tmp_path / "cat.mp4").unlink()
    assert run(records, tmp_path / "d").endswith(
        "0 of them new; none was left out. Kept unchecked: 1 whose files are gone."
    )
    lines = records.read_text().splitlines()
    records.write_text(lines[0])
    assert run(records, tmp_path / "d").endswith("Kept unchecked: 2 of other records.")
    assert len(ShardSource(tmp_path / "d")) == 3


def test_an_interrupted_redo_goes_on(records, tmp_path, monkeypatch):
    run(records, tmp_path / "d")
    new_video(tmp_path)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(encode_module, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(records, tmp_path / "d", REDO)
    assert read_manifest(tmp_path / "d").num_examples == 2
    assert "3 examples are in" in run(records, tmp_path / "d")
    assert verify_shards(tmp_path / "d") == []


def test_any_fault_in_one_record_leaves_out_this_one_alone(records, tmp_path, monkeypatch):
    load = clips_module.load_clip

    def fails(record, config):
        if record.id.startswith("cat"):
            raise PermissionError(13, "Permission denied", "cat.mp4")
        return load(record, config)

    monkeypatch.setattr(clips_module, "load_clip", fails)
    assert "2 of them new; 1 left out (1 the record can't be read;" in run(records, tmp_path / "d")
    (line,) = (tmp_path / "d" / "skipped.jsonl").read_text().splitlines()
    assert "PermissionError: [Errno 13] Permission denied" in json.loads(line)["detail"]


def test_prompts_that_are_cut_are_counted_and_ids_are_unique(records, tmp_path):
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    lines[2]["prompt"] = "word " * 600
    records.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    said = run(records, tmp_path / "d")
    assert "Cut at 512 tokens: 1 prompts, the longest, of coffee-" in said
    assert said.endswith("by 89.")
    twice = read_jsonl(records) * 2
    with pytest.raises(ValueError, match="3 ids are those of several records, such as 'astronaut-"):
        prepare(twice, tmp_path / "e", SMALL, {})


def test_a_second_writer_is_refused_at_once(records, tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    monkeypatch.setattr(prepare_module, "open_encoders", lambda _: pytest.fail("not at once"))
    with exclusive(tmp_path / "d", "a test"), pytest.raises(ValueError, match="in use by this very process"):
        run(records, tmp_path / "d")


PREPARE = """
import sys, time
from refalign_jax.config import PrepareConfig
from refalign_jax.data.prepare import prepare
from refalign_jax.data.sources.jsonl import read_jsonl
config = PrepareConfig(vae="dct", text_encoder="words", vfm="daisy", height=48, width=64, num_frames=5, dct_stride=4,
                       dct_channels=6, word_width=12, examples_per_shard=1)
records = read_jsonl(sys.argv[1])
for folder, at in zip(sys.argv[2::2], map(float, sys.argv[3::2])):
    while time.time() < at:
        pass
    try:
        print("done:", prepare(records, folder, config, {}).count("3 examples"))
    except ValueError as error:
        print("refused:", error)
"""
"""A program that prepares records into several folders, each at a time."""


def test_simultaneous_starts_of_two_writers_damage_nothing(records, tmp_path):
    start = time.time() + 12
    plan = [value for n in range(20) for value in (str(tmp_path / f"d{n}"), str(start + n * 0.8))]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARE, str(records), *plan],
            env=environment(JAX_PLATFORMS="cpu"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    lines = [out.splitlines() for out, _ in outputs]
    assert [len(found) for found in lines] == [20, 20], outputs
    for n, pair in enumerate(zip(*lines, strict=True)):
        assert "done: 1" in pair
        for line in pair:
            assert line == "done: 1" or "is in use by" in line
        assert verify_shards(tmp_path / f"d{n}") == []
        assert len(ShardSource(tmp_path / f"d{n}")) == 3
        assert {path.name for path in (tmp_path / f"d{n}").iterdir()} <= {
            MANIFEST,
            "skipped.jsonl",
            ".digests.jsonl",
            *(f"examples-{k:05d}.array_record" for k in range(3)),
        }
