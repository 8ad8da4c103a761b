"""Answers a prompt: `python -m pasta_jax --ckpt=W "List the capitals of France and Peru."`.

Prints the answer; on stderr what it cost and, with --timeline, its threads over time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import app, flags


def main(argv: Sequence[str]) -> None:
    """The verb. Mistakes end in one line and status 2."""
    values = flags.FLAGS
    if len(argv) != 2 or not values.ckpt:
        _refuse(f"Give one prompt and --ckpt=WORKDIR. {__doc__.splitlines()[0]}")
    from pasta_jax import decode, load
    from pasta_jax.reports.timeline import timeline
    from pasta_jax.training.checkpoints import CheckpointError

    try:
        model = load(values.ckpt)
        result = decode(
            model,
            argv[1],
            mode=values.mode,
            max_new_tokens=values.max_new_tokens,
            lanes=values.lanes,
            temperature=values.temperature,
            seed=values.seed,
        )
    except (CheckpointError, ValueError) as error:
        _refuse(str(error))
    print(result.annotated if values.annotated else result.text)
    stats = result.stats
    said = [
        f"{stats.decode_steps} steps for {stats.sequential_steps} tokens of text",
        f"{len(result.branches)} branches",
        f"{stats.wall_s:.3f} s",
    ]
    if stats.measured_speedup:
        said.append(f"{stats.measured_speedup:.2f}x as fast as without promises")
    print(f"[{', '.join(said)}]", file=sys.stderr)
    for issue in result.issues:
        print(f"[{issue}]", file=sys.stderr)
    if values.timeline:
        print(timeline(result), file=sys.stderr)


def _refuse(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(2)


def command() -> None:
    """Parses the command line and runs `main`."""
    flags.DEFINE_string("ckpt", None, "Workdir or checkpoint of the model.")
    flags.DEFINE_enum(
        "mode", "parallel", ["parallel", "sequential", "both"], "How to decode; both times both."
    )
    flags.DEFINE_integer("max_new_tokens", 512, "Most tokens of the answer, tags included.", lower_bound=1)
    flags.DEFINE_integer("lanes", 8, "Threads that decode in the same step.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "0 is greedy.", lower_bound=0.0)
    flags.DEFINE_integer("seed", 0, "Of the drawing.")
    flags.DEFINE_bool("annotated", False, "Print the answer with its tags.")
    flags.DEFINE_bool("timeline", False, "Draw the threads over time.")
    app.run(main)


if __name__ == "__main__":
    command()
