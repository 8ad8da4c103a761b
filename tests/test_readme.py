"""Law 11: every command of the pages for users runs, in the order of a reader, on fewer steps."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import only_full
from tests.helpers.commands import ROOT, python
from tests.helpers.hf_folders import CONFIGS, write_hf_folder

pytestmark = pytest.mark.slow

PAGES = ("README.md", "docs/usage.md", "docs/own-data.md")
SHIPPED = {
    "--ckpt=models/smollm2-135m-pasta --base=runs/demo/base --dtype=float32": "--ckpt=runs/almanac/bon",
    '"models/smollm2-135m-pasta", base="runs/demo/base", dtype="float32"': '"runs/almanac/bon"',
}
"""A tiny model stands in for the shipped one, whose base is not at hand here: test_shipped.py loads that."""

TEXT = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
for shipped, tiny in SHIPPED.items():
    assert shipped in TEXT
    TEXT = TEXT.replace(shipped, tiny)

SHORTER = {
    "pasta_jax": ["--lanes=2"],
    "pasta_jax.answer": ["--lanes=2", "--rows=2", "--max_new_tokens=16", "--samples=2", "--temperature=0.7"],
    **{
        f"configs/tiny.py{which}": ["--config.model.num_layers=1"]
        for which in ("", ":base", ":baseline", ":pasta")
    },
    **{f"configs/own_data.py:{which}": ["--config.model.num_layers=1"] for which in ("baseline", "pasta")},
    "pasta_jax.train": ["--config.steps=2", "--config.data.rows=2"],
    **{
        f"configs/{which}.py:preference": [
            "--config.model.num_layers=1",
            "--config.preference.prompts_per_round=2",
            "--config.preference.samples=4",
            "--config.preference.sampling_rows=8",
            "--config.preference.sampling_lanes=2",
            "--config.preference.rounds=1",
        ]
        for which in ("tiny", "own_data")
    },
    "configs/sft.py": ["--config.epochs=0", "--config.data.length=256"],
    "pasta_jax.evaluate": ["--prompts=2"],
    "--prompts=questions.jsonl": ["--prompts=questions.jsonl", "--max_new_tokens=64"],
    "pasta_jax.almanac": ["--prompts=2"],
    "pasta_jax.compile": ["--pool=256", "--lanes=2"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [split for line in lines if (split := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder as a reader would have it: configs and runs beside each other, and records of one's own."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    record = blocks("json")[0].strip()
    json.loads(record)
    (folder / "mine.jsonl").write_text((record + "\n") * 8, encoding="utf-8")
    (folder / "prompts.jsonl").write_text('{"prompt": "Give the symbol of Iron."}\n', encoding="utf-8")
    (folder / "runs").mkdir()
    plants = next(block for block in blocks("python") if "data.jsonl" in block)
    subprocess.run([sys.executable, "-c", plants], cwd=folder, check=True)
    for name, count in {"data.jsonl": 200, "questions.jsonl": 2}.items():
        lines = (folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:count]), encoding="utf-8")
    write_hf_folder(folder / "my-gemma", CONFIGS["gemma"])
    return folder


def run(workspace: Path, arguments: list[str]) -> str:
    """`python ARGUMENTS`."""
    for_tpus = "pasta_jax.compile" in arguments
    # libtpu refuses the flags of CPUs; and as for users, where jax would look for a TPU.
    env = {"XLA_FLAGS": "", "JAX_PLATFORMS": None} if for_tpus else {}
    done = python(*arguments, cwd=workspace, env=env, seconds=600, real=for_tpus)
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert "Unable to initialize backend" not in done.stderr
    return done.stdout


def chains() -> list[list[list[str]]]:
    """Commands that share folders, in the order of a reader: what the first ones write, the later ones read."""
    chains: list[tuple[set[str], list[int]]] = []
    for i, command in enumerate(commands()):
        folders = {*re.findall(r"\b(?:runs/\w+|my-\w+)", " ".join(command))}
        linked = [chain for chain in chains if chain[0] & folders]
        chains = [chain for chain in chains if chain not in linked]
        numbers = sorted([i, *(earlier for _, numbers in linked for earlier in numbers)])
        chains.append((folders.union(*(theirs for theirs, _ in linked)), numbers))
    return [[commands()[i] for i in numbers] for _, numbers in chains]


def test_the_pages_have_commands():
    assert sum(command[:2] == ["python", "-m"] for command in commands()) >= 7, (
        "the pages lost their commands"
    )


def is_long(chain: list[list[str]]) -> bool:
    return any("runs/own/" in part for command in chain for part in command)


@pytest.mark.parametrize(
    "chain",
    [pytest.param(chain, marks=[only_full] if is_long(chain) else []) for chain in chains()],
    ids=lambda chain: " ".join(chain[0][:4]),
)
def test_every_command(workspace, chain):
    """Installing is what the test run itself did."""
    for command in chain:
        run_command(workspace, command)


def run_command(workspace: Path, command: list[str]) -> None:
    """A line of a page, made shorter."""
    if command[0] == "make":
        done = subprocess.run(["make", "-n", *command[1:]], cwd=ROOT, capture_output=True, check=False)
        assert done.returncode == 0, command
    elif command == ["python", "plants.py"]:
        assert (workspace / "data.jsonl").exists()
    elif command[:2] == ["python", "-m"]:
        named = [command[2], *(part.removeprefix("--config=") for part in command)]
        shorter = [
            *command[1:],
            *(option for name in dict.fromkeys(named) for option in SHORTER.get(name, [])),
        ]
        if any("--ckpt=runs/almanac/" in part for part in command):
            _almanac_model(workspace)
        run(workspace, shorter)
    else:
        assert command[:2] == ["pip", "install"], f"what is this command? {command}"
        assert all((ROOT / part).exists() for part in command if part.endswith(".txt"))


def _almanac_model(workspace: Path) -> None:
    """The model that `make almanac` would have left, of two steps."""
    if (workspace / "runs/almanac/bon").exists():
        return
    train = ["-m", "pasta_jax.train", "--config=configs/tiny.py", "--workdir=runs/almanac/bon"]
    run(workspace, [*train, *SHORTER["configs/tiny.py"], *SHORTER["pasta_jax.train"]])


def test_every_snippet(workspace):
    """In one session: what the first ones define, the later ones use; models that commands make are there."""
    _almanac_model(workspace)
    snippets = [f"{snippet}\nprint('ran', {i})" for i, snippet in enumerate(blocks("python"))]
    code = "\n".join(snippets)
    for chain in chains():  # in this process of several, perhaps, no test has run them
        made = [{*re.findall(r"--(?:to|workdir)=(runs/\S+)", " ".join(command))} for command in chain]
        missing = [
            i
            for i, folders in enumerate(made)
            if any(f'"{folder}"' in code and not (workspace / folder).exists() for folder in folders)
        ]
        for command in chain[: max(missing, default=-1) + 1]:
            run_command(workspace, command)
    said = run(workspace, ["-c", code])
    assert all(f"ran {i}\n" in said for i in range(len(snippets)))
