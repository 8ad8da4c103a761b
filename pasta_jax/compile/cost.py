"""What a run of a compiled program costs one chip, read from its text: operations, bytes of memory, bytes sent.

The compiler's own count (`cost_analysis()`) takes a loop for one round; here a loop of known length counts as often
as it goes round.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

from pasta_jax.chips import Chip, network
from pasta_jax.compile import hlo
from pasta_jax.compile.hlo import Computation, HloModule, Instruction

RECEIVED = {"all-gather": 1, "all-reduce": 2, "reduce-scatter": 1, "all-to-all": 1, "collective-permute": 1}
"""Name of a collective to how often a device of many receives an array of its larger side."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between the devices of a group.

    Attributes:
      op: a name of RECEIVED.
      bytes: that each device receives.
      group: number of devices.
      times: how often.
      moved: bytes that each device reads from main memory and writes to it, where `hlo.moved` leaves them out.
    """

    op: str
    bytes: float
    group: int
    times: int = 1
    moved: int = 0


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run on one chip: operations of matrix products, bytes to and from main memory, collectives."""

    flops: float
    bytes: float
    collectives: tuple[Collective, ...]

    def seconds(self, chip: Chip, shape: tuple[int, ...]) -> dict[str, float]:
        """The time that each resource takes at least, on a slice of this shape; the largest bounds the whole."""
        sent = sum(c.times * c.bytes / network(chip, shape, c.group) for c in self.collectives)
        return {"compute": self.flops / chip.flops, "memory": self.bytes / chip.bandwidth, "network": sent}


def cost_of(program: HloModule, name: str = "") -> Cost:
    """The cost of one run of a computation, by default of the whole program."""
    name = name or program.entry
    found = _whole(_collectives(program, name, 1))
    moved = hlo.moved(program, name, rounds=True) + sum(c.times * c.moved for c in found)
    return Cost(_flops(program, name), moved, found)


# -------------------------------------------------------------------------------------------------- operations


def _flops(program: HloModule, name: str) -> float:
    @functools.cache
    def of(name: str) -> float:
        body, total = program.computations[name], 0.0
        for i in body.values():
            if i.op in ("convolution", "dot"):
                total += product_flops(body, i)
            elif i.op == "conditional":
                total += max(map(of, i.calls))
            elif i.op in hlo.CALLS or i.op == "fusion":
                total += hlo.rounds_of(program, i) * sum(map(of, i.calls))
            elif i.op == "custom-call" and (
                own := re.search(r'"cost_estimate":{[^}]*"flops":"(\d+)', i.text)
            ):
                total += int(own[1])  # of a kernel, whose products are not in the text
        return total

    return of(name)


def product_flops(body: Computation, i: Instruction) -> float:
    """Operations of a matrix product: two for each number of the result and each that is summed for it.

    A TPU has matrix products as convolutions, batches of them with a dimension of the window, of which only the
    places within the input count.
    """
    out, left = i.shapes[0].dims, body[i.operands[0]].shapes[0].dims
    if i.op == "dot":
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.text)
        return (
            2.0 * math.prod(out) * math.prod(left[int(d)] for d in summed[1].split(",") if d) if summed else 0
        )
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.text)
    assert labels, i.text[:200]
    right = body[i.operands[1]].shapes[0].dims
    sizes = [dict(zip(names, dims)) for names, dims in zip(labels.groups(), (left, right, out))]
    window = re.search(r"window=\{(.*?)\}", i.text)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    groups = re.search(r"feature_group_count=(\d+)", i.text)
    total = 2.0 * sizes[0]["f"] / (int(groups[1]) if groups else 1) * sizes[2]["b"] * sizes[2]["f"]
    spatial = sorted(label for label in sizes[2] if label.isdigit())
    for number, label in enumerate(spatial):
        values = {name: text.split("x")[number] for name, text in fields.items()}
        total *= _places(sizes[0][label], sizes[1][label], sizes[2][label], values)
    return total


def _places(size: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """Pairs of an output and a place of the window that lie within the input."""
    stride, low = int(window.get("stride", 1)), int(window.get("pad", "0_0").split("_")[0])
    dilate, spread = int(window.get("lhs_dilate", 1)), int(window.get("rhs_dilate", 1))
    last = (size - 1) * dilate
    places = (o * stride - low + k * spread for o in range(out) for k in range(kernel))
    return sum(0 <= place <= last and place % dilate == 0 for place in places)


# ------------------------------------------------------------------------------------------------- collectives


def _collectives(program: HloModule, name: str, times: int) -> Iterator[tuple[str, Collective]]:
    """Those of a computation and of all that it runs, with the channel of each."""
    for i in program.computations[name].values():
        if i.op == "while":
            yield from _collectives(program, i.calls[1], times * hlo.rounds_of(program, i))
        elif i.op in ("conditional", "call"):
            yield from _collectives(program, i.calls[-1], times)
        for computation, inner, scattered in _with_fused(program, name, i):
            op = inner.op.removesuffix("-start")
            if op not in RECEIVED:
                continue
            channel = re.search(r"channel_id=(\d+)", inner.text)
            group = _group(inner.text) if op != "collective-permute" else 2
            made = sum(shape.bytes for shape in hlo.results(program, computation, inner))
            whole = made * (group if op == "reduce-scatter" else 1)
            often = 1 if scattered and op == "all-reduce" else RECEIVED[op]
            part = 1 if op == "collective-permute" else (group - 1) / group
            body = program.computations[computation]
            touched = [inner] * (i.op == "fusion" and not scattered) + [
                body[operand] for operand in inner.operands
            ]
            moved = sum(shape.bytes * shape.main for each in touched for shape in each.shapes)
            if group > 1 and whole:
                yield (
                    channel[1] if channel else inner.name,
                    Collective(op, often * whole * part, group, times, moved if i.op in hlo.WITHIN else 0),
                )


def _whole(found: Iterator[tuple[str, Collective]]) -> tuple[Collective, ...]:
    """Each collective once: one that runs beside others is cut into pieces, some in inner loops, of one channel."""
    whole: dict[str, Collective] = {}
    for channel, collective in found:
        if channel not in whole or collective.times < whole[channel].times:
            whole[channel] = collective
    return tuple(whole.values())


def _with_fused(
    program: HloModule, name: str, i: Instruction, inside: bool = False
) -> Iterator[tuple[str, Instruction, bool]]:
    """An instruction, or all within it, with the computation of each.

    The last value says that a part of the result is kept, as where an all-reduce is a reduce-scatter.
    """
    if i.op in hlo.WITHIN:
        body = program.computations[i.calls[0]]
        kept = sum(shape.bytes for shape in i.shapes)
        for inner in body.values():
            scattered = kept < sum(shape.bytes for shape in inner.shapes)
            yield from _with_fused(program, i.calls[0], inner, scattered)
    else:
        yield name, i, inside


def _group(text: str) -> int:
    """The number of devices of a group, from `replica_groups` in any of its three spellings.

    >>> _group("replica_groups={{0,2,4,6},{1,3,5,7}}, x"), _group("replica_groups=[2,4]<=[4,2]T(1,0)")
    (4, 4)
    >>> _group("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, x")
    4
    """
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    return 1


def by_kind(collectives: Sequence[Collective]) -> dict[str, float]:
    """Bytes that a device receives, by kind, most first."""
    total: dict[str, float] = {}
    for c in collectives:
        total[c.op] = total.get(c.op, 0) + c.times * c.bytes
    return dict(sorted(total.items(), key=lambda item: -item[1]))
