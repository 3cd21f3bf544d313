"""Folders in object stores: what is written there, who may write, and what is said where a store refuses."""

import errno
import hashlib
import json
import logging
import os
import socket
import sys

import fsspec
import pytest
from etils import epath
from support import store
from support.examples import FLOAT32, make
from support.store import HttpError, MemoryStore

from refalign_jax import command, locks, remote
from refalign_jax.atomic import atomic_write, first_line, write_text
from refalign_jax.convert.checkpoint import find_checkpoint
from refalign_jax.convert.checksums import store_url
from refalign_jax.convert.files import open_weights
from refalign_jax.data.manifest import read_manifest
from refalign_jax.data.records import Skipped
from refalign_jax.data.shard_writer import ShardWriter
from refalign_jax.data.shards import CorruptRecordError, ShardSource, verify_shards
from refalign_jax.data.skips import SkipLog, read_skipped
from refalign_jax.data.sources.jsonl import read_jsonl
from refalign_jax.data.stored import open_bytes, size_of
from refalign_jax.inference.requests import read_requests
from refalign_jax.locks import LOCK, FolderInUseError, check_free, exclusive

MADE = {"encoders": {"video": "dct"}, "command": "test"}
ANONYMOUS = HttpError(401, "Anonymous caller does not have storage.objects.list access")
FORBIDDEN = OSError("Forbidden: b/bucket/o\nsa@project does not have storage.objects.create access.")
"""What gcsfs raises for a status of 403."""


@pytest.fixture(autouse=True)
def bucket(monkeypatch):
    return store.empty(monkeypatch)


def names(bucket):
    return sorted(bucket.store)


def holder(**changes):
    """The text of a lock that a process on another host holds."""
    found = {"host": "elsewhere", "pid": 1, "begun": "", "what": "a run", "time": "2026-11-27T00:00:00+00:00"}
    return json.dumps(found | changes).encode()


def write(folder, count=5):
    with ShardWriter(folder, storage=FLOAT32, made=MADE, examples_per_shard=2) as writer:
        for i in range(count):
            writer.add(make(i))


def test_a_dataset_is_written_and_continued(bucket):
    write("gs://bucket/data", 3)
    bucket().pipe_file("gs://bucket/data/examples-00007.array_record", b"left over")
    bucket().pipe_file("gs://bucket/data/.manifest.json.abc-1.partial", b"left over")
    with ShardWriter("gs://bucket/data", storage=FLOAT32, made=MADE, examples_per_shard=2) as writer:
        assert len(writer.done) == 3
        writer.add(make(9))
    shards = [f"/bucket/data/examples-{i:05d}.array_record" for i in range(3)]
    assert names(bucket) == [*shards, "/bucket/data/manifest.json"]
    manifest = read_manifest("gs://bucket/data")
    assert manifest.complete
    for name, shard in zip(shards, manifest.shards, strict=True):
        assert hashlib.sha256(bucket.store[name].getvalue()).hexdigest() == shard.sha256
    assert verify_shards("gs://bucket/data") == []


