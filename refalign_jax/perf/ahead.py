"""Compilation for TPU slices that aren't there: what a step needs and what bounds it, before anyone pays for one.

The TPU compiler comes with libtpu and runs on any host. It tells the memory; FLOPs are counted from sizes (`flops`),
since XLA sees neither into kernels nor how often a loop runs; collectives are read off the optimised program (`hlo`).

    compute  hardware FLOPs a chip / peak           model FLOPs and what is computed twice
    memory   bytes read and written / bandwidth     roughly, from the program
    links    bytes received / bandwidth             half of the link bandwidth, which vendors give for both directions
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import tempfile
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from refalign_jax import flops
from refalign_jax.config import AttentionTiles, Config, DiTConfig, MeshConfig, RematPolicy
from refalign_jax.devices import GIB, Chip, chip
from refalign_jax.initial import model_shapes
from refalign_jax.objective import Batch
from refalign_jax.perf import hlo
from refalign_jax.provenance import about
from refalign_jax.sampling import sample
from refalign_jax.sharding import (
    AXES,
    BATCH,
    check_batch,
    check_heads,
    make_mesh,
    param_spec,
    replicated,
    state_sharding,
)
from refalign_jax.trainer.state import state_shapes
from refalign_jax.trainer.step import lower_step
from refalign_jax.trees import count, flatten

Step = Literal["train", "sample"]
HLO_FILE = "optimized.hlo.txt"


def topology_mesh(config: MeshConfig, topology: str) -> Mesh:
    """The configured mesh over a TPU slice (or `config.slices` of them) that need not exist.

    Args:
      config: the mesh.
      topology: such as v5p:4x4x4, v5e:16x16, v6e:8x8; of one slice. libtpu must have been told that there is no TPU,
        by `devices.NO_TPU` in the environment before JAX is imported.

    Raises:
      ValueError: libtpu is missing, it doesn't know the topology, or the mesh doesn't fit its chips.
    """
    more = {"num_slices": config.slices} if config.slices > 1 else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    except Exception as error:  # of libtpu, or for want of it
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--topology {topology!r} can't be used ({reason:.200}); give one such as v5p:4x4x4 or v5e:16x16, with "
            "libtpu installed (pip install libtpu)."
        ) from error
    return make_mesh(config, list(described.devices))


def lower(config: Config, mesh: Mesh, step: Step) -> jax.stages.Lowered:
    """Lowers the trainer's step, or the whole sampling loop, of shapes alone."""
    dit, data = config.model.dit, config.data
    B, R, grid = data.batch_size, data.max_references, config.synthetic.latent_grid
    check_heads(dit, mesh)
    check_batch(B, config.optimizer.accumulation if step == "train" else 1, mesh)
    place = NamedSharding(mesh, BATCH)

    def of(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    _, rows, columns = dit.token_grid(*grid)
    text = of(B, data.text_length, dit.text_width)
    references = of(B, R, *grid[1:], dit.latent_channels)
    counts = of(B, dtype=jnp.int32)
    if step == "train":
        batch = Batch(
            video_latents=of(B, *grid, dit.latent_channels),
            text=text,
            reference_latents=references,
            num_references=counts,
            subject_ids=of(B, R, dtype=jnp.int32),
            vfm_features=of(B, R, rows * columns, config.model.alignment.vfm_width),
            aligned=of(B, dtype=jnp.bool_),
        )
        empty = jax.ShapeDtypeStruct(text.shape[1:], jnp.float32, sharding=replicated(mesh))
        return lower_step(state_shapes(config, mesh), batch, empty, config, mesh)
    shapes = model_shapes(config.model)["dit"]
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dit.compute_dtype), sharding=sharding),
        shapes,
        state_sharding({"dit": shapes}, mesh)["dit"],
    )
    noise = of(B, *grid, dit.latent_channels, dtype=jnp.float32)
    with jax.set_mesh(mesh):
        given = (references, counts) if R else (None, None)
        return sample.lower(params, noise, text, text, *given, dit=dit, config=config.sampling)


