"""The shipped recipes, and what their headers say about one device."""

import dataclasses
import re
import shlex
from typing import Annotated

import jax
import pytest
import tyro

from refalign_jax.command import parse_recipe
from refalign_jax.config import RECIPES, Config, find_recipe, read_recipe, without_data
from refalign_jax.initial import model_shapes
from refalign_jax.perf.ahead import lower
from refalign_jax.sharding import make_mesh
from refalign_jax.trees import count

NAMES = sorted(path.stem for path in RECIPES.glob("[!_]*.py"))
BYTES = 16
"""Bytes of state per parameter: itself, two moments and the gradient in float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


def on_one_device(name: str) -> Config:
    """A recipe with the options that its header names for one device."""
    header = find_recipe(name).read_text().split('"""')[1]
    assert "One device" in header
    if "One device: as it is." in header:
        return read_recipe(name)
    found = re.search(r"One device of 80 GB [^-]*\n    (--.*)\n", header)
    assert found is not None
    return parse_recipe(Options, [name, *shlex.split(found[1])], "train", "").config


def test_recipes_are_found_by_path_and_by_bare_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_recipe("tiny") == read_recipe(RECIPES / "tiny.py") == read_recipe(str(RECIPES / "tiny.py"))
    (tmp_path / "tiny").mkdir()  # neither a folder nor a file of that name hides a recipe that comes with the package
    assert read_recipe("tiny") == read_recipe(RECIPES / "tiny.py")
    with pytest.raises(ValueError, match=r"The recipe tiny\.py does not exist; .* one of demo, refalign_14b_mixture"):
        read_recipe("tiny.py")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ValueError, match=r"x\.txt is not a recipe"):
        read_recipe("x.txt")


@pytest.mark.parametrize("name", NAMES)
def test_the_state_fits_one_device_as_the_header_says(name):
    config = on_one_device(name)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    assert mesh.size == 1
    limit = 80e9 if name.startswith("refalign") else 0.1e9
    assert count(model_shapes(config.model)) * BYTES < 0.7 * limit  # the rest is for what a step computes
    whole = count(model_shapes(read_recipe(name).model)) * BYTES
    assert (whole > limit) == name.startswith("refalign_14b")


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_lowered_for_one_device_as_the_header_says(name):
    config = without_data(on_one_device(name))
    lower(config, make_mesh(config.mesh, jax.devices()[:1]), "train")
