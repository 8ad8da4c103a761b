"""Commands, each in a process of its own: a result or one line, no traceback, whatever is asked of them."""

from __future__ import annotations

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import Any

from tests.fuzz import checkpoints, hostile
from tests.fuzz.runner import HERE, Target
from tests.helpers import ONE_DEVICE

VERBS = (
    "pasta_jax",
    *(f"pasta_jax.{verb}" for verb in ("train", "convert", "evaluate", "benchmark", "compile")),
    *("pasta_jax.answer", "pasta_jax.annotate", "pasta_jax.tokenizer", "pasta_jax.prepare"),
    *("pasta_jax.doctor", "pasta_jax.simulate", "pasta_jax.serve", "pasta_jax.demo"),
)
DECODE = ("pasta_jax", "--ckpt=WORKDIR", "--max_new_tokens=9")
ANNOTATE = (
    *("pasta_jax.annotate", "--input=WORKDIR/data.jsonl", "--output=WORKDIR/out.jsonl"),
    *("--annotator=rule:structure", "--tokenizer=almanac"),
)
SIMULATE = ("pasta_jax.simulate", "--step_ms=1:6.65,8:6.97", "--requests=50")
SIMULATED = {
    "step_ms": ("1:0.0000001", "8:7,1:6", "1:1e999", "1:0", "99999999999999999999:3", "x"),
    "rates": ("1e-300", "inf", "nan", "0", "-1", "x", "1,2"),
    "answers": ("WORKDIR/data.jsonl", "no/such", ""),
    "tokenizer": ("almanac", "no/such"),
    **dict.fromkeys(
        ("share", "bound", "prefill_ms", "demand", "dollars_per_chip_hour"), ("0", "1", "nan", "inf")
    ),
    **dict.fromkeys(("rows", "chunk", "chips"), ("0", "1", "99999999999999999999")),
    **dict.fromkeys(("tokens", "branches", "requests", "seed"), ("-1", "0", "1", "1000", "1000000000")),
}
"""Flags of simulate, with their values."""
TRAIN = ("pasta_jax.train", "--workdir=WORKDIR", "--config=configs/tiny.py", "--config.data.rows=2")
OPTIONS = (
    *(
        "--stream",
        "--annotated",
        "--timeline",
        "--mode=both",
        "--grammar=false",
        "--stop=e",
        "--stop=",
        "--open_bias=nan",
    ),
    *(
        "--trace=WORKDIR/t.html",
        "--trace=WORKDIR/t.png",
        "--trace=WORKDIR/no/t.html",
        "--trace=t.txt",
        "--trace=",
    ),
    *(
        "--max_new_tokens=1000000000",
        "--cache_len=99999999999",
        "--max_branches=-1",
        "--lanes=0",
        "--temperature=inf",
    ),
    *(
        "--seed=18446744073709551616",
        "--top_p=0",
        "--top_k=x",
        "--nonsense",
        "--dtype=int4",
        "--quantize=int8",
    ),
)
DATA = "".join(
    f'{{"prompt": "Name {n}.", "response": "Here:\\n\\n- one: {text}\\n- two: {text}\\n"}}\n'
    for n, text in enumerate(("short", "a river that flows past many towns and under old stone bridges " * 3))
)
"""Records, of which one has promises when it is annotated."""
LATE = 240.0


def as_argument(text: str) -> str:
    """Without what no argument of a process can hold: NUL, and half a character."""
    return text.replace("\0", "").encode("utf-8", "ignore").decode("utf-8")


def draw(rng: random.Random) -> Any:
    kind = rng.random()
    damage, stdin = {}, ""
    prompt = rng.choice(
        ("the Nile", "", "caf\udce9", "x" * 3_000, as_argument(str(hostile.text(rng, large=False))))
    )
    words = [*DECODE, prompt]
    if rng.random() < 0.3:
        words, stdin = [*DECODE], prompt
    if kind < 0.15:
        words = [rng.choice(VERBS), "--help"]
    elif kind < 0.3:
        override = rng.choice(
            ("steps=1", "model.num_heads=0", "seed=99999999999999999999", "steps=x", "data.rows=0")
        )
        words = [*TRAIN, f"--config.{override}"]
    elif kind < 0.4:
        names = rng.sample(sorted(SIMULATED), rng.randint(1, 3))
        words = [*SIMULATE, *(f"--{name}={rng.choice(SIMULATED[name])}" for name in names)]
    elif kind < 0.45:
        words = [
            *ANNOTATE,
            f"--keep_plain={rng.choice(('0', '0.5', '1', '1e-9', '-0.1', '1.5', 'nan', 'x'))}",
        ]
    elif kind < 0.65:
        words += rng.sample(OPTIONS, rng.randint(1, 2))
    else:
        name = rng.choice([name for name in checkpoints.files() if name.startswith(checkpoints.NEWEST)])
        damage[name] = hostile.damage(rng)
    return {"words": words, "damage": damage, "reads": rng.choice((None, None, None, 0, 1)), "stdin": stdin}


def check(case: Any) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        workdir = pathlib.Path(temporary, "run")
        shutil.copytree(checkpoints.written(), workdir)
        for name, damage in case["damage"].items():
            checkpoints.hurt(workdir / checkpoints.place(name), damage)
        (workdir / "data.jsonl").write_text(DATA, encoding="utf-8")
        (workdir / "stdin").write_text(case.get("stdin", ""), encoding="utf-8", errors="surrogateescape")
        words = [word.replace("WORKDIR", str(workdir)) for word in case["words"]]
        status, said = run(words, case["reads"], workdir / "stdin")
    assert "Traceback" not in said and "Event loop is closed" not in said, said[-3_000:]
    if "--help" in case["words"]:
        assert status == 0 or (case["reads"] is not None and status == 128 + signal.SIGPIPE), (
            f"status {status}"
        )
    elif case["reads"] is None:
        assert status in (0, 1, 2), f"status {status}: {said[-1_000:]}"
        assert not status or said.strip(), "it does not say why"


def run(words: list[str], reads: int | None, stdin: pathlib.Path) -> tuple[int, str]:
    """Status and stderr of a verb; of its stdout a pipe takes only so many bytes, if a number is given."""
    line = [sys.executable, "-m", *words]
    env = os.environ | {"XLA_FLAGS": ONE_DEVICE}
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with (
        stdin.open("rb") as given,
        subprocess.Popen(line, cwd=HERE.parents[1], env=env, stdin=given, **pipes) as process,
    ):
        assert process.stdout is not None and process.stderr is not None
        try:
            if reads is not None:
                process.stdout.read(reads)
                process.stdout.close()
                said = process.stderr.read()
                process.wait(LATE)
            else:
                _, said = process.communicate(timeout=LATE)
        finally:
            process.kill()
    return process.returncode, said.decode("utf-8", "replace")


TARGET = Target(draw, check, share=2.0, seconds=600.0, cases=0)
