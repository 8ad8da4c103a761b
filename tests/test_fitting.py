"""Which examples of a file are used, as which documents, and what is said of the others."""

import dataclasses
import gzip
import json
import pathlib
import tracemalloc
from typing import Any

import numpy as np
import pytest

from pasta_jax.arrays import NO_TARGET, ThreadedTokens
from pasta_jax.config import ConfigError, DataConfig
from pasta_jax.data.batches import Mixture, Shuffled
from pasta_jax.data.fitting import places, up_to
from pasta_jax.data.records import RecordError
from pasta_jax.data.sources import contents, make_source, make_sources
from pasta_jax.data.stored import Stored
from pasta_jax.lang.assemble import assemble
from pasta_jax.lang.parse import parse
from pasta_jax.testing import WordTokenizer
from pasta_jax.tokens.tokenizer import TextError
from tests.helpers.layouts import write_files

BLOCK = '<promise topic="river" tokens=1 /><async>The Nile is long. It is.</async>'
TOKENIZER = WordTokenizer("Rivers? More? One two three. The Nile is long. Don a b c d e f g h")


def config(*files: pathlib.Path, **fields: Any) -> DataConfig:
    return DataConfig(sources=tuple((str(file), 1.0) for file in files), **{"length": 64, **fields})


def lines(path: pathlib.Path, *found: Any) -> pathlib.Path:
    path.write_text("\n".join(map(json.dumps, found)))
    return path


