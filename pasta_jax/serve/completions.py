"""The replies of /v1/chat/completions and /v1/completions.

Deltas carry settled text in document order, so whoever joins them has the answer. Who wrote what when is in the
extra field `pasta` of the chunks, if asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pasta_jax.decoding.results import DecodeResult
from pasta_jax.decoding.streaming import Draft, Event
from pasta_jax.serve import sse
from pasta_jax.serve.asked import Asked
from pasta_jax.serve.errors import ApiError
from pasta_jax.serve.replies import FINISH, Head, Told, account_of, text_logprobs, usage_of


class Completions:
    """A reply of one of the two endpoints. They differ in how a choice is written."""

    kind, chunk_kind = "text_completion", "text_completion"

    def __init__(self, head: Head, asked: Asked):
        self.head, self.asked = head, asked
        count = asked.count
        self._drafts, self._told, self._sent = (
            [Draft() for _ in range(count)],
            [Told() for _ in range(count)],
            [0] * count,
        )
        self._results: dict[int, DecodeResult] = {}

    def whole(self, results: Sequence[DecodeResult]) -> dict[str, Any]:
        choices = []
        for index, result in enumerate(results):
            choice = self._choice(index, result.text, FINISH.get(result.stop_reason, "stop"), result)
            choices.append(choice | ({"pasta": account_of(result)} if self.asked.branches else {}))
        return self._object(self.kind, choices) | {"usage": self._usage(results)}

    def begin(self) -> Iterator[bytes]:
        return iter(())

    def add(self, choice: int, event: Event) -> Iterator[bytes]:
        draft, text, finish = self._drafts[choice], "", None
        draft.add(event)
        if len(draft.settled) > self._sent[choice]:
            text = draft.settled[self._sent[choice] :]
            self._sent[choice] = len(draft.settled)
        if event.result is not None:
            self._results[choice] = event.result
            finish = FINISH.get(event.result.stop_reason, "stop")
        told = self._told[choice].tell(event) if self.asked.branches else None
        if text or finish or told:
            yield self._chunk([self._delta(choice, text, finish, event.result)], [told] if told else [])

    def end(self) -> Iterator[bytes]:
        if self.asked.usage:
            results = [self._results[i] for i in sorted(self._results)]
            yield sse.data(self._object(self.chunk_kind, []) | {"usage": self._usage(results)})
        yield sse.DONE

    def failed(self, error: ApiError) -> bytes:
        return sse.data(error.body)

    # ---------------------------------------------------------------------------------------- how it is written

    def _choice(
        self, index: int, text: str, finish: str | None, result: DecodeResult | None
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._logprobs(result), "finish_reason": finish}

    def _delta(
        self, index: int, text: str, finish: str | None, result: DecodeResult | None
    ) -> dict[str, Any]:
        return self._choice(index, text, finish, result)

    def _logprobs(self, result: DecodeResult | None) -> Any:
        """Those of the whole answer, in the choice that says that it is finished."""
        if result is None or not self.asked.logprobs:
            return None
        tokens, values, offsets = list[str](), list[float](), list[int]()
        for spelled, value, before in text_logprobs(result, self.head.vocabulary):
            tokens.append(spelled.decode(errors="replace"))
            values.append(value)
            offsets.append(before)
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": None, "text_offset": offsets}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = self.head
        return {
            "id": head.id,
            "object": kind,
            "created": head.created,
            "model": head.model,
            "choices": choices,
        }

    def _chunk(self, choices: list[dict[str, Any]], told: list[dict[str, Any]]) -> bytes:
        return sse.data(self._object(self.chunk_kind, choices) | ({"pasta": told} if told else {}))

    def _usage(self, results: Sequence[DecodeResult]) -> dict[str, Any]:
        prompt, reused, answer = usage_of(self.asked, results)
        return {
            "prompt_tokens": prompt,
            "prompt_tokens_details": {"cached_tokens": reused},
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
        }


class ChatCompletions(Completions):
    """A reply of /v1/chat/completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def begin(self) -> Iterator[bytes]:
        for index in range(len(self._drafts)):
            opening = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            yield self._chunk([opening], [])

    def _choice(
        self, index: int, text: str, finish: str | None, result: DecodeResult | None
    ) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(result),
            "finish_reason": finish,
        }

    def _delta(
        self, index: int, text: str, finish: str | None, result: DecodeResult | None
    ) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": self._logprobs(result), "finish_reason": finish}

    def _logprobs(self, result: DecodeResult | None) -> Any:
        if result is None or not self.asked.logprobs:
            return None
        content = [
            {
                "token": spelled.decode(errors="replace"),
                "logprob": value,
                "bytes": [*spelled],
                "top_logprobs": [],
            }
            for spelled, value, _ in text_logprobs(result, self.head.vocabulary)
        ]
        return {"content": content, "refusal": None}
