"""Programs compiled ahead of time, and what they write anew instead of changing it in place."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from pasta_jax.compile import hlo
from pasta_jax.compile.hlo import CALLS, FREE, HloModule, results, updates
from pasta_jax.compile.programs import Job


def lowered(jobs: Iterable[Job]) -> dict[str, Any]:
    """The programs of jobs, by name."""
    return {job.name: job.lower() for job in jobs}


def bytes_of_a_step(compiled: Any) -> int:
    """Bytes that a step of a loop of one width moves to and from a chip's main memory."""
    program = hlo.read(compiled)
    assert program.loop
    return hlo.moved(program, program.loop)


def written(program: HloModule, smallest: int, largest: int) -> list[str]:
    """What makes an array of `smallest` to `largest` numbers anew in main memory, instead of changing one in place.

    Copies, transposes, conversions, selections, gathers: whatever writes all of it. So does a copy within the
    chip, if it is there to change the order in which an array lies; fetching ahead and writing back are not.
    """
    copies = []
    for name, computation in program.reached.items():
        for i in computation.values():
            if i.op in FREE | CALLS or i.op.endswith("-done"):
                continue
            if i.op == "copy-start" and not all(shape.main for shape in i.shapes[:2]):
                continue
            changed = updates(program, i)
            for place, shape in enumerate(results(program, name, i)):
                new = place not in changed and (shape.main or i.op == "copy")
                if new and smallest <= math.prod(shape.dims) <= largest:
                    copies.append(f"{name}: {i.name} = {i.op} {list(shape.dims)}")
    return copies
