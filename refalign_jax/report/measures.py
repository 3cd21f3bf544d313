"""The paper's Figure 1(b) for a run: maps and measures of reference tokens before and after training, and the VFM's."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from refalign_jax.report import figures, representation, tokens
from refalign_jax.report.content import Chart, Section
from refalign_jax.report.render import render
from refalign_jax.report.run import Run
from refalign_jax.report.tokens import References
from refalign_jax.types import Float, Int

MEASURES: Mapping[str, str] = {
    "neighbour": "Nearest-neighbour subject accuracy",
    "cka": "Linear CKA to the VFM",
    "silhouette": "Silhouette by subject",
    "anywhere": "Subject accuracy with neighbours at any position",
}
"""Titles of the measures, each of which is computed after every block."""
SHORT: Mapping[str, str] = {
    "neighbour": "accuracy",
    "cka": "CKA",
    "silhouette": "silhouette",
    "anywhere": "accuracy, any position",
}
"""Shorter titles, for table heads."""
MAP_TOKENS = 700
"""The largest number of points on a map."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """The measures after every block, by the names in `MEASURES`, and the tokens after the last aligned block."""

    values: Mapping[str, Float[np.ndarray, " layers"]]
    tokens: Float[np.ndarray, "n D"]

    def mean(self, name: str, aligned: int) -> float:
        """The mean of a measure over the first `aligned` blocks."""
        return float(np.mean(self.values[name][:aligned]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The content of a table."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    """The first cell of a row names it."""
    total: Sequence[object] = ()
    """A last row that sums up the others."""


def measure(features: Float[np.ndarray, "layers n D"], references: References, aligned: int) -> Measured:
    """Measures the tokens after every block.

    Args:
      features: the reference tokens after every block.
      references: their subjects and the VFM's tokens.
      aligned: number of aligned blocks.
    """
    numbers = [_numbers(block, references) for block in features]
    values = {name: np.array([found[name] for found in numbers]) for name in MEASURES}
    return Measured(values=values, tokens=features[aligned - 1])


def _numbers(x: Float[np.ndarray, "n D"], references: References) -> dict[str, float]:
    subjects = references.subjects
    return {
        "neighbour": representation.neighbour_accuracy(x, subjects, references.allowed["elsewhere"]),
        "cka": representation.linear_cka(x, references.vfm),
        "silhouette": representation.silhouette(x, subjects),
        "anywhere": representation.neighbour_accuracy(x, subjects, references.allowed["anywhere"]),
    }


def tokens_section(run: Run) -> Section:
    """Maps and measures of a run's reference tokens; if they can't be computed, a sentence that says why."""
    try:
        references = tokens.read_references(run.config)
        trained, step = tokens.trained_params(run)
    except (ValueError, OSError) as error:
        return Section(html=render("tokens.html", failure=error))
    aligned = run.config.model.alignment.num_blocks
    states, failure = {f"after {step:,} steps": trained}, None
    try:
        states = {"before training": tokens.untrained_params(run.config), **states}
    except (ValueError, OSError) as error:
        failure = error
    measured = {
        state: measure(tokens.features(params, references, run.config, f"tokens {state}"), references, aligned)
        for state, params in states.items()
    }
    maps = token_maps({"of the VFM": references.vfm, **{s: m.tokens for s, m in measured.items()}}, references)
    charts = block_charts(measured, references, aligned if run.config.model.alignment.weight else 0)
    html = render(
        "tokens.html",
        failure=None,
        untrained_failure=failure,
        description=describe(references, run),
        aligned=aligned,
        names=references.names,
        maps=maps,
        charts=charts,
        table=_table(measured, references, aligned),
    )
    return Section(html=html, charts=(*maps, *charts))


def describe(references: References, run: Run) -> str:
    """Describes the tokens that are compared, and how they were computed."""
    examples, count = len(references.rows), len(references.subjects)
    which = "held-out examples" if references.held_out else "examples, the last of the dataset, seen in training"
    who = f"{len(references.names)} subjects" if references.named else "unnamed subjects"
    return (
        f"{count:,} reference tokens of {who}, out of {examples} {which}. References are clean; the video beside them "
        f"is noised to t = {tokens.noise_time(run.config):.0f}, the median time of training, with seed {tokens.SEED}. "
        "Tokens that show no subject, such as white padding, are left out. VFM is the vision foundation model."
    )


def token_maps(sets: Mapping[str, Float[np.ndarray, "n _"]], references: References, stem: str = "") -> list[Chart]:
    """PCA and t-SNE of each set of tokens; none if the dataset names no subjects.

    Args:
      sets: tokens by a title such as "before training".
      references: their subjects.
      stem: a part of the charts' file names.
    """
    if not references.named:
        return []
    count = len(references.subjects)
    chosen = np.unique(np.linspace(0, count - 1, min(count, MAP_TOKENS)).round().astype(int))
    subjects: Int[np.ndarray, " n"] = references.subjects[chosen]
    charts = []
    for kind, project in (("PCA", representation.principal_map), ("t-SNE", representation.tsne_map)):
        for title, x in sets.items():
            plain = re.sub(r"[^a-z0-9]+", "_", title.replace("λ", "lambda").lower()).strip("_")
            name = f"map_{kind.lower().replace('-', '')}_{stem}{plain}"
            charts.append(figures.token_map(name, f"{kind}, {title}", project(x[chosen]), subjects, f"{kind} map"))
    return charts


def block_charts(measured: Mapping[str, Measured], references: References, shaded: int, stem: str = "") -> list[Chart]:
    """A chart for every measure that is defined, with a line for every state.

    Args:
      measured: measures by state; the last state is drawn in the accent colour.
      references: the tokens' subjects and the VFM's tokens.
      shaded: number of blocks to shade.
      stem: a part of the charts' file names.
    """
    of_vfm = _numbers(references.vfm, references)
    random = {
        "neighbour": representation.chance(references.subjects, references.allowed["elsewhere"]),
        "anywhere": representation.chance(references.subjects, references.allowed["anywhere"]),
    }
    last = list(measured)[-1]
    charts = []
    for name, title in MEASURES.items():
        curves = [
            figures.Curve(
                label=state,
                x=np.arange(len(m.values[name])),
                y=m.values[name],
                strong=state == last,
                dashed=state != last,
            )
            for state, m in measured.items()
        ]
        if any(np.isfinite(curve.y).any() for curve in curves):
            levels = {"VFM": of_vfm[name]} if name != "cka" else {}
            if name in random:
                levels["chance"] = random[name]
            charts.append(figures.blocks(f"blocks_{stem}{name}", title, curves, shaded, levels))
    return charts


def _table(measured: Mapping[str, Measured], references: References, aligned: int) -> Table:
    """Every measure after every block, of the VFM's tokens, and the means over the aligned blocks."""
    head, columns = ["block"], []
    for name in MEASURES:
        for state, m in measured.items():
            head.append(f"{SHORT[name]}, {state}")
            columns.append((name, m))
    layers = len(columns[0][1].values["cka"])
    rows: list[Sequence[object]] = [[str(i), *(float(m.values[n][i]) for n, m in columns)] for i in range(layers)]
    vfm = _numbers(references.vfm, references)
    rows.append(["the VFM itself", *(vfm[name] for name, _ in columns)])
    total = [f"mean of blocks 0 to {aligned - 1}", *(m.mean(name, aligned) for name, m in columns)]
    return Table(head=head, rows=rows, total=total)