def talk(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def stored(config: DataConfig, tokenizer: Any = TOKENIZER, **options: Any) -> Stored:
    source = make_source(config, tokenizer, 0, **options)
    assert isinstance(source, Shuffled) and isinstance(source.source, Stored)
    return source.source


def text(document: ThreadedTokens) -> str:
    return TOKENIZER.vocabulary.text(document.token.tolist()).replace('topic=" ', 'topic="')


# ------------------------------------------------------------------------------------------- what is used


def test_every_layout_and_kind_of_file_gives_the_same_documents(tmp_path: pathlib.Path) -> None:
    first: list[list[int]] = []
    for name, path in write_files(tmp_path).items():
        documents = [document.token.tolist() for document in stored(config(path))]
        first = first or documents
        assert documents == first and len(documents) == 2, name


def test_each_turn_is_a_document_and_sees_the_earlier_ones_without_tags(tmp_path: pathlib.Path) -> None:
    file = lines(tmp_path / "a.jsonl", talk("Rivers?", f"One. {BLOCK}", "More?", f"Don. {BLOCK}"))
    _, second = stored(config(file))
    assert text(second).startswith("Rivers?\nOne. The Nile is long. It is.\nMore?\nDon. <promise")
    learnt = second.token[second.order >= 0]
    assert TOKENIZER.vocabulary.text(learnt.tolist()).startswith("Don. <promise")
    assert (second.target[: len(second) - len(learnt) - 1] == NO_TARGET).all()
    [last] = stored(config(file, turns="last"))
    assert last.token.tolist() == second.token.tolist()


def test_what_a_chat_format_cannot_write_is_a_problem_of_its_record(tmp_path: pathlib.Path) -> None:
    class WithoutSystem(WordTokenizer):
        def encode_chat(self, messages: Any) -> list[int]:
            if messages[0]["role"] == "system":
                raise ValueError("This chat format has no system message.")
            return super().encode_chat(messages)

    led = {"messages": [{"role": "system", "content": "a"}, *talk("b", "c")["messages"]]}
    file = lines(tmp_path / "a.jsonl", led, talk("a", "b", "c", "d"))
    account = config(file, max_unusable=0.5)
    assert len(stored(account, WithoutSystem(), invalid=tmp_path / "invalid.jsonl")) == 2
    kept = json.loads((tmp_path / "invalid.jsonl").read_text())
    assert (kept["line"], kept["reason"]) == (1, "chat format")
    assert kept["message"] == "This chat format has no system message."


def test_characters_that_the_tokenizer_lacks_are_a_problem_of_their_record(tmp_path: pathlib.Path) -> None:
    class Lacking(WordTokenizer):
        def encode(self, text: str) -> list[int]:
            if "\x13" in text:
                raise TextError("The text holds U+0013.")
            return super().encode(text)

    records = (
        {"prompt": prompt, "response": answer} for prompt in ("a", "a \x13") for answer in ("b", "b \x13")
    )
    account = config(lines(tmp_path / "a.jsonl", *records), max_unusable=0.9)
    assert len(stored(account, Lacking(), invalid=tmp_path / "invalid.jsonl")) == 1
    kept = [json.loads(line) for line in (tmp_path / "invalid.jsonl").read_text().splitlines()]
    reason = "characters that the tokenizer lacks"
    assert [(each["line"], each["reason"], each["message"]) for each in kept] == [
        (line, reason, "The text holds U+0013.") for line in (2, 3, 4)
    ]


def test_examples_of_a_conversation_are_held_out_together(tmp_path: pathlib.Path) -> None:
    talks = [talk(f"{'a b c d e f g h'[2 * n]} Rivers?", "One.", "More?", "Don.") for n in range(8)]
    file = lines(tmp_path / "a.jsonl", *talks, {"prompt": "a Rivers?", "response": "two"})
    source, held = make_sources(config(file, held_out="0.3"), TOKENIZER, seed=0)
    assert isinstance(source, Shuffled)
    sides = [
        {text(document).split("?")[0] for document in documents}
        for documents in (held, [source[i] for i in range(len(source))])
    ]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 8
    assert len(held) + len(source) == 17


def test_what_is_asked_in_several_files_is_on_one_side(tmp_path: pathlib.Path) -> None:
    plain, annotated = (
        lines(tmp_path / name, *({"prompt": f"{n} Rivers?", "response": said} for n in "abcdefgh"))
        for name, said in (("a.jsonl", "One."), ("b.jsonl", f"One. {BLOCK}"))
    )
    source, held = make_sources(config(plain, annotated, held_out="0.3"), TOKENIZER, seed=0)
    assert isinstance(source, Mixture)
    trained = [[text(stream[i]) for i in range(len(stream.source))] for stream in source.streams]  # type: ignore[attr-defined]
    asked = [{each.split("?")[0] for each in some} for some in (map(text, held), *trained)]
    assert asked[1] == asked[2] and not asked[0] & asked[1] and len(asked[0] | asked[1]) == 8
    assert len(held) == 2 * len(asked[0]) == 6


# ------------------------------------------------------------------------------------- longer than a row


def test_what_is_too_long_is_dropped_left_out_or_cut_and_counted(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = " ".join(["The Nile is long."] * 20)
    file = lines(tmp_path / "a.jsonl", talk("Rivers?", "One.", "More?", long), talk("Rivers?", "two"))
    found = {}
    for policy in ("drop", "turn", "sentence"):
        caplog.clear()
        found[policy] = [text(each) for each in stored(config(file, too_long=policy, max_unusable=0.5))]
        said = caplog.text
        reason = {
            "drop": "1 of 2 records cannot be used (50.0%): 1 longer than a row\n  ",
            "turn": f"{file}: answers left out of records that are used: 1 longer than a row",
            "sentence": f"{file}: answers cut after a sentence or a block: 1 longer than a row",
        }
        assert reason[policy] in said, said
    assert len(found["drop"]) == 1 and len(found["turn"]) == 2 and len(found["sentence"]) == 3
    assert found["sentence"][0] == found["turn"][0]
    assert found["sentence"][1] == "Rivers?\nOne.\nMore?\n" + " ".join(["The Nile is long."] * 9)


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (f"One two three. {BLOCK} One two three. {BLOCK} One two.", "One two three. {B} One two three."),
        (
            "\u5c3c\u7f57\u6cb3\u3002\u300c\u957f\u3002\u300d\u5b83\u5411\u5317\u6d41",
            "\u5c3c\u7f57\u6cb3\u3002\u300c\u957f\u3002\u300d",
        ),
        (f"One. {BLOCK}<sync/> One two three a b c d e f g h. One.", "One. {B}"),
        ("- One two\n- three a b c d e f g h\n- One a b c d e f g h\n", "- One two\n- three a b c d e f g h"),
    ],
)
def test_an_answer_is_cut_after_a_sentence_or_block_and_its_end_is_not_learnt(
    answer: str, kept: str, tmp_path: pathlib.Path
) -> None:
    file = lines(tmp_path / "a.jsonl", {"prompt": "Rivers?", "response": answer})
    [whole] = stored(config(file, length=200))
    kept = kept.replace("{B}", BLOCK)
    expected = stored(
        config(lines(tmp_path / "b.jsonl", {"prompt": "Rivers?", "response": kept}), length=200)
    )
    [document] = stored(config(file, length=len(expected[0]) + 1, too_long="sentence"))
    assert text(document) == f"Rivers?\n{kept}"
    for name, values in document.fields().items():
        before = whole.fields()[name][: len(document)]
        if name == "target":  # nothing follows what is now the last token of main
            [changed] = np.flatnonzero(values != before)
            assert values[changed] == NO_TARGET
            assert changed == np.flatnonzero(document.thread == 0)[-1]
        else:
            np.testing.assert_array_equal(values, before, err_msg=name)


