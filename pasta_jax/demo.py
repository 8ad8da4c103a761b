"""The whole path on the embedded benchmark: `make demo`, or `python -m pasta_jax.demo --workdir=runs/demo`.

Trains a base model on Almanac, finetunes a sequential baseline and PASTA from it, improves PASTA by one round
of preference optimisation, evaluates all of them on held-out prompts, and shows one answer's threads over time.
Two CPU cores, no accelerator, no download; every part resumes where it was cut off.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from pasta_jax import train
from pasta_jax.decoding.model import Model
from pasta_jax.evaluate import __main__ as evaluate
from pasta_jax.overrides import load_config
from pasta_jax.verbs import refuse, show_log

CONFIGS = Path(__file__).parent.parent / "configs"
CONFIG = CONFIGS / "tiny.py"

STAGES = {
    "base": "the base model, on facts as plain text and plain instructions",
    "baseline": "Baseline-SFT, from the base, on plain answers",
    "pasta": "PASTA-SFT, from the base, on the same answers with imperfect annotations",
}
"""What is trained, in order, and how it is announced."""


def main(argv: Sequence[str]) -> None:
    """The verb."""
    del argv
    if not CONFIG.exists():
        refuse(
            "The demo needs configs/tiny.py, which is in the repository only. Clone it, and run make demo."
        )
    from pasta_jax.loading import load

    begun = time.monotonic()
    workdir = flags.FLAGS.workdir
    paths = {name: os.path.join(workdir, name) for name in (*STAGES, "bon", "evaluation")}
    show_log()

    for number, (name, what) in enumerate(STAGES.items(), 1):
        say(f"{number}/5  Training {what}", begun)
        start = [] if name == "base" else [f"init_from={paths['base']}"]
        train.run(load_config(f"{CONFIG}:{name}", start), paths[name])

    say(
        "4/5  One round of preference optimisation, PASTA-BoN: PASTA-SFT's answers, sampled, scored and paired",
        begun,
    )
    overrides = [
        f"init_from={paths['pasta']}",
        f"preference.baseline={paths['baseline']}",
        "preference.rounds=1",
        "preference.prompts_per_round=192",
    ]
    train.run(load_config(f"{CONFIG}:preference", overrides), paths["bon"])

    say(f"5/5  Evaluating on {flags.FLAGS.prompts} held-out prompts, each decoded twice at batch 1", begun)
    tests = {"PASTA-SFT": paths["pasta"], "PASTA-BoN": paths["bon"]}
    table = evaluate.compare(paths["baseline"], tests, flags.FLAGS.prompts, paths["evaluation"])

    print(f"\n{table}\n")
    print(
        "win rate: the judge's, against the baseline. Speeds are geometric means, also against the baseline;"
    )
    print(
        "theoretical: its tokens / the model's longest chain of steps; realized: its seconds / the model's, both"
    )
    print("through the same engine, second of two runs.\n")
    show_one_answer(load(paths["bon"]))
    print(
        f"\nIn {workdir}: base/, baseline/, pasta/, bon/ are models; evaluation/ has every answer and this table."
    )
    print(f'Ask it yourself:  python -m pasta_jax --ckpt={paths["bon"]} --timeline "{shown_prompt()}"')
    say("Done", begun)


def shown_prompt() -> str:
    """A held-out prompt with several look-ups and a conclusion that has to wait for them."""
    from pasta_jax.data import almanac

    compared = [task for task in almanac.evaluation_tasks(100) if task.family == "compare"]
    return max(compared, key=lambda task: len(almanac.plain(task))).prompt


def show_one_answer(model: Model) -> None:
    """Decodes one held-out prompt with and without promises, and draws it."""
    from pasta_jax.decoding.api import decode
    from pasta_jax.terminal import timeline

    prompt = shown_prompt()
    result = decode(model, prompt, mode="both")
    print(f"> {prompt}\n\n{result.annotated}\n")
    print(timeline(result, width=100))
    print(
        f"\n{result.stats.decode_steps} decode steps for {result.stats.text_tokens} tokens of text; "
        f"{result.stats.measured_speedup:.2f}x as fast as the same model without promises."
    )


def say(what: str, begun: float) -> None:
    """A line with the time since the beginning."""
    minutes, seconds = divmod(int(time.monotonic() - begun), 60)
    print(f"[{minutes:02}:{seconds:02}] {what}", file=sys.stderr, flush=True)


def command() -> None:
    """Parses the command line and runs `main`."""
    flags.DEFINE_string("workdir", "runs/demo", "Where everything goes; the same one resumes.")
    flags.DEFINE_integer("prompts", 280, "Held-out prompts of the evaluation.", lower_bound=1)
    app.run(main)


if __name__ == "__main__":
    command()
