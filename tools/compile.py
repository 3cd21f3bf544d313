"""Compiles a training or sampling step for a TPU topology that need not be there, and tells what it needs.

python tools/compile.py --config configs/refalign_14b_stage1.py --topology v5p:4x4x4 --mesh.fsdp 64 \
    --data.batch-size 64 --data.held-out 0 [--json FILE] [--dump DIR] [--sweep]
python tools/compile.py --config configs/refalign_14b_stage1.py --parameters
python tools/compile.py --compare DUMP_A DUMP_B
python tools/compile.py --table FILE FILE …

Every field of the recipe can be overridden as in tools/train.py. Runs on the CPU; needs libtpu (pip install libtpu).
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from refalign_jax.devices import NO_TPU, XLA_FLAGS

os.environ.update(NO_TPU)  # before anything imports JAX

from refalign_jax.command import _exit
from refalign_jax.config import Config, read_recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """The command line."""

    recipe: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)
    """What --config names."""
    topology: str = ""
    """The slice: v5p:4x4x4, v5e:16x16, v6e:8x8 and so on."""
    step: Literal["train", "sample"] = "train"
    """The training step, or the sampling of one batch."""
    json: Path | None = None
    """Write the report here."""
    dump: Path | None = None
    """Keep the optimised program's text in this folder."""
    flags: bool = False
    """Compile with the flags that refalign_jax/devices.py has for TPUs."""
    sweep: bool = False
    """Try every mesh that fits, each with remat policies until one fits; rank those that do."""
    parameters: bool = False
    """Print each parameter's shape, split and bytes a device; compiles nothing."""
    compare: tuple[Path, Path] | None = None
    """Tell how two dumps differ; compiles nothing."""
    table: tuple[Path, ...] = ()
    """Print reports, as --json wrote them, as a Markdown table; compiles nothing."""


def parse(arguments: list[str]) -> Command:
    """The command line, its recipe's fields taken from the file under --config.

    Raises:
      ValueError: no such recipe, or a value that a field can't have.
    """
    default = Command()
    if "--config" in arguments[:-1]:
        place = arguments.index("--config")
        default = Command(recipe=read_recipe(Path(arguments[place + 1])))
        arguments = arguments[:place] + arguments[place + 2 :]
    return tyro.cli(Command, default=default, args=arguments, description=__doc__, prog="tools/compile.py")


def main(arguments: list[str]) -> int:
    """Parses, compiles, prints; returns 1 where nothing fits."""
    command = parse(arguments)
    from refalign_jax.perf import ahead, hlo, tables

    if command.compare:
        texts = [(folder / ahead.HLO_FILE).read_text() for folder in command.compare]
        print("\n".join(hlo.compare(*texts)))
        return 0
    if command.table:
        print(tables.table([report for path in command.table for report in _read(path)]))
        return 0
    if command.parameters:
        print(tables.parameter_table(command.recipe, command.topology))
        return 0
    if not command.topology:
        raise ValueError("Name a topology, as in: tools/compile.py --config configs/tiny.py --topology v5e:2x2.")
    if command.sweep:
        reports = []
        for report in ahead.sweep(command.recipe, command.topology, command.step):
            reports.append(report)
            print(tables.summary(report), end="\n\n", flush=True)
            _write(command.json, reports)
        reports = ahead.ranked(reports)
        print(f"{len(reports)} fit; the fastest by its bounds first:")
        for report in reports:
            bounds = report["bound_seconds"]
            print(f"  {report['mesh']} {report['remat']}: compute {bounds['compute']} s, links {bounds['links']} s")
        return int(not reports)
    flags = XLA_FLAGS["tpu"] if command.flags else {}
    report = ahead.compile_ahead(command.recipe, command.topology, command.step, command.dump, flags)
    print(tables.summary(report))
    _write(command.json, report)
    return int(not report["fits"])


def _read(path: Path) -> list[dict[str, Any]]:
    """The report, or the reports of a sweep, that --json wrote."""
    try:
        found = json.loads(path.read_text())
        reports = found if isinstance(found, list) else [found]
        missing = {key for report in reports for key in ("topology", "memory_gib", "tiles") if key not in report}
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--table {path}: can't be read as a report of --json ({error}).") from error
    if missing:
        raise ValueError(f"--table {path}: no report of --json, or an old one; it lacks {', '.join(sorted(missing))}.")
    return reports


def _write(path: Path | None, report: object) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    _exit(lambda: main(sys.argv[1:]))
