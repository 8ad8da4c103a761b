"""Several models on the same prompts: measures prompt by prompt, batches, the page side by side, the audit."""

import collections
import dataclasses
import json
import math
import pathlib
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pasta_jax.annotate.audit import Part
from pasta_jax.annotate.audited import Audited
from pasta_jax.data.prompts import Question, questions_of
from pasta_jax.evaluate import answers, contests, own
from pasta_jax.evaluate.answers import Answered, Batch, key_of
from pasta_jax.evaluate.measures import (
    Measure,
    audit_gap_of,
    measure_of,
    measure_table,
    measures_of,
    pair_table,
    speeds_of,
    win_rate_of,
)
from pasta_jax.evaluate.names import name_of
from pasta_jax.evaluate.report import read_results
from pasta_jax.evaluate.side_by_side import Pair, as_html, as_markdown
from pasta_jax.intervals import Values
from tests.helpers.answers import WORDS

NILE = '- <promise topic="Nile" tokens=1 /><async>It is long</async>\n'
DON = '- <promise topic="Don" tokens=1 /><async>It is < <b>short</b></async>\n<sync/>'


def answered(prompt: str = '"?"', annotated: str = "yes", **fields: Any) -> Answered:
    counts: dict[str, Any] = {"output_tokens": 10, "text_tokens": 10, "critical_path": 10, "wall_s": 1.0}
    counts |= {"promises": annotated.count("<promise"), "stop_reason": "eos"}
    return Answered(prompt, annotated, annotated, **counts | fields)


def words(text: str) -> int:
    return len(text.split())


def test_promises_by_kind_and_lengths_of_whole_answers() -> None:
    written = [
        answered(annotated=NILE + DON),
        answered(annotated=NILE),
        answered(),
        answered(annotated=NILE, stop_reason="length", issues=("branch 1: stopped before its </async>.",)),
        Answered('"?"', error="too long"),
    ]
    kinds = ["list", "single", "story", "story", ""]
    found = measures_of(written, kinds, ("single", "story"), "pasta", words)
    shares = {name: each.interval.mean for name, each in found.items()}
    assert (shares["promising"], shares["promising list"], shares["promising story"]) == (0.6, 1.0, 0.5)
    assert shares["false promises"] == pytest.approx(2 / 3)
    assert found["false promises"].title == "false promises, kind single or story"
    assert shares["branches"] == pytest.approx(4 / 3)
    assert (shares["is_cut"], shares["error"], shares["is_malformed"]) == (0.2, 0.2, 0)
    # 10 tokens were promised for 3, 4 and 3 words; what was cut off had no time for them.
    assert shares["length_error"] == pytest.approx((7 + 6 + 7) / 10)
    assert found["one_marker"].values.below.tolist() == [1, 0, 0, 0, 0]
    assert "numbered" not in found and "promising compare" not in found, "there are none"
    bare = measures_of([answered(annotated="<promise/><async>x</async>")], [""], (), "apar", words)
    assert bare["branches"].interval.mean == 1 and "length_error" not in bare and "false promises" not in bare


def test_speeds_of_what_was_timed_alone_and_together() -> None:
    baseline = [answered(output_tokens=40, wall_s=4.0), answered(output_tokens=90, wall_s=0.0), answered()]
    test = [
        answered(critical_path=20, text_tokens=36, wall_s=2.5),
        answered(critical_path=10, text_tokens=20, wall_s=0.0),
        Answered('"?"', error="too long"),
    ]
    batches = [
        (Batch(tuple(baseline[:2]), 6.0), Batch(tuple(test[:2]), 2.0)),
        (Batch(tuple(baseline[2:]), 9.0), Batch(tuple(test[2:]), 1.0)),  # not full
    ]
    found = speeds_of(baseline, test, batches, rows=2)
    means = {name: each.interval.mean for name, each in found.items()}
    assert means == pytest.approx({
        "theoretical": math.sqrt(2 * 9), "realized": 1.6, "realized together": 3.0, "parallelism": math.sqrt(3.6),
        "efficiency": 0.8,
    })  # fmt: skip
    branched = [dataclasses.replace(test[0], promises=2), *test[1:]]
    apart = {name: each.interval.mean for name, each in speeds_of(baseline, branched).items()}
    assert (apart["efficiency branched"], apart["parallelism branched"]) == pytest.approx((0.8, 1.8))
    assert found["realized"].shown(found["realized"].interval) == "1.60x (n = 1)"
    assert found["realized together"].title == "realized speedup, batch 2"
    assert found["theoretical"].values.below.tolist() == [1, 1, 0]
    assert "realized together" not in speeds_of(baseline, test)


