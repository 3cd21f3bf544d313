"""Verifies this implementation against values that another framework wrote.

    python tools/verify.py tests/golden/dit_a
    python tools/verify.py DIR --profile 16bit --out ours.npz

Every value in the folder is computed again and compared; the exit code is 1 if one falls short.
"""

import sys
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import Positional

from refalign_jax.command import OutputFile, run


def verify(
    folder: Positional[Path], /, *, out: OutputFile = None, profile: Literal["float32", "16bit"] = "float32"
) -> int:
    """Computes every value in a folder again and prints a table.

    Args:
      folder: config.json, values.npz and weights, in the form that docs/verify.md describes.
      out: file (.npz) for our values under the same names.
      profile: float32, or 16bit for values made in bfloat16; ours are then computed in bfloat16 too.
    """
    from rich.console import Console

    from refalign_jax.verify.folder import verify

    report = verify(folder, profile)
    report.show(Console(width=None if sys.stdout.isatty() else 160))
    if out is not None:
        report.write(out)
    return 0 if report.passed else 1


def main(arguments: list[str], prog: str) -> int:
    """Parses and verifies."""
    return tyro.cli(verify, args=arguments, prog=prog, description=__doc__)


if __name__ == "__main__":
    run(main)
