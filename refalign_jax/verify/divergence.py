"""Where two computations diverge: the first block, and the first operation within it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from refalign_jax.verify.case import Case
from refalign_jax.verify.floors import ALL_DRAWS, operation, spread
from refalign_jax.verify.report import Curves, Row
from refalign_jax.verify.streamed import OPERATIONS, Inputs, Walk
from refalign_jax.verify.values import channels_second

FILES = {**{name: name for name in OPERATIONS}, "block": "blocks"}
"""The operations of a block in their order, and how the folder's arrays of their values end."""

Walked = Mapping[str, np.ndarray]
"""What `walk` returns."""

BACKWARD = ("projector", "ffn", "cross_attention", "attention", "modulation")
"""The parts of a block in the order in which gradients reach their parameters."""


def check_operations(case: Case, name: str, inputs: Inputs, agrees: bool, ours: Walked | None = None) -> None:
    """Compares what the folder has of the operations of every block, and finds the first that diverges.

    Args:
      case: the model and its values.
      name: of the forward pass.
      inputs: of the pass.
      agrees: whether the velocity is within tolerance.
      ours: what `walk` returned for it, if that is at hand.
    """
    arrays = case.values.arrays
    theirs = {op: arrays[f"{name}_{FILES[op]}"] for op in offered(case, name)}
    if not theirs:
        if not agrees:
            case.report.remarks.append(
                f"{name} diverges; to see where, add the tokens after each block and its operations: {name}_blocks, "
                f"{name}_attention, {name}_cross_attention, {name}_ffn [layers, B, tokens, D] (docs/verify.md)."
            )
        return
    ours = ours or walk(case, inputs, 0, tuple(theirs))
    moved: dict[int, Walked] = {0: ours}
    limits: dict[str, float] = {}
    for op, values in theirs.items():

        def floor(op: str = op) -> float:
            for draw in ALL_DRAWS if len(moved) == 1 else ():
                moved[draw] = walk(case, case.moved_inputs(inputs, draw), draw, tuple(theirs))
            return spread(moved.__getitem__, op)

        row = case.report.compare(f"{name}_{FILES[op]}", ours[op], values, "forward", floor)
        limits[op] = row.tolerance + row.floor
    errors = {op: [relative(*pair) for pair in zip(ours[op], theirs[op], strict=True)] for op in theirs}
    first = first_forward(errors, limits) or ("" if agrees or "block" not in theirs else "the head")
    case.report.curves.append(Curves(name, errors, max(limits.values()), first))


def offered(case: Case, name: str) -> tuple[str, ...]:
    """The operations of which the folder has values for a forward pass."""
    return tuple(op for op, end in FILES.items() if f"{name}_{end}" in case.values.arrays)


def walk(case: Case, inputs: Inputs, draw: int, operations: Sequence[str]) -> Walked:
    """The values of some operations of every block, [layers, B, tokens, D], and the `velocity`, channels second."""
    found: dict[str, list[np.ndarray]] = {op: [] for op in operations}
    walking = Walk(case, inputs, draw)
    for _, _, values in walking.blocks():
        for op in operations:
            found[op].append(np.asarray(values[op]))
    return {"velocity": channels_second(walking.velocity()), **{op: np.stack(layers) for op, layers in found.items()}}


def first_forward(errors: Mapping[str, Sequence[float]], limits: Mapping[str, float]) -> str:
    """The first block and the first operation within it whose error is beyond its limit; empty if there is none."""
    for i in range(max(map(len, errors.values()))):
        for op, series in errors.items():
            if not series[i] <= limits[op]:
                what = "the residual sum after the operations" if op == "block" and len(errors) > 1 else op
                before = ", or the embedding before it" if i == 0 and op in ("attention", "block") else ""
                return f"block {i}: {what}{before}"
    return ""


def gradient_curves(name: str, pairs: Mapping[str, tuple[Row, float, float]]) -> Curves:
    """Errors of the gradients of each operation's parameters over the blocks, and the first, in backward order.

    Args:
      name: of the gradients.
      pairs: for each parameter, by its published name, its comparison, ‖ours - theirs‖² and ‖theirs‖².
    """
    sums: dict[str, list[float]] = {}
    failed = {operation(parameter) for parameter, (row, _, _) in pairs.items() if not row.passed}
    for parameter, (_, difference, scale) in pairs.items():
        total = sums.setdefault(operation(parameter), [0.0, 0.0])
        total[0], total[1] = total[0] + difference, total[1] + scale
    layers = 1 + max((int(key.split(".")[1]) for key in sums if key.startswith("blocks.")), default=-1)
    errors = {
        op: [_ratio(sums.get(f"blocks.{i}.{op}")) for i in range(layers)]
        for op in reversed(BACKWARD)
        if any(f"blocks.{i}.{op}" in sums for i in range(layers))
    }
    order = ["head", *(f"blocks.{i}.{op}" for i in reversed(range(layers)) for op in BACKWARD), "embedding"]
    first = next((key for key in order if key in failed), "")
    return Curves(name, errors, max(row.tolerance for row, _, _ in pairs.values()), _words(first))


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """‖ours - theirs‖ / ‖theirs‖, or ‖ours‖ where theirs is zero, in float64."""
    a, b = np.float64(ours), np.float64(theirs)
    return float(np.linalg.norm((a - b).ravel()) / (np.linalg.norm(b.ravel()) or 1.0))


def _ratio(sums: Sequence[float] | None) -> float:
    """The root of a ratio of squares; NaN where there is nothing."""
    if sums is None:
        return float("nan")
    return float(np.sqrt(sums[0] / sums[1])) if sums[1] else float(np.sqrt(sums[0]))


def _words(key: str) -> str:
    """`blocks.3.ffn` as `block 3: ffn`, with the direction in which gradients flow."""
    if not key:
        return ""
    parts = key.split(".")
    return f"block {parts[1]}: {parts[2]} (backwards)" if len(parts) == 3 else f"the {key} (backwards)"
