"""The paper's Figure 1(b) from a run: reference tokens before and after training, and the VFM's; maps and numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from refalign_jax.report import html, representation, tokens
from refalign_jax.report.figures import Curve, Picture, blocks, token_map
from refalign_jax.report.run import Run
from refalign_jax.report.tokens import References
from refalign_jax.types import Float, Int

MEASURES: Mapping[str, str] = {
    "neighbour": "Nearest-neighbour subject accuracy",
    "cka": "Linear CKA to the VFM",
    "silhouette": "Silhouette by subject",
}
"""Names of the numbers, each told for every block."""
MAP_TOKENS = 900
"""Points of a map at most."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """Numbers of every block, under the names of `MEASURES`, and the tokens after the last aligned block."""

    values: Mapping[str, Float[np.ndarray, " layers"]]
    tokens: Float[np.ndarray, "n D"]

    def mean(self, name: str, aligned: int) -> float:
        """A number's mean over the first `aligned` blocks."""
        return float(np.mean(self.values[name][:aligned]))


def measure(features: Float[np.ndarray, "layers n D"], references: References, aligned: int) -> Measured:
    """Measures tokens after every block; see `Measured`."""
    numbers = [_numbers(block, references) for block in features]
    values = {name: np.array([found[name] for found in numbers]) for name in MEASURES}
    return Measured(values=values, tokens=features[aligned - 1])


def _numbers(x: Float[np.ndarray, "n D"], references: References) -> dict[str, float]:
    subjects = references.subjects
    return {
        "neighbour": representation.neighbour_accuracy(x, subjects, references.allowed),
        "cka": representation.linear_cka(x, references.vfm),
        "silhouette": representation.silhouette(x, subjects),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the page and the pictures in it."""

    html: str
    pictures: tuple[Picture, ...] = ()


def tokens_part(run: Run) -> Part:
    """Maps and numbers of a run's reference tokens; where they can't be had, a sentence that says why."""
    try:
        references = tokens.read_references(run.config)
        trained, step = tokens.trained_params(run)
    except (ValueError, OSError) as error:
        return Part(html=html.paragraph(f"The reference tokens are left out: {error}"))
    aligned = run.config.model.alignment.num_blocks
    states = {f"after {step:,} steps": trained}
    said = []
    try:
        states = {"before training": tokens.untrained_params(run.config), **states}
    except (ValueError, OSError) as error:
        said.append(html.paragraph(f"The state before training is left out: {error}"))
    measured = {
        state: measure(tokens.features(params, references, run.config, f"tokens {state}"), references, aligned)
        for state, params in states.items()
    }
    maps = token_maps({"of the VFM": references.vfm, **{s: m.tokens for s, m in measured.items()}}, references)
    charts = block_charts(measured, references, aligned if run.config.model.alignment.weight else 0)
    parts = [html.paragraph(describe(references, run)), *said]
    if maps:
        parts += [
            f"<h3>Maps of the tokens, after block {aligned - 1}</h3>",
            html.legend(references.names),
            html.figures(maps, 250),
        ]
    else:
        parts.append(html.paragraph("The dataset names no subjects, so there is nothing to colour maps by."))
    parts += ["<h3>Numbers by block</h3>", html.paragraph(EXPLANATION), html.figures(charts, 310)]
    parts.append(_table(measured, references, aligned))
    return Part(html="".join(parts), pictures=(*maps, *charts))


EXPLANATION = (
    "Tokens are compared by cosine after their common mean is removed. The nearest neighbour of a token is looked for "
    "among tokens of other examples that do not show the same pixels, so that a picture cannot be its own neighbour. "
    "CKA tells how far tokens differ from each other as the VFM's do: 1 is the same but for rotation and scale. Shaded "
    "blocks are those that training aligned."
)


def describe(references: References, run: Run) -> str:
    """A sentence on what was looked at."""
    examples, count = len(references.rows), len(references.subjects)
    which = "held-out examples" if references.held_out else "examples, the last of the dataset, which training saw"
    who = f"{len(references.names)} subjects" if references.named else "nameless subjects"
    return (
        f"{count:,} reference tokens of {who}, out of {examples} {which}. References are clean, the video beside them "
        f"is noised to t = {tokens.noise_time(run.config):.0f}, the median of training, with seed {tokens.SEED}. "
        "Tokens that show the same in references of different subjects, such as white padding, are left out."
    )


def token_maps(sets: Mapping[str, Float[np.ndarray, "n _"]], references: References, stem: str = "") -> list[Picture]:
    """PCA and t-SNE of each set of tokens; none where no subject has a name."""
    if not references.named:
        return []
    count = len(references.subjects)
    chosen = np.unique(np.linspace(0, count - 1, min(count, MAP_TOKENS)).round().astype(int))
    subjects: Int[np.ndarray, " n"] = references.subjects[chosen]
    pictures = []
    for kind, project in (("PCA", representation.principal_map), ("t-SNE", representation.tsne_map)):
        for title, x in sets.items():
            name = f"map_{kind.lower().replace('-', '')}_{stem}{title.replace(' ', '_').replace(',', '')}"
            pictures.append(token_map(name, f"{kind}, {title}", project(x[chosen]), subjects, f"{kind} map"))
    return pictures


def block_charts(
    measured: Mapping[str, Measured], references: References, shaded: int, stem: str = ""
) -> list[Picture]:
    """A chart for every number that can be told, a line for every state."""
    of_vfm = _numbers(references.vfm, references)
    random = representation.chance(references.subjects, references.allowed)
    last = list(measured)[-1]
    pictures = []
    for name, title in MEASURES.items():
        curves = [
            Curve(
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
            if name == "neighbour":
                levels["chance"] = random
            pictures.append(blocks(f"blocks_{stem}{name}", title, curves, shaded, levels))
    return pictures


def _table(measured: Mapping[str, Measured], references: References, aligned: int) -> str:
    """Every number of every block, then means over the aligned blocks and the VFM's own."""
    head, columns = ["block"], []
    for name, title in MEASURES.items():
        for state, m in measured.items():
            head.append(f"{title.split()[0].rstrip(',')}, {state}" if name != "cka" else f"CKA, {state}")
            columns.append((name, m))
    layers = len(columns[0][1].values["cka"])
    rows: list[Sequence[object]] = [[str(i), *(float(m.values[n][i]) for n, m in columns)] for i in range(layers)]
    vfm = _numbers(references.vfm, references)
    rows.append(["the VFM itself", *(vfm[name] for name, _ in columns)])
    total = [f"mean of blocks 0 to {aligned - 1}", *(m.mean(name, aligned) for name, m in columns)]
    return f"<details><summary>All numbers</summary>{html.table(head, rows, total)}</details>"
