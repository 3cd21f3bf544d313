r"""Compiles a training or sampling step for TPUs or GPUs that need not be present, and prints what it needs.

    python tools/compile.py refalign_14b_stage1 --topology v5p:4x4x4 --mesh.fsdp 64 --data.batch-size 64 \
        --data.held-out 0 --train.held-out-every 0 --json report.json
    python tools/compile.py RECIPE --topology h100:8 --mesh.fsdp 8 --data.batch-size 8
    python tools/compile.py RECIPE --topology v5e:16x16 --suggest
    python tools/compile.py RECIPE --topology v5e:16x16 --sweep
    python tools/compile.py RECIPE --parameters
    python tools/compile.py --compare DUMP_A DUMP_B
    python tools/compile.py --table FILE FILE …
    python tools/compile.py --predict FILE FILE …
    python tools/compile.py --again FILE FILE …

RECIPE is a Python file, which is executed, or the bare name of one under configs/; options override its fields. It runs
on the CPU. TPUs need libtpu (pip install -e '.[ahead]'), GPUs need JAX's CUDA plugin ('.[ahead-gpu]'). The exit code is
1 where nothing fits.
"""

from refalign_jax.command import OutputFile, parse_recipe, run

# isort: split
import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from refalign_jax.atomic import write_text
from refalign_jax.config import Config, QuantisedDType
from refalign_jax.devices import NO_TPU, memory_fraction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line."""

    topology: str = ""
    """The devices: v5p:4x4x4, v5e:16x16, tpu7x:2x2x1 and so on, or GPUs per host, h100:8, or hosts x GPUs, h100:4x8."""
    step: Literal["train", "sample", "text", "decode"] = "train"
    """The training step; the sampling of a batch; UMT5-XXL before it; the decoding of its videos by Wan2.1's VAE."""
    weights_dtype: Annotated[
        QuantisedDType | None, arg(metavar="{int8,float8}", help_behavior_hint="(default: the compute dtype)")
    ] = None
    """Compile sampling with quantised weights, as sample.py --weights-dtype has them."""
    json: OutputFile = None
    """File for the report."""
    dump: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: not kept)")] = None
    """Folder in which the optimised program's text is kept."""
    flags: bool = False
    """Compile with the flags that refalign_jax/devices.py has for the platform."""
    sweep: bool = False
    """Try every mesh that fits, each with remat policies until one fits; rank those that do."""
    suggest: bool = False
    """Find the mesh, remat policy and batch that fit the devices best, and print the options that choose them."""
    parameters: bool = False
    """Print each parameter's shape, split and bytes per device; compiles nothing."""
    compare: tuple[Path, ...] = ()
    """Print how two dumps differ; compiles nothing."""
    table: tuple[Path, ...] = ()
    """Print reports, as --json wrote them, as a Markdown table; compiles nothing."""
    predict: tuple[Path, ...] = ()
    """Print what step time and MFU reports of training steps allow, on paper; compiles nothing."""
    again: tuple[Path, ...] = ()
    """Compile what reports describe, as their commands have it, and write each again."""
    config: Annotated[Config, arg(name="")] = dataclasses.field(default_factory=Config)
    """The recipe."""


def main(arguments: list[str], prog: str) -> int:
    """Parses, compiles, prints; returns 1 where nothing fits."""
    given = parse_recipe(Arguments, arguments, prog, __doc__, optional=True)
    named = bool(arguments) and not arguments[0].startswith("-")
    if not named and not (given.compare or given.table or given.predict or given.again):
        raise ValueError(f"Name a recipe first, as in: {prog} tiny --topology v5e:2x2; see {prog} --help.")
    os.environ.update(NO_TPU)  # before anything imports JAX
    if given.compare or given.table or given.predict:
        option = "--table" if given.table else "--predict"
        print(_compared(given.compare) if given.compare else _of_reports(option, given.table or given.predict))
        return 0
    if given.again:
        return _again(given.again)
    if given.weights_dtype and given.step not in ("sample", "text"):
        raise ValueError("--weights-dtype is for --step sample and text; nothing else is quantised.")
    if (given.weights_dtype or given.step in ("text", "decode")) and (given.sweep or given.suggest):
        raise ValueError("--sweep and --suggest have no --weights-dtype and no --step text or decode.")
    memory_fraction()  # JAX's plugins do not start with a wrong one
    from refalign_jax.perf import ahead, tables

    if given.parameters:
        print(tables.parameter_table(given.config, given.topology))
        return 0
    if not given.topology:
        raise ValueError(f"Name a topology, as in: {prog} tiny --topology v5e:2x2.")
    if given.suggest:
        return _suggest(given)
    if given.sweep:
        return _sweep(given)
    report = ahead.compile_ahead(given.config, given.topology, given.step, given.dump, given.flags, given.weights_dtype)
    print(tables.summary(report))
    _write(given.json, report)
    return int(not report["fits"])


