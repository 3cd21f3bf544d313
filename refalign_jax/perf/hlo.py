"""Collectives, kernels and arrays of a compiled program, read from its optimised HLO text.

The compiler's own cost analysis counts the body of a loop once. This module walks the text instead, from the entry
computation through loops, calls and fusions, and multiplies by the number of iterations, which is the constant that a
loop's condition compares with.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "s8": 8, "u8": 8, "s16": 16, "u16": 16}
BITS |= {"s32": 32, "u32": 32, "s64": 64, "u64": 64, "s4": 4, "u4": 4, "f8e4m3fn": 8, "f8e5m2": 8, "c64": 64}

_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\](?:\{[^}]*?(S\([1-4]\))?\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One array of an instruction's result.

    Attributes:
      sizes: one per axis.
      bytes: size in memory without the padding of tiles.
      on_chip: whether it lies in a TPU's on-chip memory.
    """

    sizes: tuple[int, ...]
    bytes: int
    on_chip: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: what the result is called.
      opcode: such as `fusion`.
      shapes: the arrays of the result; several where it is a tuple.
      outputs: of an instruction that starts a collective, whose result holds its operands too, the arrays that the
        collective returns; of others, `shapes`.
      text: the whole line.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    text: str

    def called(self, attribute: str) -> str | None:
        """Returns the name of the computation under an attribute such as `body`, or None."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
        return match and match[1]


Program = Mapping[str, list[Instruction]]
"""Computations by name; the entry computation is under the empty name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collectives:
    """The collectives that one device takes part in during one run of a program.

    Attributes:
      count: how many, by kind.
      received: bytes that one device receives in them, by kind. In an all-gather among n devices it receives the n-1
        other parts, in an all-reduce twice that (reduce-scatter, then all-gather), in a permutation the result.
    """

    count: Mapping[str, int]
    received: Mapping[str, int]


def parse(text: str) -> Program:
    """Parses HLO text as `compiled.as_text()` returns it."""
    program: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    scatters = False
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = program.setdefault("" if header[1] else header[2], [])
            scatters = header[2].startswith("all-reduce-scatter")  # the TPU compiler's form of a reduce-scatter
            continue
        name = _NAME.match(line)
        if name:
            instruction = _instruction(name[1], line, line[name.end() :])
            if scatters and instruction.opcode == "all-reduce":
                instruction = dataclasses.replace(instruction, opcode="reduce-scatter")
            current.append(instruction)
    return program


def collectives(program: Program) -> Collectives:
    """Counts the collectives of a whole run of a program."""
    count, received = collections.Counter[str](), collections.Counter[str]()
    for instruction, times, _ in walk(program, fusions=True):
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            count[kind] += times
            received[kind] += times * _received(instruction, kind)
    return Collectives(count=dict(count), received=dict(received))


def arrays(program: Program, opcode: str = "") -> set[tuple[int, ...]]:
    """Returns the sizes of all arrays in a program, or of the results of one kind of instruction."""
    chosen = (i for body in program.values() for i in body if opcode in ("", i.opcode, i.opcode.removesuffix("-start")))
    return {shape.sizes for instruction in chosen for shape in instruction.shapes}


def kernels(program: Program) -> collections.Counter[str]:
    """Counts the custom calls in the text by their target."""
    found = (re.search(r'custom_call_target="([^"]+)"', i.text) for body in program.values() for i in body)
    return collections.Counter(match[1] for match in found if match)


def compare(before: str, after: str) -> list[str]:
    """Returns lines that describe how two programs' texts differ: instructions and collectives by kind."""
    programs = [parse(text) for text in (before, after)]
    lines = []
    kinds = [collections.Counter(i.opcode for body in program.values() for i in body) for program in programs]
    for kind in sorted(kinds[0] | kinds[1]):
        if kinds[0][kind] != kinds[1][kind]:
            lines.append(f"{kind}: {kinds[0][kind]} → {kinds[1][kind]} in the text")
    moved = [collectives(program) for program in programs]
    for kind in COLLECTIVES:
        a, b = ((found.count.get(kind, 0), found.received.get(kind, 0)) for found in moved)
        if a != b:
            lines.append(f"{kind}: {a[0]} of {a[1] / 1e9:.3f} GB → {b[0]} of {b[1] / 1e9:.3f} GB per run")
    return lines or ["The programs have the same instructions and collectives."]


