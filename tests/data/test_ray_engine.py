"""Preparation on Ray, on its local runner: the same bytes as in threads, also where a run goes on."""

import dataclasses
import itertools
import json

import pytest
from support import preparing
from support.footage import write_records
from support.published import TINY

from refalign_jax.config import OpenS2VConfig, PrepareConfig
from refalign_jax.data.manifest import read_manifest
from refalign_jax.data.prepare import prepare
from refalign_jax.data.skips import read_skipped
from refalign_jax.data.sources.jsonl import read_jsonl
from refalign_jax.data.sources.opens2v import open_opens2v

ray = pytest.importorskip("ray")

CONFIG = PrepareConfig(
    vae="dct",
    text_encoder="words",
    vfm="daisy",
    height=48,
    width=64,
    num_frames=5,
    dct_stride=4,
    word_width=8,
    examples_per_shard=2,
    batch_size=2,
)
ON_RAY = dataclasses.replace(CONFIG, engine="ray")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    yield
    ray.shutdown()


def contents(folder):
    return [(shard.sha256, shard.ids, shard.inputs) for shard in read_manifest(folder).shards]


@pytest.mark.slow
def test_the_same_bytes_as_in_threads(tmp_path):
    """With records left out by reading and by encoding's batch ends, and where a run goes on with the other engine."""
    path = write_records(tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    faulty = {**lines[0], "video": "none.mp4"}
    again = [{**line, "prompt": f"Again: {line['prompt']}"} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in (lines[0], faulty, *lines[1:], *again)))
    records, about = read_jsonl(path), {"name": "jsonl"}
    expected = prepare(records, tmp_path / "threads", CONFIG, about)
    assert prepare(records, tmp_path / "ray", ON_RAY, about) == expected.replace("threads", "ray")
    prepare(records[:3], tmp_path / "both", CONFIG, about)
    prepare(records, tmp_path / "both", ON_RAY, about)
    for folder in ("ray", "both"):
        assert contents(tmp_path / folder) == contents(tmp_path / "threads")
        skipped = [(tmp_path / name / "skipped.jsonl").read_text() for name in (folder, "threads")]
        assert skipped[0] == skipped[1]
        assert skipped[0].count("\n") == 1


@pytest.mark.slow
def test_two_hundred_records_one_in_ten_faulty(tmp_path):
    """The same shards as in threads, and exactly the faulty ones left out, each with its reason."""
    wanted = preparing.write(tmp_path)
    config = OpenS2VConfig(videos=f"{tmp_path}/videos", pairs=f"{tmp_path}/pairs.json", cross_probability=1.0)
    for engine in ("threads", "ray"):
        settings = dataclasses.replace(TINY, engine=engine, batch_size=4)
        source = open_opens2v(f"{tmp_path}/total_part1.json", config, tmp_path / engine / ".tables", TINY.seed)
        prepare(source, tmp_path / engine, settings, {"name": "opens2v", "settings": config.settings})
        assert {entry.id: entry.reason for entry in read_skipped(tmp_path / engine)} == wanted
    assert contents(tmp_path / "ray") == contents(tmp_path / "threads")
    assert len(wanted) == 20


@pytest.mark.slow
def test_what_is_wrong_is_one_sentence_and_nothing_is_written(tmp_path):
    records = itertools.islice(read_jsonl(write_records(tmp_path)), 1)
    with pytest.raises(ValueError, match=r"^--vfm '.*/none' does not exist; .*\.$"):
        prepare(list(records), tmp_path / "d", dataclasses.replace(ON_RAY, vfm=f"{tmp_path}/none"), {"name": "jsonl"})
    assert not (tmp_path / "d" / "manifest.json").exists()
