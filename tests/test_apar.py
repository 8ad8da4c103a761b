"""The rival APAR: its rule on plain answers, its dialect in a layout, its data and checkpoints."""

from __future__ import annotations

import dataclasses
import random
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pasta_jax
from pasta_jax.arrays import NO_TARGET
from pasta_jax.baselines import apar
from pasta_jax.checkpoints.load import load_params
from pasta_jax.checkpoints.save import Checkpoints
from pasta_jax.config import DataConfig
from pasta_jax.data import almanac
from pasta_jax.data.almanac import Section
from pasta_jax.data.almanac.facts import KIND_OF
from pasta_jax.data.sources import make_source, make_tokenizer
from pasta_jax.decoding.state import Limits, Stop
from pasta_jax.decoding.trace import as_document, trace_of_row
from pasta_jax.lang import tags
from pasta_jax.lang.assemble import assemble
from pasta_jax.lang.grammar import Kind
from pasta_jax.lang.parse import ParseError, parse, parse_lenient
from pasta_jax.lang.program import Node, Program, Promise, Sync, Text
from pasta_jax.lang.render import joined, render
from pasta_jax.model import init_params
from pasta_jax.overrides import differences, load_config
from pasta_jax.testing import WordTokenizer
from pasta_jax.tokens.cost import critical_path
from pasta_jax.tokens.detokenize import read, threads_of
from pasta_jax.tokens.layout import LayoutError, layout, layout_example
from pasta_jax.tokens.positions import Positions
from pasta_jax.training.state import TrainState, new_state
from pasta_jax.visibility import visible
from tests.helpers import scripted
from tests.helpers.programs import random_program
from tests.helpers.scripted import ScriptTokenizer, lines_of

SHARED = Positions("shared")


def words(*texts: str) -> WordTokenizer:
    tokenizer = WordTokenizer(*texts)
    tokenizer.vocabulary = tokenizer.vocabulary.with_dialect("apar")
    return tokenizer


WORDS = words(" The rivers two words moons tokens and it's é 東京 the Nile is long a b c d e f")
FORK = WORDS.vocabulary.tag_ids[tags.PROMISE_CLOSE]


