"""Writes the report of a run as one HTML file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from refalign_jax.atomic import atomic_write, write_text
from refalign_jax.provenance import about
from refalign_jax.report import sections
from refalign_jax.report.compare import comparison, read_pairs
from refalign_jax.report.content import Chart, Section
from refalign_jax.report.measures import tokens_section
from refalign_jax.report.render import render
from refalign_jax.report.run import Run, read_run
from refalign_jax.report.targets import targets_section


def write_report(run: Path, out: Path, compare: Mapping[str, Sequence[tuple[Path, Path]]] | None = None) -> None:
    """Writes the report of a run as one HTML file that needs no other, and its charts as PNG files beside it.

    Files that are missing from the run's folder are left out, and the page says so.

    Args:
      run: folder of a run of the trainer.
      out: the HTML file. The charts go into a folder beside it, named after it with `_figures` appended.
      compare: comparisons by their headings, each of pairs of runs with the same seed, the first with alignment, the
        second without.

    Raises:
      ValueError: `run` or a folder of `compare` is not a run's, one of their files is damaged, or `out` is not an
        .html file in a folder that exists.
      OSError: the report can't be written.
    """
    if out.suffix != ".html" or not out.parent.is_dir():
        raise ValueError(f"{out} can't be the report; name an .html file in a folder that exists.")
    read = read_run(run)
    compared = {heading: read_pairs(pairs) for heading, pairs in (compare or {}).items()}
    parts: list[tuple[str, str, Callable[[], Section]]] = [
        ("samples", "Subjects and sampled videos", lambda: sections.samples(read)),
        ("evaluation", "Evaluation", lambda: sections.evaluation(read.evaluation)),
    ]
    for place, (heading, pairs) in enumerate(compared.items()):
        stem = f"compare_{place}_" if place else "compare_"
        parts.append((f"comparison-{place}", heading, lambda pairs=pairs, stem=stem: comparison(pairs, stem)))  # type: ignore[misc]
    parts += [
        ("tokens", "Reference tokens", lambda: tokens_section(read)),
        ("targets", "Targets and push", lambda: targets_section(read)),
        ("losses", "Losses", lambda: sections.losses(read)),
        ("set-up", "Set-up", lambda: sections.set_up(read)),
    ]
    made: list[tuple[str, str, Section]] = []
    for name, heading, make in (bar := tqdm(parts, desc="report", unit="section")):
        bar.set_postfix_str(heading)
        made.append((name, heading, make()))
    page = render(
        "page.html",
        title=(read.evaluation and read.evaluation.heading) or f"RefAlign run {read.folder.resolve().name}",
        summary=_summary(read),
        paragraphs=read.evaluation.paragraphs if read.evaluation else (),
        pictures=sections.pictures(read),
        sections=made,
        made=about(),
    )
    figures = out.with_name(f"{out.stem}_figures")
    new = not figures.exists()
    try:
        _write_charts(figures, [chart for *_, section in made for chart in section.charts])
        write_text(out, page)
    except OSError:  # such as a full disk
        if new:
            shutil.rmtree(figures, ignore_errors=True)
        raise


def _summary(run: Run) -> str:
    """The run in a sentence."""
    config, last = run.config, run.steps[-1]["step"] if run.steps else 0
    weight = config.model.alignment.weight
    how = f"with reference alignment (λ = {weight:g})" if weight else "without reference alignment (λ = 0)"
    names = [Path(path).name for path in config.data.paths]
    data = f"prepared examples of {' and '.join(names)}" if names else "synthetic noise"
    return f"A video diffusion transformer trained for {last:,} steps {how} on {data}."


def _write_charts(folder: Path, charts: Sequence[Chart]) -> None:
    if charts:
        folder.mkdir(exist_ok=True)
    for chart in charts:
        with atomic_write(folder / f"{chart.name}.png") as temporary:
            temporary.write_bytes(chart.light)
