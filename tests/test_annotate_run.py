"""The annotate command: every layout as it was but for the tags, runs that go on, the border, the report."""

from __future__ import annotations

import collections
import gzip
import json
import pathlib
import subprocess
import tracemalloc
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from pasta_jax.annotate.plain import write_plain
from pasta_jax.annotate.protocol import Annotated, Declined, Item, Messages, Result
from pasta_jax.annotate.report import Tally, _quantiles, one_line, write_report
from pasta_jax.annotate.run import Line, Outcome, RunError, annotate_file, answers_of, journal_of
from pasta_jax.annotate.structure import Structure
from pasta_jax.data.reading import RecordError
from pasta_jax.data.records import Example, Problem, Reader, read
from pasta_jax.files import InUse, locked
from pasta_jax.lang.assemble import assemble
from pasta_jax.lang.parse import parse
from pasta_jax.lang.program import Node, Program, Promise, Text
from pasta_jax.lang.render import render
from pasta_jax.testing import WordTokenizer
from pasta_jax.tokens.tokenizer import TextError
from tests.helpers.commands import python

NILE = "The river flows north through ten dry countries and has fed the fields of Egypt for ages. " * 2
ANSWER = f"Rivers:\n- **Nile**: {NILE}\n- **Rhine**: {NILE}\n\nBoth are long. é🌍"
TOKENIZER = WordTokenizer(ANSWER)
RULE = Structure(TOKENIZER)
ABOUT = {"input": "in", "annotator": "rule:structure"}


def run(
    path: pathlib.Path,
    output: pathlib.Path,
    annotator: Any = RULE,
    about: dict[str, str] = ABOUT,
    **reader: Any,
) -> list[Line]:
    annotate_file(str(path), str(output), annotator, TOKENIZER, Reader(**reader), about, max_branches=15)
    return sorted(journal_of(str(output)), key=lambda line: line.number)


def without_tags(value: Any) -> Any:
    """JSON with every text as its reader gets it."""
    if isinstance(value, dict):
        return {key: without_tags(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_tags(item) for item in value]
    return assemble(parse(value)) if isinstance(value, str) else value


USER, GPT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": ANSWER}
LAYOUTS: dict[str, dict[str, Any]] = {
    "prompt/response": {"prompt": "Hi", "response": ANSWER, "id": 7},
    "Alpaca": {"instruction": "Hi", "input": "there", "output": ANSWER},
    "Dolly": {"instruction": "Hi", "context": "", "response": ANSWER, "category": None},
    "prompt/completion": {"prompt": "Hi", "completion": ANSWER},
    "prompt/completion as messages": {"prompt": [USER], "completion": [GPT]},
    "messages": {"messages": [{"role": "system", "content": "S"}, USER, GPT, USER, GPT]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ANSWER}]},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_comes_out_as_it_was(name: str, tmp_path: pathlib.Path) -> None:
    record = LAYOUTS[name]
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (line,) = run(path, output)
    annotated = json.loads(output.read_text(encoding="utf-8"))
    assert without_tags(annotated) == record and annotated != record
    examples = [each for each in read(output) if isinstance(each, Example)]
    assert len(examples) == len(line.outcomes) == (2 if name == "messages" else 1)
    assert [[p.topic for p in example.program.promises()] for example in examples] == [
        ["Nile", "Rhine"]
    ] * len(examples)
    assert all(outcome.blocks and outcome.syncs == outcome.depth == 1 for outcome in line.outcomes)
    write_plain(str(output), str(tmp_path / "plain.jsonl"), Reader())
    assert json.loads((tmp_path / "plain.jsonl").read_text(encoding="utf-8")) == record


def test_without_tags_an_answer_says_the_same(tmp_path: pathlib.Path) -> None:
    """Also one that speaks of tags; what cannot be read is left out, and a file of nothing else refused."""
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    spelled = Program((Text("Write <sync/> so: "), Promise("a", 1, (Text("<async>"),))))
    answers = [render(spelled), "</async>", "No."]
    records = [{"prompt": "Hi", "response": each, "note": "half a character: \ud83d"} for each in answers]
    path.write_text("\n".join(map(json.dumps, records)))
    assert "2 records without tags; 1 cannot be read" in write_plain(str(path), str(output), Reader())
    first, last = (each for each in read(output) if isinstance(each, Example))
    assert first.program == Program((Text(assemble(spelled)),)) and assemble(last.program) == answers[2]
    path.write_text(json.dumps({"prompt": "Hi", "response": "</async>"}))
    with pytest.raises(RecordError, match="none of 1 records"):
        write_plain(str(path), str(tmp_path / "none.jsonl"), Reader())
    assert not (tmp_path / "none.jsonl").exists()


