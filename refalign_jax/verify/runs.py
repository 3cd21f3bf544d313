"""Compares two training runs step by step: their metrics, and the norms of their weights layer by layer.

Two correct runs drift apart, since they round differently and training amplifies what they round. How much that is can
be measured, by a third run that differs in the order of its sums alone (such as another `optimizer.accumulation`, or
another mesh); its distance from the first run, times `floors.SAFETY`, is then the bound. Without a third run the bound
is a model, `rounding_drift`.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from refalign_jax.convert.checkpoint import open_params
from refalign_jax.convert.dit import model_table
from refalign_jax.convert.infer import open_transformer
from refalign_jax.convert.table import stored
from refalign_jax.data.json_lines import read_lines
from refalign_jax.initial import model_shapes
from refalign_jax.trees import flatten
from refalign_jax.types import Float, Params
from refalign_jax.verify.case import select
from refalign_jax.verify.floors import SAFETY
from refalign_jax.verify.report import SPACING, TOLERANCES, Profile

GROWTH = 0.02
"""Rate, per step, above every one at which training was seen to amplify a difference; see docs/verify.md."""

TIMES = ("seconds", "per_second", "data_wait", "mfu")
"""Metrics that depend on the machine, by how their names end."""

GIVEN = ("learning_rate", "weight", "gate", "skipped")
"""Metrics that depend on the step and the drawn times alone, not on the weights."""

Weights = Callable[[], Iterator[tuple[str, np.ndarray]]]
"""Reads the tensors of a checkpoint one at a time, with our names; `/3` at the end is layer 3 of a stack."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's records.

    Attributes:
      name: where it is from.
      metrics: for each metric, its value by step.
      weights: for each step that has a checkpoint, its reader.
      profile: whether it is known to have computed in 16 bits.
    """

    name: str
    metrics: Mapping[str, Mapping[int, float]]
    weights: Mapping[int, Weights]
    profile: Profile = "float32"


@dataclasses.dataclass(frozen=True, eq=False)
class Drift:
    """How far two runs are apart in one quantity.

    Attributes:
      name: a metric, `weights of step 100`.
      labels: steps, or names of tensors.
      differences: relative, one for each label; infinite where one of two numbers is not finite.
      bounds: what rounding explains, one for each label.
    """

    name: str
    labels: list[Any]
    differences: np.ndarray
    bounds: np.ndarray

    @property
    def first(self) -> Any:
        """The first label whose difference is beyond its bound; None where there is none."""
        beyond = np.flatnonzero(~(self.differences <= self.bounds) | np.isinf(self.differences))
        return self.labels[beyond[0]] if len(beyond) else None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two runs compared.

    Attributes:
      names: of the runs.
      drifts: what was compared.
      bound: how the bounds were made, in a sentence.
    """

    names: tuple[str, str]
    drifts: list[Drift]
    bound: str

    @property
    def code(self) -> int:
        """The command's exit code: 1 where a quantity is beyond its bound."""
        return int(any(drift.first is not None for drift in self.drifts))

    @property
    def summary(self) -> str:
        """The outcome in a sentence."""
        far = [drift for drift in self.drifts if drift.first is not None]
        if not far:
            ends = any(np.isinf(drift.bounds).any() for drift in self.drifts)
            partly = "no difference is beyond rounding, as far as the bound reaches"
            found = partly if ends else "rounding explains every difference"
            return f"Quantities compared: {len(self.drifts)}; {found}."
        metrics = [drift for drift in far if isinstance(drift.first, int)]
        first = min(metrics, key=lambda drift: drift.first, default=far[0])
        step = f"step {first.first}" if metrics else str(first.first)
        return f"{len(far)} of {len(self.drifts)} quantities are beyond rounding, {first.name} first, at {step}."

    def show(self, console: Console) -> None:
        """Prints a table of the quantities, and the outcome."""
        table = Table("quantity", "compared", "largest difference", "bound there", "first beyond its bound", box=None)
        for drift in self.drifts:
            finite = np.isfinite(drift.differences)
            share = np.where(finite, drift.differences, 0) / np.maximum(drift.bounds, 1e-300)
            worst = int(np.argmax(np.where(finite, share, np.inf)))
            first = "[green]none[/]" if drift.first is None else f"[red]{drift.first}[/]"
            numbers = (f"{drift.differences[worst]:.1e}", f"{drift.bounds[worst]:.1e}")
            table.add_row(drift.name, str(len(drift.labels)), *numbers, first)
        console.print(table)
        console.print(self.bound, self.summary, sep="\n", markup=False)


