"""Records, packing, order and batches."""

import json
import pathlib
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from pasta_jax.arrays import NO_DOC, NO_TARGET, ThreadedTokens
from pasta_jax.data import batches, fitting, packing, records
from pasta_jax.visibility import visible

PROMISE = '<promise topic="rivers" tokens=1 /><async>The Nile.</async>'


def document(length: int, value: int = 0) -> ThreadedTokens:
    """`length` tokens in sequence that say which document they are."""
    line = np.arange(length, dtype=np.int32)
    return ThreadedTokens(
        token=np.full(length, value, np.int32),
        position=line,
        doc=np.ones(length, np.int32),
        segment=np.zeros(length, np.int32),
        order=line,
        sees=np.zeros((length, 2), np.uint32),
        thread=np.zeros(length, np.int32),
        target=line + 100,
    )


class Documents:
    """A source: document i holds the token i, and has the given length."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> ThreadedTokens:
        return document(self.lengths[index], index)


# ------------------------------------------------------------------------------------------------ records


def write(path: pathlib.Path, *lines: bytes | dict[str, str]) -> pathlib.Path:
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
    return path


def test_records_and_every_kind_of_fault(tmp_path: pathlib.Path) -> None:
    good = {"prompt": "Rivers?", "response": f"Two: {PROMISE}<sync/> Done."}
    file = write(
        tmp_path / "data.jsonl",
        b"\xef\xbb\xbf" + json.dumps(good).encode() + b"\r",
        b"",
        b'{"prompt": "\xc3\xa9\xff"}',
        b'{"prompt": "a", }',
        b"[1]",
        {"question": "a", "answer": "b"},
        {"prompt": " ", "response": "b"},
        {"prompt": "a", "response": "one\ntwo </async>"},
        {"prompt": "a", "response": PROMISE.replace("The Nile.", PROMISE)},
        {"prompt": "a", "response": "cut \ud83d"},
        {"prompt": "\ude00", "response": PROMISE},
        {"prompt": "a", "response": PROMISE.replace("rivers", "rivers \ud83d")},
        good,
    )
    examples, problems = records.read_records(file)
    assert [e.line for e in examples] == [1, 13]
    assert examples[0].prompt == "Rivers?"
    assert [p.topic for p in examples[1].program.promises()] == ["rivers"]
    with pytest.raises(json.JSONDecodeError) as comma:  # reported at another column from Python 3.13 on
        json.loads('{"prompt": "a", }')
    places = [(3, 14), (4, comma.value.colno), (5, None), (6, None), (7, None), (8, None), (9, None)]
    places += [(10, None), (11, None), (12, None)]
    assert [(p.line, p.column) for p in problems] == places
    messages = [str(p) for p in problems]
    assert messages[0] == f"{file} line 3, column 14: byte 0xff is not UTF-8. Save the file as UTF-8."
    assert "not JSON" in messages[1]
    assert "no known layout (found: question, answer). Map the names" in messages[3]
    assert '"prompt" must be a text that is not empty' in messages[4]
    assert 'in "response", line 2, column 5: </async> without <async>' in messages[5]
    assert f'{file} line 9: in "response", line 1, column 43: a promise nested deeper' in messages[6]
    half = "The text holds half a character"
    assert messages[7] == f"{file} line 10: in \"response\": {half}, U+D83D, after 'cut '. Remove it."
    assert messages[8] == f'{file} line 11: in "prompt": {half}, U+DE00, at its start. Remove it.'
    assert f'{file} line 12: in "response": {half}, U+D83D, after' in messages[9]
    assert len(records.read_records(file, max_depth=2)[0]) == 3


def test_numbers_and_depth_that_no_parser_takes_cost_one_record(tmp_path: pathlib.Path) -> None:
    good = {"prompt": "a", "response": "b"}
    huge = b'{"prompt": "a", "response": "b", "n": %s}' % (b"1" * 5000)
    deep = b'{"prompt": "a", "response": "b", "n": %s' % (b"[" * 200_000)
    examples, problems = records.read_records(
        write(tmp_path / "data.jsonl", good, huge, b"7" * 5000, deep, b'{"n": 1e999, "n": NaN}', good)
    )
    assert [e.line for e in examples] == [1, 6]
    assert [p.line for p in problems] == [2, 3, 4, 5]
    messages = [p.message for p in problems]
    assert (
        messages[0]
        == messages[1]
        == ("a number of thousands of digits. Write it as a text, or leave it out.")
    )
    assert "nested too deeply" in messages[2]


def test_columns_map_foreign_names(tmp_path: pathlib.Path) -> None:
    file = write(tmp_path / "data.jsonl", {"instruction": "a", "output": "b"})
    examples, problems = records.read_records(file, columns={"prompt": "instruction", "response": "output"})
    assert (len(examples), problems) == (1, [])
    with pytest.raises(records.RecordError, match="columns maps 'answer'"):
        records.read_records(file, columns={"answer": "output"})
    with pytest.raises(records.RecordError, match="No such file"):
        records.read_records(tmp_path / "none.jsonl")


def test_unusable_lines_are_counted_and_kept_to_the_byte(tmp_path: pathlib.Path) -> None:
    line = b'{"prompt": "\xff\xfe"}'
    examples, problems = records.read_records(write(tmp_path / "data.jsonl", *[line] * 30))
    assert examples == []
    account = fitting.Account("data.jsonl", records=40)
    for problem in problems:
        account.add(problem)
    shown = account.report()
    assert shown.startswith("30 of 40 records cannot be used (75.0%): 30 not UTF-8\n")
    assert shown.count("is not UTF-8") == fitting.SHOWN
    assert shown.endswith("... and 10 more")
    kept = [json.loads(records.invalid_line(problem)) for problem in problems]
    assert [k["raw"].encode("utf-8", "surrogateescape") for k in kept] == [line] * 30
    assert kept[29]["line"] == 30


# ------------------------------------------------------------------------------------------------ packing


def test_packing_keeps_documents_whole_and_apart() -> None:
    documents = [document(4, 1), document(3, 2), document(5, 3)]
    batch = packing.pack(documents, [0, 1, 1], rows=2, length=8)
    assert batch.token.tolist() == [[1] * 4 + [0] * 4, [2] * 3 + [3] * 5]
    assert batch.doc.tolist() == [[1] * 4 + [NO_DOC] * 4, [1] * 3 + [2] * 5]
    assert batch.target[0].tolist() == [100, 101, 102, 103] + [NO_TARGET] * 4
    assert batch.position[1].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    may_attend = visible(batch, batch)
    assert may_attend.shape == (2, 8, 8)
    assert not may_attend[1, 3:, :3].any(), "a document saw the one before it"
    assert not may_attend[0, :, 4:].any(), "someone saw padding"
    assert (may_attend[1, 3:, 3:] == np.tri(5, dtype=bool)).all()


def test_packer_places_anew_when_no_row_has_room() -> None:
    packer = packing.Packer(rows=2, length=10)
    assert [packer.add(document(n)) for n in (3, 3, 3, 7)] == [True] * 4  # first fit alone: 9 and 7
    assert packer.add(document(4))  # fits only as 7+3 and 4+3+3
    assert not packer.add(document(1))
    batch = packer.pack()
    assert packing.real_fraction(batch) == 1.0
    assert sorted(len(set(row.tolist())) for row in batch.doc) == [2, 3]


def test_at_least_95_percent_real_tokens(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(50, 251, size=2000).tolist()
    stream = batches.Shuffled(Documents(lengths), seed=1)
    index, fractions = 0, []
    for _ in range(10):
        batch, index = batches.next_batch(stream, index, rows=8, length=1024)
        fractions.append(packing.real_fraction(batch))
    assert np.mean(fractions) >= 0.95, fractions


# -------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("n", [1, 2, 3, 10, 64, 1000])
def test_permutation(n: int) -> None:
    orders = [[batches.permuted(i, n, seed) for i in range(n)] for seed in range(4)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    if n >= 10:
        assert len({tuple(order) for order in orders}) == 4
        moved = [np.mean(np.array(order) != np.arange(n)) for order in orders]
        assert min(moved) > 0.5


def test_permutation_of_an_endless_source_is_immediate() -> None:
    assert 0 <= batches.permuted(12345, 2**40, seed=0) < 2**40


def test_nothing_is_dropped_and_every_epoch_has_its_own_order(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 20, size=60).tolist()
    stream = batches.Shuffled(Documents(lengths), seed=seed)
    index, seen = 0, []
    while index < 120:
        batch, following = batches.next_batch(stream, index, rows=2, length=30)
        took = {int(t) for row, doc in zip(batch.token, batch.doc) for t, d in zip(row, doc) if d != NO_DOC}
        assert took == {int(stream[i].token[0]) for i in range(index, following)}
        assert (batch.doc != NO_DOC).sum() == sum(len(stream[i]) for i in range(index, following))
        seen += [int(stream[i].token[0]) for i in range(index, following)]
        index = following
    assert sorted(seen[:60]) == list(range(60))
    assert sorted(seen[60:120]) == list(range(60))
    assert seen[:60] != seen[60:120]


def test_resuming_from_the_index_gives_the_same_batches() -> None:
    stream = batches.Shuffled(Documents([3, 9, 4, 7, 5, 2, 8]), seed=3)
    index, whole = 0, []
    for _ in range(6):
        batch, index = batches.next_batch(stream, index, 2, 12)
        whole.append((batch, index))
    resumed = batches.batches(stream, whole[2][1], 2, 12)
    for (batch, index), (again, index_again) in zip(whole[3:], resumed):
        assert index == index_again
        for name, value in batch.fields().items():
            np.testing.assert_array_equal(value, getattr(again, name))


def test_a_mixture_keeps_its_shares_everywhere() -> None:
    streams = [batches.Shuffled(Documents([1] * 50), seed=0), batches.Shuffled(Documents([2] * 50), seed=0)]
    mixture = batches.Mixture(streams, [3, 1])
    drawn = [len(mixture[i]) for i in range(2000)]
    assert drawn.count(2) == 500
    assert all(drawn[i : i + 100].count(2) in (24, 25, 26) for i in range(0, 1900, 37))
    # Each stream is read through in its own order, none of it skipped.
    first = [int(mixture[i].token[0]) for i in range(2000) if drawn[i] == 1]
    assert first == [int(streams[0][i].token[0]) for i in range(1500)]


def test_a_document_longer_than_a_row_is_named() -> None:
    with pytest.raises(ValueError, match="Document 1 has 9 tokens; a row holds 8"):
        batches.next_batch(Documents([3, 9]), 0, rows=1, length=8)


# ----------------------------------------------------------------------------------------------- prefetch


def running() -> bool:
    return any(thread.name == "prefetch" for thread in threading.enumerate())


def test_prefetch_gives_all_in_order_and_leaves_no_thread() -> None:
    with batches.prefetch(iter(range(10))) as items:
        assert list(items) == list(range(10))
    assert not running()


def test_prefetch_is_ahead_and_no_further() -> None:
    computed = []

    def make() -> Iterator[int]:
        for i in range(100):
            computed.append(i)
            yield i

    with batches.prefetch(make(), ahead=2) as items:
        assert next(items) == 0
        time.sleep(0.2)
        assert 2 <= len(computed) <= 4
    assert not running()


def test_prefetch_passes_errors_on() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("lost")

    with batches.prefetch(broken()) as items:
        assert next(items) == 1
        with pytest.raises(KeyError, match="lost"):
            next(items)
    assert not running()
