"""`pasta_jax.decode`: prompts in, answers out, for people.

>>> import pasta_jax  # doctest: +SKIP
>>> model = pasta_jax.load("runs/pasta")  # doctest: +SKIP
>>> print(pasta_jax.decode(model, "List the capitals of France and Peru."))  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import threading
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, overload

from pasta_jax.arrays import LARGEST_INT
from pasta_jax.decoding.compiled import Compiled, Sizes
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.fits import DoesNotFit
from pasta_jax.decoding.model import Model, check_model
from pasta_jax.decoding.options import switch, whole
from pasta_jax.decoding.pending import PendingAnswer
from pasta_jax.decoding.request import Conversation, SamplingParams
from pasta_jax.decoding.results import DecodeResult, result
from pasta_jax.decoding.state import MAX_POOL, Limits, Stop
from pasta_jax.decoding.streaming import Consumed, Event, new_events
from pasta_jax.messages import shown
from pasta_jax.rounding import next_power_of_two, round_up
from pasta_jax.tokens.tokenizer import Tokenizer

MODES = ("parallel", "sequential", "both")

MAX_ROWS = 8
"""Prompts decoded at once; a longer list takes turns. Fewer are rounded up to a power of two."""


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParams` as keyword arguments of `decode`. None is a field's default."""

    max_new_tokens: int | None
    max_branch_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    open_bias: float | None
    stop: str | Sequence[str] | None


