"""What a compiled program writes anew instead of changing it in place."""

from __future__ import annotations

import math

from pasta_jax.compile.hlo import CALLS, FREE, HloModule, results, updates


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
