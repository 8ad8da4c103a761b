"""Streaming and stop strings, as pure functions of traces: what a consumer sees, whenever it looks."""

from __future__ import annotations

import dataclasses
import functools
import random
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasta_jax.arrays import ThreadedTokens
from pasta_jax.decoding import interpreter, reference, results
from pasta_jax.decoding.script import depth_of
from pasta_jax.decoding.state import UNFED, Limits, RowState, Stop
from pasta_jax.decoding.stops import check_stops, cut, find_stop, held_back
from pasta_jax.decoding.streaming import Consumed, Draft, Event, new_events, settled_text
from pasta_jax.decoding.trace import Trace, document_order, trace_of_row
from pasta_jax.lang.assemble import assemble, shortened
from pasta_jax.testing import WordTokenizer
from pasta_jax.tokens.detokenize import read
from pasta_jax.tokens.positions import Positions
from pasta_jax.tokens.tokenizer import Vocabulary
from tests.helpers import scripted
from tests.helpers.scripted import random_script

SETTINGS = (
    Limits(lanes=8, threads=16, pool=160),
    Limits(lanes=2, threads=6, pool=120, max_depth=3),
    Limits(lanes=3, threads=12, pool=160, max_depth=2, constrained=False),
    Limits(lanes=8, threads=24, pool=240, max_depth=3, constrained=False),
)

PIECES = list(scripted.VOCABULARY.pieces)
PIECES[scripted.A], PIECES[scripted.B], PIECES[15] = b"\xf0\x9f", b"\x8c\x8d \xe6", b"x"
SPLIT = dataclasses.replace(scripted.VOCABULARY, pieces=tuple(PIECES))
"""The same ids and kinds, but one character takes two tokens, and many bytes are no character at all."""

CUT = "branch {}: stopped before its </async>."

VOCABULARIES = (scripted.VOCABULARY, SPLIT)


def trace_of(answer: reference.Decoded) -> Trace:
    """The trace that the engine would read of what the specification decoded."""
    entries, steps = list(answer.entries), [e.step for e in answer.entries]
    if answer.stop == Stop.EOS:
        last = [t.pending for t in (*answer.threads[1:], answer.threads[0]) if t.pending]
        entries += last
        steps += [UNFED] * len(last)
    n = len(entries)
    fields = {
        name: np.array([getattr(e, name) for e in entries], np.int32)
        for name in ("token", "thread", "order", "position")
    }
    zeros = np.zeros(n, np.int32)
    document = ThreadedTokens(
        **fields, doc=zeros + 1, segment=zeros, sees=zeros[:, None].astype(np.uint32), target=zeros
    )
    fed = [t.pending is None or (answer.stop == Stop.EOS and t.closing) for t in answer.threads]
    return Trace(
        tokens=document,
        step=np.array(steps, np.int32),
        logprob=-np.arange(n, dtype=np.float32),
        stop=answer.stop,
        steps=answer.steps,
        parent=np.array([t.parent.number if t.parent else -1 for t in answer.threads], np.int32),
        fork_order=np.array([t.fork_order for t in answer.threads], np.int32),
        force_closed=np.array([t.force_closed for t in answer.threads]),
        finished=np.array(fed),
    )


@functools.cache
def traces(seed: int, per_setting: int = 16) -> list[Trace]:
    rng = np.random.default_rng(seed)
    out = []
    for limits in SETTINGS:
        for _ in range(per_setting):
            ask = scripted.request(int(rng.integers(5, 200)), int(rng.integers(3, 40)))
            prompt = [scripted.A] * int(rng.integers(1, 7))
            answer = scripted.run_reference(prompt, random_script(rng), limits, ask, Positions())
            out.append(trace_of(answer))
    return out


def at_step(trace: Trace, step: int, stop: Stop = Stop.RUNNING) -> Trace:
    """What is there of a trace after so many steps."""
    keep = (trace.step >= 0) & (trace.step <= step)
    fed, whole = (
        np.bincount(trace.tokens.thread[k], minlength=len(trace.parent)) for k in (keep, keep | True)
    )
    return dataclasses.replace(
        trace,
        tokens=ThreadedTokens(**{name: array[keep] for name, array in trace.tokens.fields().items()}),
        step=trace.step[keep],
        logprob=trace.logprob[keep],
        stop=stop,
        steps=step,
        force_closed=trace.force_closed & (fed == whole),
        finished=trace.finished & (fed == whole),
    )


