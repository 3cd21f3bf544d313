"""Compilation for devices that need not exist: what a step needs and what bounds it, before anyone pays for them.

The compilers of TPUs and of NVIDIA GPUs run on any host (`topology`). They report the memory. FLOPs are counted from
sizes (`flops`), since XLA sees neither into kernels nor how often a loop runs. Collectives are read from the optimised
program (`hlo`), and so are the bytes that it moves to and from memory (`traffic`).

    compute  hardware FLOPs per device / peak       the model's FLOPs and those computed twice
    links    bytes received / bandwidth             half of the link bandwidth, which vendors state for both directions

A step takes at least as long as either. A GPU's compiler has no GPU to ask here, so that some things stay open: see
`GPU_LIMITS`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from refalign_jax import flops
from refalign_jax.atomic import write_text
from refalign_jax.config import Config, QuantisedDType
from refalign_jax.devices import GIB, XLA_FLAGS, Chip
from refalign_jax.initial import model_shapes
from refalign_jax.models.gradients import is_alone
from refalign_jax.models.quantise import quantise_shapes
from refalign_jax.perf import hlo, traffic
from refalign_jax.perf.progress import progress
from refalign_jax.perf.stages import lower_stage, stage_params
from refalign_jax.perf.topology import is_gpu, known_chip, topology_mesh, usable_gib
from refalign_jax.provenance import about
from refalign_jax.sampling import num_forwards, sample
from refalign_jax.sharding import check_batch, check_heads, place_shapes, replicated
from refalign_jax.trainer.preflight import synthetic_spec
from refalign_jax.trainer.state import state_shapes
from refalign_jax.trainer.step import batch_shapes, lower_step
from refalign_jax.trees import count

Step = Literal["train", "sample", "text", "decode"]
HLO_FILE = "optimized.hlo.txt"
"""Name of the optimised program in the folder of a dump."""

GPU_LIMITS = (
    "matrix products are not tuned and cuDNN is not asked, which a GPU does when it compiles; the CUDA context and "
    "NCCL's buffers are not in the memory; no time is predicted beyond the lower bounds"
)
"""What a report on GPUs does not know."""

BOUNDS = ("compute", "links")
"""What bounds the time of a step from below."""


def lower(config: Config, mesh: Mesh, step: Step, quantised: QuantisedDType | None = None) -> jax.stages.Lowered:
    """Lowers one step from shapes alone, of sampling the whole loop; arguments as in `compile_ahead`."""
    dit, data = config.model.dit, config.data
    check_batch(data.batch_size, config.optimizer.accumulation if step == "train" else 1, mesh)
    if step in ("text", "decode"):
        return lower_stage(config, mesh, step, quantised)
    check_heads(dit, mesh)
    batch = batch_shapes(config, synthetic_spec(config), mesh)
    if step == "train":
        empty = jax.ShapeDtypeStruct(batch.text.shape[1:], jnp.float32, sharding=replicated(mesh))
        return lower_step(state_shapes(config, mesh), batch, empty, config, mesh)
    dtype = jnp.dtype("float32" if quantised else dit.compute_dtype)
    params = place_shapes({"dit": model_shapes(config.model)["dit"]}, mesh, dtype)["dit"]
    if quantised:
        params = quantise_shapes(params, quantised)
    video = batch.video_latents
    noise = jax.ShapeDtypeStruct(video.shape, jnp.float32, sharding=video.sharding)
    with jax.set_mesh(mesh):
        return sample.lower(params, noise, batch.condition, batch.condition, dit=dit, config=config.sampling)


def compile_ahead(
    config: Config,
    topology: str,
    step: Step = "train",
    dump: Path | None = None,
    flags: bool = False,
    quantised: QuantisedDType | None = None,
) -> dict[str, Any]:
    """Compiles a step for a topology and reports on it. Prints progress on stderr.

    Args:
      config: the recipe; `synthetic.latent_grid`, `data.max_references` and `data.text_length` are the shape.
      topology: see `topology.topology_mesh`.
      step: the training step, the sampling of one batch, or what sampling does before and after it.
      dump: a folder for the text of the optimised program.
      flags: whether to compile with the platform's flags in `devices.XLA_FLAGS`.
      quantised: dtype of the quantised weights of sampling, whose other parameters are float32 then, or of the text
        encoder; None for all parameters of the transformer in the compute dtype.

    Returns:
      What `tables.summary` prints, ready for JSON. Where memory is too small, `fits` is False, memory_gib has only what
      the compiler needed in total (or for temporaries, where it reports no more), and nothing is reported about the
      program.

    Raises:
      ValueError: the topology or its chip is not known, cuDNN's library is missing for GPUs, or mesh, batch and heads
        do not fit each other.
    """
    mesh = topology_mesh(config.mesh, topology)
    known, gpu = known_chip(mesh, topology), is_gpu(mesh)
    usable, options = usable_gib(mesh, known), XLA_FLAGS["gpu" if gpu else "tpu"] if flags else {}
    report = describe(config, mesh, known, topology, step)
    report |= {"weights_dtype": quantised, "flags": dict(options), "about": about()}
    began = time.perf_counter()
    with progress(f"lowering the {step} step"), _asking_for_cudnn(topology):
        lowered = lower(config, mesh, step, quantised)
    report["lower_seconds"] = round(time.perf_counter() - began, 1)
    began, busy = time.perf_counter(), time.process_time()
    try:
        with progress(f"compiling it for {topology}"):
            compiled, text = _compile_gpu(lowered, options) if gpu else _compile_tpu(lowered, options)
    except jax.errors.JaxRuntimeError as error:
        needed = needed_gib(str(error))
        if needed is None:
            raise
        report["compile_seconds"] = round(time.perf_counter() - began, 1)
        return report | {"memory_gib": {"total": needed, "device": usable}, "fits": False}
    report["compile_seconds"] = round(time.perf_counter() - began, 1)
    report["compile_cpu_seconds"] = round(time.process_time() - busy, 1)  # summed over all threads
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        write_text(dump / HLO_FILE, text)
    program = hlo.parse(text)
    moved, report["passes"] = hlo.collectives(program), traffic.measure(program)
    found = bounds(moved, report["tflops"]["hardware_a_device"], known) if report["tflops"] else {}
    return report | found | memory(compiled, usable)


@contextlib.contextmanager
def _asking_for_cudnn(topology: str) -> Iterator[None]:
    """Raises in one sentence, as a ValueError, that cuDNN's library is missing."""
    try:
        yield
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        raise ValueError(
            f"--topology {topology!r} needs cuDNN's library ({error}): pip install -e '.[ahead-gpu]'."
        ) from error