def test_places_are_ends_of_sentences_lines_and_blocks() -> None:
    program = parse(f'He said "No!" 3.5 times.\n\n1. One\n2. two {BLOCK}<sync/>Don, e.g. "a".')
    kept = [assemble(up_to(program, place)) for place in places(program)]
    assert [each.removeprefix(before) for before, each in zip(["", *kept], kept)] == [
        *('He said "No!"', " 3.5 times.", "\n\n1. One", "\n2. two The Nile is long. It is."),
        "Don, e.g.",
    ]


# ------------------------------------------------------------------------------------------ too many faults


def test_a_file_of_which_little_can_be_used_stops_the_run_in_one_line(tmp_path: pathlib.Path) -> None:
    long = {"prompt": "Rivers?", "response": "The Nile is long. " * 20}
    good, broken = {"prompt": "Rivers?", "response": "One."}, {"prompt": "Rivers?", "response": "</async>"}
    file = lines(tmp_path / "a.jsonl", *[long] * 197, *[good] * 2, broken)
    with pytest.raises(ConfigError) as stopped:
        stored(config(file))
    assert str(stopped.value) == (
        f"config.data.sources: {file}: 198 of 200 records cannot be used (99.0%): 197 longer than a row, 1 tags. "
        "Raise --config.data.length, set --config.data.too_long=sentence, or go on with the others by "
        f"--config.data.max_unusable=0.99. The first: line 1: 108 tokens, a row holds 64. "
        "Set --config.data.length=108 or more, or --config.data.too_long."
    )
    assert len(stored(config(file, max_unusable=0.99))) == 2
    assert len(stored(config(file, too_long="sentence"))) == 199
    tenth = lines(tmp_path / "b.jsonl", *[good] * 9, broken)
    assert len(stored(config(tenth))) == 9, "a tenth is allowed"
    held = lines(tmp_path / "c.jsonl", *[good] * 9, broken, broken)
    with pytest.raises(ConfigError, match="config.data.held_out: .*2 of 11 records.* 2 tags"):
        make_sources(config(tenth, held_out=str(held)), TOKENIZER, 0)


# ------------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_memory_holds_places_and_no_texts(name: str, tmp_path: pathlib.Path) -> None:
    record = json.dumps({"prompt": "Rivers?", "response": "One.", "more": "x" * 30_000}).encode()
    whole = b"\n".join([record] * 300)
    (tmp_path / name).write_bytes(gzip.compress(whole, 1) if name.endswith(".gz") else whole)
    tracemalloc.start()
    try:
        examples = stored(config(tmp_path / name))
        made = contents(Shuffled(examples, 0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert made[str(tmp_path / name)]["examples"] == len(examples) == 300
    assert peak < len(whole) / 3, f"{peak:,} bytes for a file of {len(whole):,}"


def test_a_record_that_changes_while_it_is_used_is_named(tmp_path: pathlib.Path) -> None:
    good = {"prompt": "Rivers?", "response": "One."}
    file = lines(tmp_path / "a.jsonl", good, good)
    examples = stored(config(file))
    before = examples[1].token.tolist()
    with file.open("a") as more:
        more.write("\n" + json.dumps(good))
    assert examples[1].token.tolist() == before, "what is added later does no harm"
    file.write_text(file.read_text().replace("One.", "two."))
    with pytest.raises(RecordError, match=r"a\.jsonl has changed while it is used \(line 2\)"):
        examples[1]


def test_columns_that_do_not_exist_are_refused_before_anything_is_read(tmp_path: pathlib.Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"prompt": "Rivers?", "response": "One."})
    bad = dataclasses.replace(config(file), columns=(("answer", "output"),))
    with pytest.raises(ConfigError, match="config.data.sources: columns maps 'answer'"):
        stored(bad)
