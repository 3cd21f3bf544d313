"""Shards are whole or absent, a writer goes on where one stopped, and damage is named."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.examples import FLOAT32, assert_same, make
from support.places import environment

from refalign_jax.config import Storage
from refalign_jax.data.examples import decode, encode
from refalign_jax.data.manifest import MANIFEST, read_manifest
from refalign_jax.data.shard_writer import ShardWriter
from refalign_jax.data.shards import CorruptRecordError, ShardSource, verify_shards

MADE = {"encoders": {"video": "dct"}, "command": "test"}


def write(folder, count=10, size=4, storage=FLOAT32, made=MADE):
    with ShardWriter(folder, storage=storage, made=made, examples_per_shard=size) as writer:
        for i in range(count):
            writer.add(make(i, references=i % 4, text=3 + i))
    return folder


def write_twice(folder):
    """Fails at the eighth example, in the second shard."""
    with ShardWriter(folder, storage=FLOAT32, made=MADE, examples_per_shard=4) as writer:
        for i in (*range(7), 0):
            writer.add(make(i))


WRITER = f"""
import os, signal, sys
from refalign_jax.data.shard_writer import ShardWriter
from support.examples import FLOAT32, make
folder, MADE = sys.argv[1], {MADE}
"""
"""The first lines of a program that writes shards."""


def run(code, folder):
    """Runs a program on a folder."""
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=environment(), capture_output=True, text=True, check=False
    )


def shards(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def flip(path, marker):
    """Flips one bit a few bytes after `marker`, which is somewhere in the file."""
    data = bytearray(path.read_bytes())
    data[data.index(marker) + 100] ^= 4
    path.write_bytes(data)


def test_everything_comes_back_in_order(tmp_path):
    source = ShardSource(write(tmp_path / "d"))
    assert len(source) == 10
    for i in range(10):
        arrays, about = source[i]
        assert about["id"] == f"e{i}"
        assert_same(decode(source._records[i]), make(i, references=i % 4, text=3 + i), rtol=0, atol=0)
        assert len(arrays["subject_ids"]) == i % 4
    assert source.where(9) == ("examples-00002.array_record", 1)


def test_manifest_says_what_is_there(tmp_path):
    folder = write(tmp_path / "d", storage=Storage(vfm_features="int8"))
    manifest = read_manifest(folder)
    assert manifest.complete
    assert [len(shard.ids) for shard in manifest.shards] == [4, 4, 2]
    assert manifest.spec.video_latents == (2, 4, 6, 3)
    assert (manifest.spec.text_width, manifest.spec.vfm_width, manifest.spec.vfm_tokens) == (8, 7, 6)
    assert (manifest.spec.longest_text, manifest.spec.most_references) == (12, 3)
    fewest = manifest.spec.fewest_references
    assert fewest == min(n for shard in manifest.shards for n in shard.references)
    assert [manifest.spec.pads(n) for n in (fewest, fewest + 1)] == [False, True]
    assert manifest.storage == Storage(vfm_features="int8")
    assert 0.999 < manifest.vfm_cosine < 1
    assert manifest.made == MADE
    raw = json.loads((folder / MANIFEST).read_text())
    assert raw["num_examples"] == 10
    assert raw["fields"]["reference_latents"] == {"shape": ["R", 4, 6, 3], "dtype": "bfloat16"}
    assert verify_shards(folder) == []


def test_a_writer_that_fails_keeps_whole_shards_and_the_next_goes_on(tmp_path):
    folder = tmp_path / "d"
    with pytest.raises(ValueError, match="already"):
        write_twice(folder)
    assert shards(folder) == ["examples-00000.array_record", MANIFEST]
    with pytest.raises(ValueError, match="unfinished with 4 examples in 1 shards"):
        ShardSource(folder)

    (folder / "examples-00001.array_record.partial").write_bytes(b"left by kill -9")
    (folder / "examples-00001.array_record").write_bytes(b"renamed, but killed before the manifest")
    writer = ShardWriter(folder, storage=FLOAT32, made={**MADE, "command": "again"}, examples_per_shard=4)
    assert writer.done == {"e0", "e1", "e2", "e3"}
    with writer:
        for i in range(10):
            if f"e{i}" not in writer.done:
                writer.add(make(i))
    assert shards(folder) == [*(f"examples-0000{n}.array_record" for n in range(3)), MANIFEST]
    source = ShardSource(folder)
    assert [source[i][1]["id"] for i in range(len(source))] == [f"e{i}" for i in range(10)]
    assert source.manifest.made["command"] == "again"
    assert verify_shards(folder) == []


def test_killed_writer_leaves_whole_shards(tmp_path):
    code = (
        WRITER
        + """
writer = ShardWriter(folder, storage=FLOAT32, made=MADE, examples_per_shard=2)
for i in range(5):
    writer.add(make(i))