def test_tables_and_what_is_kept_of_them() -> None:
    fast, slow = (
        Measure("realized", "speed", Values(np.log(speeds), np.ones(4)))
        for speeds in ([2.0, 4.0, 2.0, 4.0], [1.0, 2.0, 1.0, 2.0])
    )
    # Twice as fast on each prompt, however the prompts differ; a doubt comes from the one that is not.
    assert fast.less(slow).mean == pytest.approx(2) and math.isnan(fast.less(slow).low)
    other = Measure("realized", "speed", Values(np.log([1.0, 2.0, 1.0, 4.0]), np.ones(4)))
    assert fast.less(other).mean == pytest.approx(2**0.75)
    assert fast.less(other).high == pytest.approx(2 ** (0.75 + 3.182446 / 4), rel=1e-4)
    low = (1.5 - 3.182446 / math.sqrt(12)) * math.log(2)
    assert fast.interval.low == pytest.approx(math.exp(low), rel=1e-4)
    wins = win_rate_of([0.5, None, 1.0, 0.75], "win rate")
    assert wins.interval.mean == 0.75 and wins.values.below.tolist() == [1, 0, 1, 1]
    models = {"base": {}, "fast": {"doubled": wins, "realized": fast}, "slow": {"realized": slow}}
    header, rows = measure_table(models)
    assert header == ["measure", "base", "fast", "slow"] and [row[0] for row in rows] == [
        "realized",
        "win rate",
    ]
    assert rows[0][1] == "" and rows[0][3].startswith("1.41x (") and rows[1][2].startswith("75.0 % (")
    header, rows = pair_table({name: models[name] for name in ("fast", "slow")})
    assert (header, rows) == (["models", "realized"], [["fast against slow", "2.00x"]])
    again = measure_of(json.loads(json.dumps(fast.as_json())))
    assert again.interval == pytest.approx(fast.interval, rel=1e-5) and again.unit == "speed"


def test_the_gap_of_the_audit() -> None:
    def part(tokens: int, loss: float, *, is_block: bool = True, unseen: int = 3) -> Part:
        return Part(1, is_block, "Nile", unseen, tokens, loss, "")

    audited = [
        Audited(3, 0, (part(10, 1.0), part(5, 9.0, is_block=False), part(7, 9.0, unseen=0))),
        Audited(1, 0, (part(30, 1.0),)),
    ]
    gap = audit_gap_of(audited, 4)
    assert gap.values.below.tolist() == [30, 0, 10, 0] and gap.interval.mean == pytest.approx(2 / 40)
    assert gap.shown(gap.interval).startswith("0.050 (")


def test_answers_side_by_side() -> None:
    pairs = [
        Pair(
            "Two\nrivers?",
            "list",
            answered(annotated="Nile"),
            answered(annotated=NILE + DON, critical_path=5),
        ),
        Pair("Code?", "", answered(annotated="```\nx\n```"), Answered('"?"', error="too long")),
    ]
    page = as_markdown(pairs, ("slow", "fast"), "pasta")
    assert "## 1. Two rivers? (list)\n\n**slow**: 10 tokens" in page
    assert "- ⟦1 Nile, 10: It is long⟧\n- ⟦2 Don, 10: It is < <b>short</b>⟧\n⟦sync⟧\n```" in page
    assert "**fast**: 2 branches, 10 tokens, 0 steps, 1.00 s, theoretical 2.00x, realized 1.00x" in page
    assert "````text\n```\nx\n```\n````" in page and "failed: too long" in page
    html = as_html(pairs, ("slow", "fast"), "pasta")
    assert "It is &lt; &lt;b&gt;short&lt;/b&gt;</span>" in html and html.count('class="block"') == 2


