"""Verifies this implementation against values that another framework wrote.

    python tools/verify.py tests/golden/dit_a
    python tools/verify.py DIR --weights Wan2.1-T2V-1.3B/ --html page.html
    python tools/verify.py DIR --profile 16bit --out ours.npz

Every value in the folder is computed again and compared. The exit code is 0 if all agree, 1 if one falls short or has
an unknown name, 3 if those that could be compared agree.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from refalign_jax.command import OutputFile, run

Weights = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="(default: those in the folder)")]
Stream = Annotated[bool | None, arg(help_behavior_hint="(default: if it has more than 200M parameters)")]


def verify(
    folder: Positional[Path],
    /,
    *,
    weights: Weights = None,
    out: OutputFile = None,
    html: OutputFile = None,
    profile: Literal["float32", "16bit"] = "float32",
    devices: int = 1,
    stream: Stream = None,
) -> int:
    """Computes every value in a folder again and prints a table.

    Args:
      folder: values.npz, weights and config.json, in the form that docs/verify.md describes.
      weights: weights of a transformer, in any form that convert.py import reads.
      out: file (.npz) for our values under the same names.
      html: page with the table and, for each pass, the errors over the blocks.
      profile: float32, or 16bit for values made in bfloat16; ours are then computed in bfloat16 too.
      devices: number of devices over which the transformer is split.
      stream: read the transformer block by block.
    """
    from rich.console import Console

    from refalign_jax.verify.dit import Options
    from refalign_jax.verify.folder import verify

    report = verify(folder, profile, Options(weights=weights, devices=devices, stream=stream))
    report.show(Console(width=None if sys.stdout.isatty() else 160))
    if out is not None:
        report.write(out)
    return report.code


def main(arguments: list[str], prog: str) -> int:
    """Parses and verifies."""
    return tyro.cli(verify, args=arguments, prog=prog, description=__doc__)


if __name__ == "__main__":
    run(main)