def looks(trace: Trace, rng: random.Random, density: float) -> list[Trace]:
    """The trace as it is at some steps, and as it is at last."""
    steps = [step for step in range(trace.steps + 1) if rng.random() < density]
    return [*(at_step(trace, step) for step in steps), trace]


def text_of(trace: Trace, vocabulary: Vocabulary) -> str:
    return assemble(read(vocabulary, trace.threads).program)


def follow(
    seen: Consumed, draft: Draft, trace: Trace, vocabulary: Vocabulary, stop: tuple[str, ...] = ()
) -> tuple[Consumed, list[Event]]:
    seen, events = new_events(seen, trace, vocabulary, stop=stop)
    for event in events:
        draft.add(event)
    return seen, events


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_however_the_steps_are_cut_the_document_is_the_answer(seed, vocabulary):
    rng = random.Random(seed)
    kinds = set()
    for trace in traces(seed):
        text = text_of(trace, vocabulary)
        promises = list(read(vocabulary, trace.threads).promises)
        for density in (0.0, 0.1, 1.0):
            seen, draft, settled, everything = Consumed(), Draft(), "", []
            for look in looks(trace, rng, density):
                seen, events = follow(seen, draft, look, vocabulary)
                everything += events
                assert draft.settled.startswith(settled) and text.startswith(draft.settled)
                settled = draft.settled
                if look is not trace:
                    reading = read(vocabulary, look.threads)
                    cut_off = {
                        k for k in reading.promises for issue in reading.issues if issue == CUT.format(k)
                    }
                    assert {e.branch for e in everything if e.kind == "closed"} == {
                        *reading.promises
                    } - cut_off
            assert str(draft) == draft.settled == text
            assert [e.branch for e in everything if e.kind == "closed"][-1:] == [0]
            assert sorted(promises) == sorted(e.branch for e in everything if e.kind == "promise")
            closed = [e.branch for e in everything if e.kind == "closed"]
            assert sorted(closed) == [0, *sorted(promises)]
            kinds |= {event.kind for event in everything}
            assert "".join(settled_text(everything)) == text
            assert new_events(seen, trace, vocabulary, raw=True) == (seen, [])
    assert kinds == {"text", "promise", "closed"}


def test_every_look_gets_document_order_and_no_more_than_is_new(seed):
    """Within a look, a branch is heard before the text that follows it; with one look that is the document."""
    for trace in traces(seed):
        reading = read(SPLIT, trace.threads)
        _, events = new_events(Consumed(), trace, SPLIT)
        assert "".join(event.text for event in events) == assemble(reading.program)
        kept = [event for event in events if event.kind == "promise"]
        assert [event.branch for event in kept] == list(reading.promises)
        for event in kept:
            promise = reading.promises[event.branch]
            assert (event.topic, event.promised_tokens) == (promise.topic, 10 * promise.tokens)
            assert event.parent == trace.parent[event.branch]


def test_text_is_whole_characters_and_no_tag_in_the_making():
    """Byte by byte and piece by piece; a tag is text once it can be none any more, not before."""
    words = WordTokenizer()
    vocabulary = words.vocabulary
    tag = [vocabulary.tag_ids[piece] for piece in ('<promise topic="', '" tokens=')]
    said = [*words.encode("東🌍"), *tag[:1], *words.encode("x"), *tag[1:], *words.encode("y")]
    trace = of_main(said, Stop.EOS, vocabulary.eos)
    seen, texts = Consumed(), []
    for step in range(len(said) + 1):
        seen, events = new_events(seen, at_step(trace, step), vocabulary)
        texts.append("".join(event.text for event in events))
    assert texts == ["", "", "", "東", "", "", "", "🌍", "", "", "", '<promise topic="x" tokens=y']
    half = of_main(said[:2], Stop.LENGTH)
    assert [e.text for e in new_events(Consumed(), half, vocabulary)[1]] == ["\ufffd", ""]


