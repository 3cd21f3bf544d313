"""Time by operation, read from a profile.

Every operation on a device is an instruction of the optimised HLO, whose metadata names the scopes that it comes from.
"""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from refalign_jax.perf import hlo

SCOPES: tuple[tuple[str, str], ...] = (
    ("optimizer", "optimizer"),
    ("alignment", "alignment"),
    ("self_attention", "self_attention"),
    ("cross_attention", "cross_attention"),
    ("ffn", "ffn"),
    ("embed", "embed|patch_embedding|text_embedding|time_in|time_out|time_projection"),
    ("head", "head"),
    ("rest of the blocks", "blocks|Block"),  # norms, modulation, the residual stream, slices of the stacked weights
)
"""Names under which time is reported, each with the parts of an operation's path that belong to it; first match."""

CONTAINERS = ("while", "conditional", "call")
"""Instructions whose time is that of the instructions inside them."""


def profile(step: Callable[[], Any], text: str, steps: int) -> dict[str, dict[str, float]]:
    """Runs a program under JAX's profiler.

    Args:
      step: runs the program once.
      text: the program's optimised HLO.
      steps: how often to run it.

    Returns:
      The seconds per device of one run, by scope and by phase, see `scope_of` and `phase_of`. On a CPU, whose threads
      share the work, they are summed over the threads.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        jax.profiler.start_trace(folder, profiler_options=options)
        for _ in range(steps):
            jax.block_until_ready(step())
        jax.profiler.stop_trace()
        times = operations(Path(folder), text)
    share = steps * jax.local_device_count()
    return by_scope(text, {name: seconds / share for name, seconds in times.items()})


def operations(folder: Path, text: str) -> dict[str, float]:
    """Returns the seconds of each instruction of one program in a profile, summed over all devices.

    Args:
      folder: the folder that `jax.profiler` wrote to.
      text: the program's optimised HLO.
    """
    match = re.match(r"HloModule ([\w.\-]+)", text)
    module = match[1] if match else ""
    total = collections.Counter[str]()
    for path in folder.rglob("*.xplane.pb"):
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
        devices = [plane for plane in planes if plane.name.startswith("/device:")]
        for plane in devices or planes:
            lines = list(plane.lines)
            # a TPU reports the same time under several headings
            for line in [line for line in lines if line.name == "XLA Ops"] or lines:
                for event in line.events:
                    stats = dict(event.stats)
                    if "hlo_op" in stats and str(stats.get("hlo_module", module)).startswith(module):
                        total[str(stats["hlo_op"])] += event.duration_ns / 1e9
    return dict(total)


def by_scope(text: str, times: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Sums the seconds of instructions by the named scopes that they come from.

    Args:
      text: the optimised HLO.
      times: seconds by instruction.

    Returns:
      Seconds by scope and phase.
    """
    paths = {}
    for body in hlo.parse(text).values():
        for instruction in body:
            found = re.search(r'op_name="([^"]*)"', instruction.text)
            paths[instruction.name] = instruction.opcode, found[1] if found else ""
    result: dict[str, dict[str, float]] = {}
    for name, seconds in times.items():
        opcode, path = paths.get(name, ("", ""))
        if opcode in CONTAINERS:
            continue
        phases = result.setdefault(scope_of(path), {})
        phases[phase_of(path)] = phases.get(phase_of(path), 0.0) + seconds
    return result


def scope_of(path: str) -> str:
    """Returns which of `SCOPES` an operation's path lies in; "rest" if none."""
    parts = path.split(";")[0].split("/")
    found = (name for name, pattern in SCOPES if any(re.fullmatch(pattern, part) for part in parts))
    return next(found, "rest")


def phase_of(path: str) -> str:
    """Returns the phase of an operation: forward, backward, repeated (the backward pass recomputes it) or neither."""
    marks = (("rematted_computation", "repeated"), ("transpose(", "backward"), ("jvp(", "forward"))
    return next((phase for mark, phase in marks if mark in path), "neither")
