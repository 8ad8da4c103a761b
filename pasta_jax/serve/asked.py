"""What a request asks for: bodies of three endpoints of OpenAI's API, read into prompts and sampling parameters.

Fields that this server does not know are ignored, as clients expect. Fields that it knows and cannot serve are
refused if they ask for something: an answer that ignores them would be another one than was asked for.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import operator
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from pasta_jax.decoding.options import real, switch, whole
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.messages import shown
from pasta_jax.serve.errors import ApiError, wrong
from pasta_jax.tokens.tokenizer import check_text

Prompt: TypeAlias = str | list[int] | list[dict[str, str]]
"""A text or a conversation, which get the model's chat format, or ids."""

Body: TypeAlias = Mapping[str, Any]

MOST_CHOICES = 128

MOST_STOPS, LONGEST_STOP = 16, 256
"""Texts to stop at, and characters of one: the decoder's thread looks for them after every piece of text."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
      field: of the request, that the prompts come from.
      prompts: each to be answered `n` times.
      samplings: how each of the n answers to a prompt is drawn.
      stream: events instead of one reply.
      usage: a stream ends with the count of tokens.
      branches: who wrote what when, in the extra field `pasta`.
      logprobs: log-probabilities of the text's tokens.
      echoed: fields of the request that are sent back as they came.
    """

    field: str
    prompts: tuple[Prompt, ...]
    samplings: tuple[SamplingParams, ...]
    stream: bool = False
    usage: bool = False
    branches: bool = False
    logprobs: bool = False
    echoed: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def n(self) -> int:
        """Answers to each prompt."""
        return len(self.samplings)

    @property
    def count(self) -> int:
        """Answers in all."""
        return len(self.prompts) * self.n

    @property
    def requests(self) -> list[tuple[Prompt, SamplingParams]]:
        """All that is to be decoded, in the order of the choices' indices."""
        return [(prompt, sampling) for prompt in self.prompts for sampling in self.samplings]


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What holds where a request does not say otherwise: the model's name, and the most tokens of an answer."""

    model: str
    max_new_tokens: int = 512


def parsed(body: bytes) -> Body:
    """The JSON object of a request's body. Raises ApiError."""
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError) as error:
        place = ""
        if isinstance(error, json.JSONDecodeError):
            place = f": {error.msg}, line {error.lineno}, column {error.colno}"
        raise wrong(None, f"The request is no JSON{place}. Send an object.", "invalid_json") from None
    if not isinstance(tree, dict):
        raise wrong(None, "The request is JSON, but no object.", "invalid_json")
    return tree


def asked_of_chat(body: Body, defaults: Defaults) -> Asked:
    """What a request to /v1/chat/completions asks for. Raises ApiError."""
    _check(body, defaults, _NOT_IN_CHAT)
    tokens = _first(body, "max_completion_tokens", "max_tokens")
    messages = conversation(_sequence(body, "messages"), "messages")
    return Asked(
        "messages",
        (messages,),
        _samplings(body, defaults, tokens),
        logprobs=_switch(body, "logprobs"),
        **_streaming(body),
    )


def asked_of_completions(body: Body, defaults: Defaults) -> Asked:
    """What a request to /v1/completions asks for. Raises ApiError."""
    _check(body, defaults, _NOT_IN_COMPLETIONS)
    prompt = body.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) or _is_ids(prompt) else prompt
    if (
        not isinstance(prompts, list)
        or not prompts
        or not all(isinstance(p, str) or _is_ids(p) for p in prompts)
    ):
        raise wrong("prompt", f"prompt is {shown(prompt)}. Give a text, a list of ids, or a list of either.")
    if alternatives := _whole(body, "logprobs", 0, 5):
        message = f"logprobs={alternatives} asks for alternatives to each token, which are not given. Give 0."
        raise wrong("logprobs", message, "unsupported_value")
    logprobs = alternatives is not None
    samplings = _samplings(body, defaults, "max_tokens")
    return Asked("prompt", tuple(prompts), samplings, logprobs=logprobs, **_streaming(body))