def test_prompts_are_answered_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be asked has failed and takes no row; the first of a decoder are decoded twice."""
    asked: list[int] = []

    class Engine:
        def decode(self, prompts: list[list[int]], sampling: list[Any]) -> tuple[list[str], Any]:
            asked.append(len(prompts))
            return [WORDS.vocabulary.text(ids) for ids in prompts], types.SimpleNamespace(wall_s=2.0)

    model: Any = types.SimpleNamespace(tokenizer=WORDS)
    monkeypatch.setattr(answers, "result", lambda tokenizer, trace, wall_s: trace.strip())
    monkeypatch.setattr(answers, "answered", lambda prompt, decoded: Answered(prompt, decoded))
    respondent = answers.Respondent(model, 30, rows=3)
    engines = collections.defaultdict[int, Engine](Engine)
    monkeypatch.setattr(respondent, "decoder", engines.__getitem__)
    questions = [Question(text, None, 1, "") for text in ("rivers", " ", "cities")]
    batch = respondent.together(questions)
    assert [each.text for each in batch.answers] == ["rivers", "", "cities"] and batch.wall_s == 2
    assert [each.error != "" for each in batch.answers] == [False, True, False] and asked == [2, 2]
    respondent.together(questions[:1])
    assert asked == [2, 2, 1] and list(engines) == [64], "one pool, for the longest prompt and its answer"
    assert respondent.together(questions[1:2]).wall_s == 0


def test_adapters_have_the_name_of_their_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / "models" / "small-pasta").mkdir(parents=True)
    assert name_of(tmp_path / "models" / "small-pasta") == "models-small-pasta"
    (tmp_path / "models" / "small-pasta" / "adapter_config.json").touch()
    assert name_of(tmp_path / "models" / "small-pasta") == "small-pasta"


# ---------------------------------------------------------------------------------------------- the whole way

PROMPTS = ["Name rivers.", "Name a river.", "Name cities.", "What is long?", "Tell a story."]


class Fake:
    """In place of `Respondent`: answers by the name of its model, and counts."""

    asked = 0

    def __init__(self, model: str, *sizes: int, sequential: bool = False, **others: Any):
        self.model, self.sequential = model, sequential

    def __call__(self, question: Question) -> Answered:
        Fake.asked += 1
        speed = 1 if self.sequential else len(self.model)
        text = "yes" if self.sequential else NILE + DON
        return answered(key_of(question.prompt), text, critical_path=10 // speed, wall_s=1 / speed)

    def together(self, questions: Sequence[Question]) -> Batch:
        found = tuple(dataclasses.replace(self(question), wall_s=0.0) for question in questions)
        return Batch(found, 3.0 if self.sequential else 2.0)


class Named(str):
    """In place of a model: its name, with a tokenizer."""

    tokenizer = WORDS


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> own.Settings:
    def find(path: Any) -> pathlib.Path:
        return pathlib.Path(path) / "checkpoints" / "7"

    for module in (own, contests):
        monkeypatch.setattr(module, "place_of", find)
        monkeypatch.setattr(module, "load", lambda path, **options: Named(path.parent.parent.name))
        monkeypatch.setattr(module, "identity_of", lambda path: {"checkpoint": str(path)})
    monkeypatch.setattr(own, "Respondent", Fake)
    monkeypatch.setattr(Fake, "asked", 0)
    path = tmp_path / "prompts.jsonl"
    kinds = ["list", "single", "list", "single", "story"]
    path.write_text(
        "".join(json.dumps({"prompt": text, "kind": kind}) + "\n" for text, kind in zip(PROMPTS, kinds))
    )
    return own.Settings("runs/xy", "runs/slow", str(path), {}, str(tmp_path / "out"), 32, {}, rows=2, timed=2)


def test_models_of_one_workdir_side_by_side(settings: own.Settings) -> None:
    questions = questions_of(settings.prompts, {})
    for ckpt in ("runs/xy", "runs/xyz"):
        each = dataclasses.replace(settings, ckpt=ckpt)
        found = own.answer_all([each], questions)[0]
        markdown = contests.write_report(each, found, None, "", None)
    assert (found.timed, len(found.test), [answer.wall_s > 0 for answer in found.test]) == (
        2,
        5,
        [True, True, False, False, False],
    )
    folder, workdir = pathlib.Path(found.folder), pathlib.Path(settings.workdir)
    summary = (workdir / "summary-prompts.md").read_text()
    assert summary.startswith("# 2 models on ") and "The first 2 of 5 prompts are answered" in summary
    for page in (markdown, summary):
        assert "| false promises, kind single or story " in page and "100.0 % (43.9 to 100.0)" in page
        line = next(line for line in page.splitlines() if line.startswith("| realized speedup, batch 1"))
        assert [cell.strip() for cell in line.split("|")[3:5]] == ["2.00x (n = 2)", "3.00x (n = 2)"]
        assert "| realized speedup, batch 2" in page and "1.50x" in page
        assert "| xy-7 against xyz-7 |" in page and "0.67x" in page
    records = [json.loads(line) for line in (folder / "annotated.jsonl").read_text().splitlines()]
    assert records[4] == {"kind": "story", "prompt": PROMPTS[4], "response": NILE + DON}
    assert (folder / "side_by_side.md").read_text().count("## ") == 5
    results = read_results(settings.workdir)
    assert [result.name for result in results] == ["xy-7", "xyz-7"]
    assert all({"theoretical", "false promises"} <= result.measures.keys() for result in results)
    # The same again asks nobody. More at batch 1 asks for these only, and fewer forget none.
    asked = Fake.asked
    assert asked == 2 * (2 * 2 + 2 * 5)
    own.answer_all([each], questions)
    assert Fake.asked == asked
    (more,) = own.answer_all([dataclasses.replace(each, timed=4)], questions)
    assert more.timed == 4 and Fake.asked == asked + 4
    assert own.answer_all([each], questions)[0].timed == 4 and Fake.asked == asked + 4
    assert own.answer_all([dataclasses.replace(each, timed=None, rows=1)], questions)[0].batches == []


def test_several_models_take_turns_with_one_baseline(settings: own.Settings) -> None:
    questions = questions_of(settings.prompts, {})
    several = [dataclasses.replace(settings, ckpt=ckpt) for ckpt in ("runs/xy", "runs/xyz", "runs/xyzt")]
    own.answer_all(several[:2], questions)
    assert Fake.asked == 3 * (2 + 5), "the baseline answered once"
    together = own.answer_all(several, questions)
    assert Fake.asked == (3 + 2) * (2 + 5), "the third asks it again, and nobody else"
    alone = [own.answer_all([each], questions)[0] for each in several]
    assert Fake.asked == (3 + 2) * (2 + 5)
    assert [found.name for found in together] == ["xy-7", "xyz-7", "xyzt-7"]
    for found, same in zip(together, alone):
        assert (found.folder, found.test, found.baseline) == (same.folder, same.test, same.baseline)
        assert found.batches == same.batches and len(found.test) == len(found.baseline) == 5
    # More of one at batch 1 than of the others counts no more of it, for they are compared.
    more = dataclasses.replace(several[0], timed=4)
    own.answer_all([more], questions)
    assert [found.timed for found in own.answer_all(several, questions)] == [2, 2, 2]
    with pytest.raises(ValueError, match=r"--ckpt=runs/xy,runs/xy names a model twice\."):
        own.answer_all([settings, settings], questions)
    # Without a baseline each is its own.
    Fake.asked = 0
    itself = own.answer_all([dataclasses.replace(each, baseline="") for each in several], questions)
    assert Fake.asked == 3 * 2 * (2 + 5)
    assert [found.baseline_name for found in itself] == [f"{found.name}, sequential" for found in itself]


def test_the_audit_of_an_evaluation(settings: own.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []

    def audit_file(auditor: Any, examples: Any, folder: str, about: Any) -> list[Audited]:
        read.extend([auditor, *examples])
        return [Audited(2, 0, (Part(1, True, "Don", 2, 4, 1.0, "long"),))]

    monkeypatch.setattr(contests, "Auditor", lambda model, rows: str(model))
    monkeypatch.setattr(contests, "audit_file", audit_file)
    monkeypatch.setattr(contests, "write_audit", lambda *args: None)
    settings = dataclasses.replace(settings, audit="runs/reader")
    found = own.answer_all([settings], questions_of(settings.prompts, {}))[0]
    audited = contests.audit(settings, found)
    assert read[0] == "reader" and [(example.line, example.prompt) for example in read[1:]] == [
        *enumerate(PROMPTS, 1)
    ]
    assert "| audit gap, nats per token " in contests.write_report(
        settings, found, None, "", None, "", audited
    )
    silent = dataclasses.replace(found, test=found.baseline)
    assert contests.audit(settings, silent) == [], "no promises, and nothing to read"
