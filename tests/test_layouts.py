"""Records of every common layout and kind of file, read as the same examples, and what is said of broken ones."""

import gzip
import importlib
import json
import pathlib
import sys
import types
from typing import Any

import pytest

from pasta_jax.data import layouts, reading, records
from pasta_jax.data.records import Example, Problem, RecordError, read, read_records
from pasta_jax.lang.assemble import assemble
from tests.helpers.layouts import ANSWER, ASKED, LAYOUTS, write_files

PROMISE = '<promise topic="river" tokens=1 /><async>The Nile.</async>'
SHA = "1b890722255408f7a4e2842383ae76ec054a71c8c4e515b69320bf941ca66081"

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Rivers?"},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "The Don."},
    {"role": "user", "content": "Thanks!"},
]


def lines(path: pathlib.Path, *found: Any) -> pathlib.Path:
    path.write_text("\n".join(map(json.dumps, found)))
    return path


def fault(path: pathlib.Path, record: Any, **options: Any) -> Problem:
    [problem] = read(lines(path, record), **options)
    assert isinstance(problem, Problem)
    return problem


# ------------------------------------------------------------------------------------------------ recognition


def test_every_file_gives_the_same_examples(tmp_path: pathlib.Path) -> None:
    files = write_files(tmp_path)
    assert {"alpaca.jsonl", "array.json", "packed.jsonl.zst", "columns.parquet"} <= files.keys()
    for name, path in files.items():
        examples, problems = read_records(path)
        assert problems == [], name
        assert [each.prompt for each in examples] == [ASKED, "And lakes?"], name
        assert [assemble(each.program) for each in examples] == ["One: The Nile.", "Baikal."], name
        assert [each.line for each in examples] == [1, 2], name


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_named_and_written_as_they_were_read(name: str) -> None:
    record = {"id": 7, **LAYOUTS[name](ASKED, ANSWER)}
    found = layouts.conversation(record)
    assert found.layout == name.partition(",")[0]
    before = json.dumps(record)
    changed = layouts.replaced(record, 0, "Else.")
    assert changed == {"id": 7, **LAYOUTS[name](ASKED, "Else.")}
    assert json.dumps(record) == before, "the record itself is not changed"


def test_what_was_read_as_prompt_and_response_still_is(tmp_path: pathlib.Path) -> None:
    more = {"messages": TURNS, "system": "no", "instruction": "x", "output": "y"}
    file = lines(
        tmp_path / "a.jsonl",
        {"prompt": "a", "response": f"b {PROMISE}", **more},
        {"prompt": "ä", "response": "c"},
    )
    examples = read_records(file)[0]
    assert [each.prompt for each in examples] == ["a", "ä"]
    # The hash by which runs that began before there were other layouts know their data.
    assert records.digest(examples) == {"examples": 2, "sha256": SHA}


def test_columns_join_map_and_name_a_system_message(tmp_path: pathlib.Path) -> None:
    file = lines(
        tmp_path / "a.jsonl", {"title": "Rivers", "body": "Two?", "answer": "Nile.", "hint": "Brief."}
    )
    [joined] = read(file, columns={"prompt": "title+body", "response": "answer"})
    assert isinstance(joined, Example) and joined.prompt == "Rivers\n\nTwo?"
    [led] = read(file, columns={"prompt": "title", "response": "answer", "system": "hint"})
    assert isinstance(led, Example)
    assert led.prompt == ({"role": "system", "content": "Brief."}, {"role": "user", "content": "Rivers"})
    [dialogue] = read(lines(tmp_path / "b.jsonl", {"chat": TURNS[1:3]}), columns={"messages": "chat"})
    assert isinstance(dialogue, Example) and dialogue.prompt == "Rivers?"
    said = fault(tmp_path / "a.jsonl", {"title": "Rivers", "answer": "b"}, columns={"prompt": "title+body"})
    assert 'missing "body" (found: title, answer). Map the names' in str(said)
    assert said.reason == "missing key"
    with pytest.raises(RecordError, match="columns maps 'answer'; only prompt, response, system, messages"):
        list(read(file, columns={"answer": "output"}))


# -------------------------------------------------------------------------------------------- conversations


def test_each_answer_of_a_conversation_is_asked_what_decoding_sees(tmp_path: pathlib.Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"messages": TURNS})
    first, second = read(file)
    assert isinstance(first, Example) and isinstance(second, Example)
    assert first.prompt == tuple(TURNS[:2])
    earlier = {"role": "assistant", "content": "One: The Nile."}
    assert second.prompt == (*TURNS[:2], earlier, TURNS[3]), "earlier answers lose their tags"
    assert [first.turn, second.turn] == [0, 1]
    assert first.asked == second.asked == "Rivers?"
    assert [each.turn for each in read(file, turns="last") if isinstance(each, Example)] == [1]
    assert records.prompt_text(second.prompt).endswith("assistant: One: The Nile.\n\nuser: More?")


