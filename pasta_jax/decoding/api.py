"""`pasta_jax.decode`: prompts in, answers out, for people.

>>> import pasta_jax  # doctest: +SKIP
>>> model = pasta_jax.load("runs/pasta")  # doctest: +SKIP
>>> print(pasta_jax.decode(model, "List the capitals of France and Peru."))  # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypedDict, Unpack, overload

import numpy as np

from pasta_jax.decoding.engine import Decoder, Model, Sampling
from pasta_jax.decoding.state import Limits
from pasta_jax.decoding.stops import cut, find_stop
from pasta_jax.decoding.trace import UNFED, Trace, document_order
from pasta_jax.lang.assemble import assemble, shortened
from pasta_jax.lang.program import Program, Promise
from pasta_jax.lang.render import render
from pasta_jax.tokens.reading import read
from pasta_jax.tokens.tokenizer import Tokenizer

MODES = ("parallel", "sequential", "both")

MAX_ROWS = 8
"""Prompts decoded at once; a longer list takes turns. Fewer are rounded up to a power of two."""


Conversation: TypeAlias = Sequence[Mapping[str, str]]
"""Messages {"role": "system" | "user" | "assistant", "content": text}, of which the user's is the last."""


@dataclasses.dataclass(frozen=True)
class Branch:
    """One kept promise.

    Attributes:
      id: thread number, from 1 in order of promise.
      parent: thread that promised it; 0 is main.
      topic, promised_tokens: what the promise said; promised_tokens in tokens, ten times the tag's number. A bare
        promise says "" and 0.
      tokens: content tokens written.
      text: reader's text of the block.
      start_step, end_step: decode steps that fed its first and its last token.
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
    """What a decode cost.

    Attributes:
      prompt_tokens, output_tokens: the answer's count has its tags in it, and every thread.
      decode_steps: steps that the row took after the prompt.
      sequential_steps: the answer's tokens without tags: the least steps for the same text one by one.
      step_speedup: sequential_steps / decode_steps.
      wall_s: seconds of the whole call's batch, compiling apart.
      compile_s: seconds of compiling in this call.
      tokens_per_s: output tokens by wall_s, this row's.
      max_width, mean_width: lanes used by a step.
      sequential_wall_s, measured_speedup: with mode="both", of the same prompt decoded without promises.
    """

    prompt_tokens: int
    output_tokens: int
    decode_steps: int
    sequential_steps: int
    step_speedup: float
    wall_s: float
    compile_s: float
    tokens_per_s: float
    max_width: int
    mean_width: float
    sequential_wall_s: float | None = None
    measured_speedup: float | None = None


@dataclasses.dataclass(frozen=True)
class DecodeResult:
    """An answer.

    One that ended at a stop string is the beginning of what was decoded, as far as `text` goes in document order:
    what lies beyond, in other threads too, is in no attribute but stats and trace. Its last token may spell the
    beginning of the stop string.

    Attributes:
      text: for the reader: tags removed, branches in promised order.
      annotated: what the model wrote, as PASTA-LANG.
      tokens, logprobs: NumPy, the answer in document order; the log-probabilities are the model's own, before
        temperature and grammar, and 0 for tokens that the interpreter inserted.
      branches: the promises kept, in order of promise.
      stats: what it cost.
      stop_reason: "eos", "length" (max_new_tokens), "cache_full", "stop" (a stop string) or "cancelled".
      issues: recoverable faults, a sentence each.
      program: `annotated`, parsed.
      trace: what the decode did, step by step.
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

    def __str__(self) -> str:
        return self.text


class Options(TypedDict, total=False):
    """The keyword arguments of `decode`, for type checkers; what they mean and their defaults stand there."""

    mode: str
    max_new_tokens: int
    max_branches: int
    max_branch_tokens: int
    lanes: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    open_bias: float
    grammar: bool
    cache_len: int | None