def compile_ahead(
    config: Config,
    topology: str,
    step: Step = "train",
    dump: Path | None = None,
    flags: Mapping[str, str] = types.MappingProxyType({}),
) -> dict[str, Any]:
    """Compiles a step for a topology and tells of it.

    Args:
      config: the recipe; `synthetic.latent_grid`, `data.max_references` and `data.text_length` are the shape.
      topology: see `topology_mesh`.
      step: the training step, or the sampling of one batch.
      dump: a folder for the optimised program's text.
      flags: options of the compiler, such as `devices.XLA_FLAGS["tpu"]`.

    Returns:
      What `summary` prints, as JSON has it. Where memory is too small, `fits` is False and what the compiler needed
      stands under memory_gib (of temporaries alone, where it says no more), but nothing of the program.

    Raises:
      ValueError: the topology isn't known, or mesh, batch and heads don't fit each other.
    """
    mesh = topology_mesh(config.mesh, topology)
    known = chip(mesh.devices.flat[0].device_kind)
    assert known is not None, mesh.devices.flat[0].device_kind
    began = time.perf_counter()
    lowered = lower(config, mesh, step)
    between, busy = time.perf_counter(), time.process_time()
    report = describe(config, mesh, known, topology, step) | {
        "flags": dict(flags),
        "about": about(),
        "lower_seconds": round(between - began, 1),
    }
    try:
        compiled, text = _compile(lowered, flags)
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        return report | {
            "compile_seconds": round(time.perf_counter() - between, 1),
            "memory_gib": {"total": needed, "chip": known.hbm_gib},
            "fits": False,
        }
    report["compile_seconds"] = round(time.perf_counter() - between, 1)
    report["compile_cpu_seconds"] = round(time.process_time() - busy, 1)  # of all threads
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / HLO_FILE).write_text(text)
    moved = hlo.traffic(hlo.parse(text))
    report["collectives"] = {
        kind: {"count": moved.count[kind], "gb": round(moved.received[kind] / 1e9, 3)} for kind in sorted(moved.count)
    }
    seconds = {
        "compute": report["tflops"]["hardware_a_chip"] / known.tflops,
        "memory": moved.hbm / known.hbm_gbps / 1e9,
        "links": 2 * sum(moved.received.values()) / known.link_gbps / 1e9,
    }
    report["bound_seconds"] = {name: round(value, 4) for name, value in seconds.items()}
    report["bound_by"] = max(seconds, key=seconds.__getitem__)
    return report | memory(compiled, known)


def _compile(lowered: jax.stages.Lowered, flags: Mapping[str, str]) -> tuple[jax.stages.Compiled, str]:
    """The program and its optimised text, which libtpu writes itself: jaxlib can't read each of its instructions."""
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, **flags}
        compiled = lowered.compile(compiler_options=options)
        (path,) = Path(folder).glob("*.after_optimizations.txt")
        return compiled, path.read_text()


def describe(config: Config, mesh: Mesh, known: Chip, topology: str, step: Step) -> dict[str, Any]:
    """What is compiled, and its FLOPs, of one step over all chips and of one chip."""
    dit, data = config.model.dit, config.data
    shape = flops.Shape(grid=config.synthetic.latent_grid, references=data.max_references, text_length=data.text_length)
    if step == "train":
        model, again = flops.train_flops(config.model, shape), flops.repeated_flops(config.model, shape, "splash")
    else:
        model, again = flops.sample_flops(dit, shape, config.sampling.num_steps), 0
    chips = mesh.size
    return {
        "step": step,
        "topology": topology,
        "slices": config.mesh.slices,
        "chips": chips,
        "chip": known.kind,
        "mesh": dict(mesh.shape),
        "batch": data.batch_size,
        "latent_grid": list(shape.grid),
        "references": shape.references,
        "remat": dit.remat,
        "offload": dit.offload,
        "residual_dtype": dit.residual_dtype,
        "tiles": dataclasses.asdict(dit.tiles),
        "parameters": count(model_shapes(config.model)["dit"]),
        "tflops": {
            "model_a_sample": round(model / 1e12, 2),
            "model": round(model * data.batch_size / 1e12, 2),
            "hardware": round((model + again) * data.batch_size / 1e12, 2),
            "hardware_a_chip": round((model + again) * data.batch_size / chips / 1e12, 3),
        },
    }