def _instruction(name: str, line: str, rest: str) -> Instruction:
    """Parses what follows `name = `: shapes and opcode."""
    end = closing(rest) if rest.startswith("(") else rest.index(" ")
    opcode = rest[end:].strip().partition("(")[0]
    shapes = tuple(_shapes(rest[:end]))
    outputs = tuple(_shapes(_started(rest[:end], opcode))) if opcode.endswith("-start") else shapes
    return Instruction(name=name, opcode=opcode, shapes=shapes, outputs=outputs, text=line)


def closing(text: str) -> int:
    """Returns the index behind the bracket that closes the one at the text's beginning."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return i + 1
    raise AssertionError(text)


def _started(result: str, opcode: str) -> str:
    """Returns what a collective returns, out of the result of the instruction that starts it.

    The result is (operands, outputs, …), each an array or a tuple of arrays. An all-reduce may be without its operands:
    then the result is the outputs.
    """
    if not result.startswith("(") or (opcode == "all-reduce-start" and not result.startswith("((")):
        return result
    inside = result[1:-1]
    end = closing(inside) if inside.startswith("(") else _SHAPE.match(inside).end()  # type: ignore[union-attr]
    if not inside.startswith("(") and inside[end : end + 1] == "{":  # the layout
        end = inside.index("}", end) + 1
    rest = re.sub(r"^, (/\*index=\d+\*/)?", "", inside[end:])
    if rest.startswith("("):
        return rest[: closing(rest)]
    return _SHAPE.match(rest)[0]  # type: ignore[index]


def _shapes(text: str) -> Iterator[Shape]:
    for kind, sizes, space in _SHAPE.findall(text):
        if kind in BITS:
            axes = tuple(int(n) for n in sizes.split(",") if n)
            yield Shape(sizes=axes, bytes=math.prod(axes) * BITS[kind] // 8, on_chip=bool(space))


def walk(program: Program, *, fusions: bool) -> Iterator[tuple[Instruction, int, str]]:
    """Yields every instruction that runs, how often it runs, and the computation that it is in.

    An asynchronous collective appears in the fusion that starts it and, under the same channel, in every fusion that
    carries it on, even inside a loop that runs meanwhile. It is yielded once, where it starts.

    Args:
      program: to walk through, from its entry computation.
      fusions: whether the instructions within fusions are yielded too.
    """
    yield from _walk(program, "", 1, (fusions, False), set())


def _walk(
    program: Program, name: str, times: int, fusions: tuple[bool, bool], seen: set[str]
) -> Iterator[tuple[Instruction, int, str]]:
    """As `walk`; `fusions` is whether to enter them and whether this computation is in one."""
    for instruction in program.get(name, []):
        channel = re.search(r"channel_id=(\d+)", instruction.text)
        if channel and instruction.opcode.removesuffix("-start") in COLLECTIVES:
            if fusions[1] and channel[1] in seen:
                continue
            seen.add(channel[1])
        yield instruction, times, name
        if instruction.opcode == "while":
            condition, inner = instruction.called("condition"), instruction.called("body")
            assert condition is not None
            assert inner is not None
            yield from _walk(program, inner, times * _trips(instruction, program[condition]), fusions, seen)
        elif instruction.opcode == "conditional":
            for branch in re.findall(r"%([\w.\-]+)", re.search(r"computations=\{([^}]*)\}", instruction.text)[1]):  # type: ignore[index]
                yield from _walk(program, branch, times, fusions, seen)
        else:
            called = instruction.called("to_apply" if instruction.opcode == "call" else "calls")
            outside = instruction.opcode in ("call", "async-start")
            if called and (fusions[0] or outside):
                yield from _walk(program, called, times, (fusions[0], fusions[1] or instruction.opcode != "call"), seen)


def _trips(loop: Instruction, condition: list[Instruction]) -> int:
    """Returns the number of iterations of a loop: its known trip count, else the largest constant in its condition."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text)
    if known:
        return int(known[1])
    constants = [int(n) for i in condition for n in re.findall(r" constant\((\d+)\)", i.text)]
    return max(constants, default=1)


def _received(instruction: Instruction, kind: str) -> int:
    """Returns the bytes that one device receives in a collective."""
    result = sum(shape.bytes for shape in instruction.outputs)
    n = _group(instruction.text)
    if kind == "collective-permute":
        return result
    if kind == "reduce-scatter":
        return result * (n - 1) // (n if " all-reduce(" in instruction.text else 1)
    return (2 if kind == "all-reduce" else 1) * result * (n - 1) // n


def _group(text: str) -> int:
    """Returns the number of devices that take part in one collective together."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text)
    if mesh:
        sizes = dict(re.findall(r"'([\w]+)'=(\d+)", mesh[1]))
        parts = re.findall(r"'([\w]+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", text)
    if iota:
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    return len(listed[1].split(",")) if listed else 1
