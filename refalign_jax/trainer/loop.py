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
import logging
import signal
import threading
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from refalign_jax.config import Config
from refalign_jax.data.loader import BatchIterator, Source
from refalign_jax.encoders.interface import VideoCodec
from refalign_jax.initial import random_params
from refalign_jax.provenance import about
from refalign_jax.sharding import check_batch, check_heads, make_mesh, replicated
from refalign_jax.trainer import distributed, preflight
from refalign_jax.trainer.checkpoint import Checkpoints
from refalign_jax.trainer.distributed import Watch
from refalign_jax.trainer.held_out import held_out_batches, held_out_losses
from refalign_jax.trainer.log import Log, Meter, Profiler, write_config
from refalign_jax.trainer.optimizer import split
from refalign_jax.trainer.preflight import example_shape, open_loader
from refalign_jax.trainer.preview import write_preview
from refalign_jax.trainer.state import TrainState, begin, save
from refalign_jax.trainer.step import as_batch, compile_step
from refalign_jax.types import Array

logger = logging.getLogger(__name__)


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
    loader = open_loader(config.data, source, "train")
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
