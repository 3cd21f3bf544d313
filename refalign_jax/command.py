"""What the commands under tools/ share: arguments from typed functions, errors as one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import tyro


def run(main: Callable[..., int | None]) -> None:
    """Parses the command line for `main`'s parameters, calls it and exits with what it returns.

    A `ValueError` or `OSError` is the user's to mend: its sentence goes to stderr, and the exit code is 2.
    """
    _exit(lambda: tyro.cli(main))


def run_subcommands(commands: Mapping[str, Callable[..., int | None]]) -> None:
    """As `run`, for a command with subcommands."""
    _exit(lambda: tyro.extras.subcommand_cli_from_dict(dict(commands)))


def _exit(call: Callable[[], Any]) -> None:
    try:
        code = call()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code or 0)
