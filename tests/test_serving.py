"""A decoder that serves: whoever waits or follows has the text that the request has alone, and nothing is lost."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from pasta_jax import (
    Closed,
    Decoder,
    DecodeResult,
    Event,
    PendingAnswer,
    QueueFull,
    SamplingParams,
    settled_text,
)
from pasta_jax.decoding.compiled import Compiled
from pasta_jax.decoding.results import result
from tests.helpers.chatty import PROMPTS, WORDS, chatty_model, decoder, ids

pytestmark = pytest.mark.slow


def a_decoder(queue: int | None = None) -> Decoder:
    """Another queue over the programs that other tests use."""
    return Decoder(chatty_model(), compiled=decoder().compiled, chunk=16, queue=queue)


def ask(number: int, **changes: Any) -> tuple[str, SamplingParams]:
    options: Any = dict(max_new_tokens=60, temperature=1.0, seed=number, open_bias=3.5)
    return f"{PROMPTS[number % len(PROMPTS)]} {number}", SamplingParams(**options | changes)


def alone(number: int, **changes: Any) -> DecodeResult:
    prompt, sampling = ask(number, **changes)
    (trace,), _ = decoder(rows=1).decode([ids(prompt)], [sampling])
    return result(WORDS, trace, stop=sampling.stop)


def in_threads(work: Callable[[int], object], count: int) -> None:
    """`work(i)` in a thread of its own for each i; errors of it are errors here."""
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors
    assert not any(thread.is_alive() for thread in threads), "somebody waits for ever"


def joined(events: list[Event]) -> str:
    """The text of a whole stream, which ends with the same text as result."""
    text = "".join(settled_text(events))
    assert [event.kind for event in events].count("done") == 1 and events[-1].kind == "done"
    assert events[-1].result is not None and events[-1].result.text == text
    return text


def test_many_clients_of_every_kind() -> None:
    texts: dict[int, str] = {}

    def client(i: int) -> None:
        answer = server.submit(*ask(i), tokens=i % 2 == 0)
        match i % 6:
            case 0:
                texts[i] = answer.result(timeout=60).text
            case 1:
                texts[i] = joined([*answer.events()])
            case 2:  # slow, and a second consumer that comes when all is done
                slow = []
                for event in answer.events():
                    slow.append(event)
                    time.sleep(0.005)
                texts[i] = joined(slow)
                later = [*answer.events()]
                assert joined(later) == texts[i]
                assert sum(event.kind == "token" for event in later) == len(answer.result().tokens)
            case 3:  # vanishes
                next(iter(answer.events()))
                answer.cancel()
                texts[i] = alone(i).text
            case 4:
                heard, done = list[Event](), threading.Event()

                def hear(event: Event) -> None:
                    heard.append(event)
                    if event.kind == "done":
                        done.set()
                    raise RuntimeError("the consumer broke")

                answer.on_event(hear)
                assert done.wait(60)
                texts[i] = joined(heard)
            case 5:
                texts[i] = asyncio.run(follow(answer))

    with a_decoder().serving() as server:
        in_threads(client, 24)
        assert server.session.idle and server.load.submitted == 24
    assert texts == {i: alone(i).text for i in range(24)}


async def follow(answer: PendingAnswer) -> str:
    """Two consumers, one that leaves early, and somebody else on the event loop who is never held up."""
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            beats += 1
            await asyncio.sleep(0)

    async def leave_early() -> None:
        async for _ in answer:
            break

    heart = asyncio.create_task(beat())
    early = asyncio.create_task(leave_early())
    text = joined([event async for event in answer])
    assert (await answer).text == text and beats > 3
    await early
    heart.cancel()
    return text


def test_one_event_loop_without_and_with_a_serving_thread() -> None:
    """An answer can be awaited either way."""

    async def main(server: Decoder) -> list[str]:
        answers = [server.submit(*ask(i)) for i in range(6)]
        followed = await asyncio.gather(*map(follow, answers[:3]))
        return followed + [(await answer).text for answer in answers[3:]]

    expected = [alone(i).text for i in range(6)]
    assert asyncio.run(main(a_decoder())) == expected
    with a_decoder().serving() as server:
        assert asyncio.run(main(server)) == expected


def test_a_conversation_is_a_prompt() -> None:
    one = SamplingParams(max_new_tokens=3)
    by_ids = decoder().submit(WORDS.encode_chat([{"role": "user", "content": "rivers"}]), one)
    by_words = decoder().submit([{"role": "user", "content": "rivers"}], one)
    assert by_words.prompt == by_ids.prompt and by_words.result().text == by_ids.result().text


def test_the_queue_is_bounded() -> None:
    server = a_decoder(queue=2)
    rows = server.load.rows
    answers = [server.submit(*ask(i)) for i in range(rows + 2)]
    with pytest.raises(QueueFull, match=r"^2 requests wait already\. Try again later, or raise queue=2\.$"):
        server.submit(*ask(0))
    answers.append(server.submit(*ask(rows + 2), wait=True))  # works until there is room
    with server.serving():
        in_threads(lambda i: answers.append(server.submit(*ask(i), wait=True)), 12)
        with pytest.raises(RuntimeError, match="serving already"):
            server.session.serve()
    assert len(answers) == rows + 15 and all(answer.done for answer in answers)
    assert [answer.result().text for answer in answers[: rows + 3]] == [
        alone(i).text for i in range(rows + 3)
    ]


def test_closing_loses_nothing() -> None:
    server = a_decoder()
    with server.serving():
        answers = [server.submit(*ask(i)) for i in range(20)]
        assert server.load.serving and server.load.running + server.load.waiting <= 20
    assert not server.load.serving and server.session.idle
    with pytest.raises(Closed, match="takes requests again while it is serving"):
        server.submit(*ask(0))
    assert [answer.result(timeout=0).text for answer in answers] == [alone(i).text for i in range(20)]

    long = list[PendingAnswer]()

    def breaks_off() -> None:
        with server.serving():
            long.extend(server.submit(*ask(i, max_new_tokens=100)) for i in range(20))
            next(iter(long[0].events()))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks_off()
    assert all(answer.done for answer in long) and server.session.idle
    assert {answer.result().stop_reason for answer in long} >= {"cancelled"}
    assert len(long[0].result().tokens), "what there was is kept"

    waits = a_decoder()
    answers = [waits.submit(*ask(i)) for i in range(9)]
    waits.close()  # without a thread it works itself
    assert [answer.result().text for answer in answers] == [alone(i).text for i in range(9)]


def test_a_timeout_ends_only_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on, decode_chunk = threading.Event(), Compiled.decode_chunk

    def slow(self: Compiled, *args: Any) -> Any:
        may_go_on.wait(60)
        return decode_chunk(self, *args)

    monkeypatch.setattr(Compiled, "decode_chunk", slow)
    with a_decoder().serving() as server:
        answer = server.submit(*ask(1))
        with pytest.raises(TimeoutError, match=r"not there after 0\.01 s; its request goes on"):
            answer.result(timeout=0.01)
        may_go_on.set()
        assert answer.result(timeout=60).text == alone(1).text


@pytest.mark.parametrize("verb", ["admit", "decode_chunk", "read"])
def test_an_error_ends_only_the_request_that_it_comes_back_for(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = getattr(Compiled, verb)
    with a_decoder().serving() as server:

        def breaks(self: Compiled, *args: Any) -> Any:
            rows = server.session._rows
            if bad in rows or len(calls) < 1:  # once for all, and always for one of them
                calls.append(verb)
                raise MemoryError("no memory")
            return done(self, *args)

        calls: list[str] = []
        bad = server.session.prepare(ids("rivers"), SamplingParams())
        monkeypatch.setattr(Compiled, verb, breaks)
        answers = [server.submit(*ask(i)) for i in range(3)]
        server.session.submit(bad, wait=False)
        answers += [server.submit(*ask(i)) for i in range(3, 8)]
        heard = list[Event]()
        bad.on_event(heard.append)
        for wait in (bad.result, lambda: [*bad.events()], lambda: asyncio.run(awaited(bad))):
            with pytest.raises(MemoryError, match="no memory"):
                wait()
        assert heard[-1].kind == "done" and heard[-1].result is None
        assert [answer.result(timeout=60).text for answer in answers] == [alone(i).text for i in range(8)]
        assert server.load.failed == 1 and len(calls) <= 4


async def awaited(answer: PendingAnswer) -> DecodeResult:
    return await answer


def test_a_follower_that_waits_holds_up_nobody() -> None:
    """Also if it was told of past events in the thread that named it, and there is more to tell meanwhile."""
    heard, begun = list[Event](), threading.Event()

    def hear(event: Event) -> None:
        if not heard:
            begun.set()
            others.append(server.submit(*ask(2)).result(timeout=60).text)
        heard.append(event)

    others = list[str]()
    with a_decoder().serving() as server:
        answer = server.submit(*ask(1))
        next(iter(answer.events()))  # there is an event that is past
        answer.on_event(hear)
        texts = [server.submit(*ask(i)).result(timeout=60).text for i in (3, 4)]
        assert begun.is_set()
        answer.result(timeout=60)
    assert joined(heard) == alone(1).text and heard[-1].kind == "done"
    assert [*texts, *others] == [alone(i).text for i in (3, 4, 2)]


@pytest.mark.filterwarnings("ignore:Exception in thread")
def test_whoever_waits_works_if_the_serving_thread_ends() -> None:
    """Also on an event loop, where nobody looks again by himself."""

    def leave(event: Event) -> None:
        if threading.current_thread().name == "pasta_jax decoder":
            raise SystemExit

    async def main(server: Decoder) -> list[str]:
        answers = [server.submit(*ask(i)) for i in range(3)]
        waits = [asyncio.create_task(awaited(answer)) for answer in answers[1:]]
        await asyncio.sleep(0)  # they wait for the thread
        answers[0].on_event(leave)
        await asyncio.wait_for(asyncio.gather(*waits), 60)
        return [answers[0].result().text, *(task.result().text for task in waits)]

    with a_decoder().serving() as server:
        assert asyncio.run(main(server)) == [alone(i).text for i in range(3)]
        assert not server.load.serving


def test_a_follower_may_use_the_decoder() -> None:
    """It may submit, wait for another answer, and close, though its thread is the one that decodes."""
    texts, closed = list[str](), threading.Event()

    def hear(event: Event) -> None:
        if event.kind == "done":
            assert event.result is not None
            texts.append(event.result.text)
            texts.append(server.submit(*ask(2)).result().text)
            server.close()
            closed.set()

    with a_decoder().serving() as server:
        server.submit(*ask(1)).on_event(hear)
        assert closed.wait(60)
    assert texts == [alone(1).text, alone(2).text]