def asked_of_responses(body: Body, defaults: Defaults) -> Asked:
    """What a request to /v1/responses asks for. Raises ApiError."""
    text = body.get("text")
    known = {**body, "text": {"format": text.get("format")}} if isinstance(text, Mapping) else body
    _check(known, defaults, _NOT_IN_RESPONSES)
    if isinstance(body.get("include"), list) and "message.output_text.logprobs" in body["include"]:
        raise wrong("include", "Log-probabilities are not in responses. Leave them out.", "unsupported_value")
    given = body.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else _sequence(body, "input")
    if (instructions := body.get("instructions")) is not None:
        if not isinstance(instructions, str):
            raise wrong("instructions", f"instructions is {shown(instructions)}. Give a text.")
        items = [{"role": "system", "content": instructions}, *items]
    samplings = _samplings({**body, "n": None, "stop": None}, defaults, "max_output_tokens")
    echoed = {"instructions": instructions, "metadata": _metadata(body)}
    prompt = conversation(items, "input")
    return Asked("input", (prompt,), samplings, echoed=echoed, **_streaming(body))


# ------------------------------------------------------------------------------------------------ single fields


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

_TEXT_PARTS = ("text", "input_text", "output_text")


def conversation(messages: Sequence[Any], param: str) -> list[dict[str, str]]:
    """Messages with contents of one text each, neighbours of one role joined.

    The parts of an assistant's message, and its neighbours, are joined as they are: they are the branches of an
    answer that a client sends back.

    Raises:
      ApiError: a message that is none, has a role or a content that a text model has no use for.
    """
    said = [_said(message, f"{param}[{number}]") for number, message in enumerate(messages)]
    return [
        {
            "role": role,
            "content": ("" if role == "assistant" else "\n\n").join(text for _, text in neighbours),
        }
        for role, neighbours in itertools.groupby(said, operator.itemgetter(0))
    ]


def _said(message: Any, where: str) -> tuple[str, str]:
    """The role and the content of a message."""
    if not isinstance(message, Mapping) or message.get("type", "message") != "message":
        raise wrong(where, f'{where} is {shown(message)}. Give {{"role": ..., "content": ...}}.')
    role = _ROLES.get(message["role"]) if isinstance(message.get("role"), str) else None
    if role is None:
        raise wrong(
            f"{where}.role", f"{where}.role is {shown(message.get('role'))}. Use one of {', '.join(_ROLES)}."
        )
    return role, _content(message.get("content"), role, f"{where}.content")


def _content(content: Any, role: str, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list):
        raise wrong(where, f"{where} is {shown(content)}. Give a text, or a list of parts with texts.")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise wrong(
                f"{where}[{number}]", f"{where}[{number}] is {shown(part)}. This model reads texts alone."
            )
        texts.append(part["text"])
    return ("" if role == "assistant" else "\n").join(texts)


def _streaming(body: Body) -> dict[str, Any]:
    options = body.get("stream_options")
    if not isinstance(options, Mapping | None):
        raise wrong("stream_options", f"stream_options is {shown(options)}. Give an object.")
    return {
        "stream": _switch(body, "stream"),
        "usage": _switch(options or {}, "include_usage"),
        "branches": _switch(options or {}, "include_branches"),
    }


def _samplings(body: Body, defaults: Defaults, max_tokens: str) -> tuple[SamplingParams, ...]:
    """How each answer is drawn: the seeds of several follow each other."""
    mode = body.get("mode")
    if mode not in (None, "parallel", "sequential"):
        raise wrong(
            "mode", f'mode is {shown(mode)}. Use "parallel", or "sequential", which forbids promises.'
        )
    seed = _whole(body, "seed", -(2**63), 2**64 - 1)
    first = secrets.randbits(63) if seed is None else seed
    options: dict[str, Any] = {
        "max_new_tokens": _whole(body, max_tokens, 1) or defaults.max_new_tokens,
        "max_branch_tokens": _whole(body, "max_branch_tokens", 1),
        "temperature": _real(body, "temperature", 0),
        "top_p": _real(body, "top_p", 0, 1, above=True),
        "top_k": max(0, _whole(body, "top_k", -1) or 0),
        "min_p": _real(body, "min_p", 0, 1),
        "open_bias": float("-inf") if mode == "sequential" else _real(body, "open_bias", float("-inf")),
        "stop": _stops(body.get("stop")),
    }
    given = {name: value for name, value in options.items() if value is not None}
    n = _whole(body, "n", 1, MOST_CHOICES) or 1
    sampling = SamplingParams(**given)
    return tuple(dataclasses.replace(sampling, seed=(first + i) % 2**64) for i in range(n))


