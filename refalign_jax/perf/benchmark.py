"""What a step costs on the devices present: time, FLOP/s, memory, and time by operation.

A training step is the trainer's own: its program, its loader and synthetic examples, timed from one step's metrics to
the next's. A sampling step is the program that samples a batch of videos. Settings are measured in turns, so that
whatever else slows the machine affects all of them:

    for repeat: for setting: make the state, run some steps, time more of them together

    MFU = FLOPs of the model / (seconds · devices · peak of a device)      (see `flops`; recomputation does not count)
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from refalign_jax import flops
from refalign_jax.config import Config, Mode, Plan
from refalign_jax.data.loader import BatchIterator
from refalign_jax.devices import peak_flops
from refalign_jax.initial import random_params
from refalign_jax.models.condition import Condition
from refalign_jax.perf import hlo
from refalign_jax.perf.profile import profile
from refalign_jax.perf.progress import progress
from refalign_jax.sampling import num_forwards, sample
from refalign_jax.sharding import BATCH, check_batch, check_heads, make_mesh, replicated
from refalign_jax.trainer import preflight
from refalign_jax.trainer.preflight import example_shape, open_loader
from refalign_jax.trainer.state import init_state, state_shapes
from refalign_jax.trainer.step import as_batch, batch_shapes, compile_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runner:
    """One compiled setting.

    Attributes:
      config: the setting.
      program: its compiled program.
      compile_seconds: time that compiling took.
      flops: of the model, in one run of the program.
      session: returns a context that yields a function. Each call of the function starts one run of the program and
        returns its result without waiting for it. Leaving the context frees the devices' memory.
    """

    config: Config
    program: jax.stages.Compiled
    compile_seconds: float
    flops: int
    session: Callable[[], contextlib.AbstractContextManager[Callable[[], Any]]]


def compiled(config: Config, mode: Mode) -> Runner:
    """Compiles one setting.

    Raises:
      ValueError: the mesh or batch does not fit the devices or the model.
    """
    mesh = make_mesh(config.mesh)
    check_batch(config.data.batch_size, config.optimizer.accumulation, mesh)
    check_heads(config.model.dit, mesh)
    return _train_runner(config, mesh) if mode == "train" else _sample_runner(config, mesh)


def _train_runner(config: Config, mesh: Mesh) -> Runner:
    """Compiles the training step; one run is one turn of the trainer's loop and returns its metrics."""
    source = preflight.open_source(config)
    empty_text = jax.device_put(preflight.empty_text(config, source), replicated(mesh))

    def loader() -> contextlib.closing[BatchIterator]:
        return contextlib.closing(open_loader(config, source, "train"))

    shapes = state_shapes(config, mesh)
    program: Any
    program, about = compile_step(shapes, batch_shapes(config, source.spec, mesh), empty_text, config, mesh)
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
                state, metrics = program(state, as_batch(next(rows), config, source.spec, mesh), empty_text)
                return metrics

            yield step

    counted = config.data.batch_size * flops.train_flops(config.model, example_shape(config, source))
    seconds = about["compile_seconds"]
    return Runner(config=config, program=program, compile_seconds=seconds, flops=counted, session=session)


def _sample_runner(config: Config, mesh: Mesh) -> Runner:
    """Compiles the sampling of videos for a batch of random prompts and references; one run returns their latents."""
    dit, data, grid, B = config.model.dit, config.data, config.synthetic.latent_grid, config.data.batch_size
    sizes = {
        "noise": (B, *grid, dit.latent_channels),
        "text": (B, data.text_length, dit.text_width),
        "negative_text": (B, data.text_length, dit.text_width),
        "reference_latents": (B, data.max_references, *grid[1:], dit.latent_channels),
    }
    draw = jax.jit(jax.random.normal, static_argnums=1, out_shardings=NamedSharding(mesh, BATCH))
    drawn = {name: draw(jax.random.key(i), size) for i, (name, size) in enumerate(sizes.items())}
    prompt = Condition(drawn["text"], drawn["reference_latents"] if data.max_references else None)
    inputs = drawn["noise"], prompt, prompt._replace(text=drawn["negative_text"])
    shapes = state_shapes(config, mesh).params["dit"]
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        program = sample.lower(shapes, *inputs, dit=dit, config=config.sampling).compile()
    seconds = time.perf_counter() - began
    fresh = jax.jit(
        lambda key: random_params(config.model, key)["dit"],
        out_shardings=jax.tree.map(lambda x: x.sharding, shapes),
    )

    @contextlib.contextmanager
    def session() -> Iterator[Callable[[], Any]]:
        params = fresh(jax.random.key(0))
        yield lambda: program(params, *inputs)

    shape = flops.Shape(grid=grid, references=data.max_references, text_length=data.text_length)
    counted = B * flops.sample_flops(dit, shape, num_forwards(config.sampling, shape.references > 0))
    return Runner(config=config, program=program, compile_seconds=seconds, flops=counted, session=session)