def bounds(moved: hlo.Collectives, tflops: float, known: Chip) -> dict[str, Any]:
    """Returns the collectives of a step, the seconds that it takes at least, and which of them is the longest.

    Args:
      moved: collectives of one device.
      tflops: operations of one device, 10^12.
      known: the device.
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


def _compile_gpu(lowered: jax.stages.Lowered, flags: Mapping[str, str]) -> tuple[jax.stages.Compiled, str]:
    """Returns the program and its optimised text; XLA's GPU options are typed."""
    options = {name: {"true": True, "false": False}.get(value, value) for name, value in flags.items()}
    compiled = lowered.compile(compiler_options=options)
    text = compiled.as_text()
    assert text is not None
    return compiled, text


def _compile_tpu(lowered: jax.stages.Lowered, flags: Mapping[str, str]) -> tuple[jax.stages.Compiled, str]:
    """Returns the program and its optimised text as libtpu dumps it: jaxlib cannot print all of its instructions."""
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, **flags}
        compiled = lowered.compile(compiler_options=options)
        (path,) = Path(folder).glob("*.after_optimizations.txt")
        return compiled, path.read_text()


def describe(config: Config, mesh: Mesh, known: Chip, topology: str, step: Step) -> dict[str, Any]:
    """Returns what is compiled, and the FLOPs of one step on all devices and per device; None of an encoder's."""
    dit, data = config.model.dit, config.data
    shape = flops.Shape(grid=config.synthetic.latent_grid, references=data.max_references, text_length=data.text_length)
    if step == "train":
        kernel: flops.Kernel = "cudnn" if is_gpu(mesh) else "splash"
        with jax.set_mesh(mesh):
            alone = is_alone(data.batch_size // config.optimizer.accumulation)
        model = flops.train_flops(config.model, shape)
        again = flops.repeated_flops(config.model, shape, kernel, alone)
        attention = flops.attention_flops(config.model, shape, kernel)
    else:
        forwards = num_forwards(config.sampling, shape.references > 0)
        model, again = flops.sample_flops(dit, shape, forwards), 0
        attention = flops.sample_attention_flops(dit, shape, forwards)
    params = stage_params(config, step)[1] if step in ("text", "decode") else model_shapes(config.model)["dit"]
    return {
        "step": step,
        "topology": topology,
        "slices": config.mesh.slices,
        "devices": mesh.size,
        "chips": mesh.size // known.devices_per_chip,
        "device": known.kind,
        "platform": "gpu" if is_gpu(mesh) else "tpu",
        "mesh": dict(mesh.shape),
        "batch": data.batch_size,
        "latent_grid": list(shape.grid),
        "references": shape.references,
        "remat": dit.remat,
        "offload": dit.offload,
        "residual_dtype": dit.residual_dtype,
        "tiles": dataclasses.asdict(dit.tiles),
        "parameters": count(params),
        "tflops": None
        if step in ("text", "decode")
        else {
            "model_a_sample": round(model / 1e12, 2),
            "model": round(model * data.batch_size / 1e12, 2),
            "hardware": round((model + again) * data.batch_size / 1e12, 2),
            "hardware_a_device": round((model + again) * data.batch_size / mesh.size / 1e12, 3),
            "attention_a_device": round(attention * data.batch_size / mesh.size / 1e12, 3),
        },
    }


def memory(compiled: jax.stages.Compiled, usable: float) -> dict[str, Any]:
    """Returns the memory that one device needs in GiB, by kind, and whether that is at most `usable`."""
    found: Any = compiled.memory_analysis()
    sizes = {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "outputs_not_in_place": found.output_size_in_bytes - found.alias_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
    }
    total = sum(sizes.values()) / GIB
    listed = {name: round(size / GIB, 3) for name, size in sizes.items()}
    listed |= {"total": round(total, 3), "device": usable, "host": round(found.host_temp_size_in_bytes / GIB, 3)}
    return {"memory_gib": listed, "spare": round(1 - total / usable, 4), "fits": total <= usable}


def needed_gib(message: str) -> float | None:
    """Returns the GiB that the program needs according to the compiler's error, or None if it is another error."""
    match = re.search(r"Used ([\d.]+)([KMGT])\w* of|required for HLO temporaries \(([\d.]+)([KMGT])", message)
    if match is None:
        return None
    size, unit = match[1] or match[3], match[2] or match[4]
    return round(float(size) * {"K": 2**-20, "M": 2**-10, "G": 1, "T": 2**10}[unit], 3)
