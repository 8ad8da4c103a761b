"""Traces of written answers, as the specification decodes them: no model, and nothing to compile."""

from __future__ import annotations

from collections.abc import Callable

from pasta_jax.decoding import reference
from pasta_jax.decoding.script import script_of
from pasta_jax.decoding.state import Limits
from pasta_jax.decoding.trace import Trace
from pasta_jax.lang.parse import parse
from pasta_jax.testing import WordTokenizer
from pasta_jax.tokens.positions import Positions
from tests.helpers.traces import trace_of


def replayed(annotated: str, prompt: str, tokenizer: WordTokenizer, limits: Limits = Limits()) -> Trace:
    """The trace of this answer in PASTA-LANG to this prompt."""
    threads = script_of(parse(annotated), tokenizer).threads
    line: dict[int, int] = {0: 0}

    def sample(thread: reference.Thread, legal: Callable[[int], bool]) -> int:
        if thread.parent is not None:
            line[thread.number] = threads.branches[line[thread.parent.number]][thread.fork_order]
        return threads.tokens[line[thread.number]][thread.order]

    return trace_of(
        reference.decode(
            tokenizer.encode_prompt(prompt), sample, tokenizer.vocabulary, limits, positions=Positions(),
            max_new_tokens=10_000, max_branch_tokens=10_000,
        )
    )  # fmt: skip
