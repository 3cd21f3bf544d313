"""OpenS2V-Eval's table: one's own row beside published ones, as text, Markdown and JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from refalign_jax.evaluate.scores import Domain, Score, metrics_of, total

PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "RefAlign-14B": {
        "Aesthetic": 46.84,
        "Smoothness": 97.61,
        "Amplitude": 22.48,
        "FaceSim": 55.23,
        "Gme": 68.32,
        "Nexus": 48.52,
        "Natural": 73.63,
    },
    "VINO": {
        "Aesthetic": 45.92,
        "Smoothness": 94.73,
        "Amplitude": 12.30,
        "FaceSim": 52.00,
        "Gme": 69.69,
        "Nexus": 42.67,
        "Natural": 71.99,
    },
    "VACE-14B": {
        "Aesthetic": 47.21,
        "Smoothness": 94.97,
        "Amplitude": 15.02,
        "FaceSim": 55.09,
        "Gme": 67.27,
        "Nexus": 44.08,
        "Natural": 67.04,
    },
    "Phantom-14B": {
        "Aesthetic": 46.39,
        "Smoothness": 96.31,
        "Amplitude": 33.42,
        "FaceSim": 51.46,
        "Gme": 70.65,
        "Nexus": 37.43,
        "Natural": 69.35,
    },
    "RefAlign-1.3B": {
        "Aesthetic": 42.96,
        "Smoothness": 94.74,
        "Amplitude": 20.74,
        "FaceSim": 53.06,
        "Gme": 66.85,
        "Nexus": 43.97,
        "Natural": 66.25,
    },
}
"""Rows of the public leaderboard in the Open-Domain, read in November 2026."""

SPREAD = (
    "Totals are noisy: Phantom-14B stands at 56.77 on the leaderboard and was measured again at 60.43 by others "
    "(arXiv 2609.11507)."
)
COPY_PASTE = (
    "FaceSim - Natural is high where subjects are pasted in rather than shown anew: RefAlign trained without its loss "
    "has 68.45 - 40.46 = 27.99."
)
DOMAIN_NAMES: Mapping[Domain, str] = {"open": "Open-Domain", "single": "Single-Domain", "human": "Human-Domain"}


def rows(name: str, scores: Mapping[str, Score], domain: Domain) -> list[tuple[str, ...]]:
    """Returns the table's head, one's own row, and the published rows of the domain.

    Args:
      name: of the row.
      scores: each metric of the domain.
      domain: decides on metrics and weights.
    """
    columns = [metric.name for metric in metrics_of(domain)]
    own = {column: scores[column].percent for column in columns}
    published = PUBLISHED if domain == "open" else {}
    return [
        ("model", "TotalScore", *columns, "FaceSim - Natural"),
        _row(name, own, domain),
        *(_row(model, values, domain) for model, values in published.items()),
    ]


def _row(name: str, values: Mapping[str, float | None], domain: Domain) -> tuple[str, ...]:
    columns = [values[metric.name] for metric in metrics_of(domain)]
    face, natural = values["FaceSim"], values["Natural"]
    gap = None if face is None or natural is None else face - natural
    return (name, *(_cell(value) for value in (total(values, domain), *columns, gap)))


def _cell(value: float | None) -> str:
    return "missing" if value is None else f"{value:.2f}"


def text(name: str, scores: Mapping[str, Score], domain: Domain) -> str:
    """Returns the table in aligned columns, and what there is to know about it."""
    table = rows(name, scores, domain)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [f"OpenS2V-Eval, {DOMAIN_NAMES[domain]}, percent"]
    lines += [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in table
    ]
    return "\n".join([*lines, "", *notes(scores, domain)])


def markdown(name: str, scores: Mapping[str, Score], domain: Domain) -> str:
    """Returns the table and the notes in Markdown."""
    head, *body = rows(name, scores, domain)
    lines = [f"# OpenS2V-Eval, {DOMAIN_NAMES[domain]}", ""]
    lines += [_line(head), _line(("---",) * len(head)), *map(_line, body), ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes(scores, domain)), ""])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def notes(scores: Mapping[str, Score], domain: Domain) -> list[str]:
    """Returns what a reader of the table must know: missing metrics, how many videos, spread, copy-paste."""
    missing = [metric for metric in metrics_of(domain) if scores[metric.name].percent is None]
    found = []
    if missing:
        files = ", ".join(f"{metric.name} ({', '.join(metric.files)})" for metric in missing)
        found.append(f"No total: {files} missing. A missing metric does not count as zero.")
    counts = {name: score.videos for name, score in scores.items() if score.percent is not None}
    if len(set(counts.values())) == 1:
        found.append(f"Means over {next(iter(counts.values()))} videos.")
    elif counts:
        found.append(
            "Means over the videos that have a value: " + ", ".join(f"{k} {v}" for k, v in counts.items()) + "."
        )
    for name, score in scores.items():
        if score.skipped:
            listed = ", ".join(score.skipped[:3]) + (" …" if len(score.skipped) > 3 else "")
            found.append(f"{name}: {len(score.skipped)} videos have no value that counts ({listed}).")
    return [*found, SPREAD, COPY_PASTE]


def report(name: str, scores: Mapping[str, Score], domain: Domain) -> dict[str, Any]:
    """Returns everything for JSON."""
    values = {metric: score.percent for metric, score in scores.items()}
    return {
        "model": name,
        "benchmark": "OpenS2V-Eval v1.1",
        "domain": DOMAIN_NAMES[domain],
        "total": total(values, domain),
        "metrics": {
            metric: {"percent": score.percent, "videos": score.videos, "without_value": list(score.skipped)}
            for metric, score in scores.items()
        },
        "notes": notes(scores, domain),
    }
