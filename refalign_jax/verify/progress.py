"""A progress line on stderr while values are computed; nothing where stderr is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tqdm import tqdm

Task = tuple[str, Callable[[], None]]
"""What a check computes, in a few words, and the check."""


def run_tasks(tasks: Sequence[Task]) -> None:
    """Runs checks in order and shows which one is running."""
    with tqdm(total=len(tasks), desc="verify", unit="check", leave=False, disable=None) as bar:
        for what, check in tasks:
            bar.set_postfix_str(what)
            check()
            bar.update()
