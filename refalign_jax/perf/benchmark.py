"""What a step costs on the devices present: time, FLOP/s, memory, and time by operation.

A training step is the trainer's own: its program, its loader and synthetic examples, timed from one step's metrics to
the next's. Sampling is the program that draws videos. Settings are measured in turns, so that whatever else the machine
does meets all of them:

    for repeat: for setting: make the state anew, run some steps, time more of them together

    MFU = FLOPs of the model / (seconds · devices · peak of a device)      (flops.py; what is repeated isn't counted)

Time by operation is read from one profile: every operation on a device is an instruction of the optimised HLO, whose
metadata tells the named scopes that it comes from.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from refalign_jax import flops
from refalign_jax.config import AttentionKernel, Config, Mode, Plan
from refalign_jax.data.loader import make_loader
from refalign_jax.devices import peak_flops
from refalign_jax.initial import random_params
from refalign_jax.models.attention import attention
from refalign_jax.perf import hlo
from refalign_jax.sampling import sample
from refalign_jax.sharding import BATCH, check_batch, check_heads, make_mesh, replicated
from refalign_jax.trainer import preflight
from refalign_jax.trainer.preflight import example_shape
from refalign_jax.trainer.state import init_state, state_shapes
from refalign_jax.trainer.step import as_batch, compile_step
from refalign_jax.types import Array, Float

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
"""Names under which time is told, and the parts of an operation's path that belong to each; first match."""

