"""The whole path on the built-in data set: `make almanac`, or `python -m pasta_jax.almanac`.

Trains a base model on Almanac, finetunes a sequential baseline and PASTA from it, improves PASTA by one round
of preference optimization, evaluates all of them on held-out prompts, and shows one answer's threads over time.
It needs two CPU cores, no accelerator and no download. The same command resumes. WORKDIR/table.md gets the
tables of docs/almanac.md, and how they were made.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from absl import flags

from pasta_jax import train
from pasta_jax.benchmark.measure import provenance
from pasta_jax.decoding.model import Model
from pasta_jax.evaluate.compare import compare, overview, table
from pasta_jax.files import replacing
from pasta_jax.overrides import load_config
from pasta_jax.verbs import begin, config_file, refuse, run_main, say

STAGES = {
    "base": "the base model, on facts as plain text and plain instructions",
    "baseline": "Baseline-SFT, from the base, on plain answers",
    "pasta": "PASTA-SFT, from the base, on the same answers with imperfect annotations",
}
"""The models of the first stage, in order: variants of configs/tiny.py, and how their training is announced."""

PREFERENCE = (
    "One round of preference optimization, PASTA-BoN: answers of PASTA-SFT are sampled, scored and paired"
)

LEGEND = """\
Win rate: the judge's, against the baseline. Speeds are geometric means, also against the baseline. Theoretical: its
tokens / the model's longest chain of decode steps. Realized: its seconds / the model's, both through the same
engine, second of two runs.
"""


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        refuse(f"{argv[1]!r} is no flag. --help shows them.")
    from pasta_jax.loading import load

    started = time.monotonic()
    workdir, prompts = flags.FLAGS.workdir, flags.FLAGS.prompts
    paths = {name: os.path.join(workdir, name) for name in (*STAGES, "bon", "evaluation")}
    resumed = os.path.exists(paths["base"])
    begin()
    titles = [
        *(f"Training {what}" for what in STAGES.values()),
        PREFERENCE,
        f"Evaluating on {prompts} held-out prompts, each decoded twice at batch 1",
    ]
    announcements = (f"{number}/{len(titles)}  {title}" for number, title in enumerate(titles, 1))

    for name in STAGES:
        say(next(announcements), started)
        settings = [] if name == "base" else [f"init_from={paths['base']}"]
        train.run(load_config(f"{config_file('tiny.py')}:{name}", settings), paths[name])

    say(next(announcements), started)
    settings = [
        f"init_from={paths['pasta']}",
        f"preference.baseline={paths['baseline']}",
        "preference.rounds=1",
        "preference.prompts_per_round=192",
    ]
    train.run(load_config(f"{config_file('tiny.py')}:preference", settings), paths["bon"])

    say(next(announcements), started)
    tests = {"PASTA-SFT": paths["pasta"], "PASTA-BoN": paths["bon"]}
    rows = compare(paths["baseline"], tests, prompts, paths["evaluation"])

    print(f"\n{table(rows)}\n\n{LEGEND}")
    model = load(paths["bon"])
    show_one_answer(model)
    print(f"\nIn {workdir}: base/, baseline/, pasta/, bon/ are models; evaluation/ has every answer.")
    print(f'Ask it yourself:  python -m pasta_jax --ckpt={paths["bon"]} --timeline "{shown_prompt()}"')
    minutes = f"{(time.monotonic() - started) / 60:.1f} minutes" + (
        ", resumed: of the last session" * resumed
    )
    about = provenance("pasta_jax.almanac", f"{minutes}, training included, installing not")
    with replacing(os.path.join(workdir, "table.md")) as file:
        facts = "".join(f"- {name}: {fact}\n" for name, fact in about.items())
        file.write(f"{overview(rows)}\n\n{table(rows)}\n\n{LEGEND}\n{facts}")
    say(f"Done; the table is in {workdir}/table.md", started)


def shown_prompt() -> str:
    """A held-out prompt with several look-ups and a conclusion that has to wait for them."""
    from pasta_jax.data import almanac

    compared = [task for task in almanac.evaluation_tasks(100) if task.family == "compare"]
    return max(compared, key=lambda task: len(almanac.plain(task))).prompt


def show_one_answer(model: Model) -> None:
    """Decodes one held-out prompt with and without promises, and draws the threads."""
    from pasta_jax.decoding.api import decode
    from pasta_jax.terminal import timeline

    prompt = shown_prompt()
    result, alone = decode(model, prompt, mode="both"), decode(model, prompt, mode="sequential")
    print(f"> {prompt}\n\n{result.annotated}\n")
    print(timeline(result, width=100))
    steps, others = result.stats.decode_steps, alone.stats.decode_steps
    seconds, other_seconds = result.stats.wall_s, result.stats.sequential_wall_s or 0.0
    print(
        f"\n{steps} decode steps with promises, {others} without ({others / steps:.2f}x fewer). "
        f"In seconds, on this machine: {other_seconds / seconds:.2f}x as fast."
    )


def command() -> None:
    """Parses the command line and runs `main`."""
    flags.DEFINE_string("workdir", "runs/almanac", "Folder of all output; the same one resumes.")
    flags.DEFINE_integer("prompts", 280, "Held-out prompts of the evaluation.", lower_bound=1)
    run_main(main)


if __name__ == "__main__":
    command()
