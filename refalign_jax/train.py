"""Training.

    batch, noise, i  from  the data iterator and fold_in(key, step)
    loss(θ)   = mean over the batch of w(t_i)·MSE + λ·g(t_i)·L_RA           (objective.py)
    θ, m, v   ← AdamW(∇loss)                                                (optimizer.py)

One jitted program draws, differentiates and updates; its state is donated. The host reads a step's metrics while the
devices compute the next. A checkpoint holds all that the next step depends on, so that a run that was killed and
started again is the run that never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import signal
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from refalign_jax import distributed, flops, preflight
from refalign_jax.checkpoint import Checkpoints
from refalign_jax.convert.table import count
from refalign_jax.data.encoders import VideoCodec
from refalign_jax.data.loader import BatchIterator, DataConfig, Source, make_loader
from refalign_jax.distributed import Watch
from refalign_jax.initial import random_params
from refalign_jax.metrics import Log, Meter, Profiler, about, write_config
from refalign_jax.objective import Batch, Terms, objective
from refalign_jax.optimizer import learning_rate, merge, moving_average, split, update
from refalign_jax.preview import write_preview
from refalign_jax.sharding import check_batch, check_heads, make_mesh, replicated, to_devices
from refalign_jax.state import TrainState, begin, save
from refalign_jax.train_config import Config, DropoutConfig
from refalign_jax.types import Array, Float, Int, Key, Params

logger = logging.getLogger(__name__)


def drop_conditions(
    batch: Batch, u: Float[Array, " B"], empty_text: Float[Array, "S text_width"], config: DropoutConfig
) -> Batch:
    """Takes text, references or both from some samples.

    Args:
      batch: the samples.
      u: uniform in [0, 1): below `text` the text goes, in the next `references` the references, then both.
      empty_text: embedding of the empty prompt, padding rows zero; what stands in for a dropped text.
      config: the shares.

    Returns:
      The batch; dropped references are as many frames of zero latents as there were, and are not aligned.
    """
    first, second, third = np.cumsum([config.text, config.references, config.both])
    no_text = (u < first) | ((u >= second) & (u < third))
    no_references = (u >= first) & (u < third)
    return batch._replace(
        text=jnp.where(no_text[:, None, None], empty_text.astype(batch.text.dtype), batch.text),
        reference_latents=jnp.where(no_references[:, None, None, None, None], 0, batch.reference_latents),
        aligned=batch.aligned & ~no_references,
    )


def draw(
    key: Key[Array, ""], batch: Batch, empty_text: Float[Array, "S text_width"], config: Config
) -> tuple[Batch, Float[Array, "B F H W C"], Int[Array, " B"]]:
    """Draws what is random in one step: dropped conditions, noise, and each sample's place in the training schedule."""
    noise_key, index_key, dropout_key = jax.random.split(key, 3)
    samples = batch.video_latents.shape[0]
    noise = jax.random.normal(noise_key, batch.video_latents.shape, jnp.float32)
    index = jax.random.randint(index_key, (samples,), 0, config.model.flow.num_train_steps)
    u = jax.random.uniform(dropout_key, (samples,))
    return drop_conditions(batch, u, empty_text, config.dropout), noise, index


def train_step(
    state: TrainState, batch: Batch, noise: Float[Array, "B F H W C"], index: Int[Array, " B"], config: Config
) -> tuple[TrainState, dict[str, Array]]:
    """One step of training, pure.

    Args:
      state: before the step.
      batch: what to train on.
      noise: standard normal.
      index: place of each sample in the training schedule.
      config: of the run.

    Returns:
      The state after the step, and scalars: the batch means of the loss's terms (those of the alignment over aligned
      samples alone), gradient norm before the clip, learning rate, and `skipped`. Where loss or gradient is not
      finite, parameters, average and moments stay as they were, and `skipped` counts up.
    """
    trained, frozen = split(state.params, config.optimizer.freeze)

    def loss(trained: Params, batch: Batch, noise: Array, index: Array) -> tuple[Array, Terms]:
        return objective(merge(trained, frozen), batch, noise, index, state.step, config.model)

    terms, gradients = mean_gradient(loss, trained, (batch, noise, index), config.optimizer.accumulation)
    norm = optax.tree.norm(gradients)
    rate = learning_rate(state.step, config.optimizer, config.train.steps)
    with jax.named_scope("optimizer"):
        trained, moments = update(gradients, state.optimizer, trained, rate, config.optimizer)
        params = merge(trained, frozen)
        ema = None if state.ema is None else moving_average(state.ema, params, config.optimizer.ema_decay)

    finite = jnp.isfinite(jnp.mean(terms.loss)) & jnp.isfinite(norm)
    params, ema, moments = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, ema, moments),
        (state.params, state.ema, state.optimizer),
    )
    skipped = jnp.where(finite, 0, state.skipped + 1)
    metrics = {**mean_terms(terms, batch), "grad_norm": norm, "learning_rate": rate, "skipped": skipped}
    return TrainState(state.step + 1, skipped, state.key, params, ema, moments), metrics


