"""What a run records: a progress bar, metrics.jsonl, TensorBoard, and how each of its files was made.

metrics.jsonl holds one JSON object per line. A line with "start" opens every start of the run and records versions,
flags and commit; one with "compile_seconds" describes the compiled program; a line with "step" records one training
step, numbered by the steps done after it. A run that continues from step k first drops the lines of later steps, so
that every step is there once.

A step's metrics are read one step late, while the devices compute the next, so that the devices never wait for the
host: `Log` holds them until then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from refalign_jax import flops
from refalign_jax.atomic import write_text
from refalign_jax.config import Config, TrainConfig
from refalign_jax.devices import peak_flops
from refalign_jax.types import Array

SHOWN = {"loss": "loss", "examples_per_second": "ex/s", "mfu": "MFU"}
"""Metrics beside the progress bar, and how they are called there: as many as 80 columns leave room for."""
BAR = "{percentage:3.0f}%|{bar:6}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
"""The progress bar: short enough for 80 columns with three metrics behind it."""


class NotFiniteError(ValueError):
    """A loss or gradient is not finite, in more batches in a row than `train.max_skipped`."""


class Meter:
    """Time between steps and the rates that follow from it.

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
        """Sets the clock to 0."""
        self._began, self._waited = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside the block as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """Rates since the clock was 0, and sets it to 0.

        Returns:
          Seconds, examples and tokens per second, the share of time spent waiting for data, and the MFU where the
          devices' peak is known; see `flops`.
        """
        seconds = max(time.perf_counter() - self._began, 1e-9)
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
    """A window of steps that JAX's profiler records into folder/profile.

    Args:
      folder: of the run.
      start: steps after the start at which the window opens.
      steps: its length; 0 for no window.
    """

    def __init__(self, folder: Path, start: int, steps: int) -> None:
        self._folder, self._left, self._steps, self._open = folder / "profile", start, steps, False

    def step(self, previous: object) -> None:
        """To be called before each step, with an array that the previous step returned."""
        if self._steps and self._left in (0, -self._steps):
            jax.block_until_ready(previous)
            if self._left == 0:
                jax.profiler.start_trace(str(self._folder))
                self._open = True
            else:
                self.close()
        self._left -= 1

    def close(self) -> None:
        """Closes the window if it is open."""
        if self._open:
            jax.profiler.stop_trace()
            self._open = False


def write_config(folder: Path, config: Config, made: Mapping[str, Any]) -> None:
    """Writes the resolved configuration beside the checkpoints, as config.json."""
    content = {"config": dataclasses.asdict(config), "about": made}
    write_text(folder / "config.json", json.dumps(content, indent=1) + "\n")