def of_main(tokens: list[int], stop: Stop, *end: int) -> Trace:
    """A trace of one thread and no prompt."""
    n = len(tokens) + len(end)
    column = np.arange(n, dtype=np.int32)
    zeros = np.zeros(n, np.int32)
    document = ThreadedTokens(
        np.array([*tokens, *end], np.int32), column, zeros + 1, zeros, column, zeros[:, None], zeros, zeros
    )
    step = np.array([*range(1, len(tokens) + 1), *(UNFED for _ in end)], np.int32)
    one = np.zeros(1, np.int32)
    return Trace(document, step, zeros.astype(np.float32), stop, len(tokens), one - 1, one, one > 0, one > 0)


def test_raw_tokens_are_the_trace(seed):
    rng = random.Random(seed)
    for trace in traces(seed)[::5]:
        seen, raw = Consumed(), []
        for look in looks(trace, rng, 0.2):
            seen, events = new_events(seen, look, SPLIT, request=3, raw=True)
            tokens = [event for event in events if event.kind == "token"]
            assert events[: len(tokens)] == tokens
            assert all(event.request == 3 for event in events)
            raw += tokens
        n = trace.prompt_length
        assert [e.token for e in raw] == trace.tokens.token[n:].tolist()
        assert [e.branch for e in raw] == trace.tokens.thread[n:].tolist()
        assert [(e.step, e.logprob) for e in raw] == list(
            zip(trace.step[n:].tolist(), trace.logprob[n:].tolist())
        )
        assert [e.parent for e in raw] == [trace.parent[e.branch] for e in raw]
        assert [e.text for e in raw] == [SPLIT.text([e.token]) for e in raw]


def test_a_running_row_has_the_beginning_of_its_trace(seed):
    """What `trace_of_row` makes of the compiled interpreter's states is what the other tests take for it."""
    limits = Limits(lanes=2, threads=4, pool=60, constrained=False)
    rng = np.random.default_rng(seed)
    lines = jnp.asarray(np.stack([random_script(rng).lines for _ in range(6)]))
    rules = interpreter.rules_for(scripted.VOCABULARY, limits, Positions())
    ask = scripted.request(50, 9)

    def run(lines: jax.Array) -> RowState:
        state = interpreter.begin(limits, limits.pool + limits.lanes, jnp.full(3, scripted.A), jnp.int32(3))
        lanes = interpreter.feed(state, ask, limits)

        def step(carry, _):
            state, lanes = carry
            thread = jnp.minimum(lanes.thread, limits.threads - 1)
            line = scripted.lines_of_table(state.threads, 8, limits.max_depth)
            said = lines[line[thread], (lanes.order + 1) % 80]
            running = state.stop == Stop.RUNNING
            after = interpreter.advance(state, ask, lanes, said, jnp.zeros(limits.lanes), rules)
            state = jax.tree.map(lambda a, b: jnp.where(running, a, b), after, state)
            lanes = interpreter.feed(state, ask, limits)
            return (interpreter.record(state, lanes), lanes), state

        return jax.lax.scan(step, (state, lanes), None, 51)[1]

    rows = jax.tree.map(np.asarray, jax.jit(jax.vmap(run))(lines))
    for i in range(len(lines)):
        states = [trace_of_row(jax.tree.map(lambda x, i=i, t=t: x[i, t], rows)) for t in range(51)]
        final = states[-1]
        assert final.stop != Stop.RUNNING
        seen, draft = Consumed(), Draft()
        for state in states:
            if state.stop == Stop.RUNNING:
                expected = at_step(final, state.steps)
                assert state.tokens.token.tolist() == expected.tokens.token.tolist()
                assert state.tokens.thread.tolist() == expected.tokens.thread.tolist()
            seen, _ = follow(seen, draft, state, scripted.VOCABULARY)
        assert str(draft) == text_of(final, scripted.VOCABULARY)