def mean_gradient(
    loss: Callable[..., tuple[Array, Terms]], trained: Params, inputs: tuple[Any, ...], parts: int
) -> tuple[Terms, Params]:
    """Terms of every sample and the gradient of the mean loss, computed in `parts` parts one after the other."""
    gradient = jax.grad(loss, has_aux=True)
    if parts == 1:
        gradients, terms = gradient(trained, *inputs)
        return terms, gradients
    # A part takes every parts-th sample: so every device finds its share of each part among the rows it holds.
    split_up = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), inputs)

    def add(total: Params, part: Any) -> tuple[Params, Terms]:
        gradients, terms = gradient(trained, *part)
        return jax.tree.map(jnp.add, total, gradients), terms

    total, terms = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trained), split_up)
    terms = jax.tree.map(lambda x: x.T.reshape(-1), terms)
    return terms, jax.tree.map(lambda x: x / parts, total)


def mean_terms(terms: Terms, batch: Batch) -> dict[str, Array]:
    """Batch means of the loss's terms by name; pull, push and alignment over the aligned samples with references."""
    aligned = batch.aligned & (batch.num_references > 0)
    means = {name: jnp.mean(value) for name, value in terms._asdict().items()}
    for name in ("pull", "push", "alignment"):
        means[name] = jnp.sum(getattr(terms, name) * aligned) / jnp.maximum(jnp.sum(aligned), 1)
    return means


def as_batch(rows: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
    """The global batch on the devices, of each process's rows out of the loader; every sample is aligned."""
    arrays = {**rows, "aligned": np.ones(len(rows["num_references"]), bool)}
    return Batch(**to_devices({name: arrays[name] for name in Batch._fields}, mesh))


@functools.partial(jax.jit, static_argnames="config")
def held_out_terms(params: Params, batch: Batch, place: Int[Array, " B"], config: Config) -> dict[str, Array]:
    """Batch means of the loss's terms at noise and times that are fixed for each example.

    Args:
      params: of the model.
      batch: held-out examples, nothing dropped.
      place: of each among the held-out examples; over all of them, times cover the schedule evenly.
      config: of the run.
    """
    key, shape = jax.random.key(config.train.seed), batch.video_latents.shape[1:]
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32))(place)
    index = ((place + 0.5) * (config.model.flow.num_train_steps / config.data.held_out)).astype(jnp.int32)
    _, terms = objective(params, batch, noise, index, jnp.int32(0), config.model)
    return mean_terms(terms, batch)