def test_arrays_archives_and_columns(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "out.jsonl"
    array = tmp_path / "in.json"
    array.write_text(json.dumps([{"q": "Hi", "a": ANSWER}, {"q": "Hi", "a": "No."}], indent=2))
    lines = run(array, output, columns={"prompt": "q", "response": "a"})
    assert [[outcome.reason for outcome in line.outcomes] for line in lines] == [[""], ["no structure"]]
    first, second = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    assert without_tags(first) == {"q": "Hi", "a": ANSWER} and second == {"q": "Hi", "a": "No."}
    packed = tmp_path / "in.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps({"prompt": "Hi", "response": ANSWER}).encode()))
    (line,) = run(packed, tmp_path / "unpacked.jsonl")
    assert not line.outcomes[0].reason


def numbered(count: int) -> list[str]:
    return [json.dumps({"prompt": f"{i}?", "response": ANSWER if i % 3 else f"{i}."}) for i in range(count)]


class Killed(BaseException):
    """As a kill: nothing in the package catches it."""


def dying(after: int) -> Any:
    left = [after]

    def annotator(prompt: str | Messages, answer: str) -> Annotated:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return RULE(prompt, answer)

    return annotator


def test_a_killed_run_goes_on(tmp_path: pathlib.Path) -> None:
    """The output is that of a run that was not killed; nothing is annotated twice but what was under way."""
    path, whole, output = (tmp_path / name for name in ("in.jsonl", "whole.jsonl", "out.jsonl"))
    path.write_bytes(
        "\n".join([*numbered(7), "", "no record\udcff", *numbered(2)]).encode("utf-8", "surrogateescape")
    )
    lines = run(path, whole)
    journal, records = (tmp_path / "out.jsonl.run" / name for name in ("journal.jsonl", "records.jsonl"))
    for torn, damage in enumerate((None, journal, records)):
        with pytest.raises(Killed):
            run(path, output, dying(2))
        assert not output.exists() and len(journal.read_text().splitlines()) == 2 * (torn + 1) - max(
            0, torn - 1
        )
        if damage is not None:  # cut off within its last line
            damage.write_bytes(damage.read_bytes()[:-9])
    asked: list[str] = []

    def last(prompt: str | Messages, answer: str) -> Annotated:
        asked.append(str(prompt))
        return RULE(prompt, answer)

    assert run(path, output, last) == lines
    assert output.read_bytes() == whole.read_bytes() and asked == ["4?", "5?", "6?", "0?", "1?"]
    assert [line.number for line in lines if line.problem] == [9]
    (invalid,) = map(json.loads, pathlib.Path(f"{output}.invalid.jsonl").read_text().splitlines())
    assert invalid["line"] == 9 and invalid["raw"] == "no record\udcff"
    assert run(path, output, dying(0)) == lines, "a complete one is not done again"


def test_what_needs_no_annotator_is_kept_at_once(tmp_path: pathlib.Path) -> None:
    """However many records come before the next plain answer, a kill loses none of them."""
    path, journal = tmp_path / "in.jsonl", tmp_path / "out.jsonl.run" / "journal.jsonl"
    tagged = json.dumps({"prompt": "Hi", "response": render(RULE("Hi", ANSWER).program)})
    path.write_text("\n".join([*numbered(1), tagged, "{}", tagged, *numbered(1)]))
    with pytest.raises(Killed):
        run(path, tmp_path / "out.jsonl", dying(1))
    assert [json.loads(line)["number"] for line in journal.read_text().splitlines()] == [1, 2, 3, 4]


def test_results_may_come_in_any_order(tmp_path: pathlib.Path) -> None:
    class Backwards:
        def annotate_all(self, items: Iterable[Item]) -> Iterator[Result]:
            for item in reversed(list(items)):
                yield Result(item.key, RULE(item.prompt, item.answer))

    path = tmp_path / "in.jsonl"
    path.write_text("\n".join([*numbered(5), json.dumps(LAYOUTS["messages"])]))
    lines = run(path, tmp_path / "a.jsonl"), run(path, tmp_path / "b.jsonl", Backwards())
    assert lines[0] == lines[1]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_other_runs_are_refused(tmp_path: pathlib.Path) -> None:
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text("\n".join(numbered(2)))
    run(path, output)
    with pytest.raises(
        RunError, match=r"out.jsonl is of another run: annotator was 'rule:structure' and is 'x'"
    ):
        run(path, output, about=ABOUT | {"annotator": "x"})
    mine = tmp_path / "mine.jsonl"
    mine.write_text("precious")
    with pytest.raises(RunError, match=r"mine.jsonl exists, and is not of this command. Give another --out"):
        run(path, mine)
    (tmp_path / "same.jsonl").symlink_to(mine)
    for same in (mine, tmp_path / "same.jsonl"):
        with pytest.raises(RunError, match=r"is --input itself. Give another --output"):
            run(mine, same)
    assert mine.read_text() == "precious"
    with locked(f"{tmp_path}/c.jsonl.run"), pytest.raises(InUse):
        run(path, tmp_path / "c.jsonl")


def promised(*nodes: Node) -> Any:
    return lambda prompt, answer: Annotated(Program(nodes))


BLOCK = (Text(NILE),)


def failing(prompt: str | Messages, answer: str) -> Annotated:
    raise KeyError("no\nsuch")


BORDER = [
    # what an annotator returns, and why the answer stays as it was
    (promised(Text(NILE), Promise("a", 1, (Text("x"),))), "the annotator altered the text at character"),
    (
        promised(Promise("a", 4, (Text(NILE[:9]),)), Text(NILE[9:])),
        "validator: the block has fewer than 5 words",
    ),
    (failing, "tests.test_annotate_run:failing failed: KeyError: 'no\\nsuch' (test_annotate_run.py, line "),
    (lambda prompt, answer: answer, "tests.test_annotate_run:<lambda> returned a str, and not an Annotated"),
    (lambda prompt, answer: Annotated(answer), "tests.test_annotate_run:<lambda> failed: AttributeError: "),
    (promised(Promise("a", 3, BLOCK)), "slower than without tags"),
    (promised(Promise('"', 4, BLOCK)), "cannot render the promise '\"': the topic holds"),
    (
        promised(Promise("", 0, BLOCK)),
        "The answer has tags of the apar dialect, the tokenizer those of pasta",
    ),
    (
        promised(Promise("a", 3, (Promise("b", 3, BLOCK),))),
        "validator: a promise nested deeper than max_depth=1",
    ),
]


@pytest.mark.parametrize(("annotator", "reason"), BORDER)
def test_what_an_annotator_may_not_do(annotator: Any, reason: str, tmp_path: pathlib.Path) -> None:
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "response": NILE}) + "\n")
    (line,) = run(path, output, annotator)
    assert line.outcomes[0].reason.startswith(reason)
    assert output.read_text() == path.read_text()


