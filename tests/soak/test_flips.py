"""Flipped bits of a dataset are refused or change nothing; a reader that hides damage is found."""

import random

from support import examples

from refalign_jax.config import Storage
from refalign_jax.data.shard_writer import ShardWriter
from refalign_jax.soak import flips


def test_no_flip_of_a_dataset_is_read(tmp_path, monkeypatch):
    with ShardWriter(tmp_path, storage=Storage(), made={}, examples_per_shard=2) as writer:
        for seed in range(3):
            writer.add(examples.make(seed))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    refused, faults = flips.flip_dataset(tmp_path, 60, random.Random(0))
    assert faults == []
    assert 20 <= refused <= 60  # every flip of the manifest, one file of three
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.setattr(flips, "verify_shards", lambda _: [])
    _, faults = flips.flip_dataset(tmp_path, 6, random.Random(0))
    assert faults
