"""`pasta_jax.decode`: prompts in, answers out, for people.

>>> import pasta_jax  # doctest: +SKIP
>>> model = pasta_jax.load("runs/pasta")  # doctest: +SKIP
>>> print(pasta_jax.decode(model, "List the capitals of France and Peru."))  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, overload

from pasta_jax.decoding.engine import Decoder, Model, SamplingParams
from pasta_jax.decoding.results import DecodeResult, result
from pasta_jax.decoding.session import PendingAnswer
from pasta_jax.decoding.state import Limits, Stop
from pasta_jax.decoding.streaming import Consumed, Event, new_events
from pasta_jax.rounding import next_power_of_two, round_up
from pasta_jax.tokens.tokenizer import Tokenizer

MODES = ("parallel", "sequential", "both")

MAX_ROWS = 8
"""Prompts decoded at once; a longer list takes turns. Fewer are rounded up to a power of two."""


Conversation: TypeAlias = Sequence[Mapping[str, str]]
"""Messages {"role": "system" | "user" | "assistant", "content": text}, of which the user's is the last."""


class Options(TypedDict, total=False):
    """The keyword arguments of `decode`, for type checkers; what they mean and their defaults stand there."""

    mode: str
    max_new_tokens: int
    max_branches: int
    max_branch_tokens: int
    lanes: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int
    open_bias: float
    stop: str | Sequence[str]
    grammar: bool
    cache_len: int | None
    stream_tokens: bool


Events: TypeAlias = Generator[Event, None, None]
"""What a stream is: an iterator that decodes as it is asked for more; `close` ends the decode."""

Callback: TypeAlias = Callable[[Event], object]


