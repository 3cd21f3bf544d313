"""The command `refalign NAME …`, and what the commands under tools/ share.

A command is a file tools/NAME.py with a function `main(arguments, prog)` that returns its exit code, or None for 0.
It parses its arguments with `refalign_jax.config` alone and imports what computes afterwards, so that help and
mistakes are shown at once. `refalign NAME …` and `python tools/NAME.py …` run the same file.
"""

from __future__ import annotations

import ast
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import arg

from refalign_jax.config import Config, read_recipe

Main = Callable[[list[str], str], int | None]
"""A command: its arguments, and the name under which it was called; returns the exit code."""

OutputFile = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: not written)")]
"""A file that is written only if it is named."""

_PACKAGE = Path(__file__).parent
TOOLS = next(filter(Path.is_dir, (_PACKAGE / "tools", _PACKAGE.parent / "tools")), _PACKAGE / "tools")
"""The commands: inside of the package when it is installed, beside it in a clone."""


def main() -> None:
    """The entry point `refalign`: runs the command named first, or lists the commands."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"    {name:20s} {_summary(name)}" for name in command_names()]
        print("usage: refalign COMMAND [OPTIONS]\n", *lines, "\nrefalign COMMAND --help shows a command's.", sep="\n")
        return
    _exit(lambda: load(name)(arguments, f"refalign {name}"))


def run(command: Main) -> None:
    """Runs a command on the command line of this process and exits with what it returns.

    A `ValueError` or `OSError` is the user's to mend: its sentence goes to stderr, and the exit code is 2.
    """
    _exit(lambda: command(sys.argv[1:], sys.argv[0]))


def log_progress() -> None:
    """Logs the progress of this package, and the warnings of all others, with their time."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", force=True)
    logging.getLogger("refalign_jax").setLevel(logging.INFO)


def command_names() -> list[str]:
    """Names of all commands."""
    return sorted(path.stem for path in TOOLS.glob("[!_]*.py"))


def load(name: str) -> Main:
    """Imports the file of one command and returns its `main`.

    Raises:
      ValueError: there is no such command.
    """
    if name not in command_names():
        raise ValueError(f"There is no command {name!r}; choose one of {', '.join(command_names())}.")
    module_name = f"refalign_jax.tools.{name}"
    spec = importlib.util.spec_from_file_location(module_name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module.main


Parsed = TypeVar("Parsed")


def parse_recipe(
    kind: type[Parsed],
    arguments: Sequence[str],
    prog: str,
    description: str | None,
    *,
    change: Callable[[Config], Config] = lambda config: config,
    optional: bool = False,
) -> Parsed:
    """Parses `RECIPE [OPTIONS]`.

    Args:
      kind: a dataclass of the options; its field `config` is the recipe, whose fields the options override.
      arguments: the command line; the recipe is named first, by its path or by the bare name of a shipped one.
      prog: the command's name.
      description: what help says; lines that are indented keep their line breaks.
      change: what becomes of the recipe before the options override its fields.
      optional: whether the command also does something without a recipe.

    Raises:
      ValueError: no recipe is named, it cannot be read, or a field cannot have its value.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    if not named and not optional and not {"-h", "--help"} & set(arguments):
        raise ValueError(f"Name a recipe first, as in: {prog} tiny; see {prog} --help.")
    recipe, rest = (arguments[0], arguments[1:]) if named else ("RECIPE", arguments)
    config = change(read_recipe(recipe)) if named else Config()
    defaults: Any = kind
    return tyro.cli(kind, default=defaults(config=config), args=rest, description=description, prog=f"{prog} {recipe}")


def override(config: Config, fields: Sequence[str]) -> Config:
    """A configuration with some fields changed, each given as name=value; the values of a tuple are split by commas.

    Raises:
      ValueError: an argument that is not name=value; tyro exits where there is no such field or it has no such value.
    """
    arguments: list[str] = []
    for field in fields:
        name, equals, value = field.partition("=")
        if not equals:
            raise ValueError(f"{field!r} names no value; give a field and its value, as in model.dit.remat=full.")
        switch = {"true": f"--{name}", "false": f"--{'.no-'.join(name.rpartition('.')[::2])}"}.get(value.lower())
        arguments += [switch] if switch else [f"--{name}", *value.split(",")]
    return tyro.cli(Config, default=config, args=arguments, prog="NAME=VALUE")


def _summary(name: str) -> str:
    """The first line of a command's docstring."""
    return (ast.get_docstring(ast.parse((TOOLS / f"{name}.py").read_text(encoding="utf-8"))) or "").split("\n")[0]


def _exit(call: Callable[[], int | None]) -> None:
    try:
        code = call()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        code = 130
    sys.exit(code or 0)
