"""What a compiled program moves, read off its optimised HLO text: collectives and memory traffic, loops multiplied out.

The compiler's own cost analysis counts a loop's body once, so that the text is walked here: from the entry through
loops, calls and fusions. A loop's trips are what its condition compares with.
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

_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
_FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One array of an instruction's result.

    Attributes:
      sizes: of its axes.
      bytes: in memory, tiles' padding left out.
      on_chip: it lies in a TPU's vector memory and not in HBM.
    """

    sizes: tuple[int, ...]
    bytes: int
    on_chip: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: of the result.
      opcode: such as `fusion`.
      shapes: of the result, several of a tuple.
      operands: names; `name#k` is element k of a tuple, as newer text has it in place of get-tuple-element.
      text: the whole line.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str

    def called(self, attribute: str) -> str | None:
        """Name of the computation under an attribute such as `body`."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
        return match and match[1]


Program = Mapping[str, list[Instruction]]
"""Computations by name; the entry under ''."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one device moves in one run of a program.

    Attributes:
      count: collectives by kind.
      received: bytes that a device receives in them, by kind: of n devices' all-gather the other n-1 parts, of an
        all-reduce twice that (reduce-scatter, then all-gather), of a permutation its result.
      hbm: bytes read from and written to memory by all instructions, each taken to read its operands whole unless it
        slices them: a rough measure, for comparing programs. What a kernel reads again is not seen.
    """

    count: Mapping[str, int]
    received: Mapping[str, int]
    hbm: int


def parse(text: str) -> Program:
    """Reads HLO text as `compiled.as_text()` gives it."""
    program: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    scatters = False
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = program.setdefault("" if header[1] else header[2], [])
            scatters = header[2].startswith("all-reduce-scatter")  # how the TPU's compiler writes a reduce-scatter
            continue
        name = _NAME.match(line)
        if name:
            instruction = _instruction(name[1], line, line[name.end() :])
            if scatters and instruction.opcode == "all-reduce":
                instruction = dataclasses.replace(instruction, opcode="reduce-scatter")
            current.append(instruction)
    return program


def traffic(program: Program) -> Traffic:
    """Sums over the whole run of a program."""
    count, received, hbm = collections.Counter[str](), collections.Counter[str](), 0.0
    for instruction, times, made, fused in _walk(program, "", 1):
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            count[kind] += times
            received[kind] += times * _received(instruction, kind)
        if not fused:
            hbm += times * _hbm(instruction, made, program)
    return Traffic(count=dict(count), received=dict(received), hbm=int(hbm))


def arrays(program: Program, opcode: str = "") -> set[tuple[int, ...]]:
    """Sizes of all arrays in a program, or of those that one kind of instruction makes."""
    chosen = (i for body in program.values() for i in body if opcode in ("", i.opcode, i.opcode.removesuffix("-start")))
    return {shape.sizes for instruction in chosen for shape in instruction.shapes}


def kernels(program: Program) -> collections.Counter[str]:
    """How often each custom call's target occurs in the text."""
    found = (re.search(r'custom_call_target="([^"]+)"', i.text) for body in program.values() for i in body)
    return collections.Counter(match[1] for match in found if match)


def compare(before: str, after: str) -> list[str]:
    """Lines that tell how two programs' texts differ: instructions by kind, collectives, memory traffic."""
    programs = [parse(text) for text in (before, after)]
    lines = []
    kinds = [collections.Counter(i.opcode for body in program.values() for i in body) for program in programs]
    for kind in sorted(kinds[0] | kinds[1]):
        if kinds[0][kind] != kinds[1][kind]:
            lines.append(f"{kind}: {kinds[0][kind]} → {kinds[1][kind]} in the text")
    moved = [traffic(program) for program in programs]
    for kind in COLLECTIVES:
        a, b = ((t.count.get(kind, 0), t.received.get(kind, 0)) for t in moved)
        if a != b:
            lines.append(f"{kind}: {a[0]} of {a[1] / 1e9:.3f} GB → {b[0]} of {b[1] / 1e9:.3f} GB a run")
    if moved[0].hbm != moved[1].hbm:
        lines.append(f"memory traffic: {moved[0].hbm / 1e9:.2f} → {moved[1].hbm / 1e9:.2f} GB a run")
    return lines or ["The programs have the same instructions, collectives and memory traffic."]


def _instruction(name: str, line: str, rest: str) -> Instruction:
    """Parses what stands behind `name = `: shape, opcode, operands."""
    end = 0
    if rest.startswith("("):  # a tuple; layouts in it have brackets of their own
        depth = 1
        while depth:
            end += 1
            depth += (rest[end] == "(") - (rest[end] == ")")
        end += 1
    else:
        end = rest.index(" ")
    opcode, _, arguments = rest[end:].strip().partition("(")
    return Instruction(
        name=name,
        opcode=opcode,
        shapes=tuple(_shapes(rest[:end])),
        operands=tuple(re.findall(r"%([\w.\-]+(?:#\d+)?)", arguments.split("), ")[0])),
        text=line,
    )


