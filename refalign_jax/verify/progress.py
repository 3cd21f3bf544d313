"""A progress line on stderr while values are computed, and what becomes of a check that can't be made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tqdm import tqdm

from refalign_jax.verify.report import Report
from refalign_jax.verify.values import MissingError

Task = tuple[str, Callable[[], None]]
"""What a check computes, in a few words, and the check."""


def run_tasks(tasks: Sequence[Task]) -> None:
    """Runs checks in order and shows which one is running; nothing is shown where stderr is not a terminal."""
    with tqdm(total=len(tasks), desc="verify", unit="check", leave=False, disable=None) as bar:
        for what, check in tasks:
            bar.set_postfix_str(what)
            check()
            bar.update()


def attempt(report: Report, names: Sequence[str], check: Callable[[], object]) -> None:
    """Makes a check; if it can't be made, only its values are lost.

    Args:
      report: records values that can't be compared for lack of an input, and remarks on faults in the folder.
      names: of the values.
      check: the check.
    """
    try:
        check()
    except MissingError as error:
        report.skip(names, str(error))
    except ValueError as error:
        report.remarks.append(f"{names[0]}: {error}")
