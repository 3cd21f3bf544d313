"""Bytes that a compiled program moves to and from memory, read from its optimised HLO text.

Every instruction outside of fusions reads its operands from memory and writes its results there; what lies within a
fusion stays in registers. So the bytes of an instruction are those of its operands and results, with these exceptions:
of an operand of which only slices are read, the slices count; of an array that is updated in place, the update; arrays
in on-chip memory, which the TPU's compiler marks, do not count. Instructions in loops count once per iteration.

What a cache saves is not known here, nor what a kernel reads more than once.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from refalign_jax.perf import hlo

Kind = Literal["elementwise", "copies", "products", "kernels", "collectives"]

KINDS: tuple[Kind, ...] = ("elementwise", "copies", "products", "kernels", "collectives")
"""Elementwise operations and sums; what only moves or reorders; matrix products and what is fused with them; other
custom calls, such as attention; collectives."""

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "domain"}
_FREE |= {"after-all", "partition-id", "replica-id", "opt-barrier", "async-start"}
_MOVES = {"copy", "copy-start", "transpose", "reshape", "bitcast", "slice", "dynamic-slice", "dynamic-update-slice"}
_MOVES |= {"concatenate", "pad", "parameter", "constant", "tuple", "slice-start", "get-tuple-element", "reverse"}
_SLICES = ("slice", "dynamic-slice", "gather")
_PRODUCTS = ("dot", "convolution")
_PRODUCT_CALLS = re.compile(r'custom_call_target="__(cublas|cudnn\$conv)')
_OPERAND = re.compile(r"%([\w.\-]+)(?:#(\d+))?")
_SOURCE = re.compile(r'op_name="([^"]+)"')
_WRAPPERS = re.compile(r"^(jit\(.*\)|while|body|closed_call|checkpoint|cond|branch_\d+_fun)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """One instruction that moves bytes.

    Attributes:
      kind: one of `KINDS`.
      name: of the instruction.
      source: where in the program it comes from, by its named scopes.
      bytes: read and written by one run of the instruction.
      times: how often it runs.
    """

    kind: Kind
    name: str
    source: str
    bytes: int
    times: int


def passes(program: hlo.Program) -> list[Pass]:
    """Returns all instructions of a program that move bytes, in no particular order."""
    index = {name: {i.name: i for i in body} for name, body in program.items()}
    found: list[Pass] = []
    for instruction, times, computation in hlo.walk(program, fusions=False):
        if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
            continue
        is_fusion = instruction.opcode in ("fusion", "fusion-start")  # the latter runs beside others
        fused = program[instruction.called("calls") or ""] if is_fusion else []
        known = index[computation]
        moved = _fusion_bytes(instruction, fused, known) if fused else _bytes(instruction, known)
        if moved:
            found.append(
                Pass(
                    kind=_kind(instruction, fused),
                    name=instruction.name,
                    source=_source([instruction, *reversed(fused)]),
                    bytes=moved,
                    times=times,
                )
            )
    return found


def measure(program: hlo.Program, number: int = 12) -> dict[str, Any]:
    """Returns what one run of a program moves on one device, in 10^9 bytes, ready for JSON.

    Args:
      program: parsed.
      number: how many of the largest sources of elementwise passes and copies are listed.

    Returns:
      `elementwise_gb`, of which copies are `copies_gb`; `products_gb`, `kernels_gb`, `collectives_gb`; `largest`.
    """
    found = passes(program)
    moved = {kind: sum(p.bytes * p.times for p in found if p.kind == kind) / 1e9 for kind in KINDS}
    moved["elementwise"] += moved["copies"]
    listed = largest([p for p in found if p.kind in ("elementwise", "copies")], number)
    return {f"{kind}_gb": round(size, 2) for kind, size in moved.items()} | {"largest": listed}


def largest(found: Sequence[Pass], number: int) -> list[dict[str, Any]]:
    """Returns the largest passes with the same source and kind together: kind, source, how many, 10^9 bytes."""
    count, moved = collections.Counter[tuple[str, str]](), collections.Counter[tuple[str, str]]()
    for p in found:
        count[p.kind, p.source] += p.times
        moved[p.kind, p.source] += p.bytes * p.times
    return [
        {"kind": kind, "source": source, "count": count[kind, source], "gb": round(size / 1e9, 2)}
        for (kind, source), size in moved.most_common(number)
    ]


def _kind(instruction: hlo.Instruction, fused: Sequence[hlo.Instruction]) -> Kind:
    """What an instruction counts as."""
    inside = {i.opcode.removesuffix("-start") for i in (fused or [instruction])}
    if inside & set(hlo.COLLECTIVES):
        return "collectives"
    if inside & set(_PRODUCTS) or _PRODUCT_CALLS.search(instruction.text):
        return "products"
    if "custom-call" in inside:
        return "kernels"
    return "copies" if {i.opcode for i in (fused or [instruction])} <= _MOVES else "elementwise"


def _source(candidates: Sequence[hlo.Instruction]) -> str:
    """The named scopes of the first instruction that has any, without what loops and transformations add."""
    names = (_SOURCE.search(i.text) for i in candidates)
    name = next((match[1] for match in names if match), "?")
    backward = "transpose(" in name
    name = re.sub(r"\b(?:transpose|jvp)\(([^()]*)\)", r"\1", re.sub(r"\b(?:transpose|jvp)\(([^()]*)\)", r"\1", name))
    again = "rematted_computation" in name
    parts = [part for part in name.split("/") if not _WRAPPERS.match(part) and part != "rematted_computation"]
    return ("again " if again else "backward " if backward else "") + "/".join(parts)


def _operands(instruction: hlo.Instruction) -> list[tuple[str, int | None]]:
    """The operands of an instruction: name, and the element of a tuple where newer text names one."""
    text = instruction.text
    found = re.search(r" = .*? [a-z][\w\-]*(?=\()", text)  # the text's opcode; `hlo.parse` renames some all-reduces
    assert found is not None, text
    inside = text[found.end() :]
    inside = inside[: hlo.closing(inside)]
    return [(name, int(element) if element else None) for name, element in _OPERAND.findall(inside)]


def _shapes(operand: tuple[str, int | None], index: dict[str, hlo.Instruction]) -> tuple[hlo.Shape, ...]:
    """The arrays of an operand."""
    name, element = operand
    if name not in index:
        return ()
    shapes = index[name].shapes
    return shapes if element is None else shapes[element : element + 1]


def _size(shapes: Sequence[hlo.Shape]) -> int:
    return sum(shape.bytes for shape in shapes if not shape.on_chip)


def _bytes(instruction: hlo.Instruction, index: dict[str, hlo.Instruction]) -> int:
    """Bytes of an instruction that is no fusion."""
    operands = _operands(instruction)
    if instruction.opcode in _SLICES:
        return 2 * _size(instruction.shapes)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _size(_shapes(operands[1], index))
    return _size(instruction.outputs) + sum(_size(_shapes(operand, index)) for operand in dict.fromkeys(operands))


def _fusion_bytes(fusion: hlo.Instruction, fused: Sequence[hlo.Instruction], index: dict[str, hlo.Instruction]) -> int:
    """Bytes of a fusion: the parts of its operands that it reads, and what it writes."""
    inside = {i.name: i for i in fused}
    read = _read_shares(fused, inside)
    parameters = {int(match[1]): i.name for i in fused if (match := re.search(r" parameter\((\d+)\)", i.text))}
    total = 0.0
    for number, operand in enumerate(_operands(fusion)):
        total += _size(_shapes(operand, index)) * read.get(parameters.get(number, ""), 1.0)
    return round(total) + sum(_written(shape, root) for shape, root in _results(fusion, fused[-1], inside))


def _results(
    fusion: hlo.Instruction, root: hlo.Instruction, inside: dict[str, hlo.Instruction]
) -> Iterator[tuple[hlo.Shape, hlo.Shape]]:
    """Each array that a fusion returns, and the shape of the part of it that is written."""
    producers = [inside[name] for name, _ in _operands(root)] if root.opcode == "tuple" else [root]
    if len(producers) != len(fusion.outputs):
        yield from zip(fusion.outputs, fusion.outputs, strict=True)
        return
    for shape, producer in zip(fusion.outputs, producers, strict=True):
        while producer.opcode == "bitcast" and _operands(producer)[0][0] in inside:
            producer = inside[_operands(producer)[0][0]]
        updated = producer.opcode == "dynamic-update-slice"
        yield shape, inside[_operands(producer)[1][0]].shapes[0] if updated else shape


def _written(shape: hlo.Shape, part: hlo.Shape) -> int:
    return 0 if shape.on_chip else part.bytes


def _read_shares(fused: Sequence[hlo.Instruction], inside: dict[str, hlo.Instruction]) -> dict[str, float]:
    """The share of each instruction's elements that a fusion computes or reads, from its results backwards.

    Of several users the one that needs most counts; of several different slices, their sum.
    """
    need: dict[str, float] = {fused[-1].name: 1.0}
    sliced: dict[str, dict[str, float]] = collections.defaultdict(dict)
    for user in reversed(fused):  # users come after what they use
        whole = user.opcode.removesuffix("-start") in hlo.COLLECTIVES  # these read all, whatever is kept of it
        share = 1.0 if whole else min(1.0, max(need.get(user.name, 0.0), sum(sliced[user.name].values())))
        need[user.name] = share
        for place, (name, _) in enumerate(dict.fromkeys(_operands(user))):
            if name not in inside:
                continue
            if user.opcode in _SLICES and place == 0:
                part = _elements(user) / max(_elements(inside[name]), 1)
                where = re.search(r"slice=\{[^}]*\]\}", user.text)
                sliced[name][where[0] if where else user.name] = part * share
            elif user.opcode != "dynamic-update-slice" or place:
                need[name] = max(need.get(name, 0.0), share)
            else:
                need.setdefault(name, 0.0)
    return need


def _elements(instruction: hlo.Instruction) -> int:
    return sum(math.prod(shape.sizes) for shape in instruction.shapes)
