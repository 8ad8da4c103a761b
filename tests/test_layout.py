"""Law 6: text -> Program -> tokens -> Program -> text is the identity, and a trace laid out again is the same."""

from __future__ import annotations

import random

import jax
import numpy as np
import pytest

from pasta_jax.arrays import NO_TARGET, ThreadedTokens
from pasta_jax.decoding.state import Limits, Stop
from pasta_jax.decoding.trace import as_document, document_order, trace_of_row
from pasta_jax.lang import tags
from pasta_jax.lang.parse import parse
from pasta_jax.lang.program import Program, Promise, Sync, Text
from pasta_jax.lang.render import render
from pasta_jax.testing import WordTokenizer
from pasta_jax.tokens.cost import critical_path, threads_of_program
from pasta_jax.tokens.detokenize import promise_of, read, threads_of
from pasta_jax.tokens.layout import LayoutError, layout, layout_example, layout_text, promise_tokens
from pasta_jax.tokens.load import load_tokenizer
from pasta_jax.tokens.positions import Positions
from pasta_jax.visibility import visible
from tests.helpers import FULL, scripted
from tests.helpers.data import data_file, real_responses
from tests.helpers.programs import random_program
from tests.helpers.scripted import ScriptTokenizer, lines_of

WORDS = WordTokenizer(" The rivers two words moons tokens and it's é 東京 the Nile is long a b c d e f")
ROUNDS = 2000 if FULL else 200


def test_program_to_tokens_and_back(seed):
    rng = random.Random(seed)
    for _ in range(ROUNDS):
        program = random_program(rng, max_depth=3)
        document = layout(WORDS, [2, 30, 31], program, Positions(), threads=16)
        reading = read(WORDS.vocabulary, threads_of(document))
        assert reading.program == program
        assert not reading.issues
        annotated = render(program)
        assert parse(annotated) == program and render(reading.program) == annotated


@pytest.mark.parametrize(
    ("written", "topic"), [(" two", "two"), ("two  ", "two"), ("two words", "two words"), (" ", " ")]
)
def test_no_topic_ends_in_a_blank(written: str, topic: str) -> None:
    """Neither of what a model wrote nor of what it is taught."""
    ids = WORDS.vocabulary.tag_ids
    text = [*WORDS.encode(f" {written}"), ids[tags.PROMISE_TOKENS], *WORDS.encode("3")]
    tag = [ids[tags.PROMISE_OPEN], *text, ids[tags.PROMISE_CLOSE]]
    assert promise_of(WORDS.vocabulary, tag) == (topic, 3)
    assert promise_tokens(WORDS, Promise(written, 3, ())) == promise_tokens(WORDS, Promise(topic, 3, ()))


def test_trace_laid_out_again_has_the_same_fields(seed):
    """The interpreter numbers threads, segments, orders, positions and sees as the layout does."""
    rng = random.Random(seed)
    limits = Limits(lanes=4, threads=16, pool=1000)
    tokenizer = ScriptTokenizer()
    done = 0
    while done < 40:
        program = random_program(rng)
        try:
            document = layout(tokenizer, [2, 13, 14], program, Positions(), threads=16)
        except LayoutError:  # this vocabulary spells topics byte by byte, some longer than the grammar allows
            continue
        done += 1
        lines = lines_of(document)
        assert lines is not None
        assert threads_of_program(tokenizer, program) == threads_of(document)
        ask = scripted.request(900, 900)
        rows = scripted.compiled(limits, Positions(), 3)(
            np.array([[2, 13, 14]], np.int32),
            np.array([3]),
            lines[None],
            jax.tree.map(lambda x: np.asarray(x)[None], ask),
        )
        trace = trace_of_row(jax.tree.map(lambda x: np.asarray(x)[0], rows))
        assert trace.stop == Stop.EOS
        again = as_document(trace)
        for name, expected in document.fields().items():
            np.testing.assert_array_equal(getattr(again, name), expected, err_msg=name)
        assert read(tokenizer.vocabulary, trace.threads) == read(tokenizer.vocabulary, threads_of(document))
        unlimited = trace.steps if trace.widths.max(initial=0) < limits.lanes else None
        if unlimited is not None:
            assert critical_path(threads_of(document), tokenizer.vocabulary) == unlimited
        assert document_order(trace).shape == again.token.shape


def test_nested_trace_laid_out_again_is_the_same_but_for_names(seed):
    """Where promises nest, threads and segments are numbered as they were decoded; all else is equal."""
    rng = random.Random(seed)
    tokenizer = ScriptTokenizer()
    limits = Limits(lanes=4, threads=16, pool=1000, max_depth=3)
    done = 0
    while done < 20:
        program = random_program(rng, max_depth=3)
        try:
            document = layout(tokenizer, [2, 13, 14], program, Positions(), threads=16)
        except LayoutError:
            continue
        if (lines := lines_of(document)) is None:
            continue
        done += 1
        rows = scripted.compiled(limits, Positions(), 3)(
            np.array([[2, 13, 14]], np.int32),
            np.array([3]),
            lines[None],
            jax.tree.map(lambda x: np.asarray(x)[None], scripted.request(900, 900)),
        )
        trace = trace_of_row(jax.tree.map(lambda x: np.asarray(x)[0], rows))
        again = as_document(trace)
        for name in ("token", "position", "doc", "order", "target"):
            np.testing.assert_array_equal(getattr(again, name), getattr(document, name), err_msg=name)
        np.testing.assert_array_equal(visible(again, again), visible(document, document))
        first_seen = {thread: i for i, thread in reversed(list(enumerate(again.thread.tolist())))}
        names = {thread: n for n, thread in enumerate(sorted(first_seen, key=lambda t: first_seen[t]))}
        np.testing.assert_array_equal([names[t] for t in again.thread.tolist()], document.thread)


