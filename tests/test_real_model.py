"""The recipe of the real model: its steps are commands that exist, done once, and gone on with after a stop."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest
from absl import flags

from pasta_jax.config import Config
from pasta_jax.overrides import load_config
from pasta_jax.real_model import __main__ as recipe
from pasta_jax.real_model.prompts import (
    HINTS,
    PARTS,
    TOPICS,
    WHOLE,
    held_out_prompts,
    topics,
    training_prompts,
)
from tests.helpers.started import ROOT


def test_prompts_of_the_recipe() -> None:
    training, held_out = training_prompts(1500), held_out_prompts(100)
    assert len({asked.question for asked in training}) == 1500
    assert len({asked.prompt for asked in held_out}) == 100
    kept, others = topics(held_out=False), topics(held_out=True)
    for name in TOPICS:
        assert {*kept[name]} | {*others[name]} == {*TOPICS[name]} and not {*kept[name]} & {*others[name]}
    assert {asked.kind for asked in held_out} == {*PARTS, *WHOLE} == {*HINTS}
    assert all(asked.prompt == asked.question for asked in held_out)
    hinted = [asked for asked in training if asked.prompt.endswith(HINTS[asked.kind])]
    assert 0.92 < len(hinted) / len(training) < 0.98
    assert 0.25 < sum(asked.question == asked.prompt for asked in hinted) / len(hinted) < 0.35
    assert all(asked.prompt.startswith(asked.question) for asked in training)
    assert training_prompts(9, seed=1) != training[:9]
    with pytest.raises(ValueError, match=r"The templates give 1,9\d\d prompts, not 5,000"):
        training_prompts(5000)


READ = ("from", "ckpt", "base", "baseline", "prompts", "input", "tokenizer")
WRITTEN = ("to", "output", "workdir")


def configured(step: recipe.Step) -> Config:
    """What a step that trains would train."""
    name, *settings = (word for word in step.words[1:] if not word.startswith("--workdir="))
    return load_config(
        f"{ROOT}/{name.removeprefix('--config=')}", [word.removeprefix("--config.") for word in settings]
    )


def test_every_step_has_what_it_needs() -> None:
    """It reads what an earlier one wrote, and each training run has its variant of the configuration."""
    made: set[str] = {"runs/real"}
    for step in recipe.recipe():
        given = dict(word[2:].partition("=")[::2] for word in step.words if word.startswith("--"))
        reads = [path for name in READ if name in given for path in given[name].split(",")]
        if step.words[0] == "pasta_jax.train":
            config = configured(step)
            reads = [config.init_from, *(name for name, _ in config.data.sources)]
            if config.stage == "preference":
                reads += [
                    config.preference.baseline,
                    config.preference.judge_model,
                    config.preference.prompts,
                ]
        assert {path.removeprefix("gguf:") for path in reads} <= made, step.line
        made |= {given[name] for name in WRITTEN if name in given}
        made |= {f"{path}/round-1" for path in made if path.split("/")[-1] in recipe.LAMBDAS}
        if step.words[0] == "pasta_jax.demo.base":
            made.add(f"{given['to']}/{recipe.GGUF}")
        if step.words[0] == "pasta_jax.real_model.prompts":
            made |= {f"{given['to']}/{name}.jsonl" for name in ("prompts", "held_out")}


def test_elsewhere_and_smaller() -> None:
    steps = recipe.recipe("runs/tenth", scale=0.1, more_prompts="more.json")
    lines = [step.line for step in steps]
    assert not any("runs/real" in line for line in lines)
    assert ["--prompts=more.json" in line for line in lines].index(True) == len(lines) - 1
    assert "--count=150 --held_out=10" in lines[2] and "--timed=8" in lines[-1]
    assert any("--config.preference.prompts_per_round=8" in line for line in lines)
    (copy, *_) = [step for step in recipe.recipe("my runs") if step.words[0] == "sh"]
    assert copy.words[2].startswith(
        "mkdir -p 'my runs/bon-4/round-1' && cp 'my runs/bon-1/round-1'/samples.jsonl"
    )
    for step in steps:
        if step.words[0] == "pasta_jax.train":
            changed = configured(step)
            assert "runs/real" not in json.dumps(dataclasses.asdict(changed))


def test_it_goes_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    fails = {4}

    def run(self: Any) -> int:
        ran.append(self.title)
        return 3 if len(ran) in fails else 0

    monkeypatch.setattr(recipe.Step, "run", run)
    monkeypatch.setattr(recipe, "begin_alone", lambda: None)
    values = flags.FlagValues()
    recipe.define(values)
    values(["real_model", f"--workdir={tmp_path}"])
    with pytest.raises(SystemExit, match="2"):
        recipe.main([""], values=values)
    assert "status 3. The same command goes on from there." in capsys.readouterr().err
    recipe.main([""], values=values)
    titles = [step.title for step in recipe.recipe(str(tmp_path))]
    assert ran == titles[:4] + titles[3:]
    log = (tmp_path / "recipe" / "log.md").read_text()
    assert log.count("\n") == len(titles) + 2 and f"| {titles[0]} | 0 | 20" in log
    ran.clear()
    # A conversion that was cut off between its end and its line is done: it would refuse a folder that is there.
    fails.clear()
    done = tmp_path / "recipe" / "done.jsonl"
    done.write_text("".join(line for line in done.open() if "pasta_jax.convert" not in line))
    (tmp_path / "base").mkdir()
    recipe.main([""], values=values)
    assert ran == [title for title in titles if title.startswith("5 MB: ")] != []
    ran.clear()
    recipe.main([""], values=values)
    assert ran == [] and f"All {len(titles)} steps are done." in capsys.readouterr().out
    values(["real_model", "--more_prompts=none.jsonl"])  # it would be read last, after a night
    with pytest.raises(SystemExit, match="2"):
        recipe.main([""], values=values)
    assert "--more_prompts: there is no file none.jsonl." in capsys.readouterr().err
    values(["real_model", f"--workdir={tmp_path / 'base'}", "--more_prompts="])
    (tmp_path / "base" / "mine").touch()
    with pytest.raises(SystemExit, match="2"):
        recipe.main([""], values=values)
    assert "base holds other files." in capsys.readouterr().err and ran == []
    values(["real_model", f"--workdir={tmp_path}", "--scale=0.1"])  # its answers would be those of scale 1
    with pytest.raises(SystemExit, match="2"):
        recipe.main([""], values=values)
    assert ran == [] and "was begun with another --scale, or by another version" in capsys.readouterr().err


def test_the_page_has_the_commands() -> None:
    lines = {step.line for step in recipe.recipe()}
    page = (ROOT / "docs" / "real-model.md").read_text()
    shown = [
        line
        for line in page.splitlines()
        if line.startswith(("python -m", "sh -c")) and "real_model --w" not in line
    ]
    assert {*shown} <= lines, {*shown} - lines
    verbs = {line.split()[2] for line in lines if line.startswith("python")}
    assert {line.split()[2] for line in shown if line.startswith("python")} == verbs
