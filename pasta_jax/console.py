"""The console script `pasta`, for those who have installed the package.

`pasta` lists the verbs, `pasta train ...` is `python -m pasta_jax.train ...`, and `pasta decode ...` and
`pasta chat ...` are `python -m pasta_jax ...`.
"""

from __future__ import annotations

import ast
import difflib
import re
import runpy
import sys
from pathlib import Path

from pasta_jax.verbs import refuse

PACKAGE = Path(__file__).parent

OWN = {"decode": "Answers a prompt", "chat": "Holds a conversation on a terminal"}
"""What the package's own module does: with a prompt, and without one."""

VERBS = (
    *(*OWN, "serve", "demo", "almanac"),
    *("annotate", "tokenizer", "prepare", "train", "answer", "evaluate"),
    *("convert", "compile", "simulate", "benchmark", "doctor", "real_model", "reproduce"),
)
"""In the order in which they are listed: to try, to make a model, and the others."""


def module_of(verb: str) -> str:
    """The module that a verb runs.

    >>> module_of("train"), module_of("decode")
    ('pasta_jax.train', 'pasta_jax')
    """
    return "pasta_jax" if verb in OWN else f"pasta_jax.{verb}"


def about(verb: str) -> str:
    """What a verb does, by the first line of its module, which is not imported.

    >>> about("doctor")
    'Says what this machine and this installation lack'
    """
    if verb in OWN:
        return OWN[verb]
    path = PACKAGE / verb
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    first = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").splitlines()[0]
    return re.split(r"[:.](?:\s|$)", first)[0]


def command() -> None:
    """Runs a verb with the words that follow it; without one, lists them."""
    verb, words = (sys.argv[1] if len(sys.argv) > 1 else "help"), sys.argv[2:]
    if verb in ("help", "--help", "-h"):
        width = max(map(len, VERBS))
        lines = [f"  {each:<{width}}  {about(each)}" for each in VERBS]
        print("\n".join(["usage: pasta VERB ...   (pasta VERB --help shows its flags)", "", *lines]))
        return
    if verb == "--version":
        verb, words = "decode", ["--version"]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        refuse(
            f"pasta has no verb {verb}." + (f" Did you mean {close[0]}?" if close else " pasta lists them.")
        )
    sys.argv = [verb, *words]
    runpy.run_module(module_of(verb), run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    command()