def rounding_drift(steps: Float[np.ndarray, " n"], start: float) -> Float[np.ndarray, " n"]:
    """How far rounding alone may drive two runs apart: a model for where no third run measures it.

    After k steps that is start·√k·exp(GROWTH·k). Each step rounds every weight, differently in the two runs: a random
    walk. And training amplifies the distance that there is.

    Args:
      steps: number of steps since the runs were equal.
      start: the difference after one step; see `_start`.

    Returns:
      Relative differences; infinite where the model gives 1 or more, so that it excludes nothing.
    """
    drift = start * np.sqrt(steps) * np.exp(np.minimum(GROWTH * steps, 100))
    return np.where(drift < 1, drift, np.inf)


def _start(profile: Profile, metric: bool) -> float:
    """The difference that a step's rounding makes: SAFETY spacings of the dtype, and one in 16 bits for a metric.

    A difference in the last bit of float32 changes some 16-bit roundings, each change causes others in the layers that
    follow, and within a step the two runs differ as if each had rounded by itself: by a spacing in every value. AdamW
    divides that by the gradient's size. Means and norms over many values differ by less.
    """
    return SPACING[profile] if metric and profile == "16bit" else SAFETY * SPACING[profile]


def compare_runs(first: Path, second: Path, spread: Path | None = None, profile: Profile = "float32") -> Comparison:
    """Compares two runs at the steps that both have.

    Args:
      first: a run's folder, metrics as JSONL or CSV with a column `step`, a weight file, or a folder of weight files
        whose names hold the step.
      second: the same.
      spread: a third run, which differs from the first in the order of its sums alone.
      profile: `16bit` if one of them computed in 16 bits; a config.json that says so is enough.

    Raises:
      ValueError: one of them is none of these, or they have no step and no metric in common.
    """
    a, b = read_run(first), read_run(second)
    c = read_run(spread) if spread else None
    if "16bit" in (a.profile, b.profile):
        profile = "16bit"
    drifts = [
        _metric(name, a.metrics[name], b.metrics[name], c.metrics.get(name) if c else None, profile)
        for name in a.metrics
        if name in b.metrics and not name.endswith(TIMES) and a.metrics[name].keys() & b.metrics[name].keys()
    ]
    for step in sorted(a.weights.keys() & b.weights.keys()):
        drifts += _weights(step, a.weights[step], b.weights[step], c.weights.get(step) if c else None, profile)
    if not drifts:
        raise ValueError(f"{a.name} and {b.name} have no step with a metric or a checkpoint in common.")
    model = _model(drifts, profile)
    return Comparison((a.name, b.name), drifts, _measured(drifts, a, c, model) if c else model)


def _lacking(drifts: Sequence[Drift], a: Run, c: Run) -> list[str]:
    """What the third run has no distance for at all."""
    lacking = []
    for drift in drifts:
        if drift.name in a.metrics:
            there = bool(a.metrics[drift.name].keys() & c.metrics.get(drift.name, {}).keys())
        else:
            there = int(drift.name.rpartition(" ")[2]) in c.weights
        lacking += [] if there or drift.name in GIVEN else [drift.name]
    return lacking


