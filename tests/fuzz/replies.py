"""What an endpoint returns: any reply, as HTTP, as JSON, as an annotated text, as a verdict."""

from __future__ import annotations

import json
import random
from typing import Any

import requests

from pasta_jax.annotate.insertion import NotInserted, inserted
from pasta_jax.annotate.llm import FAILED_RULES, _read_verdicts, _useful
from pasta_jax.endpoint.post import AskAgain, EndpointError, Key, RequestError, post
from pasta_jax.judges.llm import _by_logprobs, _by_text
from pasta_jax.lang.assemble import text_of
from tests.fuzz import hostile
from tests.fuzz.runner import Target, outcome

KEY = "sk-fuzz-0123456789"
COMPLETION = {
    "choices": [
        {
            "message": {"role": "assistant", "content": f"Bearer {KEY}"},
            "finish_reason": "stop",
            "logprobs": {"content": [{"token": "A", "top_logprobs": [{"token": "A", "logprob": -0.1}]}]},
        }
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 4},
    "error": {"message": f"what is {KEY}", "code": "no"},
}
NAMES = ("choices", "message", "content", "logprobs", "usage", "error", "code", "top_logprobs")
TAGS = (
    '<async topic="x">',
    "</async>",
    "<sync/>",
    "<async topic='a b'>",
    "< sync >",
    "<async>",
    "1 true: a\n",
    " ",
)


def draw(rng: random.Random) -> Any:
    return {
        "answer": hostile.text(rng, large=False),
        "tags": [[rng.random(), rng.choice(TAGS)] for _ in range(rng.randrange(8))],
        "edits": hostile.edits(rng, COMPLETION, NAMES, rng.randrange(3)),
        "status": rng.choice((200, 200, 200, 400, 401, 404, 429, 500, 503, 307, 999)),
        "after": rng.choice(
            ("", "1", "-1", "nan", "1e400", "Thu, 01 Jan 1970 00:00:00 GMT", "99999999999999")
        ),
    }


class Session(requests.Session):
    """Gives the same answer to every request."""

    def __init__(self, answer: requests.Response):
        super().__init__()
        self.answer = answer

    def post(self, url: Any, *args: Any, **options: Any) -> requests.Response:
        return self.answer


def check(case: Any) -> None:
    answer = hostile.expand(case["answer"])
    reply = answer
    for place, tag in case["tags"]:
        at = int(place * len(reply))
        reply = reply[:at] + tag + reply[at:]
    nodes, error = outcome(NotInserted, inserted, reply, answer)
    if not error:
        assert text_of(nodes) == text_of(_useful(nodes)) == answer
    assert set(_read_verdicts(reply).values()) <= {0, *FAILED_RULES}
    assert _by_text(reply) is None or 0 <= _by_text(reply) <= 1  # type: ignore[operator]
    check_post(case)


def check_post(case: Any) -> None:
    answer = requests.Response()
    answer.status_code = case["status"]
    answer.headers["Retry-After"] = case["after"]
    answer._content = json.dumps(hostile.expand(hostile.edited(COMPLETION, case["edits"]))).encode()
    refused = (AskAgain, RequestError, EndpointError)
    reply, error = outcome(refused, post, Session(answer), "http://host/v1", {}, Key(KEY, "KEY"), 1.0)
    assert KEY not in repr(reply) and KEY not in str(error)
    assert not isinstance(error, AskAgain) or error.after is None or error.after >= 0
    if reply is not None:
        chance = _by_logprobs(reply)
        assert chance is None or 0 <= chance <= 1


TARGET = Target(draw, check, cases=150)
