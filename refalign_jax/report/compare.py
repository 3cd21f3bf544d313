"""Pairs of runs that differ in the alignment's weight alone: what alignment changes, seed by seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from refalign_jax.config.recipe import flat_fields
from refalign_jax.report import figures, html, tokens
from refalign_jax.report.measures import MEASURES, Measured, Part, block_charts, describe, measure, token_maps
from refalign_jax.report.run import Run, read_run
from refalign_jax.report.tokens import References

OTHER = ("model.alignment.weight", "train.folder", "train.checkpoint_folder", "train.compilation_cache")
"""Fields in which the runs of a pair may differ without the page saying so."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A run with alignment and one without."""

    aligned: Run
    baseline: Run

    @property
    def name(self) -> str:
        """What the page calls it."""
        return f"seed {self.aligned.config.train.seed}"

    def differences(self) -> list[str]:
        """Fields, beside the alignment's weight, in which their recipes differ."""
        one, other = (flat_fields(dataclasses.asdict(run.config)) for run in (self.aligned, self.baseline))
        return [name for name in one if one[name] != other[name] and name not in OTHER]


def read_pairs(folders: Sequence[tuple[Path, Path]]) -> list[Pair]:
    """Reads pairs of runs.

    Raises:
      ValueError: a folder is no run's, or a pair is not one with alignment and one without, of one seed.
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
    """A plain sentence on whether a number is higher with alignment."""
    differences = np.subtract(aligned, baseline)
    count, higher = len(differences), int(np.sum(differences > 0))
    mean, low, high = interval(differences.tolist())
    if not np.isfinite(differences).all():
        return f"{title} could not be measured in every run."
    if higher == count:
        said = "is higher with alignment than with λ = 0 in " + (f"all {count} pairs" if count > 1 else "the one pair")
    else:
        said = f"is higher with alignment than with λ = 0 in {higher} of {count} pairs, so not in every seed"
    if count < 2:
        return f"{title} {said} (difference {mean:+.3g}; one pair gives no interval)."
    doubt = "" if low > 0 or high < 0 else "; the interval includes 0"
    return f"{title} {said} (mean difference {mean:+.3g}, 95% interval {low:+.3g} to {high:+.3g}{doubt})."


def comparison(pairs: Sequence[Pair]) -> Part:
    """The section on the pairs: sentences of the outcome, numbers seed by seed, charts and maps."""
    parts: list[str] = []
    pictures: list[figures.Picture] = []
    try:
        references, measured = _measure(pairs)
    except (ValueError, OSError) as error:
        parts.append(html.paragraph(f"The reference tokens of the pairs are left out: {error}"))
    else:
        told = _representations(pairs, references, measured)
        parts.append(told.html)
        pictures += told.pictures
    for pair in pairs:
        if others := pair.differences():
            parts.append(html.paragraph(f"The runs of {pair.name} differ in {', '.join(others)} too."))
    parts.append(_evaluations(pairs))
    return Part(html="".join(parts), pictures=tuple(pictures))


def _measure(pairs: Sequence[Pair]) -> tuple[References, list[tuple[Measured, Measured]]]:
    """The first pair's references, and each pair's numbers on its own."""
    measured, first = [], None
    for pair in pairs:
        references = tokens.read_references(pair.aligned.config)
        first = first or references
        aligned = pair.aligned.config.model.alignment.num_blocks
        one, other = (
            measure(
                tokens.features(tokens.trained_params(run)[0], references, run.config, f"tokens of {run.folder.name}"),
                references,
                aligned,
            )
            for run in (pair.aligned, pair.baseline)
        )
        measured.append((one, other))
    assert first is not None
    return first, measured


def _representations(
    pairs: Sequence[Pair], references: References, measured: Sequence[tuple[Measured, Measured]]
) -> Part:
    """Outcome, table and charts of the numbers of reference tokens, means over the aligned blocks."""
    aligned = pairs[0].aligned.config.model.alignment.num_blocks
    names = [pair.name for pair in pairs]
    values = {name: [[m.mean(name, aligned) for m in pair] for pair in measured] for name in MEASURES}
    values = {name: rows for name, rows in values.items() if np.isfinite(rows).any()}
    sentences = [outcome(MEASURES[name], *zip(*rows, strict=True)) for name, rows in values.items()]
    rows_of = {MEASURES[name]: rows for name, rows in values.items()}
    charts = [
        figures.pairs(f"compare_{name}", MEASURES[name], names, *zip(*rows, strict=True))
        for name, rows in values.items()
    ]
    states = {"λ = 0": measured[0][1], "with alignment": measured[0][0]}
    lines = block_charts(states, references, aligned, "compare_")
    maps = token_maps({state: m.tokens for state, m in states.items()}, references, "compare_")
    parts = [
        html.outcome(sentences),
        html.paragraph(
            f"Means over the aligned blocks, 0 to {aligned - 1}, after training; the runs of a pair start from the "
            f"same transformer and see the same batches. {describe(references, pairs[0].aligned)}"
        ),
        html.figures(charts, 440),
        differences_table(names, rows_of),
        f"<h3>Block by block, {names[0]}</h3>",
        html.figures(lines, 440),
    ]
    if maps:
        parts += [
            f"<h3>Maps after block {aligned - 1}, {names[0]}</h3>",
            html.legend(references.names),
            html.figures(maps, 250),
        ]
    return Part(html="".join(parts), pictures=(*charts, *lines, *maps))


def _evaluations(pairs: Sequence[Pair]) -> str:
    """The numbers of evaluation.json that all runs have."""
    found = [(pair.aligned.evaluation, pair.baseline.evaluation) for pair in pairs]
    if any(evaluation is None for both in found for evaluation in both):
        return html.paragraph("Not every run of the pairs has an evaluation.json, so evaluations are not compared.")
    numbers = [tuple(evaluation.numbers for evaluation in both if evaluation) for both in found]
    shared = [name for name in numbers[0][0] if all(name in told for both in numbers for told in both)]
    if not shared:
        return html.paragraph("The evaluations of the pairs have no number in common.")
    rows = {name: [[told[name] for told in both] for both in numbers] for name in shared}
    return "<h3>Evaluation of the samples</h3>" + differences_table([pair.name for pair in pairs], rows)


def differences_table(names: Sequence[str], values: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Aligned against λ = 0 for each pair, the mean difference and its interval; a row a number."""
    head = ["aligned / λ = 0", "mean difference", "95% interval", *names]
    rows = []
    for title, pairs in values.items():
        mean, low, high = interval([one - other for one, other in pairs])
        between = f"{low:+.3g} to {high:+.3g}" if np.isfinite(low) else html.ABSENT
        rows.append([title, f"{mean:+.3g}", between, *(f"{html.number(a)} / {html.number(b)}" for a, b in pairs)])
    return html.table(head, rows)