def measure(settings: Mapping[str, Config], mode: Mode, plan: Plan) -> dict[str, dict[str, Any]]:
    """Measures settings in turns. Prints progress on stderr.

    Args:
      settings: configurations by name.
      mode: the training step, or the sampling of a batch of videos.
      plan: how often to measure.

    Returns:
      The `figures` of each setting by name. All but the first also have "ratio", the `spread` of their time over the
      first's, turn by turn, and all have "scopes" if the plan includes a profile, see `profile.profile`.

    Raises:
      ValueError: as in `compiled`.
    """
    runners = {}
    for name, config in settings.items():
        with progress(f"compiling setting {name} ({mode})"):
            runners[name] = compiled(config, mode)
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    memory: dict[str, int | None] = {}
    for turn in range(plan.repeats):
        for name, runner in runners.items():
            with progress(f"measuring setting {name}, {turn + 1} of {plan.repeats}"):
                seconds[name].append(_timed(runner, plan))
            memory[name] = _peak_memory()
    results = {name: figures(runner, seconds[name], memory[name]) for name, runner in runners.items()}
    first, *others = settings
    for name in others:
        results[name]["ratio"] = spread([b / a for a, b in zip(seconds[first], seconds[name], strict=True)])
    for name, runner in runners.items() if plan.profile else ():
        with progress(f"profiling setting {name}"):
            results[name]["scopes"] = _profiled(runner, plan)
    return results


def figures(runner: Runner, seconds: Sequence[float], peak_memory: int | None) -> dict[str, Any]:
    """Returns the figures of one setting: time per step or batch, FLOP/s, MFU, memory per device, kernels."""
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
    """Returns the median, the least and the largest of some numbers, and the numbers."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": list(values)}


def _profiled(runner: Runner, plan: Plan) -> dict[str, dict[str, float]]:
    """Returns the seconds per device of one run of the program, by scope and phase."""
    with runner.session() as step:
        for _ in range(max(plan.warmup, 1)):
            jax.block_until_ready(step())
        return profile(step, runner.program.as_text() or "", plan.profile)


def _timed(runner: Runner, plan: Plan) -> float:
    """Returns the seconds of one run, the mean of `plan.steps`; each result is awaited after the next run has begun."""
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
    """Returns the most bytes that a device of this process has held so far; None if it does not report that."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)


def lines(title: str, result: Mapping[str, Any]) -> list[str]:
    """Returns the figures of one setting as lines of text."""
    seconds, peak = result["seconds"], result["peak_tflops"]
    mfu = f"MFU {result['mfu']:.1%} of {peak:g} TFLOP/s" if peak else "no MFU, since the peak is not known"
    planned = result["planned_bytes"]
    needed = f"{(planned['argument'] + planned['temp']) / 2**30:.3f} GiB planned" if planned else "memory not planned"
    held = f", {result['peak_bytes'] / 2**30:.3f} GiB held at most" if result["peak_bytes"] else ""
    text = [
        f"{title}: {seconds['median']:.4g} s ({seconds['min']:.4g} to {seconds['max']:.4g}), "
        f"{result['tflops_per_device']:.4g} TFLOP/s per device, {mfu}; per device: {needed}{held}; "
        f"compiled in {result['compile_seconds']:.1f} s"
    ]
    if "ratio" in result:
        ratio = result["ratio"]
        text.append(f"  time relative to the first: {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})")
    scopes = result.get("scopes", {})
    total = sum(sum(phases.values()) for phases in scopes.values())
    for scope, phases in sorted(scopes.items(), key=lambda item: -sum(item[1].values())):
        shares = ", ".join(f"{phase} {seconds / total:.1%}" for phase, seconds in sorted(phases.items()))
        text.append(f"  {scope:20} {sum(phases.values()) / total:6.1%}   {shares}")
    return text