def _shapes(text: str) -> Iterator[Shape]:
    for kind, sizes, layout in _SHAPE.findall(text):
        if kind in BITS:
            axes = tuple(int(n) for n in sizes.split(",") if n)
            yield Shape(sizes=axes, bytes=math.prod(axes) * BITS[kind] // 8, on_chip="S(1)" in layout)


def _walk(
    program: Program, name: str, times: int, fused: bool = False, seen: set[str] | None = None
) -> Iterator[tuple[Instruction, int, Mapping[str, Instruction], bool]]:
    """Yields every instruction that runs, how often, its computation by name, and whether in a fusion.

    An asynchronous collective appears in the fusion that starts it and in those that carry it on, even in a loop that
    runs meanwhile, under one channel; it is yielded once, where it starts.
    """
    seen = set() if seen is None else seen
    body = program.get(name, [])
    made = {instruction.name: instruction for instruction in body}
    for instruction in body:
        channel = re.search(r"channel_id=(\d+)", instruction.text)
        if channel and instruction.opcode.removesuffix("-start") in COLLECTIVES:
            if fused and channel[1] in seen:
                continue
            seen.add(channel[1])
        yield instruction, times, made, fused
        if instruction.opcode == "while":
            condition, inner = instruction.called("condition"), instruction.called("body")
            assert condition is not None
            assert inner is not None
            yield from _walk(program, inner, times * _trips(instruction, program[condition]), fused, seen)
        elif instruction.opcode == "conditional":
            for branch in re.findall(r"%([\w.\-]+)", re.search(r"computations=\{([^}]*)\}", instruction.text)[1]):  # type: ignore[index]
                yield from _walk(program, branch, times, fused, seen)
        else:
            called = instruction.called("to_apply" if instruction.opcode == "call" else "calls")
            if called:
                yield from _walk(program, called, times, fused or instruction.opcode != "call", seen)


def _trips(loop: Instruction, condition: list[Instruction]) -> int:
    """How often a loop runs: its known trip count, else the largest constant in its condition."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text)
    if known:
        return int(known[1])
    constants = [int(n) for i in condition for n in re.findall(r" constant\((\d+)\)", i.text)]
    return max(constants, default=1)


def _received(instruction: Instruction, kind: str) -> int:
    """Bytes that one device receives in a collective."""
    sizes = [shape.bytes for shape in instruction.shapes]
    started = instruction.opcode.endswith("-start")
    result = max(sizes, default=0) if started and kind != "all-reduce" else sum(sizes)
    n = _group(instruction.text)
    if kind == "collective-permute":
        return result
    if kind == "reduce-scatter":
        return result * (n - 1) // (n if " all-reduce(" in instruction.text else 1)
    return (2 if kind == "all-reduce" else 1) * result * (n - 1) // n


def _group(text: str) -> int:
    """Devices that take part in one collective together."""
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


def _hbm(instruction: Instruction, made: Mapping[str, Instruction], program: Program) -> int:
    """Bytes that an instruction outside of fusions reads from and writes to memory; `made` is its computation."""
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return 0
    if any(f'"{target}"' in instruction.text for target in _FREE_TARGETS) or "async-collective" in instruction.name:
        return 0
    if instruction.opcode in ("copy-start", "slice-start"):  # (target, source, …), or ((source), target, …)
        source, target = instruction.shapes[:2][:: 1 if instruction.opcode == "slice-start" else -1]
        return min(source.bytes, target.bytes) * ((not source.on_chip) + (not target.on_chip))
    reads = [sum(s.bytes for s in _result(name, made) if not s.on_chip) for name in instruction.operands]
    writes = sum(shape.bytes for shape in instruction.shapes if not shape.on_chip)
    if instruction.opcode == "fusion":
        body = program.get(instruction.called("calls") or "", [])
        reads = [min(size, _taken(body, place, size)) for place, size in enumerate(reads)]
        inside: Mapping[str, Instruction] = {i.name: i for i in body}
    else:
        body, inside = [instruction], made
        if instruction.opcode in ("dynamic-slice", "slice"):
            reads = [writes]
    updates = [i for i in body if i.opcode == "dynamic-update-slice"]
    if updates:  # what is updated stays where it is
        small = sum(s.bytes for i in updates for s in _result(i.operands[1], inside))
        whole = max((shape.bytes for i in updates for shape in i.shapes), default=0)
        writes = min(writes, small)
        reads = [0 if size >= whole else size for size in reads]
    return writes + sum(reads)


def _result(operand: str, made: Mapping[str, Instruction]) -> tuple[Shape, ...]:
    """What an operand is, a whole result or an element of a tuple; nothing where its name isn't known."""
    name, _, element = operand.partition("#")
    if name not in made:
        return ()
    shapes = made[name].shapes
    return shapes[int(element) :][:1] if element else shapes


def _taken(body: list[Instruction], place: int, size: int) -> int:
    """Bytes that a fusion takes of its operand at a place: slices of it, where nothing else uses it, else all."""
    names = {i.name for i in body if i.opcode == "parameter" and f" parameter({place})" in i.text}
    taken = 0
    for instruction in body:  # in order, so that what a bitcast makes is known before it is used
        if names & set(instruction.operands):
            if instruction.opcode == "bitcast":
                names.add(instruction.name)
            elif instruction.opcode in ("dynamic-slice", "slice"):
                taken += sum(shape.bytes for shape in instruction.shapes)
            elif instruction.opcode != "dynamic-update-slice" or instruction.operands[0] not in names:
                return size
    return taken
