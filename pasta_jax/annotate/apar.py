"""`rule:apar`: the forks of APAR (`baselines.apar`) as an annotator. They need --config.data.dialect=apar."""

from __future__ import annotations

import dataclasses

from pasta_jax.annotate.annotators import Options
from pasta_jax.annotate.protocol import Annotated, Declined, Messages
from pasta_jax.baselines import apar
from pasta_jax.lang import tags
from pasta_jax.lang.assemble import assemble
from pasta_jax.lang.program import Node, Program, Promise, Text
from pasta_jax.lang.render import escape, joined
from pasta_jax.tokens.cost import theoretical_speedup
from pasta_jax.tokens.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Apar:
    """The annotator. Of an answer with more forks than `max_branches` the first ones stay forks.

    Attributes:
      tokenizer: of the model, in the dialect of APAR.
      max_branches: the most forks of an answer.
    """

    tokenizer: Tokenizer
    max_branches: int

    def __call__(self, prompt: str | Messages, answer: str) -> Annotated:
        if escape(answer) != answer or tags.FORK in answer:
            raise Declined("the text looks as if it had tags")
        program = apar.annotate(answer)
        nodes = list[Node]()
        forks = 0
        for node in program.nodes:
            forks += isinstance(node, Promise)
            nodes.append(node if forks <= self.max_branches else Text(assemble(Program((node,)))))
        program, notes = (
            Program(joined(nodes)),
            ("more forks than an answer may have",) * (forks - self.max_branches),
        )
        if forks and theoretical_speedup(self.tokenizer, program) < 1:
            return Annotated(Program((Text(answer),)), ("would not pay",))
        return Annotated(program, notes)


def make(options: Options) -> Apar:
    """The annotator of these options."""
    return Apar(options.tokenizer.with_dialect("apar"), options.max_branches)
