"""Comparisons, and the table of them.

The relative error of an array is ‖ours - theirs‖ / ‖theirs‖ in float64, or ‖ours‖ where theirs is zero. It passes
within the tolerance of its kind. Beyond that, it passes within tolerance and noise floor (floors.py) together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from refalign_jax.atomic import atomic_write

Kind = Literal["forward", "scalar", "gradient", "update", "sample", "encode", "decode"]
Profile = Literal["float32", "16bit"]

TOLERANCES: Mapping[Profile, Mapping[Kind, float]] = {
    "float32": {
        "forward": 2e-6,
        "scalar": 1e-5,
        "gradient": 2e-5,
        "update": 2e-3,
        "sample": 1e-4,
        "encode": 1e-5,
        "decode": 1e-4,
    },
    "16bit": {
        "forward": 2e-2,
        "scalar": 2e-2,
        "gradient": 1e-1,
        "update": 5e-1,
        "sample": 1e-1,
        "encode": 2e-2,
        "decode": 5e-2,
    },
}
"""Largest relative error by kind of value, for values computed in float32 and in bfloat16."""

SPACING: Mapping[Profile, float] = {"float32": 2.0**-23, "16bit": 2.0**-8}
"""Relative distance of neighbouring numbers."""

Floor = Callable[[], float]
"""Computes a noise floor: an absolute error of the norm."""

AGREE, FALL_SHORT, NOT_ALL_COMPARED = 0, 1, 3
"""Exit codes: all agrees; a value falls short or is not understood; what was compared agrees, but not all was."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
      name: of the value.
      shape: of the value.
      max_abs: largest absolute error.
      relative: relative error.
      tolerance: largest relative error that passes without a look at the noise floor.
      floor: noise floor, relative; 0 where it was not needed.
      entries: whether every single entry is within its own bound, where a value has one.
    """

    name: str
    shape: tuple[int, ...]
    max_abs: float
    relative: float
    tolerance: float
    floor: float = 0.0
    entries: bool = True

    @property
    def passed(self) -> bool:
        """Whether the relative error is a number within tolerance and noise floor, and each entry within its bound."""
        return self.entries and bool(self.relative <= self.tolerance + self.floor)

    @property
    def verdict(self) -> str:
        """The outcome in a word or two."""
        if not self.passed:
            return "FALLS SHORT" if self.entries else "FALLS SHORT: an entry is beyond its bound"
        return "ok" if self.relative <= self.tolerance else "ok, rounding"


@dataclasses.dataclass(frozen=True)
class Curves:
    """Errors over the blocks of one pass.

    Attributes:
      name: of the pass: `velocity_t437.5_refs1`, `grads_step600`.
      errors: relative error of each block, by operation.
      tolerance: what a block's error must not exceed.
      first: where it diverges, such as `block 1: ffn`; empty where it does not.
    """

    name: str
    errors: Mapping[str, Sequence[float]]
    tolerance: float
    first: str = ""


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
        self.tolerances, self.spacing = TOLERANCES[profile], SPACING[profile]
        self.rows: list[Row] = []
        self.values: dict[str, np.ndarray] = {}
        self.remarks: list[str] = []
        self.skipped: dict[str, str] = {}
        self.curves: list[Curves] = []

    def compare(
        self,
        name: str,
        ours: object,
        theirs: np.ndarray,
        kind: Kind,
        floor: Floor | None = None,
        key: str | None = None,
    ) -> Row:
        """Adds a comparison, and our value under `key`.

        Args:
          name: of the value, in the table.
          ours: an array.
          theirs: an array of the same shape.
          kind: sets the tolerance.
          floor: computes the noise floor, if the error is beyond the tolerance.
          key: name of our value in `values`; None: `name`.

        Raises:
          ValueError: the shapes differ.
        """
        mine = np.asarray(ours)
        if mine.shape != theirs.shape:
            raise ValueError(f"{name} has the shape {list(theirs.shape)}; computed here, it is {list(mine.shape)}.")
        self.values[key or name] = mine
        return self._add(measure(name, mine, theirs, self.tolerances[kind]), theirs, floor)

    def compare_table(self, name: str, ours: np.ndarray, theirs: np.ndarray, bounds: np.ndarray) -> Row:
        """Adds a comparison in which, beside the norm, every entry has a bound of its own.

        Raises:
          ValueError: the shapes differ.
        """
        row = self.compare(name, ours, theirs, "forward", floor=lambda: float(np.linalg.norm(bounds)))
        far = np.abs(np.asarray(ours, np.float64) - theirs) > bounds + 2 * self.spacing * np.abs(ours)
        if (far.any() and self.spacing < 1e-6) or not np.isfinite(theirs).all():
            self.rows[-1] = row = dataclasses.replace(row, entries=False)
            worst = int(np.argmax(np.abs(np.asarray(ours, np.float64) - theirs) / (bounds + 1e-30)))
            self.remarks.append(
                f"{name}: entry {worst} is {theirs.ravel()[worst]:.9g}, computed here {np.ravel(ours)[worst]:.9g}, and "
                f"float32 explains a difference of {bounds.ravel()[worst]:.1e}."
            )
        return row

    def compare_each(
        self, name: str, ours: object, theirs: np.ndarray, labels: Sequence[str], floors: Mapping[str, Floor]
    ) -> None:
        """Adds one comparison for each scalar of a vector.

        Args:
          name: of the vector.
          ours: the scalars.
          theirs: as many.
          labels: the scalars' names.
          floors: computes noise floors of those that have one, by label.

        Raises:
          ValueError: the vectors and the labels are not equally many.
        """
        mine = np.asarray(ours, np.float32)
        if mine.shape != theirs.shape or len(labels) != len(mine):
            raise ValueError(f"{name} holds {list(theirs.shape)} scalars, expected {len(labels)}: {', '.join(labels)}.")
        self.values[name] = mine
        for label, a, b in zip(labels, mine, theirs, strict=True):
            row = measure(f"{name}[{label}]", a, b, self.tolerances["scalar"])
            self._add(row, b, floors.get(label))

    def skip(self, names: Sequence[str], reason: str) -> None:
        """Records values that can't be compared, and why."""
        self.skipped |= {name: reason for name in names if name not in self.compared}

    @property
    def compared(self) -> set[str]:
        """Names of the compared values; a vector of scalars counts under its own name."""
        return {row.name.split("[")[0] for row in self.rows}

    @property
    def failed(self) -> list[Row]:
        """The comparisons that fall short."""
        return [row for row in self.rows if not row.passed]

    @property
    def passed(self) -> bool:
        """Whether something was compared, everything is within tolerance, and nothing was left out or remarked on."""
        return self.code == AGREE

    @property
    def code(self) -> int:
        """The command's exit code: `AGREE`, `FALL_SHORT` or `NOT_ALL_COMPARED`."""
        if self.failed or self.remarks:
            return FALL_SHORT
        return AGREE if self.rows and not self.skipped else NOT_ALL_COMPARED

    @property
    def summary(self) -> str:
        """The outcome in a sentence."""
        counts = f"{len(self.rows)} compared, {len(self.failed)} fall short, {len(self.remarks)} remarks"
        return f"{counts}, {len(self.skipped)} not compared." if self.skipped else f"{counts}."

    def show(self, console: Console) -> None:
        """Prints the table, the remarks and a summary."""
        table = Table("name", "shape", "max abs error", "relative error", "tolerance", "verdict", box=None)
        for row in self.rows:
            colour = "green" if row.passed else "red"
            shape = "x".join(map(str, row.shape)) or "scalar"
            errors = (f"{row.max_abs:.1e}", f"{row.relative:.1e}", f"{row.tolerance + row.floor:.0e}")
            table.add_row(row.name.replace("[", r"\["), shape, *errors, f"[{colour}]{row.verdict}[/]")
        for name, reason in self.skipped.items():
            table.add_row(name.replace("[", r"\["), "", "", "", "", f"[yellow]not compared: {reason}[/]")
        console.print(table)
        for curves in self.curves:
            if curves.first:
                console.print(f"{curves.name} diverges first at {curves.first}.", style="red", markup=False)
        for remark in self.remarks:
            console.print(remark, style="red", markup=False)
        console.print(self.summary)

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

    def _add(self, row: Row, theirs: np.ndarray, floor: Floor | None) -> Row:
        """Adds a comparison, with its noise floor where it is needed."""
        if floor is not None and row.relative > row.tolerance:
            scale = float(np.linalg.norm(np.asarray(theirs, np.float64).ravel()))
            row = dataclasses.replace(row, floor=floor() / (scale if scale > 0 else 1.0))
        self.rows.append(row)
        return row