def held_out_batches(config: Config, source: Source, mesh: Mesh) -> Iterator[tuple[Batch, Int[Array, " B"]]]:
    """One pass over the held-out examples, read by this process, and the place of each among them."""
    data = dataclasses.replace(config.data, num_workers=0)
    loader = _open_loader(data, source, "held_out")
    with contextlib.closing(loader):
        for _ in range(data.held_out // data.batch_size):
            rows = next(loader)
            place = (rows["index"] - (len(source) - data.held_out)).astype(np.int32)
            yield as_batch(rows, mesh), to_devices(place, mesh)


def held_out_losses(params: Params, config: Config, source: Source, mesh: Mesh) -> dict[str, float]:
    """Means over the held-out examples of the loss's terms, named held_out_loss and so on."""
    with jax.set_mesh(mesh):
        means = [held_out_terms(params, *inputs, config) for inputs in held_out_batches(config, source, mesh)]
    names = ("loss", "flow", "pull", "push")
    return {f"held_out_{name}": float(np.mean([jax.device_get(mean[name]) for mean in means])) for name in names}


def lower_step(state: TrainState, batch: Batch, empty_text: Any, config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """The loop's one program, draw and step with the state donated, of arrays or of shapes with shardings."""

    def program(state: TrainState, batch: Batch, empty_text: Array) -> tuple[TrainState, dict[str, Array]]:
        step_key = jax.random.fold_in(state.key, state.step)
        return train_step(state, *draw(step_key, batch, empty_text, config), config)

    places = jax.tree.map(lambda x: x.sharding, state), replicated(mesh)
    with jax.set_mesh(mesh):
        return jax.jit(program, donate_argnums=0, out_shardings=places).lower(state, batch, empty_text)


def compile_step(
    state: TrainState, batch: Batch, empty_text: Array, config: Config, mesh: Mesh
) -> tuple[Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Array]]], dict[str, float]]:
    """Compiles the loop's one program.

    Returns:
      The program; seconds it took to compile, parameters, and bytes a device needs beside the state and the batch.
    """
    began = time.perf_counter()
    compiled = lower_step(state, batch, empty_text, config, mesh).compile()
    seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
    needed = memory.temp_size_in_bytes if memory else 0
    logger.info("Compiled in %.1f s; a device needs %.3f GB beside state and batch.", seconds, needed / 1e9)
    return compiled, {"compile_seconds": seconds, "parameters": count(state.params), "temporary_bytes": needed}


def train(config: Config) -> None:
    """Runs a recipe to its last step, from the newest checkpoint in its folder or from the start.

    SIGTERM and Ctrl-C end it after the step at hand, with a checkpoint from which the next start goes on.

    Raises:
      ValueError, OSError: what a user can mend, in one sentence.
    """
    _start_jax(config)
    with Watch(config.train) as watch:
        _train(config, watch)


def _train(config: Config, watch: Watch) -> None:
    """As `train`, where JAX has its settings and the processes have joined."""
    mesh = make_mesh(config.mesh)
    check_batch(config.data.batch_size, config.optimizer.accumulation, mesh)
    check_heads(config.model.dit, mesh)
    split(jax.eval_shape(lambda: random_params(config.model, jax.random.key(0))), config.optimizer.freeze)
    source = preflight.open_source(config)
    codec = preflight.preview_codec(config, source)
    empty_text = jax.device_put(preflight.empty_text(config, source), replicated(mesh))
    loader = _open_loader(config.data, source, "train")
    folder = preflight.check_folder(config.train.folder, "train.folder")
    made = about()
    with (
        _stop_requested() as stop,
        contextlib.closing(loader),
        Checkpoints(config.train.checkpoint_folder or folder / "checkpoints", config.train.keep) as checkpoints,
    ):
        state, position = begin(config, mesh, checkpoints)
        if position is not None:
            loader.set_state(position)
        if int(state.step) >= config.train.steps:
            logger.info("%s is at step %d already; nothing is left to do.", checkpoints.folder, int(state.step))
            return
        first = jax.process_index() == 0
        if first:
            write_config(folder, config, made)
        with Log(folder, int(state.step), config.train.steps, made, enabled=first) as log, _memory_in_one_sentence():
            _loop(state, loader, source, empty_text, codec, config, mesh, checkpoints, log, stop, made, watch)


