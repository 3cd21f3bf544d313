"""What is measured, and how often."""

from __future__ import annotations

import dataclasses
from typing import Literal

from refalign_jax.config.checks import check_range, check_values

Mode = Literal["train", "sample"]
"""A training step, or drawing a batch of videos."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The repetitions of a benchmark.

    Attributes:
      warmup: Steps before each timing.
      steps: Steps that are timed together.
      repeats: Timings of each setting, in turns.
      profile: Steps in the profile that time by operation is read from; 0 for none.
    """

    warmup: int = 1
    steps: int = 3
    repeats: int = 3
    profile: int = 1

    def __post_init__(self) -> None:
        """Refuses to measure nothing."""
        check_values(self)
        check_range(self, "steps", "repeats", least=1)
        check_range(self, "warmup", "profile", least=0)
