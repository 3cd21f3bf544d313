"""Whole commands on damaged files: exit code 0, or 2 with a sentence; no traceback, and nothing is left over.

Each case damages a file (support/damage.py) and runs a command in this process, as `refalign NAME` does.
"""

import json
import random
import shutil

import jax
import pytest
from support import examples, tiny
from support.damage import damaged
from support.places import GOLDEN
from support.runs import MODEL

from refalign_jax import command
from refalign_jax.config import Storage
from refalign_jax.convert import checksums
from refalign_jax.convert.checkpoint import save_params
from refalign_jax.data.shard_writer import ShardWriter

HLO = "HloModule jit_f\n\nENTRY %main (p: f32[2]) -> f32[2] {\n  ROOT %p = f32[2]{0} parameter(0)\n}\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Good files of every kind."""
    folder = tmp_path_factory.mktemp("good")
    with ShardWriter(folder / "data", storage=Storage(), made={"settings": {}}, examples_per_shard=2) as writer:
        for seed in range(3):
            writer.add(examples.make(seed))
    save_params(folder / "params", jax.device_get(tiny.params(MODEL)), MODEL)
    shutil.copytree(folder / "params", folder / "older")
    for path in (folder / "older").rglob(checksums.FILE):
        path.unlink()
    shutil.copy(GOLDEN / "dit_a/weights.safetensors", folder / "w.safetensors")
    references = [{"image": "a.png", "subject": "cat"}]
    lines = [{"video": f"{i}.mp4", "prompt": "p", "references": references} for i in range(3)]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"id": f"{i}", "prompt": "p", "references": references} for i in range(3)]
    (folder / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in "ab":
        (folder / name).mkdir()
        (folder / name / "optimized.hlo.txt").write_text(HLO)
    return folder


ENCODERS = ("--vae=dct", "--text-encoder=words", "--vfm=daisy", "--height=32", "--width=32", "--num-frames=5")
COMMANDS = {  # name: cases, damaged file, command line; {g} is the folder of good files, {o} one for results
    "overview, manifest": (150, "data/manifest.json", ["overview", "{g}/data", "--verify"]),
    "overview, shard": (150, "data/examples-00000.array_record", ["overview", "{g}/data", "--verify"]),
    "prepare": (150, "records.jsonl", ["prepare", "{g}/records.jsonl", "{o}/data", *ENCODERS]),
    "sample": (150, "requests.jsonl", ["sample", "{g}/params", "{g}/requests.jsonl", "{o}/s"]),
    "import": (80, "w.safetensors", ["convert", "import", "{g}/w.safetensors", "{o}/c"]),
    "export, digests": (60, "params/params/digests.json", ["convert", "export", "{g}/params", "{o}/w.safetensors"]),
    "export, config": (60, "older/config/metadata", ["convert", "export", "{g}/older", "{o}/w.safetensors"]),
    "export, arrays": (60, "older/params/_METADATA", ["convert", "export", "{g}/older", "{o}/w.safetensors"]),
    "export, index": (60, "older/params/manifest.ocdbt", ["convert", "export", "{g}/older", "{o}/w.safetensors"]),
    "compile, dump": (150, "a/optimized.hlo.txt", ["compile", "--compare", "{g}/a", "{g}/b"]),
}
RESULTS = {"prepare": {"data", "data/skipped.jsonl"}, "import": {"c"}}
"""What a command may leave beside an error: the list of records that were left out, or a result that is whole."""


@pytest.mark.parametrize("name", COMMANDS)
def test_damaged_files(name, good, tmp_path, monkeypatch, capsys):
    cases, file, line = COMMANDS[name]
    path, rng = good / file, random.Random(name)
    content, before, out = path.read_bytes(), sorted(good.rglob("*")), tmp_path / "out"
    monkeypatch.setattr(command.tempfile, "tempdir", str(tmp_path))  # where unforeseen errors would be kept
    monkeypatch.setattr("os.environ", dict(command.os.environ))  # compile sets variables
    codes, faults = {}, []
    try:
        for number in range(cases):
            out.mkdir()
            path.write_bytes(damaged(content, rng) if number else content)
            given = [argument.format(g=good, o=out) for argument in line]
            monkeypatch.setattr("sys.argv", ["refalign", *given])
            with pytest.raises(SystemExit) as end:
                command.main()
            code, printed = end.value.code, capsys.readouterr().err
            codes[code] = codes.get(code, 0) + 1
            left = {x.relative_to(out).as_posix() for x in out.rglob("*")} if code else set()
            left = {x for x in left if x not in RESULTS.get(name, ()) and not x.endswith(".digests.jsonl")}
            sentence = printed.rstrip("\n").rsplit("\n", 1)[-1]
            right = code == 0 or (code == 2 and sentence.startswith("error: ") and sentence.endswith("."))
            if not right or left or "Traceback" in printed:
                faults.append((number, code, sorted(left), printed[-300:], path.read_bytes()[:200]))
            shutil.rmtree(out)
    finally:
        path.write_bytes(content)
    assert not faults, faults[:5]
    assert codes.get(2), codes
    assert sorted(good.rglob("*")) == before