LIMITS = [
    ({}, ""),
    ({"min_speedup": 1.67}, "saves too little time"),
    ({"length": 90}, "longer than a row with its tags"),
    ({"length": 91, "min_speedup": 75 / 45}, ""),
]


@pytest.mark.parametrize(("limits", "reason"), LIMITS)
def test_limits_hold_for_every_annotator(limits: dict[str, Any], reason: str, tmp_path: pathlib.Path) -> None:
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "response": NILE * 2}) + "\n")
    annotator = promised(Promise("a", 3, BLOCK), Text(NILE))
    annotate_file(
        str(path), str(output), annotator, TOKENIZER, Reader(), ABOUT, **{"max_branches": 15} | limits
    )
    (line,) = journal_of(str(output))
    assert line.outcomes[0].reason == reason


def test_a_share_of_the_plain_answers_is_written(tmp_path: pathlib.Path) -> None:
    """All with promises, and of the others as many as asked, in the order of the file."""
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}", "response": NILE * 2}) + "\n" for n in range(9)))
    annotated = promised(Promise("a", 3, BLOCK), Text(NILE))

    def annotator(prompt: Any, answer: str) -> Any:
        if prompt not in ("2", "5", "6"):
            raise Declined("no")
        return annotated(prompt, answer)

    for share, expected in ((0.0, "256"), (0.5, "1256" + "48"), (1.0, "012345678")):
        output = tmp_path / f"{share}.jsonl"
        annotate_file(
            str(path), str(output), annotator, TOKENIZER, Reader(), ABOUT, max_branches=15, keep_plain=share
        )
        prompts = [json.loads(line)["prompt"] for line in output.read_text().splitlines()]
        assert prompts == sorted(expected)


