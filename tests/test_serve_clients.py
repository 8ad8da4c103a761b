"""Clients of Python, on a server in this process. Skipped where openai is not installed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("openai")

import openai

from tests.helpers.served import MODEL, Served, alone, asked, served

pytestmark = pytest.mark.slow

SAID: Any = [{"role": "user", "content": "rivers"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(keys=("key",)) as running:
        yield running


@pytest.fixture
def client(server: Served) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0)


def fields(number: int) -> dict[str, Any]:
    """What OpenAI's client takes by name, and what it passes on."""
    given = asked(number)
    return dict(temperature=given["temperature"], extra_body={"open_bias": given["open_bias"]})


def test_chat_whole_and_streamed(client: Any) -> None:
    expected = alone("rivers", asked(3))
    options = fields(3) | {"model": MODEL, "messages": SAID, "max_completion_tokens": 60, "seed": 3}
    reply = client.chat.completions.create(**options, logprobs=True)
    assert reply.choices[0].message.content == expected.text
    assert reply.usage.completion_tokens == expected.stats.output_tokens
    spelled = bytes(byte for token in reply.choices[0].logprobs.content for byte in token.bytes)
    assert spelled.decode(errors="replace") == expected.text
    body = options["extra_body"] | {"stream_options": {"include_usage": True, "include_branches": True}}
    text, branches, prompt_tokens = "", set[int](), 0
    for chunk in client.chat.completions.create(**options | {"extra_body": body}, stream=True):
        prompt_tokens = chunk.usage.prompt_tokens if chunk.usage else 0
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
            branches |= {each["branch"] for each in getattr(chunk, "pasta", []) if "branch" in each}
    assert text == expected.text and prompt_tokens == expected.stats.prompt_tokens
    assert branches == {0, *(branch.id for branch in expected.branches)}
    with client.chat.completions.stream(**options) as stream:
        assert stream.get_final_completion().choices[0].message.content == expected.text
    assert [model.id for model in client.models.list()] == [MODEL]


def test_completions(client: Any) -> None:
    reply = client.completions.create(
        **fields(4), model=MODEL, prompt=["rivers", "world"], max_tokens=60, seed=4, n=2
    )
    assert [choice.text for choice in reply.choices] == [
        alone(prompt, asked(4 + i)).text for prompt in ("rivers", "world") for i in range(2)
    ]


def test_responses_accumulate_branches_in_document_order(client: Any) -> None:
    interleaved = 0
    for number in range(12):
        expected = alone("rivers", asked(number))
        options = fields(number) | {"model": MODEL, "input": "rivers", "max_output_tokens": 60}
        options["extra_body"] |= {"seed": number, "stream_options": {"include_branches": number % 2 == 0}}
        reply = client.responses.create(**options)
        assert reply.output_text == expected.text
        with client.responses.stream(**options) as stream:
            text, order = dict[tuple[int, int], str](), list[int]()
            for event in stream:
                if event.type == "response.output_text.delta":
                    place = event.output_index, event.content_index
                    text[place] = text.get(place, "") + event.delta
                    assert event.snapshot == text[place]
                    order.append(event.output_index)
            assert "".join(text[place] for place in sorted(text)) == expected.text
            interleaved += order != sorted(order)
            assert order == sorted(order) or number % 2 == 0, "as they are written, only if asked for"
            if expected.stop_reason == "eos":
                final = stream.get_final_response()
                assert final.output_text == expected.text and len(final.output) > len(expected.branches)
    assert interleaved, "in no answer did branches write side by side"


def test_errors(client: Any, server: Served) -> None:
    ask = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="This server has 'chatty'"):
        ask(model="gpt", messages=SAID)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(model=MODEL, messages=[{"role": "user", "content": "the " * 500}])
    assert caught.value.code == "context_length_exceeded" and caught.value.request_id.startswith("req_")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(model=MODEL, messages=SAID, tools=[{"type": "function", "function": {"name": "f"}}])
    assert caught.value.param == "tools"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="other").models.list()


def test_a_stream_that_is_closed_is_cancelled(client: Any, server: Served) -> None:
    load, session = server.service.decoder.load, server.service.decoder.session
    options = fields(5) | {"model": MODEL, "messages": SAID, "max_completion_tokens": 100}
    stream = client.chat.completions.create(**options, stream=True)
    next(iter(stream))
    stream.close()

    async def leave() -> None:
        other = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(other.chat.completions.create(**options), 0.01)

    asyncio.run(leave())
    until = time.monotonic() + 10
    while not session.idle and time.monotonic() < until:
        time.sleep(0.01)
    assert session.idle and server.service.decoder.load.submitted > load.submitted


def test_langchain(server: Served) -> None:
    chat = pytest.importorskip("langchain_openai").ChatOpenAI
    given = asked(3)
    for responses in (False, True):
        model = chat(
            base_url=f"{server.url}/v1", api_key="key", model=MODEL, temperature=given["temperature"],
            max_tokens=60, extra_body={"open_bias": given["open_bias"], "seed": 3}, use_responses_api=responses,
        )  # fmt: skip
        expected = alone("rivers", given).text
        assert model.invoke("rivers").text == expected
        assert "".join(chunk.text for chunk in model.stream("rivers")) == expected
