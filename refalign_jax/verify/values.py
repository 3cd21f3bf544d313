"""A folder of another framework's values, opened. Its arrays are in PyTorch layout, channels second."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refalign_jax.atomic import first_line
from refalign_jax.data.json_lines import read_json


class MissingError(ValueError):
    """A value can't be computed here, because the folder lacks something that it depends on."""


class Entries(dict[str, Any]):
    """A JSON object that reports a missing entry in one sentence.

    Args:
      entries: the object.
      place: its file and, within it, the object's name.
    """

    def __init__(self, entries: Mapping[str, Any], place: str) -> None:
        super().__init__(entries)
        self.place = place

    def __missing__(self, name: str) -> Any:
        """Raises ValueError, naming the entry."""
        raise ValueError(f"{self.place} lacks {name!r}; docs/verify.md lists its entries.")

    def optional(self, name: str, default: Any) -> Any:
        """Returns an entry of the type of `default`, or `default` where there is none; whole numbers pass for floats.

        Raises:
          ValueError: the entry is of another type.
        """
        value = self.get(name, default)
        kinds = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"{self.place}: {name} is {value!r:.60}; it must be a {type(default).__name__}.")
        return value


@dataclasses.dataclass(frozen=True)
class Values:
    """What a folder holds beside its weights.

    Attributes:
      folder: its path.
      config: config.json; empty where there is none.
      arrays: values.npz.
    """

    folder: Path
    config: Entries
    arrays: Mapping[str, np.ndarray]

    def need(self, name: str) -> np.ndarray:
        """Returns an array that others depend on.

        Raises:
          MissingError: it is missing.
        """
        if name not in self.arrays:
            raise MissingError(f"values.npz lacks {name}")
        return self.arrays[name]

    def channels_last(self, name: str) -> jax.Array:
        """Returns an array such as a video, [B, C, F, H, W] in the file, as [B, F, H, W, C]; errors as in `need`."""
        return jnp.moveaxis(jnp.asarray(self.need(name)), 1, -1)

    def sizes(self, name: str) -> Entries:
        """Returns the sizes of an encoder, an object in config.json.

        Raises:
          ValueError: it is missing; later, when a size is looked up that it lacks.
        """
        sizes = self.config[name]
        if not isinstance(sizes, dict):
            raise ValueError(f"{self.config.place}: {name!r} is {sizes!r:.60}; it must be an object.")
        return Entries(sizes, f"{self.config.place}: {name!r}")


def open_values(folder: Path) -> Values:
    """Reads values.npz and, where there is one, config.json.

    Raises:
      ValueError: there is no such folder, values.npz is missing, or one of the files is damaged.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name the folder that holds it, with values.npz and weights.")
    if not folder.is_dir():
        raise ValueError(f"The folder {folder} does not exist.")
    if not (folder / "values.npz").is_file():
        raise ValueError(f"{folder} is not a folder of values: it lacks values.npz.")
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; it must be an object.")
    arrays = _read_arrays(folder / "values.npz")
    return Values(folder, Entries(config, str(path)), arrays)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of an .npz file."""
    try:
        with np.load(path) as file:
            return {name: np.asarray(file[name]) for name in file.files}
    except Exception as error:  # zipfile, zlib and numpy have a dozen
        raise ValueError(f"{path} can't be read as an .npz file: {first_line(error)}.") from error


def channels_second(x: jax.Array) -> np.ndarray:
    """Returns an array in PyTorch layout: the inverse of `Values.channels_last`."""
    return np.moveaxis(np.asarray(x), -1, 1)
