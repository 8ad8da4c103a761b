"""Commands as documents show them: whether they could be given, without running them."""

from __future__ import annotations

import importlib.util
import itertools
import pathlib
import re
import shlex

from pasta_jax.config import Config, ConfigError
from pasta_jax.overrides import field_type, load_config, split_overrides
from tests.helpers.commands import ROOT
from tests.test_packaging import SETUP

SOURCES = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "pasta_jax").rglob("*.py"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
FOREIGN = ("pasta_jax.adapters.lm_eval",)
"""Commands with flags of other packages."""


def lines_of(page: str) -> list[str]:
    """What a page shows as commands: lines of its blocks, with what they go on with, and code within its text."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    blocks = [text for language, text in fence.findall(page) if language in ("", "bash")]
    prose = fence.sub("", page)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    return lines + [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def fault_of(line: str) -> str | None:
    """Why a command could not be given, as far as that is seen without running it; None also for other programs."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a piece of text that is no command
        return None
    if words[:1] == ["launch/tpu_run.sh"] and "--" in words:
        return fault_of(shlex.join(words[words.index("--") + 1 :]))
    while words and re.fullmatch(r"(env|[A-Z_]+=\S*)", words[0]):
        words = words[1:]
    if words[:2] == ["python", "-m"] and len(words) > 2 and words[2].partition(".")[0] == "pasta_jax":
        return _fault_of_verb(words[2], words[3:])
    if words[:1] == ["make"]:
        targets = [word for word in words[1:] if "=" not in word]
        unknown = [each for each in targets if not re.search(rf"^{re.escape(each)}:", MAKEFILE, re.MULTILINE)]
        return f"make {unknown[0]}: there is no such target" if unknown else None
    if words[:2] == ["pip", "install"]:
        return _fault_of_install(words[2:])
    return None


def _fault_of_verb(verb: str, words: list[str]) -> str | None:
    if verb == "pasta_jax.NAME":  # any of them
        return None
    if importlib.util.find_spec(verb) is None:
        return f"there is no {verb}"
    if verb in FOREIGN:
        return None
    overrides, rest = split_overrides(words)
    for name in (word[2:].partition("=")[0] for word in rest if re.match(r"--\w", word)):
        if name != "help" and not re.search(rf'"{name}"|"{name.removeprefix("no")}"', SOURCES):
            return f"--{name} is no flag"
    try:
        for name in (word.removeprefix("--config=") for word in rest if word.startswith("--config=configs/")):
            load_config(str(ROOT / name), overrides)
        for path in (each.partition("=")[0] for each in overrides):
            field_type(Config, path)
    except ConfigError as error:
        return str(error)
    return None


def _fault_of_install(words: list[str]) -> str | None:
    files = [file for option, file in itertools.pairwise(words) if option in ("-r", "-c")]
    if missing := [file for file in files if not pathlib.Path(ROOT, file).exists()]:
        return f"there is no {missing[0]}"
    for names in re.findall(r"\.\[([^\]]*)\]", " ".join(words)):
        if unknown := {*names.split(",")} - {*SETUP["extras_require"], "NAME"}:
            return f"there is no extra {', '.join(sorted(unknown))}"
    return None
