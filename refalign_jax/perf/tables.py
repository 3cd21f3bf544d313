"""Reports of `ahead` as text: a summary, a Markdown table, and the table of a model's parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import AbstractMesh, AxisType, NamedSharding

from refalign_jax.config import AttentionTiles, Config
from refalign_jax.initial import model_shapes
from refalign_jax.perf.ahead import BOUNDS, GPU_LIMITS
from refalign_jax.perf.topology import topology_mesh
from refalign_jax.sharding import AXES, param_spec
from refalign_jax.trees import flatten


def summary(report: Mapping[str, Any]) -> str:
    """Returns a report as lines of text."""
    axes = " ".join(f"{name} {size}" for name, size in report["mesh"].items())
    sizes, work = report["memory_gib"], report["tflops"]
    policy = report["remat"] + (" + offload" if report["offload"] else "")
    lines = [
        f"{report['step']} step, {report['parameters'] / 1e9:.2f}e9 parameters, on {report['topology']}"
        + (f" x {report['slices']}" if report["slices"] > 1 else "")
        + f": {report['devices']} x {report['device']}"
        + (f", {report['chips']} chips" if report["chips"] != report["devices"] else ""),
        f"mesh         {axes}; batch {report['batch']}; remat {policy}; residual {report['residual_dtype']}",
        "memory       " + ", ".join(f"{name.replace('_', ' ')} {size:.2f}" for name, size in sizes.items()) + " GiB",
        f"fits         {'yes' if report['fits'] else 'no'}"
        + (f", {100 * report['spare']:.1f}% to spare" if "spare" in report else ""),
    ]
    if report.get("weights_dtype"):
        lines.append(f"weights      {report['weights_dtype']}, quantised")
    if work:
        lines.append(
            f"FLOPs        {work['model']:,.0f} T model, {work['hardware']:,.0f} T with what is computed twice; "
            f"{work['hardware_a_device']:,.1f} T per device"
        )
    if "collectives" in report:
        listed = [f"{kind} {c['count']} ({c['gb']:.2f} GB)" for kind, c in report["collectives"].items()]
        seconds = [f"{name} {report['bound_seconds'][name]:.2f}" for name in BOUNDS] if work else []
        lines.append(f"collectives  {', '.join(listed) or 'none'}, per device and step")
        if seconds:
            lines.append(f"seconds      at least {', '.join(seconds)}; bound by {report['bound_by']}")
    if "passes" in report:
        lines += _passes(report["passes"])
    busy = f" ({report['compile_cpu_seconds']:.0f} s of CPU time)" if "compile_cpu_seconds" in report else ""
    lines.append(
        f"compiled in  {report['compile_seconds']:.0f} s{busy}, lowered in {report['lower_seconds']:.0f} s, by "
        f"{compiler(report)}"
    )
    if report["platform"] == "gpu":
        lines.append(f"not known    {GPU_LIMITS}")
    return "\n".join(lines)


def _passes(moved: Mapping[str, Any]) -> list[str]:
    """What a program moves to and from memory, and the sources of most of its elementwise passes, in lines."""
    kinds = ", ".join(f"{kind} {moved[f'{kind}_gb']:.1f}" for kind in ("products", "kernels", "collectives"))
    return [
        f"memory moved elementwise {moved['elementwise_gb']:.1f} (copies {moved['copies_gb']:.1f} of it), {kinds} GB "
        "per device and step; most of the elementwise:",
        *(f"             {row['gb']:6.1f} GB in {row['count']:4} {row['source']}" for row in moved["largest"]),
    ]


def compiler(report: Mapping[str, Any]) -> str:
    """Returns the name and version of the package that compiled."""
    versions = report["about"]["versions"]
    names = ("libtpu",) if report["platform"] == "tpu" else ("jax-cuda13-plugin", "jax-cuda12-plugin")
    return next(f"{name} {versions[name]}" for name in names if name in versions)


def table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Returns reports as a Markdown table, one per row; training and sampling each have one of their own."""
    parts = [[report for report in reports if (report["step"] == "train") is train] for train in (True, False)]
    tables = (make(part) for make, part in zip((_training_table, _sampling_table), parts, strict=True) if part)
    return "\n\n".join(tables)


