"""Training.

One program draws noise and times, differentiates the loss and updates the state (step.py); it is compiled from shapes
before the first batch is read. The host reads a step's metrics while the devices compute the next (log.py). A
checkpoint holds all that the next step depends on, so that a run that was killed and started again ends as the run
that was never stopped, bit for bit.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from refalign_jax.config import Config, TrainConfig
from refalign_jax.data.loader import Rows
from refalign_jax.data.mixture import Source
from refalign_jax.data.shards import WAN_FPS, clip_fps
from refalign_jax.trainer import distributed, preflight
from refalign_jax.trainer.distributed import HangGuard
from refalign_jax.trainer.dump import write_dump
from refalign_jax.trainer.held_out import held_out_losses
from refalign_jax.trainer.log import Log, Meter, NotFiniteError, Profiler, write_config
from refalign_jax.trainer.preview import draw_preview, preview_rows, write_preview
from refalign_jax.trainer.run import Run, open_run
from refalign_jax.trainer.state import TrainState, begin, save
from refalign_jax.trainer.step import as_batch, batch_shapes, compile_step

logger = logging.getLogger(__name__)


def train(config: Config, source: Source | None = None) -> None:
    """Runs a recipe to its last step, from the newest checkpoint in its folder or from the start.

    SIGTERM and Ctrl-C end it after the current step, with a checkpoint from which the next start continues.

    Args:
      config: the recipe.
      source: the examples; None opens those that the recipe names.

    Raises:
      ValueError, OSError: what the user can correct, in one sentence.
      KeyboardInterrupt: Ctrl-C ended it; the checkpoint is written.
    """
    with distributed.exit_alone():
        start_jax(config.train)
        _train(config, source)


def _train(config: Config, source: Source | None) -> None:
    """As `train`, where JAX has its settings and the processes have joined."""
    with (
        HangGuard(config.train.stalled_after_seconds) as guard,
        open_run(config, source) as run,
        stop_requested() as stop,
    ):
        with one_sentence(run):
            state, position = begin(config, run.mesh, run.checkpoints)
        if position is not None:
            run.loader.set_state(position)
        done, first = int(state.step), jax.process_index() == 0
        guard.step(done)
        if done >= config.train.steps:
            logger.info("%s is at step %d already; nothing is left to do.", run.checkpoints.folder, done)
            return
        if first:
            write_config(Path(config.train.folder), config, run.made)
        meter = Meter(config, preflight.example_shape(config, run.source))
        with one_sentence(run), Log(config.train, done, run.made, meter, enabled=first) as log:
            train_steps(state, run, log, stop, guard)


def train_steps(state: TrainState, run: Run, log: Log, stop: threading.Event, guard: HangGuard) -> None:
    """The steps that are left.

    Args:
      state: before the first of them; donated.
      run: opened.
      log: records the steps.
      stop: set by a signal to end after the current step.
      guard: ends the process if a step hangs.
    """
    config, mesh, source = run.config, run.mesh, run.source
    if stop.is_set():
        log.print(f"Stopped before step {int(state.step) + 1}; nothing was done that could be lost.")
        return
    shapes = batch_shapes(config, source.spec, mesh)
    program, description = compile_step(state, shapes, run.empty_text, config, mesh)
    distributed.meet("compiled", config.train)
    log.note(description)
    profiler = Profiler(Path(config.train.folder), config.train.profile_start, config.train.profile_steps)
    with contextlib.closing(profiler):
        for done in range(int(state.step) + 1, config.train.steps + 1):
            rows = next_rows(state, run, log)
            batch = as_batch(rows, config, source.spec, mesh)
            if done in config.train.verify_dump:
                write_dump(state, batch, run, done)
            profiler.step(state.step)
            state, metrics = program(state, batch, run.empty_text)

            stopping = stop.is_set() or run.checkpoints.should_stop(done)
            due = due_after(done, config.train, stopping)
            log.step(done, rows["ids"].tolist(), metrics, wait=any(due))
            guard.step(done)
            if due.held_out:
                log.add(held_out_losses(state.params, config, source, mesh))
            if due.preview:
                preview(state, run, done)
            if due.save:
                checkpoint(state, run, log)
            if stopping:
                log.print(f"Stopped after step {done}; the next start continues from there.")
                return


class Due(NamedTuple):
    """What is to be done after a step."""

    held_out: bool
    preview: bool
    save: bool


def due_after(done: int, config: TrainConfig, stopping: bool) -> Due:
    """What is due after so many steps."""

    def every(steps: int) -> bool:
        return steps > 0 and done % steps == 0

    save = stopping or done == config.steps or every(config.save_every)
    return Due(held_out=every(config.held_out_every), preview=every(config.preview_every), save=save)


def next_rows(state: TrainState, run: Run, log: Log) -> Rows:
    """This process's rows of the next batch.

    Raises:
      ValueError, OSError: the data can't be read; the state, which is good, is saved first.
    """
    try:
        with log.waiting():
            return next(run.loader)
    except (ValueError, OSError):
        log.flush()
        if int(state.step) and jax.process_count() == 1:  # several processes would have to save together
            checkpoint(state, run, log)
        raise


def preview(state: TrainState, run: Run, done: int) -> None:
    """Samples from the first held-out examples, by the moving average where there is one, and writes the samples."""
    config = run.config
    rows = preview_rows(config, run.source)
    drawn = draw_preview(state.ema or state.params, rows, run.empty_text, config, run.mesh)
    if jax.process_index() == 0:
        path = Path(config.train.folder) / "previews" / f"step-{done:08d}"
        made = {**run.made, "step": done, "seed": config.train.seed}
        write_preview(path, drawn, made, run.codec, WAN_FPS if run.codec is None else clip_fps(config.data.paths[0]))


def checkpoint(state: TrainState, run: Run, log: Log) -> None:
    """Begins to write a checkpoint; returns when the state may be donated."""
    log.flush()
    save(state, run.loader.get_state(), run.config, run.made, run.checkpoints)


def start_jax(config: TrainConfig) -> None:
    """Settings that JAX takes before its first use."""
    if config.distributed:
        distributed.join(config)
    if config.compilation_cache:
        preflight.check_folder(config.compilation_cache, "train.compilation_cache")
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@contextlib.contextmanager
def one_sentence(run: Run) -> Iterator[None]:
    """Raises in one sentence what went wrong inside, with what to do about it."""
    try:
        yield
    except NotFiniteError as error:
        good = run.checkpoints.latest
        where = f"the last good checkpoint is {run.checkpoints.path(good)}" if good else "there is no checkpoint yet"
        raise ValueError(f"{error}; {where}.") from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            f"The devices' memory is too small ({str(error).splitlines()[0]:.200}); raise mesh.fsdp or "
            "optimizer.accumulation, lower data.batch_size, or set model.dit.remat to full."
        ) from error


@contextlib.contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets; a second one has its usual effect.

    With several processes jax.distributed listens for SIGTERM, so that all of them stop after the same step.

    Raises:
      KeyboardInterrupt: when the block has ended after Ctrl-C, so that its exit code differs from a finished run.
    """
    event = threading.Event()
    before: dict[int, Any] = {}
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        event.set()
        received.append(number)
        signal.signal(number, before[number])

    numbers = [signal.SIGTERM, signal.SIGINT] if jax.process_count() == 1 else []
    for number in numbers:
        before[number] = signal.signal(number, handle)
    try:
        yield event
        if signal.SIGINT in received:
            raise KeyboardInterrupt
    finally:
        for number in numbers:
            signal.signal(number, before[number])