def test_promises_may_nest_deeper_than_python_does():
    """Every walk over threads: reading, document order, critical path, streaming, drafts, stop strings."""
    words, depth = WordTokenizer(), 2 * sys.getrecursionlimit()
    ids = words.vocabulary.tag_ids
    tag = [ids['<promise topic="'], *words.encode("x"), ids['" tokens='], *words.encode("1"), ids[" />"]]
    begin, end = ids["<async>"], ids["</async>"]
    head, tail = [begin, *words.encode("a"), *tag], [*words.encode("b"), end]
    inner = [begin, *words.encode("c"), end]
    lines = [tag, *[head] * (depth - 1), inner, *[tail] * (depth - 1), [words.vocabulary.eos]]
    threads = [*range(depth + 1), *reversed(range(depth))]
    starts = [0] * (depth + 1) + [len(head)] * (depth - 1) + [len(tag)]
    trace = of_main([token for line in lines for token in line], Stop.EOS)
    thread = np.repeat(np.array(threads, np.int32), [len(line) for line in lines])
    order = np.concatenate(
        [np.arange(start, start + len(line), dtype=np.int32) for start, line in zip(starts, lines)]
    )
    trace = dataclasses.replace(
        trace,
        tokens=dataclasses.replace(trace.tokens, thread=thread, order=order),
        parent=np.arange(-1, depth, dtype=np.int32),
        fork_order=np.array([-1, len(tag) - 1, *[len(head) - 1] * (depth - 1)], np.int32),
        force_closed=np.zeros(depth + 1, bool),
        finished=np.ones(depth + 1, bool),
    )
    text = "a" * (depth - 1) + "c" + "b" * (depth - 1)
    answer = results.result(words, trace)
    assert answer.text == text and answer.stats.text_tokens == len(text)
    assert answer.stats.critical_path == len(tag) + (depth - 1) * (1 + len(tag)) + 1  # no `</async>` is fed
    assert len(answer.branches) == depth == depth_of(trace.threads) and not answer.issues
    assert sorted(document_order(trace)) == [*range(len(thread))]
    short = results.result(words, trace, stop=["c"])
    assert short.text == text[: depth - 1] and len(short.branches) == depth - 1
    draft = Draft()
    seen, _ = follow(Consumed(), draft, at_step(trace, trace.steps - 2 * depth), words.vocabulary)
    assert str(draft) == "a" * (depth - 1) + "c" + "[x …]" * depth
    follow(seen, draft, trace, words.vocabulary)
    assert str(draft) == text


# ------------------------------------------------------------------------------------------------------ drafts


def test_a_draft_marks_what_is_to_come():
    draft = Draft()
    events = [
        Event("text", text="Facts: "),
        Event("promise", branch=1, parent=0, topic="rivers"),
        Event("promise", branch=2, parent=0),
        Event("text", text=" Done."),
        Event("text", branch=2, text="B"),
        Event("promise", branch=3, parent=2, topic="inner"),
        Event("closed", branch=1),
        Event("closed", branch=3),
        Event("closed", branch=2),
        Event("closed"),
        Event("done"),
    ]
    shown = []
    for event in events:
        draft.add(event)
        shown.append((str(draft), draft.settled))
    first = "Facts: "
    assert shown == [
        (first, first),
        (first + "[rivers …]", first),
        (first + "[rivers …][…]", first),
        (first + "[rivers …][…] Done.", first),
        (first + "[rivers …]B[…] Done.", first),
        (first + "[rivers …]B[inner …][…] Done.", first),
        (first + "B[inner …][…] Done.", first + "B"),
        (first + "B[…] Done.", first + "B"),
        *[(first + "B Done.", first + "B Done.")] * 3,
    ]
    assert repr(events[1]) == "Event('promise', branch=1, parent=0, topic='rivers')"
    with pytest.raises(ValueError, match="draft is of request 0, and the event of request 1"):
        draft.add(Event("text", request=1))


# ------------------------------------------------------------------------------------------------ stop strings


def first_stop(text: str, stops: tuple[str, ...]) -> int | None:
    """The specification: the text grows by one character at a time, until it ends with a stop string."""
    for n in range(1, len(text) + 1):
        ends = [stop for stop in stops if text[:n].endswith(stop)]
        if ends:
            return n - max(map(len, ends))
    return None


def random_stops(text: str, rng: random.Random) -> tuple[str, ...]:
    """Pieces of the text, so that they occur, in any place, over any boundary; and one that may not."""
    stops = []
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text))
        stops.append(text[at : at + rng.randint(1, 12)])
    return (*stops, rng.choice(["ab b", "zz", "3b a"]))


