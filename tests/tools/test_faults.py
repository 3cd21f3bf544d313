"""Faulty set-ups of `refalign train`: one sentence, exit code 2, no traceback, nothing half-written.

Most run in this process, and must end before anything is compiled; a few, whose fault needs a process, in their own.
"""

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from support import tiny
from support.places import ROOT, environment
from support.runs import MODEL, recipe

from refalign_jax import command
from refalign_jax.config import Storage
from refalign_jax.convert.checkpoint import save_params
from refalign_jax.convert.dit import model_table
from refalign_jax.convert.table import published_shapes, to_published
from refalign_jax.convert.write import write_weights
from refalign_jax.data.examples import Example
from refalign_jax.data.shard_writer import ShardWriter
from refalign_jax.sharding import make_mesh
from refalign_jax.trainer import loop, preflight
from refalign_jax.trainer.checkpoint import Checkpoints
from refalign_jax.trainer.state import begin, save

TINY = "tiny"


def write_data(folder: Path, count: int = 17, made: dict | None = None, finish: bool = True) -> None:
    """A dataset that fits configs/tiny.py."""
    rng = np.random.default_rng(0)
    writer = ShardWriter(folder, storage=Storage(), made=made or {}, examples_per_shard=4)
    for i in range(count):
        normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
        writer.add(
            Example(
                id=f"clip-{i}",
                prompt="",
                video_latents=normal(2, 4, 6, 16),
                reference_latents=normal(2, 4, 6, 16),
                subject_ids=np.arange(2, dtype=np.int32),
                text=normal(5, 16),
                vfm_features=normal(2, 6, 8),
            )
        )
    if finish:
        writer.close()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """What is whole and is copied before it is broken: a dataset, a run with a checkpoint, weights of two models."""
    folder = tmp_path_factory.mktemp("good")
    write_data(folder / "data")
    params = jax.device_get(tiny.params(MODEL))
    save_params(folder / "params", params, MODEL)
    table = model_table(MODEL.dit, MODEL.alignment)
    shapes = published_shapes(table, params)
    shapes = {name: shapes[name] for entry in table for name in entry.names}
    kinds = dict.fromkeys(shapes, np.dtype(np.float32))
    write_weights(folder / "w.safetensors", to_published(table, params), shapes, kinds, 10**9)
    config = recipe(folder / "run")
    (folder / "run").mkdir()
    with Checkpoints(folder / "run/checkpoints", 2) as checkpoints:
        state, _ = begin(config, make_mesh(config.mesh), checkpoints)
        data = {"examples_consumed": 8, "shuffle_seed": 0, "first_example": 0, "num_examples": 21}
        save(state._replace(step=state.step + 1), data, config, {}, checkpoints)
    return folder


@pytest.fixture
def place(good, tmp_path):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    return tmp_path


def refuse(arguments: list, capsys, monkeypatch) -> str:
    """Runs the command, which must end before anything is compiled; returns the sentence it was refused with."""
    sentence, printed = fail(arguments, capsys, monkeypatch)
    assert "Compiled in" not in printed
    return sentence


