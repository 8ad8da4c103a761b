"""The result of a decode, computed from its trace."""

from __future__ import annotations

import dataclasses
import html
import textwrap
from collections.abc import Sequence

import numpy as np

from pasta_jax.decoding.state import UNFED
from pasta_jax.decoding.stops import cut, find_stop
from pasta_jax.decoding.timeline import Timeline
from pasta_jax.decoding.trace import Trace, document_order
from pasta_jax.lang.assemble import assemble, shortened
from pasta_jax.lang.program import Program, Promise
from pasta_jax.lang.render import render
from pasta_jax.tokens.cost import critical_path
from pasta_jax.tokens.detokenize import read
from pasta_jax.tokens.tokenizer import Tokenizer, Vocabulary


@dataclasses.dataclass(frozen=True)
class Branch:
    """One kept promise.

    Attributes:
      id: thread number, from 1 in order of promise.
      parent: thread that promised it; 0 is main.
      topic, promised_tokens: of the promise; promised_tokens in tokens, ten times the tag's number. "" and 0 for a
        bare promise.
      tokens: tokens of the block, without its `<async>` and `</async>`.
      text: the block's text for the reader.
      start_step, end_step: decode steps that fed the branch's first and last token.
      stop_reason: "done", "budget" (its end was forced) or "cut" (the answer ended first).
    """

    id: int
    parent: int
    topic: str
    promised_tokens: int
    tokens: int
    text: str
    start_step: int
    end_step: int
    stop_reason: str


@dataclasses.dataclass(frozen=True)
class Stats:
    """The cost of an answer.

    Attributes:
      prompt_tokens, output_tokens: tokens of the prompt, and of the answer in all threads with its tags.
      decode_steps: steps that the row took after the prompt.
      text_tokens: the answer's tokens without its tags: the steps that a sequential decode of the same text takes.
      critical_path: decode steps that the answer needs with unlimited lanes (`tokens.cost`), at least 1.
      step_speedup: text_tokens / decode_steps.
      wall_s: seconds of the whole call without compiling; for a streamed or submitted request, seconds that the
        decoder worked while the request had a row.
      compile_s: seconds of compiling in that time.
      tokens_per_s: output_tokens / wall_s.
      max_width, mean_width: lanes used per step.
      sequential_text_tokens, sequential_wall_s: with mode="both", of the same prompt decoded without promises.
      measured_speedup: with mode="both", text_tokens / wall_s of this answer over those of the other one, which may
        be longer or shorter.
      reused_tokens: those of the prompt that were not fed, because an earlier prompt began alike.
    """

    prompt_tokens: int
    output_tokens: int
    decode_steps: int
    text_tokens: int
    critical_path: int
    step_speedup: float
    wall_s: float
    compile_s: float
    tokens_per_s: float
    max_width: int
    mean_width: float
    sequential_text_tokens: int | None = None
    sequential_wall_s: float | None = None
    measured_speedup: float | None = None
    reused_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class DecodeResult:
    """An answer.

    An answer with a stop string is cut off there, in document order. What was decoded beyond, in any thread, is
    only in `trace`, and counts only in the steps, widths and seconds of `stats`. The last token may spell the start
    of the stop string.

    Attributes:
      text: for the reader: without tags, every branch where it was promised. A tag that the end of the answer cut
        off is left out.
      annotated: the same in PASTA-LANG.
      tokens, logprobs: NumPy, the answer in document order; the log-probabilities are the model's own, before
        temperature and grammar, and 0 for tokens that the interpreter inserted.
      branches: the promises kept, in order of promise.
      stats: tokens, steps and seconds.
      stop_reason: "eos", "length" (max_new_tokens), "cache_full", "stop" (a stop string) or "cancelled".
      issues: recoverable faults, one sentence each.
      program: `annotated`, parsed.
      trace: the whole decode, step by step.
      vocabulary: of its tokens.
    """

    text: str
    annotated: str
    tokens: np.ndarray
    logprobs: np.ndarray
    branches: tuple[Branch, ...]
    stats: Stats
    stop_reason: str
    issues: tuple[str, ...]
    program: Program
    trace: Trace
    vocabulary: Vocabulary

    def timeline(self) -> Timeline:
        """Its threads over the decode steps, to `save` as a page or a figure."""
        stats = self.stats
        seconds = {"wall_s": stats.wall_s or None, "measured_speedup": stats.measured_speedup}
        stopped = len(self.text) if self.stop_reason == "stop" else None
        return Timeline.of(self.trace, self.vocabulary, stopped=stopped, **seconds)

    def _repr_html_(self) -> str:
        """In a notebook: the text, and a small chart of its threads."""
        text = f'<div style="max-width:60em;white-space:pre-wrap">{html.escape(self.text)}</div>'
        return f"{text}{self.timeline()._repr_html_()}"

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        counts = f"{len(self.branches)} branches, {self.stats.decode_steps} decode steps"
        text = textwrap.shorten(self.text, 72, placeholder=" …")
        return f"DecodeResult({text!r}, {counts}, stop_reason={self.stop_reason!r})"


