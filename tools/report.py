"""Writes a run's report: losses, samples, evaluation and what its reference tokens show, as one HTML file.

    python tools/report.py RUN --out report.html
    python tools/report.py RUN --compare ALIGNED BASELINE ALIGNED BASELINE

With --compare the page also shows, pair by pair, what alignment changed.
"""

from refalign_jax.command import run

# isort: split
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg


def report(
    folder: Annotated[Positional[Path], arg(metavar="RUN")],
    /,
    *,
    out: Annotated[str, arg(metavar="FILE", help_behavior_hint="(default: report.html in RUN)")] = "",
    compare: tuple[tuple[Path, Path], ...] = (),
) -> None:
    """Writes an HTML page about a run: its losses, its samples and what its reference tokens show.

    Args:
      folder: the run's folder, the train.folder of tools/train.py.
      out: the HTML file.
      compare: pairs of runs with the same seed, each with alignment, then without (model.alignment.weight 0).
    """
    for run_ in (folder, *(one for pair in compare for one in pair)):
        if not run_.is_dir():
            raise ValueError(f"The run {run_} does not exist; name the train.folder of a run.")
    from refalign_jax.report.page import write_report

    path = Path(out) if out else folder / "report.html"
    write_report(folder, path, {"With and without alignment": compare} if compare else None)
    print(f"The report is {path}.")


def main(arguments: list[str], prog: str) -> None:
    """Parses and writes the report."""
    tyro.cli(report, args=arguments, prog=prog, description=__doc__)


if __name__ == "__main__":
    run(main)
