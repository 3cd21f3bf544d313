"""The examples of a dataset that are trained on, and those that are held out, and how a resume recognises them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from refalign_jax.config import DataConfig
from refalign_jax.data.mixture import Source
from refalign_jax.data.order import Order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """The part of one dataset that is trained on, or that is held out."""

    source: Source
    data: DataConfig
    """Configuration of this dataset alone."""
    first: int
    """Index of the split's first example; the training split begins at 0 and passes over what is held out."""
    size: int
    """Number of examples in the split."""
    start: int
    """Number of the dataset's first example in the mixture."""
    train: bool
    """Whether it is trained on."""

    def index(self, place: int) -> int:
        """Returns the index in the dataset of the example at a place in the split."""
        index = self.first + place % self.size
        gap = self.data.first_held_out(len(self.source))
        return index + self.data.held_out if self.train and index >= gap else index

    def state(self, order: Order) -> dict[str, Any]:
        """Returns what a resume compares: the dataset and the split of it, and the segments of its order."""
        return {
            "first_example": self.first,
            "num_examples": self.size,
            "dataset_examples": len(self.source),
            "began_with": self.data.began_with(len(self.source)),
            "dataset": self.source.identity(len(self.source)),
            "segments": [list(segment) for segment in order.segments],
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Compares a dataset with that of a state.

        Raises:
          ValueError: it is another dataset or split, or has grown without `data.grown_from`.
        """
        # States of older versions have neither the dataset's size nor its digest.
        before = state.get("dataset_examples", self.data.began_with(len(self.source)))
        now = {"first_example": self.first, "num_examples": self.size - (len(self.source) - before)}
        check_same(state, now)
        _check_same_data(state, before, self.source, self.data)


def open_split(source: Source, data: DataConfig, train: bool, start: int) -> Split:
    """The examples of one dataset that are trained on, or those that are held out.

    Args:
      source: the dataset.
      data: of this dataset alone, as in `DataConfig.parts`.
      train: which of the two.
      start: number of the dataset's first example in the mixture.

    Raises:
      ValueError: fewer examples than `grown_from`, or none to train on.
    """
    of_path = f" of {data.path}" if data.path else ""
    if data.began_with(len(source)) > len(source):
        raise ValueError(f"data.grown_from{of_path} is {data.grown_from}, but there are {len(source)} examples.")
    first = data.first_held_out(len(source))
    if first < 0 or (train and data.held_out >= len(source)):
        raise ValueError(
            f"data.held_out{of_path} is {data.held_out} of {len(source)} examples, which leaves none for the split "
            f"{'train' if train else 'held_out'}."
        )
    size = len(source) - data.held_out if train else data.held_out
    return Split(source=source, data=data, first=0 if train else first, size=size, start=start, train=train)


def check_same(state: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ValueError where a value that decides the order is another than in a state."""
    for name, value in now.items():
        if state.get(name) != value:
            raise ValueError(
                f"The data iterator was saved with {name} {state.get(name)}, now it is {value}; "
                "the order of examples would change, so restore the old setting or start a new run."
            )


def _check_same_data(state: Mapping[str, Any], before: int, source: Source, config: DataConfig) -> None:
    """Checks that the examples are those of a state, or that the option says that they have grown.

    Raises:
      ValueError: they are others, fewer, or more without the option.
    """
    if len(source) < before:
        raise ValueError(
            f"The dataset had {before} examples when the run was saved, now it has {len(source)}; restore it, or start "
            "a new run."
        )
    if "dataset" in state and source.identity(before) != state["dataset"]:
        raise ValueError(
            f"The dataset's first {before} examples are not those that the run was saved with; restore them, or start "
            "a new run."
        )
    began = state.get("began_with", before)
    if config.began_with(len(source)) != began:
        raise ValueError(
            f"The dataset had {began} examples when the run began, now it has {len(source)}, and data.grown_from is "
            f"{config.grown_from}; set data.grown_from={began} to go on with all of them."
        )
