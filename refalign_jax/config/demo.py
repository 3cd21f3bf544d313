"""The size of the demo."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from refalign_jax.config.checks import check_range, check_values


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The size of the demo."""

    folder: Path = Path("runs/demo")
    """Folder of everything that the demo writes."""
    clips: int = 2048
    """Number of clips; the last `data.held_out` of them are held out from training."""
    samples: int = 64
    """Held-out captions that are sampled, at most `data.held_out`."""
    seeds: int = 3
    """Pairs of runs in the comparison."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the recipe's)")] = None
    """Steps of training."""

    def __post_init__(self) -> None:
        """Refuses a demo of nothing."""
        check_values(self)
        check_range(self, "clips", "samples", "seeds", "steps", least=1)
