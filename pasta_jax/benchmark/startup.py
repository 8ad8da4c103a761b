"""How long it takes from starting Python to the first token, with and without jax's persistent compilation cache.

Each start is a process of its own; the first finds an empty cache, the others what the first left there.
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

from pasta_jax.benchmark.measure import Point, Spread

PHASES = ("import, s", "model, s", "compile, s", "first token, s", "all, s")

RUN = "import sys; from pasta_jax.benchmark.startup import report; report(*sys.argv[1:])"


def startup(name: str, dtype: str | None, repeats: int, *, pool: int) -> list[Point]:
    """Seconds of each phase of a start, by whether programs were in the cache.

    Args:
      name, dtype: of the model, as `models.model_of` takes them.
      repeats: starts with a full cache; there are as many with an empty one.
      pool: P and the lanes' room.
    """
    cold, warm = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(_start(cache, name, dtype, pool))
            warm.append(_start(cache, name, dtype, pool))
    return [
        {"cache": label, **{phase: Spread.of([start[phase] for start in starts]) for phase in PHASES}}
        for label, starts in (("empty", cold), ("full", warm))
    ]


def _start(cache: str, name: str, dtype: str | None, pool: int) -> dict[str, float]:
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # another process may hold memory of the same accelerator
        "PYTHONPATH": os.pathsep.join(filter(None, [_package_home(), os.environ.get("PYTHONPATH")])),
    }
    arguments = [sys.executable, "-c", RUN, name, dtype or "", str(pool), repr(time.time())]
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"A start failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _package_home() -> str:
    import pasta_jax

    return os.path.dirname(os.path.dirname(os.path.abspath(pasta_jax.__file__)))


def report(name: str, dtype: str, pool: str, begun: str) -> None:
    """What the started process does: answers one request with one token, and prints seconds as JSON.

    `begun` is when the process was started, in seconds since 1970.
    """
    marks: list[float] = [float(begun)]

    def mark() -> None:
        marks.append(time.time())

    import jax

    from pasta_jax.benchmark.models import model_of
    from pasta_jax.benchmark.replay import PROMPT
    from pasta_jax.decoding.engine import Decoder
    from pasta_jax.decoding.request import SamplingParams
    from pasta_jax.decoding.state import Limits

    mark()
    model: Any = model_of(name, dtype or None)
    jax.block_until_ready(model.params)
    mark()
    decoder = Decoder(model, limits=Limits(lanes=8, threads=16, pool=int(pool) - 8))
    prompt = model.tokenizer.encode_prompt(PROMPT)
    _, timing = decoder.decode([prompt], [SamplingParams(max_new_tokens=1)])
    mark()
    imported, loaded, decoded = (after - before for before, after in itertools.pairwise(marks))
    seconds = (imported, loaded, decoded - timing.wall_s, timing.wall_s, marks[-1] - marks[0])
    print(json.dumps(dict(zip(PHASES, seconds))))
