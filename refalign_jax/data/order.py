"""The endless order of examples: of one dataset, and of several, interleaved by weights.

Both are functions of the position alone, given seed, weights and sizes, and cost O(1). Grain's own mixing is not used:
it rounds weights, such as 7:3 to 233:100, and its order is free to change between versions, which a resumed run cannot
bear.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import grain
import numpy as np

ENDLESS = 2**52
"""Number of positions; not `sys.maxsize`, because Grain computes with lengths as floats."""

_APART = 0x9E3779B1
"""Added to the seed from one dataset to the next, so that datasets of one size are not shuffled alike."""


class Order:
    """The endless order of one dataset: random access from a position to the place of an example in the split.

    Args:
      seed: of the shuffling; None for the written order.
      segments: (first position, number of examples) of each part of the order, the first at position 0. A segment ends
        with an epoch.
    """

    def __init__(self, seed: int | None, segments: Sequence[tuple[int, int]]) -> None:
        self.seed, self.segments = seed, list(segments)
        self._starts = [first for first, _ in segments]
        self._datasets: list[grain.MapDataset] = []
        epochs = 0
        for number, (first, size) in enumerate(segments):
            places = grain.MapDataset.range(size)
            if seed is not None:
                places = places.shuffle(seed=(seed + epochs) % 2**32)
            self._datasets.append(places.repeat())
            if number + 1 < len(segments):
                epochs += (segments[number + 1][0] - first) // size

    def __getitem__(self, position: int) -> int:
        number = bisect.bisect_right(self._starts, position) - 1
        return self._datasets[number][position - self._starts[number]]


class Interleaved:
    """The endless order of several datasets; an element is (number of the dataset, place of the example in its split).

    The datasets take turns in a pattern that repeats. After any number of positions, each has had its share of them,
    rounded; so each batch has about the shares of the weights.

    Args:
      orders: of each dataset.
      pattern: the datasets' numbers over one period, as `spread` or `one_after_another` returns it.
    """

    def __init__(self, orders: Sequence[Order], pattern: np.ndarray) -> None:
        self.orders, self._pattern = list(orders), pattern
        took = pattern[:, None] == np.arange(len(orders))
        self._before = np.concatenate([np.zeros((1, len(orders)), np.int64), np.cumsum(took, axis=0)])

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, position: int) -> np.ndarray:
        number = int(self._pattern[position % len(self._pattern)])
        return np.array([number, self.orders[number][self.count(number, position)]])

    def count(self, number: int, position: int) -> int:
        """Number of examples of one dataset before a position."""
        periods, rest = divmod(position, len(self._pattern))
        return periods * int(self._before[-1, number]) + int(self._before[rest, number])

    def change(self, orders: Sequence[Order]) -> Interleaved:
        """Returns the same turns over other orders."""
        return Interleaved(orders, self._pattern)


def spread(proportions: Sequence[int]) -> np.ndarray:
    """Returns a period in which each dataset has as many turns as its proportion, evenly spread: 3:2 is 0 1 0 1 0."""
    turns = [((turn + 0.5) / count, number) for number, count in enumerate(proportions) for turn in range(count)]
    return np.array([number for _, number in sorted(turns)])


def one_after_another(sizes: Sequence[int]) -> np.ndarray:
    """Returns a period that passes once through all examples of each dataset."""
    return np.repeat(np.arange(len(sizes)), sizes)


def seed_of(number: int, seed: int) -> int:
    """Returns the seed of a dataset's shuffling."""
    return (seed + number * _APART) % 2**32


def grow(segments: Sequence[tuple[int, int]], size: int, consumed: int) -> list[tuple[int, int]]:
    """Returns the segments of an order that goes on with `size` examples after the epoch that has begun."""
    segments = list(segments)
    while len(segments) > 1 and segments[-1][0] >= consumed:  # a growth before that has not come into use yet
        segments = segments[:-1]
    first, last = segments[-1]
    if last == size:
        return segments
    end = first + -(-(consumed - first) // last) * last
    return [*segments, (end, size)] if end > first else [*segments[:-1], (end, size)]
