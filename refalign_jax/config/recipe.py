"""Recipes: Python files whose get_config() returns a run's configuration, such as those under configs/.

A recipe is executed to be read: treat one from someone else as you treat any of their programs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from refalign_jax.config.data import SyntheticConfig
from refalign_jax.config.train import Config

_PACKAGE = Path(__file__).parents[1]
RECIPES = next(filter(Path.is_dir, (_PACKAGE / "configs", _PACKAGE.parent / "configs")), _PACKAGE / "configs")
"""The recipes that come with the package: inside of it when it is installed, beside it in a clone."""


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe, given by its path or, if it is one of `RECIPES`, by its bare name, such as tiny.

    Raises:
      ValueError: no such file, or not a Python file.
    """
    if "://" in str(name):
        raise ValueError(f"{name} is not on this machine; a recipe is a local Python file, or one of those shipped.")
    path = Path(name)
    if path.suffix != ".py" and (shipped := RECIPES / f"{name}.py").is_file():
        return shipped
    if not path.exists():
        known = ", ".join(sorted(path.stem for path in RECIPES.glob("[!_]*.py")))
        raise ValueError(f"The recipe {path} does not exist; name a Python file with get_config(), or one of {known}.")
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"{path} is not a recipe; name a Python file with get_config(), such as those under configs/.")
    return path


def read_recipe(name: str | Path) -> Config:
    """Executes a recipe and returns what its get_config() returns.

    Args:
      name: as in `find_recipe`.

    Raises:
      ValueError: no such recipe, an error in it, or one that returns something else.
    """
    path = find_recipe(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a recipe: {str(error).rstrip('.')}.") from error
    if not isinstance(config, Config):
        raise ValueError(f"{path}: get_config() returns {type(config).__name__}; it must return a Config.")
    return config


def without_data(config: Config) -> Config:
    """A recipe on synthetic examples, in the training shape unless it has its own, with nothing held out."""
    synthetic = config.synthetic if config.synthetic.num_examples else SyntheticConfig(num_examples=64)
    return dataclasses.replace(
        config,
        synthetic=synthetic,
        data=dataclasses.replace(config.data, path="", mix=(), held_out=0, grown_from=0, num_workers=0),
        train=dataclasses.replace(config.train, held_out_every=0, preview_every=0),
    )


Kind = TypeVar("Kind")


def from_dict(kind: type[Kind], values: Mapping[str, Any], source: str) -> Kind:
    """Builds a configuration from the nested dict that `dataclasses.asdict` made of it.

    Raises:
      ValueError: a field that `kind` does not have, lacks, or cannot have this value.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{source}: {kind.__name__} is {values!r:.60}; it must be an object.")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{source}: {kind.__name__} has no field {unknown[0]!r}; it has {', '.join(hints)}.")
    converted = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = from_dict(typing.cast(type, hint), value, source)
        elif isinstance(value, list) and _is_tuple(hint):
            value = tuple(tuple(item) if isinstance(item, list) else item for item in value)
        converted[name] = value
    try:
        return kind(**converted)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def _is_tuple(hint: Any) -> bool:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return any(typing.get_origin(option) is tuple for option in options)


def flat_fields(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields as {"model.dit.width": 1536}; tuples, and tuples in them, as lists, as JSON has them."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flat_fields(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = _as_json(value)
    return flat


def _as_json(value: Any) -> Any:
    return [_as_json(item) for item in value] if isinstance(value, tuple | list) else value
