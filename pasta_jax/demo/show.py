"""Prompts answered before the reader's eyes, in parallel and sequentially, and timed as they are shown."""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
from collections.abc import Sequence

from pasta_jax.data.prompts import read_questions
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.state import Limits
from pasta_jax.demo.prompts import PROMPTS
from pasta_jax.evaluate.answers import LANES, THREADS, Answered, answered
from pasta_jax.live import screen
from pasta_jax.memory import return_freed
from pasta_jax.model.forms import outputs_first
from pasta_jax.rounding import next_power_of_two, round_up
from pasta_jax.terminal import timeline

WARM_TOKENS = 12
"""Decoded once before anything is timed, so that all memory was touched."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """Two answers to a prompt.

    Attributes:
      prompt: what was asked.
      parallel, sequential: the answers; `wall_s` is of one decode, when everything was compiled and had run.
      chart: the threads of the parallel one over time.
    """

    prompt: str
    parallel: Answered
    sequential: Answered
    chart: str


class Stage:
    """Prompts, a model that answers them in parallel, and what answers them sequentially: at first the same model.

    It compiles what these prompts need, which is one prefill and one loop, and runs it once.

    Args:
      model: what is shown.
      prompts: all of them are padded alike, and share one size of the pool.
      sampling: how each is answered.
      lanes: threads that decode in one step.

    Raises:
      ValueError: a prompt that the model cannot be asked.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[str],
        sampling: SamplingParams,
        *,
        lanes: int = LANES,
    ):
        self.prompts = prompts
        longest = max(len(model.tokenizer.encode_prompt(prompt)) for prompt in prompts)
        self._bucket = max(next_power_of_two(longest), 16)
        limits = Limits(lanes, THREADS, round_up(longest + sampling.max_new_tokens, 128), model.max_depth)
        self.parallel = self.sequential = Decoder(model, limits=limits, prompt_buckets=[self._bucket])
        self._warm_up(self.parallel)
        self._sampling, self._alone = sampling, dataclasses.replace(sampling, open_bias=-math.inf)

    def compare_with(self, baseline: Model) -> None:
        """Another model answers sequentially; what is compiled is shared if it fits."""
        if self.parallel.fits(baseline):
            self.sequential = self.parallel.for_model(baseline)
        else:
            limits = self.parallel.limits
            self.sequential = Decoder(baseline, limits=limits, prompt_buckets=[self._bucket])
        self._warm_up(self.sequential)

    def _warm_up(self, decoder: Decoder) -> None:
        programs = decoder.compiled.programs
        decoder.compiled.compile_all(
            [key for key in programs if key.verb != "admit" or key.length == self._bucket]
        )
        return_freed()  # compiling takes much
        ids = decoder.model.tokenizer.encode_prompt(self.prompts[0])
        decoder.decode([ids], [SamplingParams(max_new_tokens=WARM_TOKENS)])

    def show(self, number: int) -> Shown:
        """Answers a prompt twice, and says how long it took: drawing is not timed."""
        prompt = self.prompts[number]
        print(f"\n{'=' * self.columns}\n> {prompt}\n")
        parallel = screen.show(self.parallel.submit(prompt, self._sampling), sys.stdout)
        stats = parallel.stats
        chart = timeline(parallel, width=self.columns)
        print(f"\n{self._coloured(chart)}\n")
        print(
            f"{stats.text_tokens} tokens of text in {stats.decode_steps} steps and {stats.wall_s:.1f} s, "
            f"{len(parallel.branches)} branches. Now the same question, one token at a time:\n"
        )
        alone = screen.show(self.sequential.submit(prompt, self._alone), sys.stdout)
        print(
            f"\n{alone.stats.text_tokens} tokens in {alone.stats.decode_steps} steps and "
            f"{alone.stats.wall_s:.1f} s."
        )
        return Shown(prompt, answered(prompt, parallel), answered(prompt, alone), chart)

    @property
    def columns(self) -> int:
        """Of the terminal, but at most 100."""
        return min(shutil.get_terminal_size().columns - 1, 100)

    def _coloured(self, chart: str) -> str:
        """Each branch's line in the colour of its text."""
        if not (screen.is_live(sys.stdout) and screen.has_colours()):
            return chart
        ruler, *threads = chart.splitlines()
        return "\n".join(
            [screen.faint(ruler), *(screen.in_colour(line, i) for i, line in enumerate(threads))]
        )


def light(model: Model) -> Model:
    """The model in the one form that steps on this CPU read, where they would make a second copy of its weights.

    It uses up the other one.
    """
    if Decoder(model).compiled.form != "outputs_first":
        return model
    turned = dataclasses.replace(model, params=outputs_first(model.params, donate=True))
    return_freed()
    return turned


def read_prompts(file: str | None) -> Sequence[str]:
    """The prompts of a file, or the demo's own. Raises RecordError, ValueError."""
    if file is None:
        return PROMPTS
    questions, problems = read_questions(file)
    texts = [question.prompt for question in questions if isinstance(question.prompt, str)]
    if not texts:
        raise ValueError(f"{file} has no prompt.{f' {problems[0]}' if problems else ''}")
    return texts