def _measured(drifts: Sequence[Drift], a: Run, c: Run, model: str) -> str:
    """Describes the bound that a third run gives, and `model` where it lacks something.

    Raises:
      ValueError: it has nothing in common with the first.
    """
    lacking = _lacking(drifts, a, c)
    if lacking and len(lacking) == sum(drift.name not in GIVEN for drift in drifts):
        raise ValueError(f"{c.name} has no step with a metric or a checkpoint in common with {a.name}.")
    sentence = f"The bound is {SAFETY:g} times the distance between {a.name} and {c.name}."
    return f"{sentence} That run lacks {', '.join(lacking)}: there it is a model. {model}" if lacking else sentence


def read_run(path: Path) -> Run:
    """Reads a run's metrics, and finds its checkpoints; arguments and errors as in `compare_runs`."""
    if not path.exists():
        raise ValueError(f"{path} does not exist.")
    metrics: dict[str, dict[int, float]] = {}
    weights: dict[int, Weights] = {}
    if path.is_file():
        if path.suffix in (".safetensors", ".pth", ".pt", ".bin"):
            weights[0] = functools.partial(read_published, path)
        else:
            metrics = read_metrics(path)
    else:
        for name in ("metrics.jsonl", "metrics.csv"):
            if not metrics and (path / name).is_file():
                metrics = read_metrics(path / name)
        for child in sorted((path / "checkpoints").glob("[0-9]*")):
            if child.name.isdigit():
                weights[int(child.name)] = functools.partial(read_checkpoint, child)
        for child in sorted(path.glob("*.safetensors")):
            if numbers := re.findall(r"\d+", child.stem):
                weights[int(numbers[-1])] = functools.partial(read_published, child)
    if not metrics and not weights:
        raise ValueError(
            f"{path} is no run: expected metrics.jsonl, metrics.csv or checkpoints in a folder, a .jsonl or .csv file "
            "with steps, or weights."
        )
    return Run(str(path), metrics, weights, _profile(path))


def _profile(path: Path) -> Profile:
    """What a run of ours computed in; float32 where there is no config.json that says otherwise."""
    try:
        dtype = json.loads((path / "config.json").read_text())["config"]["model"]["dit"]["compute_dtype"]
    except (OSError, ValueError, KeyError, TypeError):
        return "float32"
    return "float32" if dtype == "float32" else "16bit"


def read_metrics(path: Path) -> dict[str, dict[int, float]]:
    """Reads metrics by name and step, from JSONL or CSV; what is not a number is left out.

    Raises:
      ValueError: it can't be read, or has no `step`.
    """
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            records: list[Any] = list(csv.DictReader(file))
    else:
        records = [value for _, value in read_lines(path) if isinstance(value, dict)]
    found: dict[str, dict[int, float]] = {}
    for record in records:
        step = _number(record.get("step"))
        if step is None or not math.isfinite(step):
            continue
        for name, value in record.items():
            number = _number(value)
            if name != "step" and number is not None:
                found.setdefault(str(name), {})[int(step)] = number
    if not found:
        raise ValueError(f"{path} holds no metrics: every record needs a number called step, and others beside it.")
    return found


