"""Checkpoints through Orbax.

A checkpoint of parameters alone is a folder with two items, `params` (arrays, as stored) and `config` (the
`ModelConfig` as JSON). Orbax writes it whole or not at all.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from refalign_jax.config import ModelConfig
from refalign_jax.types import Params

Config = TypeVar("Config")


def save_params(path: str | Path, params: Params, config: ModelConfig) -> None:
    """Writes parameters and their configuration.

    Args:
      path: a folder that does not exist yet.
      params: {"dit": …} with or without {"projectors": …}; jax arrays of any sharding (numpy arrays work too, but Orbax
        copies those whole).
      config: the model they belong to.

    Raises:
      ValueError: the folder exists.
    """
    path = Path(path).absolute()
    if path.exists():
        raise ValueError(f"{path} exists; it is not overwritten. Name another folder or remove it.")
    with ocp.Checkpointer(_handlers()) as checkpointer:
        checkpointer.save(
            path,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(params),
                config=ocp.args.JsonSave(dataclasses.asdict(config)),
            ),
        )


def load_params(path: str | Path) -> tuple[dict[str, Any], ModelConfig]:
    """Reads what `save_params` wrote, as numpy arrays of the dtype stored.

    Raises:
      ValueError: no such folder, or no checkpoint of parameters.
    """
    path = Path(path).absolute()
    if not (path / "params").is_dir() or not (path / "config").is_dir():
        raise ValueError(f"{path} is no checkpoint of parameters: it needs the folders 'params' and 'config'.")
    with ocp.Checkpointer(_handlers()) as checkpointer:
        tree = ocp.PyTreeCheckpointHandler().metadata(path / "params").tree
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = checkpointer.restore(
            path,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeRestore(restore_args=restore_args), config=ocp.args.JsonRestore()
            ),
        )
    return restored["params"], from_dict(ModelConfig, restored["config"], str(path))


def _handlers() -> ocp.CompositeCheckpointHandler:
    """The two items; of large parameters no more than 1 GB is on its way to disk at a time.

    Weights hardly compress, and compressing them costs four times the time and 1 GB more.
    """
    params = ocp.PyTreeCheckpointHandler(save_concurrent_gb=1, use_compression=False)
    return ocp.CompositeCheckpointHandler(params=params, config=ocp.JsonCheckpointHandler())


def from_dict(kind: type[Config], values: Mapping[str, Any], source: str) -> Config:
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
