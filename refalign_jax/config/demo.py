"""The size of the demo."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Of what size the demo is."""

    folder: Path = Path("runs/demo")
    """Everything that it writes."""
    clips: int = 2048
    """Clips, the last `data.held_out` of them held out from training."""
    samples: int = 64
    """Held-out captions that are sampled, at most `data.held_out`."""
    seeds: int = 3
    """Pairs of runs in the comparison."""
    steps: int | None = None
    """Of training; None, as many as the recipe says."""

    def __post_init__(self) -> None:
        """Refuses a demo of nothing."""
        for name in ("clips", "samples", "seeds", "steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
