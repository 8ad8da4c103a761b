"""The independence audit: its two views, what blocks lose, and the annotator that it makes."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from absl import flags

from pasta_jax import visibility
from pasta_jax.annotate import audited, auditing
from pasta_jax.annotate.__main__ import RULE_FLAGS, options_of
from pasta_jax.annotate.annotators import MAX_LOSS, AnnotatorError, Options, make_annotator
from pasta_jax.annotate.audit import Auditor, Part
from pasta_jax.annotate.itself import DOES_NOT_PAY, NEEDS, WAITS, SelfAudit
from pasta_jax.annotate.protocol import Annotated, Estimating, Item
from pasta_jax.annotate.sequential import that_pay
from pasta_jax.arrays import ThreadedTokens
from pasta_jax.data import almanac
from pasta_jax.data.records import Problem, read
from pasta_jax.decoding.model import Model
from pasta_jax.endpoint.flags import define_endpoint
from pasta_jax.files import write_jsonl
from pasta_jax.lang.assemble import assemble
from pasta_jax.lang.parse import parse
from pasta_jax.lang.program import Program, Promise
from pasta_jax.lang.render import render
from pasta_jax.loading import load
from pasta_jax.testing import WordTokenizer
from pasta_jax.tokens.cost import theoretical_speedup
from pasta_jax.tokens.layout import layout_example
from pasta_jax.tokens.views import is_text, with_siblings, without_siblings
from tests.helpers import only_full
from tests.helpers.models import TINY, random_params


def block(topic: str, text: str, tens: int = 1) -> str:
    return f'<promise topic="{topic}" tokens={tens} /><async>{text}</async>'


NILE = " the river Nile flows north through Egypt"
RHINE = " the river Rhine flows west past Basel"
LENA = " the Lena is not as long as the Nile or Rhine in Egypt"
THREE = f"Rivers:{block('Nile', NILE)} and{block('Rhine', RHINE)} and{block('Lena', LENA)}"
ENDS = f"{block('Nile', NILE)}{block('Rhine', RHINE)}"
WORDS = WordTokenizer(
    f"Name some rivers. Rivers: and{NILE}{RHINE}{LENA} Both flow: Nile, Rhine, Egypt, Basel, west"
)
VOCABULARY = WORDS.vocabulary
SURE, UNSURE = math.log(0.9), math.log(0.01)


def lay_out(answer: str) -> ThreadedTokens:
    return layout_example(WORDS, "Name some rivers.", parse(answer, max_depth=2))


class Copying(Auditor):
    """A model that is sure of what it sees somewhere, and of nothing else: its losses can be counted by hand."""

    @property
    def _forward(self) -> Any:
        def forward(_: Any, fields: dict[str, Any]) -> np.ndarray:
            batch = ThreadedTokens(**{name: np.asarray(field) for name, field in fields.items()})
            is_seen = batch.token[:, None, :] == batch.target[:, :, None]
            return np.where((visibility.visible(batch, batch) & is_seen).any(-1), SURE, UNSURE)

        return forward


COPYING = Copying(Model({}, TINY, WORDS), rows=2, length=128, threads=16)


def lost(words: int) -> float:
    """Nats that this many words lose."""
    return words * (SURE - UNSURE)


def audit(*answers: str, auditor: Auditor = COPYING) -> list[list[Part]]:
    programs = [parse(answer, max_depth=2) for answer in answers]
    return auditor.audit([(auditor.document("Name some rivers.", program), program) for program in programs])


# ----------------------------------------------------------------------------------------------------- views

INNER = f" the{block('Nile', NILE)}{block('Rhine', RHINE)}<sync/> flow"
NESTED = f"Rivers:{block('two', INNER)}{block('Lena', LENA)}"


@pytest.mark.parametrize("answer", [THREE, f"{THREE}<sync/> Both flow", NESTED])
def test_the_views_differ_in_visibility_alone(answer: str) -> None:
    document = lay_out(answer)
    sequential, threaded = with_siblings(VOCABULARY, document), without_siblings(VOCABULARY, document)
    for name in ("token", "target", "position", "doc", "thread"):
        np.testing.assert_array_equal(getattr(sequential, name), getattr(threaded, name), err_msg=name)
    text = is_text(VOCABULARY, document)
    assert VOCABULARY.text(document.token[text].tolist()) == "Name some rivers.\n" + assemble(
        parse(answer, max_depth=2)
    )
    np.testing.assert_array_equal(sequential.position[text], np.arange(text.sum()), err_msg="as plain text")

    both = text[:, None] & text[None]
    in_order = np.tril(np.ones_like(both))
    for view, expected in ((sequential, in_order), (threaded, visibility.visible(document, document))):
        sees = visibility.visible(view, view)
        np.testing.assert_array_equal(sees[both], expected[both])
        assert not sees[text][:, ~text].any(), "a tag is in view"
        assert sees.diagonal().all()


# ---------------------------------------------------------------------------------------------------- losses


def test_a_block_loses_what_only_its_siblings_tell() -> None:
    [parts] = audit(THREE)
    blocks = [part for part in parts if part.is_block]
    first, second, third = blocks
    # The first word of each, " the", is predicted from a tag, and its topic is known from the promise.
    assert (first.unseen, first.tokens, first.loss) == (0, 7 - 2, 0.0)
    assert second.unseen == len(WORDS.encode(NILE)) and second.tokens == 7 - 2
    assert second.loss == pytest.approx(lost(2)), "river, flows"
    assert third.unseen == len(WORDS.encode(NILE + RHINE)) and third.tokens == 13 - 2
    assert third.loss == pytest.approx(lost(3)), "Nile, Rhine, Egypt; its second `the` it says itself"
    assert third.per_token == pytest.approx(lost(3) / 11)
    assert third.worst.endswith(" Nile") and third.worst in assemble(parse(THREE))
    assert [part.topic for part in parts if not part.is_block] == [], "` and` is predicted from a tag"


def test_text_beside_open_branches_is_measured_and_after_a_sync_it_loses_nothing() -> None:
    without, with_sync = audit(f"{ENDS} Both flow: Nile, Egypt", f"{ENDS}<sync/> Both flow: Nile, Egypt")
    [text] = [part for part in without if not part.is_block]
    assert (text.branch, text.loss) == (2, pytest.approx(lost(2)))
    assert not [part for part in with_sync if not part.is_block and part.unseen]


def test_an_answer_is_judged_alike_in_any_company() -> None:
    alone = audit(THREE)
    assert audit(ENDS, "Rivers", THREE, NESTED)[2] == alone[0]


def test_answers_that_cannot_be_laid_out_are_refused() -> None:
    short = dataclasses.replace(COPYING, length=16)
    with pytest.raises(ValueError, match="more than the 16 tokens of a row"):
        short.document("Name some rivers.", parse(THREE))


@pytest.fixture(scope="module")
def tiny() -> Auditor:
    """A real model with random parameters."""
    config = dataclasses.replace(TINY, vocab_size=len(VOCABULARY))
    return Auditor(Model(random_params(config, np.random.default_rng(0)), config, WORDS), 2, 64)


def test_in_a_model_the_mask_alone_makes_the_difference(tiny: Auditor) -> None:
    """What is not seen changes nothing, and where nothing is hidden the two passes agree to the bit."""
    both = block("Nile", NILE + " north") + block("Rhine", RHINE + " and Basel")
    swapped = block("Rhine", RHINE + " and Basel") + block("Nile", NILE + " north")
    found, other = audit(both + block("Lena", LENA), swapped + block("Lena", LENA), auditor=tiny)
    assert [found[0].loss, other[0].loss] == [0.0, 0.0], "the first block has no sibling before it"
    assert found[1].loss and found[2].loss

    documents = [
        tiny.document("Name some rivers.", parse(answer + block("Lena", LENA))) for answer in (both, swapped)
    ]
    last = (documents[0].thread == 3) & is_text(VOCABULARY, documents[0])
    forward = tiny._forward
    for view, same in ((without_siblings, True), (with_siblings, False)):
        scores = [
            np.asarray(
                forward(
                    tiny.model.params, {n: np.stack([f, f]) for n, f in padded(view(VOCABULARY, d)).items()}
                )
            )
            for d in documents
        ]
        a, b = (score[0, : len(last)][last] for score in scores)
        assert np.array_equal(a, b) == same, view.__name__


def padded(document: ThreadedTokens, length: int = 64) -> dict[str, np.ndarray]:
    """The fields of a document in a row of this length."""
    return {
        name: np.concatenate([field, np.zeros((length - len(document), *field.shape[1:]), field.dtype)])
        for name, field in document.fields().items()
    }


@only_full
def test_it_separates_steps_of_chains_from_items_of_lists_and_prose() -> None:
    """With the base model of `make almanac`, which knows the texts and no tags."""
    folder = pathlib.Path(__file__).parents[1] / "runs" / "almanac" / "base"
    if not folder.exists():
        pytest.skip(f"{folder} is not there; `make almanac` trains it")
    model = load(folder)
    auditor = Auditor(model, rows=8, length=512, threads=16)
    tasks = [task for task in almanac.evaluation_tasks(140) if task.family in ("chain", "list", "prose")]
    programs = []
    for task in tasks:
        program = almanac.annotate_exactly(task, lambda text: len(model.tokenizer.encode(text)))
        if task.family == "chain":
            steps = zip(
                task.steps, task.plan.nodes, strict=True
            )  # named as items of lists are, by what they tell of
            program = Program(tuple(Promise(step.after, 1, (node,)) for step, node in steps))
        programs.append((auditor.document(task.prompt, program), program))
    losses: dict[bool, list[float]] = {True: [], False: []}
    for task, parts in zip(tasks, auditor.audit(programs), strict=True):
        losses[task.family == "chain"] += [part.per_token for part in parts if part.is_block and part.unseen]
    needy, free = np.array(losses[True]), np.array(losses[False])
    more = needy[:, None] - free
    assert np.mean((more > 0) + 0.5 * (more == 0)) > 0.99, "the area under the ROC curve"
    assert np.mean(needy > MAX_LOSS) > 0.97 and np.mean(free > MAX_LOSS) < 0.03


# ------------------------------------------------------------------------------------------------- annotator


def itself(max_loss: float = 10.0, min_speedup: float = 0.1) -> SelfAudit:
    def rule(prompt: Any, answer: str) -> Annotated:
        [found] = [each for each in CANDIDATES if assemble(parse(each)) == answer]
        return Annotated(parse(found), ("a note",))

    return SelfAudit(rule, COPYING, WORDS, max_loss=max_loss, min_speedup=min_speedup, chunk=2)


NEEDY = " the Lena Nile Egypt Rhine Basel"
LIMIT = lost(2) / 4
"""The Rhine, which takes two words of five from the Nile, is below; what says little of its own is above."""

CANDIDATES = (
    f"Rivers:{block('Nile', NILE)} and{block('Rhine', RHINE)} and{block('Lena', NEEDY)}",
    f"{ENDS}{block('Basel', ' west west west')} Both flow: {NILE + RHINE}",
    "Rivers: and",
)


def annotated(*options: float) -> Iterator[tuple[str, Annotated]]:
    items = [Item(str(i), "Name some rivers.", assemble(parse(each))) for i, each in enumerate(CANDIDATES)]
    results = {result.key: result for result in itself(*options).annotate_all(items)}
    assert [*results] == ["0", "1", "2"]
    for item in items:
        found = results[item.key].annotated
        assert found is not None and assemble(found.program) == item.answer
        yield render(found.program), found


def test_blocks_that_need_siblings_stay_sequential() -> None:
    (three, notes), (waits, more), (plain, _) = annotated(LIMIT)
    assert three == CANDIDATES[0].replace(block("Lena", NEEDY), f"<sync/>{NEEDY}")
    assert notes.notes == ("a note", NEEDS)
    assert "<sync/> Both flow" in waits and waits.count("<promise") == 3 and WAITS in more.notes
    assert plain == "Rivers: and"
    (strict, notes), _, _ = annotated(0.1, 1.1)
    assert "<promise" not in strict and notes.notes == ("a note", NEEDS, NEEDS, DOES_NOT_PAY)
    (lax, notes), _, _ = annotated(100)
    assert lax == CANDIDATES[0] and notes.notes == ("a note",)


def test_topics_that_are_too_long_are_shortened_first() -> None:
    answer = f"Rivers:{block('Nile', 3 * NILE, 2)}{block('Rhine', 3 * RHINE, 2)}"
    long = answer.replace('"Rhine"', '"Rhine Rhine Rhine Rhine"')
    twice = SelfAudit(lambda *_: Annotated(parse(long)), COPYING, WORDS, max_loss=100)
    [result] = twice.annotate_all([Item("0", "Name some rivers.", assemble(parse(answer)))])
    assert result.annotated is not None
    assert render(result.annotated.program) == answer.replace('"Rhine"', '"Rhine Rhine Rhine"')


def test_promises_that_do_not_pay_go() -> None:
    lonely = f"Rivers:{block('Nile', NILE)}<sync/>{RHINE}"
    assert that_pay(WORDS, parse(lonely), 0) == (parse(f"Rivers:{NILE}{RHINE}"), 1)
    inside = f"{block('two', lonely)}{block('Rhine', RHINE)}"
    assert render(that_pay(WORDS, parse(inside, max_depth=2), 0)[0]).count("<promise") == 2
    long = f"Rivers:{block('Nile', 6 * NILE, 4)}{block('Rhine', 6 * RHINE, 4)}"
    assert that_pay(WORDS, parse(long)) == (parse(long), 0)
    short = long + 20 * f" and{block('Lena', ' west')}"
    speedup = theoretical_speedup(WORDS, parse(short))
    program, fewer = that_pay(WORDS, parse(short), 1.2 * speedup)
    assert render(program).startswith(long) and 0 < fewer <= 10, "the shortest go first"
    assert theoretical_speedup(WORDS, program) >= 1.2 * speedup
    assert that_pay(WORDS, parse(long), min_speedup=5)[1] == 2, "not fast enough"


def test_an_answer_that_does_not_fit_is_declined() -> None:
    short = dataclasses.replace(itself(), auditor=dataclasses.replace(COPYING, length=16))
    [result] = short.annotate_all([Item("0", "Name some rivers.", assemble(parse(CANDIDATES[0])))])
    assert result.annotated is None and "16 tokens" in result.declined


# ---------------------------------------------------------------------------------------------------- report


def test_the_audit_of_a_file_resumes_and_reports(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = [THREE, "Rivers", f"{ENDS} Both flow: Nile, Egypt", " ".join([THREE] * 4), ENDS]
    data, folder = tmp_path / "own.jsonl", tmp_path / "out"
    write_jsonl(data, [{"prompt": "Name some rivers.", "response": answer} for answer in answers])
    monkeypatch.setattr(audited, "CHUNK", 2)
    asked: list[int] = []

    class Counting(Copying):
        def audit(self, answers: Any) -> list[list[Part]]:
            asked.append(len(answers))
            return super().audit(answers)

    auditor = Counting(COPYING.model, rows=1, length=128)

    def run(about: str = "this") -> list[audited.Audited]:
        asked.clear()
        return audited.audit_file(auditor, read(data), str(folder), {"what": about})

    whole = run()
    assert [(each.line, bool(each.fault)) for each in whole] == [
        (1, False),
        (3, False),
        (4, True),
        (5, False),
    ]
    assert sum(asked) == 3
    lines = (folder / "audit.jsonl").read_text().splitlines(keepends=True)
    (folder / "audit.jsonl").write_text("".join(lines[:2]) + lines[2][:40])
    assert run() == whole and sum(asked) == 1, "one line was cut short, one missing"
    with pytest.raises(ValueError, match=r"has another audit: what was 'this' and is 'another model' now"):
        run("another model")
    assert run() == whole and sum(asked) == 0

    text = audited.write_report(whole, str(folder), LIMIT - 0.5, "own.jsonl")
    assert (folder / "audit.md").read_text() == text
    assert (folder / "audit.png").stat().st_size > 5000
    assert "3 answers with promises were audited. 4 of their blocks have siblings" in text
    assert "1 answers could not be audited" in text and "tokens of a row" in text
    [worst] = [line for line in text.splitlines() if line.startswith("| 1 ")]
    assert "2 Rhine" in worst and f"{lost(2) / 5:.2f}" in worst and worst.rstrip(" |").endswith("river")
    assert "75.0%" in text, "of four blocks the Lena is below the limit"

    (folder / "audit.png").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(audited, "can_draw", lambda what: False)
        text = audited.write_report(whole, str(folder), LIMIT - 0.5, "own.jsonl")
    assert (folder / "audit.md").read_text() == text and "audit.png" not in text


def test_records_that_cannot_be_read_are_counted_by_reason(tmp_path: pathlib.Path) -> None:
    problems = [Problem("own.jsonl", line, None, f"no JSON in {line}", "{", "JSON") for line in (1, 2)]
    for _ in range(2):
        found = audited.audit_file(COPYING, problems, str(tmp_path), {})
        assert [(each.line, each.fault) for each in found] == [(n, "not readable: JSON") for n in (1, 2)]
    assert "- 2: not readable: JSON" in audited.report(found, 1.0, "own.jsonl")


def test_forks_of_apar_are_audited_too(tmp_path: pathlib.Path) -> None:
    answer = f"Rivers:<promise/><async>{NILE}</async> and<promise/><async>{RHINE}</async>"
    write_jsonl(tmp_path / "own.jsonl", [{"prompt": "Name some rivers.", "response": answer}])
    found = audited.audit_file(COPYING, read(tmp_path / "own.jsonl", dialect="apar"), str(tmp_path), {})
    assert [part.branch for each in found for part in each.measured if part.is_block] == [2]


def test_the_command_audits_a_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    values, data, folder = flags.FlagValues(), tmp_path / "own.jsonl", tmp_path / "out"
    auditing.define(values)
    for name in ("input", "output", "turns"):
        flags.DEFINE_string(name, "all", "", flag_values=values)
    flags.DEFINE_integer("length", 128, "", flag_values=values)
    write_jsonl(data, [{"q": "Name some rivers.", "a": THREE}])
    asked: list[Any] = []

    def loaded(path: str, **options: Any) -> Model:
        asked.append((path, options))
        return COPYING.model

    monkeypatch.setattr("pasta_jax.loading.load", loaded)
    monkeypatch.setattr("pasta_jax.annotate.itself.Auditor", Copying)

    def run(*words: str) -> str:
        values(
            [
                "annotate",
                f"--input={data}",
                f"--output={folder}",
                "--ckpt=hf:org/name",
                "--dtype=float32",
                *words,
            ]
        )
        return auditing.audit(values, {"prompt": "q", "response": "a"}, {"input": str(data)})

    assert run().startswith("1 answers with promises were audited. 2 of their blocks have siblings")
    assert asked == [("hf:org/name", {"dtype": "float32", "extend_tokenizer": True})]
    about = json.loads((folder / "about.json").read_text())
    assert about["ckpt"] == "hf:org/name" and about["length"] == 128
    (folder / "audit.jsonl").write_text((folder / "audit.jsonl").read_text().replace("Lena", "kept"))
    run("--max_loss=1.5")
    assert "above 1.5" in (folder / "audit.md").read_text(), "another limit needs no other audit"
    assert "kept" in (folder / "audit.jsonl").read_text()
    for other in ("--length=256", "--dialect=apar"):
        with pytest.raises(ValueError, match="has another audit: .*Remove it, or give another --output"):
            run("--length=128", "--dialect=pasta", other)
    assert "kept" in (folder / "audit.jsonl").read_text()
    folder = tmp_path / "apar"
    write_jsonl(data, [{"q": "Some rivers.", "a": f"Rivers:<promise/><async>{NILE}</async>"}])
    assert run("--length=128", "--dialect=pasta").startswith("0 answers")
    assert "- 1: not readable: " in (folder / "audit.md").read_text() and "--dialect=apar" in caplog.text


@pytest.mark.parametrize(("given", "limit"), [({}, MAX_LOSS), ({"max_loss": 0.0}, 0.0)])
def test_no_loss_at_all_may_be_asked_for(
    given: dict[str, Any], limit: float, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pasta_jax.annotate.itself.auditor_of", lambda *_: COPYING)
    made = make_annotator("self", Options(WORDS, str(tmp_path), flags={"ckpt": "W", **given}))
    assert isinstance(made, SelfAudit) and made.max_loss == limit


def test_candidates_that_are_asked_for_are_estimated_first(tmp_path: pathlib.Path) -> None:
    """And a run whose candidates come from elsewhere, or hotter, is another run."""
    values = flags.FlagValues()
    auditing.define(values)
    define_endpoint(values)
    for name in ("input", "annotator", "turns", *RULE_FLAGS):
        flags.DEFINE_string(name, "", "", flag_values=values)

    def given(*words: str) -> dict[str, Any]:
        values.unparse_flags()
        values(["annotate", "--base_url=http://127.0.0.1:9/v1", "--model=m", "--ckpt=hf:org/name", *words])
        return options_of(values)

    for name in ("--annotator=llm", "--annotator=self"):
        asking = given(name, "--candidates=llm")
        for change in ("--base_url=http://127.0.0.1:8/v1", "--model=n", "--temperature=0.5"):
            assert given(name, "--candidates=llm", change) != asking
    rule = given("--annotator=self", "--candidates=rule:structure", "--base_url=http://127.0.0.1:8/v1")
    assert "base_url" not in rule and "base_url" not in given("--annotator=rule:structure")

    given("--annotator=self", "--candidates=llm", "--dry_run=1")
    options = Options(WORDS, str(tmp_path), flags=values.flag_values_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pasta_jax.annotate.itself.auditor_of", lambda *_: COPYING)
        made = make_annotator("self", options)
        assert isinstance(made, Estimating) and made.status() == "0 requests"
        shown = made.estimate([Item("1", "Name some rivers.", THREE)], shown=1)
        assert "About 2 requests would be sent" in shown and "Name some rivers." in shown
        flags_of_rule = {**options.flags, "candidates": "rule:structure"}
        assert not isinstance(
            make_annotator("self", Options(WORDS, str(tmp_path), flags=flags_of_rule)), Estimating
        )


def test_what_it_cannot_be_made_of_is_refused(tmp_path: pathlib.Path) -> None:
    for given, message in (
        ({}, "add --ckpt=WORKDIR"),
        ({"ckpt": "W", "candidates": "self"}, "--candidates=self proposes nothing"),
        ({"ckpt": "W", "candidates": "rule:apar"}, "--candidates=rule:apar has no syncs"),
        ({"ckpt": "W", "candidates": "rule:none"}, "--annotator='rule:none' is none of"),
    ):
        with pytest.raises(AnnotatorError, match=message):
            make_annotator("self", Options(WORDS, str(tmp_path), flags=given))
    with pytest.raises(ValueError, match="no complete checkpoint"):
        make_annotator("self", Options(WORDS, str(tmp_path), flags={"ckpt": str(tmp_path)}))