os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    assert run(code, tmp_path / "d").returncode == -signal.SIGKILL
    assert [len(shard.ids) for shard in read_manifest(tmp_path / "d").shards] == [2, 2]
    assert verify_shards(tmp_path / "d") == []
    with ShardWriter(tmp_path / "d", storage=FLOAT32, made=MADE, examples_per_shard=2) as writer:
        assert writer.done == {"e0", "e1", "e2", "e3"}
        writer.add(make(4))
    assert len(ShardSource(tmp_path / "d")) == 5


def test_more_examples_can_be_added_to_a_finished_dataset(tmp_path):
    folder = write(tmp_path / "d", 4)
    with ShardWriter(folder, storage=FLOAT32, made=MADE, examples_per_shard=4) as writer:
        writer.add(make(77))
    assert len(ShardSource(folder)) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"storage": Storage()}, "stored as"),
        ({"made": {"encoders": {"video": "wan"}}}, "made with the encoders"),
        ({"examples_per_shard": 0}, "at least 1"),
    ],
)
def test_going_on_with_other_settings_is_refused(tmp_path, change, message):
    folder = write(tmp_path / "d")
    with pytest.raises(ValueError, match=message):
        ShardWriter(folder, **({"storage": FLOAT32, "made": MADE} | change))


def test_examples_that_do_not_fit_are_refused_and_the_rest_is_written(tmp_path):
    other = dataclasses.replace(make(5), text=np.zeros((3, 9), np.float32))
    infinite = dataclasses.replace(make(6), text=np.full((3, 8), np.inf, np.float32))
    with ShardWriter(tmp_path / "d", storage=FLOAT32, made=MADE) as writer:
        with pytest.raises(ValueError, match="e6: text holds NaN"):
            writer.add(infinite)
        writer.add(make(0))
        for example, message in ((make(0), "e0 is in .* already"), (other, "all examples of a dataset must agree")):
            with pytest.raises(ValueError, match=message):
                writer.add(example)
        writer.add(make(1))
    assert read_manifest(tmp_path / "d").shards[0].ids == ["e0", "e1"]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="can't be written"):
        ShardWriter(tmp_path / "file" / "d", storage=FLOAT32, made=MADE)


def test_full_disk_leaves_nothing_half_written(tmp_path):
    folder = tmp_path / "d"
    code = (
        WRITER
        + """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
big = make(9, text=512, metadata={"a": "x" * 900_000})
try:
    with ShardWriter(folder, storage=FLOAT32, made=MADE, examples_per_shard=2) as writer:
        for example in (make(0), make(1), make(2), big):
            writer.add(example)
except OSError as error:
    print(error)
"""
    )
    done = run(code, folder)
    assert os.strerror(errno.EFBIG) in done.stdout, done
    assert "finished shards are kept" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert shards(folder) == ["examples-00000.array_record", MANIFEST]
    assert verify_shards(folder) == []


def test_folders_that_are_no_dataset(tmp_path):
    with pytest.raises(ValueError, match=r"manifest.json can't be read \(No such file"):
        ShardSource(tmp_path)
    for text in ("", "{}", "[]", '{"format": "other"}'):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(ValueError, match="is not a manifest of prepared examples"):
            ShardSource(tmp_path)
    ShardWriter(tmp_path / "empty", storage=FLOAT32, made=MADE).close()
    with pytest.raises(ValueError, match="holds no examples"):
        ShardSource(tmp_path / "empty")


def test_missing_and_truncated_shards_are_found_on_opening(tmp_path):
    folder = write(tmp_path / "d")
    shard = folder / "examples-00001.array_record"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1000])
    with pytest.raises(
        ValueError, match=r"examples-00001.array_record has \d+ bytes, the manifest says \d+; it is trunc"
    ):
        ShardSource(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=r"examples-00001.array_record is missing"):
        ShardSource(folder)
    assert len(verify_shards(folder)) == 1


def test_flipped_byte_is_named_by_shard_and_record(tmp_path):
    folder = write(tmp_path / "d")
    flip(folder / "examples-00001.array_record", b'"id\\": \\"e6')
    source = ShardSource(folder)
    with pytest.raises(
        CorruptRecordError, match=r"examples-00001.array_record, record 2 \(example 6\) can't be read: .+"
    ):
        source[6]
    assert source[5][1]["id"] == "e5"
    assert source[7][1]["id"] == "e7"
    (problem,) = verify_shards(folder)
    assert "examples-00001.array_record has SHA-256" in problem


def test_record_of_another_shape_is_corrupt(tmp_path):
    folder = write(tmp_path / "d", 1)
    source = ShardSource(folder)
    other = encode(dataclasses.replace(make(0), text=np.zeros((2, 9), np.float32)), FLOAT32)
    source._records = [other]
    with pytest.raises(CorruptRecordError, match="not the manifest's"):
        source[0]


