"""The page of a verification: where values diverge, block by block, and the table; and that of two runs compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from refalign_jax.atomic import write_text
from refalign_jax.provenance import about
from refalign_jax.report.content import Chart, Section
from refalign_jax.report.figures import Curve, error_curves
from refalign_jax.report.render import render
from refalign_jax.verify.report import Curves, Report, Row
from refalign_jax.verify.runs import Comparison, Drift

HEAD = ("name", "shape", "max abs error", "relative error", "tolerance", "verdict")
WORST = 40
"""Tensors shown of the weights of a step."""


def write_verification(report: Report, out: Path, title: str) -> None:
    """Writes the page of a verified folder, one HTML file that needs no other.

    Raises:
      ValueError: `out` is not an .html file in a folder that exists.
      OSError: it can't be written.
    """
    check_page(out)
    charts = [_curves_chart(curves, i) for i, curves in enumerate(report.curves)]
    diverging = [(curves.name, curves.first) for curves in report.curves if curves.first]
    section = render("divergence.html", charts=charts, diverging=diverging, remarks=report.remarks)
    order = sorted(report.rows, key=lambda row: (row.passed, row.relative <= row.tolerance))
    rows = [*map(_cells, order), *([name, "", "", "", "", f"not compared: {x}"] for name, x in report.skipped.items())]
    sections = [
        ("divergence", "Where it diverges", Section(html=section)),
        ("table", "Every value", Section(html=render("verified.html", head=HEAD, rows=rows))),
    ]
    _write(out, title, report.summary, sections)


def write_comparison(comparison: Comparison, out: Path) -> None:
    """Writes the page of two runs compared; errors as in `write_verification`."""
    check_page(out)
    charts = [_drift_chart(drift, i) for i, drift in enumerate(comparison.drifts) if isinstance(drift.labels[0], int)]
    diverging = [(drift.name, str(drift.first)) for drift in comparison.drifts if drift.first is not None]
    html = render("divergence.html", charts=charts, diverging=diverging, remarks=[comparison.bound])
    sections = [("drift", "Drift over the steps", Section(html=html))]
    for drift in comparison.drifts:
        if not isinstance(drift.labels[0], int):
            worst = np.argsort(-drift.differences / drift.bounds)[:WORST]
            cells = [[drift.labels[i], f"{drift.differences[i]:.1e}", f"{drift.bounds[i]:.1e}"] for i in worst]
            table = render("verified.html", head=("tensor", "relative difference", "bound"), rows=cells)
            sections.append((drift.name.replace(" ", "-"), f"Farthest {drift.name}", Section(html=table)))
    _write(out, " and ".join(Path(name).name for name in comparison.names), comparison.summary, sections)


def check_page(out: Path) -> None:
    """Checks that a page can be written under this name.

    Raises:
      ValueError: it is not an .html file in a folder that exists.
    """
    if out.suffix != ".html" or not out.parent.is_dir():
        raise ValueError(f"{out} can't be the page; name an .html file in a folder that exists.")


def _write(out: Path, title: str, summary: str, sections: Sequence[tuple[str, str, Section]]) -> None:
    page = render(
        "page.html", title=title, summary=summary, paragraphs=(), pictures=(), sections=sections, made=about()
    )
    write_text(out, page)


def _cells(row: Row) -> list[str]:
    shape = "x".join(map(str, row.shape)) or "scalar"
    return [
        row.name,
        shape,
        f"{row.max_abs:.1e}",
        f"{row.relative:.1e}",
        f"{row.tolerance + row.floor:.0e}",
        row.verdict,
    ]


def _curves_chart(curves: Curves, number: int) -> Chart:
    """Errors of each operation over the blocks."""
    lines = [
        Curve(label=name.replace("_", " "), x=np.arange(len(errors)), y=np.asarray(errors, float))
        for name, errors in curves.errors.items()
    ]
    ends = np.array([0, max(len(errors) for errors in curves.errors.values()) - 1])
    limit = ("tolerance", ends, np.full(2, curves.tolerance))
    return error_curves(f"curves_{number}", curves.name, lines, "block", limit)


def _drift_chart(drift: Drift, number: int) -> Chart:
    """The difference of a metric over the steps, and its bound."""
    steps = np.array(drift.labels)
    line = Curve(label="difference", x=steps, y=drift.differences)
    return error_curves(f"drift_{number}", drift.name, [line], "step", ("rounding", steps, drift.bounds))