def test_damage_and_loss_of_a_shard_are_named(bucket):
    write("gs://bucket/data")
    first, second = names(bucket)[:2]
    damaged = bytearray(bucket.store[first].getvalue())
    damaged[len(damaged) // 2] ^= 1
    bucket().pipe_file(first, bytes(damaged))
    assert "examples-00000.array_record has SHA-256" in verify_shards("gs://bucket/data")[0]
    bucket().rm_file(second)
    with pytest.raises(ValueError, match=r"gs://bucket/data/examples-00001\.array_record is missing"):
        ShardSource("gs://bucket/data")


class Records:
    """Raises one error for every record, as ArrayRecord does."""

    def __init__(self, text):
        self.text = text

    def __getitem__(self, index):
        raise RuntimeError(self.text)


def test_a_record_is_corrupt_only_where_the_store_has_answered():
    write("gs://bucket/data")
    source = ShardSource("gs://bucket/data")
    source._records = Records("Corrupted Riegeli/records file: chunk data hash mismatch")
    with pytest.raises(CorruptRecordError, match=r"examples-00001\.array_record, record 1 .* hash mismatch"):
        source[3]
    source._records = Records("Retry policy exhausted in Read(): Connection refused")
    with pytest.raises(OSError, match=r"examples-00001\.array_record, record 1 .* Connection refused"):
        source[3]


def test_a_file_is_there_whole_or_not_at_all(bucket):
    write_text("gs://bucket/f", "before")
    with pytest.raises(ZeroDivisionError), atomic_write("gs://bucket/f") as temporary:
        temporary.write_text(f"after {temporary.write_text('half')} {1 / 0}")
    assert names(bucket) == ["/bucket/f"]
    assert bucket.store["/bucket/f"].getvalue() == b"before"


def test_the_list_of_what_was_left_out_is_written_there():
    folder = epath.Path("gs://bucket/data")
    with SkipLog(folder) as log:
        log.add(Skipped(id="a", reason="too short"))
    assert [entry.id for entry in read_skipped(folder)] == ["a"]


@pytest.mark.parametrize(
    ("refuses", "sentence"),
    [
        (ANONYMOUS, r"gs://bucket/\w+ can't be reached: the store wants other credentials \(Anonymous caller .*\)"),
        (FORBIDDEN, r"gs://bucket/\w+ can't be reached: the store does not allow it \(sa@project does not .* access\)"),
        (OSError(errno.ECONNREFUSED, "Connection refused"), r"gs://bucket/\w+ can't be reached: Connection refused"),
    ],
    ids=["no credentials", "no permission", "no connection"],
)
def test_a_store_that_refuses_is_one_sentence(bucket, monkeypatch, refuses, sentence):
    monkeypatch.setattr(bucket, "refuses", refuses)
    for action in (read_manifest, find_checkpoint, lambda place: check_free(place, "x"), write):
        with pytest.raises(OSError, match=sentence):
            action("gs://bucket/refused")
    with pytest.raises(OSError, match=sentence):
        command.require("gs://bucket/refused", "a dataset")


def test_a_store_that_refuses_later_is_one_sentence(bucket, monkeypatch):
    remote.check("gs://bucket/later")
    monkeypatch.setattr(bucket, "refuses", FORBIDDEN)
    for action in (lambda: write("gs://bucket/later"), lambda: write_text("gs://bucket/later/f", "x")):
        with pytest.raises(OSError, match=r"can't be written: the store does not allow it \(sa@project"):
            action()
    assert command.judge(FORBIDDEN)[0] == 2
    code, sentence = command.judge(ANONYMOUS)
    assert code == 2
    assert sentence.startswith("error: An object store can't be read or written: the store wants other credentials")
    assert command.judge(FileNotFoundError("b/bucket/o"))[1].endswith(": it does not exist.")
    for kind in (OSError, PermissionError):
        assert command.judge(kind("A sentence of ours."))[1] == "error: A sentence of ours."


def test_the_answer_of_a_store_to_tensorstore_is_cut_to_its_sentence():
    text = "PERMISSION_DENIED: Error reading gs://b/x: No access. [http_response_code='403'] [http_response_body='{}']"
    assert first_line(ValueError(text)) == "PERMISSION_DENIED: Error reading gs://b/x: No access"


def test_what_is_not_there_is_one_sentence():
    for action in (read_manifest, find_checkpoint, lambda place: check_free(place, "x"), write):
        with pytest.raises(ValueError, match=r"gs://typo/data can't be reached: there is no bucket typo\."):
            action("gs://typo/data")
    with pytest.raises(ValueError, match=r"nothing/manifest\.json can't be read \(it does not exist\)"):
        read_manifest("gs://bucket/nothing")
    with pytest.raises(ValueError, match="gs://bucket/nothing does not exist; a checkpoint is a folder"):
        find_checkpoint("gs://bucket/nothing")
    with pytest.raises(ValueError, match="gs://bucket/nothing does not exist; expected a dataset"):
        command.require("gs://bucket/nothing", "a dataset")
    with pytest.raises(ValueError, match="names no bucket"):
        remote.check("gs:///data")
    for name in ("a#b", "a?b"):
        with pytest.raises(ValueError, match="must have no # and no"):
            remote.check(f"gs://bucket/{name}/data")
    with pytest.raises(ValueError, match="ftp:// is no object store that is known here"):
        remote.check("ftp://bucket/data")
    with pytest.raises(ValueError, match="published weights are read from local files"):
        open_weights("gs://bucket/weights.safetensors")


def test_a_package_that_is_missing_is_named(monkeypatch):
    def missing(*_, **__):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(ValueError, match=r"the package gcsfs is not installed; pip install -e '\.\[gs\]'\."):
        remote.check("gs://bucket/missing")


def test_listings_are_not_remembered():
    assert remote.file_system("gs://bucket").storage_options["use_listings_cache"] is False


def test_tracebacks_of_a_store_are_not_printed(caplog, monkeypatch):
    monkeypatch.setenv("EPATH_USE_TF", "true")
    remote.configure()
    assert os.environ["EPATH_USE_TF"] == "true"
    logger = logging.getLogger("gcsfs")
    try:
        raise ANONYMOUS
    except HttpError:
        logger.exception("_request non-retriable exception")
    logger.warning("a warning")
    assert [record.message for record in caplog.records] == ["a warning"]


def test_the_lock_is_created_once_and_removed(bucket):
    with exclusive("gs://bucket/data", "one"):
        assert json.loads(bucket.store[f"/bucket/data/{LOCK}"].getvalue())["what"] == "one"
        with pytest.raises(FolderInUseError, match="this very process"), exclusive("gs://bucket/data/", "two"):
            pass
    assert names(bucket) == []


def test_of_two_that_start_together_the_store_refuses_one(bucket, monkeypatch):
    create = MemoryStore.pipe_file

    def slower(self, path, value, mode="overwrite", **kwargs):
        """The other process's lock comes between this one's look and its creation."""
        if mode == "create":
            create(self, path, holder())
        create(self, path, value, mode=mode, **kwargs)

    monkeypatch.setattr(MemoryStore, "pipe_file", slower)
    with pytest.raises(FolderInUseError, match=r"a run \(process 1 on elsewhere"), exclusive("gs://bucket/data", "two"):
        pass
    assert bucket.store[f"/bucket/data/{LOCK}"].getvalue() == holder()


def test_a_lock_that_was_left_over_is_taken_over(bucket, monkeypatch):
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.01)
    monkeypatch.setattr(locks.time, "sleep", lambda _: None)
    gone = holder(host=socket.gethostname(), pid=os.getpid(), begun="before")
    for left in (holder(), gone, b"not JSON"):
        bucket().pipe_file(f"gs://bucket/data/{LOCK}", left)
        with exclusive("gs://bucket/data", "new"):
            assert json.loads(bucket.store[f"/bucket/data/{LOCK}"].getvalue())["what"] == "new"
        assert names(bucket) == []