def read_checkpoint(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Reads the parameters of a checkpoint of ours, layer by layer."""
    params, _ = open_params(path)
    for name, leaf in flatten(params).items():
        stacked = "/blocks/" in name or name.startswith("projectors/")
        for i in range(leaf.shape[0] if stacked else 1):
            yield (f"{name}/{i}", np.asarray(leaf[i])) if stacked else (name, np.asarray(leaf))


def read_published(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Reads published weights under our names, layer by layer."""
    opened = open_transformer(path)
    shapes: Params = model_shapes(opened.config)
    if not opened.has_projectors:
        shapes = select(shapes, "projectors")
    table = model_table(opened.config.dit, opened.config.alignment if opened.has_projectors else None, opened.names)
    for name, leaf in flatten(stored(table, shapes, opened.tensors)).items():
        stacked = leaf.entry.stack
        for i in range(stacked or 1):
            yield (f"{name}/{i}", leaf[(slice(i, i + 1),)][0]) if stacked else (name, leaf[()])


def _number(value: object) -> float | None:
    """A number, or text that is one, finite or not; None for all else."""
    try:
        return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        return None


def _model(drifts: Sequence[Drift], profile: Profile) -> str:
    """Describes the bound that `rounding_drift` gives."""
    start, dtype = _start(profile, metric=True), "float32" if profile == "float32" else "16 bits"
    sentence = f"The bound is a model of rounding in {dtype}: {start:.1e} after a step, then as the root of the steps "
    sentence += f"and {GROWTH:.1%} more each step."
    if any(np.isinf(drift.bounds).any() for drift in drifts):
        horizon = int(np.argmax(np.isinf(rounding_drift(np.arange(1.0, 10_000), start)))) + 1
        sentence += f" After {horizon} steps it excludes nothing; a third run (--spread) measures the bound."
    return sentence


def _apart(x: float, y: float) -> float:
    """The relative difference of two numbers; infinite where one of them is not finite and the other is another."""
    if not (math.isfinite(x) and math.isfinite(y)):
        return 0.0 if repr(x) == repr(y) else math.inf
    return abs(x - y) / (max(abs(x), abs(y)) or 1.0)


def _metric(
    name: str, a: Mapping[int, float], b: Mapping[int, float], c: Mapping[int, float] | None, profile: Profile
) -> Drift:
    """The relative difference of a metric at each step that both have, and the bound."""
    steps = sorted(a.keys() & b.keys())

    def apart(other: Mapping[int, float]) -> np.ndarray:
        return np.array([_apart(a[s], other[s]) if s in other else math.nan for s in steps])

    every = steps[1] - steps[0] if len(steps) > 1 else max(steps[0], 1)  # a log may hold every tenth step alone
    bounds = rounding_drift(np.array(steps, float) - steps[0] + every, _start(profile, metric=True))
    if name in GIVEN:
        bounds = np.full(len(steps), TOLERANCES["float32"]["scalar"])
    elif c is not None and a.keys() & c.keys():
        measured = np.fmax.accumulate(np.nan_to_num(apart(c), posinf=np.inf))
        bounds = np.maximum(SAFETY * measured, _start(profile, metric=True))
    return Drift(name, steps, apart(b), bounds)


def _weights(step: int, a: Weights, b: Weights, c: Weights | None, profile: Profile) -> list[Drift]:
    """The distance of each layer's weights, relative to their norm, or to that of as many average weights.

    The larger norm counts. What began at 0 is all update at first, and AdamW divides an update by the gradient's size,
    with what the gradient's sums have rounded.
    """
    others = dict(b())
    third = dict(c()) if c else {}
    norms, sizes, apart, measured = dict[str, float](), dict[str, int](), dict[str, float](), dict[str, float]()
    for name, x in a():
        if name in others and others[name].shape == x.shape:
            norms[name], sizes[name] = _norm(x), x.size
            apart[name] = _norm(np.subtract(x, others.pop(name), dtype=np.float64))
            measured[name] = _norm(np.subtract(x, third[name], dtype=np.float64)) if name in third else 0.0
    if not norms:
        return []
    average = math.sqrt(sum(norm**2 for norm in norms.values()) / sum(sizes.values()))
    scales = np.array([max(norms[name], math.sqrt(sizes[name]) * average) or 1.0 for name in norms])
    bounds = np.full(len(scales), rounding_drift(np.array([max(step, 1.0)]), _start(profile, metric=False))[0])
    if third:
        bounds = SAFETY * np.maximum(np.array(list(measured.values())) / scales, SPACING["float32"])
    return [Drift(f"weights of step {step}", list(norms), np.array(list(apart.values())) / scales, bounds)]


def _norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64)))
