r"""Models of this package in lm-eval (extra [lm-eval]): its command, with a model named `pasta_jax`.

    python -m pasta_jax.adapters.lm_eval --model pasta_jax --model_args ckpt=runs/pasta --tasks gsm8k \
        --apply_chat_template --batch_size 8

All flags are lm-eval's, which finds models of others only if they are registered before it starts; in Python it is
`lm_eval.simple_evaluate(model=PastaLM("runs/pasta"), ...)`. Without `--apply_chat_template` the model goes on with
the task's text as it stands, which a finetuned one has not learnt. Log-likelihoods are of text without promises.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from pasta_jax.adapters.sampling import sampling_of
from pasta_jax.decoding.api import decoder_for
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.state import Limits
from pasta_jax.extras import optional
from pasta_jax.loading import load
from pasta_jax.rounding import next_power_of_two
from pasta_jax.tokens.base import TextTokenizer
from pasta_jax.training.logprobs import continuation_scores, scores_pass

CHAT = "pasta_jax conversation: "  # passes through lm-eval as a text
DRAWS = ("temperature", "top_k", "top_p", "min_p")
KNOWN = {"until", "max_gen_toks", "do_sample", "seed", *DRAWS}  # arguments of generation


def __getattr__(name: str) -> Any:
    if name != "PastaLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _pasta_lm()


@functools.cache
def _pasta_lm() -> type:
    names = ("api.model", "models.utils", "utils")
    api, models, utils = (optional(f"lm_eval.{name}", "lm-eval", "The adapter for lm-eval") for name in names)

    class PastaLM(api.TemplateLM):  # type: ignore[name-defined]
        """A model of this package, as lm-eval asks it.

        Args:
          ckpt: what `pasta_jax.load` takes, or has loaded.
          sequential: forbid promises.
          batch_size: answers decoded at once, and rows of forward passes.
          max_gen_toks: tokens of an answer over all threads, where the task does not say.
          max_length: tokens read at once for a log-likelihood: the end of a longer context; windows of a text.
          options: of `pasta_jax.load`: dtype, quantize, ...; max_batch_size and device have no effect.
        """

        def __init__(
            self,
            ckpt: str | Model,
            sequential: bool = False,
            batch_size: int | str = 8,
            max_gen_toks: int = 512,
            max_length: int = 2048,
            max_batch_size: Any = None,
            device: Any = None,
            **options: Any,
        ):
            super().__init__()
            self.model = ckpt if isinstance(ckpt, Model) else load(ckpt, **options)
            self.rows = int(batch_size) if str(batch_size).isdigit() else 8  # "auto"
            self.sequential, self.max_gen_toks, self.max_length = sequential, max_gen_toks, max_length
            self._forward = scores_pass(self.model.config, self.model.mesh)
            self._seeds = itertools.count()  # so that repeated samples differ

        eot_token_id = property(lambda self: self.model.tokenizer.vocabulary.eos)
        prefix_token_id = property(lambda self: self.model.tokenizer.vocabulary.bos)
        tokenizer_name = "pasta_jax"  # of a cache of requests, which are texts whatever the tokenizer

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return CHAT + json.dumps(chat_history, ensure_ascii=False)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            tokenizer = self.model.tokenizer
            if string.startswith(CHAT):
                messages = json.loads(string.removeprefix(CHAT))
                begun = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
                return tokenizer.encode_chat(messages) + tokenizer.encode(begun)
            begins = not isinstance(tokenizer, TextTokenizer) or tokenizer.usage.begins
            start = [self.prefix_token_id] if begins and add_special_tokens is not False else []
            return start + tokenizer.encode(string)

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            if context.startswith(CHAT):
                return self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)
            return super()._encode_pair(context, continuation)

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            pairs = [(before[-max(1, self.max_length - len(ids)) :], ids) for _, before, ids in requests]
            return continuation_scores(self._forward, self.model, pairs, self.rows, 512)

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            texts = (self.tok_encode(request.args[0], add_special_tokens=False) for request in requests)
            sizes = self.prefix_token_id, self.max_length - 1, 1
            windows = [[*utils.get_rolling_token_windows(ids, *sizes)] for ids in texts]
            parts = [("", *utils.make_disjoint_window(pair)) for pair in itertools.chain(*windows)]
            scores = iter(self._loglikelihood_tokens(parts))
            return [sum(logprob for logprob, _ in itertools.islice(scores, len(each))) for each in windows]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            args = [request.args for request in requests]
            asked = [(self.tok_encode(context), self._sampling(given)) for context, given in args]
            longest = max((len(ids) + sampling.max_new_tokens for ids, sampling in asked), default=1)
            limits = Limits(pool=max(128, next_power_of_two(longest)), max_depth=self.model.max_depth)
            decoder = decoder_for(self.model, limits, self.rows)
            pending = [decoder.submit(*each) for each in asked]  # waiting for one works on all
            texts = []
            for each, answer in zip(tqdm(args, "decoding", disable=disable_tqdm), pending, strict=True):
                texts.append(answer.result().text)
                self.cache_hook.add_partial("generate_until", each, texts[-1])
            return texts

        def _sampling(self, given: Mapping[str, Any]) -> SamplingParams:
            wanted = models.normalize_gen_kwargs(given, self.max_gen_toks)
            if ignored := sorted({*wanted} - KNOWN):
                utils.warning_once(api.eval_logger, f"Ignored by pasta_jax: {', '.join(ignored)}.")
            return sampling_of(
                wanted["max_gen_toks"],
                sequential=self.sequential,
                stop=wanted["until"],
                seed=wanted.get("seed", next(self._seeds)),
                **{name: wanted.get(name) for name in DRAWS},
            )

    return PastaLM


def main() -> None:
    """The command of lm-eval, which then knows the model `pasta_jax`."""
    registry = optional("lm_eval.api.registry", "lm-eval", "This command", SystemExit)
    registry.model_registry.register("pasta_jax", target="pasta_jax.adapters.lm_eval:PastaLM")
    optional("lm_eval.__main__", "lm-eval", "This command", SystemExit).cli_evaluate()


if __name__ == "__main__":
    main()
