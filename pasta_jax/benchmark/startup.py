"""The time from the start of Python to the first token, with and without jax's persistent compilation cache.

Each start is a process of its own. The first finds an empty cache, the second what the first left in it.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from pasta_jax.benchmark.measure import Quartiles, TableRow, log_first, number

PHASES = ("import, s", "model, s", "compile, s", "first token, s", "all, s")

PACKAGE = "package alone, s"
"""The time of `import pasta_jax`, which loads no jax: it should be far below a second."""

IMPORT = "import time; t = time.perf_counter(); import pasta_jax; print(time.perf_counter() - t)"
RUN = "import sys; from pasta_jax.benchmark.startup import report; report(*sys.argv[1:])"


def startup(name: str, dtype: str | None, repeats: int, *, entries: int) -> list[TableRow]:
    """Seconds of each phase of a start, with an empty and with a full cache.

    Args:
      name, dtype: of the model, as `models.model_of` takes them.
      repeats: number of starts with each cache.
      entries: P + S, the pool with the entries that idle lanes write.
    """
    found: dict[str, list[dict[str, float]]] = {"empty": [], "full": []}
    for repeat in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            for label, starts in found.items():
                starts.append(_start(cache, name, dtype, entries))
                if not repeat:
                    log_first(f"startup, {label} cache", f"{number(starts[0][PHASES[-1]])} s", repeats)
    return [
        {
            "cache": label,
            **{name: Quartiles.of([start[name] for start in starts]) for name in (*PHASES, PACKAGE)},
        }
        for label, starts in found.items()
    ]


def _start(cache: str, name: str, dtype: str | None, entries: int) -> dict[str, float]:
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # another process may hold memory of the same accelerator
        "PYTHONPATH": os.pathsep.join(filter(None, [_package_home(), os.environ.get("PYTHONPATH")])),
    }
    arguments = [name, dtype or "", str(entries), repr(time.time())]
    phases = json.loads(_python(env, RUN, *arguments))
    return {**phases, PACKAGE: float(_python(env, IMPORT))}


def _python(env: dict[str, str], code: str, *arguments: str) -> str:
    """The last line that a fresh Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"A start failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout.splitlines()[-1]


def _package_home() -> str:
    import pasta_jax

    return os.path.dirname(os.path.dirname(os.path.abspath(pasta_jax.__file__)))


def report(name: str, dtype: str, entries: str, started: str) -> None:
    """Runs in the started process: answers one request with one token, and prints its seconds as JSON.

    `started` is the time at which the process was started, in seconds since 1970.
    """
    marks: list[float] = [float(started)]

    def mark() -> None:
        marks.append(time.time())

    import jax

    from pasta_jax.benchmark.models import model_of
    from pasta_jax.benchmark.replay import PROMPT
    from pasta_jax.decoding.engine import Decoder
    from pasta_jax.decoding.request import SamplingParams
    from pasta_jax.decoding.state import Limits
    from pasta_jax.kept import keep_compiled

    keep_compiled(os.environ["JAX_COMPILATION_CACHE_DIR"])
    mark()
    model: Any = model_of(name, dtype or None)
    jax.block_until_ready(model.params)
    mark()
    decoder = Decoder(model, limits=Limits(lanes=8, threads=16, pool=int(entries) - 8))
    prompt = model.tokenizer.encode_prompt(PROMPT)
    _, timing = decoder.decode([prompt], [SamplingParams(max_new_tokens=1)])
    mark()
    imported, loaded, decoded = (after - before for before, after in itertools.pairwise(marks))
    seconds = (imported, loaded, decoded - timing.wall_s, timing.wall_s, marks[-1] - marks[0])
    print(json.dumps(dict(zip(PHASES, seconds))))