def memory(compiled: jax.stages.Compiled, known: Chip) -> dict[str, Any]:
    """Memory of one chip in GiB by kind, and whether it suffices."""
    found: Any = compiled.memory_analysis()
    sizes = {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "outputs_not_in_place": found.output_size_in_bytes - found.alias_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
    }
    total = sum(sizes.values()) / GIB
    listed = {name: round(size / GIB, 3) for name, size in sizes.items()}
    listed |= {"total": round(total, 3), "chip": known.hbm_gib, "host": round(found.host_temp_size_in_bytes / GIB, 3)}
    return {"memory_gib": listed, "spare": round(1 - total / known.hbm_gib, 4), "fits": total <= known.hbm_gib}


def summary(report: Mapping[str, Any]) -> str:
    """A report in lines."""
    axes = " ".join(f"{name} {size}" for name, size in report["mesh"].items())
    sizes, work = report["memory_gib"], report["tflops"]
    kept = report["remat"] + (" + offload" if report["offload"] else "")
    lines = [
        f"{report['step']} step, {report['parameters'] / 1e9:.2f}e9 parameters, on {report['topology']}"
        + (f" x {report['slices']}" if report["slices"] > 1 else "")
        + f": {report['chips']} {report['chip']}",
        f"mesh         {axes}; batch {report['batch']}; remat {kept}; residual {report['residual_dtype']}",
        "memory       " + ", ".join(f"{name.replace('_', ' ')} {size:.2f}" for name, size in sizes.items()) + " GiB",
        f"fits         {'yes' if report['fits'] else 'no'}"
        + (f", {100 * report['spare']:.1f}% to spare" if "spare" in report else ""),
        f"FLOPs        {work['model']:,.0f} T model, {work['hardware']:,.0f} T with what is repeated; "
        f"{work['hardware_a_chip']:,.1f} T a chip",
    ]
    if "collectives" in report:
        listed = [f"{kind} {c['count']} ({c['gb']:.2f} GB)" for kind, c in report["collectives"].items()]
        bounds = [f"{name} {value:.2f}" for name, value in report["bound_seconds"].items()]
        lines += [
            f"collectives  {', '.join(listed) or 'none'}, a chip and step",
            f"seconds      {', '.join(bounds)} (memory roughly, the others at least); bound by {report['bound_by']}",
        ]
    busy = f" ({report['compile_cpu_seconds']:.0f} s of CPU time)" if "compile_cpu_seconds" in report else ""
    libtpu = report["about"]["versions"]["libtpu"]
    lines.append(
        f"compiled in  {report['compile_seconds']:.0f} s{busy}, lowered in {report['lower_seconds']:.0f} s, by libtpu "
        f"{libtpu}"
    )
    return "\n".join(lines)