def said(result: results.DecodeResult) -> tuple:
    """All of a result but stats and trace."""
    return (
        result.text, result.annotated, result.tokens.tolist(), result.logprobs.tolist(), result.branches,
        result.stop_reason, result.issues, result.program,
    )  # fmt: skip


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_stop_strings_end_the_answer_whenever_one_looks(seed, vocabulary):
    """The cut is that of a plain search in the whole text, and nothing decoded after it changes the result."""
    rng = random.Random(seed)
    words = WordTokenizer()
    words.vocabulary = vocabulary
    stopped_early = boundaries = 0
    for trace in traces(seed):
        text = text_of(trace, vocabulary)
        if not text:
            continue
        stops = random_stops(text, rng)
        place = first_stop(text, stops)
        expected = results.result(words, trace, stop=stops)
        assert expected.text == text[:place]
        assert expected.stop_reason == ("stop" if place is not None else trace.stop.reason)
        for density in (0.0, 0.2, 1.0):
            seen, draft, shown = Consumed(), Draft(), ""
            for look in looks(trace, rng, density):
                seen, _ = follow(seen, draft, look, vocabulary, stops)
                assert draft.settled.startswith(shown), "what was shown stays"
                shown = draft.settled
                assert expected.text.startswith(shown), "never a piece of a stop string"
                if draft.stopped:
                    assert str(draft) == draft.settled == expected.text
                    ended = dataclasses.replace(look, stop=Stop.STOP if look is not trace else trace.stop)
                    assert said(results.result(words, ended, stop=stops)) == said(expected)
                    stopped_early += look is not trace
                    break
            assert draft.settled == str(draft) == expected.text
        boundaries += place is not None and across(trace, vocabulary, place, stops)
    assert stopped_early > 10 and boundaries > 2


def across(trace: Trace, vocabulary: Vocabulary, place: int, stops: tuple[str, ...]) -> bool:
    """Whether a stop string that begins here is written by two threads."""
    _, events = new_events(Consumed(), trace, vocabulary)
    owner = [event.branch for event in events for _ in event.text]
    text = "".join(event.text for event in events)
    length = min(len(stop) for stop in stops if text.startswith(stop, place))
    return len(set(owner[place : place + length])) > 1


def test_a_cut_answer_agrees_with_itself(seed):
    rng = random.Random(seed)
    words = WordTokenizer()
    words.vocabulary = SPLIT
    for trace in traces(seed):
        text = text_of(trace, SPLIT)
        n = rng.randint(0, len(text))
        kept = cut(trace, SPLIT, n)
        again = read(SPLIT, kept.threads)
        assert shortened(again.program, n) == shortened(read(SPLIT, trace.threads).program, n)
        order = document_order(trace)[trace.prompt_length :]
        tokens = kept.tokens.token[document_order(kept)][trace.prompt_length :].tolist()
        assert tokens == trace.tokens.token[order][: len(tokens)].tolist(), "the beginning of the document"
        assert assemble(again.program)[:n] == text[:n]
        if tokens and "\ufffd" not in text:  # one token less would not do, and may itself be a tag's
            last = trace.prompt_length + len(tokens) - 1
            less = shorter(kept, document_order(kept)[last])
            assert len(text_of(less, SPLIT).rstrip("\ufffd")) < n
    stop = text_of(trace, SPLIT)[:1]
    if stop:
        assert results.result(words, trace, stop=(stop,)).tokens.size == 0


def shorter(trace: Trace, place: int) -> Trace:
    fields = trace.tokens.fields().items()
    return dataclasses.replace(
        trace, tokens=ThreadedTokens(**{name: np.delete(array, place, axis=0) for name, array in fields})
    )


def test_which_stop_counts():
    assert find_stop("abcd", ["abcd", "bc"]) == 1
    assert find_stop("abcd", ["bc", "abc"]) == 0
    assert find_stop("aXbX", ["X"], searched=2) == 3
    assert find_stop("ab", ["abc"]) is None and find_stop("", ["a"]) is None
    assert held_back("xab", ["abc", "b!"]) == 2 and held_back("abc", ["abc"]) == 0
    assert held_back("ab", []) == 0 and held_back("a", ["ab", "aab"]) == 1
    assert check_stops(["a", "b"]) == ("a", "b")
    for wrong in ("text", [""], [3]):
        with pytest.raises(ValueError, match="give a list of texts to stop at"):
            check_stops(wrong)  # type: ignore[arg-type]