def _training_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Reports of training as a Markdown table."""
    names = (
        "step",
        "batch, latents, references",
        "mesh",
        "remat, tiles",
        "GiB per device",
        "spare",
        "recomputed FLOPs",
    )
    rows: list[Sequence[str]] = [
        (*names, "lower bounds: compute, links", "CPU time to compile"),
        ("---",) * (len(names) + 2),
    ]
    for report in reports:
        work, sizes = report["tflops"], report["memory_gib"]
        slices = f" x {report['slices']}" if report["slices"] > 1 else ""
        policy = f"`{report['remat']}`" + (" + offload" if report["offload"] else "")
        policy += ", 16-bit stream" if report["residual_dtype"] == "bfloat16" else ""
        usual = dataclasses.asdict(AttentionTiles(backward_kv=1024))  # what 0 chooses where memory is no concern
        policy += "".join(
            f", {name} {value}" for name, value in report["tiles"].items() if value not in (0, usual[name])
        )
        seconds = report.get("bound_seconds")
        rows.append(
            (
                f"{report['step']}, {report['parameters'] / 1e9:.1f}e9 on {report['topology']}{slices}"
                + (", with flags" if report["flags"] else ""),
                f"{report['batch']}, {'x'.join(map(str, report['latent_grid']))}, {report['references']}",
                ", ".join(f"{name} {size}" for name, size in report["mesh"].items() if size > 1),
                policy,
                f"{sizes['total']:.1f} of {sizes['device']:.2f}",
                f"{100 * report['spare']:.1f}%" if report["fits"] else "does not fit",
                f"{100 * (work['hardware'] / work['model'] - 1):.0f}%",
                f"{seconds['compute']:.1f} s, {seconds['links']:.1f} s" if seconds else "",
                f"{report['compile_cpu_seconds']:.0f} s" if "compile_cpu_seconds" in report else "",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _sampling_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Reports of sampling and of the stages around it as a Markdown table."""
    names = ("stage", "batch, latents, references", "mesh", "weights", "GiB per device: weights and inputs, all")
    rows: list[Sequence[str]] = [
        (*names, "spare", "TFLOP a video", "lower bounds: compute, links", "CPU time to compile"),
        ("---",) * (len(names) + 4),
    ]
    stages = {"sample": "transformer", "text": "UMT5", "decode": "VAE decoder"}
    stored = {"sample": "bfloat16", "text": "bfloat16", "decode": "float32"}
    for report in reports:
        sizes, seconds = report["memory_gib"], report.get("bound_seconds")
        held = f"{sizes['arguments']:.1f}, " if "arguments" in sizes else ""
        rows.append(
            (
                f"{stages[report['step']]}, {report['parameters'] / 1e9:.1f}e9 on {report['topology']}",
                f"{report['batch']}, {'x'.join(map(str, report['latent_grid']))}, {report['references']}",
                ", ".join(f"{name} {size}" for name, size in report["mesh"].items() if size > 1),
                report.get("weights_dtype") or stored[report["step"]],
                f"{held}{sizes['total']:.1f} of {sizes['device']:.2f}",
                f"{100 * report['spare']:.1f}%" if report["fits"] else "does not fit",
                f"{report['tflops']['model_a_sample']:,.0f}" if report["tflops"] else "",
                f"{seconds['compute']:.1f} s, {seconds['links']:.1f} s" if seconds else "",
                f"{report['compile_cpu_seconds']:.0f} s" if "compile_cpu_seconds" in report else "",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def parameter_table(config: Config, topology: str = "") -> str:
    """Returns a table of every parameter's shape, how it is split, and its bytes per device in float32.

    Args:
      config: model and mesh.
      topology: see `topology_mesh`; if empty, the mesh has as many devices as its axes multiply to.
    """
    if topology:
        mesh: Any = topology_mesh(config.mesh, topology)
    else:
        sizes = tuple(getattr(config.mesh, axis) or 1 for axis in AXES)
        mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    rows, total = [], 0
    for path, x in flatten(model_shapes(config.model)).items():
        spec = param_spec(path, x.shape, mesh)
        held = 4
        for size in NamedSharding(mesh, spec).shard_shape(x.shape):
            held *= size
        total += held
        split = ", ".join("·".join(a) if isinstance(a, tuple) else a or "-" for a in spec) or "whole"
        rows.append((path, str(list(x.shape)), split, f"{held:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"{p:{widths[0]}}  {s:{widths[1]}}  {a:{widths[2]}}  {b:>{widths[3]}}" for p, s, a, b in rows]
    return "\n".join([*lines, f"{total:,} bytes per device in float32; moments take twice that, an EMA once more."])