def _loop(
    state: TrainState,
    loader: BatchIterator,
    source: Source,
    empty_text: Array,
    codec: VideoCodec | None,
    config: Config,
    mesh: Mesh,
    checkpoints: Checkpoints,
    log: Log,
    stop: threading.Event,
    made: Mapping[str, Any],
    watch: Watch,
) -> None:
    """The steps that are left. The host reads a step's metrics while the devices are busy with the next."""
    run, start = config.train, int(state.step)
    done = start
    meter = Meter(config, example_shape(config, source))
    program, unread = None, None
    with contextlib.closing(Profiler(Path(run.folder), run.profile_start, run.profile_steps)) as profiler:
        while done < run.steps:
            try:
                with meter.waiting():
                    rows = next(loader)
            except (ValueError, OSError):  # the data failed, what was learned is good
                _report(unread, meter, log, checkpoints, run.max_skipped)
                if done > start and jax.process_count() == 1:  # several would have to save together
                    log.sync()
                    save(state, loader.get_state(), config, made, checkpoints)
                raise
            batch = as_batch(rows, mesh)
            if program is None:
                if stop.is_set():
                    return  # before anything was done that could be lost
                program, told = compile_step(state, batch, empty_text, config, mesh)
                watch.meet("compiled")
                log.note(told)
                meter.restart()
            profiler.step(state.step)
            state, metrics = program(state, batch, empty_text)
            _report(unread, meter, log, checkpoints, run.max_skipped)
            watch.step(done)
            done += 1
            unread = done, rows["ids"].tolist(), metrics

            stopping = stop.is_set() or checkpoints.should_stop(done)
            saving = stopping or done == run.steps or done % run.save_every == 0
            testing, previewing = (n > 0 and done % n == 0 for n in (run.held_out_every, run.preview_every))
            if not (saving or testing or previewing):
                continue
            jax.block_until_ready(metrics)
            with meter.excluded():
                tested = held_out_losses(state.params, config, source, mesh) if testing else {}
                if previewing:
                    batch = next(held_out_batches(config, source, mesh))[0]
                    with jax.set_mesh(mesh):
                        write_preview(state.ema or state.params, batch, empty_text, config, done, made, codec)
            _report(unread, meter, log, checkpoints, run.max_skipped, tested)
            unread = None
            if saving:
                with meter.excluded():
                    log.sync()
                    save(state, loader.get_state(), config, made, checkpoints)
            if stopping:
                log.say(f"Stopped after step {done}; the next start goes on from there.")
                return


def _report(
    unread: tuple[int, list[str], dict[str, Array]] | None,
    meter: Meter,
    log: Log,
    checkpoints: Checkpoints,
    max_skipped: int,
    more: Mapping[str, float] = types.MappingProxyType({}),
) -> None:
    """Waits for a step's metrics and tells them.

    Raises:
      ValueError: its loss or gradient is not finite, once too often in a row.
    """
    if unread is None:
        return
    step, ids, metrics = unread
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    log.step(step, {**values, **meter.lap(), **more})
    if not values["skipped"]:
        return
    what = (
        f"Step {step}: the loss ({values['loss']}) or its gradient (norm {values['grad_norm']}) is not finite; "
        f"examples {', '.join(ids)}"
    )
    if values["skipped"] <= max_skipped:
        log.say(f"{what}; the batch is skipped.")
        return
    good = checkpoints.latest
    raise ValueError(
        f"{what}; {int(values['skipped'])} in a row, train.max_skipped={max_skipped}; "
        + (f"the last good checkpoint is {checkpoints.path(good)}." if good else "there is no checkpoint yet.")
    )


def example_shape(config: Config, source: Source) -> flops.Shape:
    """Sizes of one example as it is computed, padding included."""
    return flops.Shape(
        grid=source.spec.video_latents[:3], references=config.data.max_references, text_length=config.data.text_length
    )


def _open_loader(data: DataConfig, source: Source, part: Literal["train", "held_out"]) -> BatchIterator:
    """This process's share of the batches."""
    return make_loader(data, source, split=part, process_index=jax.process_index(), process_count=jax.process_count())


def _start_jax(config: Config) -> None:
    """Settings that JAX takes before its first use."""
    for name in ("absl", "asyncio"):  # Orbax prints tracebacks of what it also raises
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if config.train.distributed:
        distributed.join(config.train)
    if config.train.compilation_cache:
        preflight.check_folder(config.train.compilation_cache, "train.compilation_cache")
        jax.config.update("jax_compilation_cache_dir", config.train.compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@contextlib.contextmanager
def _memory_in_one_sentence() -> Iterator[None]:
    """Says in a sentence what XLA says in a page."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            f"The devices' memory is too small ({str(error).splitlines()[0]:.200}); raise mesh.fsdp or "
            "optimizer.accumulation, lower data.batch_size, or set model.dit.remat to full."
        ) from error


@contextlib.contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets; a second one has its usual effect.

    With several processes jax.distributed listens for SIGTERM, so that all of them stop after the same step.
    """
    event = threading.Event()
    before: dict[int, Any] = {}

    def handle(number: int, frame: object) -> None:
        event.set()
        signal.signal(number, before[number])

    numbers = [signal.SIGTERM, signal.SIGINT] if jax.process_count() == 1 else []
    for number in numbers:
        before[number] = signal.signal(number, handle)
    try:
        yield event
    finally:
        for number in numbers:
            signal.signal(number, before[number])
