"""Sources of examples that fail, poison or delay a run: how tests reach into one from outside."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from refalign_jax.config import Config
from refalign_jax.data.synthetic import SyntheticSource
from refalign_jax.trainer.preflight import synthetic_spec

Arrays = dict[str, np.ndarray]


class Disturbed(SyntheticSource):
    """A recipe's synthetic examples, disturbed from the n-th one on that training reads.

    With `data.num_threads=1` batches are read one after the other; otherwise two may be read at a time.

    Args:
      config: of the run.
      first: which reading is the first that is disturbed, from 1.
      disturb: is called with the example's arrays and returns those to use.
    """

    def __init__(self, config: Config, first: int, disturb: Callable[[Arrays], Arrays]) -> None:
        super().__init__(synthetic_spec(config))
        self._training = len(self) - config.data.held_out
        self._first, self._disturb, self._count = first, disturb, itertools.count(1)

    def __getitem__(self, index: int) -> tuple[Arrays, dict[str, Any]]:
        arrays, about = super().__getitem__(index)
        if index < self._training and next(self._count) >= self._first:
            arrays = self._disturb(arrays)
        return arrays, about


class Slow(SyntheticSource):
    """A recipe's synthetic examples, each read in so many seconds."""

    def __init__(self, config: Config, seconds: float) -> None:
        super().__init__(synthetic_spec(config))
        self._seconds = seconds

    def __getitem__(self, index: int) -> tuple[Arrays, dict[str, Any]]:
        time.sleep(self._seconds)
        return super().__getitem__(index)
