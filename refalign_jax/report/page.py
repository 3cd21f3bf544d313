"""The report of a run, written whole or not at all: the body of tools/report.py."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from refalign_jax.provenance import about
from refalign_jax.report import html, sections
from refalign_jax.report.compare import comparison, read_pairs
from refalign_jax.report.figures import Picture
from refalign_jax.report.measures import Part, tokens_part
from refalign_jax.report.run import Run, read_run


def write_report(run: Path, out: Path, compare: Sequence[tuple[Path, Path]] = ()) -> None:
    """Writes a run's report, one HTML file that needs no other, and its charts as PNG files beside it.

    What the run's folder lacks is left out, and the page says so.

    Args:
      run: folder of a run of the trainer.
      out: the HTML file; charts go into a folder of its name with `_figures`.
      compare: pairs of runs of one seed, with alignment and without.

    Raises:
      ValueError: `run` or one of `compare` is no run, a file of theirs is damaged, or `out` can't be named so.
      OSError: the report can't be written.
    """
    if out.suffix != ".html" or not out.parent.is_dir():
        raise ValueError(f"{out} can't be the report; name an .html file in a folder that exists.")
    read, pairs = read_run(run), read_pairs(compare)
    title = f"RefAlign run {read.folder.resolve().name}"
    parts: dict[str, tuple[str, Part]] = {}
    makers = {
        "losses": ("Losses", lambda: sections.losses(read)),
        "samples": ("Subjects and what was sampled", lambda: Part(html=sections.samples(read))),
        "evaluation": ("Evaluation", lambda: Part(html=sections.evaluation(read.evaluation))),
        "tokens": ("What the reference tokens show", lambda: tokens_part(read)),
    }
    if pairs:
        makers["comparison"] = ("With alignment and without", lambda: comparison(pairs))
    for name, (heading, make) in (bar := tqdm(makers.items(), desc="report", unit="section")):
        bar.set_postfix_str(heading)
        parts[name] = heading, make()
    _write_figures(out.with_name(f"{out.stem}_figures"), [p for _, part in parts.values() for p in part.pictures])
    partial = out.with_name(f"{out.name}.partial")
    partial.write_text(html.page(title, _body(title, read, parts)), encoding="utf-8")
    partial.replace(out)


def report(
    run: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    out: Path | None = None,
    compare: tuple[tuple[Path, Path], ...] = (),
) -> None:
    """Writes what a run was, learned and sampled as one HTML page.

    Args:
      run: its folder, the train.folder of tools/train.py.
      out: the HTML file; unless named, report.html in the run's folder.
      compare: pairs of runs of one seed, each with alignment, then without (model.alignment.weight 0).
    """
    out = out or run / "report.html"
    write_report(run, out, compare)
    print(f"The report is {out}.")


def _body(title: str, run: Run, parts: dict[str, tuple[str, Part]]) -> str:
    """Head, sections in order, foot."""
    links = "".join(f'<a href="#{name}">{escape(heading)}</a>' for name, (heading, _) in parts.items())
    made = about()
    return (
        f"<header><h1>{escape(title)}</h1>{html.paragraph(_summary(run), 'lead')}<nav>{links}</nav></header>"
        f"<main>{sections.about(run)}"
        + "".join(html.section(name, heading, [part.html]) for name, (heading, part) in parts.items())
        + f"</main><footer>Written {escape(made['time'])} by <code>{escape(made['command'])}</code>, commit "
        f"<code>{escape(made['commit'])}</code>.</footer>"
    )


def _summary(run: Run) -> str:
    """The run in a sentence."""
    config, last = run.config, run.steps[-1]["step"] if run.steps else 0
    weight = config.model.alignment.weight
    how = f"with reference alignment (λ = {weight:g})" if weight else "without reference alignment (λ = 0)"
    data = f"prepared examples of {Path(config.data.path).name}" if config.data.path else "synthetic noise"
    return f"A video diffusion transformer trained for {last:,} steps {how} on {data}."


def _write_figures(folder: Path, pictures: Sequence[Picture]) -> None:
    if pictures:
        folder.mkdir(exist_ok=True)
    for picture in pictures:
        (folder / f"{picture.name}.png").write_bytes(picture.light)