def test_an_answer_of_weight_0_is_read_and_not_learnt(tmp_path: pathlib.Path) -> None:
    said = [
        ("human", "a", {}),
        ("GPT", ANSWER, {"weight": 0}),
        ("user", "b", {}),
        ("bard", "c", {"weight": 1}),
    ]
    record = {"conversations": [{"from": role, "value": text, **more} for role, text, more in said]}
    [example] = read(lines(tmp_path / "a.jsonl", record | {"system": "Be brief."}))
    assert isinstance(example, Example)
    assert example.turn == 1
    assert [message["content"] for message in example.prompt if isinstance(message, dict)] == [
        *("Be brief.", "a", "One: The Nile.", "b"),
    ]
    assert layouts.replaced(record, 1, "d")["conversations"][3] == {"from": "bard", "value": "d", "weight": 1}


@pytest.mark.parametrize(
    ("record", "reason", "message"),
    [
        ([1], "not an object", "not an object. Write one with the keys prompt and response."),
        ({"text": "a"}, "no known layout", "no known layout (found: text). Map the names that the file uses"),
        ({}, "no known layout", "no known layout (found: none)"),
        ({"prompt": "a"}, "no answer", '"prompt" has no answer (found: prompt). Add its "response". Map'),
        ({"messages": "a"}, "not a list", '"messages" must be a list of {"role": ..., "content": ...}.'),
        ({"messages": None}, "not a list", '"messages" must be a list'),
        ({"messages": []}, "no answer", "nothing answers the user. Add an answer, or remove the line."),
        ({"messages": TURNS[:2]}, "no answer", "nothing answers the user"),
        ({"messages": ["a"]}, "not a message", "\"messages[0]\" is 'a'; write {"),
        ({"messages": [{"role": "user"}]}, "not a message", '"messages[0]" is {'),
        (
            {"conversations": [{"from": "narrator", "value": "a"}]},
            "unknown role",
            "\"conversations[0].from\" is 'narrator'. Write system, user or assistant.",
        ),
        (
            {"messages": [TURNS[1], {"role": "tool", "content": "a"}]},
            "a tool's turn",
            "\"messages[1].role\" is 'tool': no chat format here has tools.",
        ),
        (
            {"messages": [TURNS[1], {"role": "assistant", "content": None}]},
            "empty text",
            '"messages[1].content" must be a text that is not empty. Fix or remove the line.',
        ),
        (
            {"messages": [{"role": "user", "content": ["a"]}]},
            "not a text",
            '"messages[0].content" must be a text',
        ),
        (
            {"messages": TURNS[2:5]},
            "turns out of order",
            '"messages[0].content" is of the assistant; the user is',
        ),
        (
            {"messages": [TURNS[1], TURNS[1]]},
            "turns out of order",
            '"messages[1].content" is of the user; the as',
        ),
        (
            {"messages": [*TURNS[1:3], TURNS[0]]},
            "turns out of order",
            '"messages[2].content" is of the system',
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}]},
            "nothing to learn",
            "every answer has the weight 0. Remove the line.",
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b", "weight": 0.5},
                ]
            },
            "weight",
            '"conversations[1].weight" is 0.5; write 1 for an answer to learn, or 0.',
        ),
        (
            {"instruction": " ", "output": "b"},
            "empty text",
            '"instruction" must be a text that is not empty.',
        ),
        ({"instruction": "a", "input": 7, "output": "b"}, "not a text", '"input" must be a text'),
        ({"prompt": "a", "completion": ""}, "empty text", '"completion" must be a text that is not empty.'),
        (
            {"prompt": [TURNS[1]], "completion": [TURNS[1]]},
            "turns out of order",
            '"completion[0].content" is of the user; the assistant is expected there.',
        ),
        (
            {"messages": [TURNS[1], {"role": "assistant", "content": "one\ntwo </async>"}]},
            "tags",
            'in "messages[1].content", line 2, column 5: </async> without <async>',
        ),
        (
            {"instruction": "a", "output": "\ud83d"},
            "half a character",
            'in "output": The text holds half a chara',
        ),
    ],
)
def test_faults_name_the_key_and_have_a_reason(
    record: Any, reason: str, message: str, tmp_path: pathlib.Path
) -> None:
    problem = fault(tmp_path / "a.jsonl", record)
    assert str(problem).startswith(f"{tmp_path / 'a.jsonl'} line 1: {message}"), str(problem)
    assert problem.reason == reason
    assert "\n" not in str(problem)