def test_a_lock_that_another_has_taken_over_is_left_to_it(bucket, monkeypatch, caplog):
    beats = []
    monkeypatch.setattr(locks, "_beating", lambda beat: beats.append(beat) or locks.contextlib.nullcontext())
    with exclusive("gs://bucket/data", "suspended"):
        bucket().pipe_file(f"gs://bucket/data/{LOCK}", holder())
        beats[0]()
        beats[0]()
    assert bucket.store[f"/bucket/data/{LOCK}"].getvalue() == holder()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "is no longer held by this process" in caplog.text


def test_the_newest_checkpoint_of_a_run_is_the_newest_that_is_whole(bucket):
    for step, committed in ((4, True), (12, False), (8, True)):
        for file in ("params/x", "config/metadata", *(["commit_success.txt"] if committed else [])):
            bucket().pipe_file(f"gs://bucket/run/{step}/{file}", b"")
    folder, item = find_checkpoint("gs://bucket/run")
    assert (os.fspath(folder), item) == ("gs://bucket/run/8", "params")


def test_the_checkpoints_of_a_run_are_where_its_configuration_names_them(bucket, tmp_path):
    recipe = {"config": {"train": {"checkpoint_folder": "gs://bucket/run"}}}
    (tmp_path / "config.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match="has no checkpoint yet; it keeps them in gs://bucket/run"):
        find_checkpoint(tmp_path)
    for file in ("params/x", "config/metadata", "commit_success.txt"):
        bucket().pipe_file(f"gs://bucket/run/4/{file}", b"")
    assert os.fspath(find_checkpoint(tmp_path)[0]) == "gs://bucket/run/4"
    (tmp_path / "config.json").write_text(json.dumps(recipe).replace("bucket", "typo"))
    with pytest.raises(ValueError, match="there is no bucket typo"):
        find_checkpoint(tmp_path)


def test_tensorstore_gets_a_name_as_it_is():
    assert store_url("gs://bucket/a%20b/c d") == "gs://bucket/a%2520b/c%20d"
    assert store_url("/a%20b") == "file:///a%2520b"


def test_a_url_where_a_local_path_is_expected_is_refused(monkeypatch, capsys, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["convert", "import", "w.safetensors", "gs://bucket/init"])
    with pytest.raises(SystemExit) as exit:
        command.run(command.load("convert"))
    assert exit.value.code == 2
    assert "gs://bucket/init is not on this machine" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_records_name_files_at_urls(bucket, tmp_path):
    bucket().pipe_file("gs://bucket/cat.mp4", b"a video")
    line = {"video": "gs://bucket/cat.mp4", "prompt": "", "references": [{"image": "gs://bucket/cat.png"}]}
    (tmp_path / "records.jsonl").write_text(json.dumps(line))
    (record,) = read_jsonl(tmp_path / "records.jsonl")
    assert str(record.video) == "gs://bucket/cat.mp4"
    assert record.video.read() == b"a video"
    with pytest.raises(ValueError, match=r"gs://bucket/cat\.png does not exist\."):
        record.references[0].path.read()
    (tmp_path / "requests.jsonl").write_text(json.dumps({"prompt": "", "references": line["references"]}))
    with pytest.raises(ValueError, match=r"line 1: gs://bucket/cat\.png is a URL; references to sample with are local"):
        read_requests(tmp_path / "requests.jsonl")


def test_a_file_at_a_url_that_is_refused_is_one_sentence(bucket, monkeypatch):
    monkeypatch.setattr(bucket, "refuses", ANONYMOUS)
    for action in (open_bytes, size_of):
        with pytest.raises(ValueError, match=r"gs://bucket/f can't be read: the store wants other credentials"):
            action("gs://bucket/f")