def result(
    tokenizer: Tokenizer, trace: Trace, wall_s: float = 0.0, compile_s: float = 0.0, stop: Sequence[str] = ()
) -> DecodeResult:
    """The answer that a trace holds; it ends before the first of the stop strings."""
    vocabulary, kept, threads = tokenizer.vocabulary, trace, trace.threads
    reading = read(vocabulary, threads)
    program, text = reading.program, assemble(reading.program)
    if (end := find_stop(text, stop)) is not None:
        program, text = shortened(program, end), text[:end]
        kept = cut(trace, vocabulary, end)
        threads = kept.threads
        reading = read(vocabulary, threads, shortened=True)
    forced = [
        f"branch {k}: over its budget, its </async> was forced." for k in np.flatnonzero(kept.force_closed)
    ]
    answer = document_order(kept)[trace.prompt_length :]
    tokens = kept.tokens.token[answer]
    output, widths = int(np.sum(~np.isin(tokens, list(vocabulary.stops)))), trace.widths
    branches = zip(reading.promises, program.promises(), strict=True)
    return DecodeResult(
        text=text,
        annotated=render(program),
        tokens=tokens,
        logprobs=kept.logprob[answer],
        branches=tuple(_branch(kept, thread, promise) for thread, promise in sorted(branches)),
        stats=Stats(
            prompt_tokens=trace.prompt_length,
            output_tokens=output,
            decode_steps=trace.steps,
            text_tokens=reading.text_tokens,
            critical_path=max(1, critical_path(threads, vocabulary)),
            step_speedup=reading.text_tokens / max(trace.steps, 1),
            wall_s=wall_s,
            compile_s=compile_s,
            tokens_per_s=output / wall_s if wall_s else 0.0,
            max_width=int(widths.max(initial=0)),
            mean_width=float(widths.mean()) if widths.size else 0.0,
        ),
        stop_reason=kept.stop.reason,
        issues=(*reading.issues, *forced),
        program=program,
        trace=trace,
        vocabulary=vocabulary,
    )


def _branch(trace: Trace, thread: int, promise: Promise) -> Branch:
    steps = trace.step[trace.tokens.thread == thread]
    fed = steps[steps != UNFED]
    finished = bool(trace.finished[thread])
    start = int(fed.min(initial=trace.steps))
    return Branch(
        id=thread,
        parent=int(trace.parent[thread]),
        topic=promise.topic,
        promised_tokens=10 * promise.tokens,
        tokens=max(0, len(steps) - 1 - finished),
        text=assemble(Program(promise.block)),
        start_step=start,
        end_step=int(fed.max(initial=start)),
        stop_reason="budget" if trace.force_closed[thread] else "done" if finished else "cut",
    )