CONTAINERS = ("while", "conditional", "call")
"""Instructions whose time is that of others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runner:
    """One setting, compiled.

    Attributes:
      config: the setting.
      program: its compiled program.
      compile_seconds: what compiling took.
      flops: of the model, in one run of the program.
      session: a context, within which each call of what it gives is one run of the program, not waited for; leaving it
        frees the devices' memory.
    """

    config: Config
    program: jax.stages.Compiled
    compile_seconds: float
    flops: int
    session: Callable[[], contextlib.AbstractContextManager[Callable[[], Any]]]


def compiled(config: Config, mode: Mode) -> Runner:
    """Compiles one setting.

    Raises:
      ValueError: a mesh or batch that doesn't fit the devices or the model.
    """
    mesh = make_mesh(config.mesh)
    check_batch(config.data.batch_size, config.optimizer.accumulation, mesh)
    check_heads(config.model.dit, mesh)
    return _train_runner(config, mesh) if mode == "train" else _sample_runner(config, mesh)


def _train_runner(config: Config, mesh: Mesh) -> Runner:
    """The trainer's step; a run of it is a turn of the trainer's loop, and returns metrics."""
    source = preflight.open_source(config)
    empty_text = jax.device_put(preflight.empty_text(config, source), replicated(mesh))

    def loader() -> Any:
        index, count = jax.process_index(), jax.process_count()
        return contextlib.closing(
            make_loader(config.data, source, split="train", process_index=index, process_count=count)
        )

    with loader() as rows:
        batch = as_batch(next(rows), mesh)
    shapes = state_shapes(config, mesh)
    program: Any
    program, about = compile_step(shapes, batch, empty_text, config, mesh)
    fresh = jax.jit(
        lambda key: init_state(random_params(config.model, key), key, config),
        out_shardings=jax.tree.map(lambda x: x.sharding, shapes),
    )

    @contextlib.contextmanager
    def session() -> Iterator[Callable[[], Any]]:
        state = fresh(jax.random.key(0))
        with loader() as rows:

            def step() -> Any:
                nonlocal state
                state, metrics = program(state, as_batch(next(rows), mesh), empty_text)
                return metrics

            yield step

    counted = config.data.batch_size * flops.train_flops(config.model, example_shape(config, source))
    seconds = about["compile_seconds"]
    return Runner(config=config, program=program, compile_seconds=seconds, flops=counted, session=session)


def _sample_runner(config: Config, mesh: Mesh) -> Runner:
    """Drawing videos for a batch of random prompts and references; a run of it returns their latents."""
    dit, data, grid, B = config.model.dit, config.data, config.synthetic.latent_grid, config.data.batch_size
    sizes = {
        "noise": (B, *grid, dit.latent_channels),
        "text": (B, data.text_length, dit.text_width),
        "negative_text": (B, data.text_length, dit.text_width),
        "reference_latents": (B, data.max_references, *grid[1:], dit.latent_channels),
    }
    draw = jax.jit(jax.random.normal, static_argnums=1, out_shardings=NamedSharding(mesh, BATCH))
    inputs = {name: draw(jax.random.key(i), size) for i, (name, size) in enumerate(sizes.items())}
    shapes = state_shapes(config, mesh).params["dit"]
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        program = sample.lower(shapes, **inputs, dit=dit, config=config.sampling).compile()
    seconds = time.perf_counter() - began
    fresh = jax.jit(
        lambda key: random_params(config.model, key)["dit"],
        out_shardings=jax.tree.map(lambda x: x.sharding, shapes),
    )

    @contextlib.contextmanager
    def session() -> Iterator[Callable[[], Any]]:
        params = fresh(jax.random.key(0))
        yield lambda: program(params, **inputs)

    shape = flops.Shape(grid=grid, references=data.max_references, text_length=data.text_length)
    counted = B * flops.sample_flops(dit, shape, config.sampling.num_steps)
    return Runner(config=config, program=program, compile_seconds=seconds, flops=counted, session=session)


def measure(settings: Mapping[str, Config], mode: Mode, plan: Plan) -> dict[str, dict[str, Any]]:
    """Measures settings beside each other.

    Args:
      settings: configurations by name.
      mode: the training step, or drawing a batch of videos.
      plan: how often.

    Returns:
      Of each setting what `told` says of it; where several are measured, all but the first have "ratio": median, least
      and largest of its time over the first's, turn by turn.

    Raises:
      ValueError: as in `compiled`.
    """
    runners = {name: compiled(config, mode) for name, config in settings.items()}
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    memory: dict[str, int | None] = {}
    for _ in range(plan.repeats):
        for name, runner in runners.items():
            seconds[name].append(_timed(runner, plan))
            memory[name] = _peak_memory()
    results = {name: told(runner, seconds[name], memory[name]) for name, runner in runners.items()}
    first, *others = settings
    for name in others:
        results[name]["ratio"] = spread([b / a for a, b in zip(seconds[first], seconds[name], strict=True)])
    for name, runner in runners.items() if plan.profile else ():
        results[name]["scopes"] = profile(runner, plan)
    return results


def told(runner: Runner, seconds: Sequence[float], peak_memory: int | None) -> dict[str, Any]:
    """What is known of one setting: time of a step or batch, FLOP/s, MFU, memory a device, kernels."""
    devices = jax.devices()
    time_, peak = spread(seconds), runner.config.train.peak_tflops * 1e12 or peak_flops(devices[0].device_kind)
    rate = runner.flops / time_["median"] / len(devices)
    analysis = runner.program.memory_analysis()
    plans = ("argument", "output", "alias", "temp")
    return {
        "seconds": time_,
        "samples_per_second": runner.config.data.batch_size / time_["median"],
        "model_tflop": runner.flops / 1e12,
        "tflops_per_device": rate / 1e12,
        "peak_tflops": peak and peak / 1e12,
        "mfu": peak and rate / peak,
        "compile_seconds": runner.compile_seconds,
        "planned_bytes": {name: getattr(analysis, f"{name}_size_in_bytes") for name in plans} if analysis else None,
        "peak_bytes": peak_memory,
        "kernels": dict(hlo.kernels(hlo.parse(runner.program.as_text() or ""))),
        "config": dataclasses.asdict(runner.config),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and largest of some numbers, and the numbers."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": list(values)}


def profile(runner: Runner, plan: Plan) -> dict[str, dict[str, float]]:
    """Seconds of a device in one run of the program, by scope and by phase, see `scope_of` and `phase_of`.

    On a CPU, whose threads share the work, it is the sum over the threads.
    """
    with runner.session() as step, tempfile.TemporaryDirectory() as folder:
        for _ in range(max(plan.warmup, 1)):
            jax.block_until_ready(step())
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        jax.profiler.start_trace(folder, profiler_options=options)
        for _ in range(plan.profile):
            jax.block_until_ready(step())
        jax.profiler.stop_trace()
        times = operations(Path(folder), runner.program.as_text() or "")
    share = plan.profile * jax.local_device_count()
    return by_scope(runner.program.as_text() or "", {name: t / share for name, t in times.items()})


def operations(folder: Path, text: str) -> dict[str, float]:
    """Seconds of each instruction of one program in a profile, over all devices.

    Args:
      folder: where `jax.profiler` wrote.
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
            # a TPU tells the same time under several headings
            for line in [line for line in lines if line.name == "XLA Ops"] or lines:
                for event in line.events:
                    stats = dict(event.stats)
                    if "hlo_op" in stats and str(stats.get("hlo_module", module)).startswith(module):
                        total[str(stats["hlo_op"])] += event.duration_ns / 1e9
    return dict(total)