def _suggest(given: Arguments) -> int:
    """Compiles until the best fit is known, prints each report and the options of the best."""
    from refalign_jax.perf import search

    best = _printed(given, search.suggest(given.config, given.topology))[-1]
    print(f"The best fit: {search.options(best)}")
    return 0


def _sweep(given: Arguments) -> int:
    """Compiles every mesh, prints each and the ranking; returns 1 where nothing fits."""
    from refalign_jax.perf import search

    reports = search.ranked(_printed(given, search.sweep(given.config, given.topology, given.step)))
    print(f"{len(reports)} fit; the fastest by its bounds first:")
    for report in reports:
        bounds = report["bound_seconds"]
        print(f"  {report['mesh']} {report['remat']}: compute {bounds['compute']} s, links {bounds['links']} s")
    return int(not reports)


def _printed(given: Arguments, reports: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prints and writes reports as they come, and returns them."""
    from refalign_jax.perf import tables

    seen: list[dict[str, Any]] = []
    for report in reports:
        seen.append(report)
        print(tables.summary(report), end="\n\n", flush=True)
        _write(given.json, seen)
    return seen


def _again(files: tuple[Path, ...]) -> int:
    """Runs the commands of reports again, each in a process of its own, and prints the new table.

    Returns:
      2 where one of them failed; its report stays as it was.
    """
    commands = [_command(path) for path in files]
    failed = []
    for number, (path, command) in enumerate(zip(files, commands, strict=True), 1):
        print(f"{number} of {len(files)}: tools/compile.py {shlex.join(command)}", flush=True)
        if subprocess.run([sys.executable, os.path.relpath(__file__), *command], check=False).returncode not in (0, 1):
            failed.append(str(path))
    print(_of_reports("--table", files))
    if failed:
        print(f"Not compiled, and unchanged: {', '.join(failed)}.", file=sys.stderr)
    return 2 if failed else 0


def _command(path: Path) -> list[str]:
    """The arguments that a report was made with, and that write it where it is now.

    Raises:
      ValueError: it is no report of one compilation, or its command is not this one's.
    """
    reports = _read(path, "--again")
    try:
        (report,) = reports
        _, *arguments = shlex.split(report["about"]["command"])
        if arguments[0] == "--config":  # what reports of 2026-11 have
            arguments.pop(0)
        if arguments[0].startswith("-"):
            raise ValueError("its command names no recipe")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"--again {path}: no report of one compilation that can be made again ({error}).") from error
    for option in ("--json", "--dump"):
        if option in arguments:
            place = arguments.index(option)
            del arguments[place : place + 2]
    return [*arguments, "--json", str(path)]


def _compared(folders: tuple[Path, ...]) -> str:
    """How the programs of two dumps differ, in lines."""
    if len(folders) != 2:
        raise ValueError(f"--compare names {len(folders)} dumps; name two.")
    from refalign_jax.perf import ahead, hlo

    paths = [folder / ahead.HLO_FILE for folder in folders]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"--compare: {path} does not exist; name two folders that --dump wrote.")
    try:
        return "\n".join(hlo.compare(*(path.read_text(encoding="utf-8") for path in paths)))
    except (ValueError, LookupError) as error:
        raise ValueError(
            f"--compare: {paths[0]} or {paths[1]} is not whole; name two folders that --dump wrote."
        ) from error


def _of_reports(option: str, files: Sequence[Path]) -> str:
    """Reports as a Markdown table, or with the option --predict what they allow on paper as another."""
    reports = [report for path in files for report in _read(path, option)]
    from refalign_jax.perf import predict, tables

    try:
        return tables.table(reports) if option == "--table" else predict.table(reports)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{option}: one of the files is no report of --json, or an old one ({error!r}).") from error


def _read(path: Path, option: str) -> list[dict[str, Any]]:
    """The report, or the reports of a sweep, that --json wrote."""
    if not path.is_file():
        raise ValueError(f"{option}: the report {path} does not exist; name files that --json wrote.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        reports = found if isinstance(found, list) else [found]
        missing = {
            key
            for report in reports
            for key in ("topology", "memory_gib", "tiles", "devices")
            if key not in dict(report)
        }
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{option} {path}: can't be read as a report of --json ({error}).") from error
    if missing:
        raise ValueError(f"{option} {path}: no report of --json, or an old one; it lacks {', '.join(sorted(missing))}.")
    return reports


def _write(path: Path | None, report: object) -> None:
    if path is not None:
        write_text(path, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