class Options(SamplingOptions, total=False):
    """All keyword arguments of `decode` that do not change its type."""

    mode: str
    max_branches: int
    lanes: int
    grammar: bool
    cache_len: int | None
    batch_invariant: bool
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
    max_branches: int = 15,
    lanes: int = 8,
    grammar: bool = True,
    cache_len: int | None = None,
    batch_invariant: bool = False,
    stream: bool | Callback = False,
    stream_tokens: bool = False,
    **options: Unpack[SamplingOptions],
) -> DecodeResult | list[DecodeResult] | Events:
    """Answers one prompt or conversation, or a list of them at once.

    Args:
      model: from `pasta_jax.load`.
      prompt: a string, or a conversation: a list of {"role": ..., "content": ...}, the roles an optional
        "system" first, then "user" and "assistant" in turn, the user's last. Both are put into the model's chat
        format. A list of strings or of conversations gives a list of results.
      mode: "parallel"; "sequential", in which promises are forbidden; or "both", which decodes twice each and
        adds the measured speedup.
      max_branches: T - 1, the most promises of one answer.
      lanes: S, threads that decode in the same step.
      grammar: keep tags well formed; without it pieces of broken tags become text and are listed in `issues`.
      cache_len: P, tokens of prompt and answer together; the default holds both.
      batch_invariant: rounding (1e-5 of a log-probability in float32, hundredths in bfloat16), and so now and then
        a text, depends on how many prompts are answered at once, on their lengths and on cache_len. With this an
        answer depends on its prompt and the options alone, bit for bit, but takes longer: one prompt, too, is
        decoded with 8 rows. It needs cache_len.
      stream: True gives an iterator of `Event`s, which decodes as it is asked for more; closing or dropping it ends
        the decode. A function is called with each event, and `decode` returns its usual result. Events carry
        the index of the prompt in `request`; a `Draft` makes text of them, `settled_text` text to print.
      stream_tokens: events of single tokens too.
      options: of sampling, with the defaults of `SamplingParams`; None is the default.
        max_new_tokens (512): tokens of an answer over all threads, tags included.
        max_branch_tokens (256): content tokens of one branch; then its end is forced.
        temperature (0.0, greedy), seed (0, to 2**64 - 1): of drawing. A draw depends on no other request.
        top_k (0, off), top_p (1.0, off), min_p (0.0, off): draw among the most likely tokens only, in this order,
        after temperature: the top_k first; of these the fewest that have the share top_p; of these what is at
        least min_p times as likely as the likeliest.
        open_bias (0.0): added to the logit that opens a promise; above 0 more parallel.
        stop (none): a text or several; the answer ends before the first of them in the reader's text, whichever
        thread wrote it.

    Raises:
      ValueError: an empty prompt, one that does not fit, also into memory, or holds half a character; a
        conversation out of turn; an option out of range or of the wrong type; batch_invariant without cache_len.
    """
    check_model(model)
    if mode not in MODES:
        raise ValueError(f"mode={shown(mode)} is unknown. Use one of {', '.join(MODES)}.")
    whole("max_branches", max_branches, 0, LARGEST_INT - 1)
    whole("lanes", lanes, 1)
    switch("grammar", grammar)
    switch("stream_tokens", stream_tokens)
    batch_invariant = switch("batch_invariant", batch_invariant)
    stream = stream if callable(stream) else switch("stream", stream)
    if stream and mode == "both":
        raise ValueError('mode="both" decodes each prompt several times. To stream, decode it in one mode.')
    _check_prompt(prompt)
    prompts: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
    if is_single := isinstance(prompt, str) or any(isinstance(message, Mapping) for message in prompts):
        prompts = [prompt]
    if not prompts:
        return (event for event in list[Event]()) if stream is True else []
    if unknown := options.keys() - SamplingOptions.__annotations__.keys():
        name = min(unknown)
        close = difflib.get_close_matches(name, Options.__annotations__, n=1)
        raise TypeError(f"decode() has no option {name}." + (f" Did you mean {close[0]}?" if close else ""))
    for each in prompts:
        _check_prompt(each)
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = (given["stop"],)
    sampling = SamplingParams(**given)  # type: ignore[arg-type]
    tokenizer = model.tokenizer
    ids = _encoded(tokenizer, prompts)
    if batch_invariant and cache_len is None:
        raise ValueError(
            "batch_invariant=True needs cache_len: by default the longest prompt of the list decides it, and all "
            "answers would depend on that."
        )
    if cache_len is None:
        cache_len = min(round_up(max(map(len, ids)) + sampling.max_new_tokens, 128), MAX_POOL)
    whole("cache_len", cache_len, 1, MAX_POOL)
    limits = Limits(
        lanes=min(lanes, max_branches + 1),
        threads=max_branches + 1,
        pool=cache_len,
        max_depth=model.max_depth,
        constrained=grammar,
    )
    rows = MAX_ROWS if batch_invariant else min(MAX_ROWS, next_power_of_two(len(prompts)))
    sequential = dataclasses.replace(sampling, open_bias=float("-inf"))
    if mode == "sequential":
        sampling = sequential
    try:
        decoder = decoder_for(model, limits, rows, batch_invariant)
        if stream:
            answers = [decoder.session.prepare(prompt, sampling) for prompt in ids]
            events = _stream(decoder, answers, stream_tokens)
            if not callable(stream):
                return events
            results = _call_back(events, stream)
        else:
            results = _decode(decoder, ids, sampling, repeat=mode == "both")
    except DoesNotFit as error:
        raise ValueError(error.for_decode) from None
    if mode == "both":
        alone = _decode(decoder, ids, sequential, repeat=True)
        results = [_with_speedup(*pair) for pair in zip(results, alone, strict=True)]
    return results[0] if is_single else results


def _check_prompt(prompt: Any) -> None:
    """Raises ValueError for what is neither a text nor a list."""
    if isinstance(prompt, bytes | bytearray | Mapping) or not isinstance(prompt, str | Sequence):
        kind = type(prompt).__name__
        what = "None" if prompt is None else f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
        raise ValueError(
            f"The prompt is {what}. Give a text, a conversation "
            '[{"role": "user", "content": "..."}], or a list of either.'
        )


def _encoded(tokenizer: Tokenizer, prompts: Sequence[Any]) -> list[list[int]]:
    """The ids of each prompt. Raises ValueError, which says of several which one is wrong."""
    ids = []
    for number, prompt in enumerate(prompts, 1):
        try:
            encode = tokenizer.encode_prompt if isinstance(prompt, str) else tokenizer.encode_chat
            ids.append(encode(prompt))
        except ValueError as error:
            if len(prompts) == 1:
                raise
            raise ValueError(f"Prompt {number} of {len(prompts)}: {error}") from error
    return ids