class Log:
    """Writes metrics to the progress bar, the file and TensorBoard; a context manager.

    Args:
      config: has the run's folder, its number of steps and `max_skipped`.
      done: steps done before this start; what the file holds beyond them is dropped.
      made: what `provenance.about` returned.
      meter: measures the steps; None for none.
      enabled: False writes nothing: for all processes but the first.

    Raises:
      OSError: the folder or the file can't be written.
    """

    def __init__(
        self, config: TrainConfig, done: int, made: Mapping[str, Any], meter: Meter | None = None, enabled: bool = True
    ) -> None:
        self._enabled, self._max_skipped, self._meter = enabled, config.max_skipped, meter
        self._unread: tuple[int, Sequence[str], Mapping[str, Any]] | None = None
        self._record: dict[str, float] = {}
        if not enabled:
            return
        from tensorboardX import SummaryWriter  # imports torch where it is installed

        folder = Path(config.folder)
        self.path = folder / "metrics.jsonl"
        _drop_after(self.path, done)
        self._file = self.path.open("a", encoding="utf-8")
        self._write({"start": done, **made})
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        self._board.add_text("about", f"```\n{json.dumps(made, indent=1)}\n```", done)
        self._done, self._steps = done, config.steps
        self._bar: tqdm[Any] | None = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """To be entered while a batch is waited for.

        A step lasts from the end of the one before; if that has been read already, from here.
        """
        if self._meter is None:
            yield
            return
        if self._unread is None:
            self._meter.restart()
        with self._meter.waiting():
            yield

    def step(self, step: int, ids: Sequence[str], metrics: Mapping[str, Array | float], wait: bool = False) -> None:
        """Records the step before this one, and holds this one's metrics until the next call.

        Args:
          step: number of steps done.
          ids: of the batch's examples.
          metrics: scalars, on the devices or not; those that are not finite become null in the file.
          wait: wait for this step too, since what follows is not part of its time.

        Raises:
          NotFiniteError: `skipped` is greater than `max_skipped`.
          OSError: the file can't be written.
        """
        if self._enabled and self._bar is None:  # not earlier, so that compilation is no part of its estimate
            self._bar = tqdm(
                initial=self._done,
                total=self._steps,
                mininterval=0.5 if sys.stderr.isatty() else 30,
                dynamic_ncols=True,
                bar_format=BAR,
            )
        self._finish()
        self._unread = step, ids, metrics
        if wait:
            self._read()

    def add(self, values: Mapping[str, float]) -> None:
        """Adds values to the record of a step that was waited for."""
        assert self._record, "add follows step(…, wait=True)"
        self._record |= values

    def flush(self) -> None:
        """Records the step that is held and forces the file to disk, as a checkpoint must not be ahead of it.

        Raises:
          NotFiniteError, OSError: as in `step`.
        """
        self._finish()
        if self._enabled:
            os.fsync(self._file.fileno())

    def note(self, record: Mapping[str, Any]) -> None:
        """Writes a line that belongs to no step."""
        if self._enabled:
            self._write(record)

    def print(self, text: str) -> None:
        """Prints a line without breaking the progress bar."""
        if self._enabled:
            tqdm.write(text, file=sys.stderr)

    def _read(self) -> None:
        """Waits for the metrics that are held and makes a record of them."""
        assert self._unread is not None
        (step, ids, metrics), self._unread = self._unread, None
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        self._record = {"step": step, **values, **(self._meter.lap() if self._meter else {})}
        if not values.get("skipped"):
            return
        what = (
            f"Step {step}: the loss ({values['loss']}) or its gradient (norm {values['grad_norm']}) is not finite; "
            f"examples {', '.join(ids)}"
        )
        if values["skipped"] > self._max_skipped:
            self._finish()
            raise NotFiniteError(f"{what}; {int(values['skipped'])} in a row, train.max_skipped={self._max_skipped}")
        self.print(f"{what}; the batch is skipped.")

    def _finish(self) -> None:
        """Reads what is held and writes the record."""
        if self._unread is not None:
            self._read()
        record, self._record = self._record, {}
        if not self._enabled or not record:
            return
        self._write(record)
        values = {name: value for name, value in record.items() if name != "step"}
        for name, value in values.items():
            if math.isfinite(value):
                self._board.add_scalar(name, value, record["step"])
        assert self._bar is not None
        shown = {title: f"{values[name]:.3g}" for name, title in SHOWN.items() if name in values}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def _write(self, record: Mapping[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(f"{self.path} could not be written: {error.strerror}.") from error

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            if self._enabled:
                if self._bar is not None:
                    self._bar.close()
                self._board.close()
                with contextlib.suppress(OSError):
                    self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The step lines of a metrics file, in order.

    Raises:
      ValueError: a line is not a JSON object.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        return [record for record in map(json.loads, lines) if "step" in record]
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error


def _drop_after(path: Path, done: int) -> None:
    """Keeps the lines of a metrics file up to step `done`; drops the rest and a last line that was cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line)
            early = record.get("step", record.get("start", 0)) <= done
        except (ValueError, TypeError, AttributeError, RecursionError):  # cut short or damaged
            continue
        if line.endswith("\n") and early:
            kept.append(line)
    write_text(path, "".join(kept))
