"""Options of decoding and loading: any value is a result, or an error that names the option."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pasta_jax
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.state import Limits
from tests.fuzz import hostile
from tests.fuzz.runner import Target, outcome
from tests.helpers.answers import PROMPT, model

SAMPLING: dict[str, tuple[Any, ...]] = {
    "max_new_tokens": (1, 7, 40, True, 2**31, 2**31 - 1),
    "max_branch_tokens": (1, 20, 2**31 - 1, 0),
    "temperature": (0.0, 0.7, 1, 1e-30, 1e30),
    "top_k": (0, 5, 1, 10**6, 2**31),
    "top_p": (1.0, 0.9, 1e-30, 0.0),
    "min_p": (0.0, 0.05, 1.0, 1e-30),
    "seed": (0, 3, 2**31, 2**32, 2**32 + 3, 2**64, -1),
    "open_bias": (0.0, 3.5, 1e30, -1e30),
    "stop": ("e", ["e", "the"], [], [""], ["\ud83d"], ("e",), {"$repeat": ["e", 5_000]}, [["e"]], "\x00"),
}
DECODE = SAMPLING | {
    "mode": ("parallel", "sequential", "both", "PARALLEL"),
    "max_branches": (15, 2**31 - 1, 10**6, 10**30),
    "lanes": (8, 2**31, 10**30),
    "grammar": (True,),
    "cache_len": (None, 128, 2**31, 2**40),
    "batch_invariant": (False,),
    "stream": (False, True),
    "stream_tokens": (True, False),
    "prompt": ("rivers", {"$repeat": ["rivers ", 200_000]}, "", " ", [], [""], [[]], "\ud83d"),
    "nonsense": (1,),
}
LIMITS = dict.fromkeys(("lanes", "threads", "pool", "max_depth"), (1, 8, 2**31, 10**30, 0)) | {
    "constrained": (False,)
}
LOAD: dict[str, tuple[Any, ...]] = {
    "dtype": ("float32", "bfloat16", "float16", "int8"),
    "quantize": ("int8", "int4"),
    "base": ("nowhere",),
    "tokenizer": ("nowhere",),
    "chat": ("auto", "plain", "nonsense"),
    "extend_tokenizer": (True,),
}
SETS = {
    "decode": DECODE,
    "sampling": SAMPLING,
    "limits": LIMITS,
    "load": LOAD,
    "submit": {"prompt": ()},
}
"""What is called; its options, and values that are often right."""

SIZES = ("lanes", "max_branches", "cache_len", "batch_invariant", "grammar", "max_new_tokens", "prompt")
"""Options that compile programs of their own: no value of them but those above and what no program can have."""


PROMPT_WORDS = ("text", "ids", "conversation")
"""A prompt is one of these."""


def draw(rng: random.Random) -> Any:
    call = rng.choice(("decode", "decode", *SETS))
    known, given = SETS[call], dict[str, Any]()
    for name in rng.sample(sorted(known), min(len(known), rng.choice((1, 1, 2, 3)))):
        value = rng.choice(known[name]) if known[name] and rng.random() < 0.5 else hostile.odd(rng)
        if call == "decode" and name in SIZES and value not in known[name]:
            value = (
                -value if type(value) is int else str(value)[:25] if isinstance(value, str | list) else value
            )
        given[name] = value
    return {"call": call, "options": given}


def check(case: Any) -> None:
    given = {name: hostile.expand(value) for name, value in case["options"].items()}
    _, error = outcome((ValueError, TypeError), CALLS[case["call"]], given)
    if error and not (case["call"] == "load" and "no such directory" in str(error)):  # of the model
        named = {*given, *(PROMPT_WORDS if "prompt" in given else ())} & {*re.findall(r"\w+", str(error))}
        assert named, f"it names none of {', '.join(given)}: {error}"


def decode(given: dict[str, Any]) -> None:
    options = dict(max_new_tokens=8, temperature=1.0) | given
    prompt = options.pop("prompt", PROMPT)
    stream = options.get("stream")
    if callable(stream):  # what it does with an event is the caller's own affair
        options["stream"] = lambda event: None
    elif stream is not None and not isinstance(stream, bool):
        options["stream"] = bool(stream)
    answer = pasta_jax.decode(model(), prompt, **options)
    answers = (
        list(answer) if options.get("stream") is True else answer if isinstance(answer, list) else [answer]
    )
    assert all(isinstance(each, pasta_jax.Event | pasta_jax.DecodeResult) for each in answers)


def sampling(given: dict[str, Any]) -> None:
    asked = SamplingParams(**given)
    request = asked.request()
    for name in ("max_new_tokens", "max_branch_tokens"):
        assert int(getattr(request, name)) == getattr(asked, name)
    if asked.seed:
        assert request.key.tolist() != SamplingParams(seed=asked.seed % 2**32).request().key.tolist() or (
            0 <= asked.seed < 2**32
        ), "two seeds are one"


def limits(given: dict[str, Any]) -> None:
    made = Limits(**given)
    assert all(type(getattr(made, name)) is int for name in ("lanes", "threads", "pool", "max_depth"))


def submit(given: dict[str, Any]) -> None:
    from pasta_jax.decoding.api import decoder_for

    answer = decoder_for(model(), Limits(pool=128), 1).submit(
        given["prompt"], SamplingParams(max_new_tokens=1)
    )
    answer.cancel()


def load(given: dict[str, Any]) -> None:
    pasta_jax.load("/nowhere", **given)


CALLS: dict[str, Callable[[dict[str, Any]], None]] = {
    "decode": decode, "sampling": sampling, "limits": limits, "load": load, "submit": submit,
}  # fmt: skip

TARGET = Target(draw, check, seconds=60.0, cases=60)