def _stops(stop: Any) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else stop
    try:
        texts = SamplingParams(stop=stops).stop
    except ValueError as error:
        raise wrong("stop", str(error)) from None
    if len(texts) > MOST_STOPS or any(len(text) > LONGEST_STOP for text in texts):
        message = f"Give at most {MOST_STOPS} texts of at most {LONGEST_STOP} characters."
        raise wrong("stop", f"stop={shown(stop)}: {message}")
    return texts


def _metadata(body: Body) -> dict[str, str]:
    """Words of a client's own about its request."""
    metadata = body.get("metadata") or {}
    try:
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("give an object of texts.")
        for text in (*metadata, *metadata.values()):
            check_text(text)
    except ValueError as error:
        raise wrong("metadata", f"metadata={shown(metadata)}: {error}") from None
    return metadata


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _sequence(body: Body, name: str) -> list[Any]:
    value = body.get(name)
    if not isinstance(value, list) or not value:
        what = "is missing" if value is None else f"is {shown(value)}"
        raise wrong(
            name, f"{name} {what}. Give a list of messages.", "invalid_type" if name in body else "missing"
        )
    return value


def _first(body: Body, *names: str) -> str:
    """The first of some names that the body has; else the last."""
    return next((name for name in names if body.get(name) is not None), names[-1])


def _whole(body: Body, name: str, *bounds: int) -> int | None:
    return _checked(whole, body, name, *bounds)


def _real(body: Body, name: str, *bounds: float, above: bool = False) -> float | None:
    return _checked(real, body, name, *bounds, above=above)


def _switch(body: Body, name: str) -> bool:
    return bool(_checked(switch, body, name))


def _checked(check: Any, body: Body, name: str, *bounds: Any, **options: Any) -> Any:
    value = body.get(name)
    if value is None:
        return None
    try:
        return check(name, value, *bounds, **options)
    except ValueError as error:
        raise wrong(name, str(error)) from None


# ---------------------------------------------------------------------------------- what this server cannot serve


_TEXT_FORMAT: tuple[Any, ...] = (None, {"type": "text"})
_NOTHING: tuple[Any, ...] = (None, [], {}, 0, False, "")
_SAMPLING = dict.fromkeys(
    ("frequency_penalty", "presence_penalty", "logit_bias", "tools", "functions"), _NOTHING
)

_NOT_IN_CHAT = {**_SAMPLING, "top_logprobs": _NOTHING, "response_format": _TEXT_FORMAT, "audio": _NOTHING}
_NOT_IN_COMPLETIONS = {**_SAMPLING, "echo": _NOTHING, "suffix": _NOTHING, "best_of": (None, 1)}
_NOT_IN_RESPONSES = {
    **_SAMPLING,
    **dict.fromkeys(("stop", "previous_response_id", "conversation", "background", "top_logprobs"), _NOTHING),
    "n": (None, 1),
    "text": (None, *({"format": form} for form in _TEXT_FORMAT)),
}
"""Fields that would change the answer, each with the values that ask for nothing."""


def _check(body: Body, defaults: Defaults, unsupported: Mapping[str, Sequence[Any]]) -> None:
    """Raises ApiError for another model, and for a field that cannot be served."""
    name = body.get("model")
    if name is not None and name != defaults.model:
        message = f"The model {shown(name)} is not here. This server has {defaults.model!r}."
        raise ApiError(404, message, "model_not_found", param="model")
    for field, harmless in unsupported.items():
        if (value := body.get(field)) not in harmless:
            raise wrong(field, f"{field}={shown(value)} is not supported. Leave it out.", "unsupported_value")
