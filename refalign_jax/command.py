"""The command `refalign NAME …`, and what the commands under tools/ share.

A command is a file tools/NAME.py with a function `main(arguments, prog)` that returns its exit code, or None for 0.
It parses its arguments with `refalign_jax.config` alone and imports what computes afterwards, so that help and
mistakes are shown at once. `refalign NAME …` and `python tools/NAME.py …` run the same file.
"""

from __future__ import annotations

from refalign_jax.interrupt import INTERRUPTED

# isort: split
import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import io
import logging
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import arg

from refalign_jax import remote
from refalign_jax.atomic import first_line
from refalign_jax.config import Config, flat_fields, read_recipe

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
    exit_with(lambda: _call(load(name), arguments, f"refalign {name}"))


def run(command: Main) -> None:
    """Runs a command on the command line of this process and exits with what it returns.

    A `ValueError` or `OSError` is the user's to mend: its sentence goes to stderr, and the exit code is 2. After Ctrl-C
    it is 130. Any other error is ours: the traceback is kept in a file that the sentence names, and the exit code is 1.
    """
    exit_with(lambda: _call(command, sys.argv[1:], sys.argv[0]))


def _call(command: Main, arguments: Sequence[str], prog: str) -> int | None:
    """Calls a command. Where it expects a local path, it refuses a URL, of which `Path` would drop a slash."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def local_path(found: Any) -> tyro.constructors.PrimitiveConstructorSpec[Path] | None:
        if found.type is not Path:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda texts: local(texts[0]),
            is_instance=lambda value: isinstance(value, os.PathLike),
            str_from_instance=lambda value: [str(value)],
        )

    remote.configure()
    with registry:
        return command(expand_home(arguments), prog)


def local(place: str | Path) -> Path:
    """A path of this machine.

    Raises:
      ValueError: it is a URL.
    """
    if remote.is_remote(place):
        raise ValueError(f"{place} is not on this machine; give a local path here.")
    return Path(place)


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
      ValueError: an argument that is not name=value, or no such field; tyro exits where it can't have such a value.
    """
    arguments: list[str] = []
    known = flat_fields(dataclasses.asdict(config))
    for field in fields:
        name, equals, value = field.partition("=")
        if not equals:
            raise ValueError(f"{field!r} names no value; give a field and its value, as in model.dit.remat=full.")
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            raise ValueError(f"There is no field {name!r}{'; near it are ' * bool(near)}{', '.join(near)}.")
        switch = {"true": f"--{name}", "false": f"--{'.no-'.join(name.rpartition('.')[::2])}"}.get(value.lower())
        arguments += [switch] if switch else [f"--{name}", *value.split(",")]
    return tyro.cli(Config, default=config, args=arguments, prog="NAME=VALUE")


def require(path: str | Path, what: str) -> None:
    """Checks that something is there, before what reads it is imported, which takes seconds.

    Args:
      path: as the user gave it, local or in an object store; at another URL it is not looked for.
      what: what it should be, for the message, such as "weights".

    Raises:
      ValueError: nothing is there.
      OSError: its object store can't be reached, or refuses the credentials.
    """
    place = os.fspath(path)
    if remote.is_remote(place):
        if place.partition("://")[0] not in remote.PACKAGES:
            return
        remote.check(place)
        there = remote.file_system(place).exists(place)
    else:
        there = os.path.exists(place)
    if not there:
        raise ValueError(f"{path} does not exist; expected {what}.")


def _summary(name: str) -> str:
    """The first line of a command's docstring."""
    return (ast.get_docstring(ast.parse((TOOLS / f"{name}.py").read_text(encoding="utf-8"))) or "").split("\n")[0]


def expand_home(arguments: Sequence[str]) -> list[str]:
    """Replaces ~ at the start of an argument, or of the value in --name=value, by the home folder.

    Raises:
      ValueError: an argument is not UTF-8, so that no result could name it.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"The argument {argument!a} is not UTF-8 text; rename the file or folder.") from error
    split = [re.fullmatch(r"(--[^=]*=)?(.*)", argument, re.DOTALL) for argument in arguments]
    return [f"{found[1] or ''}{os.path.expanduser(found[2])}" for found in split if found]


def exit_with(call: Callable[[], int | None]) -> None:
    """Calls a command and exits the process; whatever happens, the last line is a sentence and no traceback."""
    _open_streams()
    signals: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGINT, interrupt)
    try:
        code, sentence = call() or 0, ""
    except (Exception, KeyboardInterrupt) as error:
        # An import or a callback that Ctrl-C stopped may have raised another error.
        stopped = bool(signals) or isinstance(error, KeyboardInterrupt)
        code, sentence = (130, INTERRUPTED) if stopped else judge(error)
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, signal.SIG_DFL if signals else before)
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{sentence}\n" if sentence else "")  # at once, since other threads may print too
    sys.exit(_close_streams() or code)


def judge(error: BaseException) -> tuple[int, str]:
    """The exit code and the sentence for an error: 2 for what the user can mend, 1 for what nobody foresaw.

    The traceback of what nobody foresaw is kept in a file that the sentence names.
    """
    text = str(error)
    if isinstance(error, BrokenPipeError):  # the reader of stdout or stderr, such as head, has had enough
        return 1, ""
    if remote.is_answer(error):
        return 2, f"error: An object store can't be read or written: {remote.reason(error)}."
    if isinstance(error, ValueError | OSError):
        return 2, f"error: {text}"
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("refalign_jax"):
        return 2, f"error: The package {error.name} is not installed; install it with pip."
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return 2, f"error: There is too little memory: {first_line(error)}."
    in_backend = traceback.extract_tb(error.__traceback__)[-1].filename.endswith("xla_bridge.py")
    if in_backend or (isinstance(error, RuntimeError) and "initialize backend" in text):
        return 2, f"error: JAX can't use its devices ({first_line(error)}); JAX_PLATFORMS=cpu chooses the CPU."
    return 1, f"error: {_keep_traceback(error)}"


def _keep_traceback(error: BaseException) -> str:
    """Writes the traceback of an unforeseen error to a file; returns a sentence that names it."""
    what = f"{type(error).__name__}: {first_line(error)}"
    lines = [shlex.join(sys.argv), f"Python {sys.version}", *traceback.format_exception(error)]
    try:
        handle, name = tempfile.mkstemp(prefix="refalign-error-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(lines))
    except OSError:
        return f"This was not foreseen ({what}); please report it as CONTRIBUTING.md describes."
    return f"This was not foreseen ({what}); please report it as CONTRIBUTING.md describes, with the file {name}."


def _open_streams() -> None:
    """Opens stdin, stdout and stderr on the null device where they are closed, since any file would take their place.

    What a stream can't encode is escaped.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        mode = "r" if name == "stdin" else "w"
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _close_streams() -> int:
    """Flushes stdout and stderr; returns 1 where stdout can't be written, and lets nothing be flushed again."""
    code = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if stream is sys.stdout:
                code = 1
                if not isinstance(error, BrokenPipeError):
                    with contextlib.suppress(OSError):
                        print(f"error: The output can't be written: {error.strerror}.", file=sys.stderr, flush=True)
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code