def test_no_annotator_is_asked_about_an_answer_that_cannot_fit(tmp_path: pathlib.Path) -> None:
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps({"prompt": "Hi", "response": NILE * n}) + "\n" for n in (1, 3)))
    assert [item.key for item in answers_of(str(path), Reader(), TOKENIZER, 91)] == ["1:0"]
    asked: list[str] = []

    def annotator(prompt: str | Messages, answer: str) -> Annotated:
        asked.append(answer)
        return Annotated(Program((Text(answer),)))

    annotate_file(str(path), str(output), annotator, TOKENIZER, Reader(), ABOUT, max_branches=15, length=91)
    assert (
        asked == [NILE]
        and [*journal_of(str(output))][1].outcomes[0].reason == "longer than a row without tags"
    )


def test_no_annotator_is_asked_about_an_answer_without_ids(tmp_path: pathlib.Path) -> None:
    class Lacking(WordTokenizer):
        def encode(self, text: str) -> list[int]:
            if "\x13" in text:
                raise TextError("The text holds U+0013.")
            return super().encode(text)

    path, output, tokenizer = tmp_path / "in.jsonl", tmp_path / "out.jsonl", Lacking(ANSWER)
    path.write_text(
        "".join(json.dumps({"prompt": "Hi", "response": a}) + "\n" for a in (f"{ANSWER}\x13", ANSWER))
    )
    annotate_file(str(path), str(output), Structure(tokenizer), tokenizer, Reader(), ABOUT, max_branches=15)
    found = sorted(journal_of(str(output)), key=lambda line: line.number)
    reasons = [outcome.reason for line in found for outcome in line.outcomes]
    assert reasons == ["characters that the tokenizer lacks", ""]
    assert [without_tags(json.loads(line)) for line in output.read_text().splitlines()] == [
        json.loads(line) for line in path.read_text().splitlines()
    ]


def test_what_has_tags_already_stays(tmp_path: pathlib.Path) -> None:
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    first, again = tmp_path / "in.jsonl", tmp_path / "again.jsonl"
    path.write_text(json.dumps(LAYOUTS["Alpaca"]))
    run(first, output)
    assert [outcome.reason for line in run(output, again) for outcome in line.outcomes] == [
        "it has tags already"
    ]
    assert again.read_bytes() == output.read_bytes()


def test_topics_are_shortened_and_lengths_counted(tmp_path: pathlib.Path) -> None:
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "response": NILE * 2}))
    tens = round(len(TOKENIZER.encode(NILE)) / 10)
    annotator = promised(Promise("the river of ten dry countries", 99, BLOCK), Text(NILE))
    (line,) = run(path, output, annotator)
    assert not line.outcomes[0].reason
    assert f'topic="the river" tokens={tens} />' in json.loads(output.read_text())["response"]


def test_the_report(tmp_path: pathlib.Path) -> None:
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text(
        "\n".join([*numbered(6), "{}", json.dumps({"prompt": "Hi", "response": "Write <sync/ >."})])
    )
    lines = run(path, output)
    figures = write_report(str(output), lines, ABOUT)
    assert (
        figures == Tally(lines).figures()
        and json.loads(pathlib.Path(f"{output}.report.json").read_text())["answers"] == 7
    )
    assert (figures["annotated"], figures["records"], figures["unusable"]) == (4, 8, 1)
    assert figures["reasons"] == {"no structure": 2, "the text looks as if it had tags": 1}
    assert figures["shapes"]["branches"] == {"2": 4} and figures["unusable_reasons"] == {"no known layout": 1}
    assert figures["left"][0] == {"record": 1, "answer": 0, "reason": "no structure"}
    speedup = figures["speedup"]
    assert speedup["annotated"] == pytest.approx(speedup["least"]) and speedup["least"] > 1.1
    assert speedup["all"] == pytest.approx(speedup["annotated"] ** (4 / 7))
    assert one_line(figures).startswith("4 of 7 answers are annotated (57.1%), 1 unusable records.")
    text = pathlib.Path(f"{output}.report.md").read_text()
    assert "| annotated answers                   | 4 (57.1%) |" in text and "(out.jsonl.report.png)" in text
    assert pathlib.Path(f"{output}.report.png").read_bytes().startswith(b"\x89PNG")
    nothing = Tally([]).figures()
    assert nothing["speedup"] == {"annotated": 1.0, "all": 1.0, "least": 1.0} and "0 of 0" in one_line(
        nothing
    )