@overload
def decode(
    model: Model,
    prompt: str | Conversation | list[str] | Sequence[Conversation],
    *,
    stream: Literal[True],
    **options: Unpack[Options],
) -> Events: ...
@overload
def decode(
    model: Model,
    prompt: str | Conversation,
    *,
    stream: Callback | Literal[False] = False,
    **options: Unpack[Options],
) -> DecodeResult: ...
@overload
def decode(
    model: Model,
    prompt: list[str] | Sequence[Conversation],
    *,
    stream: Callback | Literal[False] = False,
    **options: Unpack[Options],
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
    top_k: int | None = 0,
    top_p: float | None = 1.0,
    min_p: float | None = 0.0,
    seed: int = 0,
    open_bias: float = 0.0,
    stop: str | Sequence[str] | None = (),
    grammar: bool = True,
    cache_len: int | None = None,
    stream: bool | Callback = False,
    stream_tokens: bool = False,
) -> DecodeResult | list[DecodeResult] | Events:
    """PendingAnswer one prompt or conversation, or a list of them at once.

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
      temperature, seed: drawing; temperature 0 is greedy. The text depends on nothing else.
      top_k, top_p, min_p: draw among the most likely tokens only, in this order, after temperature: the top_k
        first; of these the fewest that have the share top_p; of these what is at least min_p times as likely as
        the likeliest. 0, 1 and 0 are off, and so is None.
      open_bias: added to the logit that opens a promise; above 0 more parallel.
      stop: texts; the answer ends before the first of them in the reader's text, whichever thread wrote it.
      grammar: keep tags well formed; without it malformed pieces become text and are listed in `issues`.
      cache_len: P, tokens of prompt and answer together; the default holds both.
      stream: True gives an iterator of `Event`s, which decodes as it is asked for more; closing it, or letting go
        of it, ends the decode. A function is called with each event, and `decode` returns as without. Events carry
        the index of the prompt in `request`; a `Draft` makes text of them, `settled_text` text to print.
      stream_tokens: events of single tokens too.

    Raises:
      ValueError: an empty prompt, one that does not fit, a conversation out of turn, or an option out of range.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown. Use one of {', '.join(MODES)}.")
    if stream and mode == "both":
        raise ValueError('mode="both" decodes each prompt several times. To stream, decode it in one mode.')
    if isinstance(prompt, Mapping) or not isinstance(prompt, str | Sequence):
        raise ValueError(
            f"The prompt is a {type(prompt).__name__}. Give a text, a conversation "
            '[{"role": "user", "content": "..."}], or a list of either.'
        )
    prompts: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
    if alone := isinstance(prompt, str) or any(isinstance(each, Mapping) for each in prompts):
        prompts = [prompt]
    if not prompts:
        return (event for event in list[Event]()) if stream is True else []
    ids = [_encode(model.tokenizer, each) for each in prompts]
    if cache_len is None:
        cache_len = round_up(max(map(len, ids)) + max_new_tokens, 128)
    limits = Limits(min(lanes, max_branches + 1), max_branches + 1, cache_len, model.max_depth, grammar)
    wishes = SamplingParams(
        max_new_tokens=max_new_tokens,
        max_branch_tokens=max_branch_tokens,
        temperature=temperature,
        top_k=top_k or 0,
        top_p=1.0 if top_p is None else top_p,
        min_p=min_p or 0.0,
        seed=seed,
        open_bias=open_bias,
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
    )
    rows = min(MAX_ROWS, next_power_of_two(len(prompts)))
    decoder = model.decoder(limits, rows)
    plain = dataclasses.replace(wishes, open_bias=float("-inf"))
    if stream:
        for each in ids:
            decoder.check(each)
        events = _stream(decoder, ids, plain if mode == "sequential" else wishes, stream_tokens)
        if not callable(stream):
            return events
        answers = _tell(events, stream)
        return answers[0] if alone else answers
    results = _decode(decoder, ids, plain if mode == "sequential" else wishes, repeat=mode == "both")
    if mode == "both":
        sequential = _decode(decoder, ids, plain, repeat=True)
        results = [_with_speedup(*pair) for pair in zip(results, sequential, strict=True)]
    return results[0] if alone else results


def _encode(tokenizer: Tokenizer, prompt: str | Conversation) -> list[int]:
    return tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(prompt)


def _decode(
    decoder: Decoder, ids: list[list[int]], wishes: SamplingParams, *, repeat: bool
) -> list[DecodeResult]:
    """`repeat` decodes twice and times the second, as the paper does (section 5.1)."""
    compile_s = 0.0
    for _ in range(1 + repeat):
        traces, timing = decoder.decode(ids, [wishes] * len(ids))
        compile_s += timing.compile_s
    tokenizer = decoder.model.tokenizer
    return [result(tokenizer, trace, timing.wall_s, compile_s, wishes.stop) for trace in traces]


def _stream(decoder: Decoder, ids: list[list[int]], wishes: SamplingParams, raw: bool) -> Events:
    """Decodes whenever there is nothing to tell. Whatever ends it early cancels what is not done."""
    vocabulary = decoder.model.tokenizer.vocabulary
    answers: list[PendingAnswer] = []
    seen = dict.fromkeys(range(len(ids)), Consumed())  # of those whose end was not told yet
    try:
        for each in ids:
            answers.append(decoder.submit(each, wishes))
        while seen:
            for i in [*seen]:
                if (trace := answers[i].trace) is None:
                    continue
                seen[i], events = new_events(seen[i], trace, vocabulary, request=i, stop=wishes.stop, raw=raw)
                yield from events
                if trace.stop != Stop.RUNNING:
                    yield Event("done", i, result=answers[i].result(), stop=wishes.stop)
                    del seen[i]
            if not seen:
                break
            for answer in answers:
                answer.watched = True  # by nobody while the consumer is away
            answers[min(seen)].step()
            for answer in answers:
                answer.watched = False
    finally:
        for answer in answers:
            answer.cancel()


def _tell(events: Events, callback: Callback) -> list[DecodeResult]:
    """Calls back with each event; the results in the order of the prompts."""
    results: dict[int, DecodeResult] = {}
    with contextlib.closing(events):
        for event in events:
            callback(event)
            if event.result is not None:
                results[event.request] = event.result
    return [results[i] for i in sorted(results)]


def _with_speedup(parallel: DecodeResult, sequential: DecodeResult) -> DecodeResult:
    stats = dataclasses.replace(
        parallel.stats,
        sequential_wall_s=sequential.stats.wall_s,
        measured_speedup=sequential.stats.wall_s / parallel.stats.wall_s,
    )
    return dataclasses.replace(parallel, stats=stats)