@overload
def decode(model: Model, prompt: str | Conversation, **options: Unpack[Options]) -> DecodeResult: ...
@overload
def decode(
    model: Model, prompt: list[str] | Sequence[Conversation], **options: Unpack[Options]
) -> list[DecodeResult]: ...
def decode(
    model: Model,
    prompt: str | Conversation | list[str] | Sequence[Conversation],
    *,
    mode: str = "parallel",
    max_new_tokens: int = 512,
    max_branches: int = 15,
    max_branch_tokens: int = 256,
    lanes: int = 8,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    open_bias: float = 0.0,
    grammar: bool = True,
    cache_len: int | None = None,
) -> DecodeResult | list[DecodeResult]:
    """Answer one prompt or conversation, or a list of them at once.

    Args:
      model: from `pasta_jax.load`.
      prompt: a string, or a conversation: a list of {"role": ..., "content": ...}, the roles an optional
        "system" first, then "user" and "assistant" in turn, the user's last. Both are put into the model's chat
        format. A list of strings or of conversations gives a list of results.
      mode: "parallel"; "sequential", in which promises are forbidden; or "both", which decodes twice each and
        adds the measured speedup.
      max_new_tokens: tokens of an answer over all threads, tags included.
      max_branches: T - 1, promises that one answer can hold.
      max_branch_tokens: content tokens of one branch; then its end is forced.
      lanes: S, threads that decode in the same step.
      temperature, top_k, top_p, seed: drawing; temperature 0 is greedy. The text depends on nothing else.
      open_bias: added to the logit that opens a promise; above 0 more parallel.
      grammar: keep tags well formed; without it malformed pieces become text and are listed in `issues`.
      cache_len: P, tokens of prompt and answer together; the default holds both.

    Raises:
      ValueError: an empty prompt, one that does not fit, a conversation out of turn, or an option out of range.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown. Use one of {', '.join(MODES)}.")
    if isinstance(prompt, Mapping) or not isinstance(prompt, str | Sequence):
        raise ValueError(
            f"The prompt is a {type(prompt).__name__}. Give a text, a conversation "
            '[{"role": "user", "content": "..."}], or a list of either.'
        )
    prompts: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
    if alone := isinstance(prompt, str) or any(isinstance(each, Mapping) for each in prompts):
        prompts = [prompt]
    if not prompts:
        return []
    ids = [_encode(model.tokenizer, each) for each in prompts]
    if cache_len is None:
        cache_len = _round_up(max(map(len, ids)) + max_new_tokens, 128)
    limits = Limits(min(lanes, max_branches + 1), max_branches + 1, cache_len, model.max_depth, grammar)
    wishes = Sampling(max_new_tokens, max_branch_tokens, temperature, top_k, top_p, seed, open_bias)
    rows = min(MAX_ROWS, 1 << (len(prompts) - 1).bit_length())
    if (limits, rows) not in model.decoders:
        model.decoders[limits, rows] = Decoder(model, limits=limits, rows=rows)
    decoder = model.decoders[limits, rows]
    plain = dataclasses.replace(wishes, open_bias=float("-inf"))
    results = _decode(decoder, ids, plain if mode == "sequential" else wishes, repeat=mode == "both")
    if mode == "both":
        sequential = _decode(decoder, ids, plain, repeat=True)
        results = [_with_speedup(*pair) for pair in zip(results, sequential, strict=True)]
    return results[0] if alone else results


def _encode(tokenizer: Tokenizer, prompt: str | Conversation) -> list[int]:
    return tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(prompt)


def _decode(decoder: Decoder, ids: list[list[int]], wishes: Sampling, *, repeat: bool) -> list[DecodeResult]:
    """`repeat` decodes twice and times the second, as the paper does (section 5.1)."""
    compile_s = 0.0
    for _ in range(1 + repeat):
        traces, timing = decoder.decode(ids, [wishes] * len(ids))
        compile_s += timing.compile_s
    return [result(decoder.model.tokenizer, trace, timing.wall_s, compile_s) for trace in traces]


def _with_speedup(parallel: DecodeResult, sequential: DecodeResult) -> DecodeResult:
    stats = dataclasses.replace(
        parallel.stats,
        sequential_wall_s=sequential.stats.wall_s,
        measured_speedup=sequential.stats.wall_s / parallel.stats.wall_s,
    )
    return dataclasses.replace(parallel, stats=stats)


def result(
    tokenizer: Tokenizer, trace: Trace, wall_s: float = 0.0, compile_s: float = 0.0, stop: Sequence[str] = ()
) -> DecodeResult:
    """A trace as an answer, which ends before the first of the stop strings."""
    vocabulary = tokenizer.vocabulary
    reading = read(vocabulary, trace.threads)
    program, text = reading.program, assemble(reading.program)
    kept, end = trace, find_stop(text, stop)
    if end is not None:
        kept = cut(trace, vocabulary, end)
        program, text = shortened(program, end), text[:end]
        reading = read(vocabulary, kept.threads)
    forced = [f"branch {k}: over its budget, its </async> was forced." for k in np.flatnonzero(kept.forced)]
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
            sequential_steps=reading.text_tokens,
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
    )


def _branch(trace: Trace, thread: int, promise: Promise) -> Branch:
    mine = np.flatnonzero(trace.tokens.thread == thread)
    fed = trace.step[mine][trace.step[mine] != UNFED]
    finished = bool(trace.finished[thread])
    start = int(fed.min(initial=trace.steps))
    return Branch(
        id=thread,
        parent=int(trace.parent[thread]),
        topic=promise.topic,
        promised_tokens=10 * promise.tokens,
        tokens=max(0, len(mine) - 1 - finished),
        text=assemble(Program(promise.block)),
        start_step=start,
        end_step=int(fed.max(initial=start)),
        stop_reason="budget" if trace.forced[thread] else "done" if finished else "cut",
    )


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