def test_memory_does_not_grow_with_the_records(tmp_path: pathlib.Path) -> None:
    """The texts of these are 3 MB, and half of them are in the journal as well."""
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    count, long = 160, "x" * 20_000
    record = json.dumps({"prompt": "Hi", "response": f"<sync/>{long}"})
    bad = json.dumps({"question": long})
    path.write_text("".join(f"{record if i % 2 else bad}\n" for i in range(count)))

    def peak() -> int:
        tracemalloc.start()
        annotate_file(str(path), str(output), RULE, TOKENIZER, Reader(), ABOUT, max_branches=15)
        write_report(str(output), journal_of(str(output)), ABOUT)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert max(peak(), peak()) < 2**20
    assert sum(1 for _ in journal_of(str(output))) == count


def test_the_figure_has_numbers_and_thin_bars(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocks of one length, and one reason."""
    drawn: list[Any] = []
    monkeypatch.setattr("pasta_jax.annotate.report.save", lambda figure, path: drawn.append(figure))
    outcome = Outcome(0, notes={"short": 3}, blocks=(37, 37), depth=1, tokens=100, steps=60)
    write_report(str(tmp_path / "out.jsonl"), [Line(1, (outcome,))], ABOUT)
    *_, lengths, reasons = drawn[0].axes
    assert [label.get_text() for label in lengths.get_xticklabels()] == ["37"]
    [bar] = reasons.patches
    below, above = reasons.get_ylim()
    assert bar.get_height() < (below - above) / 4


def test_where_nothing_is_annotated_the_reason_is_said(tmp_path: pathlib.Path) -> None:
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "response": "Ho."}))
    said = one_line(Tally(run(path, output)).figures())
    assert said == "0 of 1 answers are annotated (0.0%). The most frequent reason: no structure (1)."


def test_a_file_of_which_no_record_can_be_used_is_refused(tmp_path: pathlib.Path) -> None:
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"question": "a"}\n{}\n')
    for _ in range(2):
        with pytest.raises(
            RunError, match=r"none of 2 records .* line 1: no known layout .*question.* --columns"
        ):
            run(path, output)
    assert not output.exists()
    path.write_text(json.dumps({"prompt": "Hi", "response": "Ho."}))
    assert run(path, output, about={"annotator": "x"})  # other options, the same output
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(RunError, match=r"empty.jsonl has no records\."):
        run(empty, tmp_path / "nothing.jsonl")


def test_quantiles_of_counts() -> None:
    values = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    found = _quantiles(collections.Counter(values))
    assert [*found.values()] == pytest.approx([*np.percentile(values, [5, 25, 50, 75, 95])])


def verb(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "pasta_jax.annotate", *arguments)


@pytest.mark.slow
def test_the_command(tmp_path: pathlib.Path) -> None:
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps({"instruction": "Hi", "output": ANSWER}))
    done = verb(f"--input={path}", f"--output={output}", "--tokenizer=almanac", "--annotator=rule:apar")
    assert done.returncode == 0, done.stderr
    assert "1 of 1 answers are annotated" in done.stdout and "--config.data.dialect=apar" in done.stdout
    assert "<promise/><async>" in output.read_text()
    assert [each.reason for each in read(output) if isinstance(each, Problem)] == ["tags"]
    (example,) = (each for each in read(output, dialect="apar"))
    assert isinstance(example, Example) and assemble(example.program) == ANSWER
    done = verb("--plain", f"--input={output}", f"--output={tmp_path / 'plain.jsonl'}", "--dialect=apar")
    assert done.returncode == 0 and "has 1 records without tags" in done.stdout
    assert json.loads((tmp_path / "plain.jsonl").read_text()) == json.loads(path.read_text())


@pytest.mark.slow
def test_a_mistake_is_one_line(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "out.jsonl"
    done = verb("--input=README.md", f"--output={output}", "--tokenizer=almanac", "--annotator=x")
    assert done.returncode == 2 and not output.exists()
    assert done.stderr.splitlines()[-1].startswith("--annotator='x' is none of rule:structure"), done.stderr


def test_declined_for_one_is_not_declined_for_all(tmp_path: pathlib.Path) -> None:
    def picky(prompt: str | Messages, answer: str) -> Annotated:
        if prompt == "1?":
            raise Declined("I would rather not")
        return RULE(prompt, answer)

    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text("\n".join(numbered(3)))
    reasons = [outcome.reason for line in run(path, output, picky) for outcome in line.outcomes]
    assert reasons == ["no structure", "I would rather not", ""]