def by_scope(text: str, times: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Sums the seconds of instructions by the named scopes that they come from.

    Args:
      text: optimised HLO.
      times: seconds by instruction.

    Returns:
      By scope, seconds by phase.
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
    """Which of `SCOPES` an operation's path lies in; "rest" if none."""
    parts = path.split(";")[0].split("/")
    found = (name for name, pattern in SCOPES if any(re.fullmatch(pattern, part) for part in parts))
    return next(found, "rest")


def phase_of(path: str) -> str:
    """Whether an operation is of the forward pass, of the backward pass, of what that repeats, or of neither."""
    marks = (("rematted_computation", "repeated"), ("transpose(", "backward"), ("jvp(", "forward"))
    return next((phase for mark, phase in marks if mark in path), "neither")


def attention_difference(
    kernels: tuple[AttentionKernel, AttentionKernel], tokens: int, heads: int = 12, head_width: int = 128
) -> tuple[float, float]:
    """Relative difference ‖a − b‖ / ‖b‖ of two kernels in bfloat16: of what they return, and of the worst gradient.

    Args:
      kernels: a and b.
      tokens: queries, and keys, of which the last eighth is padding.
      heads: N.
      head_width: K.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weight = (jax.random.normal(key, (1, tokens, heads, head_width), jnp.bfloat16) for key in keys)
    lengths = jnp.array([tokens - tokens // 8])

    def loss(inputs: tuple[Array, Array, Array], kernel: AttentionKernel) -> tuple[Array, Array]:
        out = attention(*inputs, lengths, kernel)
        return jnp.sum(out.astype(jnp.float32) * weight), out

    def both(kernel: AttentionKernel) -> tuple[Array, ...]:
        gradients, out = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)((q, k, v), kernel)
        return (out, *gradients)

    a, b = map(both, kernels)
    forward, *backward = (_relative(x, y) for x, y in zip(a, b, strict=True))
    return forward, max(backward)


def _relative(a: Float[Array, "*sizes"], b: Float[Array, "*sizes"]) -> float:
    x, y = (np.asarray(value, np.float64) for value in (a, b))
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def _timed(runner: Runner, plan: Plan) -> float:
    """Seconds of one run of the program, over `plan.steps` of them; each is read when the next is under way."""
    with runner.session() as step:
        for _ in range(plan.warmup):
            jax.block_until_ready(step())
        unread: Any = None
        began = time.perf_counter()
        for _ in range(plan.steps):
            new = step()
            jax.block_until_ready(unread)
            unread = new
        jax.block_until_ready(unread)
        return (time.perf_counter() - began) / plan.steps


def _peak_memory() -> int | None:
    """The most bytes that a device of this process has held until now; None where that isn't told."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)


def lines(title: str, result: Mapping[str, Any]) -> list[str]:
    """What `measure` found of one setting, to be printed."""
    seconds, peak = result["seconds"], result["peak_tflops"]
    mfu = f"MFU {result['mfu']:.1%} of {peak:g} TFLOP/s" if peak else "peak not known, so no MFU"
    planned = result["planned_bytes"]
    needed = f"{(planned['argument'] + planned['temp']) / 2**30:.3f} GiB planned" if planned else "memory not planned"
    held = f", {result['peak_bytes'] / 2**30:.3f} GiB held at most" if result["peak_bytes"] else ""
    text = [
        f"{title}: {seconds['median']:.4g} s ({seconds['min']:.4g} to {seconds['max']:.4g}), "
        f"{result['tflops_per_device']:.4g} TFLOP/s a device, {mfu}; a device: {needed}{held}; "
        f"compiled in {result['compile_seconds']:.1f} s"
    ]
    if "ratio" in result:
        ratio = result["ratio"]
        text.append(f"  time over the first's: {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})")
    scopes = result.get("scopes", {})
    total = sum(sum(phases.values()) for phases in scopes.values())
    for scope, phases in sorted(scopes.items(), key=lambda item: -sum(item[1].values())):
        shares = ", ".join(f"{phase} {seconds / total:.1%}" for phase, seconds in sorted(phases.items()))
        text.append(f"  {scope:20} {sum(phases.values()) / total:6.1%}   {shares}")
    return text
