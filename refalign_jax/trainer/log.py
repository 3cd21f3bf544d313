"""What a run tells: a progress bar, metrics.jsonl, TensorBoard, and what each of its files says about its making.

metrics.jsonl holds one JSON object a line. A line with "start" opens every start of the run and tells versions, flags
and commit, one with "compile_seconds" how its program turned out; a line with "step" tells of one training step, the
number of steps done after it. A run that goes on from step k first drops the lines behind k, so that every step is
there once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from refalign_jax import flops
from refalign_jax.config import Config
from refalign_jax.devices import peak_flops

SHOWN = ("loss", "pull", "push", "grad_norm", "examples_per_second", "data_wait", "mfu")


class Meter:
    """Time between steps, without what is not training, and the rates that follow from it.

    Args:
      config: of the run.
      shape: of one example.
    """

    def __init__(self, config: Config, shape: flops.Shape) -> None:
        self._examples = config.data.batch_size
        self._tokens = self._examples * sum(flops.tokens(config.model.dit, shape))
        self._flops = self._examples * flops.train_flops(config.model, shape)
        device = config.train.peak_tflops * 1e12 or peak_flops(jax.devices()[0].device_kind)
        self._peak = device and device * jax.device_count()
        self.restart()

    def restart(self) -> None:
        """Begins to count from now."""
        self._began, self._waited, self._excluded = time.perf_counter(), 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens inside is waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """What happens inside is no part of a step."""
        start = time.perf_counter()
        yield
        self._excluded += time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """Of the time since the last call: seconds, examples and tokens a second, share of waiting for data, MFU.

        MFU is there where the peak is known; see `flops`.
        """
        seconds = max(time.perf_counter() - self._began - self._excluded, 1e-9)
        rates = {
            "seconds": seconds,
            "examples_per_second": self._examples / seconds,
            "tokens_per_second": self._tokens / seconds,
            "data_wait": min(self._waited / seconds, 1.0),
        }
        if self._peak:
            rates["mfu"] = self._flops / seconds / self._peak
        self.restart()
        return rates


class Profiler:
    """A window of steps in which JAX's profiler records into folder/profile.

    Args:
      folder: of the run.
      start: steps after the start at which the window opens.
      steps: its length; 0, no window.
    """

    def __init__(self, folder: Path, start: int, steps: int) -> None:
        self._folder, self._left, self._steps, self._open = folder / "profile", start, steps, False

    def step(self, previous: object) -> None:
        """To be called before each step, with an array that the previous one returned."""
        if self._steps and self._left in (0, -self._steps):
            jax.block_until_ready(previous)
            if self._left == 0:
                jax.profiler.start_trace(str(self._folder))
                self._open = True
            else:
                self.close()
        self._left -= 1

    def close(self) -> None:
        """Ends the window, if it is open."""
        if self._open:
            jax.profiler.stop_trace()
            self._open = False


def write_config(folder: Path, config: Config, made: Mapping[str, Any]) -> None:
    """Writes the resolved configuration beside the checkpoints, as config.json."""
    path = folder / "config.json"
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps({"config": dataclasses.asdict(config), "about": made}, indent=1) + "\n", "utf-8")
    partial.replace(path)


class Log:
    """Writes metrics to the bar, the file and TensorBoard; a context manager.

    Args:
      folder: of the run; made if need be.
      done: steps done before this start; what the file holds beyond them is dropped.
      steps: of the whole run.
      made: what `about` returned.
      enabled: False writes nothing, for all processes but the first.

    Raises:
      OSError: the folder or the file can't be written.
    """

    def __init__(self, folder: Path, done: int, steps: int, made: Mapping[str, Any], enabled: bool = True) -> None:
        self._enabled = enabled
        if not enabled:
            return
        self.path = folder / "metrics.jsonl"
        _drop_after(self.path, done)
        self._file = self.path.open("a", encoding="utf-8")
        self._write({"start": done, **made})
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        self._board.add_text("about", f"```\n{json.dumps(made, indent=1)}\n```", done)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            initial=done, total=steps, unit="step", mininterval=0.5 if terminal else 30, dynamic_ncols=True
        )

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Tells of one finished step. A number that is not finite is null in the file."""
        if not self._enabled:
            return
        self._write({"step": step, **values})
        for name, value in values.items():
            if math.isfinite(value):
                self._board.add_scalar(name, value, step)
        self._bar.set_postfix({name: f"{values[name]:.3g}" for name in SHOWN if name in values}, refresh=False)
        self._bar.update()

    def note(self, record: Mapping[str, Any]) -> None:
        """Writes a line that belongs to no step."""
        if self._enabled:
            self._write(record)

    def sync(self) -> None:
        """Makes sure that what was told is on disk; before a checkpoint, which must not be ahead of it."""
        if self._enabled:
            os.fsync(self._file.fileno())

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self._enabled:
            self._bar.write(text, file=sys.stderr)

    def _write(self, record: Mapping[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(f"{self.path} could not be written: {error.strerror}.") from error

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        if self._enabled:
            self._bar.close()
            self._board.close()
            with contextlib.suppress(OSError):
                self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The step lines of a metrics file, in order."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "step" in record]


def _drop_after(path: Path, done: int) -> None:
    """Keeps the lines of a metrics file up to step `done`; drops the rest and a last line that was cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if line.endswith("\n") and record.get("step", record.get("start", 0)) <= done:
            kept.append(line)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)
