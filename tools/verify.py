"""Verifies this implementation against values another framework wrote: `python tools/verify.py DIR [--out FILE]`."""

import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from refalign_jax.command import run
from refalign_jax.verify.folder import verify
from refalign_jax.verify.report import Profile


def main(
    folder: Annotated[Path, tyro.conf.Positional], /, *, out: Path | None = None, profile: Profile = "float32"
) -> int:
    """Computes every value in a folder again, prints a table, exits 1 if one falls short.

    Args:
      folder: config.json, values.npz and weights in the form that docs/verify.md describes.
      out: file (.npz) that receives our values under the same names.
      profile: float32, or 16bit for values made in bfloat16 (ours are then computed in it too).
    """
    report = verify(folder, profile)
    report.show(Console(width=None if sys.stdout.isatty() else 160))
    if out is not None:
        report.write(out)
    return 0 if report.passed else 1


if __name__ == "__main__":
    run(main)
