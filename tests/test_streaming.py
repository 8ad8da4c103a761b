"""Streaming and stop strings, as pure functions of traces: what a consumer sees, whenever it looks."""

from __future__ import annotations

import dataclasses
import random
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasta_jax.arrays import ThreadedTokens
from pasta_jax.decoding import interpreter, results
from pasta_jax.decoding.script import depth_of
from pasta_jax.decoding.state import Limits, RowState, Stop
from pasta_jax.decoding.stops import check_stops, cut, find_stop, held_back
from pasta_jax.decoding.streaming import Consumed, Draft, Event, new_events, settled_text
from pasta_jax.decoding.trace import Trace, document_order, trace_of_row
from pasta_jax.lang.assemble import assemble, shortened
from pasta_jax.lang.parse import parse
from pasta_jax.testing import WordTokenizer
from pasta_jax.tokens.detokenize import read
from pasta_jax.tokens.positions import Positions
from pasta_jax.tokens.tokenizer import Vocabulary
from tests.helpers import scripted
from tests.helpers.scripted import random_script
from tests.helpers.traces import SPLIT, VOCABULARIES, at_step, looks, of_main, traces

CUT = "branch {}: stopped before its </async>."


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


LETTERS = set('0123456789ab "')
"""What the scripted vocabulary spells besides tags."""


def test_no_reader_sees_a_piece_of_a_tag(seed):
    """Under the grammar, wherever an answer is cut off and whoever looked at it before; nor does a stop string."""
    rng = random.Random(seed)
    words = WordTokenizer()
    words.vocabulary = scripted.VOCABULARY
    left_out = 0
    for trace in traces(seed, constrained=True):
        for step in rng.sample(range(trace.steps + 1), min(12, trace.steps + 1)):
            short = at_step(trace, step, rng.choice((Stop.LENGTH, Stop.CACHE_FULL, Stop.CANCELLED)))
            answer = results.result(words, short)
            assert set(answer.text) <= LETTERS and all(set(b.text) <= LETTERS for b in answer.branches)
            assert parse(answer.annotated) == answer.program and assemble(answer.program) == answer.text
            faults = [issue for issue in answer.issues if "tag" in issue]
            assert all("incomplete tag '<promise" in fault and "left out" in fault for fault in faults)
            left_out += len(faults)
            seen, draft, shown = Consumed(), Draft(), ""
            for look in (at_step(trace, rng.randint(0, step)), short):
                seen, _ = follow(seen, draft, look, scripted.VOCABULARY)
                assert set(str(draft)) <= LETTERS | set("[…]")
                assert draft.settled.startswith(shown)
                shown = draft.settled
            assert str(draft) == draft.settled == answer.text
            stopped = results.result(words, short, stop=["<", "topic", "=", "o"])
            assert said(stopped) == said(answer)
    assert left_out > 20


def test_a_tag_within_which_its_thread_ends_is_left_out():
    """Without the grammar too, whatever ended the thread. Pieces that another token broke are text there."""
    words = WordTokenizer()
    ids = words.vocabulary.tag_ids
    opening, number = [ids['<promise topic="'], *words.encode("x")], [ids['" tokens='], *words.encode("1")]
    for tag in (opening[:1], opening, opening + number[:1], opening + number):
        said = [*words.encode("東y"), *tag]
        missing = f"main: incomplete tag {words.vocabulary.text(tag)!r} left out."
        for trace in (of_main(said, Stop.LENGTH), of_main(said, Stop.EOS, words.vocabulary.eos)):
            answer = results.result(words, trace)
            assert (answer.text, answer.annotated, answer.issues) == ("東y", "東y", (missing,))
            assert answer.stats.text_tokens == 4 and answer.tokens.tolist() == trace.tokens.token.tolist()
            for stop in ("y<", "promise", "x", "="):
                assert results.result(words, trace, stop=[stop]).stop_reason == trace.stop.reason
        broken = results.result(words, of_main([*said, ids["<sync/>"], *words.encode("z")], Stop.LENGTH))
        assert broken.text == words.vocabulary.text(said) + "z"
        assert broken.issues == (missing.replace("left out", "kept as text"),)


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
        again = read(SPLIT, kept.threads, shortened=n < len(text))
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
    with pytest.raises(ValueError, match=r"^stop=.*: The text holds half a character"):
        check_stops(["cut \ud83d"])
