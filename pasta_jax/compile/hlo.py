"""What a compiled program does to memory, read from its text (optimized HLO, `compiled.as_text()`).

For checks: does a loop keep its arrays in place, what does it copy, how many bytes does a step move? The text is
the compiler's own account of the program that will run; nothing has to be run, and no device has to be there.

    %name = f32[8,128]{1,0:T(8,128)S(1)} fusion(%a, %b), kind=kLoop, calls=%fused_computation

S(1) says that the array lies in a memory of the chip itself (VMEM); without it, it lies in main memory (HBM).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from pasta_jax.rounding import ceil_div

BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}
"""Of a number, where the name's digits do not say it."""

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "opt-barrier"}
"""What moves nothing: names for what is there, or what is made where it is used."""

CALLS = {"while", "conditional", "call"}
"""What runs other computations as they stand."""

WITHIN = {"fusion", "async-start"}
"""What runs a computation as one instruction, which reads of an operand what is used there."""

SLICES = {"dynamic-slice", "slice", "gather"}
"""What reads of its first operand no more than it gives."""

COLLECTIVES = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}
"""What devices exchange. Cut into pieces, each in a fusion of its own, every piece has the whole as its result."""

UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""What changes its first operand in place, by the operand with this number."""

STARTS = {"slice-start", "dynamic-slice-start", "async-start", "all-gather-start", "collective-permute-start"}
"""What names its operands, and then what it makes, in one tuple. (`copy-start` has what it makes first.)"""


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array: `dims`, bytes, and whether it lies in main memory."""

    dims: tuple[int, ...]
    bytes: int
    main: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a program.

    Attributes:
      name, op: as in `%name = ... op(...)`.
      shapes: of its result; of every array of a tuple.
      operands: names of other instructions of the same computation.
      calls: names of computations: of a fusion, a loop (condition, body), the branches of a conditional.
      root: whether it is the result of its computation.
      number: of a parameter, or of an integer constant.
      text: its operands and attributes, as they stand.
    """

    name: str
    op: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    calls: tuple[str, ...]
    root: bool
    number: int
    text: str


Computation: TypeAlias = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class HloModule:
    """A parsed program.

    Attributes:
      computations: by name.
      entry: name of the first.
      aliases: numbers of the entry's parameters whose memory the results take over.
    """

    computations: Mapping[str, Computation]
    entry: str
    aliases: frozenset[int]

    @property
    def reached(self) -> dict[str, Computation]:
        """The computations that run as they stand: the entry, bodies of loops, branches; no fusion's inside."""
        names, reached = [self.entry], {}
        while names:
            name = names.pop()
            reached[name] = self.computations[name]
            names += [called for i in reached[name].values() if i.op in CALLS for called in i.calls]
        return reached

    @property
    def loop(self) -> str:
        """Name of the body of the loop that carries most; empty without any."""
        loops = [i for body in self.reached.values() for i in body.values() if i.op == "while"]
        return max(loops, key=lambda i: len(i.shapes)).calls[1] if loops else ""


def read(compiled: Any) -> HloModule:
    """The program of a compiled function, as of `jax.jit(f).lower(...).compile()`."""
    return parse(compiled.as_text())


def parse(text: str) -> HloModule:
    """The program in a compiled function's text."""
    computations: dict[str, Computation] = {}
    entry, body = "", {}
    text = re.sub(r'\n(?="|}})', "", text)  # what a kernel says of itself has lines of its own
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            body = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif match := re.match(r"\s+(ROOT )?%([\w.\-]+) = ", line):
            instruction = _instruction(match[2], line[match.end() :], bool(match[1]))
            for operand in instruction.operands:
                if "#" in operand and operand not in body:
                    body[operand] = _element(body, operand)
            body[instruction.name] = instruction
    header = text[: text.index("\n")]
    aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", header)
    aliases = re.findall(r": \((\d+), \{\}", aliased[1]) if aliased else []
    return HloModule(computations, entry, frozenset(map(int, aliases)))


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    """From what stands after the `=`."""
    end = _closed(rest, 0) if rest.startswith("(") else rest.index(" ")
    opened = rest.index("(", end)
    closed = _closed(rest, opened)
    operands, attributes = rest[opened:closed], rest[closed:]
    op = rest[end:opened].strip()
    called = re.findall(r"(?:calls|condition|body|to_apply)=%?([\w.\-]+)", attributes)
    branches = re.search(r"branch_computations=\{(.*?)\}", attributes)
    called += re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
    number = int(operands[1:-1]) if re.fullmatch(r"\(\d+\)", operands) else -1
    names = tuple(re.findall(r"%([\w.\-]+(?:#\d+)?)", operands))
    return Instruction(
        name, op, tuple(_shapes(rest[:end])), names, tuple(called), root, number, rest[opened:]
    )


def _element(body: Computation, operand: str) -> Instruction:
    """The `get-tuple-element` for which later compilers write `%tuple#index`."""
    source, _, index = operand.partition("#")
    shapes = body[source].shapes[int(index) :][:1]
    text = f"(%{source}), index={index}"
    return Instruction(operand, "get-tuple-element", shapes, (source,), (), False, -1, text)


