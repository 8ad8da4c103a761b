"""Evaluates a model against a sequential baseline on Almanac's held-out prompts.

    python -m pasta_jax.evaluate --ckpt=runs/pasta --baseline=runs/baseline --workdir=runs/evaluation

Both models answer each prompt in turn, at batch 1, through the same engine. Each request is decoded twice and the
second decode is timed (paper section 5.1). The workdir gets a JSONL file of answers for each model, and table.md.
Running the same command again resumes. Of several processes the first does it all, on one device; the others wait.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from pasta_jax import verbs
from pasta_jax.evaluate.compare import compare, table
from pasta_jax.verbs import begin_first, define_loading, define_processes, loading_options, refuse


def main(argv: Sequence[str]) -> None:
    """Runs the command line. A mistake ends in one line and status 2."""
    values = flags.FLAGS
    if len(argv) > 1 or not (values.ckpt and values.baseline):
        refuse("Name both models: --ckpt=runs/pasta --baseline=runs/baseline.")
    begin_first()
    try:
        tests, options = {"PASTA": values.ckpt}, loading_options(values)
        print(table(compare(values.baseline, tests, values.prompts, values.workdir, **options)))
    except (ValueError, OSError) as error:
        refuse(str(error))


def command() -> None:
    """Parses the command line and runs `main`."""
    flags.DEFINE_string("ckpt", None, "Workdir or checkpoint of the model to evaluate.")
    flags.DEFINE_string("baseline", None, "Workdir or checkpoint of the sequential baseline.")
    define_loading()
    flags.adopt_module_key_flags(verbs)  # so that --help shows them
    flags.DEFINE_string("workdir", "runs/evaluation", "Folder of the answers and the table.")
    flags.DEFINE_integer("prompts", 500, "Number of held-out prompts.", lower_bound=1)
    define_processes()
    verbs.run_main(main)


if __name__ == "__main__":
    command()
