"""Ranges, choices and finite numbers of every configuration, and what importing them costs."""

import dataclasses
import math
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from refalign_jax import config as package
from refalign_jax.config import AugmentConfig, Config, DataConfig, DiTConfig, GenerateConfig, TrainConfig

ENCODERS = {"vae": "dct", "text_encoder": "words", "vfm": "daisy"}
CONFIGS = [kind for name in package.__all__ if dataclasses.is_dataclass(kind := getattr(package, name))]


def required(kind: type) -> dict[str, str]:
    """Values of the fields that have no default."""
    given = {"PrepareConfig": ENCODERS, "OpenS2VConfig": {"videos": "v"}}
    return given.get(kind.__name__, {"videos": "v", "metadata": "m"} if kind.__name__ == "PhantomConfig" else {})


def fields_of(*wanted: type) -> list[tuple[type, str, typing.Any]]:
    """Every field of every configuration whose annotation holds one of these types."""
    found = []
    for kind in CONFIGS:
        for name, hint in typing.get_type_hints(kind).items():
            options = {hint, *typing.get_args(hint)}
            if options & set(wanted):
                found.append((kind, name, hint))
    return found


def bad(hint: typing.Any, value: object) -> object:
    """A value of a field, or a tuple of it where the field is one."""
    return (value,) * len(typing.get_args(hint)) if typing.get_origin(hint) is tuple else value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("kind", "name", "hint"), fields_of(float), ids=lambda x: getattr(x, "__name__", str(x)))
def test_numbers_that_are_not_finite_are_refused(kind, name, hint, value):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.{name}=.* is not finite\.$"):
        kind(**required(kind), **{name: bad(hint, value)})


@pytest.mark.parametrize(("kind", "name", "hint"), fields_of(int), ids=lambda x: getattr(x, "__name__", str(x)))
def test_whole_numbers_are_whole(kind, name, hint):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.{name}=.* must be a whole number\.$"):
        kind(**required(kind), **{name: bad(hint, 1.5)})


def test_every_choice_is_checked():
    checked = 0
    for kind in CONFIGS:
        for name, hint in typing.get_type_hints(kind).items():
            if typing.get_origin(hint) is typing.Literal:
                checked += 1
                with pytest.raises(ValueError, match=rf"{kind.__name__}\.{name}='no such' is unknown; choose one of "):
                    kind(**{**required(kind), name: "no such"})
    assert checked >= 10


@pytest.mark.parametrize(
    ("kind", "change", "sentence"),
    [
        (DiTConfig, {"width": 0}, "DiTConfig.width=0 must be positive."),
        (DiTConfig, {"patch_size": (1, 2)}, "DiTConfig.patch_size=(1, 2) must hold 3 values."),
        (TrainConfig, {"seed": 2**32}, "TrainConfig.seed=4294967296 must be at least 0 and below 2^32."),
        (AugmentConfig, {"scale": (1.2, 0.8)}, "AugmentConfig.scale=(1.2, 0.8) must ascend: the smallest first."),
        (DataConfig, {"held_out": 9, "grown_from": 9}, "DataConfig.held_out=9 must be below grown_from=9."),
        (GenerateConfig, {"num_frames": 16}, "GenerateConfig.num_frames=16 must be 4k+1, such as 17."),
        (GenerateConfig, {"shift": 0.0}, "GenerateConfig.shift=0.0 must be positive."),
    ],
)
def test_one_sentence_names_class_field_and_value(kind, change, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole sentence is compared)
        kind(**change)
    assert str(error.value) == sentence


def test_configurations_import_nothing_heavy():
    """Neither JAX nor anything else that a command can do without until its arguments are right."""
    heavy = ("jax", "numpy", "grain", "transformers", "flax", "orbax", "matplotlib", "PIL")
    script = f"import sys, refalign_jax.config; print([name for name in {heavy} if name in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout == "[]\n"


def test_the_whole_recipe_is_frozen_and_takes_keywords_only():
    with pytest.raises(TypeError):
        Config(DiTConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().data = DataConfig()
