"""What all commands have in common: quick help with real defaults, examples on lines of their own, one entry point."""

import os
import re
import subprocess
import sys

import pytest
from support.places import ROOT, environment

from refalign_jax import command
from refalign_jax.config import Config

NAMES = command.command_names()
MAX_HELP_SECONDS = 1.5


def help_of(*arguments: str) -> tuple[str, float]:
    """What a command prints for --help, and the CPU time that it took in user mode."""
    before = os.times().children_user
    given = [sys.executable, str(ROOT / "tools" / arguments[0]), *arguments[1:], "--help"]
    done = subprocess.run(given, capture_output=True, text=True, env=environment(COLUMNS="100"), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, os.times().children_user - before


@pytest.mark.parametrize("name", NAMES)
def test_help_is_quick_and_shows_real_defaults_and_examples(name):
    text, seconds = help_of(f"{name}.py")
    if seconds > MAX_HELP_SECONDS:  # on a busy machine, and for the first time, it may take longer
        _, seconds = help_of(f"{name}.py")
    assert seconds < MAX_HELP_SECONDS
    assert "None" not in text
    assert re.search(rf"^    .*tools/{name}\.py( |$)", text, re.MULTILINE), "an example on a line of its own"
    assert not re.search(r"tools/\w+\.py .*tools/\w+\.py", text), "two examples on one line"


@pytest.mark.parametrize("arguments", [("prepare.py", "jsonl"), ("convert.py", "import"), ("convert.py", "export")])
def test_help_of_subcommands_shows_real_defaults(arguments):
    assert "None" not in help_of(*arguments)[0]


def test_help_after_a_recipe_shows_the_recipes_values():
    assert "--train.steps INT" in help_of("train.py", "tiny")[0]
    assert "(default: 12)" in help_of("train.py", "tiny")[0]


def test_nothing_heavy_is_imported_before_arguments_are_parsed():
    """JAX and its neighbours come with the first computation, in every command of a user's day."""
    daily = [name for name in NAMES if not name.startswith("benchmark_") and name != "soak"]
    script = (
        "import sys; from refalign_jax.command import load\n"
        f"for name in {daily!r}: load(name)\n"
        "print(*{'jax', 'numpy', 'grain', 'flax', 'orbax', 'matplotlib', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.strip() == ""


def refalign(*arguments: str, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["refalign", *arguments])
    try:
        command.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_entry_point_lists_the_commands(monkeypatch, capsys):
    assert refalign(monkeypatch=monkeypatch) == 0
    listed = re.findall(r"^    (\w+) +\w", capsys.readouterr().out, re.MULTILINE)
    assert listed == NAMES
    assert {"train", "prepare", "sample", "verify", "report", "compile", "benchmark", "convert", "demo"} <= set(listed)


def test_the_entry_point_refuses_an_unknown_command(monkeypatch, capsys):
    assert refalign("trian", monkeypatch=monkeypatch) == 2
    assert "There is no command 'trian'; choose one of benchmark, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "none.py"], "The recipe none.py does not exist"),
        (["train", "nonesuch"], "The recipe nonesuch does not exist"),
        (["train"], "Name a recipe first, as in: refalign train tiny"),
        (["benchmark", "none.py"], "The recipe none.py does not exist"),
        (["benchmark"], "Name a recipe first, as in: refalign benchmark tiny"),
        (["compile", "none.py"], "The recipe none.py does not exist"),
        (["compile"], "Name a recipe first, as in: refalign compile tiny --topology v5e:2x2"),
        (["compile", "--compare", "a"], "--compare names 1 dumps; name two"),
        (["compile", "--compare", "none", "none"], "none/optimized.hlo.txt does not exist"),
        (["compile", "--table", "none.json"], "none.json does not exist"),
        (["demo", "none.py"], "The recipe none.py does not exist"),
        (["prepare", "none.jsonl", "d", "--vae", "dct", "--text-encoder", "words", "--vfm", "daisy"], "none.jsonl"),
        (["prepare", "none.txt", "d"], "The ending of none.txt does not show what kind of records it holds"),
        (["prepare", ".", "d"], ". is a folder; name the file that holds the records"),
        (["sample", "none", "none.jsonl", "out"], "none.jsonl"),
        (["studio"], "runs/demo/seed-0 holds no run of the demo; name weights, or run `make demo` first"),
        (["overview", "none"], "none/manifest.json"),
        (["verify", "none"], "none"),
        (["report", "none"], "none"),
        (["convert", "import", "none.safetensors", "out"], "none.safetensors"),
        (["convert", "export", "none", "out.safetensors"], "none"),
        (["train", "tiny", "--from-dataset", "--data.path", "none", "--train.folder", "r"], "none/manifest.json"),
    ],
)
def test_what_is_missing_is_called_missing(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert refalign(*arguments, monkeypatch=monkeypatch) == 2
    printed = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert printed.startswith("error: ")
    assert sentence in printed
    if "none" in sentence and "ending" not in sentence:
        assert re.search(r"does not exist|No such file", printed), printed
    assert list(tmp_path.iterdir()) == []


def test_settings_as_name_and_value():
    config = command.override(Config(), ["model.dit.offload=true", "synthetic.latent_grid=1,8,8", "train.steps=3"])
    assert (config.model.dit.offload, config.synthetic.latent_grid, config.train.steps) == (True, (1, 8, 8), 3)
    with pytest.raises(ValueError, match=r"'model\.dit\.remat' names no value"):
        command.override(Config(), ["model.dit.remat"])
