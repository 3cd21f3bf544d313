"""`refalign train` as a command: help, overrides, misspelt fields, recipes, and kill -9."""

import dataclasses
import json
import random
import re
import signal
from pathlib import Path
from typing import Annotated

import pytest
import tyro
from support.runs import CACHE, recipe

from refalign_jax.command import load, parse_recipe
from refalign_jax.config import Config, flat_fields, read_recipe
from refalign_jax.flops import Shape, tokens
from refalign_jax.soak.training import Attempt, survivors
from refalign_jax.trainer.compare import differences

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs/tiny.py")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


def parse(arguments: list[str]) -> Config:
    return parse_recipe(Options, arguments, "tools/train.py", "What it does.").config


def test_help_shows_every_field_with_type_and_the_recipes_value(capsys):
    with pytest.raises(SystemExit) as end:
        parse([TINY, "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, value in flat_fields(dataclasses.asdict(parse([TINY]))).items():
        option = f"--{name.replace('_', '-')} "
        if isinstance(value, bool):
            option = f"--{name.replace('_', '-')}, --"
        assert option in text, name
    assert "--data.batch-size INT" in text
    assert "(default: 8)" in text
    assert "--model.dit.remat {none,dots,narrow,attention,full}" in text
    assert "--optimizer.learning-rate FLOAT" in text
    assert "(default: 0.001)" in text


def test_overrides_reach_every_kind_of_field():
    arguments = ["--train.steps", "7", "--optimizer.freeze", "dit/*bias", "dit/head/*", "--train.init-ema"]
    arguments += ["--synthetic.latent-grid", "3", "8", "8", "--model.dit.remat", "full", "--data.path", "x"]
    config = parse([TINY, *arguments])
    assert config.train.steps == 7
    assert config.optimizer.freeze == ("dit/*bias", "dit/head/*")
    assert config.train.init_ema
    assert config.synthetic.latent_grid == (3, 8, 8)
    assert (config.model.dit.remat, config.data.path) == ("full", "x")
    assert config.optimizer.ema_decay == 0.9  # the recipe's


def test_a_misspelt_field_suggests_the_right_one(capsys):
    with pytest.raises(SystemExit) as end:
        parse([TINY, "--optimizer.learning-rat", "1"])
    assert end.value.code == 2
    assert "--optimizer.learning-rate" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_recipes_are_whole_and_their_headers_say_how_to_run_them(path):
    config = read_recipe(path)
    assert isinstance(config, Config)
    header = path.read_text().split('"""')[1]
    assert f"python tools/train.py configs/{path.name}" in header
    for word in ("Hardware:", "Time:", "ours"):
        assert word in header
    assert ("not measured" in header) != bool(re.search(r"\d+ min .*\(20\d\d-\d\d-\d\d\)", header))
    if not path.stem.startswith("refalign"):
        return
    assert tokens(config.model.dit, Shape(grid=(21, 60, 104), references=3, text_length=512)) == (32_760, 4_680)
    assert config.optimizer.learning_rate == (1e-5 if "stage2" in path.stem else 5e-5)
    assert config.train.folder == f"runs/{path.stem}"
    if "stage2" in path.stem:
        assert config.train.init == f"runs/{path.stem.replace('stage2', 'stage1')}"


def test_a_killed_run_loses_nothing_and_leaves_no_worker(tmp_path):
    """Once what tools/soak.py does many times."""
    file = tmp_path / "recipe.py"
    values = json.dumps(dataclasses.asdict(recipe(tmp_path, preview_every=0)))
    file.write_text(
        "import json\nfrom refalign_jax.config import Config, from_dict\n"
        f"def get_config():\n    return from_dict(Config, json.loads({values!r}), 'recipe')\n"
    )
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    first = Attempt(file, killed, steps=12, workers=2, cache=CACHE)
    first.wait_for_step(random.randint(2, 11))
    first.process.kill()
    first.wait()
    assert first.process.returncode == -signal.SIGKILL, (killed / "output.txt").read_text()
    assert survivors(first.process.pid) == []
    second = Attempt(file, killed, steps=12, workers=2, cache=CACHE)
    second.wait()
    assert second.process.returncode == 0, (killed / "output.txt").read_text()
    assert survivors(second.process.pid) == []
    assert load("train")([str(file), "--train.folder", str(whole), "--train.save-every", "3"], "train") is None
    assert differences(killed, whole) == []
