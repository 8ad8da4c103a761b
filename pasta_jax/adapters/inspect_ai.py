"""Models of this package in inspect_ai (extra [inspect]): the provider `pasta_jax`, found by its entry point.

    inspect eval task.py --model pasta_jax/runs/pasta --max-tokens 512

What stands behind the first slash is what `pasta_jax.load` takes, an absolute path with two slashes in all.
Samples that inspect_ai asks at once are decoded at once. Steps, branches and seconds of an answer are in the
metadata of its output. Without a temperature, answers are greedy.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Sequence
from typing import Any

from pasta_jax.adapters.sampling import sampling_of
from pasta_jax.decoding.api import decoder_for
from pasta_jax.decoding.fits import DoesNotFit
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.results import DecodeResult
from pasta_jax.decoding.state import Limits
from pasta_jax.extras import optional
from pasta_jax.loading import load

STOPS = {"eos": "stop", "stop": "stop", "length": "max_tokens", "cache_full": "model_length"}
"""Reasons to stop by the names of inspect_ai."""


def __getattr__(name: str) -> Any:
    if name != "provider":  # of the entry point
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _provider()


@functools.cache
def _provider() -> Any:
    anyio, api = (
        optional(name, "inspect", "The adapter for inspect_ai") for name in ("anyio", "inspect_ai.model")
    )

    @api.modelapi(name="pasta_jax")
    class PastaAPI(api.ModelAPI):  # type: ignore[name-defined]
        """A model of this package, as inspect_ai asks it.

        Args:
          model_name: what `pasta_jax.load` takes.
          base_url, api_key, config: of inspect_ai; the first two have no effect.
          sequential: forbid promises.
          rows: answers decoded at once.
          cache_len: tokens of a prompt and its answer together.
          options: of `pasta_jax.load`: dtype, quantize, ...
        """

        def __init__(
            self,
            model_name: str,
            base_url: str | None = None,
            api_key: str | None = None,
            config: Any = None,
            sequential: bool = False,
            rows: int = 8,
            cache_len: int = 2048,
            **options: Any,
        ):
            super().__init__(model_name, base_url, api_key, [], config or api.GenerateConfig())
            model = load(model_name, **options)
            self.decoder = decoder_for(model, Limits(pool=cache_len, max_depth=model.max_depth), rows)
            self.sequential = sequential

        def max_connections(self) -> int:
            return self.decoder.compiled.rows

        def max_tokens(self) -> int:
            return SamplingParams().max_new_tokens

        def collapse_user_messages(self) -> bool:
            return True

        def collapse_assistant_messages(self) -> bool:
            return True

        async def generate(self, input: Sequence[Any], tools: Any, tool_choice: Any, config: Any) -> Any:
            if tools:
                raise ValueError("Models of pasta_jax call no tools.")
            tokenizer = self.decoder.model.tokenizer
            ids = tokenizer.encode_chat([{"role": each.role, "content": each.text} for each in input])
            try:
                pending = self.decoder.submit(ids, self._sampling(config))
            except DoesNotFit as error:
                return api.ModelOutput.from_content(self.model_name, "", "model_length", str(error))
            return self._output(await anyio.to_thread.run_sync(pending.result))

        def _sampling(self, config: Any) -> SamplingParams:
            return sampling_of(
                config.max_tokens or self.max_tokens(),
                sequential=self.sequential,
                stop=config.stop_seqs,
                temperature=config.temperature,
                seed=secrets.randbits(63) if config.seed is None else config.seed,  # epochs differ
                top_k=config.top_k,
                top_p=config.top_p,
            )

        def _output(self, answer: DecodeResult) -> Any:
            output = api.ModelOutput.from_content(
                self.model_name, answer.text, STOPS.get(answer.stop_reason, "unknown")
            )
            stats = answer.stats
            asked, answered = stats.prompt_tokens, stats.output_tokens
            output.usage = api.ModelUsage(
                input_tokens=asked, output_tokens=answered, total_tokens=asked + answered
            )
            output.time = stats.wall_s
            output.metadata = {
                "annotated": answer.annotated,
                "branches": len(answer.branches),
                "decode_steps": stats.decode_steps,
                "text_tokens": stats.text_tokens,
                "critical_path": stats.critical_path,
                "issues": [*answer.issues],
            }
            return output

    return PastaAPI