def fail(arguments: list, capsys, monkeypatch) -> tuple[str, str]:
    """Runs the command, which must fail; returns its sentence, and everything that it printed to stderr."""
    monkeypatch.setattr(sys, "argv", ["refalign", "train", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    if "Value error" in printed:  # of a field, in tyro's frame
        return " ".join(line.strip("│ ") for line in printed.splitlines()), printed
    sentence = printed.rstrip("\n").splitlines()[-1]
    assert sentence.startswith("error: ")
    assert sentence.endswith(".")
    return sentence, printed


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.exists() else []


# name: (arguments that follow the recipe and its folder, what the sentence must say); {p} is a folder of good things
FAULTS: dict[str, tuple[list[str], str]] = {
    "no data": (["--synthetic.num-examples", "0"], r"data\.path is empty"),
    "data and synthetic": (["--data.path", "{p}/data"], r"data\.path=.* exclude each other"),
    "no dataset there": (
        ["--synthetic.num-examples", "0", "--data.path", "{p}/none"],
        r"none/manifest\.json does not exist",
    ),
    "a file as dataset": (["--synthetic.num-examples", "0", "--data.path", "{p}/w.safetensors"], "can't be read"),
    "held-out takes all": (["--data.held-out", "40"], r"data\.held_out is 40 of 40 examples"),
    "batch and devices": (
        ["--data.batch-size", "4", "--data.held-out", "4"],
        r"data\.batch_size=4 is not .*mesh\.fsdp, 8, ",
    ),
    "batch and parts": (["--optimizer.accumulation", "3"], r"data\.batch_size=8 is not .* optimizer\.accumulation=3"),
    "mesh": (["--mesh.fsdp", "3"], r"fsdp=3 times .* is not the number of devices, 8"),
    "grid and patch": (
        ["--synthetic.latent-grid", "2", "5", "6"],
        "A latent grid of 5x6 is not divisible by the patch",
    ),
    "patch and VFM": (["--model.dit.patch-size", "1", "2", "1"], "6 VFM tokens .* makes 12 tokens"),
    "positions": (["--model.dit.max-position", "4"], r"2 latent frames, .*max_references=3 .*max_position=4"),
    "no folder": (["--train.folder", ""], r"train\.folder is empty"),
    "folder is a file": (["--train.folder", "{p}/w.safetensors"], r"train\.folder='.*w\.safetensors' can't be written"),
    "folder not to be made": (["--train.folder", "/proc/none/run"], r"train\.folder='/proc/none/run' can't be written"),
    "folder is remote": (["--train.folder", "gs://bucket/run"], r"TrainConfig\.folder='gs://bucket/run' must be local"),
    "checkpoints in a file": (["--train.checkpoint-folder", "{p}/w.safetensors"], r"w\.safetensors is a file; name"),
    "cache in a file": (["--train.compilation-cache", "{p}/w.safetensors"], r"train\.compilation_cache=.* can't be"),
    "freeze nothing": (["--optimizer.freeze", "dit/nothing*"], "no parameter is called 'dit/nothing"),
    "freeze all": (["--optimizer.freeze", "*"], "freezes every parameter"),
    "init not there": (["--train.init", "{p}/none"], "none"),
    "init of another model": (["--train.init", "{p}/params", "--model.dit.ffn-width", "48"], r"\[3, 24, 40\], not"),
    "init of another file": (["--train.init", "{p}/data/manifest.json"], "manifest.json"),
    "init without average": (["--train.init", "{p}/params", "--train.init-ema"], "no moving average"),
    "average of published": (["--train.init", "{p}/w.safetensors", "--train.init-ema"], "no training checkpoint"),
    "dropout": (["--dropout.both", "0.9"], "DropoutConfig: text, references, both"),
    "learning rate": (["--optimizer.learning-rate", "-1"], r"OptimizerConfig\.learning_rate=-1\.0 must be positive"),
    "cosine": (
        ["--optimizer.schedule", "cosine", "--optimizer.warmup-steps", "12"],
        "leaves nothing of train.steps=12",
    ),
    "evaluation": (["--data.held-out", "0"], r"train\.held_out_every=6 needs examples that training never sees"),
    "heads": (["--model.dit.num-heads", "5"], r"DiTConfig\.width=24 is not divisible by num_heads=5"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_refused_before_compiling(name, place, capsys, monkeypatch):
    arguments, message = FAULTS[name]
    before = files(place)
    given = [TINY, "--train.folder", place / "new", *(x.replace("{p}", str(place)) for x in arguments)]
    sentence = refuse(given, capsys, monkeypatch)
    assert re.search(message, sentence), sentence
    assert files(place) == before


DATA = ["--synthetic.num-examples", "0", "--train.held-out-every", "0", "--train.preview-every", "0"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("--model.alignment.vfm-width", 10, "VFM width 8, but model.alignment.vfm_width is 10"),
        ("--model.dit.text-width", 20, "text width 16, but model.dit.text_width is 20"),
        ("--model.dit.latent-channels", 12, "latent channels 16, but model.dit.latent_channels is 12"),
        ("--data.text-length", 4, "data.text_length is 4, but the longest prompt has 5 tokens"),
        ("--data.held-out", 24, "data.held_out is 24 of 17 examples, which leaves none to train on"),
    ],
)
def test_a_model_that_does_not_fit_the_data(field, value, message, place, capsys, monkeypatch):
    given = [TINY, *DATA, "--data.path", place / "data", "--train.folder", place / "new", field, value]
    assert message in refuse(given, capsys, monkeypatch)
    assert files(place / "new") == []


def test_everything_that_does_not_fit_is_listed_at_once(place, capsys, monkeypatch):
    shutil.rmtree(place / "data")
    write_data(place / "data", made={"empty_text": [[0.0] * 12] * 6})
    fields = {"model.alignment.vfm-width": 10, "model.dit.text-width": 20, "model.dit.latent-channels": 12}
    fields |= {"data.text-length": 4, "data.held-out": 24, "model.dit.max-position": 4}
    given = [f"--{name}={value}" for name, value in fields.items()]
    patch = ["--model.dit.patch-size", "1", "1", "2"]
    sentence = refuse(
        [TINY, *DATA, "--data.path", place / "data", "--train.folder", place / "new", *given, *patch],
        capsys,
        monkeypatch,
    )
    for name in ("vfm_width is 10", "text_width is 20", "latent_channels is 12", "longest prompt has 5 tokens"):
        assert name in sentence
    for name in ("held_out is 24 of 17", "max_position=4", "patch_size=(1, 1, 2) makes 12", "shape [6, 12]"):
        assert name in sentence
    assert "--from-dataset takes these sizes" in sentence
    assert files(place / "new") == []


def broken_data(place: Path, how: str) -> str:
    """Breaks a dataset in one way; returns what must be said."""
    data, shard = place / "data", place / "data/examples-00001.array_record"
    if how == "unfinished":
        shutil.rmtree(data)
        write_data(data, count=9, finish=False)
        return "is unfinished with 8 examples"
    if how == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-100])
        return "it is truncated or was changed"
    if how == "missing shard":
        shard.unlink()
        return "examples-00001.array_record is missing"
    if how == "no manifest":
        (data / "manifest.json").write_text("{")
        return "is not a manifest of prepared examples"
    if how == "empty text":
        shutil.rmtree(data)
        write_data(data, made={"empty_text": [[0.0] * 12]})
        return "has an empty_text of shape [1, 12], but model.dit.text_width is 16"
    assert how == "flipped bytes"
    for path in data.glob("*.array_record"):
        blob = bytearray(path.read_bytes())
        blob[len(blob) // 2 :: 997] = bytes(x ^ 1 for x in blob[len(blob) // 2 :: 997])
        path.write_bytes(blob)
    return "More than 0 corrupt records (data.max_corrupt), the last: "


@pytest.mark.parametrize(
    "how", ["unfinished", "truncated shard", "missing shard", "no manifest", "empty text", "flipped bytes"]
)
def test_broken_data(how, place, capsys, monkeypatch):
    message = broken_data(place, how)
    given = [TINY, *DATA, "--data.path", place / "data", "--train.folder", place / "new"]
    # Records are read when the first batch is, after the step is compiled; all else is found before.
    sentence = fail(given, capsys, monkeypatch)[0] if how == "flipped bytes" else refuse(given, capsys, monkeypatch)
    assert message in sentence
    assert not files(place / "new/checkpoints")


def broken_run(place: Path, how: str) -> tuple[list[str], str]:
    """Breaks a run's folder; returns what to override and what must be said."""
    step = place / "run/checkpoints/1"
    if how == "another model":
        return ["--model.dit.ffn-width", "48"], "model.dit.ffn_width was 40, now it is 48; set this back"
    if how == "another seed of the data":
        return ["--data.shuffle-seed", "5"], "saved with shuffle_seed 0, now it is 5"
    if how == "no moments":
        shutil.rmtree(step / "optimizer")
        return [], "remove that folder to continue from the beginning"
    if how == "no configuration":
        shutil.rmtree(step / "config")
        return [], "the checkpoint is not whole"
    for path in step.rglob("d/*"):
        path.write_bytes(path.read_bytes()[:100])
    return [], "can't be restored"


@pytest.mark.parametrize(
    "how", ["another model", "another seed of the data", "no moments", "no configuration", "truncated files"]
)
def test_a_run_that_can_not_go_on(how, place, capsys, monkeypatch):
    arguments, message = broken_run(place, how)
    given = [write_recipe(place), "--train.folder", place / "run", *arguments]
    before = files(place)
    assert message in refuse(given, capsys, monkeypatch)
    assert files(place) == before


def write_recipe(place: Path) -> Path:
    """The tests' recipe as a file."""
    path = place / "recipe.py"
    values = json.dumps(dataclasses.asdict(recipe(place / "run")))
    path.write_text(
        "import json\nfrom refalign_jax.config import Config, from_dict\n"
        f"def get_config():\n    return from_dict(Config, json.loads({values!r}), 'recipe')\n"
    )
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "recipe.py does not exist; name a Python file with get_config(), or one of demo, refalign_14b_mixture,"),
        ("def get_config(:", "cannot be read as a recipe: "),
        ("import nothing_of_that_name", "No module named 'nothing_of_that_name'"),
        ("x = 1", "has no attribute 'get_config'"),
        ("def get_config(): return 1 / 0", "cannot be read as a recipe: division by zero"),
        (
            "from refalign_jax.config import DiTConfig\ndef get_config(): return DiTConfig(width=float('nan'))",
            "recipe.py cannot be read as a recipe: DiTConfig.width=nan must be a whole number",
        ),
        ("def get_config(): return {}", "get_config() returns dict; it must return a Config"),
    ],
)
def test_recipes_that_are_none(text, message, tmp_path, capsys, monkeypatch):
    path = tmp_path / "recipe.py"
    if text is not None:
        path.write_text(text)
    assert message in refuse([path, "--train.folder", tmp_path / "new"], capsys, monkeypatch)
    assert not (tmp_path / "new").exists()
    assert "Name a recipe first" in refuse(["--train.steps", "3"], capsys, monkeypatch)


