"""PASTA-LANG: any text is read, strictly or with repairs; what was read is written, and read back as the same."""

from __future__ import annotations

import random
import re
from typing import Any

from pasta_jax.lang.assemble import assemble, shortened
from pasta_jax.lang.parse import ParseError, parse, parse_lenient
from pasta_jax.lang.program import Program, Text
from pasta_jax.lang.render import escape, render
from pasta_jax.lang.validate import validate
from tests.fuzz import hostile
from tests.fuzz.runner import Target, check_message, outcome
from tests.helpers.programs import random_program


def draw(rng: random.Random) -> Any:
    text = hostile.text(rng)
    if rng.random() < 0.4:
        written = render(random_program(rng, max_depth=rng.randint(1, 3)))
        at = rng.randint(0, len(written))
        text = (
            written[:at] + (text if isinstance(text, str) else "") + written[at + rng.choice((0, 0, 1, 5)) :]
        )
    return {"text": text, "depth": rng.choice((None, 1, 1, 2)), "cut": rng.choice((0, 1, rng.randrange(60)))}


def check(case: Any) -> None:
    text, depth = hostile.expand(case["text"]), case["depth"]
    program, repairs = parse_lenient(text, max_depth=depth)
    problems = validate(text, max_depth=depth or 1_000)
    said: Any
    for said in (*repairs, *problems):
        check_message(str(said))
        for number in re.findall(r"tokens=(\d+)", said.problem):
            assert number in text, f"a number that the text does not have: {said}"
    check_program(program, depth, case["cut"])
    strict, error = outcome(ParseError, parse, text, max_depth=depth)
    if not error:
        check_program(strict, depth, case["cut"])
    if depth is not None:
        assert bool(error) == any(problem.severity == "error" for problem in problems)
    assert parse(escape(text)) == Program((Text(text),) if text else ())


def check_program(program: Program, depth: int | None, characters: int) -> None:
    assert equal(parse(render(program), max_depth=depth), program)
    cut = shortened(program, characters)
    assert assemble(cut) == assemble(program)[:characters]
    assert equal(parse(render(cut), max_depth=depth), cut)


def equal(one: Program, other: Program) -> bool:
    """Python compares dataclasses recursively, so those that nest hundreds deep are compared as text."""
    try:
        return one == other
    except RecursionError:
        return render(one) == render(other)


TARGET = Target(draw, check, cases=80)