def test_a_record_under_another_id_is_corrupt(tmp_path):
    folder = write(tmp_path / "d", 2)
    source = ShardSource(folder)
    source._records = [encode(make(1), FLOAT32), encode(make(0), FLOAT32)]
    with pytest.raises(CorruptRecordError, match="its id is 'e1', the manifest has 'e0' there"):
        source[0]


def test_a_record_with_another_number_of_references_is_corrupt(tmp_path):
    """The trainer compiles for no padding if the manifest says that every example has all references."""
    folder = write(tmp_path / "d", 1)
    source = ShardSource(folder)
    (expected,) = source.manifest.shards[0].references
    source._records = [encode(make(0, references=expected + 1), FLOAT32)]
    with pytest.raises(CorruptRecordError, match=f"it has {expected + 1} references, the manifest says {expected}"):
        source[0]


def test_a_writer_hashes_its_own_file_and_refuses_one_that_was_replaced_or_emptied(tmp_path):
    for number, spoil in enumerate((lambda path: path.write_bytes(b""), Path.unlink)):
        folder = tmp_path / str(number)
        writer = ShardWriter(folder, storage=FLOAT32, made=MADE)
        writer.add(make(0))
        (partial,) = folder.glob("*.partial")
        if number:
            spoil(partial)
            partial.write_bytes(b"another writer's")
        else:
            os.truncate(partial, 0)
            writer._open._writer.close()
            os.truncate(partial, 0)
        with pytest.raises(OSError, match="could not be written, finished shards are kept"):
            writer.close()
        assert not (folder / MANIFEST).exists()


def test_a_second_writer_is_refused_while_the_first_is_open(tmp_path):
    with ShardWriter(tmp_path / "d", storage=FLOAT32, made=MADE) as writer:
        writer.add(make(0))
        with pytest.raises(ValueError, match="is in use by this very process"):
            ShardWriter(tmp_path / "d", storage=FLOAT32, made=MADE)
    assert shards(tmp_path / "d") == ["examples-00000.array_record", MANIFEST]


def test_removed_examples_can_be_added_again_and_the_others_keep_their_order(tmp_path):
    folder = write(tmp_path / "d")
    with ShardWriter(folder, storage=FLOAT32, made=MADE, examples_per_shard=4) as writer:
        writer.remove({"e1", "e5", "e8", "e9"})
        for i in (8, 1):
            writer.add(make(i))
    source = ShardSource(folder)
    assert [source[i][1]["id"] for i in range(len(source))] == ["e0", "e2", "e3", "e4", "e6", "e7", "e8", "e1"]
    assert verify_shards(folder) == []


def test_any_flip_and_any_shape_of_a_manifest_is_one_sentence(tmp_path):
    folder = write(tmp_path / "d")
    path = folder / MANIFEST
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    data = json.loads(whole)
    texts = []
    for _ in range(300):
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        texts.append(bytes(flipped))
    texts += [whole[: rng.integers(len(whole) - 3)] for _ in range(100)]
    junk = [None, True, -1, 1.5, "x", [], {}, [[]], "../x", 10**400]
    assert not accepted(path, texts)
    bare = {name: value for name, value in data.items() if name != "sha256"}
    changed = [bare | {name: value} for name in bare for value in junk]
    changed += [bare | {"shards": [data["shards"][0] | {name: value}]} for name in data["shards"][0] for value in junk]
    # What may differ without a seal: num_examples and vfm_cosine, which follow from the rest, complete, an empty list
    # of shards or of inputs, and numbers of bytes, which opening compares.
    assert len(accepted(path, [json.dumps(value).encode() for value in changed])) < 40


def accepted(path, texts):
    """The manifests that are read without an error; every error is one sentence that names the file."""
    found, messages = [], []
    for text in texts:
        path.write_bytes(text)
        try:
            read_manifest(path.parent)
            found.append(text)
        except ValueError as error:
            messages.append(str(error))
    assert all("\n" not in message and MANIFEST in message for message in messages)
    return found


def test_masks_are_in_all_examples_or_in_none(tmp_path):
    mask = np.ones((2, 6), bool)
    with ShardWriter(tmp_path / "masks", storage=FLOAT32, made={}) as writer:
        writer.add(make(0, subject_mask=mask))
        with pytest.raises(ValueError, match=r"e1 has no subject mask; the other examples of .* have one"):
            writer.add(make(1))
    assert ShardSource(tmp_path / "masks").spec.subject_mask
    with ShardWriter(tmp_path / "none", storage=FLOAT32, made={}) as writer:
        writer.add(make(0))
    with ShardWriter(tmp_path / "none", storage=FLOAT32, made={}) as writer:  # a dataset of an older version grows
        writer.add(make(1, subject_mask=mask))
    source = ShardSource(tmp_path / "none")
    assert not source.spec.subject_mask
    assert len(source) == 2
    assert not any("subject_mask" in source[i][0] for i in range(2))
