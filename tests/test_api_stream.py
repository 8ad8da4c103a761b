"""`pasta_jax.decode` with `stream` and `stop`: the same answers, as they come and as they end."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest

import pasta_jax
from pasta_jax import Draft, Event, settled_text
from pasta_jax.decoding.api import decoder_for
from pasta_jax.decoding.state import Limits
from tests.helpers.answers import OTHER, PROMPT, SEEDS, model, options, results, what_was_said

pytestmark = pytest.mark.slow


def events_of(prompt: Any = PROMPT, **changes: Any) -> list[Event]:
    return list(pasta_jax.decode(model(), prompt, stream=True, **options(**changes)))


def test_a_stream_gives_what_decode_returns() -> None:
    for seed, expected in zip(SEEDS, results(), strict=True):
        draft, shown = Draft(), [""]
        for event in events_of(seed=seed):
            draft.add(event)
            shown.append(draft.settled)
        assert event.kind == "done" and event.result is not None
        assert what_was_said(event.result) == what_was_said(expected)
        assert str(draft) == draft.settled == expected.text
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))
    assert len(set(shown)) > 2, "it came in one piece"


def test_several_prompts_and_a_callback() -> None:
    prompts = [PROMPT, OTHER, PROMPT]
    heard: list[Event] = []
    streamed = pasta_jax.decode(model(), prompts, stream=heard.append, stream_tokens=True, **options())
    plain = pasta_jax.decode(model(), prompts, **options())
    assert [what_was_said(a) for a in streamed] == [what_was_said(a) for a in plain]
    for i, answer in enumerate(plain):
        own = [event for event in heard if event.request == i]
        assert "".join(settled_text(own)) == answer.text
        tokens = [event.token for event in own if event.kind == "token"]
        assert sorted(tokens) == sorted(answer.tokens.tolist())
        assert own[-1].kind == "done" and own[-1].result is streamed[i]
    draft = Draft()
    alone = pasta_jax.decode(model(), OTHER, stream=draft.add, **options())
    assert str(draft) == alone.text
    on: Any
    for on in (True, np.True_):
        assert next(pasta_jax.decode(model(), [], stream=on), None) is None
    assert pasta_jax.decode(model(), [], stream=draft.add) == []


def test_stop_strings(seed: int) -> None:
    rng = random.Random(seed)
    stopped = 0
    for number, whole in zip(SEEDS, results(), strict=True):
        if not whole.text:
            continue
        start = rng.randrange(len(whole.text))
        stop = whole.text[start : start + rng.randint(1, 4)]
        expected = whole.text[: whole.text.find(stop)]
        answer = pasta_jax.decode(model(), PROMPT, stop=stop, **options(seed=number))
        assert (answer.text, answer.stop_reason) == (expected, "stop")
        assert pasta_jax.parse(answer.annotated) == answer.program
        assert answer.stats.decode_steps <= whole.stats.decode_steps
        stopped += answer.stats.decode_steps < whole.stats.decode_steps
        streamed = events_of(seed=number, stop=[stop, "\ufffd never"])
        assert streamed[-1].result is not None
        assert what_was_said(streamed[-1].result) == what_was_said(answer)
        assert "".join(settled_text(streamed)) == expected
        never = pasta_jax.decode(model(), PROMPT, stop="never said", **options(seed=number))
        assert what_was_said(never) == what_was_said(whole)
    assert stopped, "no row was stopped before it would have ended"


def test_a_consumer_that_goes_away_leaves_nothing_behind() -> None:
    expected = what_was_said(results()[1])
    stream = pasta_jax.decode(model(), PROMPT, stream=True, **options(seed=SEEDS[0]))
    next(stream)
    stream.close()
    assert list(stream) == []
    never_started = pasta_jax.decode(model(), PROMPT, stream=True, **options(seed=SEEDS[0]))
    del never_started
    assert what_was_said(pasta_jax.decode(model(), PROMPT, **options(seed=SEEDS[1]))) == expected

    def fails(event: Event) -> None:
        raise RuntimeError("the consumer broke")

    with pytest.raises(RuntimeError, match="the consumer broke"):
        pasta_jax.decode(model(), PROMPT, stream=fails, **options(seed=SEEDS[0]))
    assert what_was_said(pasta_jax.decode(model(), PROMPT, **options(seed=SEEDS[1]))) == expected
    longest = max(range(len(SEEDS)), key=lambda i: results()[i].stats.decode_steps)
    stream = pasta_jax.decode(model(), PROMPT, stream=True, **options(seed=SEEDS[longest]))
    next(stream)  # of an answer that takes more than one chunk
    session = decoder_for(model(), Limits(pool=128), 1).session
    assert not session.idle
    stream.close()
    assert session.idle


def test_streams_side_by_side() -> None:
    """On one decoder, whose only row they wait for in turn; one of them is slow, one goes away."""
    texts = []
    streams = [
        pasta_jax.decode(model(), PROMPT, stream=True, **options(seed=seed))
        for seed in (*SEEDS[:2], *SEEDS[:2])
    ]
    slow, away = streams[0], streams[3]
    heard = [next(slow)]
    next(away)
    away.close()
    for stream in streams[1:3]:
        texts.append("".join(settled_text(stream)))
    texts.append("".join(settled_text([*heard, *slow])))
    first, second = (result.text for result in results()[:2])
    assert texts == [second, first, first]


def test_mistakes_in_words() -> None:
    with pytest.raises(ValueError, match='mode="both" decodes each prompt several times'):
        pasta_jax.decode(model(), PROMPT, stream=True, mode="both")
    for wrong in ("", [""]):
        with pytest.raises(ValueError, match="give a list of texts to stop at, none of them empty"):
            pasta_jax.decode(model(), PROMPT, stop=wrong)
    with pytest.raises(ValueError, match="The prompt has"):  # at once, not when the first event is asked for
        pasta_jax.decode(model(), "x" * 50, cache_len=16, stream=True)
