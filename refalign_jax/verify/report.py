"""Comparisons, and the table of them.

The relative error of an array is ‖ours - theirs‖ / ‖theirs‖ in float64, or ‖ours‖ where theirs is zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from refalign_jax.atomic import atomic_write

Kind = Literal["forward", "scalar", "gradient", "update", "sample", "decode"]
Profile = Literal["float32", "16bit"]

TOLERANCES: Mapping[Profile, Mapping[Kind, float]] = {
    "float32": {"forward": 1e-5, "scalar": 1e-5, "gradient": 1e-4, "update": 5e-3, "sample": 1e-4, "decode": 1e-4},
    "16bit": {"forward": 2e-2, "scalar": 2e-2, "gradient": 1e-1, "update": 5e-1, "sample": 1e-1, "decode": 5e-2},
}
"""Largest relative error by kind of value, for values computed in float32 and in bfloat16."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
      name: of the value.
      shape: of the value.
      max_abs: largest absolute error.
      relative: relative error.
      tolerance: largest relative error that passes.
    """

    name: str
    shape: tuple[int, ...]
    max_abs: float
    relative: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the relative error is a number within tolerance."""
        return bool(self.relative <= self.tolerance)


def measure(name: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> Row:
    """Compares two arrays of one shape."""
    a, b = (np.asarray(x, np.float64) for x in (ours, theirs))
    difference = a - b
    scale = np.linalg.norm(b.ravel())
    relative = np.linalg.norm(difference.ravel()) / (scale if scale > 0 else 1.0)
    return Row(name, a.shape, float(np.abs(difference).max(initial=0)), float(relative), tolerance)


class Report:
    """Collects comparisons, our own values and remarks.

    Args:
      profile: sets the tolerances.
    """

    def __init__(self, profile: Profile) -> None:
        self.tolerances = TOLERANCES[profile]
        self.rows: list[Row] = []
        self.values: dict[str, np.ndarray] = {}
        self.remarks: list[str] = []

    def compare(self, name: str, ours: object, theirs: np.ndarray, kind: Kind, key: str | None = None) -> Row:
        """Adds a comparison, and our value under `key`.

        Args:
          name: of the value, in the table.
          ours: an array.
          theirs: an array of the same shape.
          kind: sets the tolerance.
          key: name of our value in `values`; None: `name`.

        Raises:
          ValueError: the shapes differ.
        """
        mine = np.asarray(ours)
        if mine.shape != theirs.shape:
            raise ValueError(f"{name} has the shape {list(theirs.shape)}; computed here, it is {list(mine.shape)}.")
        self.values[key or name] = mine
        row = measure(name, mine, theirs, self.tolerances[kind])
        self.rows.append(row)
        return row

    def compare_each(self, name: str, ours: object, theirs: np.ndarray, labels: list[str]) -> None:
        """Adds one comparison for each scalar of a vector.

        Raises:
          ValueError: the vectors and the labels are not equally many.
        """
        mine = np.asarray(ours, np.float32)
        if mine.shape != theirs.shape or len(labels) != len(mine):
            raise ValueError(f"{name} holds {list(theirs.shape)} scalars, expected {len(labels)}: {', '.join(labels)}.")
        self.values[name] = mine
        for label, a, b in zip(labels, mine, theirs, strict=True):
            self.rows.append(measure(f"{name}[{label}]", a, b, self.tolerances["scalar"]))

    @property
    def compared(self) -> set[str]:
        """Names of the compared values; a vector of scalars counts under its own name."""
        return {row.name.split("[")[0] for row in self.rows}

    @property
    def passed(self) -> bool:
        """Whether something was compared, everything is within tolerance and nothing is remarked on."""
        return bool(self.rows) and all(row.passed for row in self.rows) and not self.remarks

    def show(self, console: Console) -> None:
        """Prints the table, the remarks and a summary."""
        table = Table("name", "shape", "max abs error", "relative error", "tolerance", "verdict", box=None)
        for row in self.rows:
            verdict = "[green]ok[/]" if row.passed else "[red]FALLS SHORT[/]"
            shape = "x".join(map(str, row.shape)) or "scalar"
            name = row.name.replace("[", r"\[")
            table.add_row(name, shape, f"{row.max_abs:.1e}", f"{row.relative:.1e}", f"{row.tolerance:.0e}", verdict)
        console.print(table)
        for remark in self.remarks:
            console.print(remark, style="red", markup=False)
        failed = sum(not row.passed for row in self.rows)
        console.print(f"{len(self.rows)} compared, {failed} fall short, {len(self.remarks)} remarks.")

    def write(self, path: Path) -> None:
        """Writes our values to an `.npz` file.

        Raises:
          ValueError: `path` does not end in .npz.
          OSError: the file can't be written; what was there before stays.
        """
        if path.suffix != ".npz":
            raise ValueError(f"{path}: our values are written as .npz; give a name that ends in it.")
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **self.values)  # type: ignore[arg-type]