def _closed(text: str, start: int) -> int:
    """Just behind the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    raise ValueError(f"An open bracket in {text[:80]!r}: this is no optimized HLO.")


def _shapes(text: str) -> Iterator[Shape]:
    for kind, sizes, layout in re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?", text):
        dims = tuple(int(size) for size in sizes.split(",") if size)
        digits = re.search(r"\d+", kind)
        bits = BITS.get(kind) or (int(digits[0]) if digits else 0)
        yield Shape(dims, math.prod(dims) * bits // 8, not re.search(r"S\([1-9]\)", layout))


# -------------------------------------------------------------------------------------------------- bytes


def results(program: HloModule, computation: str, i: Instruction) -> tuple[Shape, ...]:
    """The arrays that an instruction writes: what starts a move also names what it reads."""
    if i.op == "copy-start":
        return i.shapes[:1]
    if i.op in STARTS:
        body = program.computations[computation]
        read = sum(len(body[operand].shapes) for operand in i.operands)
        return i.shapes[read : read + 1]
    return i.shapes


def updates(program: HloModule, i: Instruction) -> dict[int, int]:
    """Which arrays of the result are an operand changed in place; for a fusion, with the bytes of the change.

    What a fusion only passes on is not written; collectives within it are counted by `cost`.
    """
    if i.op in UPDATES:
        return {0: 0}
    if i.op != "fusion":
        return {}
    body = program.computations[i.calls[0]]
    root = next(inner for inner in body.values() if inner.root)
    changed = {}
    for place, member in enumerate([body[name] for name in root.operands] if root.op == "tuple" else [root]):
        while member.op == "bitcast":
            member = body[member.operands[0]]
        if member.op == "parameter" or member.op in COLLECTIVES:
            changed[place] = 0
        elif member.op in UPDATES:
            update = body[member.operands[UPDATES[member.op]]]
            changed[place] = sum(shape.bytes for shape in update.shapes)
        elif member.op == "fusion" and 0 in updates(program, member):
            changed[place] = updates(program, member)[0]
    return changed


def rounds_of(program: HloModule, i: Instruction) -> int:
    """How often a loop goes round, if it counts from 0 to a constant by a constant, as `lax.scan` does; else 1."""
    if i.op != "while":
        return 1
    condition, body = (program.computations[name] for name in i.calls)
    root = next(inner for inner in condition.values() if inner.root)
    operands = [condition[name] for name in root.operands]
    bounds = [operand.number for operand in operands if operand.op == "constant"]
    places = [_place(operand) for operand in operands if operand.op == "get-tuple-element"]
    if root.op not in ("compare", "fusion") or len(bounds) != 1 or len(places) != 1:
        return 1
    result = next(inner for inner in body.values() if inner.root)
    step = _steps(program, body, body[result.operands[places[0]]]) if result.op == "tuple" else 0
    return ceil_div(bounds[0], step or 1) if bounds[0] > 0 else 1


def _place(i: Instruction) -> int:
    """Which element of a tuple it takes."""
    index = re.search(r"index=(\d+)", i.text)
    return int(index[1]) if index else 0


def _steps(program: HloModule, body: Computation, i: Instruction) -> int:
    """The constants that are added on the way to a number, in the computation and in fusions."""
    if i.op == "fusion":
        inside = program.computations[i.calls[0]]
        return _steps(program, inside, next(inner for inner in inside.values() if inner.root))
    if i.op not in ("add", "copy", "bitcast"):
        return 0
    operands = [body[name] for name in i.operands]
    return sum(
        operand.number if operand.op == "constant" else _steps(program, body, operand) for operand in operands
    )


def moved(program: HloModule, name: str, *, rounds: bool = False) -> int:
    """Bytes that one run of a computation reads from main memory and writes to it.

    The compiler's own count (`cost_analysis()["bytes accessed"]`) also has what moves within the chip: a matrix
    that is fetched ahead into VMEM counts three times there. Of the branches of a conditional the dearest
    counts, and of a loop inside, one round; with `rounds` all, where it is known how many.
    """
    body = program.computations[name]
    total = 0
    for i in body.values():
        if i.op in FREE or i.op.endswith("-done"):
            continue
        if i.op in CALLS:
            inner = [moved(program, called, rounds=rounds) for called in i.calls]
            times = rounds_of(program, i) if rounds else 1
            total += max(inner) if i.op == "conditional" else times * sum(inner)
            continue
        operands = [body[operand] for operand in i.operands]
        arrays = results(program, name, i)
        if i.op in UPDATES:
            update = operands[UPDATES[i.op]].shapes[0]
            total += update.bytes * (update.main + arrays[0].main)
        elif i.op in SLICES or i.op.endswith("slice-start"):
            total += arrays[0].bytes * (operands[0].shapes[0].main + arrays[0].main)
        else:
            changed = updates(program, i)
            for number, operand in enumerate(operands):
                if any(shape.main for shape in operand.shapes):
                    total += _read(program, i, number, sum(shape.bytes for shape in operand.shapes))
            for place, shape in enumerate(arrays):
                total += changed.get(place, shape.bytes) * shape.main
    return total


def _read(program: HloModule, i: Instruction, number: int, whole: int) -> int:
    """Bytes that an instruction reads of its operand with this number, whose size is `whole`."""
    if i.op not in WITHIN:
        return whole
    body = program.computations[i.calls[0]]
    parameter = next(inner for inner in body.values() if (inner.op, inner.number) == ("parameter", number))
    return min(whole, _used(program, body, parameter, whole))


def _used(program: HloModule, body: Computation, source: Instruction, whole: int) -> int:
    """Bytes of an array that those instructions read that use it."""
    if source.root:
        return whole
    total = 0
    for user in body.values():
        for number, operand in enumerate(user.operands):
            if operand != source.name:
                continue
            if user.op == "bitcast":
                total += _used(program, body, user, whole)
            elif user.op in SLICES and number == 0:
                total += sum(shape.bytes for shape in user.shapes)
            elif user.op == "tuple" or user.op in COLLECTIVES:
                continue  # passed on, or counted with the collective
            elif user.op not in UPDATES or number != 0:
                total += _read(program, user, number, whole)
    return total
