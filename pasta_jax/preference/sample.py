"""Sampling: N answers of the policy to each prompt, and one of the baseline, kept as JSONL.

A line holds a prompt, the answer of the data, the baseline's greedy answer and the samples, each with its
trace, from which alone its training document can be had back: text would not do, for a sampled text may be
spelled with other tokens than a tokenizer would choose.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from pasta_jax.arrays import ThreadedTokens
from pasta_jax.config import PreferenceConfig
from pasta_jax.decoding.engine import Decoder, Model, SamplingParams
from pasta_jax.decoding.results import result
from pasta_jax.decoding.state import Limits, Stop
from pasta_jax.decoding.trace import Trace, as_document, critical_path, document_order
from pasta_jax.files import replacing
from pasta_jax.training.signals import Stopped, stop_requests

LOG = logging.getLogger("pasta_jax")

SAY_EVERY_S = 20.0
"""Seconds between lines on how far it is, where nobody sees a progress bar."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question, and the answer that the data gives."""

    text: str
    reference: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """One decoded answer.

    Attributes:
      text: for the reader.
      annotated: as PASTA-LANG.
      output_tokens: tags included.
      text_tokens: tags excluded.
      critical_path: decode steps needed with unlimited lanes.
      stop_reason: "eos", "length" or "cache_full".
      document: the trace in document order, a training document; [n] fields.
      step: int32 [n], the decode step that fed each of its tokens (see `Trace`).
    """

    text: str
    annotated: str
    output_tokens: int
    text_tokens: int
    critical_path: int
    stop_reason: str
    document: ThreadedTokens
    step: np.ndarray


@dataclasses.dataclass(frozen=True)
class Record:
    """What was answered to one prompt."""

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
    """Every prompt's record, those that `path` holds already as they are, the others decoded and appended.

    Args:
      policy: answers N times, at `config.temperature`.
      baseline: answers once, greedily and without promises.
      prompts: the questions.
      config: N and the rest.
      length: tokens that prompt and answer may take together.
      threads: that one answer may have, main included.
      seed: the same one draws the same samples, whatever was there before.
      path: the JSONL file.

    Raises:
      Stopped: by a signal, between two groups of prompts; what was sampled is kept.
    """
    records = [*read_records(path)]
    if {record.prompt for record in records} - {*prompts}:
        records = []
    write_records(path, records)  # a line that was cut short goes
    LOG.info(
        "%d answers to each of %d prompts; %d prompts are done.", config.samples, len(prompts), len(records)
    )
    if len(records) == len(prompts):
        return records

    def decoder(model: Model, lanes: int) -> Decoder:
        return Decoder(
            model, limits=Limits(lanes, threads, length, model.max_depth), rows=config.rows, chunk=64
        )

    plain = _answers(decoder(baseline, lanes=1), prompts, [_greedy(length)] * len(prompts))
    # Rows of a batch wait for the longest: prompts with answers of like length go together.
    order = sorted(range(len(prompts)), key=lambda i: (plain[i].output_tokens, i))
    if [record.prompt for record in records] != [prompts[i] for i in order[: len(records)]]:
        records = []
        write_records(path, records)
    group = max(1, config.rows // config.samples)
    todo = range(len(records), len(prompts), group)
    engine = decoder(policy, config.lanes)
    someone_looks, said_at = sys.stderr.isatty(), time.monotonic()
    with open(path, "a", encoding="utf-8") as file, stop_requests() as request:
        for start in tqdm(todo, unit="group", desc="sampling", disable=not someone_looks):
            here = order[start : start + group]
            wishes = [
                _drawn(length, config.temperature, np.random.SeedSequence([seed, i, j]))
                for i in here
                for j in range(config.samples)
            ]
            drawn = _answers(engine, [prompts[i] for i in here for _ in range(config.samples)], wishes)
            for number, i in enumerate(here):
                mine = drawn[number * config.samples : (number + 1) * config.samples]
                records.append(Record(prompts[i], plain[i], tuple(mine)))
                print(_to_json(records[-1]), file=file, flush=True)
            if request.signal:
                LOG.warning(
                    "%d of %d prompts are sampled. Run the same command again to go on.",
                    len(records),
                    len(prompts),
                )
                raise Stopped(request.signal)
            if not someone_looks and time.monotonic() - said_at > SAY_EVERY_S:
                LOG.info("%d of %d prompts are sampled.", len(records), len(prompts))
                said_at = time.monotonic()
    return records


def _greedy(length: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=length, max_branch_tokens=length, open_bias=float("-inf"))


def _drawn(length: int, temperature: float, seed: np.random.SeedSequence) -> SamplingParams:
    number = int(seed.generate_state(1)[0])
    return SamplingParams(
        max_new_tokens=length, max_branch_tokens=length, temperature=temperature, seed=number
    )


def _answers(decoder: Decoder, prompts: Sequence[Prompt], wishes: Sequence[SamplingParams]) -> list[Sample]:
    tokenizer = decoder.model.tokenizer
    traces, _ = decoder.decode([tokenizer.encode_prompt(prompt.text) for prompt in prompts], wishes)
    return [_answer(decoder.model, trace) for trace in traces]


def _answer(model: Model, trace: Trace) -> Sample:
    decoded = result(model.tokenizer, trace)
    document = as_document(trace)
    return Sample(
        text=decoded.text,
        annotated=decoded.annotated,
        output_tokens=decoded.stats.output_tokens,
        text_tokens=decoded.stats.text_tokens,
        critical_path=max(1, critical_path(document, trace.prompt_length, model.tokenizer.vocabulary)),
        stop_reason=Stop(trace.stop).reason,
        document=document,
        step=trace.step[document_order(trace)],
    )


# ------------------------------------------------------------------------------------------------- at rest


def read_records(path: str) -> Iterator[Record]:
    """The records of a file, up to the first line that is none, as one that was cut short."""
    with contextlib.suppress(OSError, ValueError, KeyError), open(path, encoding="utf-8") as file:
        for line in file:
            tree = json.loads(line)
            yield Record(
                prompt=Prompt(**tree["prompt"]),
                baseline=_answer_from(tree["baseline"]),
                samples=tuple(_answer_from(each) for each in tree["samples"]),
            )


def write_records(path: str, records: Sequence[Record]) -> None:
    """Replaces the file."""
    with replacing(path) as file:
        file.writelines(_to_json(record) + "\n" for record in records)


def _to_json(record: Record) -> str:
    return json.dumps(dataclasses.asdict(record), ensure_ascii=False, default=lambda array: array.tolist())


def _answer_from(tree: dict[str, Any]) -> Sample:
    fields = {
        name: np.array(values, np.uint32 if name == "sees" else np.int32)
        for name, values in tree["document"].items()
    }
    return Sample(**tree | {"document": ThreadedTokens(**fields), "step": np.array(tree["step"], np.int32)})
