"""Bodies of requests to the server: whatever they hold, they ask for something, or are refused in words."""

from __future__ import annotations

import json
import random
from typing import Any

from pasta_jax.decoding.request import SamplingParams
from pasta_jax.serve.asked import Defaults, asked_of_chat, asked_of_completions, asked_of_responses, parsed
from pasta_jax.serve.errors import ApiError
from pasta_jax.tokens.tokenizer import TokenizerError
from tests.fuzz import hostile
from tests.fuzz.runner import Target, outcome
from tests.helpers.answers import WORDS

SAMPLING = {
    "model": "m",
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 3,
    "n": 2,
    "stop": ["\n"],
    "stream": True,
    "stream_options": {"include_usage": True, "include_branches": False},
    "mode": "parallel",
    "open_bias": 0.5,
    "max_branch_tokens": 9,
}
SAID = [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]
BODIES = {
    "chat": SAMPLING | {"messages": SAID, "max_completion_tokens": 7, "logprobs": True},
    "completions": SAMPLING | {"prompt": ["a", [1, 2]], "max_tokens": 7, "logprobs": 0},
    "responses": {
        **SAMPLING,
        "n": None,
        "stop": None,
        "input": SAID,
        "instructions": "c",
        "max_output_tokens": 7,
    },
}
READ = {"chat": asked_of_chat, "completions": asked_of_completions, "responses": asked_of_responses}
NAMES = (
    "tools",
    "response_format",
    "text",
    "echo",
    "best_of",
    "logit_bias",
    "messages",
    "prompt",
    "input",
    "stop",
)


def draw(rng: random.Random) -> Any:
    kind = rng.choice([*BODIES])
    return {
        "kind": kind,
        "edits": hostile.edits(rng, BODIES[kind], NAMES, rng.choice((1, 1, 2, 4))),
        "damage": hostile.damage(rng) if rng.random() < 0.2 else None,
    }


def check(case: Any) -> None:
    body = json.dumps(hostile.expand(hostile.edited(BODIES[case["kind"]], case["edits"]))).encode()
    if case["damage"]:
        body = hostile.damaged(body, case["damage"]) or b""
    asked, error = outcome(ApiError, lambda: READ[case["kind"]](parsed(body), Defaults("m")))
    if isinstance(error, ApiError):
        assert error.status in (400, 404) and json.dumps(error.body)
        return
    assert 1 <= asked.n == len({sampling.seed for sampling in asked.samplings})
    assert all(isinstance(sampling, SamplingParams) for sampling in asked.samplings)
    for prompt in asked.prompts:
        if isinstance(prompt, str):
            outcome(ValueError, WORDS.encode_prompt, prompt)
        elif isinstance(prompt[0], dict):
            outcome((ValueError, TokenizerError), WORDS.encode_chat, prompt)
        else:
            assert all(type(token) is int for token in prompt)


TARGET = Target(draw, check, cases=150)