# ------------------------------------------------------------------------------------------------- decoders


_Key: TypeAlias = tuple[Limits, int, bool]


class _Cache:
    """What was compiled for one model, by sizes; and its decoders, as long as somebody uses them.

    A decoder holds its model. If this held decoders, no model would ever be freed.
    """

    def __init__(self) -> None:
        self.compiled: dict[_Key, Compiled] = {}
        self.decoders = weakref.WeakValueDictionary[_Key, Decoder]()


_CACHES: weakref.WeakKeyDictionary[Model, _Cache] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def decoder_for(model: Model, limits: Limits, rows: int, batch_invariant: bool = False) -> Decoder:
    """The decoder of these sizes that `decode` uses. Its programs stay compiled as long as the model is in use."""
    with _LOCK:
        cache = _CACHES.setdefault(model, _Cache())
        key = limits, rows, batch_invariant
        decoder = cache.decoders.get(key)
        if decoder is None:
            compiled = cache.compiled.get(key)
            sizes: Sizes = {"limits": limits, "rows": rows, "batch_invariant": batch_invariant}
            decoder = Decoder(model, compiled=compiled, **({} if compiled else sizes))
            cache.compiled[key], cache.decoders[key] = decoder.compiled, decoder
        return decoder


# -------------------------------------------------------------------------------------------------- decoding


def _decode(
    decoder: Decoder, ids: list[list[int]], sampling: SamplingParams, *, repeat: bool
) -> list[DecodeResult]:
    """`repeat` decodes twice and times the second, as the paper does (section 5.1)."""
    compile_s = 0.0
    for _ in range(1 + repeat):
        traces, timing = decoder.decode(ids, [sampling] * len(ids))
        compile_s += timing.compile_s
    tokenizer = decoder.model.tokenizer
    return [result(tokenizer, trace, timing.wall_s, compile_s, sampling.stop) for trace in traces]


def _stream(decoder: Decoder, answers: list[PendingAnswer], raw: bool) -> Events:
    """Decodes whenever there are no events left. However it ends, unfinished answers are cancelled."""
    vocabulary = decoder.model.tokenizer.vocabulary
    seen = dict.fromkeys(range(len(answers)), Consumed())  # of answers whose end is still to be streamed
    try:
        for answer in answers:
            decoder.session.queue(answer)
        while seen:
            for i in [*seen]:
                answer, stop = answers[i], answers[i].sampling.stop
                if (trace := answer.trace) is None:
                    continue
                seen[i], events = new_events(seen[i], trace, vocabulary, request=i, stop=stop, raw=raw)
                yield from events
                if trace.stop != Stop.RUNNING:
                    yield Event("done", i, result=answer.result(), stop=stop)
                    del seen[i]
            if not seen:
                break
            for answer in answers:
                answer.watched = True  # but by nobody while the consumer is away
            answers[min(seen)].step()
            for answer in answers:
                answer.watched = False
    finally:
        for answer in answers:
            answer.cancel()


def _call_back(events: Events, callback: Callback) -> list[DecodeResult]:
    """Calls the function with each event; the results in the order of the prompts."""
    results: dict[int, DecodeResult] = {}
    with contextlib.closing(events):
        for event in events:
            callback(event)
            if event.result is not None:
                results[event.request] = event.result
    return [results[i] for i in sorted(results)]


def _with_speedup(parallel: DecodeResult, sequential: DecodeResult) -> DecodeResult:
    rate, other = (max(1, each.stats.text_tokens) / each.stats.wall_s for each in (parallel, sequential))
    stats = dataclasses.replace(
        parallel.stats,
        sequential_text_tokens=sequential.stats.text_tokens,
        sequential_wall_s=sequential.stats.wall_s,
        measured_speedup=rate / other,
    )
    return dataclasses.replace(parallel, stats=stats)
