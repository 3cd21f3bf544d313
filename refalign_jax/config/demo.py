"""The size of the demo."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from refalign_jax.config.checks import check_range, check_values


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The size of the demo."""

    folder: Path = Path("runs/demo")
    """Folder of everything that the demo writes."""
    clips: int = 1088
    """Number of clips; the last `data.held_out` of them are held out from training."""
    samples: int = 64
    """Held-out captions that are sampled, at most `data.held_out`."""
    seeds: int = 5
    """Seeds of the comparison; each trains a run with the published loss, one without alignment and one with targets
    that do not contradict themselves."""
    steps: int = 0
    """Steps of training; 0, as many as the recipe has."""
    unseen: Literal[0, 2, 3] = 0
    """Subjects that no clip of training shows; held-out clips show these alone. Such a demo is in a folder of its own
    within `folder`."""

    def __post_init__(self) -> None:
        """Refuses a demo of nothing."""
        check_values(self)
        check_range(self, "clips", "samples", "seeds", least=1)
        check_range(self, "steps", least=0)

    @property
    def place(self) -> Path:
        """Folder of this demo: `folder`, or the one in it for so many unseen subjects."""
        return self.folder / f"unseen-{self.unseen}" if self.unseen else self.folder