def random_apar(rng: random.Random, max_depth: int = 1) -> Program:
    """A random program of the dialect: bare promises, no sync."""

    def bare(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
        kept = (node for node in nodes if not isinstance(node, Sync))
        return joined(Promise("", 0, bare(n.block)) if isinstance(n, Promise) else n for n in kept)

    return Program(bare(random_program(rng, max_depth=max_depth).nodes))


# -------------------------------------------------------------------------------------------------- the rule


def annotated(task: almanac.Task) -> str:
    return render(apar.annotate(almanac.plain(task)))


def test_a_list_forks_at_every_colon():
    assert annotated(almanac.list_task(("France", "Japan"), ("capital", "currency"))) == (
        "- France:<promise/><async> Its capital is Paris. Its currency is the euro.</async>\n"
        "- Japan:<promise/><async> Its capital is Tokyo. Its currency is the yen.</async>\n"
    )


def test_a_conclusion_stays_in_main_and_never_sees_what_it_is_about():
    superlative = next(s for s in KIND_OF["Neon"].superlatives if s.noun == "atomic number")
    task = almanac.compare_task(("Neon", "Palladium"), ("symbol", "atomic number"), superlative)
    program = apar.annotate(almanac.plain(task))
    assert program.nodes[-1] == Text("\n" + task.conclusion)
    assert len(list(program.promises())) == 2
    tokenizer = words(task.prompt, almanac.plain(task))
    document = layout_example(tokenizer, task.prompt, program, positions=SHARED)
    conclusion = len(tokenizer.encode(task.conclusion))
    in_main = visible(document, document)[-1 - conclusion : -1]  # the last is the answer's end
    assert in_main[:, document.thread == 0].any()
    assert not in_main[:, document.thread != 0].any()


def test_a_chain_forks_after_each_first_sentence():
    assert annotated(almanac.chain_task("Iron", 2, "symbol")) == (
        "1. After Iron comes Cobalt.<promise/><async> Its symbol is Co.</async>\n"
        "2. After Cobalt comes Nickel.<promise/><async> Its symbol is Ni.</async>\n"
    )


def test_a_report_has_both_kinds_and_its_headings_stay():
    sections = [Section(("Argon",), ("symbol", "group")), Section(("Peru", "Japan"), ("capital",))]
    assert annotated(almanac.report_task(sections)) == (
        "## Argon\nIts symbol is Ar.<promise/><async> Its group is 18.</async>\n"
        "## Countries\n- Peru:<promise/><async> Its capital is Lima.</async>\n"
        "- Japan:<promise/><async> Its capital is Tokyo.</async>\n"
    )


@pytest.mark.parametrize(
    "task",
    [
        almanac.prose_task(
            ("Argon", "Neon", "Iron"), ("symbol", "group")
        ),  # one paragraph: one fork, too few
        almanac.single_task(almanac.Fact("Peru", "capital")),
        almanac.mixed_task(("Iron", "Neon"), (3, 2)),  # every line is one sentence
    ],
    ids=lambda task: task.family,
)
def test_what_stays_plain(task):
    assert apar.annotate(almanac.plain(task)).nodes == (Text(almanac.plain(task)),)


@pytest.mark.parametrize(
    ("line", "head"),
    [
        ("- Peru: 10 letters", "- Peru:"),
        ("- Peru: 9 letters", None),  # these are nine characters
        ("  2. Peru: It is a country.", "  2. Peru:"),
        ("Peru: It is a country. It is large.", "Peru: It is a country."),  # no list item
        ("- At 10:30 we go. Nobody waits.", "- At 10:30 we go."),
        ("10. It is far. Nobody goes there.", "10. It is far."),
        ("Which is newest? Palladium is.", None),  # a sentence ends with a full stop
        ("# Peru: It is a country. It is large.", None),
        ("", None),
    ],
)
def test_where_a_head_ends(line, head):
    assert line[: apar.head_end(line)] == (line if head is None else head)


def test_the_text_is_never_altered(seed):
    rng = np.random.default_rng(seed)
    forks = dict.fromkeys(almanac.FAMILIES, 0)
    for family in almanac.FAMILIES:
        for _ in range(50):
            text = almanac.plain(almanac.training_task(rng, family))
            program = apar.annotate(text)
            assert assemble(program) == text
            count = len(list(program.promises()))
            assert count == 0 or count >= apar.MIN_FORKS
            forks[family] += count
    assert {family for family, count in forks.items() if count} == {"list", "compare", "chain", "report"}


# ---------------------------------------------------------------------------------------------- the language


def test_bare_promises_are_read_in_their_dialect_only():
    program = Program((Text("a:"), Promise("", 0, (Text("b"),))))
    text = render(program)
    assert text == "a:<promise/><async>b</async>"
    with pytest.raises(ParseError, match="the promise has no topic"):
        parse(text)
    assert assemble(parse_lenient(text)[0]) == "a:<promise/>b"
    assert parse("<promise/>").nodes == (Text("<promise/>"),)
    assert parse(text, dialect="apar") == program
    assert parse("<promise/> ", dialect="apar").nodes == (Text("<promise/> "),)
    with pytest.raises(ParseError, match="line 1, column 20: a promise nested deeper"):
        parse(f"<promise/><async>a {text}</async>".replace("a:", ""), max_depth=1, dialect="apar")


def test_dialects_share_ids_and_no_kind_of_promise():
    one, other = WORDS.vocabulary.with_dialect("pasta"), WORDS.vocabulary
    assert one.tag_ids == other.tag_ids and len(one) == len(other)
    assert other.with_dialect("pasta") == one and one.with_dialect("apar") == other
    assert Kind.FORK not in one.kinds
    assert not {Kind.OPEN, Kind.TOKENS, Kind.CLOSE, Kind.SYNC} & {int(kind) for kind in other.kinds}
    assert other.kinds[FORK] == Kind.FORK and other.text([FORK]) == "<promise/>"
    differ = np.flatnonzero(one.kinds != other.kinds)
    assert sorted(differ) == sorted(
        one.tag_ids[piece]
        for piece in (tags.PROMISE_OPEN, tags.PROMISE_TOKENS, tags.PROMISE_CLOSE, tags.SYNC)
    )


def test_a_program_of_the_other_dialect_is_refused():
    bare, full = Program((Promise("", 0, ()),)), Program((Promise("b", 1, ()),))
    pasta = WordTokenizer("a b")
    with pytest.raises(LayoutError, match=r"Set --config.data.dialect=apar"):
        layout(pasta, [2], bare, SHARED, threads=3)
    for program in (full, Program((Sync(),))):
        with pytest.raises(LayoutError, match=r"Set --config.data.dialect=pasta"):
            layout(words("a b"), [2], program, SHARED, threads=3)


# -------------------------------------------------------------------------------------- layout and visibility


def test_worked_example():
    """Two forks by hand: main sees no child before its end, children see main up to their fork and themselves."""
    program = Program(
        (Text("a"), Promise("", 0, (Text("b"),)), Text("c"), Promise("", 0, (Text("d"),)), Text("e"))
    )
    tokenizer = words()
    d = layout(tokenizer, [2], program, SHARED, threads=3)
    assert tokenizer.vocabulary.text(d.token) == "a<promise/><async>b</async>c<promise/><async>d</async>e"
    rows = [
        "1............",  # the prompt
        "11...........",  # a
        "111..........",  # <promise/>
        "1111.........",  # <async>
        "11111........",  # b
        "111111.......",  # </async>
        "111...1......",  # c
        "111...11.....",  # <promise/>
        "111...111....",  # <async>
        "111...1111...",  # d
        "111...11111..",  # </async>
        "111...11...1.",  # e
        "1111111111111",  # the end joins; nothing follows it
    ]
    np.testing.assert_array_equal(visible(d, d), [[cell == "1" for cell in row] for row in rows])
    assert d.thread.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 2, 2, 2, 0, 0]
    assert d.position.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 5, 6]
    a, fork, _, b, close, c, _, _, dd, _, e, end = d.token[1:]
    assert d.target.tolist() == [
        a,
        fork,
        c,
        b,
        close,
        NO_TARGET,
        fork,
        e,
        dd,
        close,
        NO_TARGET,
        end,
        NO_TARGET,
    ]
    answer = threads_of(d)
    assert (
        critical_path(answer, tokenizer.vocabulary) == 5
    )  # a, fork, c, fork, e; the branches are done beside it


