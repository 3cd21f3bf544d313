"""Pairs of runs that differ only in the weight of the alignment: what alignment changes, for each seed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from refalign_jax.config.recipe import flat_fields
from refalign_jax.convert.checkpoint import find_checkpoint
from refalign_jax.report import figures, tokens
from refalign_jax.report.content import Section
from refalign_jax.report.measures import MEASURES, Measured, Table, block_charts, describe, measure, token_maps
from refalign_jax.report.render import ABSENT, number, render
from refalign_jax.report.run import Run, read_run
from refalign_jax.report.tokens import References

OTHER = ("model.alignment.weight", "train.folder", "train.checkpoint_folder", "train.compilation_cache")
"""Fields in which the two runs of a pair may differ without a note on the page."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A run with alignment and one without."""

    aligned: Run
    baseline: Run

    @property
    def name(self) -> str:
        """The name of the pair on the page."""
        return f"seed {self.aligned.config.train.seed}"

    def differences(self) -> list[str]:
        """Fields in which the two recipes differ, except those in `OTHER`."""
        one, other = (flat_fields(dataclasses.asdict(run.config)) for run in (self.aligned, self.baseline))
        return [name for name in one if one[name] != other[name] and name not in OTHER]


def read_pairs(folders: Sequence[tuple[Path, Path]]) -> list[Pair]:
    """Reads pairs of runs.

    Raises:
      ValueError: a folder is not a run's, or a pair is not a run with alignment and a run without of the same seed.
    """
    pairs = []
    for first, second in folders:
        pair = Pair(aligned=read_run(first), baseline=read_run(second))
        weights = pair.aligned.config.model.alignment.weight, pair.baseline.config.model.alignment.weight
        if not weights[0] or weights[1]:
            raise ValueError(
                f"{first} and {second} have alignment weights {weights[0]} and {weights[1]}; a pair is a run with "
                "alignment, then one with model.alignment.weight 0."
            )
        seeds = pair.aligned.config.train.seed, pair.baseline.config.train.seed
        if seeds[0] != seeds[1]:
            raise ValueError(f"{first} and {second} have the seeds {seeds[0]} and {seeds[1]}; a pair has one seed.")
        pairs.append(pair)
    return pairs


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences and its 95% t-interval; NaN bounds with fewer than two pairs."""
    values = np.asarray(differences, np.float64)
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return mean, float("nan"), float("nan")
    half = float(student.ppf(0.975, count - 1) * values.std(ddof=1) / np.sqrt(count))
    return mean, mean - half, mean + half


def outcome(title: str, aligned: Sequence[float], baseline: Sequence[float]) -> str:
    """A plain sentence on whether a measure is higher with alignment."""
    differences = np.subtract(aligned, baseline)
    count, higher = len(differences), int(np.sum(differences > 0))
    mean, low, high = interval(differences.tolist())
    if not np.isfinite(differences).all():
        return f"{title} could not be measured in every run."
    if higher == count:
        result = "is higher with alignment than with λ = 0 in " + (
            f"all {count} pairs" if count > 1 else "the one pair"
        )
    else:
        result = f"is higher with alignment than with λ = 0 in {higher} of {count} pairs, so not in every seed"
    if count < 2:
        return f"{title} {result} (difference {mean:+.3g}; one pair gives no interval)."
    doubt = "" if low > 0 or high < 0 else "; the interval includes 0"
    return f"{title} {result} (mean difference {mean:+.3g}, 95% interval {low:+.3g} to {high:+.3g}{doubt})."


def comparison(pairs: Sequence[Pair], stem: str = "compare_") -> Section:
    """The section about the pairs: outcomes in sentences, numbers for each seed, charts and maps.

    Args:
      pairs: the runs.
      stem: what the charts' file names begin with.
    """
    failure: Exception | None = None
    compared: dict[str, Any] = {}
    try:
        references, measured = _measure(pairs)
    except (ValueError, OSError) as error:
        failure = error
    else:
        compared = _representations(pairs, references, measured, stem)
    evaluated, evaluations = _evaluations(pairs)
    html = render(
        "comparison.html",
        failure=failure,
        tokens=compared,
        differences=[(pair.name, fields) for pair in pairs if (fields := pair.differences())],
        evaluated=evaluated,
        evaluations=evaluations,
    )
    charts = () if failure else (*compared["charts"], *compared["by_block"], *compared["maps"])
    return Section(html=html, charts=charts)


def _measure(pairs: Sequence[Pair]) -> tuple[References, list[tuple[Measured, Measured]]]:
    """The references of the first pair, and the measures of every pair, each run on the references of its dataset."""
    measured = [(_newest_measures(pair.aligned), _newest_measures(pair.baseline)) for pair in pairs]
    return tokens.read_references(pairs[0].aligned.config), measured


def _newest_measures(run: Run) -> Measured:
    path, _ = find_checkpoint(run.folder)
    return _measure_run(run.folder, path)


@functools.lru_cache(maxsize=64)
def _measure_run(folder: Path, checkpoint: object) -> Measured:
    """The measures of a run at its newest checkpoint, `checkpoint`; kept, since comparisons may share a run."""
    run = read_run(folder)
    references = tokens.read_references(run.config)
    params = tokens.trained_params(run)[0]
    features = tokens.features(params, references, run.config, f"tokens of {run.folder.name}")
    return measure(features, references, run.config.model.alignment.num_blocks)


def _representations(
    pairs: Sequence[Pair], references: References, measured: Sequence[tuple[Measured, Measured]], stem: str
) -> dict[str, Any]:
    """What comparison.html shows of the reference tokens; the measures are means over the aligned blocks."""
    aligned = pairs[0].aligned.config.model.alignment.num_blocks
    names = [pair.name for pair in pairs]
    values = {name: [[m.mean(name, aligned) for m in pair] for pair in measured] for name in MEASURES}
    values = {name: rows for name, rows in values.items() if np.isfinite(rows).any()}
    charts = [
        figures.pairs(f"{stem}{name}", MEASURES[name], names, *zip(*rows, strict=True)) for name, rows in values.items()
    ]
    states = {"λ = 0": measured[0][1], "with alignment": measured[0][0]}
    return {
        "outcomes": [outcome(MEASURES[name], *zip(*rows, strict=True)) for name, rows in values.items()],
        "aligned": aligned,
        "description": describe(references, pairs[0].aligned),
        "charts": charts,
        "tables": differences_table(names, {MEASURES[name]: rows for name, rows in values.items()}),
        "first": names[0],
        "by_block": block_charts(states, references, aligned, stem),
        "names": references.names,
        "maps": token_maps({state: m.tokens for state, m in states.items()}, references, stem),
    }


def _evaluations(pairs: Sequence[Pair]) -> tuple[bool, tuple[Table, Table] | None]:
    """Whether every run was evaluated, and tables of the measures that all evaluations have."""
    found = [(pair.aligned.evaluation, pair.baseline.evaluation) for pair in pairs]
    if any(evaluation is None for both in found for evaluation in both):
        return False, None
    numbers = [tuple(evaluation.numbers for evaluation in both if evaluation) for both in found]
    shared = [name for name in numbers[0][0] if all(name in values for both in numbers for values in both)]
    rows = {name: [[values[name] for values in both] for both in numbers] for name in shared}
    return True, differences_table([pair.name for pair in pairs], rows)


def differences_table(names: Sequence[str], values: Mapping[str, Sequence[Sequence[float]]]) -> tuple[Table, Table]:
    """A table of the mean differences with their intervals, and one of both values of each pair; a row each measure.

    Args:
      names: of the pairs.
      values: for each measure and each pair, the value with alignment and the value without.
    """
    means, rows = [], []
    for title, pairs in values.items():
        mean, low, high = interval([one - other for one, other in pairs])
        between = f"{low:+.3g} to {high:+.3g}" if np.isfinite(low) else ABSENT
        means.append([title, *(float(np.mean(column)) for column in zip(*pairs, strict=True)), f"{mean:+.3g}", between])
        rows.append([title, *(f"{number(a)} / {number(b)}" for a, b in pairs)])
    head = ["mean of the pairs", "aligned", "λ = 0", "difference", "95% interval"]
    return Table(head=head, rows=means), Table(head=["aligned / λ = 0", *names], rows=rows)
