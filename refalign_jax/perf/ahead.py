"""Compilation for a TPU slice that need not exist: what a step needs and what bounds it, before anyone pays for one.

The TPU compiler comes with libtpu and runs on any host. It reports the memory. FLOPs are counted from sizes (`flops`),
since XLA sees neither into kernels nor how often a loop runs. Collectives are read from the optimised program (`hlo`).

    compute  hardware FLOPs per chip / peak         the model's FLOPs and those computed twice
    links    bytes received / bandwidth             half of the link bandwidth, which vendors state for both directions

A step takes at least as long as either.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import tempfile
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from refalign_jax import flops
from refalign_jax.atomic import write_text
from refalign_jax.config import Config, DiTConfig, MeshConfig, RematPolicy
from refalign_jax.devices import GIB, Chip, chip
from refalign_jax.initial import model_shapes
from refalign_jax.perf import hlo
from refalign_jax.perf.progress import progress
from refalign_jax.provenance import about
from refalign_jax.sampling import sample
from refalign_jax.sharding import check_batch, check_heads, make_mesh, place_shapes, replicated
from refalign_jax.trainer.preflight import synthetic_spec
from refalign_jax.trainer.state import state_shapes
from refalign_jax.trainer.step import batch_shapes, lower_step
from refalign_jax.trees import count

Step = Literal["train", "sample"]
HLO_FILE = "optimized.hlo.txt"
"""Name of the optimised program in the folder of a dump."""

BOUNDS = ("compute", "links")
"""What bounds the time of a step from below."""


def topology_mesh(config: MeshConfig, topology: str) -> Mesh:
    """Returns the configured mesh over a TPU slice, or over `config.slices` of them, that need not exist.

    Args:
      config: the mesh.
      topology: of one slice, such as v5p:4x4x4, v5e:16x16, v6e:8x8. The variables in `devices.NO_TPU` must be in the
        environment before JAX is imported, so that libtpu does not look for a TPU.

    Raises:
      ValueError: libtpu is missing, it does not support the topology, or the mesh does not fit its chips.
    """
    if not re.fullmatch(r"[^:]+:[1-9]\d*(x[1-9]\d*)*", topology):
        raise ValueError(f"--topology {topology!r} can't be used; give one such as v5p:4x4x4 or v5e:16x16.")
    more = {"num_slices": config.slices} if config.slices > 1 else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    except Exception as error:  # libtpu is missing, or refuses the topology with one of several exceptions
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--topology {topology!r} can't be used ({reason:.200}); give one such as v5p:4x4x4 or v5e:16x16, with "
            "libtpu installed (pip install libtpu)."
        ) from error
    return make_mesh(config, list(described.devices))


def known_chip(mesh: Mesh, topology: str) -> Chip:
    """Returns the table's entry for the chips of a mesh.

    Raises:
      ValueError: the table has none.
    """
    kind = mesh.devices.flat[0].device_kind
    found = chip(kind)
    if found is None:
        raise ValueError(
            f"--topology {topology!r} has chips of kind {kind!r}, whose peak, memory and bandwidth are not in CHIPS of "
            "refalign_jax/devices.py; add them there."
        )
    return found


def lower(config: Config, mesh: Mesh, step: Step) -> jax.stages.Lowered:
    """Lowers the training step, or the whole sampling loop, from shapes alone."""
    dit, data = config.model.dit, config.data
    check_heads(dit, mesh)
    check_batch(data.batch_size, config.optimizer.accumulation if step == "train" else 1, mesh)
    batch = batch_shapes(config, synthetic_spec(config), mesh)
    if step == "train":
        empty = jax.ShapeDtypeStruct(batch.text.shape[1:], jnp.float32, sharding=replicated(mesh))
        return lower_step(state_shapes(config, mesh), batch, empty, config, mesh)
    params = place_shapes({"dit": model_shapes(config.model)["dit"]}, mesh, jnp.dtype(dit.compute_dtype))["dit"]
    video = batch.video_latents
    noise = jax.ShapeDtypeStruct(video.shape, jnp.float32, sharding=video.sharding)
    with jax.set_mesh(mesh):
        return sample.lower(params, noise, batch.condition, batch.condition, dit=dit, config=config.sampling)


def compile_ahead(
    config: Config,
    topology: str,
    step: Step = "train",
    dump: Path | None = None,
    flags: Mapping[str, str] = types.MappingProxyType({}),
) -> dict[str, Any]:
    """Compiles a step for a topology and reports on it. Prints progress on stderr.

    Args:
      config: the recipe; `synthetic.latent_grid`, `data.max_references` and `data.text_length` are the shape.
      topology: see `topology_mesh`.
      step: the training step, or the sampling of one batch.
      dump: a folder for the text of the optimised program.
      flags: options of the compiler, such as `devices.XLA_FLAGS["tpu"]`.

    Returns:
      What `tables.summary` prints, ready for JSON. Where memory is too small, `fits` is False, memory_gib has only what
      the compiler needed in total (or for temporaries, where it reports no more), and nothing is reported about the
      program.

    Raises:
      ValueError: the topology or its chip is not known, or mesh, batch and heads do not fit each other.
    """
    mesh = topology_mesh(config.mesh, topology)
    known = known_chip(mesh, topology)
    report = describe(config, mesh, known, topology, step) | {"flags": dict(flags), "about": about()}
    began = time.perf_counter()
    with progress(f"lowering the {step} step"):
        lowered = lower(config, mesh, step)
    report["lower_seconds"] = round(time.perf_counter() - began, 1)
    began, busy = time.perf_counter(), time.process_time()
    try:
        with progress(f"compiling it for {topology}"):
            compiled, text = _compile(lowered, flags)
    except jax.errors.JaxRuntimeError as error:
        needed = needed_gib(str(error))
        if needed is None:
            raise
        report["compile_seconds"] = round(time.perf_counter() - began, 1)
        return report | {"memory_gib": {"total": needed, "chip": known.hbm_gib}, "fits": False}
    report["compile_seconds"] = round(time.perf_counter() - began, 1)
    report["compile_cpu_seconds"] = round(time.process_time() - busy, 1)  # summed over all threads
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        write_text(dump / HLO_FILE, text)
    moved = hlo.collectives(hlo.parse(text))
    return report | bounds(moved, report["tflops"]["hardware_a_chip"], known) | memory(compiled, known)


def bounds(moved: hlo.Collectives, tflops: float, known: Chip) -> dict[str, Any]:
    """Returns the collectives of a step, the seconds that it takes at least, and which of them is the longest.

    Args:
      moved: collectives of one chip.
      tflops: operations of one chip, 10^12.
      known: the chip.
    """
    seconds = {
        "compute": round(tflops / known.tflops, 4),
        "links": round(2 * sum(moved.received.values()) / known.link_gbps / 1e9, 4),
    }
    return {
        "collectives": {
            kind: {"count": moved.count[kind], "gb": round(moved.received[kind] / 1e9, 3)}
            for kind in sorted(moved.count)
        },
        "bound_seconds": seconds,
        "bound_by": max(seconds, key=seconds.__getitem__),
    }


def _compile(lowered: jax.stages.Lowered, flags: Mapping[str, str]) -> tuple[jax.stages.Compiled, str]:
    """Returns the program and its optimised text as libtpu dumps it: jaxlib cannot print all of its instructions."""
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, **flags}
        compiled = lowered.compile(compiler_options=options)
        (path,) = Path(folder).glob("*.after_optimizations.txt")
        return compiled, path.read_text()


def describe(config: Config, mesh: Mesh, known: Chip, topology: str, step: Step) -> dict[str, Any]:
    """Returns what is compiled, and the FLOPs of one step on all chips and per chip."""
    dit, data = config.model.dit, config.data
    shape = flops.Shape(grid=config.synthetic.latent_grid, references=data.max_references, text_length=data.text_length)
    if step == "train":
        model, again = flops.train_flops(config.model, shape), flops.repeated_flops(config.model, shape, "splash")
    else:
        model, again = flops.sample_flops(dit, shape, config.sampling), 0
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
    """Returns the memory that one chip needs in GiB, by kind, and whether the chip has it."""
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


def candidates(config: Config, chips: int) -> Iterator[Config]:
    """Yields recipes of every mesh that fits chips, batch and heads, each with every remat policy.

    The policies that recompute least come first.
    """
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
    """Compiles the candidates and yields each report; for each mesh, up to the first policy that fits."""
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
    """Returns the reports of what fits, the one with the lowest bound on its time first."""
    fitting = [report for report in reports if report["fits"]]
    return sorted(fitting, key=lambda r: max(r["bound_seconds"][name] for name in BOUNDS))


def needed_gib(message: str) -> float | None:
    """Returns the GiB that the program needs according to the compiler's error, or None if it is another error."""
    match = re.search(r"Used ([\d.]+)([KMGT])\w* of|required for HLO temporaries \(([\d.]+)([KMGT])", message)
    if match is None:
        return None
    size, unit = match[1] or match[3], match[2] or match[4]
    return round(float(size) * {"K": 2**-20, "M": 2**-10, "G": 1, "T": 2**10}[unit], 3)
