"""Evaluates a model against a sequential baseline on Almanac's held-out prompts.

    python -m pasta_jax.evaluate --ckpt=runs/pasta --baseline=runs/baseline --workdir=runs/evaluation

Both go through the same engine, prompt by prompt in turn, at batch 1; each request is decoded twice and the
second is timed (paper section 5.1). The workdir gets a JSONL file of answers for each model, and table.md.
Running the same command again goes on where it was cut off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags
from tqdm import tqdm

from pasta_jax.data import almanac
from pasta_jax.decoding.api import DecodeResult, result
from pasta_jax.decoding.engine import Decoder, Model, Sampling
from pasta_jax.decoding.state import Limits
from pasta_jax.decoding.trace import as_document, critical_path
from pasta_jax.reports.tables import markdown_table
from pasta_jax.verbs import refuse, show_log

LOG = logging.getLogger("pasta_jax")

LIMITS = Limits(lanes=8, threads=16, pool=448)
GREEDY = Sampling(max_new_tokens=384, max_branch_tokens=256)


@dataclasses.dataclass(frozen=True)
class Answer:
    """One model's answer to one prompt, measured.

    Attributes:
      truth: the judge's score, 0 to 1.
      output_tokens: tokens of the answer, tags included.
      text_tokens: tokens without tags.
      critical_path: decode steps needed with unlimited lanes.
      decode_steps: decode steps taken.
      wall_s: seconds of the second of two decodes, prompt included.
    """

    family: str
    prompt: str
    text: str
    annotated: str
    truth: float
    output_tokens: int
    text_tokens: int
    critical_path: int
    decode_steps: int
    wall_s: float
    stop_reason: str
    issues: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Summary:
    """One row of the table: a family, or all. Speeds are geometric means over prompts (paper section 5.1).

    Attributes:
      truth, baseline_truth: mean scores, 0 to 1.
      theoretical: baseline's tokens / critical path of the test's answer.
      realized: baseline's seconds / test's seconds.
      parallelism: the test's tokens without tags / its critical path.
    """

    name: str
    prompts: int
    truth: float
    baseline_truth: float
    theoretical: float
    realized: float
    parallelism: float


def measure(decoder: Decoder, task: almanac.Task) -> tuple[Answer, DecodeResult]:
    """Decodes a prompt twice, times the second and judges the answer."""
    tokenizer = decoder.model.tokenizer
    prompt = [tokenizer.encode_prompt(task.prompt)]
    decoder.decode(prompt, [GREEDY])
    (trace,), timing = decoder.decode(prompt, [GREEDY])
    decoded = result(tokenizer, trace, timing.wall_s)
    answer = Answer(
        family=task.family,
        prompt=task.prompt,
        text=decoded.text,
        annotated=decoded.annotated,
        truth=almanac.truth(task, decoded.text).score,
        output_tokens=decoded.stats.output_tokens,
        text_tokens=decoded.stats.sequential_steps,
        critical_path=max(1, critical_path(as_document(trace), trace.prompt_length, tokenizer.vocabulary)),
        decode_steps=trace.steps,
        wall_s=timing.wall_s,
        stop_reason=decoded.stop_reason,
        issues=decoded.issues,
    )
    return answer, decoded


def evaluate(
    models: Mapping[str, Model], prompts: int, workdir: str, about: Mapping[str, Any]
) -> dict[str, list[Answer]]:
    """Every model's answers to the same held-out prompts; also written to WORKDIR/NAME.jsonl as they come.

    The models take turns at each prompt, so that what the machine does besides meets them alike. Prompts that
    all of them answered in an earlier call are not asked again.

    Args:
      models: by name.
      prompts: how many.
      workdir: where to write; answers that are there already count if they are of the same `about`.
      about: which models these are, as JSON can hold it.
    """
    os.makedirs(workdir, exist_ok=True)
    tasks = almanac.evaluation_tasks(prompts)
    paths = {name: os.path.join(workdir, f"{name}.jsonl") for name in models}
    decoders = {name: Decoder(model, limits=LIMITS) for name, model in models.items()}
    answers = _answered(tasks, paths, os.path.join(workdir, "about.json"), about)
    done = min(map(len, answers.values()))
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(path, "a", encoding="utf-8")) for name, path in paths.items()}
        quiet = not sys.stderr.isatty()
        bar = tqdm(tasks[done:], initial=done, total=len(tasks), unit="prompt", disable=quiet)
        for number, task in enumerate(bar, done + 1):
            for name, decoder in decoders.items():
                answer, _ = measure(decoder, task)
                answers[name].append(answer)
                print(_line(answer), file=files[name], flush=True)
            if quiet and number % 100 == 0:
                LOG.info("%d of %d prompts", number, len(tasks))
    return answers


def _answered(
    tasks: Sequence[almanac.Task], paths: Mapping[str, str], about_path: str, about: Mapping[str, Any]
) -> dict[str, list[Answer]]:
    """Answers of an earlier call to the first of the tasks, as many as every model has; the files hold no more."""
    found: dict[str, list[Answer]] = {name: [] for name in paths}
    if os.path.exists(about_path):
        with open(about_path, encoding="utf-8") as file:
            if file.read() == _as_json(about):
                found = {name: _read_answers(path) for name, path in paths.items()}
    done = 0
    for task, *given in zip(tasks, *found.values()):
        if any(answer.prompt != task.prompt for answer in given):
            break
        done += 1
    for name, path in paths.items():
        found[name] = found[name][:done]
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            file.writelines(_line(answer) + "\n" for answer in found[name])
        os.replace(path + ".tmp", path)
    with open(about_path, "w", encoding="utf-8") as file:  # last: until then the files may be of other models
        file.write(_as_json(about))
    return found


def _line(answer: Answer) -> str:
    return json.dumps(dataclasses.asdict(answer), ensure_ascii=False)


def _as_json(about: Mapping[str, Any]) -> str:
    return json.dumps(about, indent=2) + "\n"


def _read_answers(path: str) -> list[Answer]:
    """The answers in a file, up to the first line that is none, as one that was cut short."""
    answers: list[Answer] = []
    with contextlib.suppress(OSError, ValueError, TypeError), open(path, encoding="utf-8") as file:
        for line in file:
            fields = json.loads(line)
            answers.append(Answer(**fields | {"issues": tuple(fields["issues"])}))
    return answers


def summarise(baseline: Sequence[Answer], test: Sequence[Answer]) -> list[Summary]:
    """A row for each family, and one for all of them together."""
    families = [*dict.fromkeys(answer.family for answer in test)]
    rows = []
    for name in (*families, "overall"):
        pairs = [(b, t) for b, t in zip(baseline, test, strict=True) if name in (t.family, "overall")]
        rows.append(
            Summary(
                name=name,
                prompts=len(pairs),
                truth=sum(t.truth for _, t in pairs) / len(pairs),
                baseline_truth=sum(b.truth for b, _ in pairs) / len(pairs),
                theoretical=geometric_mean([max(1, b.output_tokens) / t.critical_path for b, t in pairs]),
                realized=geometric_mean([b.wall_s / t.wall_s for b, t in pairs]),
                parallelism=geometric_mean([max(1, t.text_tokens) / t.critical_path for _, t in pairs]),
            )
        )
    return rows


def geometric_mean(ratios: Sequence[float]) -> float:
    """exp(mean(log)).

    >>> round(geometric_mean([1.0, 4.0]), 6)
    2.0
    """
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def table(rows: Sequence[Summary]) -> str:
    """As Markdown."""
    header = [
        "family",
        "prompts",
        "truth: baseline",
        "truth: PASTA",
        "theoretical",
        "realized",
        "parallelism",
    ]
    return markdown_table(
        header,
        [
            [
                row.name,
                str(row.prompts),
                f"{100 * row.baseline_truth:.1f} %",
                f"{100 * row.truth:.1f} %",
                f"{row.theoretical:.2f}x",
                f"{row.realized:.2f}x",
                f"{row.parallelism:.2f}x",
            ]
            for row in rows
        ],
    )


def compare(baseline: str, test: str, prompts: int, workdir: str) -> str:
    """Evaluates the models of two workdirs or checkpoints, writes everything to `workdir`, returns the table.

    Raises:
      CheckpointError: a model that cannot be loaded.
      ValueError: more prompts than there are.
    """
    from pasta_jax.loading import load
    from pasta_jax.training.checkpoints import find

    checkpoints = {"baseline": find(baseline), "pasta": find(test)}
    models = {name: load(path) for name, path in checkpoints.items()}
    # A model may have been trained anew to the same step: then its checkpoint was written at another time.
    about = {
        name: {"checkpoint": os.fspath(path), "written": (path / "pasta" / "pasta.json").stat().mtime}
        for name, path in checkpoints.items()
    }
    answers = evaluate(models, prompts, workdir, about)
    text = table(summarise(answers["baseline"], answers["pasta"]))
    with open(os.path.join(workdir, "table.md"), "w", encoding="utf-8") as file:
        file.write(text + "\n")
    return text


def main(argv: Sequence[str]) -> None:
    """The verb. Mistakes end in one line and status 2."""
    values = flags.FLAGS
    if len(argv) > 1 or not (values.ckpt and values.baseline):
        refuse("Name both models: --ckpt=runs/pasta --baseline=runs/baseline.")
    show_log()
    try:
        print(compare(values.baseline, values.ckpt, values.prompts, values.workdir))
    except (ValueError, OSError) as error:
        refuse(str(error))


def command() -> None:
    """Parses the command line and runs `main`."""
    flags.DEFINE_string("ckpt", None, "Workdir or checkpoint of the model to evaluate.")
    flags.DEFINE_string("baseline", None, "Workdir or checkpoint of the sequential baseline.")
    flags.DEFINE_string("workdir", "runs/evaluation", "Where answers and the table go.")
    flags.DEFINE_integer("prompts", 500, "How many held-out prompts.", lower_bound=1)
    app.run(main)


if __name__ == "__main__":
    command()
