"""Recipes: files under configs/ whose get_config() returns a run's configuration."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from refalign_jax.train_config import Config


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