def test_program_to_tokens_and_back(seed):
    rng = random.Random(seed)
    for _ in range(200):
        program = random_apar(rng, max_depth=2)
        document = layout(WORDS, [2, 30, 31], program, SHARED, threads=16)
        reading = read(WORDS.vocabulary, threads_of(document))
        assert reading.program == program and not reading.issues


@pytest.mark.slow
@pytest.mark.parametrize("positions", [SHARED, Positions()])
def test_trace_laid_out_again_has_the_same_fields(positions, seed):
    """Digits in the text are no length of a fork, whatever the position scheme."""
    rng = random.Random(seed)
    tokenizer = ScriptTokenizer()
    tokenizer.vocabulary = tokenizer.vocabulary.with_dialect("apar")
    limits = Limits(lanes=4, threads=16, pool=1000)
    forks = 0
    for _ in range(30):
        program = random_apar(rng)
        document = layout(tokenizer, [2, 13, 14], program, positions, threads=16)
        lines = lines_of(document)
        assert lines is not None
        rows = scripted.compiled(limits, positions, 3, "apar")(
            np.array([[2, 13, 14]], np.int32),
            np.array([3]),
            lines[None],
            jax.tree.map(lambda x: np.asarray(x)[None], scripted.request(900, 900)),
        )
        trace = trace_of_row(jax.tree.map(lambda x: np.asarray(x)[0], rows))
        assert trace.stop == Stop.EOS
        again = as_document(trace)
        for name, expected in document.fields().items():
            np.testing.assert_array_equal(getattr(again, name), expected, err_msg=name)
        if trace.widths.max(initial=0) < limits.lanes:
            assert critical_path(threads_of(document), tokenizer.vocabulary) == trace.steps
        forks += len(trace.parent) - 1
    assert forks > 20


# --------------------------------------------------------------------------------------- data and checkpoints


TINY = str(Path(__file__).parents[1] / "configs" / "tiny.py")
CONFIG = load_config(f"{TINY}:apar")


@pytest.mark.slow
def test_it_is_trained_as_pasta_is():
    pasta = load_config(f"{TINY}:pasta")
    assert differences(pasta, CONFIG) == ["data.sources", "data.positions.scheme", "data.dialect"]
    assert (CONFIG.data.positions, CONFIG.data.dialect) == (SHARED, "apar")


def test_the_source_is_the_rule_on_plain_answers():
    tokenizer = make_tokenizer(CONFIG.data)
    source, plain = (almanac.source(which, tokenizer, positions=SHARED) for which in ("apar", "plain"))
    programs = [
        [read(tokenizer.vocabulary, threads_of(source_or_plain[i])).program for i in range(20)]
        for source_or_plain in (source, plain)
    ]
    assert programs[0] == [apar.annotate(assemble(program)) for program in programs[1]]
    assert any(list(program.promises()) for program in programs[0])
    stream = make_source(CONFIG.data, tokenizer, seed=0)
    np.testing.assert_array_equal(stream[3].token, source[3].token)
    wrong = dataclasses.replace(CONFIG.data, dialect="pasta")
    stream = make_source(wrong, make_tokenizer(wrong), seed=0)
    with pytest.raises(LayoutError, match=r"dialect=apar"):
        all(stream[i] for i in range(20))


@pytest.mark.slow
def test_a_checkpoint_keeps_its_dialect(tmp_path: Path) -> None:
    state = new_state(init_params(CONFIG.model, jax.random.key(0)), optax.adamw(1e-3))
    with Checkpoints(tmp_path, CONFIG, make_tokenizer(CONFIG.data)) as run:
        run.save(TrainState(state.params, state.opt_state, jnp.int32(1)), data_index=0)
    model = pasta_jax.load(tmp_path)
    assert model.tokenizer.vocabulary == make_tokenizer(CONFIG.data).vocabulary
    assert model.tokenizer.vocabulary.dialect == "apar" and model.positions == SHARED
    _, about = load_params(tmp_path)
    pasta = make_tokenizer(DataConfig())
    assert pasta.vocabulary.dialect == "pasta"
    retrained: Any = types.SimpleNamespace(vocabulary=pasta.vocabulary, to_bytes=lambda: b"other bytes")
    assert about.matches_tokenizer(pasta) and about.matches_tokenizer(retrained), (
        "a dialect is no other tokenizer"
    )
    retrained.vocabulary = WORDS.vocabulary
    assert not about.matches_tokenizer(retrained)