def test_truncated_weights(place, capsys, monkeypatch):
    path = place / "w.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    given = [write_recipe(place), "--train.folder", place / "new", "--train.init", path]
    assert "w.safetensors" in refuse(given, capsys, monkeypatch)
    assert files(place / "new") == []


def test_no_room_for_a_checkpoint(place, capsys, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    assert "one checkpoint takes 0.00 GB" in refuse([TINY, "--train.folder", place / "new"], capsys, monkeypatch)
    assert files(place / "new") == []


def test_metrics_on_a_full_disk(place, capsys, monkeypatch):
    (place / "new").mkdir()
    (place / "new/metrics.jsonl").symlink_to("/dev/full")
    sentence, _ = fail([TINY, "--train.folder", place / "new"], capsys, monkeypatch)
    assert "metrics.jsonl could not be written: No space left on device" in sentence


def test_too_little_device_memory(place, capsys, monkeypatch):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nand a page more")

    monkeypatch.setattr(jax.stages.Lowered, "compile", exhausted)
    sentence, _ = fail([TINY, "--train.folder", place / "new"], capsys, monkeypatch)
    assert "memory is too small (RESOURCE_EXHAUSTED" in sentence


def test_too_little_device_memory_for_the_state(place, capsys, monkeypatch):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nand a page more")

    monkeypatch.setattr(loop, "begin", exhausted)
    sentence, _ = fail([TINY, "--train.folder", place / "new"], capsys, monkeypatch)
    assert "The devices' memory is too small (RESOURCE_EXHAUSTED" in sentence
    assert "raise mesh.fsdp" in sentence


def process(place: Path, *arguments: object, limit: str = "unlimited") -> subprocess.CompletedProcess:
    """Runs the command in a process whose files may grow to `limit` blocks of 1,024 bytes."""
    given = [sys.executable, str(ROOT / "tools/train.py"), str(write_recipe(place)), *map(str, arguments)]
    shell = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", *given]
    return subprocess.run(shell, capture_output=True, text=True, env=environment(), check=False)


def test_a_loss_that_becomes_infinite_as_a_command(place):
    done = process(place, "--train.folder", place / "new", "--optimizer.learning-rate", "1e30")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    sentence = done.stderr.rstrip("\n").splitlines()[-1]
    assert sentence.startswith("error: Step 2: the loss (nan)")
    assert "examples synthetic-" in sentence
    assert sentence.endswith("there is no checkpoint yet.")
    assert files(place / "new/checkpoints") == []


def test_a_disk_that_fills_up_is_noticed_before_a_checkpoint_is_begun(place, capsys, monkeypatch):
    free = itertools.chain([10**9] * 2, itertools.repeat(1))  # at the start, at the first checkpoint, at the second
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**10, 0, next(free)))
    given = [write_recipe(place), "--train.folder", place / "new", "--train.save-every", "2"]
    sentence, _ = fail(given, capsys, monkeypatch)
    assert "one checkpoint takes 0.00 GB" in sentence
    assert [path.name for path in (place / "new/checkpoints").iterdir()] == ["2"]


def test_a_checkpoint_that_can_not_be_written_as_a_command(place):
    """Files may not grow beyond 64 kB: metrics fit, arrays don't."""
    done = process(place, "--train.folder", place / "new", "--train.save-every", "2", limit="64")
    assert done.returncode == 2, done.stderr
    sentence = r"error: A checkpoint could not be written to \S+ \(File too large\); there is no earlier one\."
    assert re.fullmatch(sentence, done.stderr.splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr
    assert [path for path in (place / "new/checkpoints").iterdir() if path.name.isdigit()] == []
