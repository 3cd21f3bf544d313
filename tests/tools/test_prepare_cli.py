"""tools/prepare.py as a command: what it prints, its faults, and a kill in the middle."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.footage import write_records

from refalign_jax.data.manifest import read_manifest
from refalign_jax.data.shards import ShardSource, verify_shards

ROOT = Path(__file__).parents[2]
STAND_INS = ("--vae", "dct", "--text-encoder", "words", "--vfm", "daisy")
SMALL = (
    *("--height", 48, "--width", 64, "--num-frames", 5),
    *("--dct-stride", 4, "--word-width", 8, "--examples-per-shard", 1),
)


def command(*arguments):
    return [sys.executable, str(ROOT / "tools" / "prepare.py"), "jsonl", *map(str, arguments)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=ENVIRONMENT)


def test_a_killed_command_goes_on(tmp_path):
    """Killed at once after its first shard; the dataset is then the one of a run that was never stopped."""
    records = write_records(tmp_path)
    whole, out = tmp_path / "whole", tmp_path / "d"
    done = run(records, whole, *STAND_INS, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "3 examples are in" in done.stdout
    assert "prepare: 100%" in done.stderr

    process = subprocess.Popen(command(records, out, *STAND_INS, *SMALL), stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    while process.poll() is None and not (out / "manifest.json").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert verify_shards(out) == []
    if process.returncode == -signal.SIGKILL:
        assert 1 <= read_manifest(out).num_examples <= 3
    done = run(records, out, *STAND_INS, *SMALL)
    assert done.returncode == 0, done.stderr
    assert len(ShardSource(out)) == 3
    assert [s.sha256 for s in read_manifest(out).shards] == [s.sha256 for s in read_manifest(whole).shards]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none.jsonl", "d", *STAND_INS], "error: none.jsonl does not exist; expected a JSONL file."),
        (["records.jsonl", "records.jsonl/d", *STAND_INS, *SMALL], "error: records.jsonl/d can't be written"),
    ],
)
def test_faults_are_one_sentence(tmp_path, arguments, sentence):
    write_records(tmp_path)
    done = subprocess.run(command(*arguments), capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(sentence), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "d").exists()


def test_the_kind_of_the_records_is_found_by_the_file_or_named(tmp_path):
    """RECORDS.jsonl by itself, and any name after the kind; both give the same examples."""
    records = write_records(tmp_path)
    other = records.rename(tmp_path / "records.txt")
    (tmp_path / "again.jsonl").write_text(other.read_text())
    shards = []
    for given, out in (((tmp_path / "again.jsonl",), "by_ending"), (("jsonl", other), "named")):
        line = [sys.executable, str(ROOT / "tools/prepare.py"), *map(str, (*given, tmp_path / out, *STAND_INS, *SMALL))]
        done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
        shards.append([shard.sha256 for shard in read_manifest(tmp_path / out).shards])
    assert shards[0] == shards[1]


def test_encoders_are_never_chosen_silently(tmp_path):
    done = run("records.jsonl", tmp_path / "d", "--vae", "dct", "--vfm", "daisy")
    assert done.returncode == 2
    assert "--text-encoder" in done.stderr
    assert not (tmp_path / "d").exists()
