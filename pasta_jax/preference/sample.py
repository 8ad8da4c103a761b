"""Sampling: N answers of the policy to each prompt, and one of the baseline, kept as JSONL.

A line holds a prompt, the reference answer, the baseline's greedy answer and the samples, each with its training
document: text alone would not do, since a sample may spell a text with other tokens than the tokenizer chooses.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from pasta_jax.arrays import ThreadedTokens
from pasta_jax.config import PreferenceConfig
from pasta_jax.data.records import Prompt as Asked
from pasta_jax.data.records import encode_prompt
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.request import SamplingParams, seed_of
from pasta_jax.decoding.results import Stats, result
from pasta_jax.decoding.state import Limits
from pasta_jax.decoding.trace import as_document, document_order
from pasta_jax.files import LOG_EVERY_S, Lines, json_line, read_jsonl, shows_progress, write_jsonl
from pasta_jax.processes.agreement import agreed
from pasta_jax.training.signals import Stopped, stop_requests

LOG = logging.getLogger("pasta_jax")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, and the answer that the data gives.

    Attributes:
      text: as a judge reads it.
      reference: the answer; None if the data gives none.
      messages: (role, content) of each message, if `text` is not all that is asked.
    """

    text: str
    reference: str | None
    messages: tuple[tuple[str, str], ...] = ()

    @property
    def asked(self) -> Asked:
        """What the model is asked."""
        return tuple({"role": role, "content": text} for role, text in self.messages) or self.text


@dataclasses.dataclass(frozen=True)
class Sample:
    """One decoded answer.

    Attributes:
      text: for the reader.
      annotated: as PASTA-LANG.
      stats: its cost; without times, since rows are decoded together.
      document: the trace in document order, a training document; [n] fields.
      step: int32 [n], the decode step that fed each of its tokens (see `Trace`).
    """

    text: str
    annotated: str
    stats: Stats
    document: ThreadedTokens
    step: np.ndarray


@dataclasses.dataclass(frozen=True)
class Record:
    """All answers to one prompt."""

    prompt: Prompt
    baseline: Sample
    samples: tuple[Sample, ...]


def sample(
    policy: Model,
    baseline: Model,
    prompts: Sequence[Prompt],
    config: PreferenceConfig,
    *,
    length: int,
    threads: int,
    seed: int,
    path: str,
) -> list[Record]:
    """A record for every prompt: those that `path` holds already, the others decoded and appended to it.

    Args:
      policy: answers N times, at `config.temperature`.
      baseline: answers once, greedily and without promises.
      prompts: all different.
      config: N and the other settings.
      length: maximum tokens of prompt and answer together.
      threads: maximum threads of an answer, main included.
      seed: the same seed draws the same samples, however often the run was interrupted.
      path: the JSONL file.

    Raises:
      Stopped: on SIGTERM or Ctrl-C, between two groups of prompts; finished groups are kept.
    """
    records = read_jsonl(path, record_of)
    if {record.prompt for record in records} - {*prompts}:
        records = []
    write_records(path, records)  # without a broken last line
    LOG.info("%d samples of each of %d prompts; %d are done.", config.samples, len(prompts), len(records))
    if len(records) == len(prompts):
        return records

    def decoder(model: Model, lanes: int) -> Decoder:
        limits = Limits(lanes, threads, length, model.max_depth)
        return Decoder(model, limits=limits, rows=config.sampling_rows)

    greedy = SamplingParams(max_new_tokens=length, max_branch_tokens=length, open_bias=float("-inf"))
    baselines = _answers(decoder(baseline, lanes=1), prompts, [greedy] * len(prompts))
    # Rows of a batch wait for the longest: prompts with answers of similar length go together.
    order = sorted(range(len(prompts)), key=lambda i: (baselines[i].stats.output_tokens, i))
    if [record.prompt for record in records] != [prompts[i] for i in order[: len(records)]]:
        records = []
        write_records(path, records)
    group = max(1, config.sampling_rows // config.samples)
    todo = range(len(records), len(prompts), group)
    engine = decoder(policy, config.sampling_lanes)
    interactive, logged_at = shows_progress(), time.monotonic()
    with Lines(path) as file, stop_requests() as request:
        for start in tqdm(todo, unit="group", desc="sampling", disable=not interactive):
            members = order[start : start + group]
            asked = [(i, j) for i in members for j in range(config.samples)]
            sampling = [_drawn(length, config.temperature, seed, i, j) for i, j in asked]
            drawn = iter(_answers(engine, [prompts[i] for i, _ in asked], sampling))
            for i in members:
                samples = tuple(itertools.islice(drawn, config.samples))
                records.append(Record(prompts[i], baselines[i], samples))
                file.write(json_line(dataclasses.asdict(records[-1])))
            progress = f"{len(records)} of {len(prompts)} prompts are sampled."
            (stop,) = agreed(request.signal or 0)
            if stop:
                request.is_heeded = True
                LOG.warning("%s Run the same command again to go on.", progress)
                raise Stopped(stop)
            if not interactive and time.monotonic() - logged_at > LOG_EVERY_S:
                LOG.info(progress)
                logged_at = time.monotonic()
    if request.signal:  # it came after the last group
        LOG.warning(
            "%d of %d prompts are sampled. Run the same command again to go on.", *(len(records),) * 2
        )
        raise Stopped(request.signal)
    return records


def _drawn(length: int, temperature: float, *seed: int) -> SamplingParams:
    return SamplingParams(length, length, temperature, seed=seed_of(*seed))


def _answers(decoder: Decoder, prompts: Sequence[Prompt], sampling: Sequence[SamplingParams]) -> list[Sample]:
    tokenizer = decoder.model.tokenizer
    traces, _ = decoder.decode([encode_prompt(tokenizer, prompt.asked) for prompt in prompts], sampling)
    return [
        Sample(r.text, r.annotated, r.stats, as_document(r.trace), r.trace.step[document_order(r.trace)])
        for r in (result(tokenizer, trace) for trace in traces)
    ]


# ------------------------------------------------------------------------------------------------- on disk


def write_records(path: str, records: Sequence[Record]) -> None:
    """Replaces the file."""
    write_jsonl(path, map(dataclasses.asdict, records))


def record_of(tree: dict[str, Any]) -> Record:
    """From a line of the file, for `files.read_jsonl`."""
    samples = tuple(map(_sample_of, tree["samples"]))
    prompt = Prompt(**tree["prompt"])
    prompt = dataclasses.replace(prompt, messages=tuple((role, text) for role, text in prompt.messages))
    return Record(prompt, _sample_of(tree["baseline"]), samples)


def _sample_of(tree: dict[str, Any]) -> Sample:
    dtypes = {"sees": np.uint32}
    fields = {name: np.array(x, dtypes.get(name, np.int32)) for name, x in tree["document"].items()}
    step = np.array(tree["step"], np.int32)
    return Sample(tree["text"], tree["annotated"], Stats(**tree["stats"]), ThreadedTokens(**fields), step)
