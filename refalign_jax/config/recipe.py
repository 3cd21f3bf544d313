"""Recipes: files under configs/ whose get_config() returns a run's configuration."""

from __future__ import annotations

import dataclasses
import importlib.util
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from refalign_jax.config.train import Config


def read_recipe(path: Path) -> Config:
    """What a recipe's get_config() returns.

    Raises:
      ValueError: no Python file with such a function.
    """
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"{path} is no recipe; name a Python file with get_config(), as under configs/.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (AttributeError, ImportError, SyntaxError, NameError, TypeError) as error:
        raise ValueError(f"{path} is no recipe that can be read: {error}.") from error
    if not isinstance(config, Config):
        raise ValueError(f"{path}: get_config() returns {type(config).__name__}; it must return a Config.")
    return config


Kind = TypeVar("Kind")


def from_dict(kind: type[Kind], values: Mapping[str, Any], source: str) -> Kind:
    """Builds a configuration from the nested dict that `dataclasses.asdict` made of it.

    Raises:
      ValueError: a field that `kind` does not have.
    """
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
            value = tuple(value)
        converted[name] = value
    return kind(**converted)


def _is_tuple(hint: Any) -> bool:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return any(typing.get_origin(option) is tuple for option in options)


def flat_fields(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields as {"model.dit.width": 1536}; tuples as lists, as JSON has them."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flat_fields(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat
