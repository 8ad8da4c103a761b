"""Measurements of a server's decoder: prompts that begin alike, and branches that wait for each other's requests.

The first gives the time to the first token of a question after a long system prompt: fed at once, in blocks, and
with the blocks of the system prompt kept.

The second replays requests side by side, trees and plain answers in turn, under each policy of admission. As TAPER
(arXiv 2605.06914) does, it asks for the goodput, what is served a second within a bound of latency: here tokens of
text of requests that took no more than so many seconds for each of them.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Callable, Sequence

from pasta_jax.benchmark.measure import Quartiles, TableRow, interleaved, median_ratio
from pasta_jax.benchmark.measurements import SEQUENTIAL, Effort
from pasta_jax.benchmark.replay import UNLIMITED, ReplayError, in_one_size
from pasta_jax.benchmark.trees import one_token_words, random_text, random_tree, without_tags
from pasta_jax.decoding.compiled import Sizes
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.prefixes import PROMPT_BLOCK
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.script import Script, in_document_order, script_of
from pasta_jax.decoding.state import Limits
from pasta_jax.model.pool import pool_bytes
from pasta_jax.rounding import round_up
from pasta_jax.tokens.tokenizer import Tokenizer

QUESTION = 24
"""Tokens of a question after the system prompt."""

SAME = 16
"""Tokens of which the texts are compared."""

PROMPT = 32
"""The bucket of the prompts: one, so that little is compiled."""

CHUNK = 8
"""Steps between two looks, as of a decoder whose answers are streamed."""

BOUND = 2.0
"""Seconds for each token of text that are in time, in those of a step in which each request has one lane."""


# ------------------------------------------------------------------------------------------------------- prefix


def measure_prefix(model: Model, effort: Effort, rng: random.Random) -> list[TableRow]:
    """Measures the time to the first token after a system prompt, fed and kept; one table row for each way."""
    tokenizer = model.tokenizer
    words = one_token_words(tokenizer)

    def text(tokens: int) -> list[int]:
        return tokenizer.encode(random_text(rng, tokenizer, words, tokens))

    system = [tokenizer.vocabulary.bos, *text(effort.prompt_tokens - 1)]
    questions = [system + text(QUESTION) for _ in range(2 + effort.repeats)]
    block = min(PROMPT_BLOCK, effort.prompt_tokens)
    pool = round_up(effort.prompt_tokens + QUESTION + SAME + effort.lanes, block)
    limits = Limits(effort.lanes, max(2, effort.lanes), pool, model.max_depth)
    reuse = pool_bytes(model.config, 1, 2 * pool // block * block)
    at_once = Decoder(model, limits=limits)
    in_blocks = Decoder(model, limits=limits, reuse=reuse, prompt_block=block)
    kept = in_blocks.for_model(model)
    decoders = {"fed at once": at_once, "fed in blocks": in_blocks, "in blocks, the beginning kept": kept}

    def timer(decoder: Decoder) -> Callable[[], float]:
        ask = iter(questions)

        def first_token_s() -> float:
            if decoder is in_blocks and decoder.prefixes is not None:
                decoder.prefixes.clear()
            one = dataclasses.replace(SEQUENTIAL, max_new_tokens=1)
            return decoder.decode([next(ask)], [one])[1].wall_s

        return first_token_s

    some = dataclasses.replace(SEQUENTIAL, max_new_tokens=SAME)
    texts = {way: decoder.decode([questions[0]], [some])[0][0].threads for way, decoder in decoders.items()}
    samples = interleaved(
        "prefix", {way: timer(decoder) for way, decoder in decoders.items()}, effort.repeats, "s"
    )
    first = samples["fed at once"]
    return [
        {
            "system prompt": way,
            "its tokens": effort.prompt_tokens,
            "first token, s": Quartiles.of(times),
            "relative to the first row": median_ratio(times, first),
            "same text": texts[way] == texts["fed at once"],
        }
        for way, times in samples.items()
    ]


# ---------------------------------------------------------------------------------------------------- admission


@dataclasses.dataclass(frozen=True)
class Served:
    """Requests that were answered at once.

    Attributes:
      seconds: until the last was answered.
      token_s: of each request, the seconds for each token of its text.
      text_tokens: of each request.
    """

    seconds: float
    token_s: tuple[float, ...]
    text_tokens: tuple[int, ...]

    @property
    def throughput(self) -> float:
        """Tokens of text a second."""
        return sum(self.text_tokens) / self.seconds

    def goodput(self, bound_s: float) -> float:
        """Tokens of text a second, of requests that took no more than `bound_s` for each token."""
        pairs = zip(self.token_s, self.text_tokens, strict=True)
        return sum(tokens for token_s, tokens in pairs if token_s <= bound_s) / self.seconds


def measure_admission(model: Model, effort: Effort, rng: random.Random) -> list[TableRow]:
    """Measures goodput under each policy of admission; a table row for each policy and number of requests."""
    table: list[TableRow] = []
    tokenizer = model.tokenizer
    prompts, scripts = _requests(tokenizer, effort, rng, max(effort.requests))
    limits = _limits(tokenizer, effort, scripts)
    for count in effort.requests:
        widths = [1 << i for i in range(limits.lanes.bit_length())]
        sizes = Sizes(limits=limits, rows=count, pool_buckets=(), widths=widths, prompt_buckets=(PROMPT,))
        first = Decoder(model, admission="cost", chunk=CHUNK, **sizes)
        first.admission.measure(model.params_as(first.compiled.form))
        times = first.admission.times
        assert times is not None
        bound_s = BOUND * min(narrowest for narrowest, *_ in times.values())
        caps = sorted({1, min(4, limits.lanes)})
        policies = {name: name for name in ("all", *(f"cap:{cap}" for cap in caps), "cost")}
        policies["cost, in time"] = f"cost:{bound_s:.9f}"
        runs: dict[str, list[Served]] = {}
        meters: dict[str, Callable[[], float]] = {}
        for name, policy in policies.items():
            decoder = Decoder(model, compiled=first.compiled, chunk=CHUNK, admission=policy)
            decoder.admission.times = times if policy.startswith("cost") else None
            runs[name] = []
            meters[name] = _meter(decoder, prompts[:count], scripts[:count], bound_s, runs[name])
        interleaved(f"admission, {count}", meters, effort.repeats, "tokens/s in time")
        for name, served in runs.items():
            counted = served[1:]  # after the first, which compiles
            slowest = [max(run.token_s) for run in counted]
            in_time = [statistics.mean(s <= bound_s for s in run.token_s) for run in counted]
            table.append(
                {
                    "requests": count,
                    "admission": name,
                    "goodput, tokens/s": statistics.median(run.goodput(bound_s) for run in counted),
                    "tokens/s": Quartiles.of([run.throughput for run in counted]),
                    "in time": statistics.mean(in_time),
                    "ms a token, slowest": Quartiles.of([1000 * s for s in slowest]),
                    "bound, ms": 1000 * bound_s,
                }
            )
    return table


def _requests(
    tokenizer: Tokenizer, effort: Effort, rng: random.Random, count: int
) -> tuple[list[list[int]], list[Script]]:
    """Prompts and what is forced: trees, and after each the text of one that has half of its branches."""
    words, branches = one_token_words(tokenizer), max(2, effort.branches[-1] // 2)
    scripts = []
    for number in range(count):
        size = branches // (1 + number % 2)
        tree = random_tree(rng, tokenizer, branches=size, tokens=effort.branch_tokens, balanced=False)
        scripts.append(script_of(without_tags(tree) if number % 2 else tree, tokenizer))
    prompts = [tokenizer.encode_prompt(random_text(rng, tokenizer, words, 12)) for _ in range(count)]
    return prompts, in_one_size(scripts)


def _limits(tokenizer: Tokenizer, effort: Effort, scripts: Sequence[Script]) -> Limits:
    tokens = max(int((script.tokens >= 0).sum()) for script in scripts)
    threads = max(len(script.threads.tokens) for script in scripts)
    longest = tokenizer.encode_prompt(" ".join(["word"] * 16))
    return Limits(
        min(effort.lanes, threads),
        threads,
        round_up(len(longest) + tokens + effort.lanes, 128) - effort.lanes,
    )


def _meter(
    decoder: Decoder,
    prompts: Sequence[list[int]],
    scripts: Sequence[Script],
    bound_s: float,
    runs: list[Served],
) -> Callable[[], float]:
    """A function that answers all requests at once, adds what it measured to `runs`, and returns the goodput."""
    sampling = [SamplingParams(UNLIMITED, max_branch_tokens=UNLIMITED, script=script) for script in scripts]

    def goodput() -> float:
        answers = decoder.enqueue(prompts, sampling)
        results = [answer.result() for answer in answers]
        for result, script in zip(results, scripts, strict=True):
            if in_document_order(result.trace.threads) != script.threads:
                raise ReplayError("The engine wrote other tokens than it was forced to.")
        seconds = max(answer.wall_s for answer in answers)
        text = tuple(result.stats.text_tokens for result in results)
        token_s = tuple(answer.wall_s / tokens for answer, tokens in zip(answers, text, strict=True))
        runs.append(Served(seconds, token_s, text))
        return runs[-1].goodput(bound_s)

    return goodput