def table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Reports as a Markdown table, one a line."""
    names = ("step", "batch, latents, references", "mesh", "remat, tiles", "GiB a chip", "spare", "repeated FLOPs")
    rows: list[Sequence[str]] = [
        (*names, "compute, links at least", "CPU time to compile"),
        ("---",) * (len(names) + 2),
    ]
    for report in reports:
        work, sizes = report["tflops"], report["memory_gib"]
        slices = f" x {report['slices']}" if report["slices"] > 1 else ""
        kept = f"`{report['remat']}`" + (" + offload" if report["offload"] else "")
        kept += ", 16-bit stream" if report["residual_dtype"] == "bfloat16" else ""
        usual = dataclasses.asdict(AttentionTiles())
        kept += "".join(f", {name} {value}" for name, value in report["tiles"].items() if value != usual[name])
        bounds = report.get("bound_seconds")
        rows.append(
            (
                f"{report['step']}, {report['parameters'] / 1e9:.1f}e9 on {report['topology']}{slices}"
                + (", with flags" if report["flags"] else ""),
                f"{report['batch']}, {'x'.join(map(str, report['latent_grid']))}, {report['references']}",
                ", ".join(f"{name} {size}" for name, size in report["mesh"].items() if size > 1),
                kept if report["step"] == "train" else "",
                f"{sizes['total']:.1f} of {sizes['chip']:.2f}",
                f"{100 * report['spare']:.1f}%" if report["fits"] else "does not fit",
                f"{100 * (work['hardware'] / work['model'] - 1):.0f}%",
                f"{bounds['compute']:.1f} s, {bounds['links']:.1f} s" if bounds else "",
                f"{report['compile_cpu_seconds']:.0f} s" if "compile_cpu_seconds" in report else "",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def candidates(config: Config, chips: int) -> Iterator[Config]:
    """Recipes of every mesh that fits chips, batch and heads, each with every remat policy, least repeated first."""
    policies: tuple[RematPolicy, ...] = get_args(RematPolicy)
    batch, heads = config.data.batch_size // config.optimizer.accumulation, config.model.dit.num_heads
    for context, tensor in itertools.product(range(1, heads + 1), repeat=2):
        rest = chips // (context * tensor)
        if heads % (context * tensor) or chips % (context * tensor) or rest % config.mesh.slices or batch % rest:
            continue
        mesh = dataclasses.replace(
            config.mesh, data=config.mesh.slices, fsdp=rest // config.mesh.slices, context=context, tensor=tensor
        )
        for remat in policies:
            dit: DiTConfig = dataclasses.replace(config.model.dit, remat=remat, offload=False)
            yield dataclasses.replace(config, mesh=mesh, model=dataclasses.replace(config.model, dit=dit))


def sweep(config: Config, topology: str, step: Step = "train") -> Iterator[dict[str, Any]]:
    """Compiles the candidates and yields each report; of a mesh, up to the first policy that fits."""
    chips = topology_mesh(dataclasses.replace(config.mesh, data=0, fsdp=1, context=1, tensor=1), topology).size
    fitting: set[MeshConfig] = set()
    for candidate in candidates(config, chips):
        if candidate.mesh in fitting:
            continue
        report = compile_ahead(candidate, topology, step)
        if report["fits"]:
            fitting.add(candidate.mesh)
        yield report


def ranked(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that fit, the fastest by its bounds first: a step takes at least the longest of compute and links."""
    fitting = [report for report in reports if report["fits"]]
    return sorted(fitting, key=lambda r: max(r["bound_seconds"][name] for name in ("compute", "links")))


def parameter_table(config: Config, topology: str = "") -> str:
    """Every parameter's shape, how it is split, and the bytes a device holds of it in float32.

    Args:
      config: model and mesh.
      topology: of the mesh; empty, as many devices as the mesh has.
    """
    if topology:
        mesh: Any = topology_mesh(config.mesh, topology)
    else:
        sizes = (config.mesh.data or 1, config.mesh.fsdp, config.mesh.context, config.mesh.tensor)
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
    return "\n".join([*lines, f"{total:,} bytes a device in float32; moments take twice that, an EMA once more."])


def _needed(message: str) -> float | None:
    """GiB that the compiler says it needed where memory did not suffice."""
    match = re.search(r"Used ([\d.]+)([KMGT])\w* of|required for HLO temporaries \(([\d.]+)([KMGT])", message)
    if match is None:
        return None
    size, unit = match[1] or match[3], match[2] or match[4]
    return round(float(size) * {"K": 2**-20, "M": 2**-10, "G": 1, "T": 2**10}[unit], 3)
