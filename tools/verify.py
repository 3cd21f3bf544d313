"""Verifies this implementation against values that another framework wrote.

    python tools/verify.py tests/golden/dit_a
    python tools/verify.py DIR --weights Wan2.1-T2V-1.3B/ --html page.html
    python tools/verify.py DIR --profile 16bit --out ours.npz
    python tools/verify.py --runs RUN RUN --spread RUN

Every value in the folder is computed again and compared. The exit code is 0 if all agree, 1 if one falls short or has
an unknown name, 3 if those that could be compared agree. With --runs, metrics and weights of two training runs are
compared step by step, and the exit code is 1 if they are farther apart than rounding explains.
"""

from refalign_jax.command import OutputFile, run

# isort: split
import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

Weights = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="(default: those in the folder)")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line."""

    folder: Annotated[Positional[Path | None], arg(metavar="[DIR]", help_behavior_hint="")] = None
    """values.npz, weights and config.json, in the form that docs/verify.md describes."""
    weights: Weights = None
    """Weights of a transformer, in any form that convert.py import reads."""
    out: OutputFile = None
    """File (.npz) for our values under the same names."""
    html: OutputFile = None
    """Page with the table and, for each pass, the errors over the blocks or steps."""
    profile: Literal["float32", "16bit"] = "float32"
    """float32, or 16bit for values made in bfloat16; ours are then computed in bfloat16 too. With --runs: one
    of them computed in 16 bits."""
    devices: int = 1
    """Number of devices over which the transformer is split."""
    stream: Literal["auto", "yes", "no"] = "auto"
    """Whether the transformer is read block by block; auto: if it has more than 200M parameters."""
    runs: Annotated[tuple[Path, Path] | None, arg(metavar="RUN RUN", help_behavior_hint="(default: none)")] = None
    """Two runs to compare: folders of runs, JSONL or CSV files with steps, weights."""
    spread: Annotated[Path | None, arg(metavar="RUN", help_behavior_hint="(default: an error model)")] = None
    """A third run that differs from the first in the order of its sums alone."""


def main(arguments: list[str], prog: str) -> int:
    """Parses and verifies."""
    given = tyro.cli(Arguments, args=arguments, prog=prog, description=__doc__)
    if (given.folder is None) == (given.runs is None):
        raise ValueError("Name a folder of values to verify, or two runs to compare after --runs.")
    from rich.console import Console

    from refalign_jax.report.verification import check_page, write_comparison, write_verification

    if given.html is not None:
        check_page(given.html)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if given.runs is not None:
        from refalign_jax.verify.runs import compare_runs

        comparison = compare_runs(*given.runs, given.spread, given.profile)
        comparison.show(console)
        if given.html is not None:
            write_comparison(comparison, given.html)
        return comparison.code
    assert given.folder is not None
    from refalign_jax.verify.dit import Options
    from refalign_jax.verify.folder import verify

    stream = {"auto": None, "yes": True, "no": False}[given.stream]
    options = Options(weights=given.weights, devices=given.devices, stream=stream)
    report = verify(given.folder, given.profile, options)
    report.show(console)
    if given.out is not None:
        report.write(given.out)
    if given.html is not None:
        write_verification(report, given.html, f"Verification of {given.folder.resolve().name}")
    return report.code


if __name__ == "__main__":
    run(main)
