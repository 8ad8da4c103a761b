"""`rule:apar`: the forks of APAR (`baselines.apar`) as an annotator. They need --config.data.dialect=apar."""

from __future__ import annotations

import dataclasses

from pasta_jax.annotate.annotators import Options
from pasta_jax.annotate.protocol import Annotated, Declined, Messages
from pasta_jax.baselines import apar
from pasta_jax.data.records import encode_prompt
from pasta_jax.lang import tags
from pasta_jax.lang.assemble import text_of
from pasta_jax.lang.program import Node, Program, Promise, Text
from pasta_jax.lang.render import escape, joined
from pasta_jax.tokens.cost import threads_of_program
from pasta_jax.tokens.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Apar:
    """The annotator. Of an answer with more forks than `max_branches` the first ones stay forks.

    Attributes:
      tokenizer: of the model, in the dialect of APAR.
      max_branches: the most forks of an answer.
      length: the most tokens of a prompt and its annotated answer; 0 for any number.
    """

    tokenizer: Tokenizer
    max_branches: int
    length: int = 0

    def __call__(self, prompt: str | Messages, answer: str) -> Annotated:
        if escape(answer) != answer or tags.FORK in answer:
            raise Declined("the text looks as if it had tags")
        nodes: list[Node] = []
        forks = 0
        for node in apar.annotate(answer).nodes:
            forks += isinstance(node, Promise)
            nodes.append(node if forks <= self.max_branches else Text(text_of([node])))
        program = Program(joined(nodes))
        if self.length:
            tokens = sum(map(len, threads_of_program(self.tokenizer, program).tokens))
            try:
                tokens += len(encode_prompt(self.tokenizer, prompt))
            except ValueError as error:  # the chat format cannot write it
                raise Declined(str(error)) from None
            if tokens > self.length:
                return Annotated(Program((Text(answer),)), ("longer than a row",) * forks)
        return Annotated(program, ("more forks than an answer may have",) * (forks - self.max_branches))


def make(options: Options) -> Apar:
    """The annotator of these options."""
    return Apar(options.tokenizer.with_dialect("apar"), options.max_branches, options.length)