def test_the_advice_on_names_works(tmp_path: pathlib.Path) -> None:
    """For every layout that is not known: what the message proposes is read, with the names put in."""
    said = str(fault(tmp_path / "a.jsonl", {"question": "a", "answer": "b"}))
    columns = dict(pair.split("=") for pair in said.split("columns=")[1].rstrip(".").split(","))
    [example] = read(tmp_path / "a.jsonl", columns=columns)
    assert isinstance(example, Example) and example.prompt == "a"


# ------------------------------------------------------------------------------------------------- files


def test_arrays_are_read_piece_by_piece(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces that cut strings, escapes and characters anywhere; a broken element costs itself alone."""
    good = [
        {"prompt": 'a, "[{b\\', "response": "]}x\u2028é" * n, "n": [1, {"a": "]"}, "\\"]}
        for n in range(1, 30)
    ]
    texts = [json.dumps(record, indent=n % 3 or None, ensure_ascii=False) for n, record in enumerate(good)]
    file = tmp_path / "a.json"
    file.write_bytes(b"\xef\xbb\xbf\n [" + ", ".join([*texts[:9], '{"a": }', *texts[9:]]).encode() + b"] \n")
    for chunk in (8, 13, 64, 1 << 20):
        monkeypatch.setattr(reading, "CHUNK", chunk)
        examples, problems = read_records(file)
        assert [json.loads(each.raw) for each in examples] == good, chunk
        assert [each.line for each in examples] == [*range(1, 10), *range(11, 31)]
        [problem] = problems
        assert str(problem).startswith(f"{file} record 10, column 7: not JSON: Expecting value.")
    file.write_text("[]")
    assert read_records(file) == ([], [])
    file.write_text('{"prompt": "a", "response": "b"}\n')
    assert len(read_records(file)[0]) == 1, "lines, in spite of the name"


def test_files_that_are_cut_off_or_damaged_are_not_taken_for_short_ones(tmp_path: pathlib.Path) -> None:
    zstandard: Any = pytest.importorskip("zstandard")
    whole = b"\n".join(json.dumps({"prompt": str(n) * 50, "response": "b"}).encode() for n in range(99))
    array = b"[" + whole.replace(b"\n", b",") + b"]"
    for name, data, message in (
        ("a.json", array[:-1], "is cut off: its end is missing. Copy it again."),
        ("a.json", array[:-9], "is cut off"),
        ("b.json", array + array, "goes on after its array. Write one array, or one record on each line."),
        ("a.jsonl.gz", gzip.compress(whole)[:-20], "is cut off"),
        ("b.jsonl.gz", whole, "Not a gzipped file"),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(whole)[:-20], "is cut off"),
        ("b.jsonl.zst", whole, "is damaged"),
        ("a.parquet", whole, "Cannot read"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(RecordError) as refused:
            read_records(tmp_path / name)
        assert message in str(refused.value) and str(tmp_path / name) in str(refused.value)
        assert "\n" not in str(refused.value)
    # Several parts in a row, as `cat` makes them, are one file.
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(whole + b"\n") * 3)
    assert len(read_records(tmp_path / "c.jsonl.zst")[0]) == 297


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name=name.partition(".")[0])

    monkeypatch.setattr(importlib, "import_module", missing)
    for name, package, extra in (
        (str(tmp_path / "a.jsonl.zst"), "zstandard", "zstd"),
        (str(tmp_path / "a.parquet"), "pyarrow", "parquet"),
        ("hf:owner/name", "datasets", "datasets"),
    ):
        if not name.startswith("hf:"):
            pathlib.Path(name).touch()
        with pytest.raises(RecordError, match=rf"^Reading {name} needs {package}: pip .*\[{extra}\]"):
            read_records(name)


def test_a_data_set_of_the_hub_is_read_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, *, split: str, streaming: bool) -> Any:
        asked.append((path, split, streaming))
        yield {"prompt": "a", "response": "b", "when": types.SimpleNamespace()}
        yield {"prompt": "a", "response": None}
        if path == "owner/broken":
            raise OSError("no network")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    examples, problems = read_records("hf:owner/name:test")
    assert asked == [("owner/name", "test", True)]
    assert [each.prompt for each in examples] == ["a"]
    assert [str(each) for each in problems] == [
        'hf:owner/name:test record 2: "response" must be a text that is not empty. Fix or remove the line.'
    ]
    with pytest.raises(RecordError, match="Cannot read hf:owner/broken: OSError: no network"):
        read_records("hf:owner/broken")
    assert asked[-1] == ("owner/broken", "train", True)
