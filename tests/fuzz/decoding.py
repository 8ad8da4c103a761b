"""Requests side by side: prompts, sampling, cuts, stop strings, streams, cancels and interrupts at random.

Each request ends, and has the text that it has alone; a reader sees no piece of a tag, streamed or not, and no stop
string; and the interpreter has done what the specification says.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
from collections.abc import Callable
from typing import Any

from pasta_jax.decoding import reference
from pasta_jax.decoding.compiled import Compiled
from pasta_jax.decoding.pending import PendingAnswer
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.results import DecodeResult, result
from pasta_jax.decoding.state import Stop
from pasta_jax.decoding.streaming import Consumed, Draft, new_events
from pasta_jax.decoding.trace import Trace
from pasta_jax.lang import tags
from pasta_jax.lang.assemble import assemble
from pasta_jax.lang.parse import parse
from tests.fuzz.runner import Target
from tests.helpers.chatty import LIMITS, PROMPTS, WORDS, decoder, ids

BREAKS = ("admit", "decode_chunk", "read", "release")
"""Where an interrupt may come: after one of these has run, when what went in is gone."""


def draw(rng: random.Random) -> Any:
    requests = [_request(rng) for _ in range(rng.randint(1, 8))]
    breaks = [[rng.choice(BREAKS), rng.randrange(4)] for _ in range(rng.choice((0, 0, 1, 2)))]
    return {"requests": requests, "interrupts": breaks}


def _request(rng: random.Random) -> dict[str, Any]:
    return {
        "prompt": f"{rng.choice(PROMPTS)} {rng.randrange(97)}",
        "sampling": {
            "max_new_tokens": rng.choice((1, 2, 3, 4, 5, 6, 7, 9, 12, 20, 60, 119)),
            "max_branch_tokens": rng.choice((1, 2, 8, 30)),
            "temperature": rng.choice((0.0, 0.7, 1.0, 1.5)),
            "top_k": rng.choice((0, 0, 1, 5)),
            "top_p": rng.choice((1.0, 0.9, 0.1)),
            "min_p": rng.choice((0.0, 0.05)),
            "seed": rng.randrange(10_000),
            "open_bias": rng.choice((0.0, 3.5, 3.5, 6.0, float("-inf"))),
            "stop": rng.choice(
                ([], [], [], [" the", "a"], ["e", "rivers and"], [" ", "<"], ['"'], ["topic", ">"])
            ),
        },
        "watched": rng.random() < 0.4,
        "cancel": rng.choice((None, None, None, None, 0, 1, 3)),
    }


# ------------------------------------------------------------------------------------------------------ check


def check(case: Any) -> None:
    requests = case["requests"]
    answers = [decoder().submit(ids(each["prompt"]), sampling(each)) for each in requests]
    views = [_View(answer) if each["watched"] else None for each, answer in zip(requests, answers)]
    try:
        work(requests, answers, views, interrupted(dict(case["interrupts"])))
    finally:
        for answer in answers:
            answer.cancel()
    for each, answer, view in zip(requests, answers, views):
        check_answer(each, answer, view)


Turn = Callable[[Callable[[], None]], None]


def work(requests: list[Any], answers: list[PendingAnswer], views: list[_View | None], turn: Turn) -> None:
    """All requests to their end, with cancels and looks between the turns."""
    for answer, view in zip(answers, views):
        answer.watched = view is not None
    for turns in itertools.count():
        for each, answer in zip(requests, answers):
            if each["cancel"] is not None and each["cancel"] <= turns:
                answer.cancel()
        if decoder().session.idle:
            break
        turn(decoder().session.turn)
        for view in filter(None, views):
            view.look()
        assert turns < 400, "they do not end"
    assert all(answer.done for answer in answers), "a request is lost"


def sampling(request: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**{name: _tuple(value) for name, value in request["sampling"].items()})


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def interrupted(waits: dict[str, int]) -> Turn:
    """Calls a turn, in which Ctrl-C comes once after so many calls of each of these functions of `Compiled`."""

    def turn(call: Callable[[], None]) -> None:
        originals = {verb: getattr(Compiled, verb) for verb in waits}

        def breaking(verb: str) -> Callable[..., Any]:
            def run(self: Compiled, *arguments: Any) -> Any:
                done = originals[verb](self, *arguments)
                waits[verb] -= 1
                if waits[verb] == -1:
                    raise KeyboardInterrupt
                return done

            return run

        try:
            for verb in waits:
                setattr(Compiled, verb, breaking(verb))
            call()
        except KeyboardInterrupt:
            pass
        finally:
            for verb, original in originals.items():
                setattr(Compiled, verb, original)

    return turn


class _View:
    """A reader of a stream: what it has been shown."""

    def __init__(self, answer: PendingAnswer):
        self.answer, self.seen, self.draft, self.shown = answer, Consumed(), Draft(), ""

    def look(self) -> None:
        if self.answer.trace is None:
            return
        stop = self.answer.sampling.stop
        self.seen, events = new_events(self.seen, self.answer.trace, WORDS.vocabulary, stop=stop)
        for event in events:
            self.draft.add(event)
            assert event.kind != "text" or not pieces_in(event.text), f"a reader saw {event.text!r}"
            assert self.draft.settled.startswith(self.shown), "what was shown is taken back"
            self.shown = self.draft.settled
            assert not pieces_in(str(self.draft)) and not pieces_in(self.shown), "a reader saw a tag"


def pieces_in(text: str) -> list[str]:
    """Tags that a text shows."""
    return [piece for piece in tags.PIECES if piece in text]


def check_answer(request: dict[str, Any], answer: PendingAnswer, view: _View | None) -> None:
    trace, found = answer.wait(), answer.result()
    stops = answer.sampling.stop
    assert not pieces_in(found.text), f"a reader sees {pieces_in(found.text)} in {found.text[-80:]!r}"
    assert not any(stop in found.text for stop in stops), "the stop string is in the text"
    assert parse(found.annotated) == found.program and assemble(found.program) == found.text
    assert (found.stop_reason == "cancelled") <= (request["cancel"] is not None)
    assert sum(trace.tokens.order >= 0) <= answer.sampling.max_new_tokens + len(trace.parent)
    for branch in found.branches:
        assert not pieces_in(branch.topic + branch.text)
    if view is not None:
        view.look()
        assert str(view.draft) == view.draft.settled == found.text, "the stream shows another text"
    check_reference(trace, answer)
    whole = alone(json.dumps(request, sort_keys=True))
    if trace.stop == Stop.CANCELLED:
        pairs = [*zip(trace.threads.tokens, whole.trace.threads.tokens)]
        assert len(trace.parent) <= len(whole.trace.parent) and all(a == b[: len(a)] for a, b in pairs)
    else:
        assert told(found) == told(whole), "other requests changed it"


def told(found: DecodeResult) -> tuple[Any, ...]:
    return found.text, found.annotated, found.tokens.tolist(), found.stop_reason, found.issues


@functools.lru_cache(maxsize=256)
def alone(request: str) -> DecodeResult:
    """The answer without others, looks and interrupts."""
    each = json.loads(request)
    prompt, asked = ids(each["prompt"]), sampling(each)
    (trace,), _ = decoder(rows=1).decode([prompt], [asked])
    return result(WORDS, trace, stop=asked.stop)


def check_reference(trace: Trace, answer: PendingAnswer) -> None:
    """The specification, saying what the model said, feeds the same tokens in the same steps."""
    if trace.stop not in (Stop.EOS, Stop.LENGTH, Stop.CACHE_FULL):
        return
    said = {
        (int(thread), int(order)): int(token)
        for token, thread, order in zip(trace.tokens.token, trace.tokens.thread, trace.tokens.order)
    }
    vocabulary = WORDS.vocabulary
    text, waits = WORDS.encode("a")[0], vocabulary.tag_ids[tags.SYNC]

    def sample(thread: reference.Thread, legal: Callable[[int], bool]) -> int:
        token = said.get((thread.number, thread.order))
        if token is None:  # it was never fed, for want of room: what holds a thread that has branches, or any
            unseen = [waits, text] if thread.unjoined else [text]
            return next(token for token in (*unseen, *range(len(vocabulary))) if legal(token))
        assert legal(token) or thread.depth, f"the grammar forbids {vocabulary.text([token])!r}"
        return token

    asked = answer.sampling
    expected = reference.decode(
        answer.prompt, sample, vocabulary, LIMITS,
        max_new_tokens=asked.max_new_tokens, max_branch_tokens=asked.max_branch_tokens,
    )  # fmt: skip
    fed = trace.step >= 0
    names = ("token", "thread", "order", "position")
    assert expected.stop == trace.stop and expected.steps == trace.steps
    assert [e.step for e in expected.entries] == trace.step[fed].tolist()
    columns = [getattr(trace.tokens, name)[fed].tolist() for name in names]
    assert [[getattr(entry, name) for entry in expected.entries] for name in names] == columns


TARGET = Target(draw, check, share=4.0, seconds=60.0, cases=12)