def test_worked_example():
    """Every field of one small answer, by hand."""
    program = Program((Text("a"), Promise("b", 2, (Text("c"), Text("d"))), Text("e"), Sync(), Text("f")))
    words = WordTokenizer("aa b")
    d = layout(words, [2], program, Positions(), threads=3)
    piece = words.vocabulary.pieces
    assert [piece[t].decode() for t in d.token] == [
        "", "a", '<promise topic="', " b", '" tokens=', "2", " />", "<async>", "c", "d", "</async>", "e", "<sync/>",
        "f", "",
    ]  # fmt: skip
    assert d.thread.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]
    assert d.segment.tolist() == [0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 1, 3, 3, 3]
    assert d.order.tolist() == [-1, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 6, 7, 8, 9]
    # The promise's last token is at 6, so the branch starts at 7 and main goes on at 7 + 10 * 2 + 2 = 29.
    assert d.position.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 29, 30, 31, 32]
    assert d.sees[:, 0].tolist() == [0] * 7 + [0b1] * 5 + [0b111] * 3
    e, f, sync, end = (d.token[i] for i in (11, 13, 12, 14))
    t = d.token
    assert d.target.tolist() == [
        t[1],
        t[2],
        t[3],
        t[4],
        t[5],
        t[6],
        e,
        t[8],
        t[9],
        t[10],
        NO_TARGET,
        sync,
        f,
        end,
        -1,
    ]
    # a, the tag's 5, c, d, </async> with sync, f
    assert critical_path(threads_of(d), words.vocabulary) == 10


@pytest.mark.parametrize(
    ("positions", "resumes"),
    [
        (Positions(), 29),
        (Positions("pred", 1), 11),
        (Positions("const", 40), 49),
        (Positions("oracle"), 11),
        (Positions("shared"), 7),
    ],
)
def test_position_schemes(positions, resumes):
    program = Program((Text("a"), Promise("b", 2, (Text("cd"),)), Text("e")))
    d = layout(WordTokenizer("aa b"), [2], program, positions, threads=3)
    assert d.position[11] == resumes


def test_learnt_prompt_and_plain_text():
    document = layout_text(WORDS, "the Nile is long")
    assert (document.target[:-1] == document.token[1:]).all() and document.target[-1] == NO_TARGET
    answer = layout_example(WORDS, "the Nile", Program((Text("is long"),)), threads=4)
    prompt = len(WORDS.encode_prompt("the Nile"))
    assert (answer.target[: prompt - 1] == NO_TARGET).all() and answer.target[prompt - 1] == answer.token[
        prompt
    ]


def test_limits_in_words():
    many = Program((Promise("b", 1, ()),) * 3)
    with pytest.raises(LayoutError, match="more than 2 branches.*threads above 3"):
        layout(WORDS, [2], many, Positions(), threads=3)
    with pytest.raises(LayoutError, match="topic .* takes 11 tokens; 1 to 8"):
        layout(WORDS, [2], Program((Promise("zzzzzzzzzz", 1, ()),)), Positions(), threads=3)
    with pytest.raises(ValueError, match="Use one of pred"):
        Positions("guess")  # type: ignore[arg-type]


def test_real_responses_with_a_real_tokenizer():
    """Every real response survives encoding, and so does a program made of its paragraphs."""
    tokenizer = load_tokenizer(data_file("llama2_tokenizer.model"), extend=True)
    for response in real_responses()[:: 1 if FULL else 8]:
        assert tokenizer.vocabulary.text(tokenizer.encode(response)) == response
        parts = [part for part in response.split("\n\n") if part][:14]
        program = Program((*(Promise("part", 1 + i, (Text(part),)) for i, part in enumerate(parts)), Sync()))
        document = layout(tokenizer, [1], program, Positions(), threads=16)
        assert read(tokenizer.vocabulary, threads_of(document)).program == program
        tag_ids = set(tokenizer.vocabulary.tag_ids.values())
        assert sum(int(t) in tag_ids for t in document.token) == 5 * len(parts) + 1


def test_layout_sees_what_the_tree_says(seed):
    """Visibility of a layout against the definition: walk the tree, do not trust the numbering."""
    rng = random.Random(seed)
    for _ in range(40):
        d = layout(WORDS, [2], random_program(rng, max_depth=3), Positions(), threads=16)
        np.testing.assert_array_equal(visible(d, d), sight_of(d))
        assert not np.triu(
            visible(d, d), 1
        ).any()  # what a whole pass may count on (layers.attend_to_earlier)


def sight_of(document: ThreadedTokens) -> np.ndarray:
    """Bool [L, L]: a branch begins with what its parent had in sight; a sync and an end show what was promised."""
    ids = WORDS.vocabulary.tag_ids
    joins = (ids[tags.SYNC], ids[tags.ASYNC_CLOSE], WORDS.vocabulary.eos)
    sight: dict[int, set[int]] = {0: set()}
    unjoined: dict[int, list[int]] = {0: []}
    expected = np.zeros((len(document), len(document)), bool)
    for place, (thread, token) in enumerate(zip(document.thread.tolist(), document.token.tolist())):
        if thread not in sight:
            parent = int(document.thread[place - 1])
            sight[thread], unjoined[thread] = set(sight[parent]), []
            unjoined[parent].append(thread)
        if token in joins:
            sight[thread] = sight[thread].union(*(sight[branch] for branch in unjoined[thread]))
            unjoined[thread] = []
        sight[thread].add(place)
        expected[place, sorted(sight[thread])] = True
    return expected
