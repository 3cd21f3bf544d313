"""The push that remains at perfect alignment, on the dataset of a run."""

from __future__ import annotations

import math

from refalign_jax.data.shards import ShardSource
from refalign_jax.data.targets import RemainingPush, remaining_pushes
from refalign_jax.report.content import Section
from refalign_jax.report.render import render
from refalign_jax.report.run import Run


def targets_section(run: Run) -> Section:
    """How far pull and push contradict each other; if that can't be computed, a sentence that says why."""
    config = run.config
    try:
        if config.synthetic.num_examples:
            raise ValueError("The run was trained on synthetic noise, which has no targets.")
        count = config.data.grown_from
        if config.data.mix or isinstance(count, tuple):
            raise ValueError("The run was trained on several datasets; tools/overview.py measures each of them.")
        found = remaining_pushes(ShardSource(config.data.path), config.model.alignment, count=count or None)
        if not found.examples:
            raise ValueError("No example that was read has two subjects, so nothing is pushed apart.")
    except (ValueError, OSError) as error:
        return Section(html=render("targets.html", failure=error))
    return Section(
        html=render(
            "targets.html", failure=None, found=found, published=found.all_patches["as published"], rows=_rows(found)
        )
    )


def _rows(found: RemainingPush) -> list[tuple[str, float, float]]:
    """The rows of the table: targets, and the push over all patches and over those that show a subject."""
    subject = found.subject_patches
    return [(name, value, subject.get(name, math.nan)) for name, value in found.all_patches.items()]
