"""Compares two runs, such as one that was stopped and started again with one that never stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from refalign_jax.convert.checkpoint import ARRAYS, find_checkpoint, read_arrays, read_json
from refalign_jax.trainer.log import read_metrics
from refalign_jax.trees import flatten

COMPARED = ("loss", "flow", "pull", "push", "grad_norm", "held_out_loss")
"""Metrics that must be equal; the others depend on time."""


def differences(first: Path, second: Path) -> list[str]:
    """Where the newest checkpoints and the metrics of two runs differ, and steps that are not recorded exactly once."""
    found = []
    a, b = (find_checkpoint(folder)[0] for folder in (first, second))
    for item in ARRAYS:
        ours, theirs = (flatten(plain_dicts(read_arrays(x, item))) for x in (a, b))
        found += [
            f"{item}/{name}"
            for name in sorted(ours.keys() | theirs.keys())
            if name not in ours or name not in theirs or not np.array_equal(ours[name], theirs[name])
        ]
    ours, theirs = (read_json(x, "progress") for x in (a, b))
    found += [f"progress/{name}" for name in ours if name != "about" and ours[name] != theirs[name]]
    recorded, expected = (read_metrics(folder / "metrics.jsonl") for folder in (first, second))
    if [record["step"] for record in recorded] != [*range(1, len(expected) + 1)]:
        found.append(f"steps {[record['step'] for record in recorded]}")
    for x, y in zip(recorded, expected, strict=False):
        found += [f"step {x['step']} {name}" for name in COMPARED if x.get(name) != y.get(name)]
    return found


def plain_dicts(tree: object) -> dict:
    """An optimizer's state with dicts in place of lists and tuples, and without None."""
    if isinstance(tree, list | tuple):
        tree = {str(i): x for i, x in enumerate(tree)}
    if isinstance(tree, dict):
        return {
            k: plain_dicts(v) if isinstance(v, dict | list | tuple) else v for k, v in tree.items() if v is not None
        }
    return {}
